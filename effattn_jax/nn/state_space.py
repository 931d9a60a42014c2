"""Time-invariant state-space layers: S4, S4D, S5 and LRU, with the initial weights of their papers.

y = a * sigmoid(b),  (a, b) = gelu(ssm(x)) W                the bidirectional form adds a second system over reversed time before the gelu

Parameters that want a lower learning rate and no weight decay, by the ends of their names: log_step, log_real, imag, P, B (S4, S5), nu_log,
theta_log, gamma_log (LRU). Complex ones are stored as real arrays with a last axis of two.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import ssm
from effattn_jax.nn.recurrent import carried_over
from effattn_jax.nn.state_mixer import StateMixer

STEPS = (1e-3, 1e-1)  # the steps at the start are log-uniform between these


def log_uniform(low: float, high: float):
    """Initialiser: the logarithm of a number log-uniform in [low, high]."""

    def init(rng, shape, dtype):
        return jax.random.uniform(rng, shape, dtype, np.log(low), np.log(high))

    return init


def fixed(value: Any):
    """Initialiser: this array."""
    return lambda _, shape, dtype: jnp.broadcast_to(jnp.asarray(value), shape).astype(dtype)


def pair(x: np.ndarray) -> np.ndarray:
    """A complex array as a real one with a last axis of two."""
    return np.stack([x.real, x.imag], axis=-1)


def as_complex(x: jax.Array) -> jax.Array:
    """The inverse of `pair`, complex64 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.complex(x[..., 0], x[..., 1])


class TimeInvariant(StateMixer):
    """Base of the layers of this file: a system, gelu, and a gated projection.

    Attributes:
      See `SequenceMixer`.
    """

    def _branch(self, x, segment_ids, state, prefix):
        initial = None if state is None else carried_over(state.hidden, state.segment_id, segment_ids)
        y, hidden = self._system(prefix, x, initial, segment_ids)
        y = nn.gelu(y.astype(self.dtype))
        return nn.glu(self._dense(2 * self.width, prefix + "out", self.output_scale)(y)), hidden

    def _weight(self, name, init, *shape):
        return self.param(name, init, shape, self.param_dtype).astype(jnp.promote_types(self.param_dtype, jnp.float32))

    def _system(self, prefix, u, initial, segment_ids):
        raise NotImplementedError

    @property
    def _size(self) -> int:
        """Conjugate pairs."""
        return max(1, (64 if self.state_size is None else self.state_size) // 2)

    @nn.nowrap
    def _hidden(self, batch):
        return jnp.zeros((batch, self.width, self._size), jnp.complex64)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The gated projection, and 16 operations a conjugate pair of each channel."""
        return self._directions * (4 * self.width**2 + 16 * self.width * self._size)


class S4D(TimeInvariant):
    """Diagonal state-space layer (S4D), (B, T, D) -> (B, T, D): one system a channel, zero-order hold.

    Attributes:
      init: of the poles, a kind of `ssm.diagonal_init`.
      state_size: N, 64 real states a channel when None.
      The others: see `SequenceMixer`.

    Cost: 4 D^2 + 8 D N operations a token; state D N numbers. Source: arXiv:2206.11893.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(S4D(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    init_poles: str = "legs"

    def _system(self, prefix, u, initial, segment_ids):
        shape = (self.width, self._size)
        poles = ssm.diagonal_init(self.init_poles, 2 * self._size)
        log_real = self._weight(prefix + "log_real", fixed(np.log(-poles.real)), *shape)
        imag = self._weight(prefix + "imag", fixed(poles.imag), *shape)
        C = as_complex(self._weight(prefix + "C", nn.initializers.normal(0.5**0.5), *shape, 2))
        D = self._weight(prefix + "D", nn.initializers.normal(1.0), self.width)
        step = self.rate * jnp.exp(self._weight(prefix + "log_step", log_uniform(*STEPS), self.width))
        Lambda = jax.lax.complex(-jnp.exp(log_real), imag)
        return ssm.diagonal_ssm(
            u, Lambda, jnp.ones_like(C), C, D, step, initial_state=initial, segment_ids=segment_ids, return_state=True,
            chunk_size=self.chunk_size,
        )  # fmt: skip


class S4(TimeInvariant):
    """Diagonal plus low-rank state-space layer (S4-LegS), (B, T, D) -> (B, T, D): one system a channel, bilinear.

    Rows without segments or a state are a convolution by FFT, which is causal but for rounding: a later NaN spoils all of its row.

    Attributes:
      state_size: N, 64 real states a channel when None.
      The others: see `SequenceMixer`.

    Cost: 4 D^2 + 8 D N operations a token; state D N numbers. Source: arXiv:2111.00396.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(S4(4, state_size=4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    def _system(self, prefix, u, initial, segment_ids):
        shape = (self.width, self._size)
        Lambda, P, B, _ = (np.asarray(x) for x in ssm.legs_dplr(2 * self._size))
        log_real = self._weight(prefix + "log_real", fixed(np.log(-Lambda.real)), *shape)
        imag = self._weight(prefix + "imag", fixed(Lambda.imag), *shape)
        P, B = (as_complex(self._weight(prefix + n, fixed(pair(x)), *shape, 2)) for n, x in (("P", P), ("B", B)))
        C = as_complex(self._weight(prefix + "C", nn.initializers.normal(0.5**0.5), *shape, 2))
        D = self._weight(prefix + "D", nn.initializers.normal(1.0), self.width)
        step = self.rate * jnp.exp(self._weight(prefix + "log_step", log_uniform(*STEPS), self.width))
        Lambda = jax.lax.complex(-jnp.exp(log_real), imag)
        stateful = initial is not None  # a returned state costs the recurrence, step by step
        mode = "recurrence" if stateful or segment_ids is not None or u.shape[1] == 1 else "convolution"
        out = ssm.dplr_ssm(
            u, Lambda, P, B, C, D, step, mode=mode, initial_state=initial, segment_ids=segment_ids, return_state=stateful
        )  # fmt: skip
        return out if stateful else (out, None)


class S5(TimeInvariant):
    """State-space layer whose channels share their states (S5), (B, T, D) -> (B, T, D): poles of HiPPO-LegS in blocks, a step a state.

    Attributes:
      blocks: diagonal blocks of LegS among the states; they divide their number.
      state_size: N, as many as the width when None.
      The others: see `SequenceMixer`.

    Cost: 4 D^2 + 4 D N operations a token; state N numbers. Source: arXiv:2208.04933.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(S5(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    blocks: int = 1

    def _system(self, prefix, u, initial, segment_ids):
        size, width = self._size, self.width
        if size % self.blocks:
            raise ValueError(f"blocks must divide the {size} pairs of states; got {self.blocks}")
        Lambda, _, _, V = (np.asarray(x) for x in ssm.legs_dplr(2 * size // self.blocks))
        V = np.kron(np.eye(self.blocks), V)
        Lambda = np.tile(Lambda, self.blocks)

        def enter(rng, shape, dtype):
            real = jax.random.normal(rng, (2 * size, width)) / width**0.5
            return jnp.stack([V.real.T @ real, -V.imag.T @ real], axis=-1).astype(dtype)

        def leave(rng, shape, dtype):
            real = jax.random.normal(rng, (width, 2 * size)) / (2 * size) ** 0.5
            return jnp.stack([real @ V.real, real @ V.imag], axis=-1).astype(dtype)

        log_real = self._weight(prefix + "log_real", fixed(np.log(-Lambda.real)), size)
        imag = self._weight(prefix + "imag", fixed(Lambda.imag), size)
        B = as_complex(self._weight(prefix + "B", enter, size, width, 2))
        C = as_complex(self._weight(prefix + "C", leave, width, size, 2))
        D = self._weight(prefix + "D", nn.initializers.normal(1.0), width)
        step = self.rate * jnp.exp(self._weight(prefix + "log_step", log_uniform(*STEPS), size))
        return ssm.s5_ssm(
            u, jax.lax.complex(-jnp.exp(log_real), imag), B, C, D, step, initial_state=initial, segment_ids=segment_ids,
            return_state=True,
        )  # fmt: skip

    @property
    def _size(self) -> int:
        return max(1, (self.width if self.state_size is None else self.state_size) // 2)

    @nn.nowrap
    def _hidden(self, batch):
        return jnp.zeros((batch, self._size), jnp.complex64)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The gated projection, the products with B and C, and 8 operations a pair."""
        return self._directions * (4 * self.width**2 + 8 * self.width * self._size + 8 * self._size)


class LRU(TimeInvariant):
    """Linear recurrent unit, (B, T, D) -> (B, T, D): P complex states on a ring, initialised as in its paper.

    Attributes:
      radii: |lambda| at the start lies between these, uniform in area.
      max_phase: its angle lies between 0 and this.
      state_size: 2 P, as many as the width when None.
      The others: see `SequenceMixer`.

    Cost: 4 D^2 + 8 D P operations a token; state P complex numbers. Source: arXiv:2303.06349.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(LRU(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    radii: tuple[float, float] = (0.9, 0.999)
    max_phase: float = 6.28

    def _system(self, prefix, u, initial, segment_ids):
        size, width, (low, high) = self._size, self.width, self.radii

        def ring(rng, shape, dtype):
            square = jax.random.uniform(rng, shape, minval=low**2, maxval=high**2)
            return jnp.log(-0.5 * jnp.log(square)).astype(dtype)

        def phases(rng, shape, dtype):
            return jnp.log(self.max_phase * jax.random.uniform(rng, shape, minval=1e-6)).astype(dtype)

        nu_log = self._weight(prefix + "nu_log", ring, size)
        theta_log = self._weight(prefix + "theta_log", phases, size)
        start = 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu_log)))  # gamma = sqrt(1 - |lambda|^2)
        gamma_log = self._weight(prefix + "gamma_log", lambda *_: start, size)
        B = as_complex(self._weight(prefix + "B", nn.initializers.normal((2 * width) ** -0.5), size, width, 2))
        C = as_complex(self._weight(prefix + "C", nn.initializers.normal(size**-0.5), width, size, 2))
        D = self._weight(prefix + "D", nn.initializers.normal(1.0), width)
        step = None if self.rate == 1 else self.rate
        return ssm.lru(
            u, nu_log, theta_log, gamma_log, B, C, D, step=step, initial_state=initial, segment_ids=segment_ids, return_state=True
        )  # fmt: skip

    @property
    def _size(self) -> int:
        return max(1, (self.width if self.state_size is None else self.state_size) // 2)

    @nn.nowrap
    def _hidden(self, batch):
        return jnp.zeros((batch, self._size), jnp.complex64)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The gated projection, the products with B and C, and 8 operations a state."""
        return self._directions * (4 * self.width**2 + 8 * self.width * self._size + 8 * self._size)
