"""From tokens or features to the residual stream: where each token stands, and what that adds to its embedding."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.models.config import ModelConfig
from effattn_jax.nn import Embedding
from effattn_jax.position import hierarchical_embedding, random_positions, sinusoidal_embedding


class InputEmbedding(nn.Module):
    """Adds positions and dropout to embedded tokens, (B, T, D) -> (B, T, D) and the positions used; padding becomes 0.

    x + P_t (learned, at the scale of the token embedding), x + sin/cos waves, or x.

    Attributes:
      config: the model's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, positions, mask, deterministic):
        """positions (B, T) or (1, T), counted from 0; mask (B, T) or None."""
        c = self.config
        if c.random_positions and not deterministic:
            drawn = random_positions(self.make_rng("dropout"), x_BxTxD.shape[1], c.random_positions)
            positions = jnp.take(drawn[0], positions, axis=0)
        if c.positions == "learned":
            table = Embedding(c.max_length, c.width, c.dtype, c.param_dtype, name="positions")
            x_BxTxD += self._stretched(table, positions) if c.hierarchical_alpha else table(positions)
        elif c.positions == "sinusoidal":
            x_BxTxD += sinusoidal_embedding(positions, c.width).astype(x_BxTxD.dtype)
        # Whatever stands in a padded place, NaN from an id out of range included, goes no further.
        x_BxTxD = x_BxTxD if mask is None else jnp.where(mask[..., None], x_BxTxD, 0)
        return nn.Dropout(c.dropout, deterministic=deterministic)(x_BxTxD), positions

    def _stretched(self, table, positions):
        rows = table(jnp.arange(self.config.max_length)[None])[0]
        return hierarchical_embedding(rows, positions, alpha=self.config.hierarchical_alpha)


def embed_features(config: ModelConfig, inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Inside a compact method: feature vectors (B, T, F) to the width, by one layer of the name `features`.

    What stands in padded places is 0 from the start: 0 * NaN would be NaN in the layer's gradient. A mask of another shape is left to whoever checks it.

    Raises:
      ValueError: inputs of another rank or type.
    """
    if inputs.ndim != 3 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        given = f"{inputs.dtype}{list(inputs.shape)}"
        raise ValueError(f"inputs must be floats of shape (B, T, F) without vocab_size; got {given}")
    if mask is not None and jnp.shape(mask) == inputs.shape[:2]:
        inputs = jnp.where(jnp.asarray(mask)[..., None], inputs, 0)
    return nn.Dense(config.width, dtype=config.dtype, param_dtype=config.param_dtype, name="features")(inputs)


def check_length(config: ModelConfig, length: int) -> None:
    """Raises ValueError for a sequence longer than learned positions, or the weights of a mixer, have places for."""
    if config.fixes_length and length > config.longest:
        limit = f"max_length={config.max_length}" if config.longest == config.max_length else config.longest
        why = (
            "with learned positions"
            if config.positions == "learned"
            else f"with the mixer {config.mixers or config.mixer}"
        )
        raise ValueError(f"sequences must be at most {limit} long {why}; got {length}")
