"""The causal half of a model, from embedded inputs to what the head reads: shared by language model and regressor.

x = inputs + positions;   x = block_l(x) for each layer;   norm(x), and the state after the last input
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._places import count_positions, ids_without_padding
from effattn_jax.models.config import COUNTED, ModelConfig
from effattn_jax.models.inputs import InputEmbedding, check_length
from effattn_jax.models.stack import Stack
from effattn_jax.nn.mixer import check_inputs


class LanguageState(NamedTuple):
    """What a causal model remembers: real tokens of the current segment (B,), its id (B,), and the blocks' states."""

    position: jax.Array
    segment_id: jax.Array
    blocks: Any


def run_causal(
    config: ModelConfig, x_BxTxD, *, segment_ids, mask, positions, deterministic, state, return_state
) -> tuple[jax.Array, LanguageState | None]:
    """Inside a compact method: the stream (B, T, D) after all blocks, and the new state or None.

    Args:
      config: the model's.
      x_BxTxD: embedded inputs.
      segment_ids, mask, positions, deterministic, state, return_state: as in `LanguageModel`.

    Raises:
      ValueError: wrong shapes, a sequence beyond max_length where positions or a mixer fix it, or positions that would not be honoured.
    """
    check_inputs(x_BxTxD, config.width, mask, segment_ids)
    check_length(config, x_BxTxD.shape[1])
    if segment_ids is not None and mask is not None:
        segment_ids = ids_without_padding(segment_ids, mask, None if state is None else state.segment_id)
    if positions is not None and config.counts_positions:
        raise ValueError(f"positions must be None {COUNTED}; got {jnp.asarray(positions).shape}")
    if positions is None:
        positions = count_positions(x_BxTxD.shape[:2], mask, segment_ids, *(state[:2] if state is not None else ()))
    y_BxTxD, placed = InputEmbedding(config, name="inputs")(x_BxTxD, positions, mask, deterministic)
    y_BxTxD, blocks = Stack(config, name="stack")(
        y_BxTxD,
        mask=mask,
        segment_ids=segment_ids,
        positions=placed,
        state=None if state is None else state.blocks,
        deterministic=deterministic,
        return_state=return_state,
    )
    if not return_state:
        return y_BxTxD, None
    return y_BxTxD, LanguageState(*_advance(x_BxTxD, positions, mask, segment_ids, state), blocks)


def init_state(config: ModelConfig, batch: int, capacity: int) -> LanguageState:
    """The state before the first input of `batch` rows, with room for `capacity` of them.

    Raises:
      ValueError: capacity beyond max_length where learned positions or a mixer fix the length.
    """
    check_length(config.validate(), capacity)
    zeros = jnp.zeros((batch,), jnp.int32)
    return LanguageState(zeros, zeros, Stack(config, parent=None).init_state(batch, capacity))


def _advance(x_BxTxD, positions, mask, segment_ids, state):
    """(position, segment_id) of the new state: those that the next token would have."""
    batch, length, _ = x_BxTxD.shape
    zeros = jnp.zeros_like(x_BxTxD, jnp.int32, shape=(batch,))
    position, segment_id = (zeros, zeros) if state is None else state[:2]
    if length == 0:
        return position, segment_id
    is_real = 1 if mask is None else mask[:, -1].astype(jnp.int32)
    position = zeros + positions[:, -1].astype(jnp.int32) + is_real
    return position, segment_id if segment_ids is None else segment_ids[:, -1].astype(jnp.int32)
