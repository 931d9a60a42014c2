"""From tokens to the residual stream: where each token stands, and what that adds to its embedding."""

import flax.linen as nn
import jax.numpy as jnp

from effattn_jax.models.config import ModelConfig
from effattn_jax.nn import Embedding
from effattn_jax.position import sinusoidal_embedding


class InputEmbedding(nn.Module):
    """Adds positions and dropout to embedded tokens, (B, T, D) -> (B, T, D); padding becomes 0.

    x + P_t (learned, at the scale of the token embedding), x + sin/cos waves, or x.

    Attributes:
      config: the model's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, positions, mask, deterministic):
        """positions (B, T) or (1, T), counted from 0; mask (B, T) or None."""
        c = self.config
        if c.positions == "learned":
            x_BxTxD += Embedding(c.max_length, c.width, c.dtype, c.param_dtype, name="positions")(positions)
        elif c.positions == "sinusoidal":
            x_BxTxD += sinusoidal_embedding(positions, c.width).astype(x_BxTxD.dtype)
        # Whatever stands in a padded place, NaN from an id out of range included, goes no further.
        x_BxTxD = x_BxTxD if mask is None else jnp.where(mask[..., None], x_BxTxD, 0)
        return nn.Dropout(c.dropout, deterministic=deterministic)(x_BxTxD)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises ValueError for a sequence longer than learned positions, or the weights of a mixer, have places for."""
    if config.fixes_length and length > config.max_length:
        why = (
            "with learned positions"
            if config.positions == "learned"
            else f"with the mixer {config.mixers or config.mixer}"
        )
        raise ValueError(f"sequences must be at most max_length={config.max_length} long {why}; got {length}")
