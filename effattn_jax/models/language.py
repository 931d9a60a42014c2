"""Decoder language model: the next token's logits from the tokens so far, in one call or one token a call.

x = E[tokens] + positions;   x = block_l(x) for each layer;   logits = norm(x) E^T
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.models.causal import LanguageState, init_state, run_causal
from effattn_jax.models.config import ModelConfig
from effattn_jax.nn import Embedding
from effattn_jax.nn.products import float32_product


class LanguageModel(nn.Module):
    """A causal language model of `config` over `vocab_size` tokens.

    Attributes:
      config: see `ModelConfig`; checked when the model is called.
      vocab_size: A.

    The state's size is the mixers': constant for recurrences, capacity keys and values for softmax. A call with a state
    continues
    from it, whatever its length: a prompt at once, then a token a call, give what one call on everything gives.

    >>> import jax, jax.numpy as jnp
    >>> model = LanguageModel(ModelConfig(layers=1, width=8, heads=2), vocab_size=11)
    >>> tokens = jnp.array([[1, 2, 3]])
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> jax.jit(model.apply)({"params": params}, tokens).shape
    (1, 3, 11)
    >>> step = jax.jit(model.step)
    >>> logits, state = step(params, tokens, model.init_state(batch=1, capacity=10))
    >>> logits, state = step(params, jnp.array([[4]]), state)
    >>> state.position.tolist()
    [4]
    """

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
        state: LanguageState | None = None,
        return_state: bool = False,
    ) -> jax.Array | tuple[jax.Array, LanguageState]:
        """Logits (B, T, A), float32, of the token after each one; with return_state also the state.

        Args:
          tokens_BxT: integer ids in [0, A); one out of range gives NaN.
          segment_ids: (B, T); tokens see their own segment only and positions restart, so packed documents are as if
            alone. None continues the segment of the state.
          mask: (B, T) bool, False at padding, which nothing sees and which has neither a position nor a segment of its own.
          positions: (B, T) to overrule the counted ones: learned, sinusoidal or rotary. None where kernels count for themselves, as
            biases, xpos, rerope, sinks, mixers with positions of their own, and log_scale do.
          deterministic: False applies dropout, with rngs={"dropout": key}.
          state: from `init_state` or an earlier call.
          return_state: whether to return (logits, state).

        Raises:
          ValueError: wrong shapes or types, a sequence beyond max_length where positions or a mixer fix it, positions that would not
            be honoured, an invalid config.
        """
        c = self.config.validate()
        if tokens_BxT.ndim != 2 or not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers of shape (B, T); got {tokens_BxT.dtype}{list(tokens_BxT.shape)}")
        embed = Embedding(self.vocab_size, c.width, c.dtype, c.param_dtype, name="tokens")
        x_BxTxD, after = run_causal(
            c,
            embed(tokens_BxT),
            segment_ids=segment_ids,
            mask=mask,
            positions=positions,
            deterministic=deterministic,
            state=state,
            return_state=return_state,
        )
        logits_BxTxA = embed.attend(x_BxTxD) if c.tie_embeddings else self._head(x_BxTxD)
        return (logits_BxTxA, after) if return_state else logits_BxTxA

    def _head(self, x_BxTxD):
        init = nn.initializers.variance_scaling(0.04, "fan_in", "normal")  # small logits: the first loss is about ln A
        kernel = partial(nn.Dense, use_bias=False, dtype=self.config.dtype, param_dtype=self.config.param_dtype)
        return kernel(self.vocab_size, kernel_init=init, dot_general=float32_product, name="head")(x_BxTxD)

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> LanguageState:
        """The state before the first token of `batch` rows, with room for `capacity` tokens; its shapes never change.

        Raises:
          ValueError: capacity beyond max_length where learned positions or a mixer fix the length.
        """
        return init_state(self.config, batch, capacity)

    @nn.nowrap
    def step(
        self, params: Any, tokens_BxT: jax.Array, state: LanguageState, **inputs: Any
    ) -> tuple[jax.Array, LanguageState]:
        """(logits, state) after more tokens: what `decoding.generate` takes as its step."""
        return self.apply({"params": params}, tokens_BxT, state=state, return_state=True, **inputs)
