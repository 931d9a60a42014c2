"""A window of steps traced by jax's profiler, for xprof or Perfetto."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from effattn_jax.training.config import profile_window
from effattn_jax.training.folder import RunFolder


class Profiler:
    """Traces the steps START ... STOP - 1 into the folder `profile` of the run; without a window it does nothing.

    Args:
      folder: the run folder.
      window: the text START,STOP or None.
    """

    def __init__(self, folder: RunFolder, window: str | None):
        self._window = profile_window(window)
        self._folder = folder / "profile"
        self._running = False

    def step(self, step: int, state: Any) -> AbstractContextManager:
        """The context of one step; `state` is what the step before has made."""
        if self._window is None:
            return nullcontext()
        start, stop = self._window
        if start <= step < stop and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= stop:
            self._stop(state)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _stop(self, state: Any = None) -> None:
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()
