"""A diagonal system with one step for all of time, as products of matrices.

    chunked        y = M u + W x,  x' = a^C x + V u     for each chunk of C steps: M the Toeplitz matrix of the kernel, x the state at its start
    convolution    y = K * u + sum_n C_n a_n^{t+1} x_n

Real matrices throughout: the real and imaginary parts of the states stand side by side.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._derivatives import Fixed, tie
from effattn_jax.recurrence import diagonal_recurrence
from effattn_jax.ssm._fold import fold
from effattn_jax.ssm._poles import long_table, powers

__all__: list[str] = []

_GROUP = 16  # chunks side by side; groups follow one another
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _parts(x: jax.Array, axis: int, sign: int = 1) -> jax.Array:
    """Real and imaginary part (times sign) side by side on an axis; a real array as it is."""
    return jnp.concatenate([x.real, sign * x.imag], axis=axis) if jnp.iscomplexobj(x) else x


def _factor(poles: jax.Array) -> int:
    return 2 if jnp.iscomplexobj(poles) else 1


def kernel(weights: jax.Array, step: jax.Array, poles: jax.Array, method: str, length: int) -> jax.Array:
    """2 Re sum_n weights_n a_n^l for l < length, (..., D, length); weights (..., D, P), step (D,), poles (D, P)."""
    far, near = long_table(length)
    high = powers(step[:, None], poles, method, far, near)
    left = weights[..., None] * high.reshape((1,) * (weights.ndim - 2) + high.shape)
    right = powers(step[:, None], poles, method, near)
    table = _einsum("...dpi,dpj->...dij", _parts(left, -2, -1), _parts(right, -2))
    return _factor(poles) * table.reshape(*table.shape[:-2], far * near)[..., :length]


def _toeplitz(rows: jax.Array) -> jax.Array:
    """(D, C) -> (D, j, i) with row i - j where i >= j, else 0: a tiled row, read at one step less than its period."""
    width, size = rows.shape
    row = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1)
    tiled = jnp.broadcast_to(row[:, None], (width, size, 2 * size)).reshape(width, 2 * size * size)
    return tiled[:, : size * (2 * size - 1)].reshape(width, size, 2 * size - 1)[:, :, :size]


def _tables(system: tuple, method: str, size: int) -> tuple:
    """(M, V, W, a^C) of chunks of `size` steps: (D, C, C), (D, C, Q), (D, Q, C), (D, P), Q the real numbers of a state."""
    poles, enter, C, step = system
    power = _consecutive(step, poles, method, size + 1)
    both, left = (_pair(x[..., None]) for x in (enter * C, C))
    inside = _factor(poles) * _einsum("dqc,dq->dc", jnp.concatenate(power, 1)[..., :-1], _side_by_side(both)[..., 0])
    backwards = [jnp.flip(x[..., :-1], -1) for x in power]
    to_end = jnp.swapaxes(jnp.concatenate(_times(_pair(enter[..., None]), backwards), 1), 1, 2)
    from_start = _factor(poles) * _side_by_side(_times(left, [x[..., 1:] for x in power]))
    last = [x[..., -1] for x in power]
    return _toeplitz(inside), to_end, from_start, lax.complex(*last) if len(last) == 2 else last[0]


def _consecutive(step: jax.Array, poles: jax.Array, method: str, count: int) -> list[jax.Array]:
    """The real numbers of a^l for l < count, (D, P, count), as products of two short tables.

    A loop over the lags of one of them: without it XLA computes the exponentials again wherever a product is read.
    """
    far, near = long_table(count)
    high, low = (_pair(powers(step[:, None], poles, method, *size)) for size in ((far, near), (near,)))
    high = [jnp.moveaxis(x, -1, 0)[..., None] for x in high]
    table = lax.map(lambda x: _times(x, low), high)
    return [jnp.moveaxis(x, 0, 2).reshape(*poles.shape, far * near)[..., :count] for x in table]


def _pair(x: jax.Array) -> list[jax.Array]:
    """The real numbers of x: real and imaginary part, or x alone."""
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _times(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    """The product of two such pairs, or of two single arrays. XLA's complex product on a CPU is several times slower."""
    if len(b) == 1:
        return [a[0] * b[0]]
    imag = a[1] if len(a) == 2 else jnp.zeros_like(a[0])
    return [a[0] * b[0] - imag * b[1], a[0] * b[1] + imag * b[0]]


def _side_by_side(a: list[jax.Array]) -> jax.Array:
    """(D, Q, C) whose sum with the numbers of a state side by side is the real part of a product."""
    return jnp.concatenate([a[0], -a[1]], axis=1) if len(a) == 2 else a[0]


def _group(size: int, state: jax.Array, inputs: tuple, aux: Any, tables: tuple) -> tuple[jax.Array, jax.Array]:
    """Some chunks side by side: what each adds to the state, a scan over these, then all outputs."""
    del aux
    (u,), (inside, to_end, from_start, kept) = inputs, tables
    batch, length, width = u.shape
    count = length // size
    rows = jnp.moveaxis(u.reshape(batch, count, size, width), 3, 0)  # (D, B, count, C)
    added = jnp.moveaxis(_einsum("dbnj,djq->dbnq", rows, to_end), 0, 2)
    if jnp.iscomplexobj(state):
        added = lax.complex(*jnp.split(added, 2, axis=-1))
    ends, last = diagonal_recurrence(kept[None, None], added, initial_state=state, return_state=True)
    starts = jnp.moveaxis(_parts(jnp.concatenate([state[:, None], ends[:, :-1]], axis=1), -1), 2, 0)
    out = _einsum("dbnj,dji->dbni", rows, inside) + _einsum("dbnq,dqi->dbni", starts, from_start)
    return last, jnp.moveaxis(out, 0, 3).reshape(batch, length, width)


def _finite(u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u with what is no number set to 0, which a product of matrices would spread over the past, and where such begins, (B, D)."""
    bad = ~jnp.isfinite(u)
    time = lax.broadcasted_iota(jnp.int32, u.shape, 1)
    return jnp.where(bad, 0, u), jnp.min(jnp.where(bad, time, u.shape[1]), axis=1)


def in_chunks(u: jax.Array, state: jax.Array, system: tuple, method: str, size: int) -> tuple[jax.Array, jax.Array]:
    """(y, last state) of u (B, T, D), T >= 1, from `state` (B, D, P); system is (poles, gain * B, C, step)."""
    u, state, system = tie((u, state, system))
    length, size = u.shape[1], min(size, u.shape[1])
    clean, first_bad = _finite(u)
    whole, outs = length - length % size, []
    tables = _tables(system, method, size)
    state, out = fold(Fixed(_group, size), state, (clean[:, :whole],), None, tables, _GROUP * size)
    outs.append(out)
    if whole < length:
        rest = length - whole
        inside, to_end, from_start, _ = tables
        kept = powers(system[3][:, None], system[0], method, rest + 1)[..., -1]
        short = (inside[:, :rest, :rest], to_end[:, size - rest :], from_start[:, :, :rest], kept)
        state, out = _group(rest, state, (clean[:, whole:],), None, short)
        outs.append(out)
    out = jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]
    time = lax.broadcasted_iota(jnp.int32, u.shape, 1)
    out = jnp.where(time >= first_bad[:, None], jnp.nan, out)
    return out, jnp.where((first_bad < length)[..., None], jnp.nan, state)


def convolved(u: jax.Array, state: jax.Array, system: tuple, method: str, _: int) -> tuple[jax.Array, jax.Array]:
    """The same by FFT."""
    from effattn_jax.recurrence import fft_convolution

    poles, enter, C, step = system
    length = u.shape[1]
    out = fft_convolution(u, kernel(enter * C, step, poles, method, length).T)
    far, near = long_table(length + 1)
    low, high = powers(step[:, None], poles, method, near), powers(step[:, None], poles, method, far, near)
    once = powers(step[:, None], poles, method, 2)[..., 1]
    out = out + jnp.moveaxis(kernel((C * once)[None] * state, step, poles, method, length), 1, 2)
    # x_T = a^T x_0 + sum_l a^l enter u_{T-1-l}, lags l split in two
    late = jnp.pad(jnp.flip(u, 1), [(0, 0), (0, far * near - length), (0, 0)]).reshape(
        u.shape[0], far, near, u.shape[2]
    )
    by_near = _einsum("bijd,djq->bidq", late, jnp.swapaxes(_parts(low, 1), 1, 2))
    if jnp.iscomplexobj(poles):
        by_near = lax.complex(*jnp.split(by_near, 2, axis=-1))
    added = jnp.sum(by_near * jnp.moveaxis(high, 2, 0)[None], axis=1) * enter[None]
    whole, rest = divmod(length, near)
    return out, (high[..., whole] * low[..., rest])[None] * state + added
