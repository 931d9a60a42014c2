"""Accuracy of a trained run on rows longer than those it was trained on.

    python -m benchmarks.longer_rows RUN [--lengths 256 1024 4096 16384] [--rows 64]

RUN is the folder of a run on a procedural language task, such as runs/selective-copying. Each length is the task's own with a longer context: fresh rows
of the validation side, a few at a time. A mixer with weights for each place, or learned positions, has no longer rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Contexts to test at."""
    rows: int = 64
    """Rows of each."""
    tokens: int = 1 << 16
    """Tokens at a time, at least one row."""
    step: str = "best"
    """Checkpoint: best, last or a number."""


def accuracies(run: str, settings: Settings) -> dict[int, float]:
    """Length -> accuracy."""
    from effattn_jax.data import load
    from effattn_jax.generate import _restore
    from effattn_jax.training.folder import RunFolder
    from effattn_jax.training.tasks import make_task

    folder = RunFolder(run, writes=False)
    config, found = folder.config(), {}
    task = make_task(config.model, load(config.data))
    params = _restore(folder, config, task, settings.step).params
    evaluate = jax.jit(task.evaluate)
    for length in settings.lengths:
        data = load(dataclasses.replace(config.data, context=length, validation_examples=settings.rows))
        size = max(1, min(settings.rows, settings.tokens // length))
        sums = [
            evaluate(params, jax.tree.map(jnp.asarray, data.validation_items(np.arange(start, start + size))))
            for start in range(0, settings.rows - size + 1, size)
        ]
        found[length] = float(sum(s["correct"] for s in sums) / sum(s["weight"] for s in sums))
        print(f"{length:9,} tokens: accuracy {found[length]:.4f}", flush=True)
    return found


if __name__ == "__main__":
    import tyro

    def main(run: tyro.conf.Positional[str], settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()) -> None:
        """Accuracy of a trained run on longer rows.

        Args:
          run: folder of the run.
        """
        accuracies(run, settings)

    tyro.cli(main)
