"""Naive attention with positions of its own: a softmax with further scores (B, N, T, S), from positions of queries (B, T) and of keys (B, S)."""

import math

import jax.numpy as jnp
import numpy as np

from .softmax_references import four_axes, key_mask_of, places_in_segments, softmax, spread


def distances(counted):
    """j - i of counted positions, (B, T, S)."""
    rows, columns = counted
    return columns[:, None, :] - rows[:, :, None]


def shaw(query, key, counted, *, key_table, **_):
    """q_i . A_d"""
    reach = key_table.shape[0] // 2
    place = np.clip(distances(counted), -reach, reach) + reach
    scale = 1 / math.sqrt(query.shape[-1])
    return scale, scale * jnp.einsum("btnh,btsnh->bnts", query, key_table[place])


def disentangled(query, key, counted, *, key_table, query_table, **_):
    """q_i . A_d + k_j . C_e"""
    last, apart = key_table.shape[0] - 1, distances(counted)
    forth, back = (np.clip(x + key_table.shape[0] // 2, 0, last) for x in (-apart, apart))
    scores = jnp.einsum("btnh,btsnh->bnts", query, key_table[forth])
    scores = scores + jnp.einsum("bsnh,btsnh->bnts", key, query_table[back])
    scale = 1 / math.sqrt(3 * query.shape[-1])
    return scale, scale * scores


def xl(query, key, counted, *, relative_key, content_bias, position_bias, **_):
    """u . k_j + (q_i + v) . W^T R_(i-j)"""
    features = relative_key.shape[0]
    angle = -distances(counted)[..., None] * 10000.0 ** (-np.arange(0, features, 2) / features)
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    relative = jnp.einsum("btsm,mnh->btsnh", waves, relative_key)
    scores = jnp.einsum("nh,bsnh->bns", content_bias, key)[:, :, None]
    scores = scores + jnp.einsum("btnh,btsnh->bnts", query + position_bias[None, None], relative)
    scale = 1 / math.sqrt(query.shape[-1])
    return scale, scale * scores


def tupe(query, key, places, *, position_query, position_key, first_token, **_):
    """a_i . c_j, but a score of its own in the row and the column of a document's first token"""
    rows, columns = places
    scale = 1 / math.sqrt(2 * query.shape[-1])
    tied = scale * jnp.einsum("btnm,bsnm->bnts", position_query[rows], position_key[columns])
    row, column = (rows == 0)[:, None, :, None], (columns == 0)[:, None, None, :]
    first, other = (first_token[:, c][None, :, None, None] for c in (0, 1))
    return scale, jnp.where(row, first, jnp.where(column, other, tied))


def turned(query, key, distance, fading=None):
    """q_i . R(distance) k_j, for halves of features, by complex products; 0 of the plain products."""
    half = query.shape[-1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    pairs = [x[..., :half] + 1j * x[..., half:] for x in (query, key)]
    turn = np.exp(1j * distance[..., None] * frequencies)
    turn = turn if fading is None else turn * fading
    scores = jnp.einsum("btnm,bsnm,btsm->bnts", pairs[0], pairs[1].conj(), jnp.asarray(turn)).real
    return 0.0, scores / math.sqrt(query.shape[-1])


def rerope(query, key, slots, *, window, leak, **_):
    """Distances that grow slower beyond the window."""
    apart = -distances(slots).astype(float)
    far = np.abs(apart)
    return turned(query, key, np.sign(apart) * np.where(far < window, far, window + (far - window) * leak))


def xpos(query, key, counted, **_):
    """Each pair of features fades at its own rate."""
    apart, dim = -distances(counted).astype(float), query.shape[-1]
    rates = (np.arange(0, dim, 2) / dim + 0.4) / 1.4
    return turned(query, key, apart, rates ** (np.maximum(apart, 0)[..., None] / 512))


def with_positions(scores_of, count):
    """Softmax with a scale and further scores, from the positions that `count(inputs, mask, segment_ids)` gives."""

    def reference(inputs, *, bias=None, is_causal=True, mask=None, segment_ids=None, scale=None, **options):
        assert scale is None
        query = inputs["query"]
        key = spread(inputs["key"], query.shape[2])
        scale, scores = scores_of(query, key, count(inputs, mask, segment_ids), **options)
        bias = scores if bias is None else four_axes(bias) + scores
        return softmax(inputs, bias=bias, scale=scale, is_causal=is_causal, mask=mask, segment_ids=segment_ids)

    return reference


def at_rows(columns, length, before):
    """Positions (B, T) of queries that stand where keys (B, S) stand, ends aligned; `before(row)` are those of rows before every key."""
    batch, keys = columns.shape
    row = np.arange(length)[None] + keys - length
    return np.where(row < 0, before(row), np.pad(columns, [(0, 0), (0, 1)])[:, np.clip(row[0], 0, keys)])


def slots(inputs, mask, segment_ids):
    """Every key counts."""
    (batch, length), keys = inputs["query"].shape[:2], inputs["key"].shape[1]
    columns = np.broadcast_to(np.arange(keys), (batch, keys))
    return at_rows(columns, length, lambda row: row), columns


def counted(inputs, mask, segment_ids):
    """Keys that a key mask shows count, in whatever segment."""
    real = key_mask_of(inputs, mask)
    columns = np.cumsum(real, axis=1) - real
    return at_rows(columns, inputs["query"].shape[1], lambda row: row), columns


def in_segments(inputs, mask, segment_ids):
    """They count from 0 in each segment; hidden keys, and rows before every key, stand at 0, rows at hidden keys where the next token would."""
    ids = segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids
    real = key_mask_of(inputs, mask)
    places = places_in_segments(real, ids)
    return at_rows(places, inputs["query"].shape[1], np.zeros_like), np.where(real, places, 0)


POSITION_REFERENCES = {
    "shaw": with_positions(shaw, counted),
    "disentangled": with_positions(disentangled, counted),
    "xl": with_positions(xl, counted),
    "xpos": with_positions(xpos, counted),
    "tupe": with_positions(tupe, in_segments),
    "rerope": with_positions(rerope, slots),
}
