"""Types and sizes of numbers that calls must not break on: sums in half precision, extreme features, scales and states."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import (
    MIXERS,
    cosine_features,
    delta_rule_attention,
    dot_product_attention,
    efficient_attention,
    linear_attention,
    linformer_attention,
    performer_attention,
    random_features,
    retention_attention,
)
from effattn_jax.mixing import gmlp
from effattn_jax.position import rotary_linear_attention


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights_of(mixer):
    """Numbers in the shapes of the weights of two heads of 4 features, with no draw to compile."""
    if mixer.weights is None:
        return {}
    length = {"length": 8} if "length" in inspect.signature(mixer.weights).parameters else {}
    shapes = jax.eval_shape(lambda: mixer.weights(jax.random.key(4), 2, 2, 4, **length))
    rng = np.random.default_rng(4)
    return {name: rng.normal(size=leaf.shape).astype(leaf.dtype) for name, leaf in shapes.items()}


BOTH_WAYS = {
    "retention": lambda q, k, v: retention_attention(q, k, v, decay=jnp.full(1, 0.9)),
    "delta rule": lambda q, k, v: delta_rule_attention(q, k, v, beta=jnp.full(k.shape[:3], 0.5)),
    "efficient": lambda q, k, v: efficient_attention(q, k, v, segment_ids=np.zeros((1, 11), np.int32)),
    "rotary linear": lambda q, k, v: rotary_linear_attention(
        q, k, v, query_positions=jnp.zeros((1, 11), int), normalize=False, feature_map="relu", segment_ids=np.zeros((1, 11), np.int32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_past_and_future_are_added_before_they_are_rounded(name):
    """Values that cancel: rounding each of the two sums leaves an error as large as the result, or Inf - Inf in float16."""
    ones, call = np.full((1, 11, 1, 2), 0.5, np.float32), jax.jit(BOTH_WAYS[name])
    for dtype, size in ((jnp.bfloat16, 100.3), (jnp.float16, 3e4)):
        value = np.array([size] * 5 + [0.5] + [-size] * 5, dtype).reshape(1, 11, 1, 1)
        got = call(ones.astype(dtype), ones.astype(dtype), value)
        wide = call(ones, ones, value.astype(np.float32))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.asarray(wide).astype(dtype))


OPTIONS = {
    "causal": {"is_causal": True},
    "all": {},
    "dense": {"implementation": "dense"},
    "segments": {"segment_ids": np.zeros((1, 6), np.int32)},
}


@functools.cache
def quotient_derivatives(case):
    """First and second derivatives by features of any size, in one program."""
    query, key = (np.abs(normal(i, 1, 6, 1, 4)) + np.float32(0.5) for i in (0, 1))
    value = normal(2, 1, 6, 1, 4)

    @jax.jit
    def derivatives(size):
        def loss(query, key):
            out = linear_attention(query * size, key * size, value, feature_map="relu", **OPTIONS[case])
            return jnp.sum(out**2)

        def slope(query, key):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss, (0, 1))(query, key))

        return [*jax.grad(loss, (0, 1))(query, key), *jax.grad(slope, (0, 1))(query, key)]

    return derivatives


@pytest.mark.parametrize("size", [1e-10, 1e10])
@pytest.mark.parametrize("case", OPTIONS)
def test_gradients_of_a_quotient_at_every_size_of_features(size, case):
    """The sums are 1e-20 or 1e20, whose squares float32 does not hold; first and second derivatives are those at size 1."""
    derivatives = quotient_derivatives(case)
    for got, expected in zip(derivatives(size), derivatives(1.0), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_performer_has_gradients_where_it_has_weights():
    """Norms of 30, at which sums of features leave the range of float32's square root."""
    query, key, value = (normal(i, 1, 5, 1, 8) for i in range(3))
    query, key = (x * 30 / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))

    @jax.jit
    def gradients(query, key):
        projection = random_features(jax.random.key(0), 32, 8)

        def loss(query, key):
            out = performer_attention(query, key, value, projection=projection, is_causal=True)
            return jnp.sum(out * jnp.cos(out))

        return jax.grad(loss, (0, 1))(query, key)

    assert all(np.isfinite(g).all() for g in gradients(query, key))


@pytest.mark.parametrize("kernel", [linear_attention, efficient_attention, dot_product_attention])
def test_scales_that_half_precision_does_not_hold(kernel):
    half = [normal(i, 1, 6, 1, 4).astype(np.float16) for i in range(3)]
    wide = [x.astype(np.float32) for x in half]
    options = {"feature_map": "relu"} if kernel is linear_attention else {}
    scales = (1e5, jnp.float32(1e5))

    @jax.jit
    def run(half, wide):
        return [kernel(*half, scale=scale, **options) for scale in scales], kernel(*wide, scale=1e5, **options)

    found, expected = run(half, wide)
    for got in found:
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_exponentials_of_large_keys_pair_by_pair():
    """Segments that queries and keys have apart, and the dense form, which go through all pairs."""
    query, key, value = normal(0, 1, 6, 1, 4), normal(1, 1, 6, 1, 4) + 100, normal(2, 1, 6, 1, 4)
    ids, exp = np.zeros((1, 6), np.int32), {"feature_map": "exp"}

    @jax.jit
    def run(query, key, value):
        forms = ({"segment_ids": (ids, ids.copy())}, {"implementation": "dense"})
        found = [linear_attention(query, key, value, **exp, **options) for options in forms]
        return found, linear_attention(query, key - 100, value, **exp)

    found, expected = run(query, key, value)
    for got in found:
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "efficient", "delta_rule", "performer"])
def test_a_narrow_state_does_not_narrow_the_sums(name):
    """A state that was cast to bfloat16 is a rounded one; what is added to it is added in float32, and in float64 to float64."""
    mixer = MIXERS[name]
    query, key, value = (normal(i, 1, 9, 2, 4) for i in range(3))
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), query)
    options = {**mixer.options, **extras, **weights_of(mixer), "is_causal": True, "return_state": True}
    call = jax.jit(lambda state: mixer.function(query, key, value, initial_state=state, **options))

    def floats(state, dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    state = jax.tree.map(np.asarray, call(None)[1])
    narrow = floats(state, jnp.bfloat16)
    for got, expected in zip(
        jax.tree.leaves(call(narrow)), jax.tree.leaves(call(floats(narrow, jnp.float32))), strict=True
    ):
        assert got.dtype == expected.dtype != jnp.bfloat16
        np.testing.assert_array_equal(got, expected)


def test_gmlp_in_float16_where_what_is_inside_is_larger():
    kernel = np.random.default_rng(1).uniform(50, 100, (4, 8)).astype(np.float32)
    inputs, ones, zeros = np.linspace(100, 900, 12, dtype=np.float32).reshape(3, 4), np.ones, np.zeros
    rest = (kernel, zeros(8), zeros((3, 3)), ones(3), ones(4), zeros(4), 1e-3 * ones((4, 4)), zeros(4))
    rest = [x.astype(np.float32) for x in rest]
    narrow, wide = jax.jit(lambda *x: (gmlp(x[0].astype(jnp.float16), *x[1:]), gmlp(*x)))(inputs, *rest)
    assert narrow.dtype == jnp.float16
    np.testing.assert_allclose(narrow, wide, rtol=2e-3)


def test_decay_zero_has_a_gradient():
    query, key, value = (normal(i, 1, 6, 2, 4) for i in range(3))
    gradient = jax.jit(jax.grad(lambda d: retention_attention(query, key, value, decay=d, is_causal=True).sum()))(
        np.float32([0.0, 1.0])
    )
    assert gradient[0] == 0 and np.isfinite(gradient[1])


def test_cosines_of_the_largest_numbers():
    features = jax.jit(cosine_features)
    for size in (9e37, 3.4e38):
        np.testing.assert_allclose(features(np.full(2, size, np.float32)), [1, 0.5**0.5, 0.5**0.5], rtol=1e-6)


# Of the table all with segments.
ALIGNED = sorted(n for n in MIXERS if "causality" not in MIXERS[n].exempt)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ALIGNED)
def test_padding_in_front_may_hold_nan_in_queries_too(name, is_causal):
    """A query that sees no key gives 0 and passes nothing back, whatever it holds; a state that came in is something to see."""
    mixer, mask = MIXERS[name], np.array([False, False, True, True, True])
    arrays = [normal(i, 1, 5, 2, 4) for i in range(3)]
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), arrays[0])
    hidden = {} if is_causal else {"segment_ids": np.array([[0, 0, 1, 1, 1]])}
    weights = {**weights_of(mixer), "scale": np.float32(0.7)}

    def loss(arrays, weights):
        options = {**mixer.options, **extras, **weights, **hidden}
        out = mixer.function(*arrays, mask=mask[None, None, None], is_causal=is_causal, **options)
        return jnp.sum(out**2), out

    padding = np.array([True, True, False, False, False])[None, :, None, None]
    poisoned, clean = ([np.where(padding, fill, x).astype(np.float32) for x in arrays] for fill in (np.nan, 0))
    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    got, expected = (gradient(xs, weights) for xs in (poisoned, clean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert not np.any(np.asarray(got[1])[:, :2])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["softmax", "synthesizer_dense", "synthesizer_factorized_dense", "synthesizer_mixed"])
def test_a_document_that_goes_on_after_another_is_seen(name, is_causal):
    """The last token's own key is hidden, and so is the whole of its stretch; those of its id before another document are not."""
    arrays, ids = [normal(i, 1, 5, 2, 4) for i in range(3)], np.array([[1, 1, 2, 2, 1]])
    shown = np.array([True] * 4 + [False])
    options = {"scale": np.float32(0.7), "segment_ids": ids, "is_causal": is_causal, **weights_of(MIXERS[name])}
    masks = shown[None, None, None], np.broadcast_to(shown, (1, 1, 5, 5))
    run = jax.jit(lambda arrays, masks: [MIXERS[name].function(*arrays, mask=mask, **options) for mask in masks])
    by_keys, by_pairs = map(np.asarray, run(arrays, masks))
    np.testing.assert_allclose(by_keys[:, 4], by_pairs[:, 4], atol=1e-6)


@pytest.mark.parametrize("keys", [3, 0])
def test_linformer_without_any_key(keys):
    """A row of padding alone gives 0 and passes nothing back, whatever its queries hold."""
    query, key = np.full((1, 2, 1, 4), np.nan, np.float32), np.ones((1, keys, 1, 4), np.float32)

    def loss(query, table):
        mask, tables = np.zeros((1, 1, 1, keys), bool), {"key_projection": table, "value_projection": table}
        return linformer_attention(query, key, key, mask=mask, **tables).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(query, np.ones((2, 5), np.float32))
    assert value == 0 and not any(np.any(np.asarray(g) != 0) for g in grads)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 4), (4, 2)])
@pytest.mark.parametrize("name", ["linear", "performer", "delta_rule"])
def test_masks_where_lengths_differ(name, lengths, is_causal):
    """A mask of all keys changes nothing, and a hidden key in front neither."""
    mixer, (length, keys) = MIXERS[name], lengths
    query, key, value = normal(0, 1, length, 2, 4), normal(1, 1, keys, 2, 4), normal(2, 1, keys, 2, 4)
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), key)
    rows = {"query": query, "key": key, "value": value, **extras}
    calls = [rows, {**rows, "mask": np.ones((1, 1, 1, keys), bool)}]
    if length <= keys:  # else queries would move to other keys
        front = lambda x, fill=0.0: np.pad(x, [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)  # noqa: E731
        hidden = {"key": front(key, np.nan), "value": front(value, np.nan), **{n: front(x) for n, x in extras.items()}}
        calls.append({"query": query, **hidden, "mask": (np.arange(keys + 1) > 0)[None, None, None]})
    options = {"is_causal": is_causal, **mixer.options, **weights_of(mixer)}
    plain, whole, *moved = jax.jit(lambda calls: [mixer.function(**inputs, **options) for inputs in calls])(calls)
    np.testing.assert_allclose(whole, plain, rtol=1e-6, atol=1e-7)
    for out in moved:
        np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, option",
    [("local", "window"), ("sparse", "window"), ("atrous", "dilation"), ("fixed", "block"), ("topk", "k")],
)
def test_patterns_larger_than_any_row(name, option):
    """Up to sys.maxsize and beyond: as a number that is just larger than the row, in both forms."""
    mixer, x = MIXERS[name], normal(0, 1, 9, 1, 4)
    forms = ({"implementation": "dense"}, {"implementation": "chunked"})

    @jax.jit
    def run(x):
        def call(size, form):
            return mixer.function(x, x, x, is_causal=True, **mixer.options | {option: size}, **form)

        return [[call(size, form) for size in (2**31 - 1, 2**65, 30)] for form in forms]

    for *calls, expected in run(x):
        for got in calls:
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_call_of_no_tokens_leaves_the_segment_in_progress():
    x, ids = normal(0, 1, 4, 2, 4), np.full((1, 4), 7)

    @jax.jit
    def run(x):
        options = {"is_causal": True, "return_state": True}
        _, state = dot_product_attention(x, x, x, segment_ids=ids, **options)
        none = x[:, :0]
        return dot_product_attention(none, none, none, segment_ids=ids[:, :0], initial_state=state, **options)[1]

    assert run(x).last == 7
