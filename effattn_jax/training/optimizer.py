"""The optimizer of a run: clipping, a rule by name, parameter groups, Lookahead, the learning rate of each step.

To add a rule, add one line to `OPTIMIZERS`, and one to `DIRECTIONS` where groups can have it.
"""

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from effattn_jax.nn.layers import EMBEDDING_STD
from effattn_jax.optim import (
    GroupOptions,
    amos,
    clip_by_global_norm,
    group_table,
    lamb,
    lars,
    lookahead,
    parameter_groups,
    soft_clip_by_global_norm,
    tiger,
)
from effattn_jax.training.config import OptimConfig
from effattn_jax.training.options import read_fields, split_options

# Last names of matrices: those of functions that bring their own weights (in_kernel), and of pairs of layers by number.
MATRICES = re.compile(r"(kernel|embedding|_ffn_[02])$")

Direction = optax.GradientTransformation | Callable[..., optax.GradientTransformation]


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    options = {"weight_decay": config.weight_decay, "mask": decayed}
    return optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, **options)


def _amos(
    config: OptimConfig, schedule: optax.Schedule, scale_fn: Any = lambda path, shape: None, shape_fn: Any = None
) -> optax.GradientTransformation:
    def scale(path: tuple[str, ...], shape: tuple[int, ...]) -> float | None:
        given = scale_fn(path, shape)
        return EMBEDDING_STD if given is None and path[-1] == "embedding" else given

    options = {"beta": config.beta2, "momentum": config.beta1 or None, "extra_l2": config.extra_l2}
    return amos(schedule, scale_fn=scale, shape_fn=shape_fn, **options)


def _lamb(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    masks = {"weight_decay_mask": decayed, "trust_ratio_mask": decayed}
    return lamb(schedule, config.beta1, config.beta2, config.epsilon, config.weight_decay, **masks)


def _lars(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    masks = {"weight_decay_mask": decayed, "trust_ratio_mask": decayed}
    return lars(schedule, config.weight_decay, config.beta1, **masks)


def _lion(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)


def _sgd(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    return optax.chain(decay, optax.sgd(schedule, momentum=config.beta1 or None))


def _tiger(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return tiger(schedule, config.beta1, config.weight_decay, weight_decay_mask=decayed)


OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "amos": _amos,
    "lamb": _lamb,
    "lars": _lars,
    "lion": _lion,
    "sgd": _sgd,
    "tiger": _tiger,
}


def _adam_direction(config: OptimConfig) -> Direction:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


# What a table of groups decays, adapts and scales; a rule of it turns trust_ratio on, which makes adamw and lamb one.
DIRECTIONS: dict[str, Callable[[OptimConfig], Direction]] = {
    "adamw": _adam_direction,
    "lamb": _adam_direction,
    "lion": lambda config: optax.scale_by_lion(config.beta1, config.beta2),
    "sgd": lambda config: optax.trace(config.beta1) if config.beta1 else optax.identity(),
}


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule.

    Returns:
      (transformation, schedule); clipping stands before the rule, after any averaging over micro-batches.

    Raises:
      ValueError: for a name that is not in `OPTIMIZERS`, or a rule of groups that cannot be read; the transformation's
        `init` raises it for leaves that no rule matches, and for rules that match none.

    Example:
      >>> _, schedule = make_optimizer(OptimConfig(learning_rate=1.0, final_learning_rate=0.0, warmup_steps=10), 110)
      >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 60, 110)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if config.name not in OPTIMIZERS:
        close = difflib.get_close_matches(config.name, OPTIMIZERS, n=1)
        hint = f" Perhaps you meant {close[0]!r}?" if close else ""
        raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {config.name!r}.{hint}")
    schedule = make_schedule(config, steps)
    rule = _grouped(config, schedule) if config.groups else OPTIMIZERS[config.name](config, schedule)
    if config.clip_norm:
        clip = {"hard": clip_by_global_norm, "soft": soft_clip_by_global_norm}[config.clip]
        rule = optax.chain(clip(config.clip_norm), rule)
    if config.lookahead_period:
        rule = lookahead(rule, config.lookahead_period, config.lookahead_step)
    # Amos' schedule sees the number of the update, from 1; the others' the number of updates done.
    return rule, (lambda step: schedule(step + 1)) if config.name == "amos" else schedule


def _table(config: OptimConfig) -> dict[str, dict[str, Any]]:
    """The rules of `optim.groups`, checked against the optimizer that they are for."""
    table, amos_alone, not_amos = {}, ("scale", "slot_shape"), ("weight_decay", "trust_ratio")
    for pattern, options in map(parse_rule, config.groups):
        if pattern in table:
            raise ValueError(f"optim.groups must hold each regular expression once, got {pattern!r} twice.")
        for name in not_amos if config.name == "amos" else amos_alone:
            if name in options:
                raise ValueError(f"optim.groups, rule {pattern!r}: {config.name} has no {name}.")
        table[pattern] = options
    return table


def _grouped(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    table = _table(config)
    if config.name == "amos":
        return parameter_groups(table, learning_rate=None, inner=partial(_amos, config, schedule))
    if config.name not in DIRECTIONS:
        known = ", ".join(sorted([*DIRECTIONS, "amos"]))
        raise ValueError(f"optim.groups needs optim.name to be one of {known}, got {config.name!r}.")
    return parameter_groups(table, learning_rate=schedule, inner=DIRECTIONS[config.name](config))


def describe_groups(config: OptimConfig, params: Any) -> str:
    """The table of the parameter groups with what matched, "" without groups.

    Example:
      >>> describe_groups(OptimConfig(), {})
      ''
    """
    return group_table(_table(config), params) if config.groups else ""


def parse_rule(text: str) -> tuple[str, dict[str, Any]]:
    """A rule of `optim.groups` as (regular expression, options); values are numbers, True, False, None or words.

    Raises:
      ValueError: text without a colon, an option without a value or given twice, or a value of another type.

    Example:
      >>> parse_rule("embedding$: weight_decay=0.1, lazy=frozen")
      ('embedding$', {'weight_decay': 0.1, 'lazy': 'frozen'})
    """
    pattern, colon, rest = text.rpartition(":")
    options = split_options(rest)
    if not colon or options is None:
        raise ValueError(f'optim.groups must hold rules "REGEX: option=value, ...", each option once, got {text!r}.')
    pattern = pattern.strip()
    return pattern, read_fields(GroupOptions, options, f"optim.groups, rule {pattern!r}: ")


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the course that the config names, ending at step `steps`."""
    warmup = config.warmup(steps)
    rest = max(steps - warmup, 1)
    peak, last = config.learning_rate, config.final_learning_rate
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=last / peak),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decayed(params: Any) -> Any:
    """The mask of the weight decay: True for matrices and embeddings; `OptimConfig.weight_decay` says what is left out.

    Example:
      >>> import jax.numpy as jnp
      >>> decayed({"in_kernel": jnp.ones((2, 3)), "in_bias": jnp.ones(3), "key_table": jnp.ones((4, 3))})
      {'in_bias': False, 'in_kernel': True, 'key_table': False}
    """

    def matrix(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and bool(MATRICES.search(name))

    return jax.tree_util.tree_map_with_path(matrix, params)
