"""Frequencies of rotary positions, as trained and as stretched for sequences longer than those of training.

w_m = base^(-2m / dim), m = 0 .. dim/2 - 1, and, for sequences k times as long,

linear      w_m / k                                       every distance shrinks: near ones too
ntk         (base k^(dim / (dim - 2)))^(-2m / dim)        the lowest frequency is interpolated, the highest is not
ntk_fixed   w_m / k^(2 (m + 1) / dim)                     the same in the number system: each digit takes its share
ntk_mixed   w_m / exp(a (m + 1)^b), a (dim/2)^b = ln k    more of it on the high digits; b = 1 is ntk_fixed, b = 0 linear
yarn        w_m / k below one turn in the trained length, w_m above 32 turns, a ramp between them
"""

import math

import numpy as np

from effattn_jax._contract import choose, positive
from effattn_jax.position.angles import inverse_frequencies

__all__ = ["rotary_frequencies", "yarn_temperature"]

SCALINGS = ("none", "linear", "ntk", "ntk_fixed", "ntk_mixed", "yarn")


def rotary_frequencies(
    dim: int,
    *,
    base: float = 10000.0,
    scaling: str = "none",
    factor: float = 1.0,
    exponent: float = 0.625,
    train_length: int | None = None,
    fast: float = 32.0,
    slow: float = 1.0,
) -> np.ndarray:
    """Angles a position of rotary embeddings, scaled for sequences `factor` times as long as those of training.

    Args:
      dim: H, or the part of it that is turned; even.
      base: sets the lowest frequency, base^(-1 + 2 / dim); above 1 with "yarn".
      scaling: "none", "linear" (position interpolation), "ntk" (a larger base), "ntk_fixed", "ntk_mixed" or "yarn"; see the module.
      factor: k >= 1, evaluated length over trained length.
      exponent: b >= 0 of "ntk_mixed".
      train_length: of "yarn", which counts turns in it.
      fast, slow: of "yarn": turns in the trained length above which a frequency stays, and below which it is interpolated; 0 < slow < fast.

    Returns:
      (dim/2,) float64 numpy, constants that `rotary(frequencies=)` takes on its exact path.

    Raises:
      ValueError: an unknown scaling, a factor below 1, dim odd, an exponent below 0, "yarn" without train_length or with bounds out of order.

    Sources: linear arXiv:2306.15595; ntk and its mixed forms kexue.fm/archives/9675 and 9706; yarn arXiv:2309.00071.

    >>> float(round(1 / rotary_frequencies(128, scaling="ntk", factor=8)[1] ** 64))
    82685.0
    """
    choose("scaling", scaling, SCALINGS)
    frequencies = inverse_frequencies(dim, base)
    if not factor >= 1:
        raise ValueError(f"factor must be at least 1, evaluated length over trained length; got {factor}")
    places = np.arange(1, dim // 2 + 1)
    if scaling == "linear":
        return frequencies / factor
    if scaling == "ntk":
        return inverse_frequencies(dim, base * factor ** (dim / max(dim - 2, 1)))
    if scaling == "ntk_fixed":
        return frequencies / factor ** (2 * places / dim)
    if scaling == "ntk_mixed":
        if not 0 <= exponent < math.inf:
            raise ValueError(f"exponent must be at least 0 and finite with scaling='ntk_mixed'; got {exponent}")
        return frequencies / np.exp(math.log(factor) * (places / (dim / 2)) ** exponent)
    if scaling == "yarn":
        kept = _yarn_kept(dim, base, train_length, fast, slow)
        return frequencies * kept + frequencies / factor * (1 - kept)
    return frequencies


def _yarn_kept(dim: int, base: float, train_length: int | None, fast: float, slow: float) -> np.ndarray:
    """How much of each frequency stays, from 1 to 0, over places rounded outwards."""
    if train_length is None:
        raise ValueError("train_length must be given with scaling='yarn', which counts turns in it; got None")
    positive(train_length=train_length)
    if not 1 < base < math.inf:
        raise ValueError(f"base must be above 1 with scaling='yarn', so that turns fall from pair to pair; got {base}")
    if not 0 < slow < fast < math.inf:
        raise ValueError(f"slow and fast must be turns with 0 < slow < fast; got slow={slow}, fast={fast}")

    def place(turns):
        return dim * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(place(fast)), min(math.ceil(place(slow)), dim - 1)
    if high > 0:  # else no pair makes `slow` turns: the ramp ends before the first
        low = max(low, 0)
    high = high if high > low else low + 0.001
    return 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)


def yarn_temperature(factor: float) -> float:
    """YaRN's factor on queries and on keys, 0.1 ln k + 1: scores are multiplied by its square.

    Args:
      factor: k >= 1, evaluated length over trained length.

    Returns:
      a number, 1 for k <= 1.

    Source: arXiv:2309.00071.

    >>> round(yarn_temperature(8), 4)
    1.2079
    """
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
