"""The command line: presets, overrides, and one clear line for every mistake."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effattn_jax.training import UserError, cli, config
from effattn_jax.training.config import Config, TrainConfig, differences, flat, from_dict

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "configs"


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of train.py, in this process."""
    code = cli.main(PRESETS, list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *arguments) -> str:
    """The one line with which train.py refuses its arguments."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err and "---" not in err, err
    return err


# ---------------------------------------------------------------- presets and help


def test_help_lists_every_preset_with_its_summary(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for path in PRESETS.glob("[a-z]*.py"):
        name, summary = path.stem.replace("_", "-"), path.read_text().split('"""')[1].split("\n")[0]
        assert any(name in line and summary in line for line in out.splitlines()), name


@pytest.mark.parametrize("name", sorted(cli.presets(PRESETS)))
def test_every_preset_is_valid_and_documented(name):
    loaded = cli.load_preset(PRESETS, name)
    loaded.validate()
    assert loaded.train.run_dir == f"runs/{name}"
    text = (PRESETS / f"{name.replace('-', '_')}.py").read_text().split('"""')[1]
    for word in ("Reproduces", "Expected", "Hardware", "Command: python train.py"):
        assert word in text, f"{name} does not say its {word}"


def test_preset_help_shows_every_field_with_its_text(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(PRESETS, ["quickstart", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name, _ in flat(Config()):
        assert f"--{name.replace('_', '-')}" in out
    assert "Number of updates" in out


def test_every_field_has_a_help_text():
    for kind in (config.OptimConfig, config.TrainConfig, config.MeshConfig):
        source = Path(config.__file__).read_text().split(f"class {kind.__name__}")[1].split("@dataclasses")[0]
        for name in kind.__dataclass_fields__:
            assert f"\n    {name}: " in source and source.split(f"\n    {name}: ")[1].split("\n")[1].strip().startswith(
                '"""'
            )


# ---------------------------------------------------------------- overrides


def test_overrides():
    quickstart = cli.load_preset(PRESETS, "quickstart")
    changed = cli.parse(
        quickstart,
        "quickstart",
        ["--model.mixer", "linear", "--train.steps=7", "--optim.clip-norm", "None", "--model.remat", "True"],
    )
    assert (changed.model.mixer, changed.train.steps, changed.optim.clip_norm, changed.model.remat) == (
        "linear",
        7,
        None,
        True,
    )
    assert differences(quickstart, changed) != []
    assert cli.parse(quickstart, "quickstart", ["--train.run-dir", "None"]).train.run_dir == "runs/quickstart"
    config.OptimConfig(clip_norm=float("inf")).validate()  # clips nothing


def test_config_round_trips_through_json():
    import dataclasses
    import json

    for name in cli.presets(PRESETS):
        loaded = cli.load_preset(PRESETS, name)
        assert from_dict(json.loads(json.dumps(dataclasses.asdict(loaded)))) == loaded


def test_only_fields_that_change_updates_make_another_run():
    old = Config()
    assert differences(old, Config(train=TrainConfig(run_dir="x", log_every=3, eval_every=7, checkpoint_every=9))) == []
    assert differences(old, Config(train=TrainConfig(steps=7))) == ["train.steps: 1000 -> 7"]
    assert differences(old, Config(mesh=config.MeshConfig(fsdp=4))) == []


# ---------------------------------------------------------------- mistakes


def test_unknown_preset(capsys):
    assert "there is no preset 'quikstart'; nearest: quickstart" in fails(capsys, "quikstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.mixr", "linear"], "there is no option --model.mixr; nearest: --model.mixer"),
        (["--steps", "3"], "nearest: --train.steps"),
        (["--model.layers", "two"], "--model.layers: invalid literal for int"),
        (["--model.layers"], "Missing value for argument '--model.layers'"),
        (["--model.norm", "layer"], "'layernorm', 'rmsnorm'"),
        (["stray"], "stray"),
        (["--model.heads", "3"], "heads must be a divisor of the width"),
        (["--model.mixer", "sofmax"], "Perhaps you meant 'softmax'"),
        (["--train.steps", "0"], "train.steps must be positive, got 0"),
        (["--train.microbatches", "3"], "train.microbatches must divide data.batch_size"),
        (["--train.profile-steps", "9"], "train.profile_steps must be START,STOP"),
        (["--train.profile-steps", ""], "train.profile_steps must be START,STOP"),
        (["--model.mlp-ratio", "inf"], "mlp_ratio must be finite; got inf"),
        (["--train.eval-also", "data.validation_fraction=abc"], "data.validation_fraction must be a number, got 'abc'"),
        (
            ["--data.batch-size", "8", "--train.eval-also", "data.batch-size=6"],
            "a multiple of the mesh's data x fsdp = 8",
        ),
        (["--optim.name", "adamm"], "optim.name must be one of adamw"),
        (["--optim.warmup-steps", "-1"], "optim.warmup_steps must not be negative, got -1"),
        (["--optim.beta2", "1.5"], "optim.beta2 must be in [0, 1), got 1.5"),
        (["--optim.epsilon", "-1"], "optim.epsilon must not be negative, got -1.0"),
        (["--train.eval-batches", "0"], "train.eval_batches must be positive or None, got 0"),
        (["--train.sample-tokens", "-1"], "train.sample_tokens must not be negative, got -1"),
        (["--train.sample-temperature", "-1"], "train.sample_temperature must lie in [0, inf), got -1.0"),
        (["--train.sample-temperature", "inf"], "train.sample_temperature must lie in [0, inf), got inf"),
        (["--train.sample-prompt", ""], "train.sample_prompt must hold some text or be None"),
        (["--train.profile-steps", "9999,10000"], "train.profile_steps must begin before step"),
        (["--data.path", ""], "data.path: '' given, must be a file or a folder, or None"),
        (["--optim.clip-norm", "-1"], "optim.clip_norm must be positive or None, got -1.0"),
        (["--data.task", "mqra"], "nearest: mqar"),
        (
            ["--model.mlp-ratio", "1e300"],
            "model.mlp_ratio times model.width must be less than 2**31, got 1e+300 and 128",
        ),
        (["--model.random-positions", "8"], "model.random_positions must be 0 or at least data.context, got 8 and 128"),
        (["--train.run-dir", ""], "train.run_dir must be a folder or None, got ''"),
        (["--train.sample-prompt", "\udcff"], r"train.sample_prompt: text: '\udcff' given, must be characters that"),
        (["--train.eval-also", "model.width=4"], "evaluation 'model.width=4': the setting to change at inference"),
        (["--optim.learning-rate", "inf"], "optim.learning_rate must be finite, got inf"),
        (["--optim.final-learning-rate", "nan"], "optim.final_learning_rate must be finite, got nan"),
        (["--optim.weight-decay", "inf"], "optim.weight_decay must be finite, got inf"),
        (["--optim.clip-norm", "inf", "--optim.clip", "soft"], "optim.clip_norm must be finite, got inf"),
        (["--mesh.data", "0"], "mesh axis data must be positive or -1, got 0"),
        (["--mesh.fsdp", "64"], "needs 64 devices, and there are 8"),
        (["--mesh.cpu-devices", "0"], "mesh.cpu_devices must be positive or None, got 0"),
        (["--mesh.process-id", "0"], "must be given together"),
        (["--data.path", "no/such/file"], "must be an existing file or folder"),
    ],
)
def test_mistakes_in_the_command(capsys, tmp_path, arguments, message):
    assert message in fails(capsys, "quickstart", "--train.run-dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"", "is empty"), (b"too short", "too short"), (b"caf\xe9 " * 999, "must be UTF-8 text, and byte 3 is not")],
)
def test_bad_texts(capsys, tmp_path, contents, message):
    (tmp_path / "text.txt").write_bytes(contents)
    line = fails(capsys, "--data.path", str(tmp_path / "text.txt"), "--train.run-dir", str(tmp_path / "run"))
    assert message in line and not (tmp_path / "run").exists()


def test_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be used: Not a directory" in fails(capsys, "--train.run-dir", str(tmp_path / "file" / "run"))


def test_folder_of_another_run(capsys, tmp_path):
    from effattn_jax.training.folder import RunFolder

    loaded = cli.load_preset(PRESETS, "quickstart")
    RunFolder(tmp_path).write_json("config.json", __import__("dataclasses").asdict(loaded))
    line = fails(capsys, "--train.run-dir", str(tmp_path), "--model.width", "64", "--train.seed", "3")
    assert "model.width: 128 -> 64; train.seed: 0 -> 3" in line


def test_folder_in_use(capsys, tmp_path):
    from effattn_jax.data import load
    from effattn_jax.training.folder import RunFolder

    loaded = cli.load_preset(PRESETS, "quickstart")
    folder = RunFolder(tmp_path)
    folder.open(loaded, load(loaded.data))
    assert "is in use by another process" in fails(capsys, "--train.run-dir", str(tmp_path))
    folder.close()


def test_config_of_another_version(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model": {"depth": 3}}')
    assert "config.json of another version" in fails(capsys, "--train.run-dir", str(tmp_path))


def test_a_locale_without_unicode(tmp_path):
    program = (
        "import sys; from effattn_jax.training import cli, folder; cli.quiet(); print(chr(9473))\n"
        "folder.RunFolder(sys.argv[1]).write_text('text', chr(9473))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ | plain, capture_output=True, check=True).stdout == b"?\n"
    assert (tmp_path / "text").read_text(encoding="utf-8") == chr(9473)


def test_one_line_of_an_os_error():
    from effattn_jax.training.errors import one_line

    assert one_line(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f")) == "No space left on device: f"


def test_train_py_is_one_screen_and_exits_with_the_code():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40
    ended = subprocess.run([sys.executable, "train.py", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: there is no preset 'nothing'")


def test_user_errors_do_not_hide_programming_errors():
    from effattn_jax.training.errors import user_errors

    with pytest.raises(UserError, match="reading: bad"), user_errors("reading"):
        raise ValueError("bad")
    with pytest.raises(TypeError), user_errors():
        raise TypeError
