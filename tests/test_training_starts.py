"""Starts of a run that are refused, that come after one, or that come from another thread."""

import dataclasses
import signal
from concurrent.futures import ThreadPoolExecutor

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
