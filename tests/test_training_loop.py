"""The run: what it writes, how it stops, and that it goes on bit by bit where it stopped."""

import json
import os
import shutil
import signal
import time
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.data import load
from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.training import Interrupted, UserError, progress, train
from effattn_jax.training.checkpoints import Checkpoints, restore_named
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.metrics import COLUMNS, Metrics
from effattn_jax.training.reports import Reporter
from effattn_jax.training.sampling import continue_tokens
from effattn_jax.training.setup import Setup, prepare
from tests.random_parameters import random_parameters
from tests.training_runs import assert_same, final_state, losses, rows, shared_programs, tiny  # noqa: F401


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of eight steps without interruption."""
    config = tiny(tmp_path_factory.mktemp("reference") / "run")
    train(config)
    return config


def interrupt_after(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal as soon as the loop reports a step."""
    report = Reporter.step

    def reporting(self, done, numbers, last=False):
        report(self, done, numbers, last)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "step", reporting)


# ---------------------------------------------------------------- what a run writes


def test_run_folder(tmp_path):
    config = tiny(tmp_path / "run", sample_tokens=20, tensorboard=True, eval_every=4, log_every=3)
    values = train(config)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json",
        "dataset.json",
        "finished.json",
        "metrics.csv",
        "metrics.jsonl",
        "samples.txt",
        "loss.png",
    } <= names
    assert {"6", "8"} <= names and any(name.startswith("events.out") for name in names)
    table = rows(folder)
    assert tuple(table[0]) == COLUMNS and COLUMNS[0] == "step"
    assert [row["step"] for row in table] == ["3", "4", "6", "8"]
    assert [row["step"] for row in table if row["val/loss"]] == ["4", "8"]
    last = {name: float(table[-1][name]) for name in ("val/loss", "val/bits_per_byte", "val/accuracy")}
    np.testing.assert_allclose(last["val/bits_per_byte"], last["val/loss"] / np.log(2), rtol=1e-6)
    np.testing.assert_allclose([values[name] for name in last], list(last.values()), rtol=1e-6)
    assert (folder / "samples.txt").read_text(errors="replace").count("=== step") == 2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finished_run_says_so(reference, capsys):
    run = RunFolder(reference.train.run_dir)
    assert "8 steps, validation loss" in run.finished(8)
    assert run.finished(9) is None


def test_best_and_the_two_newest_are_kept(tmp_path, monkeypatch):
    planned = {1: 5.0, 2: 6.0, 3: 1.0, 4: 3.0, 5: 7.0, 6: 9.0, 7: 4.0, 8: 2.0}
    evaluate = Reporter.evaluate
    monkeypatch.setattr(
        Reporter, "evaluate", lambda self, step, params: evaluate(self, step, params) | {"val/loss": planned[step]}
    )
    config = tiny(tmp_path / "run", checkpoint_every=1, eval_every=1)
    train(config)
    with Checkpoints(RunFolder(config.train.run_dir, writes=False)) as checkpoints:
        assert checkpoints.steps() == [3, 7, 8]
        assert checkpoints.best() == 3


def test_classification_and_answers(tmp_path):
    config = tiny(tmp_path / "digits", data={"task": "digits", "context": 64}, sample_tokens=1)
    train(config)
    assert float(rows(tmp_path / "digits")[-1]["val/accuracy"]) >= 0
    assert "expected" in (tmp_path / "digits" / "samples.txt").read_text()
    data = {"task": "mqar", "context": 32, "vocab_size": 64, "validation_examples": 2}
    train(tiny(tmp_path / "mqar", data=data, steps=1, sample_tokens=1))
    assert (tmp_path / "mqar" / "samples.txt").read_text().count("model") == 2  # the answers of all two


def test_regression_and_further_evaluations(tmp_path, monkeypatch):
    """A run of numbers has no accuracy, shows its answers, and evaluates its last parameters, saved before, on other data too."""
    saved, write = [], Metrics.also
    monkeypatch.setattr(Metrics, "also", lambda *a: (saved.append((tmp_path / "run" / "8").exists()), write(*a)))
    data = {"task": "adding", "context": 16, "validation_examples": 16}
    also = ("data.context=24, data.batch-size=4, model.rate=0.5", "data.validation_examples=16")
    model = {"mixer": "s4d", "positions": "none", "state_size": 2}
    values = train(tiny(tmp_path / "run", model=model, data=data, sample_tokens=1, eval_also=also))
    assert set(values) == {"val/loss"} and rows(tmp_path / "run")[-1]["val/accuracy"] == ""
    assert "expected" in (tmp_path / "run" / "samples.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    other, same = (line for line in lines if "also" in line)
    assert other["also"] == also[0] and other["val/loss"] != same["val/loss"]
    assert same["val/loss"] == values["val/loss"] and other["step"] == 8
    assert also[0] in RunFolder(tmp_path / "run").finished(8) and saved == [True, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data.context", 'an evaluation must be a text "NAME=value, ..."'),
        ("optim.name=sgd", "an evaluation must name data.FIELD or model.FIELD"),
        ("data.contxt=4", "an evaluation must name data.FIELD"),
        ("data.context=8, data.context=9", "each name once"),
        ("data.validation_fraction=0.2", "data.validation_fraction may change with data.path only"),
        ("model.width=4", "evaluation 'model.width=4': the setting to change at inference is 'width'"),
        ("data.batch-size=0", "data.batch_size: 0 given"),
        ("data.vocab-size=99", "changes what the model reads or says"),
        ("data.context=32", "sequences must be at most max_length=16 long with learned positions; got 32"),
    ],
)
def test_bad_further_evaluations(tmp_path, text, words):
    model = {"positions": "learned", "max_length": 16}
    data = {"task": "copying", "num_tokens": 4}
    with pytest.raises(UserError, match=words):
        train(tiny(tmp_path / "run", model=model, data=data, eval_also=(text,)))
    assert not (tmp_path / "run").exists()


def test_metrics_begin_after_the_step_that_is_resumed(tmp_path, monkeypatch):
    """What a run writes again is dropped: in TensorBoard from the first step on, and evaluations after the last step."""
    purged = []
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda path, purge_step: purged.append(purge_step))
    lines = [{"step": 7}, {"step": 8}, {"step": 8, "also": "x"}, {"step": 9}]
    for step in (0, 8):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Metrics(RunFolder(tmp_path), step, tensorboard=True).close()
    assert purged == [1, 9]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 7}\n{"step": 8}\n'


def test_step_time_where_steps_are_computed_as_they_are_handed_over(tmp_path, monkeypatch):
    """A step of one second and evaluations of a hundred, one to four steps apart: every row has one second."""
    clock, batch, evaluate = [0.0], Setup.batch, Setup.evaluate

    def taking(seconds, method):
        return lambda *arguments: (clock.__setitem__(0, clock[0] + seconds), method(*arguments))[1]

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock[0], monotonic=time.monotonic))
    monkeypatch.setattr(Setup, "batch", taking(1.0, batch))
    monkeypatch.setattr(Setup, "evaluate", taking(100.0, evaluate))
    train(tiny(tmp_path / "run", eval_every=7, checkpoint_every=4))  # pauses after 4, 7, 8
    assert [row["ms_per_step"] for row in rows(tmp_path / "run")] == ["", *["1000"] * 7]
    train(tiny(tmp_path / "other", eval_every=2, checkpoint_every=6))  # after 2, 4, 6, 8
    assert [row["ms_per_step"] for row in rows(tmp_path / "other")] == ["", "", "", *["1000"] * 5]


def test_text_of_a_model_that_reads_one_token():
    model = LanguageModel(ModelConfig(layers=1, width=4, heads=1, positions="learned", max_length=1), 8)
    params = random_parameters(model, np.zeros((1, 1), np.int32))
    assert continue_tokens(model, params, np.array([3]), 4, 1, jax.random.key(1)).shape == (4,)


def test_profile_window(tmp_path):
    train(tiny(tmp_path / "run", profile_steps="1,3"))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


# ---------------------------------------------------------------- the same numbers in other ways


def test_accumulation_remat_and_scan_change_nothing_but_rounding(tmp_path):

    def four_losses(model=None, **options):
        config = tiny(tmp_path, model={"dropout": 0.0, **(model or {})}, steps=4, **options)
        setup = prepare(config, load(config.data))
        found = []
        with jax.set_mesh(setup.mesh):
            state = setup.init(np.uint32(config.train.seed))
            for step in range(4):
                state, numbers = setup.train_step(state, setup.batch(step), np.int32(step))
                found.append(float(numbers["loss"]))
        return found

    plain = four_losses()
    for other in (four_losses(microbatches=4), four_losses(model={"remat": True})):
        np.testing.assert_allclose(other, plain, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_bfloat16_and_every_optimizer(tmp_path, optimizer):
    model = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config = tiny(tmp_path / "run", model=model, optim={"name": optimizer, "learning_rate": 1e-3}, steps=4)
    train(config)
    state = final_state(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)} <= {np.dtype("float32"), np.dtype("int32")}
    assert np.isfinite([float(row["train/loss"]) for row in rows(tmp_path / "run")]).all()


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (5, signal.SIGINT), (6, signal.SIGTERM)])
def test_resumes_bit_by_bit(tmp_path, monkeypatch, reference, step, number):
    config = tiny(tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, number)
        with pytest.raises(Interrupted, match="is saved, the same command goes on") as stop:
            train(config)
    assert stop.value.code == 128 + number
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("7,99.0,1.0\n8,0.1")  # a row after the saved step, and one that a kill cut short
    train(config)
    assert_same(final_state(config), final_state(reference))
    assert losses(tmp_path / "run") == losses(RunFolder(reference.train.run_dir).path)


def damage_by_truncation(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_by_deletion(folder):
    shutil.rmtree(folder / "state" / "ocdbt.process_0")
    shutil.rmtree(folder / "state" / "d")


def damage_by_one_bit(folder):
    file = max(folder.glob("state/ocdbt.process_0/d/*"), key=lambda f: f.stat().st_size)
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_deletion, damage_by_one_bit, shutil.rmtree])
def test_damaged_newest_checkpoint(tmp_path, reference, damage):
    shutil.copytree(reference.train.run_dir, tmp_path / "run")
    config = tiny(tmp_path / "run")
    damage(tmp_path / "run" / "8")
    assert RunFolder(config.train.run_dir).finished(8) is None or damage is damage_by_one_bit
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(config)
    said = [str(w.message) for w in seen if "is damaged" in str(w.message)]
    assert damage is shutil.rmtree or "checkpoint 8 is damaged" in said[0]
    assert (tmp_path / "run" / "8.damaged").exists() == (damage is not shutil.rmtree)
    assert_same(final_state(config), final_state(reference))


def test_readers_take_what_is_whole_and_change_nothing(tmp_path, reference):
    """A damaged best checkpoint is answered with another one, and what a live run is writing stays."""
    folder = RunFolder(shutil.copytree(reference.train.run_dir, tmp_path / "run"), writes=False)
    for name in ("5.damaged", "9.orbax-checkpoint-tmp"):
        (folder / name / "metrics").mkdir(parents=True)
        (folder / name / "metrics" / "metrics").write_text("{")
    damage_by_one_bit(folder / "8")
    names = sorted(path.name for path in folder.path.iterdir())
    state = prepare(reference, load(reference.data)).abstract_state
    for step in ("best", "last"):
        with pytest.warns(UserWarning, match=r"checkpoint 8 is damaged \(.*\); trying 6\."):
            assert restore_named(folder, state, step).step == 6
    with pytest.raises(UserError, match=r"step 8 of .* is damaged \(.*\); whole: 6\."):
        restore_named(folder, state, "8")
    (folder / "8" / "metrics" / "metrics").write_text("{")
    with pytest.warns(UserWarning, match="its metrics are unreadable"):
        assert restore_named(folder, state, "6").step == 6
    assert sorted(path.name for path in folder.path.iterdir()) == names


@pytest.mark.parametrize(("before", "after"), [({"data": 1}, {"data": 4}), ({"data": 2, "fsdp": 2}, {"data": 1})])
def test_goes_on_with_another_number_of_devices(tmp_path, monkeypatch, reference, before, after):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            train(tiny(tmp_path / "run", mesh=before))
    train(tiny(tmp_path / "run", mesh=after))
    here, there = (
        np.array([float(row["train/loss"]) for row in rows(RunFolder(f).path)])
        for f in (tmp_path / "run", reference.train.run_dir)
    )
    np.testing.assert_allclose(here, there, rtol=1e-5)


def test_longer_run_with_a_constant_schedule(tmp_path):
    optim = {"schedule": "constant"}
    train(tiny(tmp_path / "run", optim=optim, steps=4))
    train(tiny(tmp_path / "run", optim=optim, steps=8))
    straight = tiny(tmp_path / "straight", optim=optim, steps=8)
    train(straight)
    assert_same(final_state(tiny(tmp_path / "run", optim=optim)), final_state(straight))
    with pytest.raises(UserError, match="train.steps: 8 -> 9"):
        train(tiny(tmp_path / "straight", steps=9))


def test_longer_run_with_a_constant_schedule_and_another_warmup(tmp_path):
    """The warm-up is at most half of the run: where it grows with the run, what went before was another one."""
    optim = {"schedule": "constant", "warmup_steps": 3}
    train(tiny(tmp_path / "run", optim=optim, steps=4))
    with pytest.raises(UserError, match="train.steps: 4 -> 8"):
        train(tiny(tmp_path / "run", optim=optim, steps=8))


def test_edited_text_is_another_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 20)
    train(tiny(tmp_path / "run", data={"path": str(text)}, steps=2))
    moved = text.rename(tmp_path / "moved.txt")
    train(tiny(tmp_path / "run", data={"path": str(moved)}, steps=2))
    moved.write_text("whether 'tis nobler in the mind to suffer. " * 20)
    with pytest.raises(UserError, match="contents of the data"):
        train(tiny(tmp_path / "run", data={"path": str(moved)}, steps=2))


# ---------------------------------------------------------------- what can go wrong on the way


def test_nan_stops_with_the_last_good_state(tmp_path, monkeypatch, reference):
    from effattn_jax.training.tasks import LanguageTask

    loss = LanguageTask.loss
    bad = _token_that_only_step_has(reference, 5)

    def poisoned(self, params, batch, key):
        total, weight = loss(self, params, batch, key)
        return total + jnp.where(jnp.all(batch["tokens"] == bad), jnp.nan, 0.0), weight

    config = tiny(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTask, "loss", poisoned)
        for _ in range(2):  # starting it again meets the same step again
            with pytest.raises(UserError, match="step 6: the loss is nan .* the state before it is kept as step 5 of"):
                train(config)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4", "5"]
    train(config)  # the cause removed, the run ends as if nothing had been
    assert_same(final_state(config), final_state(reference))


def _token_that_only_step_has(config, step):
    from effattn_jax.data import load

    return load(config.data).batch(config.train.seed, step)["tokens"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk(tmp_path, monkeypatch, reference):
    from effattn_jax.training import metrics

    config = tiny(tmp_path / "run")
    write = metrics.Metrics.write

    def full(self, step, values):
        if step == 5:
            self._csv = open("/dev/full", "a")
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", full)
        with pytest.raises(UserError, match="No space left on device.*newest complete checkpoint is step 3"):
            train(config)
    train(config)
    assert_same(final_state(config), final_state(reference))


def test_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, reference):
    import orbax.checkpoint as ocp

    config = tiny(tmp_path / "run")
    save = ocp.CheckpointManager.save

    def full(self, step, **options):
        if step == 6:
            raise OSError(28, "No space left on device")
        return save(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(
            UserError, match="checkpoint 6 could not be written.*No space left.*complete checkpoint is step 3"
        ):
            train(config)
    train(config)
    assert_same(final_state(config), final_state(reference))
