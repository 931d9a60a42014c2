"""Tiny runs that the training tests share."""

import csv
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, MeshConfig, OptimConfig, TrainConfig, loop
from effattn_jax.training.checkpoints import Checkpoints
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.setup import prepare
from effattn_jax.training.tasks import LanguageTask

SETUPS = {}


def prepare_once(config, dataset):
    """`prepare`, but runs whose programs are the same share the functions that the first of them compiled."""
    if config.train.eval_also:
        return prepare(config, dataset)
    data = (dataclasses.replace(config.data, path=None), dataset.fingerprint)
    train = (config.train.steps, config.train.seed, config.train.microbatches, config.train.sample_prompt)
    key = (config.model, data, config.optim, config.mesh, train, LanguageTask.loss)
    if key not in SETUPS:
        SETUPS[key] = prepare(config, dataset)
    return SETUPS[key]._replace(config=config, dataset=dataset)


@pytest.fixture(autouse=True, scope="module")
def shared_programs():
    """A module that imports this compiles the programs of equal runs once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepare_once)
        yield


def tiny(folder: Path, *, model=None, data=None, optim=None, mesh=None, **train) -> Config:
    """A run of eight steps of a model with one narrow layer, in a fraction of a second once compiled."""
    return Config(
        model=ModelConfig(**{"layers": 1, "width": 16, "heads": 2, "dropout": 0.1, **(model or {})}),
        data=DataConfig(**{"batch_size": 8, "context": 16, **(data or {})}),
        optim=OptimConfig(**{"warmup_steps": 2, "learning_rate": 1e-2, **(optim or {})}),
        mesh=MeshConfig(**{"data": 1, **(mesh or {})}),
        train=TrainConfig(
            **{
                "steps": 8,
                "run_dir": str(folder),
                "checkpoint_every": 3,
                "eval_every": 4,
                "eval_batches": 2,
                "log_every": 1,
                "sample_tokens": 0,
                "tensorboard": False,
                "compile_cache": None,
                **train,
            }
        ),
    )


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[tuple[str, str, str]]:
    """(step, training loss, validation loss) of each row, as the file has them."""
    return [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(folder)]


def final_state(config: Config, step: int | None = None):
    """The state of the newest (or a certain) checkpoint of a run, as numpy arrays."""
    from effattn_jax.data import load

    setup = prepare_once(dataclasses.replace(config, mesh=MeshConfig(data=1)), load(config.data))
    with Checkpoints(RunFolder(config.train.run_dir, writes=False), read_only=True) as checkpoints:
        state, _ = checkpoints.restore(setup.abstract_state, None if step is None else [step])
    return jax.tree.map(np.asarray, state)


def assert_same(a, b) -> None:
    """Two states are equal bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
