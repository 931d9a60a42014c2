"""The state of softmax attention: the keys and values so far, in a buffer of fixed size, in one that grows, or the last W of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._compiled import when_known
from effattn_jax._contract import Call, positive
from effattn_jax._places import split_like

__all__ = ["Cache", "cache"]


class Cache(NamedTuple):
    """Keys and values of the past.

    Attributes:
      key: (*B, S, K, H), S the slots.
      value: (*B, S, K, V).
      valid: whether a slot holds a key that may be seen, (*B, S) bool.
      segment: segment id of each slot, (*B, S) int32.
      last: id of the segment in progress, (*B,) int32.
      length: slots in use, () int32; None where all are (a cache that grows, or a window's).
    """

    key: jax.Array
    value: jax.Array
    valid: jax.Array
    segment: jax.Array
    last: jax.Array
    length: jax.Array | None


def cache(
    batch: int | tuple[int, ...],
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> Cache:
    """An empty cache of fixed size, to pass as `initial_state` of softmax attention.

    Its shapes stay the same from call to call, so one compiled step serves a whole decoding. Writing past its end is a ValueError where the
    length is known, and gives NaN outputs under jit.

    Args:
      batch: the batch axes *B.
      capacity: slots: the longest sequence it will hold.
      num_kv_heads: K.
      head_dim: H.
      value_dim: V; None is H.
      dtype: of the stored keys and values.

    Returns:
      a `Cache` of capacity (H + V) K numbers a sequence.

    Raises:
      ValueError: when a size is not a positive integer.

    >>> cache(2, 16, num_kv_heads=4, head_dim=8).key.shape
    (2, 16, 4, 8)
    """
    positive(capacity=capacity, num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
    lead = (batch,) if isinstance(batch, int) else tuple(batch)
    key = jnp.zeros((*lead, capacity, num_kv_heads, head_dim), dtype)
    value = jnp.zeros((*lead, capacity, num_kv_heads, value_dim or head_dim), dtype)
    ids = jnp.zeros((*lead, capacity), jnp.int32)
    return Cache(key, value, ids > 0, ids, jnp.zeros(lead, jnp.int32), jnp.zeros((), jnp.int32))


def flat(state: Cache, call: Call) -> Cache:
    """The state with one batch axis, or the ValueError that says what it should have been."""
    want = (*call.batch, "S", *call.key.shape[2:])
    ok = isinstance(state, Cache) and state.key.ndim == len(want)
    ok = ok and state.key.shape[: len(call.batch)] == call.batch and state.key.shape[-2:] == call.key.shape[2:]
    if not ok or state.value.shape[-1] != call.value.shape[-1]:
        got = (state.key.shape, state.value.shape) if isinstance(state, Cache) else type(state).__name__
        raise ValueError(
            f"initial_state must be a Cache with keys (*B, S, K, H) = {want} and values to match; got {got}"
        )
    rank = len(call.batch)
    parts = [x.reshape(call.query.shape[0], *x.shape[rank:]) for x in state[:-1]]
    return Cache(*parts, state.length)


def restored(state: Cache, call: Call) -> Cache:
    """The state with the caller's batch axes."""
    return Cache(*(call.restore(x) for x in state[:-1]), state.length)


def start(call: Call, valid: jax.Array | None) -> Cache:
    """The state after a call without one: it grows from here on."""
    ids = jnp.zeros(call.key.shape[:2], jnp.int32) if call.key_segments is None else call.key_segments
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    ids, valid = _with_rows_of(call, ids), _with_rows_of(call, valid)
    last = ids[:, -1] if ids.shape[1] else jnp.zeros(ids.shape[:1], jnp.int32)
    return Cache(call.key, call.value, valid, ids, last, None)


def _with_rows_of(call: Call, x: jax.Array) -> jax.Array:
    """An array whose first axis is the batch, sharded over it as the keys are (on meshes of Explicit axes)."""
    return split_like(jnp.asarray(x), 0, call.key, 0)


def extend(state: Cache, call: Call, valid: jax.Array | None) -> Cache:
    """The state with the keys, values and ids of a call written behind what it holds."""
    new = start(call, valid)
    state = state._replace(**{name: _with_rows_of(call, getattr(state, name)) for name in Cache._fields[:-1]})
    if call.key_segments is None:
        new = new._replace(segment=jnp.broadcast_to(state.last[:, None], new.segment.shape), last=state.last)
    count = call.key.shape[1]
    if state.length is None:
        joined = [
            jnp.concatenate([old, x.astype(old.dtype)], axis=1) for old, x in zip(state[:4], new[:4], strict=True)
        ]
        return Cache(*joined, new.last if count else state.last, None)
    capacity = state.key.shape[1]
    if count > capacity:
        raise _full("its", count, capacity)
    when_known(partial(_require_room, count, capacity), state.length)
    written = [
        lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), state.length, axis=1)
        for old, x in zip(state[:4], new[:4], strict=True)
    ]
    return Cache(*written, new.last if count else state.last, state.length + count)


def _require_room(count: int, capacity: int, held: np.ndarray) -> None:
    if held + count > capacity:
        raise _full(held, count, capacity)


def _full(held: Any, count: int, capacity: int) -> ValueError:
    return ValueError(
        f"initial_state is full: {held} tokens and {count} more do not fit a capacity of {capacity}; make a larger cache"
    )


def last_slots(state: Cache, count: int) -> Cache:
    """The last `count` slots, with slots that nobody may see in front where there were fewer."""
    missing = max(count - state.key.shape[1], 0)
    parts = [jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2)) for x in state[:4]] if missing else state[:4]
    return Cache(*(x[:, x.shape[1] - count :] for x in parts), state.last, None)
