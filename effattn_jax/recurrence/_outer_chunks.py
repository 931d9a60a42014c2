"""One chunk of the outer-product recurrence, and the kernel that folds it over time.

Pairs inside a chunk by a masked C x C product, everything older through the state at its start. Only sums of decays between two steps are
exponentiated, each <= 0, so nothing overflows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import accumulator
from effattn_jax._derivatives import tie
from effattn_jax.recurrence._chunks import scan_chunks

__all__: list[str] = []

_FLOOR = -1000.0  # exp of it is 0 in float32 and float64, and sums of it stay finite where -inf - -inf would not


class Options(NamedTuple):
    """What a chunk does, fixed at trace time."""

    normalize: bool = False  # divide by q . z
    split: bool = False  # return numerator and denominator apart
    strict: bool = False  # leave out each step's own pair
    feature_map: Callable | None = None  # applied to query and key inside the chunk, where they are still in cache


_DEFAULT = Options()


class Marks(NamedTuple):
    """Integers and booleans (B, T) that say which steps may interact; None where all may."""

    run: jax.Array | None = None  # number of the segment a step is in, counted along time
    run_before: jax.Array | None = (
        None  # number of the segment that the state at the start of the step's chunk belongs to
    )
    key_mask: jax.Array | None = None  # whether the step's key and value exist


def runs(segment_ids: jax.Array, last_id: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments numbered along time (a state before the first step has number 0), and the number at each chunk's start."""
    before = segment_ids[:, :1] if last_id is None else last_id[:, None]
    change = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(change.astype(jnp.int32), axis=1)
    ends = jnp.concatenate([jnp.zeros_like(run[:, :1]), run[:, size - 1 : -1 : size]], axis=1)
    return run, jnp.repeat(ends, size, axis=1)


def _between(decay: jax.Array) -> jax.Array:
    """Sums of decays over (j, i] for every pair of a chunk: (B, C, ...) -> (B, i, j, ...).

    A product with ones, not a difference of cumulative sums: each entry adds only its own terms, so small sums beside large ones stay exact.
    """
    size = decay.shape[1]
    later = jnp.tril(jnp.ones((size, size), bool), -1).reshape(size, size, *(1,) * (decay.ndim - 2))
    terms = jnp.where(later, decay[:, :, None], 0)
    upto = jnp.tril(jnp.ones((size, size), decay.dtype))
    return jnp.einsum("im,bmj...->bij...", upto, terms, precision=lax.Precision.HIGHEST)


def _allowed(marks: Marks, size: int, strict: bool) -> jax.Array:
    """Which pairs of a chunk interact, (B | 1, i, j)."""
    allowed = jnp.tril(jnp.ones((1, size, size), bool), -1 if strict else 0)
    if marks.run is not None:
        allowed = allowed & (marks.run[:, :, None] == marks.run[:, None, :])
    return allowed


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with trailing axes of size 1 up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _heads(x: jax.Array) -> jax.Array:
    """Axes K and G back as N."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _inside(q, k, v, decay_between, allowed, dtype):
    """Pairs of one chunk: scores (B, K, G, i, j), their product with the values, and which rows met a value that is not finite.

    0 * NaN is NaN: values enter the masked product with what is not finite set to 0, and rows that may see such a value become NaN again.
    """
    if decay_between is None:
        scores = jnp.einsum("bikgh,bjkh->bkgij", q, k)
    elif decay_between.ndim == 4:  # one decay a head
        weight = jnp.exp(jnp.where(allowed[..., None], decay_between, -jnp.inf))
        scores = jnp.einsum("bikgh,bjkh->bkgij", q, k) * jnp.moveaxis(weight, 3, 1)[:, :, None]
    else:  # one decay a feature
        weight = jnp.exp(jnp.where(allowed[..., None, None], decay_between, -jnp.inf))
        scores = jnp.einsum("bikgh,bijkh->bkgij", q, k[:, None] * weight)
    scores = jnp.where(allowed[:, None, None], scores, 0)
    finite = jnp.isfinite(v)
    out = jnp.einsum("bkgij,bjkv->bikgv", scores, jnp.where(finite, v, 0))
    bad = jnp.any(~finite, axis=-1).astype(dtype)
    poisoned = (
        jnp.einsum("bij,bjk->bik", jnp.broadcast_to(allowed, (v.shape[0], *allowed.shape[1:])).astype(dtype), bad) > 0
    )
    return scores, out, poisoned[..., None]


def _chunk(options: Options, out_dtype: Any, carry: Any, inputs: Any, marks: Marks) -> tuple[Any, Any]:
    """One chunk: the state (B, K, H, V) [and (B, K, H)] before it, its steps, the state after it and the outputs."""
    state, total = carry
    dtype = state.dtype
    q, k, v, decay = inputs
    k, v = k.astype(dtype), v.astype(dtype)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]).astype(
        dtype
    )  # here, not outside: there it would copy the whole array
    if options.feature_map is not None:
        q, k = options.feature_map(q), options.feature_map(k)
    if marks.key_mask is not None:
        k, v = (jnp.where(_spread(marks.key_mask, x), x, 0) for x in (k, v))
    allowed = _allowed(marks, q.shape[1], options.strict)
    between = from_start = None
    q_state, k_state, kept = q, k, 1
    if decay is not None:
        decay = jnp.maximum(decay.astype(dtype), _FLOOR)
        between, from_start = _between(decay), jnp.cumsum(decay, axis=1)
        q_state = q * jnp.exp(_spread(from_start[:, :, :, None], q))
        k_state = k * _spread(jnp.exp(between[:, -1]), k)
        kept = jnp.exp(from_start[:, -1])
    scores, numerator, poisoned = _inside(q, k, v, between, allowed, dtype)
    old = jnp.einsum("bikgh,bkhv->bikgv", q_state, state)
    old_total = None if total is None else jnp.einsum("bikgh,bkh->bikg", q_state, total)
    v_state = v
    if marks.run is not None:
        sees_state = marks.run == marks.run_before
        old = jnp.where(_spread(sees_state, old), old, 0)
        old_total = None if total is None else jnp.where(_spread(sees_state, old_total), old_total, 0)
        last = marks.run[:, -1:]
        k_state, v_state = (jnp.where(_spread(marks.run == last, x), x, 0) for x in (k_state, v))
        goes_on = (last == marks.run_before[:, -1:])[:, :, None]
        state = jnp.where(goes_on[..., None], state, 0)
        total = None if total is None else jnp.where(goes_on, total, 0)
    numerator = _heads(jnp.where(poisoned[..., None], jnp.nan, numerator + old))
    after = (
        _spread(kept, state) * state + jnp.einsum("bjkh,bjkv->bkhv", k_state, v_state)
        if decay is not None
        else state + jnp.einsum("bjkh,bjkv->bkhv", k_state, v_state)
    )
    if total is None:
        return (after, None), numerator.astype(out_dtype)
    denominator = _heads(jnp.moveaxis(scores.sum(-1), 3, 1) + old_total)
    total = (total if decay is None else _spread(kept, total) * total) + k_state.sum(1)
    if options.split:
        return (after, total), (numerator, denominator)
    return (after, total), normalized(numerator, denominator).astype(out_dtype)


def normalized(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 with zero gradient where there was nothing to normalise."""
    empty = (denominator == 0)[..., None]
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator[..., None]))


def outer_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: tuple[jax.Array, jax.Array | None] | None,
    *,
    segments: jax.Array | None = None,
    last_segment: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    size: int | None = None,
    options: Options = _DEFAULT,
) -> tuple[Any, tuple[jax.Array, jax.Array | None]]:
    """The chunked kernel behind every member of the family: query (B, T, N, H), key (B, T, K, H), value (B, T, K, V), T >= 1.

    Returns (out, (S, z)): out (B, T, N, V), or (numerator, denominator) with `options.split`.
    """
    length = query.shape[1]
    per_feature = log_decay is not None and log_decay.ndim == 4
    size = min(size or (16 if per_feature else 64), length)
    dtype = accumulator(query, key, value)
    if state is None:
        k0 = key[:, 0] if options.feature_map is None else options.feature_map(key[:, 0].astype(dtype))
        z = jnp.zeros_like(k0, dtype)
        state = (
            jnp.zeros_like(jnp.einsum("bkh,bkv->bkhv", z, value[:, 0].astype(dtype))),
            z if options.normalize else None,
        )
    arrays = (query, key, value, log_decay, state, segments, last_segment, key_mask)
    query, key, value, log_decay, state, segments, last_segment, key_mask = tie(arrays)
    missing = -length % size

    def pad(x):
        return x if x is None or missing == 0 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    if segments is not None:
        segments = segments if missing == 0 else jnp.pad(segments, [(0, 0), (0, missing)], mode="edge")
    marks = Marks(*(runs(segments, last_segment, size) if segments is not None else (None, None)), pad(key_mask))
    body = partial(_chunk, options, value.dtype)
    state, out = scan_chunks(body, state, tuple(map(pad, (query, key, value, log_decay))), marks, size=size)
    return (jax.tree.map(lambda x: x[:, :length], out) if missing else out), state
