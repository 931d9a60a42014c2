"""Rotary position embedding (RoPE): each pair of features is turned by an angle that grows with the position.

(x_a, x_b) -> (x_a cos u - x_b sin u, x_a sin u + x_b cos u),   u = t * w_i,   w_i = base^(-2i / dim)
so that R(t) q . R(s) k = q . R(s - t) k: scores depend on the distance only.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import floating
from effattn_jax.position.angles import (
    angles,
    check_pairs,
    given_frequencies,
    given_positions,
    inverse_frequencies,
    wide_positions,
)


def rotary(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10000.0,
    interleaved: bool = False,
    scaling: float | np.ndarray | jax.Array | None = None,
    dim: int | None = None,
    frequencies: np.ndarray | jax.Array | None = None,
) -> jax.Array:
    """Turns pairs of features of queries or keys by angles proportional to their positions.

    (x_a, x_b) -> (x_a cos u - x_b sin u, x_a sin u + x_b cos u) with u = t * scaling * base^(-2i / dim). Pairs are (i,
    i + dim/2) by default (Llama, NeoX) or (2i, 2i + 1) with `interleaved` (the paper); both are the same up to a
    permutation of features.

    Args:
      x: (*B, T, N, H), any floating type.
      positions: (*B, T), or any shape that broadcasts to it such as (T,); integers (angles right to float32 up to 2^31) or floats.
      base: sets the lowest frequency, base^(-1 + 2 / dim).
      interleaved: the layout of the pairs.
      scaling: factor on the frequencies, a number or (dim/2,): 1/k is position interpolation by k. None is 1.
      frequencies: (dim/2,) angles a position, in place of base and of scaling: what `rotary_frequencies` returns.
      dim: only the first `dim` features are turned, the others pass unchanged. None is all of H.

    Returns:
      Array like x: same shape, same dtype (the rotation itself is computed in float32 at least).

    Raises:
      ValueError: dim odd or larger than H, frequencies or scaling of another shape, or both, positions that are no real numbers or not
        broadcastable to (*B, T), x of fewer than three axes or not floating.

    Cost: O(H) a token and head, no state. Source: RoFormer, arXiv 2104.09864.

    >>> import jax, jax.numpy as jnp
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    >>> score = lambda t, s: jnp.sum(rotary(q, jnp.array([t])) * rotary(k, jnp.array([s])))
    >>> bool(jnp.allclose(score(5, 3), score(1_000_005, 1_000_003), atol=1e-5))
    True
    """
    (x,) = floating(x=x)
    if x.ndim < 3:
        raise ValueError(f"x must have the shape (*B, T, N, H); got {x.shape}")
    positions = wide_positions(given_positions(positions, x.shape[:-2]), x.dtype)
    dim = x.shape[-1] if dim is None else dim
    if dim > x.shape[-1]:
        raise ValueError(f"dim must be at most the head dimension {x.shape[-1]}; got {dim}")
    check_pairs(dim)
    angle = angles(positions, _frequencies(dim, base, scaling, frequencies))[..., None, :]
    turned = turn(x[..., :dim].astype(jnp.promote_types(x.dtype, jnp.float32)), angle, interleaved).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)


def _frequencies(dim, base, scaling, frequencies):
    if frequencies is not None:
        if scaling is not None:
            raise ValueError(f"scaling must be None where frequencies, which replace it, are given; got {scaling!r}")
        return given_frequencies(frequencies, dim // 2, "(dim/2,)")
    frequencies = inverse_frequencies(dim, base)
    if scaling is None:
        return frequencies
    scaling = scaling if isinstance(scaling, jax.Array) else np.asarray(scaling)
    if scaling.shape not in ((), frequencies.shape):
        raise ValueError(f"scaling must be a number or of shape (dim/2,) = {frequencies.shape}; got {scaling.shape}")
    return frequencies * scaling


def turn(x: jax.Array, angle: jax.Array, interleaved: bool) -> jax.Array:
    """Pairs of features (..., H) turned by angles (..., H/2)."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    pair = first * cos - second * sin, first * sin + second * cos
    return jnp.stack(pair, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(pair, axis=-1)
