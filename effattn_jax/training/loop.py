"""The run, start to end, in the order in which it happens."""

import dataclasses
from typing import Any

import jax
import numpy as np

from effattn_jax.data import load
from effattn_jax.training.checkpoints import Checkpoints
from effattn_jax.training.config import Config
from effattn_jax.training.errors import Interrupted, UserError, one_line, user_errors
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.hardware import device_summary
from effattn_jax.training.interrupt import StopSignals
from effattn_jax.training.optimizer import describe_groups
from effattn_jax.training.profiler import Profiler
from effattn_jax.training.progress import Screen
from effattn_jax.training.reports import Reporter
from effattn_jax.training.setup import Setup, prepare
from effattn_jax.training.startup import join_processes, keep_freed_memory, split_cpu, use_compile_cache


def train(config: Config, name: str = "run") -> dict[str, float]:
    """The run of `effattn_jax.training.train`."""
    if config.train.run_dir is None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=f"runs/{name}"))

    # ------------------------------------------------------------------ data, processes, mesh, model, optimizer
    with user_errors():
        config.validate()
        dataset = load(config.data)
    keep_freed_memory()
    use_compile_cache(config.train.compile_cache)
    split_cpu(config.mesh.cpu_devices)
    join_processes(config.mesh)
    first_process = jax.process_index() == 0
    setup = prepare(config, dataset)

    # ------------------------------------------------------------------ folder, state, steps
    folder = RunFolder(config.train.run_dir, writes=first_process)
    screen = Screen(name, config.train.steps, visible=first_process)
    folder.open(config, dataset)
    screen.say(f"{name}: {device_summary()}; run folder {config.train.run_dir}")
    try:
        checkpoints = Checkpoints(folder)
        with jax.set_mesh(setup.mesh), checkpoints:
            state, step = _first_state(setup, checkpoints, screen)
            return _steps(setup, folder, checkpoints, screen, state, step)
    except OSError as error:
        raise UserError(f"run folder {folder.path}: {one_line(error)}; {folder.newest()}.") from error
    finally:
        screen.stop()
        folder.close()


def _first_state(setup: Setup, checkpoints: Checkpoints, screen: Screen) -> tuple[Any, int]:
    """The newest whole checkpoint, or the initial state.

    Raises:
      UserError: the checkpoint lies beyond the run's last step, so a longer run would pass for this one.
    """
    params = setup.abstract_state.params
    screen.table(params, jax.tree.map(lambda x: x.sharding, params))
    groups = describe_groups(setup.config.optim, params)
    if groups:
        screen.say(groups)
    restored = checkpoints.restore(setup.abstract_state)
    if restored is None:
        return setup.init(np.uint32(setup.config.train.seed)), 0
    state, meta = restored
    if meta["step"] > setup.config.train.steps:
        done = f"the {meta['step']} steps that run folder {checkpoints.folder.path} has done"
        raise UserError(f"train.steps must be at least {done}, got {setup.config.train.steps}.")
    screen.say(f"resuming after step {meta['step']}")
    return state, meta["step"]


def _steps(
    setup: Setup, folder: RunFolder, checkpoints: Checkpoints, screen: Screen, state: Any, first: int
) -> dict[str, float]:
    """The loop. Numbers of a step are read while the next one is computed, so the device never waits for the host."""
    config = setup.config.train
    with (
        StopSignals() as signals,
        Profiler(folder, config.profile_steps) as profiler,
        Reporter(setup, folder, screen, first) as reporter,
    ):
        screen.start(first)
        pending = None
        for step in range(first, config.steps):
            with profiler.step(step, state):
                state, numbers = setup.train_step(state, setup.batch(step), np.int32(step))
            if pending:
                _check(reporter, checkpoints, state, *pending)
            pending, done = (step + 1, numbers), step + 1

            # ---------------------------------------------------------- now and then: evaluate, save, stop
            stop = signals.received(done)
            last = done == config.steps
            evaluate = last or done % config.eval_every == 0
            save = last or stop or done % config.checkpoint_every == 0
            if evaluate or save:
                _check(reporter, checkpoints, state, *pending, last=True)
                pending = None
                values = reporter.evaluate(done, state.params) if evaluate else {}
                if save:
                    checkpoints.save(done, state, values.get("val/loss"))
                reporter.resume(done)
            if stop and not last:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped by signal {stop}; step {done} is saved, the same command goes on.", 128 + stop
                )

        # -------------------------------------------------------------- the end
        checkpoints.wait()
        return reporter.finish(state)


def _check(
    reporter: Reporter,
    checkpoints: Checkpoints,
    state: Any,
    step: int,
    numbers: dict[str, jax.Array],
    last: bool = False,
) -> None:
    """Read a step's numbers; after a bad one the state has stood still, and is saved before the run stops."""
    values = jax.device_get(numbers)
    if values["good"]:
        reporter.step(step, values, last)
        return
    checkpoints.save(step - 1, state)
    checkpoints.wait()
    if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
        found = f"an update of norm {values['update_norm']} would leave parameters that are not finite"
    else:
        found = f"the loss is {values['loss']} and the gradient norm {values['grad_norm']}"
    raise UserError(
        f"step {step}: {found}, so the run stops; the state before it is kept as step {step - 1} of "
        f"{checkpoints.folder.path}. A lower --optim.learning-rate or more --optim.warmup-steps may help."
    )
