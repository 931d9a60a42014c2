"""Time, compile time and memory of the recurrences and state-space models against the ways in which they are written otherwise.

    python -m benchmarks.state_spaces [--lengths 1024 4096 16384 65536 262144 1048576] [--groups ...] [--rounds 5] [--name NAME]

Against `lax.scan` step by step, `lax.associative_scan` over all states, and a convolution by FFT with the kernel summed term by term. Rules as in
:mod:`benchmarks.attention`: contenders in turn, medians, and what needs too much memory or time is left out and named.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import tyro
from jax import lax

from benchmarks.attention import contest
from benchmarks.peers import Contender, compiled
from effattn_jax.recurrence import diagonal_recurrence, fft_convolution
from effattn_jax.ssm import diagonal_init, diagonal_ssm, s5_ssm, selective_scan, state_space_duality

SHAPE = {"channels": 256, "states": 64, "selective states": 16, "heads": 8, "head_dim": 64, "scanned": 8}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144, 1048576)
    """Sequence lengths."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    memory_limit: float = 6.0
    """GiB of temporaries above which a program is not run."""
    patience: float = 10.0
    """Seconds one pass may take; a contender expected to exceed it is left out."""
    groups: tuple[str, ...] = ()
    """Only these groups; empty is all."""
    name: str = "state_spaces"
    """Name of the result files."""
    dtype: str = "float32"
    """Input dtype; states are complex64 where a model has complex ones."""


def combine(first, second):
    """The affine map of two steps."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def associative(decay: jax.Array, inputs: jax.Array) -> jax.Array:
    """h_t = decay_t h_{t-1} + inputs_t over axis 1."""
    return lax.associative_scan(combine, (decay, inputs), axis=1)[1]


def stepwise(decay: jax.Array, inputs: jax.Array) -> jax.Array:
    """The same by lax.scan."""

    def step(h, ax):
        h = ax[0] * h + ax[1]
        return h, h

    over_time = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(inputs, 1, 0))
    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(inputs[:, 0]), over_time)[1], 0, 1)


def by_steps(step: Callable, start: jax.Array, *inputs: jax.Array) -> jax.Array:
    """A model as one writes it token by token: step(state, inputs at t) -> (state, output at t); inputs (B, T, ...)."""
    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in inputs)
    return jnp.moveaxis(lax.scan(step, start, over_time)[1], 0, 1)


def held(Lambda: jax.Array, B: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zero-order hold of a diagonal system."""
    decay = jnp.exp(Lambda * step)
    return decay, B * (decay - 1) / Lambda


def s4d_steps(u, Lambda, B, C, D, step):
    """S4D token by token."""
    decay, drive = held(Lambda, B, step[:, None])

    def one(x, at):
        x = decay * x + drive * at[0][..., None]
        return x, 2 * jnp.real((C * x).sum(-1)) + D * at[0]

    return by_steps(one, jnp.zeros((u.shape[0], *Lambda.shape), Lambda.dtype), u)


def s4d_associative(u, Lambda, B, C, D, step):
    """S4D with every state formed."""
    decay, drive = held(Lambda, B, step[:, None])
    inputs = drive * u[..., None]
    states = associative(jnp.broadcast_to(decay, inputs.shape), inputs)
    return 2 * jnp.real((C * states).sum(-1)) + D * u


def s4d_fft(u, Lambda, B, C, D, step):
    """S4D as a convolution whose kernel is a sum over a Vandermonde matrix of (D, P, T)."""
    decay_log, (_, drive) = Lambda * step[:, None], held(Lambda, B, step[:, None])
    powers = jnp.exp(decay_log[..., None] * jnp.arange(u.shape[1]))
    kernel = 2 * jnp.real(jnp.einsum("dp,dpt->td", C * drive, powers))
    return fft_convolution(u, kernel) + D * u


def s5_states(recurrence: Callable, u, Lambda, B, C, D, step):
    """S5 over a recurrence of all its states."""
    decay = jnp.exp(Lambda * step)
    inputs = jnp.einsum("btd,pd->btp", u, B * ((decay - 1) / Lambda)[:, None])
    states = recurrence(jnp.broadcast_to(decay, inputs.shape), inputs)
    return 2 * jnp.real(jnp.einsum("btp,dp->btd", states, C)) + D * u


def selective_steps(u, delta, A, B, C, D):
    """Mamba's recurrence token by token."""

    def one(x, at):
        u, delta, B, C = at
        x = jnp.exp(delta[..., None] * A) * x + (delta * u)[..., None] * B[:, None]
        return x, (x * C[:, None]).sum(-1) + D * u

    return by_steps(one, jnp.zeros((u.shape[0], *A.shape), u.dtype), u, delta, B, C)


def selective_associative(u, delta, A, B, C, D):
    """Mamba's recurrence with every state formed."""
    states = associative(jnp.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
    return (states * C[:, :, None]).sum(-1) + D * u


def duality_steps(x, delta, A, B, C, D):
    """Mamba-2's recurrence token by token."""

    def one(state, at):
        x, delta, B, C = at
        new = (delta[..., None] * x)[..., None] * B[:, :, None]
        state = jnp.exp(delta * A)[..., None, None] * state + new
        return state, (state * C[:, :, None]).sum(-1) + D[:, None] * x

    return by_steps(one, jnp.zeros((*x[:, 0].shape, B.shape[-1]), x.dtype), x, delta, B, C)


def scanned(key: jax.Array, length: int) -> tuple:
    """Decays inside the unit circle, and inputs."""
    phase, real, imaginary = jax.random.normal(key, (3, 1, length, SHAPE["scanned"]))
    return 0.99 * jnp.exp(1j * phase), real + 1j * imaginary


def diagonal(key: jax.Array, length: int) -> tuple:
    """u, and S4D-Lin's system for each channel."""
    channels, half = SHAPE["channels"], SHAPE["states"] // 2
    u, real, imaginary = jax.random.normal(key, (1, length, channels)), *jax.random.normal(key, (2, channels, half))
    Lambda = jnp.broadcast_to(jnp.asarray(diagonal_init("lin", 2 * half), jnp.complex64), (channels, half))
    return (
        u,
        Lambda,
        jnp.ones_like(Lambda),
        real + 1j * imaginary,
        jnp.ones(channels),
        jnp.geomspace(1e-3, 1e-1, channels),
    )


def shared(key: jax.Array, length: int) -> tuple:
    """u, and one system for all channels."""
    channels, states = SHAPE["channels"], SHAPE["states"]
    u, maps = jax.random.normal(key, (1, length, channels)), jax.random.normal(key, (4, states, channels)) / channels
    Lambda = jnp.asarray(diagonal_init("lin", 2 * states), jnp.complex64)
    return u, Lambda, maps[0] + 1j * maps[1], (maps[2] + 1j * maps[3]).T, jnp.ones(channels), jnp.float32(1e-2)


def selective(key: jax.Array, length: int) -> tuple:
    """u, delta, A, B, C, D of Mamba's shape."""
    channels, states = SHAPE["channels"], SHAPE["selective states"]
    u, delta = jax.random.normal(key, (2, 1, length, channels))
    B, C = jax.random.normal(key, (2, 1, length, states))
    A = -jnp.broadcast_to(jnp.arange(1.0, states + 1), (channels, states))
    return u, 0.1 * jax.nn.softplus(delta), A, B, C, jnp.ones(channels)


def headed(key: jax.Array, length: int) -> tuple:
    """x, delta, A, B, C, D of Mamba-2's shape, one B and C for all heads."""
    heads, width, states = SHAPE["heads"], SHAPE["head_dim"], SHAPE["states"]
    x, delta = jax.random.normal(key, (1, length, heads, width)), jax.random.normal(key, (1, length, heads))
    B, C = jax.random.normal(key, (2, 1, length, 1, states)) / states**0.5
    return x, 0.1 * jax.nn.softplus(delta), -jnp.arange(1.0, heads + 1), B, C, jnp.ones(heads)


GROUPS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "scan, 8 complex": (
        scanned,
        {"effattn_jax": diagonal_recurrence, "lax.scan": stepwise, "lax.associative_scan": associative},
    ),
    "S4D": (
        diagonal,
        {
            "effattn_jax": diagonal_ssm,
            "ours, mode=convolution": partial(diagonal_ssm, mode="convolution"),
            "lax.scan": s4d_steps,
            "lax.associative_scan": s4d_associative,
            "FFT": s4d_fft,
        },
    ),
    "S5": (
        shared,
        {
            "effattn_jax": s5_ssm,
            "lax.scan": partial(s5_states, stepwise),
            "lax.associative_scan": partial(s5_states, associative),
        },
    ),
    "selective scan": (
        selective,
        {"effattn_jax": selective_scan, "lax.scan": selective_steps, "lax.associative_scan": selective_associative},
    ),
    "state-space duality": (headed, {"effattn_jax": state_space_duality, "lax.scan": duality_steps}),
}


def _contender(function: Callable, inputs: Callable, length: int) -> Contender:
    key = jax.random.key(0)
    arrays = inputs(key, length)
    shape = jax.eval_shape(function, *arrays)
    cotangent = jax.random.normal(key, shape.shape).astype(shape.dtype)
    return compiled(function, arrays, cotangent)


def contenders(settings: Settings) -> dict[str, dict[str, Callable[[int], Contender]]]:
    """By group: ours and the others, each a builder of a contender from a length."""
    return {
        group: {name: partial(_contender, function, inputs) for name, function in members.items()}
        for group, (inputs, members) in GROUPS.items()
    }


def main(settings: Settings) -> None:
    """The contest of the recurrences."""
    contest(settings, contenders(settings), SHAPE, f"batch 1, {SHAPE['channels']} channels, {SHAPE['states']} states")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
