"""Terms of content and of position with projections of their own, which factorise: each is a product of features of i and of j.

    Transformer-XL   s_ij = scale ((q_i + u) . k_j + (q_i + v) . W^T R_(i-j)),     R_d = [sin(d w), cos(d w)]
    TUPE             s_ij = (q_i . k_j + a_i . c_j) / sqrt(2 H),                   a, c: positions under projections of their own

R_(i-j) is R_j turned by the angles of i, so Transformer-XL's second term is (turned W (q_i + v)) . R_j: features side by side run on the block
kernel, in O(T) memory, without the shift of a T x S array that the authors use. State: softmax's cache, of keys and values alone.
Sources: Dai et al., arXiv:1901.02860 (XLNet, arXiv:1906.08237, has the same scores); Ke et al., arXiv:2006.15595.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, floating, scale_or
from effattn_jax._places import at_own_keys, count_positions, rows_of_table, split_like
from effattn_jax.attention._calls import with_positions
from effattn_jax.attention._pairs import Marks
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import Scores
from effattn_jax.position.angles import angles, inverse_frequencies, wide_positions
from effattn_jax.position.relative import _run, by_head
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__ = ["tupe_attention", "xl_attention"]


@compiled
def xl_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    relative_key: ArrayLike,
    content_bias: ArrayLike | None = None,
    position_bias: ArrayLike | None = None,
    base: float = 10000.0,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Transformer-XL's and XLNet's attention: scores scale ((q_i + u) . k_j + (q_i + v) . W^T R_(i-j)), R_d = [sin(d w), cos(d w)].

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as in
        `dot_product_attention`.
      relative_key: W = W_K,R, (M, N, H) for sinusoids of M features: first M / 2 sines, then as many cosines.
      content_bias, position_bias: u and v, (N, H); None is 0.
      base: of the sinusoids' wavelengths.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last. There is no term on values.

    Raises:
      ValueError: weights of another shape; what `dot_product_attention` raises.

    Cost O(T S (H + M + V)) a head, memory O((T + S) (H + M)); state: the cache. Sources: arXiv:1901.02860, arXiv:1906.08237.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 2, 4))
    >>> xl_attention(x, x, x, relative_key=jnp.ones((6, 2, 4)), is_causal=True).shape
    (1, 5, 2, 4)
    """

    def rescore(call: Call, marks: Marks) -> Scores:
        dtype, (heads, dim) = accumulator(call.query, call.key, call.value), call.query.shape[2:]
        weights = {"relative_key": relative_key, "content_bias": content_bias, "position_bias": position_bias}
        weights = {name: x for name, x in weights.items() if x is not None}
        weights = {n: x.astype(dtype) for n, x in zip(weights, floating(**weights), strict=True)}
        for name, x in weights.items():
            want = ("M", heads, dim) if name == "relative_key" else (heads, dim)
            if x.shape[-len(want) + (name == "relative_key") :] != (heads, dim) or x.ndim != len(want):
                raise ValueError(f"{name} must have shape {want} for N={heads}, H={dim}; got {x.shape}")
        frequencies = inverse_frequencies(weights["relative_key"].shape[0], base)
        query = call.query.astype(dtype)
        content, place = (
            query + weights[name][None, None] if name in weights else query
            for name in ("content_bias", "position_bias")
        )
        marks = with_positions(marks, call.query.shape[1], call.key.shape[1])
        turned, waves = _sinusoids(place, weights["relative_key"], frequencies, marks)
        factor = scale_or(1 / math.sqrt(dim), scale)
        query, key = _beside(content, turned), _beside(call.key.astype(dtype), waves)
        return Scores(query, key, call.value, call.bias, scale=factor)

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


def _sinusoids(place, projection, frequencies, marks):
    """Features of queries (B, T, N, M) and of keys (B | 1, S, 1, M) whose product is place . W^T R_(i-j)."""
    at_sine, at_cosine = jnp.split(jnp.einsum("btnh,mnh->btnm", place, by_head(projection, place)), 2, axis=-1)
    here = angles(wide_positions(marks.query_positions, place.dtype), frequencies)[:, :, None]
    sine, cosine = jnp.sin(here), jnp.cos(here)
    there = angles(wide_positions(marks.key_positions, place.dtype), frequencies)[:, :, None]
    turned = [at_sine * sine + at_cosine * cosine, at_cosine * sine - at_sine * cosine]
    return jnp.concatenate(turned, axis=-1), jnp.concatenate([jnp.cos(there), jnp.sin(there)], axis=-1)


def _beside(x: jax.Array, more: jax.Array) -> jax.Array:
    """Features x (B, T, N, H) with further ones (B | 1, T, N | 1, M) of their dtype behind them, sharded as x is."""
    more = jnp.ones_like(x[..., :1]) * more.astype(x.dtype)  # the tangent of a sum would not be sharded so (jax 0.7)
    return jnp.concatenate([x, more], axis=-1)


@compiled
def tupe_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    position_query: ArrayLike,
    position_key: ArrayLike,
    first_token: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""TUPE's attention: content and position do not mix, scores (q_i . k_j + a_i . c_j) / sqrt(2 H); T5's bias goes into `bias`.

    Args:
      query, key, value, bias, mask, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as in
        `dot_product_attention`. Places are counted in each segment, without what a key mask hides.
      position_query, position_key: a = p U_Q and c = p U_K of the places 0, 1, ..., (L, N, M), L the longest sequence.
      first_token: (N, 2): what replaces a_i . c_j / sqrt(2 H) where i is the first token, and where only j is ([CLS] untied); None: nothing.
      scale: factor on both products; None is 1 / sqrt(2 H).

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: tables of another shape, a sequence longer than they are; what `dot_product_attention` raises.

    Cost O(T S (H + M + V)) a head, memory O((T + S) (H + M)); state: the cache. Source: arXiv:2006.15595.

    >>> import jax.numpy as jnp
    >>> x, table = jnp.ones((1, 5, 2, 4)), jnp.ones((8, 2, 3))
    >>> tupe_attention(x, x, x, position_query=table, position_key=table, is_causal=True).shape
    (1, 5, 2, 4)
    """

    def rescore(call: Call, marks: Marks) -> Scores:
        dtype, (heads, dim) = accumulator(call.query, call.key, call.value), call.query.shape[2:]
        tables = [x.astype(dtype) for x in floating(position_query=position_query, position_key=position_key)]
        for name, x in zip(("position_query", "position_key"), tables, strict=True):
            if x.ndim != 3 or x.shape[1] != heads or x.shape != tables[0].shape:
                raise ValueError(f"{name} must have shape (L, N, M) with N={heads}, both alike; got {x.shape}")
        at_rows, at_columns = _places(call, marks, tables[0].shape[0])
        factor = scale_or(1 / math.sqrt(2 * dim), scale)
        rows, columns = (rows_of_table(x, at) for x, at in zip(tables, (at_rows, at_columns), strict=True))
        rows, columns = (split_like(x, 2, call.query, 2) for x in (rows, columns))
        if first_token is not None:
            first = floating(first_token=first_token)[0].astype(dtype) / factor
            rows, columns = _untie(rows, columns, at_rows, at_columns, first)
        query = _beside(call.query.astype(dtype), rows)
        key = _beside(repeat_heads(call.key, call.query).astype(dtype), columns)
        return Scores(query, key, repeat_heads(call.value, call.query), call.bias, scale=factor)

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


def _places(call: Call, marks: Marks, limit: int) -> tuple[jax.Array, jax.Array]:
    """Places of queries (B | 1, T) and of keys (B | 1, S) in their segments; a query's is that of the key it is aligned with."""
    length, keys = call.query.shape[1], call.key.shape[1]
    plain = marks.key_mask is None and marks.key_segments is None
    if plain and keys > limit:
        raise ValueError(f"key must hold at most {limit} tokens, the places of position_key; got {keys}")
    rows = columns = count_positions((call.key.shape[0], keys), marks.key_mask, marks.key_segments)
    if marks.key_mask is not None:
        # Hidden keys have no place. Queries there have that of the next token, which may be one beyond the table.
        rows = jnp.where(marks.key_mask, columns, jnp.minimum(columns, limit - 1))
        columns = jnp.where(marks.key_mask, columns, 0)
    return at_own_keys(rows, marks.offset, length), columns


def _untie(rows, columns, at_rows, at_columns, scores):
    """Features (B | 1, T, N, M + 2) and (B | 1, S, N, M + 2) whose product is scores (N, 2) in the row and the column of the first token."""
    if scores.shape != (rows.shape[2], 2):
        raise ValueError(f"first_token must have shape (N, 2) with N={rows.shape[2]}; got {scores.shape}")
    is_row, is_column = ((at == 0)[..., None, None] for at in (at_rows, at_columns))
    scores = split_like(scores, 0, rows, 2)
    row_part = jnp.where(is_row, scores[None, None, :, :1], 0)
    column_part = jnp.where(is_column, scores[None, None, :, 1:], 0)
    other_rows = jnp.where(is_row, 0, jnp.ones_like(row_part))
    rows = jnp.concatenate([jnp.where(is_row, 0, rows), row_part, other_rows], axis=-1)
    return rows, jnp.concatenate([jnp.where(is_column, 0, columns), jnp.ones_like(column_part), column_part], axis=-1)
