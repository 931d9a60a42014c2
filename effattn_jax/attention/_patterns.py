"""Softmax over patterns of pairs, as a union of disjoint parts: each part one call of the block kernel, merged by their normalisers.

    o_i = sum_p e^(l_pi - m_i) o_pi / sum_p e^(l_pi - m_i)      o_p, l_p: output and log normaliser of part p,  m_i = max_p l_pi

A part is a cut or a rearrangement of queries and keys after which its pairs are all pairs, a band, or a band with a hole: a class of positions
modulo r is a sequence of its own, so that every r-th key costs T T / r pairs. Memory O(T), whatever the pattern.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import choose, flags, positive
from effattn_jax._places import at_own_keys, split_like
from effattn_jax._products import scaled_rows
from effattn_jax.attention._blocks import by_blocks
from effattn_jax.attention._calls import DENSE_PAIRS, FORMS, block_sizes, prepare, with_positions
from effattn_jax.attention._pairs import Arrays, Marks, Spec, whole_rows

__all__: list[str] = []

Part = tuple[jax.Array, jax.Array]  # out (B, T, N, V), lse (B, T, N)


class View(NamedTuple):
    """Queries and keys with who may see whom, before a pattern takes pairs away."""

    spec: Spec
    arrays: Arrays
    marks: Marks
    offset: int | None  # of the marks, where it is known at trace time
    chunk_size: int | None

    @property
    def is_causal(self) -> bool:
        return self.spec.right == 0

    @property
    def lengths(self) -> tuple[int, int]:
        """T and S."""
        return self.arrays.query.shape[1], self.arrays.key.shape[1]

    def positions(self) -> jax.Array:
        """(T,): the number of the key that each query stands at."""
        return self.marks.offset + jnp.arange(self.lengths[0])

    def marked(self, **marks: Any) -> "View":
        """With further marks; a key mask adds to the one there is."""
        if "key_mask" in marks and self.marks.key_mask is not None:
            marks["key_mask"] = marks["key_mask"] & self.marks.key_mask
        return self._replace(marks=self.marks._replace(**marks))

    def cut(self, rows: tuple[int, int], columns: tuple[int, int]) -> "View":
        """Only the queries and keys of these ranges."""

        def of(x, where, axis):
            return x if x is None or (x.ndim == 4 and x.shape[axis] == 1) else lax.slice_in_dim(x, *where, axis=axis)

        def pairs(x):
            return None if x is None else of(of(x, rows, 2), columns, 3)

        q, k, v, bias = self.arrays
        m = self.marks
        bias = bias if callable(bias) else pairs(bias)
        arrays = Arrays(
            *(lax.slice_in_dim(x, *where, axis=1) for x, where in ((q, rows), (k, columns), (v, columns))), bias
        )
        marks = Marks(
            m.offset + rows[0] - columns[0], pairs(m.mask), of(m.key_mask, columns, 1), of(m.query_segments, rows, 1), of(m.key_segments, columns, 1),
            query_positions=of(m.query_positions, rows, 1), key_positions=of(m.key_positions, columns, 1),
        )  # fmt: skip
        return self._replace(arrays=arrays, marks=marks)


class Pattern(Protocol):
    """What `run` needs of a pattern."""

    def within(self, places: int) -> "Pattern":
        """The same for queries and keys that stand less than so many places apart, with no number larger than that."""

    def dense(self, view: View) -> tuple[jax.Array, jax.Array | None]:
        """The output from all scores at once, and the weights (B, K, G, T, S) if they are those of one softmax."""

    def chunked(self, view: View) -> jax.Array:
        """The output in O(T) memory."""


def run(
    pattern: Pattern, arguments: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: Any, return_state: bool,
    implementation: str | None, chunk_size: int | None, return_weights: bool = False,
) -> Any:  # fmt: skip
    """A call (query, key, value, bias, mask) under the contract, over a pattern; weights are those of the dense form."""
    choose("implementation", implementation, FORMS)
    positive(chunk_size=chunk_size)
    flags(return_weights=return_weights)
    ready = prepare(
        arguments, scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state
    )  # fmt: skip
    if ready.no_pairs:
        return ready.results(ready.nothing(), return_state, return_weights)
    view = View(ready.spec, ready.arrays, ready.marks, ready.offset, chunk_size)
    length, keys = view.lengths
    if isinstance(length, int) and isinstance(keys, int):  # in an export they may be unknown
        pattern = pattern.within(length + keys)
    if (
        callable(ready.arrays.bias) and ready.marks.key_positions is None
    ):  # parts of a pattern no longer count one by one
        view = view._replace(marks=with_positions(view.marks, length, keys))
    small = implementation is None and chunk_size is None and length * keys <= DENSE_PAIRS
    if small or implementation == "dense" or return_weights:
        out, weights = pattern.dense(view)
    else:
        out, weights = pattern.chunked(view), None
    return ready.results(out.astype(ready.arrays.value.dtype), return_state, return_weights, weights)


def dense(view: View, pattern: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and weights (B, K, G, T, S): all scores at once under a mask (B | 1, 1, T, S)."""
    mask = pattern if view.marks.mask is None else pattern & view.marks.mask
    return whole_rows(view.spec, view.arrays, view.marks._replace(mask=mask))[::2]


def part(view: View, *, budget: int = 2**21, **changes: Any) -> Part:
    """The block kernel over a view; `changes` of its spec name the band. `budget`: scores of a block, over batch and heads."""
    (length, keys), (batch, _, heads, _) = view.lengths, view.arrays.query.shape
    spec = view.spec._replace(**changes)
    segmented = view.marks.key_segments is not None
    bounds = (spec.left, spec.right)
    rows, columns = block_sizes(length, keys, batch * heads, bounds, view.chunk_size, budget, segmented)
    count, step = spec.places
    few = max(128, 4 * rows * count // step)
    if step > 1 and spec.right is not None and view.chunk_size is None and few < columns:
        # Keys far apart: many rows see about the same ones, and a block of few keys reaches little beyond those that they see.
        rows, columns = min(2 * rows, length), few
    arrays = view.arrays._replace(value=view.arrays.value.astype(spec.dtype))  # merged before it is rounded
    return by_blocks(spec._replace(rows=rows, columns=columns), arrays, view.marks)


def merge(parts: list[Part]) -> jax.Array:
    """One softmax over disjoint parts."""
    if len(parts) == 1:
        return parts[0][0]
    top = lax.stop_gradient(jax.tree.reduce(jnp.maximum, [lse for _, lse in parts]))
    weights = [jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top)) for _, lse in parts]
    total = sum(weights)
    spoiled = jnp.isnan(total)  # a row of NaN, which passes nothing back
    total = jnp.where((total == 0) | spoiled, 1, total)
    shares = [jnp.where(spoiled, 0, weight / total) for weight in weights]
    out = sum(scaled_rows(share, out) for share, (out, _) in zip(shares, parts, strict=True))
    return jnp.where(spoiled[..., None], jnp.nan, out)


def select(x: jax.Array, here: jax.Array, axis: int) -> jax.Array:
    """The one entry along an axis where `here` is set, 0 where it is nowhere; NaN and inf elsewhere do not enter."""
    if x.dtype == jnp.bool_:
        return jnp.any(x & here, axis=axis)
    return jnp.sum(jnp.where(here, x, jnp.zeros((), x.dtype)), axis=axis, dtype=x.dtype)


class _Classes(NamedTuple):
    """Positions by their remainder modulo a period: each class a row of the batch, (B, L, ...) as (B r, L / r, ...).

    Keys are shifted so that query 0 stands at a multiple of the period: a query and a key of one class then have equal remainders.
    """

    period: int
    shift: Any
    length: int  # of a class
    keys: int
    like: jax.Array  # (B, T, N, H): what is alike for the whole batch is spread over its batch axis, sharded as that is

    def _split(self, x: jax.Array, axis: int) -> jax.Array:
        x = x.reshape(*x.shape[:axis], x.shape[axis] // self.period, self.period, *x.shape[axis + 1 :])
        return self._merge(jnp.moveaxis(x, axis + 1, 1))

    def _merge(self, x: jax.Array) -> jax.Array:
        """(B | 1, r, ...) as (B r, ...)."""
        if x.shape[0] != self.like.shape[0]:
            x = jnp.broadcast_to(x, (self.like.shape[0], *x.shape[1:]))
        ones = tuple(axis for axis in range(2, x.ndim) if x.shape[axis] == 1)  # jax 0.7 would see them merged as well
        x = jnp.squeeze(x, ones)
        x = jnp.expand_dims(x.reshape(x.shape[0] * self.period, *x.shape[2:]), [axis - 1 for axis in ones])
        return split_like(x, 0, self.like, 0)

    def _pad(self, x: jax.Array, axis: int, front: int, behind: int) -> jax.Array:
        return jnp.pad(x, [(front, behind) if a == axis else (0, 0) for a in range(x.ndim)])

    def _padded_rows(self, x: jax.Array, axis: int) -> jax.Array:
        return self._pad(x, axis, 0, self.length * self.period - x.shape[axis])

    def _padded_columns(self, x: jax.Array, axis: int) -> jax.Array:
        total, known = self.keys * self.period, isinstance(self.shift, int)
        front = self.shift if known else self.period - 1
        x = self._pad(x, axis, front, total - x.shape[axis] - (self.shift if known else 0))
        return x if known else lax.dynamic_slice_in_dim(x, front - self.shift, total, axis)

    def rows(self, x: jax.Array | None, axis: int = 1) -> jax.Array | None:
        """Queries, padded at the end."""
        return None if x is None else self._split(self._padded_rows(x, axis), axis)

    def columns(self, x: jax.Array | None, axis: int = 1) -> jax.Array | None:
        """Keys, with `shift` in front and padded at the end."""
        return None if x is None else self._split(self._padded_columns(x, axis), axis)

    def pairs(self, x: jax.Array | None) -> jax.Array | None:
        """A (B | 1, N | 1, T | 1, S | 1) array as (B r | 1, N | 1, T / r | 1, S / r | 1): the pairs inside each class."""
        if x is None or x.shape[0] == x.shape[2] == x.shape[3] == 1:
            return x
        if x.shape[2] == x.shape[3] == 1:
            return self._merge(jnp.broadcast_to(x[:, None], (x.shape[0], self.period, *x.shape[1:])))
        if x.shape[3] == 1:
            return self.rows(x, 2)
        if x.shape[2] == 1:
            return self.columns(x, 3)
        x = self._padded_columns(self._padded_rows(x, 2), 3)
        x = x.reshape(*x.shape[:2], self.length, self.period, x.shape[3])
        x = x.reshape(*x.shape[:4], self.keys, self.period)
        same = jnp.eye(self.period, dtype=bool).reshape(1, 1, 1, self.period, 1, self.period)
        return self._merge(jnp.moveaxis(select(x, same, 5), 3, 1))

    def together(self, x: jax.Array, length: int) -> jax.Array:
        """The outputs of all classes (B r, T / r, ...) in order of time."""
        x = jnp.moveaxis(x.reshape(x.shape[0] // self.period, self.period, *x.shape[1:]), 1, 2)
        return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def by_class(view: View, period: int, **changes: Any) -> Part:
    """Pairs whose distance is a multiple of the period, as one call in which each class of positions is a row of the batch.

    The bounds in `changes` count the keys of a class.
    """
    (length, keys), offset = view.lengths, view.offset
    shift = (-view.marks.offset if offset is None else -offset) % period
    count = -(-(keys + (period - 1 if offset is None else shift)) // period)
    classes = _Classes(period, shift, -(-length // period), count, view.arrays.query)
    marks, key_mask = view.marks, view.marks.key_mask
    padded = offset is None or shift or (not view.is_causal and count * period != keys)
    if padded and key_mask is None:
        key_mask = jnp.ones((1, keys), bool)
    query, key, value, bias = view.arrays
    arrays = Arrays(
        classes.rows(query),
        classes.columns(key),
        classes.columns(value),
        bias if callable(bias) else classes.pairs(bias),
    )
    marks = Marks(
        jnp.asarray((view.marks.offset + shift) // period, jnp.int32), classes.pairs(marks.mask), classes.columns(key_mask),
        classes.rows(marks.query_segments), classes.columns(marks.key_segments),
        query_positions=classes.rows(marks.query_positions), key_positions=classes.columns(marks.key_positions),
    )  # fmt: skip
    # All classes run side by side, with all their buffers.
    parts = part(view._replace(arrays=arrays, marks=marks), budget=2**19, **changes)
    return jax.tree.map(partial(classes.together, length=length), parts)


class Documents(NamedTuple):
    """Positions inside the segment that a key, or a query at the place of its own key, belongs to."""

    keys: jax.Array  # (B | 1, S): position in the document, from 0
    queries: jax.Array  # (B | 1, T)
    at_queries: (
        Callable  # (B | 1, S) numbers of keys -> (B | 1, T) those at the queries' own keys, the first one's before it
    )


def documents(view: View) -> Documents:
    """A document is a run of equal ids, without ids everything; it starts with its first key that is not masked, as padding is."""
    length, index = view.lengths[0], jnp.arange(view.lengths[1])[None]
    ids, real = view.marks.key_segments, view.marks.key_mask

    def at_queries(x):
        return at_own_keys(x, view.marks.offset, length, x[:, :1])

    if ids is None and real is None:
        return Documents(index, view.positions()[None], at_queries)
    begins = index == 0
    if ids is not None:
        begins = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    if real is not None:
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        before = lax.cummax(jnp.where(begins, count - real, 0), axis=1)
        begins = begins | (real & (count - before == 1))
    start = lax.cummax(jnp.where(begins, index, 0), axis=1)
    return Documents(index - start, view.positions()[None] - at_queries(start), at_queries)
