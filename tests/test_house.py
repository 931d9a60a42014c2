"""The house rules: one legend of dimension letters, walls between rooms, documented public names, short functions, portable calls."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import typing

import pytest

import effattn_jax

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = sorted((ROOT / "effattn_jax").rglob("*.py"))
SOURCES = [*PACKAGE, ROOT / "train.py", ROOT / "conftest.py"] + [
    path
    for folder in ("configs", "scripts", "benchmarks", "tests", "notebooks", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
ROOMS = sorted(module.name for module in pkgutil.iter_modules(effattn_jax.__path__) if module.ispkg)
WALLS = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
PURE = WALLS["The pure rooms import jax and numpy only"]


def relative(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# The legend


def legend() -> set[str]:
    """The dimension letters that the package's docstring declares, in indented columns such as `B batch`."""
    return set(re.findall(r"(?:^| ) +([A-Z]) (?=[a-z])", effattn_jax.__doc__, re.MULTILINE))


def suffix_names(tree: ast.AST) -> set[str]:
    """The names of a module that end in a shape, as q_BxTxNxH does."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    return {name for name in names if re.search(r"_[A-Z0-9]+(x[A-Z0-9]+)+$", name)}


def test_the_legend_is_declared():
    assert legend() >= set("BTSNKHVMPDCWLFA")


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_suffix_names_use_the_legend(path):
    known = legend()
    for name in suffix_names(ast.parse(path.read_text())):
        for dimension in name.rsplit("_", 1)[1].split("x"):
            assert dimension.isdigit() or dimension in known, (
                f"{name}: {dimension} is not in the legend of effattn_jax/__init__.py"
            )


# The walls


def test_walls():
    """The contracts of pyproject.toml hold; the closing lines of lint-imports say which one does not."""
    linter = pathlib.Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_room_of_the_design_that_stands_has_its_wall():
    pure = {name.split(".")[1] for name in PURE["source_modules"]}
    assert pure >= {
        "analysis",
        "attention",
        "decoding",
        "mixing",
        "objectives",
        "position",
        "recurrence",
        "similarity",
        "ssm",
    }


def test_pure_rooms_import_where_jax_and_numpy_are_all_there_is():
    """In a process that refuses every other library, the package, its pure rooms and the parallel forms import."""
    blocked = sorted({*PURE["forbidden_modules"]} - {"scipy"})  # jax itself imports scipy
    rooms = sorted({*PURE["source_modules"], "effattn_jax", "effattn_jax.parallel"})
    code = f"import importlib, sys\nsys.modules.update(dict.fromkeys({blocked}))\nfor room in {rooms}: importlib.import_module(room)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_import_touches_no_device_and_no_setting():
    """Importing the package starts no backend, sets no jax option and adds no logging handler."""
    code = (
        "import jax, logging; before = dict(jax.config.values), list(logging.root.handlers)\n"
        "import effattn_jax, effattn_jax.attention, effattn_jax.recurrence, effattn_jax.position\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
        "assert before == (dict(jax.config.values), list(logging.root.handlers))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# The public names


def public_names() -> list[tuple[str, str]]:
    return [(room, name) for room in ROOMS for name in importlib.import_module(f"effattn_jax.{room}").__all__]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_list_their_names(room):
    module = importlib.import_module(f"effattn_jax.{room}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert inspect.getdoc(module), f"effattn_jax.{room} has no docstring"


@pytest.mark.parametrize(("room", "name"), public_names(), ids=str)
def test_public_names_are_documented(room, name):
    """A docstring of one line and more; for a function a runnable example too."""
    member = getattr(importlib.import_module(f"effattn_jax.{room}"), name)
    if not callable(member) or typing.get_origin(member):
        return  # a table, a constant or the name of a type
    text = inspect.getdoc(member) or ""
    assert text and not text.startswith(f"{name}("), f"effattn_jax.{room}.{name} has no docstring"
    if inspect.isfunction(inspect.unwrap(member)):
        assert ">>> " in text, f"effattn_jax.{room}.{name} shows no example"


def test_version():
    """pyproject.toml, the package and the newest entry of the changelog name one version."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert effattn_jax.__version__ == PYPROJECT["project"]["version"] == newest


# The text


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] not in ("tests", "laws")], ids=relative)
def test_page_rule(path):
    """No file over 400 lines; no function over 60, its docstring not counted, which is the longer the more there is to say."""
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            prose = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            lines = node.end_lineno - node.lineno + 1 - prose
            assert lines <= 60, f"{node.name} has {lines} lines"


# What fails, or warns, on some jax from 0.7.2 to 0.12; each pattern with what to write instead.
UNPORTABLE = {
    r"PRNGKey\(": "jax.random.key",
    r"^\s*with (self\.)?mesh:": "jax.set_mesh",
    r"jax\.experimental(\.| import )shard_map": "jax.shard_map",
    r"jax\.reshard|jax\.get_mesh\(": "jax.device_put, or the mesh itself",
    r"@jax\.jit\(": "functools.partial(jax.jit, ...)",
    r"jax\.tree_map\(|jax\.tree_util\.tree_map\(": "jax.tree.map",
    r"flax\.training\.(checkpoints|lr_schedule|prefetch_iterator)": "orbax, optax",
}


@pytest.mark.parametrize("path", [p for p in SOURCES if p != pathlib.Path(__file__)], ids=relative)
def test_portable_calls(path):
    text = path.read_text()
    for pattern, instead in UNPORTABLE.items():
        assert not re.search(pattern, text, re.MULTILINE), f"{pattern}: use {instead}"


def tracked_text() -> list[pathlib.Path]:
    """The text files of the repository, without asking git, which a downloaded archive lacks."""
    skipped = {"build", "dist", "runs", "_build", "_generated", "__pycache__"}
    suffixes = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".sh", ".json", ".ipynb", ".svg", ""}
    paths = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".gitignore") for part in parts)
        if path.is_file() and path.suffix in suffixes and not hidden and not skipped & set(parts):
            paths.append(path)
    return paths


def test_nothing_left_over():
    """No note to do something later, no path of one machine, no host of a package index."""
    words = [
        "TO" + "DO",
        "FIX" + "ME",
        "XX" + "X:",
        "/home" + "/",
        "/ro" + "ot/",
        "/wo" + "rk/",
        "pypi" + ".org",
        "index" + "-url",
        "pythonhosted",
    ]
    for path in tracked_text():
        text = path.read_text(errors="ignore")
        found = [word for word in words if word in text and path != pathlib.Path(__file__)]
        assert not found, f"{relative(path)} holds {found}"


# The README


def test_readme_examples_run():
    """The Python of the README runs, top to bottom."""
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(block, namespace)


def tables() -> dict[str, list[str]]:
    """The rows of the README's table, by the code they stand for: the functions of the kernels' rooms, and the tables by name."""
    rows = {}
    for room in ("recurrence", "attention", "ssm", "mixing", "position", "objectives", "decoding", "optim"):
        names = importlib.import_module(f"effattn_jax.{room}").__all__
        rows[f"effattn_jax.{room}"] = [name for name in names if name.islower()]
    models = importlib.import_module("effattn_jax.models")
    rows["effattn_jax.models"] = [name for name in models.__all__ if hasattr(getattr(models, name), "apply")]
    rows["--model.mixer"] = list(importlib.import_module("effattn_jax.nn").MIXERS)
    rows["--data.task"] = list(importlib.import_module("effattn_jax.data").TASKS)
    rows["train.py"] = sorted(path.stem.replace("_", "-") for path in (ROOT / "configs").glob("[a-z]*.py"))
    return rows


@pytest.mark.parametrize("row", tables())
def test_readme_lists_what_there_is(row):
    listed = re.search(rf"^\| `{re.escape(row)}` \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    expected = tables()[row]
    line = f"| `{row}` | {', '.join(f'`{name}`' for name in expected)} |"
    assert listed and set(re.findall(r"`([^`]+)`", listed[1])) == set(expected), (
        f"the README's table needs the row\n{line}"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.py")), ids=relative)
def test_notebooks_are_built_from_their_sources(path):
    """The .ipynb beside each source is what `make notebooks` makes of it, badge aside."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "scripts" / "notebook.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    target = path.with_suffix(".ipynb").read_text()
    assert re.sub(rf"\]\({builder.COLAB}github/[^)]*\)", f"]({builder.COLAB})", target) == builder.build(path)
