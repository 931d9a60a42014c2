"""The Synthesizers as sequence mixers under the contract, on softmax attention's loops and its cache.

A token's place is counted among the real tokens of its segment, so packed documents and padding are as if absent. The scores are

    dense              relu(q_i + b_1) . w_j + b_j        features of the query against a row of a table: blocks, O(T) memory
    random             R_ij                               rows of the table, a block of queries at a time
    factorised dense   (h_i . l_u)(h_i . r_v), j = u b + v      h = relu(q + b_1); the same
    factorised random  l_i . r_j                          two tables as query and key: blocks, O(T) memory
    mixed              alpha_1 q_i . k_j / sqrt(H) + alpha_2 l_i . r_j       features side by side: blocks, O(T) memory

The state holds values, and keys where they are read. Source: Tay et al., arXiv:2005.00743.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, scale_or
from effattn_jax._places import rows_of_table, split_like
from effattn_jax.attention._synthetic import Problem, by_rows, columns_of, mixer, size
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import Scores
from effattn_jax.attention.synthesizer import factorized_dense_scores
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__ = [
    "synthesizer_dense",
    "synthesizer_factorized_dense",
    "synthesizer_factorized_random",
    "synthesizer_mixed",
    "synthesizer_random",
]


@compiled
def synthesizer_dense(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    hidden_bias: ArrayLike,
    columns: ArrayLike,
    column_bias: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Dense Synthesizer: each token predicts its weights alone, o_i = sum_j softmax_j(relu(q_i + b_1) . w_j + b_j) v_j.

    With q = x W_1 this is relu(x W_1 + b_1) W_2 + b_2, whose columns are the w_j of the places j.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N. The key is checked, its length counts, its numbers do not.
      bias, mask: as for `dot_product_attention`; tokens that a mask over keys hides have no place.
      hidden_bias: b_1, (N, H).
      columns: w, (L, N, H), L the longest sequence.
      column_bias: b, (L, N).
      scale: factor on the scores; None is 1.
      is_causal, segment_ids: as for `dot_product_attention`; places are counted anew in each segment.
      initial_state, return_state: as for `dot_product_attention`; the cache holds no keys.
      implementation, chunk_size, return_weights: as for `dot_product_attention`.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule; a sequence of more than L tokens. Where jit hides the count its tokens give NaN.

    Cost O(T S (H + V)) a head, memory O(T); state: K V numbers a token. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> from effattn_jax.attention import MIXERS, synthesizer_dense
    >>> import jax
    >>> weights = MIXERS["synthesizer_dense"].weights(jax.random.key(0), 2, 2, 4, length=16)
    >>> x = jax.random.normal(jax.random.key(1), (1, 5, 2, 4))
    >>> synthesizer_dense(x, x, x, is_causal=True, **weights).shape
    (1, 5, 2, 4)
    """

    def score(p: Problem, hidden_bias, columns, column_bias) -> Scores:
        hidden = jax.nn.relu(p.call.query.astype(p.dtype) + hidden_bias[None, None])
        features = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
        table = jnp.concatenate([columns, column_bias[..., None]], axis=-1)
        keys = p.like_value(rows_of_table(table, p.places.key, p.places.plain))
        return Scores(features, keys, p.value, scale=scale_or(1.0, p.scale))

    weights = {
        "hidden_bias": (hidden_bias, ("N", "H")),
        "columns": (columns, ("L", "N", "H")),
        "column_bias": (column_bias, (size(columns), "N")),
    }
    return mixer(
        "synthesizer_dense", (query, key, value, bias, mask), score, weights, limit=size(columns), scale=scale, is_causal=is_causal,
        reads_key=False, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights,
    )  # fmt: skip


@compiled
def synthesizer_random(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    table: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Random Synthesizer: weights by place alone, o_i = sum_j softmax_j(R_ij) v_j.

    Args:
      query, key, value: as for `synthesizer_dense`; the numbers of query and key do not count.
      bias, mask: as for `dot_product_attention`; tokens that a mask over keys hides have no place.
      table: R by row, head and column, (L, N, L), L the longest sequence.
      scale, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as for `synthesizer_dense`.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: as for `synthesizer_dense`.

    Cost O(T S V) a head; state: K V numbers a token; L^2 parameters a head. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> print(synthesizer_random(x, x, x, table=jnp.zeros((8, 1, 8)), is_causal=True)[0, :, 0, 0])
    [0.  0.5 1. ]
    """

    def score(p: Problem, table) -> Scores:
        def rows(row, count):
            some = rows_of_table(table, lax.dynamic_slice_in_dim(p.places.query, row, count, 1))
            return columns_of(jnp.swapaxes(some, 1, 2), p.places.key)

        return by_rows(p, rows)

    weights = {"table": (table, ("L", "N", size(table)))}
    return mixer(
        "synthesizer_random", (query, key, value, bias, mask), score, weights, limit=size(table), scale=scale, is_causal=is_causal,
        reads_key=False, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights,
    )  # fmt: skip


@compiled
def synthesizer_factorized_dense(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    hidden_bias: ArrayLike,
    left: ArrayLike,
    right: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Factorised dense Synthesizer: scores (h_i . l_u)(h_i . r_v) of the place j = u b + v, h_i = relu(q_i + b_1).

    Args:
      query, key, value: as for `synthesizer_dense`.
      bias, mask: as for `dot_product_attention`; tokens that a mask over keys hides have no place.
      hidden_bias: b_1, (N, H).
      left: l, (a, N, H).
      right: r, (b, N, H); sequences are at most a b long.
      scale, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as for `synthesizer_dense`.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: as for `synthesizer_dense`.

    Cost O(T (S V + (a + b) H)) a head, memory O(T); state: K V numbers a token. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> x, left, right = jnp.ones((1, 6, 2, 4)), jnp.ones((2, 2, 4)), jnp.ones((3, 2, 4))
    >>> synthesizer_factorized_dense(x, x, x, hidden_bias=jnp.zeros((2, 4)), left=left, right=right).shape
    (1, 6, 2, 4)
    """

    def score(p: Problem, hidden_bias, left, right) -> Scores:
        hidden, width = jax.nn.relu(p.call.query.astype(p.dtype) + hidden_bias[None, None]), right.shape[0]

        def rows(row, count):
            some = lax.dynamic_slice_in_dim(hidden, row, count, 1)
            factors = [jnp.einsum("brnh,anh->bnra", some, split_like(x, 1, some, 2)) for x in (left, right)]
            if p.places.plain:  # products in their order: no gather, whose derivative adds entry by entry
                return factorized_dense_scores(*factors, p.value.shape[1])
            return columns_of(factors[0], p.places.key // width) * columns_of(factors[1], p.places.key % width)

        return by_rows(p, rows)

    weights = {
        "hidden_bias": (hidden_bias, ("N", "H")),
        "left": (left, ("a", "N", "H")),
        "right": (right, ("b", "N", "H")),
    }
    return mixer(
        "synthesizer_factorized_dense", (query, key, value, bias, mask), score, weights, limit=size(left) * size(right), scale=scale, is_causal=is_causal,
        reads_key=False, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights,
    )  # fmt: skip


@compiled
def synthesizer_factorized_random(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    left: ArrayLike,
    right: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Factorised random Synthesizer: weights by place alone, of low rank, o_i = sum_j softmax_j(l_i . r_j) v_j.

    Args:
      query, key, value: as for `synthesizer_dense`; the numbers of query and key do not count.
      bias, mask: as for `dot_product_attention`; tokens that a mask over keys hides have no place.
      left, right: l and r, (L, N, k) each, L the longest sequence.
      scale, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as for `synthesizer_dense`.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: as for `synthesizer_dense`.

    Cost O(T S (k + V)) a head, memory O(T); state: K V numbers a token. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> print(synthesizer_factorized_random(x, x, x, left=jnp.zeros((8, 1, 2)), right=jnp.ones((8, 1, 2)), is_causal=True)[0, :, 0, 0])
    [0.  0.5 1. ]
    """

    def score(p: Problem, left, right) -> Scores:
        rows = p.like_query(rows_of_table(left, p.places.query, p.places.plain))
        columns = p.like_value(rows_of_table(right, p.places.key, p.places.plain))
        return Scores(rows, columns, p.value, scale=scale_or(1.0, p.scale))

    weights = {"left": (left, ("L", "N", "k")), "right": (right, (size(left), "N", size(left, -1)))}
    return mixer(
        "synthesizer_factorized_random", (query, key, value, bias, mask), score, weights, limit=size(left), scale=scale, is_causal=is_causal,
        reads_key=False, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights,
    )  # fmt: skip


@compiled
def synthesizer_mixed(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    mixture: ArrayLike,
    left: ArrayLike,
    right: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Mixture of products and a factorised random Synthesizer, under one softmax: scores alpha_1 q_i . k_j / sqrt(H) + alpha_2 l_i . r_j.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias, mask: as for `dot_product_attention`; tokens that a mask over keys hides have no place.
      mixture: (N, 2); alpha of a head is its softmax.
      left, right: l and r, (L, N, k) each, L the longest sequence.
      scale: factor on the products q . k; None is 1 / sqrt(H).
      is_causal, segment_ids, initial_state, return_state, implementation, chunk_size, return_weights: as for `synthesizer_dense`.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: as for `synthesizer_dense`.

    Cost O(T S (H + k + V)) a head, memory O(T); state: K (H + V) numbers a token. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> x, table = jnp.ones((1, 5, 2, 4)), jnp.ones((8, 2, 3))
    >>> synthesizer_mixed(x, x, x, mixture=jnp.zeros((2, 2)), left=table, right=table).shape
    (1, 5, 2, 4)
    """

    def score(p: Problem, mixture, left, right) -> Scores:
        alpha = jax.nn.softmax(mixture, axis=-1)
        factor = scale_or(1 / math.sqrt(p.call.query.shape[-1]), p.scale)
        rows = p.like_query(rows_of_table(left, p.places.query, p.places.plain) * alpha[None, None, :, 1:])
        columns = p.like_value(rows_of_table(right, p.places.key, p.places.plain))
        features = jnp.concatenate([p.call.query.astype(p.dtype) * (factor * alpha[None, None, :, :1]), rows], axis=-1)
        key = repeat_heads(p.call.key.astype(p.dtype), p.value)
        return Scores(features, jnp.concatenate([key, columns], axis=-1), p.value)

    weights = {
        "mixture": (mixture, ("N", 2)),
        "left": (left, ("L", "N", "k")),
        "right": (right, (size(left), "N", size(left, -1))),
    }
    return mixer(
        "synthesizer_mixed", (query, key, value, bias, mask), score, weights, limit=size(left), scale=scale, is_causal=is_causal,
        reads_key=True, segment_ids=segment_ids, initial_state=initial_state, return_state=return_state,
        implementation=implementation, chunk_size=chunk_size, return_weights=return_weights,
    )  # fmt: skip
