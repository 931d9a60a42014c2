"""What is trained: the model and the loss for each kind of dataset.

To add a kind, derive a class from `_Task` and add one line to `TASKS`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.data import Dataset
from effattn_jax.models import LanguageModel, ModelConfig, SequenceClassifier, SequenceRegressor, flops_per_token
from effattn_jax.objectives import accuracy, cross_entropy, squared_error

Batch = dict[str, jax.Array]


class _Task:
    """A model under an objective that gives sums over the marked places of a batch.

    Attributes:
      model: the Linen module.
      items_per_row: tokens in a row, what throughput counts.
      flops_per_item: operations a token, forward.
      unit: of the loss.
      answers: the name of the true answers in a batch.
      objective: (outputs, answers, weights) -> (sum of losses, sum of weights).
      score: the same of right answers, or None where there is no right and wrong.
    """

    unit = "nats"
    answers = "targets"
    objective = staticmethod(cross_entropy)
    score = staticmethod(accuracy)

    def __init__(self, model: Any, items_per_row: int, flops_per_item: float):
        self.model, self.items_per_row, self.flops_per_item = model, items_per_row, flops_per_item

    def _inputs(self, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the model is called with."""
        return batch["inputs"], {}

    def _outputs(self, params: Any, batch: Batch, **options: Any) -> jax.Array:
        inputs, more = self._inputs(batch)
        return self.model.apply({"params": params}, inputs, **more, **options)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Initial parameters."""
        return self.model.init(key, self._inputs(batch)[0])["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum of losses, sum of weights) in training, dropout drawn from the key."""
        outputs = self._outputs(params, batch, deterministic=False, rngs={"dropout": key})
        return self.objective(outputs, batch[self.answers], batch["weights"])

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums over one validation batch: loss, weight and, where there is a score, correct."""
        outputs = self._outputs(params, batch)
        loss, weight = self.objective(outputs, batch[self.answers], batch["weights"])
        sums = {"loss": loss, "weight": weight}
        if self.score is not None:
            sums["correct"] = self.score(outputs, batch[self.answers], batch["weights"])[0]
        return sums

    def predict(self, params: Any, batch: Batch) -> jax.Array:
        """Most probable answers, or the outputs where they are the answers."""
        outputs = self._outputs(params, batch)
        return outputs if self.score is None else jnp.argmax(outputs, axis=-1)


class LanguageTask(_Task):
    """Next tokens, or answers at marked positions, by a causal language model."""

    unit = "nats a token"

    def __init__(self, config: ModelConfig, dataset: Dataset):
        flops = flops_per_token(config, dataset.vocab_size, dataset.context)
        super().__init__(LanguageModel(config, dataset.vocab_size), dataset.context, flops)

    def _inputs(self, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return batch["tokens"], {}


class ClassificationTask(_Task):
    """One label a sequence, by a bidirectional classifier."""

    answers = "labels"

    def __init__(self, config: ModelConfig, dataset: Dataset):
        model = SequenceClassifier(config, dataset.num_classes, dataset.vocab_size)
        super().__init__(model, dataset.context, flops_per_token(config, None, dataset.context, causal=False))

    def _inputs(self, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return batch["inputs"], {"mask": batch["mask"]}


class RegressionTask(_Task):
    """Numbers at marked steps from the numbers so far, by a causal regressor."""

    unit = "squared error"
    objective = staticmethod(squared_error)
    score = None

    def __init__(self, config: ModelConfig, dataset: Dataset):
        flops = flops_per_token(config, dataset.num_outputs, dataset.context)
        super().__init__(SequenceRegressor(config, dataset.num_outputs), dataset.context, flops)


TASKS = {"language": LanguageTask, "classification": ClassificationTask, "regression": RegressionTask}


def make_task(config: ModelConfig, dataset: Dataset) -> Any:
    """The task of a dataset's kind.

    Raises:
      ValueError: for a kind that is not in `TASKS`.

    Example:
      >>> from effattn_jax.data import DataConfig, load
      >>> make_task(ModelConfig(), load(DataConfig(context=32))).items_per_row
      32
    """
    if dataset.kind not in TASKS:
        raise ValueError(f"a dataset of kind {dataset.kind!r} cannot be trained; known kinds: {', '.join(TASKS)}.")
    return TASKS[dataset.kind](config, dataset)
