"""Sums, products and quotients in two floats: what single precision rounds off, kept as a second number. In double precision nobody asks for it."""

import jax
import jax.numpy as jnp
from jax import lax

__all__: list[str] = []

Pair = tuple[jax.Array, jax.Array]


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """a + b and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, lax.stop_gradient((a - (total - part)) + (b - part))


def product_error(a: jax.Array, b: jax.Array, product: jax.Array) -> jax.Array:
    """a * b - product, exactly (Dekker, with halves cut by their bits, which no compiler can reorder); it carries no derivative."""
    if product.dtype != jnp.float32:
        return jnp.zeros_like(product)
    a, b, product = lax.stop_gradient((jnp.asarray(a), jnp.asarray(b), product))

    def halves(x):
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32)
        return high, x - high

    (a1, a2), (b1, b2) = halves(a), halves(b)
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def add_product(a: jax.Array, b: jax.Array, c: Pair) -> Pair:
    """a + b c."""
    product = b * c[0]
    total, error = two_sum(a, product)
    return total, error + (product_error(b, c[0], product) + b * c[1])


def share(a: Pair, b: jax.Array) -> Pair:
    """a / b."""
    quotient = a[0] / b
    product = quotient * b
    rest = lax.stop_gradient((a[0] - product) - product_error(quotient, b, product))
    return quotient, (rest + a[1]) / b
