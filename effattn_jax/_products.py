"""Products of rows, written so that XLA computes them well on every backend."""

import jax
import jax.numpy as jnp

__all__: list[str] = []


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum_i a_i b_i over the last axis, at full precision.

    On CPU, XLA's fused sum of products takes a hundred times as long where an axis has size 1, as that of a batch often has; a product does not.

    >>> import jax.numpy as jnp
    >>> row_products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
    [11.0]
    """
    return jnp.einsum("...i,...i->...", a, b, precision="highest")
