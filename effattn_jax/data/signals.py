"""Tasks over real numbers: a delayed signal, a sum of marked numbers, chirps at any sampling rate."""

import dataclasses
from typing import ClassVar

import numpy as np

from effattn_jax.data import codecs
from effattn_jax.data.config import at_least, invalid
from effattn_jax.data.procedural import Procedural
from effattn_jax.data.sampling import Batch


def white_signal(rng: np.random.Generator, count: int, length: int, bandwidth: float, rms: float = 0.5) -> np.ndarray:
    """Periodic white noise without the frequencies above `bandwidth` times that of Nyquist, (count, length) float64.

    u = irfft(z), z_k complex Gaussian for 1 <= k <= K and 0 elsewhere, K = floor(bandwidth h), h = ceil(length / 2),
    scaled so that the mean square of u is rms^2. The same rng gives samples of one signal in continuous time at all even
    lengths with the same bandwidth * length. The rule of S4's code (Gu et al., arXiv 2111.00396). O(N T log T).

    >>> u = white_signal(np.random.default_rng(0), 50, 1000, bandwidth=0.25)
    >>> round(float((u**2).mean() ** 0.5), 1), bool(abs(np.fft.rfft(u)[:, 126:]).max() < 1e-9)
    (0.5, True)
    """
    half = -(-length // 2)
    kept = max(1, int(bandwidth * half + 1e-9))
    real, imaginary = rng.standard_normal((2, count, kept))
    spectrum = np.zeros((count, half + 1), complex)
    spectrum[:, 1 : kept + 1] = (real + 1j * imaginary) * (rms * half / kept**0.5)
    return np.fft.irfft(spectrum, 2 * half)[:, :length]


class Signals(Procedural):
    """Base of tasks whose inputs are real numbers (B, T, features)."""

    identifying = "inputs"

    @property
    def vocab_size(self) -> None:
        """None: the inputs are real numbers."""
        return None

    @property
    def codec(self) -> codecs.Codec | None:
        """None: there is nothing to write out."""
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Delay(Signals):
    """Say at each step what the signal was `lag` steps ago, 0 before it began.

    The signal is white noise below `bandwidth` of the Nyquist frequency with root mean square 1/2, its first sample taken
    off. Uses `lag` (a quarter of the context where empty) and `bandwidth`. Always saying 0 errs by 0.38 in the mean square
    (the power of u - u_0 is 1/2, and 3/4 of the steps are asked for it). The task of S4's code, there with T = 4,000, lag
    1,000 and half of the band.

    >>> from effattn_jax.data import DataConfig, load
    >>> row = load(DataConfig(task="delay", context=8, lag=2)).batch(seed=0, step=0)
    >>> bool((row["targets"][:, 2:] == row["inputs"][:, :-2]).all()), row["targets"].shape
    (True, (32, 8, 1))
    """

    kind = "regression"
    num_outputs = 1

    def check(self) -> None:
        """Raises ValueError unless 1 <= lag < T and 0 < bandwidth <= 1."""
        at_least("context", self.context, 2)
        at_least("lag", self.lag, 1)
        if self.lag >= self.context:
            raise invalid("lag", self.lag, f"must be below the context {self.context}")
        if not 0 < self.config.bandwidth <= 1:
            raise invalid("bandwidth", self.config.bandwidth, "must lie in (0, 1], 1 being the Nyquist frequency")

    @property
    def lag(self) -> int:
        """Steps of delay."""
        return max(1, self.context // 4) if self.config.lag is None else self.config.lag

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        signal = white_signal(rng, count, self.context, self.config.bandwidth)
        signal = (signal - signal[:, :1]).astype(np.float32)[..., None]
        late = np.pad(signal, ((0, 0), (self.lag, 0), (0, 0)))[:, : self.context]
        return {"inputs": signal, "targets": late, "weights": np.ones(signal.shape[:2], np.float32)}


@dataclasses.dataclass(frozen=True, eq=False)
class Adding(Signals):
    """Two channels, numbers and marks: say at the last step the sum of the two marked numbers.

    The numbers are uniform in [0, 1); one mark stands in the first half of the row and one in the second, each at a
    uniform place. Always saying 1 errs by 1/6 in the mean square. Hochreiter and Schmidhuber 1997; the rule
    is that of S4's code, with T = 1,000 there.

    >>> from effattn_jax.data import DataConfig, load
    >>> row = load(DataConfig(task="adding", context=6)).batch(seed=0, step=0)
    >>> numbers, marks = row["inputs"][0].T
    >>> bool(np.isclose(numbers @ marks, row["targets"][0, -1, 0])), row["weights"][0].tolist()
    (True, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    """

    kind = "regression"
    num_outputs = 1

    def check(self) -> None:
        """Raises ValueError unless T >= 2."""
        at_least("context", self.context, 2)

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        length, half = self.context, self.context // 2
        numbers = rng.random((count, length), np.float32)
        places = np.stack([rng.integers(0, half, count), rng.integers(half, length, count)], axis=1)
        marks, targets, weights = np.zeros((3, count, length), np.float32)
        np.put_along_axis(marks, places, np.float32(1), axis=1)
        targets[:, -1] = np.take_along_axis(numbers, places, axis=1).sum(axis=1)
        weights[:, -1] = 1
        return {"inputs": np.stack([numbers, marks], axis=-1), "targets": targets[..., None], "weights": weights}


@dataclasses.dataclass(frozen=True, eq=False)
class Chirps(Signals):
    """Tell rising from falling chirps of five pitches, in noise, at any sampling rate: 10 classes.

    A row lasts T / r units of time for `sampling_rate` r. Its tone rises from f to 1.5 f cycles a unit of time, or falls
    from there, at a constant rate of octaves, for f = 0.02 * 1.5^k, k = 0 ... 4; phase uniform, amplitude uniform in
    [0.5, 1.5], and white noise below 0.2 cycles a unit with the root mean square of 1/2 is added. Neighbouring classes
    share their band, so the order of what is heard decides. `context` and `sampling_rate` times the same factor are the
    same signals, sampled more or less often; at r = 1/2 the highest pitch is at 0.6 of the Nyquist frequency.

    >>> from effattn_jax.data import DataConfig, load
    >>> load(DataConfig(task="chirps", context=64, sampling_rate=0.5)).batch(seed=0, step=0)["inputs"].shape
    (32, 64, 1)
    """

    kind = "classification"
    num_classes = 10
    lowest: ClassVar[float] = 0.02
    ratio: ClassVar[float] = 1.5
    noise_band: ClassVar[float] = 0.2

    def check(self) -> None:
        """Raises ValueError for a rate that loses part of the band."""
        at_least("context", self.context, 2)
        rate = self.config.sampling_rate
        if not 2 * self.noise_band <= rate < float("inf"):
            raise invalid("sampling_rate", rate, f"must be finite and at least {2 * self.noise_band}, to hold the band")

    @property
    def codec(self) -> codecs.Codec:
        """Labels by pitch and direction."""
        return codecs.Symbols([f"{direction}{k}" for k in range(5) for direction in ("rising", "falling")])

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        rate, length = self.config.sampling_rate, self.context
        labels = rng.integers(0, 10, count)
        pitch, falls = labels // 2, labels % 2
        start = self.lowest * self.ratio ** (pitch + falls)
        octaves = np.where(falls, -1, 1) * np.log(self.ratio) * rate / length  # log f grows by this a unit of time
        time = np.arange(length) / rate
        turns = start[:, None] * np.expm1(octaves[:, None] * time) / octaves[:, None] + rng.random((count, 1))
        tone = rng.uniform(0.5, 1.5, (count, 1)) * np.sin(2 * np.pi * turns)
        signal = tone + white_signal(rng, count, length, 2 * self.noise_band / rate)
        return {
            "inputs": signal.astype(np.float32)[..., None],
            "labels": labels.astype(np.int32),
            "mask": np.ones(signal.shape, bool),
            "weights": np.ones(count, np.float32),
        }
