"""Softmax attention: dense, or by blocks in O(T) memory with windows, biases, segments, caches and grouped heads.

    o_i = sum_j p_ij v_j        p_i = softmax_j(cap(scale q_i . k_j + b_ij))  over the keys j that i may see; o_i = 0 where there are none

Cost O(T S) for all pairs, O(T W) for a window; state: the cache, (H + V) K numbers a token. Beside jax.nn.dot_product_attention: no T x S
buffer in either pass, total masks, ends aligned when T < S, bias gradients, windows, segments and a state.
Source: Vaswani et al., arXiv:1706.03762.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, Call, accumulator, check_call, choose, positive
from effattn_jax.attention import kv_cache as caches
from effattn_jax.attention._blocks import by_blocks, by_rows
from effattn_jax.attention._cudnn import by_cudnn
from effattn_jax.attention._pairs import Arrays, Marks, Spec, whole_rows

__all__ = ["dot_product_attention"]

_FORMS = (None, "dense", "chunked")
_DENSE_PAIRS = 256 * 512  # up to so many (query, key) pairs a head all scores are formed at once


def window_bounds(window: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) counts of neighbours, None without bound, from an int, a pair or None."""
    pair = window if isinstance(window, tuple | list) else (window, window)
    ok = len(pair) == 2 and all(w is None or (isinstance(w, int) and not isinstance(w, bool) and w >= 0) for w in pair)
    if not ok:
        raise ValueError(
            f"window must be an int >= 0 or a pair (left, right) of them, neighbours on each side; got {window!r}"
        )
    left, right = pair
    return left, (0 if is_causal else right)


def _block_sizes(
    length: int, keys: int, groups: int, bounds: tuple[int | None, int | None], chunk_size: int | None
) -> tuple[int, int]:
    """Rows and columns of a block: as large as fits a cache (about 4 MiB of scores over the heads), no wider than a window makes sense of."""
    if chunk_size is not None:
        return min(chunk_size, length), min(chunk_size, keys)
    rows, columns = 256, 512
    while groups * rows * columns > 2**21 and rows > 64:
        rows, columns = rows // 2, columns // 2
    left, right = bounds
    if left is not None and right is not None:
        while rows > 64 and left + right < rows // 2:
            rows //= 2
        columns = min(columns, -(-(left + right + rows) // 64) * 64)
    return min(rows, length), min(columns, keys)


def _with_state(
    call: Call, state: caches.Cache | None, valid: jax.Array | None, left: int | None, return_state: bool
) -> Any:
    """The call over all keys there are, the marks of the keys, and the state to return."""
    if state is None:
        after = caches.start(call, valid) if return_state else None
        marks = Marks(
            jnp.int32(call.key.shape[1] - call.query.shape[1]), None, valid, call.query_segments, call.key_segments
        )
        full = call
    else:
        grown = caches.extend(state, call, valid)
        q_ids = call.query_segments
        if q_ids is None:
            q_ids = jnp.broadcast_to(state.last[:, None], call.query.shape[:2])
        end = grown.key.shape[1] if grown.length is None else grown.length
        seen = grown.valid
        if grown.length is not None:
            seen = seen & (jnp.arange(seen.shape[1])[None] < grown.length)
        marks = Marks(jnp.asarray(end - call.query.shape[1], jnp.int32), None, seen, q_ids, grown.segment)
        full = call._replace(key=grown.key.astype(call.key.dtype), value=grown.value.astype(call.value.dtype))
        after = grown
    if after is not None and left is not None and after.length is None:
        after = caches.last_slots(after, left)
    return full, marks, after


def _split_mask(call: Call, state: caches.Cache | None) -> tuple[jax.Array | None, jax.Array | None]:
    """(mask over this call's keys alone, which a state remembers; mask over pairs, its columns those of the state after the call)."""
    mask, keys = call.mask, call.key.shape[1]
    if mask is None:
        return None, None
    if mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] in (1, keys):
        return jnp.broadcast_to(mask[:, 0, 0], (call.key.shape[0], keys)), None
    if state is None or mask.shape[3] != keys:
        return None, mask
    total = state.key.shape[1] + (keys if state.length is None else 0)
    everything = jnp.ones((*mask.shape[:3], total), bool)
    begin = state.key.shape[1] if state.length is None else state.length
    return None, jax.lax.dynamic_update_slice_in_dim(everything, mask, begin, axis=3)


def _overfull(state: caches.Cache | None, out: jax.Array) -> jax.Array:
    """NaN where a cache of fixed size was written past its end."""
    if state is None or state.length is None:
        return out
    return jnp.where(state.length > state.key.shape[1], jnp.nan, out)


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
      bias: float, broadcastable to (*B, N, T, S), added to the scaled scores; -inf masks. Gradients have its own shape.
      mask: boolean, broadcastable to (*B, N, T, S); True = attend. A row with nothing to attend gives 0 and no gradient.
      scale: factor on the scores; None is 1 / sqrt(H).
      is_causal: query i sees keys up to its own, ends aligned: with T < S the last query sees every key.
      segment_ids: (*B, T) integers, or a pair for query and key; only equal ids interact.
      initial_state: `attention.cache(...)` or the state of an earlier call (causal only). bias and mask then cover this call's keys, or with a
        last axis of all slots the whole cache; a mask over keys alone, (*B, 1, 1, S), is remembered. Without segment_ids the last segment goes on.
      return_state: also return the cache: the one given, filled further; else one that grows; with a causal window the last W keys.
      window: W neighbours on each side, the query's own key besides (causal: to the left), or (left, right), None for no bound.
      logits_soft_cap: c: scores s become c tanh(s / c), before masking.
      chunk_size: rows and columns of a block; None picks.
      return_weights: also return p, (*B, N, T, S), from the dense form.
      implementation: "dense" (all scores at once) or "chunked" (O(T) memory, recomputing backward pass); None picks one of them by size.
        "cudnn" is cuDNN's flash attention through jax.nn, for half-precision calls on an NVIDIA GPU that need no more than a scale, causality
        with T = S and a causal window; it is never picked, since it does not promise the laws on NaN and on bits.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last. Softmax and sums run in float32 at least.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head, O(T W (H + V)) with a window; memory O(T + S) when chunked. Source: arXiv:1706.03762, arXiv:2205.14135.

    >>> import jax, jax.numpy as jnp
    >>> q = jax.random.normal(jax.random.key(0), (1, 6, 4, 8))
    >>> kv = jax.random.normal(jax.random.key(1), (1, 6, 2, 8))
    >>> out = dot_product_attention(q, kv, kv, is_causal=True, window=2)
    >>> out.shape, bool(jnp.allclose(out[:, 0], jnp.repeat(kv[:, 0], 2, axis=1), atol=1e-6))
    ((1, 6, 4, 8), True)
    """
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive; got {logits_soft_cap!r}")
    if implementation == "cudnn":
        refused = {
            "bias": bias, "mask": mask, "segment_ids": segment_ids, "initial_state": initial_state, "return_state": return_state,
            "logits_soft_cap": logits_soft_cap, "return_weights": return_weights, "chunk_size": chunk_size,
        }  # fmt: skip
        return by_cudnn(query, key, value, scale, is_causal, window, refused)
    out, state, weights, _ = run(
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, window=window, cap=logits_soft_cap, chunk_size=chunk_size,
        implementation=implementation, return_weights=return_weights,
    )  # fmt: skip
    results = [out] + [state] * return_state + [weights] * return_weights
    return results[0] if len(results) == 1 else tuple(results)


class Scores(NamedTuple):
    """What a call's scores are, where they are not products of its queries and keys.

    Attributes:
      query, key: (B, T, N, M) and (B, S, K, M), S all slots of the state: features whose products are scores, or part of them.
      value: (B, S, K, V), one head for each of key's.
      bias: further scores, (B | 1, N | 1, T | 1, S | 1), or None.
      rows: `rows(row, count) -> (B | 1, N | 1, count, S)`: the scores of some rows, to be added; None for none. No T x S array then exists.
      scale: factor on the products.
      side: whatever the caller wants handed back.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    rows: Callable | None = None
    scale: float = 1.0
    side: Any = None


def run(
    arrays: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: caches.Cache | None, return_state: bool,
    window: Any = None, cap: float | None = None, chunk_size: int | None = None,
    implementation: str | None = None, return_weights: bool = False, reads_key: bool = True, rescore: Callable | None = None,
) -> tuple:  # fmt: skip
    """The call behind every softmax mixer: (out, state or None, weights or None, side).

    Args:
      arrays: query, key, value, bias, mask, as the caller gave them.
      reads_key: False keeps the keys out of the state.
      rescore: `rescore(call, marks) -> Scores`: other scores than products, from the call over all slots; None for the products.
    """
    choose("implementation", implementation, _FORMS)
    positive(chunk_size=chunk_size)
    bounds = window_bounds(window, is_causal)
    totals = ()
    if isinstance(initial_state, caches.Cache):
        slots = initial_state.key.shape[-3]
        totals = (slots if initial_state.length is not None else slots + jnp.shape(arrays[1])[-3],)
    stateful = return_state or initial_state is not None
    call = check_call(*arrays, is_causal=is_causal, segment_ids=segment_ids, stateful=stateful, totals=totals)
    if not reads_key:
        call = call._replace(key=call.key[..., :0])
    state = None if initial_state is None else caches.flat(initial_state, call)
    valid, pair_mask = _split_mask(call, state)
    full, marks, after = _with_state(call, state, valid, bounds[0] if is_causal else None, return_state)
    if call.bias is not None and call.bias.shape[3] not in (1, full.key.shape[1]):
        raise ValueError(
            f"bias must cover all {full.key.shape[1]} keys of the state after the call; got {jnp.shape(arrays[3])}"
        )
    marks = marks._replace(mask=pair_mask)
    scores = None if rescore is None else rescore(full, marks)
    if scores is not None:
        full, scale = full._replace(**{n: getattr(scores, n) for n in ("query", "key", "value", "bias")}), scores.scale
    rows = None if scores is None else scores.rows
    out, weights = _attend(full, marks, bounds, scale, cap, chunk_size, implementation, return_weights, rows)
    out = call.restore(_overfull(after, out))
    after = caches.restored(after, call) if return_state else None
    return out, after, call.restore(weights) if return_weights else None, None if scores is None else scores.side


def _attend(
    call: Call, marks: Marks, bounds: tuple, scale: Any, cap: float | None, chunk_size: int | None, implementation: str | None,
    want_weights: bool, more: Callable | None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """out (B, T, N, V) and, where asked for, weights (B, N, T, S)."""
    query, key, value = call.query, call.key, call.value
    (batch, length, heads, dim), keys = query.shape, key.shape[1]
    if scale is not None and not isinstance(scale, int | float):
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    scale = 1 / math.sqrt(dim) if scale is None else float(scale)
    if length == 0 or keys == 0:
        return jnp.zeros((batch, length, heads, value.shape[-1]), value.dtype), jnp.zeros((batch, heads, length, keys))
    rows, columns = _block_sizes(length, keys, batch * heads, bounds, chunk_size)
    spec = Spec(*bounds, cap, scale, rows, columns, accumulator(query, key, value))
    arrays = Arrays(query, key, value, call.bias)
    small = implementation is None and chunk_size is None and length * keys <= _DENSE_PAIRS
    if want_weights or implementation == "dense" or small:
        out, _, weights = whole_rows(spec, arrays, marks, more=more)
        weights = weights.reshape(batch, heads, length, keys)
    elif more is not None:
        rows = rows if chunk_size is not None else max(1, min(length, 2**21 // max(1, batch * heads * keys)))
        out, weights = by_rows(spec._replace(rows=rows), arrays, marks, more)[0], None
    else:
        out, weights = by_blocks(spec, arrays, marks)[0], None
    return out, weights
