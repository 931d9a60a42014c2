"""Kill a training run at random moments, start it again, and compare its end with an uninterrupted run bit by bit.

    python -m benchmarks.kill_resume --points 20

Each point is a fresh run folder: the command is started, gets SIGKILL or SIGTERM at a random step plus a random
fraction of a second (a save may be under way), and is started again until it ends. Exit code 1 if any state differs.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro

ROOT = Path(__file__).parents[1]
STEPS = 120
SMALL = {
    "--model.layers": 2,
    "--model.width": 32,
    "--model.heads": 2,
    "--model.dropout": 0.1,
    "--data.batch-size": 8,
    "--data.context": 32,
    "--train.checkpoint-every": 7,
    "--train.eval-every": 30,
    "--train.eval-batches": 2,
    "--train.log-every": 1,
    "--train.sample-tokens": 0,
    "--optim.warmup-steps": 5,
}


class Point(NamedTuple):
    """One kill: the signal, the last step written before it, where the second start went on, and what came out."""

    signal: str
    killed_at: int
    exit_code: int
    resumed_after: int
    same_state: bool
    same_losses: bool


def command(folder: Path, steps: int) -> list[str]:
    """The training command of every run here."""
    options = SMALL | {"--train.steps": steps, "--train.run-dir": folder}
    return [sys.executable, "train.py", "quickstart", *(str(word) for pair in options.items() for word in pair)]


def start(folder: Path, steps: int, devices: int) -> subprocess.Popen:
    """Start the run on a number of simulated CPU devices."""
    # Of two flags the last one holds: the number of devices is this one, all else as in this process.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        command(folder, steps), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(folder: Path, steps: int, devices: int) -> str:
    """Run the command to its end; returns what it printed."""
    out, err = (process := start(folder, steps, devices)).communicate()
    if process.returncode:
        raise RuntimeError(f"the run in {folder} ended with code {process.returncode}: {err[-2000:]}")
    return out


def losses(folder: Path) -> list[tuple[str, ...]]:
    """(step, training loss, validation loss) of each complete row of metrics.csv."""
    if not (folder / "metrics.csv").exists():
        return []
    text = (folder / "metrics.csv").read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [(row["step"], row["train/loss"], row["val/loss"]) for row in rows]


def final_state(folder: Path, steps: int) -> list[np.ndarray]:
    """Every array of the last checkpoint: parameters, optimizer, step, seed."""
    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on which devices the arrays were does not matter here
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpointer.restore(folder / str(steps) / "state"))]


def identical(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """Whether all bits agree."""
    return len(a) == len(b) and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b))


def kill_once(folder: Path, steps: int, devices: int, chance: random.Random, reference: Path) -> Point:
    """Start a run, kill it at a random moment, let the same command end it."""
    number = chance.choice([signal.SIGKILL, signal.SIGTERM])
    target, delay = chance.randrange(steps), chance.uniform(0, 0.1)
    process = start(folder, steps, devices)
    while process.poll() is None and len(losses(folder)) < target:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(number)
    process.communicate()
    killed_at = len(losses(folder))
    printed = finish(folder, steps, devices)
    resumed = [line.split()[-1] for line in printed.splitlines() if line.startswith("resuming after step")]
    return Point(
        signal=number.name,
        killed_at=killed_at,
        exit_code=process.returncode,
        resumed_after=int(resumed[0]) if resumed else steps if "is finished already" in printed else 0,
        same_state=identical(final_state(folder, steps), final_state(reference, steps)),
        same_losses=losses(folder) == losses(reference),
    )


def measure(folder: Path, points: int, seed: int = 0, steps: int = STEPS, devices: int = 1) -> list[Point]:
    """The reference run and all points, each in a folder of its own below `folder`."""
    chance = random.Random(seed)
    finish(folder / "reference", steps, devices)
    return [kill_once(folder / f"point{i}", steps, devices, chance, folder / "reference") for i in range(points)]


def main(points: int = 20, seed: int = 0, steps: int = STEPS, devices: int = 1) -> int:
    """Print a table of all points; 0 if every final state is the reference's.

    Args:
      points: number of kills.
      seed: of the random moments.
      steps: of a run.
      devices: simulated on the CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), points, seed, steps, devices)
    print(f"{'':>3}  {'signal':<8} {'killed at':>9} {'exit code':>9} {'resumed after':>13}  state      losses")
    for i, point in enumerate(measured):
        state, loss = ("identical" if same else "DIFFERENT" for same in (point.same_state, point.same_losses))
        numbers = f"{point.killed_at:>9} {point.exit_code:>9} {point.resumed_after:>13}"
        print(f"{i:>3}  {point.signal:<8} {numbers}  {state:<10} {loss}")
    good = sum(point.same_state and point.same_losses for point in measured)
    print(f"{good} of {len(measured)} runs end bit by bit as the uninterrupted run of {steps} steps.")
    return int(good < len(measured))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__.partition("\n")[0]))
