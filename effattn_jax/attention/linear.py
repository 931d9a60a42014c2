"""Linear attention: the outer-product recurrence read as attention.

    o_i = sum_j phi(q_i).phi(k_j) v_j  /  sum_j phi(q_i).phi(k_j)          j <= i when causal

Cost O(T (C + M) V) a head for M features and chunks of C, memory O(T), state M x V and M: independent of how much came
before. Source: Katharopoulos et al., arXiv:2006.16236.
"""

from collections.abc import Callable
from typing import Any

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax.attention._frame import LinearState
from effattn_jax.attention._linear import run

__all__ = ["linear_attention"]


@compiled
def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    feature_map: str | Callable = "elu",
    normalize: bool = True,
    query_weights: ArrayLike | None = None,
    key_weights: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Attention whose similarity is a product of features: o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j).

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias: refused: there are no pairwise scores to add it to.
      mask: boolean over keys, broadcastable to (*B, 1, 1, S); True = attend. A mask over (query, key) pairs is refused.
      scale: factor on query before the feature map; None is 1.
      is_causal: query i sees keys up to i, ends aligned: with T < S the last query sees every key.
      segment_ids: (*B, T), or a pair for query and key; only equal ids interact and the state restarts at a boundary. A pair of different
        arrays costs O(T S) time (still O(T) memory).
      initial_state: the state of an earlier call, which this one goes on from (causal only). Without segment_ids its last segment goes on.
      return_state: also return the state after the last key.
      implementation: "chunked" (one chunk after the other), "parallel" (all chunks side by side, for accelerators; not for "exp" and
        "hedgehog") or "dense" (all pairs, a block of queries at a time); None is one of the first two, by the platform the program is
        compiled for.
      feature_map: a name of `FEATURE_MAPS`, a function of (..., H) -> (..., M), or a pair of functions (for query, for key). The features of
        "exp" never overflow where they are normalised: sums are kept relative to a running maximum of each feature (pair by pair, of each key).
      normalize: divide by the sum of weights, without any constant added, so that the scale of features cancels. A row whose weights sum
        to exactly 0 gives 0. Maps without sign (all of the table but "identity") have sums > 0, save where no key meets the query's
        features ("relu", "dpfp") or all keys point away from it ("cosine"). "identity" sums may be near 0 or negative: the quotient is then
        as large as it is, and normalize=False is what such maps are for.
      query_weights, key_weights: W of feature_map="hedgehog", (N, H, P) and (K, H, P), or (H, P) for all heads.
      chunk_size: steps a chunk; None is 64 (128 in the parallel form), 32 with "exp", 128 with "hedgehog" or more than 256 features.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (C + M) V) a head, state M V + M a key head. Source: arXiv:2006.16236.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
    >>> attend = jax.jit(linear_attention, static_argnames=("is_causal", "return_state"))
    >>> whole = attend(q, k, v, is_causal=True)
    >>> head, state = attend(q[:, :3], k[:, :3], v[:, :3], is_causal=True, return_state=True)
    >>> tail = attend(q[:, 3:], k[:, 3:], v[:, 3:], is_causal=True, initial_state=state)
    >>> bool(jnp.allclose(whole, jnp.concatenate([head, tail], axis=1), atol=1e-6))
    True
    """
    return run(
        "linear_attention", (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        feature_map=feature_map, normalize=normalize, query_weights=query_weights, key_weights=key_weights,
    )  # fmt: skip
