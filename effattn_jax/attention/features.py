"""Feature maps phi of linear attention: sim(q, k) = phi(q) . phi(k), each a function of (..., H) arrays.

A map of the table is elementwise or acts on the last axis alone, so that it may run inside a chunk.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt, prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, choose, floating
from effattn_jax._derivatives import Fixed
from effattn_jax._places import split_like
from effattn_jax._products import softmax

__all__ = ["FEATURE_MAPS", "cosine_features", "dpfp_features", "elu_plus_one", "hedgehog_features", "taylor_features"]


def elu_plus_one(x: jax.Array) -> jax.Array:
    """elu(x) + 1: x + 1 for x > 0 and exp(x) below; positive everywhere (H -> H). Source: arXiv:2006.16236.

    >>> import jax.numpy as jnp
    >>> print(elu_plus_one(jnp.array([0.0, 1.0])))
    [1. 2.]
    """
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def cosine_features(x: jax.Array) -> jax.Array:
    """[1, x / |x|]: phi(q) . phi(k) = 1 + cos(q, k) (H -> H + 1); x = 0 gives [1, 0] with zero gradient.

    Weights are >= 0; they all vanish only where every key points away from the query. Any scale of x gives the same features.
    Source: Su, https://kexue.fm/archives/7546.

    >>> import jax.numpy as jnp
    >>> print(cosine_features(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[1.  0.6 0.8]
     [1.  0.  0. ]]
    """
    # Dividing by the largest entry first keeps squares in range; as the result does not depend on it, it is a constant.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    largest = jnp.minimum(
        largest, jnp.finfo(x.dtype).max / 8
    )  # by more XLA divides as a product with what it flushes to 0
    nonzero = largest > 0
    x = x / jnp.where(nonzero, largest, 1)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    unit = jnp.where(nonzero, x * jax.lax.rsqrt(jnp.where(nonzero, squares, 1)), 0)
    return jnp.concatenate([jnp.ones_like(squares), unit], axis=-1)


def taylor_features(x: jax.Array) -> jax.Array:
    """Second order of exp: phi(q) . phi(k) = 1 + s + s^2 / 2 >= 1/2 with s = q . k / sqrt(H)  (H -> 1 + H + H (H + 1) / 2).

    With y = x / H^(1/4): [1, y, y_i^2 / sqrt(2), y_i y_j for i < j], the symmetric half of the products. Source: arXiv:2402.18668.

    >>> import jax.numpy as jnp
    >>> q, k = jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0])
    >>> s = q @ k / 2**0.5
    >>> bool(jnp.allclose(taylor_features(q) @ taylor_features(k), 1 + s + s**2 / 2))
    True
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    squares = x * x * (1 / sqrt(2))
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares, *_products_of_two(x)], axis=-1)


def taylor_of_products(dim: int, products: jax.Array) -> jax.Array:
    """phi(q) . phi(k) of `taylor_features` from q . k.

    >>> import jax.numpy as jnp
    >>> print(taylor_of_products(4, jnp.array([0.0, 4.0])))
    [1. 5.]
    """
    s = products * dim**-0.5
    return 1 + s + s * s / 2


def _products_of_two(x: jax.Array) -> list[jax.Array]:
    """x_i x_j for all i < j, in few pieces, since each is a handful of operations: across groups of features, then within all of them at once.

    Each is a product of arrays, whose derivatives are products too: XLA's fused sums of products are slow on CPU (`_products.row_products`).
    """
    dim = x.shape[-1]
    size = max((n for n in range(1, isqrt(dim) + 1) if dim % n == 0), default=1)
    groups = x.reshape(*x.shape[:-1], dim // size, size)

    def piece(rule, a, b):
        out = jnp.einsum(rule, a, b, precision="highest")
        return out.reshape(*x.shape[:-1], prod(out.shape[x.ndim - 1 :]))

    across = [piece("...a,...b->...ab", groups[..., i, :], x[..., (i + 1) * size :]) for i in range(dim // size - 1)]
    within = [piece("...g,...gb->...gb", groups[..., i], groups[..., i + 1 :]) for i in range(size - 1)]
    return across + within


def dpfp_features(x: jax.Array, *, order: int = 1) -> jax.Array:
    """Deterministic parameter-free projection: r_i r_{i + n} for n = 1 .. order, r = relu([x, -x])  (H -> 2 H order).

    Features are >= 0 and few of them are not 0, so a query may meet no key: such a row gives 0. Source: arXiv:2102.11174.

    >>> import jax.numpy as jnp
    >>> print(dpfp_features(jnp.array([2.0, 3.0])))
    [6. 0. 0. 0.]
    """
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    turned = [jnp.concatenate([r[..., n:], r[..., :n]], axis=-1) for n in range(1, order + 1)]
    return jnp.concatenate([r * other for other in turned], axis=-1)


def hedgehog(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[softmax(x W), softmax(-x W)] for x (..., N, H) and weights (N, H, P) or (H, P)."""
    dtype = jnp.result_type(x, weights)
    if weights.ndim == 3:
        weights = split_like(weights, 0, x, x.ndim - 2)
    rule = "...nh,nhp->...np" if weights.ndim == 3 else "...h,hp->...p"
    logits = jnp.einsum(rule, x.astype(dtype), weights.astype(dtype))
    return jnp.concatenate([softmax(logits)[0], softmax(-logits)[0]], axis=-1)


def hedgehog_features(weights: ArrayLike) -> Callable[[jax.Array], jax.Array]:
    """The learnable map [softmax(x W), softmax(-x W)] as a function of x (..., H) -> (..., 2 P); positive everywhere.

    Args:
      weights: W, (H, P) for all heads or (N, H, P), one a head of x (..., N, H). The identity is the usual start.

    Raises:
      ValueError: weights of another rank or no floating array.

    Source: arXiv:2402.04347.

    >>> import jax.numpy as jnp
    >>> print(hedgehog_features(jnp.eye(2))(jnp.zeros(2)))
    [0.5 0.5 0.5 0.5]
    """
    (weights,) = floating(weights=weights)
    if weights.ndim not in (2, 3):
        raise ValueError(f"weights must have shape (H, P) or (N, H, P); got {weights.shape}")
    return partial(hedgehog, weights=weights)


FEATURE_MAPS: dict[str, Callable[..., jax.Array]] = {
    "elu": elu_plus_one,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
    "exp": jnp.exp,
    "cosine": cosine_features,
    "taylor": taylor_features,
    "dpfp": dpfp_features,
    "hedgehog": hedgehog,
}


def num_features(feature_map: str, head_dim: int) -> int:
    """M of a map of the table; hedgehog's with a square W."""
    x = jax.ShapeDtypeStruct((head_dim,), jnp.float32)
    more = (jax.ShapeDtypeStruct((head_dim, head_dim), jnp.float32),) if feature_map == "hedgehog" else ()
    return jax.eval_shape(FEATURE_MAPS[feature_map], x, *more).shape[-1]


def hedgehog_weights(rng: jax.Array, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, jax.Array]:
    """Identities, from where hedgehog starts: the features of x itself."""
    del rng
    eye = jnp.eye(head_dim, dtype=jnp.float32)
    heads = {"query_weights": num_heads, "key_weights": num_kv_heads}
    return {name: jnp.broadcast_to(eye, (count, head_dim, head_dim)) for name, count in heads.items()}


class Maps(NamedTuple):
    """A feature map of queries and of keys, and where it may run."""

    query: Callable
    key: Callable
    inside: Callable | None = (
        None  # the one map of both where it closes over no array, so that it may run inside a chunk
    )
    weights: tuple[jax.Array, jax.Array] | None = None  # hedgehog's, for queries and keys
    exponential: bool = False  # exp, whose sums need a running maximum
    of_products: Callable | None = None  # phi(q).phi(k) from q.k, where that costs less than the features


def resolve(feature_map: Any, query_weights: Any, key_weights: Any, heads: tuple[int, int], head_dim: int) -> Maps:
    """The maps that a name, a function or a pair of functions (for queries, for keys) stands for; heads are (N, K)."""
    given = {"query_weights": query_weights, "key_weights": key_weights}
    if feature_map != "hedgehog" and any(weights is not None for weights in given.values()):
        name = next(name for name, weights in given.items() if weights is not None)
        raise ValueError(f"{name} belongs to feature_map='hedgehog'; got feature_map={feature_map!r}")
    if isinstance(feature_map, tuple | list):
        if len(feature_map) != 2 or not all(map(callable, feature_map)):
            raise ValueError(
                f"feature_map as a pair must hold two functions, for query and for key; got {feature_map!r}"
            )
        return Maps(*feature_map)
    if callable(feature_map):
        return Maps(feature_map, feature_map)
    choose("feature_map", feature_map, FEATURE_MAPS)
    if feature_map == "hedgehog":
        weights = tuple(_weights(name, w, n, head_dim) for (name, w), n in zip(given.items(), heads, strict=True))
        if weights[0].shape[-1] != weights[1].shape[-1]:
            raise ValueError(
                f"query_weights and key_weights must have one size P; got {weights[0].shape} and {weights[1].shape}"
            )
        return Maps(*map(hedgehog_features, weights), weights=weights)
    function = FEATURE_MAPS[feature_map]
    of_products = Fixed(taylor_of_products, head_dim) if feature_map == "taylor" else None
    return Maps(function, function, inside=function, exponential=feature_map == "exp", of_products=of_products)


def _weights(name: str, weights: Any, heads: int, head_dim: int) -> jax.Array:
    if weights is None:
        raise ValueError(f"{name} must be given for feature_map='hedgehog', an array (heads, H, P) or (H, P)")
    (weights,) = floating(**{name: weights})
    if weights.shape[:-1] not in ((head_dim,), (heads, head_dim)):
        raise ValueError(f"{name} must have shape {(heads, head_dim, 'P')} or {(head_dim, 'P')}; got {weights.shape}")
    return weights
