"""The patterns of sparse attention: a window, every r-th key, global tokens; blocks with summary columns; the largest scores."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._places import split_like
from effattn_jax.attention._blocks import by_rows
from effattn_jax.attention._pairs import Arrays, whole_rows
from effattn_jax.attention._patterns import Part, View, by_class, dense, documents, merge, part

__all__: list[str] = []

_FEW = 16  # keys up to which all scores at once take little room, and less time to compile than loops over blocks


class Union(NamedTuple):
    """A window, keys at multiples of a period, and the first tokens of a document: whichever are given."""

    window: tuple[int, int] | None
    period: int
    num_global: int = 0

    def within(self, places: int) -> "Union":
        """See `Pattern`."""
        window = None if self.window is None else tuple(min(size, places) for size in self.window)
        return Union(window, min(self.period, places), min(self.num_global, places))

    def keys_seen(self, context: int) -> int:
        """How many keys a query sees at most, those that several sets hold counted for each."""
        near = 0 if self.window is None else 1 + sum(self.window)
        return min(context, near + -(-context // self.period) + self.num_global)

    def dense(self, view: View) -> tuple[jax.Array, jax.Array]:
        """See `Pattern`."""
        distance = view.positions()[:, None] - jnp.arange(view.lengths[1])[None]
        see = distance % self.period == 0
        if self.window is not None:
            see = see | ((distance <= self.window[0]) & (-distance <= self.window[1]))
        see = see[None]
        if self.num_global:
            place = documents(view)
            see = see | (place.keys < self.num_global)[:, None]
            if not view.is_causal:
                see = see | self._asking(place.queries)[..., None]
        return dense(view, see[:, None])

    def chunked(self, view: View) -> jax.Array:
        """See `Pattern`."""
        parts = [] if self.window is None else [part(view, left=self.window[0], right=self.window[1])]
        return merge([*parts, self._rest(view), *(self._globals(view) if self.num_global else ())])

    def _rest(self, view: View) -> Part:
        """Multiples of the period outside the window, which in a class of positions are a band, or one with a hole."""
        if self.window is None:
            return by_class(view, self.period)
        left, right = (size // self.period for size in self.window)
        if view.is_causal:
            return by_class(view, self.period, right=-left - 1)
        return by_class(view, self.period, hole=(left, right))

    def _globals(self, view: View) -> list[Part]:
        """Pairs with a global key, and then those of a global query with the other keys, that neither other part has.

        Causal queries at global positions see global keys only.
        """
        outside = {"hole": self.window, "period": self.period}
        if view.marks.key_segments is not None or view.marks.key_mask is not None:
            return self._globals_of_documents(view, **outside)
        (length, keys), count = view.lengths, min(self.num_global, view.lengths[1])
        few = view.cut((0, length), (0, count))
        parts = [at_once(few, **outside) if count <= _FEW else part(few, **outside)]
        rows = tuple(min(max(place - view.offset, 0), length) for place in (0, self.num_global))
        if view.is_causal or rows[0] == rows[1] or count == keys:
            return parts
        some = part(view.cut(rows, (count, keys)), **outside)
        return [*parts, _with_nothing(some, rows[0], length - rows[1])]

    def _asking(self, places: jax.Array) -> jax.Array:
        """Which queries are global; those in front of the first key are not."""
        return (places >= 0) & (places < self.num_global)

    def _globals_of_documents(self, view: View, **outside: Any) -> list[Part]:
        """The same where segments or a mask say which tokens come first: so few of a document that they are brought together."""
        (length, keys), place = view.lengths, documents(view)
        first, asking = place.keys < self.num_global, self._asking(place.queries)
        if any(x is not None and not callable(x) and min(x.shape[2:]) > 1 for x in (view.marks.mask, view.arrays.bias)):
            # An array of all pairs is T x S work by itself.
            parts = [part(view.marked(key_mask=first), **outside)]
            if not view.is_causal:
                parts.append(part(view.marked(key_mask=~first, query_mask=asking), **outside))
            return parts
        one = view.marks.key_segments is None
        real = first if view.marks.key_mask is None else first & view.marks.key_mask
        some = Few.of(real, min(self.num_global, keys) if one else keys, view.arrays.key)
        parts = [part(some.keys(view), **outside)]
        if view.is_causal:
            return parts
        # Padding in front of the first real key counts as a document too.
        most = min(2 * self.num_global, length) if one else length
        some = Few.of(asking, most, view.arrays.query)
        out, lse = part(some.queries(view.marked(key_mask=~first)), **outside)
        zeros, none = jnp.zeros_like(parts[0][0]), jnp.full_like(parts[0][1], -jnp.inf)
        return [*parts, (some.back(out, zeros), some.back(lse, none))]


def at_once(view: View, **changes: Any) -> Part:
    """`part` of a handful of keys, whose scores take no more room than the queries do."""
    arrays = view.arrays._replace(value=view.arrays.value.astype(view.spec.dtype))
    return whole_rows(view.spec._replace(**changes), arrays, view.marks)[:2]


def _taken(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """(B | 1, ..., L, ...) -> (B, ..., C, ...) by an index (B, C) of its own for each row; 0 where that is L."""
    batch, count = index.shape
    index = index.reshape(batch, *[1] * (axis - 1), count, *[1] * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, index, axis, fill_value=0)


class Few(NamedTuple):
    """The marked ones of each row, brought together: `count` places, of which the last are empty where fewer are marked."""

    index: jax.Array  # (B, count)
    full: jax.Array  # (B, count): whether a marked one stands there

    @classmethod
    def of(cls, marked: jax.Array, count: int, like: jax.Array) -> "Few":
        """Those of (B | 1, L), in order, sharded as `like` (B, L, ...) is."""
        marked = marked.astype(jnp.int32) + jnp.zeros_like(like.sum((2, 3)), jnp.int32)
        full, index = lax.top_k(marked, count)  # of equal ones the first comes first
        return cls(index, full > 0)

    def __call__(self, x: jax.Array, axis: int = 1) -> jax.Array:
        """(B, ..., L, ...) -> (B, ..., count, ...); an empty place holds an unmarked one, to be masked."""
        return _taken(x, self.index, axis)

    def back(self, x: jax.Array, base: jax.Array) -> jax.Array:
        """(B, count, ...) put in their places in (B, L, ...)."""
        outside = base.shape[1] + jnp.arange(self.index.shape[1])[None]
        places = jnp.where(self.full, self.index, outside)
        return jax.vmap(lambda base, places, x: base.at[places].set(x, mode="drop", unique_indices=True))(
            base, places, x
        )

    def keys(self, view: View) -> View:
        """The view of these keys only."""
        marks, (query, key, value, bias) = view.marks, view.arrays
        marks = marks._replace(
            mask=self._or(marks.mask, 3), key_mask=self.full, key_segments=self._or(marks.key_segments),
            key_places=self.index, key_positions=self._or(marks.key_positions),
        )  # fmt: skip
        return view._replace(arrays=Arrays(query, self(key), self(value), self._or(bias, 3)), marks=marks)

    def queries(self, view: View) -> View:
        """The view of these queries only."""
        marks, (query, key, value, bias) = view.marks, view.arrays
        marks = marks._replace(
            mask=self._or(marks.mask, 2), query_mask=self.full, query_segments=self._or(marks.query_segments),
            query_places=marks.offset + self.index, query_positions=self._or(marks.query_positions),
        )  # fmt: skip
        return view._replace(arrays=Arrays(self(query), key, value, self._or(bias, 2)), marks=marks)

    def _or(self, x: Any, axis: int = 1) -> Any:
        """The same of what may be absent, a function, of one entry, or one for the whole batch."""
        if x is None or callable(x) or x.shape[axis] == 1:
            return x
        return self(x + jnp.zeros_like(self.index[:, 0], x.dtype).reshape(-1, *[1] * (x.ndim - 1)), axis)


def _with_nothing(some: Part, before: int, behind: int) -> Part:
    """A part over some queries as one over all: the others see nothing in it."""
    out, lse = some
    pads = [(0, 0), (before, behind)]
    return jnp.pad(out, [*pads, (0, 0), (0, 0)]), jnp.pad(lse, [*pads, (0, 0)], constant_values=-jnp.inf)


class Fixed(NamedTuple):
    """The block of a query, and the last `summary` columns of every other complete block of its document."""

    block: int
    summary: int

    def keys_seen(self, context: int) -> int:
        """How many keys a query sees at most."""
        return min(context, self.block + context // self.block * self.summary)

    def within(self, places: int) -> "Fixed":
        """See `Pattern`: a block that no row fills ends nowhere, however long it is."""
        return Fixed(min(self.block, places + 1), min(self.summary, places + 1))

    def dense(self, view: View) -> tuple[jax.Array, jax.Array]:
        """See `Pattern`."""
        ends, key_blocks, query_blocks = self._blocks(view)
        place = jnp.arange(ends.shape[1])[None]
        end = lax.cummin(jnp.where(ends, place, ends.shape[1] + self.summary), axis=1, reverse=True)
        columns = end - place < self.summary
        same = query_blocks[..., None] == key_blocks[:, None]
        return dense(view, (same | columns[:, None])[:, None])

    def chunked(self, view: View) -> jax.Array:
        """See `Pattern`."""
        reach = self.block - 1
        band = {"left": reach, "right": 0 if view.is_causal else reach}
        ends, key_blocks, query_blocks = self._blocks(view)
        if view.marks.key_segments is None and view.marks.key_mask is None:
            own = part(view, stretch=self.block, **band)
        else:
            own = part(view.marked(query_segments=query_blocks, key_segments=key_blocks), **band)
        return merge([own, self._summaries(view, ends, key_blocks, query_blocks)])

    def _blocks(self, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Where complete blocks end (B | 1, S), and the number of the block of each key and query; blocks begin anew with each document."""
        place = documents(view)
        key_blocks = jnp.cumsum(place.keys % self.block == 0, axis=1, dtype=jnp.int32)
        before = 1 + view.positions()[None] // self.block  # queries that stand before the first key
        query_blocks = jnp.where(view.positions()[None] < 0, before, place.at_queries(key_blocks))
        if view.marks.key_segments is not None:  # a query whose id is not that of its own key is in no block
            query_blocks = jnp.where(
                place.at_queries(view.marks.key_segments) == view.marks.query_segments, query_blocks, 0
            )
        return place.keys % self.block == self.block - 1, key_blocks, query_blocks

    def _summaries(self, view: View, ends: jax.Array, key_blocks: jax.Array, query_blocks: jax.Array) -> Part:
        """All queries against the summary columns of the other blocks, the columns brought together first.

        Complete blocks end at least `block` keys apart: each stretch of so many keys holds one end at most.
        """
        arrays, marks, keys = view.arrays, view.marks, ends.shape[1]
        pick = _Columns(self.block, self.summary)
        plain = marks.key_segments is None and marks.key_mask is None
        if not plain:
            pick = pick.of(ends, arrays.key)
        bias = arrays.bias if callable(arrays.bias) else pick.pairs(arrays.bias)
        arrays = Arrays(arrays.query, pick(arrays.key), pick(arrays.value), bias)
        positions = marks.key_positions
        positions = None if positions is None else pick(jnp.broadcast_to(positions, (len(key_blocks), keys)))
        view = view._replace(arrays=arrays, marks=marks._replace(mask=pick.pairs(marks.mask), key_positions=positions))
        # Columns stand at the first position of their stretch.
        places = (self.summary, self.block)
        if plain and view.is_causal:
            return part(view, right=-self.block, places=places)
        if plain:
            exists = jnp.arange(keys)[None] < keys // self.block * self.block
        else:
            exists = jnp.ones_like(ends) if marks.key_mask is None else marks.key_mask
            exists = jnp.broadcast_to(exists, (exists.shape[0], keys))
        segments = None if marks.key_segments is None else pick(marks.key_segments)
        view = view._replace(marks=view.marks._replace(
            key_mask=pick(exists), key_segments=segments, query_groups=query_blocks, key_groups=pick(key_blocks)
        ))  # fmt: skip
        # A column of blocks that begin anywhere may be seen from its stretch's second key on; the groups take the own block out.
        return part(view, right=-1 if view.is_causal else None, places=places)


class _Columns(NamedTuple):
    """Brings the last columns of all complete blocks together: (B, S, ...) -> (B, C, ...), `summary` a stretch of `block` keys, 0 where none ends."""

    block: int
    summary: int
    index: jax.Array | None = None  # (B, C), S where none ends; None: the blocks are the stretches

    def of(self, ends: jax.Array, like: jax.Array) -> "_Columns":
        """Those of blocks that end anywhere, (B | 1, S), sharded as `like` (B, S, ...) is."""
        keys = ends.shape[1]
        behind = jnp.where(ends, 1 + jnp.arange(keys, dtype=jnp.int32)[None], 0)
        behind = self._stretches(behind, 1).max(2, keepdims=True)  # the key behind the end; 0: none ends
        index = jnp.where(behind > 0, behind - self.summary + jnp.arange(self.summary)[None, None], keys)
        index = index.reshape(index.shape[0], index.shape[1] * self.summary)
        return self._replace(index=index + jnp.zeros_like(like.sum((1, 2, 3)), jnp.int32)[:, None])

    def __call__(self, x: jax.Array, axis: int = 1) -> jax.Array:
        if self.index is None:
            x = lax.slice_in_dim(self._stretches(x, axis), self.block - self.summary, self.block, axis=axis + 1)
            return x.reshape(*x.shape[:axis], x.shape[axis] * self.summary, *x.shape[axis + 2 :])
        if x.shape[0] > 1:  # so that its gradient can be added up where it lies
            x = split_like(x, 0, self.index, 0)
        if x.shape[0] > 1 or any(jax.typeof(self.index).sharding.spec):  # an Explicit mesh asks for the index's batch
            x = x + jnp.zeros_like(self.index[:, 0], x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return _taken(x, self.index, axis)

    def _stretches(self, x: jax.Array, axis: int) -> jax.Array:
        """(..., S, ...) as (..., stretches, block, ...), padded at the end."""
        count = -(-x.shape[axis] // self.block)
        missing = count * self.block - x.shape[axis]
        x = jnp.pad(x, [(0, missing) if a == axis else (0, 0) for a in range(x.ndim)])
        return x.reshape(*x.shape[:axis], count, self.block, *x.shape[axis + 1 :])

    def pairs(self, x: jax.Array | None) -> jax.Array | None:
        """The same of the last axis of a (B | 1, N | 1, T | 1, S | 1) array."""
        return x if x is None or x.shape[3] == 1 else self(x, 3)


class Top(NamedTuple):
    """The largest scores of a row."""

    count: int

    def within(self, places: int) -> "Top":
        """See `Pattern`."""
        return Top(min(self.count, places))

    def dense(self, view: View) -> tuple[jax.Array, jax.Array]:
        """See `Pattern`."""
        return whole_rows(view.spec._replace(top=self.count), view.arrays, view.marks)[::2]

    def chunked(self, view: View) -> jax.Array:
        """See `Pattern`."""
        (length, keys), (batch, _, heads, _) = view.lengths, view.arrays.query.shape
        rows = view.chunk_size or 128
        while view.chunk_size is None and rows > 32 and batch * heads * rows * keys > 2**21:
            rows //= 2  # fewer than 32 would go through keys and values too often
        return by_rows(view.spec._replace(top=self.count, rows=min(rows, length)), view.arrays, view.marks)[0]
