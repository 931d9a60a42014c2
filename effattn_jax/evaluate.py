"""Evaluate a run again, longer or otherwise: `python -m effattn_jax.evaluate RUN "data.context=512, model.rerope_window=32"`.

The parameters are those of a checkpoint. Each text names data, or settings of the model at inference alone, as `--train.eval-also` does for the end
of a training; the run as it was trained comes first. Nothing is written.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from effattn_jax.data import load
from effattn_jax.training.checkpoints import restore_named
from effattn_jax.training.cli import run_command
from effattn_jax.training.config import MeshConfig
from effattn_jax.training.errors import UserError, user_errors
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.reports import describe
from effattn_jax.training.setup import prepare
from effattn_jax.training.startup import use_compile_cache


def command(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    conditions: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="CONDITION ...", help_behavior_hint="(default: none)")
    ] = (),
    /,
    *,
    step: str = "best",
    batches: int | None = None,
    data_path: str | None = None,
) -> None:
    """Print the validation metrics of a run's model, as it was trained and under other conditions.

    Args:
      run: The run folder, such as runs/quickstart.
      conditions: Data fields and settings of inference, each text an evaluation: "data.context=512, model.window=63".
      step: best, last or a number.
      batches: Validation batches in each evaluation; None: as in training.
      data_path: Where the run's text is now, if it was moved.
    """
    for text, values in evaluate(run, conditions, step=step, batches=batches, data_path=data_path).items():
        print(f"{text or 'as trained'}: {describe(values)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a mistake."""
    return run_command(command, "python -m effattn_jax.evaluate", arguments)


def evaluate(
    run: str, conditions: Sequence[str] = (), *, step: str = "best", batches: int | None = None, data_path: str | None = None
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Validation metrics of a run's model, as it was trained and under other conditions.

    Args:
      run: the run folder.
      conditions: texts "NAME=value, NAME=value" of data fields and settings of inference, such as "data.context=4096, model.window=63"; the
        trained length is the run's context unless `model.train_length` says otherwise.
      step: "best" by validation loss, "last", or a number.
      batches: of validation in each evaluation, as many as in training by default.
      data_path: where the run's text is now, if it was moved.

    Returns:
      Metrics (`val/loss` and so on) by condition, "" being the run's own.

    Raises:
      UserError: no run there, no whole checkpoint, other data, a condition that does not fit the run.
    """
    folder = RunFolder(run, writes=False)
    config = folder.config()
    if config is None:
        raise UserError(f"{run} is no run folder: it has no config.json.")
    if batches is not None and batches < 1:
        raise UserError(f"batches must be positive; got {batches}.")
    use_compile_cache(config.train.compile_cache)
    train = dataclasses.replace(config.train, eval_also=tuple(conditions))
    train = train if batches is None else dataclasses.replace(train, eval_batches=batches)
    data = config.data if data_path is None else dataclasses.replace(config.data, path=data_path)
    config = dataclasses.replace(config, train=train, data=data, mesh=MeshConfig(data=1))
    with user_errors():
        config.validate()
        dataset = load(config.data)
    folder.compare(config, dataset)
    setup = prepare(config, dataset)
    with user_errors():
        params = restore_named(folder, setup.abstract_state, step).params
    return {"": setup.evaluate(params), **{text: other.evaluate(params) for text, other in setup.also.items()}}


if __name__ == "__main__":
    sys.exit(main())
