"""A page for each member of the package's tables, made from its line: what it is, how it is called, its weights, its figures.

`write(folder)` is what Sphinx's configuration calls. Pictures are computed when the documentation is built; measured figures are those of
benchmarks/results, with their device and date.
"""

import importlib
import inspect
import json
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import more_inputs
from benchmarks.peers import OPTIONS
from effattn_jax import attention, mixing, nn, position, recurrence, ssm
from effattn_jax._contract import Mixer, Recurrence, TokenMixer
from effattn_jax.attention import attention_weights
from effattn_jax.plot import plot_attention

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
TABLES = {
    "effattn_jax.attention": attention.MIXERS,
    "effattn_jax.position": position.MIXERS,
    "effattn_jax.mixing": mixing.MIXERS,
    "effattn_jax.ssm": ssm.MIXERS,
    "effattn_jax.recurrence": recurrence.RECURRENCES,
}
LENGTH, DIM = 24, 8  # of the pictures
CAUSAL = "causal"
HEADS, WIDTH = 8, 64  # of the state's size
# Groups of benchmarks/results/*.json that measure a member under another name than its own.
GROUPS = {
    "linear": ("linear", "linear, "),
    "performer": ("performer", "performer, "),
    "softmax": ("softmax", "window 256", "packed"),
    "gated_linear": ("gated_linear", "gated_linear, "),
    "diagonal_ssm": ("S4D",),
    "s5_ssm": ("S5",),
    "selective_scan": ("selective scan",),
    "state_space_duality": ("state-space duality",),
    "diagonal_complex": ("scan, 8 complex",),
}
INPUTS = ("value", "inputs", "u", "x")  # what the weights of a member without queries are on
_FIGURES = ("attention", "attention_65536", "attention_more", "state_spaces")


def function_of(line: Any) -> Callable:
    """The public function behind a table's line, without the options that the line fixes."""
    return line.function.func if isinstance(line.function, partial) else line.function


def pages() -> Iterator[tuple[str, str, Any, str]]:
    """(room, name, line, file name) of every member; a name that two rooms have gets the room's before it."""
    for room, table in TABLES.items():
        for name, line in table.items():
            yield room, name, line, f"{room.removeprefix('effattn_jax.')}-{name}"


def page_of() -> dict[Callable, str]:
    """The page on which each function is documented: that of the first line that has it."""
    found: dict[Callable, str] = {}
    for room, _, line, file in pages():
        function = function_of(line)
        if getattr(importlib.import_module(room), function.__name__, None) is function:
            found.setdefault(function, file)
    return found


def write(folder: pathlib.Path) -> None:
    """Writes a Markdown page and a picture for every member into the folder."""
    folder.mkdir(parents=True)
    documented = page_of()
    for room, name, line, file in pages():
        parts = (
            _head(room, name, line, file, documented), _use(room, name, line), _picture(name, line, folder / f"{file}.png"),
            _state(name, line), _exempt(line), _measured(name), _compiled(name), _recall(name),
        )  # fmt: skip
        (folder / f"{file}.md").write_text("\n".join(text for part in parts for text in part) + "\n")


def _head(room: str, name: str, line: Any, file: str, documented: dict[Callable, str]) -> list[str]:
    function = function_of(line)
    place = documented.get(function)
    fixed = line.function.keywords if isinstance(line.function, partial) else {}
    call = f"`{function.__name__}`" + (f" with `{_keywords(fixed)}`" if fixed else "")
    lines = [f"# {name}", ""]
    if place == file:
        return [*lines, "```{eval-rst}", f".. autofunction:: {room}.{function.__name__}", "```", ""]
    about = (inspect.getdoc(function) or "").split("\n\n")[0]
    about = f"{call}, documented under [{place}]({place}.md)." if place else f"{call}: {about}"
    return [*lines, about, ""]


def _keywords(options: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _use(room: str, name: str, line: Any) -> list[str]:
    """How a model has it."""
    lines = ["## In a model", ""]
    if isinstance(line, Mixer) and room == "effattn_jax.attention" and not (line.weights or line.extras):
        options = "".join(f", {key}={value!r}" for key, value in (OPTIONS.get(name) or line.options).items())
        lines += [
            f'As the attention of a Flax layer, Linen or NNX: `attention_fn=as_attention_fn("{name}"{options}, is_causal=True)`.',
            "",
        ]
    layers = [layer for layer in nn.MIXERS if layer == name or _kernel(layer) == name]
    for layer in layers:
        options = nn.MIXERS[layer](width=16, parent=None).own_options()
        known = ", ".join(f"`{option}`" for option in sorted(options))
        lines += [f"`--model.mixer {layer}`" + (f", with the options {known}." if known else "."), ""]
    if not layers:
        lines += [f"A part of other mixers; call it as it is: `from {room} import {function_of(line).__name__}`.", ""]
    return lines


def _kernel(layer: str) -> str:
    """The table's line that a layer of `nn.MIXERS` runs."""
    return getattr(nn.MIXERS[layer](width=16, parent=None), "kernel", "")


def _picture(name: str, line: Any, path: pathlib.Path) -> list[str]:
    """The weights on values of random inputs, or how much each output moves with each input."""
    images = []
    for title, weights in (_weights(line) if isinstance(line, Mixer) else _influence(line)).items():
        image = path.with_name(f"{path.stem}-{title.replace(' ', '-')}.png")
        plot_attention(weights, titles=[title]).savefig(image, dpi=90)
        images.append(f"![{name}, {title}]({image.name})")
    if isinstance(line, Mixer):
        chosen = f", {_keywords(line.options)}" if line.options else ""
        said = f"How much of each value every query takes, {LENGTH} random queries and keys of {DIM}{chosen} (`attention_weights`)."
    else:
        said = f"How far each output moves with each input, the root of the sum of squares of the Jacobian; {LENGTH} steps."
    return ["## What it sees", "", " ".join(images), "", said, ""]


def _weights(line: Mixer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, LENGTH, 1, DIM)), jnp.float32) for _ in range(2))
    more = more_inputs(line, jax.random.key(0), query)

    def of(is_causal: bool) -> np.ndarray:
        kernel = partial(attention_weights, line.function, is_causal=is_causal, **line.options)
        return np.asarray(jax.jit(kernel)(query, key, **more)[0, 0])

    return _in_each_form(of)


def _influence(line: TokenMixer | Recurrence) -> dict[str, np.ndarray]:
    if isinstance(line, TokenMixer):
        weights = line.weights(jax.random.key(0), DIM, LENGTH, 2)
        inputs = jax.random.normal(jax.random.key(1), (1, LENGTH, DIM))
        return _in_each_form(lambda is_causal: _moved(partial(line.function, **weights, is_causal=is_causal), inputs))
    rng = np.random.default_rng(0)
    given = line.sample(rng, 1, LENGTH, np.float32) | (line.weights(rng) if line.weights else {})
    name = next(name for name in INPUTS if name in given)
    inputs = jnp.asarray(given.pop(name))
    return {CAUSAL: _moved(lambda x: line.function(**given, **{name: x}), inputs)}


def _in_each_form(of: Callable[[bool], np.ndarray]) -> dict[str, np.ndarray]:
    """`of(is_causal)` for the forms that a member has, by their titles."""
    found = {}
    for title, is_causal in {CAUSAL: True, "both ways": False}.items():
        try:
            found[title] = of(is_causal)
        except ValueError:  # it has no such form
            continue
    return found


def _moved(call: Callable, inputs: jax.Array) -> np.ndarray:
    slope = jax.jit(jax.jacobian(call, holomorphic=jnp.iscomplexobj(inputs)))(inputs)
    slope = jnp.abs(slope).reshape(LENGTH, -1, LENGTH, inputs[0, 0].size)
    return np.asarray(jnp.sqrt(jnp.sum(slope * slope, axis=(1, 3))))


def _state(name: str, line: Any) -> list[str]:
    """What decoding carries from token to token."""
    if not isinstance(line, Mixer) or "causality" in line.exempt:
        return []

    def count(capacity: int) -> int:
        return sum(
            x.size
            for x in jax.tree.leaves(
                jax.eval_shape(lambda: line.empty_state(1, capacity, HEADS, HEADS, WIDTH, WIDTH, jnp.float32))
            )
        )

    few, many = count(1024), count(2048)
    grows = f"{few:,} numbers for 1,024 tokens, {many:,} for 2,048" if many > few else f"{few:,} numbers at any length"
    return ["## Its state", "", f"{grows}, {HEADS} heads of {WIDTH}, batch 1.", ""]


def _exempt(line: Any) -> list[str]:
    reasons = dict(getattr(line, "exempt", {}))
    if not reasons:
        return []
    return ["## Laws that it cannot keep", "", *(f"- {law}: {reason}" for law, reason in reasons.items()), ""]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]


def _number(x: float | None) -> str:
    return "" if x is None or x != x else f"{x:,.1f}"


def _measured(name: str) -> list[str]:
    lines: list[str] = []
    for file in _FIGURES:
        record = json.loads((RESULTS / f"{file}.json").read_text())
        wanted = GROUPS.get(name, (name,))
        rows = [r for r in record["rows"] if r["group"] == wanted[0] or r["group"].startswith(wanted[1:] or ("\0",))]
        if not rows:
            continue
        cells = [
            [r["group"], f"{r['length']:,}", r["name"], *map(_number, (r["forward_ms"], r["both_ms"], r["forward_mb"], r["both_mb"]))]
            for r in sorted(rows, key=lambda r: (r["group"], r["length"]))
        ]  # fmt: skip
        head = ["", "T", "by", "forward, ms", "both passes, ms", "MB forward", "MB both"]
        lines += _table(head, cells)
        dates = " and ".join(sorted({r.get("date", record["date"]) for r in rows}))
        lines += [f"{record['caption']}, {record['dtype']}, {record['device']}, jax {record['jax']}, {dates} (`benchmarks/results/{file}.json`).", ""]  # fmt: skip
    return ["## Time and memory", "", *lines] if lines else []


def _compiled(name: str) -> list[str]:
    name, rows = GROUPS.get(name, (name,))[0], []
    for kind in ("tpu", "cuda"):
        record = json.loads((RESULTS / f"compiled_{kind}.json").read_text())
        for r in record["rows"]:
            if r["name"] == name and "both" in r:
                rows.append([
                    record["target"], f"{r['length']:,}", r["date"],
                    *(_number(r[part][what]) for part in ("forward", "both") for what in ("seconds", "mb")),
                ])  # fmt: skip
    if not rows:
        return []
    head = ["", "T", "date", "forward, s to compile", "MB", "both passes, s to compile", "MB"]
    return ["## Compiled for accelerators", "", *_table(head, rows), "By their own compilers, without the device (`make compiled`).", ""]  # fmt: skip


def _recall(name: str) -> list[str]:
    record = json.loads((RESULTS / "recall.json").read_text())
    rows = [
        [r["mixer"], f"{r['width']}", f"{r['state']:,}", f"{r['accuracy']:.3f}"]
        for r in record["best"]
        if r["mixer"] in nn.MIXERS and name in (r["mixer"], _kernel(r["mixer"]))
    ]
    if not rows:
        return []
    return ["## Recall", "", *_table(["", "width", "numbers in the state", "accuracy"], rows), "See [the comparison](../../recall.md).", ""]  # fmt: skip
