"""Random features of Performer's kernels, and the parameters of their variants.

    phi(x) = m^(-1/2) exp(A |w|^2 + B w.x - |x|^2 / 2),  B = sqrt(1 - 4 A),  w ~ N(0, I)      E phi(q).phi(k) = (1 - 4 A)^(-H/2) exp(q.k)

A = 0 is FAVOR+ (arXiv:2009.14794), A < 0 damps the directions whose norm happens to be large (arXiv:2205.15317). Every function of a kernel
returns features with the logarithm of a factor apart, so that no feature overflows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import choose, positive
from effattn_jax._products import row_products, scaled_rows

__all__ = ["random_features"]

RELU_EPSILON = 1e-3


@compiled
def random_features(
    rng: jax.Array,
    num_features: int,
    head_dim: int,
    *,
    orthogonal: bool = True,
    antithetic: bool = False,
    norms: str = "gaussian",
) -> jax.Array:
    """The directions w_1 ... w_M of a random feature map, (M, H) in float32; each row is N(0, I_H) by itself.

    Orthogonal: blocks of H rows are the Q of a Gaussian matrix, its signs fixed by R's diagonal so that Q is uniform over rotations; the
    last block is cut. Norms are drawn apart, as those of N(0, I_H). Another projection comes from another key, never from the data.

    Args:
      rng: the key that alone decides the draw.
      num_features: M.
      head_dim: H.
      orthogonal: False draws independent rows.
      antithetic: rows come as w and -w, which cancels all errors of odd order.
      norms: "gaussian", or "fixed" at sqrt(H): the kernel is then slightly below exp(q.k) at large norms, with less variance.

    Raises:
      ValueError: sizes that are no positive integers, an unknown name for norms.

    Cost O(M H^2). Source: arXiv:2009.14794.

    >>> import jax
    >>> w = random_features(jax.random.key(0), 6, 4)
    >>> w.shape, bool(abs(w[0] @ w[1]) < 1e-5)
    ((6, 4), True)
    """
    positive(num_features=num_features, head_dim=head_dim)
    choose("norms", norms, ("gaussian", "fixed"))
    rows = -(-num_features // 2) if antithetic else num_features
    key_directions, key_norms = jax.random.split(rng)
    blocks = -(-rows // head_dim)
    gaussian = jax.random.normal(key_directions, (blocks, head_dim, head_dim), jnp.float32)
    if orthogonal:
        q, r = jnp.linalg.qr(gaussian)
        sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        directions = jnp.swapaxes(q * sign[:, None], 1, 2)  # columns of Q as rows, so that a cut block keeps whole ones
    else:
        directions = gaussian / jnp.linalg.norm(gaussian, axis=-1, keepdims=True)
    directions = directions.reshape(-1, head_dim)[:rows]
    if norms == "fixed":
        lengths = jnp.full((rows, 1), head_dim**0.5, jnp.float32)
    else:
        lengths = jnp.linalg.norm(jax.random.normal(key_norms, (rows, head_dim), jnp.float32), axis=-1, keepdims=True)
    projection = directions * lengths
    return jnp.concatenate([projection, -projection])[:num_features] if antithetic else projection


class Weights(NamedTuple):
    """What the functions of a kernel take beside x."""

    projection: jax.Array  # (M, H), with the square root of the scale and B in it
    offset: jax.Array  # A |w|^2, (M,)
    half: jax.Array  # factor on |x|^2, (1,)


class Kernel(NamedTuple):
    """Features of queries and of keys; a factor common to all features of a query cancels, that of a key is its level."""

    query: Callable  # (x (..., H), Weights) -> (..., M)
    key: Callable  # (x (..., H), Weights) -> ((..., M), level (...)): the features are the first times exp(level)
    features: int = 1  # features a direction


def _dot(x: jax.Array, weights: Weights) -> jax.Array:
    return jnp.einsum("...h,mh->...m", x, weights.projection, precision=lax.Precision.HIGHEST)


def _exponents(x: jax.Array, weights: Weights) -> jax.Array:
    dots = _dot(x, weights)
    return dots + weights.offset.reshape((1,) * (dots.ndim - 1) + (-1,))


def _half_norm(x: jax.Array, weights: Weights) -> jax.Array:
    return row_products(x, x) * weights.half[0]


def _below_one(exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    level = lax.stop_gradient(jnp.max(exponent, axis=-1))
    return jnp.exp(exponent - level[..., None]), level


def _softmax_query(x, weights):
    return _below_one(_exponents(x, weights))[0]


def _softmax_key(x, weights):
    return _below_one(_exponents(x, weights) - _half_norm(x, weights)[..., None])


def _waves(x, weights):
    angles = _dot(x, weights)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _trigonometric_key(x, weights):
    exponent = _half_norm(x, weights)
    level = lax.stop_gradient(exponent)
    return scaled_rows(jnp.exp(exponent - level), _waves(x, weights)), level


def _relu(x, weights):
    return jax.nn.relu(_dot(x, weights)) + RELU_EPSILON


KERNELS: dict[str, Kernel] = {
    "softmax": Kernel(_softmax_query, _softmax_key),
    "trigonometric": Kernel(_waves, _trigonometric_key, features=2),
    "relu": Kernel(_relu, lambda x, weights: (_relu(x, weights), jnp.zeros_like(x[..., 0]))),
}


def prepare(kernel: str, projection: jax.Array, scale: Any, damping: float, dtype: Any) -> Weights:
    """The weights of a kernel whose similarity estimates exp(scale q.k); `damping` is A."""
    projection = projection.astype(dtype)
    if kernel == "relu":
        return Weights(projection, jnp.zeros_like(projection[:, 0]), jnp.zeros((1,), dtype))
    scale = jnp.asarray(scale, dtype).reshape(1)  # rank 1: the loop over chunks carries no scalars
    offset = damping * jnp.sum(projection * projection, axis=-1)
    return Weights(projection * jnp.sqrt((1 - 4 * damping) * scale[0]), offset, scale / 2)


def optimal_damping(norm: float, head_dim: int) -> float:
    """A of least variance for E |q + k|^2 = `norm`, q and k with the scale in them: arXiv:2205.15317, equation of OPRF.

    >>> round(optimal_damping(4.0, 64), 4)
    -0.0284
    """
    if norm == 0:
        return 0.0
    rest = 2 * norm + head_dim
    root = (np.sqrt(rest**2 + 8 * head_dim * norm) - rest) / (4 * norm)
    return float((1 - 1 / root) / 8)


def best_temper(norm: float, head_dim: int, num_features: int) -> float:
    """The factor t <= 1 on the scores with the least expected error of the weights exp(t s), estimated from M features.

    With r = E |q|^2 = `norm` / 2 and antithetic orthogonal directions, whose errors begin at the fourth order, the variance of a weight is
    2 / M (cosh(2 t r) - 1 - 2 t^2 r^2), and its bias (1 - t) std(s), std(s) = r / sqrt(H).

    >>> 0.5 < best_temper(4.0, 64, 256) < 0.6
    True
    """
    r = norm / 2
    t = np.linspace(0.02, 1, 99)
    variance = 2 / num_features * (np.cosh(np.minimum(2 * t * r, 300)) - 1 - 2 * (t * r) ** 2)
    return float(t[np.argmin(variance + ((1 - t) * r) ** 2 / head_dim)])
