r"""Clipping by the norm, hard and soft, of the whole gradient or of each leaf.

    |g| = sqrt(sum over all leaves of g_i^2)        hard: g min(1, c / |g|)        soft: g c / (|g| + c)

and hard / 2 <= soft <= hard, with equality on the left at |g| = c. Where |f''| <= L0 + L1 |f'|, the best step of gradient
descent is 1 / (L0 + L1 |f'|): soft clipping with c = L0 / L1 and learning rate 1 / L0.

Two passes over the gradient (its norm, then the scaling), O(1) state: the norm and the factor.
Sources: Pascanu et al. 2013 (arXiv 1211.5063); Zhang et al. 2020 (arXiv 1905.11881).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._arrays import psum, squared_norm
from effattn_jax.optim._trees import Axes, is_float, map_leaves, number, varying, wide

# Below it, squares that underflow may be a part of a sum that counts.
SMALL = 2.0**-60


class ClipState(NamedTuple):
    """What the last update saw: the norm before clipping and the factor applied, float32 scalars, one a leaf where leaves are clipped apart."""

    norm: Any
    factor: Any


def global_norm(tree: Any, *, axis_name: Axes = None) -> jax.Array:
    r"""Euclidean norm over all floating leaves of a tree, in float32, safe at both ends of the range.

    The squares are summed at once; only where that sum overflows, or is so small that squares may have vanished, are
    they taken again after division by the largest magnitude: entries of 1e30 or 1e-30 neither overflow nor vanish. Sums
    are float32 (float64 for float64 leaves) whatever the leaf's dtype. The derivative at 0 is 0.

    Args:
      tree: any pytree; integer and boolean leaves are left out.
      axis_name: mapped axis or axes over which leaves are split (inside `shard_map` or `pmap`). Under shard_map's
        default checks, a leaf that is the same on all devices of an axis counts once.

    Returns:
      A scalar; 0 for an empty tree, Inf or NaN when a leaf holds one.

    Cost: one read of the tree, two more where the sum of squares does not do; no copy.

    Example:
      >>> print(global_norm({"w": jnp.full((4,), 1e30), "count": jnp.array(7)}))
      2e+30
    """
    return norms_of([jax.tree.leaves(tree)], axis_name)[0]


def norms_of(groups: list[list[jax.Array]], axis_name: Axes = None, kept: list[int] | None = None) -> list[jax.Array]:
    """The joint norm of each list of leaves, as `global_norm` has it, with one decision for all: on a GPU each costs a wait.

    `kept`: of each list, how many first axes of its leaves the norm is not over, which it then has; none where left out.
    """
    parts = []  # (place in groups, mapped axes, leaves that are split over them)
    for place, group in enumerate(groups):
        split = {}
        for x in group:
            if is_float(x) and jnp.size(x):
                split.setdefault(varying(x, axis_name), []).append(wide(x))
        parts += [(place, names, leaves) for names, leaves in split.items()]
    if not parts:
        return [jnp.zeros((), jnp.float32)] * len(groups)
    found = [[] for _ in groups]
    kept = kept or [0] * len(groups)
    squared = _squares([leaves for *_, leaves in parts], [kept[place] for place, *_ in parts])
    for (place, names, _), (scale, squares) in zip(parts, squared):
        found[place].append((names, jax.lax.stop_gradient(scale), squares))
    return [_root(of_group) for of_group in found]


def _squares(parts: list[list[jax.Array]], kept: list[int]) -> list[tuple[jax.Array, jax.Array]]:
    """(s, q) with s^2 q the sum of squares of each part."""
    sums = [sum(squared_norm(x, n) for x in leaves) for leaves, n in zip(parts, kept)]

    def at_once(parts: list) -> list:
        return [(jnp.where(q > SMALL, 1, q), q) for q in sums]  # 1, of the type that q has on mapped axes

    def after_division(parts: list) -> list:
        out = []
        for leaves, q, n in zip(parts, sums, kept):
            axes = [tuple(range(n, x.ndim)) for x in leaves]
            sizes = [jnp.max(jnp.abs(x), a) for x, a in zip(leaves, axes)]
            largest = jax.lax.stop_gradient(jnp.max(jnp.stack(sizes), axis=0))
            # No more than 2^125 in float32: by more XLA divides as a product with a reciprocal that is flushed to 0.
            most = jnp.finfo(q.dtype).max / 8
            scale = jnp.where(jnp.isfinite(largest), jnp.minimum(largest, most), 1).astype(q.dtype)
            divisor = jnp.where(scale > 0, scale, 1)
            small = [x / jnp.expand_dims(divisor, a).astype(x.real.dtype) for x, a in zip(leaves, axes)]
            out.append((scale, sum(jnp.sum(jnp.abs(x) ** 2, a) for x, a in zip(small, axes))))
        return out

    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(q) & (q > SMALL)) for q in sums]))
    return jax.lax.cond(good, at_once, after_division, parts)


def _root(parts: list[tuple[tuple[str, ...], jax.Array, jax.Array]]) -> jax.Array:
    """The root of the sum of s^2 q over parts, each summed over its mapped axes, at one scale for all."""
    if not parts:
        return jnp.zeros((), jnp.float32)
    scales = [jax.lax.pmax(scale, names) if names else scale for names, scale, _ in parts]
    scale = jnp.max(jnp.stack(scales), axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    total = 0
    for names, own, squares in parts:
        # A factor at a time: its square may underflow where the product does not. What is not finite stays so.
        share = jnp.where(jnp.isfinite(squares), squares * (own / scale) * (own / scale), squares)
        total += psum(share, names or None)
    # The inner where keeps the square root's infinite slope at 0 out of the derivative.
    positive = total != 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, total, 1)), 0)


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

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del state, params, extra
        norms = iter(norms_of([[g] for g in jax.tree.leaves(updates)], axis_name))

        def clip(path: Any, g: jax.Array) -> tuple:
            norm = next(norms)
            factor = factor_of(norm)
            return _scaled(g, factor), *_seen(norm, factor.whole)

        updates, *seen = map_leaves(clip, 3, updates)
        return updates, ClipState(*seen)

    return optax.GradientTransformationExtraArgs(init, update)


class _Factor(NamedTuple):
    """A factor as a product of two, neither of which is flushed to 0 where the norm is beyond 1e38 and the clipped gradient is not."""

    unit: jax.Array
    rest: jax.Array

    @property
    def whole(self) -> jax.Array:
        return self.unit * self.rest


def _quotient(threshold: float, length: jax.Array) -> _Factor:
    """threshold / length."""
    unit = jnp.where(length > 2.0**64, 2.0**-64, 1).astype(length.dtype)
    return _Factor(unit, threshold / (length * unit))


def _globally(factor_of: Callable[[jax.Array], _Factor], axis_name: Axes) -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> ClipState:
        del params
        return _seen(0.0, 1.0)

    def update(updates: Any, state: ClipState, params: Any = None, **extra: Any) -> tuple[Any, ClipState]:
        del state, params, extra
        norm = global_norm(updates, axis_name=axis_name)
        factor = factor_of(norm)
        return jax.tree.map(lambda g: _scaled(g, factor), updates), _seen(norm, factor.whole)

    return optax.GradientTransformationExtraArgs(init, update)


def _positive(**threshold: float) -> float:
    [(name, value)] = threshold.items()
    if not number(value) > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
    return value


def _hard(max_norm: float, norm: jax.Array) -> _Factor:
    return _where(jnp.isfinite(norm) & (norm > max_norm), lambda norm: _quotient(max_norm, norm), norm)


def _soft(threshold: float, norm: jax.Array) -> _Factor:
    return _where(jnp.isfinite(norm + threshold), lambda norm: _quotient(threshold, norm + threshold), norm)


def _where(clips: jax.Array, factor_of: Callable[[jax.Array], _Factor], norm: jax.Array) -> _Factor:
    """1 where nothing is clipped; no derivative passes through the other side there."""
    return _Factor(*(jnp.where(clips, x, 1) for x in factor_of(jnp.where(clips, norm, 1))))


def _seen(norm: Any, factor: Any) -> ClipState:
    return ClipState(jnp.asarray(norm, jnp.float32), jnp.asarray(factor, jnp.float32))


def _scaled(g: jax.Array, factor: _Factor) -> jax.Array:
    g = jnp.asarray(g)
    if not is_float(g):
        return g
    scaled = wide(g)
    unit, rest = (x.astype(scaled.real.dtype) for x in factor)
    return (scaled * unit * rest).astype(g.dtype)
