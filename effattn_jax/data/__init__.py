"""Data: byte text, token files, procedural tasks, signals, digits. NumPy only; nothing here writes but `prepare`.

Every dataset gives `batch(seed, step, shard, num_shards)`, a pure function of its arguments, so the step is the whole
state of the input, and `validation_batches()`, a fixed set that shares nothing with training.
To add a task: write a function from `DataConfig` to `Dataset` and add a line to `TASKS`.
"""

from collections.abc import Callable

from effattn_jax.data.config import DataConfig, choice
from effattn_jax.data.digits import load_digits
from effattn_jax.data.listops import ListOps
from effattn_jax.data.recall import AssociativeRecall, Copying, InductionHeads, SelectiveCopying
from effattn_jax.data.sampling import Batch, Dataset
from effattn_jax.data.signals import Adding, Chirps, Delay
from effattn_jax.data.text import load_text
from effattn_jax.data.tokens import load_tokens

TASKS: dict[str, Callable[[DataConfig], Dataset]] = {
    "text": load_text,
    "tokens": load_tokens,
    "copying": Copying,
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
    "mqar": AssociativeRecall,
    "listops": ListOps,
    "digits": load_digits,
    "delay": Delay,
    "adding": Adding,
    "chirps": Chirps,
}


def load(config: DataConfig) -> Dataset:
    """The dataset that a config describes.

    Raises:
      ValueError: one line that names the field, what was given and the rule; an unknown task is answered with the
        nearest name.

    >>> dataset = load(DataConfig(batch_size=4, context=16))
    >>> dataset.batch(seed=0, step=3)["tokens"].shape
    (4, 16)
    """
    choice("task", config.task, TASKS)
    config.validate()
    return TASKS[config.task](config)


__all__ = [
    "TASKS",
    "Adding",
    "AssociativeRecall",
    "Batch",
    "Chirps",
    "Copying",
    "DataConfig",
    "Dataset",
    "Delay",
    "InductionHeads",
    "ListOps",
    "SelectiveCopying",
    "load",
    "load_digits",
    "load_text",
    "load_tokens",
]
