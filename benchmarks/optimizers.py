"""Optimizers at equal wall time on the shakespeare-cpu preset, and the time of one update of a tree of 10 million parameters.

    python -m benchmarks.optimizers race TEXT [--steps 200] [--seeds 3] [--name NAME]
    python -m benchmarks.optimizers update [--rounds 25] [--name NAME]

race: every optimizer has the time that `steps` steps of the preset (AdamW, hard clipping) take, told from milliseconds a step measured side by side
before; its schedule ends there. The learning rate is the best of a grid by validation loss on seed 0: every optimizer starts with three rates, and the
grid goes on by factors of 2 while the best lies at its border. The figures are over `seeds` seeds; the validation loss is taken on `eval_batches` batches,
evenly spaced. Writes NAME.json after each run, and NAME.png at the end; the same command goes on where it was stopped.

update: updates and parameters of a tree of 10 million parameters (a GPT of 3 layers, 512 wide, 1024 tokens), with the addition, state and parameters donated,
in turn, round after round, with optax's chain of clipping and AdamW; medians, of the ratios of one round too.
"""

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("Agg")

from benchmarks.attention import RESULTS, device_name  # noqa: E402
from benchmarks.plot import COLOURS  # noqa: E402
from configs.shakespeare_cpu import get_config  # noqa: E402
from effattn_jax.data import load  # noqa: E402
from effattn_jax.optim import amos, clip_by_global_norm, lamb, lookahead, soft_clip_by_global_norm, tiger  # noqa: E402
from effattn_jax.training.setup import Setup, prepare  # noqa: E402
from effattn_jax.training.startup import keep_freed_memory  # noqa: E402

# name -> (fields of OptimConfig, grid of peak learning rates); what is not named is the preset's
CONTENDERS: dict[str, tuple[dict, tuple[float, ...]]] = {
    "AdamW, hard clip": ({}, (1e-3, 3e-3, 6e-3)),
    "AdamW, soft clip": ({"clip": "soft"}, (1e-3, 3e-3, 6e-3)),
    "Lookahead + AdamW": ({"lookahead_period": 5}, (1e-3, 3e-3, 6e-3)),
    "Amos": ({"name": "amos", "beta2": 0.98}, (1e-2, 3e-2, 6e-2)),
    "LAMB": ({"name": "lamb"}, (3e-3, 1e-2, 3e-2)),
    "Tiger": ({"name": "tiger", "beta1": 0.945, "weight_decay": 0.01}, (1e-3, 3e-3, 1e-2)),
}


@dataclasses.dataclass(frozen=True)
class Race:
    """Options of the comparison."""

    text: tyro.conf.Positional[str]
    """tinyshakespeare.txt."""
    steps: int = 200
    """Steps of AdamW, whose time all have."""
    seeds: int = 3
    """Seeds of initialisation and data."""
    points: int = 5
    """Evaluations in a run, evenly spaced."""
    eval_batches: int = 20
    """Validation batches in an evaluation."""
    name: str = "optimizers"
    """Name of the result files."""


@dataclasses.dataclass(frozen=True)
class Update:
    """Options of the timing."""

    rounds: int = 25
    """Timed rounds; the median counts."""
    name: str = "optimizers_update"
    """Name of the result file."""


def setup_of(race: Race, name: str, rate: float, steps: int, seed: int = 0) -> Setup:
    """The preset with one contender."""
    config, (fields, _) = get_config(), CONTENDERS[name]
    optim = {"learning_rate": rate, "final_learning_rate": rate / 10, "warmup_steps": steps // 10} | fields
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=race.text),
        optim=dataclasses.replace(config.optim, **optim),
        train=dataclasses.replace(config.train, steps=steps, seed=seed, eval_batches=race.eval_batches),
    )
    return prepare(config, load(config.data))


def milliseconds(race: Race, rounds: int = 5, block: int = 10) -> dict[str, float]:
    """Median time of a step of each contender, blocks in turn."""
    steppers, times = {}, {name: [] for name in CONTENDERS}
    for name in CONTENDERS:
        setup = setup_of(race, name, 1e-3, 1000)
        steppers[name] = [setup, setup.init(np.uint32(0)), 0]
    for number in range(rounds + 1):
        for name, stepper in steppers.items():
            setup, state, count = stepper
            started = time.perf_counter()
            for step in range(count, count + block):
                state, numbers = setup.train_step(state, setup.batch(step), np.int32(step))
            jax.block_until_ready((state, numbers))
            if number:  # the first round compiles
                times[name].append(1e3 * (time.perf_counter() - started) / block)
            stepper[1:] = state, count + block
    return {name: statistics.median(values) for name, values in times.items()}


def curve(race: Race, name: str, rate: float, steps: int, seed: int) -> list[tuple[int, float]]:
    """(step, validation loss) along one run; infinite from where its numbers are not finite."""
    setup = setup_of(race, name, rate, steps, seed)
    state = setup.init(np.uint32(seed))
    wanted = {round(steps * (i + 1) / race.points) for i in range(race.points)}
    out = []
    for step in range(steps):
        state, numbers = setup.train_step(state, setup.batch(step), np.int32(step))
        if step + 1 in wanted:
            out.append((step + 1, setup.evaluate(state.params)["val/loss"] if bool(numbers["good"]) else float("inf")))
    return out


def run_race(race: Race) -> None:
    """Measures, prints, writes and draws; what the result file holds of the same settings is not run again."""
    console = Console()
    keep_freed_memory()
    path = RESULTS / f"{race.name}.json"
    record = started(race, path)
    for row in record["race"]:
        for rate, seed in iter(lambda row=row: wanted(row, CONTENDERS[row["name"]][1], race.seeds), None):
            found = curve(race, row["name"], rate, row["steps"], seed)
            row["runs"].append({"rate": rate, "seed": seed, "curve": found})
            console.print(f"{row['name']}, {rate:g}, seed {seed}: {found[-1][1]:.4f}")
            path.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, path.with_suffix(".png"))
    console.print(race_table(record))


def started(race: Race, path: Path) -> dict:
    """The record to go on with: that of the file, or a new one with the steps that each contender has time for."""
    settings = {k: v for k, v in dataclasses.asdict(race).items() if k != "text"}
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] == settings and [row["name"] for row in record["race"]] == list(CONTENDERS):
            return record
    ms = milliseconds(race)
    budget = race.steps * ms["AdamW, hard clip"]
    rows = [{"name": name, "steps": round(budget / ms[name]), "ms": ms[name], "runs": []} for name in CONTENDERS]
    made = {"device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__}
    return made | {"seconds": budget / 1e3, "settings": settings, "race": rows}


def final(row: dict, rate: float, seed: int = 0) -> float:
    """Validation loss at the end of a run."""
    return next(run["curve"][-1][1] for run in row["runs"] if (run["rate"], run["seed"]) == (rate, seed))


def rates(row: dict) -> list[float]:
    """The learning rates that were tried, in order."""
    return sorted({run["rate"] for run in row["runs"]})


def best_rate(row: dict) -> float:
    """The best of the grid on seed 0."""
    return min(rates(row), key=lambda rate: final(row, rate))


def curves(row: dict) -> list[list]:
    """The learning curves at the best rate, one a seed."""
    return [run["curve"] for run in row["runs"] if run["rate"] == best_rate(row)]


def wanted(row: dict, grid: tuple[float, ...], seeds: int) -> tuple[float, int] | None:
    """(rate, seed) of the next run: the grid on seed 0, widened by factors of 2 until its best is inside, then the other seeds."""
    done = {(run["rate"], run["seed"]) for run in row["runs"]}
    for rate in grid:
        if (rate, 0) not in done:
            return rate, 0
    best, tried = best_rate(row), rates(row)
    if best in (tried[0], tried[-1]):
        return (2 * best if best == tried[-1] else best / 2), 0
    return next(((best, seed) for seed in range(seeds) if (best, seed) not in done), None)


def race_table(record: dict) -> Table:
    """The results as a table, best first."""
    title = f"validation loss after {record['seconds']:.0f} s of steps, {record['device']}, {record['date']}"
    table = Table("optimizer", "rate", "tried", "ms a step", "steps", "loss, mean", "lowest", "highest", title=title)
    finals = {row["name"]: [points[-1][1] for points in curves(row)] for row in record["race"]}
    for row in sorted(record["race"], key=lambda row: statistics.mean(finals[row["name"]])):
        losses = finals[row["name"]]
        figures = (statistics.mean(losses), min(losses), max(losses))
        cells = [
            f"{best_rate(row):g}",
            f"{rates(row)[0]:g} ... {rates(row)[-1]:g}",
            f"{row['ms']:.1f}",
            str(row["steps"]),
            *(f"{x:.3f}" for x in figures),
        ]
        table.add_row(row["name"], *cells)
    return table


def draw(record: dict, path: Path) -> None:
    """Mean validation loss over the seeds against time, with the range of the seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, row in zip(COLOURS, record["race"]):
        seconds = [step * row["ms"] / 1e3 for step, _ in curves(row)[0]]
        losses = np.array([[loss for _, loss in points] for points in curves(row)])
        axes.plot(
            seconds, losses.mean(0), color=colour, marker="o", markersize=3, label=f"{row['name']}, {best_rate(row):g}"
        )
        axes.fill_between(seconds, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds of steps", ylabel="validation loss, nats a character")
    axes.set_title(f"{record['device']}, jax {record['jax']}, {record['date']}", fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def ten_million() -> dict:
    """Parameters of a GPT of 3 layers, 512 wide."""
    rng, width = np.random.default_rng(0), 512
    shapes = {"tokens/embedding": (1024, width), "norm/scale": (width,)}
    for layer in range(3):
        block = {f"{name}/kernel": (width, width) for name in ("query", "key", "value", "out")}
        block |= {"in/kernel": (width, 4 * width), "down/kernel": (4 * width, width), "norm/scale": (width,)}
        shapes |= {f"layer_{layer}/{name}": shape for name, shape in block.items()}
    return {name: jnp.asarray(0.02 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def updaters() -> dict[str, optax.GradientTransformation]:
    """The chains that are timed; the first is what the others are compared with."""
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    return {
        "optax: clip_by_global_norm, adamw": optax.chain(optax.clip_by_global_norm(1.0), adamw),
        "clip_by_global_norm, adamw": optax.chain(clip_by_global_norm(1.0), adamw),
        "soft_clip_by_global_norm, adamw": optax.chain(soft_clip_by_global_norm(1.0), adamw),
        "optax: adamw": adamw,
        "amos": amos(0.01),
        "amos, momentum, clip_value": amos(0.01, momentum=0.9, clip_value=1.0),
        "clip_by_global_norm, amos, momentum": optax.chain(clip_by_global_norm(1.0), amos(0.01, momentum=0.9)),
        "optax: lamb": optax.lamb(1e-3),
        "lamb": lamb(1e-3),
        "optax: lookahead, adamw": optax.lookahead(adamw, 5, 0.5),
        "lookahead, adamw": lookahead(adamw),
        "tiger": tiger(1e-3),
    }


def run_update(update: Update) -> None:
    """Measures, prints and writes."""
    keep_freed_memory()  # as train.py does: fresh pages for temporaries would be timed with the arithmetic
    gradients = jax.tree.map(lambda p: p * 0.1, ten_million())
    runs = {name: stepper(optimizer, gradients) for name, optimizer in updaters().items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(update.rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number > 1:
                times[name].append(1e3 * (time.perf_counter() - started))
    median = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(times.values()))
    ratio = {name: statistics.median(t / b for t, b in zip(values, base)) for name, values in times.items()}
    size = sum(x.size for x in jax.tree.leaves(gradients))
    table = Table("chain", "ms", "ratio", title=f"one update of {size:,} parameters, {device_name()}")
    for name, value in median.items():
        table.add_row(name, f"{value:.1f}", f"{ratio[name]:.2f}")
    Console().print(table)
    record = {"device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__}
    path = RESULTS / f"{update.name}.json"
    path.write_text(json.dumps(record | {"parameters": size, "milliseconds": median, "ratio": ratio}, indent=1) + "\n")


def stepper(optimizer: optax.GradientTransformation, gradients: dict) -> Callable[[], None]:
    """A function that makes one update."""
    params = ten_million()
    if optimizer.init.__module__.startswith("optax") and "lookahead" in optimizer.init.__module__:
        params = optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))  # optax doubles them
    carry = [params, optimizer.init(params)]

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run() -> None:
        carry[:] = compiled(*carry, gradients)
        jax.block_until_ready(carry)

    return run


if __name__ == "__main__":
    Command = Annotated[Race, tyro.conf.subcommand("race")] | Annotated[Update, tyro.conf.subcommand("update")]
    chosen = tyro.cli(Command, description=__doc__)
    run_race(chosen) if isinstance(chosen, Race) else run_update(chosen)
