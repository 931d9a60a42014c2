r"""Gradient accumulation inside one step, exact for unequal weights.

    L = sum_i l_i / sum_i w_i,    dL = sum_i dl_i / sum_i w_i

over micro-batches i, where l_i is a sum of losses and w_i its number of tokens: the mean of means is a different
number whenever the w_i differ. Cost: the step's arithmetic and one micro-batch's activations; one float32 gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def accumulate_gradients(loss_fn: Callable[..., tuple[jax.Array, jax.Array]], num_microbatches: int) -> Callable:
    r"""Turn sums of losses over micro-batches into the mean loss and its gradients over the whole batch.

    The batch is a pytree of arrays (B, ...). It is cut into `num_microbatches` parts by stride (part i holds rows
    i, i + m, i + 2m, ...), so that a batch axis sharded over devices stays sharded in every part. Sums and gradients
    are accumulated in float32 (float64 for float64 parameters) and divided once; a batch of weight 0 gives loss 0
    and gradient 0. Clipping, moments and schedules come after, once a step.

    Args:
      loss_fn: `loss_fn(params, batch)` or `loss_fn(params, batch, key)` -> (sum of losses, weight), two scalars.
        Part i is given `fold_in(key, i)`; a single part is given the key itself.
      num_microbatches: number of parts, a divisor of B.

    Returns:
      A function of (params, batch) or (params, batch, key) -> (weighted mean loss, gradients shaped as params).

    Raises:
      ValueError: if `num_microbatches` is not a positive integer, or does not divide B.

    Cost: B rows forward and backward; memory of B / num_microbatches rows and one more copy of the gradients.

    Source: Su, "Gradient accumulation" (kexue.fm 6794); the token weights as in T5X and MaxText.

    Example:
      >>> loss_fn = lambda w, batch: (jnp.sum(batch["m"] * (w - batch["x"]) ** 2), jnp.sum(batch["m"]))
      >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "m": jnp.array([1.0, 1.0, 1.0, 0.0])}
      >>> loss, gradient = accumulate_gradients(loss_fn, 2)(jnp.array(0.0), batch)
      >>> print(f"{loss:.4f} {gradient:.4f}")
      4.6667 -4.0000
    """
    if not isinstance(num_microbatches, int) or num_microbatches < 1:
        raise ValueError(f"num_microbatches must be a positive integer, got {num_microbatches!r}.")
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params: Any, batch: Any, *key: jax.Array) -> tuple[jax.Array, Any]:
        if num_microbatches == 1:
            (loss, weight), gradients = value_and_grad(params, batch, *key)
            return _divide(_wide(loss), _wide(weight), jax.tree.map(_wide, gradients))

        def add(total, part):
            index, microbatch = part
            keys = [jax.random.fold_in(k, index) for k in key]
            (loss, weight), gradients = value_and_grad(params, microbatch, *keys)
            return jax.tree.map(lambda a, g: a + _wide(g), total, gradients), (_wide(loss), _wide(weight))

        parts = jax.tree.map(lambda x: _split(x, num_microbatches), batch)
        zeros = jax.tree.map(lambda p: _wide(jnp.zeros_like(p)), params)
        gradients, (losses, weights) = jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), parts))
        return _divide(jnp.sum(losses), jnp.sum(weights), gradients)

    return accumulated


def _wide(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _divide(loss: jax.Array, weight: jax.Array, gradients: Any) -> tuple[jax.Array, Any]:
    reciprocal = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
    return loss * reciprocal, jax.tree.map(lambda g: g * reciprocal.astype(g.real.dtype), gradients)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """(B, ...) -> (parts, B / parts, ...) by stride, which moves no row to another device."""
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[0] % parts:
        raise ValueError(f"num_microbatches={parts} must divide the batch axis, got an array of shape {x.shape}.")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
