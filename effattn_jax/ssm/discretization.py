"""From x' = A x + B u to x_t = A_bar x_(t-1) + B_bar u_t.

    generalized bilinear     A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A)      B_bar = (I - alpha dt A)^-1 dt B
    zero-order hold          A_bar = exp(dt A)                                       B_bar = A^-1 (exp(dt A) - I) B

forward, backward and bilinear are alpha = 0, 1 and 1/2. Alpha weighs the new state, as in scipy.signal and the HiPPO and S4 codes; kexue.fm/archives/10137 weighs the old one.
"""

from math import ceil, log2
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import ArrayLike, choose
from effattn_jax.ssm._calls import number
from effattn_jax.ssm._poles import phi

__all__ = ["discretize"]

METHODS = {
    "forward": 0.0,
    "backward": 1.0,
    "bilinear": 0.5,
    "generalized": None,
    "zoh": None,
}  # the weight of the new state


def alpha_of(method: str, alpha: float, name: str = "alpha") -> float | None:
    """The weight of the new state in a method, None for the zero-order hold; `name` is what the caller calls it."""
    choose("method", method, METHODS)
    if method != "generalized":
        return METHODS[method]
    if not 0 <= number(alpha) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], 1 weighing the new state alone; got {alpha!r}")
    return number(alpha)


def _expm(matrix: np.ndarray) -> np.ndarray:
    """exp of a float64 matrix: Taylor's series of a 2^-k part of it, squared k times."""
    norm = np.linalg.norm(matrix, 1)
    squarings = max(0, ceil(log2(norm / 0.5))) if norm > 0 else 0
    scaled = matrix / 2.0**squarings
    total = term = np.eye(len(matrix), dtype=matrix.dtype)
    for n in range(1, 17):
        term = term @ scaled / n
        total = total + term
    for _ in range(squarings):
        total = total @ total
    return total


def dense(xp: Any, A: Any, B: Any, step: Any, alpha: float | None) -> tuple[Any, Any]:
    """(A_bar, B_bar) of a dense system in the module xp; alpha None is the zero-order hold."""
    size = A.shape[-1]
    if alpha is None:
        # exp of [[A, B], [0, 0]] has B_bar in its last column, whether A is singular or not.
        rows = xp.concatenate([A * step, (B * step)[:, None]], axis=1)
        whole = xp.concatenate([rows, xp.zeros((1, size + 1), rows.dtype)], axis=0)
        power = _expm(whole) if xp is np else jax.scipy.linalg.expm(whole)
        return power[:size, :size], power[:size, size]
    eye = xp.eye(size, dtype=A.dtype)
    right = xp.concatenate([eye + (1 - alpha) * step * A, (step * B)[:, None]], axis=1)
    both = xp.linalg.solve(eye - alpha * step * A, right)
    return both[:, :size], both[:, size]


def _diagonal(xp: Any, A: Any, B: Any, step: Any, alpha: float | None) -> tuple[Any, Any]:
    z = step * A
    if alpha is None:
        return xp.exp(z), phi(z, xp) * step * B
    inverse = 1 / (1 - alpha * z)
    return inverse * (1 + (1 - alpha) * z), inverse * step * B


def discretize(
    A: ArrayLike, B: ArrayLike, step: ArrayLike, method: str = "bilinear", alpha: float = 0.5
) -> tuple[Any, Any]:
    """Discretises x' = A x + B u with inputs held for a step.

    Args:
      A: (P, P) dense, with B (P,); or diagonal, (..., P) with B of the same shape. Real or complex.
      B: as said.
      step: dt, a scalar; for a diagonal A also of the shape (...), or any that broadcasts with it.
      method: "forward" (Euler), "backward", "bilinear" (Tustin), "generalized" (with alpha) or "zoh" (exact for held inputs).
      alpha: the weight of the new (implicit) state in "generalized": 0 is forward, 1 backward, 1/2 bilinear.

    Returns:
      (A_bar, B_bar) in the shapes of A and B, broadcast with steps: float64 NumPy if A, B and step are NumPy arrays or numbers, JAX arrays otherwise.

    Raises:
      ValueError: for an unknown method, alpha outside [0, 1], or shapes that do not fit.

    Diagonal hold: B_bar = dt expm1(dt A) / (dt A) B, without cancellation in value or slope, dt B where A is 0. Cost O(P^3) dense, O(P) diagonal. A diagonal plus low-rank system is discretised in
    :func:`dplr_ssm`, at O(P).

    >>> A_bar, B_bar = discretize(-1.0, 1.0, 0.5, "zoh")
    >>> print(A_bar.round(4), B_bar.round(4))
    0.6065 0.3935
    """
    alpha = alpha_of(method, alpha)
    xp = jnp if any(isinstance(x, jax.Array) for x in (A, B, step)) else np
    A, B, step = (xp.asarray(x) for x in (A, B, step))
    kind = xp.result_type(A, B, step, xp.float32) if xp is jnp else np.result_type(A, B, step, np.float64)
    A, B = A.astype(kind), B.astype(kind)
    step = step.astype(kind if xp.issubdtype(step.dtype, xp.complexfloating) else xp.finfo(kind).dtype)
    if A.shape == B.shape:
        each = step[..., None] if step.ndim else step
        try:
            shape = np.broadcast_shapes(A.shape, each.shape)
        except ValueError as error:
            rule = "step must be a scalar or broadcast with the axes (...) of a diagonal A (..., P)"
            raise ValueError(f"{rule}; got step {step.shape} and A {A.shape}") from error
        return _diagonal(xp, *(xp.broadcast_to(x, shape) for x in (A, B, each)), alpha)
    if A.ndim != 2 or A.shape[0] != A.shape[1] or B.shape != A.shape[:1]:
        raise ValueError(
            f"A must be (P, P) with B (P,), or diagonal with the shape of B; got A {A.shape} and B {B.shape}"
        )
    if step.ndim:
        raise ValueError(f"step must be a scalar for a dense A; got shape {step.shape}")
    return dense(xp, A, B, step, alpha)
