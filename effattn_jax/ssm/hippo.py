"""HiPPO: the linear systems whose state is the projection of their input's history onto a basis of functions.

    scaled memory    t x' = A x + B u        x_n(t) = int_0^1 g_n(s) u(s t) ds
    sliding memory     x' = A x + B u        x_n(t) = int_0^1 g_n(s) u(t - (1 - s) window) ds

Matrices are float64 NumPy (complex128 for complex bases), made outside of any trace. Sources: Gu et al., arXiv:2008.07669 (HiPPO) and
arXiv:2206.12037; Su, kexue.fm/archives/10114 and 10137; Voelker et al., NeurIPS 2019 (LMU).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import ArrayLike
from effattn_jax.ssm._measures import change_of, find

__all__ = ["hippo_from_basis", "hippo_matrices", "hippo_reconstruct"]


def hippo_matrices(measure: str, size: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The matrices (A, B) of a HiPPO memory, in closed form.

    Args:
      measure: one of
        "legs": Legendre polynomials, uniform over all history (scaled). Option normalization.
        "legt": Legendre, uniform over the last `window` (1.0). Options window, normalization. S4's code has window=2.
        "lmu": the same in the coordinates of the Legendre memory unit, u(t - window r) = sum_i x_i P_i(2r - 1). Option window.
        "lagt": Laguerre functions, exponentially fading; option beta (1.0) scales B. "tlagt": tilted by beta (1.0). "glagt": generalised, alpha (0.0) and beta (0.01).
        "fourier": real Fourier over the last window (1.0): 1, 0, sqrt 2 cos, sqrt 2 sin, ... of 2 pi k times the age; size even. Option endpoint: "periodic" (S4's FouT,
        whose code has window=2: the oldest value from the periodic extension's midpoint) or "decay" (S4's fourier_decay, Su's sliding Fourier).
        "fourier_scaled": exp(2 pi i n s), n = -K..K, over all history (scaled, complex); size 2K + 1.
        "cosine_scaled", "cosine": half-range cosines 1, sqrt 2 cos(pi n s), over all history (scaled) or the last window (1.0).
        "chebyshev": the best polynomial over the last window (1.0) as "legt" has it, or over all history with window=None, in Chebyshev's
        coordinates 1, sqrt 2 T_n. (The weighted projections themselves have no such system: at the newest sample one weight is infinite and the other zero.)
        "fourier_diag", "legsd": S4's normal surrogates 2 pi S - I/2 and LegS + B B^T / 2, without a basis.
      size: P.
      normalization, for legs and legt: "orthonormal"; "plain" (u = sum_n x_n P_n, no square roots); "su" (basis orthonormal on [-1, 1]: sqrt 2 times the state).

    Returns:
      A (P, P), B (P,), float64 (complex128 for "fourier_scaled"), in the stable sign.

    Raises:
      ValueError: for an unknown measure or option, or a size that the basis cannot have.

    >>> A, B = hippo_matrices("legs", 3)
    >>> print(A.round(3) + 0, B.round(3))
    [[-1.     0.     0.   ]
     [-1.732 -2.     0.   ]
     [-2.236 -3.873 -3.   ]] [1.    1.732 2.236]
    """
    found, options = find(measure, size, options)
    A, B, _ = found.system(size, **options)
    change = change_of(found, size, options)
    if change is None:
        return A, B
    return change @ A @ np.linalg.inv(change), change @ B


@contextlib.contextmanager
def double_precision():
    """Concrete arrays, in double precision, even inside a trace."""
    switch = getattr(jax, "enable_x64", None)
    if switch is None:
        from jax.experimental import enable_x64 as switch
    with jax.ensure_compile_time_eval(), switch(True):
        yield


def hippo_from_basis(
    basis: Callable,
    size: int,
    *,
    window: float | None = None,
    breaks: tuple[float, ...] = (),
    points: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The matrices (A, B) of the memory that projects onto a basis given as a function.

    window=None: A = -(I + M), M_nk = int_0^1 s conj(g_n') g_k ds, B = conj(g(1)): the scaled memory t x' = A x + B u of all history;
    a number: A = -(conj g(0) g(0)^T + D) / window, D_nk = int_0^1 conj(g_n') g_k ds, B = conj(g(1)) / window: the sliding memory.

    Args:
      basis: `basis(points (Q,), size) -> (Q, P)`, in JAX operations, orthonormal on [0, 1] with 1 the newest; continuous, smooth between `breaks`.
      size: P.
      window: length of the sliding window; None for all history.
      breaks: interior points where derivatives jump, as of splines.
      points: Gauss-Legendre points a panel; None is 2 P + 64, exact for polynomials and to rounding for P half waves.

    Returns:
      A (P, P), B (P,), float64 or complex128.

    Raises:
      ValueError: if the basis returns another shape or is not orthonormal to 1e-8.

    The oldest value that leaves a sliding window is read from the state, u(t - window) = g(0) . x. Derivation: Su, kexue.fm/archives/10114.

    >>> import jax.numpy as jnp
    >>> lines = lambda s, size: jnp.stack([jnp.ones_like(s), 12**0.5 * (s - 0.5)], axis=1)[:, :size]
    >>> A, B = hippo_from_basis(lines, 2)
    >>> print(A.round(3) + 0, B.round(3))
    [[-1.     0.   ]
     [-1.732 -2.   ]] [1.    1.732]
    """
    nodes, weights = np.polynomial.legendre.leggauss(2 * size + 64 if points is None else points)
    edges = np.array([0.0, *breaks, 1.0])
    width = np.diff(edges)[:, None]
    at = (edges[:-1, None] + width * (1 + nodes) / 2).ravel()
    weights = (width * weights / 2).ravel()
    with double_precision():
        at_j = jnp.asarray(np.concatenate([at, [0.0, 1.0]]))
        values, slopes = jax.jvp(lambda s: jnp.asarray(basis(s, size)), (at_j,), (jnp.ones_like(at_j),))
        values, slopes = np.asarray(values), np.asarray(slopes)
    if values.shape != (at.size + 2, size):
        raise ValueError(f"basis must return (Q, P) = {(at.size + 2, size)}; got {values.shape}")
    g, slopes, oldest, newest = values[:-2], slopes[:-2].conj(), values[-2], values[-1].conj()
    gram = (g.conj() * weights[:, None]).T @ g
    if not np.allclose(gram, np.eye(size), atol=1e-8):
        worst = np.abs(gram - np.eye(size)).max()
        raise ValueError(f"basis must be orthonormal on [0, 1]; its Gram matrix is off the identity by {worst:.1e}")
    if window is None:
        return -(np.eye(size) + (slopes * (weights * at)[:, None]).T @ g), newest
    return -(np.outer(oldest.conj(), oldest) + (slopes * weights[:, None]).T @ g) / window, newest / window


def hippo_reconstruct(coefficients: ArrayLike, measure: str, points: ArrayLike, **options: Any) -> jax.Array:
    """The history that a HiPPO state stands for: u(s) = sum_n x_n g_n(s).

    Args:
      coefficients: (..., P), as `hippo_project` gives them.
      measure, options: as for :func:`hippo_matrices`.
      points: (Q,) in [0, 1]: s = 1 is now; s = 0 the beginning of a scaled memory, one window ago for a sliding one. The fading Laguerre
        measures have all of the past in (0, 1], the age being -log s; for "glagt" with alpha < 0 nothing is finite now, and s = 1 gives NaN.

    Returns:
      (..., Q), real (of a complex basis the real part).

    Raises:
      ValueError: for an unknown measure or option, a measure without a basis, or points that are not (Q,).

    Points that are not traced are evaluated in float64. Cost O(P Q) a state.

    >>> import numpy as np
    >>> u = hippo_reconstruct(np.ones(2), "legs", [0.0, 0.5, 1.0])
    >>> print([round(float(x), 3) for x in u])
    [-0.732, 1.0, 2.732]
    """
    coefficients = jnp.asarray(coefficients)
    if coefficients.ndim < 1 or not jnp.issubdtype(coefficients.dtype, jnp.inexact):
        raise ValueError(
            f"coefficients must be floating of shape (..., P); got {coefficients.dtype} {coefficients.shape}"
        )
    size = coefficients.shape[-1]
    found, options = find(measure, size, options)
    if found.basis is None:
        raise ValueError(f"measure={measure!r} has no basis to reconstruct with")
    if not isinstance(points, jax.core.Tracer):
        points = np.asarray(points, np.float64)
    if points.ndim != 1:
        raise ValueError(f"points must have shape (Q,); got {points.shape}")
    values = found.basis(points, size, **options)
    change = change_of(found, size, options)
    if change is not None:
        values = values @ np.linalg.inv(change).astype(values.dtype)
    kind = jnp.result_type(coefficients.dtype, jnp.complex64) if jnp.iscomplexobj(values) else coefficients.dtype
    return jnp.real(coefficients @ jnp.asarray(values, kind).T)
