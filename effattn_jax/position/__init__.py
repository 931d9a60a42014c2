"""Positions: where a token stands, told to the model by angles, by biases on scores, or by what is added to its embedding.

Every function is pure and needs jax and numpy only. Angles are computed in float32 at least, whatever the type of the
activations, and integer positions are exact far beyond the range where a float32 product would be (see `angles.py`).
"""

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
from effattn_jax.position.rotation import rotary
from effattn_jax.position.sinusoidal import sinusoidal_embedding

__all__ = [
    "Alibi",
    "KerpleLog",
    "KerplePower",
    "PositionBias",
    "Sandwich",
    "T5Bias",
    "alibi_slopes",
    "rotary",
    "sinusoidal_embedding",
    "t5_bucket",
]
