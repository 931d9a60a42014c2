"""Relative positions as vectors: learned tables by distance that meet queries, keys and values.

    Shaw       s_ij = scale q_i . (k_j + A_d),   o_i = sum_j p_ij (v_j + C_d),        d = clip(j - i, -D, D) + D
    DeBERTa    s_ij = scale (q_i . k_j + q_i . A_d + k_j . C_e),    d = clip(i - j + D, 0, 2D - 1), e = clip(j - i + D, 0, 2D - 1)

By blocks of rows, each against all keys: no T x S array. Positions count the keys that the key mask shows. State: softmax's cache.
Sources: Shaw et al., arXiv:1803.02155 (NEZHA, arXiv:1909.00204, has sinusoids in one table for both); He et al., arXiv:2006.03654.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, floating, scale_or
from effattn_jax.attention._calls import asked_for
from effattn_jax.attention._pairs import Marks, finite_or_zero
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import Scores, run
from effattn_jax.position._distances import Distances
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__ = ["disentangled_attention", "shaw_attention"]


@compiled
def shaw_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    key_table: ArrayLike,
    value_table: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Softmax attention with a vector for each distance, added to keys and to values: scores scale q_i . (k_j + A_d), values v_j + C_d.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids, initial_state, return_state, implementation, return_weights: as in
        `dot_product_attention`.
      key_table: A, (2 D + 1, H) for all heads or (2 D + 1, N, H); row d is for keys d - D places after the query, farther ones with the ends.
      value_table: C, (2 D + 1, V) or (2 D + 1, N, V); None for none.
      chunk_size: rows of a block; None picks.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: a table of another shape; what `dot_product_attention` raises.

    Cost O(T S (H + V)) and O(T D (H + V)) a head, memory O(T + S); state: the cache. Sources: arXiv:1803.02155, arXiv:1909.00204.

    >>> import jax.numpy as jnp, numpy as np
    >>> x = jnp.zeros((1, 3, 1, 2))
    >>> out = shaw_attention(x, x, x, key_table=jnp.zeros((3, 2)), value_table=jnp.eye(3)[:, :2], is_causal=True)
    >>> print(np.asarray(out[0, :, 0]).round(2))
    [[0.   1.  ]
     [0.5  0.5 ]
     [0.67 0.33]]
    """

    def rescore(call: Call, marks: Marks) -> Scores:
        dtype = accumulator(call.query, call.key, call.value)
        keys = _table("key_table", key_table, call.query, call.query.shape[3], odd=True).astype(dtype)
        distances = Distances(marks, call, keys.shape[0])
        factor = scale_or(1 / math.sqrt(call.query.shape[-1]), scale)
        query = call.query.astype(dtype) * factor

        def scores(row, count):
            return distances.of_queries(_rows(query, keys, row, count), row)

        def values(row, count, weights):
            zeros = jnp.broadcast_to(jnp.zeros_like(weights[..., :1]), (*weights.shape[:3], table.shape[0]))
            _, add = jax.vjp(lambda x: by_distance.of_queries(x, row), zeros)  # the transpose of looking up
            return jnp.einsum("bnrd,dnv->bnrv", add(weights)[0], table)

        if value_table is not None:
            table = _table("value_table", value_table, call.query, call.value.shape[3], odd=True).astype(dtype)
            by_distance = Distances(marks, call, table.shape[0])
        return Scores(
            query, call.key.astype(dtype), call.value, call.bias, scores, None if value_table is None else values
        )

    return _run(
        rescore,
        (query, key, value, bias, mask),
        is_causal,
        segment_ids,
        initial_state,
        return_state,
        implementation,
        chunk_size,
        return_weights,
    )


@compiled
def disentangled_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    key_table: ArrayLike | None,
    query_table: ArrayLike | None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""DeBERTa's attention: content to content, content to position, position to content; scores scale (q_i . k_j + q_i . A_d + k_j . C_e).

    d = clip(i - j + D, 0, 2 D - 1), and e the same with i and j exchanged. There is no term of two positions.

    Args:
      query, key, value, bias, mask, is_causal, segment_ids, initial_state, return_state, implementation, return_weights: as in
        `dot_product_attention`.
      key_table: A = R W_K,r, (2 D, N, H) or (2 D, H) for all heads; None leaves its term out.
      query_table: C = R W_Q,r, the same.
      scale: factor on the sum; None is 1 / sqrt(t H) for t terms, 1 / sqrt(3 H) with both tables.
      chunk_size: rows of a block; None picks.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: a table of another shape; what `dot_product_attention` raises.

    Cost O(T S (H + V)) and O(T D H) a head; memory O((T + S) D) for C, else O(T + S); state: the cache. Source: arXiv:2006.03654.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 2, 4))
    >>> jax.jit(disentangled_attention)(x, x, x, key_table=jnp.ones((6, 2, 4)), query_table=None).shape
    (1, 5, 2, 4)
    """

    def rescore(call: Call, marks: Marks) -> Scores:
        dtype, dim = accumulator(call.query, call.key, call.value), call.query.shape[3]
        tables = [
            None if table is None else _table(name, table, call.query, dim, odd=False).astype(dtype)
            for name, table in (("key_table", key_table), ("query_table", query_table))
        ]
        terms = 1 + sum(table is not None for table in tables)
        factor = scale_or(1 / math.sqrt(terms * dim), scale)
        query = call.query.astype(dtype) * factor
        parts = []
        if tables[0] is not None:
            forth = Distances(marks, call, tables[0].shape[0], mirrored=True)
            parts.append(lambda row, count: forth.of_queries(_rows(query, tables[0], row, count), row))
        if tables[1] is not None:
            back = Distances(marks, call, tables[1].shape[0])
            whole = repeat_heads(finite_or_zero(call.key.astype(dtype))[0], query) * factor
            of_keys = jnp.einsum("bsnh,dnh->bnsd", whole, tables[1])
            parts.append(back.of_keys(of_keys))

        def scores(row, count):
            return sum(part(row, count) for part in parts)

        return Scores(query, call.key.astype(dtype), call.value, call.bias, scores if parts else None)

    return _run(
        rescore,
        (query, key, value, bias, mask),
        is_causal,
        segment_ids,
        initial_state,
        return_state,
        implementation,
        chunk_size,
        return_weights,
    )


def _run(
    rescore, arrays, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights
):
    out, state, weights, _ = run(
        arrays, scale=None, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights, rescore=rescore,
    )  # fmt: skip
    return asked_for(out, state, return_state, weights, return_weights)


def _table(name: str, table: ArrayLike, query: jax.Array, dim: int, *, odd: bool) -> jax.Array:
    """A table by distance as (rows, N, dim), or the ValueError that says what it should have been."""
    (table,) = floating(**{name: table})
    heads = query.shape[2]
    full = table[:, None] if table.ndim == 2 else table
    rows = "2 D + 1" if odd else "2 D"
    if (
        full.ndim != 3
        or full.shape[1] not in (1, heads)
        or full.shape[2] != dim
        or full.shape[0] % 2 != odd
        or full.shape[0] == 0
    ):
        raise ValueError(
            f"{name} must have shape ({rows}, {dim}) or ({rows}, N, {dim}) with N={heads}; got {table.shape}"
        )
    return by_head(full, query)


def by_head(weights: jax.Array, query: jax.Array) -> jax.Array:
    """Weights (R, N | 1, H) as (R, N, H), sharded over heads as the queries (B, T, N, ...) are: on Explicit meshes products ask for that."""
    return weights + jnp.sum(query[:, :0], axis=(0, 1, 3)).astype(weights.dtype)[None, :, None]


def _rows(query: jax.Array, table: jax.Array, row: Any, count: int) -> jax.Array:
    """Products of some query rows with all rows of a table, (B, N, R, rows)."""
    return jnp.einsum("brnh,dnh->bnrd", lax.dynamic_slice_in_dim(query, row, count, 1), table)
