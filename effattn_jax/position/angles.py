"""Angles t * w_i for positions t and frequencies w_i, exact to float32 at any position.

    angle_i(t) = t * w_i  (mod 2 pi),   w_i = base^(-2i / dim)

A float32 product t * w_i is wrong by up to t * 6e-8 radians: 0.03 at t = 1e6, where rotary scores no longer depend on t
- s alone. Whole positions are therefore multiplied in fixed point: a frequency is a 48-bit fraction of a turn, the
product wraps at one turn as unsigned integers do, and only the remainder becomes a float. The error is about 1e-7
radians at every position below 2^31.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_TURN = 2.0 * np.pi


def inverse_frequencies(dim: int, base: float) -> np.ndarray:
    """w_i = base^(-2i / dim) for i < dim / 2, float64; `dim` must be even and positive, `base` positive."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, since features are turned in pairs; got {dim}")
    if not base > 0:
        raise ValueError(f"base must be positive; got {base}")
    return float(base) ** (-np.arange(0, dim, 2) / dim)


def angles(positions: jax.Array, frequencies: np.ndarray | jax.Array) -> jax.Array:
    """positions (...) times frequencies (F,) -> angles (..., F), float32 (float64 for float64 positions).

    Frequencies given as a numpy array are constants and take the exact path for whole positions; a jax array (a traced
    or learned scaling) is multiplied in floating point.
    """
    positions = jnp.asarray(positions)
    whole = jnp.issubdtype(positions.dtype, jnp.integer)
    if whole and isinstance(frequencies, np.ndarray):
        return _fixed_point_angles(positions, frequencies)
    dtype = jnp.promote_types(positions.dtype, jnp.float32) if not whole else jnp.float32
    return positions.astype(dtype)[..., None] * _ranked(frequencies, positions.ndim).astype(dtype)


def wide_positions(positions: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Positions whose angles are as exact as features of that dtype."""
    return positions.astype(dtype) if dtype == jnp.float64 else positions


def _fixed_point_angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    turns = np.mod(frequencies / _TURN, 1.0) * 2.0**32
    coarse = np.floor(turns)
    fine = np.floor((turns - coarse) * 2.0**16)
    coarse, fine = (_ranked(part.astype(np.uint32), positions.ndim) for part in (coarse, fine))
    # A negative position wraps to 2^32 - |t|; its high half must then be the arithmetic shift, hence the signed one.
    t = positions.astype(jnp.int32)[..., None]
    low, high = (t & 0xFFFF).astype(jnp.uint32), (t >> 16).astype(jnp.uint32)
    wrapped = t.astype(jnp.uint32) * coarse + high * fine + ((low * fine) >> 16)
    return jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * np.float32(_TURN / 2.0**32)


def _ranked(vector: np.ndarray | jax.Array, rank: int) -> jax.Array:
    return jnp.asarray(vector).reshape((1,) * rank + (-1,))
