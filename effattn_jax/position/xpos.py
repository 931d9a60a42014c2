"""XPOS: rotary positions whose scores also fade with the distance, each pair of features at its own rate.

    s_ij = sum_m x_m^((t_i - t_j) / 512) (turned pair m of q_i) . (turned pair m of k_j),    x_m = (2m / dim + g) / (1 + g),  g = 0.4

q x^t and k x^-t apart leave the range of float32 some 36,000 positions from where exponents are 0. `xpos` puts that place where it is told;
`xpos_attention` puts one into each block of rows, and is right at any length. Causal only: the factor grows towards the future.
Source: Sun et al., arXiv:2212.10554.
"""

import math
import numbers
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, floating, scale_or
from effattn_jax._products import quiet
from effattn_jax.attention._calls import with_positions
from effattn_jax.attention._pairs import Marks, finite_or_zero
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import Scores
from effattn_jax.position.angles import given_positions
from effattn_jax.position.relative import _run
from effattn_jax.position.rotation import rotary
from effattn_jax.recurrence._outer_chunks import repeat_heads

__all__ = ["xpos", "xpos_attention", "xpos_decay"]


def xpos_decay(dim: int, *, gamma: float = 0.4, scale_base: float = 512.0) -> np.ndarray:
    """Logarithms of XPOS's factors a position, one a pair of features: ln((2m / dim + gamma) / (1 + gamma)) / scale_base, all negative.

    As `log_decay` of `gated_linear_attention`, on rotary queries and keys, it is XPOS in linear time.

    Args:
      dim: H, even.
      gamma: keeps the fastest fading at gamma / (1 + gamma).
      scale_base: positions that one factor is for.

    Returns:
      (dim/2,) float64 numpy; `np.tile(., 2)` or `np.repeat(., 2)` for features, halves or neighbours.

    >>> xpos_decay(4).round(5).tolist()
    [-0.00245, -0.00086]
    """
    if dim < 2 or dim % 2 or not all(isinstance(x, numbers.Real) and x > 0 for x in (gamma, scale_base)):
        raise ValueError(
            f"dim must be even, gamma and scale_base positive numbers; got dim={dim!r}, gamma={gamma!r}, scale_base={scale_base!r}"
        )
    return np.log((np.arange(0, dim, 2) / dim + gamma) / (1 + gamma)) / scale_base


def xpos(
    query: jax.Array,
    key: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    *,
    base: float = 10000.0,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    center: float | jax.Array | None = None,
    interleaved: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys whose products are XPOS's scores: turned, and scaled by x^(t - center) and x^(center - t).

    Args:
      query, key: (*B, T, N, H), (*B, S, K, H).
      query_positions, key_positions: (*B, T) and (*B, S), or what broadcasts to them.
      base: of the angles.
      gamma, scale_base: see `xpos_decay`.
      center: where exponents are 0: positions up to 36,000 from it are in float32's range, at the defaults. None: the middle of the key positions.
        Calls that share keys, as through a cache, share it too.
      interleaved: the layout of pairs, see `rotary`.

    Returns:
      (query, key), like the inputs, computed in float32 at least.

    Raises:
      ValueError: query and key of different H; what `rotary` and `xpos_decay` raise.

    Source: arXiv:2212.10554; for rows of any length `xpos_attention`.

    >>> import jax, jax.numpy as jnp
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 8))
    >>> @jax.jit
    ... def scores(t):
    ...     return jnp.einsum("btnh,bsnh->ts", *xpos(q, k, t + jnp.arange(4), t + jnp.arange(4)))
    >>> bool(jnp.allclose(scores(0), scores(1_000_000), atol=1e-5))
    True
    """
    query, key = floating(query=query, key=key)
    if min(query.ndim, key.ndim) < 3 or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must be (*B, T, N, H) and (*B, S, K, H), of one H; got {query.shape} and {key.shape}"
        )
    decay = xpos_decay(query.shape[-1], gamma=gamma, scale_base=scale_base)
    query_positions = given_positions(query_positions, query.shape[:-2], "query_positions")
    key_positions = given_positions(key_positions, key.shape[:-2], "key_positions")
    if center is None:
        first = jnp.min(key_positions)
        center = first + (jnp.max(key_positions) - first) // 2
    out = []
    for x, positions, sign in ((query, query_positions, 1), (key, key_positions, -1)):
        turned = rotary(x, positions, base=base, interleaved=interleaved)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        exponents = (sign * (positions - center)).astype(dtype)[..., None, None]
        out.append((turned * jnp.exp(exponents * _features(decay, x.ndim, interleaved, dtype))).astype(x.dtype))
    return out[0], out[1]


def _features(decay: np.ndarray, rank: int, interleaved: bool, dtype: DTypeLike) -> jax.Array:
    features = np.repeat(decay, 2) if interleaved else np.tile(decay, 2)
    return jnp.asarray(features, dtype).reshape((1,) * (rank - 1) + (-1,))


@compiled
def xpos_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    base: float = 10000.0,
    gamma: float = 0.4,
    scale_base: float = 512.0,
    scale: float | None = None,
    is_causal: bool = True,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Causal softmax attention with XPOS's scores, at any length: exponents are relative to each block of rows, so none overflows.

    Args:
      query, key, value, bias, mask, scale, segment_ids, initial_state, return_state, implementation, return_weights: as in `dot_product_attention`; queries and
        keys without positions, which are counted here (without what a key mask hides). The state keeps keys as they came.
      base, gamma, scale_base: see `xpos`.
      is_causal: True.
      chunk_size: rows of a block; None picks.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: is_causal=False, whose factors would grow without bound; what `dot_product_attention` raises.

    Cost O(T S (H + V)) a head, memory O(T + S); state: the cache. Source: arXiv:2212.10554.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((1, 5, 2, 4))
    >>> xpos_attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 4)
    """
    if not is_causal:
        raise ValueError("is_causal must be True: XPOS's factors grow towards the future")

    def rescore(call: Call, marks: Marks) -> Scores:
        dtype, dim = accumulator(call.query, call.key, call.value), call.query.shape[3]
        marks = with_positions(marks, call.query.shape[1], call.key.shape[1])
        decay = _features(xpos_decay(dim, gamma=gamma, scale_base=scale_base), 4, False, dtype)
        query = rotary(call.query.astype(dtype), marks.query_positions, base=base)
        query = query * scale_or(1 / math.sqrt(dim), scale)
        key, bad = finite_or_zero(call.key.astype(dtype))
        key = repeat_heads(rotary(key, marks.key_positions, base=base), call.query)

        def scores(row, count):
            places = lax.dynamic_slice_in_dim(marks.query_positions, row, count, 1)
            first = places[:, :1]  # later keys are masked, but for those of the block's own rows
            back = jnp.minimum(marks.key_positions - first, count - 1)
            rows = lax.dynamic_slice_in_dim(query, row, count, 1) * _power(decay, places - first)
            return quiet(partial(jnp.einsum, "brnh,bsnh->bnrs"))(rows, key * _power(decay, -back))

        none = jnp.zeros_like(call.query[..., :1], dtype)
        marked = jnp.where(bad, jnp.nan, jnp.zeros((), dtype))[..., None]  # rows that see such a key become NaN
        return Scores(none, marked, call.value, call.bias, scores)

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


def _power(decay: jax.Array, exponent: jax.Array) -> jax.Array:
    """x^exponent for exponents (B | 1, T) as (B | 1, T, 1, H)."""
    return jnp.exp(decay * exponent.astype(decay.dtype)[..., None, None])
