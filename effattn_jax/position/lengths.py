"""What helps a model at lengths that it was not trained on, beside its frequencies: the scale of scores, and the positions of training.

scores * log n / log N for a row that sees n keys: the entropy of its weights then does not grow with n as it does without
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import positive

__all__ = ["log_length_scale", "random_positions"]


def log_length_scale(length: Any, train_length: int, *, at_least_one: bool = False) -> jax.Array:
    """log n / log N: the factor on queries whose row sees n keys, for a model trained at N.

    It multiplies queries: in softmax kernels it is a temperature, and in Performer and the feature map "exp" too. Maps that only scale with
    their input ("relu", "identity"), normalised, cancel it, and "cosine" divides by the length first: there it has no meaning.

    Args:
      length: n, numbers or an array of any shape; causal rows see position + 1 keys.
      train_length: N > 1.
      at_least_one: the form for a model that was trained without the factor: max(1, log n / log N).

    Returns:
      float32 like length. n = 1 gives 0 in the form for training, whose one weight is 1 whatever its score.

    Raises:
      ValueError: train_length is not an int above 1.

    Source: kexue.fm/archives/8823.

    >>> import numpy as np
    >>> print(np.asarray(log_length_scale(np.array([16, 512, 4096]), 512)).round(4))
    [0.4444 1.     1.3333]
    """
    positive(train_length=train_length)
    if train_length == 1:
        raise ValueError("train_length must be above 1, since log 1 is 0; got 1")
    scale = jnp.log(jnp.asarray(length, jnp.float32)) / jnp.log(jnp.float32(train_length))
    return jnp.maximum(scale, 1) if at_least_one else scale


def random_positions(key: jax.Array, length: int, max_length: int, *, batch: int = 1) -> jax.Array:
    """Sorted positions drawn without repetition from 0 .. max_length - 1, for training: longer rows are then not new.

    Args:
      key: a typed key.
      length: T, at most max_length.
      max_length: the longest sequence to be ready for.
      batch: rows, drawn apart.

    Returns:
      (batch, length) int32, increasing along each row. Evaluation takes 0, 1, 2, ...

    Raises:
      ValueError: length beyond max_length.

    Cost O(max_length log max_length) a row. Source: Ruoss et al., arXiv:2305.16843.

    >>> import jax
    >>> random_positions(jax.random.key(0), 4, 4).tolist()
    [[0, 1, 2, 3]]
    """
    positive(length=length, max_length=max_length, batch=batch)
    if length > max_length:
        raise ValueError(f"length must be at most max_length={max_length}; got {length}")
    noise = jax.random.uniform(key, (batch, max_length))
    return jnp.sort(jnp.argsort(noise, axis=1)[:, :length].astype(jnp.int32), axis=1)
