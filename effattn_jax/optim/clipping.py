r"""Clipping by the global norm.

    |g| = sqrt(sum over all leaves of g_i^2)        g <- g * min(1, c / |g|)

Two passes over the gradient (its largest entry, then the scaled squares), O(1) state: the norm and the factor.
Source: Pascanu et al. 2013 (arXiv 1211.5063).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ClipState(NamedTuple):
    """What the last update saw: the global norm before clipping and the factor applied, float32 scalars."""

    norm: jax.Array
    factor: jax.Array


def global_norm(tree: Any, *, axis_name: str | tuple[str, ...] | None = None) -> jax.Array:
    r"""Euclidean norm over all floating leaves of a tree, in float32, safe at both ends of the range.

    The squares are taken after division by the largest magnitude, so entries of 1e30 or 1e-30 neither overflow nor
    vanish, and are summed in float32 (float64 for float64 leaves) whatever the leaf's dtype. The derivative at 0 is 0.

    Args:
      tree: any pytree; integer and boolean leaves are left out.
      axis_name: mapped axis or axes over which each leaf is split (inside `shard_map` or `pmap`).

    Returns:
      A scalar; 0 for an empty tree, Inf or NaN when a leaf holds one.

    Cost: two reads of the tree, no copy.

    Example:
      >>> print(global_norm({"w": jnp.full((4,), 1e30), "count": jnp.array(7)}))
      2e+30
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    leaves = [x for x in leaves if x.size]
    if not leaves:
        return jnp.zeros((), jnp.float32)
    largest = jnp.max(jnp.stack([jax.lax.stop_gradient(jnp.max(jnp.abs(x))) for x in leaves]))
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    squares = sum(jnp.sum(jnp.abs(x / scale.astype(x.real.dtype)) ** 2) for x in leaves)
    if axis_name is not None:
        squares = jax.lax.psum(squares, axis_name)
    # The inner where keeps the square root's infinite slope at 0 out of the derivative.
    positive = squares != 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def clip_by_global_norm(
    max_norm: float, *, axis_name: str | tuple[str, ...] | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Shrink the whole gradient to norm `max_norm` when it is longer: g * min(1, c / |g|).

    Differentiable everywhere (at g = 0 its Jacobian is the identity); leaves keep their dtypes; integer leaves pass
    through. A norm that is not finite changes nothing, so that whatever watches for it downstream still sees it.

    Args:
      max_norm: c > 0.
      axis_name: mapped axis or axes over which the leaves are split; the norm is then that of the whole gradient.

    Returns:
      An optax transformation with state `ClipState(norm, factor)`.

    Raises:
      ValueError: if `max_norm` is not positive.

    Example:
      >>> clip = clip_by_global_norm(1.0)
      >>> updates, state = clip.update({"w": jnp.array([3.0, 4.0])}, clip.init(None))
      >>> print(updates["w"], state.norm, state.factor)
      [0.6 0.8] 5.0 0.2
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}.")

    def init(params: Any) -> ClipState:
        del params
        return ClipState(norm=jnp.zeros((), jnp.float32), factor=jnp.ones((), jnp.float32))

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del state, params, extra
        norm = global_norm(updates, axis_name=axis_name)
        clipped = jnp.isfinite(norm) & (norm > max_norm)
        factor = jnp.where(clipped, max_norm / jnp.where(clipped, norm, 1), 1)
        seen = ClipState(norm=norm.astype(jnp.float32), factor=factor.astype(jnp.float32))
        return jax.tree.map(lambda g: _scaled(g, factor), updates), seen

    return optax.GradientTransformationExtraArgs(init, update)


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
    g = jnp.asarray(g)
    if not jnp.issubdtype(g.dtype, jnp.inexact):
        return g
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return (wide * factor.astype(wide.real.dtype)).astype(g.dtype)
