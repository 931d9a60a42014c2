"""Residual attention scores (RealFormer): each layer's scores are added to those of all layers before it.

    A_n = scale Q_n K_n^T + A_{n-1}        o = softmax(A_n + bias) V        over the keys that a query may see

The sum is of scores before masks: A_n equals the scores of one layer whose queries and keys are those of layers 1 to n side by side.
Cost O(T S) time and memory, the scores being part of the result. Source: He et al., arXiv:2012.11747.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, floating, scale_or
from effattn_jax.attention._pairs import Marks, bias_of, finite_or_zero
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import Scores, run

__all__ = ["residual_attention"]


@compiled
def residual_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    previous_scores: ArrayLike | None = None,
) -> Any:
    r"""Softmax attention over scores that add up from layer to layer: A_n = scale Q_n K_n^T + A_{n-1}, o = softmax(A_n + bias) V.

    Masks, segments, causality and the bias act after the addition and are not in the scores handed on: each layer applies its own.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias, mask, scale, is_causal, segment_ids: as for `dot_product_attention`.
      initial_state, return_state: as for `dot_product_attention`. S below then counts all slots of the state after the call.
      implementation: "dense" or None; the scores are formed in any case.
      previous_scores: A_{n-1}, (*B, N, T, S), the scores of the layer before for the same queries and keys; None for the first layer.

    Returns:
      (out, scores): out (*B, T, N, V) in the dtype of value, scores (*B, N, T, S) in float32 at least; with a state (out, state, scores).
      A key that is not finite has score 0.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head; memory T S a head. Source: arXiv:2012.11747.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
    >>> out, scores = residual_attention(q, k, v, is_causal=True)
    >>> out, twice = residual_attention(q, k, v, is_causal=True, previous_scores=scores)
    >>> out.shape, bool(jnp.allclose(twice, 2 * scores))
    ((1, 5, 2, 4), True)
    """
    if implementation not in (None, "dense"):
        raise ValueError(f"implementation={implementation!r} is unknown to residual_attention; known: None, dense")

    def rescore(call: Call, marks: Marks) -> Scores:
        (batch, length, heads, dim), (keys, kv_heads) = call.query.shape, call.key.shape[1:3]
        dtype = accumulator(call.query, call.key, call.value)
        key, bad = finite_or_zero(call.key.astype(dtype))
        grouped, bad_query = finite_or_zero(call.query.astype(dtype))
        grouped = grouped.reshape(batch, length, kv_heads, heads // kv_heads, dim)
        grouped = grouped * scale_or(1 / math.sqrt(dim), scale)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key).reshape(batch, heads, length, keys)
        scores = jnp.where(jnp.moveaxis(bad_query, 2, 1)[..., None], jnp.nan, scores)
        if previous_scores is not None:
            scores = scores + _previous(previous_scores, call, scores.shape).astype(dtype)
        return Scores(
            query=jnp.zeros_like(call.query[..., :1], dtype),
            key=jnp.where(bad, jnp.nan, jnp.zeros((), dtype))[..., None],  # rows that see such a key become NaN
            value=call.value,
            bias=scores if call.bias is None else scores + _whole(call.bias, marks, scores.shape, kv_heads),
            side=call.restore(scores),
        )

    out, state, _, scores = run(
        (query, key, value, bias, mask), scale=None, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, implementation="dense", rescore=rescore, hands_on=True,
    )  # fmt: skip
    return (out, state, scores) if return_state else (out, scores)


def _whole(bias: Any, marks: Marks, shape: tuple[int, ...], kv_heads: int) -> jax.Array:
    """The bias as an array, which here is as large as what is returned."""
    if not callable(bias):
        return bias
    scores = bias_of(bias, marks, 0, shape[2], 0, shape[3], kv_heads)
    return scores.reshape(scores.shape[0], scores.shape[1] * scores.shape[2], *scores.shape[3:])


def _previous(scores: ArrayLike, call: Call, shape: tuple[int, ...]) -> jax.Array:
    (scores,) = floating(previous_scores=scores)
    want = (*call.batch, *shape[1:])
    if scores.shape != want:
        raise ValueError(f"previous_scores must have shape (*B, N, T, S) = {want}; got {scores.shape}")
    return scores.reshape(shape)


@functools.wraps(residual_attention)
def one_layer(*arrays: ArrayLike, return_state: bool = False, **options: Any) -> Any:
    """A layer whose scores nobody asks for: out or (out, state)."""
    *results, _ = residual_attention(*arrays, return_state=return_state, **options)
    return tuple(results) if return_state else results[0]
