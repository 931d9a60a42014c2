"""Where each token of a row stands and whether it sees anything, with padding, packed documents and earlier calls counted as they should be."""

from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effattn_jax._contract import Call

__all__: list[str] = []


def count_positions(
    shape: tuple[int, int],
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    first: jax.Array | None = None,
    last_segment: jax.Array | None = None,
) -> jax.Array:
    """A token's place: how many real tokens of its segment stand before it.

    Padding is not counted, so a row padded on the left has the positions of the row alone; a boundary of segments
    starts again at 0.

    Args:
      shape: (B, T).
      mask: (B, T) bool, True where a token is real.
      segment_ids: (B, T).
      first: (B,) tokens counted by earlier calls, which the first segment goes on from.
      last_segment: (B,) segment of those; another one at the start of this call is a boundary.

    Returns:
      (B, T) int32, or (1, T) where all rows are alike.

    >>> import jax.numpy as jnp
    >>> count_positions((1, 5), segment_ids=jnp.array([[7, 7, 7, 8, 8]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    if mask is None:
        before = jnp.arange(shape[1], dtype=jnp.int32)[None]
    else:
        real = mask.astype(jnp.int32)
        before = jnp.cumsum(real, axis=1) - real
    start = jnp.zeros((1, 1), jnp.int32) if first is None else -first[:, None]
    if segment_ids is None or shape[1] == 0:
        return before - start
    previous = segment_ids[:, :1] if last_segment is None else last_segment[:, None]
    boundary = segment_ids != jnp.concatenate([previous, segment_ids[:, :-1]], axis=1)
    # The count at the latest boundary is the largest of all so far, and none is negative; `start` holds before any.
    start = start + jnp.zeros_like(boundary, jnp.int32)  # sharded as the ids are, where a broadcast would not be
    return before - jax.lax.cummax(jnp.where(boundary, before, start), axis=1)


def at_own_keys(numbers: jax.Array, offset: jax.Array, length: int, front: jax.Array | int = 0) -> jax.Array:
    """Of the numbers of keys (B | 1, S) those that `length` queries stand at, the first of them at key `offset`: (B | 1, T).

    Queries in front of the first key, at most all of them, stand at `front`, the last T of which (B | 1, T | 1) come before key 0.

    >>> import jax.numpy as jnp
    >>> at_own_keys(jnp.array([[5, 6, 7]]), jnp.int32(-2), 4, front=9).tolist()
    [[9, 9, 5, 6]]
    """
    # Empty slots of a cache may lie behind its keys, so that an offset below 0 says nothing of T and S.
    batch = jnp.zeros_like(jnp.sum(numbers, axis=1, keepdims=True, dtype=numbers.dtype))  # of no keys too
    front = jnp.broadcast_to(batch + front, (numbers.shape[0], length))
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([front, numbers], axis=1), offset + length, length, axis=1)


def ids_without_padding(segment_ids: jax.Array, mask: jax.Array, last_segment: jax.Array | None = None) -> jax.Array:
    """Segment ids (B, T) in which padding has that of the last real token before it, so that its own makes no boundary.

    In front of a row's first real token it has that one's; in a row of padding alone `last_segment` (B,), or what it had.

    >>> import jax.numpy as jnp
    >>> ids_without_padding(jnp.array([[0, 7, 0, 7, 8, 0]]), jnp.array([[False, True, False, True, True, False]])).tolist()
    [[7, 7, 7, 7, 8, 8]]
    """

    def latest(before, here):
        (ids, real), (own_ids, own_real) = before, here
        return jnp.where(own_real, own_ids, ids), real | own_real

    segment_ids, mask = jnp.asarray(segment_ids), jnp.asarray(mask)
    if segment_ids.shape[1] == 0:
        return segment_ids
    ids, real = jax.lax.associative_scan(latest, (segment_ids, mask), axis=1)
    next_ids, _ = jax.lax.associative_scan(latest, (segment_ids, mask), axis=1, reverse=True)
    alone = segment_ids if last_segment is None else last_segment[:, None].astype(segment_ids.dtype)
    return jnp.where(real, ids, jnp.where(real[:, -1:], next_ids, alone))


def with_sight(
    call: Call, mask: jax.Array | None, is_causal: bool, stateful: bool = False, by_runs: bool = False
) -> Call:
    """The call with 0 for the queries that see no key, whose output is 0 whatever they hold: 0 * NaN would be NaN, in gradients too.

    `mask` is over keys, (B, S), and with `stateful` the first segment goes on from keys that are not here. `by_runs`: an id that comes again is
    another document; where it is the same one, rows whose ids go up and down stay as they are. Where queries and keys have segments apart,
    equal ids are all there is to go by.
    """
    (batch, length), keys = call.query.shape[:2], call.key.shape[1]
    unaligned = call.query_segments is not call.key_segments
    if keys == 0 and not stateful:
        return call._replace(query=jnp.zeros_like(call.query))
    if keys == 0 or (not unaligned and mask is None and (length <= keys or not is_causal)):
        return call
    place = jnp.arange(keys)[None]
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    if unaligned:
        latest = jnp.arange(length) + keys - length if is_causal else jnp.full(length, keys)
        seen = jax.vmap(_meets_a_key, in_axes=(0, 0, 0, None))(call.query_segments, call.key_segments, real, latest)
        return call._replace(query=jnp.where(seen[..., None, None], call.query, 0))
    latest, start, end = jax.lax.cummax(jnp.where(real, place, -1), axis=1), 0, keys
    if call.key_segments is not None:
        changes = call.key_segments[:, 1:] != call.key_segments[:, :-1]
        start = jax.lax.cummax(jnp.where(jnp.pad(changes, [(0, 0), (1, 0)], constant_values=True), place, 0), axis=1)
        last = jnp.where(jnp.pad(changes, [(0, 0), (0, 1)], constant_values=True), place + 1, keys)
        end = jax.lax.cummin(last, axis=1, reverse=True)
    seen = (latest >= start) | ((start == 0) & stateful)
    if not is_causal:
        seen = seen | (jax.lax.cummin(jnp.where(real, place, keys), axis=1, reverse=True) < end)
    if is_causal or length == keys:
        seen = seen[:, max(keys - length, 0) :]
        seen = jnp.pad(seen, [(0, 0), (length - seen.shape[1], 0)], constant_values=stateful)
    else:  # without segments: each query sees all that the first key's place does
        seen = jnp.broadcast_to(seen[:, :1], (batch, length))
    if call.key_segments is not None and not by_runs:
        step = jnp.diff(call.key_segments, axis=1)
        seen = seen | ~(jnp.all(step >= 0, axis=1, keepdims=True) | jnp.all(step <= 0, axis=1, keepdims=True))
    return call._replace(query=jnp.where(seen[..., None, None], call.query, 0))


def _meets_a_key(query_ids: jax.Array, key_ids: jax.Array, real: jax.Array, latest: jax.Array) -> jax.Array:
    """Whether a real key with its id stands at its latest place or before, for each query (T,): asked of the first such key, found by sorting."""
    order = jnp.lexsort((~real, key_ids))
    first = jnp.searchsorted(key_ids[order], query_ids)
    first = order[jnp.minimum(first, key_ids.shape[0] - 1)]
    return (key_ids[first] == query_ids) & real[first] & (first <= latest)


def by_runs(call: Call) -> Call:
    """The call with an id of its own for each stretch of equal ids, for kernels to which one that comes again is another document.

    Not where queries and keys have segments apart: there equal ids are all there is to go by.
    """
    ids = call.key_segments
    if ids is None or call.query_segments is not ids:
        return call
    ids = number_runs(ids)
    return call._replace(query_segments=ids, key_segments=ids)


def number_runs(ids: jax.Array) -> jax.Array:
    """Numbers of the stretches of equal ids (B, T), from 0 on: an id that comes again is another document.

    >>> import jax.numpy as jnp
    >>> number_runs(jnp.array([[7, 7, 2, 7]])).tolist()
    [[0, 0, 1, 2]]
    """
    changes = jnp.concatenate([jnp.zeros_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


def rows_of_table(table: jax.Array, places: jax.Array, plain: bool = False) -> jax.Array:
    """Rows of a table (L, ...) for places (B | 1, S): (B | 1, S, ...), NaN beyond its end; `plain` places are 0, 1, ..."""
    table = jnp.asarray(table)
    if plain:
        return table[None, : places.shape[1]]
    spec = jax.typeof(places).sharding.spec
    sharded = {}
    if any(spec):  # on a mesh of Explicit axes a gather wants to be told
        sharded = {"out_sharding": PartitionSpec(*spec, *(None,) * (table.ndim - 1))}
    return table.at[places].get(mode="fill", fill_value=jnp.nan, **sharded)


def split_heads(x: jax.Array, query: jax.Array) -> jax.Array:
    """Keys or values (B, S, K, ...) split over devices by head as queries (B, T, N, ...) are, where each device has whole groups; else as they came."""
    sharding = jax.typeof(query).sharding
    names = sharding.spec[2]
    names = names if isinstance(names, tuple) else (names,)
    if names == (None,) or x.shape[2] % prod(sharding.mesh.shape[name] for name in names):
        return x
    return split_like(x, 2, query, 2)


def split_like(table: jax.Array, axis: int, array: jax.Array, array_axis: int) -> jax.Array:
    """The table with one axis split over devices as an axis of the array is, which products of the two along both ask for on a mesh of Explicit axes."""
    name = jax.typeof(array).sharding.spec[array_axis]
    spec = list(jax.typeof(table).sharding.spec)
    if spec[axis] == name:
        return table
    spec[axis] = name
    return jax.sharding.reshard(table, PartitionSpec(*spec))
