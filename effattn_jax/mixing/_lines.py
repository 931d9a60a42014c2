"""Initial weights and operation counts of the lines of `mixing.MIXERS`."""

from math import ceil, log2

import jax
import jax.numpy as jnp

__all__: list[str] = []

GMLP_RATIO = 6  # F / D, as in the source's models; half of it reaches the gate
TINY_HEAD = 64  # H of aMLP's attention
CONVOLUTION_WIDTH = 7  # W; the source grows it from 3 to 31 over the layers
REP_WIDTHS = (1, 3, 5, 7)


def _normal(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    return jax.random.normal(rng, shape, jnp.float32) / max(fan_in, 1) ** 0.5


def mlp(ratio: int):
    """Weights of an MLP along time with `ratio` hidden units a step."""

    def weights(rng, width, length, heads):
        del width, heads
        first, second = jax.random.split(rng)
        hidden = ratio * length
        return {
            "in_kernel": _normal(first, (hidden, length), length),
            "in_bias": jnp.zeros(hidden),
            "out_kernel": _normal(second, (length, hidden), hidden),
            "out_bias": jnp.zeros(length),
        }

    return weights


def mlp_flops(ratio: int):
    """Operations a token of an MLP along time."""

    def flops(width, length, heads):
        del heads
        return 4 * ratio * length * width

    return flops


def ffn_stack(rng, width, length, heads):
    """Both feed-forward layers with four hidden units a step or feature."""
    keys = jax.random.split(rng, 3)
    norm, hidden = (jnp.ones(width), jnp.zeros(width)), 4 * width
    channels = (_normal(keys[1], (width, hidden), width), jnp.zeros(hidden))
    channels += (_normal(keys[2], (hidden, width), hidden), jnp.zeros(width))
    tokens = tuple(mlp(4)(keys[0], width, length, heads).values())
    return {"token_norm": norm, "token_ffn": tokens, "channel_norm": norm, "channel_ffn": channels}


def ffn_stack_flops(width, length, heads):
    """Of both layers."""
    return mlp_flops(4)(width, length, heads) + 16 * width * width


def res_mlp(rng, width, length, heads):
    """One square matrix over time, the affine, and a LayerScale of 0.1."""
    del heads
    scales = {"scale": jnp.ones(width), "shift": jnp.zeros(width), "layer_scale": jnp.full(width, 0.1)}
    return {"kernel": _normal(rng, (length, length), length), "bias": jnp.zeros(length), **scales}


def square_flops(width, length, heads):
    """Operations a token of one square matrix over time."""
    del heads
    return 2 * length * width


def gmlp(rng, width, length, heads):
    """The gate starts open: W within 1e-3 / T_max of 0, b = 1."""
    del heads
    keys, hidden = jax.random.split(rng, 3), GMLP_RATIO * width
    half = hidden // 2
    return {
        "in_kernel": _normal(keys[0], (width, hidden), width),
        "in_bias": jnp.zeros(hidden),
        "kernel": jax.random.uniform(keys[1], (length, length), jnp.float32, -1, 1) * 1e-3 / max(length, 1),
        "bias": jnp.ones(length),
        "scale": jnp.ones(half),
        "shift": jnp.zeros(half),
        "out_kernel": _normal(keys[2], (half, width), half),
        "out_bias": jnp.zeros(width),
    }


def gmlp_flops(width, length, heads):
    """The projections in and out, and the gate."""
    return 3 * GMLP_RATIO * width * width + square_flops(GMLP_RATIO * width // 2, length, heads)


def amlp(rng, width, length, heads):
    """gMLP's weights and those of a tiny attention."""
    keys, half = jax.random.split(rng, 3), GMLP_RATIO * width // 2
    attention = {
        "attention_in_kernel": _normal(keys[1], (width, 3 * TINY_HEAD), width),
        "attention_out_kernel": _normal(keys[2], (TINY_HEAD, half), TINY_HEAD),
    }
    return gmlp(keys[0], width, length, heads) | attention


def amlp_flops(width, length, heads):
    """gMLP's operations and the tiny attention's."""
    half = GMLP_RATIO * width // 2
    attention = 2 * TINY_HEAD * (3 * width + half) + 4 * TINY_HEAD * length
    return gmlp_flops(width, length, heads) + attention


def fnet(rng, width, length, heads):
    """No weights at all."""
    del rng, width, length, heads
    return {}


def fnet_flops(width, length, heads):
    """Two fast Fourier transforms, 5 n log2 n each, over features and over time."""
    del heads
    return 5 * width * ceil(log2(max(width, 2)) + log2(max(length, 2)))


def lightweight(rng, width, length, heads):
    """A kernel a head."""
    del width, length
    return {"kernel": _normal(rng, (heads, CONVOLUTION_WIDTH), 1)}


def lightweight_flops(width, length, heads):
    """The taps of one kernel."""
    del length, heads
    return 2 * CONVOLUTION_WIDTH * width


def dynamic(rng, width, length, heads):
    """The projection that makes each token's kernel."""
    del length
    return {"kernel": _normal(rng, (width, heads, CONVOLUTION_WIDTH), width)}


def dynamic_flops(width, length, heads):
    """Making the kernels, and their taps."""
    return lightweight_flops(width, length, heads) + 2 * CONVOLUTION_WIDTH * heads * width


def rep_mlp(rng, width, length, heads):
    """A square matrix a head, convolutions of several widths, a bias a place."""
    del width
    keys = jax.random.split(rng, 1 + len(REP_WIDTHS))
    return {
        "kernel": _normal(keys[0], (heads, length, length), length),
        "convolutions": tuple(_normal(k, (heads, w), w) for k, w in zip(keys[1:], REP_WIDTHS, strict=True)),
        "bias": jnp.zeros((heads, length)),
    }
