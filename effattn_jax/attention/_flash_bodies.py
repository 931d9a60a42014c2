"""The three Pallas bodies of flash attention: the forward pass, the gradient of queries, the gradients of keys and values.

    s = cap(scale q k^T) + e     forward   m' = max(m, max_j s)   l' = l e^(m - m') + sum_j e^(s - m')   a' = a e^(m - m') + e^(s - m') v
                                 backward  p = e^(s - lse)   ds = p (do v^T + delta) cap'   dq = ds k   dk = ds^T q   dv = p^T do

A program has one block of rows (or of keys, in the last body) and loops over the blocks of keys (of rows) that they see, its sums in registers. The
extra score e of a key is 0, -inf where it is hidden, NaN where it must spoil the rows that see it; keys and values themselves come finite, so that
what is hidden never enters a sum. The last body has keys before rows in all its blocks, and so needs no transposed copy of any.

What a program sees may come in sections, one after the other along the second axis of the grid, as VMEM holds: then the outputs are kept from
section to section in the dtype of sums. out and lse are such a sum themselves, m' = lse, l' = 1, a' = out.

Numbers of one a row or key, such as lse, lie side by side, (1, R): as a column each would take a whole line of a TPU's tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._pallas import loop

__all__: list[str] = []


class Setting(NamedTuple):
    """What is fixed at trace time."""

    left: int | None  # a row at position i sees keys i - left to i + right, None without bound
    right: int | None
    offset: int  # the position of row 0
    cap: float | None
    scale: float
    rows: int  # of a block
    columns: int  # keys of a block
    row_blocks: int
    column_blocks: int
    dtype: Any  # of sums
    segmented: bool  # whether there are ids
    sections: int = 1  # that the blocks a program sees come in
    each: int = 0  # blocks of a section; of one section, all
    groups: int = 0  # of programs that share bounds, 0 where there are none


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two blocks over the given axes, summed in `dtype`; float32 is not rounded to what matrix units like best."""
    precision = None if b.dtype.itemsize == 2 else lax.Precision.HIGHEST
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a.astype(b.dtype), b, dims, precision=precision, preferred_element_type=dtype)


def _reach(first: Any, size: int, before: int | None, after: int | None, block: int, count: int) -> tuple[Any, ...]:
    """Of what the places [first, first + size) see, those from `before` places before to `after` behind, cut into `count` blocks: the
    bounds low <= inner_low <= inner_high <= high, where blocks outside [low, high) are seen by none and those in [inner_low, inner_high) whole by all."""
    last = first + (size - 1)

    def blocks(places, rounding):
        return lax.min(lax.div(lax.max(places + rounding, np.int32(0)), np.int32(block)), np.int32(count))

    low = inner_low = np.int32(0)
    inner_high = high = np.int32(count)
    if before is not None:
        low, inner_low = blocks(first - before, 0), blocks(last - before, block - 1)
    if after is not None:
        inner_high, high = blocks(first + (after + 1), 0), blocks(last + (after + 1), block - 1)
    if before is not None or after is not None:
        high = lax.max(high, low)
        inner_low = lax.min(inner_low, high)
        inner_high = lax.max(inner_high, inner_low)
    return low, inner_low, inner_high, high


def _within(reach: tuple[Any, ...], low: Any, high: Any) -> tuple[Any, ...]:
    return tuple(lax.max(low, lax.min(x, high)) for x in reach)


@jax.jit
def _read(low_ref: Any, high_ref: Any, place: Any) -> tuple[Any, Any]:
    """Compiled for itself: in the open the interpreter, inside `jax.shard_map`, would find that the index does not vary over the mesh."""
    return low_ref[place], high_ref[place]


def _bounded(s: Setting, reach: tuple[Any, ...], program: Any, blocks: int, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
    """`reach` within the bounds that segments and masks leave to this program, one of `blocks` of its group."""
    if not bounds:
        return reach
    place = lax.div(program, np.int32(blocks * s.groups)) * blocks + lax.rem(program, np.int32(blocks))
    low, high = _read(*bounds, place)
    return _within(reach, low, high)


def _reach_of_rows(s: Setting, program: Any, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The blocks of keys that this program's rows see."""
    first = lax.rem(program, np.int32(s.row_blocks)) * s.rows + s.offset
    return _bounded(
        s, _reach(first, s.rows, s.left, s.right, s.columns, s.column_blocks), program, s.row_blocks, bounds
    )


def _reach_of_keys(s: Setting, program: Any, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The blocks of rows that see this program's keys."""
    first = lax.rem(program, np.int32(s.column_blocks)) * s.columns - s.offset
    reach = _reach(first, s.columns, s.right, s.left, s.rows, s.row_blocks)
    return _bounded(s, reach, program, s.column_blocks, bounds)


def section(s: Setting, reach: tuple[Any, ...], number: Any) -> Any:
    """The section to have at hand as the `number`-th: of those outside the reach none, which spares the way to VMEM."""
    low, *_, high = reach
    first, last = (lax.div(block, np.int32(s.each)) for block in (low, lax.max(high - 1, low)))
    return lax.min(lax.max(first, lax.min(number, last)), np.int32(s.sections - 1))


def _fold(s: Setting, reach: tuple[Any, ...], windowed: tuple[bool, bool], step: Callable, state: Any) -> Any:
    """Folds `step(masked, base)(block, state)` over the blocks in reach; masked says that who sees whom must be looked at, and
    `base` is the first block at hand."""
    from jax.experimental import pallas as pl

    base = np.int32(0)
    if s.sections > 1:
        base = pl.program_id(1) * s.each
        reach = _within(reach, base, base + s.each)
    low, inner_low, inner_high, high = reach
    if s.segmented:
        return loop(low, high, step(True, base), state)
    if windowed[0]:
        state = loop(low, inner_low, step(True, base), state)
    state = loop(inner_low, inner_high, step(False, base), state)
    return loop(inner_high, high, step(True, base), state) if windowed[1] else state


def _carried(s: Setting, outputs: tuple[Any, ...], kept: tuple[Any, ...], *starts: float) -> list[jax.Array]:
    """What each output holds so far: its start in the first section, in a later one what the one before it left."""
    from jax.experimental import pallas as pl

    if s.sections == 1:
        return [jnp.full(ref.shape, start, s.dtype) for ref, start in zip(outputs, starts, strict=True)]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for ref, start in zip(kept, starts, strict=True):
            ref[...] = jnp.full(ref.shape, start, ref.dtype)

    return [ref[...] for ref in kept]


def _store(outputs: tuple[Any, ...], kept: tuple[Any, ...], *values: jax.Array) -> None:
    for ref, value in [*zip(outputs, values, strict=True), *zip(kept, values)]:
        ref[...] = value.astype(ref.dtype)


def _scores(
    s: Setting, a: jax.Array, b: jax.Array, extra: jax.Array, starts: tuple[Any, Any] | None, ids: list, row_axis: int
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Scores of rows and keys (or keys and rows, `row_axis` 1), -inf where not seen; the derivative of the cap; who is seen.

    `starts`: the position of the first row and of the first key, None where all see all; `ids`: segments along each axis, or nothing.
    """
    x = _product(a, b, (1, 1), s.dtype) * s.scale
    slope = 1.0
    if s.cap is not None:
        t = jnp.tanh(x * (1 / s.cap))
        x, slope = s.cap * t, 1 - t * t
    extra = jnp.broadcast_to(extra, x.shape)
    see = extra != -jnp.inf
    if starts is not None:
        row = lax.broadcasted_iota(jnp.int32, x.shape, row_axis) + starts[0]
        distance = row - (lax.broadcasted_iota(jnp.int32, x.shape, 1 - row_axis) + starts[1])
        see = see if s.left is None else see & (distance <= s.left)
        see = see if s.right is None else see & (distance >= -s.right)
    if ids:
        see = see & (jnp.broadcast_to(ids[0], x.shape) == jnp.broadcast_to(ids[1], x.shape))
    return jnp.where(see, x + extra, -jnp.inf), slope, see


def _windowed(s: Setting) -> tuple[bool, bool]:
    return s.left is not None, s.right is not None


def _parted(s: Setting, refs: tuple[Any, ...], own: int, seen: int, outputs: int) -> list[tuple[Any, ...]]:
    """The bounds, the program's own blocks, what it sees, the outputs, and what is kept of them; ids last in both the second and the third."""
    ends = np.cumsum([2 if s.groups else 0, own + s.segmented, seen + s.segmented, outputs])
    return [refs[low:high] for low, high in zip([0, *ends], [*ends, len(refs)], strict=True)]


def _forward(s: Setting, *refs: Any) -> None:
    """out and lse (1, R) of a block of rows (R, H) against keys (blocks, C, H), values (blocks, C, V), extra scores (blocks, 1, C)."""
    from jax.experimental import pallas as pl

    bounds, (q_ref, *row_ids), (k_ref, v_ref, extra_ref, *key_ids), outputs, kept = _parted(s, refs, 1, 3, 2)
    reach = _reach_of_rows(s, pl.program_id(0), bounds)
    first = lax.rem(pl.program_id(0), np.int32(s.row_blocks)) * s.rows + s.offset
    q, row_ids = q_ref[...], [ref[...].T for ref in row_ids]

    def step(masked, base):
        def run(j, state):
            top, total, acc = state
            starts, j = (first, j * s.columns) if masked else None, j - base
            ids = row_ids + [ref[j] for ref in key_ids]
            scores, _, _ = _scores(s, q, k_ref[j], extra_ref[j], starts, ids, 0)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            p, shrink = jnp.exp(scores - safe), jnp.exp(top - safe)
            total = total * shrink + jnp.sum(p, axis=1, keepdims=True)
            return new_top, total, acc * shrink + _product(p, v_ref[j], (1, 0), s.dtype)

        return run

    acc, lse = _carried(s, outputs, kept, 0, -jnp.inf)
    lse = lse.T
    top, total, acc = _fold(s, reach, _windowed(s), step, (lse, jnp.where(lse == -jnp.inf, 0, jnp.ones_like(lse)), acc))
    empty = total == 0
    total = jnp.where(empty, 1, total)
    _store(outputs, kept, acc / total, jnp.where(empty, -jnp.inf, top + jnp.log(total)).T)


def _slopes(
    s: Setting, scores: jax.Array, slope: Any, see: jax.Array, d_weights: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """p and ds, both exactly 0 where not seen: of a spoiled row all else is NaN."""
    p = jnp.where(see, jnp.exp(scores - lse), 0)
    return p, jnp.where(see, p * (d_weights + delta) * slope, 0)


def _query_gradient(s: Setting, *refs: Any) -> None:
    """dq of a block of rows, to be scaled."""
    from jax.experimental import pallas as pl

    bounds, own, (k_ref, v_ref, extra_ref, *key_ids), outputs, kept = _parted(s, refs, 4, 3, 1)
    reach = _reach_of_rows(s, pl.program_id(0), bounds)
    first = lax.rem(pl.program_id(0), np.int32(s.row_blocks)) * s.rows + s.offset
    q, do, lse, delta, *row_ids = (ref[...] for ref in own)
    lse, delta, row_ids = lse.T, delta.T, [x.T for x in row_ids]

    def step(masked, base):
        def run(j, dq):
            starts, j = (first, j * s.columns) if masked else None, j - base
            k, ids = k_ref[j], row_ids + [ref[j] for ref in key_ids]
            seen = _scores(s, q, k, extra_ref[j], starts, ids, 0)
            _, ds = _slopes(s, *seen, _product(do, v_ref[j], (1, 1), s.dtype), lse, delta)
            return dq + _product(ds, k, (1, 0), s.dtype)

        return run

    (dq,) = _carried(s, outputs, kept, 0)
    _store(outputs, kept, _fold(s, reach, _windowed(s), step, dq))


def _key_gradients(s: Setting, *refs: Any) -> None:
    """dk, to be scaled, and dv of a block of keys, from one query head; lse and delta are (blocks, 1, R)."""
    from jax.experimental import pallas as pl

    bounds, own, (q_ref, do_ref, lse_ref, delta_ref, *row_ids), outputs, kept = _parted(s, refs, 3, 4, 2)
    reach = _reach_of_keys(s, pl.program_id(0), bounds)
    first = lax.rem(pl.program_id(0), np.int32(s.column_blocks)) * s.columns
    k, v, extra, *key_ids = (ref[...] for ref in own)
    extra, key_ids = extra.T, [x.T for x in key_ids]

    def step(masked, base):
        def run(i, state):
            dk, dv = state
            starts, i = (i * s.rows + s.offset, first) if masked else None, i - base
            q, do, ids = q_ref[i], do_ref[i], key_ids + [ref[i] for ref in row_ids]
            seen = _scores(s, k, q, extra, starts, ids, 1)
            p, ds = _slopes(s, *seen, _product(v, do, (1, 1), s.dtype), lse_ref[i], delta_ref[i])
            return dk + _product(ds, q, (1, 0), s.dtype), dv + _product(p, do, (1, 0), s.dtype)

        return run

    state = tuple(_carried(s, outputs, kept, 0, 0))
    _store(outputs, kept, *_fold(s, reach, _windowed(s)[::-1], step, state))


class Body(NamedTuple):
    """A body with the blocks its programs see: `reach(setting, program, bounds)`."""

    run: Callable
    reach: Callable


FORWARD = Body(_forward, _reach_of_rows)
QUERY_GRADIENT = Body(_query_gradient, _reach_of_rows)
KEY_GRADIENTS = Body(_key_gradients, _reach_of_keys)
