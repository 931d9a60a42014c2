"""Checkpoints: Orbax steps named by number in the run folder, the two newest and the best by validation loss.

Saving is asynchronous; a step counts only once it is complete. Restoring verifies a checksum of every bit of the state,
sets a damaged step aside with a warning, and takes the one before. The mesh may be another one than at saving.
"""

import contextlib
import itertools
import json
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from effattn_jax.training.errors import UserError, one_line
from effattn_jax.training.folder import RunFolder


class Checkpoints:
    """The checkpoints of one run; every process of the run takes part in each call.

    Args:
      folder: the run folder.
      read_only: leave it as it is; another process may be writing to it.
    """

    def __init__(self, folder: RunFolder, read_only: bool = False):
        # Whatever Orbax logs as an error it also raises, and is then reported in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder
        self._renames = folder.writes and not read_only
        self._last: int | None = None
        unreadable = self._unreadable() if folder.writes or read_only else []
        for step in unreadable:
            then = "the newest counts as the best" if read_only else "not using it"
            warnings.warn(f"checkpoint {step} is damaged (its metrics are unreadable); {then}.", stacklevel=2)
            if self._renames:
                _rename_damaged(folder, step)
        _barrier("checkpoints")
        options = _options(read_only, best=not (read_only and unreadable))
        self.manager = ocp.CheckpointManager(folder.path, options=options)

    def steps(self) -> list[int]:
        """Steps that are complete on disk, oldest first."""
        return sorted(self.manager.all_steps())

    def best(self) -> int | None:
        """The step with the lowest validation loss, the newest where none was evaluated."""
        best = self.manager.best_step()
        return self.manager.latest_step() if best is None else best

    def save(self, step: int, state: Any, val_loss: float | None = None) -> None:
        """Begin to save the state of a step; it is copied before this returns, and may then be donated.

        Raises:
          UserError: this or the save before could not be written (a full disk, say); complete steps stay as they are.
        """
        if step == self._last or step in self.manager.all_steps():
            return
        self.wait()
        meta = {"step": step, "val_loss": val_loss, "checksum": int(checksum(state))}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        # Orbax keeps a checkpoint's metric in memory and on disk only where one is given.
        metrics = None if val_loss is None else {"val_loss": val_loss}
        with self._writing(step):
            self.manager.save(step, args=items, metrics=metrics)
        self._last = step

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          UserError: it could not be written.
        """
        with self._writing(self._last):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Wait for the last save and release the threads; an error under way is not hidden by one of these."""
        try:
            with self._writing(self._last):
                self.manager.close()
        except UserError:
            if error is None:
                raise

    def restore(self, abstract_state: Any, steps: Sequence[int] | None = None) -> tuple[Any, dict[str, Any]] | None:
        """The first whole checkpoint of some, or None where there is none.

        Args:
          abstract_state: shapes, dtypes and shardings to restore to.
          steps: in which order to try them; all, newest first, by default.

        Returns:
          (state, {"step", "val_loss", "checksum"}).

        Warns:
          for each damaged step, which the process that writes renames to STEP.damaged.
        """
        wanted = self.steps()[::-1] if steps is None else list(steps)
        for candidate, following in itertools.zip_longest(wanted, wanted[1:]):
            restored, problem = self.attempt(candidate, abstract_state)
            if _agreed(restored is not None):
                return restored
            instead = "there is no other" if following is None else f"trying {following}"
            warnings.warn(f"checkpoint {candidate} is damaged ({problem}); {instead}.", stacklevel=2)
            self._set_aside(candidate)
        return None

    def attempt(self, step: int, abstract_state: Any) -> tuple[Any, str]:
        """(what `restore` returns, "") of one step, or (None, what is wrong with it)."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore())
        try:
            restored = self.manager.restore(step, args=items)
            if int(checksum(restored.state)) == restored.meta["checksum"]:
                return (restored.state, restored.meta), ""
            return None, "its checksum is wrong"
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many types for one thing: these bytes are no checkpoint.
            return None, one_line(error)[:120]

    def _set_aside(self, step: int) -> None:
        if self._renames:
            _rename_damaged(self.folder, step)
        _barrier(f"aside-{step}")
        self.manager.reload()

    def _unreadable(self) -> list[int]:
        """Orbax reads every step's metrics when it opens a folder to find the best, and fails as a whole on a damaged one."""
        steps = []
        for path in self.folder.path.glob("[0-9]*/metrics/metrics"):
            name = path.parent.parent.name
            if not name.isdigit():  # set aside, or on its way
                continue
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                steps.append(int(name))
        return steps

    def _writing(self, step: int | None) -> "_Writing":
        return _Writing(self, step)


def restore_named(folder: RunFolder, abstract_state: Any, step: str) -> Any:
    """The state of a step that a person names: "best" by validation loss, "last", or a number; nothing is written.

    A damaged best or last one is answered with the newest whole one, and a warning.

    Raises:
      UserError: no such step, a damaged one named by its number, or no whole checkpoint.
    """
    with Checkpoints(folder, read_only=True) as checkpoints:
        known = checkpoints.steps()
        if step not in ("best", "last", *map(str, known)):
            held = f"a step that {folder.path} holds ({', '.join(map(str, known))})"
            raise UserError(f"--step must be best, last or {held}, got {step!r}.")
        if step not in ("best", "last"):
            return _restore_number(checkpoints, abstract_state, int(step))
        best = checkpoints.best() if step == "best" else None
        restored = checkpoints.restore(abstract_state, sorted(known, key=lambda s: (s == best, s), reverse=True))
    if restored is None:
        raise UserError(f"{folder.path} has no whole checkpoint.")
    return restored[0]


def _restore_number(checkpoints: Checkpoints, abstract_state: Any, step: int) -> Any:
    restored, problem = checkpoints.attempt(step, abstract_state)
    if restored is None:
        others = [s for s in checkpoints.steps() if s != step and checkpoints.attempt(s, abstract_state)[0]]
        whole = ", ".join(map(str, others)) or "none"
        raise UserError(f"step {step} of {checkpoints.folder.path} is damaged ({problem}); whole: {whole}.")
    return restored[0]


class _Writing:
    """Turns whatever fails while a checkpoint is written into one line that says what is still safe."""

    def __init__(self, checkpoints: Checkpoints, step: int | None):
        self.checkpoints, self.step = checkpoints, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        folder = self.checkpoints.folder
        with contextlib.suppress(Exception):  # the save before this one may still be on its way
            self.checkpoints.manager.wait_until_finished()
        reason = "No space left on device" if _disk_is_full(error) else one_line(error)
        kept = folder.newest(before=self.step)
        raise UserError(f"checkpoint {self.step} could not be written to {folder.path} ({reason}); {kept}.") from error


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == 28 or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _options(read_only: bool, best: bool) -> ocp.CheckpointManagerOptions:
    keep = ocp.checkpoint_managers
    best_kept = keep.BestN(get_metric_fn=lambda m: -m["val_loss"], n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        best_fn=(lambda m: m["val_loss"]) if best else None,
        best_mode="min",
        preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(2), best_kept]),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        enable_async_checkpointing=True,
        **({} if best else {"lightweight_initialize": True}),
    )


def _rename_damaged(folder: RunFolder, step: int) -> None:
    source = folder / str(step)
    number = sum(1 for _ in folder.path.glob(f"{step}.damaged*"))
    if source.exists():
        source.rename(folder / f"{step}.damaged{number or ''}")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _agreed(success: bool) -> bool:
    if jax.process_count() == 1:
        return success
    return bool(np.all(multihost_utils.process_allgather(np.array(success))))


@jax.jit
def checksum(tree: Any) -> jax.Array:
    """A 32-bit checksum of every bit of a tree of arrays, the same on every mesh.

    Example:
      >>> bool(checksum({"a": jnp.ones(3)}) == checksum({"a": jnp.array([1.0, 1.0, 1.0])}))
      True
      >>> bool(checksum({"a": jnp.ones(3)}) == checksum({"a": jnp.array([1.0, 1.0, 1.0000001])}))
      False
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        width = min(leaf.dtype.itemsize, 4)
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * width}")) if leaf.dtype != bool else leaf
        # Odd multipliers are invertible modulo 2^32, so no single change of a word can cancel.
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total
