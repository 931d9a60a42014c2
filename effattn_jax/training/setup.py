"""From a config to compiled functions on a mesh: everything between the data and the loop."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effattn_jax.data import Dataset, load
from effattn_jax.models.inputs import check_length
from effattn_jax.parallel import local_shard, make_mesh, place_batch, shard_tree
from effattn_jax.training.config import Config, changed
from effattn_jax.training.errors import user_errors
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.step import init_state, make_train_step
from effattn_jax.training.tasks import make_task


class Setup(NamedTuple):
    """The parts of a run, made once.

    Attributes:
      config, dataset, task, mesh: what the names say.
      abstract_state: shapes, dtypes and shardings of the state.
      init: seed -> state before the first step.
      train_step: (state, batch, step) -> (state, metrics); the state given is used up.
      eval_step: (params, batch) -> sums.
      also: a setup for each text of `train.eval_also`, of which the data and `evaluate` are used.
    """

    config: Config
    dataset: Dataset
    task: Any
    mesh: Mesh
    abstract_state: Any
    init: Any
    train_step: Any
    eval_step: Any
    also: dict[str, "Setup"] = {}

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The training batch of a step, on the mesh: a pure function of (seed, step)."""
        shard = local_shard(self.mesh, self.dataset.batch_size)
        rows = self.dataset.batch(self.config.train.seed, step, *shard)
        return place_batch(self.mesh, rows, self.dataset.batch_size)

    def validation_batches(self) -> Iterator[dict[str, jax.Array]]:
        """The validation batches of an evaluation, on the mesh."""
        shard = local_shard(self.mesh, self.dataset.batch_size)
        for rows in self.dataset.validation_batches(self.config.train.eval_batches, *shard):
            yield place_batch(self.mesh, rows, self.dataset.batch_size)

    def evaluate(self, params: Any) -> dict[str, float]:
        """Validation metrics, named as in metrics.csv; sums over batches are taken in float64."""
        sums = jax.device_get([self.eval_step(params, batch) for batch in self.validation_batches()])
        total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        values = {"val/loss": total["loss"] / total["weight"]}
        if "correct" in total:
            values["val/accuracy"] = total["correct"] / total["weight"]
        if self.dataset.bytes_per_token:
            values["val/bits_per_byte"] = values["val/loss"] / math.log(2) / self.dataset.bytes_per_token
        return values


def prepare(config: Config, dataset: Dataset) -> Setup:
    """Make the mesh, the model, the optimizer and the compiled functions.

    Raises:
      UserError: a mesh that does not fit the devices or the batch, or a model that cannot be built.
    """
    with user_errors():
        mesh = _make_mesh(config)
        task = make_task(config.model, dataset)
        _check_prompt(config, dataset)
        optimizer, schedule = make_optimizer(config.optim, config.train.steps)
        example = jax.tree.map(np.asarray, dataset.batch(config.train.seed, 0))
        init = partial(init_state, task, optimizer, batch=jax.tree.map(lambda x: x[:1], example))
        shapes = jax.eval_shape(init, np.uint32(config.train.seed))
    shardings = shard_tree(shapes, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    step = make_train_step(task, optimizer, schedule, config.train.microbatches)
    setup = Setup(
        config=config,
        dataset=dataset,
        task=task,
        mesh=mesh,
        abstract_state=abstract,
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        eval_step=jax.jit(task.evaluate, out_shardings=everywhere),
    )
    return setup._replace(also={text: _varied(setup, text) for text in config.train.eval_also})


def _check_prompt(config: Config, dataset: Dataset) -> None:
    """Check the prompt of the samples, which would otherwise be found wrong at the first evaluation."""
    prompt = config.train.sample_prompt
    if prompt and dataset.bytes_per_token:
        with user_errors("train.sample_prompt"):
            tokens = dataset.codec.encode(prompt)
        if not len(tokens):
            raise ValueError(f"train.sample_prompt must hold at least one token of the data, got {prompt!r}.")


def _varied(setup: Setup, text: str) -> Setup:
    """The setup that evaluates the same parameters on other data, or by other settings of inference."""
    with user_errors(f"evaluation {text!r}"):
        return _under(setup, text)


def _under(setup: Setup, text: str) -> Setup:
    config = changed(setup.config, text)
    dataset = load(config.data)
    old, new = ((d.kind, d.vocab_size, d.num_classes, d.num_outputs) for d in (setup.dataset, dataset))
    if old != new:
        raise ValueError(f"it changes what the model reads or says, (kind, sizes) from {old} to {new}")
    check_length(config.model, dataset.context)
    groups = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    if dataset.batch_size % groups:
        raise ValueError(
            f"data.batch_size must be a multiple of the mesh's data x fsdp = {groups}, got {dataset.batch_size}."
        )
    task = make_task(config.model, dataset)
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    step = jax.jit(task.evaluate, out_shardings=everywhere)
    return setup._replace(config=config, dataset=dataset, task=task, eval_step=step)


def _make_mesh(config: Config) -> Mesh:
    axes = config.mesh
    return make_mesh(axes.data, axes.fsdp, axes.tensor, axes.sequence, batch_size=config.data.batch_size)
