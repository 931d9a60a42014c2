r"""Wrappers of a loss that change its landscape by its own value or gradient.

    flooding                            |L - b| + b
    gradient penalty                    L + c/2 |dL/dtheta_s|^2
    implicit gradient regularisation    L + c |dL/dtheta|^2

Each takes `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary) and returns a function of the same form,
to be differentiated, compiled, mapped and accumulated like any loss (`mean_to_sum`). A gradient of a penalty is a
Hessian-vector product, H g: about two more passes; kernels must have second derivatives, as all of this package do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._arrays import axis_size, psum
from effattn_jax.optim._selection import (
    Select,
    choose,
    is_parameters,
    join_loss,
    split_loss,
    sum_of_squares,
    value_and_gradients,
)
from effattn_jax.optim._trees import Axes, is_float
from effattn_jax.optim.clipping import global_norm


def flooding(loss_fn: Callable, level: float, *, axis_name: Axes = None) -> Callable:
    r"""Keep the loss of a batch floating at a level: |L - b| + b, which ascends below b.

    The gradient is sign(L - b) dL, and 0 at L = b exactly. It is meant for the mean over a whole batch, without auxiliary
    losses: of parts of a batch it is another method. For accumulated gradients `scale_by_flooding` decides once a window.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      level: b.
      axis_name: mapped axis or axes over which the batch is split; the mean over the devices is what is compared with b.

    Returns:
      A function of the same arguments and form.

    Cost: none.

    Source: Ishida et al. 2020 (arXiv 2002.08709); Su, kexue.fm 7643: one descent and one ascent of size e are a step of
    e^2/2 down |dL|^2.

    Example:
      >>> flooded = flooding(lambda w: w**2, 0.5)
      >>> print(flooded(2.0), jax.grad(flooded)(2.0), flooded(0.5), jax.grad(flooded)(0.5))
      4.0 4.0 0.75 -1.0
    """

    def flooded(*args: Any, **kwargs: Any) -> Any:
        loss, auxiliary = split_loss(loss_fn(*args, **kwargs))
        loss = jnp.asarray(loss)
        mean = psum(jax.lax.stop_gradient(loss), axis_name) / axis_size(axis_name)
        return join_loss(jnp.sign(mean - level).astype(loss.dtype) * (loss - level) + level, auxiliary)

    return flooded


def scale_by_flooding(level: float) -> optax.GradientTransformationExtraArgs:
    r"""Flooding as a transformation of gradients: g * sign(L - b), with L given to `update` as `value=`.

    Inside `accumulate_updates` the value is the weighted mean of the window: flooding of the whole batch, exactly.

    Args:
      level: b.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: by `update`, where `value=` is missing.

    Source: as of `flooding`.

    Example:
      >>> flood = scale_by_flooding(0.5)
      >>> print(flood.update(jnp.array([1.0, -2.0]), flood.init(None), value=jnp.array(0.3))[0])
      [-1.  2.]
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None, *, value: Any = None, **extra: Any):
        del params, extra
        if value is None:
            raise ValueError("scale_by_flooding needs the loss: update(gradients, state, params, value=loss).")
        sign = jnp.sign(jnp.asarray(value) - level)
        return jax.tree.map(lambda g: g * sign.astype(jnp.result_type(g)) if is_float(g) else g, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def gradient_penalty(
    loss_fn: Callable, select: Select, coefficient: float, *, step: float | None = None, axis_name: Axes = None
) -> Callable:
    r"""Add the squared gradient by chosen arrays: L + c/2 |dL/ds|^2.

    With the embedding table chosen it is, to first order, training on the perturbation c dL/dE (as `fgm` with norm "none");
    with an argument chosen it is a penalty on the input's gradient of the batch's mean loss.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      select: a regular expression, searched in the '/'-joined path of each leaf of params; or n, all of the n-th argument
        (1 is the first after params); or (n, regular expression), the leaves of that argument with such a path.
      coefficient: c.
      step: None differentiates twice. A number takes instead, for functions with first derivatives only, the difference
        (dL(s + h v) - dL(s - h v)) / 2h |dL| along the unit direction v of the gradient; its value is exact, its gradient
        to O(h^2).
      axis_name: mapped axis or axes over which the batch is split, of the mean of whose losses it is the gradient.

    Returns:
      A function of the same arguments and form.

    Raises:
      ValueError: by the call, where `select` matches nothing.

    Cost: the loss's gradient once more, and a Hessian-vector product when differentiated.

    Source: Su, kexue.fm 7234 (on the embeddings); Drucker and LeCun 1992 (double backpropagation).

    Example:
      >>> penalised = gradient_penalty(lambda p, x: p["w"] * x**2, "w", 1.0)
      >>> print(penalised({"w": 3.0}, 2.0), gradient_penalty(lambda p, x: p["w"] * x**2, 1, 1.0)({"w": 3.0}, 2.0))
      20.0 84.0
    """
    parameters = is_parameters(select)

    def penalised(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = choose(select, args)

        def function(arrays: list) -> Any:
            return loss_fn(*rebuild(arrays), **kwargs)

        options = {"parameters": parameters, "axis_name": axis_name}
        if step is None:
            (loss, auxiliary), gradients = value_and_gradients(function, arrays, **options)
        else:
            loss, auxiliary = split_loss(function(arrays))
            _, gradients = value_and_gradients(function, jax.lax.stop_gradient(arrays), **options)
            gradients = jax.lax.stop_gradient(gradients)
        penalty = coefficient / 2 * sum_of_squares(gradients, axis_name=None if parameters else axis_name)
        if step is not None:
            along = coefficient * _slope(function, arrays, gradients, step, None if parameters else axis_name)
            penalty = penalty + along - jax.lax.stop_gradient(along)
        return join_loss(loss + penalty.astype(loss.dtype), auxiliary)

    return penalised


def implicit_gradient_regularization(
    loss_fn: Callable, coefficient: float, *, step: float | None = None, axis_name: Axes = None
) -> Callable:
    r"""The loss whose gradient flow gradient descent of step h really follows: L + c |dL|^2 with c = h/4.

    One step of descent on L is O(h^2) from the flow of L and O(h^3) from that of the modified loss. Added on purpose, with a
    larger c, it draws training to flatter minima.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      coefficient: c.
      step: as of `gradient_penalty`.
      axis_name: as of `gradient_penalty`.

    Returns:
      A function of the same arguments and form.

    Cost: as of `gradient_penalty`.

    Source: Barrett and Dherin 2021 (arXiv 2009.11162); Su, kexue.fm 7787.

    Example:
      >>> modified = implicit_gradient_regularization(lambda w: 0.5 * w**2, 0.25)
      >>> print(modified(2.0), jax.grad(modified)(2.0))
      3.0 3.0
    """
    return gradient_penalty(loss_fn, "", 2 * coefficient, step=step, axis_name=axis_name)


def _slope(function: Callable, arrays: list, gradients: list, step: float, axis_name: Axes) -> jax.Array:
    """(L(s + h g) - L(s - h g)) / 2h with h = step / |g|: its derivative by anything is that of |g|^2 / 2 at fixed L."""
    norm = global_norm(gradients, axis_name=axis_name)
    h = step / jnp.where(norm > 0, norm, 1)
    # Of a complex array the loss rises along the conjugate of JAX's gradient.
    gradients = [jnp.conj(g) for g in gradients]

    def moved(sign: int) -> jax.Array:
        return split_loss(function([a + (sign * h * g).astype(a.dtype) for a, g in zip(arrays, gradients)]))[0]

    return (moved(1) - moved(-1)) / (2 * h)
