"""Which keys a block of rows can see, as a range: what lies outside is never computed.

A window bounds it by positions. Segment ids and masks over keys or queries bound it by what the blocks hold: a block of rows and one of keys meet
only if the ranges of their ids overlap, and the sets of their ids modulo 32, which keep the padding behind the last document apart from the
documents before it. So documents packed into a row cost the sum of the squares of their lengths, not the square of the sum. A range is that
of all rows of the batch together, and of all that `jax.vmap` maps: the longest document at a place decides. Ids in any order are
right; ids in order, as packing gives them, leave nothing to spare but the edges of blocks. Arrays over pairs bound nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax.attention._pairs import Marks, Spec

__all__: list[str] = []

_MOST = 256  # stretches that rows, or keys, are cut into at most, so that what meets what is a small array however short the blocks are


class Span(NamedTuple):
    """The keys [low, high) that a block of rows sees, the first `clean` blocks of which need no mask."""

    low: Any
    high: Any
    clean: Any


class Bounds(NamedTuple):
    """The keys [low, high) that marks leave to each stretch of `size` rows, a whole number of blocks, whatever the window."""

    low: jax.Array  # (stretches,)
    high: jax.Array
    size: int

    def of(self, row: Any) -> tuple[jax.Array, jax.Array]:
        """Those of a block that begins, but for being moved back at the end, at this row."""
        return self.low[row // self.size], self.high[row // self.size]


def span(spec: Spec, marks: Marks, bounds: Bounds | None, block: Any, length: int, keys: int) -> Span:
    """Of a block of rows by its number; the last one is moved back to end with the rows."""
    first = marks.offset + jnp.minimum(block * spec.rows, length - spec.rows)
    last = first + spec.rows - 1
    in_order = marks.query_places is None and marks.key_places is None
    low = jnp.clip(spec.keys_before(first - spec.left), 0, keys) if in_order and spec.left is not None else 0
    high = jnp.clip(spec.keys_before(last + spec.right + 1), low, keys) if in_order and spec.right is not None else keys
    if in_order and spec.stretch is not None:
        low = jnp.clip(first // spec.stretch * spec.stretch, low, high)
        high = jnp.clip((last // spec.stretch + 1) * spec.stretch, low, high)
    if bounds is not None:
        least, most = bounds.of(block * spec.rows)
        low = jnp.maximum(low, least)
        high = jnp.maximum(low, jnp.minimum(high, most))
    if not marks.only_window or any(x is not None for x in (spec.left, spec.hole, spec.period, spec.stretch)):
        return Span(low, high, 0)
    inner = keys if spec.right is None else jnp.clip(spec.keys_before(first + spec.right + 1), 0, keys)
    return Span(low, high, inner // spec.columns)


def bounds_of(spec: Spec, marks: Marks, length: int, keys: int) -> Bounds | None:
    """What segments and masks over keys and queries leave, None where there are none of them."""
    if marks.key_segments is None and marks.key_mask is None and marks.query_mask is None:
        return None
    rows, columns = _stretch(spec.rows, length), _stretch(spec.columns, keys)
    of_rows = extents_of(*_given(marks.query_segments, marks.query_mask, length), rows)
    of_keys = extents_of(*_given(marks.key_segments, marks.key_mask, keys), columns)
    low, high = range_of(_anywhere(meeting(of_rows, of_keys)), 1)
    return Bounds(low * columns, jnp.minimum(high * columns, keys), rows)


def _stretch(block: int, length: int) -> int:
    """The least number of whole blocks, in steps, of which `_MOST` or fewer are as long as everything; no longer than that."""
    return min(block * -(-length // (block * _MOST)), length)


class Extents(NamedTuple):
    """(B | 1, stretches) each: the least and the greatest id of a stretch, and a bit for each id modulo 32; what is masked has none."""

    least: jax.Array
    most: jax.Array
    bits: jax.Array


def _given(ids: jax.Array | None, mask: jax.Array | None, length: int) -> tuple[jax.Array, jax.Array]:
    ids = jnp.zeros((1, length), jnp.int32) if ids is None else ids
    return ids, jnp.ones((1, length), bool) if mask is None else mask


def extents_of(ids: jax.Array, mask: jax.Array, size: int) -> Extents:
    """Of the stretches of so many places that ids and mask, (B | 1, L), are cut into."""
    limits, bits = jnp.iinfo(ids.dtype), jnp.uint32(1) << (ids & 31).astype(jnp.uint32)
    return Extents(
        _in_stretches(jnp.where(mask, ids, limits.max), size).min(2),
        _in_stretches(jnp.where(mask, ids, limits.min), size).max(2),
        jax.lax.reduce_or(_in_stretches(jnp.where(mask, bits, 0), size), (2,)),
    )


def meeting(of_rows: Extents, of_keys: Extents) -> jax.Array:
    """Whether a stretch of rows and one of keys may hold a common id, (B | 1, stretches of rows, of keys)."""
    meet = (of_rows.least[:, :, None] <= of_keys.most[:, None]) & (of_keys.least[:, None] <= of_rows.most[:, :, None])
    return meet & (of_rows.bits[:, :, None] & of_keys.bits[:, None] != 0)


def range_of(meet: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The least [low, high) along `axis` that holds all that is true, [0, 0) where nothing is."""
    some = meet.any(axis)
    low, high = jnp.argmax(meet, axis=axis), meet.shape[axis] - jnp.argmax(jnp.flip(meet, axis), axis=axis)
    return tuple(jnp.where(some, x, 0).astype(jnp.int32) for x in (low, high))


def _in_stretches(x: jax.Array, size: int) -> jax.Array:
    """(B, L) as (B, stretches, size); the last one ends with L, as the last block of the loops does."""
    whole = (x.shape[1] - 1) // size * size
    if whole:
        x = jnp.concatenate([x[:, :whole], x[:, x.shape[1] - size :]], axis=1)
    return x.reshape(x.shape[0], whole // size + 1, size)


@jax.custom_batching.custom_vmap
def _anywhere(meet: jax.Array) -> jax.Array:
    """Whether blocks meet in any row of the batch; one answer for all that `jax.vmap` maps too, or loops would run on after their end, masked."""
    return meet.any(0)


@_anywhere.def_vmap
def _anywhere_mapped(_: int, mapped: list[bool], meet: jax.Array) -> tuple[jax.Array, bool]:
    return _anywhere(meet.any(0)), False
