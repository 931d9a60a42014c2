"""Blocks and their stack, shared by all models.

pre: x + f(norm(x));   post: norm(x + f(x));   rezero: x + alpha f(x), alpha = 0 at first
for f the mixer (after a short convolution where asked), then for f the feed-forward layer. Attention scores may add up from block to block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from effattn_jax.models.config import ModelConfig
from effattn_jax.nn import FeedForward, ShortConvolution, make_norm


class BlockState(NamedTuple):
    """State of one block: of its short convolution (None without one) and of its mixer."""

    convolution: Any
    mixer: Any


class Block(nn.Module):
    """One mixer and one feed-forward layer on the residual stream, (B, T, D) -> (B, T, D).

    What goes from block to block is (x, scores): the stream, and the attention scores (B, N, T, S) that add up over the blocks, or None.

    Attributes:
      config: the model's.
      layer: index of the block, which says which mixer it has.
      causal: False is the bidirectional form.
      deterministic: False applies dropout.
      return_state: whether the second result is the new state or None.
    """

    config: ModelConfig
    layer: int
    causal: bool = True
    deterministic: bool = True
    return_state: bool = False

    @nn.compact
    def __call__(self, stream, state, mask, segment_ids, positions):
        """Returns ((y, scores), state); state is None in and out unless decoding."""
        c = self.config
        x_BxTxD, scores_BxNxTxS = stream
        state = BlockState(None, None) if state is None else state
        seen = {"mask": mask, "segment_ids": segment_ids, "return_state": self.return_state}

        def mix(x):
            convolution = None
            if c.conv_width:
                x, convolution = self._with_state(
                    self._convolution(name="convolution")(x, state=state.convolution, **seen)
                )
            mixer = c.make_mixer(self.layer, causal=self.causal, name="mixer")
            if scores_BxNxTxS is None:
                y, mixed = self._with_state(mixer(x, positions=positions, state=state.mixer, **seen))
                return y, (BlockState(convolution, mixed), None)
            y, *mixed, scores = mixer(
                x, positions=positions, state=state.mixer, previous_scores=scores_BxNxTxS, **seen
            )  # fmt: skip
            return y, (BlockState(convolution, *mixed or (None,)), scores)

        def feed_forward(x):
            options = {"use_bias": c.use_bias, "dtype": c.dtype, "param_dtype": c.param_dtype}
            return FeedForward(c.mlp_width, c.mlp == "gated", c.output_scale, name="mlp", **options)(x), None

        x_BxTxD, (new_state, scores_BxNxTxS) = self._residual(x_BxTxD, mix, "mixer")
        x_BxTxD, _ = self._residual(x_BxTxD, feed_forward, "mlp")
        return (x_BxTxD, scores_BxNxTxS), new_state if self.return_state else None

    def _residual(self, x, function, name):
        kind = self.config.residual
        norm = None if kind == "rezero" else _norm(self.config, f"{name}_norm")
        y, extra = function(norm(x) if kind == "pre" else x)
        y = nn.Dropout(self.config.dropout, deterministic=self.deterministic)(y)
        if kind == "rezero":
            y = y * self.param(f"{name}_scale", nn.initializers.zeros, (), jnp.float32).astype(y.dtype)
        x = x + y
        return (norm(x) if kind == "post" else x), extra

    def _with_state(self, result):
        return result if self.return_state else (result, None)

    def _convolution(self, **module_options):
        c = self.config
        return ShortConvolution(c.width, c.conv_width, self.causal, c.dtype, c.param_dtype, **module_options)

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> BlockState:
        """State before the first token; shapes never change afterwards."""
        convolution = self._convolution(parent=None).init_state(batch, capacity) if self.config.conv_width else None
        return BlockState(convolution, self.config.make_mixer(self.layer, parent=None).init_state(batch, capacity))


class Stack(nn.Module):
    """The blocks of a model and the last norm, (B, T, D) -> (B, T, D).

    Parameters are under layers_0, layers_1, ..., or stacked on a first axis under `layers` with scan_layers.

    Attributes:
      config, causal: as in `Block`.
    """

    config: ModelConfig
    causal: bool = True

    @nn.compact
    def __call__(self, x_BxTxD, *, mask, segment_ids, positions, state, deterministic, return_state):
        """Returns (y, state); state is None in and out unless decoding."""
        c = self.config
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        options = {"causal": self.causal, "deterministic": deterministic, "return_state": return_state}
        shared = (mask, segment_ids, positions)
        stream = (x_BxTxD, self._no_scores(x_BxTxD, state))
        if c.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
            )
            stream, states = scanned(c, 0, **options, name="layers")(stream, state, *shared)
        else:
            states = []
            for i in range(c.layers):
                layer_state = None if state is None else state[i]
                stream, layer_state = block(c, i, **options, name=f"layers_{i}")(stream, layer_state, *shared)
                states.append(layer_state)
            states = tuple(states)
        x_BxTxD, _ = stream
        x_BxTxD = x_BxTxD if c.residual == "post" else _norm(c, "norm")(x_BxTxD)
        return x_BxTxD, states if return_state else None

    def _no_scores(self, x_BxTxD, state):
        if not self.config.residual_scores:
            return None
        first = state if self.config.scan_layers or state is None else state[0]
        mixer = self.config.make_mixer(0, causal=self.causal, parent=None)
        return mixer.no_scores(x_BxTxD, None if first is None else first.mixer)

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> Any:
        """One `BlockState` a layer as a tuple, or one with a first axis of layers with scan_layers."""
        states = tuple(
            Block(self.config, i, parent=None).init_state(batch, capacity) for i in range(self.config.layers)
        )
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if self.config.scan_layers else states


def _norm(config: ModelConfig, name: str) -> Callable[[jax.Array], jax.Array]:
    return make_norm(
        config.norm, use_bias=config.use_bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )
