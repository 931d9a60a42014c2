"""Recall against state size: multi-query associative recall with every mixer, in one table and plot.

    python -m benchmarks.recall [--mixers softmax linear ...] [--widths 32 64] [--pairs 16] [--steps 600] [--jobs 1] [--name NAME]

Each run is the `mqar` preset (two layers, one head, a convolution of width 3 before each mixer) with another mixer, width and number of pairs; each
learning rate of `--rates` is tried and the best counts, since recurrences learn this task in a narrow band. The state is what decoding carries of one
layer's mixer after a whole context. Guessing one of the values in the context gives 1 / pairs. Writes benchmarks/results/NAME.json after each
run, from which the same command goes on where it was stopped, and its plot at the end.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import pathlib
import tempfile

RESULTS = pathlib.Path(__file__).parent / "results"
LEFT_OUT = ("fnet", "min_gru")  # no causal form; no product of keys and values


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    mixers: tuple[str, ...] = ()
    """Names of nn.MIXERS; empty is all that mix by attention or its kin."""
    widths: tuple[int, ...] = (32, 64)
    """Model widths, and with one head the width of keys and values."""
    pairs: int = 16
    """Pairs to remember."""
    context: int = 64
    """Tokens a row; at least four a pair."""
    window: int = 16
    """Window of the local mixer."""
    steps: int = 600
    """Updates a run."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates, of which the best counts."""
    jobs: int = 1
    """Runs at a time."""
    name: str = "recall"
    """Name of the result files."""


def state_size(config) -> int:
    """Numbers that one layer's mixer carries from token to token after a whole context."""
    import jax

    mixer = config.model.make_mixer(0)
    state = jax.eval_shape(lambda: mixer.init_state(1, config.data.context))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype.kind == "f")


def run(mixer: str, width: int, rate: float, settings: Settings) -> dict:
    """One training run: accuracy on the validation rows, and the state."""
    from configs.mqar import get_config
    from effattn_jax.training import train

    config = get_config()
    window = settings.window if mixer == "local" else None
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, width=width, mixer=mixer, window=window),
        data=dataclasses.replace(config.data, context=settings.context, num_pairs=settings.pairs),
        optim=dataclasses.replace(config.optim, learning_rate=rate),
    )
    with tempfile.TemporaryDirectory() as folder:
        options = {"steps": settings.steps, "eval_every": settings.steps, "checkpoint_every": settings.steps}
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, run_dir=folder + "/run", **options)
        )
        metrics = train(config, mixer)
    return {
        "mixer": mixer, "width": width, "learning_rate": rate, "accuracy": metrics["val/accuracy"], "state": state_size(config),
    }  # fmt: skip


def attempt(task: tuple) -> dict:
    """The run, or the reason why it was left out."""
    try:
        return run(*task)
    except Exception as error:  # noqa: BLE001 - a mixer that cannot run here is named and left out
        return {
            "mixer": task[0], "width": task[1], "learning_rate": task[2], "error": f"{type(error).__name__}: {str(error)[:300]}",
        }  # fmt: skip


def finished(path: pathlib.Path, record: dict) -> list[dict]:
    """The rows of an earlier start of the same measurement, so that it may be stopped and go on."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    same = all(earlier.get(name) == value for name, value in record.items() if name != "date")
    return [row for row in earlier.get("rows", ()) if "error" not in row] if same else []


def best(rows: list[dict]) -> list[dict]:
    """The best learning rate of each mixer and width."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        key = (row["mixer"], row["width"])
        if "error" not in row and row["accuracy"] >= kept.get(key, row)["accuracy"]:
            kept[key] = row
    return sorted(kept.values(), key=lambda row: (row["width"], -row["accuracy"]))


def plot(record: dict, path: pathlib.Path) -> None:
    """Accuracy against the size of the state, a point a mixer and width."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = sorted({row["mixer"] for row in record["best"]})
    colours = plt.get_cmap("tab20")
    for index, name in enumerate(names):
        rows = sorted((r for r in record["best"] if r["mixer"] == name), key=lambda r: r["state"])
        style = {"color": colours(index % 20), "marker": "os^Dv"[index % 5], "label": name}
        axes.plot([r["state"] for r in rows], [r["accuracy"] for r in rows], linewidth=0.8, **style)
    axes.axhline(1 / record["task"]["pairs"], color="grey", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="state of a layer, numbers", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_title(f"Recall of {record['task']['pairs']} pairs in {record['task']['context']} tokens")
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(settings: Settings) -> None:
    """Runs all, prints the table, writes JSON and plot."""
    import jax

    from benchmarks.attention import device_name
    from effattn_jax.nn import MIXERS

    names = settings.mixers or tuple(name for name in MIXERS if name not in LEFT_OUT)
    record = {
        "device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__,
        "task": {name: getattr(settings, name) for name in ("pairs", "context", "window", "steps")},
    }  # fmt: skip
    path = RESULTS / f"{settings.name}.json"
    rows = finished(path, record)
    done = {(row["mixer"], row["width"], row["learning_rate"]) for row in rows}
    tasks = [
        (m, w, r, settings) for m in names for w in settings.widths for r in settings.rates if (m, w, r) not in done
    ]
    record |= {"best": best(rows), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, mp_context=context) as pool:
        for row in pool.map(attempt, tasks):
            rows.append(row)
            record["best"] = best(rows)
            path.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, path.with_suffix(".png"))
    for row in record["best"]:
        print(f"{row['mixer']:32} width {row['width']:4}  state {row['state']:8,}  accuracy {row['accuracy']:.3f}")
    for row in rows:
        if "error" in row:
            print(f"{row['mixer']:32} width {row['width']:4}  left out: {row['error']}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings, description=__doc__))
