"""Squared error of predictions against targets, as a sum with its weight.

loss = sum_i w_i mean_o (y_io - t_io)^2,   weight = sum_i w_i
"""

import jax
import jax.numpy as jnp


def squared_error(
    predictions: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of the mean squared error of their outputs, and the sum of the weights to divide it by.

    loss = sum_i w_i mean_o (y_io - t_io)^2, in float32 at least. A position of weight 0 is not seen: its prediction and
    its target may be NaN, with gradient 0.

    Args:
      predictions: (..., O) of any floating type.
      targets: (..., O).
      weights: (...) non-negative, or None for ones.

    Returns:
      (loss, weight): two float32 scalars (float64 for float64 predictions).

    Raises:
      ValueError: the shapes of predictions and targets differ, or weights do not have that shape without the last axis.

    Cost: O(O) a position.

    >>> import jax.numpy as jnp
    >>> loss, weight = squared_error(jnp.array([[1.0, 3.0], [jnp.nan, 0.0]]), jnp.zeros((2, 2)), jnp.array([1.0, 0.0]))
    >>> float(loss / weight)
    5.0
    """
    if predictions.ndim < 1 or predictions.shape[-1] < 1:
        raise ValueError(f"predictions must be (..., O) with O >= 1 outputs; got {predictions.shape}")
    if targets.shape != predictions.shape:
        raise ValueError(f"targets must have the shape of predictions, {predictions.shape}; got {targets.shape}")
    places = predictions.shape[:-1]
    dtype = jnp.promote_types(predictions.dtype, jnp.float32)
    weights = jnp.ones(places, dtype) if weights is None else weights
    if weights.shape != places:
        raise ValueError(f"weights must have the shape of predictions without outputs, {places}; got {weights.shape}")
    weights = weights.astype(dtype)
    seen = (weights != 0)[..., None]
    error = jnp.where(seen, predictions.astype(dtype), 0) - jnp.where(seen, targets.astype(dtype), 0)
    return jnp.sum(jnp.mean(error**2, axis=-1) * weights), jnp.sum(weights)
