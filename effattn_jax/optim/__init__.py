"""Composable optax gradient transformations, schedules, parameter groups, and the accumulation of gradients inside one step.

Clip, adapt, decay and wrap in a chain as with optax. Slots are float32 whatever the parameters' dtype, norms are global over
`axis_name`, states keep their shapes and types from the first step on.
"""

from effattn_jax.optim._trees import exclude
from effattn_jax.optim.accumulation import accumulate_gradients
from effattn_jax.optim.adaptation import (
    LayerAdaptationState,
    decoupled_weight_decay,
    in_float32,
    lamb,
    lars,
    layer_adaptation,
)
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
from effattn_jax.optim.scales import amos_table
from effattn_jax.optim.schedules import amos_schedules, piecewise_linear_schedule
from effattn_jax.optim.tiger import TigerState, tiger
from effattn_jax.optim.wrappers import LookaheadState, SkipState, lazy_updates, lookahead, skip_nonfinite

__all__ = [
    "AmosState",
    "ClipState",
    "GroupOptions",
    "LayerAdaptationState",
    "LookaheadState",
    "NormsState",
    "SkipState",
    "TigerState",
    "accumulate_gradients",
    "amos",
    "amos_schedules",
    "amos_table",
    "clip_by_block_norm",
    "clip_by_global_norm",
    "decoupled_weight_decay",
    "exclude",
    "global_norm",
    "group_table",
    "in_float32",
    "lamb",
    "lars",
    "layer_adaptation",
    "lazy_updates",
    "log_norms",
    "logged_norms",
    "lookahead",
    "parameter_groups",
    "piecewise_linear_schedule",
    "scale_by_amos",
    "skip_nonfinite",
    "soft_clip_by_global_norm",
    "tiger",
]
