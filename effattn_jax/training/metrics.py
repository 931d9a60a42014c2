"""Where numbers go: metrics.csv and metrics.jsonl, TensorBoard events, Weights & Biases, the loss plot.

A row belongs to a step, and its losses depend on nothing but that step. On resuming at step s the rows after s, and a
line that a kill cut short, are dropped; the run writes them again.
"""

import csv
import hashlib
import io
import json
from typing import Any

from effattn_jax.training.errors import UserError
from effattn_jax.training.folder import RunFolder

COLUMNS = (
    "step",
    "train/loss",
    "train/grad_norm",
    "train/update_norm",
    "train/param_norm",
    "train/learning_rate",
    "val/loss",
    "val/bits_per_byte",
    "val/accuracy",
    "tokens_per_second",
    "ms_per_step",
)


class Metrics:
    """Writers of one run's numbers, used by the process that writes.

    Args:
      folder: the run folder.
      resume_step: the step that the run goes on from, 0 for a new run.
      tensorboard: whether to write TensorBoard events.
      wandb: project of Weights & Biases, or None.
      config: the run's configuration as nested dictionaries, for Weights & Biases.
    """

    def __init__(
        self,
        folder: RunFolder,
        resume_step: int,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        rows = [row for row in read_csv(folder) if int(row["step"]) <= resume_step]
        folder.write_text("metrics.csv", _csv_text(rows))
        # A further evaluation is made after the last step was saved, so it goes with the steps after it.
        lines = [line for line in _read_jsonl(folder) if line["step"] + ("also" in line) <= resume_step]
        folder.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self._csv = open(folder / "metrics.csv", "a", encoding="utf-8", newline="")
        self._jsonl = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self._tensorboard = _tensorboard(folder, resume_step) if tensorboard else None
        self._wandb = _wandb(folder, wandb, config) if wandb else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the row of one step. Names outside `COLUMNS` go everywhere but into the CSV file."""
        self._csv.write(_csv_text([{"step": step, **values}], header=False))
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._csv.flush()
        self._jsonl.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def also(self, step: int, text: str, values: dict[str, float]) -> None:
        """Add the line of a further evaluation, which `text` describes, to the JSON lines."""
        self._jsonl.write(json.dumps({"step": step, "also": text, **values}) + "\n")
        self._jsonl.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text (a sample) in TensorBoard."""
        if self._tensorboard:
            self._tensorboard.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._csv.close()
        self._jsonl.close()
        for writer, end in ((self._tensorboard, "close"), (self._wandb, "finish")):
            if writer:
                getattr(writer, end)()


def read_csv(folder: RunFolder) -> list[dict[str, str]]:
    """Complete rows of metrics.csv as text, in the order of the file; none where there is no file."""
    try:
        text = (folder / "metrics.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(complete))
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]


def _read_jsonl(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _csv_text(rows: list[dict[str, Any]], header: bool = True) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def _tensorboard(folder: RunFolder, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder.path), purge_step=resume_step + 1)


def _wandb(folder: RunFolder, project: str, config: dict[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("train.wandb needs the package wandb (pip install wandb).") from error
    # The same folder goes on with the same curve.
    identity = hashlib.sha256(str(folder.path).encode()).hexdigest()[:12]
    return wandb.init(
        project=project, name=folder.path.name, id=identity, resume="allow", dir=str(folder.path), config=config
    )


def plot_losses(folder: RunFolder, title: str, unit: str = "nats a token") -> None:
    """Draw metrics.csv as loss.png: training loss (each logged step, and smoothed), validation loss and its end."""
    from matplotlib.figure import Figure

    rows = read_csv(folder)
    train = [(int(r["step"]), float(r["train/loss"])) for r in rows if r["train/loss"]]
    held_out = [(int(r["step"]), float(r["val/loss"])) for r in rows if r["val/loss"]]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), color="#9ecae1", linewidth=1, label="training batch")
        axes.plot(*zip(*_smooth(train)), color="#08519c", linewidth=1.8, label="training, running mean")
    if held_out:
        label = f"validation, {held_out[-1][1]:.3f} at the end"
        axes.plot(*zip(*held_out), "o-", color="#d95f02", linewidth=1.8, markersize=4, label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held_out:
        axes.legend(frameon=False)
    temporary = folder / ".loss.png.tmp"
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(folder / "loss.png")


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential running mean over about a fortieth of the run, corrected for its start."""
    share = max(0.0, 1 - 40 / len(points))
    out, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        out.append((step, total / weight))
    return out
