"""Sphinx configuration. The API pages are made from each room's __all__; a public name without a docstring fails the build."""

import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import shutil
import sys
import typing
from collections.abc import Mapping

from sphinx.errors import ExtensionError

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = pathlib.Path(__file__).parent / "_generated"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("QUICK", "1")  # the notebook's short form
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))

import effattn_jax  # noqa: E402
from docs import members  # noqa: E402

project = "effattn_jax"
copyright = "2026, The effattn_jax authors"
author = "The effattn_jax authors"
release = version = effattn_jax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "effattn_jax"
autodoc_typehints = "none"  # the signature shows them once
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
smartquotes = False
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
suppress_warnings = ["mystnb.unknown_mime_type"]


def table(name: str, members: Mapping) -> list[str]:
    """A table of the package, as the list of its members with the first line of what each one says of itself."""
    lines = [f"## {name}", "", "| name | what it is |", "| --- | --- |"]
    for key, member in members.items():
        text = inspect.getdoc(getattr(member, "function", member)) or ""
        lines.append(
            f"| `{key}` | {text.splitlines()[0] if callable(getattr(member, 'function', member)) and text else ''} |"
        )
    return [*lines, ""]


def entry(room: str, name: str, elsewhere: Mapping) -> list[str]:
    """The lines of one public name on its room's page; members of tables have pages of their own, `elsewhere`."""
    member = getattr(importlib.import_module(room), name)
    if isinstance(member, Mapping):
        return table(name, member)
    if not callable(member) or typing.get_origin(member):  # a constant, or the name of a type
        return [f"## {name}", "", f"`{member}`", ""]
    if not inspect.getdoc(member):
        raise ExtensionError(f"{room}.{name} is public and has no docstring")
    if inspect.isfunction(member) and member in elsewhere:
        about = inspect.getdoc(member).split("\n\n")[0].replace("\n", " ")
        return [f"## {name}", "", f"{about} Its page: [{name}](../members/{elsewhere[member]}.md).", ""]
    kind = "autoclass" if inspect.isclass(member) else "autofunction"
    return [f"## {name}", "", "```{eval-rst}", f".. {kind}:: {room}.{name}", "```", ""]


def write_pages() -> None:
    """Write a page a room, and the notebooks, into docs/_generated."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    (GENERATED / "api").mkdir(parents=True)
    members.write(GENERATED / "members")
    elsewhere = members.page_of()
    for found in pkgutil.iter_modules(effattn_jax.__path__):
        if not found.ispkg:
            continue
        room = f"effattn_jax.{found.name}"
        module = importlib.import_module(room)
        lines = [f"# {room}", "", "```{eval-rst}", f".. automodule:: {room}", "   :no-members:", "```", ""]
        for name in module.__all__:
            lines += entry(room, name, elsewhere)
        (GENERATED / "api" / f"{found.name}.md").write_text("\n".join(lines))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, GENERATED / notebook.name)


def escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: `name` is code, and (*B, T) is a shape and no emphasis. Examples and literal blocks stay."""
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if example:
            continue
        parts = re.split(r"(:\w+:`[^`]*`|``[^`]*``|`[^`]*`)", line)
        for index, part in enumerate(parts):
            if index % 2 == 0:
                parts[index] = re.sub(r"([*|\\]|(?<=\w)_(?=\W|$))", r"\\\1", part)
            elif part.startswith("`") and not part.startswith("``"):
                parts[index] = f"`{part}`"
        lines[number] = "".join(parts)


def setup(app) -> None:
    write_pages()
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
