"""Sinusoidal embedding (Vaswani et al. 2017): fixed waves of geometrically spaced wavelengths.

p_{t,2i} = sin(t * base^(-2i / dim)),   p_{t,2i+1} = cos(t * base^(-2i / dim))
"""

import jax
import jax.numpy as jnp

from effattn_jax.position.angles import angles, inverse_frequencies


def sinusoidal_embedding(positions: jax.Array, dim: int, *, base: float = 10000.0) -> jax.Array:
    """Fixed sine and cosine features of positions, interleaved: (...) -> (..., dim) float32.

    p_{t,2i} = sin(t * base^(-2i / dim)) and p_{t,2i+1} = cos of the same angle, so p_t . p_s depends on t - s only and
    is dim / 2 at t = s.

    Args:
      positions: integers (angles right to float32 below 2^31) or floats, any shape.
      dim: number of features, even.
      base: the longest wavelength is 2 pi * base, approached by the last pair.

    Returns:
      Array of shape positions.shape + (dim,), values in [-1, 1].

    Raises:
      ValueError: dim is odd or not positive, base is not positive.

    Cost: O(dim) a position, no state. Source: "Attention is all you need", section 3.5, arXiv 1706.03762.

    >>> import jax.numpy as jnp
    >>> sinusoidal_embedding(jnp.arange(2), 4).round(2).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    angle = angles(positions, inverse_frequencies(dim, base))
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], dim)
