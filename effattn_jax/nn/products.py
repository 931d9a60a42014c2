"""The product of activations and a kernel, with a backward pass arranged for every backend.

y = x W;   x' = y' W^T;   W' = x^T y'   for cotangents x', y', W'
JAX arranges W' as (y'^T x)^T. Where products want their operands contiguous (XLA on CPU) that transposes the wide y'
together with the derivative of the activation that makes it: a fifth of a training step of a small model.
"""

from functools import partial
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


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """x (..., D) @ table (A, D)^T -> (..., A) in float32 as above: logits by the rows of an embedding.

    >>> import jax.numpy as jnp
    >>> table_product(jnp.ones((2, 3)), jnp.ones((4, 3))).shape
    (2, 4)
    """
    return _table_product((x, table), ())


def _dot(a, b, a_axes, b_axes, dtype=None):
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype)


def _forward(arrays, _):
    x, kernel = arrays
    return _dot(x, kernel, (x.ndim - 1,), (0,))


def _backward(arrays, _, out, cotangent):
    del out
    x, kernel = arrays
    cotangent, rows = cotangent.astype(x.dtype), tuple(range(x.ndim - 1))
    return _dot(cotangent, kernel, (x.ndim - 1,), (1,)), _dot(x, cotangent, rows, rows)


def _float32_forward(arrays, _, axis=0):
    dtype = jnp.promote_types(arrays[0].dtype, jnp.float32)

    def product(x, kernel):
        return _dot(x, kernel, (x.ndim - 1,), (axis,), dtype)

    if arrays[0].dtype == dtype:
        return product(*arrays)
    # With jax 0.7 the CPU backend has no product of bfloat16 into float32.
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda x, kernel: product(x.astype(dtype), kernel.astype(dtype)), default=product
    )


def _table_backward(arrays, _, out, cotangent):
    del out
    x, table = arrays
    cotangent, rows = cotangent.astype(x.dtype), tuple(range(x.ndim - 1))
    return _dot(cotangent, table, (x.ndim - 1,), (0,)), _dot(cotangent, x, rows, rows)


_table_forward = partial(_float32_forward, axis=1)
_product = with_backward(_forward, _forward, _backward)
_float32_product = with_backward(_float32_forward, _float32_forward, _backward)
_table_product = with_backward(_table_forward, _table_forward, _table_backward)
