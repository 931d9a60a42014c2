"""What the laws do not say of the attention-free mixers: the published forms, RepMLP's merge, FNet's lengths, states by place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import mixing
from tests.laws import token_references as references
from tests.laws.checks import widened


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rep_weights(groups, length, seed=0):
    """A kernel, convolutions of odd and even widths, one wider than the row, a bias, and norms with statistics of their own."""
    rng = np.random.default_rng(seed)
    convolutions = [rng.normal(size=(groups, w)) for w in (1, 2, 3, 17)]
    norms = [
        mixing.BranchNorm(*rng.normal(size=(3, groups)), rng.uniform(0.5, 2, groups))
        for _ in range(len(convolutions) + 1)
    ]
    return rng.normal(size=(groups, length, length)), convolutions, rng.normal(size=(groups, length)), norms


@pytest.mark.parametrize("is_causal", [False, True], ids=["centred", "causal"])
@pytest.mark.parametrize("groups, length", [(1, 12), (3, 12), (2, 9)])
def test_merged_rep_mlp_equals_its_branches(x64, groups, length, is_causal):
    """Linear map, convolutions and norms, each by itself and summed, against the one kernel; a shorter row takes the leading part."""
    x, (kernel, convolutions, bias, norms) = random(2, 9, 6), rep_weights(groups, length)

    @jax.jit
    def run(x):
        merged = mixing.merge_rep_mlp(kernel, convolutions, bias, norms, is_causal=is_causal)
        expected = [references.rep_mlp(row, is_causal, kernel, convolutions, bias, norms) for row in x]
        branches = mixing.rep_mlp(x, kernel, convolutions, bias, norms, is_causal=is_causal)
        return mixing.token_mixing(x, *merged, is_causal=is_causal), branches, jnp.stack(expected)

    out, branches, expected = run(x)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(branches, out, rtol=1e-12, atol=1e-12)


def test_a_convolution_is_what_it_makes_of_the_identity(x64):
    kernel = random(1, 5)

    @jax.jit
    def run(kernel):
        expected = jnp.einsum("w,wnd->nd", kernel[0], references.lags(jnp.eye(8), 5, False))
        return mixing.merge_rep_mlp(np.zeros((8, 8)), [kernel]), expected

    (merged, bias), expected = jax.tree.map(np.asarray, run(kernel))
    assert not np.any(bias)
    np.testing.assert_allclose(merged[0], expected)


@pytest.mark.parametrize("mistake, words", [
    ({"norms": []}, "norms must be one for the linear branch and one a convolution, 2; got"),
    ({"convolutions": [np.ones((2, 3))]}, r"convolutions\[0\] must have shape \(1, W\); got \(2, 3\)"),
    ({"kernel": np.ones((4, 5))}, r"kernel must have shape \(5, 5\); got \(4, 5\)"),
    ({"bias": np.ones(3)}, r"bias must have shape \(4,\); got \(3,\)"),
])  # fmt: skip
def test_merge_mistakes(mistake, words):
    with pytest.raises(ValueError, match=words):
        mixing.merge_rep_mlp(**{"kernel": np.ones((4, 4)), "convolutions": [np.ones((1, 3))]} | mistake)


@pytest.mark.parametrize("orthonormal", [False, True])
def test_fnet_is_a_two_dimensional_transform(x64, orthonormal):
    """The order of both transforms does not matter; orthonormal keeps lengths up to what the real part drops."""
    x = random(2, 10, 6)
    expected = np.fft.fft2(x, axes=(1, 2), norm="ortho" if orthonormal else "backward").real
    mask, ids = np.stack([np.arange(13) < 10] * 2), np.zeros((2, 13), int)
    padded = np.concatenate([x, np.full((2, 3, 6), np.nan)], axis=1)

    @jax.jit
    def run(x, padded):
        fnet = functools.partial(mixing.fnet, orthonormal=orthonormal)
        return fnet(x), [fnet(padded, mask=mask, **options) for options in ({}, {"segment_ids": ids})]

    whole, others = jax.tree.map(np.asarray, run(x, padded))
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    for out in others:
        np.testing.assert_allclose(out[:, :10], expected, atol=1e-12)
        assert not np.any(out[:, 10:])


@pytest.mark.parametrize("length", [0, 1, 2, 65])
def test_fnet_of_any_length(length):
    expected = np.fft.fft2(random(length, 4)).real if length else np.zeros((0, 4))
    np.testing.assert_allclose(jax.jit(mixing.fnet)(random(length, 4).astype(np.float32)), expected, atol=1e-4)


def test_fnet_has_no_causal_form():
    with pytest.raises(ValueError, match="is_causal must be False: the Fourier transform has no causal form"):
        mixing.fnet(np.ones((3, 2)), is_causal=True)


def test_gmlp_starts_as_a_feed_forward_layer(x64):
    """With the table's initial weights the gate is open: z_1 passes nearly as it is."""
    weights = widened(jax.jit(lambda: mixing.MIXERS["gmlp"].weights(jax.random.key(0), 8, 16, 1))())

    @jax.jit
    def run(x, weights):
        z1 = jnp.split(references.gelu(x @ weights["in_kernel"]), 2, axis=-1)[0]
        return mixing.gmlp(x, **weights), z1 @ weights["out_kernel"]

    out, expected = run(random(2, 9, 8), weights)
    np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2)


def test_lightweight_kernels_are_averages_shared_by_heads(x64):
    """Inside a row a constant stays what it is, and the channels of a head have one kernel."""
    kernel = random(2, 3)
    impulse = np.zeros((9, 4))
    impulse[4] = 1
    convolve = jax.jit(mixing.lightweight_convolution, static_argnames="is_causal")
    constant, answer = (
        np.asarray(convolve(np.ones((9, 4)), kernel)),
        np.asarray(convolve(impulse, kernel, is_causal=True)),
    )
    np.testing.assert_allclose(constant[1:-1], 1.0, rtol=1e-12)
    weights = np.exp(kernel) / np.exp(kernel).sum(1, keepdims=True)
    np.testing.assert_allclose(answer[4:7], np.repeat(weights.T, 2, axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="the heads N of kernel must divide D = 4; got N = 3"):
        mixing.lightweight_convolution(impulse, random(3, 3))


def test_mixer_needs_hidden_units_for_each_step_when_causal():
    weights = (np.ones((6, 4)), np.ones(6), np.ones((4, 6)), np.ones(4))
    assert jax.jit(mixing.mlp_mixer)(np.ones((3, 2)), *weights).shape == (3, 2)
    with pytest.raises(ValueError, match=r"a multiple of T_max rows where is_causal.*\(6, 4\)"):
        mixing.mlp_mixer(np.ones((3, 2)), *weights, is_causal=True)
    with pytest.raises(ValueError, match="segment_ids need is_causal=True"):
        mixing.mlp_mixer(np.ones((3, 2)), *weights, segment_ids=np.zeros(3, int))


def test_an_id_that_comes_again_is_another_document_for_all_of_amlp():
    """Gate and attention agree, in one call and from a state."""
    drawn = jax.jit(lambda: mixing.MIXERS["amlp"].weights(jax.random.key(1), 8, 12, 2))()
    rng = np.random.default_rng(2)
    weights = jax.tree.map(lambda a: (np.asarray(a) + 0.1 * rng.normal(size=a.shape)).astype(a.dtype), drawn)
    x, ids = random(1, 9, 8).astype(np.float32), np.array([[0, 0, 0, 1, 1, 1, 1, 0, 0]])

    @jax.jit
    def run(x, weights):
        call, splits = functools.partial(mixing.amlp, **weights, is_causal=True), []
        for cut in (2, 3, 5, 8):
            first, state = call(x[:, :cut], segment_ids=ids[:, :cut], return_state=True)
            rest = call(x[:, cut:], segment_ids=ids[:, cut:], initial_state=state)
            splits.append(jnp.concatenate([first, rest], axis=1))
        return call(x, segment_ids=ids), call(x[:, 7:]), splits

    whole, last, splits = jax.tree.map(np.asarray, run(x, weights))
    np.testing.assert_allclose(whole[:, 7:], last, atol=1e-5)
    for split in splits:
        np.testing.assert_allclose(split, whole, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["centred", "causal"])
def test_an_id_that_comes_again_is_another_document_for_convolutions(is_causal):
    """Of three documents of one step each none enters another, in one call and from a state."""
    x, ids = np.array([[1.0], [10.0], [100.0]]), np.array([7, 2, 7])
    run = functools.partial(mixing.lightweight_convolution, kernel=np.zeros((1, 3)), is_causal=is_causal)
    alone = x / 3  # a third is the weight of each tap
    np.testing.assert_allclose(run(x, segment_ids=ids), alone, rtol=1e-6)
    if is_causal:
        _, state = run(x[:2], segment_ids=ids[:2], return_state=True)
        np.testing.assert_allclose(run(x[2:], segment_ids=ids[2:], initial_state=state), alone[2:], rtol=1e-6)


@pytest.mark.parametrize("padding", [7, 0], ids=["its document's id", "another id"])
def test_the_id_of_padding_does_not_matter(padding):
    """Neither behind a row that goes on in another call, nor in a call of padding alone, nor between two tokens."""
    x, weight = random(4, 3).astype(np.float32), random(8, 8, seed=1).astype(np.float32)
    run = functools.partial(mixing.token_mixing, kernel=weight, is_causal=True)
    whole = run(x, segment_ids=np.full(4, 7))
    padded, mask = np.insert(x[:3], 2, 9.0, axis=0), np.array([True, True, False, True])
    ids = np.where(mask, 7, padding)
    np.testing.assert_allclose(run(padded, segment_ids=ids, mask=mask)[mask], whole[:3], atol=1e-5)
    behind = {"segment_ids": np.array([7, 7, 7, padding]), "mask": np.arange(4) < 3}
    _, state = run(np.insert(x[:3], 3, 9.0, axis=0), **behind, return_state=True)
    _, state = run(padded[2:3], segment_ids=ids[2:3], mask=mask[2:3], initial_state=state, return_state=True)
    np.testing.assert_allclose(run(x[3:], segment_ids=np.array([7]), initial_state=state), whole[3:], atol=1e-5)


def test_a_new_document_takes_the_places_of_the_last_one(x64):
    """A state with room for six tokens serves any number of documents of at most six."""
    kernel, bias = random(6, 6), random(6)
    x, ids = random(1, 15, 4), np.array([[1] * 6 + [2] * 5 + [3] * 4])
    call = jax.jit(functools.partial(mixing.token_mixing, kernel=kernel, bias=bias, is_causal=True))
    step = jax.jit(functools.partial(mixing.token_mixing, kernel=kernel, bias=bias, is_causal=True, return_state=True))
    state, outputs = None, []
    for t in range(15):
        out, state = step(x[:, t : t + 1], segment_ids=ids[:, t : t + 1], initial_state=state)
        outputs.append(out)
    alone = [call(x[:, a:b]) for a, b in ((0, 6), (6, 11), (11, 15))]
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), np.concatenate(alone, axis=1), rtol=1e-12, atol=1e-12)
    assert state.count.tolist() == [4] and not np.any(np.asarray(state.values[0])[0, 4:])
