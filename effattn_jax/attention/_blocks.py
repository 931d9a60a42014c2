"""Softmax attention by blocks of rows and keys: O(T) memory in every pass, and no block computed that nobody may see.

Forward, for a block of rows over the blocks of keys it sees (running maximum m, normaliser l, sum a):

    m' = max(m, max_j s_ij)    l' = l e^(m - m') + sum_j e^(s_ij - m')    a' = a e^(m - m') + sum_j e^(s_ij - m') v_j

Backward, from out and lse = m + log l: p = e^(s - lse), ds = p (do.v - do.out + dlse), and each gradient one product per block.
Blocks that every row of theirs sees whole skip all masking. Sources: Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats,
arXiv:2112.05682; Dao et al., arXiv:2205.14135.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._derivatives import Fixed, tie, with_backward
from effattn_jax._places import split_heads, split_like
from effattn_jax._products import row_products
from effattn_jax.attention._pairs import (
    Arrays,
    Keys,
    Marks,
    More,
    Spec,
    bias_of,
    block_of,
    flat,
    keeping_bounds,
    poisoned,
    rows_of,
    unrows,
    whole_rows,
    widened,
)
from effattn_jax.attention._reach import Span, bounds_of, span
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__: list[str] = []


def _row_blocks(length: int, rows: int) -> int:
    return -(-length // rows)


def _over_columns(spec: Spec, seen: Span, keys: int, bias: Any, block: Any, state: Any) -> Any:
    """Folds `block(state, column, begin, masked)` over the blocks of keys that the rows see; the last one is moved back to end with the keys."""
    low, high, clean = seen
    clean = clean if bias is None or callable(bias) else 0  # an array may hold -inf

    def step(masked):
        def run(j, state):
            begin = low + j * spec.columns
            return block(state, jnp.minimum(begin, keys - spec.columns), begin, masked)

        return run

    if not isinstance(clean, int) or clean:
        state = lax.fori_loop(0, clean, step(False), state)
    return lax.fori_loop(clean, (high - low + spec.columns - 1) // spec.columns, step(True), state)


def _zeros(query: jax.Array, value: jax.Array) -> jax.Array:
    """Zeros of the shape of the output, made from the inputs so that sharding and varying axes are theirs."""
    return jnp.zeros_like(jnp.einsum("btnh,bkv->btnv", query, value[:, 0]))


def _forward(spec: Spec, arrays: Arrays, marks: Marks) -> tuple[jax.Array, jax.Array]:
    query, key, value, bias = arrays
    length, keys, kv_heads = query.shape[1], key.shape[1], key.shape[2]
    bias = widened(bias, spec.dtype)
    out, bounds = _zeros(query, value).astype(value.dtype), bounds_of(spec, marks, length, keys)

    def row_block(i, buffers):
        row = jnp.minimum(i * spec.rows, length - spec.rows)
        seen = span(spec, marks, bounds, i, length, keys)
        q = flat(rows_of(query, row, spec.rows, kv_heads, spec.dtype)) * spec.scale

        def block(state, column, begin, masked):
            top, total, acc, spoiled = state
            b = block_of(spec, marks, q, key, value, bias, row, column, begin, masked)
            if masked:
                spoiled = spoiled | poisoned(b.see, b.bad_value)
            new_top = jnp.maximum(top, b.scores.max(-1))
            safe = jnp.where(new_top == -jnp.inf, 0, new_top)
            p, shrink = jnp.exp(b.scores - safe[..., None]), jnp.exp(top - safe)
            acc = acc * flat(shrink)[..., None] + jnp.einsum("bkmj,bkjv->bkmv", flat(p), b.value)
            return new_top, total * shrink + p.sum(-1), acc, spoiled

        acc = jnp.zeros_like(jnp.einsum("bkmh,bkv->bkmv", q, value[:, 0].astype(spec.dtype)))
        zero = jnp.zeros_like(acc[..., 0]).reshape(*acc.shape[:2], acc.shape[2] // spec.rows, spec.rows)
        state = (zero - jnp.inf, zero, acc, zero > 0)
        top, total, acc, spoiled = _over_columns(spec, seen, keys, bias, block, state)
        empty = total == 0
        done = acc.reshape(*total.shape, acc.shape[3]) / jnp.where(empty, 1, total)[..., None]
        done = jnp.where(spoiled[..., None], jnp.nan, done)
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, total)))
        parts = (unrows(done).astype(value.dtype), unrows(lse))
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


def _add_parameters(spec: Spec, marks: Marks, bias: Any, total: Any, part: jax.Array, row: Any, column: Any) -> Any:
    """Adds to the gradient of a bias by position what a block (B, K, G, R, C) of gradients of scores makes of its parameters."""

    def scores(bias):
        return bias_of(bias, marks, row, spec.rows, column, spec.columns, part.shape[1]).astype(part.dtype)

    here, pull = jax.vjp(scores, bias)
    axes = tuple(a for a in range(5) if here.shape[a] == 1 and part.shape[a] != 1)
    part = part.sum(axes, keepdims=True)
    if jax.typeof(part).sharding.spec != jax.typeof(here).sharding.spec:
        part = jax.sharding.reshard(part, jax.typeof(here).sharding.spec)
    return jax.tree.map(jnp.add, total, pull(part)[0])


def _add(total: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    here = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, here + part.astype(total.dtype), start, axis)


def _backward(spec: Spec, arrays: Arrays, marks: Marks, results: Any, cotangents: Any) -> Arrays:
    query, key, value, bias = arrays
    (out, lse), (d_out, d_lse) = results, cotangents
    length, keys, kv_heads = query.shape[1], key.shape[1], key.shape[2]
    bias, bounds = widened(bias, spec.dtype), bounds_of(spec, marks, length, keys)

    def row_block(i, grads):
        row = jnp.minimum(i * spec.rows, length - spec.rows)
        seen = span(spec, marks, bounds, i, length, keys)
        fresh = row + jnp.arange(spec.rows) >= i * spec.rows  # rows that the block before has done count once

        def here(x):
            return rows_of(x, row, spec.rows, kv_heads, spec.dtype)

        do, lse_rows, out_rows = jnp.where(fresh[:, None], here(d_out), 0), here(lse), here(out)
        d_lse_rows = jnp.where(fresh, here(d_lse), 0)
        # Queries that see nothing, that nobody asks for or whose output is NaN give no gradient, whatever they hold: 0 * NaN is NaN.
        quiet = ~jnp.isfinite(lse_rows) | jnp.isnan(out_rows).any(-1) | (jnp.all(do == 0, axis=-1) & (d_lse_rows == 0))
        q = jnp.where(quiet[..., None], 0, here(query) * spec.scale)
        lse_rows = jnp.where(quiet, jnp.inf, lse_rows)[:, :, None]
        delta = jnp.where(quiet, 0, d_lse_rows - row_products(do, out_rows))

        def block(state, column, begin, masked):
            dq, dk, dv, db = state
            # Columns first: then p and ds enter all products as they lie. Of products that sum over the first axis of both
            # operands, which XLA computes at half the speed on CPU, the one for dq would be left: the key, far smaller, is turned instead.
            b = block_of(spec, marks, flat_q, key, value, bias, row, column, begin, masked, turned=True)
            p = jnp.exp(b.scores - lse_rows)
            ds = p * (jnp.einsum("bkjv,bkmv->bkjm", b.value, flat_do).reshape(p.shape) + delta[:, :, None]) * b.slope
            ds = jnp.where(b.see, ds, 0) if masked else ds
            flat_p, flat_ds = (x.reshape(*x.shape[:3], x.shape[3] * x.shape[4]) for x in (p, ds))
            key_first = lax.optimization_barrier(jnp.moveaxis(b.key, 2, 3))
            dq = dq + jnp.einsum("bkhj,bkjm->bkhm", key_first, flat_ds)
            dk = _add(dk, jnp.moveaxis(jnp.einsum("bkjm,bkmh->bkjh", flat_ds, flat_q), 1, 2), column, 1)
            dv = _add(dv, jnp.moveaxis(jnp.einsum("bkjm,bkmv->bkjv", flat_p, flat_do), 1, 2), column, 1)
            return dq, dk, dv, None if db is None else add_bias(db, jnp.moveaxis(ds, 2, -1), row, column)

        dq, dk, dv, db = grads
        flat_q, flat_do = flat(q), flat(do)
        state = (jnp.zeros_like(jnp.moveaxis(flat_q, 2, 3)), dk, dv, db)
        dq_rows, dk, dv, db = _over_columns(spec, seen, keys, bias, block, state)
        dq_rows = jnp.moveaxis(dq_rows, 2, 3).reshape(q.shape)
        return _add(dq, unrows(dq_rows) * spec.scale, row, 1), dk, dv, db

    add_bias = partial(_add_parameters, spec, marks, bias) if callable(bias) else _add_pairs
    # -0 is a zero that XLA does not take for the other zeros of the same shape, of which it would make one and copy it for each.
    zeros = (
        jnp.full_like(query, -0.0),
        jnp.zeros_like(key, spec.dtype),
        jnp.full_like(value, -0.0, spec.dtype),
        jax.tree.map(lambda x: jnp.zeros_like(x, spec.dtype), bias),
    )
    dq, dk, dv, db = lax.fori_loop(0, _row_blocks(length, spec.rows), row_block, zeros)
    db = jax.tree.map(lambda x, like: x.astype(like.dtype), db, arrays.bias)
    return Arrays(dq, dk.astype(key.dtype), dv.astype(value.dtype), db)


def by_rows(spec: Spec, arrays: Arrays, marks: Marks, more: More | None = None) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, V) and lse (B, T, N) by blocks of rows, each against all keys at once.

    Any derivative; O(T) memory in each, since a block is computed again where it is differentiated.
    """
    length = arrays.query.shape[1]
    starts = jnp.minimum(jnp.arange(_row_blocks(length, spec.rows)) * spec.rows, length - spec.rows)
    by_head = Keys.of(arrays, spec.dtype)  # moved once, and their cotangents once
    block = keeping_bounds(lambda row: whole_rows(spec, arrays, marks, row, spec.rows, more, by_head)[:2])
    blocks = lax.map(block, starts)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        if x.shape[1] == 1:  # no axis of size 0, which cannot be reshaped on an Explicit mesh
            return x[:, 0]
        last = x[:, -1, spec.rows * (starts.shape[0]) - length :]
        return jnp.concatenate(
            [x[:, :-1].reshape(x.shape[0], (x.shape[1] - 1) * x.shape[2], *x.shape[3:]), last], axis=1
        )

    return jax.tree.map(join, blocks)


def by_blocks(spec: Spec, arrays: Arrays, marks: Marks) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, V) and lse (B, T, N); T, S >= 1, block sizes at most T and S."""
    query, key, value, bias = arrays
    key, value = (split_heads(x, query) for x in (key, value))
    if jax.typeof(key).sharding.spec[2] != jax.typeof(query).sharding.spec[2]:
        # Queries of one group on several devices of an Explicit mesh: a key for each query head, so that gradients are added up where they lie.
        key, value = (repeat_heads(x, query) for x in (key, value))
    if bias is not None and not callable(bias):
        # Sharded as its pairs are, so that its gradient can be added up where it lies.
        for axis, axis_of_query in ((0, 0), (1, 2)):
            bias = bias if bias.shape[axis] == 1 else split_like(bias, axis, query, axis_of_query)
    arrays, marks = tie((Arrays(query, key, value, bias), marks))
    forms = (Fixed(form, spec) for form in (_forward, by_rows, _backward))
    return with_backward(*forms)(arrays, marks)
