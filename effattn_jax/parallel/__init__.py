"""Mesh helpers and sharding rules: which axis of which array lies on which devices."""

from effattn_jax.parallel.mesh import AXES, make_mesh
from effattn_jax.parallel.sharding import RULES, batch_spec, local_shard, place_batch, shard_tree, spec_for

__all__ = ["AXES", "RULES", "batch_spec", "local_shard", "make_mesh", "place_batch", "shard_tree", "spec_for"]
