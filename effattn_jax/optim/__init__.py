"""Composable optax gradient transformations, and the accumulation of gradients inside one step."""

from effattn_jax.optim.accumulation import accumulate_gradients
from effattn_jax.optim.clipping import ClipState, clip_by_global_norm, global_norm

__all__ = ["ClipState", "accumulate_gradients", "clip_by_global_norm", "global_norm"]
