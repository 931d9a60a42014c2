"""Positions: where a token stands, told to the model by angles, by biases on scores, or by what is added to its embedding.

Every function is pure and needs jax and numpy only. Angles are computed in float32 at least, whatever the type of the
activations, and integer positions are exact far beyond the range where a float32 product would be (see `angles.py`).
"""

from effattn_jax.position.absolute import (
    complex_order_embedding,
    floater_embedding,
    hierarchical_embedding,
    multiplicative_embedding,
)
from effattn_jax.position.biases import (
    Alibi,
    KerpleLog,
    KerplePower,
    PositionBias,
    Sandwich,
    T5Bias,
    alibi_slopes,
    t5_bucket,
)
from effattn_jax.position.frequencies import rotary_frequencies, yarn_temperature
from effattn_jax.position.lengths import log_length_scale, random_positions
from effattn_jax.position.linear import rotary_linear_attention
from effattn_jax.position.relative import disentangled_attention, shaw_attention
from effattn_jax.position.rerope import rerope_attention
from effattn_jax.position.rotation import rotary
from effattn_jax.position.sinusoidal import sinusoidal_embedding
from effattn_jax.position.untied import tupe_attention, xl_attention
from effattn_jax.position.xpos import xpos, xpos_attention, xpos_decay

__all__ = [
    "Alibi",
    "KerpleLog",
    "KerplePower",
    "PositionBias",
    "Sandwich",
    "T5Bias",
    "alibi_slopes",
    "complex_order_embedding",
    "disentangled_attention",
    "floater_embedding",
    "hierarchical_embedding",
    "log_length_scale",
    "multiplicative_embedding",
    "random_positions",
    "rerope_attention",
    "rotary",
    "rotary_frequencies",
    "rotary_linear_attention",
    "shaw_attention",
    "sinusoidal_embedding",
    "t5_bucket",
    "tupe_attention",
    "xl_attention",
    "xpos",
    "xpos_attention",
    "xpos_decay",
    "yarn_temperature",
]
