"""Naive references of the attention-free mixers: each document of a row by itself, without its padding, one formula at a time."""

import jax.numpy as jnp
import numpy as np


def key_mask(mask, shape):
    """(B, T) from a mask of that shape or (B, 1, 1, T), True everywhere without one."""
    return np.ones(shape, bool) if mask is None else np.asarray(mask).reshape(shape)


def each_document(function, x, mask, segment_ids):
    """function (n, D) -> (n, D) of the real tokens of each document, put back where they stood; 0 at padding."""
    real = key_mask(mask, x.shape[:2])
    ids = np.zeros(x.shape[:2], int) if segment_ids is None else np.asarray(segment_ids)
    rows = []
    for b in range(x.shape[0]):
        out = jnp.zeros(x.shape[1:], x.dtype)
        cuts = [0, *(np.flatnonzero(np.diff(ids[b])) + 1), x.shape[1]]
        for start, stop in zip(cuts, cuts[1:]):
            places = start + np.flatnonzero(real[b, start:stop])
            out = out.at[places].set(function(x[b, places])) if len(places) else out
        rows.append(out)
    return jnp.stack(rows) if rows else x


def by_document(formula):
    """A reference from `formula(x (n, D), is_causal, **weights) -> (n, D)` for one document."""

    def reference(inputs, *, is_causal=True, mask=None, segment_ids=None, **weights):
        return each_document(lambda x: formula(x, is_causal, **weights), inputs["inputs"], mask, segment_ids)

    return reference


def gelu(x):
    return 0.5 * x * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale[None] + shift[None]


def softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def square(kernel, n, is_causal):
    return kernel[:n, :n] * (np.tri(n) if is_causal else np.ones((n, n)))


def mlp_mixer(x, is_causal, in_kernel, in_bias, out_kernel, out_bias):
    n, (hidden, length) = len(x), in_kernel.shape
    if is_causal:  # hidden unit f belongs to step f // (F / T_max)
        step = np.arange(hidden) // (hidden // length)
        in_kernel = in_kernel * (np.arange(length)[None, :] <= step[:, None])
        out_kernel = out_kernel * (step[None, :] <= np.arange(length)[:, None])
    units = gelu(in_kernel[:, :n] @ x + in_bias[:, None])
    return out_kernel[:n] @ units + out_bias[:n, None]


def ffn_stack(x, is_causal, token_norm, token_ffn, channel_norm, channel_ffn):
    x = x + mlp_mixer(layer_norm(x, *token_norm), is_causal, *token_ffn)
    w1, b1, w2, b2 = channel_ffn
    return x + gelu(layer_norm(x, *channel_norm) @ w1 + b1[None]) @ w2 + b2[None]


def res_mlp(x, is_causal, kernel, bias, scale, shift, layer_scale):
    n = len(x)
    mixed = square(kernel, n, is_causal) @ (x * scale[None] + shift[None]) + bias[:n, None]
    return layer_scale[None] * mixed


def gmlp(x, is_causal, in_kernel, in_bias, kernel, bias, scale, shift, out_kernel, out_bias, addition=0.0):
    n = len(x)
    z1, z2 = jnp.split(gelu(x @ in_kernel + in_bias[None]), 2, axis=-1)
    gate = square(kernel, n, is_causal) @ layer_norm(z2, scale, shift) + bias[:n, None] + addition
    return (z1 * gate) @ out_kernel + out_bias[None]


def amlp(x, is_causal, attention_in_kernel, attention_out_kernel, **weights):
    query, key, value = jnp.split(x @ attention_in_kernel, 3, axis=-1)
    logits = query @ key.T / np.sqrt(query.shape[-1])
    logits = jnp.where(np.tri(len(x)) > 0, logits, -1e30) if is_causal else logits
    return gmlp(x, is_causal, addition=softmax(logits) @ value @ attention_out_kernel, **weights)


def fnet(x, is_causal):
    assert not is_causal
    time, features = (np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in x.shape)
    both = (time[:, :, None, None] * features[None, None]).real  # (frequency, time, feature, frequency)
    return jnp.einsum("tsdk,sd->tk", both, x)


def lags(x, width, is_causal):
    """(W, n, D): x_{t - j}, or x_{t + W // 2 - j}, zeros outside."""
    ahead = 0 if is_causal else width // 2
    steps = np.arange(len(x))[None, :] + ahead - np.arange(width)[:, None]
    inside = (steps >= 0) & (steps < len(x))
    return jnp.where(inside[..., None], x[np.clip(steps, 0, len(x) - 1)], 0.0)


def lightweight(x, is_causal, kernel):
    heads, width = kernel.shape
    weights = jnp.repeat(softmax(kernel), x.shape[1] // heads, axis=0)  # (D, W)
    return jnp.einsum("dw,wnd->nd", weights, lags(x, width, is_causal))


def dynamic(x, is_causal, kernel):
    heads, width = kernel.shape[1:]
    weights = softmax(jnp.einsum("nd,dhw->nhw", x, kernel))
    weights = jnp.repeat(weights, x.shape[1] // heads, axis=1)  # (n, D, W)
    return jnp.einsum("ndw,wnd->nd", weights, lags(x, width, is_causal))


def rep_mlp(x, is_causal, kernel, convolutions, bias, norms=None):
    """Every branch by itself."""
    n, groups = len(x), kernel.shape[0]
    size = x.shape[1] // groups

    def normed(z, index):
        if norms is None:
            return z
        scale, offset, mean, variance = (jnp.repeat(a, size)[None] for a in norms[index])
        return scale * (z - mean) / jnp.sqrt(variance + 1e-5) + offset

    parts = [
        square(kernel[g], n, is_causal) @ x[:, g * size : (g + 1) * size] + bias[g, :n, None] for g in range(groups)
    ]
    out = normed(jnp.concatenate(parts, axis=1), 0)
    for index, k in enumerate(convolutions, start=1):
        weights = jnp.repeat(k, size, axis=0)
        out = out + normed(jnp.einsum("dw,wnd->nd", weights, lags(x, k.shape[1], is_causal)), index)
    return out


TOKEN_REFERENCES = {
    "mlp_mixer": by_document(mlp_mixer),
    "ffn_stack": by_document(ffn_stack),
    "res_mlp": by_document(res_mlp),
    "gmlp": by_document(gmlp),
    "amlp": by_document(amlp),
    "fnet": by_document(fnet),
    "lightweight_convolution": by_document(lightweight),
    "dynamic_convolution": by_document(dynamic),
    "rep_mlp": by_document(rep_mlp),
}
