"""Runs in processes of their own: two that train together, and kills at random moments."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import final_state, rows

from benchmarks import kill_resume
from effattn_jax.evaluate import main as evaluate
from effattn_jax.generate import main as generate
from effattn_jax.training import cli

ROOT = Path(__file__).parents[1]
SMALL = [
    "--model.layers",
    "1",
    "--model.width",
    "32",
    "--model.heads",
    "2",
    "--data.batch-size",
    "8",
    "--data.context",
    "32",
]
SHORT = [
    "--train.steps",
    "6",
    "--train.eval-every",
    "3",
    "--train.log-every",
    "1",
    "--optim.warmup-steps",
    "2",
    "--train.sample-tokens",
    "8",
]


def start(folder, *arguments, devices=1):
    command = [sys.executable, "train.py", "quickstart", *SMALL, *SHORT, "--train.run-dir", str(folder), *arguments]
    command += ["--mesh.cpu-devices", str(devices)]  # not the eight of conftest.py
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process, and what it printed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    out, err = (process := start(folder)).communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out


@pytest.mark.parametrize("mesh", [[], ["--mesh.data", "1", "--mesh.fsdp", "2"]], ids=["data", "fsdp"])
def test_two_processes_train_as_one(tmp_path, alone, mesh):
    flags = ["--mesh.coordinator", f"127.0.0.1:{free_port()}", "--mesh.num-processes", "2", *mesh]
    processes = [start(tmp_path / "run", *flags, "--mesh.process-id", str(i)) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "in 2 processes" in outputs[0][0] and "step" not in outputs[1][0]
    assert_same_losses(tmp_path / "run", alone[0])


def test_two_devices_of_a_cpu_train_as_one(tmp_path, alone):
    out, err = (process := start(tmp_path / "run", devices=2)).communicate(timeout=300)
    assert process.returncode == 0 and "2 x cpu" in out, (out, err)
    assert_same_losses(tmp_path / "run", alone[0])


def assert_same_losses(*folders):
    for name in ("train/loss", "val/loss"):
        here, there = ([float(row[name]) for row in rows(folder) if row[name]] for folder in folders)
        np.testing.assert_allclose(here, there, rtol=1e-5)


def test_output_without_a_terminal_is_plain(alone):
    folder, out = alone
    assert "\x1b" not in out and "total" in out and "finished: 6 steps, validation loss" in out
    assert "step 1/6  loss" in out


def test_finished_run_started_again_says_so(alone, capsys):
    folder, _ = alone
    arguments = [*SMALL, *SHORT, "--train.run-dir", str(folder)]
    assert cli.main(ROOT / "configs", arguments) == 0
    assert "quickstart is finished already: 6 steps" in capsys.readouterr().out


def test_finished_run_says_how_it_is_evaluated_further(alone, capsys):
    more = ["--train.eval-also", "data.context=64", "--train.run-dir", str(alone[0])]
    assert cli.main(ROOT / "configs", [*SMALL, *SHORT, *more]) == 0
    command = f"python -m effattn_jax.evaluate {alone[0]} data.context=64 --step last"
    assert f"not evaluated: data.context=64, which is done by {command}" in capsys.readouterr().out


def test_finished_run_of_other_data_is_refused(alone, tmp_path, capsys):
    folder, _ = alone
    (tmp_path / "other.txt").write_text("Another text than the run's own.\n" * 2000)
    arguments = [*SMALL, *SHORT, "--train.run-dir", str(folder), "--data.path", str(tmp_path / "other.txt")]
    assert cli.main(ROOT / "configs", arguments) == 2
    assert "contents of the data" in capsys.readouterr().err


def test_a_mistake_beside_a_finished_run_is_named_as_one(alone, capsys):
    """Not as a difference from the run that lies there."""
    arguments = [*SMALL, *SHORT, "--train.run-dir", str(alone[0]), "--model.mixer", "nosuch"]
    assert cli.main(ROOT / "configs", arguments) == 2
    assert "error: mixer is 'nosuch'. It must be among" in capsys.readouterr().err


def test_finished_run_without_its_config_says_so(alone, tmp_path, capsys):
    shutil.copytree(alone[0], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    assert cli.main(ROOT / "configs", [*SMALL, *SHORT, "--train.run-dir", str(tmp_path / "run")]) == 0
    assert "quickstart is finished already: 6 steps" in capsys.readouterr().out


def test_generate_from_a_run(alone, capsys):
    folder, _ = alone
    texts = []
    for options in (
        ["--seed", "1"],
        ["--seed", "1"],
        ["--seed", "2", "--top-k", "20", "--top-p", "0.9", "--step", "last"],
    ):
        assert generate([str(folder), "--prompt", "The ", "--tokens", "50", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("The ") and len(text) > 20 for text in texts)


def test_lengths_and_contexts_at_inference(alone, tmp_path, capsys):
    """A finished run evaluated at another length by settings of inference, and text from several contexts."""
    folder, _ = alone
    conditions = [
        "data.context=96, model.rerope_window=8, model.log_scale=inference",
        "data.context=96, model.window=15, model.sinks=2",
    ]
    assert evaluate([str(folder), *conditions, "--batches", "1", "--step", "last"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": validation loss ")[0] for line in lines] == ["as trained", *conditions]
    assert len({line.partition(": validation loss ")[2] for line in lines}) == 3
    texts = []
    for number, text in enumerate(("first fact. ", "another one. ")):
        (tmp_path / str(number)).write_text(text)
    files = [str(tmp_path / "0"), str(tmp_path / "1")]
    for options in (
        [],
        ["--pooling", "mean", "--beta", "1", "--context-top-p", "0.5", "--transition-penalty", "0"],
        [],
    ):
        asked = ["--prompt", "The ", "--tokens", "12", "--contexts", *files, "--temperature", "0"]
        assert generate([str(folder), *asked, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] and all(text.startswith("The ") and len(text) > 5 for text in texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "is no run folder"),
        (["RUN", "model.window"], 'must be a text "NAME=value, ..."'),
        (["RUN", "model.width=4"], "the setting to change at inference is 'width'"),
        (["RUN", "model.rotary_factor=4"], "rotary_factor must be 1 without rotary_scaling; got 4"),
        (["RUN", "model.rate=abc"], "model.rate must be a number, got 'abc'"),
        (["RUN", "data.context=1.5"], "data.context must be a whole number, got '1.5'"),
        (["RUN", "data.path=2024"], "data.path: '2024' given, must be an existing file or folder"),
        (["RUN", "--data-path", "no.txt"], "no.txt"),
        (["RUN", "--data-path", __file__], "give what it was trained with"),
        (["RUN", "--batches", "0"], "batches must be positive; got 0"),
        (["RUN", "--batches", "x"], "error: Error parsing --batches"),
    ],
)
def test_evaluate_mistakes(alone, capsys, arguments, message):
    assert evaluate([str(alone[0]) if word == "RUN" else word for word in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/run"], "is no run folder"),
        (["RUN", "--contexts", "no/such/file"], "--contexts: No such file or directory: no/such/file"),
        (["RUN", "--contexts", __file__], "each context must fit the"),
        (["RUN", "--set", "random_positions=9"], "the setting to change at inference is 'random_positions'"),
        (["RUN", "--step", "77"], "must be best, last or a step that"),
        (["RUN", "--prompt", ""], "the prompt is empty"),
        (["RUN", "--set", "context=1.9"], "context must be a whole number of at least 1; got 1.9"),
        (["RUN", "--set", "rate=abc"], "--set: rate must be a number, got 'abc'"),
        (["RUN", "--set", "window=abc"], "--set: window must be a whole number or None, got 'abc'"),
        (["RUN", "--set", "rotary_factor=None"], "--set: rotary_factor must be a number, got 'None'"),
        (["RUN", "--seed", "99999999999999999999"], "seed must lie in 0 ... 2**32 - 1, got 99999999999999999999"),
        (["RUN", "--pooling", "mean"], "pooling given without contexts"),
        (["RUN", "--temperature", "-1"], "temperature must be at least 0"),
        (["RUN", "--tokens", "-1"], "must not be negative, got -1"),
        ([], "error: Missing from python -m effattn_jax.generate: RUN"),
        (["RUN", "--nosuch", "1"], "error: Unrecognized options: --nosuch"),
    ],
)
def test_generate_mistakes(alone, capsys, arguments, message):
    assert generate([str(alone[0]) if word == "RUN" else word for word in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_generate_refuses_a_classifier(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dataset.json").write_text(json.dumps({"kind": "classification"}))
    assert generate([str(tmp_path)]) == 2
    assert "writes no text" in capsys.readouterr().err


def test_generate_refuses_a_prompt_that_is_no_text(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dataset.json").write_text(json.dumps({"kind": "language", "context": 8, "codec": {"codec": "bytes"}}))
    assert generate([str(tmp_path), "--prompt", "\udcff\udcfe"]) == 2
    line = "error: --prompt: text: '\\udcff' given, must be characters that UTF-8 has\n"
    assert capsys.readouterr().err == line


def test_kills_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # the five processes run the same programs
    points = kill_resume.measure(tmp_path, points=2, steps=40)
    assert all(point.same_state and point.same_losses for point in points), points


def test_final_state_is_that_of_the_run(alone):
    config = cli.parse(
        cli.load_preset(ROOT / "configs", "quickstart"),
        "quickstart",
        [*SMALL, *SHORT, "--train.run-dir", str(alone[0])],
    )
    assert int(final_state(config).step) == 6
