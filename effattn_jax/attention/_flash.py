"""Flash attention as Pallas kernels: what is handed to the bodies of `_flash_bodies`, and their place under the contract.

Heads and batch are one axis, G = B N for queries and B K for keys, so that a key head serves its group of query heads by its index alone.
Lengths are padded to whole blocks, whose sizes, as those of heads, are powers of two: Triton has no others. Residuals are out and the log-sum-exp.
Source: Dao et al., arXiv:2205.14135; Dao, arXiv:2307.08691.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._derivatives import tie, with_backward
from effattn_jax._pallas import Tile, by_platform, folding, launch
from effattn_jax._products import row_products
from effattn_jax.attention import _flash_bodies as bodies
from effattn_jax.attention._blocks import by_rows
from effattn_jax.attention._pairs import Arrays, Marks, Spec, finite_or_zero

__all__: list[str] = []

_BLOCKS = {
    "cpu": 128,
    "gpu": 64,
    "tpu": 256,
}  # rows and keys of a block; not measured, only what registers and VMEM hold
_LEAST = 16  # the smallest side of a matrix product in Triton


def refuse(bias: Any, initial_state: Any, return_weights: bool, size: int | None) -> None:
    """Raises the ValueError for what the kernels cannot honour, that names the argument and the implementation that takes it."""
    given = "an array" if bias is None or not callable(bias) else type(bias).__name__
    for wrong, message in (
        (bias is not None, f"has no bias; got bias, {given}. implementation='chunked' takes it in O(T) memory"),
        (return_weights, "never forms the weights; got return_weights=True. implementation='dense' returns them"),
        (
            getattr(initial_state, "length", None) is not None,
            "takes as initial_state a cache that grows, not one of fixed size; implementation='chunked' takes both",
        ),
        (
            size is not None and (size < _LEAST or size & (size - 1)),
            f"needs chunk_size a power of two, {_LEAST} at least; got {size}. implementation='chunked' takes any",
        ),
    ):
        if wrong:
            raise ValueError(f"implementation='pallas' {message}")


def _power(size: int) -> int:
    """The power of two that holds `size`."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def _cut(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """(G, T, ...) as blocks (G, n, size, ...), with vectors padded to a power of two."""
    wider = [(0, _power(n) - n) for n in x.shape[2:]]
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *wider], constant_values=fill)
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def _one(per_group: int, shared: int, shape: tuple[int, ...]) -> Tile:
    """The program's own block, of an array whose groups each serve `shared` groups of programs."""
    return Tile((None, None, *shape), lambda p: (p // per_group // shared, p % per_group, 0, 0))


def _all(per_group: int, shared: int, shape: tuple[int, ...]) -> Tile:
    """All blocks of the program's group."""
    return Tile((None, *shape), lambda p: (p // per_group // shared, 0, 0, 0))


def _setting(spec: Spec, offset: int, size: int | None, platform: str, length: int, keys: int) -> bodies.Setting:
    rows, columns = (min(size or _BLOCKS[platform], _power(n)) for n in (length, keys))
    blocks = -(-length // rows), -(-keys // columns)
    return bodies.Setting(spec.left, spec.right, offset, spec.cap, spec.scale, rows, columns, *blocks, spec.dtype)


def _forward(
    spec: Spec, offset: int, size: int | None, platform: str, query: jax.Array, key: jax.Array, value: jax.Array, extra: jax.Array, *ids: Any
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """out (B N, T, V) and lse (B N, T); query (B N, T, H), key (B K, S, H), value (B K, S, V), extra (B K, S), ids (B, T) and (B, S)."""
    (groups, length, _), keys, width = query.shape, key.shape[1], value.shape[2]
    s = _setting(spec, offset, size, platform, length, keys)
    rows, columns = s.rows, s.columns
    shared = groups // key.shape[0]
    q, k, v = _cut(query, rows), _cut(key, columns), _cut(value, columns)
    arrays = [q, k, v, _cut(extra, columns, -jnp.inf)[:, :, None]]
    n = s.row_blocks
    tiles = [_one(n, 1, q.shape[2:]), *(_all(n, shared, x.shape[1:]) for x in arrays[1:])]
    if ids:
        arrays += [_cut(ids[0], rows)[..., None], _cut(ids[1], columns)[:, :, None]]
        each = groups // ids[0].shape[0]
        tiles += [_one(n, each, (rows, 1)), _all(n, each, arrays[-1].shape[1:])]
    shapes = [((groups, n, rows, v.shape[3]), value.dtype), ((groups, n, rows, 1), spec.dtype)]
    outputs = [_one(n, 1, shape[2:]) for shape, _ in shapes]
    out, lse = launch(platform, partial(bodies.forward, s), (groups * n,), tiles, outputs, shapes, arrays)
    out, lse = (x.reshape(groups, n * rows, x.shape[3])[:, :length] for x in (out, lse))
    return out[..., :width], lse[..., 0]


def _backward(
    spec: Spec, offset: int, size: int | None, platform: str, query: jax.Array, key: jax.Array, value: jax.Array, extra: jax.Array,
    d_out: jax.Array, lse: jax.Array, delta: jax.Array, *ids: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dq (B N, T, H), dk (B N, S, H) and dv (B N, S, V), the latter two for every query head and for the caller to add up."""
    (groups, length, dim), keys, width = query.shape, key.shape[1], value.shape[2]
    s = _setting(spec, offset, size, platform, length, keys)
    rows, columns, n, m = s.rows, s.columns, s.row_blocks, s.column_blocks
    shared = groups // key.shape[0]
    q, do, k, v = _cut(query, rows), _cut(d_out, rows), _cut(key, columns), _cut(value, columns)
    of_rows, of_keys = [_cut(lse, rows), _cut(delta, rows)], [_cut(extra, columns, -jnp.inf)]
    more_rows, more_keys, each = [], [], 1
    if ids:
        more_rows, more_keys, each = [_cut(ids[0], rows)], [_cut(ids[1], columns)], groups // ids[0].shape[0]

    def of(tile, per_group, share, arrays):
        return [tile(per_group, share, x.shape[2:] if tile is _one else x.shape[1:]) for x in arrays]

    def upright(arrays):
        return [x[..., None] for x in arrays]

    def flat(arrays):
        return [x[:, :, None] for x in arrays]

    arrays = [q, do, *upright(of_rows)], [k, v, *flat(of_keys)], upright(more_rows), flat(more_keys)
    tiles = of(_one, n, 1, arrays[0]) + of(_all, n, shared, arrays[1])
    tiles += of(_one, n, each, arrays[2]) + of(_all, n, each, arrays[3])
    shape = ((groups, n, *q.shape[2:]), query.dtype)
    (dq,) = launch(
        platform, partial(bodies.query_gradient, s), (groups * n,), tiles, [_one(n, 1, q.shape[2:])], [shape], sum(arrays, [])
    )  # fmt: skip
    arrays = [k, v, *upright(of_keys)], [q, do, *flat(of_rows)], flat(more_rows), upright(more_keys)
    tiles = of(_one, m, shared, arrays[0]) + of(_all, m, 1, arrays[1])
    tiles += of(_all, m, each, arrays[2]) + of(_one, m, each, arrays[3])
    shapes = [((groups, m, *x.shape[2:]), x.dtype if shared == 1 else spec.dtype) for x in (k, v)]
    outputs = [_one(m, 1, shape[2:]) for shape, _ in shapes]
    grads = launch(platform, partial(bodies.key_gradients, s), (groups * m,), tiles, outputs, shapes, sum(arrays, []))
    dq, dk, dv = (x.reshape(groups, x.shape[1] * x.shape[2], x.shape[3]) for x in (dq, *grads))
    return dq[:, :length, :dim], dk[:, :keys, :dim], dv[:, :keys, :width]


def _grouped(x: jax.Array) -> jax.Array:
    """(B, T, N, ...) as (B N, T, ...)."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _ungrouped(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_grouped`."""
    return jnp.moveaxis(x.reshape(x.shape[0] // heads, heads, *x.shape[1:]), 1, 2)


def _prepared(arrays: Arrays, marks: Marks) -> tuple[Any, ...]:
    """Queries, keys, values and extra scores as the kernels take them, and segment ids where there are any."""
    query, key, value, _ = arrays
    dtype = jnp.result_type(query, key, value)
    query, key, value = (_grouped(x.astype(dtype)) for x in (query, key, value))
    (key, bad_key), (value, bad_value) = finite_or_zero(key), finite_or_zero(value)
    extra = jnp.where(bad_key | bad_value, jnp.nan, jnp.zeros((), jnp.result_type(jnp.float32, dtype)))
    if marks.key_mask is not None:
        seen = marks.key_mask[:, None] & jnp.ones_like(arrays.key[..., 0], bool).swapaxes(1, 2)
        extra = jnp.where(seen.reshape(extra.shape), extra, -jnp.inf)
    ids = () if marks.key_segments is None else (marks.query_segments, marks.key_segments)
    return query, key, value, extra, *ids


def _gradients(
    spec: Spec, offset: int, size: int | None, arrays: Arrays, marks: Marks, results: Any, cotangents: Any
) -> Arrays:
    """The backward pass. A row that is spoiled, or whose cotangent is, has lse NaN, which spoils what it sees and nothing else; one whose
    cotangent is 0 has lse infinite, and gives no gradient whatever it holds."""
    heads, kv_heads = arrays.query.shape[2], arrays.key.shape[2]
    out, lse, d_out, d_lse = (_grouped(x) for x in (*results, *cotangents))
    query, key, value, extra, *ids = _prepared(arrays, marks)
    if query.dtype == jnp.float16:  # whose range ds leaves
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    (query, bad_query), (d_out, bad_cotangent) = finite_or_zero(query), finite_or_zero(d_out)
    extra = jnp.where(jnp.isnan(extra), 0, extra)
    lse = jnp.where(bad_query | bad_cotangent, jnp.nan, jnp.where(lse == -jnp.inf, 0, lse))
    lse = jnp.where(jnp.all(d_out == 0, axis=-1) & ~bad_cotangent & (d_lse == 0), jnp.inf, lse)
    delta = d_lse - row_products(d_out.astype(spec.dtype), out.astype(spec.dtype))
    delta = jnp.where(jnp.isfinite(delta), delta, 0)

    def run(*arrays):
        return by_platform(partial(_backward, spec, offset, size), *arrays)

    dq, dk, dv = folding(run)(query, key, value, extra, d_out.astype(query.dtype), lse, delta, *ids)
    dq, dk, dv = (_ungrouped(x, heads).astype(spec.dtype) for x in (dq, dk, dv))
    dk, dv = (x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, x.shape[3]).sum(3) for x in (dk, dv))
    scaled = dq * spec.scale, dk * spec.scale, dv
    return Arrays(*(x.astype(like.dtype) for x, like in zip(scaled, arrays[:3], strict=True)), None)


def by_flash(spec: Spec, arrays: Arrays, marks: Marks, offset: int, size: int | None) -> tuple[jax.Array, jax.Array]:
    """out (B, T, N, V) and lse (B, T, N); T, S >= 1, no bias, no mask over pairs, `size` a power of two from 16 on, or None."""
    if marks.mask is not None:
        raise ValueError(
            f"implementation='pallas' takes a mask over keys, (*B, 1, 1, S), not over pairs; got mask, {marks.mask.shape} of (*B, N, T, S). "
            "implementation='chunked' takes any"
        )
    arrays, marks = tie((arrays, marks))

    def forward(arrays, marks):
        def run(*arrays):
            return by_platform(partial(_forward, spec, offset, size), *arrays)

        heads = arrays.query.shape[2]
        out, lse = (_ungrouped(x, heads) for x in folding(run)(*_prepared(arrays, marks)))
        return out.astype(arrays.value.dtype), lse

    def plain(arrays, marks):
        return by_rows(spec, arrays, marks)

    def backward(arrays, marks, results, cotangents):
        return _gradients(spec, offset, size, arrays, marks, results, cotangents)

    return with_backward(forward, plain, backward)(arrays, marks)
