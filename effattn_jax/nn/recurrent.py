"""Elementwise gated recurrence (minGRU): a GRU whose gates see the input only, so that it runs as a scan.

h_t = (1 - z_t) h_{t-1} + z_t c_t,   z_t = sigmoid(x_t W_z),   c_t = x_t W_c
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax import recurrence
from effattn_jax.nn.mixer import SequenceMixer, check_inputs


class RecurrentState(NamedTuple):
    """The hidden state (B, D), float32, and the segment it belongs to (B,)."""

    hidden: jax.Array
    segment_id: jax.Array


class MinGRU(SequenceMixer):
    """minGRU, (B, T, D) -> (B, T, D): h_t = (1 - z_t) h_{t-1} + z_t c_t, y_t = h_t W_out.

    The bidirectional form has a second set of gates for the reversed pass. Heads, positions, window and chunk size do
    not apply.

    Cost: 6 D^2 operations a token in matrix products; state D numbers. Source: "Were RNNs all we needed?", arXiv
      2410.01201.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(MinGRU(4).init_with_output)(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
    (1, 3, 4)
    """

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False):
        """See `SequenceMixer`."""
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        initial = None if state is None else carried_over(state.hidden, state.segment_id, segment_ids)
        hidden, last = self._scan(x_BxTxD, mask, segment_ids, initial, "forward")
        if not self.causal:
            hidden = jnp.concatenate([hidden, self._scan(x_BxTxD, mask, segment_ids, None, "backward")[0]], axis=-1)
        y = self._dense(self.width, "out", self.output_scale)(hidden.astype(self.dtype))
        if not return_state:
            return y
        return y, RecurrentState(last, last_segment(x_BxTxD, segment_ids, state))

    def _scan(self, x_BxTxD, mask, segment_ids, initial, direction):
        prefix = "" if direction == "forward" else "backward_"
        gate, candidate = (self._dense(self.width, prefix + name)(x_BxTxD) for name in ("gate", "candidate"))
        update = nn.sigmoid(gate.astype(jnp.promote_types(gate.dtype, jnp.float32)))
        update = update if mask is None else jnp.where(mask[..., None], update, 0)  # 0 keeps the state as it is
        inputs = update * (candidate if mask is None else jnp.where(mask[..., None], candidate, 0))
        return recurrence.diagonal_recurrence(
            1 - update,
            inputs,
            initial_state=initial,
            segment_ids=segment_ids,
            reverse=direction == "backward",
            return_state=True,
        )

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> RecurrentState:
        """Zeros; `capacity` and `dtype` change nothing, the state is float32."""
        return RecurrentState(jnp.zeros((batch, self.width), jnp.float32), jnp.zeros((batch,), jnp.int32))

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Projections (four and a wider output when bidirectional) and the recurrence's three operations a feature."""
        directions = 1 if self.causal else 2
        return directions * (6 * self.width**2 + 5 * self.width)


def carried_over(hidden, segment_id, segment_ids):
    """The state (B, ...) that a call starts from: zeros where its first token begins another segment."""
    if segment_ids is None or segment_ids.shape[1] == 0:
        return hidden
    same = segment_ids[:, 0] == segment_id
    return jax.tree.map(lambda h: jnp.where(same.reshape(-1, *(1,) * (h.ndim - 1)), h, 0), hidden)


def last_segment(x, segment_ids, state):
    """The id of the segment in progress after a call, (B,) int32."""
    if segment_ids is not None and segment_ids.shape[1]:
        return segment_ids[:, -1].astype(jnp.int32)
    return jnp.zeros(x.shape[:1], jnp.int32) if state is None else state.segment_id
