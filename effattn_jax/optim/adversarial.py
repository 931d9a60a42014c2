r"""Wrappers of a loss that evaluate it at a point moved for the worse.

    FGM, SAM    L(s + e g/|g|)                        g = dL/ds
    PGD         K times d <- project(d + a g(s + d)/|g|),    L(s + d)
    VAT         KL(f(x) || f(x + e d)),               d: power iteration with the Hessian of that KL at 0

The displacement is held fixed: derivatives go through the point, not through the search for it. Everything is a function,
so there is nothing to restore; random keys among the arguments are the same at both points.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import is_whole
from effattn_jax.optim._selection import Select, choose, is_parameters, value_and_gradients
from effattn_jax.optim._trees import Axes, is_float, number, wide
from effattn_jax.optim.clipping import global_norm

NORMS = ("l2", "inf", "none")


def fgm(
    loss_fn: Callable,
    select: Select,
    epsilon: float,
    *,
    norm: str = "l2",
    per_example: bool = False,
    axis_name: Axes = None,
) -> Callable:
    r"""The loss at the fast gradient method's adversarial point: L(s + e g/|g|), g = dL/ds.

    On an embedding table one norm goes over the whole table, and rows that no token uses do not move. To first order it
    is L + e |g|, and with norm "none" L + e |g|^2.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      select: a regular expression, searched in the '/'-joined path of each leaf of params; or n, all of the n-th argument
        (1 is the first after params); or (n, regular expression), the leaves of that argument with such a path.
      epsilon: e; 0.5 to 1 on embeddings.
      norm: "l2" is e g/|g|; "inf" is e sign(g) (FGSM); "none" is e g.
      per_example: each entry of the first axis has a norm of its own, over all chosen leaves.
      axis_name: mapped axis or axes over which the batch is split, of the mean of whose losses g is the gradient.

    Returns:
      A function of the same arguments and form: loss and auxiliary at the adversarial point only. Add the clean loss for both.

    Raises:
      ValueError: for an unknown norm or a negative epsilon; by the call, where `select` matches nothing.

    Cost: one more gradient, that by the chosen arrays.

    Source: Miyato et al. 2017 (arXiv 1605.07725); Su, kexue.fm 7234.

    Example:
      >>> attacked = fgm(lambda p, x: jnp.sum(p["embedding"] * x), "embedding", 5.0)
      >>> print(attacked({"embedding": jnp.zeros(2)}, jnp.array([3.0, 4.0])))
      25.0
    """
    _check(epsilon, norm)
    return _perturbed(
        loss_fn, select, epsilon, epsilon, 1, norm=norm, per_example=per_example, project=False, axis_name=axis_name
    )


def pgd(
    loss_fn: Callable,
    select: Select,
    epsilon: float,
    *,
    step_size: float = 0.3,
    num_steps: int = 3,
    norm: str = "l2",
    per_example: bool = False,
    axis_name: Axes = None,
) -> Callable:
    r"""The loss at the point that projected gradient ascent finds in a ball: d <- project(d + a g/|g|).

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      select: as of `fgm`.
      epsilon: the ball's radius, in the L2 norm or in the largest entry.
      step_size: a, the length of a step.
      num_steps: K, from d = 0.
      norm: "l2", or "inf" (steps a sign(g), entries clipped to e).
      per_example: as of `fgm`.
      axis_name: as of `fgm`.

    Returns:
      A function of the same arguments and form: loss and auxiliary at the adversarial point only.

    Raises:
      ValueError: for a norm not of the two, a negative epsilon or step_size, or no positive num_steps.

    Cost: K more gradients by the chosen arrays.

    Source: Madry et al. 2018 (arXiv 1706.06083).

    Example:
      >>> attacked = pgd(lambda p, x: jnp.sum((p + x) ** 2), 1, 0.5, step_size=0.3, num_steps=3)
      >>> print(f"{attacked(jnp.zeros(2), jnp.array([0.6, 0.8])):.4f}")
      2.2500
    """
    _check(epsilon, norm)
    if norm == "none" or not step_size >= 0 or not is_whole(num_steps, 1):
        raise ValueError(
            "pgd needs norm 'l2' or 'inf', step_size >= 0 and a positive integer num_steps, "
            f"got norm={norm!r}, step_size={step_size}, num_steps={num_steps!r}."
        )
    options = {"norm": norm, "per_example": per_example, "project": True, "axis_name": axis_name}
    return _perturbed(loss_fn, select, epsilon, step_size, num_steps, **options)


def sharpness_aware(loss_fn: Callable, radius: float = 0.05, *, select: str = "", axis_name: Axes = None) -> Callable:
    r"""The loss at the worst point near the parameters, to first order: L(theta + r g/|g|).

    Its gradient is that of sharpness-aware minimisation, g(theta + r g/|g|). Within `accumulate_gradients` each micro-batch
    has its own point (m-sharpness), as each device has without `axis_name` where gradients are not summed for it.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> scalar or (scalar, auxiliary).
      radius: r, over all chosen parameters together.
      select: a regular expression searched in the '/'-joined paths; all of them by default.
      axis_name: mapped axis or axes over which the batch is split, for one point of all.

    Returns:
      A function of the same arguments and form: loss and auxiliary at the moved point.

    Raises:
      ValueError: for a negative radius.

    Cost: one more gradient. A zero gradient moves nothing.

    Source: Foret et al. 2021 (arXiv 2010.01412).

    Example:
      >>> sharp = sharpness_aware(lambda w: 0.5 * jnp.sum(w**2), 0.1)
      >>> print(jax.grad(sharp)(jnp.array([0.6, 0.8])), jax.grad(sharp)(jnp.zeros(2)))
      [0.66 0.88] [0. 0.]
    """
    if not radius >= 0:
        raise ValueError(f"radius must not be negative, got {radius}.")
    return fgm(loss_fn, select, radius, axis_name=axis_name)


def virtual_adversarial(
    logits_fn: Callable[..., jax.Array], *, epsilon: float, num_iterations: int = 1, batch_axes: int = 1
) -> Callable[..., jax.Array]:
    r"""The divergence between predictions at x and at its worst neighbour: mean KL(f(x) || f(x + e d)); needs no labels.

    The direction starts random and is improved by power iteration, d <- H d / |H d|, with the Hessian of the divergence
    at 0, which is exactly H = J^T (diag p - p p^T) J: a forward and a reverse product with J, without finite differences, so
    that float32 is enough. p, the prediction at x, is held fixed.

    Args:
      logits_fn: `logits_fn(x)` -> logits (..., A). It closes over its parameters, by which the result may be differentiated.
      epsilon: e, the length of the displacement.
      num_iterations: power iterations; 0 is random noise of length e, 1 is enough in practice.
      batch_axes: leading axes of x along which each entry has its own direction of length e; 0 takes one over all of x, as for
        an embedding table.

    Returns:
      A function of (x, key), with x floating and key a random key, -> the mean over all rows of logits, a scalar.

    Raises:
      ValueError: for a negative epsilon, num_iterations or batch_axes; by the call, for x that is not floating.

    Cost: two forward passes, and a forward and a reverse pass an iteration.

    Source: Miyato et al. 2018 (arXiv 1704.03976); Su, kexue.fm 7466.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [0.0, 0.1]])
      >>> divergence = virtual_adversarial(lambda x: x @ w, epsilon=0.5, num_iterations=10)
      >>> print(f"{divergence(jnp.zeros((1, 2)), jax.random.key(0)):.3f}")
      0.259
    """
    if not number(epsilon) >= 0 or not is_whole(num_iterations, 0):
        raise ValueError(
            f"epsilon and num_iterations must not be negative, got {epsilon} and {num_iterations!r} (an integer)."
        )

    if not is_whole(batch_axes, 0):
        raise ValueError(f"batch_axes must be a number of leading axes, 0 or more, got {batch_axes!r}.")

    def divergence(x: jax.Array, key: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if not is_float(x):
            raise ValueError(f"x must be floating, got {x.dtype}; take the embeddings of tokens as x.")
        fixed = jax.lax.stop_gradient(x)

        def logits_at(displacement: jax.Array) -> jax.Array:
            return wide(logits_fn(fixed + displacement.astype(x.dtype)))

        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(wide(logits_fn(fixed))))
        d = _unit(jax.random.normal(key, x.shape, wide(x).dtype) + 0 * wide(fixed), batch_axes)
        if num_iterations:
            d = _power_iteration(logits_at, d, jnp.exp(log_p), num_iterations, batch_axes)
        d = jax.lax.stop_gradient(epsilon * d)
        log_q = jax.nn.log_softmax(wide(logits_fn(x + d.astype(x.dtype))))
        p = jnp.exp(log_p)
        return jnp.mean(jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0), axis=-1))

    return divergence


def _power_iteration(logits_at: Callable, d: jax.Array, p: jax.Array, count: int, batch_axes: int) -> jax.Array:
    """d after `count` products with the Hessian, normalised; a direction that the Hessian takes to 0 stays."""
    zero = jnp.zeros_like(d)
    _, transposed = jax.vjp(logits_at, zero)

    def iterate(d: jax.Array, _: None) -> tuple[jax.Array, None]:
        _, change = jax.jvp(logits_at, (zero,), (d,))
        change = p * (change - jnp.sum(p * change, axis=-1, keepdims=True))
        product = jnp.conj(transposed(change)[0])
        flat = jnp.all(product == 0, axis=tuple(range(batch_axes, d.ndim)), keepdims=True)
        return _unit(jnp.where(flat, d, product), batch_axes), None

    return jax.lax.scan(iterate, d, None, length=count)[0]


def _check(epsilon: float, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}.")
    if not number(epsilon) >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")


def _perturbed(
    loss_fn: Callable,
    select: Select,
    epsilon: float,
    step_size: float,
    num_steps: int,
    *,
    norm: str,
    per_example: bool,
    project: bool,
    axis_name: Axes,
) -> Callable:
    """The loss after `num_steps` steps of ascent from the arrays chosen."""
    parameters = is_parameters(select)
    split_over = None if parameters else axis_name  # parameters are whole on every device, other arguments parts

    def perturbed(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = choose(select, args)
        fixed = jax.lax.stop_gradient(arrays)

        def moved(origin: list, displacement: list) -> Any:
            points = [(wide(a) + d).astype(a.dtype) for a, d in zip(origin, displacement)]
            return loss_fn(*rebuild(points), **kwargs)

        def ascend(displacement: list, _: Any = None) -> tuple[list, None]:
            points = [(wide(a) + d).astype(a.dtype) for a, d in zip(fixed, displacement)]
            _, g = value_and_gradients(
                lambda p: loss_fn(*rebuild(p), **kwargs), points, parameters=parameters, axis_name=axis_name
            )
            # By a complex array JAX's gradient is the conjugate of the way up.
            uphill = [jnp.conj(x) for x in jax.lax.stop_gradient(g)]
            steps = _of_length(uphill, step_size, norm, per_example, split_over)
            displacement = [d + s for d, s in zip(displacement, steps)]
            return (_into_ball(displacement, epsilon, norm, per_example, split_over) if project else displacement), None

        start = [jnp.zeros_like(wide(a)) for a in fixed]
        displacement = ascend(start)[0] if num_steps == 1 else jax.lax.scan(ascend, start, None, length=num_steps)[0]
        return moved(arrays, jax.lax.stop_gradient(displacement))

    return perturbed


def _of_length(g: list, length: float, norm: str, per_example: bool, axis_name: Axes) -> list:
    """Steps along g of this length; 0 where g is 0."""
    if norm == "inf":
        return [length * jnp.sign(x) for x in g]
    if norm == "none":
        return [length * x for x in g]
    norms = _norms(g, per_example, axis_name)
    return [x * _expand(jnp.where(norms > 0, length / jnp.where(norms > 0, norms, 1), 0), x) for x in g]


def _into_ball(d: list, radius: float, norm: str, per_example: bool, axis_name: Axes) -> list:
    if norm == "inf":
        return [jnp.clip(x, -radius, radius) for x in d]
    norms = _norms(d, per_example, axis_name)
    outside = norms > radius
    return [x * _expand(jnp.where(outside, radius / jnp.where(outside, norms, 1), 1), x) for x in d]


def _norms(arrays: list, per_example: bool, axis_name: Axes) -> jax.Array:
    """The joint L2 norm of the arrays, a scalar, or (B,) over all axes but the first; then no device sees another's examples."""
    if not per_example:
        return global_norm(arrays, axis_name=axis_name)
    return jax.vmap(global_norm)(arrays)


def _expand(factor: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(factor, tuple(range(factor.ndim, x.ndim))).astype(x.dtype)


def _unit(d: jax.Array, batch_axes: int) -> jax.Array:
    """d over its norm along all axes but the first `batch_axes`; large and small entries are safe, and 0 stays 0."""
    axes = tuple(range(batch_axes, d.ndim))
    largest = jnp.max(jnp.abs(d), axis=axes, keepdims=True, initial=0)
    d = d / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(jnp.abs(d) ** 2, axis=axes, keepdims=True)
    return d / jnp.sqrt(jnp.where(squares > 0, squares, 1))
