r"""Tiger: the sign of one momentum, at a step relative to the size of what it moves.

    m <- beta m + (1 - beta) g,    theta <- theta - a (sign(m) + lambda theta)

a = lr RMS(theta) for kernels, lr times the RMS of each row for embeddings, lr / 2 and lambda = 0 for biases and scales.
State: the momentum. Source: Su, "Tiger" (kexue.fm 9512).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._trees import Axes, Path, is_float, map_leaves, number, resolve_mask, varying
from effattn_jax.optim.scales import is_stacked, kind_of


class TigerState(NamedTuple):
    """`count` of updates and `momentum` in float32, an empty state for beta = 0."""

    count: jax.Array
    momentum: Any


def tiger(
    learning_rate: float | optax.Schedule,
    beta: float = 0.965,
    weight_decay: float = 0.01,
    *,
    weight_decay_mask: Any = None,
    shrink_nonfinite: float | None = None,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sign momentum with steps relative to each leaf; the equations stand at the head of the file.

    What is a bias, a scale or an embedding is read from names and shapes. A kernel of zeros has RMS 0 and never moves:
    initialise it otherwise. `accumulate_in_momentum(tiger(lr, beta=0), every, decay=0.965)` is Tiger on large batches without a buffer.

    Args:
      learning_rate: the largest relative change of a kernel in one update, 1e-3 to 2e-3; or a schedule of the number of updates done.
      beta: of the momentum, 0.965 for language, 0.945 for images.
      weight_decay: lambda.
      weight_decay_mask: a tree of booleans, or a function of the parameters that gives one (`exclude`): which leaves decay; never biases and scales.
      shrink_nonfinite: what a leaf is shrunk by, towards 1 for a scale and towards 0 else, where its gradient is not finite,
        its momentum standing still (0.99 in the source); None lets the non-finite numbers through.
      axis_name: mapped axis or axes over which kernels, and the rows of embeddings, are split.

    Returns:
      An optax transformation with state `TigerState`; updates have sign and learning rate in them.

    Raises:
      ValueError: beta outside [0, 1), a negative decay, no params.

    Example:
      >>> optimizer = tiger(0.1)
      >>> params = {"kernel": 2 * jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> print(updates["kernel"][0], updates["bias"])
      [-0.204 -0.204] [-0.05 -0.05]
    """
    if not 0 <= number(beta) < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}.")
    if not number(weight_decay) >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}.")

    averages = number(beta) != 0

    def init(params: Any) -> TigerState:
        zeros = map_leaves(lambda path, p: (_momentum(p) if is_float(p) else None,), 1, params)[0]
        return TigerState(jnp.zeros((), jnp.int32), zeros if averages else optax.EmptyState())

    def update(updates: Any, state: TigerState, params: Any = None, **extra: Any) -> tuple[Any, TigerState]:
        del extra
        if params is None:
            raise ValueError("tiger needs the parameters: call update(updates, state, params).")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def one(path: Path, g: jax.Array, p: jax.Array, m: jax.Array | None, decays: Any) -> tuple:
            if not is_float(g):
                return g, None
            dtype, kind = g.dtype, kind_of(path, jnp.shape(p)[1:] if is_stacked(path) else jnp.shape(p))
            p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
            names = varying(g, axis_name)
            g = g.astype(p.dtype)
            good = _finite(g, names) if shrink_nonfinite is not None else True
            if averages:
                new = beta * m + (1 - beta) * g
                m = new if good is True else jnp.where(good, new, m)
            sign = jnp.sign(m if averages else g)
            step = -jnp.asarray(rate, p.dtype) * _size(kind, path, p, names)
            decay = 0.0 if kind in ("bias", "scale", "relative") else decays * weight_decay
            step = step * (sign + decay * p)
            if good is not True:
                centre = 1.0 if kind == "scale" else 0.0
                step = jnp.where(good, step, (shrink_nonfinite - 1) * (p - centre))
            return step.astype(dtype), m if averages else None

        momentum = state.momentum if averages else jax.tree.map(lambda p: None, params)
        decays = resolve_mask(weight_decay_mask, params)
        updates, momentum = map_leaves(one, 2, updates, params, momentum, decays)
        return updates, TigerState(optax.safe_increment(state.count), momentum if averages else state.momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def _momentum(p: jax.Array) -> jax.Array:
    return jnp.zeros_like(p, dtype=jnp.promote_types(jnp.result_type(p), jnp.float32))


def _finite(g: jax.Array, names: tuple[str, ...]) -> jax.Array:
    good = jnp.all(jnp.isfinite(g))
    return jax.lax.pmin(good.astype(jnp.int32), names) > 0 if names else good


def _size(kind: str, path: Path, p: jax.Array, names: tuple[str, ...]) -> Any:
    """Of what a step is a part: the root mean square of a leaf or row, one half for biases and scales."""
    if kind in ("bias", "scale", "relative"):
        return 0.5
    if kind == "embedding":
        return jnp.sqrt(jnp.mean((p * jnp.conj(p)).real, axis=-1, keepdims=True))
    axes = tuple(range(1 if is_stacked(path) else 0, p.ndim))
    mean = jnp.mean((p * jnp.conj(p)).real, axis=axes, keepdims=True)
    return jnp.sqrt(jax.lax.pmean(mean, names) if names else mean)
