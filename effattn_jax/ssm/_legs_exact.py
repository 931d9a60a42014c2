"""LegS without approximation: the Legendre projection of the held signal, at every sample or at the end.

    x_n(t) = sqrt(2n + 1) / t int_0^t P_n(2 s / t - 1) u(s) ds

The past enters in two ways. A held sample is a cell, whose mean of P_n comes from a recurrence in n for divided differences. A state x(t0) stands for a polynomial of degree
< P on [0, t0], and P weighted points at Gauss's nodes have the same integrals against all P_n: (t / t0)^A without a power, an exponential or a solve.
So have 4 P samples of a long signal: a product with one matrix turns each such chunk into P points.

Near the newest sample P_n' = n (n + 1) / 2, so a position in float32 would cost n^2 roundings. Positions are therefore distances y from the nearer end, in two floats, x = +-(1 - y), with
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
from effattn_jax.ssm._pairs import Pair, add_product, share, two_sum

__all__: list[str] = []


class Points(NamedTuple):
    """Weighted points seen from J times: distances y (J, K) to the nearer end in two floats, whether that is the older end, amounts (J, K), values (K, R) or (G, K / G, R)."""

    y: Pair
    is_old: jax.Array
    amount: jax.Array
    values: jax.Array


class Cells(NamedTuple):
    """Held samples seen from J times: the nearer edge y and the farther one y_b, then as for points; the amounts are widths."""

    y: Pair
    y_b: Pair
    is_old: jax.Array
    amount: jax.Array
    values: jax.Array


def points(newer: Pair, older: Pair, total: jax.Array, amount: jax.Array, values: jax.Array) -> Points:
    """From the time after and before each point, (J, K) in two floats, and all of the time (J, 1)."""
    is_old = older[0] < newer[0]
    near = tuple(jnp.where(is_old, a, b) for a, b in zip(older, newer))
    return Points(share(near, total / 2), is_old, jnp.broadcast_to(amount, is_old.shape), values)


def cells(newer: jax.Array, older: jax.Array, width: jax.Array, total: jax.Array, values: jax.Array) -> Cells:
    """From the time after and before each cell and its width, (J, K), and all of the time (J, 1)."""
    is_old = older < newer
    near = jnp.where(is_old, older, newer)
    y, y_b = share((near, jnp.zeros_like(near)), total / 2), share(two_sum(near, width), total / 2)
    return Cells(y, y_b, is_old, width / total, values)


def _weighted(kernel: jax.Array, values: jax.Array) -> jax.Array:
    """kernel (J, K) @ values (K, R); values (G, K / G, R) are summed group by group first, so that a long sum keeps its digits."""
    if values.ndim == 2:
        return jnp.matmul(kernel, values, precision="highest")
    groups = jnp.einsum("jgk,gkr->gjr", kernel.reshape(-1, *values.shape[:2]), values, precision="highest")
    return jnp.sum(groups, axis=0)


def project(size: int, parts: tuple[Points | Cells, ...]) -> jax.Array:
    """(J, R, P): the sum over all parts of amount * P_n * values, in orthonormal coordinates."""

    def start(part):
        y = part.y[0]
        one, zero = jnp.ones_like(y), jnp.zeros_like(y)
        return (one, zero) if isinstance(part, Points) else (one, zero, zero, zero)

    def advance(part, carry, n):
        """(what the part counts for at degree n, the carry of degree n + 1)."""
        p, d, *differences = carry
        next_d = (n * d - (2 * n + 1) * (part.y[0] * p + part.y[1] * p)) / (n + 1)
        if not differences:
            return p, (p + next_d, next_d)
        E, e = differences
        next_e = (n * e - (2 * n + 1) * (part.y_b[0] * E + (part.y_b[1] * E + p))) / (n + 1)
        return -(next_e + e) / (2 * n + 1), (p + next_d, next_d, E + next_e, next_e)

    def degree(carries, x):
        n, sign = x
        total, following = 0, []
        for part, carry in zip(parts, carries, strict=True):
            kernel, carry = advance(part, carry, n)
            kernel = jnp.where(part.is_old, sign * kernel, kernel) * part.amount
            total = total + _weighted(kernel, part.values)
            following.append(carry)
        return tuple(following), total * jnp.sqrt(2 * n + 1)

    n = jnp.arange(size, dtype=parts[0].amount.dtype)
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


def _split(x: np.ndarray, dtype: Any) -> Pair:
    """float64 constants in two floats, (1, K)."""
    high = x.astype(dtype)
    return high[None], (x - high).astype(dtype)[None]


def _of_state(x: jax.Array, start: jax.Array, later: jax.Array) -> Points:
    """The history [0, start] that x (R, P) stands for, seen from the times start + later (J,)."""
    nodes = _nodes(x.shape[-1])[0]
    total = _safe(start + later)[:, None]
    start = jnp.broadcast_to(start, total.shape)
    newer = add_product(later[:, None], start, _split(1 - nodes, x.dtype))
    older = add_product(jnp.zeros_like(start), start, _split(nodes, x.dtype))
    return points(newer, older, total, start / total, _weigh(x))


def _inside(x: jax.Array, start: jax.Array, edges: jax.Array, u: jax.Array) -> jax.Array:
    """States (C, R, P) after each of the samples u (C, R) on the edges (C + 1,) counted from `start`, where the state was x (R, P)."""
    later = edges[1:]
    newest, oldest = jnp.minimum(edges[None, 1:], later[:, None]), jnp.minimum(edges[None, :-1], later[:, None])
    total = _safe(start + later)[:, None]
    samples = cells(later[:, None] - newest, start + oldest, newest - oldest, total, u)
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
    chunk = min(
        length, max(16, round((length * size) ** (1 / 3)))
    )  # as many operations inside chunks as for their starts
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
    ahead, behind = (_split(n, x.dtype) for n in (_nodes(size)[0], 1 - _nodes(size)[0]))

    def flat(pair):
        return tuple(a.reshape(1, -1) for a in pair)

    older = flat(add_product(start + cut.begin[:, None], cut.length[:, None], ahead))

    def of_chunk(inputs):
        index, begin, gap = inputs
        total = _safe(start + begin).reshape(1, 1)
        newer = flat(add_product(gap[:, None], cut.length[:, None], behind))
        is_past = jnp.repeat(jnp.arange(count) < index, size)[None]
        past = points(newer, older, total, jnp.where(is_past, 1 / total, 0), blocks)
        past = past._replace(y=tuple(jnp.where(is_past, y, 0) for y in past.y))
        return project(size, (past, _of_state(x, start, begin[None])))[0]

    return lax.map(of_chunk, (jnp.arange(count), cut.begin, cut.gap))


def _points_of_chunk(edges: jax.Array, u: jax.Array, size: int) -> jax.Array:
    """A chunk of held samples u (C, R) as P points (P, R)."""
    total = _safe(edges[-1:])[:, None]
    inside = cells(edges[-1] - edges[None, 1:], edges[None, :-1], jnp.diff(edges)[None], total, u)
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
    samples = cells(cut.since[None], start + cut.before[None], cut.width[None], total, u)
    return project(x.shape[-1], (_of_state(x, start, later), samples))[0]


def last_regular(x: jax.Array, start: jax.Array, u: jax.Array) -> jax.Array:
    """The state (R, P) after samples u (T, R) of width 1: chunks of 4 P samples become P points each, the rest are cells."""
    size, length, dtype = x.shape[-1], u.shape[0], x.dtype
    chunk = 4 * size
    whole = length // chunk
    steps = np.arange(length - whole * chunk + 1)
    total = (start + length).reshape(1, 1)
    tail = cells(
        jnp.asarray((steps[-1] - steps[None, 1:]).astype(dtype)),
        start + (whole * chunk + steps[None, :-1]).astype(dtype),
        jnp.ones((1, len(steps) - 1), dtype),
        total,
        u[whole * chunk :],
    )
    parts = [_of_state(x, start, jnp.full((1,), length, dtype)), tail]
    if whole:
        K = _compression(size, chunk).astype(dtype)
        rows = u[: whole * chunk].reshape(whole, chunk, -1)
        values = jnp.einsum("wcr,cq->wqr", rows, K, precision="highest")
        before = (chunk * (np.arange(whole)[:, None] + _nodes(size)[0])).ravel()
        since, before = (tuple(map(jnp.asarray, _split(a, dtype))) for a in (length - before, before))
        high, low = two_sum(jnp.broadcast_to(start, before[0].shape), before[0])
        parts.append(points(since, (high, low + before[1]), total, 1 / total, values))
    return project(size, tuple(parts))[0]
