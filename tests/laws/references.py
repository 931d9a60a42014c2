"""Naive float64 references, written for correctness alone: T x T weights or one explicit step at a time.

They share no code with the kernels, take clean inputs (B, T, N, H) and are differentiated by plain autodiff. A member of a
table without an entry here is held against its own step-by-step form in float64 instead (`reference_of`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from .subjects import Subject, stepwise


def allowed(inputs, *, is_causal=True, window=None, mask=None, segment_ids=None):
    """The (B, 1 or N, T, S) pairs that may interact; causal calls align the ends."""
    T, S = inputs["query"].shape[1], inputs["key"].shape[1]
    i, j = np.arange(T)[:, None] + (S - T), np.arange(S)[None, :]
    pairs = np.ones((T, S), bool)
    if is_causal:
        pairs &= j <= i
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        pairs &= (i - j <= left) & (j - i <= right)
    pairs = jnp.asarray(pairs)[None, None]
    if mask is not None:
        pairs = pairs & four_axes(mask)
    if segment_ids is not None:
        query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        pairs = pairs & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
    return pairs


def four_axes(array):
    """A mask or bias of fewer axes, with leading axes of one."""
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def spread(array, heads):
    """Key or value heads repeated so that query head n reads head n // (N / K)."""
    return jnp.repeat(array, heads // array.shape[2], axis=2)


def softmax(inputs, *, bias=None, logits_soft_cap=None, scale=None, **pattern):
    """o_i = sum_j exp(a_ij) v_j / sum_j exp(a_ij) over the allowed pairs; 0 where there are none."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    pairs = allowed(inputs, **pattern)
    if bias is not None:
        bias = four_axes(bias)
        pairs = pairs & (bias > -jnp.inf)
        logits = logits + jnp.where(bias > -jnp.inf, bias, 0.0)
    pairs = jnp.broadcast_to(pairs, logits.shape)
    logits = jnp.where(pairs, logits, -1e30)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.where(pairs, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1.0), value)


def linear(inputs, *, normalize=True, scale=None, **pattern):
    """o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j) with phi = elu + 1."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    assert scale is None

    def phi(x):
        return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.where(x > 0, 0.0, x)))

    weights = jnp.where(allowed(inputs, **pattern), jnp.einsum("btnh,bsnh->bnts", phi(query), phi(key)), 0.0)
    if normalize:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnts,bsnv->btnv", weights, value)


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


def counted(mask, segment_ids, batch, length):
    """(B, T): how many real tokens of its segment stand before each token, one step at a time."""
    real = (
        np.ones((batch, length), bool)
        if mask is None
        else np.broadcast_to(four_axes(np.asarray(mask))[:, 0, 0], (batch, length))
    )
    ids = np.zeros((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    places = np.zeros((batch, length), int)
    for b in range(batch):
        count = 0
        for t in range(length):
            count = 0 if t and ids[b, t] != ids[b, t - 1] else count
            places[b, t] = count
            count += real[b, t]
    return places


def places_of(inputs, *, is_causal=True, mask=None, segment_ids=None, **_):
    """Places of queries (B, T) and keys (B, S): a query's is its key's where both are one sequence or the ends are aligned."""
    (B, T), S = inputs["query"].shape[:2], inputs["key"].shape[1]
    query_ids, key_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    over_keys = mask if mask is not None and four_axes(np.asarray(mask)).shape[1:3] == (1, 1) else None
    keys = counted(over_keys, key_ids, B, S)
    if not is_causal and (T != S or query_ids is not key_ids):
        return counted(None, query_ids, B, T), keys
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
    "linear": linear,
    "gated_linear": gated_linear,
    "diagonal": diagonal,
    "diagonal_complex": diagonal,
    "outer_product": outer_product,
    "outer_product_decay": outer_product,
    "outer_product_feature_decay": outer_product,
}


def is_looped(subject: Subject) -> bool:
    """Is the member held against its own steps, one Python call a time step, so that long rows are out of reach?"""
    return subject.name not in REFERENCES


def reference_of(subject: Subject):
    """reference(inputs, **options): the entry above, or the member's own steps where there is none.

    Inputs without a time axis reach a reference among its options; those of the member stand unless the caller gives others.
    """
    if subject.name in REFERENCES:
        return lambda inputs, **options: REFERENCES[subject.name](inputs, **{**subject.weights(inputs), **options})

    def own_steps(inputs, *, mask=None, segment_ids=None, **options):
        per_call = {"mask": mask, "segment_ids": segment_ids}
        per_call = {name: array for name, array in per_call.items() if array is not None}
        return stepwise(subject, inputs, per_call=per_call, **options)[0]

    return own_steps
