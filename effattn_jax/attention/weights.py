"""The weights that a kernel gives its values, whether it forms them or not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, choose, floating

__all__ = ["attention_weights"]


def attention_weights(
    kernel: str | Callable, query: ArrayLike, key: ArrayLike, *args: Any, **options: Any
) -> jax.Array:
    """W with out = W value: how much each query takes of each key, for any kernel whose output is linear in the values.

    The kernel is applied to the identity in place of values: column s of W is the output for a value of 1 at key s and 0 elsewhere. For
    the delta rule these are the effects of a value through everything written over it later.

    Args:
      kernel: a name of `attention.MIXERS` or any function under the contract.
      query, key: (*B, T, N, H), (*B, S, K, H).
      *args, **options: what the kernel takes after value: bias, mask, is_causal, segment_ids, log_decay ...

    Returns:
      (*B, N, T, S), float32 at least. Rows of normalised kernels sum to 1, or 0 where there is nothing to attend.

    Raises:
      ValueError: an unknown name, a state (it stands for keys that are not here), a key without its axes, a kernel with more results than one, and what it refuses.

    Cost: that of the kernel with values of size S; memory O(T S) at least. It is for looking, not for training.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> print(attention_weights("linear", x, x, is_causal=True)[0, 0])
    [[1.  0. ]
     [0.5 0.5]]
    """
    if isinstance(kernel, str):
        from effattn_jax.attention import MIXERS

        choose("kernel", kernel, MIXERS)
        kernel = MIXERS[kernel].function
    for name in ("initial_state", "return_state", "return_weights"):
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name} must not be given: the weights are those of the keys of one call")
    query, key = floating(query=query, key=key)
    if key.ndim < 3:
        raise ValueError(f"key must have shape (*B, S, K, H); got rank {key.ndim}, shape {key.shape}")
    keys = key.shape[-3]
    dtype = jnp.result_type(jnp.float32, query, key)
    value = jnp.broadcast_to(jnp.eye(keys, dtype=dtype)[:, None], (*key.shape[:-1], keys))
    out = kernel(query, key, value, *args, **options)
    if isinstance(out, tuple):
        raise ValueError(f"kernel must return the output alone; got {len(out)} results")
    return jnp.moveaxis(out, -2, -3)
