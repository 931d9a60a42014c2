"""Sequence classifier: one label a sequence, from all of it.

x = embed(inputs) + positions;   x = block_l(x), bidirectional;   logits = mean_t(norm(x_t)) W
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax._places import count_positions
from effattn_jax.models.config import ModelConfig
from effattn_jax.models.inputs import InputEmbedding, check_length, embed_features
from effattn_jax.models.stack import Stack
from effattn_jax.nn import Embedding
from effattn_jax.nn.mixer import check_inputs


class SequenceClassifier(nn.Module):
    """Logits of `num_classes` for sequences of tokens or of feature vectors.

    Attributes:
      config: see `ModelConfig`; mixers are bidirectional.
      num_classes: number of labels.
      vocab_size: number of token ids, or None for inputs that are feature vectors.

    >>> import jax, jax.numpy as jnp
    >>> model = SequenceClassifier(ModelConfig(layers=1, width=8, heads=2), num_classes=3, vocab_size=None)
    >>> jax.jit(model.init_with_output)(jax.random.key(0), jnp.ones((2, 5, 1)))[0].shape
    (2, 3)
    """

    config: ModelConfig
    num_classes: int
    vocab_size: int | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array, *, mask: jax.Array | None = None, deterministic: bool = True) -> jax.Array:
        """Logits (B, num_classes), float32.

        Args:
          inputs: (B, T) integer ids, or (B, T, F) features when vocab_size is None.
          mask: (B, T) bool, False at padding; a row of padding alone has the logits of an empty sequence, the head's
            bias.
          deterministic: False applies dropout, with rngs={"dropout": key}.

        Raises:
          ValueError: inputs of the wrong rank or type, a wrong mask, a sequence beyond max_length where
            learned positions or a mixer fix the length.
        """
        c = self.config.validate()
        x_BxTxD = self._embed(inputs, mask)
        check_inputs(x_BxTxD, c.width, mask, None)
        check_length(c, x_BxTxD.shape[1])
        positions = count_positions(x_BxTxD.shape[:2], mask)
        x_BxTxD, positions = InputEmbedding(c, name="inputs")(x_BxTxD, positions, mask, deterministic)
        x_BxTxD, _ = Stack(c, causal=False, name="stack")(
            x_BxTxD,
            mask=mask,
            segment_ids=None,
            positions=positions,
            state=None,
            deterministic=deterministic,
            return_state=False,
        )
        pooled_BxD = _masked_mean(x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32)), mask)
        init = nn.initializers.variance_scaling(0.04, "fan_in", "normal")
        return nn.Dense(
            self.num_classes, dtype=pooled_BxD.dtype, param_dtype=c.param_dtype, kernel_init=init, name="head"
        )(pooled_BxD)

    def _embed(self, inputs, mask):
        c = self.config
        if self.vocab_size is not None:
            if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
                raise ValueError(f"inputs must be integers of shape (B, T); got {inputs.dtype}{list(inputs.shape)}")
            return Embedding(self.vocab_size, c.width, c.dtype, c.param_dtype, name="tokens")(inputs)
        return embed_features(c, inputs, mask)


def _masked_mean(x_BxTxD, mask):
    if mask is None:
        return jnp.sum(x_BxTxD, axis=1) / max(x_BxTxD.shape[1], 1)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    return jnp.sum(jnp.where(mask[..., None], x_BxTxD, 0), axis=1) / count
