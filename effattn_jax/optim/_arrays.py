"""What the accumulating transforms and the loss wrappers do to the leaves of a tree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.optim._trees import Axes, axis_names, is_float, marks


def wide_sum(x: jax.Array) -> jax.Array:
    """A leaf, a count too, as sums of it are kept: in float32, or in its own type where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """A leaf times a real scalar, in the leaf's type."""
    return x * factor.astype(x.real.dtype)


def squared_norm(x: jax.Array, kept: int = 0) -> jax.Array:
    """sum |x|^2 over a leaf, or over all its axes but the first `kept`, real.

    As a product of the leaf with itself: a sum of squares takes twice the time on a CPU. All axes are contracted as they
    are, since flattening would gather what is sharded, and the result is whole where an explicit mesh splits the leaf.
    """
    (first, axes), sharding = (tuple(range(kept)), tuple(range(kept, x.ndim))), jax.typeof(x).sharding
    split = any(name is not None for name in sharding.spec)
    whole = jax.NamedSharding(sharding.mesh, jax.P()) if split else None
    precise = jax.lax.Precision.HIGHEST
    dims = ((axes, axes), (first, first))
    return jax.lax.dot_general(x, jnp.conj(x), dims, precision=precise, out_sharding=whole).real


def all_finite(*trees: Any) -> jax.Array:
    """Whether no entry of any floating leaf is NaN or infinite.

    A finite sum of squares says so, at a quarter of the time that looking at each entry takes on a CPU; only when the
    sum is not finite, which large finite entries can bring about too, is each entry looked at.
    """
    leaves = [wide_sum(x) for x in jax.tree.leaves(trees) if is_float(x)]
    if not leaves:
        return jnp.array(True)
    squares = sum(squared_norm(x) for x in leaves)
    each = functools.partial(jax.tree.reduce, lambda all_so_far, x: all_so_far & jnp.all(jnp.isfinite(x)))
    return jax.lax.cond(jnp.isfinite(squares), lambda x: jnp.isfinite(squares), lambda x: each(x, True), leaves)


def all_finite_everywhere(*trees: Any, apart: Axes = None) -> jax.Array:
    """`all_finite`, as one decision over the mapped axes over which shard_map knows leaves to be split, but for those `apart`."""
    good = all_finite(*trees)
    split = tuple(sorted(marks(good) - set(axis_names(apart))))
    return jax.lax.pmin(good.astype(jnp.int32), split) > 0 if split else good


def vary(tree: Any, axis_name: Axes) -> Any:
    """The same tree, each floating leaf a device's own over the mapped axes: its gradients are then not summed over them."""
    if axis_name is None:
        return tree
    index = sum(jax.lax.axis_index(name) for name in axis_names(axis_name))
    return jax.tree.map(lambda x: x + (0 * index).astype(jnp.result_type(x)) if is_float(x) else x, tree)


def axis_size(axis_name: Axes) -> int:
    """The number of devices along the mapped axes, 1 without any."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def psum(tree: Any, axis_name: Axes) -> Any:
    """The sum over the mapped axes, or the tree itself without any."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
