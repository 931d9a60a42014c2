"""Sample inputs and weights of the lines of `ssm.MIXERS`."""

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.ssm.initial import diagonal_init
from effattn_jax.ssm.nplr import legs_dplr

__all__: list[str] = []

_WIDTH, _SIZE, _HEADS = 4, 3, 2


def sample(*shapes: tuple[str, tuple[int, ...]], positive: tuple[str, ...] = (), gates: tuple[str, ...] = ()):
    """Normal arrays (B, T, *shape) by name; those named in `positive` through a softplus, in `gates` through a sigmoid."""

    def make(rng, batch, length, dtype):
        arrays = {}
        for key, (name, shape) in zip(jax.random.split(rng, len(shapes)), shapes):
            x = jax.random.normal(key, (batch, length, *shape), jnp.float32)
            x = jax.nn.softplus(x - 1) if name in positive else jax.nn.sigmoid(x) if name in gates else x
            arrays[name] = x.astype(dtype)
        return arrays

    return make


def _complex(rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    real, imag = jax.random.normal(rng, (2, *shape), jnp.float32)
    return jax.lax.complex(real, imag)


def _poles() -> np.ndarray:
    return (0.3 * diagonal_init("lin", 2 * _SIZE)).astype(np.complex64)


def diagonal(rng):
    """A system a channel."""
    keys, shape = jax.random.split(rng, 3), (_WIDTH, _SIZE)
    step = jnp.linspace(0.5, 1.5, _WIDTH)
    return {
        "Lambda": np.broadcast_to(_poles(), shape), "B": _complex(keys[0], shape), "C": _complex(keys[1], shape),
        "D": jax.random.normal(keys[2], (_WIDTH,)), "step": step,
    }  # fmt: skip


def low_rank(rng):
    """A system a channel, diagonal plus low rank."""
    Lambda, P, B, _ = legs_dplr(2 * _SIZE)
    shape = (_WIDTH, _SIZE)
    Lambda, P, B = (np.broadcast_to(np.asarray(x, np.complex64), shape) for x in (Lambda, P, B))
    return {
        "Lambda": Lambda, "P": P, "B": B, "C": _complex(rng, shape), "D": np.ones(_WIDTH, np.float32),
        "step": np.linspace(0.1, 0.4, _WIDTH, dtype=np.float32),
    }  # fmt: skip


def shared(rng):
    """One system for all channels."""
    keys = jax.random.split(rng, 3)
    return {
        "Lambda": _poles(), "B": _complex(keys[0], (_SIZE, _WIDTH)), "C": _complex(keys[1], (_WIDTH, _SIZE)),
        "D": jax.random.normal(keys[2], (_WIDTH,)), "step": jnp.linspace(0.5, 1.5, _SIZE),
    }  # fmt: skip


def linear_unit(rng):
    """An LRU."""
    system = shared(rng)
    logs = {
        "nu_log": jnp.linspace(-1.0, 0.0, _SIZE),
        "theta_log": jnp.linspace(-1.0, 0.5, _SIZE),
        "gamma_log": jnp.zeros(_SIZE),
    }
    return logs | {name: system[name] for name in "BCD"}


def selective(rng):
    """Poles and the direct term of a selective scan."""
    return {"A": -jnp.exp(jax.random.normal(rng, (_WIDTH, _SIZE))), "D": jnp.linspace(-1.0, 1.0, _WIDTH)}


def heads(rng):
    """One decay a head."""
    return {"A": -jnp.exp(jax.random.normal(rng, (_HEADS,))), "D": jnp.linspace(0.5, 1.0, _HEADS)}


def gated_unit(rng):
    """An RG-LRU."""
    return {"Lambda": jax.random.normal(rng, (_WIDTH,)) - 2}


CHANNELS = ("u", (_WIDTH,))
SELECTIVE = sample(CHANNELS, ("delta", (_WIDTH,)), ("B", (_SIZE,)), ("C", (_SIZE,)), positive=("delta",))
GATED = sample(
    CHANNELS, ("recurrence_gate", (_WIDTH,)), ("input_gate", (_WIDTH,)), gates=("recurrence_gate", "input_gate")
)
_HEADED = (("x", (_HEADS, 3)), ("delta", (_HEADS,)), ("B", (1, _SIZE)), ("C", (1, _SIZE)))
HEADED = sample(*_HEADED, positive=("delta",))
TRAPEZOID = sample(*_HEADED, ("trapezoid", (_HEADS,)), positive=("delta",), gates=("trapezoid",))
