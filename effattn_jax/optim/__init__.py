"""Composable optax gradient transformations, the accumulation of gradients, and wrappers of loss functions."""

from effattn_jax.optim.accumulated_updates import (
    AccumulatedTransformation,
    AccumulationState,
    MomentumAccumulationState,
    accumulate_in_momentum,
    accumulate_updates,
)
from effattn_jax.optim.accumulation import accumulate_gradients, mean_to_sum
from effattn_jax.optim.adversarial import fgm, pgd, sharpness_aware, virtual_adversarial
from effattn_jax.optim.clipping import ClipState, clip_by_global_norm, global_norm
from effattn_jax.optim.noise import hidden_noise, input_noise, label_noise, weight_noise
from effattn_jax.optim.penalties import (
    flooding,
    gradient_penalty,
    implicit_gradient_regularization,
    scale_by_flooding,
)

__all__ = [
    "AccumulatedTransformation",
    "AccumulationState",
    "ClipState",
    "MomentumAccumulationState",
    "accumulate_gradients",
    "accumulate_in_momentum",
    "accumulate_updates",
    "clip_by_global_norm",
    "fgm",
    "flooding",
    "global_norm",
    "gradient_penalty",
    "hidden_noise",
    "implicit_gradient_regularization",
    "input_noise",
    "label_noise",
    "mean_to_sum",
    "pgd",
    "scale_by_flooding",
    "sharpness_aware",
    "virtual_adversarial",
    "weight_noise",
]
