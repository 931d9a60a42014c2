"""Selective state-space layers: Mamba, Mamba-2 and Griffin's recurrent block with RG-LRU, with the initial weights of their papers.

Each is the whole mixer of its paper: projections in, a short causal convolution, the recurrence, a gate, a projection out.
Parameters that want no weight decay, by the ends of their names: A_log, D, step/bias, step_bias, Lambda.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax import ssm
from effattn_jax._products import scaled_axis
from effattn_jax.nn.convolution import ShortConvolution
from effattn_jax.nn.products import dense_product
from effattn_jax.nn.recurrent import carried_over
from effattn_jax.nn.state_mixer import StateMixer
from effattn_jax.nn.state_space import STEPS


def step_bias(rng, shape, dtype):
    """softplus(bias) is log-uniform between `STEPS`."""
    log_step = jax.random.uniform(rng, shape, minval=jnp.log(STEPS[0]), maxval=jnp.log(STEPS[1]))
    step = jnp.exp(log_step)
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)


class Selective(StateMixer):
    """Base of the layers of this file: what their branches share.

    Attributes:
      conv_width: w of the short convolution.
      The others: see `SequenceMixer`.
    """

    conv_width: int = 4

    def _convolved(self, x, segment_ids, state, prefix):
        """The short convolution with a bias, and its state."""
        module = self._convolution(x.shape[-1], name=prefix + "convolution")
        y, after = module(
            x, segment_ids=segment_ids, state=None if state is None else state.hidden[0], return_state=True
        )
        bias = self.param(prefix + "convolution_bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return y + bias.astype(y.dtype)[None, None], after

    def _convolution(self, width, **options):
        return ShortConvolution(width, self.conv_width, True, self.dtype, self.param_dtype, **options)

    def _wide(self, name, init, *shape):
        """A parameter of the recurrence, float32 at least."""
        return self.param(name, init, shape, self.param_dtype).astype(jnp.promote_types(self.param_dtype, jnp.float32))

    @staticmethod
    def _initial(state, segment_ids):
        return None if state is None else carried_over(state.hidden[1], state.segment_id, segment_ids)

    @nn.nowrap
    def _hidden(self, batch):
        channels, state = self._sizes()
        convolution = self._convolution(channels, parent=None).init_state(batch, 0)
        return convolution, jax.tree.map(lambda shape: jnp.zeros((batch, *shape)), state, is_leaf=_is_shape)

    @nn.nowrap
    def _sizes(self) -> tuple[int, Any]:
        """Channels of the convolution, and the shape (or a pytree of shapes) of the recurrence's state."""
        raise NotImplementedError


def _is_shape(x: Any) -> bool:
    return type(x) is tuple


class Mamba(Selective):
    """Mamba's block, (B, T, D) -> (B, T, D): y = (selective_scan(silu(conv(x))) * silu(z)) W_out, (x, z) = input W_in.

    Attributes:
      expand: E / D, the inner width.
      state_size: P, 16 a channel when None.
      The others: see `Selective`.

    Cost: 6 E D + 6 E P + 2 w E + 2 E (2 P + 2 D / 16) operations a token; state E (P + w - 1). Source: arXiv:2312.00752.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(Mamba(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    expand: int = 2

    def _branch(self, x, segment_ids, state, prefix):
        inner, size, rank = self._inner, self._size, self._rank
        u, z = jnp.split(self._dense(2 * inner, prefix + "in")(x), 2, axis=-1)
        u, convolution = self._convolved(u, segment_ids, state, prefix)
        u = nn.silu(u)
        low, B, C = jnp.split(self._dense(rank + 2 * size, prefix + "select")(u), (rank, rank + size), axis=-1)
        bound = nn.initializers.uniform(2 * rank**-0.5)
        step = nn.Dense(
            inner, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dense_product, name=prefix + "step",
            kernel_init=lambda *a: bound(*a) - rank**-0.5, bias_init=step_bias,
        )  # fmt: skip
        delta = self.rate * nn.softplus(step(low).astype(jnp.promote_types(self.dtype, jnp.float32)))
        log = jnp.log(jnp.arange(1.0, size + 1))
        A_log = self._wide(prefix + "A_log", lambda _, shape, d: jnp.broadcast_to(log, shape).astype(d), inner, size)
        D = self._wide(prefix + "D", nn.initializers.ones, inner)
        y, hidden = ssm.selective_scan(
            u, delta, -jnp.exp(A_log), B, C, D, initial_state=self._initial(state, segment_ids), segment_ids=segment_ids,
            return_state=True, chunk_size=self.chunk_size,
        )  # fmt: skip
        return self._dense(self.width, prefix + "out", self.output_scale)(y * nn.silu(z)), (convolution, hidden)

    @property
    def _inner(self) -> int:
        return self.expand * self.width

    @property
    def _size(self) -> int:
        return 16 if self.state_size is None else self.state_size

    @property
    def _rank(self) -> int:
        return -(-self.width // 16)

    @nn.nowrap
    def _sizes(self):
        return self._inner, (self._inner, self._size)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The four projections, the convolution, and six operations a state."""
        inner, projections = self._inner, 3 * self.width + 2 * self._rank + 2 * self._size
        return self._directions * (2 * inner * (projections + self.conv_width) + 6 * inner * self._size)


class Mamba2(Selective):
    """Mamba-2's block, (B, T, D) -> (B, T, D): state-space duality with one decay a head, gate and RMS norm of each
    group, all projections of the input.

    Attributes:
      expand: E / D, the inner width; heads divide it.
      groups: K, of B and C.
      trapezoid: Mamba-3's rule (`ssm.mamba3_trapezoid`) with a gate a head.
      state_size: P, 64 a head when None.
      The others: see `Selective`.

    Cost: 2 D (3 E + 2 K P + N) + 6 E P operations a token; state E P + w (E + 2 K P). Source: arXiv:2405.21060.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(Mamba2(4, heads=2).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    expand: int = 2
    groups: int = 1
    trapezoid: bool = False

    def _branch(self, x, segment_ids, state, prefix):
        inner, size, heads = self._inner, self._size, self.heads
        if inner % heads or heads % self.groups:
            raise ValueError(f"heads must divide {inner} and be a multiple of groups={self.groups}; got {heads}")
        features = (inner, inner + 2 * self.groups * size, heads, *([heads] if self.trapezoid else []))
        cuts = [sum(features[: i + 1]) for i in range(len(features) - 1)]
        z, u, step, *gate = jnp.split(self._dense(sum(features), prefix + "in")(x), cuts, axis=-1)
        u, convolution = self._convolved(u, segment_ids, state, prefix)
        u, B, C = jnp.split(nn.silu(u), (inner, inner + self.groups * size), axis=-1)
        u = u.reshape(*u.shape[:2], heads, inner // heads)
        B, C = (y.reshape(*y.shape[:2], self.groups, size) for y in (B, C))
        bias = self._wide(prefix + "step_bias", step_bias, heads)
        delta = self.rate * nn.softplus(step.astype(bias.dtype) + bias[None, None])
        A = -jnp.exp(self._wide(prefix + "A_log", _log_of_uniform, heads))
        D = self._wide(prefix + "D", nn.initializers.ones, heads)
        options = {
            "initial_state": self._initial(state, segment_ids), "segment_ids": segment_ids, "return_state": True,
            "chunk_size": self.chunk_size,
        }  # fmt: skip
        if self.trapezoid:
            own = nn.sigmoid(gate[0].astype(bias.dtype))
            y, hidden = ssm.mamba3_trapezoid(u, delta, A, B, C, own, D, **options)
        else:
            y, hidden = ssm.state_space_duality(u, delta, A, B, C, D, **options)
        y = y.reshape(*y.shape[:2], inner) * nn.silu(z)
        y = y.reshape(*y.shape[:2], self.groups, inner // self.groups)
        y = nn.RMSNorm(epsilon=1e-5, dtype=self.dtype, use_scale=False, name=prefix + "norm")(y)
        scale = self.param(prefix + "norm_scale", nn.initializers.ones, (inner,), self.param_dtype)
        y = scaled_axis(scale.astype(y.dtype), y.reshape(*y.shape[:2], inner))
        return self._dense(self.width, prefix + "out", self.output_scale)(y), (convolution, hidden)

    @property
    def _inner(self) -> int:
        return self.expand * self.width

    @property
    def _size(self) -> int:
        return 64 if self.state_size is None else self.state_size

    @nn.nowrap
    def _sizes(self):
        head = self._inner // self.heads
        state = (self.heads, self._size, head)
        channels = self._inner + 2 * self.groups * self._size
        return channels, ssm.TrapezoidState(state, state[:2], (self.heads, head)) if self.trapezoid else state

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Both projections, the convolution, and six operations a state."""
        channels = self._inner + 2 * self.groups * self._size
        gates = self.heads * (2 if self.trapezoid else 1)
        projections = 2 * self.width * (2 * self._inner + channels + gates)
        return self._directions * (projections + 2 * self.conv_width * channels + 6 * self._inner * self._size)


def _log_of_uniform(rng, shape, dtype):
    """log A, A uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(rng, shape, minval=1.0, maxval=16.0)).astype(dtype)


class RGLRU(Selective):
    """Griffin's recurrent block, (B, T, D) -> (B, T, D): (rg_lru(conv(x W_in)) * gelu(x W_gate)) W_out.

    Attributes:
      expand: E / D, the inner width; heads divide it, and are the blocks of the gates' block-diagonal kernels.
      sharpness: c.
      The others: see `Selective`; state_size does not apply.

    Cost: 6 D E + 4 E^2 / N + 2 w E operations a token; state w E. Source: arXiv:2402.19427.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(RGLRU(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    expand: int = 1
    sharpness: float = 8.0

    @nn.nowrap
    def own_options(self) -> dict[str, str]:
        """See `SequenceMixer`."""
        return {name: place for name, place in super().own_options().items() if name != "state_size"}

    def _branch(self, x, segment_ids, state, prefix):
        inner = self.expand * self.width
        if inner % self.heads:
            raise ValueError(f"heads must divide the inner width {inner}; got {self.heads}")
        gate = nn.gelu(self._dense(inner, prefix + "gate")(x))
        u, convolution = self._convolved(self._dense(inner, prefix + "in")(x), segment_ids, state, prefix)
        gates = [self._gate(u, prefix + name) for name in ("recurrence_gate", "input_gate")]
        Lambda = self._wide(prefix + "Lambda", self._poles, inner)
        step = None if self.rate == 1 else self.rate
        h, hidden = ssm.rg_lru(
            u, *gates, Lambda, sharpness=self.sharpness, step=step, initial_state=self._initial(state, segment_ids),
            segment_ids=segment_ids, return_state=True,
        )  # fmt: skip
        return self._dense(self.width, prefix + "out", self.output_scale)(h * gate), (convolution, hidden)

    def _gate(self, u, name):
        """sigmoid of a block-diagonal product, one block a head."""
        size = u.shape[-1] // self.heads
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=(0,))
        kernel = self.param(name + "_kernel", init, (self.heads, size, size), self.param_dtype)
        bias = self._wide(name + "_bias", nn.initializers.zeros, u.shape[-1])
        blocks = u.reshape(*u.shape[:2], self.heads, size)
        y = jnp.einsum("btni,nij->btnj", blocks, kernel.astype(u.dtype)).reshape(u.shape)
        return nn.sigmoid(y.astype(bias.dtype) + bias[None, None])

    def _poles(self, rng, shape, dtype):
        """a at r = 1 lies in [0.9, 0.999], uniform in area."""
        square = jax.random.uniform(rng, shape, minval=0.9**2, maxval=0.999**2)
        return jnp.log(jnp.expm1(-0.5 * jnp.log(square) / self.sharpness)).astype(dtype)

    @nn.nowrap
    def _sizes(self):
        inner = self.expand * self.width
        return inner, (inner,)

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """The projections, both gates, the convolution, and five operations a state."""
        inner = self.expand * self.width
        gates = 4 * inner**2 // self.heads
        return self._directions * (6 * self.width * inner + gates + (2 * self.conv_width + 5) * inner)
