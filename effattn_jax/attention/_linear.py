"""What plain and gated linear attention share: alignment of the ends, segments, directions, states.

    o_i = sum_j w_ij phi(q_i).phi(k_j) v_j  /  sum_j w_ij phi(q_i).phi(k_j)       w_ij = exp(sum of decays in between)

Causal calls are one run of the outer-product recurrence, calls in both directions two, calls without order one product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import Call, accumulator, check_call, choose, key_mask, positive
from effattn_jax.attention.features import resolve
from effattn_jax.recurrence._outer_chunks import Options, masked, normalized, outer_product, repeat_heads
from effattn_jax.recurrence.outer_product import check_decay

__all__ = ["LinearState"]


class LinearState(NamedTuple):
    """What linear attention remembers.

    Attributes:
      kv: sum of phi(k) v^T, (*B, K, M, V), float32 at least.
      total: sum of phi(k), (*B, K, M), or None when not normalised.
      segment: id of the segment in progress, (*B,) int32.
    """

    kv: jax.Array
    total: jax.Array | None
    segment: jax.Array


def empty_state(
    batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype, *, normalize=True, gated=False
) -> LinearState:
    """The state before the first token; `capacity` does not matter, the state never grows."""
    del capacity
    lead = (batch,) if isinstance(batch, int) else tuple(batch)
    heads = num_heads if gated else num_kv_heads
    dtype = accumulator(dtype)
    kv = jnp.zeros((*lead, heads, head_dim, value_dim), dtype)
    return LinearState(kv, kv[..., 0] if normalize else None, jnp.zeros(lead, jnp.int32))


class _Problem(NamedTuple):
    """A call with its feature map resolved and both lengths made equal."""

    query: jax.Array  # (B, T, N, M)
    key: jax.Array  # (B, T, K, M)
    value: jax.Array  # (B, T, K, V)
    log_decay: jax.Array | None  # (B, T, K[, M])
    mask: jax.Array | None  # (B, T) over keys
    segments: jax.Array | None  # (B, T)
    skipped: int  # rows in front that stand for no query
    feature_map: Callable | None


def _front(x: jax.Array | None, count: int, mode: str = "constant") -> jax.Array | None:
    if x is None or count == 0:
        return x
    return jnp.pad(x, [(0, 0), (count, 0)] + [(0, 0)] * (x.ndim - 2), mode=mode)


def _align(call: Call, mask, log_decay, feature_map: Callable | None) -> _Problem:
    """Ends aligned: missing queries in front read nothing, missing keys in front are masked."""
    query, key, value = call.query, call.key, call.value
    length, keys = query.shape[1], key.shape[1]
    missing_queries, missing_keys = max(keys - length, 0), max(length - keys, 0)
    if missing_keys:
        mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    segments = call.query_segments if length >= keys else call.key_segments
    front = partial(_front, count=missing_keys)
    return _Problem(
        _front(query, missing_queries), front(key), front(value), front(log_decay), front(mask), segments, missing_queries, feature_map
    )  # fmt: skip


def _causal(p: _Problem, state: LinearState | None, size: int | None, options: Options) -> tuple[Any, LinearState]:
    carry = None if state is None else (state.kv, state.total)
    last = None if state is None else state.segment
    segments = p.segments
    if segments is None and last is not None:
        last_segment = last
    else:
        last_segment = jnp.zeros(p.key.shape[:1], jnp.int32) if segments is None else segments[:, -1]
    out, (kv, total) = outer_product(
        p.query,
        p.key,
        p.value,
        p.log_decay,
        carry,
        segments=segments,
        last_segment=last,
        key_mask=p.mask,
        size=size,
        options=options,
    )
    return out, LinearState(kv, total, last_segment)


def _both_ways(p: _Problem, size: int | None, options: Options) -> jax.Array:
    """Past and present by one pass, the future by the same pass over reversed time without each step's own pair."""
    options = options._replace(split=options.normalize)
    past = outer_product(
        p.query, p.key, p.value, p.log_decay, None, segments=p.segments, key_mask=p.mask, size=size, options=options
    )[0]

    def flip(x):
        return None if x is None else jnp.flip(x, axis=1)

    future = outer_product(
        flip(p.query), flip(p.key), flip(p.value), flip(p.log_decay), None,
        segments=flip(p.segments), key_mask=flip(p.mask), size=size, options=options._replace(strict=True),
    )[0]  # fmt: skip
    both = jax.tree.map(lambda a, b: a + jnp.flip(b, 1), past, future)
    return normalized(*both).astype(p.value.dtype) if options.normalize else both


def _features(
    call: Call, mask: jax.Array | None, feature_map: Callable | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query features by key head (B, T, K, G, M), key features (B, S, K, M) and value in the accumulator's dtype, masked keys as 0."""
    dtype = accumulator(call.query, call.key, call.value)
    query, key, value = (x.astype(dtype) for x in (call.query, masked(call.key, mask), masked(call.value, mask)))
    if feature_map is not None:
        query, key = feature_map(query), masked(feature_map(key), mask)
    heads = key.shape[2]
    return query.reshape(*query.shape[:2], heads, query.shape[2] // heads, query.shape[-1]), key, value


def _all_keys(call: Call, mask: jax.Array | None, feature_map: Callable | None, normalize: bool) -> jax.Array:
    """Without causality or segments one state serves every query."""
    query, key, value = _features(call, mask, feature_map)
    out = jnp.einsum("btkgm,bkmv->btkgv", query, jnp.einsum("bskm,bskv->bkmv", key, value))
    if normalize:
        out = normalized(out, jnp.einsum("btkgm,bkm->btkg", query, key.sum(1)))
    return merge_heads(out).astype(call.value.dtype)


def all_pairs(
    call: Call, features: tuple, is_causal: bool, normalize: bool = True, level: jax.Array | None = None
) -> jax.Array:
    """All pairs, a block of queries at a time: the form to check the others by, and the way for segments that are not aligned in time.

    `features` are those of queries (B, T, K, G, M) and keys (B, S, K, M), and the values; exp(level), (B, S, K), is a factor on a key's.
    """
    length, keys = call.query.shape[1], call.key.shape[1]
    query, key, value = features
    finite = jnp.isfinite(value)

    def block(xs):
        query, row, ids = xs  # (B, R, K, G, M), (R,), (B, R)
        allowed = row[:, None] >= jnp.arange(keys)[None] if is_causal else jnp.ones((row.shape[0], keys), bool)
        allowed = jnp.broadcast_to(allowed, (key.shape[0], *allowed.shape))
        if call.key_segments is not None:
            allowed = allowed & (ids[:, :, None] == call.key_segments[:, None, :])
        scores = jnp.einsum("bikgm,bjkm->bkgij", query, key)
        if level is not None:
            seen = jnp.where(allowed[:, None], jnp.moveaxis(level, 2, 1)[:, :, None], jnp.finfo(level.dtype).min)
            scores = scores * jnp.exp(seen - jnp.max(seen, axis=-1, keepdims=True))[:, :, None]
        scores = jnp.where(allowed[:, None, None], scores, 0)
        out = jnp.einsum("bkgij,bjkv->bikgv", scores, jnp.where(finite, value, 0))
        if normalize:
            out = normalized(out, jnp.moveaxis(scores.sum(-1), 3, 1))
        poisoned = jnp.einsum("bij,bjk->bik", allowed.astype(query.dtype), (~finite).any(-1).astype(query.dtype)) > 0
        return jnp.where(poisoned[..., None, None], jnp.nan, out).astype(call.value.dtype)

    rows = min(_BLOCK, length)
    missing = -length % rows
    row = jnp.arange(length + missing) + keys - length
    ids = jnp.zeros(query.shape[:2], jnp.int32) if call.query_segments is None else call.query_segments

    def blocks(x, axis):
        x = jnp.pad(x, [(0, missing if a == 1 else 0) for a in range(x.ndim)]) if axis else x
        return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // rows, rows, *x.shape[axis + 1 :]), axis, 0)

    out = lax.map(jax.checkpoint(block), (blocks(query, 1), blocks(row, 0), blocks(ids, 1)))
    return merge_heads(jnp.moveaxis(out, 0, 1).reshape(query.shape[0], length + missing, *out.shape[3:])[:, :length])


def merge_heads(out: jax.Array) -> jax.Array:
    return out.reshape(*out.shape[:2], out.shape[2] * out.shape[3], out.shape[-1])


def _no_state(call: Call, feature_map: Callable | None, normalize: bool) -> LinearState:
    batch, _, heads, dim = call.key.shape
    if feature_map is not None:
        dim = jax.eval_shape(feature_map, jax.ShapeDtypeStruct((dim,), jnp.float32)).shape[-1]
    dtype = accumulator(call.query, call.key, call.value)
    return empty_state(batch, 0, heads, heads, dim, call.value.shape[-1], dtype, normalize=normalize)


_FORMS = (None, "dense", "chunked")
_BLOCK = 128  # query rows at a time where all pairs are formed


def _attend(
    call: Call, mask: jax.Array | None, log_decay: jax.Array | None, feature_map: str | Callable, normalize: bool,
    is_causal: bool, state: LinearState | None, return_state: bool, size: int | None, implementation: str | None,
) -> Any:  # fmt: skip
    """The call behind both members of the family; all arrays have one batch axis."""
    feature_map, inside = resolve(feature_map)
    if not inside:
        dtype = accumulator(call.query, call.key)
        key = masked(feature_map(masked(call.key, mask).astype(dtype)), mask)
        call = call._replace(query=feature_map(call.query.astype(dtype)), key=key)
        feature_map = None
    aligned = call.query_segments is call.key_segments
    if not aligned and (state is not None or return_state or log_decay is not None):
        raise ValueError(
            "segment_ids must be one array (*B, T), not a pair, with a state or a decay: one state follows one sequence"
        )
    length, keys = call.query.shape[1], call.key.shape[1]
    if max(length, keys) == 0 or (length == 0 and not return_state):
        return jnp.zeros((*call.query.shape[:3], call.value.shape[-1]), call.value.dtype), state or _no_state(
            call, feature_map, normalize
        )
    if implementation == "dense" or not aligned:
        return all_pairs(call, _features(call, mask, feature_map), is_causal, normalize), None
    if not is_causal and call.query_segments is None and log_decay is None:
        return _all_keys(call, mask, feature_map, normalize), None
    problem = _align(call, mask, log_decay, feature_map)
    options = Options(normalize=normalize, feature_map=feature_map)
    out, state = _causal(problem, state, size, options) if is_causal else (_both_ways(problem, size, options), None)
    return out[:, problem.skipped :], state


def run(
    name: str, arrays: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: LinearState | None, return_state: bool,
    implementation: str | None, chunk_size: int | None, feature_map: Any, normalize: bool, log_decay: Any = None,
) -> Any:  # fmt: skip
    """Checks, batch axes, and the result with or without its state."""
    choose("implementation", implementation, _FORMS)
    positive(chunk_size=chunk_size)
    stateful = return_state or initial_state is not None
    call = check_call(*arrays, is_causal=is_causal, segment_ids=segment_ids, stateful=stateful)
    mask = key_mask(call, name, arrays[3], arrays[4])
    if implementation == "dense" and stateful:
        raise ValueError("implementation='dense' has no state; leave implementation None to pass or return one")
    heads = call.query.shape[2]
    log_decay = check_decay(log_decay, call.key, heads, call.batch)
    if log_decay is not None:
        call = call._replace(key=repeat_heads(call.key, heads), value=repeat_heads(call.value, heads))
    if scale is not None:
        call = call._replace(query=call.query * jnp.asarray(scale, call.query.dtype))
    if initial_state is not None:
        initial_state = _check_state(initial_state, call, normalize)
    out, state = _attend(
        call, mask, log_decay, feature_map, normalize, is_causal, initial_state, return_state, chunk_size, implementation
    )  # fmt: skip
    out = call.restore(out)
    if not return_state:
        return out
    return out, jax.tree.map(call.restore, state)


def _check_state(state: Any, call: Call, normalize: bool) -> LinearState:
    """The state with one batch axis, or the ValueError that says what it should have been."""
    heads, lead = call.key.shape[2], call.batch
    kv = getattr(state, "kv", None)
    rule = f"initial_state must be the LinearState of an earlier call, kv of shape (*B, K, M, V) = {(*lead, heads, 'M', call.value.shape[-1])}"
    ok = (
        isinstance(state, LinearState)
        and kv.ndim == len(lead) + 3
        and kv.shape[:-2] == (*lead, heads)
        and kv.shape[-1] == call.value.shape[-1]
    )
    if not ok or (state.total is not None) != normalize:
        got = (
            f"kv {kv.shape}, total {'absent' if state.total is None else 'present'}"
            if isinstance(state, LinearState)
            else type(state).__name__
        )
        raise ValueError(f"{rule}, total {'present' if normalize else 'absent'}; got {got}")
    return jax.tree.map(lambda x: x.reshape(call.query.shape[0], *x.shape[len(lead) :]), state)
