"""Naive softmax attention: T x T weights, and the patterns of its sparse members."""

import jax
import jax.numpy as jnp
import numpy as np


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
    pairs = allowed(inputs, **pattern)
    if seen is not None:
        pairs = pairs & seen
    if bias is not None:
        bias = four_axes(bias)
        pairs = pairs & (bias > -jnp.inf)
        logits = logits + jnp.where(bias > -jnp.inf, bias, 0.0)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    pairs = jnp.broadcast_to(pairs, logits.shape)
    logits = jnp.where(pairs, logits, -1e30)
    if top is not None:
        pairs = pairs & (logits >= jnp.sort(logits, axis=-1)[..., max(logits.shape[-1] - top, 0), None])
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.where(pairs, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(total > 0, total, 1.0), value)


def key_mask_of(inputs, mask):
    """(B, S), True everywhere where the mask is of pairs."""
    batch, keys = inputs["key"].shape[:2]
    if mask is None or four_axes(mask).shape[1:3] != (1, 1):
        return np.ones((batch, keys), bool)
    return np.broadcast_to(four_axes(np.asarray(mask))[:, 0, 0], (batch, keys))


def places(inputs, segment_ids=None, mask=None, **_):
    """Queries' and keys' positions (T, 1) and (1, S), and where the document of each begins, (B, T, 1) and (B, 1, S).

    A document is a run of equal ids, and begins with its first key that no key mask hides.
    """
    (batch, length), keys = inputs["query"].shape[:2], inputs["key"].shape[1]
    ids = segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids
    ids = np.zeros((batch, keys), int) if ids is None else np.asarray(ids)
    real = key_mask_of(inputs, mask)
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
        seen = seen | ((i >= i_begin) & (i - i_begin < num_global))
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


def places_in_segments(real, segment_ids):
    """(B, T): how many real tokens of its segment stand before each token, one step at a time."""
    ids = np.zeros(real.shape, int) if segment_ids is None else np.asarray(segment_ids)
    places = np.zeros(real.shape, int)
    for b, t in np.ndindex(*real.shape):
        if t and ids[b, t] == ids[b, t - 1]:
            places[b, t] = places[b, t - 1] + real[b, t - 1]
    return places
