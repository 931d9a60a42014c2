"""Sequence regressor: real numbers in, real numbers out at each step, from the past alone.

x = W_in inputs + positions;   x = block_l(x), causal;   y = W_out norm(x)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.models.causal import LanguageState, init_state, run_causal
from effattn_jax.models.config import ModelConfig
from effattn_jax.models.inputs import embed_features


class SequenceRegressor(nn.Module):
    """Predictions of `num_outputs` numbers a step for sequences of feature vectors; causal, with a state.

    Attributes:
      config: see `ModelConfig`; checked when the model is called.
      num_outputs: O.

    >>> import jax, jax.numpy as jnp
    >>> model = SequenceRegressor(ModelConfig(layers=1, width=8, heads=2), num_outputs=3)
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 5, 1)))["params"]
    >>> outputs, state = jax.jit(model.step)(params, jnp.ones((2, 1, 1)), model.init_state(batch=2, capacity=5))
    >>> outputs.shape, state.position.tolist()
    ((2, 1, 3), [1, 1])
    """

    config: ModelConfig
    num_outputs: int

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
        state: LanguageState | None = None,
        return_state: bool = False,
    ) -> jax.Array | tuple[jax.Array, LanguageState]:
        """Predictions (B, T, O), float32; with return_state also the state.

        Args:
          inputs: floats (B, T, F).
          segment_ids, mask, positions, deterministic, state, return_state: as in `LanguageModel`.

        Raises:
          ValueError: wrong shapes or types, a sequence beyond max_length where positions or a mixer fix it, an invalid config.
        """
        c = self.config.validate()
        x_BxTxD, after = run_causal(
            c,
            embed_features(c, inputs, mask),
            segment_ids=segment_ids,
            mask=mask,
            positions=positions,
            deterministic=deterministic,
            state=state,
            return_state=return_state,
        )
        x_BxTxD = x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32))
        y = nn.Dense(self.num_outputs, dtype=x_BxTxD.dtype, param_dtype=c.param_dtype, name="head")(x_BxTxD)
        return (y, after) if return_state else y

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> LanguageState:
        """The state before the first step of `batch` rows, with room for `capacity` steps; its shapes never change.

        Raises:
          ValueError: capacity beyond max_length where learned positions or a mixer fix the length.
        """
        return init_state(self.config, batch, capacity)

    @nn.nowrap
    def step(
        self, params: Any, inputs: jax.Array, state: LanguageState, **options: Any
    ) -> tuple[jax.Array, LanguageState]:
        """(predictions, state) after more steps."""
        return self.apply({"params": params}, inputs, state=state, return_state=True, **options)
