"""Feature maps phi of linear attention: sim(q, k) = phi(q) . phi(k), each a function of (..., H) arrays.

A map of the table is elementwise or acts on the last axis alone, so that it may run inside a chunk.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effattn_jax._contract import choose

__all__ = ["FEATURE_MAPS", "elu_plus_one"]


def elu_plus_one(x: jax.Array) -> jax.Array:
    """elu(x) + 1: x + 1 for x > 0 and exp(x) below; positive everywhere (H -> H). Source: arXiv:2006.16236.

    >>> import jax.numpy as jnp
    >>> print(elu_plus_one(jnp.array([0.0, 1.0])))
    [1. 2.]
    """
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": elu_plus_one,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


def resolve(feature_map: str | Callable) -> tuple[Callable, bool]:
    """The function of a name or callable, and whether it may run inside a chunk (only the table's own maps close over nothing)."""
    if callable(feature_map):
        return feature_map, False
    choose("feature_map", feature_map, FEATURE_MAPS)
    return FEATURE_MAPS[feature_map], True
