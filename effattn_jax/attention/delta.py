"""The delta rule: linear attention that writes what a key should return, in place of adding to what it returns.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T          o_t = S_t^T q_t

The decay is a number a head, so it may come before or after the projection. As S_t = exp(g_t) S_{t-1} + k_t u_t^T with
u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t), it is the outer-product recurrence of k and u, and u solves a triangular system of a chunk:

    (I + L) U = beta (V - K S_0 decayed)          L_ij = beta_i exp(g_{j+1} + ... + g_i) k_i . k_j          j < i

Cost O(T (C^2 + C V + H V)) a head, state H x V. Source: Yang et al., arXiv:2406.06484; with decay arXiv:2412.06464.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, Call, accumulator, floating
from effattn_jax._derivatives import Fixed
from effattn_jax.attention import _frame
from effattn_jax.recurrence._outer_chunks import (
    FLOOR,
    Options,
    allowed_pairs,
    chunk,
    decays_of,
    heads_first,
    masked,
    read_state,
    repeat_heads,
    weights_of_pairs,
)
from effattn_jax.recurrence._outer_kernel import over_chunks
from effattn_jax.recurrence.outer_product import check_decay

__all__ = ["delta_rule_attention"]


@compiled
def delta_rule_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    beta: ArrayLike,
    log_decay: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: _frame.LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Linear attention by the delta rule: S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t.

    Keys are used as they are; the caller normalises them. With |k_t| = 1 and beta in (0, 2) no step lets the state grow; beta = 1 then makes
    k_t return exactly v_t. Steps with beta |k|^2 > 2 amplify, as the recurrence says.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N, keys and values are repeated to N heads.
      bias, mask: as for `linear_attention`: no bias; a mask over keys only. A masked step changes nothing: no decay, no write.
      beta: strength of each write, (*B, S, N).
      log_decay: g, (*B, S, N); <= 0, -inf forgets everything. None is no decay (DeltaNet); with it the gated delta rule.
      scale: factor on query; None is 1.
      is_causal: query i sees keys up to i, ends aligned. If False, the same rule over reversed time adds exp(g_i) S'_{i+1}^T q_i, S' the
        state of the keys after i.
      segment_ids: (*B, T), as for `linear_attention`; a pair of different arrays is refused.
      initial_state, return_state: as for `linear_attention`.
      implementation: "chunked" or None.
      chunk_size: steps a chunk; None is 64.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (C^2 + C V + H V)) a head, state H V. Source: arXiv:2406.06484, arXiv:2412.06464.

    >>> import jax.numpy as jnp
    >>> key = jnp.eye(2)[jnp.array([0, 1, 0])][None, :, None]  # the first key is written twice: the second value replaces the first
    >>> value, beta = jnp.array([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1), jnp.ones((1, 3, 1))
    >>> print(delta_rule_attention(key, key, value, beta=beta, is_causal=True)[0, :, 0, 0])
    [5. 6. 7.]
    """
    _frame.refuse("delta_rule_attention", implementation, "dense", "parallel")
    call, mask = _frame.open_call(
        "delta_rule_attention", (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
    heads = call.query.shape[2]
    beta, log_decay = _check_steps(beta, log_decay, call, heads)
    call = call._replace(key=repeat_heads(call.key, call.query), value=repeat_heads(call.value, call.query))
    features = call.key.shape[3]
    state = _frame.check_state(initial_state, call, features, total=False)
    if max(call.query.shape[1], call.key.shape[1]) == 0 or (call.query.shape[1] == 0 and not return_state):
        out, state = _frame.nothing(call, state, features, total=False)
        return _frame.close_call(call, out, state, return_state)
    problem = _frame.align(call, mask, (beta, log_decay))
    if is_causal:
        out, state = _frame.causal(_kernel, problem, state, chunk_size)
    else:
        past, future = _frame.both_ways(partial(_kernel, split=True), problem, chunk_size)
        out = (past + future).astype(call.value.dtype)
    return _frame.close_call(call, out[:, problem.skipped :], state, return_state)


def _check_steps(beta: Any, log_decay: Any, call: Call, heads: int) -> tuple[jax.Array, jax.Array | None]:
    """beta and log_decay as (B, S, N)."""
    (beta,) = floating(beta=beta)
    want = (*call.batch, call.key.shape[1], heads)
    if beta.shape != want:
        raise ValueError(f"beta must have shape (*B, S, N) = {want}; got {beta.shape}")
    log_decay = check_decay(log_decay, call.key, heads, call.batch)
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError(f"log_decay must have shape (*B, S, N) = {want}: one decay a head; got one a feature")
    return beta.reshape(call.key.shape[0], *beta.shape[len(call.batch) :]), log_decay


def _kernel(query, key, value, extras, carry, *, size, strict=False, split=False, **marks):
    """The delta rule as a kernel of the frame; `split` returns a sum to be added to another."""
    dtype = accumulator(query, key, value)
    if carry is None:
        z = jnp.zeros_like(key[:, 0], dtype)
        carry = (jnp.zeros_like(z[..., None] * value[:, 0, :, None].astype(dtype)),)
    body = Fixed(_chunk, Options(strict=strict, split=split), value.dtype)
    beta, log_decay = extras
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay, FLOOR)  # the backward pass of a chunk takes -inf for what is not finite
    out, (state, _) = over_chunks(
        body, (carry[0], None), (query, key, value, beta, log_decay), size=min(size or 64, key.shape[1]), **marks
    )
    return out, (state, None, None)


def _chunk(options: Options, out_dtype: Any, carry: Any, inputs: Any, marks: Any) -> tuple[Any, Any]:
    """One chunk: what its steps write, and then the outer-product recurrence of keys and writes."""
    state, _ = carry
    q, k, v, beta, log_decay = inputs
    k, v, beta = (masked(x, marks.key_mask).astype(state.dtype) for x in (k, v, beta))
    writes = _writes(k, v, beta, log_decay, state, marks)
    return chunk(options, out_dtype, carry, (q, k, writes, log_decay), marks)


def _writes(k, v, beta, log_decay, state, marks) -> jax.Array:
    """U of a chunk, (B, C, N, V), from keys, values and the state before it; NaN from the first step on that is not finite."""
    k, v, beta = (heads_first(x, state.dtype) for x in (k, v, beta))
    bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1) & jnp.isfinite(beta))
    k, v, beta = (jnp.where(jnp.isfinite(x), x, 0) for x in (k, v, beta))
    decay = None
    if log_decay is not None:
        decay = decays_of(heads_first(masked(log_decay, marks.key_mask), state.dtype))
        bad = bad | decay.bad
    earlier = allowed_pairs(marks, k.shape[2], strict=True)
    pairs = weights_of_pairs(Options(), k[:, :, None], k, decay, earlier)[:, :, 0]
    inverse, overflow = _unit_inverse(beta[..., None] * pairs)
    old, _ = read_state(Options(), (k if decay is None else k * decay.to_step)[:, :, None], state, None, marks)
    right = beta[..., None] * (v - old[:, :, 0])
    bad = bad | overflow | ~jnp.isfinite(right).all(-1)
    writes = jnp.einsum(
        "bkij,bkjv->bkiv", inverse, jnp.where(jnp.isfinite(right), right, 0), precision=lax.Precision.HIGHEST
    )
    seen = jnp.broadcast_to(allowed_pairs(marks, k.shape[2], strict=False), (k.shape[0], *earlier.shape[1:]))
    spoiled = jnp.einsum("bij,bkj->bki", seen.astype(k.dtype), bad.astype(k.dtype)) > 0
    return jnp.moveaxis(jnp.where(spoiled[..., None], jnp.nan, writes), 2, 1)


def _unit_inverse(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(I + L)^-1 for strictly lower L (..., C, C), and the rows that overflowed: blocks of doubling size, each

        [A    ]^-1   [     A^-1          ]
        [L   D]    = [-D^-1 L A^-1   D^-1]

    Every product is the effect of one step on another through those between, so with contracting steps nothing grows. Row i is made of rows
    up to i alone: what is not finite becomes 0 at once, so that no 0 * Inf carries it into an earlier row.
    """
    size = lower.shape[-1]
    block = np.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape) + jnp.zeros_like(lower)
    overflow = ~jnp.isfinite(lower).all(-1)
    lower = jnp.where(jnp.isfinite(lower), lower, 0)
    while block.any():
        half, block = block, block // 2
        corner = (block[:, None] == block[None]) & (half[:, None] > half[None])
        product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        effect = product(jnp.where(corner, lower, 0), inverse)
        overflow = overflow | ~jnp.isfinite(effect).all(-1)
        effect = product(inverse, jnp.where(jnp.isfinite(effect), effect, 0))
        overflow = overflow | ~jnp.isfinite(effect).all(-1)
        inverse = inverse - jnp.where(jnp.isfinite(effect), effect, 0)
    return inverse, overflow
