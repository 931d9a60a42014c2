"""Looking tables by distance up: for each pair of query and key the entry of their distance, without a gather where that can be."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import Call
from effattn_jax.attention._calls import with_positions
from effattn_jax.attention._pairs import Marks

__all__: list[str] = []

LONGEST = 4  # rows of a table a key, up to which its diagonals are moved: the band is as wide as the table, however few the keys


class Distances:
    """Where a table by distance is looked up: at j - i, or with `mirrored` at i - j, clipped to its `size` rows, of which row `size` div 2 is 0.

    Without a key mask positions are places, and pairs of one distance lie on a diagonal: looking up is moving diagonals (`_diagonals`), not a
    gather, which a TPU does an entry at a time, nor the scatter of its derivative. With a mask positions skip what it hides.
    """

    def __init__(self, marks: Marks, call: Call, size: int, mirrored: bool = False):
        self.keys, self.size, self.mirrored = call.key.shape[1], size, mirrored
        length = call.query.shape[1]
        known = isinstance(length, int) and isinstance(self.keys, int)  # in an export they may be unknown
        self.on_diagonals = marks.key_mask is None and known and size <= LONGEST * self.keys
        self.marks = with_positions(marks, length, self.keys)

    def of_queries(self, scores: jax.Array, row: Any) -> jax.Array:
        """Entries for all keys of what some queries, those from `row` on, have for each row of the table: (B, N, R, size) -> (B, N, R, S)."""
        count = scores.shape[2]
        if not self.on_diagonals:
            return _gathered(scores, self._places(row, count))
        scores = scores[..., ::-1] if self.mirrored else scores
        start = row + self.marks.offset - self._middle()  # the key that the first query finds in the table's first row
        return _diagonals(scores, start, scores[..., :1], scores[..., -1:], self.keys)

    def of_keys(self, scores: jax.Array) -> Any:
        """`f(row, count)`: entries for `count` queries, those from `row` on, of what all keys have: (B, N, S, size) -> (B, N, count, S)."""
        if not self.on_diagonals:
            return lambda row, count: jnp.swapaxes(
                _gathered(scores, jnp.swapaxes(self._places(row, count), 2, 3)), 2, 3
            )
        scores = jnp.swapaxes(scores[..., ::-1] if self.mirrored else scores, 2, 3)
        first, last = scores[:, :, :1], scores[:, :, -1:]
        found = self._by_query(scores)

        def of(row, count):
            here = lax.dynamic_slice_in_dim(found, row, count, axis=2)
            return _diagonals(here, row + self.marks.offset - self._middle(), first, last, self.keys)

        return of

    def _by_query(self, scores: jax.Array) -> jax.Array:
        """The entries of each query that are neither the first nor the last for their keys: (B, N, size, S) -> (B, N, T, size).

        Entry p of query t is that of the key p - middle places after it: row p of the scores, p entries further to the left.
        """
        length = self.marks.query_positions.shape[1]
        around = length + self.size  # so that every key that a query looks for has a place
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (around, around)))
        width = scores.shape[-1]
        flat = scores.reshape(*scores.shape[:2], self.size * width)
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, self.size)))
        start = jnp.clip(self.marks.offset - self._middle() + around, 0, width - length)
        rows = flat.reshape(*scores.shape[:3], width + 1)
        return jnp.swapaxes(lax.dynamic_slice_in_dim(rows, start, length, axis=3), 2, 3)

    def _middle(self):
        return self.size - 1 - self.size // 2 if self.mirrored else self.size // 2

    def _places(self, row, count):
        query = lax.dynamic_slice_in_dim(self.marks.query_positions, row, count, 1)
        apart = self.marks.key_positions[:, None, :] - query[:, :, None]
        return jnp.clip(self.size // 2 + (-apart if self.mirrored else apart), 0, self.size - 1)[:, None]


def _gathered(scores: jax.Array, place: jax.Array) -> jax.Array:
    """Entries `place` (B | 1, 1, R, S) along the last axis of scores (B, N, R, rows)."""
    place = jnp.broadcast_to(place, (*scores.shape[:3], place.shape[-1]))
    return jnp.take_along_axis(scores, place, axis=-1)


def _diagonals(rows: jax.Array, start: Any, first: jax.Array, last: jax.Array, keys: int) -> jax.Array:
    """out[..., a, s] = rows[..., a, s - start - a], (..., A, P) -> (..., A, S); before its entries a row has `first`, behind them `last`.

    Rows between zeros are read as rows one entry shorter: each begins one entry further to the left than the row before.
    """
    *lead, count, size = rows.shape
    band = size + count - 1
    if count > 1:
        long = jnp.pad(rows, [(0, 0)] * (len(lead) + 1) + [(count - 1, count - 1)])
        length = long.shape[-1] - 1
        flat = long.reshape(*lead, count * (length + 1))[..., count - 1 : count - 1 + count * length]
        rows = flat.reshape(*lead, count, length)[..., :band]
    place = jnp.clip(start + band, 0, keys + band)  # among as many more columns at both ends, so that the band has one
    wide = jnp.broadcast_to(jnp.zeros_like(rows[..., :1]), (*lead, count, keys + 2 * band))  # sharded as the rows are
    wide = lax.dynamic_update_slice_in_dim(wide, rows, place, axis=-1)[..., band : band + keys]
    entry = jnp.arange(keys)[None] - start - jnp.arange(count)[:, None]
    entry = entry.reshape(*(1,) * len(lead), count, keys)
    return jnp.where(entry < 0, first, jnp.where(entry < size, wide, last))
