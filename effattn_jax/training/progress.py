"""What a person sees: the parameter table, a progress bar on a terminal, plain lines elsewhere."""

import re
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 3.0


class Clock:
    """Steps a second over the last few seconds, pauses (evaluation, saving, compiling) taken out.

    A step is read after the next one was handed over, and a small program on a CPU is computed while it is handed over. What lies between two ticks
    is one step's time there too; the last step before a pause, read at once, has none of its own. Where only one or two steps lie between
    pauses, they are timed as a whole.

    Example:
      >>> clock = Clock()
      >>> clock.tick(1)
      >>> clock.seconds_per_step is None
      True
    """

    def __init__(self, memory: float = 0.9):
        self._memory = memory
        self._start: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self.seconds_per_step: float | None = None

    def tick(self, step: int) -> None:
        """Note that a step was read after the next one was handed over."""
        now = time.perf_counter()
        self._measure(self._last, step, now)
        self._last = (step, now)

    def close(self, step: int) -> None:
        """Note that the last step before a pause is complete."""
        if self._start is not None and step - self._start[0] <= 2:
            self._measure(self._start, step, time.perf_counter())

    def start(self, step: int) -> None:
        """The pause after a step is over; the first steps of all, which are compiled, have no start."""
        self._start, self._last = (step, time.perf_counter()), None

    def _measure(self, since: tuple[int, float] | None, step: int, now: float) -> None:
        if since is None:
            return
        seconds, old = (now - since[1]) / (step - since[0]), self.seconds_per_step
        self.seconds_per_step = seconds if old is None else self._memory * old + (1 - self._memory) * seconds


class Screen:
    """The run on the screen of the process that writes; silent in the others.

    Args:
      name: shown before the bar.
      steps: number of steps in all.
      visible: whether this process shows anything.
      console: where to write; standard output by default.
    """

    def __init__(self, name: str, steps: int, visible: bool = True, console: Console | None = None):
        self._console = console or Console(quiet=not visible, highlight=False, soft_wrap=True)
        self._steps = steps
        self.name = name
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = -SECONDS_BETWEEN_LINES

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line (or several) above the bar; control characters, which samples may hold, do not reach the terminal."""
        shown = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
        self._console.print(shown, style=style, markup=False)

    def table(self, params: Any, shardings: Any) -> None:
        """The parameters: layers that are alike share a line."""
        self._console.print(parameter_table(params, shardings))

    def start(self, step: int) -> None:
        """Show the bar, where there is a terminal."""
        if not self._console.is_terminal or self._console.quiet:
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
        ]
        columns += [TextColumn("{task.fields[numbers]}"), TextColumn("ETA {task.fields[eta]}")]
        self._bar = Progress(*columns, console=self._console, transient=True, expand=True, refresh_per_second=5)
        self._task = self._bar.add_task(self.name, total=self._steps, completed=step, numbers="compiling", eta="-:--")
        self._bar.start()

    def step(self, step: int, values: dict[str, float], seconds_per_step: float | None) -> None:
        """Show one step's numbers: on the bar each time, as a line now and then."""
        numbers = _numbers(values)
        eta = "-:--" if seconds_per_step is None else duration((self._steps - step) * seconds_per_step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers, eta=eta)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {numbers}  ETA {eta}")

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _numbers(values: dict[str, float]) -> str:
    text = f"loss {values['train/loss']:.3f}  grad {values['train/grad_norm']:.2f}"
    if "ms_per_step" in values:
        text += f"  {short(values['tokens_per_second'])} tok/s  {values['ms_per_step']:.1f} ms/step"
    return text


def short(number: float) -> str:
    """A number with three figures and a unit prefix.

    Example:
      >>> short(951.2), short(48213), short(3.1e6)
      ('951', '48.2k', '3.10M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 2 - int(np.log10(value)))}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as [hours:]minutes:seconds.

    Example:
      >>> duration(75), duration(7265)
      ('1:15', '2:01:05')
    """
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def parameter_table(params: Any, shardings: Any) -> Table:
    """A table of the parameters with their shapes, mesh axes and sizes; numbered layers that are alike share a line."""
    rows: dict[tuple, list[int]] = {}
    specs = jax.tree.leaves(shardings)
    for (path, leaf), sharding in zip(jax.tree_util.tree_flatten_with_path(params)[0], specs):
        name = re.sub(r"\d+", "*", jax.tree_util.keystr(path, simple=True, separator="/"))
        used = ", ".join("-" if axis is None else str(axis) for axis in _split_axes(sharding)) or "replicated"
        rows.setdefault((name, leaf.shape, str(leaf.dtype), used), []).append(int(np.prod(leaf.shape)))
    total = sum(sum(sizes) for sizes in rows.values())
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column("parameter", footer="total")
    table.add_column("shape")
    table.add_column("type")
    table.add_column("on mesh axes")
    table.add_column("copies", justify="right")
    table.add_column("size", justify="right", footer=f"{total:,}")
    for (name, shape, dtype, used), sizes in rows.items():
        text_shape = " x ".join(map(str, shape)) or "scalar"
        table.add_row(name, text_shape, dtype, used, str(len(sizes)), f"{sum(sizes):,}")
    return table


def _split_axes(sharding: Any) -> list[str | None]:
    """Mesh axes along each array axis, without those of size 1; empty where nothing is split."""
    axes = [axis if axis and sharding.mesh.shape[axis] > 1 else None for axis in sharding.spec]
    return axes if any(axes) else []
