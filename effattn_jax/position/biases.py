"""Position biases: scores that depend on the distance of a key from a query, as objects with learnable arrays.

    s_ij = scale q_i . k_j + b(j - i)

Each object is a pytree, is passed to a softmax kernel as `bias=`, and is evaluated there a block at a time: on R + C - 1 distances for a block of
R rows and C columns. Neither it nor its gradient is ever a T x S array. State: none. Sources: at each class.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import positive
from effattn_jax.position.angles import angles, inverse_frequencies, signed, wide_positions
from effattn_jax.position.sinusoidal import sinusoidal_embedding

__all__ = ["Alibi", "KerpleLog", "KerplePower", "PositionBias", "Sandwich", "T5Bias", "alibi_slopes", "t5_bucket"]

SMALLEST = 1e-2  # of KERPLE's parameters, as in its authors' code


class PositionBias:
    """A bias by distance, b(j - i) for each head; what a kernel takes as `bias=` beside an array.

    A subclass is a frozen dataclass whose arrays are pytree leaves and has `at_distance`. Any other callable pytree
    `bias(query_positions (R,), key_positions (C,)) -> (N, R, C)` serves as well, without the short cut for whole blocks; its structure must
    differ from those of other biases (`jax.tree_util.register_dataclass` leaves the class out of it).

    Positions count the keys of a row that its key mask does not hide, from 0 and across segments: biases read differences only.
    """

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """b for each head: distances j - i of any shape (...), negative for keys of the past -> (N, ...)."""
        raise NotImplementedError

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """(T,) and (S,) positions -> (N, T, S), float32 at least."""
        return self.at_distance(signed(key_positions)[None, :] - signed(query_positions)[:, None])


def _bias(*static: str):
    """A frozen dataclass as a pytree: fields named here are static, the others leaves.

    Not by `jax.tree_util.register_dataclass`: of two such classes with as many fields JAX takes the structures for equal, so that where their
    hashes meet in a table one is computed by what was traced for the other. Here the class is part of the structure.
    """

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        leaves = [field.name for field in dataclasses.fields(cls) if field.name not in static]

        def flatten(bias):
            return tuple(getattr(bias, name) for name in leaves), (cls, *(getattr(bias, name) for name in static))

        def with_keys(bias):
            children, kind = flatten(bias)
            return tuple(zip(map(jax.tree_util.GetAttrKey, leaves), children, strict=True)), kind

        def unflatten(kind, children):
            return cls(**dict(zip(leaves, children, strict=True)), **dict(zip(static, kind[1:], strict=True)))

        jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten, flatten)
        return cls

    return register


def _heads(parameter: Any, distance: jax.Array) -> jax.Array:
    """(N,) as (N, 1, ...), to go with distances."""
    return jnp.asarray(parameter).reshape(-1, *(1,) * distance.ndim)


def _size(distance: jax.Array, dtype: Any) -> jax.Array:
    """|distance| as (1, ...) floats."""
    return jnp.abs(signed(distance)).astype(jnp.promote_types(dtype, jnp.float32))[None]


def alibi_slopes(num_heads: int) -> jax.Array:
    """ALiBi's slopes for any number of heads: 2^(-8h/N), h = 1..N, where N is a power of two.

    Else those of the next lower power P, and then every second one of those for 2P, from the first on.

    Args:
      num_heads: N.

    Returns:
      (N,) float32, positive.

    Raises:
      ValueError: num_heads is not a positive int.

    Source: Press et al., arXiv:2108.12409.

    >>> alibi_slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    positive(num_heads=num_heads)
    lower = 1 << (num_heads.bit_length() - 1)
    first = 2.0 ** (-8 * np.arange(1, lower + 1) / lower)
    between = 2.0 ** (-8 * np.arange(1, 2 * lower + 1, 2) / (2 * lower))
    return jnp.asarray(np.concatenate([first, between])[:num_heads], jnp.float32)


@_bias()
class Alibi(PositionBias):
    """ALiBi: -slope |j - i|, linear in the distance.

    Attributes:
      slopes: (N,), for keys of the past; `Alibi.initial(N)` has the published ones. Learnable, or constants of the caller.
      right: (N,) for keys of the future, without which both sides look alike; None: the same.

    Source: Press et al., arXiv:2108.12409.

    >>> import jax.numpy as jnp
    >>> Alibi.initial(8)(jnp.array([3]), jnp.arange(4))[0].tolist()
    [[-1.5, -1.0, -0.5, -0.0]]
    """

    slopes: Any
    right: Any = None

    @classmethod
    def initial(cls, num_heads: int, key: jax.Array | None = None) -> "Alibi":
        """The published slopes; the key is not read."""
        del key
        return cls(alibi_slopes(num_heads))

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """See `PositionBias`."""
        slopes = _heads(self.slopes, distance)
        if self.right is not None:
            slopes = jnp.where(distance[None] > 0, _heads(self.right, distance), slopes)
        return -slopes * _size(distance, slopes.dtype)


@_bias()
class KerpleLog(PositionBias):
    """KERPLE, logarithmic: -r1 log(1 + r2 |j - i|), both at least 0.01.

    Attributes:
      scale: r1, (N,).
      rate: r2, (N,).

    Source: Chi et al., arXiv:2205.09921; the bounds and `initial` are those of its authors' code.

    >>> import jax.numpy as jnp
    >>> print(KerpleLog(jnp.ones(1), jnp.ones(1)).at_distance(jnp.array([-3, 0])).round(3))
    [[-1.386 -0.   ]]
    """

    scale: Any
    rate: Any

    @classmethod
    def initial(cls, num_heads: int, key: jax.Array) -> "KerpleLog":
        """r1 uniform in [0, 2), r2 in [0, 1)."""
        positive(num_heads=num_heads)
        first, second = jax.random.uniform(key, (2, num_heads))
        return cls(2 * first, second)

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """See `PositionBias`."""
        scale, rate = (jnp.maximum(_heads(x, distance), SMALLEST) for x in (self.scale, self.rate))
        return -scale * jnp.log1p(rate * _size(distance, rate.dtype))


@_bias()
class KerplePower(PositionBias):
    """KERPLE, power: -r1 |j - i|^r2, r1 at least 0.01, r2 in [0.01, 2].

    Attributes:
      scale: r1, (N,).
      power: r2, (N,).

    Source: Chi et al., arXiv:2205.09921; the bounds and `initial` are those of its authors' code.

    >>> import jax.numpy as jnp
    >>> print(KerplePower(jnp.ones(1), jnp.full(1, 2.0)).at_distance(jnp.array([-3, 0])).round(3))
    [[-9. -0.]]
    """

    scale: Any
    power: Any

    @classmethod
    def initial(cls, num_heads: int, key: jax.Array) -> "KerplePower":
        """r1 uniform in [0, 1), r2 in [0, 2)."""
        positive(num_heads=num_heads)
        first, second = jax.random.uniform(key, (2, num_heads))
        return cls(first, 2 * second)

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """See `PositionBias`."""
        scale = jnp.maximum(_heads(self.scale, distance), SMALLEST)
        power = jnp.clip(_heads(self.power, distance), SMALLEST, 2)
        size = _size(distance, power.dtype)
        grown = jnp.exp(power * jnp.log(jnp.where(size == 0, 1, size)))  # 0^r2 has no derivative by r2
        return -scale * jnp.where(size == 0, 0, grown)


@_bias("dim", "base")
class Sandwich(PositionBias):
    """Sandwich: scale p_i . p_j of sinusoidal embeddings, scale sum_m cos((j - i) base^(-2m / dim)), which falls with the distance on average.

    Attributes:
      scale: (N,); `initial` has 1 / h for head h = 1..N, from sharp to flat.
      dim: features of the embedding, even.
      base: of its wavelengths.

    Source: Chi et al., arXiv:2212.10356, whose bias this is up to the scales.

    >>> import jax.numpy as jnp
    >>> print(Sandwich(jnp.ones(1), dim=8).at_distance(jnp.array([-1, 0])).round(3))
    [[3.535 4.   ]]
    """

    scale: Any
    dim: int = 128
    base: float = 10000.0

    @classmethod
    def initial(cls, num_heads: int, key: jax.Array | None = None) -> "Sandwich":
        """Scales 1 / h; the key is not read."""
        del key
        positive(num_heads=num_heads)
        return cls(1 / jnp.arange(1, num_heads + 1, dtype=jnp.float32))

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """See `PositionBias`."""
        waves = jnp.cos(angles(self._wide(distance), inverse_frequencies(self.dim, self.base))).sum(-1)
        return _heads(self.scale, distance) * waves[None]

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """See `PositionBias`; a product of embeddings, O(dim) less memory than cosines of all differences."""
        places = (self._wide(x) for x in (query_positions, key_positions))
        rows, columns = (sinusoidal_embedding(x, self.dim, base=self.base) for x in places)
        return jnp.asarray(self.scale)[:, None, None] * jnp.einsum("td,sd->ts", rows, columns)[None]

    def _wide(self, positions):
        return wide_positions(jnp.asarray(positions), jnp.asarray(self.scale).dtype)


def t5_bucket(relative: jax.Array, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128) -> jax.Array:
    """T5's bucket of a distance j - i: near distances one by one, far ones in steps of equal ratio up to max_distance.

    With b buckets a side (half of them, bidirectional, where those of keys after the query come last) and t = |j - i|: t itself below
    b / 2, then b/2 + floor(ln(2t / b) / ln(2 max_distance / b) b / 2), at most b - 1. Keys after the query are in bucket 0 otherwise.

    Args:
      relative: integers j - i, any shape.
      bidirectional: whether keys after the query have buckets of their own.
      num_buckets: of all, even where bidirectional.
      max_distance: where the last bucket begins to hold everything; above the number of exact buckets.

    Returns:
      int32 like relative, computed from whole bounds: the same on every device.

    Raises:
      ValueError: sizes that leave no bucket, or floats.

    Source: Raffel et al., arXiv:1910.10683.

    >>> import jax.numpy as jnp
    >>> t5_bucket(jnp.array([0, -7, -8, -12, -500, 1]), bidirectional=True).tolist()
    [0, 7, 8, 9, 15, 17]
    """
    relative = signed(relative)
    if not jnp.issubdtype(relative.dtype, jnp.integer):
        raise ValueError(f"relative must be integers, differences of positions; got {relative.dtype}{relative.shape}")
    side, exact = _buckets(bidirectional, num_buckets, max_distance)
    ratios = (max_distance / exact) ** (np.arange(1, side - exact) / (side - exact))
    bounds = [
        math.ceil(exact * ratio * (1 - 1e-12)) for ratio in ratios
    ]  # the least distance of each wide bucket but the first
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    wide = exact + sum((distance >= bound).astype(jnp.int32) for bound in bounds)
    bucket = jnp.where(distance < exact, distance.astype(jnp.int32), wide)
    return bucket + jnp.where(relative > 0, side, 0).astype(jnp.int32) if bidirectional else bucket


def _buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> tuple[int, int]:
    """Buckets of a side, and how many of them hold one distance each."""
    positive(num_buckets=num_buckets, max_distance=max_distance)
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact or (bidirectional and num_buckets % 2):
        rule = "num_buckets must leave an exact bucket a side, be even where bidirectional, and max_distance exceed the exact ones"
        raise ValueError(f"{rule}; got num_buckets={num_buckets}, max_distance={max_distance}")
    return side, exact


@_bias("bidirectional", "max_distance")
class T5Bias(PositionBias):
    """T5's bias: one learned number a head for each bucket of distances.

    Attributes:
      table: (buckets, N).
      bidirectional: whether keys after the query have buckets of their own; False for causal attention.
      max_distance: see `t5_bucket`.

    Source: Raffel et al., arXiv:1910.10683; T5 itself has no 1 / sqrt(H), which is `scale=1` here.

    >>> import jax.numpy as jnp
    >>> T5Bias(jnp.arange(32.0)[:, None])(jnp.array([20]), jnp.array([0, 19, 20]))[0].tolist()
    [[17.0, 1.0, 0.0]]
    """

    table: Any
    bidirectional: bool = False
    max_distance: int = 128

    @classmethod
    def initial(cls, num_heads: int, key: jax.Array, *, bidirectional: bool = False, num_buckets: int = 32) -> "T5Bias":
        """A normal table of standard deviation 0.02."""
        positive(num_heads=num_heads)
        _buckets(bidirectional, num_buckets, cls.max_distance)
        return cls(0.02 * jax.random.normal(key, (num_buckets, num_heads)), bidirectional)

    def at_distance(self, distance: jax.Array) -> jax.Array:
        """See `PositionBias`."""
        table = jnp.asarray(self.table)
        options = {"num_buckets": table.shape[0], "max_distance": self.max_distance}
        bucket = t5_bucket(distance, bidirectional=self.bidirectional, **options)
        return jnp.moveaxis(jnp.take(table, bucket, axis=0), -1, 0)
