"""What a run tells: rows of metrics, the screen, evaluations with samples, the plot, the last line."""

import dataclasses
import re
from typing import Any

import jax

from effattn_jax.training.folder import RunFolder
from effattn_jax.training.hardware import utilisation
from effattn_jax.training.metrics import Metrics, plot_losses
from effattn_jax.training.progress import Clock, Screen, short
from effattn_jax.training.sampling import sample_text, show_answers
from effattn_jax.training.setup import Setup

PROMPT_TOKENS = 32


class Reporter:
    """Writes and shows one run's numbers, from step `first` on. All processes compute; one writes.

    Args:
      setup: the run's parts.
      folder: where metrics, samples and the plot go.
      screen: where lines go.
      first: the step that the run goes on from.
    """

    def __init__(self, setup: Setup, folder: RunFolder, screen: Screen, first: int):
        self._setup, self._folder, self._screen = setup, folder, screen
        self._config = setup.config.train
        self._clock = Clock()
        self._row: dict[str, float] = {}
        self._values: dict[str, float] = {}
        self._also: list[str] = []
        self._unit = setup.task.unit.partition(" a token")[0]
        self._metrics = None
        if folder.writes:
            options = {"tensorboard": self._config.tensorboard, "wandb": self._config.wandb}
            self._metrics = Metrics(folder, first, **options, config=dataclasses.asdict(setup.config))
            _keep_samples(folder, first)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._screen.stop()
        if self._metrics is None:
            return
        try:
            self._metrics.close()
            plot_losses(self._folder, self._screen.name, self._setup.task.unit)
        except OSError:
            if error is None:
                raise

    def step(self, step: int, numbers: dict[str, Any], last: bool = False) -> None:
        """Take in one step's numbers; `last` says that a pause follows."""
        if last:
            self._clock.close(step)
        else:
            self._clock.tick(step)
        self._row = {f"train/{name}": float(value) for name, value in numbers.items() if name != "good"}
        seconds = self._clock.seconds_per_step
        if seconds:
            items = self._setup.dataset.batch_size * self._setup.task.items_per_row
            self._row |= {"tokens_per_second": items / seconds, "ms_per_step": 1e3 * seconds}
        self._screen.step(step, self._row, seconds)
        if step % self._config.log_every == 0 and not self._evaluates(step):
            self._write(step, self._row)

    def _evaluates(self, step: int) -> bool:
        return step == self._config.steps or step % self._config.eval_every == 0

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._metrics:
            self._metrics.write(step, values)

    def resume(self, step: int) -> None:
        """Keep what has happened since step `step` out of the step time."""
        self._clock.start(step)

    def evaluate(self, step: int, params: Any) -> dict[str, float]:
        """Evaluate, write the step's row, sample; returns the validation metrics."""
        self._values = self._setup.evaluate(params)
        self._write(step, {**self._row, **self._values})
        self._screen.say(f"step {step}: {describe(self._values, self._unit)}", style="bold")
        if self._config.sample_tokens:
            self._sample(step, params)
        return self._values

    def _evaluate_also(self, step: int, params: Any) -> None:
        for text, setup in self._setup.also.items():
            values = setup.evaluate(params)
            self._also.append(f"{text}: {describe(values, self._unit)}")
            self._screen.say(self._also[-1], style="bold")
            if self._metrics:
                self._metrics.also(step, text, values)

    def _sample(self, step: int, params: Any) -> None:
        text = self._sampled(step, params)
        if self._metrics is None:
            return
        with open(self._folder / "samples.txt", "a", encoding="utf-8") as file:
            file.write(f"=== step {step}\n{text}\n")
        self._metrics.text("sample", text, step)
        self._screen.say(text if step == self._config.steps else _shortened(text), style="dim")

    def _sampled(self, step: int, params: Any) -> str:
        dataset = self._setup.dataset
        if not dataset.bytes_per_token:
            return show_answers(self._setup.task, params, dataset)
        prompt = self._config.sample_prompt
        if prompt is None:
            prompt = dataset.decode(dataset.validation_items([0])["tokens"][0][:PROMPT_TOKENS])
        options = {"key": jax.random.key(step), "temperature": self._config.sample_temperature}
        model, length = self._setup.task.model, self._config.sample_tokens
        return prompt + sample_text(model, params, dataset.codec, prompt, length, dataset.context, **options)

    def finish(self, state: Any) -> dict[str, float]:
        """The further evaluations and the last line, the last step being saved; the run is finished from here on."""
        values = self._values or self._setup.evaluate(state.params)
        self._evaluate_also(self._config.steps, state.params)
        speed = ""
        if "tokens_per_second" in self._row:
            rate = self._row["tokens_per_second"]
            used = utilisation(3 * self._setup.task.flops_per_item * rate, self._setup.mesh.size)
            speed = f"; {short(rate)} tokens/s, {used}"
        summary = "; ".join([f"{self._config.steps} steps, {describe(values, self._unit)}", *self._also])
        if self._folder.writes:
            self._folder.finish(self._config.steps, summary)
        self._screen.stop()
        self._screen.say(f"finished: {summary}{speed}; {self._config.run_dir}", style="bold")
        return values


def describe(values: dict[str, float], unit: str = "nats") -> str:
    """Validation metrics as text.

    Example:
      >>> describe({"val/loss": 1.5, "val/bits_per_byte": 2.164, "val/accuracy": 0.5})
      'validation loss 1.5000 nats, 2.164 bits/byte, accuracy 0.500'
    """
    loss = values["val/loss"]
    text = f"validation loss {f'{loss:.4f}' if loss >= 0.01 else f'{loss:.3g}'} {unit}"
    if "val/bits_per_byte" in values:
        text += f", {values['val/bits_per_byte']:.3f} bits/byte"
    return text + (f", accuracy {values['val/accuracy']:.3f}" if "val/accuracy" in values else "")


def _shortened(text: str, lines: int = 3) -> str:
    first = text.splitlines()
    return "\n".join(first[:lines]) + (" ..." if len(first) > lines else "")


def _keep_samples(folder: RunFolder, last: int) -> None:
    """Drop the samples of steps after `last`, which the run will write again."""
    try:
        text = (folder / "samples.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    blocks = re.split(r"(?m)^(?==== step \d+$)", text)
    kept = [b for b in blocks if (m := re.match(r"=== step (\d+)\n", b)) and int(m[1]) <= last]
    folder.write_text("samples.txt", "".join(kept))
