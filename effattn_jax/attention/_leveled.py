"""Sums of features that carry a level, exp(level_j) phi(k_j), which may be of any size.

    o_i = sum_j e^(l_j - L_i) phi(q_i).phi(k_j) v_j  /  sum_j e^(l_j - L_i) phi(q_i).phi(k_j)        L_i = max of l_j over the keys that i sees

The levels enter as factors on the products of a chunk and on the state, as decays of one number a head do: L_i depends on no later key,
every factor is <= 1 and one of them is 1, and what is left are products of matrices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import Call, accumulator
from effattn_jax.attention._frame import lowest
from effattn_jax.attention._linear import all_pairs
from effattn_jax.attention.random_features import Kernel, Weights
from effattn_jax.recurrence._outer_chunks import (
    Marks,
    Options,
    _Decay,
    _write,
    allowed_pairs,
    heads_first,
    keep_steps,
    last_segment,
    masked,
    normalized,
    read_state,
    repeat_heads,
    time_first,
    weighted_values,
    weights_of_pairs,
)
from effattn_jax.recurrence._outer_kernel import over_chunks

__all__: list[str] = []

_OPTIONS = Options()
_CHUNK = 128  # more work in pairs than at 64, half the states to keep for the backward pass
_BLOCK = 512  # steps at a time where order does not matter


def _queries(kernel: Kernel, weights: Weights, q: jax.Array, heads: int, dtype: Any) -> jax.Array:
    """Features of (B, C, N, H) by head, (B, K, G, C, M)."""
    q = heads_first(q, dtype)
    return kernel.query(q.reshape(q.shape[0], heads, q.shape[1] // heads, *q.shape[2:]), weights)


def _keys(kernel: Kernel, weights: Weights, k: jax.Array, key_mask: jax.Array | None, dtype: Any) -> tuple:
    """Features of (B, C, K, H) by head, (B, K, C, M), and their levels (B, K, C); a masked key is 0, at the lowest level."""
    k, level = kernel.key(keep_steps(heads_first(k, dtype), key_mask), weights)
    if key_mask is None:
        return k, level
    return keep_steps(k, key_mask), jnp.where(key_mask[:, None], level, lowest(level.dtype))


def _into_end(level: jax.Array, top: jax.Array, marks: Marks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors on the keys (B, K, C, 1) and on the state (B, K, 1) that make the state after the chunk, and its greatest level (B, K, 1)."""
    least, before = lowest(level.dtype), lax.stop_gradient(top)
    kept = top
    if marks.run is not None:
        level = jnp.where(last_segment(marks)[1][:, None], level, least)
        goes_on = (marks.run[:, -1:] == marks.run_before[:, -1:])[:, None]
        before, kept = jnp.where(goes_on, before, least), jnp.where(goes_on, top, least)
    end = jnp.maximum(jnp.max(level, axis=-1, keepdims=True), before)
    return jnp.exp(level - end)[..., None], jnp.exp(kept - end), end


def _factors(level: jax.Array, top: jax.Array, allowed: jax.Array, marks: Marks) -> tuple[_Decay, jax.Array, jax.Array]:
    """The levels of a chunk as decays, the level L of each step (B, K, C), and that of the state after it (B, K, 1)."""
    least = lowest(level.dtype)
    seen = jnp.max(jnp.where(allowed[:, None], level[:, :, None], least), axis=-1)
    old = jnp.broadcast_to(top, seen.shape)
    if marks.run is not None:
        old = jnp.where(last_segment(marks)[0][:, None], old, least)
    seen = jnp.maximum(seen, lax.stop_gradient(old))
    to_end, kept, end = _into_end(level, top, marks)
    between = level[:, :, None] - seen[..., None]
    return _Decay(jnp.exp(old - seen)[..., None], to_end, between, kept, ~jnp.isfinite(level)), seen, end


def _chunk(
    kernel: Kernel, strict: bool, split: bool, out_dtype: Any, carry: Any, inputs: Any, marks: Marks, weights: Weights
) -> Any:
    """One chunk: the state (B, K, M, V), (B, K, M), (B, K, 1) before it, its steps, the state after it and the outputs."""
    state, total, top = carry
    q, k, v = inputs
    q = _queries(kernel, weights, q, k.shape[2], state.dtype)
    k, level = _keys(kernel, weights, k, marks.key_mask, state.dtype)
    v = keep_steps(heads_first(v, state.dtype), marks.key_mask)
    allowed = allowed_pairs(marks, q.shape[3], strict)
    decay, seen, top = _factors(level, top, allowed, marks)
    scores = weights_of_pairs(_OPTIONS, q, k, decay, allowed)
    old, old_total = read_state(_OPTIONS, q, state, total, marks)
    to_step = decay.to_step[:, :, None]
    numerator = weighted_values(_OPTIONS, scores, v, decay, allowed) + old * to_step
    denominator = scores.sum(-1) + old_total * to_step[..., 0]
    carry = (*_write(_OPTIONS, k, v, state, total, decay, marks), top)
    if split:
        return carry, (time_first(numerator), time_first(denominator), jnp.moveaxis(seen, 2, 1))
    return carry, time_first(normalized(numerator, denominator)).astype(out_dtype)


def empty_carry(kernel: Kernel, weights: Weights, key: jax.Array, value: jax.Array) -> tuple:
    """The state before the first key, made from the inputs so that its sharding is theirs."""
    total = jnp.zeros_like(kernel.key(key[:, 0].astype(weights.projection.dtype), weights)[0])
    kv = jnp.zeros_like(total[..., None] * value[:, 0, :, None].astype(total.dtype))
    return kv, total, jnp.full_like(total[..., :1], lowest(total.dtype))


def chunked(kernel: Kernel, weights: Weights, *, split: bool = False) -> Any:
    """The kernel of `_frame`: one pass over time; `split` returns numerators, denominators and their levels L apart."""

    def run(query, key, value, _, carry, *, size, strict=False, **marks):
        carry = empty_carry(kernel, weights, key, value) if carry is None else carry
        body = partial(_chunk, kernel, strict, split, value.dtype)
        size = min(size or _CHUNK, value.shape[1])
        return over_chunks(body, carry, (query, key, value), size=size, weights=weights, **marks)

    return run


def joined(past: tuple, future: tuple, dtype: Any) -> jax.Array:
    """The quotient of two passes, (numerator (B, T, N, V), denominator (B, T, N), level (B, T, K)) each."""
    top = jnp.maximum(past[2], future[2])
    factors = [repeat_heads(jnp.exp(part[2] - top), part[1]) for part in (past, future)]
    numerator = sum(part[0] * factor[..., None] for part, factor in zip((past, future), factors, strict=True))
    denominator = sum(part[1] * factor for part, factor in zip((past, future), factors, strict=True))
    return normalized(numerator, denominator).astype(dtype)


def without_order(kernel: Kernel, weights: Weights, call: Call, mask: jax.Array | None, size: int | None) -> jax.Array:
    """One state serves every query: blocks of keys are added to it, then blocks of queries read it."""
    dtype, size = weights.projection.dtype, size or _BLOCK

    def write(carry, inputs, marks, weights):
        state, total, top = carry
        v, k = inputs
        k, level = _keys(kernel, weights, k, marks.key_mask, dtype)
        v = keep_steps(heads_first(v, dtype), marks.key_mask)
        to_end, kept, top = _into_end(level, top, marks)
        k = k * to_end
        state = state * kept[..., None] + jnp.einsum("bkjm,bkjv->bkmv", k, v)
        return (state, total * kept + k.sum(2), top), ()

    def read(carry, inputs, _, past):
        state, total, weights = past
        q = _queries(kernel, weights, *inputs, total.shape[1], dtype)
        out = normalized(jnp.einsum("bkgim,bkmv->bkgiv", q, state), jnp.einsum("bkgim,bkm->bkgi", q, total))
        return carry, time_first(out).astype(call.value.dtype)

    rows, (length, keys) = (call.value, call.key), (call.query.shape[1], call.key.shape[1])
    if min(length, keys) == 0:
        return jnp.zeros((*call.query.shape[:3], call.value.shape[-1]), call.value.dtype)
    first = empty_carry(kernel, weights, call.key, call.value)
    _, (state, total, _) = over_chunks(write, first, rows, key_mask=mask, size=min(size, keys), weights=weights)
    return over_chunks(read, (), (call.query,), size=min(size, length), weights=(state, total, weights))[0]


def pairwise(kernel: Kernel, weights: Weights, call: Call, mask: jax.Array | None, is_causal: bool) -> jax.Array:
    """All pairs, a block of queries at a time."""
    dtype = accumulator(call.query, call.key, call.value)
    query, key, value = (x.astype(dtype) for x in (call.query, masked(call.key, mask), masked(call.value, mask)))
    heads = key.shape[2]
    query = kernel.query(query.reshape(*query.shape[:2], heads, query.shape[2] // heads, query.shape[-1]), weights)
    key, level = kernel.key(key, weights)
    if mask is not None:
        key, level = masked(key, mask), jnp.where(mask[..., None], level, lowest(dtype))
    return all_pairs(call, (query, key, value), is_causal, level=level)
