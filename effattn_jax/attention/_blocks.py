"""Softmax attention by blocks of rows and keys: O(T) memory in every pass, and no block computed that nobody may see.

Forward, for a block of rows over the blocks of keys it sees (running maximum m, normaliser l, sum a):

    m' = max(m, max_j s_ij)    l' = l e^(m - m') + sum_j e^(s_ij - m')    a' = a e^(m - m') + sum_j e^(s_ij - m') v_j

Backward, from out and lse = m + log l: p = e^(s - lse), ds = p (do.v - do.out + dlse), and each gradient one product per block.
Blocks that every row of theirs sees whole skip all masking. Sources: Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682; Dao et al., arXiv:2205.14135.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._derivatives import tie, with_backward

__all__: list[str] = []


class Spec(NamedTuple):
    """What is fixed at trace time. Windows count neighbours of a query's own key; None is no bound."""

    left: int | None
    right: int | None
    cap: float | None
    scale: float
    rows: int
    columns: int
    dtype: Any


class Marks(NamedTuple):
    """Who may see whom, beside the window of `Spec`: all optional but `offset`."""

    offset: jax.Array  # () int32: the key of row 0 is key number `offset`
    mask: jax.Array | None = None  # (B | 1, N | 1, T | 1, S | 1)
    key_mask: jax.Array | None = None  # (B, S)
    query_segments: jax.Array | None = None  # (B, T)
    key_segments: jax.Array | None = None  # (B, S)

    @property
    def only_window(self) -> bool:
        return self.mask is None and self.key_mask is None and self.key_segments is None


class Arrays(NamedTuple):
    """The differentiable inputs."""

    query: jax.Array  # (B, T, N, H); grouped by key head inside a block: outside it would copy the whole array
    key: jax.Array  # (B, S, K, H)
    value: jax.Array  # (B, S, K, V)
    bias: jax.Array | None  # (B | 1, N | 1, T | 1, S | 1)


def _pairs(x: jax.Array, row: Any, rows: int, column: Any, columns: int, kv_heads: int) -> jax.Array:
    """The block of a (B | 1, N | 1, T | 1, S | 1) array as (B | 1, K | 1, G | 1, R | 1, C | 1)."""
    x = x if x.shape[2] == 1 else lax.dynamic_slice_in_dim(x, row, rows, 2)
    x = x if x.shape[3] == 1 else lax.dynamic_slice_in_dim(x, column, columns, 3)
    heads = (1, 1) if x.shape[1] == 1 else (kv_heads, x.shape[1] // kv_heads)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def allowed(
    spec: Spec, marks: Marks, kv_heads: int, row: Any, rows: int, column: Any, columns: int, begin: Any = None
) -> jax.Array:
    """Which rows [row, row + rows) see which keys [column, column + columns), broadcastable to (B, K, G, R, C); keys before `begin` are out."""
    position = marks.offset + row + jnp.arange(rows)[:, None]
    key = column + jnp.arange(columns)[None, :]
    see = jnp.ones((rows, columns), bool) if begin is None else jnp.broadcast_to(key >= begin, (rows, columns))
    if spec.left is not None:
        see = see & (key >= position - spec.left)
    if spec.right is not None:
        see = see & (key <= position + spec.right)
    see = see[None, None, None]
    if marks.key_mask is not None:
        see = see & lax.dynamic_slice_in_dim(marks.key_mask, column, columns, 1)[:, None, None, None, :]
    if marks.key_segments is not None:
        ids = lax.dynamic_slice_in_dim(marks.query_segments, row, rows, 1)[:, None, None, :, None]
        see = see & (ids == lax.dynamic_slice_in_dim(marks.key_segments, column, columns, 1)[:, None, None, None, :])
    if marks.mask is not None:
        see = see & _pairs(marks.mask, row, rows, column, columns, kv_heads)
    return see


def logits(spec: Spec, query: jax.Array, key: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """cap tanh((scale q.k + bias) / cap) and its derivative by the argument; query (B, K, G, R, H), key (B, K, C, H), already scaled."""
    s = jnp.einsum("bkgih,bkjh->bkgij", query, key)
    s = s if bias is None else s + bias
    if spec.cap is None:
        return s, jnp.ones((), s.dtype)
    t = jnp.tanh(s / spec.cap)
    return spec.cap * t, 1 - t * t


def poisoned(see: jax.Array, bad: jax.Array) -> jax.Array:
    """Rows (B, K, G, R) that see a key marked bad (B, K, C). Those keys enter products as 0, since 0 * NaN is NaN where they are masked."""
    if see.shape[1:3] == (1, 1):
        see = jnp.broadcast_to(see[:, 0, 0], (bad.shape[0], *see.shape[3:])).astype(jnp.float32)
        return (jnp.einsum("bij,bkj->bki", see, bad.astype(jnp.float32)) > 0)[:, :, None]
    return jnp.any(see & bad[:, :, None, None, :], axis=-1)


def finite_or_zero(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x with what is not finite set to 0, and whether anything along the last axis was."""
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0), ~jnp.all(finite, axis=-1)


def whole_rows(
    spec: Spec, arrays: Arrays, marks: Marks, row: Any = 0, rows: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows against all keys at once: out (B, R, N, V), lse (B, R, N), weights (B, K, G, R, S). Plain operations, any derivative."""
    query, key, value, bias = arrays
    kv_heads, keys = key.shape[1:3][::-1]
    rows = query.shape[1] if rows is None else rows
    q = _rows(query, row, rows, kv_heads, spec.dtype) * spec.scale
    k, bad_key = finite_or_zero(jnp.moveaxis(key, 1, 2).astype(spec.dtype))
    v, bad_value = finite_or_zero(jnp.moveaxis(value, 1, 2).astype(spec.dtype))
    see = allowed(spec, marks, kv_heads, row, rows, 0, keys)
    if bias is not None:
        bias = _pairs(bias.astype(spec.dtype), row, rows, 0, keys, kv_heads)
        see, bias = see & (bias != -jnp.inf), jnp.where(bias == -jnp.inf, 0, bias)
    s = jnp.where(see, logits(spec, q, k, bias)[0], -jnp.inf)
    top = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    empty = total == 0
    weights = p / jnp.where(empty, 1, total)
    out = jnp.einsum("bkgij,bkjv->bkgiv", weights, v)
    out = jnp.where(poisoned(see, bad_key | bad_value)[..., None], jnp.nan, out)
    lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))[..., 0]
    return _unrows(out).astype(value.dtype), _unrows(lse), weights


def _row_blocks(length: int, rows: int) -> int:
    return -(-length // rows)


def _span(spec: Spec, marks: Marks, row: Any, keys: int) -> tuple[Any, Any, Any]:
    """First and one past the last key that a block of rows sees, and how many whole column blocks need no mask."""
    first = marks.offset + row
    last = first + spec.rows - 1
    low = 0 if spec.left is None else jnp.clip(first - spec.left, 0, keys)
    high = keys if spec.right is None else jnp.clip(last + spec.right + 1, low, keys)
    if not marks.only_window or spec.left is not None:
        return low, high, 0
    inner = keys if spec.right is None else jnp.clip(first + spec.right + 1, 0, keys)
    return low, high, inner // spec.columns


def _over_columns(spec: Spec, marks: Marks, row: Any, keys: int, has_bias: bool, block: Any, state: Any) -> Any:
    """Folds `block(state, column, begin, masked)` over the blocks of keys that the rows see; the last one is moved back to end with the keys."""
    low, high, clean = _span(spec, marks, row, keys)
    clean = 0 if has_bias else clean

    def step(masked):
        def run(j, state):
            begin = low + j * spec.columns
            return block(state, jnp.minimum(begin, keys - spec.columns), begin, masked)

        return run

    if not isinstance(clean, int) or clean:
        state = lax.fori_loop(0, clean, step(False), state)
    return lax.fori_loop(clean, (high - low + spec.columns - 1) // spec.columns, step(True), state)


def _rows(x: jax.Array, row: Any, rows: int, kv_heads: int, dtype: Any) -> jax.Array:
    """Rows of (B, T, N, ...) as (B, K, G, R, ...)."""
    x = jnp.moveaxis(lax.dynamic_slice_in_dim(x, row, rows, 1), 1, 2)
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:]).astype(dtype)


def _unrows(x: jax.Array) -> jax.Array:
    """(B, K, G, R, ...) as (B, R, N, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), 1, 2)


def _heads_first(x: jax.Array, dtype: Any) -> jax.Array:
    return jnp.moveaxis(x, 1, 2).astype(dtype)


def _zeros(query: jax.Array, value: jax.Array) -> jax.Array:
    """Zeros of the shape of the output, made from the inputs so that sharding and varying axes are theirs."""
    return jnp.zeros_like(jnp.einsum("btnh,bkv->btnv", query, value[:, 0]))


def _forward(spec: Spec, arrays: Arrays, marks: Marks) -> tuple[jax.Array, jax.Array]:
    query, key, value, bias = arrays
    length, keys, kv_heads = query.shape[1], key.shape[1], key.shape[2]
    k, v = _heads_first(key, spec.dtype), _heads_first(value, spec.dtype)
    out = _zeros(query, value).astype(value.dtype)

    def row_block(i, buffers):
        row = jnp.minimum(i * spec.rows, length - spec.rows)
        q = _rows(query, row, spec.rows, kv_heads, spec.dtype) * spec.scale

        def block(state, column, begin, masked):
            top, total, acc, spoiled = state
            k_block, v_block = (lax.dynamic_slice_in_dim(x, column, spec.columns, 2) for x in (k, v))
            b = (
                None
                if bias is None
                else _pairs(bias.astype(spec.dtype), row, spec.rows, column, spec.columns, kv_heads)
            )
            s, _ = logits(spec, q, k_block, b)
            if masked:
                see = allowed(spec, marks, kv_heads, row, spec.rows, column, spec.columns, begin)
                see = see if b is None else see & (b != -jnp.inf)
                s = jnp.where(see, s, -jnp.inf)
                v_block, bad = finite_or_zero(v_block)
                spoiled = spoiled | poisoned(see, bad)
            new_top = jnp.maximum(top, s.max(-1))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            p, shrink = jnp.exp(s - safe[..., None]), jnp.exp(top - safe)
            acc = acc * shrink[..., None] + jnp.einsum("bkgij,bkjv->bkgiv", p, v_block)
            return new_top, total * shrink + p.sum(-1), acc, spoiled

        acc = jnp.zeros_like(jnp.einsum("bkgih,bkv->bkgiv", q, v[:, :, 0]))
        zero = jnp.zeros_like(acc[..., 0])
        state = (zero - jnp.inf, zero, acc, zero > 0)
        top, total, acc, spoiled = _over_columns(spec, marks, row, keys, bias is not None, block, state)
        empty = total == 0
        done = acc / jnp.where(empty, 1, total)[..., None]
        done = jnp.where(spoiled[..., None], jnp.nan, done)
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
        parts = (_unrows(done).astype(value.dtype), _unrows(lse))
        return jax.tree.map(lambda buffer, part: lax.dynamic_update_slice_in_dim(buffer, part, row, 1), buffers, parts)

    return lax.fori_loop(0, _row_blocks(length, spec.rows), row_block, (out, out[..., 0].astype(spec.dtype)))


def _add_pairs(total: jax.Array, part: jax.Array, row: Any, column: Any) -> jax.Array:
    """Adds a block (B, K, G, R, C) to a (B | 1, N | 1, T | 1, S | 1) gradient, summed over the axes that were broadcast."""
    part = part.reshape(part.shape[0], part.shape[1] * part.shape[2], *part.shape[3:])
    axes = tuple(a for a in range(4) if total.shape[a] == 1 and part.shape[a] != 1)
    part = part.sum(axes, keepdims=True)
    start = [
        jnp.asarray(i, jnp.int32)
        for i in (0, 0, row if total.shape[2] != 1 else 0, column if total.shape[3] != 1 else 0)
    ]
    return lax.dynamic_update_slice(total, lax.dynamic_slice(total, start, part.shape) + part, start)


def _add(total: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    here = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, here + part.astype(total.dtype), start, axis)


def _backward(spec: Spec, arrays: Arrays, marks: Marks, results: Any, cotangents: Any) -> Arrays:
    query, key, value, bias = arrays
    (out, lse), (d_out, d_lse) = results, cotangents
    length, keys, kv_heads = query.shape[1], key.shape[1], key.shape[2]
    k, v = _heads_first(key, spec.dtype), _heads_first(value, spec.dtype)

    def row_block(i, grads):
        row = jnp.minimum(i * spec.rows, length - spec.rows)
        fresh = row + jnp.arange(spec.rows) >= i * spec.rows  # rows that the block before has done count once

        def rows_of(x):
            return _rows(x, row, spec.rows, kv_heads, spec.dtype)

        q, do = rows_of(query) * spec.scale, jnp.where(fresh[:, None], rows_of(d_out), 0)
        lse_rows = rows_of(lse)
        lse_rows = jnp.where(lse_rows == -jnp.inf, 0, lse_rows)[..., None]
        delta = jnp.where(fresh, rows_of(d_lse), 0) - jnp.sum(do * rows_of(out), axis=-1)

        def block(state, column, begin, masked):
            dq, dk, dv, db = state
            k_block, v_block = (lax.dynamic_slice_in_dim(x, column, spec.columns, 2) for x in (k, v))
            b = (
                None
                if bias is None
                else _pairs(bias.astype(spec.dtype), row, spec.rows, column, spec.columns, kv_heads)
            )
            s, slope = logits(spec, q, k_block, b)
            p = jnp.exp(s - lse_rows)
            if masked:
                see = allowed(spec, marks, kv_heads, row, spec.rows, column, spec.columns, begin)
                see = see if b is None else see & (b != -jnp.inf)
                p = jnp.where(see, p, 0)
                k_block, v_block = finite_or_zero(k_block)[0], finite_or_zero(v_block)[0]
            ds = p * (jnp.einsum("bkgiv,bkjv->bkgij", do, v_block) + delta[..., None]) * slope
            ds = jnp.where(see, ds, 0) if masked else ds
            dq = dq + jnp.einsum("bkgij,bkjh->bkgih", ds, k_block)
            dk = _add(dk, jnp.einsum("bkgij,bkgih->bkjh", ds, q), column, 2)
            dv = _add(dv, jnp.einsum("bkgij,bkgiv->bkjv", p, do), column, 2)
            return dq, dk, dv, None if db is None else _add_pairs(db, ds, row, column)

        dq, dk, dv, db = grads
        state = (jnp.zeros_like(q), dk, dv, db)
        dq_rows, dk, dv, db = _over_columns(spec, marks, row, keys, bias is not None, block, state)
        return _add(dq, _unrows(dq_rows) * spec.scale, row, 1), dk, dv, db

    # -0 is a zero that XLA does not take for the other zeros of the same shape, of which it would make one and copy it for each.
    zeros = (
        jnp.full_like(query, -0.0),
        jnp.zeros_like(k),
        jnp.full_like(v, -0.0),
        None if bias is None else jnp.zeros_like(bias, spec.dtype),
    )
    dq, dk, dv, db = lax.fori_loop(0, _row_blocks(length, spec.rows), row_block, zeros)
    dk, dv = (jnp.moveaxis(x, 1, 2).astype(like.dtype) for x, like in ((dk, key), (dv, value)))
    return Arrays(dq, dk, dv, None if bias is None else db.astype(bias.dtype))


def _plain(spec: Spec, arrays: Arrays, marks: Marks) -> tuple[jax.Array, jax.Array]:
    length = arrays.query.shape[1]
    starts = jnp.minimum(jnp.arange(_row_blocks(length, spec.rows)) * spec.rows, length - spec.rows)
    blocks = lax.map(jax.checkpoint(lambda row: whole_rows(spec, arrays, marks, row, spec.rows)[:2]), starts)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        last = x[:, -1, spec.rows * (starts.shape[0]) - length :]
        return jnp.concatenate(
            [x[:, :-1].reshape(x.shape[0], (x.shape[1] - 1) * x.shape[2], *x.shape[3:]), last], axis=1
        )

    return jax.tree.map(join, blocks)


def by_blocks(spec: Spec, arrays: Arrays, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, V) and lse (B, T, N); T, S >= 1, block sizes at most T and S."""
    arrays, marks = tie((arrays, marks))

    def forward(arrays, marks):
        return _forward(spec, arrays, marks)

    def plain(arrays, marks):
        return _plain(spec, arrays, marks)

    def backward(arrays, marks, results, cotangents):
        return _backward(spec, arrays, marks, results, cotangents)

    return with_backward(forward, plain, backward)(arrays, marks)
