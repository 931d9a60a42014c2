"""Bases of functions on [0, 1], 1 the newest: f(points (Q,), size P) -> (Q, P), for NumPy arrays in NumPy and for JAX arrays in JAX."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__: list[str] = []


def _module(points: Any) -> Any:
    return jnp if isinstance(points, jax.Array) else np


def _three_terms(first: Any, second: Any, size: int, step: Any) -> Any:
    """(Q, P) columns p_0, p_1 and p_{n+1} = step(n, p_n, p_{n-1})."""
    columns = [first, second]
    for n in range(1, size - 1):
        columns.append(step(n, columns[n], columns[n - 1]))
    return _module(first).stack(columns[:size], axis=-1)


def legendre(points: Any, size: int) -> Any:
    """sqrt(2n + 1) P_n(2s - 1)."""
    x = 2 * points - 1
    values = _three_terms(x * 0 + 1, x, size, lambda n, now, before: ((2 * n + 1) * x * now - n * before) / (n + 1))
    return values * np.sqrt(2 * np.arange(size)[None, :] + 1).astype(values.dtype)


def chebyshev(points: Any, size: int) -> Any:
    """1, sqrt 2 T_n(2s - 1): orthonormal under the Chebyshev weight."""
    x = 2 * points - 1
    values = _three_terms(x * 0 + 1, x, size, lambda n, now, before: 2 * x * now - before)
    return values * np.where(np.arange(size)[None, :] == 0, 1, math.sqrt(2)).astype(values.dtype)


def cosine(points: Any, size: int) -> Any:
    """1, sqrt 2 cos(pi n s)."""
    n = np.arange(size)[None, :].astype(points.dtype)
    scale = np.where(n == 0, 1, math.sqrt(2)).astype(points.dtype)
    return scale * _module(points).cos(np.pi * n * points[:, None])


def fourier(points: Any, size: int) -> Any:
    """1, 0, sqrt 2 cos(2 pi a), sqrt 2 sin(2 pi a), sqrt 2 cos(4 pi a), ... in the age a = 1 - s."""
    xp = _module(points)
    angle = 2 * np.pi * np.arange((size + 1) // 2)[None, :].astype(points.dtype) * (1 - points)[:, None]
    scale = np.where(np.arange((size + 1) // 2)[None, :] == 0, 1, math.sqrt(2)).astype(points.dtype)
    pairs = xp.stack([scale * xp.cos(angle), scale * xp.sin(angle)], axis=-1)
    return pairs.reshape(points.shape[0], -1)[:, :size]


def exponentials(points: Any, size: int) -> Any:
    """exp(2 pi i n s), n = -(P // 2), ..., P // 2; complex."""
    n = (np.arange(size) - size // 2)[None, :].astype(points.dtype)
    angle = 2 * np.pi * n * points[:, None]
    return _module(points).cos(angle) + 1j * _module(points).sin(angle)


def laguerre(points: Any, size: int, *, alpha: float = 0.0, decay: float = 0.5) -> Any:
    """a^alpha exp(-decay a) L_n^(alpha)(a) at the age a = -log s: all of the past in (0, 1], and 0, the limit, at s = 0; NaN now for alpha < 0."""
    xp = _module(points)
    past = points > 0
    age = -xp.log(xp.where(past, points, 0.5))  # of any point where the weight is 0
    age = xp.where((age == 0) & (alpha < 0), np.nan, age)
    weight = xp.where(past, xp.exp(-decay * age) * (age**alpha if alpha else 1), 0)
    return _three_terms(
        weight, weight * (1 + alpha - age), size,
        lambda n, now, before: ((2 * n + 1 + alpha - age) * now - (n + alpha) * before) / (n + 1),
    )  # fmt: skip
