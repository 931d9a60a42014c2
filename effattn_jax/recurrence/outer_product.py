"""The outer-product recurrence, the core of every linear attention.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t          (z_t = exp(g_t) z_{t-1} + k_t, o_t / (q_t . z_t) when normalised)

In chunks of C steps: pairs inside a chunk by a masked C x C product, everything older through the state at its start. Cost
O(T (C + H) V), state H x V a head. Only sums of decays between two steps are exponentiated, each <= 0, so nothing overflows.
Source: Katharopoulos et al., arXiv:2006.16236; with decays Yang et al., arXiv:2312.06635.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, check_call, choose, flags, floating, positive
from effattn_jax._products import quiet
from effattn_jax.recurrence._outer_chunks import Options, normalized, repeat_heads
from effattn_jax.recurrence._outer_kernel import outer_product

__all__ = ["outer_product_recurrence"]


def _step_by_step(query, key, value, log_decay, state, *, segments=None, options, **_):
    """The recurrence as it is written, one step at a time."""
    dtype = accumulator(query, key, value)
    begins = jnp.zeros_like(key.sum((2, 3))) > 0
    if segments is not None:
        begins = begins.at[:, 1:].set(segments[:, 1:] != segments[:, :-1])
    decay = jnp.zeros_like(key[..., 0], dtype) if log_decay is None else log_decay.astype(dtype)
    kept = jnp.exp(decay if decay.ndim == 4 else decay[..., None])

    def step(carry, x):
        q, k, v, a, begin = x
        state, total = carry
        fresh = begin[:, None, None]
        old = jnp.where(fresh[..., None], 0, quiet(jnp.multiply)(state, a[..., None]))
        state = old + k[..., None] * v[..., None, :]
        out = quiet(partial(jnp.einsum, "bkh,bkhv->bkv"))(q, state)
        if total is not None:
            total = jnp.where(fresh, 0, quiet(jnp.multiply)(total, a)) + k
            out = normalized(out, quiet(partial(jnp.einsum, "bkh,bkh->bk"))(q, total))
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


_FORMS: dict[str | None, Callable] = {
    None: outer_product,
    "chunked": partial(outer_product, implementation="chunked"),
    "parallel": partial(outer_product, implementation="parallel"),
    "scan": _step_by_step,
}


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


@compiled
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
      chunk_size: steps a chunk; None is 64 (128 in the parallel form), or 32 with a decay for each feature.
      implementation: "chunked" (products of matrices, one chunk after the other, O(T) memory in both passes), "parallel" (all chunks side by
        side, O(T (C + H V / C)) memory, for accelerators) or "scan" (step by step); None picks by the platform the program is compiled for.

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
    flags(normalize=normalize)
    call = check_call(query, key, value, None, None, is_causal=True, segment_ids=segment_ids, stateful=True)
    query, key, value = call.query, call.key, call.value
    length, heads = query.shape[1:3]
    if key.shape[1] != length:
        raise ValueError(f"key must have the length T of query; got query {query.shape}, key {key.shape}")
    log_decay = check_decay(log_decay, key, heads, call.batch)
    key, value = repeat_heads(key, query), repeat_heads(value, query)
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
    parts = tuple(state) if normalize and isinstance(state, tuple | list) else (state,)
    wants = (shape, shape[:-1])[: 1 + normalize]
    if len(parts) != len(wants) or any(np.shape(p) != w for p, w in zip(parts, wants, strict=True)):
        what = "a pair (S, z) of shapes" if normalize else "S of shape"
        got = [np.shape(p) for p in parts]
        raise ValueError(
            f"initial_state must be {what} (*B, N, H, V) = {wants[0]}{f', {wants[1]}' if normalize else ''}; got {got}"
        )
    parts = tuple(
        jnp.asarray(p, dtype).reshape(call.query.shape[0], *w[len(call.batch) :])
        for p, w in zip(parts, wants, strict=True)
    )
    return parts if normalize else (parts[0], None)
