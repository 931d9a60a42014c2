"""Flash attention as Pallas kernels: what is handed to the bodies of `_flash_bodies`, and their place under the contract.

Heads and batch are one axis, G = B N for queries and B K for keys, so that a key head serves its group of query heads by its index alone.
Lengths are padded to whole blocks, whose sizes, as those of heads, are powers of two: Triton has no others. Residuals are out and the log-sum-exp.
Segments and masks over keys leave each block of rows a range of blocks of keys, of its own row of the batch, and outside it nothing is computed.
Source: Dao et al., arXiv:2205.14135; Dao, arXiv:2307.08691.
"""

from collections.abc import Sequence
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
from effattn_jax.attention._reach import extents_of, meeting, range_of

__all__: list[str] = []

_BLOCKS = {
    "cpu": 128,
    "gpu": 64,
    "tpu": 256,
}  # rows and keys of a block; not measured, only what registers and VMEM hold
_SECTION = {
    "cpu": None,
    "gpu": None,
    "tpu": 1 << 22,
}  # bytes at most that a program has of what it sees, VMEM holding it twice; None: all
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
    """(G, T, H) as blocks (G, n, size, H), with vectors padded to a power of two; (G, T) as (G, n, 1, size)."""
    wider = [(0, _power(n) - n) for n in x.shape[2:]]
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *wider], constant_values=fill)
    return x.reshape(x.shape[0], x.shape[1] // size, *((size,) if wider else (1, size)), *x.shape[2:])


def _setting(
    spec: Spec, offset: int, size: int | None, platform: str, length: int, keys: int, segmented: bool
) -> bodies.Setting:
    rows, columns = (min(size or _BLOCKS[platform], _power(n)) for n in (length, keys))
    blocks = -(-length // rows), -(-keys // columns)
    return bodies.Setting(
        spec.left, spec.right, offset, spec.cap, spec.scale, rows, columns, *blocks, spec.dtype, segmented
    )


def _bounds(s: bodies.Setting, extra: jax.Array, masked: bool, ids: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The blocks [low, high) along `axis` of (rows of the batch, blocks of rows, blocks of keys) that segments and a mask over keys leave to
    each block of the other axis, flat; nothing where there is neither."""
    if not (ids or masked):
        return []
    query_ids, key_ids = ids or (
        jnp.zeros((extra.shape[0], n), jnp.int32) for n in (s.rows * s.row_blocks, extra.shape[1])
    )
    shown = (extra != -jnp.inf).reshape(key_ids.shape[0], -1, extra.shape[1]).any(1)

    def extents(ids, mask, size, blocks):
        more = [(0, 0), (0, size * blocks - ids.shape[1])]
        return extents_of(jnp.pad(ids, more), jnp.pad(mask, more), size)

    of_rows = extents(query_ids, jnp.ones_like(query_ids, bool), s.rows, s.row_blocks)
    return [
        x.reshape(-1) for x in range_of(meeting(of_rows, extents(key_ids, shown, s.columns, s.column_blocks)), axis)
    ]


def _run(
    platform: str, body: bodies.Body, s: bodies.Setting, own: Sequence[tuple[jax.Array, int]], seen: Sequence[tuple[jax.Array, int]],
    outputs: Sequence[tuple[int, Any]], bounds: list[jax.Array],
) -> list[jax.Array]:  # fmt: skip
    """The outputs of a body (G, places, width) or, of width 0, (G, places), given that and their dtypes. `own` and `seen`: arrays in blocks, of
    which a program has its own one or those it sees, each with how many groups of programs it serves."""
    (first, shared), *_ = own
    groups, blocks, size = first.shape[0] * shared, first.shape[1], first.shape[2]
    count = seen[0][0].shape[1]
    whole = sum(x.dtype.itemsize * count * _in_tiles(x.shape[2]) * _in_tiles(x.shape[3]) for x, _ in seen)
    each = -(-count // -(-whole // (_SECTION[platform] or whole)))
    s = s._replace(sections=-(-count // each), each=each, groups=groups * blocks // bounds[0].size if bounds else 0)

    def one(shared, shape):
        return Tile((None, None, *shape), lambda p, *_: (p // blocks // shared, p % blocks, 0, 0))

    def section(shared, shape):
        def index(p, number=0, *bounds):
            here = bodies.section(s, body.reach(s, p, bounds), number) if s.sections > 1 else 0
            return p // blocks // shared, here, 0, 0

        return Tile((None, each, *shape), index)

    more = s.sections * each - count
    tiles = [one(n, x.shape[2:]) for x, n in own] + [section(n, x.shape[2:]) for x, n in seen]
    arrays = [x for x, _ in own] + [jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]) for x, _ in seen]
    forms = [(size, width) if width else (1, size) for width, _ in outputs]
    shapes = [((groups, blocks, *form), dtype) for form, (_, dtype) in zip(forms, outputs, strict=True)]
    kept = [(form, s.dtype) for form in forms] if s.sections > 1 else []
    grid = (groups * blocks,) + (s.sections,) * (s.sections > 1)
    out = launch(
        platform, partial(body.run, s), grid, tiles, [one(1, form) for form in forms], shapes, arrays, bounds, kept
    )
    return [
        x.reshape(groups, blocks * size, *(form[1:] if width else ()))
        for x, form, (width, _) in zip(out, forms, outputs, strict=True)
    ]


def _in_tiles(size: int) -> int:
    """A side of a block as it lies in VMEM, roughly."""
    return 8 if size == 1 else -(-size // 128) * 128


def _forward(
    spec: Spec, offset: int, size: int | None, masked: bool, platform: str,
    query: jax.Array, key: jax.Array, value: jax.Array, extra: jax.Array, *ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """out (B N, T, V) and lse (B N, T); query (B N, T, H), key (B K, S, H), value (B K, S, V), extra (B K, S), ids (B, T) and (B, S)."""
    (groups, length, _), keys, width = query.shape, key.shape[1], value.shape[2]
    s = _setting(spec, offset, size, platform, length, keys, bool(ids))
    own = [(_cut(query, s.rows), 1)]
    seen = [(_cut(x, s.columns, fill), groups // key.shape[0]) for x, fill in ((key, 0), (value, 0), (extra, -jnp.inf))]
    if ids:
        each = groups // ids[0].shape[0]
        own, seen = [*own, (_cut(ids[0], s.rows), each)], [*seen, (_cut(ids[1], s.columns), each)]
    outputs = [(_power(width), value.dtype), (0, spec.dtype)]
    out, lse = _run(platform, bodies.FORWARD, s, own, seen, outputs, _bounds(s, extra, masked, ids, 2))
    return out[:, :length, :width], lse[:, :length]


def _backward(
    spec: Spec, offset: int, size: int | None, masked: bool, platform: str, query: jax.Array, key: jax.Array, value: jax.Array,
    extra: jax.Array, d_out: jax.Array, lse: jax.Array, delta: jax.Array, *ids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """dq (B N, T, H), dk (B N, S, H) and dv (B N, S, V), the latter two for every query head and for the caller to add up."""
    (groups, length, dim), keys, width = query.shape, key.shape[1], value.shape[2]
    s = _setting(spec, offset, size, platform, length, keys, bool(ids))
    shared = groups // key.shape[0]
    of_rows = [(_cut(x, s.rows), 1) for x in (query, d_out, lse, delta)]
    of_keys = [(_cut(x, s.columns, fill), shared) for x, fill in ((key, 0), (value, 0), (extra, -jnp.inf))]
    if ids:
        each = groups // ids[0].shape[0]
        of_rows, of_keys = [*of_rows, (_cut(ids[0], s.rows), each)], [*of_keys, (_cut(ids[1], s.columns), each)]
    widths = _power(dim), _power(width)
    dtype = query.dtype if shared == 1 else spec.dtype
    outputs = [(widths[0], query.dtype)], [(n, dtype) for n in widths]
    (dq,) = _run(platform, bodies.QUERY_GRADIENT, s, of_rows, of_keys, outputs[0], _bounds(s, extra, masked, ids, 2))
    dk, dv = _run(platform, bodies.KEY_GRADIENTS, s, of_keys, of_rows, outputs[1], _bounds(s, extra, masked, ids, 1))
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
        return by_platform(partial(_backward, spec, offset, size, marks.key_mask is not None), *arrays)

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
            return by_platform(partial(_forward, spec, offset, size, marks.key_mask is not None), *arrays)

        heads = arrays.query.shape[2]
        out, lse = (_ungrouped(x, heads) for x in folding(run)(*_prepared(arrays, marks)))
        return out.astype(arrays.value.dtype), lse

    def plain(arrays, marks):
        return by_rows(spec, arrays, marks)

    def backward(arrays, marks, results, cotangents):
        return _gradients(spec, offset, size, arrays, marks, results, cotangents)

    return with_backward(forward, plain, backward)(arrays, marks)
