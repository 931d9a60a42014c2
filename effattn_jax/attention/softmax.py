"""Softmax attention: dense, or by blocks in O(T) memory with windows, biases, segments, caches and grouped heads.

    o_i = sum_j p_ij v_j        p_i = softmax_j(cap(scale q_i . k_j + b_ij))  over the keys j that i may see; o_i = 0 where there are none

Cost O(T S) for all pairs, O(T W) for a window; state: the cache, (H + V) K numbers a token. Beside jax.nn.dot_product_attention: no T x S
buffer in either pass, total masks, ends aligned when T < S, bias gradients, windows, segments and a state.
Source: Vaswani et al., arXiv:1706.03762.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, choose, flags, positive
from effattn_jax.attention import kv_cache as caches
from effattn_jax.attention._blocks import by_blocks, by_rows
from effattn_jax.attention._calls import (
    DENSE_PAIRS,
    FORMS,
    Prepared,
    asked_for,
    block_sizes,
    number_scale,
    prepare,
    window_bounds,
)
from effattn_jax.attention._cudnn import by_cudnn
from effattn_jax.attention._flash import by_flash, refuse
from effattn_jax.attention._pairs import Arrays, More, Spec, whole_rows

__all__ = ["dot_product_attention"]


@compiled
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: caches.Cache | None = None,
    return_state: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Softmax attention o_i = sum_j softmax_j(scale q_i . k_j + bias_ij) v_j over the keys that i may see.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N: each key head serves N / K query heads.
      bias: float, broadcastable to (*B, N, T, S), added to the scaled scores; -inf masks. Gradients have its own shape. Or a bias by position,
        `position.Alibi` and its like, which is evaluated by blocks and is never a T x S array; its parameters have gradients.
      mask: boolean, broadcastable to (*B, N, T, S); True = attend. A row with nothing to attend gives 0 and no gradient.
      scale: factor on the scores; None is 1 / sqrt(H).
      is_causal: query i sees keys up to its own, ends aligned: with T < S the last query sees every key.
      segment_ids: (*B, T) integers, or a pair for query and key; only equal ids interact.
      initial_state: `attention.cache(...)` or the state of an earlier call (causal only). A mask then covers this call's keys, or with a last axis of
        all slots the whole cache, as an array of biases does; with S = 1 a last axis of 1 is the new key, else it is all slots. A mask over keys
        alone, (*B, 1, 1, S), is remembered. Without segment_ids the last segment goes on. With a window's own state T is at most S.
      return_state: also return the cache: the one given, filled further; else one that grows; with a causal window the last W keys.
      window: W neighbours on each side, the query's own key besides (causal: to the left), or (left, right), None for no bound.
      logits_soft_cap: c: scores s become c tanh(s / c), before masking.
      chunk_size: rows and columns of a block; None picks.
      return_weights: also return p, (*B, N, T, S), from the dense form.
      implementation: "dense" (all scores at once) or "chunked" (O(T) memory, recomputing backward pass); None picks one of them by size.
        "cudnn" is cuDNN's flash attention through jax.nn, for half-precision calls on an NVIDIA GPU that need no more than a scale, causality
        with T = S and a causal window; it is never picked, since it does not promise the laws on NaN and on bits. "pallas" is flash attention as
        Pallas kernels, for TPU and GPU (on a CPU interpreted, slowly): everything but a bias, a mask over pairs, a cache of fixed size and
        weights; chunk_size a power of two from 16 on; float64 on a CPU only; on a mesh inside `jax.shard_map`; exported for one platform at a
        time. No device has measured it yet, so None does not pick it either.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last. Softmax and sums run in float32 at least.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head, O(T W (H + V)) with a window, when chunked the sum of the squares of a packed row's documents (of the
    longest at each place, over the batch); memory O(T + S) when chunked. Source: arXiv:1706.03762, arXiv:2205.14135.

    >>> import jax, jax.numpy as jnp
    >>> q = jax.random.normal(jax.random.key(0), (1, 6, 4, 8))
    >>> kv = jax.random.normal(jax.random.key(1), (1, 6, 2, 8))
    >>> out = dot_product_attention(q, kv, kv, is_causal=True, window=2)
    >>> out.shape, bool(jnp.allclose(out[:, 0], jnp.repeat(kv[:, 0], 2, axis=1), atol=1e-6))
    ((1, 6, 4, 8), True)
    """
    if logits_soft_cap is not None and not (isinstance(logits_soft_cap, numbers.Real) and logits_soft_cap > 0):
        raise ValueError(f"logits_soft_cap must be a positive number; got {logits_soft_cap!r}")
    if implementation == "cudnn":
        refused = {
            "bias": bias, "mask": mask, "segment_ids": segment_ids, "initial_state": initial_state, "return_state": return_state,
            "logits_soft_cap": logits_soft_cap, "return_weights": return_weights, "chunk_size": chunk_size,
        }  # fmt: skip
        return by_cudnn(query, key, value, scale, is_causal, window, refused)
    if implementation == "pallas":
        refuse(bias, initial_state, return_weights, chunk_size)
    out, state, weights, _ = run(
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, window=window, cap=logits_soft_cap, chunk_size=chunk_size,
        implementation=implementation, return_weights=return_weights, forms=(*FORMS, "cudnn", "pallas"),
    )  # fmt: skip
    return asked_for(out, state, return_state, weights, return_weights)


class Scores(NamedTuple):
    """What a call's scores are, where they are not products of its queries and keys.

    Attributes:
      query, key: (B, T, N, M) and (B, S, K, M), S all slots of the state: features whose products are scores, or part of them.
      value: (B, S, K, V), one head for each of key's.
      bias: further scores, (B | 1, N | 1, T | 1, S | 1), or a bias by position, or None.
      rows: `rows(row, count) -> (B | 1, N | 1, count, S)`: the scores of some rows, to be added; None for none. No T x S array then exists.
      values: `values(row, count, weights (B, N, count, S)) -> (B, N, count, V)`: what is added to the output of some rows; None for nothing.
      scale: factor on the products.
      side: whatever the caller wants handed back.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: Any = None
    rows: Callable | None = None
    values: Callable | None = None
    scale: float = 1.0
    side: Any = None


def run(
    arguments: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: caches.Cache | None, return_state: bool,
    window: Any = None, cap: float | None = None, chunk_size: int | None = None,
    implementation: str | None = None, return_weights: bool = False, reads_key: bool = True, rescore: Callable | None = None,
    forms: tuple[str | None, ...] = FORMS, hands_on: bool = False,
) -> tuple:  # fmt: skip
    """The call behind every softmax mixer: (out, state or None, weights or None, side).

    Args:
      arguments: query, key, value, bias, mask, as the caller gave them.
      reads_key: False keeps the keys out of the state.
      rescore: `rescore(call, marks) -> Scores`: other scores than products, from the call over all slots; None for the products.
      forms: the implementations that the mixer has.
      hands_on: whether the scores are handed on, as they are before masks.
    """
    choose("implementation", implementation, forms)
    positive(chunk_size=chunk_size)
    flags(return_weights=return_weights)
    left, right = window_bounds(window, is_causal)
    ready = prepare(
        arguments, scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, last_keys=left if is_causal else None, reads_key=reads_key,
    )  # fmt: skip
    spec = ready.spec._replace(left=left, right=right, cap=cap)
    more, side = None, None
    if rescore is not None:
        scores = rescore(ready.whole(masked_apart=hands_on), ready.marks)
        side = scores.side
        if scores.rows is not None or scores.values is not None:
            more = More(scores.rows, scores.values)
        query, scale = number_scale(scores.query, scores.scale)
        ready = ready._replace(arrays=Arrays(query, scores.key, scores.value, scores.bias))
        spec = spec._replace(scale=scale)
    out, weights = _attend(ready, spec, chunk_size, implementation, return_weights, more)
    after = caches.restored(ready.after, ready.call) if return_state else None
    return ready.restore(out), after, ready.call.restore(weights) if return_weights else None, side


def _attend(
    ready: Prepared, spec: Spec, chunk_size: int | None, implementation: str | None, want_weights: bool, more: More | None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """out (B, T, N, V) and, where asked for, weights (B, N, T, S)."""
    arrays, marks = ready.arrays, ready.marks
    (batch, length, heads, _), keys = arrays.query.shape, arrays.key.shape[1]
    if ready.no_pairs or batch == 0:
        return ready.nothing(), jnp.zeros((batch, heads, length, keys), spec.dtype)
    small = implementation is None and chunk_size is None and length * keys <= DENSE_PAIRS
    if want_weights or implementation == "dense" or small:
        out, _, weights = whole_rows(spec, arrays, marks, more=more)
        return out, weights.reshape(batch, heads, length, keys)
    segmented = marks.key_segments is not None
    rows, columns = block_sizes(length, keys, batch * heads, (spec.left, spec.right), chunk_size, segmented=segmented)
    if implementation == "pallas":
        return by_flash(spec._replace(rows=rows), arrays, marks, ready.offset, chunk_size)[0], None
    if more is None:
        return by_blocks(spec._replace(rows=rows, columns=columns), arrays, marks)[0], None
    if chunk_size is None:  # fewer rows would go through keys and values more often than they save room
        rows = min(length, max(32, 3 * 2**18 // max(1, batch * heads * keys)))
    return by_rows(spec._replace(rows=rows), arrays, marks, more)[0], None
