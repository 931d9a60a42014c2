"""External attention as a mixer: a memory of key and value slots among the parameters.

q = x W_q;   y = external_attention(q, M_k, M_v) W_out
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from effattn_jax import attention
from effattn_jax.nn.mixer import SequenceMixer, check_inputs


class ExternalAttention(SequenceMixer):
    """External attention, (B, T, D) -> (B, T, D): tokens read a learned memory and meet in its normaliser only.

    Positions, window and chunk size do not apply.

    Attributes:
      slots: S, entries of the memory.
      The others: see `SequenceMixer`; kv_heads memories serve the heads.

    Raises:
      ValueError: heads that do not divide the width or the key heads.

    Cost: 4 D^2 + 4 S D operations a token; state S numbers a head. Source: arXiv 2105.02358.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(ExternalAttention(8, heads=2, slots=5).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 8)))[0].shape
    (1, 3, 8)
    """

    slots: int = 64

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False):
        """See `SequenceMixer`."""
        del positions
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        shape = (self.slots, self.kv_heads, self._head_dim)
        query = self._dense(self.heads * self._head_dim, "query")(x_BxTxD)
        key, value = (
            self.param(name, nn.initializers.normal(scale), shape, self.param_dtype)
            for name, scale in (("memory_key", self._head_dim**-0.5), ("memory_value", 1.0))
        )
        out = attention.external_attention(
            query.reshape(*x_BxTxD.shape[:2], self.heads, self._head_dim),
            key.astype(self.dtype),
            value.astype(self.dtype),
            mask=None if mask is None else mask[:, None, None, :],
            is_causal=self.causal,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=return_state,
        )
        out, *rest = out if return_state else (out,)
        y_BxTxD = self._dense(self.width, "out", self.output_scale)(out.reshape(*x_BxTxD.shape[:2], self.width))
        return (y_BxTxD, *rest) if rest else y_BxTxD

    @property
    def _head_dim(self):
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads must divide width and kv_heads must divide heads; got width={self.width}, heads={self.heads}, "
                f"kv_heads={self.kv_heads}"
            )
        return self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> attention.ExternalState:
        """Normalisers of no token; `capacity` and `dtype` change nothing, the state is float32."""
        nothing = jnp.full((batch, self.heads, self.slots), -jnp.inf, jnp.float32)
        return attention.ExternalState(nothing, jnp.zeros((batch,), jnp.int32))

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Two projections, and 4 H for each slot a head."""
        return 4 * self.width**2 + 4 * self.slots * self.width
