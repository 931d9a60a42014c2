"""What is trained: the model and the loss for each kind of dataset.

To add a kind, write a class with the members of `LanguageTask` and add one line to `TASKS`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.data import Dataset
from effattn_jax.models import LanguageModel, ModelConfig, SequenceClassifier, SequenceRegressor, flops_per_token
from effattn_jax.objectives import accuracy, cross_entropy, squared_error

Batch = dict[str, jax.Array]


class LanguageTask:
    """Next tokens, or answers at marked positions, by a causal language model.

    Attributes:
      model: the Linen module.
      items_per_row: tokens in a row, what throughput counts.
      unit: of the loss.
    """

    unit = "nats a token"

    def __init__(self, config: ModelConfig, dataset: Dataset):
        self.model = LanguageModel(config, dataset.vocab_size)
        self.items_per_row = dataset.context
        self.flops_per_item = flops_per_token(config, dataset.vocab_size, dataset.context)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Initial parameters."""
        return self.model.init(key, batch["tokens"])["params"]

    def _logits(self, params: Any, batch: Batch, **options: Any) -> jax.Array:
        return self.model.apply({"params": params}, batch["tokens"], **options)

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum of losses in nats, sum of weights) in training, dropout drawn from the key."""
        logits = self._logits(params, batch, deterministic=False, rngs={"dropout": key})
        return cross_entropy(logits, batch["targets"], batch["weights"])

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums over one validation batch: loss, correct, weight."""
        logits = self._logits(params, batch)
        loss, weight = cross_entropy(logits, batch["targets"], batch["weights"])
        return {"loss": loss, "correct": accuracy(logits, batch["targets"], batch["weights"])[0], "weight": weight}

    def predict(self, params: Any, batch: Batch) -> jax.Array:
        """Most probable token at each position, (B, T)."""
        return jnp.argmax(self._logits(params, batch), axis=-1)


class ClassificationTask:
    """One label a sequence, by a bidirectional classifier; the members are those of `LanguageTask`."""

    unit = "nats"

    def __init__(self, config: ModelConfig, dataset: Dataset):
        self.model = SequenceClassifier(config, dataset.num_classes, dataset.vocab_size)
        self.items_per_row = dataset.context
        self.flops_per_item = flops_per_token(config, None, dataset.context, causal=False)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Initial parameters."""
        return self.model.init(key, batch["inputs"])["params"]

    def _logits(self, params: Any, batch: Batch, **options: Any) -> jax.Array:
        return self.model.apply({"params": params}, batch["inputs"], mask=batch["mask"], **options)

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum of losses in nats, sum of weights) in training, dropout drawn from the key."""
        logits = self._logits(params, batch, deterministic=False, rngs={"dropout": key})
        return cross_entropy(logits, batch["labels"], batch["weights"])

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums over one validation batch: loss, correct, weight."""
        logits = self._logits(params, batch)
        loss, weight = cross_entropy(logits, batch["labels"], batch["weights"])
        return {"loss": loss, "correct": accuracy(logits, batch["labels"], batch["weights"])[0], "weight": weight}

    def predict(self, params: Any, batch: Batch) -> jax.Array:
        """Most probable label, (B,)."""
        return jnp.argmax(self._logits(params, batch), axis=-1)


class RegressionTask:
    """Numbers at marked steps from the numbers so far, by a causal regressor; the members are those of `LanguageTask`."""

    unit = "squared error"

    def __init__(self, config: ModelConfig, dataset: Dataset):
        self.model = SequenceRegressor(config, dataset.num_outputs)
        self.items_per_row = dataset.context
        self.flops_per_item = flops_per_token(config, dataset.num_outputs, dataset.context)

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Initial parameters."""
        return self.model.init(key, batch["inputs"])["params"]

    def loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(sum of squared errors, sum of weights) in training, dropout drawn from the key."""
        options = {"deterministic": False, "rngs": {"dropout": key}}
        outputs = self.model.apply({"params": params}, batch["inputs"], **options)
        return squared_error(outputs, batch["targets"], batch["weights"])

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Sums over one validation batch: loss, weight."""
        loss, weight = squared_error(self.predict(params, batch), batch["targets"], batch["weights"])
        return {"loss": loss, "weight": weight}

    def predict(self, params: Any, batch: Batch) -> jax.Array:
        """The outputs, (B, T, O)."""
        return self.model.apply({"params": params}, batch["inputs"])


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
