"""Residual attention beyond the laws: scores that add up over layers, unmasked, through caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import cache, dot_product_attention, residual_attention
from effattn_jax.position import Alibi

B, T, N, K, H, LAYERS = 2, 6, 4, 2, 4, 3


def layers(seed=0, length=T):
    rng = np.random.default_rng(seed)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, 3))
    return [[rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(LAYERS)]


def stacked(stack, **options):
    """Layer after layer, each with the scores of those before it: the last output, and all scores."""
    scores, everything = None, []
    for query, key, value in stack:
        out, scores = residual_attention(query, key, value, previous_scores=scores, **options)
        everything.append(scores)
    return out, everything


def side_by_side(stack):
    """One query and one key whose features are those of all layers: A_n = [Q_1 .. Q_n] [K_1 .. K_n]^T."""
    return np.concatenate([layer[0] for layer in stack], -1), np.concatenate([layer[1] for layer in stack], -1)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_scores_equal_those_of_concatenated_features(options):
    stack = layers()
    scale = options.get("scale", H**-0.5)

    @jax.jit
    def run(stack, query, key):
        return stacked(stack, **options), dot_product_attention(query, key, stack[-1][2], **{**options, "scale": scale})

    (out, scores), expected_out = run(stack, *side_by_side(stack))
    for n in range(1, LAYERS + 1):
        query, key = side_by_side(stack[:n])
        expected = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, N // K, axis=2)) * scale
        np.testing.assert_allclose(scores[n - 1], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out, expected_out, rtol=1e-4, atol=1e-5)


def test_masks_and_biases_act_after_the_addition_and_are_not_handed_on():
    stack = layers(1)
    mask = np.random.default_rng(0).random((B, N, T, T)) < 0.6
    bias = np.random.default_rng(1).normal(size=(N, T, T)).astype(np.float32)
    bias[:, 2] = -np.inf
    options = {"mask": mask, "bias": bias, "is_causal": True}

    @jax.jit
    def run(stack, query, key):
        expected = dot_product_attention(query, key, stack[-1][2], **options, scale=H**-0.5)
        return stacked(stack), stacked(stack, **options), expected

    plain, masked, expected = run(stack, *side_by_side(stack))
    for a, b in zip(plain[1], masked[1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(masked[0], expected, rtol=1e-4, atol=1e-5)


def test_no_tokens_with_a_bias_by_distance():
    x = jnp.zeros((1, 0, 2, H))
    out, scores = residual_attention(x, x, x, is_causal=True, bias=Alibi.initial(2))
    assert out.shape == x.shape and scores.shape == (1, 2, 0, 0)


def test_prefill_and_steps_with_a_cache_a_layer():
    """previous_scores are those of the new rows over all slots."""
    stack = layers(2)
    whole = jax.jit(lambda s: stacked(s, is_causal=True)[0])(stack)
    states = jax.jit(lambda: [cache(B, 8, K, H, 3) for _ in stack])()

    @jax.jit
    def step(now, states):
        scores, after = None, []
        for (query, key, value), state in zip(now, states, strict=True):
            out, state, scores = residual_attention(
                query, key, value, is_causal=True, initial_state=state, return_state=True, previous_scores=scores
            )
            after.append(state)
        return out, after, scores

    outputs = []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 6)]:
        out, states, scores = step([[x[:, start:stop] for x in layer] for layer in stack], states)
        outputs.append(out)
    assert scores.shape == (B, N, 1, 8)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_gradients_go_through_the_scores():
    """By every layer's queries and keys, as by the concatenated features; NaN in a masked key goes nowhere."""
    stack = layers(3)
    mask = np.ones((B, 1, 1, T), bool)
    mask[..., 1] = False
    slopes = jax.jit(jax.grad(lambda s: jnp.sum(stacked(s, mask=mask)[0] ** 2)))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def together(q, k):
        return jnp.sum(dot_product_attention(q, k, stack[-1][2], mask=mask, scale=H**-0.5) ** 2)

    clean = slopes(stack)
    for index, expected in enumerate(together(*side_by_side(stack))):
        actual = np.concatenate([layer[index] for layer in clean], axis=-1)
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
    stack[0][1][:, 1] = np.nan
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slopes(stack), clean)


def test_mistakes():
    query, key, value = layers()[0]
    with pytest.raises(
        ValueError, match=r"previous_scores must have shape \(\*B, N, T, S\) = \(2, 4, 6, 6\); got \(2, 4, 6, 5\)"
    ):
        residual_attention(query, key, value, previous_scores=np.zeros((B, N, T, 5), np.float32))
    with pytest.raises(ValueError, match="previous_scores must be a floating array"):
        residual_attention(query, key, value, previous_scores=np.zeros((B, N, T, T), np.int32))
    with pytest.raises(ValueError, match="implementation='chunked' is unknown to residual_attention"):
        residual_attention(query, key, value, implementation="chunked")
