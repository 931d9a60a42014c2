"""Sharding rules: a table from parameter names to mesh axes, read with the array's shape in hand.

A rule names, for the last axes of an array, the mesh axis that each lies on. An axis whose length the mesh axis does
not divide stays whole, so one table serves every width, every mesh and the optimizer's moments, whose paths end in
the names of the parameters they belong to.
"""

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
    (r"(out|down|output)[^/]*/kernel$", ("tensor", "fsdp")),
    # Every other matrix maps the width to heads or features.
    (r"kernel$", ("fsdp", "tensor")),
)
"""First match wins (regular expression searched in the '/'-joined path); arrays that match none are replicated."""


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """The partition of one array.

    Args:
      path: '/'-joined path of the array in its tree.
      shape: its shape; the rule's axes are laid against the last axes, so that stacked layers need no rule of their own.
      mesh: the mesh, whose axis sizes decide which axes can be split.
      rules: table of (regular expression, axis names).

    Returns:
      A PartitionSpec of the array's rank; empty (replicated) for arrays of rank < 2 or without a rule.

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> tuple(spec_for("block_0/mlp/up/kernel", (64, 256), make_mesh()))
      ('fsdp', 'tensor')
      >>> tuple(spec_for("block_0/mlp/up/bias", (256,), make_mesh()))
      ()
    """
    axes = next((axes for pattern, axes in rules if re.search(pattern, path)), ())
    if len(shape) < 2 or len(axes) > len(shape):
        return PartitionSpec()
    tail = shape[len(shape) - len(axes) :]
    fitting = [name if name and size % mesh.shape[name] == 0 else None for name, size in zip(axes, tail)]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *fitting) if any(fitting) else PartitionSpec()


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


def place_batch(mesh: Mesh, load_rows: Any, num_rows: int) -> Any:
    """Put one global batch on the mesh, each process loading only the rows that its own devices hold.

    Args:
      mesh: the mesh.
      load_rows: `load_rows(shard, num_shards)` -> dict of numpy arrays (num_rows / num_shards, ...), the rows
        [shard * n, (shard + 1) * n) of the global batch.
      num_rows: rows of the global batch.

    Returns:
      A dict of global arrays (num_rows, ...), sharded by `batch_spec`.

    Example:
      >>> from effattn_jax.parallel import make_mesh
      >>> place_batch(make_mesh(batch_size=4), lambda shard, num_shards: {"x": np.arange(4)}, 4)["x"].shape
      (4,)
    """
    first, count = _local_rows(mesh, num_rows)
    local = load_rows(first // count, num_rows // count)

    def place(rows: np.ndarray) -> jax.Array:
        shape = (num_rows, *rows.shape[1:])
        sharding = NamedSharding(mesh, _fitting(batch_spec(rows.ndim), shape, mesh))
        if sharding.is_fully_addressable:
            return jax.device_put(rows, sharding)
        return jax.make_array_from_callback(shape, sharding, lambda index: rows[_shift(index[0], first), *index[1:]])

    return {name: place(np.asarray(rows)) for name, rows in local.items()}


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Without the sequence axis where the length does not divide (labels (B, 1), odd lengths)."""
    if len(spec) > 1 and shape[1] % mesh.shape["sequence"]:
        return PartitionSpec(*spec[:1])
    return spec


def _local_rows(mesh: Mesh, num_rows: int) -> tuple[int, int]:
    """First row and number of rows of the smallest aligned block that covers this process's devices."""
    sharding = NamedSharding(mesh, batch_spec(1))
    slices = [index[0] for index in sharding.addressable_devices_indices_map((num_rows,)).values()]
    first = min(s.start or 0 for s in slices)
    last = max(num_rows if s.stop is None else s.stop for s in slices)
    count = next(n for n in range(last - first, num_rows + 1) if num_rows % n == 0 and first // n == (last - 1) // n)
    return first // count * count, count


def _shift(rows: slice, first: int) -> slice:
    start = rows.start or 0
    return slice(start - first, None if rows.stop is None else rows.stop - first)
