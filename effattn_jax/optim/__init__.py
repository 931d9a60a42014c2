"""Composable optax gradient transformations, schedules, parameter groups, accumulation of gradients,
and wrappers of loss functions.

Clip, adapt, decay and wrap in a chain as with optax. Slots are float32 whatever the parameters' dtype, norms are global over
`axis_name`, states keep their shapes and types from the first step on.

`optax.inject_hyperparams` gives numbers the type of the parameters: with bfloat16 ones pass it `hyperparam_dtype=jnp.float32`, or a
beta of 0.999 becomes 1.
"""

from effattn_jax.optim._trees import exclude
from effattn_jax.optim.accumulated_updates import (
    AccumulatedTransformation,
    AccumulationState,
    MomentumAccumulationState,
    accumulate_in_momentum,
    accumulate_updates,
)
from effattn_jax.optim.accumulation import accumulate_gradients, mean_to_sum
from effattn_jax.optim.adaptation import (
    LayerAdaptationState,
    decoupled_weight_decay,
    in_float32,
    lamb,
    lars,
    layer_adaptation,
)
from effattn_jax.optim.adversarial import fgm, pgd, sharpness_aware, virtual_adversarial
from effattn_jax.optim.amos import AmosState, amos, scale_by_amos
from effattn_jax.optim.clipping import (
    ClipState,
    clip_by_block_norm,
    clip_by_global_norm,
    global_norm,
    soft_clip_by_global_norm,
)
from effattn_jax.optim.groups import GroupOptions, group_table, parameter_groups
from effattn_jax.optim.logs import NormsState, log_norms, logged_norms
from effattn_jax.optim.noise import hidden_noise, input_noise, label_noise, weight_noise
from effattn_jax.optim.penalties import flooding, gradient_penalty, implicit_gradient_regularization, scale_by_flooding
from effattn_jax.optim.scales import amos_table
from effattn_jax.optim.schedules import amos_schedules, piecewise_linear_schedule
from effattn_jax.optim.tiger import TigerState, tiger
from effattn_jax.optim.wrappers import LookaheadState, SkipState, lazy_updates, lookahead, skip_nonfinite

__all__ = [
    "AccumulatedTransformation",
    "AccumulationState",
    "AmosState",
    "ClipState",
    "GroupOptions",
    "LayerAdaptationState",
    "LookaheadState",
    "MomentumAccumulationState",
    "NormsState",
    "SkipState",
    "TigerState",
    "accumulate_gradients",
    "accumulate_in_momentum",
    "accumulate_updates",
    "amos",
    "amos_schedules",
    "amos_table",
    "clip_by_block_norm",
    "clip_by_global_norm",
    "decoupled_weight_decay",
    "exclude",
    "fgm",
    "flooding",
    "global_norm",
    "gradient_penalty",
    "group_table",
    "hidden_noise",
    "implicit_gradient_regularization",
    "in_float32",
    "input_noise",
    "label_noise",
    "lamb",
    "lars",
    "layer_adaptation",
    "lazy_updates",
    "log_norms",
    "logged_norms",
    "lookahead",
    "mean_to_sum",
    "parameter_groups",
    "pgd",
    "piecewise_linear_schedule",
    "scale_by_amos",
    "scale_by_flooding",
    "sharpness_aware",
    "skip_nonfinite",
    "soft_clip_by_global_norm",
    "tiger",
    "virtual_adversarial",
    "weight_noise",
]
