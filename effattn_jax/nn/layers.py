"""Norms, feed-forward layers and embeddings: the parts of a block that look at one token at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax._places import rows_of_table
from effattn_jax.nn.products import dense_product, table_product

EMBEDDING_STD = 0.02


def make_norm(
    kind: str, *, use_bias: bool = False, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, name: str
) -> Callable[[jax.Array], jax.Array]:
    """A "layernorm" or "rmsnorm" over the last axis, or "none"; statistics and scaling in float32, output in `dtype`.

    LayerNorm: (x - mean) / sqrt(var + 1e-5) * scale (+ bias); RMSNorm: x / sqrt(mean(x^2) + 1e-6) * scale.

    Raises:
      ValueError: an unknown kind.

    >>> import jax, jax.numpy as jnp
    >>> norm = make_norm("rmsnorm", name="norm")
    >>> y, params = norm.init_with_output(jax.random.key(0), jnp.array([3.0, 4.0]))
    >>> [round(float(y_i), 3) for y_i in y]
    [0.849, 1.131]
    """
    if kind == "layernorm":
        return nn.LayerNorm(epsilon=1e-5, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, name=name)
    if kind == "rmsnorm":
        return nn.RMSNorm(epsilon=1e-6, dtype=dtype, param_dtype=param_dtype, name=name)
    if kind == "none":
        return lambda x: x
    raise ValueError(f"norm must be 'layernorm', 'rmsnorm' or 'none'; got {kind!r}")


class FeedForward(nn.Module):
    """Feed-forward layer of each token alone, (B, T, D) -> (B, T, D).

    y = gelu(x W_in) W_out, or gated: y = (silu(x W_gate) * x W_in) W_out (SwiGLU, arXiv 2002.05202).

    Attributes:
      hidden: F, the inner width.
      gated: which of the two.
      output_scale: factor on the initial W_out.
      use_bias, dtype, param_dtype: as in `SequenceMixer`.

    >>> import jax, jax.numpy as jnp
    >>> FeedForward(16).init_with_output(jax.random.key(0), jnp.ones((1, 2, 4)))[0].shape
    (1, 2, 4)
    """

    hidden: int
    gated: bool = False
    output_scale: float = 1.0
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "dot_general": dense_product}
        dense = partial(nn.Dense, use_bias=self.use_bias, **options)
        init, output_init = (
            nn.initializers.variance_scaling(s**2, "fan_in", "normal") for s in (1.0, self.output_scale)
        )
        hidden_BxTxF = dense(self.hidden, kernel_init=init, name="in")(x_BxTxD)
        if self.gated:
            hidden_BxTxF *= nn.silu(dense(self.hidden, kernel_init=init, name="gate")(x_BxTxD))
        else:
            hidden_BxTxF = nn.gelu(hidden_BxTxF)
        return dense(x_BxTxD.shape[-1], kernel_init=output_init, name="out")(hidden_BxTxF)


class Embedding(nn.Module):
    """A table of rows by id, read in at unit scale and usable as the output layer.

    embed(i) = E_i / 0.02 and attend(x) = x E^T with E ~ N(0, 0.02^2): the residual stream starts at unit variance, and
    the logits of tied embeddings start near 0, so that the first loss is about ln A. An id out of range gives NaN,
    never another row.

    Attributes:
      num: A, number of rows.
      features: D.
      dtype: of the output of embed and of the operands of attend, whose sums and result are float32.
      param_dtype: of the table.

    >>> import jax, jax.numpy as jnp
    >>> Embedding(5, 4).init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))[0].shape
    (1, 3, 4)
    """

    num: int
    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.normal(EMBEDDING_STD)
        self.embedding = self.param("embedding", init, (self.num, self.features), self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids (...) -> (..., D)."""
        ids = jnp.where(ids < 0, self.num, ids)  # a negative id would count from the end
        return (rows_of_table(self.embedding, ids) / EMBEDDING_STD).astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """x (..., D) -> logits (..., A), float32."""
        return table_product(x.astype(self.dtype), self.embedding.astype(self.dtype))
