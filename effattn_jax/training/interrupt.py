"""Being asked to stop: SIGTERM and SIGINT (Ctrl-C) end a run after the step at hand, with its state saved."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While this context is open, the first signal is only noted; a second Ctrl-C interrupts at once.

    In a run of several processes SIGTERM belongs to jax, whose service lets all of them agree on the last step. Outside
    the main thread, where Python hands out no signals, they stay as they are.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._previous.items():
            # None is a handler from outside Python, which cannot be put back; with ours left, signals would do nothing.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def received(self, step: int) -> int | None:
        """The signal's number if the run is to stop after this step; every process asks at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self._received
