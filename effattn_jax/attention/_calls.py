"""What every softmax call does before and after its kernel: checks, the keys of its state, marks, the state to return."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, Call, accumulator, check_call, is_whole, scale_or, scaled
from effattn_jax._places import at_own_keys, with_sight
from effattn_jax.attention import kv_cache as caches
from effattn_jax.attention._pairs import Arrays, Marks, Spec, allowed

__all__: list[str] = []

FORMS = (None, "dense", "chunked")
FAR = 2**30  # neighbours that reach past both ends of any row, and positions beyond them still fit int32
DENSE_PAIRS = 256 * 512  # up to so many (query, key) pairs a head all scores are formed at once


def window_bounds(window: Any, is_causal: bool) -> tuple[int | None, int | None]:
    """(left, right) counts of neighbours, None without bound, from an int, a pair or None."""
    pair = window if isinstance(window, tuple | list) else (window, window)
    ok = len(pair) == 2 and all(w is None or is_whole(w, 0) for w in pair)
    if not ok:
        raise ValueError(
            f"window must be an int >= 0 or a pair (left, right) of them, neighbours on each side; got {window!r}"
        )
    left, right = (None if w is None or w >= FAR else w for w in pair)
    return left, (0 if is_causal else right)


def block_sizes(
    length: int,
    keys: int,
    groups: int,
    bounds: tuple[int | None, int | None],
    chunk_size: int | None,
    budget: int = 2**21,
    segmented: bool = False,
) -> tuple[int, int]:
    """Rows and columns of a block: up to `budget` scores over the heads, as fit a cache, and no wider than a window makes sense of.

    `segmented`: whether keys have segments, as packed rows and caches have: long blocks would touch more documents.
    """
    if chunk_size is not None:
        return min(chunk_size, length), min(chunk_size, keys)
    left, right = bounds
    windowed = left is not None and right is not None
    rows, columns = 256 if windowed or segmented else 512, 512  # products of more rows use more of a machine
    while groups * rows * columns > budget and rows > 64:
        rows, columns = rows // 2, columns // 2 if rows < columns else columns
    if windowed:
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


def with_positions(marks: Marks, length: int, keys: int) -> Marks:
    """Marks with the positions that a bias reads: of keys, how many that the key mask shows stand before; of a query, that of its own key."""
    count = jnp.arange(keys)[None]
    if marks.key_mask is not None:
        real = marks.key_mask.astype(jnp.int32)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
    query = at_own_keys(count, marks.offset, length, jnp.arange(length)[None] - length)
    return marks._replace(query_positions=query, key_positions=count)


def number_scale(query: jax.Array, scale: Any) -> tuple[jax.Array, float]:
    """The scale as a number, 1 / sqrt(H) for None; an array goes into the query."""
    scale = scale_or(1 / math.sqrt(max(query.shape[-1], 1)), scale)
    if isinstance(scale, numbers.Real):
        return query, float(scale)
    return scaled(query, scale), 1.0


def rows_with_keys(spec: Spec, marks: Marks, call: Call, rows: int = 128) -> jax.Array:
    """Which queries see any key, (B | 1, T, N | 1, 1), asked of all pairs, a block of rows after the other."""
    (length, heads), (keys, kv_heads) = call.query.shape[1:3], call.key.shape[1:3]
    rows = min(rows, length)
    starts = jnp.minimum(jnp.arange(-(-length // rows)) * rows, length - rows)
    seen = jax.lax.map(lambda row: allowed(spec, marks, kv_heads, row, rows, 0, keys).any(-1), starts)
    before, last = (len(starts) - 1) * rows, seen[-1]  # (B | 1, K | 1, G | 1, rows), moved back to end with the rows
    if before:
        first = jnp.moveaxis(seen[:-1], 0, -2)
        first = first.reshape(*first.shape[:-2], before)
        last = jnp.concatenate([first, last[..., rows - (length - before) :]], axis=-1)
    if last.shape[1:3] != (1, 1):
        last = jnp.broadcast_to(last, (last.shape[0], kv_heads, heads // kv_heads, length))
    return jnp.moveaxis(last.reshape(last.shape[0], last.shape[1] * last.shape[2], length), 1, 2)[..., None]


def asked_for(out: Any, state: Any, return_state: bool, weights: Any, return_weights: bool) -> Any:
    """out, or out with what else a call returns behind it."""
    found = (out, *[state] * return_state, *[weights] * return_weights)
    return found if len(found) > 1 else out


class Prepared(NamedTuple):
    """A softmax call over all the keys there are, those of its state included."""

    call: Call  # as given
    arrays: Arrays
    marks: Marks
    offset: int | None  # of the marks, where it is known at trace time
    after: caches.Cache | None  # the state to return
    spec: Spec  # causal or not, one block of everything

    def whole(self, masked_apart: bool = False) -> Call:
        """The call over all the keys, for scores that meet the query before its rows know what they see: rows that see nothing hold 0;
        `masked_apart`: but for those that a mask over pairs, or ids apart, hide all keys from, since the scores are handed on without these."""
        call = self.call._replace(query=self.arrays.query, key=self.arrays.key, value=self.arrays.value)
        aligned = self.call.key.shape[1] == call.key.shape[1] and call.query_segments is call.key_segments
        if aligned and (masked_apart or self.marks.mask is None):
            return with_sight(call, self.marks.key_mask, self.spec.right == 0)
        if self.no_pairs or masked_apart:
            return call
        return call._replace(query=jnp.where(rows_with_keys(self.spec, self.marks, call), call.query, 0))

    @property
    def no_pairs(self) -> bool:
        return self.arrays.query.shape[1] == 0 or self.arrays.key.shape[1] == 0

    def nothing(self) -> jax.Array:
        """The output of a call without queries or without keys."""
        return jnp.zeros((*self.arrays.query.shape[:3], self.arrays.value.shape[-1]), self.arrays.value.dtype)

    def restore(self, out: jax.Array) -> jax.Array:
        """The output as the caller shaped its inputs; NaN where a cache of fixed size was written past its end."""
        if self.after is not None and self.after.length is not None:
            out = jnp.where(self.after.length > self.after.key.shape[1], jnp.nan, out)
        return self.call.restore(out)

    def results(
        self, out: jax.Array, return_state: bool, return_weights: bool = False, weights: jax.Array | None = None
    ) -> Any:
        """What the call returns: out, or out, the state and the weights, those that are asked for; without pairs there are no weights yet."""
        if return_weights:
            (batch, length, heads, _), keys = self.arrays.query.shape, self.arrays.key.shape[1]
            weights = jnp.zeros((), self.spec.dtype) if weights is None else weights.reshape(batch, heads, length, keys)
            weights = self.call.restore(jnp.broadcast_to(weights, (batch, heads, length, keys)))
        state = caches.restored(self.after, self.call) if return_state else None
        return asked_for(self.restore(out), state, return_state, weights, return_weights)


def prepare(
    arguments: tuple[ArrayLike | None, ...], *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: caches.Cache | None,
    return_state: bool, last_keys: int | None = None, reads_key: bool = True,
) -> Prepared:  # fmt: skip
    """A call (query, key, value, bias, mask) under the contract, checked; `last_keys` bounds the state that grows, and `reads_key=False` keeps
    the keys out of it."""
    key, bias = arguments[1], arguments[3]
    totals = ()
    if isinstance(initial_state, caches.Cache):
        slots = initial_state.key.shape[-3]
        totals = (slots if initial_state.length is not None else slots + jnp.shape(key)[-3],)
    stateful = return_state or initial_state is not None
    call = check_call(*arguments, is_causal=is_causal, segment_ids=segment_ids, stateful=stateful, totals=totals)
    if not reads_key:
        call = call._replace(key=call.key[..., :0])
    state = None if initial_state is None else caches.flat(initial_state, call)
    length, keys = call.query.shape[1], call.key.shape[1]
    if state is not None and last_keys is not None and state.length is None and length > keys:
        raise ValueError(
            f"query must have at most the S = {keys} tokens of key beside the state of a window, which holds the {last_keys} keys before "
            f"them alone; got T = {length}. attention.cache keeps all"
        )
    valid, pair_mask = _split_mask(call, state)
    full, marks, after = _with_state(call, state, valid, last_keys, return_state)
    if call.bias is not None and not callable(call.bias) and call.bias.shape[3] not in (1, full.key.shape[1]):
        raise ValueError(
            f"bias must cover all {full.key.shape[1]} keys of the state after the call; got {jnp.shape(bias)}"
        )
    query, (length, keys) = full.query, (full.query.shape[1], full.key.shape[1])
    if state is None and scale is not None and not isinstance(scale, numbers.Real):  # whose gradient meets all queries
        query = with_sight(full, marks.key_mask, is_causal).query
    query, scale = number_scale(query, scale)
    spec = Spec(None, 0 if is_causal else None, None, scale, length, keys, accumulator(query, full.key, full.value))
    offset = keys - length if state is None or state.length is None else None
    arrays = Arrays(query, full.key, full.value, call.bias)
    marks = marks._replace(mask=pair_mask)
    if callable(call.bias) and marks.key_mask is not None:
        marks = with_positions(marks, length, keys)
    return Prepared(call, arrays, marks, offset, after, spec)
