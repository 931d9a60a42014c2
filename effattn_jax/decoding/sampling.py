"""Sampling from logits: temperature, then the k largest, then the nucleus among them.

p_a ~ exp(z_a / temperature) over the smallest set of the most probable tokens whose probabilities reach top_p.
"""

import jax
import jax.numpy as jnp
import numpy as np


def filter_logits(logits: jax.Array, *, top_k: int | None = None, top_p: float | jax.Array | None = None) -> jax.Array:
    """Logits with the tokens that top-k and nucleus sampling exclude set to -inf.

    `top_k` keeps exactly k tokens (all of them where k >= A). `top_p` then keeps the smallest set of the most probable
    of those whose probabilities, renormalised after top-k, sum to at least top_p: the token that crosses it is kept, so
    one token always remains, and top_p >= 1 keeps all. Of equal logits the lower id comes first in both.

    Args:
      logits: (..., A).
      top_k: a whole number >= 1, or None for no limit.
      top_p: a number in [0, 1], or None for no limit; may be traced.

    Returns:
      Array like logits.

    Raises:
      ValueError: top_k < 1, or a concrete top_p outside [0, 1].

    Cost: O(A log A) a row. Source: Holtzman et al., arXiv 1904.09751.

    >>> import jax.numpy as jnp
    >>> filter_logits(jnp.array([0.0, 2.0, 1.0]), top_k=2).tolist()
    [-inf, 2.0, 1.0]
    """
    _check_logits(logits)
    top_k, num_tokens = check_limits(top_k, top_p), logits.shape[-1]
    top_k = num_tokens if top_k is None else min(top_k, num_tokens)
    if top_p is None and top_k == num_tokens:
        return logits
    sorted_logits, ids = jax.lax.top_k(logits, top_k)
    kept = jnp.ones(sorted_logits.shape, bool)
    if top_p is not None:
        probabilities = jax.nn.softmax(sorted_logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        first = jax.lax.broadcasted_iota(jnp.int32, before.shape, before.ndim - 1) == 0
        kept = (before < top_p) | first | (jnp.asarray(top_p) >= 1)
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def sample_logits(
    logits: jax.Array,
    key: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """One token id a row: greedy at temperature 0, otherwise drawn from softmax(z / temperature) after `filter_logits`.

    Args:
      logits: (..., A), any floating type; computed in float32 at least. A token of logit -inf is never drawn.
      key: a typed key of `jax.random.key`; needed unless temperature is 0.
      temperature: a number >= 0, or a positive traced scalar.
      top_k, top_p: see `filter_logits`; applied after the temperature.

    Returns:
      int32 ids of shape logits.shape[:-1]; greedy takes the lowest id among equal largest logits.

    Raises:
      ValueError: negative temperature, a missing key, or what `filter_logits` raises.

    Cost: O(A) a row, O(A log A) with top_k or top_p.

    >>> import jax, jax.numpy as jnp
    >>> int(sample_logits(jnp.array([0.0, 2.0, 1.0]), temperature=0.0))
    1
    >>> int(sample_logits(jnp.array([0.0, 2.0, 1.0]), jax.random.key(0), top_k=1))
    1
    """
    check_limits(top_k, top_p)
    _check_logits(logits)
    if is_greedy(temperature):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    check_key(key)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # With the maximum at 0 a small temperature can only send the others to -inf, never inf - inf to NaN.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    logits = (logits - jnp.where(jnp.isfinite(largest), largest, 0)) / temperature
    return jax.random.categorical(key, filter_logits(logits, top_k=top_k, top_p=top_p), axis=-1).astype(jnp.int32)


def check_key(key: object) -> None:
    """Raises a ValueError for what is no key to sample with."""
    if key is None:
        raise ValueError(
            "key must be given to sample at a positive temperature; temperature=0 is greedy and needs none"
        )
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise ValueError(f"key must be one of jax.random.key; got {key!r}"[:400])


def _check_logits(logits: jax.Array) -> None:
    if jnp.ndim(logits) < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., A) with A >= 1; got {jnp.shape(logits)}")


def is_greedy(temperature: float | jax.Array) -> bool:
    """Whether a temperature is the number 0; a traced one is taken as positive, a negative one is a ValueError."""
    if isinstance(temperature, jax.core.Tracer):
        return False
    if not 0 <= number(temperature) < float("inf"):
        raise ValueError(f"temperature must be at least 0 (0 is greedy) and finite; got {temperature!r}")
    return bool(temperature == 0)


def number(value: object) -> float:
    """What is one real number as a float, NaN for all else."""
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    return float(array) if array.ndim == 0 and real else float("nan")


def whole_number(name: str, value: object, none: str = "") -> int | None:
    """The int that a value is, or None where that stands for something, `none`; a ValueError for all else."""
    if value is None and none:
        return None
    if isinstance(value, jax.core.Tracer) or np.asarray(value).dtype.kind not in "iu" or np.ndim(value):
        other = f", or None for {none}" if none else ""
        raise ValueError(f"{name} must be a whole number{other}; got {value!r}"[:400])
    return int(value)


def check_limits(top_k: int | None, top_p: float | jax.Array | None) -> int | None:
    """top_k as an int; a ValueError where it is below 1, or a concrete top_p outside [0, 1]."""
    top_k = whole_number("top_k", top_k, "no limit")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for no limit; got {top_k}")
    if top_p is not None and not isinstance(top_p, jax.core.Tracer) and not 0 <= number(top_p) <= 1:
        raise ValueError(f"top_p must lie in [0, 1], or be None for no limit; got {top_p!r}")
    return top_k
