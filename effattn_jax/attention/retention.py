"""Retention: gated linear attention with one fixed decay a head.

    S_t = gamma_h S_{t-1} + k_t v_t^T          o_t = S_t^T q_t          gamma_h = 1 - 2^(-5 - h)

Cost O(T (C + H) V) a head, state H x V. Source: Sun et al., arXiv:2307.08621.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, floating, positive
from effattn_jax.attention._frame import LinearState, refuse
from effattn_jax.attention._linear import run

__all__ = ["retention_attention", "retention_decay"]


def retention_decay(num_heads: int) -> np.ndarray:
    """The decays of retention, gamma_h = 1 - 2^(-5 - h) for head h = 0 .. N - 1: memories of 32, 64, 128 ... steps.

    A float64 NumPy array (N,), so that its logarithm, which `gated_linear_attention` takes, is exact.

    Raises:
      ValueError: num_heads is no positive int.

    Source: arXiv:2307.08621.

    >>> print(retention_decay(3))
    [0.96875 0.984375 0.9921875]
    """
    positive(num_heads=num_heads)
    return 1 - 2.0 ** (-5 - np.arange(num_heads))


@compiled
def retention_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    decay: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Linear attention with a fixed decay a head: o_i = sum_j gamma^(i - j) q_i . k_j v_j, j <= i when causal.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N, keys and values are repeated to N heads.
      bias, mask: as for `linear_attention`: no bias; a mask over keys only. A masked step changes nothing: it does not decay.
      decay: gamma, (N,), in [0, 1]; None is `retention_decay(N)`. Its gradient at 0 is 0: log gamma is what enters. Where heads are split by hand (shard_map), each part needs its own.
      scale: factor on query; None is 1. The paper has 1 / sqrt(H), and divides by norms of heads afterwards.
      is_causal: query i sees keys up to i, ends aligned. If False, later keys count as well, with gamma^(j - i).
      segment_ids, initial_state, return_state: as for `gated_linear_attention`.
      implementation: "chunked" or "parallel", as for `gated_linear_attention`; None picks by the platform.
      chunk_size: steps a chunk; None is 64 (128 in the parallel form).

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (C + H) V) a head, state H V. Source: arXiv:2307.08621.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> print(retention_attention(ones, ones, ones, is_causal=True)[0, :, 0, 0])
    [1.        1.96875   2.9072266]
    """
    refuse("retention_attention", implementation, "dense")
    query, key, value = floating(query=query, key=key, value=value)
    options = {"scale": scale, "is_causal": is_causal, "segment_ids": segment_ids, "initial_state": initial_state}
    return run(
        "retention_attention", (query, key, value, bias, mask), **options, return_state=return_state, implementation=implementation,
        chunk_size=chunk_size, feature_map="identity", normalize=False, log_decay=_log_decay(decay, query, key),
    )  # fmt: skip


def _log_decay(decay: ArrayLike | None, query: Any, key: Any) -> Any:
    """log gamma for each key and query head, (*B, S, N); arrays that do not fit are left to the checks that follow."""
    if query.ndim < 3 or key.ndim < 3 or query.shape[:-3] != key.shape[:-3]:
        return None
    heads = query.shape[-2]
    dtype = accumulator(query, key)
    if decay is None:
        log = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), dtype)
    else:
        (decay,) = floating(decay=decay)
        if decay.shape != (heads,):
            raise ValueError(f"decay must have shape (N,) = {(heads,)}, one a query head; got {decay.shape}")
        decay = decay.astype(dtype)
        log = jnp.where(decay == 0, -jnp.inf, jnp.log(jnp.where(decay == 0, 1, decay)))
    # Zeros of the query's make heads and batch sharded as they are there.
    zero = jnp.sum(jnp.zeros_like(query[..., 0], dtype), axis=-2, keepdims=True)
    return jnp.broadcast_to(zero + log.reshape(*(1,) * (zero.ndim - 1), heads), (*key.shape[:-2], heads))
