"""The outer-product recurrence with a decay for each feature, whose pairs are products of matrices over halves of a chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.recurrence import _outer_kernel, outer_product_recurrence

STEPS = 70


def sample(dtype):
    """Query, key, value, log decays over twelve orders of magnitude, among them 0 and -inf, and segment ids."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 2, STEPS, 2, 5))
    value = rng.normal(size=(2, STEPS, 2, 3))
    decay = -(10.0 ** rng.uniform(-8, 4, size=query.shape))
    decay[rng.random(decay.shape) < 0.1] = 0
    decay[rng.random(decay.shape) < 0.02] = -np.inf
    ids = np.cumsum(rng.random((2, STEPS)) < 0.06, axis=1)
    return [x.astype(dtype) for x in (query, key, value, decay)], ids


def results(arrays, ids, **options):
    """Outputs, the last state, and the gradients of a weighted sum of both, in one program."""

    def call(query, key, value, decay):
        return outer_product_recurrence(
            query, key, value, log_decay=decay, segment_ids=ids, return_state=True, **options
        )

    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(call, *arrays)
        return out, pull(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), out))

    return run(arrays)


@functools.cache
def by_scan(segmented):
    """The sample's results by the recurrence, in float64."""
    arrays, ids = sample(np.float64)
    return results(arrays, ids if segmented else None, implementation="scan")


@pytest.mark.parametrize("segmented", [False, True], ids=["one row", "segments"])
@pytest.mark.parametrize("size", [None, 16, 37, 48])
def test_decays_for_each_feature_equal_the_recurrence(size, segmented, x64):
    """Chunks that are powers of two and such that are not, several of them, the last one not full."""
    arrays, ids = sample(np.float64)
    actual = results(arrays, ids if segmented else None, implementation="chunked", chunk_size=size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), actual, by_scan(segmented))


def test_small_decays_beside_large_ones_stay_exact(x64):
    """A difference of cumulative sums would lose what comes after a step that forgets nearly all."""
    arrays, _ = sample(np.float32)
    decay = np.full_like(arrays[3], -1e-3)
    decay[:, 3] = -1e4
    expected = results([x.astype(np.float64) for x in (*arrays[:3], decay)], None, implementation="scan")
    actual = results([*arrays[:3], decay], None, implementation="chunked")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize(
    ("features", "width", "heads", "size"),
    [(5, 5, 2, 6), (5, 5, 2, 2), (5, 5, 4, 3), (3, 5, 2, 4), (5, 4, 2, 3)],
    ids=["in one", "in three", "in two of key heads", "in values alone", "nowhere"],
)
def test_states_wait_in_cotangents(features, width, heads, size, x64):
    """Where the states at the chunk starts lie in the rows of cotangents not yet written, in one or in several, and where they do not fit."""
    rng = np.random.default_rng(1)
    query, key = (rng.normal(size=(2, 23, n, features)) for n in (heads, 2))
    value = rng.normal(size=(2, 23, 2, width))
    ids = np.cumsum(rng.random((2, 23)) < 0.1, axis=1)

    @jax.jit
    def gradients(*arrays):
        def loss(options, *arrays):
            out = outer_product_recurrence(*arrays, segment_ids=ids, **options)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape))

        forms = {"implementation": "scan"}, {"implementation": "chunked", "chunk_size": size}
        return [jax.grad(functools.partial(loss, options), argnums=(0, 1, 2))(*arrays) for options in forms]

    expected, actual = gradients(query, key, value)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), actual, expected)


@pytest.mark.parametrize(("width", "size"), [(64, None), (32, None), (64, 32)], ids=["alike", "narrow values", "short"])
def test_gradients_keep_no_states_apart(width, size):
    """Outputs and gradients aside, twice the steps need no more memory: the states lie where the gradients will, and nothing is copied whole."""

    def both(*arrays):
        out, pull = jax.vjp(lambda *x: outer_product_recurrence(*x, implementation="chunked", chunk_size=size), *arrays)
        return out, pull(out)

    def used(steps):
        shapes = [jax.ShapeDtypeStruct((1, steps, 4, n), jnp.float32) for n in (64, 64, width)]
        return jax.jit(both).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert used(4096) <= 1.01 * used(2048)


@pytest.mark.parametrize("decays", ["none", "a head", "a feature"])
def test_rows_side_by_side_go_in_sections(decays, monkeypatch, x64):
    """Chunks are side by side within a section; sections follow each other, the last one not full."""
    (*arrays, decay), ids = sample(np.float64)
    state = np.random.default_rng(1).normal(size=(2, 2, 5, 3))
    decay = {"none": None, "a head": decay[..., 0], "a feature": decay}[decays]

    def run(**options):
        def call(arrays, decay, state):
            return outer_product_recurrence(
                *arrays, log_decay=decay, initial_state=state, segment_ids=ids, return_state=True, **options
            )

        @jax.jit
        def both(arrays, decay, state):
            out, pull = jax.vjp(call, arrays, decay, state)
            return out, pull(jax.tree.map(jnp.cos, out))

        return both(arrays, decay, state)

    expected = run(implementation="scan")
    monkeypatch.setattr(_outer_kernel, "_SECTION", 25)
    assert _outer_kernel.section_of(STEPS, 8) == 24
    actual = run(implementation="parallel", chunk_size=8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), actual, expected)


def test_rows_side_by_side_need_the_memory_of_a_section():
    def both(*arrays):
        out, pull = jax.vjp(lambda *x: outer_product_recurrence(*x, implementation="parallel"), *arrays)
        return out, pull(out)

    def used(steps):
        shapes = [jax.ShapeDtypeStruct((1, steps, 2, 64), jnp.float32)] * 3
        return jax.jit(both).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    section = _outer_kernel._SECTION
    assert used(4 * section) <= 1.1 * used(2 * section)


def test_a_state_that_is_no_pair_is_refused():
    ones = np.ones((1, 3, 2, 4), np.float32)
    for state in (3, None, ones[0]), 3, ones:
        with pytest.raises(ValueError, match=r"initial_state must be a pair \(S, z\) of shapes"):
            outer_product_recurrence(ones, ones, ones, normalize=True, initial_state=state)
