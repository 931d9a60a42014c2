"""The contract of a mixer module: what a line of `nn.MIXERS` must make."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.nn.placing import Placing
from effattn_jax.nn.products import dense_product


class SequenceMixer(nn.Module):
    """Base of every sequence mixer: tokens exchange information along time, (B, T, D) -> (B, T, D).

    Called as mixer(x_BxTxD, *, mask=None, segment_ids=None, positions=None, state=None, return_state=False),
    giving y, or (y, state) with return_state:

      mask: (B, T) bool, False where a token is padding: the others then get what they would get without it.
      segment_ids: (B, T) int: tokens interact within equal ids only, the state restarts at a boundary.
      positions: (B, T) or (1, T), for mixers that turn their queries and keys; read by them only.
      state: what `init_state` or an earlier call returned; its shapes never change.

    Padding inside a row counts in windows and patterns. Padding has the id of a document beside it, as the models see to: one of its own
    would be a boundary.

    Attributes:
      width: D, of input and output.
      heads: N, query heads.
      kv_heads: K, key and value heads; K divides N.
      causal: False is the bidirectional form, which has no state.
      rotary_base: turns queries and keys by their positions with this base; None does not. Mixers without queries,
        and with positions of their own, ignore it.
      placing: further options of positions, see `nn.Placing`; None for none.
      window: how many tokens to the left are seen besides the token itself; None for all.
      chunk_size: of the chunked form; None is the kernel's own choice.
      max_length: the longest sequence, for mixers whose weights have a place for each step; the others ignore it.
      state_size: P, numbers of state a channel, head or layer, of state-space mixers; None is the mixer's own choice.
      rate: sampling step of the input over that of training; state-space mixers multiply their steps by it.
      output_scale: factor on the initial weights of the projection that writes into the residual stream.
      use_bias: whether projections have biases.
      dtype: of activations; states and gates accumulate in float32.
      param_dtype: of parameters.
    """

    width: int
    heads: int = 1
    kv_heads: int = 1
    causal: bool = True
    rotary_base: float | None = None
    window: int | None = None
    chunk_size: int | None = None
    max_length: int | None = None
    state_size: int | None = None
    rate: float = 1.0
    output_scale: float = 1.0
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    placing: Placing | None = None

    @nn.nowrap
    def refuses_placing(self) -> str:
        """Why this mixer cannot have its `placing`; empty where it can."""
        ignored = self.placing is None or self.placing.kind == "rotary"  # as rotary_base is
        return "" if ignored else "it has no queries and keys that positions could act on"

    @nn.nowrap
    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> Any:
        """The state before the first token, with room for `capacity` tokens where a mixer stores them."""
        raise NotImplementedError

    @nn.nowrap
    def flops_per_token(self, context: int) -> int:
        """Forward floating-point operations a token (a multiply-add is two), matrix products and state updates only."""
        raise NotImplementedError

    @nn.nowrap
    def accepts_window(self) -> bool:
        """Whether this mixer can limit itself to a window."""
        return False

    @nn.nowrap
    def accepts_causal(self) -> bool:
        """Whether this mixer has a causal form, and with it a state."""
        return True

    @nn.nowrap
    def fixes_length(self) -> bool:
        """Whether its weights have a place for each step, so that no sequence is longer than `max_length`."""
        return False

    @nn.nowrap
    def has_positions(self) -> bool:
        """Whether positions are part of this mixer, so that others besides are refused."""
        return False

    @nn.nowrap
    def own_options(self) -> dict[str, str]:
        """What may be given behind the name, as in "s5(blocks=4)", each a "field" of the module or an option of its "kernel"."""
        common = {field.name for field in dataclasses.fields(SequenceMixer)}
        return {field.name: "field" for field in dataclasses.fields(self) if field.name not in common}

    @nn.nowrap
    def accepts_scores(self) -> bool:
        """Whether this mixer can add its attention scores to those of the layer before, `previous_scores`."""
        return False

    def _dense(
        self, features: int, name: str, scale: float = 1.0, use_bias: bool | None = None, **options: Any
    ) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=self.use_bias if use_bias is None else use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dense_product,
            kernel_init=nn.initializers.variance_scaling(scale**2, "fan_in", "normal"),
            name=name,
            **options,
        )

    def _check_state(self, state: Any, return_state: bool) -> None:
        if not self.causal and (state is not None or return_state):
            raise ValueError("state and return_state need causal=True: a bidirectional mixer has no state")


def check_inputs(x: jax.Array, width: int, mask: jax.Array | None, segment_ids: jax.Array | None) -> None:
    """Raises ValueError unless x is (B, T, width), mask bool (B, T) and segment_ids integer (B, T)."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x must have the shape (B, T, D) with D = {width}; got {x.shape}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != bool):
        raise ValueError(
            f"mask must be bool of shape (B, T) = {x.shape[:2]}, True where a token is real; "
            f"got {mask.dtype}{mask.shape}"
        )
    if segment_ids is not None and (
        segment_ids.shape != x.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise ValueError(
            f"segment_ids must be integers of shape (B, T) = {x.shape[:2]}; got {segment_ids.dtype}{segment_ids.shape}"
        )
