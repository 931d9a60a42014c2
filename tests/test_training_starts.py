"""Starts of a run that are refused, that come after one, or that come from another thread."""

import dataclasses
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from effattn_jax.training import UserError, train
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.interrupt import StopSignals
from tests.training_runs import shared_programs, tiny  # noqa: F401


def test_a_refused_start_gives_the_lock_back(tmp_path):
    config = tiny(tmp_path / "run", steps=2)
    train(config)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=0.5))
    with pytest.raises(UserError, match="learning_rate: 0.01 -> 0.5") as kept:
        train(other)
    train(config)
    assert kept.value is not None  # so that its frames, and the folder in them, have lived until here

    folder, second = RunFolder(tmp_path), RunFolder(tmp_path)
    folder._take_lock()
    with pytest.raises(UserError, match="in use"):
        second.open(config, None)
    assert second._lock is None
    folder.close()


def test_fewer_steps_than_the_folder_has_done(tmp_path):
    config = tiny(tmp_path / "run", optim={"schedule": "constant"})
    train(config)
    (tmp_path / "run" / "finished.json").unlink()
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    with pytest.raises(UserError, match="train.steps must be at least the 8 steps that run folder .* has done, got 4"):
        train(shorter)
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.parametrize("contents", ["", "{", "null", "[]", "\0" * 9])
@pytest.mark.parametrize("name", ["config.json", "dataset.json"])
def test_a_damaged_record_of_the_run_is_refused(tmp_path, name, contents):
    """Taken for missing, it would let another config or other data go on with the checkpoints that lie there."""
    config, data = tiny(tmp_path), SimpleNamespace(fingerprint="of the data")
    folder = RunFolder(tmp_path)
    folder.write_json("config.json", dataclasses.asdict(config))
    folder.write_json("dataset.json", {"fingerprint": "of the data"})
    folder.open(config, data)
    folder.close()
    (tmp_path / name).write_text(contents)
    with pytest.raises(UserError, match=f"run folder .*: {name} is damaged .*: put the old file back"):
        folder.open(config, data)
    assert folder._lock is None and (tmp_path / name).read_text() == contents


@pytest.mark.parametrize("contents", ["{", "null"])
def test_a_damaged_record_of_the_end_is_not_an_end(tmp_path, contents):
    (tmp_path / "finished.json").write_text(contents)
    assert RunFolder(tmp_path).finished(4) is None


def test_a_run_without_a_checkpoint_is_not_finished(tmp_path):
    folder = RunFolder(tmp_path)
    folder.finish(4, "4 steps")
    assert folder.finished(4) is None


def test_trains_outside_the_main_thread(tmp_path):
    with ThreadPoolExecutor(1) as threads:
        values = threads.submit(train, tiny(tmp_path / "run", steps=2)).result()
    assert values["val/loss"] > 0 and (tmp_path / "run" / "finished.json").exists()


def test_a_handler_from_outside_python(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handle = signal.signal
    monkeypatch.setattr(signal, "signal", lambda *given: [handle(*given), None][1])  # None, whatever was there
    try:
        with StopSignals():
            pass
        assert all(signal.getsignal(number) == signal.SIG_DFL for number in before)
    finally:
        for number, handler in before.items():
            handle(number, handler)
