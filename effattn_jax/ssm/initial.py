"""Initial poles of diagonal state-space models: the spectrum of HiPPO-LegS and what imitates it.

    lin    -1/2 + i pi n            inv   -1/2 + i (N / pi) (N / (2 n + 1) - 1)          quad   -1/2 + i (1 + 2 n)^2 / pi
    real   -(n + 1)                 legs  eigenvalues of the normal part of HiPPO-LegS

Source: Gu et al., arXiv:2206.11893.
"""

import numpy as np

from effattn_jax._contract import choose, is_whole

__all__ = ["diagonal_init"]


def _legs(size: int) -> np.ndarray:
    """Eigenvalues -1/2 + i w, w > 0, of A + (1/2) B B^T, which is skew but for -1/2 on its diagonal; ascending w."""
    root = np.sqrt(2 * np.arange(size) + 1.0)
    skew = -0.5 * np.outer(root, root) * (np.tri(size, k=-1) - np.tri(size, k=-1).T)
    return -0.5 + 1j * np.linalg.eigvalsh(-1j * skew)[(size + 1) // 2 :]


_KINDS = {
    "legs": _legs,
    "lin": lambda size: -0.5 + 1j * np.pi * np.arange(size // 2),
    "inv": lambda size: -0.5 + 1j * size / np.pi * (size / (2 * np.arange(size // 2) + 1) - 1),
    "quad": lambda size: -0.5 + 1j * (1 + 2 * np.arange(size // 2)) ** 2 / np.pi,
    "real": lambda size: -(np.arange(size // 2) + 1.0),
}


def diagonal_init(kind: str, size: int) -> np.ndarray:
    """Poles of a diagonal state-space model at its start, one of each conjugate pair.

    lin: -1/2 + i pi n; inv: -1/2 + i (N / pi) (N / (2 n + 1) - 1); quad: -1/2 + i (1 + 2 n)^2 / pi; real: -(n + 1), n = 0 ... N / 2 - 1;
    legs: the eigenvalues -1/2 + i w, w > 0 ascending, of the normal part A + B B^T / 2 of HiPPO-LegS of size N.

    Args:
      kind: "legs", "lin", "inv", "quad" or "real" (float64 instead of complex128).
      size: N, even: the number of real states.

    Returns:
      (N / 2,), NumPy.

    Raises:
      ValueError: an unknown kind, or a size that is odd or not positive.

    Cost O(N), legs O(N^3). Source: Gu et al., arXiv:2206.11893.

    >>> diagonal_init("inv", 8).imag.round(4).tolist()
    [17.8254, 4.2441, 1.5279, 0.3638]
    """
    choose("kind", kind, _KINDS)
    if not is_whole(size, 2) or size % 2:
        raise ValueError(f"size must be an even positive int, two states to a conjugate pair; got {size!r}")
    return _KINDS[kind](size)
