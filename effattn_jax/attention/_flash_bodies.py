"""The three Pallas bodies of flash attention: the forward pass, the gradient of queries, the gradients of keys and values.

    s = cap(scale q k^T) + e     forward   m' = max(m, max_j s)   l' = l e^(m - m') + sum_j e^(s - m')   a' = a e^(m - m') + e^(s - m') v
                                 backward  p = e^(s - lse)   ds = p (do v^T + delta) cap'   dq = ds k   dk = ds^T q   dv = p^T do

A program has one block of rows (or of keys, in the last body) and loops over the blocks of keys (of rows) that they see, its sums in registers. The
extra score e of a key is 0, -inf where it is hidden, NaN where it must spoil the rows that see it; keys and values themselves come finite, so that
what is hidden never enters a sum. The last body has keys before rows in all its blocks, and so needs no transposed copy of any.
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


def _fold(reach: tuple[Any, ...], bounded: tuple[bool, bool], segmented: bool, step: Callable, state: Any) -> Any:
    """Folds `step(masked)(block, state)` over the blocks in reach; masked says that who sees whom must be looked at."""
    low, inner_low, inner_high, high = reach
    if segmented:
        return loop(low, high, step(True), state)
    if bounded[0]:
        state = loop(low, inner_low, step(True), state)
    state = loop(inner_low, inner_high, step(False), state)
    return loop(inner_high, high, step(True), state) if bounded[1] else state


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


def _bounded(s: Setting) -> tuple[bool, bool]:
    return s.left is not None, s.right is not None


def forward(s: Setting, q_ref: Any, k_ref: Any, v_ref: Any, extra_ref: Any, *rest: Any) -> None:
    """out and lse of a block of rows (R, H) against keys (blocks, C, H), values (blocks, C, V), extra scores (blocks, 1, C)."""
    from jax.experimental import pallas as pl

    *ids, out_ref, lse_ref = rest
    first = lax.rem(pl.program_id(0), np.int32(s.row_blocks)) * s.rows + s.offset
    q = q_ref[...]
    row_ids = ids[0][...] if ids else None

    def step(masked):
        def run(j, state):
            top, total, acc = state
            starts = (first, j * s.columns) if masked else None
            some = [row_ids, ids[1][j]] if ids else []
            scores, _, _ = _scores(s, q, k_ref[j], extra_ref[j], starts, some, 0)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            p, shrink = jnp.exp(scores - safe), jnp.exp(top - safe)
            total = total * shrink + jnp.sum(p, axis=1, keepdims=True)
            return new_top, total, acc * shrink + _product(p, v_ref[j], (1, 0), s.dtype)

        return run

    column = jnp.zeros((s.rows, 1), s.dtype)
    state = (column - jnp.inf, column, jnp.zeros((s.rows, v_ref.shape[-1]), s.dtype))
    reach = _reach(first, s.rows, s.left, s.right, s.columns, s.column_blocks)
    top, total, acc = _fold(reach, _bounded(s), bool(ids), step, state)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out_ref[...] = (acc / total).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _slopes(
    s: Setting, scores: jax.Array, slope: Any, see: jax.Array, d_weights: jax.Array, lse: jax.Array, delta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """p and ds, both exactly 0 where not seen: of a spoiled row all else is NaN."""
    p = jnp.where(see, jnp.exp(scores - lse), 0)
    return p, jnp.where(see, p * (d_weights + delta) * slope, 0)


def query_gradient(
    s: Setting, q_ref: Any, do_ref: Any, lse_ref: Any, delta_ref: Any, k_ref: Any, v_ref: Any, extra_ref: Any, *rest: Any
) -> None:  # fmt: skip
    """dq of a block of rows, to be scaled."""
    from jax.experimental import pallas as pl

    *ids, dq_ref = rest
    first = lax.rem(pl.program_id(0), np.int32(s.row_blocks)) * s.rows + s.offset
    q, do, lse, delta = q_ref[...], do_ref[...], lse_ref[...], delta_ref[...]
    row_ids = ids[0][...] if ids else None

    def step(masked):
        def run(j, dq):
            starts = (first, j * s.columns) if masked else None
            some = [row_ids, ids[1][j]] if ids else []
            k = k_ref[j]
            seen = _scores(s, q, k, extra_ref[j], starts, some, 0)
            _, ds = _slopes(s, *seen, _product(do, v_ref[j], (1, 1), s.dtype), lse, delta)
            return dq + _product(ds, k, (1, 0), s.dtype)

        return run

    reach = _reach(first, s.rows, s.left, s.right, s.columns, s.column_blocks)
    dq = _fold(reach, _bounded(s), bool(ids), step, jnp.zeros(q.shape, s.dtype))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def key_gradients(
    s: Setting, k_ref: Any, v_ref: Any, extra_ref: Any, q_ref: Any, do_ref: Any, lse_ref: Any, delta_ref: Any, *rest: Any
) -> None:  # fmt: skip
    """dk, to be scaled, and dv of a block of keys, from one query head: extra scores (C, 1), lse and delta (blocks, 1, R)."""
    from jax.experimental import pallas as pl

    *ids, dk_ref, dv_ref = rest
    first = lax.rem(pl.program_id(0), np.int32(s.column_blocks)) * s.columns
    k, v, extra = k_ref[...], v_ref[...], extra_ref[...]
    key_ids = ids[1][...] if ids else None

    def step(masked):
        def run(i, state):
            dk, dv = state
            starts = (i * s.rows + s.offset, first) if masked else None
            some = [key_ids, ids[0][i]] if ids else []
            q, do = q_ref[i], do_ref[i]
            seen = _scores(s, k, q, extra, starts, some, 1)
            p, ds = _slopes(s, *seen, _product(v, do, (1, 1), s.dtype), lse_ref[i], delta_ref[i])
            return dk + _product(ds, q, (1, 0), s.dtype), dv + _product(p, do, (1, 0), s.dtype)

        return run

    zeros = (jnp.zeros(k.shape, s.dtype), jnp.zeros(v.shape, s.dtype))
    reach = _reach(first - s.offset, s.columns, s.right, s.left, s.rows, s.row_blocks)
    dk, dv = _fold(reach, _bounded(s)[::-1], bool(ids), step, zeros)
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
