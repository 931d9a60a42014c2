"""Performer: softmax attention estimated by random features, in linear time.

    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)       E phi(q).phi(k) = exp(q.k)       j <= i when causal
    phi(x) = M^(-1/2) exp(w.x - |x|^2 / 2),  w ~ N(0, I)

Cost O(T M (C + H + V)) a head for M features and chunks of C, memory O(T), state M x V, M and one level a key head.
Source: Choromanski et al., arXiv:2009.14794.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, Call, accumulator, choose, floating
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

    Args:
      projection: (M, H), the directions w of `random_features`. Draw others by another key; nothing here depends on the data of the batch.

    >>> import jax, jax.numpy as jnp
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
    state = _frame.check_state(initial_state, call, features, total=True, maximum=1)
    out, state = _attend(KERNELS[kernel], weights, call, mask, is_causal, state, chunk_size, implementation)
    return _frame.close_call(call, out, state, return_state)


def _weights(
    call: Call, projection: Any, kernel: str, estimator: str, input_scale: float, scale: Any
) -> Weights:
    (projection,) = floating(projection=projection)
    dim = call.query.shape[-1]
    if projection.ndim != 2 or projection.shape[1] != dim or projection.shape[0] == 0:
        raise ValueError(f"projection must have shape (M, H) with H = {dim}; got {projection.shape}")
    if estimator != "plain" and kernel != "softmax":
        raise ValueError(f"estimator={estimator!r} belongs to kernel='softmax'; got kernel={kernel!r}")
    if not isinstance(input_scale, int | float) or input_scale <= 0:
        raise ValueError(f"input_scale must be a positive number, the standard deviation of query and key; got {input_scale!r}")
    if isinstance(scale, int | float) and scale <= 0 and kernel != "relu":
        raise ValueError(f"scale must be positive: query and key are each multiplied by its square root; got {scale!r}")
    damping = 0.0
    if estimator != "plain":
        norm = 2 * input_scale**2 * dim * float(dim**-0.5 if scale is None else scale)  # E |q + k|^2, the scale in q and k
        damping = optimal_damping(norm, dim) if estimator == "optimal" else 0.0
    scale = dim**-0.5 if scale is None else scale
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


def draw(rng: jax.Array, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, jax.Array]:
    """The projection of the table's line: four directions a dimension of a head, 256 for H = 64."""
    del num_heads, num_kv_heads
    return {"projection": random_features(rng, 4 * head_dim, head_dim)}


def empty_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype) -> LinearState:
    """The state before the first token with the projection of `draw`; `capacity` does not matter, the state never grows."""
    del capacity, num_heads
    return _empty(batch, num_kv_heads, 4 * head_dim, value_dim, accumulator(dtype))
