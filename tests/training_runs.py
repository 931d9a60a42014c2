"""Tiny runs that the training tests share."""

import csv
import dataclasses
from pathlib import Path

import jax
import numpy as np

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, MeshConfig, OptimConfig, TrainConfig
from effattn_jax.training.checkpoints import Checkpoints
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.setup import prepare


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

    setup = prepare(dataclasses.replace(config, mesh=MeshConfig(data=1)), load(config.data))
    with Checkpoints(RunFolder(config.train.run_dir, writes=False), read_only=True) as checkpoints:
        state, _ = checkpoints.restore(setup.abstract_state, None if step is None else [step])
    return jax.tree.map(np.asarray, state)


def assert_same(a, b) -> None:
    """Two states are equal bit by bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
