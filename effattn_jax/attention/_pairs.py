"""Which pairs of queries and keys a softmax call is over, their scores, and the dense form.

Shapes inside: a block of R rows and C keys is (B, K, G, R, C), G = N / K query heads for each of the K key heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from effattn_jax._places import split_like
from effattn_jax._products import softmax

__all__: list[str] = []


class Spec(NamedTuple):
    """What is fixed at trace time. Windows count neighbours of a query's own key; None is no bound, a negative one leaves out the nearest."""

    left: int | None
    right: int | None
    cap: float | None
    scale: float
    rows: int
    columns: int
    dtype: Any
    hole: tuple[int, int] | None = None  # a window left out
    period: int | None = None  # distances left out: its multiples
    stretch: int | None = None  # only pairs of one stretch of so many positions
    places: tuple[int, int] = (1, 1)  # (count, step): key j stands at position (j // count) * step
    top: int | None = None  # so many of the largest scores of a row are kept, and all that tie with the last of them

    def keys_before(self, position: Any) -> Any:
        """How many keys stand before a position, those at negative positions counted as negative."""
        count, step = self.places
        return position if step == 1 else -(-position // step) * count


class Marks(NamedTuple):
    """Who may see whom, beside the window of `Spec`: all optional but `offset`."""

    offset: jax.Array  # () int32: the key of row 0 is key number `offset`
    mask: jax.Array | None = None  # (B | 1, N | 1, T | 1, S | 1)
    key_mask: jax.Array | None = None  # (B, S)
    query_segments: jax.Array | None = None  # (B, T)
    key_segments: jax.Array | None = None  # (B, S)
    query_mask: jax.Array | None = None  # (B, T)
    query_groups: jax.Array | None = None  # (B, T): a query sees no key of its own group
    key_groups: jax.Array | None = None  # (B, S)
    query_places: jax.Array | None = None  # (B | 1, T): where queries stand that were brought together; None: in order
    key_places: jax.Array | None = None  # (B | 1, S)
    query_positions: jax.Array | None = None  # (B | 1, T): what a bias by position reads; None: rows and columns count
    key_positions: jax.Array | None = None  # (B | 1, S)

    @property
    def only_window(self) -> bool:
        return all(mark is None for mark in self[1:-2])


class Arrays(NamedTuple):
    """The differentiable inputs."""

    query: jax.Array  # (B, T, N, H); grouped by key head inside a block: outside it would copy the whole array
    key: jax.Array  # (B, S, K, H)
    value: jax.Array  # (B, S, K, V)
    bias: Any  # (B | 1, N | 1, T | 1, S | 1), or a bias by position, or None


def pairs_of(x: jax.Array, row: Any, rows: int, column: Any, columns: int, kv_heads: int) -> jax.Array:
    """The block of a (B | 1, N | 1, T | 1, S | 1) array as (B | 1, K | 1, G | 1, R | 1, C | 1)."""
    x = x if x.shape[2] == 1 else lax.dynamic_slice_in_dim(x, row, rows, 2)
    x = x if x.shape[3] == 1 else lax.dynamic_slice_in_dim(x, column, columns, 3)
    heads = (1, 1) if x.shape[1] == 1 else (kv_heads, x.shape[1] // kv_heads)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def bias_of(bias: Any, marks: Marks, row: Any, rows: int, column: Any, columns: int, kv_heads: int) -> jax.Array:
    """The block of a bias as (B | 1, K | 1, G | 1, R | 1, C | 1), whether it is an array or goes by position."""
    if not callable(bias):
        return pairs_of(bias, row, rows, column, columns, kv_heads)
    if marks.query_positions is None:
        return pairs_of(_by_count(bias, marks.offset + row, rows, column, columns)[None], 0, rows, 0, columns, kv_heads)
    query = lax.dynamic_slice_in_dim(marks.query_positions, row, rows, 1)
    key = lax.dynamic_slice_in_dim(marks.key_positions, column, columns, 1)
    axes = (None if query.shape[0] == 1 else 0, None if key.shape[0] == 1 else 0)
    if axes == (None, None):
        scores = bias(query[0], key[0])[None]
    else:
        query, key = (x[0] if axis is None else x for x, axis in zip((query, key), axes, strict=True))
        scores = jax.vmap(bias, in_axes=axes)(query, key)
    return pairs_of(scores, 0, rows, 0, columns, kv_heads)


def _by_count(bias: Any, first: Any, rows: int, column: Any, columns: int) -> jax.Array:
    """(N, R, C) for rows that stand at first, first + 1, ... and columns at column, column + 1, ...

    A bias by distance is evaluated once for each of the R + C - 1 distances. With M = R + C, entry (r, c) of a block is entry (c - r) mod M of
    its distances, and R copies of them end to end, cut into rows of M - 1, are in that order.
    """
    size = rows + columns
    if not hasattr(bias, "at_distance") or size == 0:
        return bias(first + jnp.arange(rows), column + jnp.arange(columns))
    step = jnp.arange(size)
    values = bias.at_distance(column - first + jnp.where(step < columns, step, step - size))
    copies = jnp.broadcast_to(values[:, None], (values.shape[0], rows, size)).reshape(values.shape[0], rows * size)
    return copies[:, : rows * (size - 1)].reshape(values.shape[0], rows, size - 1)[..., :columns]


def widened(bias: Any, dtype: Any) -> Any:
    """A bias by position in the dtype of scores; an array as it is, for it may be large."""
    return jax.tree.map(lambda x: x.astype(dtype), bias) if callable(bias) else bias


def _by_distance(spec: Spec, position: jax.Array, place: jax.Array) -> jax.Array | bool:
    """The part of `allowed` that places alone decide; position (..., R, 1), place (..., 1, C)."""
    see = True
    if spec.left is not None:
        see = see & (place >= position - spec.left)
    if spec.right is not None:
        see = see & (place <= position + spec.right)
    if spec.hole is not None:
        see = see & ((place < position - spec.hole[0]) | (place > position + spec.hole[1]))
    if spec.period is not None:
        see = see & ((position - place) % spec.period != 0)
    if spec.stretch is not None:
        see = see & (position // spec.stretch == place // spec.stretch)
    return see


def allowed(
    spec: Spec, marks: Marks, kv_heads: int, row: Any, rows: int, column: Any, columns: int, begin: Any = None
) -> jax.Array:
    """Which rows [row, row + rows) see which keys [column, column + columns), broadcastable to (B, K, G, R, C); keys before `begin` are out."""

    def of_rows(x):
        return lax.dynamic_slice_in_dim(x, row, rows, 1)[:, None, None, :, None]

    def of_columns(x):
        return lax.dynamic_slice_in_dim(x, column, columns, 1)[:, None, None, None, :]

    position = (marks.offset + row + jnp.arange(rows)).reshape(1, 1, 1, rows, 1)
    key = (column + jnp.arange(columns)).reshape(1, 1, 1, 1, columns)
    count, step = spec.places
    place = key if step == 1 else key // count * step
    if marks.query_places is not None:
        position = of_rows(marks.query_places)
    if marks.key_places is not None:
        place = of_columns(marks.key_places)
    see = jnp.ones((1, 1, 1, rows, columns), bool) & _by_distance(spec, position, place)
    see = see if begin is None else see & (key >= begin)
    if marks.key_mask is not None:
        see = see & of_columns(marks.key_mask)
    if marks.query_mask is not None:
        see = see & of_rows(marks.query_mask)
    if marks.key_segments is not None:
        see = see & (of_rows(marks.query_segments) == of_columns(marks.key_segments))
    if marks.key_groups is not None:
        see = see & (of_rows(marks.query_groups) != of_columns(marks.key_groups))
    if marks.mask is not None:
        see = see & pairs_of(marks.mask, row, rows, column, columns, kv_heads)
    return see


def logits(
    spec: Spec, query: jax.Array, key: jax.Array, bias: jax.Array | None, rows: int, turned: bool = False
) -> tuple[jax.Array, jax.Array]:
    """cap tanh((scale q.k + bias) / cap) and its derivative by the argument; query (B, K, G R, H), already scaled, key (B, K, C, H).

    Scores, and a bias, are (B, K, G, R, C), or turned (B, K, C, G, R).
    """
    groups = query.shape[2] // rows
    if turned:
        s = jnp.einsum("bkjh,bkmh->bkjm", key, query)
        s = s.reshape(*s.shape[:3], groups, rows)
    else:
        s = jnp.einsum("bkmh,bkjh->bkmj", query, key)
        s = s.reshape(*s.shape[:2], groups, rows, s.shape[3])
    s = s if bias is None else s + bias
    if spec.cap is None:
        return s, jnp.ones((), s.dtype)
    t = jnp.tanh(s / spec.cap)
    return spec.cap * t, 1 - t * t


def poisoned(see: jax.Array, bad: jax.Array) -> jax.Array:
    """Rows (B, K, G, R) that see a key marked bad (B, K, C). Those keys enter products as 0, since 0 * NaN is NaN where they are masked."""
    if see.shape[1:3] == (1, 1):
        see = jnp.broadcast_to(see[:, 0, 0], (bad.shape[0], *see.shape[3:])).astype(jnp.float32)
        see = split_like(see, 0, bad, 0)
        return (jnp.einsum("bij,bkj->bki", see, bad.astype(jnp.float32)) > 0)[:, :, None]
    return jnp.any(see & bad[:, :, None, None, :], axis=-1)


def finite_or_zero(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x with what is not finite set to 0, and whether anything along the last axis was."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0), ~jnp.all(finite, axis=-1)


def rows_of(x: jax.Array, row: Any, rows: int, kv_heads: int, dtype: Any) -> jax.Array:
    """Rows of (B, T, N, ...) as (B, K, G, R, ...)."""
    x = jnp.moveaxis(lax.dynamic_slice_in_dim(x, row, rows, 1), 1, 2)
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:]).astype(dtype)


def flat(x: jax.Array) -> jax.Array:
    """(B, K, G, R, ...) with groups and rows as one axis: of an operand with more axes XLA makes a transposed copy on CPU."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def unrows(x: jax.Array) -> jax.Array:
    """(B, K, G, R, ...) as (B, R, N, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), 1, 2)


def heads_first(x: jax.Array, dtype: Any) -> jax.Array:
    """(B, S, K, ...) as (B, K, S, ...), in `dtype`."""
    return jnp.moveaxis(x, 1, 2).astype(dtype)


def least_kept(x: jax.Array, count: int) -> jax.Array:
    """The least of the `count` largest numbers of the last axis, (..., 1).

    Floats keep their order as unsigned integers once the sign bit is set (or all bits are flipped, below 0), so the bits of that number
    follow one by one from counts: no sort, and nothing but sums along the axis.
    """
    bits = 8 * x.dtype.itemsize
    x = jnp.where(x == 0, 0, x)  # -0 ties with 0
    word = lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    one = jnp.ones((), word.dtype)
    sign = one << (bits - 1)
    order = jnp.where(word >= sign, ~word, word | sign)

    def bit(i, least):
        higher = least | (one << (bits - 1 - i).astype(word.dtype))
        enough = jnp.sum(order >= higher, axis=-1, keepdims=True, dtype=jnp.int32) >= count
        return jnp.where(enough, higher, least)

    least = lax.fori_loop(0, bits, bit, jnp.zeros_like(order[..., :1]))
    return lax.bitcast_convert_type(jnp.where(least >= sign, least ^ sign, ~least), x.dtype)


def largest(x: jax.Array, count: int) -> jax.Array:
    """Which entries of the last axis are among its `count` largest or tie with the last of these; NaN always is.

    The bound is kept by `keeping_bounds`: to find it costs more than all that is computed again.
    """
    return (x >= checkpoint_name(least_kept(x, count), _BOUND)) | jnp.isnan(x)


_BOUND = "least score kept"
keeping_bounds = partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_BOUND))


class More(NamedTuple):
    """What rows have beside products of queries and keys, and beside sums of values."""

    scores: Callable | None  # (row, R) -> (B | 1, N | 1, R, S), finite scores to add to the products
    values: Callable | None = None  # (row, R, weights (B, N, R, S)) -> (B, N, R, V), to add to the output


class Keys(NamedTuple):
    """Keys and values by head, (B, K, S, ...), what is not finite set to 0."""

    key: jax.Array
    value: jax.Array
    bad: jax.Array  # (B, K, S): whether the key or its value was not finite

    @classmethod
    def of(cls, arrays: Arrays, dtype: Any) -> "Keys":
        """Those of a call, in `dtype`."""
        key, bad_key = finite_or_zero(heads_first(arrays.key, dtype))
        value, bad_value = finite_or_zero(heads_first(arrays.value, dtype))
        return cls(key, value, bad_key | bad_value)


def whole_rows(
    spec: Spec, arrays: Arrays, marks: Marks, row: Any = 0, rows: int | None = None, more: More | None = None, by_head: Keys | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Rows against all keys at once: out (B, R, N, V), lse (B, R, N), weights (B, K, G, R, S). Plain operations, any derivative.

    `by_head`: the keys, from callers with more rows than these.
    """
    query, key, value, bias = arrays
    kv_heads, keys = key.shape[1:3][::-1]
    rows = query.shape[1] if rows is None else rows
    q = rows_of(query, row, rows, kv_heads, spec.dtype) * spec.scale
    k, v, bad = Keys.of(arrays, spec.dtype) if by_head is None else by_head
    see = allowed(spec, marks, kv_heads, row, rows, 0, keys)
    if bias is not None:
        bias = bias_of(widened(bias, spec.dtype), marks, row, rows, 0, keys, kv_heads).astype(spec.dtype)
        see, bias = see & (bias != -jnp.inf), jnp.where(bias == -jnp.inf, 0, bias)
    if more is not None and more.scores is not None:
        extra = more.scores(row, rows).astype(spec.dtype)
        extra = pairs_of(extra, 0, rows, 0, keys, kv_heads)
        bias = extra if bias is None else bias + extra
    # A row that sees nothing gives no gradient, whatever it holds, and one that is not finite none to what it does not see: 0 * NaN is NaN.
    q, bad_row = finite_or_zero(jnp.where(see.any(-1, keepdims=True), q, 0))
    s = jnp.where(see, logits(spec, flat(q), k, bias, rows)[0], -jnp.inf)
    if spec.top is not None and spec.top < keys:
        s = jnp.where(largest(lax.stop_gradient(s), spec.top), s, -jnp.inf)
    weights, lse = softmax(s)
    bad_row = bad_row | jnp.isnan(lse)
    weights = jnp.where(bad_row[..., None], 0, weights)
    out = jnp.einsum("bkgij,bkjv->bkgiv", weights, v)
    if more is not None and more.values is not None:
        by_head = weights.reshape(weights.shape[0], weights.shape[1] * weights.shape[2], *weights.shape[3:])
        out = out + more.values(row, rows, by_head).astype(spec.dtype).reshape(out.shape)
    out = jnp.where((bad_row | poisoned(see, bad))[..., None], jnp.nan, out)
    lse, weights = (jnp.where(b, jnp.nan, x) for b, x in ((bad_row, lse), (bad_row[..., None] & see, weights)))
    return unrows(out).astype(value.dtype), unrows(lse), weights


class Block(NamedTuple):
    """What both passes need of a block of rows and keys."""

    key: jax.Array  # (B, K, C, H)
    value: jax.Array  # (B, K, C, V)
    scores: jax.Array  # (B, K, G, R, C), or turned (B, K, C, G, R); -inf where not seen
    slope: jax.Array  # derivative of the soft cap, likewise
    see: jax.Array | None  # likewise; None where every row sees every key
    bad_value: jax.Array | None  # (B, K, C): values that are not finite, here set to 0


def block_of(
    spec: Spec, marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array, bias: Any,
    row: Any, column: Any, begin: Any, masked: bool, turned: bool = False,
) -> Block:  # fmt: skip
    """Scaled query rows (B, K, G R, H) from `row` on against the columns from `column` on of key and value (B, S, K, ...).

    `turned` puts the axis of columns before those of groups and rows in all that has both.
    """
    kv_heads = key.shape[2]

    def turn(x):
        return jnp.moveaxis(x, -1, 2) if turned else x

    key, value = (heads_first(lax.dynamic_slice_in_dim(x, column, spec.columns, 1), spec.dtype) for x in (key, value))
    if bias is not None:
        bias = turn(bias_of(bias, marks, row, spec.rows, column, spec.columns, kv_heads).astype(spec.dtype))
    scores, slope = logits(spec, query, key, bias, spec.rows, turned)
    if not masked:
        return Block(key, value, scores, slope, None, None)
    see = turn(allowed(spec, marks, kv_heads, row, spec.rows, column, spec.columns, begin))
    see = see if bias is None else see & (bias != -jnp.inf)
    value, bad_value = finite_or_zero(value)
    return Block(finite_or_zero(key)[0], value, jnp.where(see, scores, -jnp.inf), slope, see, bad_value)
