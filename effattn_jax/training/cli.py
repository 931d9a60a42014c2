"""The command line: a preset by name, overrides by dotted field names, one line for every mistake."""

import ast
import dataclasses
import difflib
import importlib.util
import io
import os
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

DEFAULT_PRESET = "quickstart"


def main(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      folder: the folder of the presets, one Python file each.
      arguments: the command's arguments, `sys.argv` by default.

    Returns:
      The exit code: 0 when the run is finished, 2 for a mistake, 128 + n after signal n.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    from effattn_jax.training.errors import Interrupted, UserError

    quiet()
    try:
        if arguments and arguments[0] in ("-h", "--help"):
            print(presets_help(folder), flush=True)
            return 0
        return _run(folder, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except BrokenPipeError:  # `--help | head`; what is still buffered must not fail again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(folder: Path, arguments: list[str]) -> int:
    name = DEFAULT_PRESET
    if arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0).replace("_", "-")
    config = parse(load_preset(folder, name), name, arguments)
    from effattn_jax.training.folder import RunFolder

    run = RunFolder(config.train.run_dir)
    summary = run.finished(config.train.steps)
    if summary is not None:
        _check_finished(run, config)
        print(f"{name} is finished already: {summary}; {config.train.run_dir}{_also(config, summary)}")
        return 0
    from effattn_jax.training.loop import train

    train(config, name)
    return 0


def _check_finished(run, config) -> None:
    """Check that a finished run is the one that is asked for; the data are read only where another place of them is given."""
    from effattn_jax.training.errors import user_errors

    with user_errors():
        config.validate()
    run.compare(config)
    held = run.config()
    if held is None or held.data != config.data:
        from effattn_jax.data import load

        with user_errors():
            run.compare(config, load(config.data))


def _also(config, summary: str) -> str:
    """How to evaluate a finished run under the conditions of `train.eval_also` that its summary does not have."""
    texts = [text for text in config.train.eval_also if f"; {text}: " not in summary]
    if not texts:
        return ""
    command = ["python", "-m", "effattn_jax.evaluate", config.train.run_dir, *texts, "--step", "last"]
    return f"; not evaluated: {', '.join(texts)}, which is done by {shlex.join(command)}"


def run_command(command: Callable[..., None], prog: str, arguments: Sequence[str] | None = None) -> int:
    """Run `command` with what the command line gives for its parameters; the exit code, 2 after the one line of a mistake."""
    from effattn_jax._command_line import bound
    from effattn_jax.training.errors import UserError, user_errors

    quiet()
    try:
        with user_errors():
            run = bound(command, prog, arguments)
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def presets(folder: Path) -> dict[str, str]:
    """Names of the presets with the first line of each file's docstring; nothing is imported.

    Example:
      >>> presets(Path("no such folder"))
      {}
    """
    found = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.replace("_", "-")] = docstring.partition("\n")[0]
    return dict(sorted(found.items(), key=lambda item: (item[0] != DEFAULT_PRESET, item[0])))


def presets_help(folder: Path) -> str:
    """The text of `train.py --help`."""
    lines = ["usage: python train.py [PRESET] [--model.FIELD VALUE] [--data.FIELD VALUE] [--optim.FIELD VALUE] ...", ""]
    known = presets(folder)
    width = max(map(len, known), default=0)
    lines += ["presets:", *(f"  {name:<{width}}  {summary}" for name, summary in known.items())]
    lines += ["", *textwrap.wrap(f"mixers (--model.mixer): {', '.join(_mixers())}", 100, subsequent_indent="  ")]
    lines += ["", f"Without a preset: {DEFAULT_PRESET}. Every field of a preset: python train.py PRESET --help"]
    lines += ["The run folder is runs/PRESET (--train.run-dir); the same command resumes what it finds there."]
    return "\n".join(lines)


def _mixers() -> list[str]:
    from effattn_jax import nn

    return list(nn.MIXERS)


def load_preset(folder: Path, name: str):
    """The config that a preset's file makes.

    Raises:
      UserError: an unknown preset; the message has the nearest name.
    """
    from effattn_jax.training.errors import UserError

    known = presets(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"nearest: {near[0]}; " if near else ""
        raise UserError(f"there is no preset {name!r}; {hint}presets: {', '.join(known)}.")
    path = folder / f"{name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _with_run_dir(module.get_config(), name)


def parse(config, name: str, arguments: Sequence[str]):
    """A config with the command line's overrides; `--help` prints every field and exits.

    Raises:
      UserError: an unknown field (the message has the nearest one) or a value of the wrong type.
    """
    import tyro

    from effattn_jax._command_line import mistakes_on_one_line
    from effattn_jax.training.config import flat
    from effattn_jax.training.errors import user_errors

    _check_names([field for field, _ in flat(config)], arguments)
    options = {
        "prog": f"train.py {name}",
        "default": config,
        "args": list(arguments),
        "config": (tyro.conf.FlagConversionOff,),
    }
    with user_errors(), mistakes_on_one_line():
        return _with_run_dir(tyro.cli(type(config), **options), name)


def _with_run_dir(config, name: str):
    """The config with the folder that None stands for."""
    run_dir = f"runs/{name}" if config.train.run_dir is None else config.train.run_dir
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))


def _check_names(fields: list[str], arguments: Sequence[str]) -> None:
    from effattn_jax.training.errors import UserError

    known = [f"--{field}".replace("_", "-") for field in fields]
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if not option.startswith("--") or option in (*known, "--help"):
            continue
        by_last_part = [k for k in known if k.rpartition(".")[2] == option.lstrip("-").rpartition(".")[2]]
        near = by_last_part or difflib.get_close_matches(option, known, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
        raise UserError(f"there is no option {option}{hint} (all of them: python train.py PRESET --help).")


def quiet() -> None:
    """Show warnings as one line, and `?` for what the terminal cannot write; drop what TensorStore's threads say after an error that is reported anyway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    unraisable = sys.unraisablehook

    def hook(problem):
        if str(problem.exc_value) != "Event loop is closed":
            unraisable(problem)

    sys.unraisablehook = hook
    warnings.showwarning = lambda message, *where, **options: print(f"warning: {message}", file=sys.stderr)
