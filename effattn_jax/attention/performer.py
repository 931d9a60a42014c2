"""Performer: softmax attention estimated by random features, in linear time.

    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)       E phi(q).phi(k) = exp(q.k)       j <= i when causal
    phi(x) = M^(-1/2) exp(w.x - |x|^2 / 2),  w ~ N(0, I)

Cost O(T M (C + H + V)) a head for M features and chunks of C, memory O(T), state M x V, M and one level a key head.
Source: Choromanski et al., arXiv:2009.14794.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, choose, floating, scale_or
from effattn_jax.attention import _frame, _leveled
from effattn_jax.attention._frame import LinearState
from effattn_jax.attention.random_features import (
    KERNELS,
    Kernel,
    Weights,
    best_temper,
    optimal_damping,
    prepare,
    random_features,
)

__all__ = ["performer_attention"]

_ESTIMATORS = ("plain", "optimal", "tempered")


@compiled
def performer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    projection: ArrayLike,
    kernel: str = "softmax",
    estimator: str = "plain",
    input_scale: float = 0.5,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Softmax attention estimated with random features: o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j).

    With y = scale^(1/2) x:  softmax phi(x) = exp(w.y - |y|^2 / 2);  trigonometric phi(x) = exp(|y|^2 / 2) [cos w.y, sin w.y];  relu
    phi(x) = max(w.x, 0) + 1e-3. Softmax features are exact in float32 for keys of any norms: each key's greatest exponent is kept apart from
    its features, and each query is measured against the greatest among the keys that it sees. Only where the exponents of a query and of a key
    both range over more than 87 (norms of both above about 12 after scaling, far beyond what the estimate is good for) is their weight lost.

    The estimate is good for small norms only. Relative RMS error of the output against softmax attention, H = 64, 512 keys, entries of query
    and key N(0, std^2), by number of features M (`python -m benchmarks.performer`, 16 draws each, 2 x86_64 cores, 2026-11-26):

        std   projection and estimator                      M = 64          M = 256         M = 1024
        0.25  independent rows, plain                       0.130 +- 0.009  0.067 +- 0.004  0.034 +- 0.002
        0.25  orthogonal, plain                             0.109 +- 0.005  0.054 +- 0.003  0.027 +- 0.002
        0.25  orthogonal, optimal                           0.105 +- 0.005  0.052 +- 0.003  0.026 +- 0.002
        0.25  antithetic, norms="fixed", tempered           0.060 +- 0.003  0.015 +- 0.001  0.008 +- 0.000
        0.5   independent rows, plain                       0.72 +- 0.04    0.44 +- 0.02    0.26 +- 0.02
        0.5   orthogonal, plain                             0.69 +- 0.06    0.45 +- 0.06    0.25 +- 0.01
        0.5   orthogonal, optimal                           0.64 +- 0.05    0.37 +- 0.03    0.20 +- 0.01
        0.5   antithetic, norms="fixed", tempered           0.203 +- 0.008  0.143 +- 0.006  0.107 +- 0.004
        1.0   any of the first three                        3.7             3.4             3.0  (useless)
        1.0   antithetic, norms="fixed", tempered           0.74            0.70            0.67 (little more than a mean of values)

    At 1.0 the figures grow with the number of keys (2.7 at M = 256 with 256 keys), for what is estimated shrinks with it. Queries and keys
    from a trained model are rarely small enough: normalise them, or lower `scale`.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias: refused: there are no pairwise scores to add it to.
      mask: boolean over keys, broadcastable to (*B, 1, 1, S); True = attend. A mask over (query, key) pairs is refused.
      projection: (M, H), the directions w of `random_features`. Another draw comes from another key, never from the data.
      kernel: "softmax" (positive features, FAVOR+), "trigonometric" (2 M features whose sums may come near 0 or below; for comparison)
        or "relu".
      estimator: of the softmax kernel. "plain" is unbiased; "optimal" too, with the damping exp(A |w|^2) of least variance; "tempered" takes
        t <= 1 times the scores, a bias that costs less than the variance it saves.
      input_scale: the standard deviation of query and key that A and t are chosen for; the other estimators do not read it.
      scale: factor on the scores q.k; None is 1 / sqrt(H), as in the softmax attention that is estimated, and 1 for "relu".
      is_causal: query i sees keys up to i, ends aligned: with T < S the last query sees every key.
      segment_ids: (*B, T), or a pair for query and key; only equal ids interact and the state restarts at a boundary. A pair of different
        arrays costs O(T S) time (still O(T) memory).
      initial_state: the state of an earlier call, which this one goes on from (causal only). Without segment_ids its last segment goes on.
      return_state: also return the state after the last key.
      implementation: "chunked" or "dense" (all pairs, a block of queries at a time); None is "chunked".
      chunk_size: steps a chunk; None is 128, or 512 where every query sees every key.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T M (C + H + V)) a head, state M V + M + 1 a key head. Sources: arXiv:2009.14794; "optimal": arXiv:2205.15317.

    >>> import jax, jax.numpy as jnp
    >>> q, k, v = 0.3 * jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> w = random_features(jax.random.key(1), 256, 8)
    >>> estimate = jax.jit(performer_attention)(q, k, v, projection=w)
    >>> exact = jax.nn.dot_product_attention(q, k, v)
    >>> bool(jnp.max(jnp.abs(estimate - exact)) < 0.02)
    True
    """
    choose("kernel", kernel, KERNELS)
    choose("estimator", estimator, _ESTIMATORS)
    call, mask = _frame.open_call(
        "performer_attention", (query, key, value, bias, mask), scale=scale if kernel == "relu" else None, is_causal=is_causal,
        segment_ids=segment_ids, initial_state=initial_state, return_state=return_state, implementation=implementation,
        chunk_size=chunk_size, one_sequence=False,
    )  # fmt: skip
    weights = _weights(call, projection, kernel, estimator, input_scale, scale)
    features = weights.projection.shape[0] * KERNELS[kernel].features
    state = _frame.check_state(initial_state, call, features, total=True, level=True)
    out, state = _attend(KERNELS[kernel], weights, call, mask, is_causal, state, chunk_size, implementation)
    return _frame.close_call(call, out, state, return_state)


def _weights(call: Call, projection: Any, kernel: str, estimator: str, input_scale: float, scale: Any) -> Weights:
    (projection,) = floating(projection=projection)
    dim = call.query.shape[-1]
    if projection.ndim != 2 or projection.shape[1] != dim or projection.shape[0] == 0:
        raise ValueError(f"projection must have shape (M, H) with H = {dim}; got {projection.shape}")
    if estimator != "plain" and kernel != "softmax":
        raise ValueError(f"estimator={estimator!r} belongs to kernel='softmax'; got kernel={kernel!r}")
    if not isinstance(input_scale, numbers.Real) or input_scale <= 0:
        raise ValueError(
            f"input_scale must be a positive number, the standard deviation of query and key; got {input_scale!r}"
        )
    if isinstance(scale, numbers.Real) and scale <= 0 and kernel != "relu":
        raise ValueError(f"scale must be positive: query and key are each multiplied by its square root; got {scale!r}")
    damping = 0.0
    if estimator != "plain":
        if not isinstance(scale, numbers.Real | None):
            raise ValueError(f"scale must be None or a number with estimator={estimator!r}; got {type(scale).__name__}")
        norm = 2 * input_scale**2 * dim * scale_or(dim**-0.5, scale)  # E |q + k|^2, the scale in q and k
        damping = optimal_damping(norm, dim) if estimator == "optimal" else 0.0
    scale = scale_or(dim**-0.5, scale)
    if estimator == "tempered":
        scale = scale * best_temper(norm, dim, projection.shape[0])
    return prepare(kernel, projection, scale, damping, accumulator(call.query, call.key, call.value))


def _attend(
    kernel: Kernel, weights: Weights, call: Call, mask: jax.Array | None, is_causal: bool, state: LinearState | None,
    size: int | None, implementation: str | None,
) -> tuple[jax.Array, LinearState | None]:  # fmt: skip
    """The call with one batch axis."""
    length, keys = call.query.shape[1], call.key.shape[1]
    if max(length, keys) == 0:
        out = jnp.zeros((*call.query.shape[:3], call.value.shape[-1]), call.value.dtype)
        return out, _nothing(kernel, weights, call) if state is None else state
    if implementation == "dense" or call.query_segments is not call.key_segments:
        return _leveled.pairwise(kernel, weights, call, mask, is_causal), None
    if not is_causal and call.query_segments is None:
        return _leveled.without_order(kernel, weights, call, mask, size), None
    problem = _frame.align(call, mask)
    if is_causal:
        out, state = _frame.causal(_leveled.chunked(kernel, weights), problem, state, size)
    else:
        parts = _frame.both_ways(_leveled.chunked(kernel, weights, split=True), problem, size)
        out = _leveled.joined(*parts, call.value.dtype)
    return out[:, problem.skipped :], state


def _nothing(kernel: Kernel, weights: Weights, call: Call) -> LinearState:
    batch, _, heads, _ = call.key.shape
    features = weights.projection.shape[0] * kernel.features
    return _empty(batch, heads, features, call.value.shape[-1], weights.projection.dtype)


def _empty(batch: Any, heads: int, features: int, value_dim: int, dtype: Any) -> LinearState:
    lead = (batch,) if isinstance(batch, int) else tuple(batch)
    kv = jnp.zeros((*lead, heads, features, value_dim), dtype)
    top = jnp.full((*lead, heads, 1), _frame.lowest(dtype), dtype)
    return LinearState(kv, kv[..., 0], jnp.zeros(lead, jnp.int32), top)


# The lines of the table


def draw(
    rng: jax.Array, num_heads: int, num_kv_heads: int, head_dim: int, num_features: int | None = None
) -> dict[str, jax.Array]:
    """The projection of the table's line: four directions a dimension of a head, 256 for H = 64, where their number is None."""
    del num_heads, num_kv_heads
    return {"projection": random_features(rng, 4 * head_dim if num_features is None else num_features, head_dim)}


def empty_state(
    batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype, num_features=None, kernel="softmax"
) -> LinearState:
    """The state before the first token with the projection of `draw`; `capacity` does not matter, the state never grows."""
    del capacity, num_heads
    features = (4 * head_dim if num_features is None else num_features) * KERNELS[kernel].features
    return _empty(batch, num_kv_heads, features, value_dim, accumulator(dtype))
