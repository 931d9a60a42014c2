"""The backward pass of one chunk of the outer-product recurrence, arranged by hand.

With g = d num, e = d den, w the decay weights of the pairs and P = q k^T w of a chunk, S before and S' after it:

    ds = (g v^T + e) w       dq = ds k + (g S^T + e z) a        dk = ds^T q + (v dS'^T + dz') b        dv = P^T g + k b dS'

a and b the decays from the chunk's start and to its end. What autodiff would compute again is read from the outputs (e = -do . out / den).
P and ds are made transposed, as two of the three products that read them want them. With a decay for each feature w is not one number a
pair, and what goes through P is differentiated where P is made.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._products import finite, grouped_product, row_products
from effattn_jax.recurrence._feature_pairs import feature_pairs
from effattn_jax.recurrence._outer_chunks import (
    Chunk,
    Marks,
    Options,
    heads_first,
    interacting,
    keep_steps,
    last_segment,
    masked,
    prepared,
    product,
)

__all__: list[str] = []


def _cotangents(options: Options, outputs: Any, d_out: Any, groups: int, dtype: Any) -> tuple[jax.Array, Any]:
    """d num (B, K, G, C, V) and d den (B, K, G, C), the latter None without a normaliser."""

    def by_head(x):
        x = heads_first(x, dtype)
        return x.reshape(x.shape[0], x.shape[1] // groups, groups, *x.shape[2:])

    if not options.normalize:
        return by_head(d_out), None
    if options.split:
        return by_head(d_out[0]), by_head(d_out[1])
    (out, denominator), (d_out, d_denominator) = map(by_head, outputs), map(by_head, d_out)
    # A row of 0 for want of keys, or of NaN, passes nothing back.
    some = (denominator != 0)[..., None] & jnp.isfinite(out)
    share = jnp.where(some, d_out / jnp.where(denominator == 0, 1, denominator)[..., None], 0)
    return share, d_denominator - row_products(share, jnp.where(some, out, 0))


def pull_chunk(
    options: Options, carry: Any, inputs: Any, marks: Marks, outputs: Any, d_carry: Any, d_out: Any
) -> tuple[Any, Any]:
    """Cotangents of (carry, inputs) of one chunk from those of its outputs and of the state after it."""
    (state, total), (d_state, d_total) = jax.tree.map(finite, carry), d_carry
    dtype, groups = state.dtype, inputs[0].shape[2] // inputs[1].shape[2]

    # What is not finite is 0 here: beside the cotangent of 0 of another document it would make NaN.
    (q, k, v, decay, rows), pull_inputs = jax.vjp(partial(prepared, options, marks, dtype), inputs)
    q, k, v, rows = jax.tree.map(finite, (q, k, v, rows))
    g, e = _cotangents(options, outputs, d_out, groups, dtype)
    pairs = interacting(options, marks, q.shape[3])
    from_start, into_end = (None, None) if marks.run is None else last_segment(marks)
    # What reads the state before the chunk, and what enters the one after it.
    g_old, e_old = (x if from_start is None or x is None else _rows(x, from_start) for x in (g, e))
    q_old = q if decay is None else q * decay.to_step[:, :, None]
    read = product("bkgiv,bkhv->bkgih", g_old, state, options)
    read = read if e is None else read + e_old[..., None] * total[:, :, None, None]
    write = product("bkjv,bkhv->bkjh", v, d_state, options)
    write = write if e is None else write + d_total[:, :, None]
    write = keep_steps(write, into_end)
    k_end = keep_steps(k if decay is None else k * decay.to_end, into_end)

    p_t, *d_rows, d_pairs = _pairs(options, *rows, v, g, e, decay, pairs)
    dq = read if decay is None else read * decay.to_step[:, :, None]
    dk = write if decay is None else write * decay.to_end
    dv = product("bkjgi,bkgiv->bkjv", p_t, g, options) + product("bkjh,bkhv->bkjv", k_end, d_state, options)

    goes_on = None if marks.run is None else (marks.run[:, -1:] == marks.run_before[:, -1:])[:, 0]
    d_kept_state, d_kept_total = masked(d_state, goes_on), None if e is None else masked(d_total, goes_on)
    d_decay = None
    if decay is not None:
        d_kept = row_products(state, d_kept_state)
        d_kept = d_kept if e is None else d_kept + total * d_kept_total
        d_decay = decay._replace(
            to_step=_as(decay.to_step, jnp.sum(q * read, axis=2)), to_end=_as(decay.to_end, k * write),
            kept=_as(decay.kept, d_kept), bad=_no_cotangent(decay.bad), **d_pairs,
        )  # fmt: skip
        d_kept_state = d_kept_state * decay.kept[..., None]
        d_kept_total = None if e is None else d_kept_total * decay.kept
    d_state = d_kept_state + product("bkgih,bkgiv->bkhv", q_old, g_old, options)
    d_total = None if e is None else d_kept_total + grouped_product("bkgih,bkgi->bkh", q_old, e_old)
    (d_inputs,) = pull_inputs(Chunk(dq, dk, dv, d_decay, tuple(d_rows)))
    return (d_state, d_total), d_inputs


def _rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x (B, K, G, C, ...) with 0 where rows (B, C) is False."""
    return jnp.where(rows.reshape(rows.shape[0], 1, 1, rows.shape[1], *(1,) * (x.ndim - 4)), x, 0)


def _as(factor: jax.Array, d_factor: jax.Array) -> jax.Array:
    """The cotangent of a factor (..., 1 | H) from that of each feature."""
    return d_factor if factor.shape == d_factor.shape else row_products(d_factor, jnp.ones_like(d_factor))[..., None]


def _pairs(options, q, k, v, g, e, decay, pairs) -> tuple:
    """P^T (B, K, j, G, i), what q and k get through P, and the cotangents of what the decays put on pairs, by their names."""
    pairs_t = jnp.swapaxes(pairs, 1, 2)[:, None, :, None]  # (B | 1, 1, j, 1, i)
    dp_t = product("bkjv,bkgiv->bkjgi", v, g, options)
    dp_t = dp_t if e is None else dp_t + e[:, :, None]
    if decay is not None and decay.within is not None:
        p, pull = jax.vjp(feature_pairs, q, k, decay.within)
        dq, dk, d_within = pull(jnp.moveaxis(jnp.where(pairs_t, dp_t, 0), 2, 4))
        return jnp.where(pairs_t, jnp.moveaxis(p, 4, 2), 0), dq, dk, {"within": d_within}
    p_t, d_pairs, d_products = product("bkjh,bkgih->bkjgi", k, q, options), {}, None
    if options.of_products is not None:
        p_t, d_products = jax.vjp(options.of_products, p_t)
    if decay is not None:
        weight_t = jnp.swapaxes(jnp.exp(jnp.where(pairs[:, None], decay.between, -jnp.inf)), 2, 3)[:, :, :, None]
        d_between = jnp.sum(jnp.where(pairs_t, dp_t * p_t * weight_t, 0), axis=3)
        d_pairs = {"between": jnp.swapaxes(d_between, 2, 3)}
        dp_t, p_t = dp_t * weight_t, p_t * weight_t
    ds_t = dp_t if d_products is None else d_products(dp_t)[0]
    p_t, ds_t = jnp.where(pairs_t, p_t, 0), jnp.where(pairs_t, ds_t, 0)
    dq, dk = product("bkjgi,bkjh->bkgih", ds_t, k, options), product("bkjgi,bkgih->bkjh", ds_t, q, options)
    return p_t, dq, dk, d_pairs


def _no_cotangent(x: jax.Array) -> Any:
    """What stands for the cotangent of a boolean."""
    return np.zeros(x.shape, jax.dtypes.float0)
