"""Sample weights of the lines of `position.MIXERS`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.attention.kv_cache import Cache, cache

__all__: list[str] = []


def cache_of(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype) -> Cache:
    """Softmax's state: keys and values as they came."""
    del num_heads
    return cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)


def by_distance(rows: int, *names: str) -> Callable[..., dict[str, jax.Array]]:
    """Tables of so many distances, by argument name."""

    def make(rng, num_heads, num_kv_heads, head_dim):
        del num_kv_heads
        tables = jax.random.normal(rng, (len(names), rows, num_heads, head_dim)) / 2
        return dict(zip(names, tables, strict=True))

    return make


def transformer_xl(rng, num_heads, num_kv_heads, head_dim) -> dict[str, jax.Array]:
    """The projection of six sinusoids, and both biases of queries."""
    del num_kv_heads
    projection, biases = jax.random.split(rng)
    content, place = jax.random.normal(biases, (2, num_heads, head_dim)) / 2
    relative = jax.random.normal(projection, (6, num_heads, head_dim)) / 2
    return {"relative_key": relative, "content_bias": content, "position_bias": place}


def tupe(rng, num_heads, num_kv_heads, head_dim, length) -> dict[str, Any]:
    """Projected places of a sequence of up to `length` tokens, and the scores of an untied first token."""
    del num_kv_heads, head_dim
    places, first = jax.random.split(rng)
    # Row by row, so that a longer table begins with the shorter one.
    row = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(places, i), (2, num_heads, 3)) / 2)
    rows = row(jnp.arange(length))
    return {
        "position_query": rows[:, 0], "position_key": rows[:, 1], "first_token": jax.random.normal(first, (num_heads, 2)),
    }  # fmt: skip
