"""How the Synthesizers run on softmax attention's loops and cache: places of tokens, their rows of tables, blocks of scores.

A token's place is counted among the real tokens of its segment, so packed documents and padding are as if absent; the state holds no
places, they are counted again over its slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._compiled import when_known
from effattn_jax._contract import ArrayLike, Call, accumulator, floating, scale_or
from effattn_jax._places import at_own_keys, count_positions
from effattn_jax.attention._calls import asked_for
from effattn_jax.attention._pairs import Marks
from effattn_jax.attention.kv_cache import Cache, cache
from effattn_jax.attention.softmax import Scores, run
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__: list[str] = []

RIGHT_FACTOR = 32  # b: columns that follow one another and share a left factor
RANK = 8  # k of the factorised tables


class _Places(NamedTuple):
    """Where queries (B | 1, T) and keys (B | 1, S) stand; `plain` where both simply count from 0."""

    query: jax.Array
    key: jax.Array
    plain: bool


def _places(call: Call, marks: Marks, is_causal: bool, limit: int, name: str) -> _Places:
    """Places of all slots; a query's is that of the key it is aligned with, or without order and with other keys its own count."""
    length, keys = call.query.shape[1], call.key.shape[1]
    unmarked = marks.key_mask is None and marks.key_segments is None
    plain = unmarked and length == keys
    key = count_positions((call.key.shape[0], keys), marks.key_mask, marks.key_segments)
    if marks.key_mask is not None:
        key = jnp.where(marks.key_mask, key, jnp.minimum(key, limit - 1))  # padding behind the last place is nowhere
    reach = keys if is_causal else max(length, keys)
    rule = f"key must hold at most {limit} tokens, the length of the tables of {name}; got a sequence of {{}}, shape {call.restore(call.value).shape}"
    if unmarked:
        _require_places(rule, limit, np.array(reach))
    else:  # only the numbers know; where they stay unknown, places beyond the end give NaN
        when_known(partial(_require_places, rule, limit), jnp.max(key, initial=-1) + 1)
    if not is_causal and not (length == keys and marks.query_segments is marks.key_segments):
        return _Places(count_positions((call.query.shape[0], length), None, marks.query_segments), key, plain)
    return _Places(at_own_keys(key, marks.offset, length) if is_causal and not plain else key, key, plain)


def _require_places(rule: str, limit: int, reach: np.ndarray) -> None:
    if reach > limit:
        raise ValueError(rule.format(reach))


def columns_of(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Entries (B | 1, S) along the last axis of rows (B | 1, N, R, L): (B | 1, N, R, S)."""
    batch = max(rows.shape[0], columns.shape[0])
    rows = jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
    columns = jnp.broadcast_to(columns[:, None, None, :], (batch, 1, 1, columns.shape[1]))
    return jnp.take_along_axis(rows, columns, axis=-1, mode="fill", fill_value=jnp.nan)


class Problem(NamedTuple):
    """The call over all slots, in the accumulator's dtype where that matters, with a value for each query head."""

    call: Call
    value: jax.Array  # (B, S, N, V)
    places: _Places
    scale: Any
    dtype: Any

    def like_value(self, x: jax.Array) -> jax.Array:
        """Features (B | 1, S, N, M) for each of the batch, sharded as the values are."""
        return x + jnp.zeros_like(self.value[..., :1], x.dtype)

    def like_query(self, x: jax.Array) -> jax.Array:
        """Features (B | 1, T, N, M) for each of the batch, sharded as the queries are."""
        return x + jnp.zeros_like(self.call.query[..., :1], x.dtype)


def mixer(
    name: str, arrays: tuple, score: Callable, weights: dict[str, tuple[ArrayLike, tuple]], *, limit: int, scale: Any, is_causal: bool,
    **options: Any,
) -> Any:  # fmt: skip
    """What a call returns of a member whose scores are `score(problem, *weights)`; `weights` are arrays with their shapes."""

    def rescore(call: Call, marks: Marks) -> Scores:
        heads, dim = call.query.shape[2:]
        dtype = accumulator(call.query, call.value)
        arrays = [jnp.asarray(x).astype(dtype) for x in _checked(heads, dim, weights)]
        places = _places(call, marks, is_causal, limit, name)
        problem = Problem(call, repeat_heads(call.value, call.query), places, scale, dtype)
        return score(problem, *arrays)._replace(bias=call.bias)

    out, state, of_pairs, _ = run(arrays, scale=None, is_causal=is_causal, rescore=rescore, **options)
    return asked_for(out, state, options["return_state"], of_pairs, options["return_weights"])


def by_rows(problem: Problem, rows: Callable) -> Scores:
    """Scores of blocks of rows alone: queries and keys have no features."""
    scale = scale_or(1.0, problem.scale)
    none = problem.like_value(jnp.zeros((1, 1, 1, 1), problem.dtype))[..., :0]
    query = problem.like_query(jnp.zeros((1, 1, 1, 1), problem.dtype))[..., :0]
    return Scores(query, none, problem.value, rows=lambda row, count: scale * rows(row, count))


def _checked(heads: int, dim: int, weights: dict[str, tuple[ArrayLike, tuple]]) -> list[jax.Array]:
    """The weights of a member, or the ValueError that names the one of another shape; a letter other than N and H is any size."""
    for name, (array, shape) in weights.items():
        (array,) = floating(**{name: array})
        want = [{"N": heads, "H": dim}.get(size, size) for size in shape]
        fits = [not isinstance(w, int) or w == size for w, size in zip(want, array.shape, strict=False)]
        if array.ndim != len(want) or not all(fits):
            rule = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have shape ({rule}) with N={heads}, H={dim}; got {array.shape}")
    return [array for array, _ in weights.values()]


def size(array: ArrayLike, axis: int = 0) -> int:
    """The size of an axis, 0 where there is none."""
    shape = jnp.shape(array)
    return shape[axis] if shape else 0


# What the lines of the table say


def empty_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype) -> Cache:
    """A cache of values alone."""
    del num_heads
    state = cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)
    return state._replace(key=state.key[..., :0])


def _drawn(rng: jax.Array, length: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Normal numbers (length, *shape), of which a shorter table has the first."""
    rows = jax.vmap(partial(jax.random.fold_in, rng))(jnp.arange(length))
    return scale * jax.vmap(lambda row: jax.random.normal(row, shape, jnp.float32))(rows)


def dense_weights(rng, num_heads, num_kv_heads, head_dim, *, length) -> dict[str, jax.Array]:
    """Biases of 0 but for what tells the places apart from the start; columns at the scale of their inputs."""
    del num_kv_heads
    column, offset = jax.random.split(rng)
    return {
        "hidden_bias": jnp.zeros((num_heads, head_dim)),
        "columns": _drawn(column, length, num_heads, head_dim, scale=head_dim**-0.5),
        "column_bias": _drawn(offset, length, num_heads, scale=0.02),
    }


def random_weights(rng, num_heads, num_kv_heads, head_dim, *, length) -> dict[str, jax.Array]:
    """Scores of unit variance."""
    del num_kv_heads, head_dim
    return {"table": jax.random.normal(rng, (length, num_heads, length), jnp.float32)}


def factorized_dense_weights(rng, num_heads, num_kv_heads, head_dim, *, length) -> dict[str, jax.Array]:
    """b = 32 right factors and as many left ones as the length needs."""
    del num_kv_heads
    left, right = jax.random.split(rng)
    options = {"scale": head_dim**-0.5}
    return {
        "hidden_bias": jnp.zeros((num_heads, head_dim)),
        "left": _drawn(left, -(-length // RIGHT_FACTOR), num_heads, head_dim, **options),
        "right": _drawn(right, RIGHT_FACTOR, num_heads, head_dim, **options),
    }


def factorized_random_weights(rng, num_heads, num_kv_heads, head_dim, *, length) -> dict[str, jax.Array]:
    """Scores of unit variance, from k = 8 factors."""
    del num_kv_heads, head_dim
    keys = dict(zip(("left", "right"), jax.random.split(rng), strict=True))
    return {name: _drawn(key, length, num_heads, RANK, scale=RANK**-0.25) for name, key in keys.items()}


def mixed_weights(rng, num_heads, num_kv_heads, head_dim, *, length) -> dict[str, jax.Array]:
    """Equal parts of both at first."""
    tables = factorized_random_weights(rng, num_heads, num_kv_heads, head_dim, length=length)
    return {"mixture": jnp.zeros((num_heads, 2)), **tables}
