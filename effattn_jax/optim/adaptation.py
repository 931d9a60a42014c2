r"""Layer adaptation: each leaf moves in proportion to its own size.

    u_l <- u_l * k phi(|theta_l|) / |u_l|,    phi(z) = min(max(z, low), high)

LAMB is this around Adam with weight decay, LARS around SGD, before momentum. One norm of update and parameter a leaf, or
a layer of a leaf that stacks layers, as those of a scan over `layers` do.
Sources: You et al. 2017 (arXiv 1708.03888), You et al. 2020 (arXiv 1904.00962), Su (kexue.fm 7094).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._trees import Axes, Path, is_float, map_leaves, number, resolve_mask, wide
from effattn_jax.optim.clipping import norms_of
from effattn_jax.optim.scales import is_stacked


class LayerAdaptationState(NamedTuple):
    """The trust ratio that the last update had, a float32 scalar a leaf, (L,) of one that stacks L layers."""

    ratio: Any


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run an optax transformation, and keep its state, in float32 whatever the types of parameters and gradients.

    Leaves go in as float32 (float64 where they are), and an update comes out in the type of its gradient: moments of
    bfloat16 parameters do not stall, since 0.999 is 1 there. Integer leaves pass by it.

    Args:
      inner: any optax transformation, a chain say.

    Returns:
      The transformation with the same state, but wide.

    Example:
      >>> optimizer = in_float32(optax.adamw(1e-3))
      >>> optimizer.init(jnp.ones(3, jnp.bfloat16))[0].nu.dtype
      dtype('float32')
    """
    inner = optax.with_extra_args_support(inner)

    def seen(tree: Any) -> Any:
        return jax.tree.map(lambda x: wide(x) if is_float(x) else optax.MaskedNode(), tree)

    def init(params: Any) -> Any:
        return inner.init(seen(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wide_params = None if params is None else seen(params)
        new, state = inner.update(seen(updates), state, wide_params, **extra)
        cast = map_leaves(lambda path, g, u: (u.astype(jnp.result_type(g)) if is_float(g) else g,), 1, updates, new)[0]
        return cast, state

    return optax.GradientTransformationExtraArgs(init, update)


def layer_adaptation(
    *,
    mask: Any = None,
    bounds: tuple[float, float] | None = None,
    coefficient: float = 1.0,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scale each leaf's update to the norm of its parameter, u * coefficient * phi(|theta|) / |u|.

    Where phi(|theta|) or |u| is 0 the ratio is 1, so that a leaf that starts at 0 moves at all; with plain phi its next
    step is then smaller by the learning rate. A lower bound gives such leaves steps of one size from the first on. Put
    it behind the weight decay to have the decay inside the norm, as in LAMB.

    Args:
      mask: leaves to be scaled: a tree (or prefix) of booleans or a function of the parameters, `exclude("bias", "norm")`
        say; None takes all.
      bounds: (low, high) of phi; None is the identity.
      coefficient: k.
      axis_name: mapped axis or axes over which leaves are split.

    Returns:
      An optax transformation with state `LayerAdaptationState`: the ratios to look at.

    Raises:
      ValueError: a coefficient that is not positive, bounds out of order, no params.

    Example:
      >>> adapt = layer_adaptation()
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> updates, state = adapt.update({"w": jnp.array([0.0, 2.0])}, adapt.init(params), params)
      >>> print(updates["w"], state.ratio["w"])
      [0. 5.] 2.5
    """
    if not number(coefficient) > 0:
        raise ValueError(f"coefficient must be positive, got {coefficient}.")
    traced = isinstance(bounds, tuple) and any(isinstance(bound, jax.core.Tracer) for bound in bounds)
    if bounds is not None and not traced and not (len(bounds) == 2 and 0 <= bounds[0] <= bounds[1]):
        raise ValueError(f"bounds must be (low, high) with 0 <= low <= high, got {bounds}.")

    def init(params: Any) -> LayerAdaptationState:
        return LayerAdaptationState(map_leaves(lambda path, p: (_ones(path, p),), 1, params)[0])

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, LayerAdaptationState]:
        del state, extra
        if params is None:
            raise ValueError("layer_adaptation needs the parameters: call update(updates, state, params).")
        chosen = resolve_mask(mask, params)
        groups, kept = [], []

        def collect(path: Path, u: jax.Array, p: jax.Array, scaled: bool) -> tuple:
            if _adapts(u, scaled):
                groups.extend(([p], [u]))
                kept.extend([int(is_stacked(path))] * 2)
            return (None,)

        map_leaves(collect, 1, updates, params, chosen)
        norms = iter(norms_of(groups, axis_name, kept))

        def adapt(path: Path, u: jax.Array, scaled: bool) -> tuple:
            if not _adapts(u, scaled):
                return u, _ones(path, u)
            size, step = next(norms), next(norms)
            size = size if bounds is None else jnp.clip(size, *bounds)
            usable = (size > 0) & (step > 0)
            ratio = jnp.where(usable, coefficient * size / jnp.where(usable, step, 1), 1)
            each = jnp.expand_dims(ratio, tuple(range(ratio.ndim, jnp.ndim(u))))
            return (wide(u) * each.astype(wide(u).real.dtype)).astype(u.dtype), ratio.astype(jnp.float32)

        updates, ratio = map_leaves(adapt, 2, updates, chosen)
        return updates, LayerAdaptationState(ratio)

    return optax.GradientTransformationExtraArgs(init, update)


def _adapts(update: jax.Array, chosen: bool) -> bool:
    return is_float(update) and bool(chosen)


def decoupled_weight_decay(rate: float | optax.Schedule, *, mask: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""Take rate * theta off, whatever the learning rate: u - rate(t) theta, at the end of a chain.

    `optax.add_decayed_weights`, before the learning rate, is AdamW's decay, lr * weight_decay * theta. This one has a
    course of its own, such as `amos_schedules` gives it.

    Args:
      rate: a number, or a schedule of the number of updates done.
      mask: leaves to be decayed, as in `layer_adaptation`.

    Returns:
      An optax transformation whose state counts updates.

    Raises:
      ValueError: a negative rate, no params.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).

    Example:
      >>> from effattn_jax.optim import exclude
      >>> decay = decoupled_weight_decay(0.1, mask=exclude("bias"))
      >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
      >>> updates, _ = decay.update({"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}, decay.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [-0.1 -0.1] [0. 0.]
    """
    if not callable(rate) and not number(rate) >= 0:
        raise ValueError(f"rate must be at least 0, got {rate}.")

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, optax.ScaleByScheduleState]:
        del extra
        if params is None:
            raise ValueError("decoupled_weight_decay needs the parameters: call update(updates, state, params).")
        factor = rate(state.count) if callable(rate) else rate

        def decay(path: Path, u: jax.Array, p: jax.Array, decayed: bool) -> tuple:
            if not is_float(u) or not decayed:
                return (u,)
            return ((wide(u) - jnp.asarray(factor, wide(p).dtype) * wide(p)).astype(u.dtype),)

        updates = map_leaves(decay, 1, updates, params, resolve_mask(mask, params))[0]
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def lamb(
    learning_rate: float | optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    *,
    weight_decay_mask: Any = None,
    trust_ratio_mask: Any = None,
    bounds: tuple[float, float] | None = None,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB: Adam's direction with weight decay, scaled to the norm of each leaf.

    h = m_hat / (sqrt(v_hat) + eps) + weight_decay theta,    theta <- theta - lr h phi(|theta|) / |h|

    Recipes leave biases and norms out of both: `exclude("bias", "norm")` for both masks.

    Args:
      learning_rate: or a schedule of the number of updates done.
      b1, b2, eps: Adam's; eps is outside the root.
      weight_decay, weight_decay_mask: inside the norm.
      trust_ratio_mask, bounds, axis_name: as in `layer_adaptation`.

    Returns:
      An optax transformation; moments are float32.

    Source: You et al. 2020 (arXiv 1904.00962).

    Example:
      >>> optimizer = lamb(0.1)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = optimizer.update(jnp.array([1.0, 1.0]), optimizer.init(params), params)
      >>> print(f"{jnp.linalg.norm(updates):.4f}")  # the learning rate times |theta|
      0.5000
    """
    direction = optax.scale_by_adam(b1, b2, eps)
    decay = optax.add_decayed_weights(weight_decay, lambda params: resolve_mask(weight_decay_mask, params))
    adapt = layer_adaptation(mask=trust_ratio_mask, bounds=bounds, axis_name=axis_name)
    return in_float32(optax.chain(direction, decay, adapt, optax.scale_by_learning_rate(learning_rate)))


def lars(
    learning_rate: float | optax.Schedule,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
    *,
    weight_decay_mask: Any = None,
    trust_ratio_mask: Any = None,
    bounds: tuple[float, float] | None = None,
    nesterov: bool = False,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LARS: SGD with momentum over steps scaled to the norm of each leaf.

    h = g + weight_decay theta,    m <- momentum m + lr h k phi(|theta|) / |h|,    theta <- theta - m

    Args:
      learning_rate: or a schedule of the number of updates done.
      weight_decay, weight_decay_mask: inside the norm.
      momentum, nesterov: of the scaled steps.
      trust_coefficient: k.
      trust_ratio_mask, bounds, axis_name: as in `layer_adaptation`.

    Returns:
      An optax transformation; the momentum is float32.

    Source: You et al. 2017 (arXiv 1708.03888).

    Example:
      >>> optimizer = lars(1.0)
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, _ = optimizer.update(jnp.array([0.0, 2.0]), optimizer.init(params), params)
      >>> print(updates)
      [ 0.    -0.005]
    """
    decay = optax.add_decayed_weights(weight_decay, lambda params: resolve_mask(weight_decay_mask, params))
    adapt = layer_adaptation(mask=trust_ratio_mask, bounds=bounds, coefficient=trust_coefficient, axis_name=axis_name)
    rate, trace = optax.scale_by_learning_rate(learning_rate), optax.trace(momentum, nesterov)
    return in_float32(optax.chain(decay, adapt, rate, trace))


def _ones(path: Path, x: jax.Array) -> jax.Array:
    """Ratios of 1, of the shape that those of a leaf have."""
    return jnp.ones(jnp.shape(x)[:1] if is_stacked(path) else (), jnp.float32)
