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


def softmax(inputs, *, bias=None, logits_soft_cap=None, scale=None, seen=None, top=None, **pattern):
    """o_i = sum_j exp(a_ij) v_j / sum_j exp(a_ij) over the allowed pairs; 0 where there are none."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    key, value = spread(key, query.shape[2]), spread(value, query.shape[2])
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    pairs = allowed(inputs, **pattern)
    if seen is not None:
        pairs = pairs & seen
    if bias is not None:
        bias = four_axes(bias)
        pairs = pairs & (bias > -jnp.inf)
        logits = logits + jnp.where(bias > -jnp.inf, bias, 0.0)
    pairs = jnp.broadcast_to(pairs, logits.shape)
    logits = jnp.where(pairs, logits, -1e30)
    if top is not None:
        pairs = pairs & (logits >= jnp.sort(logits, axis=-1)[..., max(logits.shape[-1] - top, 0), None])
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.where(pairs, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1.0), value)


def places(inputs, segment_ids=None, mask=None, **_):
    """Queries' and keys' positions (T, 1) and (1, S), and where the document of each begins, (B, T, 1) and (B, 1, S).

    A document is a run of equal ids, and begins with its first key that no key mask hides.
    """
    (batch, length), keys = inputs["query"].shape[:2], inputs["key"].shape[1]
    ids = segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids
    ids = np.zeros((batch, keys), int) if ids is None else np.asarray(ids)
    real = np.ones((batch, keys), bool)
    if mask is not None and four_axes(mask).shape[1:3] == (1, 1):
        real = np.broadcast_to(four_axes(np.asarray(mask))[:, 0, 0], (batch, keys))
    begin = np.zeros((batch, max(keys, 1)), int)
    for row in range(batch):
        awaited = True
        for j in range(keys):
            if j and ids[row, j] != ids[row, j - 1]:
                begin[row, j], awaited = j, True
            elif j:
                begin[row, j] = begin[row, j - 1]
            if awaited and real[row, j]:
                begin[row, j], awaited = j, False
    i, j = np.arange(length)[:, None] + (keys - length), np.arange(keys)[None, :]
    return i, j, begin[:, np.maximum(i[:, 0], 0)][:, :, None], begin[:, None, :keys]


def sparse(inputs, *, window=None, dilation, num_global=0, **options):
    """Softmax over {i - left <= j <= i + right}, {(i - j) % r == 0} and the pairs of a document's first tokens."""
    i, j, i_begin, j_begin = places(inputs, **options)
    seen = (i - j) % dilation == 0
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        seen = seen | ((i - j <= left) & (j - i <= right))
    seen = seen | (j - j_begin < num_global)
    if num_global and not options.get("is_causal", True):
        seen = seen | (i - i_begin < num_global)
    return softmax(inputs, seen=jnp.asarray(seen)[:, None], **options)


def strided(inputs, *, stride, **options):
    """Softmax over {|i - j| < l} and {(i - j) % l == 0}."""
    return sparse(inputs, window=stride - 1, dilation=stride, **options)


def fixed(inputs, *, block, summary, **options):
    """Softmax over the pairs of a block, and the last columns of complete blocks."""
    i, j, i_begin, j_begin = places(inputs, **options)
    i_block, column, j_block = (i - i_begin) // block, (j - j_begin) % block, (j - j_begin) // block
    same = (i_block == j_block) & (i_begin == j_begin)
    end, last = j - column + block - 1, max(j.shape[1] - 1, 0)
    complete = (end <= last) & (np.take_along_axis(j_begin, np.minimum(end, last), axis=2) == j_begin)
    return softmax(inputs, seen=jnp.asarray(same | ((column >= block - summary) & complete))[:, None], **options)


def topk(inputs, *, k, **options):
    """Softmax over the k largest scores of a row."""
    return softmax(inputs, top=k, **options)


def linformer(inputs, *, key_projection, value_projection, mask=None, is_causal=False):
    """softmax(q (E k)^T) (F v), masked keys and values 0."""
    assert not is_causal
    keys = inputs["key"].shape[1]
    real = (
        jnp.ones((1, keys), bool)
        if mask is None
        else jnp.broadcast_to(four_axes(mask), (*mask.shape[:1], 1, 1, keys))[:, 0, 0]
    )

    def mixed(matrix, x):
        return jnp.einsum("rs,bskh->brkh", matrix[:, :keys], jnp.where(real[..., None, None], x, 0.0))

    mixtures = {"key": mixed(key_projection, inputs["key"]), "value": mixed(value_projection, inputs["value"])}
    return softmax(inputs | mixtures, is_causal=False)


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


REFERENCES = {
    "softmax": softmax,
    "local": softmax,
    "atrous": sparse,
    "sparse": sparse,
    "strided": strided,
    "fixed": fixed,
    "topk": topk,
    "linformer": linformer,
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
        return lambda inputs, **options: REFERENCES[subject.name](
            inputs, **{**subject.weights(inputs), **subject.options, **options}
        )

    def own_steps(inputs, *, mask=None, segment_ids=None, **options):
        per_call = {"mask": mask, "segment_ids": segment_ids}
        per_call = {name: array for name, array in per_call.items() if array is not None}
        return stepwise(subject, inputs, per_call=per_call, **options)[0]

    return own_steps
