"""LegS without approximation: the Legendre projection of the held signal, at every sample or at the end.

    x_n(t) = sqrt(2n + 1) / t int_0^t P_n(2 s / t - 1) u(s) ds

The past enters in two ways. A held sample is a cell, whose mean of P_n comes from a recurrence in n for divided differences. A state x(t0) stands for a polynomial of degree
< P on [0, t0], and P weighted points at Gauss's nodes have the same integrals against all P_n: (t / t0)^A without a power, an exponential or a solve.
So have 4 P samples of a long signal: a product with one matrix turns each such chunk into P points.

Near the newest sample P_n' = n (n + 1) / 2, so a position in float32 would cost n^2 roundings. Positions are therefore distances y from the nearer end, x = +-(1 - y), with
    d_(n+1) = (n d_n - (2n + 1) y P_n) / (n + 1),                    P_(n+1) = P_n + d_(n+1)                     (Reinsch's form)
    e_(n+1) = (n e_n - (2n + 1) (y_b E_n + P_n(y_a))) / (n + 1),      E_(n+1) = E_n + e_(n+1)                     E = (P(y_b) - P(y_a)) / (y_b - y_a)
    mean of P_n over [y_a, y_b] = -(e_(n+1) + e_n) / (2n + 1).
"""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax.ssm import _bases as bases

__all__: list[str] = []


class Points(NamedTuple):
    """Weighted points seen from J times: distances y (J, K) to the nearer end, whether that is the older one, amounts (J, K), values (K, R)."""

    y: jax.Array
    is_old: jax.Array
    amount: jax.Array
    values: jax.Array


class Cells(NamedTuple):
    """Held samples seen from J times: the nearer and farther edge y_a, y_b (J, K), then as for points; the amounts are widths."""

    y_a: jax.Array
    y_b: jax.Array
    is_old: jax.Array
    amount: jax.Array
    values: jax.Array


def points(newer: jax.Array, older: jax.Array, amount: jax.Array, values: jax.Array) -> Points:
    """From the shares 1 - s and s of the history that are newer and older than each point."""
    return Points(2 * jnp.minimum(newer, older), older < newer, jnp.broadcast_to(amount, newer.shape), values)


def cells(newer: jax.Array, older: jax.Array, width: jax.Array, values: jax.Array) -> Cells:
    """From the shares newer than the cell, older than the cell, and the cell's own."""
    is_old = older < newer
    near = 2 * jnp.where(is_old, older, newer)
    return Cells(near, near + 2 * width, is_old, width, values)


def project(size: int, parts: tuple[Points | Cells, ...]) -> jax.Array:
    """(J, R, P): the sum over all parts of amount * P_n * values, in orthonormal coordinates."""

    def start(part):
        y = part[0]
        one, zero = jnp.ones_like(y), jnp.zeros_like(y)
        return (one, zero) if isinstance(part, Points) else (one, zero, zero, zero)

    def advance(part, carry, n):
        """(what the part counts for at degree n, the carry of degree n + 1)."""
        p, d, *differences = carry
        next_d = (n * d - (2 * n + 1) * part[0] * p) / (n + 1)
        if not differences:
            return p, (p + next_d, next_d)
        E, e = differences
        next_e = (n * e - (2 * n + 1) * (part.y_b * E + p)) / (n + 1)
        return -(next_e + e) / (2 * n + 1), (p + next_d, next_d, E + next_e, next_e)

    def degree(carries, x):
        n, sign = x
        total, following = 0, []
        for part, carry in zip(parts, carries, strict=True):
            kernel, carry = advance(part, carry, n)
            kernel = jnp.where(part.is_old, sign * kernel, kernel) * part.amount
            total = total + jnp.matmul(kernel, part.values, precision="highest")
            following.append(carry)
        return tuple(following), total * jnp.sqrt(2 * n + 1)

    n = jnp.arange(size, dtype=parts[0][0].dtype)
    sign = jnp.asarray(1 - 2 * (np.arange(size) % 2), n.dtype)
    out = lax.scan(degree, tuple(start(part) for part in parts), (n, sign))[1]
    return jnp.moveaxis(out, 0, -1)


@lru_cache(maxsize=32)
def _nodes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(Gauss's nodes on [0, 1], the matrix (P, P) that turns a state into the weights of points there)."""
    x, w = np.polynomial.legendre.leggauss(size)
    x = (1 + x) / 2
    return x, (bases.legendre(x, size) * (w / 2)[:, None]).T


@lru_cache(maxsize=32)
def _compression(size: int, count: int) -> np.ndarray:
    """(count, P): a chunk of held samples as P points at Gauss's nodes, widths in samples."""
    edges = np.linspace(0, 1, count + 1)
    more = bases.legendre(edges, size + 1) / np.sqrt(2 * np.arange(size + 1)[None, :] + 1)
    integrals = np.concatenate(
        [edges[:, None], (more[:, 2:] - more[:, :-2]) / (4 * np.arange(1, size)[None, :] + 2)], 1
    )
    moments = np.diff(integrals, axis=0) * np.sqrt(2 * np.arange(size)[None, :] + 1)
    return count * moments @ _nodes(size)[1]


def _safe(t: jax.Array) -> jax.Array:
    return jnp.where(t > 0, t, 1)


def _weigh(x: jax.Array) -> jax.Array:
    """States (..., R, P) as weights (..., P, R) of points at Gauss's nodes."""
    return jnp.matmul(x, _nodes(x.shape[-1])[1].astype(x.dtype), precision="highest").swapaxes(-1, -2)


def _of_state(x: jax.Array, start: jax.Array, later: jax.Array) -> Points:
    """The history [0, start] that x (R, P) stands for, seen from the times start + later (J,)."""
    nodes = _nodes(x.shape[-1])[0]
    total = _safe(start + later)[:, None]
    newer = (later[:, None] + start * (1 - nodes).astype(x.dtype)[None, :]) / total
    older = start * nodes.astype(x.dtype)[None, :] / total
    return points(newer, older, start / total, _weigh(x))


def _inside(x: jax.Array, start: jax.Array, edges: jax.Array, u: jax.Array) -> jax.Array:
    """States (C, R, P) after each of the samples u (C, R) on the edges (C + 1,) counted from `start`, where the state was x (R, P)."""
    later = edges[1:]
    total = _safe(start + later)[:, None]
    newest, oldest = jnp.minimum(edges[None, 1:], later[:, None]), jnp.minimum(edges[None, :-1], later[:, None])
    samples = cells((later[:, None] - newest) / total, (start + oldest) / total, (newest - oldest) / total, u)
    return project(x.shape[-1], (_of_state(x, start, later), samples))


class Grid(NamedTuple):
    """Cells and chunks of them, in the dtype of states: made of float64 edges where those are known, and no argument is a difference of large numbers.

    before, width, since: (T,) time from the first edge to the cell, its width, time from the cell to the last edge.
    windows: (count, C + 1) edges of each chunk from its first; begin, length: (count,) of the chunks; gap: (count, count) time from the end of chunk j to the beginning of chunk i.
    """

    before: Any
    width: Any
    since: Any
    windows: Any
    begin: Any
    length: Any
    gap: Any


def grid(edges: Any, size: int, dtype: Any) -> Grid:
    """The grid of edges (T + 1,) that begin at 0; the last chunk is filled up with cells of no width."""
    length = edges.shape[0] - 1
    chunk = min(length, max(16, min(size, 128), int(length**0.6) // 2))
    count = -(-length // chunk)
    xp = jnp if isinstance(edges, jax.Array) else np
    full = xp.concatenate([edges, xp.broadcast_to(edges[-1:], (count * chunk - length,))])
    bounds = full[::chunk]
    windows = xp.concatenate([full[:-1].reshape(count, chunk), bounds[1:, None]], axis=1) - bounds[:-1, None]
    gap = xp.maximum(bounds[:-1, None] - bounds[None, 1:], 0)
    parts = (edges[:-1], edges[1:] - edges[:-1], edges[-1:] - edges[1:], windows, bounds[:-1], xp.diff(bounds), gap)
    return Grid(*(a.astype(dtype) for a in parts))


def _chunk_starts(x: jax.Array, start: jax.Array, cut: Grid, blocks: jax.Array) -> jax.Array:
    """States (count, R, P) at the beginning of every chunk from the points (count, P, R) of all chunks before it, so that no rounding is handed on."""
    size, count = x.shape[-1], blocks.shape[0]
    nodes = _nodes(size)[0]
    ahead, behind = nodes.astype(x.dtype)[None], (1 - nodes).astype(x.dtype)[None]
    values = blocks.reshape(count * size, -1)
    older = (start + cut.begin[:, None] + cut.length[:, None] * ahead).reshape(1, -1)

    def of_chunk(inputs):
        index, begin, gap = inputs
        total = _safe(start + begin).reshape(1, 1)
        newer = (gap[:, None] + cut.length[:, None] * behind).reshape(1, -1)
        is_past = jnp.repeat(jnp.arange(count) < index, size)[None]
        past = points(newer / total, older / total, jnp.where(is_past, 1 / total, 0), values)
        past = past._replace(y=jnp.where(is_past, past.y, 0))
        return project(size, (past, _of_state(x, start, begin[None])))[0]

    return lax.map(of_chunk, (jnp.arange(count), cut.begin, cut.gap))


def _points_of_chunk(edges: jax.Array, u: jax.Array, size: int) -> jax.Array:
    """A chunk of held samples u (C, R) as P points (P, R)."""
    total = _safe(edges[-1:])[:, None]
    inside = cells((edges[-1] - edges[None, 1:]) / total, edges[None, :-1] / total, jnp.diff(edges)[None] / total, u)
    return edges[-1] * _weigh(project(size, (inside,))[0])


def every(x: jax.Array, start: jax.Array, cut: Grid, u: jax.Array, is_regular: bool) -> jax.Array:
    """States (T, R, P) after every sample u (T, R) of a grid that begins at the time `start`, where the state was x (R, P)."""
    size, length = x.shape[-1], u.shape[0]
    count, chunk = cut.windows.shape[0], cut.windows.shape[1] - 1
    u = jnp.pad(u, ((0, count * chunk - length), (0, 0))).reshape(count, chunk, -1)
    if count == 1:
        starts = x[None]
    elif is_regular:
        K = _compression(size, chunk).astype(x.dtype)
        starts = _chunk_starts(x, start, cut, jnp.einsum("wcr,cq->wqr", u, K, precision="highest"))
    else:
        blocks = lax.map(lambda a: _points_of_chunk(*a, size), (cut.windows, u))
        starts = _chunk_starts(x, start, cut, blocks)
    run = jax.checkpoint(lambda a: _inside(*a))
    states = lax.map(run, (starts, start + cut.begin, cut.windows, u))
    return states.reshape(count * chunk, *x.shape)[:length]


def last(x: jax.Array, start: jax.Array, cut: Grid, u: jax.Array) -> jax.Array:
    """The state (R, P) after samples u (T, R) of a grid that begins at the time `start`, where the state was x (R, P)."""
    later = cut.since[:1] + cut.width[:1] + cut.before[:1]
    total = _safe(start + later)[:, None]
    samples = cells(cut.since[None] / total, (start + cut.before[None]) / total, cut.width[None] / total, u)
    return project(x.shape[-1], (_of_state(x, start, later), samples))[0]


def last_regular(x: jax.Array, start: jax.Array, u: jax.Array) -> jax.Array:
    """The state (R, P) after samples u (T, R) of width 1: chunks of 4 P samples become P points each, the rest are cells."""
    size, length, dtype = x.shape[-1], u.shape[0], x.dtype
    chunk = 4 * size
    whole = length // chunk
    steps = np.arange(length - whole * chunk + 1)
    total = (start + length).reshape(1, 1)
    tail = cells(
        ((steps[-1] - steps[None, 1:]).astype(dtype)) / total,
        (start + (whole * chunk + steps[None, :-1]).astype(dtype)) / total,
        jnp.ones((1, len(steps) - 1), dtype) / total,
        u[whole * chunk :],
    )
    parts = [_of_state(x, start, jnp.full((1,), length, dtype)), tail]
    if whole:
        K = _compression(size, chunk).astype(dtype)
        rows = u[: whole * chunk].reshape(whole, chunk, -1)
        values = jnp.einsum("wcr,cq->wqr", rows, K, precision="highest").reshape(whole * size, -1)
        before = (chunk * (np.arange(whole)[:, None] + _nodes(size)[0])).ravel()[None]
        since = (length - before).astype(dtype)
        parts.append(points(since / total, (start + before.astype(dtype)) / total, 1 / total, values))
    return project(size, tuple(parts))[0]
