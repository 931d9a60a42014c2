"""Angles t * w_i for positions t and frequencies w_i, exact to float32 at any position.

    angle_i(t) = t * w_i  (mod 2 pi),   w_i = base^(-2i / dim)

A float32 product t * w_i is wrong by up to t * 6e-8 radians: 0.03 at t = 1e6, where rotary scores no longer depend on t
- s alone. Whole positions are therefore multiplied in fixed point: a frequency is a 64-bit fraction of a turn, the
product wraps at one turn as unsigned integers do, and only the remainder becomes a float. The error is at most
3e-7 radians, that of float32 itself near half a turn, and twice that just below 2^31, where float64 frequencies count.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

_TURN = 2.0 * np.pi


def inverse_frequencies(dim: int, base: float) -> np.ndarray:
    """w_i = base^(-2i / dim) for i < dim / 2, float64; `dim` must be even and positive, `base` positive."""
    check_pairs(dim)
    if not base > 0:
        raise ValueError(f"base must be positive; got {base}")
    return float(base) ** (-np.arange(0, dim, 2) / dim)


def check_pairs(dim: int) -> None:
    """Raises the ValueError for a number of features that does not come in pairs."""
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, since features are turned in pairs; got {dim}")


def given_frequencies(frequencies: Any, size: int, rule: str) -> np.ndarray | jax.Array:
    """Frequencies of a caller, (size,) as `rule` says it; lists are constants, as numpy arrays are."""
    frequencies = frequencies if isinstance(frequencies, jax.Array) else np.asarray(frequencies)
    if frequencies.shape != (size,):
        raise ValueError(f"frequencies must have shape {rule} = ({size},); got {frequencies.shape}")
    if not _is_real(frequencies):
        raise ValueError(f"frequencies must be real numbers; got {frequencies.dtype}")
    return frequencies


def given_positions(positions: ArrayLike, lead: tuple[int, ...], name: str = "positions") -> jax.Array:
    """Positions of a caller that broadcast to (*B, T), with as many axes."""
    positions = jnp.asarray(positions)
    fits = all(size in (1, axis) for size, axis in zip(positions.shape[::-1], lead[::-1]))
    if positions.ndim > len(lead) or not fits:
        raise ValueError(f"{name} must broadcast to (*B, T) = {lead}; got {positions.shape}")
    if not _is_real(positions):
        raise ValueError(f"{name} must be integers or real floats; got {positions.dtype}")
    return signed(positions).reshape((1,) * (len(lead) - positions.ndim) + positions.shape)


def _is_real(x: np.ndarray | jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)


def signed(positions: ArrayLike) -> jax.Array:
    """Whole positions in a signed type of 32 bits or more, whose differences and sizes do not wrap; floats as they are."""
    positions = jnp.asarray(positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        return positions
    return positions.astype(jnp.int64 if positions.dtype.itemsize > 4 else jnp.int32)


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
    rest = (turns - coarse) * 2.0**16
    fine = np.floor(rest)
    finest = _ranked(np.floor((rest - fine) * 2.0**16).astype(np.int32), positions.ndim)
    coarse, fine = (_ranked(part.astype(np.uint32), positions.ndim) for part in (coarse, fine))
    # A negative position wraps to 2^32 - |t|; its high half must then be the arithmetic shift, hence the signed one.
    t = positions.astype(jnp.int32)[..., None]
    low, high = (t & 0xFFFF).astype(jnp.uint32), t >> 16
    carried = ((low * fine) >> 16) + ((high * finest) >> 16).astype(jnp.uint32)
    wrapped = t.astype(jnp.uint32) * coarse + high.astype(jnp.uint32) * fine + carried
    return jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * np.float32(_TURN / 2.0**32)


def _ranked(vector: np.ndarray | jax.Array, rank: int) -> jax.Array:
    return jnp.asarray(vector).reshape((1,) * rank + (-1,))
