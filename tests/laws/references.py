"""Naive float64 references, written for correctness alone: T x T weights or one explicit step at a time.

They share no code with the kernels, take clean inputs (B, T, N, H) and are differentiated by plain autodiff. A member of a
table without an entry here is held against its own step-by-step form in float64 instead (`reference_of`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from .checks import widened
from .position_references import POSITION_REFERENCES
from .softmax_references import (
    allowed,
    fixed,
    four_axes,
    key_mask_of,
    places_in_segments,
    softmax,
    sparse,
    spread,
    strided,
    topk,
)
from .state_space_references import STATE_SPACE_REFERENCES
from .subjects import Subject, stepwise
from .token_references import TOKEN_REFERENCES


def linformer(inputs, *, key_projection, value_projection, mask=None, is_causal=False):
    """softmax(q (E k)^T) (F v), E and F having a column for the first real key, the second, ..."""
    assert not is_causal
    keys = inputs["key"].shape[1]
    real = (
        jnp.ones((1, keys), bool)
        if mask is None
        else jnp.broadcast_to(four_axes(mask), (*mask.shape[:1], 1, 1, keys))[:, 0, 0]
    )

    def mixed(matrix, x):
        columns = jnp.stack([jnp.asarray(matrix)[:, jnp.maximum(jnp.cumsum(row) - 1, 0)] for row in real])
        columns = jnp.broadcast_to(columns, (x.shape[0], *columns.shape[1:]))
        return jnp.einsum("brs,bskh->brkh", columns, jnp.where(real[..., None, None], x, 0.0))

    mixtures = {"key": mixed(key_projection, inputs["key"]), "value": mixed(value_projection, inputs["value"])}
    return softmax(inputs | mixtures, is_causal=False)


def unit(x):
    """x / |x|, 0 for x = 0."""
    length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.where(length == 0, 1.0, length)


def second_order(x):
    """[1, y, y (x) y / sqrt(2)] with y = x / H^(1/4), all H^2 products."""
    y = x / x.shape[-1] ** 0.25
    products = (y[..., :, None] * y[..., None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.ones_like(y[..., :1]), y, products / np.sqrt(2)], axis=-1)


def neighbours(x):
    """r_i r_{i + 1} around the circle, r = relu([x, -x])."""
    r = jnp.maximum(jnp.concatenate([x, -x], axis=-1), 0)
    return r * jnp.roll(r, -1, axis=-1)


def both_softmaxes(x, weights):
    """[softmax(x W), softmax(-x W)], one W a head."""
    logits = jnp.einsum("btnh,nhp->btnp", x, weights)
    return jnp.concatenate([jax.nn.softmax(logits), jax.nn.softmax(-logits)], axis=-1)


PHI = {
    "elu": lambda x: jnp.where(x > 0, x + 1.0, jnp.exp(jnp.where(x > 0, 0.0, x))),
    "relu": lambda x: jnp.maximum(x, 0),
    "identity": lambda x: x,
    "exp": jnp.exp,
    "cosine": lambda x: jnp.concatenate([jnp.ones_like(x[..., :1]), unit(x)], axis=-1),
    "taylor": second_order,
    "dpfp": neighbours,
}


def linear(inputs, *, normalize=True, scale=None, feature_map="elu", query_weights=None, key_weights=None, **pattern):
    """o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    assert scale is None
    if query_weights is not None:
        query, key = both_softmaxes(query, query_weights), both_softmaxes(key, key_weights)
    else:
        query, key = PHI[feature_map](query), PHI[feature_map](key)
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    weights = jnp.where(allowed(inputs, **pattern), jnp.einsum("btnh,bsnh->bnts", query, key), 0.0)
    if normalize:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("bnts,bsnv->btnv", weights, value)


def efficient(inputs, **pattern):
    """o_i = sum_a softmax(q_i)_a sum_j r_ija v_j, r_ija the softmax of feature a over the positions j that i sees."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    pairs = allowed(inputs, **pattern)[..., None]
    shape = (query.shape[0], query.shape[2], query.shape[1], *key.shape[1::2])
    logits = jnp.where(pairs, jnp.broadcast_to(jnp.moveaxis(key, 2, 1)[:, :, None], shape), -1e30)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=3, keepdims=True, initial=-1e30))
    weights = jnp.where(pairs, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=3, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("btna,bntsa,bsnv->btnv", jax.nn.softmax(query), weights, value)


def restarts(segment_ids):
    """(B, T): does a new segment begin at this step?"""
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return segment_ids != before


def gated_linear(inputs, **pattern):
    """o_i = sum_j (q_i * exp(decays from j to i)) . k_j v_j: g_{j+1} + ... + g_i for j <= i, and g_i + ... + g_{j-1} for later keys.

    A masked step does not count, its decay included.
    """
    query, key, value, decay = (inputs[name] for name in ("query", "key", "value", "log_decay"))
    heads, T, S = query.shape[2], query.shape[1], key.shape[1]
    key, value = spread(key, heads), spread(value, heads)
    decay = decay[..., None] if decay.ndim == 3 else decay
    if pattern.get("mask") is not None:
        decay = jnp.where(jnp.asarray(pattern["mask"])[:, 0, 0, :, None, None], decay, 0.0)
    sums = jnp.concatenate(
        [jnp.zeros_like(decay[:, :1]), jnp.cumsum(decay, axis=1)], axis=1
    )  # entry t: g_0 + ... + g_{t-1}
    i, j = np.maximum(np.arange(T)[:, None] + (S - T), -1), np.arange(S)[None, :]
    back = sums[:, np.broadcast_to(i + 1, (T, S))] - sums[:, np.broadcast_to(j + 1, (T, S))]
    ahead = sums[:, np.broadcast_to(j, (T, S))] - sums[:, np.broadcast_to(np.maximum(i, 0), (T, S))]
    between = jnp.where((j <= i)[None, :, :, None, None], back, ahead)
    weights = jnp.einsum(
        "btnh,btsnh,bsnh->bnts", query, jnp.exp(jnp.broadcast_to(between, (*between.shape[:4], key.shape[3]))), key
    )
    return jnp.einsum("bnts,bsnv->btnv", jnp.where(allowed(inputs, **pattern), weights, 0.0), value)


def retention(inputs, **pattern):
    """The decay 1 - 2^(-5 - h) for every step of head h."""
    heads = inputs["query"].shape[2]
    decay = jnp.broadcast_to(jnp.log(1 - 0.5 ** (5 + jnp.arange(heads))), (*inputs["key"].shape[:2], heads))
    return gated_linear({**inputs, "log_decay": decay}, **pattern)


def delta_states(key, value, beta, decay, new):
    """Per step, time first: the state as it decays, and after the write that makes key return more of value."""

    def step(state, t):
        state = jnp.where(new[:, t, None, None, None], 0.0, state) * jnp.exp(decay[:, t])[..., None, None]
        found = jnp.einsum("bnhv,bnh->bnv", state, key[:, t])
        write = jnp.einsum("bnh,bnv->bnhv", key[:, t], beta[:, t][..., None] * (value[:, t] - found))
        return state + write, (state, state + write)

    state = jnp.zeros((key.shape[0], *key.shape[2:], value.shape[3]), key.dtype)
    return jax.lax.scan(step, state, jnp.arange(key.shape[1]))[1]


def delta_rule(inputs, *, is_causal=True, mask=None, segment_ids=None):
    """o_i = S_i^T q_i, S the states of the delta rule; without causality also those of reversed time before their step i writes."""
    query, key, value, beta = (inputs[name] for name in ("query", "key", "value", "beta"))
    B, T, N, _ = query.shape
    S = key.shape[1]
    key, value, decay = spread(key, N), spread(value, N), inputs.get("log_decay", jnp.zeros_like(beta))
    if mask is not None:
        keep = jnp.broadcast_to(jnp.asarray(mask)[..., 0, 0, :], (B, S))[..., None]
        beta, decay = jnp.where(keep, beta, 0.0), jnp.where(keep, decay, 0.0)
    ids = jnp.zeros((B, S), int) if segment_ids is None else segment_ids
    if S == 0:
        return jnp.zeros((B, T, N, value.shape[3]), query.dtype)
    rows = np.arange(T) + S - T
    here = jnp.asarray(np.maximum(rows, 0))
    _, states = delta_states(key, value, beta, decay, restarts(ids))
    read = jnp.where((rows >= 0)[:, None, None, None, None], states[here], 0.0)
    if not is_causal:
        arrays = [x[:, ::-1] for x in (key, value, beta, decay)]
        decayed, states = delta_states(*arrays, restarts(ids[:, ::-1]))
        read = read + jnp.where((rows >= 0)[:, None, None, None, None], decayed[::-1][here], states[-1][None])
    return jnp.einsum("tbnhv,btnh->btnv", read, query)


def performer(inputs, *, projection, scale=None, **pattern):
    """o_i = sum_j sum_m exp(w_m.q_i + w_m.k_j - |k_j|^2 / 2) v_j over the sum of these weights, q and k times the root of the scale."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    query, key, value = query * root, spread(key, query.shape[2]) * root, spread(value, query.shape[2])
    exponents = (
        jnp.einsum("btnh,mh->bntm", query, projection)[:, :, :, None]
        + (jnp.einsum("bsnh,mh->bnsm", key, projection) - 0.5 * jnp.moveaxis(jnp.sum(key**2, -1), 1, 2)[..., None])[
            :, :, None
        ]
    )
    pairs = allowed(inputs, **pattern)[..., None]
    exponents = jnp.where(pairs, exponents, -1e30)
    top = jax.lax.stop_gradient(jnp.max(exponents, axis=(-2, -1), keepdims=True, initial=-1e30))
    weights = jnp.sum(jnp.where(pairs, jnp.exp(exponents - top), 0.0), axis=-1)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1.0), value)


def outer_product(inputs, *, normalize=False, segment_ids=None):
    """The same recurrence with any number of query heads to a key head; normalised by q.z with z the state of values of one."""
    if normalize:
        ones = jnp.ones_like(inputs["value"][..., :1])
        both = outer_product({**inputs, "value": jnp.concatenate([inputs["value"], ones], -1)}, segment_ids=segment_ids)
        return both[..., :-1] / jnp.where(both[..., -1:] == 0, 1.0, both[..., -1:])
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    decay = inputs.get("log_decay")
    if decay is not None and decay.ndim == 3:
        decay = decay[..., None]
    T, heads = query.shape[1:3]
    decay = jnp.zeros((1, T, 1, 1)) if decay is None else spread(decay, heads)
    new = jnp.zeros((1, T), bool) if segment_ids is None else restarts(segment_ids)

    def step(state, t):
        state = jnp.where(new[:, t, None, None, None], 0.0, state)
        state = jnp.exp(decay[:, t, :, :, None]) * state + key[:, t, :, :, None] * value[:, t, :, None, :]
        return state, jnp.einsum("bnhv,bnh->bnv", state, query[:, t])

    state = jnp.zeros((query.shape[0], heads, key.shape[3], value.shape[3]), query.dtype)
    return jnp.moveaxis(jax.lax.scan(step, state, jnp.arange(T))[1], 0, 1)


def diagonal(inputs, *, segment_ids=None, reverse=False):
    """h_t = a_t h_{t-1} + x_t, elementwise, forward or backward in time."""
    decay, x = inputs["decay"], inputs["inputs"]
    if reverse:
        ids = None if segment_ids is None else segment_ids[:, ::-1]
        flipped = {name: array[:, ::-1] for name, array in inputs.items()}
        return diagonal(flipped, segment_ids=ids)[:, ::-1]
    new = jnp.zeros((1, x.shape[1]), bool) if segment_ids is None else restarts(segment_ids)

    def step(state, t):
        state = jnp.where(new[:, t].reshape((-1,) + (1,) * (x.ndim - 2)), 0.0, state)
        state = decay[:, t] * state + x[:, t]
        return state, state

    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.arange(x.shape[1]))[1], 0, 1)


def places_of(inputs, *, is_causal=True, mask=None, segment_ids=None, **_):
    """Places of queries (B, T) and keys (B, S): a query's is its key's where both are one sequence or the ends are aligned."""
    (B, T), S = inputs["query"].shape[:2], inputs["key"].shape[1]
    query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    keys = places_in_segments(key_mask_of(inputs, mask), key_ids)
    if not is_causal and (T != S or query_ids is not key_ids):
        return places_in_segments(np.ones((B, T), bool), query_ids), keys
    return np.concatenate([np.zeros((B, max(T - S, 0)), int), keys], axis=1)[:, -T or S + T :], keys


def synthesizer(make):
    """The reference of a Synthesizer: `make(inputs, query places, key places, **weights)` forms all scores, (B, N, T, S)."""

    def reference(inputs, *, bias=None, is_causal=True, mask=None, segment_ids=None, **weights):
        pattern = {"is_causal": is_causal, "mask": mask, "segment_ids": segment_ids}
        weights = {name: jnp.asarray(array, inputs["query"].dtype) for name, array in weights.items()}
        scores = make(inputs, *places_of(inputs, **pattern), **weights)
        T, S = inputs["query"].shape[1], inputs["key"].shape[1]
        scores = jnp.broadcast_to(scores, (inputs["query"].shape[0], inputs["query"].shape[2], T, S))
        nothing = {"query": 0 * inputs["query"][..., :1], "key": 0 * inputs["key"][..., :1], "value": inputs["value"]}
        return softmax(nothing, bias=scores if bias is None else scores + four_axes(bias), scale=1.0, **pattern)

    return reference


def dense_columns(inputs, _, keys, hidden_bias, columns, column_bias):
    hidden = jnp.maximum(inputs["query"] + hidden_bias[None, None], 0)
    return jnp.einsum("btnh,bsnh->bnts", hidden, columns[keys]) + jnp.moveaxis(column_bias[keys], 2, 1)[:, :, None]


def random_table(_, queries, keys, table):
    return jnp.moveaxis(table[queries[:, :, None], :, keys[:, None, :]], 3, 1)


def factorized_columns(inputs, _, keys, hidden_bias, left, right):
    hidden = jnp.maximum(inputs["query"] + hidden_bias[None, None], 0)
    u, v = np.divmod(keys, right.shape[0])
    return jnp.einsum("btnh,bsnh->bnts", hidden, left[u]) * jnp.einsum("btnh,bsnh->bnts", hidden, right[v])


def factorized_table(_, queries, keys, left, right):
    return jnp.einsum("btnk,bsnk->bnts", left[queries], right[keys])


def mixed_scores(inputs, queries, keys, mixture, left, right):
    alpha = jax.nn.softmax(mixture, axis=-1)[None, :, :, None, None]
    key = spread(inputs["key"], inputs["query"].shape[2])
    products = jnp.einsum("btnh,bsnh->bnts", inputs["query"], key) / np.sqrt(key.shape[-1])
    return alpha[:, :, 0] * products + alpha[:, :, 1] * factorized_table(inputs, queries, keys, left, right)


REFERENCES = {
    "residual": softmax,
    "synthesizer_dense": synthesizer(dense_columns),
    "synthesizer_random": synthesizer(random_table),
    "synthesizer_factorized_dense": synthesizer(factorized_columns),
    "synthesizer_factorized_random": synthesizer(factorized_table),
    "synthesizer_mixed": synthesizer(mixed_scores),
    "softmax": softmax,
    "local": softmax,
    "atrous": sparse,
    "sparse": sparse,
    "strided": strided,
    "fixed": fixed,
    "topk": topk,
    "linformer": linformer,
    "linear": linear,
    "linear_hedgehog": linear,
    "gated_linear": gated_linear,
    "efficient": efficient,
    "retention": retention,
    "delta_rule": delta_rule,
    "gated_delta_rule": delta_rule,
    "diagonal": diagonal,
    "diagonal_complex": diagonal,
    "performer": performer,
    "outer_product": outer_product,
    "outer_product_decay": outer_product,
    "outer_product_feature_decay": outer_product,
    **POSITION_REFERENCES,
    **TOKEN_REFERENCES,
    **STATE_SPACE_REFERENCES,
}


def is_looped(subject: Subject) -> bool:
    """Is the member held against its own steps, one Python call a time step, so that long rows are out of reach?"""
    return subject.name not in REFERENCES


def reference_of(subject: Subject):
    """reference(inputs, **options): the entry above, or the member's own steps where there is none.

    Inputs without a time axis reach a reference among its options; those of the member stand unless the caller gives others.
    """
    if subject.name in REFERENCES:
        form = {"is_causal": subject.causal} if subject.is_token_mixer else {}
        return lambda inputs, **options: REFERENCES[subject.name](
            inputs, **{**form, **widened(subject.weights(inputs)), **subject.options, **options}
        )

    def own_steps(inputs, *, mask=None, segment_ids=None, **options):
        per_call = {"mask": mask, "segment_ids": segment_ids}
        per_call = {name: array for name, array in per_call.items() if array is not None}
        return stepwise(subject, inputs, per_call=per_call, **options)[0]

    return own_steps
