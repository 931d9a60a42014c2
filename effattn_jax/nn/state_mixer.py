"""What mixers with a state of fixed size share: padding, both directions, and segments across calls.

Padding is left out: real tokens are moved together, the causal branch runs, its outputs go back to where their tokens stood. Where a state
comes in or goes out, tokens are taken one at a time, and padding leaves the state as it is.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.nn.mixer import SequenceMixer, check_inputs
from effattn_jax.nn.recurrent import RecurrentState, last_segment


class StateMixer(SequenceMixer):
    """Base of the state-space layers: (B, T, D) -> (B, T, D) from a causal branch, run both ways where not causal.

    A subclass gives `_branch(x, segment_ids, state, prefix) -> (y, hidden)`, causal and without padding, `state` a `RecurrentState` or None and
    `prefix` that of its parameters' names; the outputs of both directions add up. And `_hidden(batch)`, the hidden state before the first token.
    """

    @nn.nowrap
    def own_options(self) -> dict[str, str]:
        """See `SequenceMixer`."""
        return super().own_options() | {"state_size": "field"}

    @nn.compact
    def __call__(self, x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False):
        """See `SequenceMixer`."""
        check_inputs(x_BxTxD, self.width, mask, segment_ids)
        self._check_state(state, return_state)
        x = x_BxTxD.astype(self.dtype)
        if return_state and state is None:
            state = self.init_state(x.shape[0], x.shape[1])
        if mask is not None and state is not None and x.shape[1]:
            y, state = self._one_by_one(jnp.where(mask[..., None], x, 0), mask, segment_ids, state)
            return (y, state) if return_state else y
        y, after = self._compacted(x, mask, segment_ids, state, "")
        if not self.causal:
            turned = (None if a is None else jnp.flip(a, 1) for a in (x, mask, segment_ids))
            y = y + jnp.flip(self._compacted(*turned, None, "backward_")[0], 1)
        return (y, after) if return_state else y

    def _compacted(self, x, mask, segment_ids, state, prefix):
        """The branch over real tokens alone; 0 at padding."""
        if mask is None:
            y, hidden = self._branch(x, segment_ids, state, prefix)
            return y, RecurrentState(hidden, last_segment(x, segment_ids, state))
        order = jnp.argsort(~mask, axis=1)
        x = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], axis=1)
        ids = None if segment_ids is None else jnp.take_along_axis(segment_ids, order, axis=1)
        y, _ = self._branch(x, ids, state, prefix)
        y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[..., None], axis=1)
        return jnp.where(mask[..., None], y, 0), None

    def _one_by_one(self, x, mask, segment_ids, state):
        """One token a step from a state; one of padding leaves it as it is."""
        ids = jnp.broadcast_to(state.segment_id[:, None], mask.shape) if segment_ids is None else segment_ids

        def step(module, state, inputs):
            x, real, ids = (a[:, None] for a in inputs)
            y, hidden = module._branch(x, ids, state, "")
            after = RecurrentState(hidden, ids[:, 0].astype(jnp.int32))
            keep = real[:, 0]

            def choose(new, old):
                return jnp.where(keep.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

            return jax.tree.map(choose, after, state), jnp.where(real[..., None], y, 0)[:, 0]

        if x.shape[1] == 1:
            state, y = step(self, state, jax.tree.map(lambda a: a[:, 0], (x, mask, ids)))
            return y[:, None], state
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        state, y = scan(self, state, (x, mask, ids))
        return y, state

    def _branch(self, x, segment_ids, state, prefix):
        raise NotImplementedError

    @nn.nowrap
    def _hidden(self, batch: int) -> Any:
        raise NotImplementedError

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> RecurrentState:
        """Zeros; `capacity` and `dtype` change nothing."""
        return RecurrentState(self._hidden(batch), jnp.zeros((batch,), jnp.int32))

    @property
    def _directions(self) -> int:
        return 1 if self.causal else 2
