"""Gated linear attention: linear attention that forgets.

    o_i = sum_j (phi(q_i) * exp(g_{j+1} + ... + g_i)) . phi(k_j) v_j          j <= i when causal

Cost O(T (C + H) V) a head, state H x V. Source: Yang et al., arXiv:2312.06635.
"""

from collections.abc import Callable
from typing import Any

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax.attention._frame import LinearState, refuse
from effattn_jax.attention._linear import run

__all__ = ["gated_linear_attention"]


@compiled
def gated_linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    log_decay: ArrayLike,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    feature_map: str | Callable = "identity",
    normalize: bool = False,
    chunk_size: int | None = None,
) -> Any:
    r"""Linear attention that forgets: o_i = sum_j (phi(q_i) * exp(g_{j+1} + ... + g_i)) . phi(k_j) v_j.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N, keys and values are repeated to N heads.
      bias, mask: as for `linear_attention`: no bias; a mask over keys only. A masked step changes nothing: its decay does not count.
      log_decay: g, (*B, S, N) or, one a feature, (*B, S, N, H); <= 0, -inf forgets everything. One entry a key.
      scale: factor on query before the feature map; None is 1.
      is_causal: query i sees keys up to i, ends aligned. If False, later keys count as well, j > i with weight exp(g_i + ... + g_{j-1}).
      segment_ids: (*B, T), as for `linear_attention`; a pair of different arrays is refused.
      initial_state, return_state: as for `linear_attention`.
      implementation: "chunked" (one chunk after the other) or "parallel" (all side by side, for accelerators); None picks by the platform the
        program is compiled for.
      feature_map: as for `linear_attention`; with a decay for each feature from H to H. "exp" is not kept from overflowing here.
      normalize: divide by the sum of weights.
      chunk_size: steps a chunk; None is 64 (128 in the parallel form), or 32 with a decay for each feature.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (C + H) V) a head, state H V. Source: arXiv:2312.06635.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> print(gated_linear_attention(ones, ones, ones, log_decay=jnp.full((1, 3, 1), jnp.log(0.5)), is_causal=True)[0, :, 0, 0])
    [1.   1.5  1.75]
    """
    refuse("gated_linear_attention", implementation, "dense")
    return run(
        "gated_linear_attention", (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        feature_map=feature_map, normalize=normalize, log_decay=log_decay,
    )  # fmt: skip
