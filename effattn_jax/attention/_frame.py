"""What every kernel with a state of fixed size shares: its state, alignment of the ends, segments, directions.

A kernel is a function over one row of time, as long in queries as in keys:

    kernel(query, key, value, extras, carry, *, segments, last_segment, key_mask, size, strict) -> (out, carry)

with arrays (B, T, heads, ...), `extras` a tuple of further arrays (B, T, N, ...), `carry` None or the tuple (kv, total, maximum) of
`LinearState`, and `strict` leaving out each step's own pair.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import Call, accumulator, check_call, choose, key_mask, positive, scale_or, scaled
from effattn_jax._places import with_sight
from effattn_jax.attention.features import num_features

__all__ = ["LinearState"]


class LinearState(NamedTuple):
    """What linear attention remembers.

    Attributes:
      kv: sum of phi(k) v^T, (*B, K, M, V), float32 at least.
      total: sum of phi(k), (*B, K, M), or None when not normalised.
      segment: id of the segment in progress, (*B,) int32.
      maximum: greatest exponent so far, (*B, K, M) or one a head, (*B, K, 1), where features are exponentials: kv and total are sums of
        exp(exponent - maximum). Else None.
    """

    kv: jax.Array
    total: jax.Array | None
    segment: jax.Array
    maximum: jax.Array | None = None


def lowest(dtype: Any) -> Any:
    """The maximum of nothing: the lowest finite number, so that differences of maxima are never NaN."""
    return jnp.finfo(dtype).min


def empty_state(
    batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype, *, normalize=True, gated=False, feature_map="elu"
) -> LinearState:  # fmt: skip
    """The state before the first token; `capacity` does not matter, the state never grows."""
    del capacity
    lead = (batch,) if isinstance(batch, int) else tuple(batch)
    lead_heads = (*lead, num_heads if gated else num_kv_heads)
    dtype = accumulator(dtype)
    features = num_features(feature_map, head_dim)
    kv = jnp.zeros((*lead_heads, features, value_dim), dtype)
    maximum = jnp.full(kv.shape[:-1], lowest(dtype), dtype) if feature_map == "exp" and normalize else None
    return LinearState(kv, kv[..., 0] if normalize else None, jnp.zeros(lead, jnp.int32), maximum)


class Problem(NamedTuple):
    """A call with both lengths made equal."""

    query: jax.Array  # (B, T, N, H)
    key: jax.Array  # (B, T, K, H)
    value: jax.Array  # (B, T, K, V)
    extras: tuple[jax.Array | None, ...]  # (B, T, N, ...)
    mask: jax.Array | None  # (B, T) over keys
    segments: jax.Array | None  # (B, T)
    skipped: int  # rows in front that stand for no query


def padded_in_front(x: jax.Array | None, count: int, mode: str = "constant") -> jax.Array | None:
    """`count` steps more before the first one of (B, T, ...); None stays None."""
    if x is None or count == 0:
        return x
    return jnp.pad(x, [(0, 0), (count, 0)] + [(0, 0)] * (x.ndim - 2), mode=mode)


def align(call: Call, mask: jax.Array | None, extras: tuple = ()) -> Problem:
    """Ends aligned: missing queries in front read nothing, missing keys in front are masked."""
    query, key, value = call.query, call.key, call.value
    length, keys = query.shape[1], key.shape[1]
    missing_queries, missing_keys = max(keys - length, 0), max(length - keys, 0)
    if missing_keys:
        mask = jnp.ones(key.shape[:2], bool) if mask is None else mask
    segments = call.query_segments if length >= keys else call.key_segments
    front = partial(padded_in_front, count=missing_keys)
    return Problem(
        padded_in_front(query, missing_queries), front(key), front(value), tuple(map(front, extras)), front(mask), segments, missing_queries
    )  # fmt: skip


def causal(kernel: Callable, p: Problem, state: LinearState | None, size: int | None) -> tuple[Any, LinearState]:
    """The kernel over time, from a state to a state."""
    carry = None if state is None else (state.kv, state.total, state.maximum)
    last = None if state is None else state.segment
    if p.segments is not None:
        last_segment = p.segments[:, -1]
    else:
        last_segment = jnp.zeros(p.key.shape[:1], jnp.int32) if last is None else last
    out, (kv, total, maximum) = kernel(
        p.query, p.key, p.value, p.extras, carry, segments=p.segments, last_segment=last, key_mask=p.mask, size=size
    )
    return out, LinearState(kv, total, last_segment, maximum)


def both_ways(kernel: Callable, p: Problem, size: int | None) -> Any:
    """Past and present by one pass, the future by the same pass over reversed time without each step's own pair: both results."""
    rows = (p.query, p.key, p.value, p.extras)
    past = kernel(*rows, None, segments=p.segments, key_mask=p.mask, size=size)[0]
    flip = partial(jax.tree.map, partial(jnp.flip, axis=1))
    future = kernel(*flip(rows), None, segments=flip(p.segments), key_mask=flip(p.mask), size=size, strict=True)[0]
    return past, flip(future)


def open_call(
    name: str, arrays: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: Any, return_state: bool,
    implementation: str | None, chunk_size: int | None, one_sequence: bool = True,
) -> tuple[Call, jax.Array | None]:  # fmt: skip
    """The call with one batch axis and its key mask, after the checks that all kernels share.

    `one_sequence`: whether queries and keys must have the same segment ids, as they must wherever a state or a decay follows one sequence.
    """
    choose("implementation", implementation, (None, "dense", "chunked", "parallel"))
    positive(chunk_size=chunk_size)
    stateful = return_state or initial_state is not None
    call = check_call(*arrays, is_causal=is_causal, segment_ids=segment_ids, stateful=stateful)
    mask = key_mask(call, name, arrays[3], arrays[4])
    if implementation == "dense" and stateful:
        raise ValueError("implementation='dense' has no state; leave implementation None to pass or return one")
    if call.query_segments is not call.key_segments and (stateful or one_sequence):
        raise ValueError(
            "segment_ids must be one array (*B, T), not a pair, with a state or a decay: one state follows one sequence"
        )
    call = with_sight(call, mask, is_causal, initial_state is not None, by_runs=True)
    if scale is not None:
        call = call._replace(query=scaled(call.query, scale_or(1.0, scale)))
    return call, mask


def refuse(name: str, implementation: str | None, *unknown: str) -> None:
    """Raises the ValueError of kernels that lack one of the family's forms."""
    if implementation in unknown:
        known = ", ".join(form for form in ("None", "chunked", "parallel", "dense") if form not in unknown)
        raise ValueError(f"implementation={implementation!r} is unknown to {name}; known: {known}")


def nothing(call: Call, state: LinearState | None, features: int, *, total: bool, maximum: bool = False) -> Any:
    """The result of a call without queries or keys, and the state that it leaves as it was."""
    out = jnp.zeros((*call.query.shape[:3], call.value.shape[-1]), call.value.dtype)
    if state is not None:
        return out, state
    batch, _, heads, _ = call.key.shape
    dtype = accumulator(call.query, call.key, call.value)
    state = empty_state(batch, 0, heads, heads, features, call.value.shape[-1], dtype, normalize=total)
    return out, state._replace(maximum=jnp.full_like(state.total, lowest(dtype)) if maximum else None)


def close_call(call: Call, out: jax.Array, state: LinearState | None, return_state: bool) -> Any:
    """The result with the caller's batch axes, alone or with its state."""
    out = call.restore(out)
    return (out, jax.tree.map(call.restore, state)) if return_state else out


def check_state(
    state: Any,
    call: Call,
    features: int,
    *,
    total: bool,
    maximum: bool = False,
    level: bool = False,
    heads: int | None = None,
) -> LinearState | None:
    """The state with one batch axis, in the dtype of sums, or the ValueError that says what it should have been."""
    if state is None:
        return None
    lead = call.batch
    kv = (*lead, call.key.shape[2] if heads is None else heads, features, call.value.shape[-1])
    top = kv[:-1] if maximum else (*kv[:-2], 1) if level else None
    want = {"kv": kv, "total": kv[:-1] if total else None, "segment": lead, "maximum": top}
    if not isinstance(state, LinearState):
        got = type(state).__name__
    else:
        got = {name: None if x is None else tuple(jnp.shape(x)) for name, x in state._asdict().items()}
    if got != want:
        shown = ", ".join(f"{name} {'absent' if shape is None else shape}" for name, shape in want.items())
        raise ValueError(
            f"initial_state must be the LinearState of an earlier call, (*B, K, M, V) and so on: {shown}; got {got}"
        )

    def ready(x):
        x = jnp.asarray(x)
        x = x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(accumulator(x, call.query, call.key, call.value))
        return x.reshape(call.query.shape[0], *x.shape[len(lead) :])

    return jax.tree.map(ready, state)
