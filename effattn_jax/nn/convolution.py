"""Short causal convolution: a token sees its last few neighbours before the mixer does.

y_t = sum_{j < w} kernel_j * x_{t-j}, each feature on its own; state: the last w - 1 inputs.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.nn.mixer import check_inputs


class ConvolutionState(NamedTuple):
    """The last w - 1 inputs (B, w - 1, D), 0 where there were none, and the segment of each (B, w - 1)."""

    inputs: jax.Array
    segment_ids: jax.Array


class ShortConvolution(nn.Module):
    """Depthwise convolution over time, (B, T, D) -> (B, T, D), starting close to the identity.

    y_t = sum_{j < w} kernel_j * x_{t-j}; bidirectional: x_{t+w//2-j}. Padding and other segments count as zeros.

    Attributes:
      width: D.
      conv_width: w, how many tokens are seen, the token itself included.
      causal: False centres the kernel, and there is no state.
      dtype, param_dtype: as in `SequenceMixer`.

    Cost: 2 w D operations a token; state (w - 1) D numbers.

    >>> import jax, jax.numpy as jnp
    >>> ShortConvolution(4, 3).init_with_output(jax.random.key(0), jnp.ones((1, 5, 4)))[0].shape
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
        before = self.init_state(x.shape[0], 0, x.dtype) if state is None else state
        ids = self._ids(x, segment_ids, state)
        x_all, ids_all = jnp.concatenate([before.inputs, x], axis=1), jnp.concatenate([before.segment_ids, ids], axis=1)
        after = ConvolutionState(x_all[:, x.shape[1] :], ids_all[:, x.shape[1] :])
        y = self._convolve(
            x_all, ids_all, ids, kernel_WxD.astype(self.dtype), segment_ids is not None or state is not None
        )
        return (y, after) if return_state else y

    def _convolve(self, x_all, ids_all, ids, kernel_WxD, has_segments):
        length, ahead = ids.shape[1], 0 if self.causal else self.conv_width // 2
        x_all, ids_all = (jnp.pad(a, [(0, 0), (0, ahead)] + [(0, 0)] * (a.ndim - 2)) for a in (x_all, ids_all))
        y = 0
        for lag in range(self.conv_width):
            start = self.conv_width - 1 + ahead - lag
            shifted = x_all[:, start : start + length]
            if has_segments:
                shifted = jnp.where((ids_all[:, start : start + length] == ids)[..., None], shifted, 0)
            y += shifted * kernel_WxD[lag][None, None]
        return y

    def _ids(self, x, segment_ids, state):
        if segment_ids is not None:
            return segment_ids.astype(jnp.int32)
        if state is None or self.conv_width == 1:
            return jnp.zeros(x.shape[:2], jnp.int32)
        return jnp.broadcast_to(state.segment_ids[:, -1:], x.shape[:2])

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
