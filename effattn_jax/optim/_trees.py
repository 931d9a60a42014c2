"""Leaves of trees by name, whatever the tree is made of, and what a mapped axis means for a leaf."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Axes = str | tuple[str, ...] | None
Path = tuple[str, ...]


def is_float(x: Any) -> bool:
    """Whether a leaf is real or complex floating."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def wide(x: jax.Array) -> jax.Array:
    """A floating leaf in float32, or in its own type where that is wider; others as they are."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if is_float(x) else x


def _is_none(x: Any) -> bool:
    return x is None


def path_of(keys: tuple) -> Path:
    """A key path as strings; the attribute in which an NNX variable keeps its array is no part of its name."""
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
    boxed = isinstance(keys[-1], jax.tree_util.GetAttrKey) if keys else False
    return names[:-1] if boxed and len(names) > 1 and names[-1] in ("value", "raw_value") else names


def named_leaves(tree: Any) -> list[tuple[Path, Any]]:
    """(path, leaf) of every leaf, in the order of `jax.tree.leaves`."""
    return [(path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_named(function: Callable, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` of function(path, leaf, ...)."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest)


def map_leaves(function: Callable[..., tuple], count: int, tree: Any, *rest: Any) -> tuple:
    """function(path, leaf, ...) -> `count` results, as so many trees; a leaf None, as Equinox has it, gives None.

    The other trees need no leaf where `tree` has none, and are given as None to `function` where they have none.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    columns = [treedef.flatten_up_to(other) for other in rest]
    rows = [
        (None,) * count if leaf is None else function(path_of(keys), leaf, *others)
        for (keys, leaf), *others in zip(pairs, *columns)
    ]
    return tuple(treedef.unflatten([row[i] for row in rows]) for i in range(count))


def matches(pattern: str, path: Path) -> bool:
    """Whether a regular expression is found in the '/'-joined path."""
    return re.search(pattern, "/".join(path)) is not None


def exclude(*patterns: str) -> Callable[[Any], Any]:
    r"""A mask for decay and trust ratios: True for every leaf whose '/'-joined path matches none of the patterns.

    Args:
      patterns: regular expressions, searched in the path; a plain word is a substring, as in Keras' exclusion lists.

    Returns:
      A function of a tree of parameters -> tree of booleans, for every `mask` argument here and in optax.

    Example:
      >>> exclude("bias", "norm")({"norm_0": {"scale": 1.0}, "out": {"bias": 0.0, "kernel": 2.0}})
      {'norm_0': {'scale': False}, 'out': {'bias': False, 'kernel': True}}
    """
    return lambda params: map_named(lambda path, _: not any(matches(p, path) for p in patterns), params)


def resolve_mask(mask: Any, params: Any) -> Any:
    """A mask as a tree of booleans shaped as `params`: None is True everywhere, a function is called, a prefix is spread out.

    A model that can be called is a tree all the same.
    """
    if mask is None:
        mask = True
    is_function = callable(mask) and jax.tree_util.treedef_is_leaf(jax.tree.structure(mask))
    return jax.tree.broadcast(mask(params) if is_function else mask, params)


def axis_names(axis_name: Axes) -> tuple[str, ...]:
    """Names of mapped axes as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def varying(x: Any, axis_name: Axes) -> tuple[str, ...]:
    """The mapped axes of `axis_name` over which a leaf is split.

    Where shard_map follows which values differ from device to device (its default), a leaf that is the same on all
    devices is not; elsewhere every leaf is taken to be split.
    """
    own = marks(x)
    return tuple(n for n in axis_names(axis_name) if n in own or n not in marks(jax.lax.axis_index(n)))


def marks(x: Any) -> frozenset:
    """The mapped axes over which shard_map knows a value to vary; `vma` until jax 0.9, `mat.varying` since."""
    kind = jax.typeof(x)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "mat", None), "varying", frozenset())
