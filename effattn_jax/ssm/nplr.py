"""HiPPO matrices as normal plus low rank, A = V (diag(Lambda) - P P^H) V^-1, by the Hermitian route.

In orthonormal coordinates A + L^T conj(L) = -kappa I + K, K skew-Hermitian, so eigh(-i K) gives unitary eigenvectors and exactly imaginary parts:
no general eigensolver, whose eigenvectors of LegS have condition 3e19 at P = 32. One of each conjugate pair is kept. Source: Gu et al., arXiv:2111.00396.
"""

from typing import Any

import numpy as np

from effattn_jax.ssm._measures import change_of, find

__all__ = ["hippo_dplr", "legs_dplr"]


def _half(skew: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frequencies >= 0 (P/2,), eigenvectors (P, P/2)) of a real skew matrix of even size: x = 2 Re(V V^H x) for every real x."""
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    still = np.abs(frequencies) <= 1e-12 * max(1.0, frequencies[-1])
    moving = frequencies > 0
    moving &= ~still
    if not still.any():
        return frequencies[moving], vectors[:, moving]
    # The kernel is spanned by real vectors; two of them make one complex direction and its conjugate.
    planes, _, _ = np.linalg.svd(np.concatenate([vectors[:, still].real, vectors[:, still].imag], axis=1))
    planes = planes[:, : still.sum()]
    kernel = (planes[:, ::2] + 1j * planes[:, 1::2]) / np.sqrt(2)
    return np.concatenate([np.zeros(kernel.shape[1]), frequencies[moving]]), np.concatenate(
        [kernel, vectors[:, moving]], axis=1
    )


def hippo_dplr(measure: str, size: int, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A HiPPO memory in diagonal plus low-rank form, x' = (diag(Lambda) - sum_r P_r P_r^H) x + B u with own state 2 Re(V x).

    Args:
      measure, options: as for :func:`hippo_matrices`; every measure with real matrices.
      size: P, even.

    Returns:
      Lambda (P/2,), imaginary parts >= 0 and ascending; P, (P/2,) for rank 1 (legs, lagt, tlagt, glagt, fourier, cosine_scaled, scaled chebyshev), (2, P/2) for rank 2
      (legt, lmu, cosine, chebyshev), zeros (P/2,) for fourier_diag and legsd; B (P/2,), real and >= 0 by choice of phases; V (P, P/2), unitary with its conjugate in orthonormal coordinates.
      complex128. A row C of the output enters as C @ V, unconjugated, and y = 2 Re(sum_n (C @ V)_n x_n).

    Raises:
      ValueError: for an odd size, an unknown measure, or a complex one.

    >>> Lambda, P, B, V = hippo_dplr("legt", 4)
    >>> print(P.shape, Lambda.imag.round(3))
    (2, 2) [2.844 7.205]
    """
    found, options = find(measure, size, options)
    if size % 2:
        raise ValueError(f"size must be even, for conjugate pairs; got {size}")
    A, B, low_rank = found.system(size, **options)
    normal = A + low_rank.T @ low_rank
    kappa = np.round(np.diag(normal).mean(), 12)
    frequencies, vectors = _half((normal - normal.T) / 2)
    B = vectors.conj().T @ B
    phase = np.where(np.abs(B) > 1e-14, B, 1)
    vectors = vectors * (phase / np.abs(phase))
    P = low_rank @ vectors.conj()
    P = P[0] if len(P) == 1 else P if len(P) else np.zeros(size // 2, complex)
    change = change_of(found, size, options)
    V = vectors if change is None else change @ vectors
    return kappa + 1j * frequencies, P, np.abs(B).astype(complex), V


def legs_dplr(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """LegS as S4 has it: Lambda = -1/2 + i w, rank 1, one of each conjugate pair.

    Returns:
      Lambda, P, B (P/2,) and V (P, P/2), complex128: A = 2 Re(V (diag(Lambda) ...) V^H) as :func:`hippo_dplr` says; B = sqrt 2 P > 0.

    Raises:
      ValueError: for a size that is not even and positive.

    Source: Gu et al., arXiv:2111.00396, theorem 1; S4D-LegS (arXiv:2206.11893) keeps Lambda and B alone.

    >>> Lambda, P, B, V = legs_dplr(8)
    >>> print(Lambda.real, Lambda.imag.round(4))
    [-0.5 -0.5 -0.5 -0.5] [ 0.4275  1.9578  5.3542 19.8574]
    """
    return hippo_dplr("legs", size)
