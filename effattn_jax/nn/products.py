"""The product of activations and a kernel, with a backward pass arranged for every backend.

y = x W;   x' = y' W^T;   W' = x^T y'   for cotangents x', y', W'
JAX arranges W' as (y'^T x)^T, over as many summed axes as x has. On CPU, XLA then copies both operands transposed, and with them computes the
activations that make them again, column by column: a fifth of a training step of a small model. Over one axis it takes them as they lie.
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


def _dot(a, b, a_axes, b_axes, dtype=None, like=None):
    sharding = None if like is None else jax.typeof(like).sharding
    return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype, out_sharding=sharding)


def _over_rows(a, b, like):
    """a^T b over all axes but the last: of one axis where that is only another view of the same memory."""
    rows = tuple(range(a.ndim - 1))
    if any(
        axis is not None for x in (a, b) for axis in jax.typeof(x).sharding.spec
    ):  # axes of an Explicit mesh do not merge
        return _dot(a, b, rows, rows, like=like)

    def flat(a, b):
        return _dot(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), (0,), (0,))

    return jax.lax.platform_dependent(a, b, cpu=flat, default=lambda a, b: _dot(a, b, rows, rows))


def _forward(arrays, _):
    x, kernel = arrays
    return _dot(x, kernel, (x.ndim - 1,), (0,))


def _backward(arrays, _, out, cotangent):
    del out
    x, kernel = arrays
    cotangent = cotangent.astype(x.dtype)
    return _dot(cotangent, kernel, (x.ndim - 1,), (1,)), _over_rows(x, cotangent, kernel)


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
    cotangent = cotangent.astype(x.dtype)
    return _dot(cotangent, table, (x.ndim - 1,), (0,)), _over_rows(cotangent, x, table)


_table_forward = partial(_float32_forward, axis=1)
_product = with_backward(_forward, _forward, _backward)
_float32_product = with_backward(_float32_forward, _float32_forward, _backward)
_table_product = with_backward(_table_forward, _table_forward, _table_backward)
