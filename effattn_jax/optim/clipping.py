r"""Clipping by the norm, hard and soft, of the whole gradient or of each leaf.

    |g| = sqrt(sum over all leaves of g_i^2)        hard: g min(1, c / |g|)        soft: g c / (|g| + c)

and hard / 2 <= soft <= hard, with equality on the left at |g| = c. Where |f''| <= L0 + L1 |f'|, the best step of gradient
descent is 1 / (L0 + L1 |f'|): soft clipping with c = L0 / L1 and learning rate 1 / L0.

Two passes over the gradient (its largest entry, then the scaled squares), O(1) state: the norm and the factor.
Sources: Pascanu et al. 2013 (arXiv 1211.5063); Zhang et al. 2020 (arXiv 1905.11881).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._trees import Axes, is_float, map_leaves, varying, wide


class ClipState(NamedTuple):
    """What the last update saw: the norm before clipping and the factor applied, float32 scalars, one a leaf where leaves are clipped apart."""

    norm: Any
    factor: Any


def global_norm(tree: Any, *, axis_name: Axes = None) -> jax.Array:
    r"""Euclidean norm over all floating leaves of a tree, in float32, safe at both ends of the range.

    The squares are taken after division by the largest magnitude, so entries of 1e30 or 1e-30 neither overflow nor
    vanish, and are summed in float32 (float64 for float64 leaves) whatever the leaf's dtype. The derivative at 0 is 0.

    Args:
      tree: any pytree; integer and boolean leaves are left out.
      axis_name: mapped axis or axes over which leaves are split (inside `shard_map` or `pmap`). Under shard_map's
        default checks, a leaf that is the same on all devices of an axis counts once.

    Returns:
      A scalar; 0 for an empty tree, Inf or NaN when a leaf holds one.

    Cost: two reads of the tree, no copy.

    Example:
      >>> print(global_norm({"w": jnp.full((4,), 1e30), "count": jnp.array(7)}))
      2e+30
    """
    leaves = [wide(x) for x in jax.tree.leaves(tree) if is_float(x)]
    leaves = [x for x in leaves if x.size]
    if not leaves:
        return jnp.zeros((), jnp.float32)
    largest = jnp.max(jnp.stack([jax.lax.stop_gradient(jnp.max(jnp.abs(x))) for x in leaves]))
    axes = [varying(x, axis_name) for x in leaves]
    everywhere = tuple(sorted({name for names in axes for name in names}))
    if everywhere:
        largest = jax.lax.pmax(largest, everywhere)
    scale = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    sums = {}
    for x, names in zip(leaves, axes):
        sums[names] = sums.get(names, 0) + jnp.sum(jnp.abs(x / scale.astype(x.real.dtype)) ** 2)
    squares = sum(jax.lax.psum(s, names) if names else s for names, s in sums.items())
    # The inner where keeps the square root's infinite slope at 0 out of the derivative.
    positive = squares != 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def clip_by_global_norm(max_norm: float, *, axis_name: Axes = None) -> optax.GradientTransformationExtraArgs:
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
    return _globally(partial(_hard, _positive(max_norm=max_norm)), axis_name)


def soft_clip_by_global_norm(threshold: float, *, axis_name: Axes = None) -> optax.GradientTransformationExtraArgs:
    r"""Shrink the whole gradient smoothly, to a norm below `threshold` always: g * c / (|g| + c).

    Between half of hard clipping at the same threshold and all of it: g / 2 where |g| = c, and nearly g where |g| is
    small. The Jacobian at g = 0 is the identity; the rest is as in `clip_by_global_norm`.

    Args:
      threshold: c > 0.
      axis_name: mapped axis or axes over which the leaves are split; the norm is then that of the whole gradient.

    Returns:
      An optax transformation with state `ClipState(norm, factor)`.

    Raises:
      ValueError: if `threshold` is not positive.

    Source: Zhang et al. 2020 (arXiv 1905.11881).

    Example:
      >>> clip = soft_clip_by_global_norm(1.0)
      >>> updates, state = clip.update({"w": jnp.array([0.0, 4.0])}, clip.init(None))
      >>> print(updates["w"], state.norm, state.factor)
      [0.  0.8] 4.0 0.2
    """
    return _globally(partial(_soft, _positive(threshold=threshold)), axis_name)


def clip_by_block_norm(
    max_norm: float, *, soft: bool = False, axis_name: Axes = None
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each leaf by its own norm: g_l * min(1, c / |g_l|), or softly g_l * c / (|g_l| + c).

    Args:
      max_norm: c > 0, for every leaf.
      soft: which of the two.
      axis_name: mapped axis or axes over which the leaves are split.

    Returns:
      An optax transformation with state `ClipState(norm, factor)`, each a tree of scalars shaped as the parameters.

    Raises:
      ValueError: if `max_norm` is not positive.

    Example:
      >>> clip = clip_by_block_norm(1.0)
      >>> updates = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = clip.update(updates, clip.init(updates))
      >>> print(updates["a"], updates["b"], state.norm["a"])
      [0.6 0.8] [0.5] 5.0
    """
    factor_of = partial(_soft if soft else _hard, _positive(max_norm=max_norm))

    def init(params: Any) -> ClipState:
        return ClipState(*map_leaves(lambda path, x: _seen(0.0, 1.0), 2, params))

    def clip(path: Any, g: jax.Array) -> tuple:
        norm = global_norm(g, axis_name=axis_name)
        factor = factor_of(norm)
        return _scaled(g, factor), *_seen(norm, factor)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del state, params, extra
        updates, *seen = map_leaves(clip, 3, updates)
        return updates, ClipState(*seen)

    return optax.GradientTransformationExtraArgs(init, update)


def _globally(factor_of: Callable[[jax.Array], jax.Array], axis_name: Axes) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> ClipState:
        del params
        return _seen(0.0, 1.0)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del state, params, extra
        norm = global_norm(updates, axis_name=axis_name)
        factor = factor_of(norm)
        return jax.tree.map(lambda g: _scaled(g, factor), updates), _seen(norm, factor)

    return optax.GradientTransformationExtraArgs(init, update)


def _positive(**threshold: float) -> float:
    [(name, value)] = threshold.items()
    if not isinstance(value, jax.core.Tracer) and not value > 0:  # optax.inject_hyperparams hands tracers in
        raise ValueError(f"{name} must be positive, got {value}.")
    return value


def _hard(max_norm: float, norm: jax.Array) -> jax.Array:
    longer = jnp.isfinite(norm) & (norm > max_norm)
    return jnp.where(longer, max_norm / jnp.where(longer, norm, 1), 1)


def _soft(threshold: float, norm: jax.Array) -> jax.Array:
    finite = jnp.isfinite(norm)
    return jnp.where(finite, threshold / (jnp.where(finite, norm, 1) + threshold), 1)


def _seen(norm: Any, factor: Any) -> ClipState:
    return ClipState(jnp.asarray(norm, jnp.float32), jnp.asarray(factor, jnp.float32))


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
    g = jnp.asarray(g)
    if not is_float(g):
        return g
    scaled = wide(g)
    return (scaled * factor.astype(scaled.real.dtype)).astype(g.dtype)
