"""Attention whose features are exponentials of keys, normalised a feature, with a running maximum so that nothing overflows.

    Z_i[a] = sum_j exp(k_j[a])      y_i[a] = sum_j exp(k_j[a]) v_j / Z_i[a]      o_i = sum_a p_i[a] y_i[a]          j <= i when causal

p_i = softmax(q_i) is efficient attention; p_i[a] proportional to exp(q_i[a]) Z_i[a] is linear attention with phi = exp, whose one
normaliser is sum_a exp(q_i[a]) Z_i[a]. Sums are kept divided by exp(c_i[a]), c the greatest key of the feature up to i; a new
maximum rescales them by exp(c_{i-1} - c_i) <= 1. The result does not depend on c, so c is a constant to derivatives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import Call, accumulator
from effattn_jax._derivatives import Fixed
from effattn_jax._products import softmax
from effattn_jax.attention import _frame
from effattn_jax.recurrence._outer_chunks import (
    Options,
    allowed_pairs,
    heads_first,
    masked,
    read_state,
    time_first,
    weighted_values,
)
from effattn_jax.recurrence._outer_kernel import outer_product, over_chunks

__all__: list[str] = []

_CHUNK = 32  # a chunk forms C x C x M weights


class _Mass(NamedTuple):
    """The exponentials of one chunk, heads before time."""

    weight: jax.Array  # exp(k_j - c_i), 0 where i does not see j, (B, K, i, j, M)
    old: jax.Array  # exp(c_before - c_i), 0 where i does not see what was before, (B, K, i, M)
    maximum: jax.Array  # c_i, same
    total: jax.Array  # Z_i / exp(c_i), same


def _mass(k: jax.Array, total: jax.Array, maximum: jax.Array, marks: Any, strict: bool) -> tuple[_Mass, jax.Array]:
    """The exponentials of keys (B, K, C, M) before which total and maximum (B, K, M) stood, and which pairs interact (B, i, j)."""
    nothing = _frame.lowest(k.dtype)
    allowed = allowed_pairs(marks, k.shape[2], strict)
    allowed = allowed if marks.key_mask is None else allowed & marks.key_mask[:, None]
    sees = allowed[:, None, :, :, None]
    same = jnp.ones((1, 1, k.shape[2], 1), bool)
    if marks.run is not None:
        same = (marks.run == marks.run_before)[:, None, :, None]
    fixed, before = lax.stop_gradient((k, maximum))
    c = jnp.max(jnp.where(sees, fixed[:, :, None], nothing), axis=3)
    c = jnp.maximum(c, jnp.where(same, before[:, :, None], nothing))
    weight = jnp.exp(jnp.where(sees, k[:, :, None] - c[:, :, :, None], -jnp.inf))
    old = jnp.exp(jnp.where(same, maximum[:, :, None] - c, -jnp.inf))
    return _Mass(weight, old, c, weight.sum(3) + jnp.where(same, old * total[:, :, None], 0)), allowed


def _mixture(q: jax.Array, maximum: jax.Array, total: jax.Array, joint: bool) -> jax.Array:
    """p_i[a] / Z_i[a], in units of 1 / exp(c_i[a]): factors on sums of exp(k - c); 0 for features that saw no key. q (..., M)."""
    empty = total == 0
    if not joint:
        return jnp.where(empty, 0, softmax(q)[0] / jnp.where(empty, 1, total))
    logits = jnp.where(empty, -jnp.inf, q + maximum)
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    factor = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, q + maximum - jnp.where(top == -jnp.inf, 0, top))))
    whole = jnp.sum(factor * total, axis=-1, keepdims=True)
    return factor / jnp.where(whole == 0, 1, whole)


def _chunk(joint: bool, out_dtype: Any, carry: Any, inputs: Any, marks: Any) -> tuple[Any, Any]:
    """One chunk: sums and maxima before it, its steps, sums and maxima after it and the outputs."""
    kv, total, maximum = carry
    q, k, v = inputs
    k, v = (heads_first(masked(x, marks.key_mask), kv.dtype) for x in (k, v))
    q = heads_first(q, kv.dtype)
    q = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])  # (B, K, G, C, M)
    mass, allowed = _mass(k, total, maximum, marks, strict=False)
    p = _mixture(q, mass.maximum[:, :, None], mass.total[:, :, None], joint)
    scores = jnp.einsum("bkgim,bkijm->bkgij", p, mass.weight)
    out = weighted_values(Options(), jnp.where(allowed[:, None, None], scores, 0), v, None, allowed)
    out = out + read_state(Options(), p * mass.old[:, :, None], kv, None, marks)[0]
    v = jnp.where(
        allowed[:, None, -1, :, None], v, 0
    )  # 0 * NaN is NaN: a value of another segment has no place in the state
    kv = kv * mass.old[:, :, -1, :, None]
    if marks.run is not None:
        kv = masked(kv, marks.run[:, -1] == marks.run_before[:, -1])
    kv = kv + jnp.einsum("bkjm,bkjv->bkmv", mass.weight[:, :, -1], v)
    return (kv, mass.total[:, :, -1], mass.maximum[:, :, -1]), time_first(out).astype(out_dtype)


def _first(key: jax.Array, value: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums and maxima before the first step."""
    total = jnp.zeros_like(key[:, 0], dtype)
    kv = jnp.zeros_like(total[..., None] * value[:, 0, :, None].astype(dtype))
    return kv, total, jnp.full_like(total, _frame.lowest(dtype))


def _kernel(joint: bool) -> Any:
    def kernel(query, key, value, extras, carry, *, size, **marks):
        carry = _first(key, value, accumulator(query, key, value)) if carry is None else carry
        size = min(size or _CHUNK, key.shape[1])
        return over_chunks(Fixed(_chunk, joint, value.dtype), carry, (query, key, value), size=size, **marks)

    return kernel


def _log_mass(query, key, value, extras, carry, *, size, strict=False, **marks):
    """log Z_i[a] over the keys seen, (B, T, K, M), as a kernel of the frame."""
    dtype = accumulator(query, key, value)

    def body(carry, inputs, marks):
        k = heads_first(masked(inputs[1], marks.key_mask), dtype)
        mass, _ = _mass(k, *carry, marks, strict)
        empty = mass.total == 0
        log = jnp.where(empty, _frame.lowest(dtype), mass.maximum + jnp.log(jnp.where(empty, 1, mass.total)))
        after = _mass(k, *carry, marks, False)[0] if strict else mass  # each step's own key counts for those after it
        return (after.total[:, :, -1], after.maximum[:, :, -1]), jnp.moveaxis(log, 2, 1)

    first = _first(key, value, dtype)[1:]
    out, carry = over_chunks(body, first, (key, key), size=min(size or _CHUNK, key.shape[1]), **marks)
    return out, (None, *carry)


def _both_ways(p: _frame.Problem, size: int | None, joint: bool) -> jax.Array:
    """Without causality inside segments: keys divided by their segment's sums are ordinary features, past and future added up."""
    dtype = accumulator(p.query, p.key, p.value)
    log_mass = jnp.logaddexp(*_frame.both_ways(_log_mass, p, size))
    key = masked(p.key, p.mask).astype(dtype)
    key = masked(jnp.exp(key - log_mass), p.mask)
    groups = p.query.shape[2] // key.shape[2]
    q = p.query.astype(dtype).reshape(*p.query.shape[:2], key.shape[2], groups, p.query.shape[3])
    q = softmax(q + log_mass[:, :, :, None] if joint else q)[0].reshape(p.query.shape)

    def kernel(query, key, value, extras, carry, *, strict=False, **marks):
        return outer_product(query, key, value, None, carry, options=Options(strict=strict, split=True), **marks)

    past, future = _frame.both_ways(kernel, p._replace(query=q, key=key), size)
    return past + future


def _all_keys(call: Call, mask: jax.Array | None, joint: bool) -> jax.Array:
    """Without causality or segments one state serves every query."""
    dtype = accumulator(call.query, call.key, call.value)
    key, value = (masked(x, mask).astype(dtype) for x in (call.key, call.value))
    sees = jnp.ones((1, key.shape[1], 1, 1), bool) if mask is None else mask[:, :, None, None]
    nothing = _frame.lowest(dtype)
    c = jnp.max(jnp.where(sees, lax.stop_gradient(key), nothing), axis=1, initial=nothing)
    weight = jnp.exp(jnp.where(sees, key - c[:, None], -jnp.inf))
    groups = call.query.shape[2] // key.shape[2]
    query = call.query.astype(dtype).reshape(*call.query.shape[:2], key.shape[2], groups, key.shape[3])
    p = _mixture(query, c[:, None, :, None], weight.sum(1)[:, None, :, None], joint)
    out = jnp.einsum("btkgm,bkmv->btkgv", p, jnp.einsum("bskm,bskv->bkmv", weight, value))
    return out.reshape(*call.query.shape[:3], value.shape[3]).astype(call.value.dtype)


def attend(
    call: Call, mask: jax.Array | None, is_causal: bool, state: Any, size: int | None, *, joint: bool
) -> tuple[jax.Array, Any]:
    """The output and the state of a call with one batch axis; `joint` chooses exp-linear attention, its absence the efficient one."""
    if not is_causal and call.query_segments is None:
        return _all_keys(call, mask, joint), None
    problem = _frame.align(call, mask)
    if not is_causal:
        return _both_ways(problem, size, joint)[:, problem.skipped :].astype(call.value.dtype), None
    out, state = _frame.causal(_kernel(joint), problem, state, size)
    return out[:, problem.skipped :], state
