"""Attention over the largest scores of each row.

    o_i = sum_j p_ij v_j      p_i = softmax_j(s_ij)  over the keys j whose score s_ij is among the k largest that i may see

Cost O(T S), for all scores are formed; memory O(T) by blocks of rows, each computed again for its derivatives. State: the cache.
Source: Zhao et al., arXiv:1912.11637 (explicit sparse transformer).
"""

from typing import Any

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, positive
from effattn_jax.attention._patterns import run
from effattn_jax.attention._unions import Top
from effattn_jax.attention.kv_cache import Cache

__all__ = ["topk_attention"]


@compiled
def topk_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    k: int,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Softmax attention over the k largest scores of each row (a query in a head), bias included, among the keys it may see.

    Keys that tie with the k-th largest score are all kept, so the result does not depend on the order of keys. A row that sees fewer than k
    keys keeps them all. The choice itself has no gradient.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids: as in `dot_product_attention`.
      initial_state, return_state: its cache, of all keys.
      implementation: "dense" (all rows at once) or "chunked" (by blocks of rows); None picks by size.
      k: how many keys a row keeps.
      chunk_size: rows of a block; None picks.
      return_weights: also return the weights, (*B, N, T, S), from the dense form.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head, memory O(T + S); state: the cache. Source: arXiv:1912.11637.

    >>> import jax, jax.numpy as jnp
    >>> x = 9 * jnp.eye(5)[None, :, None]
    >>> bool(jnp.allclose(topk_attention(x, x, x, k=1), x))
    True
    """
    positive(k=k)
    return run(
        Top(k),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        return_weights=return_weights,
    )  # fmt: skip
