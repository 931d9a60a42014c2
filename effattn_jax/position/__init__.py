"""Positions: where a token stands, told to the model by angles.

Every function is pure and needs jax and numpy only. Angles are computed in float32 at least, whatever the type of the
activations, and integer positions are exact far beyond the range where a float32 product would be (see `angles.py`).
"""

from effattn_jax.position.rotation import rotary
from effattn_jax.position.sinusoidal import sinusoidal_embedding

__all__ = ["rotary", "sinusoidal_embedding"]
