"""The run folder: who may use it, which run it belongs to, and whether that run is finished.

config.json says which run this is; finished.json, written last, names the files of the final checkpoint, so that a
finished run is recognised in milliseconds and a damaged one is not taken for finished.
"""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from effattn_jax.data import Dataset
from effattn_jax.training.config import Config, differences, from_dict
from effattn_jax.training.errors import UserError, one_line


class RunFolder:
    """A run's folder on disk; only the process with `writes=True` changes it.

    Attributes:
      path: the folder, absolute.
      writes: whether this process writes.
    """

    def __init__(self, path: str | os.PathLike, writes: bool = True):
        self.path = Path(path).absolute()
        self.writes = writes
        self._lock = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, config: Config, dataset: Dataset) -> None:
        """Take the folder for this run: make it, lock it, and compare it with the run that it holds.

        Args:
          config: the run that is to be started or resumed.
          dataset: its data, whose contents must be those of the run in the folder.

        Raises:
          UserError: the folder cannot be written, is in use, or belongs to another run (the message says how it
            differs).
        """
        try:
            if self.writes:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
            if self.read_json("config.json") is not None:
                self.compare(config, dataset)
            elif self.writes:
                self.write_json("dataset.json", describe(dataset))
                self.write_json("config.json", dataclasses.asdict(config))
        except BaseException as error:
            self.close()  # who keeps the error, as a notebook does, keeps this object and would keep the lock
            if isinstance(error, OSError):
                raise UserError(f"run folder {self.path} cannot be used: {one_line(error)}") from error
            raise

    def _take_lock(self) -> None:
        self._lock = open(self / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"run folder {self.path} is in use by another process.") from error
        except OSError:
            pass  # Some network file systems know no locks; training there is still worth more than refusing to.

    def config(self) -> Config | None:
        """The configuration of the run that the folder holds, None where it holds none.

        Raises:
          UserError: it is damaged, or was written by another version, with other fields.
        """
        held = self.read_json("config.json")
        try:
            return None if held is None else from_dict(held)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"run folder {self.path} has a config.json of another version: {one_line(error)}"
            ) from error

    def compare(self, config: Config, dataset: Dataset | None = None) -> None:
        """Check that the folder's run is the given one.

        Raises:
          UserError: it is not; the message shows the difference.
        """
        held = self.config()
        changes = differences(held, config) if held is not None else []
        old = (self.read_json("dataset.json") or {}).get("fingerprint")
        if dataset is not None and old not in (None, dataset.fingerprint):
            changes.append(f"contents of the data: {old} -> {dataset.fingerprint}")
        if changes:
            way_out = (
                "give the old values to resume it, or another --train.run-dir."
                if self.writes
                else "give what it was trained with."
            )
            raise UserError(f"run folder {self.path} holds another run ({'; '.join(changes)}): {way_out}")

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The record in a JSON file, None where there is no file.

        Raises:
          UserError: a file that holds no record, so that nobody can tell which run this is.
        """
        try:
            record = json.loads((self / name).read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("it holds no record")
            return record
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            way_out = "put the old file back, or give another run folder."
            raise UserError(f"run folder {self.path}: {name} is damaged ({one_line(error)}): {way_out}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in one piece: a kill in between leaves the old one."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in one piece: a kill in between leaves the old one."""
        temporary = self / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self / name)

    def newest(self, before: int | None = None) -> str:
        """What is safe on disk, in words: the newest checkpoint, or the newest before a certain step."""
        steps = [int(p.name) for p in self.path.glob("[0-9]*") if p.name.isdigit()]
        steps = [step for step in steps if before is None or step < before]
        return (
            f"the newest complete checkpoint is step {max(steps)}" if steps else "there is no complete checkpoint yet"
        )

    def finish(self, step: int, summary: str) -> None:
        """Declare the run finished at `step`, whose checkpoint is complete."""
        self.write_json("finished.json", {"step": step, "summary": summary, "files": self._sizes(step)})

    def finished(self, steps: int) -> str | None:
        """The summary of a finished run of `steps` steps whose final checkpoint has all its bytes, else None."""
        try:
            record = self.read_json("finished.json")
        except UserError:  # the run goes on from its newest checkpoint, and writes the file again
            return None
        if not record or record["step"] < steps or not record["files"]:
            return None
        return record["summary"] if record["files"] == self._sizes(record["step"]) else None

    def _sizes(self, step: int) -> dict[str, int]:
        root = self / str(step)
        return {str(f.relative_to(root)): f.stat().st_size for f in sorted(root.rglob("*")) if f.is_file()}


def describe(dataset: Dataset) -> dict[str, Any]:
    """What sampling and resuming must know of a dataset, as JSON."""
    return {
        "fingerprint": dataset.fingerprint,
        "kind": dataset.kind,
        "vocab_size": dataset.vocab_size,
        "num_classes": dataset.num_classes,
        "context": dataset.context,
        "codec": dataset.codec.spec() if dataset.codec else None,
    }
