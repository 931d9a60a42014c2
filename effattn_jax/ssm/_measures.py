"""Measures of HiPPO in closed form: matrices, low-rank parts and bases, in float64 NumPy.

Scaled memories of all history [0, t]       t x' = A x + B u        A = -(I + M),  M_nk = int s g_n' g_k ds,  B = g(1)
sliding memories of [t - w, t]                x' = A x + B u        A = -(g(0) g(0)^T + D) / w,  D_nk = int g_n' g_k ds,  B = g(1) / w

with g_n orthonormal on [0, 1], 1 the newest. Integration by parts gives the low-rank part: A + A^H = -I - B B^H, or -(g(0) g(0)^T + g(1) g(1)^T) / w.
Sources: Gu et al., arXiv:2008.07669 and arXiv:2206.12037; Su, kexue.fm/archives/10114 and 10137.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from effattn_jax._contract import choose, is_whole
from effattn_jax.ssm import _bases as bases
from effattn_jax.ssm._calls import number

__all__: list[str] = []


class Measure(NamedTuple):
    """One measure: its system in coordinates where A + low_rank^T conj(low_rank) is normal, and what leads from there to its own coordinates.

    Attributes:
      defaults: its options.
      system: `system(size, **options) -> (A (P, P), B (P,), low_rank (R, P))`.
      basis: `basis(points, size, **options) -> (Q, P)`, what the state is decoded with; None where it has no meaning as a function.
      change: `change(size, **options)` -> the matrix S (P, P), or the diagonal of one (P,), of x_own = S x; None is the identity.
      is_scaled: whether it is a memory of all history, whose system is t x' = A x + B u.
      even: whether the size must be even; None: it must be odd.
    """

    defaults: Mapping[str, Any]
    system: Callable
    basis: Callable | None
    change: Callable | None = None
    is_scaled: Callable = lambda **_: False
    even: bool | None = False


def _alternate(size: int) -> np.ndarray:
    return 1.0 - 2.0 * (np.arange(size) % 2)


def _indices(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(size, dtype=float)[:, None], np.arange(size, dtype=float)[None, :]


def _legs(size, **_):
    root = np.sqrt(2 * np.arange(size) + 1.0)
    A = -np.tril(root[:, None] * root, -1) - np.diag(np.arange(size) + 1.0)
    return A, root, root[None] / math.sqrt(2)


def _legs_diag(size, **_):
    A, B, low_rank = _legs(size)
    return A + low_rank.T @ low_rank, B / 2, low_rank[:0]


def _legt(size, window, **_):
    root, sign = np.sqrt(2 * np.arange(size) + 1.0), _alternate(size)
    A = -root[:, None] * root * np.where(np.tri(size, k=-1) > 0, 1.0, sign[:, None] * sign) / window
    return A, root / window, np.stack([np.where(sign > 0, root, 0), np.where(sign < 0, root, 0)]) / math.sqrt(window)


def _lagt(size, beta):
    A = np.eye(size) / 2 - np.tri(size)
    return A, np.full(size, float(beta)), np.full((1, size), math.sqrt(0.5))


def _tlagt(size, beta):
    A, B, low_rank = _lagt(size, beta)
    return A - beta / 2 * np.eye(size), B, low_rank


def _glagt_scale(alpha, beta):
    return math.gamma(1 - alpha) ** -0.5 * beta ** ((1 - alpha) / 2)


def _glagt(size, alpha, beta):
    A, _, low_rank = _tlagt(size, beta)
    binomial = [math.exp(math.lgamma(alpha + n + 1) - math.lgamma(n + 1) - math.lgamma(alpha + 1)) for n in range(size)]
    return A, _glagt_scale(alpha, beta) * np.array(binomial), low_rank


def _glagt_weights(size, alpha, **_):
    return np.exp([(math.lgamma(n + 1) - math.lgamma(n + alpha + 1)) / 2 for n in range(size)])


def _laguerre(points, size, beta):
    """The dual of the impulse responses beta exp(-(1 + beta) a / 2) L_n(a)."""
    return bases.laguerre(points, size, decay=(1 - beta) / 2) / beta


def _generalized_laguerre(points, size, alpha, beta):
    norms = _glagt_weights(size, alpha) ** 2 / _glagt_scale(alpha, beta)
    return bases.laguerre(points, size, alpha=alpha, decay=(1 - beta) / 2) * norms[None, :]


def _rotation(size):
    """(the generator of real Fourier coefficients in the age 1 - s, one turn a unit of time; their values at age 0)."""
    turn = 2 * np.pi * np.arange(size // 2)
    upper = np.zeros(size - 1)
    upper[::2] = turn
    value = np.where(np.arange(size) % 2 == 0, math.sqrt(2), 0.0)
    value[0] = 1
    return np.diag(upper, -1) - np.diag(upper, 1), value


def _fourier(size, window, endpoint):
    turn, value = _rotation(size)
    strength = {"periodic": 2.0, "decay": 1.0}[endpoint]
    A = (turn - strength * value[:, None] * value) / window
    return A, strength * value / window, math.sqrt(strength / window) * value[None]


def _fourier_diag(size):
    turn, value = _rotation(size)
    return turn - np.eye(size) / 2, value, np.zeros((0, size))


def _fourier_scaled(size):
    n = np.arange(size) - size // 2
    gap = n[:, None] - n
    off = -n[:, None] / np.where(gap == 0, 1, gap)
    A = np.where(gap == 0, 1j * np.pi * n[:, None] - 1, off)
    return A, np.ones(size, complex), np.full((1, size), math.sqrt(0.5), complex)


def _cosine_fractions(size):
    """n (1 / (n + k) + 1 / (n - k)), with 1/2 at n = k > 0 and 0 in row 0; the column k = 0 has its norm."""
    n, k = _indices(size)
    gap = np.where(n == k, 1, n - k)
    fractions = n / np.where(n + k == 0, 1, n + k) + np.where(n == k, 0, n / gap)
    fractions[:, 0] /= math.sqrt(2)
    fractions[0, 0] = 0
    return fractions


def _cosine_ends(size):
    newest = np.where(np.arange(size) == 0, 1.0, math.sqrt(2)) * _alternate(size)
    return np.abs(newest), newest


def _cosine_scaled(size):
    sign = _alternate(size)
    B = _cosine_ends(size)[1]
    return -(np.eye(size) + sign[:, None] * sign * _cosine_fractions(size)), B, B[None] / math.sqrt(2)


def _cosine(size, window):
    sign = _alternate(size)
    oldest, newest = _cosine_ends(size)
    slopes = -(1 - sign[:, None] * sign) * _cosine_fractions(size)
    A = -(oldest[:, None] * oldest + slopes) / window
    return A, newest / window, np.stack([oldest, newest]) / math.sqrt(2 * window)


def _chebyshev(size, window):
    return _legs(size) if window is None else _legt(size, window)


def _to_chebyshev(size, **_):
    """Chebyshev coefficients of the orthonormal Legendre polynomials, by Gauss-Chebyshev quadrature."""
    nodes = (1 + np.cos(np.pi * (np.arange(size) + 0.5) / size)) / 2
    return bases.chebyshev(nodes, size).T @ bases.legendre(nodes, size) / size


def _normalized(size, normalization, **_):
    if normalization == "orthonormal":
        return None
    return np.sqrt(2 * np.arange(size) + 1.0) if normalization == "plain" else np.full(size, math.sqrt(2))


def _lmu_norm(size, **_):
    return _alternate(size) * np.sqrt(2 * np.arange(size) + 1.0)


def _fixed(basis: Callable) -> Callable:
    return lambda points, size, **_: basis(points, size)


def _always(**_) -> bool:
    return True


def _without_window(window, **_) -> bool:
    return window is None


MEASURES: dict[str, Measure] = {
    "chebyshev": Measure({"window": 1.0}, _chebyshev, _fixed(bases.legendre), _to_chebyshev, _without_window),
    "cosine": Measure({"window": 1.0}, _cosine, _fixed(bases.cosine)),
    "cosine_scaled": Measure({}, _cosine_scaled, bases.cosine, is_scaled=_always),
    "fourier": Measure({"window": 1.0, "endpoint": "periodic"}, _fourier, _fixed(bases.fourier), even=True),
    "fourier_diag": Measure({}, _fourier_diag, None, even=True),
    "fourier_scaled": Measure({}, _fourier_scaled, bases.exponentials, is_scaled=_always, even=None),
    "glagt": Measure({"alpha": 0.0, "beta": 0.01}, _glagt, _generalized_laguerre, _glagt_weights),
    "lagt": Measure({"beta": 1.0}, _lagt, lambda p, n, beta: bases.laguerre(p, n, decay=0.5) / beta),
    "legs": Measure({"normalization": "orthonormal"}, _legs, _fixed(bases.legendre), _normalized, _always),
    "legsd": Measure({}, _legs_diag, None),
    "legt": Measure({"window": 1.0, "normalization": "orthonormal"}, _legt, _fixed(bases.legendre), _normalized),
    "lmu": Measure({"window": 1.0}, _legt, _fixed(bases.legendre), _lmu_norm),
    "tlagt": Measure({"beta": 1.0}, _tlagt, _laguerre),
}


_CHOICES = {"normalization": ("orthonormal", "plain", "su"), "endpoint": ("periodic", "decay")}
_RANGES = {
    "window": (0, math.inf, "be a positive number"),
    "beta": (0, math.inf, "be a positive number"),
    "alpha": (-1, 1, "lie in (-1, 1)"),
}


def _checked(measure: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, their numbers as floats; a window of None is all of history, which only Chebyshev's measure has."""
    out = dict(options)
    for name, value in options.items():
        if name in _CHOICES:
            choose(name, value, _CHOICES[name])
        elif value is not None or measure != "chebyshev":
            low, high, rule = _RANGES[name]
            if not low < number(value) < high:
                raise ValueError(f"{name} must {rule}; got {value!r}")
            out[name] = number(value)
    return out


def find(measure: str, size: int, options: Mapping[str, Any]) -> tuple[Measure, dict[str, Any]]:
    """(the measure of that name, its options with defaults filled in), or the ValueError that says what is wrong."""
    choose("measure", measure, MEASURES)
    found = MEASURES[measure]
    for name in options:
        if name not in found.defaults:
            takes = ", ".join(sorted(found.defaults)) or "none"
            raise ValueError(f"{name} is no option of measure={measure!r}; its options: {takes}")
    if not is_whole(size, 1):
        raise ValueError(f"size must be a positive int; got {size!r}")
    if (found.even and size % 2) or (found.even is None and size % 2 == 0):
        raise ValueError(f"size must be {'even' if found.even else 'odd'} for measure={measure!r}; got {size}")
    return found, _checked(measure, {**found.defaults, **options})


def change_of(found: Measure, size: int, options: Mapping[str, Any]) -> np.ndarray | None:
    """The matrix S of x_own = S x, None for the identity."""
    change = found.change(size, **options) if found.change else None
    return np.diag(change) if change is not None and change.ndim == 1 else change
