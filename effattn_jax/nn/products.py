"""The product of activations and a kernel, with a backward pass arranged for every backend.

y = x W;   x' = y' W^T;   W' = x^T y'   for cotangents x', y', W'
JAX arranges W' as (y'^T x)^T. Where products want their operands contiguous (XLA on CPU) that transposes the wide y'
together with the derivative of the activation that makes it: a fifth of a training step of a small model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._derivatives import with_backward


def dense_product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x (..., D) @ kernel (D, F) -> (..., F); stands in for `jax.lax.dot_general` in `flax.linen.Dense`.

    >>> import jax.numpy as jnp
    >>> dense_product(jnp.ones((1, 2, 3)), jnp.ones((3, 4))).shape
    (1, 2, 4)
    """
    return _product((x, kernel), ())


def float32_product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """As `dense_product`, with float32 sums and result (float64 for float64) whatever the operands' type: for logits.

    >>> import jax.numpy as jnp
    >>> float32_product(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)).dtype.name
    'float32'
    """
    return _float32_product((x, kernel), ())


def _forward(arrays, _):
    x, kernel = arrays
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _float32_forward(arrays, _):
    dtype = jnp.promote_types(arrays[0].dtype, jnp.float32)

    def product(x, kernel):
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype)

    if arrays[0].dtype == dtype:
        return product(*arrays)
    # With jax 0.7 the CPU backend has no product of bfloat16 into float32.
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda x, kernel: product(x.astype(dtype), kernel.astype(dtype)), default=product
    )


def _backward(arrays, _, out, cotangent):
    del out
    x, kernel = arrays
    cotangent, rows = cotangent.astype(x.dtype), tuple(range(x.ndim - 1))
    x_bar = jax.lax.dot_general(cotangent, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return x_bar, jax.lax.dot_general(x, cotangent, ((rows, rows), ((), ())))


_product = with_backward(_forward, _forward, _backward)
_float32_product = with_backward(_float32_forward, _float32_forward, _backward)
