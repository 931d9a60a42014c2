"""Sample inputs and weights of the lines of `ssm.MIXERS`."""

import numpy as np

from effattn_jax.ssm.initial import diagonal_init
from effattn_jax.ssm.nplr import legs_dplr

__all__: list[str] = []

_WIDTH, _SIZE, _HEADS = 4, 3, 2


def sample(*shapes: tuple[str, tuple[int, ...]], positive: tuple[str, ...] = (), gates: tuple[str, ...] = ()):
    """Normal arrays (B, T, *shape) by name; those named in `positive` through a softplus, in `gates` through a sigmoid."""

    def make(rng, batch, length, dtype):
        arrays = {}
        for name, shape in shapes:
            x = rng.normal(size=(batch, length, *shape))
            x = np.logaddexp(0, x - 1) if name in positive else 1 / (1 + np.exp(-x)) if name in gates else x
            arrays[name] = x.astype(dtype)
        return arrays

    return make


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def _complex(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (_normal(rng, *shape) + 1j * _normal(rng, *shape)).astype(np.complex64)


def _evenly(start: float, stop: float, size: int) -> np.ndarray:
    return np.linspace(start, stop, size, dtype=np.float32)


def _poles() -> np.ndarray:
    return (0.3 * diagonal_init("lin", 2 * _SIZE)).astype(np.complex64)


def diagonal(rng):
    """A system a channel."""
    return {
        "Lambda": np.broadcast_to(_poles(), (_WIDTH, _SIZE)), "B": _complex(rng, _WIDTH, _SIZE), "C": _complex(rng, _WIDTH, _SIZE),
        "D": _normal(rng, _WIDTH), "step": _evenly(0.5, 1.5, _WIDTH),
    }  # fmt: skip


def low_rank(rng):
    """A system a channel, diagonal plus low rank."""
    Lambda, P, B, _ = legs_dplr(2 * _SIZE)
    Lambda, P, B = (np.broadcast_to(np.asarray(x, np.complex64), (_WIDTH, _SIZE)) for x in (Lambda, P, B))
    return {
        "Lambda": Lambda, "P": P, "B": B, "C": _complex(rng, _WIDTH, _SIZE), "D": np.ones(_WIDTH, np.float32),
        "step": _evenly(0.1, 0.4, _WIDTH),
    }  # fmt: skip


def shared(rng):
    """One system for all channels."""
    return {
        "Lambda": _poles(), "B": _complex(rng, _SIZE, _WIDTH), "C": _complex(rng, _WIDTH, _SIZE),
        "D": _normal(rng, _WIDTH), "step": _evenly(0.5, 1.5, _SIZE),
    }  # fmt: skip


def linear_unit(rng):
    """An LRU."""
    system = shared(rng)
    logs = {
        "nu_log": _evenly(-1.0, 0.0, _SIZE), "theta_log": _evenly(-1.0, 0.5, _SIZE), "gamma_log": np.zeros(_SIZE, np.float32)
    }  # fmt: skip
    return logs | {name: system[name] for name in "BCD"}


def selective(rng):
    """Poles and the direct term of a selective scan."""
    return {"A": -np.exp(_normal(rng, _WIDTH, _SIZE)), "D": _evenly(-1.0, 1.0, _WIDTH)}


def heads(rng):
    """One decay a head."""
    return {"A": -np.exp(_normal(rng, _HEADS)), "D": _evenly(0.5, 1.0, _HEADS)}


def gated_unit(rng):
    """An RG-LRU."""
    return {"Lambda": _normal(rng, _WIDTH) - 2}


CHANNELS = ("u", (_WIDTH,))
SELECTIVE = sample(CHANNELS, ("delta", (_WIDTH,)), ("B", (_SIZE,)), ("C", (_SIZE,)), positive=("delta",))
GATED = sample(
    CHANNELS, ("recurrence_gate", (_WIDTH,)), ("input_gate", (_WIDTH,)), gates=("recurrence_gate", "input_gate")
)
_HEADED = (("x", (_HEADS, 3)), ("delta", (_HEADS,)), ("B", (1, _SIZE)), ("C", (1, _SIZE)))
HEADED = sample(*_HEADED, positive=("delta",))
TRAPEZOID = sample(*_HEADED, ("trapezoid", (_HEADS,)), positive=("delta",), gates=("trapezoid",))
