"""S4: state-space models diagonal plus low rank, x' = (diag(Lambda) - sum_r P_r P_r^H) x + B u, y = 2 Re(C x) + D u, by the bilinear rule.

    recurrence     x_t = A_bar x_(t-1) + B_bar u_t                     O(P) a step: A_bar is diagonal plus low rank too
    convolution    y = K * u,   K_l = 2 Re(C A_bar^l B_bar)            O(L P) from Cauchy sums, O(L log L) to apply

State: P/2 complex numbers a feature, one of each conjugate pair. Source: Gu et al., arXiv:2111.00396; the linear step arXiv:2202.09729.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, choose, floating, is_whole
from effattn_jax._derivatives import tie
from effattn_jax.recurrence.fft import fft_convolution
from effattn_jax.ssm._calls import open_row, open_state, passing
from effattn_jax.ssm._cauchy import kernels, solve_small
from effattn_jax.ssm._fold import begins

__all__ = ["dplr_kernel", "dplr_ssm"]


class _System(NamedTuple):
    """Lambda, B, C (D, P), P (R, D, P) complex and step (D,) real, all of one precision."""

    Lambda: jax.Array
    P: jax.Array
    B: jax.Array
    C: jax.Array
    step: jax.Array


def _check(Lambda, P, B, C, step, *others) -> _System:
    arrays = {"Lambda": jnp.asarray(Lambda), "P": jnp.asarray(P), "B": jnp.asarray(B), "C": jnp.asarray(C)}
    if not jnp.iscomplexobj(arrays["Lambda"]):
        raise ValueError(
            f"Lambda must be complex, one of each conjugate pair; got {arrays['Lambda'].dtype} of shape {arrays['Lambda'].shape}"
        )
    shape = arrays["Lambda"].shape
    if len(shape) not in (1, 2) or shape[-1] == 0:
        raise ValueError(f"Lambda must have shape (P,) or (D, P); got {shape}")
    for name in "BC":
        if arrays[name].shape != shape:
            raise ValueError(f"{name} must have the shape of Lambda {shape}; got {arrays[name].shape}")
    P = arrays["P"]
    if P.shape not in (shape, (1, *shape), (2, *shape)):
        raise ValueError(
            f"P must have the shape of Lambda {shape}, or that behind an axis of rank 1 or 2; got {P.shape}"
        )
    (step,) = floating(step=step)
    if step.shape not in ((), shape[:-1]):
        raise ValueError(f"step must be a scalar or have shape (D,) = {shape[:-1]}; got {step.shape}")
    kind = jnp.result_type(jnp.complex64, *arrays.values(), step, *others)
    wide = (-1, shape[-1])
    system = [arrays[name].astype(kind).reshape(wide) for name in ("Lambda", "B", "C")]
    P = P.astype(kind).reshape(-1, *system[0].shape)
    step = jnp.broadcast_to(step, shape[:-1]).reshape(-1).astype(system[0].real.dtype)
    return _System(system[0], P, system[1], system[2], step)


@compiled
def dplr_kernel(Lambda: ArrayLike, P: ArrayLike, B: ArrayLike, C: ArrayLike, step: ArrayLike, length: int) -> jax.Array:
    """The convolution kernel K_l = 2 Re(C A_bar^l B_bar), l < length, of a diagonal plus low-rank system under the bilinear rule.

    Args:
      Lambda, B, C: (P,) or (D, P) complex, one of each conjugate pair; C as a row, unconjugated.
      P: of the same shape (rank 1), or (R, P) / (R, D, P) with R <= 2.
      step: the step dt > 0, scalar or (D,).
      length: L.

    Returns:
      (L,) or (D, L), real, in the precision of the arguments.

    Raises:
      ValueError: for real Lambda, shapes that do not fit, or a length that is not a positive int.

    The system must be stable, |A_bar^l| bounded. Any length costs O(L P) and is as exact: nothing is doubled, no power A_bar^L is taken; in float32 the error is below 1e-6
    of the largest entry of the kernel for LegS with P <= 256 and dt in [1e-4, 10]. Source: arXiv:2111.00396; `_cauchy.py` says what is done otherwise.

    >>> import jax
    >>> from effattn_jax.ssm import legs_dplr
    >>> Lambda, P, B, V = legs_dplr(4)
    >>> C = [1.0, 0.0, 0.0, 0.0] @ V                       # reads the first coefficient, the mean of LegS: x' = -x + u
    >>> kernel = jax.jit(dplr_kernel, static_argnames="length")
    >>> print([round(k, 4) for k in kernel(Lambda, P, B, C, 0.5, length=3).tolist()])
    [0.4, 0.24, 0.144]
    """
    if not is_whole(length, 1):
        raise ValueError(f"length must be a positive int; got {length!r}")
    system = _check(Lambda, P, B, C, step)
    drive = (system.step[:, None] * system.B)[:, None]
    out = kernels(system.Lambda, system.P, drive, system.C, system.step, length)
    return out.reshape(*jnp.shape(Lambda)[:-1], length)


def _step(system: _System) -> Any:
    """The map (x, u) -> A_bar x + B_bar u for x (B, D, P) and u (B, D).

    By Woodbury A_bar = diag(a) - U W: with E = (I - dt/2 Lambda)^-1, a = (I + dt/2 Lambda) E, W = P^H E, U = dt E P (I + dt/2 P^H E P)^-1.
    """
    Lambda, P, B, _, dt = system
    half = dt[:, None] / 2
    E = 1 / (1 - half * Lambda)
    a = (1 + half * Lambda) * E
    W, PE = P.conj() * E[None], P * E[None]  # (R, D, P)

    def pair(left, right):
        """Products over conjugate pairs, real (D, R, R')."""
        return 2 * jnp.einsum("rdn,qdn->drq", left, right, precision="highest").real

    inner = jnp.eye(P.shape[0], dtype=dt.dtype)[None] + half[..., None] * pair(W, P)
    U = solve_small(inner.swapaxes(1, 2), jnp.moveaxis(2 * half[None] * PE, 0, 1))  # (D, R, P): columns of U
    b = 2 * half * E * B - half * jnp.einsum("drn,dr->dn", U, pair(W, B[None])[..., 0].astype(U.dtype))

    def step(x, u):
        onto = [2 * jnp.sum((w[None] * x).real, axis=-1, keepdims=True) for w in W]
        x = a[None] * x + b[None] * u[..., None]
        for r, s in enumerate(onto):
            x = x - U[None, :, r] * s
        return x

    return step


def _recurrence(system: _System, u: jax.Array, x: jax.Array, begin: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, T, D) without D u, and the last state; chunks of sqrt(T) steps are computed again in the backward pass."""
    advance = _step(system)
    length = u.shape[1]
    size = max(1, int(length**0.5))
    count = -(-length // size)
    begin = jnp.zeros_like(u.sum(2), bool) if begin is None else begin

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, count * size - length)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a, 1, 0).reshape(count, size, a.shape[0], *a.shape[2:])

    def step(x, inputs):
        u, begin, real = inputs
        after = advance(jnp.where(begin[:, None, None], 0, x), u)
        x = jnp.where(real, after, x)
        return x, 2 * jnp.sum((system.C[None] * x).real, axis=-1)

    chunk = jax.checkpoint(lambda x, inputs: lax.scan(step, x, inputs))
    real = (jnp.arange(count * size) < length).reshape(count, size)
    x, y = lax.scan(chunk, x, (split(u), split(begin), real))
    return jnp.moveaxis(y.reshape(count * size, *y.shape[2:])[:length], 0, 1), x


def _convolution(system: _System, u: jax.Array, x: jax.Array | None) -> jax.Array:
    """Outputs (B, T, D) without D u; the initial state x enters as further inputs (I + dt/2 A) x, one a row of the batch."""
    length = u.shape[1]
    columns = (system.step[:, None] * system.B)[:, None]
    if x is not None:
        half = system.step[None, :, None] / 2
        onto = 2 * jnp.einsum("rdn,bdn->bdr", system.P.conj(), x, precision="highest").real.astype(x.dtype)
        Ax = system.Lambda[None] * x - jnp.einsum("rdn,bdr->bdn", system.P, onto, precision="highest")
        columns = jnp.concatenate([columns, jnp.moveaxis(x + half * Ax, 0, 1)], axis=1)
    K = kernels(system.Lambda, system.P, columns, system.C, system.step, length)
    y = fft_convolution(u, K[:, 0].T)
    return y if x is None else y + jnp.transpose(K[:, 1:], (1, 2, 0))


@compiled
def dplr_ssm(
    u: ArrayLike,
    Lambda: ArrayLike,
    P: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    step: ArrayLike,
    *,
    mode: str | None = None,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
) -> Any:
    """Runs a diagonal plus low-rank system a feature: x' = (diag(Lambda) - sum_r P_r P_r^H) x + B u, y = 2 Re(C x) + D u, bilinear.

    Args:
      u: (*B, T, D).
      Lambda, B, C: (D, P) complex, one of each conjugate pair.
      P: (D, P), or (R, D, P) with R <= 2.
      D: (D,) or None.
      step: dt > 0, scalar or (D,).
      mode: "recurrence" (step by step, O(P) a step) or "convolution" (kernel and FFT: parallel in time, and not causal to the bit, so a later NaN spoils
        all); None is "recurrence".
      initial_state: (*B, D, P) complex, the state before the first step (after the last one when `reverse`); zeros when None.
      return_state: also return the state after the last step (before the first one when `reverse`).
      segment_ids: (*B, T) integers; the state restarts wherever the id changes. The initial state belongs to the first segment. Not for convolutions.
      reverse: run from the last step to the first.

    Returns:
      y (*B, T, D) in the dtype of u, or (y, state), the state complex64 at least. "convolution" makes a returned state by the recurrence.

    Raises:
      ValueError: for shapes that do not fit, an unknown mode, or segments in a convolution.

    Cost O(T P D) in both modes (convolution: O(L P) for the kernel, O(T log T) a row), state P a feature. Source: Gu et al., arXiv:2111.00396.

    >>> import numpy as np
    >>> from effattn_jax.ssm import legs_dplr
    >>> Lambda, P, B, V = (x[None] for x in legs_dplr(4))
    >>> C = [1.0, 0.0, 0.0, 0.0] @ V
    >>> y, state = dplr_ssm(np.ones((1, 3, 1)), Lambda, P, B, C, None, 0.5, mode="recurrence", return_state=True)
    >>> print([round(x, 4) for x in y[0, :, 0].tolist()], state.shape)
    [0.4, 0.64, 0.784] (1, 1, 2)
    """
    choose("mode", mode, (None, "convolution", "recurrence"))
    mode = mode or "recurrence"
    if jnp.ndim(Lambda) != 2:
        raise ValueError(f"Lambda must have shape (D, P); got {jnp.shape(Lambda)}")
    width, size = jnp.shape(Lambda)
    system = _check(Lambda, P, B, C, step, jnp.asarray(u))
    row = open_row({"u": (u, (width,))}, segment_ids, reverse, wide=(system.B,))
    rows = row.arrays["u"]
    if mode == "convolution" and segment_ids is not None:
        raise ValueError("segment_ids need mode='recurrence': one kernel cannot restart; got mode='convolution'")
    x = open_state(initial_state, row, (width, size), rows.sum(1)[..., None] * system.B[None])
    passed = passing(D, rows)
    x, rows, system = tie((x, rows, system))
    if rows.shape[1] == 0:
        y, state = rows, x
    elif mode == "recurrence":
        y, state = _recurrence(system, rows, x, begins(row.segments))
    else:
        y = _convolution(system, rows, None if initial_state is None else x)
        state = _recurrence(system, rows, x, None)[1] if return_state else x
    return row.finish(passed(y), state, return_state)
