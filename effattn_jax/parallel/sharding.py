"""Sharding rules: a table from parameter names to mesh axes, read with the array's shape in hand.

A rule names, for the last axes of an array, the mesh axis that each lies on. An axis whose length the mesh axis does
not divide stays whole, so one table serves every width, every mesh and the optimizer's moments, whose paths end in
the names of the parameters they belong to. Large arrays that no rule names, such as weights with a place for each step,
lie over fsdp too, along their longest axis.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, tuple[str | None, ...]]

RULES: tuple[Rule, ...] = (
    # A table of rows: vocabulary over tensor, so that tied logits come out split over tensor; width over fsdp.
    (r"embedding$", ("tensor", "fsdp")),
    # The projections back into the width: they contract the axis that the projections before them split.
    (r"(out|down|output)[^/]*[/_]kernel$", ("tensor", "fsdp")),
    # Every other matrix maps the width to heads or features.
    (r"kernel$", ("fsdp", "tensor")),
)
"""First match wins (regular expression searched in the '/'-joined path); of arrays that match none, the large ones are shared out over fsdp."""
LARGE = 2**16  # entries from which on an array without a rule is not kept whole on every device


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """The partition of one array.

    Args:
      path: '/'-joined path of the array in its tree.
      shape: its shape; the rule's axes are laid against the last axes, so stacked layers need no rule of their own.
      mesh: the mesh, whose axis sizes decide which axes can be split.
      rules: table of (regular expression, axis names).

    Returns:
      A PartitionSpec of the array's rank. Without a rule, an array of `LARGE` entries has the longest of its axes that fsdp divides (of equal
      ones the last) on fsdp; a smaller one, and any of rank < 2, has the empty spec (replicated).

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> tuple(spec_for("block_0/mlp/up/kernel", (64, 256), make_mesh()))
      ('fsdp', 'tensor')
      >>> tuple(spec_for("block_0/mlp/up/bias", (256,), make_mesh()))
      ()
    """
    axes = next((axes for pattern, axes in rules if re.search(pattern, path)), None)
    if axes is None:
        axes = _longest(shape, mesh)
    if len(shape) < 2 or len(axes) > len(shape):
        return PartitionSpec()
    tail = shape[len(shape) - len(axes) :]
    fitting = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(axes, tail)]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *fitting) if any(fitting) else PartitionSpec()


def _longest(shape: Sequence[int], mesh: Mesh) -> tuple[str | None, ...]:
    sizes = [size if size % mesh.shape["fsdp"] == 0 else 0 for size in shape]
    if math.prod(shape) < LARGE or not any(sizes):
        return ()
    place = max(range(len(sizes)), key=lambda axis: (sizes[axis], axis))
    return tuple("fsdp" if axis == place else None for axis in range(len(sizes)))


def shard_tree(tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """The sharding of every array of a tree of arrays or of their shapes: parameters and optimizer state alike.

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> tuple(shard_tree({"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}, make_mesh())["kernel"].spec)
      ('fsdp', 'tensor')
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_for(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_spec(rank: int) -> PartitionSpec:
    """The partition of a batch array: rows (axis 0) over data and fsdp, time (axis 1) over sequence.

    Example:
      >>> tuple(batch_spec(1)), tuple(batch_spec(2))
      ((('data', 'fsdp'),), (('data', 'fsdp'), 'sequence'))
    """
    return PartitionSpec(("data", "fsdp"), *["sequence"][: rank - 1])


def local_shard(mesh: Mesh, num_rows: int) -> tuple[int, int]:
    """Which part of a global batch this process must load: shard i of n holds rows [i B / n, (i + 1) B / n).

    The smallest such part that covers every row of this process's devices: with one process it is (0, 1).

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> local_shard(make_mesh(), 8)
      (0, 1)
    """
    sharding = NamedSharding(mesh, batch_spec(1))
    slices = [index[0] for index in sharding.addressable_devices_indices_map((num_rows,)).values()]
    first = min(s.start or 0 for s in slices)
    last = max(num_rows if s.stop is None else s.stop for s in slices)
    count = next(n for n in range(last - first, num_rows + 1) if num_rows % n == 0 and first // n == (last - 1) // n)
    return first // count, num_rows // count


def place_batch(mesh: Mesh, rows: dict[str, np.ndarray], num_rows: int) -> dict[str, jax.Array]:
    """Put one batch on the mesh, where each process has loaded its `local_shard` only.

    Args:
      mesh: the mesh.
      rows: arrays (num_rows / n, ...), this process's shard.
      num_rows: rows of the global batch.

    Returns:
      Global arrays (num_rows, ...), sharded by `batch_spec`; a time axis that `sequence` does not divide stays whole.

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> place_batch(make_mesh(), {"x": np.arange(8)}, 8)["x"].shape
      (8,)
    """
    shard, num_shards = local_shard(mesh, num_rows)
    first = shard * (num_rows // num_shards)

    def place(local: np.ndarray) -> jax.Array:
        shape = (num_rows, *local.shape[1:])
        sharding = NamedSharding(mesh, _fitting(batch_spec(local.ndim), shape, mesh))
        if sharding.is_fully_addressable:
            return jax.device_put(local, sharding)
        return jax.make_array_from_callback(shape, sharding, lambda index: local[_shift(index[0], first), *index[1:]])

    return {name: place(np.asarray(local)) for name, local in rows.items()}


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Without the sequence axis where the length does not divide (labels (B, 1), odd lengths)."""
    if len(spec) > 1 and shape[1] % mesh.shape["sequence"]:
        return PartitionSpec(*spec[:1])
    return spec


def _shift(rows: slice, first: int) -> slice:
    start = rows.start or 0
    return slice(start - first, None if rows.stop is None else rows.stop - first)
