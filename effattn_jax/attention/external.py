"""External attention: every token reads one learned memory; tokens meet only in its normaliser.

    a_is = q_i . k_s        w_is = exp(a_is) / sum_j exp(a_js)        o_i = sum_s w_is v_s / sum_s w_is

The first normalisation is over tokens j, for each slot s of the memory; causal, over j <= i. The second is then softmax_s(a_is - z_is)
with z_is the running log of the first normaliser: no constant in a denominator, and nothing overflows.
Cost O(T S (H + V)) for S slots, state S numbers a head. Source: Guo et al., arXiv:2105.02358.
"""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, floating, scale_or
from effattn_jax._derivatives import tie
from effattn_jax._products import finite, softmax
from effattn_jax.recurrence.diagonal import by_chunks, by_platform, solve

__all__ = ["ExternalState", "external_attention"]


class ExternalState(NamedTuple):
    """What causal external attention remembers.

    Attributes:
      log_total: log of the sum over tokens of exp(a) for each slot, (*B, N, S), -inf before the first; float32 at least.
      segment: id of the segment in progress, (*B,) int32.
    """

    log_total: jax.Array
    segment: jax.Array


@compiled
def external_attention(
    query: ArrayLike,
    memory_key: ArrayLike,
    memory_value: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: ArrayLike | None = None,
    initial_state: ExternalState | None = None,
    return_state: bool = False,
) -> Any:
    r"""Attention to a learned memory with double normalisation, softmax over tokens and then l1 over slots.

    Args:
      query: (*B, T, N, H).
      memory_key, memory_value: (S, K, H) and (S, K, V), S slots; K divides N, 1 shares the memory among the heads.
      mask: boolean over tokens, broadcastable to (*B, 1, 1, T); False: the token counts in no normaliser, and its output is 0.
      scale: factor on the scores; None is 1, as in the paper.
      is_causal: a token's normaliser runs over the tokens up to it.
      segment_ids: (*B, T) integers; the normaliser runs over equal ids that follow one another.
      initial_state: the state of an earlier call, which this one goes on from (causal only). Without segment_ids its last segment goes on.
      return_state: also return the state after the last token.

    Returns:
      out (*B, T, N, V) in the dtype of memory_value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head, memory O(T S); state S numbers a head. Source: arXiv:2105.02358.

    >>> import jax, jax.numpy as jnp
    >>> query, key, value = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, 6, 2, 4), (8, 2, 4), (8, 2, 3)]))
    >>> whole = external_attention(query, key, value, is_causal=True)
    >>> head, state = external_attention(query[:, :3], key, value, is_causal=True, return_state=True)
    >>> tail = external_attention(query[:, 3:], key, value, is_causal=True, initial_state=state)
    >>> bool(jnp.allclose(whole, jnp.concatenate([head, tail], axis=1), atol=1e-6))
    True
    """
    query, memory_key, memory_value = floating(query=query, memory_key=memory_key, memory_value=memory_value)
    _check_arrays(query, memory_key, memory_value)
    batch = query.shape[:-3]
    real, ids = _check_patterns(query, mask, segment_ids)
    state = _check_state(initial_state, query, memory_key, is_causal, return_state)
    query = query.reshape(prod(batch), *query.shape[-3:])
    scores = _scores(query, memory_key, memory_value, real, scale)  # (B, T, N, S)
    if is_causal:
        log_total, after = _running(scores, ids, state)
    else:
        log_total, after = _over_segments(scores, ids), None
    empty = scores == -jnp.inf
    weights = softmax(jnp.where(empty, 0, scores) - jnp.where(empty, 0, log_total))[0]
    weights = jnp.where(empty, 0, weights)
    groups = (*weights.shape[:2], memory_key.shape[1], weights.shape[2] // memory_key.shape[1], weights.shape[3])
    out = jnp.einsum("btkgs,skv->btkgv", weights.reshape(groups), memory_value.astype(weights.dtype))
    out = out.reshape(*batch, *query.shape[1:3], memory_value.shape[-1]).astype(memory_value.dtype)
    if not return_state:
        return out
    return out, jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), after)


def _scores(query: jax.Array, key: jax.Array, value: jax.Array, real: jax.Array | None, scale: Any) -> jax.Array:
    """a, (B, T, N, S), -inf for tokens that are not there."""
    dtype = accumulator(query, key, value)
    query = query if real is None else jnp.where(real[..., None, None], query, 0)
    grouped = query.reshape(*query.shape[:2], key.shape[1], query.shape[2] // key.shape[1], query.shape[3])
    scores = jnp.einsum("btkgh,skh->btkgs", grouped.astype(dtype), key.astype(dtype))
    scores = scores.reshape(*query.shape[:3], key.shape[0]) * jnp.asarray(scale_or(1.0, scale), scores.dtype)
    return scores if real is None else jnp.where(real[..., None, None], scores, -jnp.inf)


def _starts(ids: jax.Array) -> jax.Array:
    """Whether a segment begins at each step, (B, T)."""
    return jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)], constant_values=True)


def _shifted(x: jax.Array) -> jax.Array:
    """x_{t-1} over axis 1, -inf in front."""
    return jnp.concatenate([jnp.full_like(x[:, :1], -jnp.inf), x[:, :-1]], axis=1)


def _join(a: tuple, b: tuple) -> tuple:
    """The sums sum e^(m) z of two stretches as one, and whether a segment begins in it: then the first one is left out."""
    begun = b[2].reshape(*b[2].shape, *(1,) * (b[0].ndim - b[2].ndim))
    top = jnp.where(begun, b[0], jnp.maximum(a[0], b[0]))

    def scaled(level, total):  # a level of inf is its own, without inf - inf
        return total * jnp.exp(jnp.where(level == top, 0, jnp.minimum(level - top, 0)))

    return top, jnp.where(begun, 0, scaled(a[0], a[1])) + scaled(b[0], b[1]), a[2] | b[2]


@jax.custom_jvp
def _log_sums(x: jax.Array, begins: jax.Array) -> jax.Array:
    """L_i = log sum_{j <= i} exp(x_j) over time, (B, T, N, S), begun anew where `begins` (B, T).

    dL_i = sum_{j <= i} exp(x_j - L_i) dx_j is a recurrence with decays exp(L_{i-1} - L_i) <= 1.
    """
    level = jnp.maximum(x, jnp.finfo(x.dtype).min)
    nothing = (jnp.full_like(x[:, 0], jnp.finfo(x.dtype).min), jnp.zeros_like(x[:, 0]), jnp.zeros_like(begins[:, 0]))
    top, total, _ = by_chunks(_join, nothing, (level, jnp.where(x == -jnp.inf, 0, jnp.ones_like(x)), begins))
    return jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))


@_log_sums.defjvp
def _log_sums_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, begins = primals
    total = _log_sums(x, begins)
    before = jnp.where(begins[..., None, None], -jnp.inf, _shifted(total))

    def share(part):
        none = part == -jnp.inf
        return finite(jnp.where(none, 0, jnp.exp(jnp.where(none, 0, part) - jnp.where(none, 0, total))))

    return total, solve(share(before), share(x) * tangents[0], False, by_platform)


def _added(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(e^a + e^b), with finite derivatives of every order where both are -inf."""
    none = jnp.maximum(a, b) == -jnp.inf
    return jnp.where(none, -jnp.inf, jnp.logaddexp(jnp.where(none, 0, a), jnp.where(none, 0, b)))


def _within_segments(x: jax.Array, ids: jax.Array | None) -> jax.Array:
    """The log sums up to each step of its segment."""
    if x.shape[1] == 0:
        return x
    begins = jnp.zeros_like(x[:, :, 0, 0], bool) if ids is None else _starts(ids)
    return _log_sums(*tie((x, begins)))


def _running(scores: jax.Array, ids: jax.Array | None, state: ExternalState | None) -> tuple[jax.Array, ExternalState]:
    """log sum_{j <= i} exp(a_js), and the state after the last step."""
    batch, length = scores.shape[:2]
    log_total = _within_segments(scores, ids)
    last = jnp.zeros((batch,), jnp.int32) if state is None else state.segment
    if state is not None:
        old = state.log_total.astype(scores.dtype)[:, None]
        if ids is not None and length:
            goes_on = (jnp.cumsum(_starts(ids), axis=1) == 1) & (ids[:, :1] == last[:, None])
            old = jnp.where(goes_on[..., None, None], old, -jnp.inf)
        log_total = _added(log_total, old)
    if length == 0:
        nothing = jnp.full((batch, *scores.shape[2:]), -jnp.inf, scores.dtype)
        return log_total, ExternalState(nothing, last) if state is None else state
    return log_total, ExternalState(log_total[:, -1], last if ids is None else ids[:, -1])


def _over_segments(scores: jax.Array, ids: jax.Array | None) -> jax.Array:
    """log sum_j exp(a_js) over all tokens of a segment: those up to a step, and those behind it."""
    if scores.shape[1] == 0:
        return scores
    if ids is None:
        return jax.nn.logsumexp(scores, axis=1, keepdims=True)
    turned = jnp.flip(ids, 1)
    behind = jnp.where(
        _starts(turned)[..., None, None], -jnp.inf, _shifted(_within_segments(jnp.flip(scores, 1), turned))
    )
    return _added(_within_segments(scores, ids), jnp.flip(behind, 1))


def _check_arrays(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if query.ndim < 3:
        raise ValueError(f"query must have shape (*B, T, N, H); got {query.shape}")
    heads, dim = query.shape[-2:]
    if key.ndim != 3 or key.shape[2] != dim or key.shape[0] < 1 or key.shape[1] < 1 or heads % key.shape[1]:
        raise ValueError(
            f"memory_key must have shape (S, K, H) with H={dim}, S > 0 and K dividing N={heads}; got {key.shape}"
        )
    if value.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(f"memory_value must have shape (S, K, V) with (S, K) = {key.shape[:2]}; got {value.shape}")


def _check_patterns(query: jax.Array, mask: Any, segment_ids: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """(mask over tokens, segment ids), (B, T) each or None."""
    batch, length = query.shape[:-3], query.shape[-3]
    if mask is not None:
        mask, full = jnp.asarray(mask), (*batch, 1, 1, length)
        shape = (1,) * (len(full) - mask.ndim) + mask.shape
        fits = len(shape) == len(full) and all(a in (1, b) for a, b in zip(shape, full, strict=True))
        if mask.dtype != jnp.bool_ or not fits:
            raise ValueError(
                f"mask must be boolean over tokens, True = real, and broadcast to (*B, 1, 1, T) = {full}; got {mask.dtype} {mask.shape}"
            )
        mask = jnp.broadcast_to(mask.reshape(shape), full).reshape(prod(batch), length)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        if segment_ids.shape != (*batch, length) or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids must be integers of shape (*B, T) = {(*batch, length)}; got {segment_ids.dtype} {segment_ids.shape}"
            )
        segment_ids = segment_ids.astype(jnp.int32).reshape(prod(batch), length)
    return mask, segment_ids


def _check_state(state: Any, query: jax.Array, key: jax.Array, is_causal: bool, return_state: bool) -> Any:
    """The state with one batch axis."""
    if not is_causal and (state is not None or return_state):
        raise ValueError("initial_state and return_state need is_causal=True: a state holds the past only")
    if state is None:
        return None
    batch = query.shape[:-3]
    want = (*batch, query.shape[-2], key.shape[0])
    if not isinstance(state, ExternalState) or state.log_total.shape != want:
        got = state.log_total.shape if isinstance(state, ExternalState) else type(state).__name__
        raise ValueError(f"initial_state must be an ExternalState with log_total (*B, N, S) = {want}; got {got}")
    return jax.tree.map(lambda x: x.reshape(prod(batch), *x.shape[len(batch) :]), state)
