"""Mesh axes of one device, whose names in the type of an array (`AxisType.Explicit`) say nothing of where it lies.

JAX loses such a name where an axis of size 1, which one may have, is dropped or broadcast, and then takes two arrays of a kernel to lie apart.
Kernels compute without these names; what they return has them again.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

__all__: list[str] = []


def _kept(entry: Any, sizes: Any) -> Any:
    """An entry of a spec (None, a name or a tuple of them) without the names of axes of one device."""
    names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name and sizes[name] > 1)
    return names if len(names) > 1 else names[0] if names else None


def _stripped(x: Any) -> PartitionSpec | None:
    """The spec of x without those names; None where it has none of them, or is no array."""
    # Of every array of every call, and `jax.typeof` takes a microsecond or two.
    sharding = getattr(getattr(x, "aval", None), "sharding", None)
    if sharding is None or not any(sharding.spec):
        return None
    spec = PartitionSpec(*(_kept(entry, sharding.mesh.shape) for entry in sharding.spec))
    return None if spec == sharding.spec else spec


def _placed(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _without(x: Any) -> Any:
    spec = _stripped(x)
    return x if spec is None else _placed(x, jax.typeof(x).sharding.mesh, spec)


def without_unit_axes(args: tuple, kwargs: dict) -> tuple[tuple, dict, Callable[[Any], Any]]:
    """The arguments of a kernel without the names of mesh axes of one device, and the function that names its results.

    The first result, the output, has them as the first input of the highest rank that has some; all others, parts of a state, on the axis of the batch.
    """
    named = [x for x in jax.tree.leaves((args, list(kwargs.values()))) if _stripped(x) is not None]
    if not named:
        return args, kwargs, lambda out: out
    like = max(named, key=lambda x: x.ndim)  # the first of them
    mesh, before, after = jax.typeof(like).sharding.mesh, jax.typeof(like).sharding.spec, _stripped(like)

    def with_names(x: jax.Array, axes: int) -> jax.Array:
        spec = list(jax.typeof(x).sharding.spec)
        for axis in range(min(axes, len(spec), len(before))):
            spec[axis] = before[axis] if spec[axis] == after[axis] else spec[axis]
        return _placed(x, mesh, PartitionSpec(*spec))

    def again(out: Any) -> Any:
        leaves, tree = jax.tree.flatten(out)
        return tree.unflatten([with_names(x, 1 if i else x.ndim) for i, x in enumerate(leaves)])

    args, kwargs = jax.tree.map(_without, (args, kwargs))
    return args, kwargs, again
