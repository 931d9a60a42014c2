"""The optimizer of a run: clipping, a rule by name, the learning rate of each step.

To add a rule, add one line to `OPTIMIZERS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from effattn_jax.optim import clip_by_global_norm
from effattn_jax.training.config import OptimConfig


def _adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    options = {"weight_decay": config.weight_decay, "mask": decayed}
    return optax.adamw(schedule, config.beta1, config.beta2, config.epsilon, **options)


def _lion(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decayed)


def _sgd(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    return optax.chain(decay, optax.sgd(schedule, momentum=config.beta1 or None))


OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
}


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its schedule.

    Returns:
      (transformation, schedule); clipping stands before the rule, after any averaging over micro-batches.

    Raises:
      ValueError: for a name that is not in `OPTIMIZERS`.

    Example:
      >>> _, schedule = make_optimizer(OptimConfig(learning_rate=1.0, final_learning_rate=0.0, warmup_steps=10), 110)
      >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 60, 110)]
      [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"optim.name must be one of {', '.join(OPTIMIZERS)}, got {config.name!r}.")
    schedule = make_schedule(config, steps)
    rule = OPTIMIZERS[config.name](config, schedule)
    return (optax.chain(clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule), schedule


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the course that the config names, ending at step `steps`."""
    warmup = min(config.warmup_steps, steps // 2)
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
    """True for matrices and embeddings, False for biases, norms and gains: the mask of the weight decay."""

    def matrix(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and name in ("kernel", "embedding")

    return jax.tree_util.tree_map_with_path(matrix, params)
