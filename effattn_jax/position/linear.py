"""Rotary positions in linear attention: features are turned where they are multiplied, not where they are summed up to one.

    o_i = sum_j (R_i phi(q_i)).(R_j phi(k_j)) v_j  /  sum_j phi(q_i).phi(k_j)

Turned features have products of both signs, so a sum of them is no normaliser; the one of features as they are stays positive, and weights may be
negative and need not add up to 1. Two passes of the outer-product recurrence; state M V + M numbers a head. Source: Su et al., arXiv:2104.09864.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import ArrayLike, choose, floating
from effattn_jax.attention.features import FEATURE_MAPS
from effattn_jax.attention.linear import linear_attention
from effattn_jax.position.frequencies import rotary_frequencies
from effattn_jax.position.rotation import rotary

__all__ = ["rotary_linear_attention"]

MAPS = ("elu", "relu", "cosine", "taylor", "dpfp")


def rotary_linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    query_positions: ArrayLike,
    key_positions: ArrayLike | None = None,
    feature_map: str = "elu",
    base: float = 10000.0,
    frequencies: np.ndarray | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Any = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Linear attention with rotary positions on its features: weights depend on distances, the normaliser on features alone.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids, implementation, chunk_size: as in `linear_attention`.
      query_positions, key_positions: (*B, T) and (*B, S), or what broadcasts to them; key_positions None are those of the queries.
      feature_map: "elu", "relu", "cosine", "taylor" or "dpfp", whose features are not negative or sums of squares; an odd last one is not turned.
      base, frequencies: of the angles, see `rotary`; frequencies (M div 2,).
      initial_state, return_state: the pair of states of both passes.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: an unknown map; what `linear_attention` and `rotary` raise.

    Cost O(T (C + M) V) a head, twice the products of queries and keys; state M V + M. Source: arXiv:2104.09864, section 3.3.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
    >>> at = lambda start: rotary_linear_attention(q, k, v, query_positions=start + jnp.arange(5), is_causal=True)
    >>> bool(jnp.allclose(at(0), at(1_000_000), atol=1e-5))
    True
    """
    choose("feature_map", feature_map, MAPS)
    query, key, value = floating(query=query, key=key, value=value)
    if scale is not None:
        query = query * jnp.asarray(scale, query.dtype)
    features = FEATURE_MAPS[feature_map]
    plain = [features(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (query, key)]
    even = plain[0].shape[-1] // 2 * 2
    frequencies = rotary_frequencies(even, base=base) if frequencies is None else frequencies
    places = (query_positions, query_positions if key_positions is None else key_positions)
    turned = [
        rotary(x, jnp.asarray(at), frequencies=frequencies, dim=even) for x, at in zip(plain, places, strict=True)
    ]
    options = {
        "is_causal": is_causal, "segment_ids": segment_ids, "return_state": return_state, "implementation": implementation,
        "chunk_size": chunk_size, "feature_map": "identity", "normalize": False,
    }  # fmt: skip
    states = (None, None) if initial_state is None else initial_state
    wide = value.astype(plain[0].dtype)
    above = linear_attention(*turned, wide, bias, mask, initial_state=states[0], **options)
    below = linear_attention(*plain, jnp.ones_like(wide[..., :1]), None, mask, initial_state=states[1], **options)
    if return_state:
        (above, first), (below, second) = above, below
    out = jnp.where(below == 0, 0, above / jnp.where(below == 0, 1, below)).astype(value.dtype)
    return (out, (first, second)) if return_state else out
