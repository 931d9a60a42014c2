"""The outer-product recurrence, the core of every linear attention.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t          (z_t = exp(g_t) z_{t-1} + k_t, o_t / (q_t . z_t) when normalised)

In chunks of C steps: pairs inside a chunk by a masked C x C product, everything older through the state at its start. Cost
O(T (C + H) V), state H x V a head. Only sums of decays between two steps are exponentiated, each <= 0, so nothing overflows.
Source: Katharopoulos et al., arXiv:2006.16236; with decays Yang et al., arXiv:2312.06635.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import ArrayLike, accumulator, check_call, choose, floating, positive
from effattn_jax._derivatives import tie
from effattn_jax.recurrence._chunks import scan_chunks

__all__ = ["outer_product_recurrence"]

_FLOOR = -1000.0  # exp of it is 0 in float32 and float64, and sums of it stay finite where -inf - -inf would not


class Options(NamedTuple):
    """What a chunk does, fixed at trace time."""

    normalize: bool = False  # divide by q . z
    split: bool = False  # return numerator and denominator apart
    strict: bool = False  # leave out each step's own pair
    feature_map: Callable | None = None  # applied to query and key inside the chunk, where they are still in cache


_DEFAULT = Options()


class Marks(NamedTuple):
    """Integers and booleans (B, T) that say which steps may interact; None where all may."""

    run: jax.Array | None = None  # number of the segment a step is in, counted along time
    run_before: jax.Array | None = (
        None  # number of the segment that the state at the start of the step's chunk belongs to
    )
    key_mask: jax.Array | None = None  # whether the step's key and value exist


def runs(segment_ids: jax.Array, last_id: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments numbered along time (a state before the first step has number 0), and the number at each chunk's start."""
    before = segment_ids[:, :1] if last_id is None else last_id[:, None]
    change = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(change.astype(jnp.int32), axis=1)
    ends = jnp.concatenate([jnp.zeros_like(run[:, :1]), run[:, size - 1 : -1 : size]], axis=1)
    return run, jnp.repeat(ends, size, axis=1)


def _between(decay: jax.Array) -> jax.Array:
    """Sums of decays over (j, i] for every pair of a chunk: (B, C, ...) -> (B, i, j, ...).

    A product with ones, not a difference of cumulative sums: each entry adds only its own terms, so small sums beside large ones stay exact.
    """
    size = decay.shape[1]
    later = jnp.tril(jnp.ones((size, size), bool), -1).reshape(size, size, *(1,) * (decay.ndim - 2))
    terms = jnp.where(later, decay[:, :, None], 0)
    upto = jnp.tril(jnp.ones((size, size), decay.dtype))
    return jnp.einsum("im,bmj...->bij...", upto, terms, precision=lax.Precision.HIGHEST)


def _allowed(marks: Marks, size: int, strict: bool) -> jax.Array:
    """Which pairs of a chunk interact, (B | 1, i, j)."""
    allowed = jnp.tril(jnp.ones((1, size, size), bool), -1 if strict else 0)
    if marks.run is not None:
        allowed = allowed & (marks.run[:, :, None] == marks.run[:, None, :])
    return allowed


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with trailing axes of size 1 up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _heads(x: jax.Array) -> jax.Array:
    """Axes K and G back as N."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _inside(q, k, v, decay_between, allowed, dtype):
    """Pairs of one chunk: scores (B, K, G, i, j), their product with the values, and which rows met a value that is not finite.

    0 * NaN is NaN: values enter the masked product with what is not finite set to 0, and rows that may see such a value become NaN again.
    """
    if decay_between is None:
        scores = jnp.einsum("bikgh,bjkh->bkgij", q, k)
    elif decay_between.ndim == 4:  # one decay a head
        weight = jnp.exp(jnp.where(allowed[..., None], decay_between, -jnp.inf))
        scores = jnp.einsum("bikgh,bjkh->bkgij", q, k) * jnp.moveaxis(weight, 3, 1)[:, :, None]
    else:  # one decay a feature
        weight = jnp.exp(jnp.where(allowed[..., None, None], decay_between, -jnp.inf))
        scores = jnp.einsum("bikgh,bijkh->bkgij", q, k[:, None] * weight)
    scores = jnp.where(allowed[:, None, None], scores, 0)
    finite = jnp.isfinite(v)
    out = jnp.einsum("bkgij,bjkv->bikgv", scores, jnp.where(finite, v, 0))
    bad = jnp.any(~finite, axis=-1).astype(dtype)
    poisoned = (
        jnp.einsum("bij,bjk->bik", jnp.broadcast_to(allowed, (v.shape[0], *allowed.shape[1:])).astype(dtype), bad) > 0
    )
    return scores, out, poisoned[..., None]


def _chunk(options: Options, out_dtype: Any, carry: Any, inputs: Any, marks: Marks) -> tuple[Any, Any]:
    """One chunk: the state (B, K, H, V) [and (B, K, H)] before it, its steps, the state after it and the outputs."""
    state, total = carry
    dtype = state.dtype
    q, k, v, decay = inputs
    k, v = k.astype(dtype), v.astype(dtype)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]).astype(
        dtype
    )  # here, not outside: there it would copy the whole array
    if options.feature_map is not None:
        q, k = options.feature_map(q), options.feature_map(k)
    if marks.key_mask is not None:
        k, v = (jnp.where(_spread(marks.key_mask, x), x, 0) for x in (k, v))
    allowed = _allowed(marks, q.shape[1], options.strict)
    between = from_start = None
    q_state, k_state, kept = q, k, 1
    if decay is not None:
        decay = jnp.maximum(decay.astype(dtype), _FLOOR)
        between, from_start = _between(decay), jnp.cumsum(decay, axis=1)
        q_state = q * jnp.exp(_spread(from_start[:, :, :, None], q))
        k_state = k * _spread(jnp.exp(between[:, -1]), k)
        kept = jnp.exp(from_start[:, -1])
    scores, numerator, poisoned = _inside(q, k, v, between, allowed, dtype)
    old = jnp.einsum("bikgh,bkhv->bikgv", q_state, state)
    old_total = None if total is None else jnp.einsum("bikgh,bkh->bikg", q_state, total)
    v_state = v
    if marks.run is not None:
        sees_state = marks.run == marks.run_before
        old = jnp.where(_spread(sees_state, old), old, 0)
        old_total = None if total is None else jnp.where(_spread(sees_state, old_total), old_total, 0)
        last = marks.run[:, -1:]
        k_state, v_state = (jnp.where(_spread(marks.run == last, x), x, 0) for x in (k_state, v))
        goes_on = (last == marks.run_before[:, -1:])[:, :, None]
        state = jnp.where(goes_on[..., None], state, 0)
        total = None if total is None else jnp.where(goes_on, total, 0)
    numerator = _heads(jnp.where(poisoned[..., None], jnp.nan, numerator + old))
    after = (
        _spread(kept, state) * state + jnp.einsum("bjkh,bjkv->bkhv", k_state, v_state)
        if decay is not None
        else state + jnp.einsum("bjkh,bjkv->bkhv", k_state, v_state)
    )
    if total is None:
        return (after, None), numerator.astype(out_dtype)
    denominator = _heads(jnp.moveaxis(scores.sum(-1), 3, 1) + old_total)
    total = (total if decay is None else _spread(kept, total) * total) + k_state.sum(1)
    if options.split:
        return (after, total), (numerator, denominator)
    return (after, total), normalized(numerator, denominator).astype(out_dtype)


def normalized(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 with zero gradient where there was nothing to normalise."""
    empty = (denominator == 0)[..., None]
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator[..., None]))


def outer_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: tuple[jax.Array, jax.Array | None] | None,
    *,
    segments: jax.Array | None = None,
    last_segment: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    size: int | None = None,
    options: Options = _DEFAULT,
) -> tuple[Any, tuple[jax.Array, jax.Array | None]]:
    """The chunked kernel behind every member of the family: query (B, T, N, H), key (B, T, K, H), value (B, T, K, V), T >= 1.

    Returns (out, (S, z)): out (B, T, N, V), or (numerator, denominator) with `options.split`.
    """
    length = query.shape[1]
    per_feature = log_decay is not None and log_decay.ndim == 4
    size = min(size or (16 if per_feature else 64), length)
    dtype = accumulator(query, key, value)
    if state is None:
        k0 = key[:, 0] if options.feature_map is None else options.feature_map(key[:, 0].astype(dtype))
        z = jnp.zeros_like(k0, dtype)
        state = (
            jnp.zeros_like(jnp.einsum("bkh,bkv->bkhv", z, value[:, 0].astype(dtype))),
            z if options.normalize else None,
        )
    arrays = (query, key, value, log_decay, state, segments, last_segment, key_mask)
    query, key, value, log_decay, state, segments, last_segment, key_mask = tie(arrays)
    missing = -length % size

    def pad(x):
        return x if x is None or missing == 0 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    if segments is not None:
        segments = segments if missing == 0 else jnp.pad(segments, [(0, 0), (0, missing)], mode="edge")
    marks = Marks(*(runs(segments, last_segment, size) if segments is not None else (None, None)), pad(key_mask))
    body = partial(_chunk, options, value.dtype)
    state, out = scan_chunks(body, state, tuple(map(pad, (query, key, value, log_decay))), marks, size=size)
    return (jax.tree.map(lambda x: x[:, :length], out) if missing else out), state


def _step_by_step(query, key, value, log_decay, state, *, segments=None, options=_DEFAULT, **_):
    """The recurrence as it is written, one step at a time."""
    dtype = accumulator(query, key, value)
    begins = jnp.zeros(query.shape[:2], bool)
    if segments is not None:
        begins = begins.at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
    decay = jnp.zeros_like(key[..., 0], dtype) if log_decay is None else log_decay.astype(dtype)
    kept = jnp.exp(decay if decay.ndim == 4 else decay[..., None])

    def step(carry, x):
        q, k, v, a, begin = x
        state, total = carry
        state = jnp.where(begin[:, None, None, None], 0, state * a[..., None]) + k[..., None] * v[..., None, :]
        out = jnp.einsum("bkh,bkhv->bkv", q, state)
        if total is not None:
            total = jnp.where(begin[:, None, None], 0, total * a) + k
            out = normalized(out, jnp.einsum("bkh,bkh->bk", q, total))
        return (state, total), out

    if state is None:
        zero = jnp.zeros_like(key[:, 0], dtype)
        state = (
            jnp.zeros_like(jnp.einsum("bkh,bkv->bkhv", zero, value[:, 0].astype(dtype))),
            zero if options.normalize else None,
        )
    steps = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (query.astype(dtype), key.astype(dtype), value.astype(dtype), kept, begins)
    )
    state, out = lax.scan(step, state, steps)
    return jnp.moveaxis(out, 0, 1).astype(value.dtype), state


_FORMS: dict[str | None, Callable] = {None: outer_product, "chunked": outer_product, "scan": _step_by_step}


def check_decay(log_decay: ArrayLike | None, key: jax.Array, heads: int, batch: tuple[int, ...]) -> jax.Array | None:
    """log_decay as (B, S, N) or (B, S, N, H), or the ValueError that says what it must be. key has its batch axes flattened."""
    if log_decay is None:
        return None
    (log_decay,) = floating(log_decay=log_decay)
    want = (*batch, key.shape[1], heads)
    if log_decay.shape not in (want, (*want, key.shape[-1])):
        raise ValueError(
            f"log_decay must have shape (*B, T, N) = {want} or (*B, T, N, H) = {(*want, key.shape[-1])}; got {log_decay.shape}"
        )
    return log_decay.reshape(key.shape[0], *log_decay.shape[len(batch) :])


def outer_product_recurrence(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    log_decay: ArrayLike | None = None,
    initial_state: Any = None,
    segment_ids: ArrayLike | None = None,
    return_state: bool = False,
    normalize: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Runs S_t = diag(exp(log_decay_t)) S_{t-1} + key_t value_t^T and reads o_t = S_t^T query_t.

    Args:
      query: (*B, T, N, H).
      key: (*B, T, K, H), K dividing N; heads are repeated.
      value: (*B, T, K, V).
      log_decay: (*B, T, N) or, one a feature, (*B, T, N, H); <= 0, -inf forgets. None is no decay. It is applied before the new pair is added.
      initial_state: S before the first step, (*B, N, H, V); with `normalize` the pair (S, z), z (*B, N, H). It belongs to the first segment.
      segment_ids: (*B, T) integers; the state restarts wherever the id changes.
      return_state: also return the last state, in the form of `initial_state`.
      normalize: divide o_t by query_t . z_t, z_t the sum of keys under the same decay; 0 where that is 0.
      chunk_size: steps a chunk; None is 64, or 16 with a decay for each feature.
      implementation: "chunked" (products of matrices, O(T) memory in both passes) or "scan" (step by step); None is "chunked".

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state); states are float32 at least.

    Raises:
      ValueError: for shapes that do not fit or an unknown implementation; it names the argument, its shape and the rule.

    Cost O(T (C + H) V) a head, state H V. Source: arXiv:2006.16236, arXiv:2312.06635.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> out, state = outer_product_recurrence(ones, ones, ones, log_decay=jnp.full((1, 3, 1), jnp.log(0.5)), return_state=True)
    >>> print(out[0, :, 0, 0], state.shape)
    [1.   1.5  1.75] (1, 1, 1, 1)
    """
    choose("implementation", implementation, _FORMS)
    positive(chunk_size=chunk_size)
    call = check_call(query, key, value, None, None, is_causal=True, segment_ids=segment_ids, stateful=True)
    query, key, value = call.query, call.key, call.value
    length, heads = query.shape[1:3]
    if key.shape[1] != length:
        raise ValueError(f"key must have the length T of query; got query {query.shape}, key {key.shape}")
    log_decay = check_decay(log_decay, key, heads, call.batch)
    key, value = (jnp.repeat(x, heads // key.shape[2], axis=2) for x in (key, value))
    state = _check_state(initial_state, normalize, (*call.batch, heads, key.shape[-1], value.shape[-1]), call)
    if length == 0:
        state = (
            _check_state(None, normalize, (*call.batch, heads, key.shape[-1], value.shape[-1]), call, fill=True)
            if state is None
            else state
        )
        out = value.reshape(*value.shape[:2], heads, value.shape[-1])
    else:
        out, state = _FORMS[implementation](
            query, key, value, log_decay, state,
            segments=call.query_segments, size=chunk_size, options=Options(normalize=normalize),
        )  # fmt: skip
    out = call.restore(out)
    if not return_state:
        return out
    state = jax.tree.map(call.restore, state)
    return out, (state if normalize else state[0])


def _check_state(state: Any, normalize: bool, shape: tuple[int, ...], call: Any, fill: bool = False) -> Any:
    dtype = accumulator(call.query, call.key, call.value)
    if state is None:
        zeros = jnp.zeros((call.query.shape[0], *shape[-3:]), dtype)
        return (zeros, zeros[..., 0] if normalize else None) if fill else None
    parts = tuple(state) if normalize else (state,)
    wants = (shape, shape[:-1])[: 1 + normalize]
    if len(parts) != len(wants) or any(jnp.shape(p) != w for p, w in zip(parts, wants, strict=True)):
        what = "a pair (S, z) of shapes" if normalize else "S of shape"
        got = [jnp.shape(p) for p in parts]
        raise ValueError(
            f"initial_state must be {what} (*B, N, H, V) = {wants[0]}{f', {wants[1]}' if normalize else ''}; got {got}"
        )
    parts = tuple(
        jnp.asarray(p, dtype).reshape(call.query.shape[0], *w[len(call.batch) :])
        for p, w in zip(parts, wants, strict=True)
    )
    return parts if normalize else (parts[0], None)
