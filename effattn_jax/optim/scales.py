r"""What a leaf of a model is, read from its name and shape: its expected scale, and the smallest slot that serves it.

    kernel  sqrt(gain / fan in)      embedding  sqrt(2 / width)      scale  1      bias  1 / 2

The gain is 2 after an activation (the second matrix of a feed-forward layer, the inner layers of a convolutional
network), 8 for a first convolution over an image, whose entries are small, and 1 elsewhere. Slots: a value a column for a
matrix (1, out), a value a row for an embedding (rows, 1), one value for anything else.
Source: the rules of Amos' published BERT and MNIST runs (Tian and Parikh 2022, arXiv 2210.11693).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from effattn_jax.optim._trees import Path, is_float, matches, named_leaves

Shape = tuple[int, ...]
Rule = Callable[[Path, Shape], Any] | Mapping[str, Any] | None


class AmosLeaf(NamedTuple):
    """What Amos makes of one leaf: its expected scale, the shape of its slots, and the bytes of both in float32."""

    path: Path
    shape: Shape
    scale: float
    slot: Shape
    bytes: int


def kind_of(path: Path, shape: Shape) -> str:
    """ "scale", "bias", "relative", "embedding", "weight" (torch's (out, in)) or "kernel"."""
    name, where = (path[-1].lower() if path else ""), "/".join(path).lower()
    if len(shape) <= 1:
        return "scale" if re.search(r"(scale|gamma|gain|weight)$", name) else "bias"
    if re.search(r"rel(ative)?_?(pos|emb|bias)", where):
        return "relative"
    if name.endswith("bias"):
        return "bias"
    if re.search(r"embedding(_table)?s?$|^w[tp]e$", name) or (name == "weight" and "embed" in where):
        return "embedding"
    return "weight" if name == "weight" else "kernel"


def is_stacked(path: Path) -> bool:
    """Whether the first axis counts layers, as under a scan over `layers`."""
    return any(a == "layers" and not b.isdigit() for a, b in zip(path, path[1:]))


def fan_in(path: Path, shape: Shape) -> int:
    """Terms in the sum that each output of a matrix is."""
    if kind_of(path, shape) == "weight":
        return math.prod(shape[1:])
    parent = path[-2].lower() if len(path) > 1 else ""
    if len(shape) == 3 and re.search(r"^(q|k|v|qkv|query|key|value)(_proj)?$", parent):
        return shape[0]  # (width, heads, head dim)
    return math.prod(shape[:-1])


def default_scales(leaves: list[tuple[Path, Shape]]) -> list[float]:
    """The expected scale of each leaf of a tree, given all of them: what follows what decides the gains."""
    shapes = dict(leaves)
    return [_default_scale(path, shape, shapes) for path, shape in leaves]


def _default_scale(path: Path, shape: Shape, shapes: Mapping[Path, Shape]) -> float:
    if is_stacked(path):
        shapes = {path: shape[1:]} | {p: s[1:] for p, s in shapes.items() if p[:-2] == path[:-2]}
        shape = shape[1:]
    kind = kind_of(path, shape)
    if kind == "scale":
        return 1.0
    if kind in ("bias", "relative"):
        return 0.5
    if kind == "embedding":
        return math.sqrt(2 / max(shape[-1], 1))
    return math.sqrt(_gain(path, shape, shapes) / max(fan_in(path, shape), 1))


def _gain(path: Path, shape: Shape, shapes: Mapping[Path, Shape]) -> int:
    if len(path) < 2:
        return 1
    beside = {p[-2]: s for p, s in shapes.items() if p[:-2] == path[:-2] and p[-1] == path[-1] and len(p) == len(path)}
    numbered = [name for name in beside if re.fullmatch(r"(Conv|Dense)_\d+", name)]
    if path[-2] in numbered and any(name.startswith("Conv") for name in numbered):
        order = sorted(numbered, key=lambda name: (name.split("_")[0], int(name.split("_")[1])))
        first, last = path[-2] == order[0], path[-2] == order[-1]
        return (8 if shape[-2] <= 4 else 1) if first else 1 if last else 2
    expands = [s for s in beside.values() if s == shape[::-1]]
    contracts = shape[0] > shape[-1] if path[-1] != "weight" else shape[-1] > shape[0]
    if len(shape) == 2 and contracts and expands:
        return 2
    return 2 if re.search(r"^(dense|fc|linear|lin|w)_?2$|^down", path[-2]) else 1


def default_slot(path: Path, shape: Shape) -> Shape:
    """The shape of a leaf's slots."""
    if is_stacked(path):
        core = default_slot(path[path.index("layers") + 1 :], shape[1:])
        return shape[:1] + (core or (1,) * (len(shape) - 1))
    kind = kind_of(path, shape)
    if len(shape) != 2 or kind not in ("kernel", "weight", "embedding"):
        return ()
    return (1, shape[1]) if kind == "kernel" else (shape[0], 1)


def _by_rule(rule: Rule, argument: str, path: Path, shape: Shape) -> Any:
    """The value that a user's rule gives: a function of (path, shape), or the first regular expression found in the path; None is the default."""
    if rule is None:
        return None
    if callable(rule):
        return rule(path, shape)
    for pattern, value in rule.items():
        if matches(pattern, path):
            return value(shape) if callable(value) else value
    raise ValueError(f"{argument} has no rule for {'/'.join(path)} of shape {shape}; its rules: {', '.join(rule)}.")


def plan(tree: Any, scale_fn: Rule, shape_fn: Rule, whole: Callable[[Path, Shape], Shape] | None = None) -> dict:
    """{path: AmosLeaf} of the floating leaves; `whole` gives the shape of which a leaf is this device's part."""
    leaves = [(path, tuple(np.shape(x))) for path, x in named_leaves(tree) if is_float(x)]
    if whole is not None:
        leaves = [(path, whole(path, shape)) for path, shape in leaves]
    scales = default_scales(leaves)
    planned = {}
    for (path, shape), default in zip(leaves, scales):
        scale = _by_rule(scale_fn, "scale_fn", path, shape)
        scale = default if scale is None else scale
        if isinstance(scale, int | float) and not 0 < scale < math.inf:
            raise ValueError(f"scale_fn must give a positive, finite scale of {'/'.join(path)}, got {scale}.")
        slot = _by_rule(shape_fn, "shape_fn", path, shape)
        slot = default_slot(path, shape) if slot is None else tuple(slot)
        fits = not slot or (len(slot) == len(shape) and all(a in (1, b) for a, b in zip(slot, shape)))
        if not fits:
            raise ValueError(
                f"shape_fn must give () or the shape {shape} of {'/'.join(path)} with axes set to 1, got {slot}."
            )
        planned[path] = AmosLeaf(path, shape, scale, slot, 2 * 4 * math.prod(slot))
    return planned


def amos_table(params: Any, scale_fn: Rule = None, shape_fn: Rule = None) -> str:
    """The scales and slots that Amos takes for a model, as a table to print.

    Args:
      params: tree of arrays, or of their shapes.
      scale_fn, shape_fn: as in `amos`.

    Returns:
      A line a leaf: path, shape, expected scale, shape of its two slots, their bytes in float32; and the sum beside Adam's.

    Raises:
      ValueError: a leaf without a rule, or a slot that does not fit.

    Example:
      >>> shapes = {"kernel": jax.ShapeDtypeStruct((100, 400), "float32"), "bias": jax.ShapeDtypeStruct((400,), "float32")}
      >>> print(amos_table({"up": shapes}))
      path         shape      scale   slots     bytes
      up/bias      400        0.5000  scalar        8
      up/kernel    100 x 400  0.1000  1 x 400    3200
      slots in all: 3208 bytes, 0.0099 of Adam's 323200
    """
    rows = [("path", "shape", "scale", "slots", "bytes")]
    planned = plan(params, scale_fn, shape_fn).values()
    for leaf in planned:
        sizes = [" x ".join(map(str, shape)) or "scalar" for shape in (leaf.shape, leaf.slot)]
        scale = f"{leaf.scale:.4f}" if isinstance(leaf.scale, int | float) else str(leaf.scale)
        rows.append(("/".join(leaf.path), sizes[0], scale, sizes[1], str(leaf.bytes)))
    total, adam = sum(leaf.bytes for leaf in planned), sum(2 * 4 * math.prod(leaf.shape) for leaf in planned)
    return table(rows, right=(4,)) + f"\nslots in all: {total} bytes, {total / max(adam, 1):.4f} of Adam's {adam}"


def table(rows: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def shapes_of(params: Any) -> Any:
    """The tree with shapes and dtypes in place of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x)), params)
