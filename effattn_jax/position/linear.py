"""Rotary positions in linear attention: features are turned where they are multiplied, not where they are summed up to one.

    o_i = sum_j (R_i phi(q_i)).(R_j phi(k_j)) v_j  /  sum_j phi(q_i).phi(k_j)

Turned features have products of both signs, so a sum of them is no normaliser; the one of features as they are stays positive, and weights may be
negative and need not add up to 1. Two passes of the outer-product recurrence; state M V + M numbers a head. Source: Su et al., arXiv:2104.09864.

Maps whose products depend on q.k and on lengths alone ("cosine", "taylor", Performer's) keep distances, and positive weights, when queries and
keys are turned before the map. "exp" has no form of either kind: each of its features is kept relative to a maximum of its own.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import ArrayLike, accumulator, choose, floating
from effattn_jax.attention._frame import LinearState, empty_state, open_call
from effattn_jax.attention.features import resolve
from effattn_jax.attention.linear import linear_attention
from effattn_jax.position.frequencies import rotary_frequencies
from effattn_jax.position.rotation import rotary

__all__ = ["rotary_linear_attention"]

MAPS = ("elu", "relu", "cosine", "taylor", "dpfp", "hedgehog")


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
    normalize: bool = True,
    query_weights: ArrayLike | None = None,
    key_weights: ArrayLike | None = None,
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
      feature_map: "elu", "relu", "dpfp", "hedgehog", "cosine" or "taylor", whose sums of products are not negative; an odd last feature is not turned.
      normalize: False leaves the sum below out.
      query_weights, key_weights: of "hedgehog", as in `linear_attention`.
      base, frequencies: of the angles, see `rotary`; frequencies (M div 2,).
      initial_state, return_state: the states of both passes, a pair.

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
    options = {
        "is_causal": is_causal, "segment_ids": segment_ids, "return_state": return_state, "implementation": implementation,
        "chunk_size": chunk_size,
    }  # fmt: skip
    call, keep = open_call(
        "rotary_linear_attention", (query, key, value, bias, mask), scale=None, initial_state=initial_state, one_sequence=False, **options
    )  # fmt: skip
    query, key, value = floating(query=query, key=key, value=value)
    if keep is not None:  # a hidden key's features would bring its NaN into gradients
        key = jnp.where(keep.reshape(key.shape[:-2])[..., None, None], key, 0)
    if scale is not None:
        query = query * jnp.asarray(scale, query.dtype)
    maps = resolve(feature_map, query_weights, key_weights, (query.shape[-2], key.shape[-2]), query.shape[-1])
    dtype = accumulator(query, key, value)
    plain = maps.query(query.astype(dtype)), maps.key(key.astype(dtype))
    even = plain[0].shape[-1] // 2 * 2
    frequencies = rotary_frequencies(even, base=base) if frequencies is None else frequencies
    places = (query_positions, query_positions if key_positions is None else key_positions)
    turned = (rotary(x, jnp.asarray(at), frequencies=frequencies, dim=even) for x, at in zip(plain, places))
    options |= {"feature_map": "identity", "normalize": False}
    states = (None, None) if initial_state is None else initial_state
    passes = [(turned, value.astype(dtype))] + [(plain, jnp.ones_like(value[..., :1], dtype))] * normalize
    sums = [
        linear_attention(*features, x, None, mask, initial_state=state, **options)
        for (features, x), state in zip(passes, states)
    ]
    above, *below = [total for total, _ in sums] if return_state else sums
    for total in below:
        above = jnp.where(total == 0, 0, above / jnp.where(total == 0, 1, total))
    out = above.astype(call.value.dtype)
    return (out, tuple(state for _, state in sums)) if return_state else out


def rotary_linear_state(
    batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype, *, feature_map="elu", normalize=True
) -> tuple[LinearState, ...]:
    """The state of each pass before the first token."""
    sizes = (batch, capacity, num_heads, num_kv_heads, head_dim)
    widths = (value_dim, 1) if normalize else (value_dim,)
    return tuple(empty_state(*sizes, v, dtype, feature_map=feature_map, normalize=False) for v in widths)
