"""Short causal convolution: a token sees its last few neighbours before the mixer does.

y_t = sum_{j < w} kernel_j * x_{t-j}, each feature on its own; state: the last w - 1 inputs.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax._products import scaled_axis
from effattn_jax.mixing import ConvolutionState
from effattn_jax.mixing.convolution import convolve
from effattn_jax.nn.mixer import check_inputs


class ShortConvolution(nn.Module):
    """Depthwise convolution over time, (B, T, D) -> (B, T, D), starting close to the identity.

    y_t = sum_{j < w} kernel_j * x_{t-j}; bidirectional: x_{t+w//2-j}. Other segments count as zeros, and padding is as if absent.

    Attributes:
      width: D.
      conv_width: w, how many tokens are seen, the token itself included.
      causal: False centres the kernel, and there is no state.
      dtype, param_dtype: as in `SequenceMixer`.

    Cost: 2 w D operations a token; state (w - 1) D numbers.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(ShortConvolution(4, 3).init_with_output)(jax.random.key(0), jnp.ones((1, 5, 4)))[0].shape
    (1, 5, 4)
    """

    width: int
    conv_width: int
    causal: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, state=None, return_state=False):
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        if not self.causal and (state is not None or return_state):
            raise ValueError("state and return_state need causal=True: a centred convolution has no state")
        kernel_WxD = self.param("kernel", self._init_kernel, (self.conv_width, self.width), self.param_dtype)
        x = x_BxTxD.astype(self.dtype)
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        kernel_WxD = kernel_WxD.astype(self.dtype)
        y, after = convolve(
            x,
            lambda lag, shifted, _: scaled_axis(kernel_WxD[lag], shifted),
            self.conv_width,
            is_causal=self.causal,
            mask=mask,
            segment_ids=segment_ids,
            state=state,
        )
        return (y, after) if return_state else y

    def _init_kernel(self, key, shape, dtype):
        noise = jax.random.normal(key, shape, dtype) * 0.1
        return noise.at[self.conv_width // 2 if not self.causal else 0].add(1)

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> ConvolutionState:
        """The state before the first token: zeros; `capacity` changes nothing."""
        shape = (batch, self.conv_width - 1)
        return ConvolutionState(jnp.zeros((*shape, self.width), dtype or self.dtype), jnp.zeros(shape, jnp.int32))

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """2 w D."""
        return 2 * self.conv_width * self.width
