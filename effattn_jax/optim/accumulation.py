r"""Gradient accumulation inside one step, exact for unequal weights.

    L = sum_i l_i / sum_i w_i,    dL = sum_i dl_i / sum_i w_i

over micro-batches i, where l_i is a sum of losses and w_i its number of tokens: the mean of means is a different
number whenever the w_i differ. Cost: the step's arithmetic and one micro-batch's activations; one float32 gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import is_whole
from effattn_jax.optim._arrays import psum, scaled, vary, wide_sum
from effattn_jax.optim._trees import Axes


def accumulate_gradients(
    loss_fn: Callable[..., tuple], num_microbatches: int, *, axis_name: Axes = None
) -> Callable[..., tuple[Any, Any]]:
    r"""Turn sums of losses over micro-batches into the mean loss and its gradients over the whole batch.

    The batch is a pytree of arrays (B, ...). It is cut into `num_microbatches` parts by stride (part i holds rows
    i, i + m, i + 2m, ...), so that a batch axis sharded over devices stays sharded in every part. Sums and gradients
    are accumulated in float32 (float64 for float64 parameters) and divided once; a batch of weight 0 gives loss 0
    and gradient 0. Clipping, moments and schedules come after, once a step.

    Args:
      loss_fn: `loss_fn(params, batch)` or `loss_fn(params, batch, key)` -> (sum of losses, weight), two scalars, or
        (sum of losses, weight, metrics) with a pytree of further sums, which are divided by the same weight.
        Part i is given `fold_in(key, i)`; a single part is given the key itself.
      num_microbatches: number of parts, a divisor of B.
      axis_name: mapped axis or axes over which the batch is split (inside `shard_map` or `pmap`), for a loss_fn that
        sums over its own device only. Everything is then summed over the devices once, after the last part.

    Returns:
      A function of (params, batch) or (params, batch, key) -> (weighted mean loss, gradients shaped as params);
      with metrics ((weighted mean loss, weighted mean metrics), gradients), as `jax.value_and_grad` has it.

    Raises:
      ValueError: if `num_microbatches` is not a positive integer, or does not divide B, or loss_fn returns neither form.

    Cost: B rows forward and backward; memory of B / num_microbatches rows and one more copy of the gradients.

    Source: Su, "Gradient accumulation" (kexue.fm 6794); the token weights as in T5X and MaxText.

    Example:
      >>> loss_fn = lambda w, batch: (jnp.sum(batch["m"] * (w - batch["x"]) ** 2), jnp.sum(batch["m"]))
      >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "m": jnp.array([1.0, 1.0, 1.0, 0.0])}
      >>> loss, gradient = accumulate_gradients(loss_fn, 2)(jnp.array(0.0), batch)
      >>> print(f"{loss:.4f} {gradient:.4f}")
      4.6667 -4.0000
    """
    if not is_whole(num_microbatches, 1):
        raise ValueError(f"num_microbatches must be a positive integer, got {num_microbatches!r}.")
    value_and_grad = jax.value_and_grad(lambda *args: _sums(loss_fn(*args)), has_aux=True)

    def accumulated(params: Any, batch: Any, *key: jax.Array) -> tuple[Any, Any]:
        params = vary(params, axis_name)
        if num_microbatches == 1:
            (loss, sums), gradients = value_and_grad(params, batch, *key)
            return _divide(*psum(jax.tree.map(wide_sum, (loss, sums, gradients)), axis_name))

        def add(total, part):
            index, microbatch = part
            keys = [jax.random.fold_in(k, index) for k in key]
            (loss, sums), gradients = value_and_grad(params, microbatch, *keys)
            return jax.tree.map(lambda a, g: a + wide_sum(g), total, gradients), jax.tree.map(wide_sum, (loss, sums))

        parts = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
        zeros = jax.tree.map(lambda p: wide_sum(jnp.zeros_like(p)), params)
        gradients, sums = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), parts))
        loss, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        return _divide(*psum((loss, sums, gradients), axis_name))

    return accumulated


def mean_to_sum(loss_fn: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    r"""Give a loss of the form (mean, weight) the form (sum, weight) that accumulation takes: (w L, w).

    The wrappers of losses (penalties, flooding, adversarial ones) mean a mean; so wrap the mean first, and this goes
    around it. Each micro-batch is then penalised or attacked by itself, and the results averaged by weight. The mean over
    nothing must be finite (divide by the larger of weight and 1).

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` -> (mean loss, weight).

    Returns:
      A function of the same arguments -> (mean loss * weight, weight).

    Example:
      >>> from effattn_jax.optim import flooding
      >>> mean = lambda w, x: (jnp.mean((w - x) ** 2), x.size)
      >>> step = accumulate_gradients(mean_to_sum(flooding(mean, 0.5)), 2)
      >>> loss, gradient = step(jnp.array(0.0), jnp.array([0.0, 2.0, 1.0, 2.0]))
      >>> print(loss, gradient)  # the parts' means are 0.5 and 4.0: the first stands at the level
      2.25 -2.0
    """

    def summed(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
        mean, weight = loss_fn(*args, **kwargs)
        mean = wide_sum(mean)
        return mean * jnp.asarray(weight, mean.dtype), weight

    return summed


def _sums(out: tuple) -> tuple[jax.Array, tuple]:
    if not isinstance(out, tuple) or len(out) not in (2, 3):
        raise ValueError(
            "loss_fn must return (sum of losses, weight) or (sum of losses, weight, metrics), "
            f"got {type(out).__name__} of length {len(out) if isinstance(out, tuple) else 1}."
        )
    return out[0], out[1:]


def _divide(loss: jax.Array, sums: tuple, gradients: Any) -> tuple[Any, Any]:
    weight, *metrics = sums
    weight = weight.astype(jnp.promote_types(weight.dtype, loss.dtype))
    reciprocal = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    loss, metrics, gradients = jax.tree.map(lambda x: scaled(x, reciprocal), (loss, metrics, gradients))
    return (loss, *metrics) if metrics else loss, gradients


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...) by stride, which moves no row to another device."""
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % parts:
        raise ValueError(f"num_microbatches={parts} must divide the batch axis, got an array of shape {x.shape}.")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
