"""Cross-entropy and accuracy of logits against class ids.

loss = sum_i w_i (log sum_a exp(z_ia) - z_{i, y_i}),   weight = sum_i w_i
Both come back as sums: micro-batches and devices add them and divide once.
"""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of negative log-likelihoods in nats, and the sum of the weights to divide it by.

    loss = sum_i w_i (logsumexp(z_i) - z_{i, y_i}), computed in float32 at least with the maximum taken out of both, so
    logits of any finite size are safe, and what is common to all classes changes nothing. A position of weight 0 is not
    seen: its logits may be NaN and its target out of range (-1, -100), with gradient 0. A target out of range with a
    positive weight gives NaN rather than a wrong number.

    Args:
      logits: (..., A) of any floating type; -inf is a class of probability 0.
      targets: (...) integers in [0, A).
      weights: (...) non-negative, or None for ones.

    Returns:
      (loss, weight): two float32 scalars (float64 for float64 logits).

    Raises:
      ValueError: the shapes of targets or weights are not those of logits without the last axis, or targets are not
        integers.

    Cost: O(A) a position, no gather, so that a class axis split over devices stays split.

    >>> import jax.numpy as jnp
    >>> loss, weight = cross_entropy(jnp.zeros((2, 4)), jnp.array([3, -1]), jnp.array([1.0, 0.0]))
    >>> round(float(loss / weight), 4)
    1.3863
    """
    weights = _checked_weights(logits, targets, weights)
    seen = weights != 0
    logits = jnp.where(seen[..., None], logits.astype(weights.dtype), 0)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    logits = logits - jnp.where(jnp.isfinite(top), top, 0)
    is_target = _classes(logits) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    loss = jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - target_logit
    loss = jnp.where(_in_range(targets, logits.shape[-1]), loss, jnp.nan)
    return jnp.sum(jnp.where(seen, loss, 0) * weights), jnp.sum(weights)


def accuracy(logits: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Weighted number of positions whose largest logit is the target's, and the sum of the weights.

    Arguments, results and errors as in `cross_entropy`; of equal largest logits the first counts.

    >>> import jax.numpy as jnp
    >>> correct, weight = accuracy(jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([1, 1]))
    >>> float(correct / weight)
    0.5
    """
    weights = _checked_weights(logits, targets, weights)
    return jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights), jnp.sum(weights)


def _checked_weights(logits: jax.Array, targets: jax.Array, weights: jax.Array | None) -> jax.Array:
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., A) with A >= 1 classes; got {logits.shape}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits without classes, {logits.shape[:-1]}; got {targets.shape}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers; got {targets.dtype}")
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    if weights is None:
        return jnp.ones(targets.shape, dtype)
    if weights.shape != targets.shape:
        raise ValueError(f"weights must have the shape of targets, {targets.shape}; got {weights.shape}")
    return weights.astype(dtype)


def _classes(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _in_range(targets: jax.Array, num_classes: int) -> jax.Array:
    # 256 classes are more than uint8 counts, where 256 itself would be 0.
    last = min(num_classes - 1, jnp.iinfo(targets.dtype).max)
    return (targets >= 0) & (targets <= last)
