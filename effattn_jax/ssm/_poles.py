"""Poles of a diagonal system: one step of it, and its powers at long lags.

    x' = lambda x + b u,   z = step lambda          zero-order hold   a = e^z                        gain = step (e^z - 1) / z
                                                    bilinear          a = (1 + z / 2) / (1 - z / 2)  gain = step / (1 - z / 2)

Powers a^l need the angle l step Im(lambda) modulo 2 pi: at l = 10^6 it is 10^8 radians, of which float32 keeps none. So the angle of one step is a
sum of two floats, brought into one turn, multiplied by the bits of l and brought into one turn again. Every product in that is exact (halves of
the mantissa), so it does not matter whether a compiler fuses multiplications and additions.
"""

from fractions import Fraction
from math import ceil, log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import choose

__all__: list[str] = []

METHODS = ("zoh", "bilinear")
_TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875021164194988918461563281257241799725606965068")
_MOST = 4096  # the longest table of consecutive powers: their lags have 12 bits, so that products with half a float32 are exact


def phi(z: Any, xp: Any = jnp) -> Any:
    """(e^z - 1) / z in the module xp, by its series where the difference would cancel, in value and slope."""
    small = xp.abs(z) < 0.5
    inside = xp.where(small, z, 0)
    terms = 8 if jnp.finfo(z.dtype).bits == 32 else 15
    series = xp.ones_like(z)
    for k in range(terms, 0, -1):
        series = 1 + inside / (k + 1) * series
    outside = xp.where(small, 1, z)
    return xp.where(small, series, xp.expm1(outside) / outside)


def transition(step: jax.Array, poles: jax.Array, method: str) -> tuple[jax.Array, jax.Array]:
    """(a, gain) of one step; `step` and `poles` broadcast."""
    z = step * poles
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)
    return jnp.exp(z), step * phi(z)


def powers(step: jax.Array, poles: jax.Array, method: str, count: int, stride: int = 1) -> jax.Array:
    """a^(stride l), l = 0 ... count - 1, on a new last axis; count at most 4,096, stride a power of two up to that."""
    step, poles = (jnp.broadcast_to(x, jnp.broadcast_shapes(step.shape, poles.shape))[..., None] for x in (step, poles))
    lags = jnp.arange(count).astype(step.dtype).reshape((1,) * (step.ndim - 1) + (count,))
    if method == "bilinear":
        # Where a = 0 its logarithm and its angle have no slope; a has one, a^2 a second derivative.
        a, none = transition(step, poles, method)[0], step * poles == -2
        few = jnp.select([stride * lags == power for power in range(3)], [jnp.ones_like(a), a, a * a], 0)
        return jnp.where(none, few, _powers(step, jnp.where(none, 0, poles), method, lags, stride))
    return _powers(step, poles, method, lags, stride)


def power_minus_one(step: jax.Array, poles: jax.Array, length: int) -> jax.Array:
    """e^(length step lambda) - 1, right for many turns and near 0."""
    step, poles = (jnp.broadcast_to(x, jnp.broadcast_shapes(step.shape, poles.shape)) for x in (step, poles))
    if not jnp.iscomplexobj(poles):
        return jnp.expm1(length * step * poles)
    near = long_table(length)[1]
    rows, rest = (jnp.full_like(step, lag) for lag in divmod(length, near))
    angle = _angles(step, poles.imag, rows, near) + _angles(step, poles.imag, rest, 1)
    size = length * step * poles.real
    real = jnp.expm1(size) * jnp.cos(angle) - 2 * jnp.square(jnp.sin(angle / 2))
    return lax.complex(real, jnp.exp(size) * jnp.sin(angle))


def _powers(step: jax.Array, poles: jax.Array, method: str, lags: jax.Array, stride: int) -> jax.Array:
    z = step * poles
    size = z.real if method == "zoh" else _log_magnitude(z)
    size = jnp.exp((stride * lags) * size)
    if not jnp.iscomplexobj(poles):
        odd = (lags % 2 == 1) & (stride == 1)
        negative = (jnp.abs(z) > 2) & (method == "bilinear")
        return jnp.where(odd & negative, -size, size)
    if method == "zoh":
        angle = _angles(step, poles.imag, lags, stride)
    else:
        angle = _angles(jnp.ones_like(step), jnp.arctan2(z.imag, 1 - jnp.abs(z / 2) ** 2), lags, stride)
    return lax.complex(size * jnp.cos(angle), size * jnp.sin(angle))


def _log_magnitude(z: jax.Array) -> jax.Array:
    """log |(1 + z / 2) / (1 - z / 2)|, exact near 0; a zero of it counts as the smallest float."""
    below = jnp.square(jnp.abs(1 - z / 2))
    ratio = jnp.maximum(jnp.square(jnp.abs(1 + z / 2)) / below, jnp.finfo(below.dtype).tiny)
    near = ratio > 0.5
    excess = jnp.where(near, 2 * z.real / below, 0)
    return 0.5 * jnp.where(near, jnp.log1p(excess), jnp.log(jnp.where(near, 1, ratio)))


def long_table(length: int) -> tuple[int, int]:
    """(far, near): lags i * near + j cover `length`, near a power of two.

    Raises:
      ValueError: a length of more than 2^24, beyond which float32 cannot count.
    """
    near = 1 << ceil(log2(max(length, 1)) / 2)
    if near > _MOST:
        raise ValueError(f"length must be at most {_MOST**2}; got {length}")
    return -(-length // near), near


@jax.custom_jvp
def _angle_table(step: jax.Array, speed: jax.Array, lags: jax.Array, stride: jax.Array) -> jax.Array:
    head, tail = _within_a_turn(*_product(step, speed))
    head, tail = _within_a_turn(head * stride, tail * stride)
    first, second = _halves(head)
    return _within_a_turn(*_sum(lags * first, lags * second, lags * tail))[0]


@_angle_table.defjvp
def _angle_table_jvp(primals, tangents):
    (step, speed, lags, stride), (d_step, d_speed, _, _) = primals, tangents
    return _angle_table(*primals), lags * stride * (step * d_speed + d_step * speed)


def _angles(step: jax.Array, speed: jax.Array, lags: jax.Array, stride: int) -> jax.Array:
    """stride * lags * step * speed, modulo 2 pi: as exact as its result is, however many turns were left out."""
    return _angle_table(step, speed, lags, jnp.full_like(lags, stride))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x as the upper half of its mantissa and the rest: products of halves are exact."""
    bits = jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")
    dropped = 12 if bits.itemsize == 4 else 27
    mask = jnp.array((1 << 8 * bits.itemsize) - (1 << dropped), bits)
    upper = lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) & mask, x.dtype)
    return upper, x - upper


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b as its float and what that rounds away (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _sum(a: jax.Array, b: jax.Array, *small: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a + b and terms far below them, as two floats."""
    head, tail = _two_sum(a, b)
    for x in small:
        tail = tail + x
    return _two_sum(head, tail)


def _product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a * b as two floats."""
    (a1, a0), (b1, b0) = _halves(a), _halves(b)
    head, rest = _two_sum(a1 * b1, a1 * b0)
    head, more = _two_sum(head, a0 * b1)
    return _sum(head, a0 * b0, rest, more)


def _pieces(bits: int) -> list[float]:
    """2 pi as floats of `bits` bits each, so that small multiples of them are exact."""
    rest, out = _TWO_PI, []
    for _ in range(4):
        unit = Fraction(2) ** (bits - 1 - _exponent(rest))
        piece = Fraction(int(rest * unit)) / unit
        out.append(float(piece))
        rest -= piece
    return out


def _exponent(x: Fraction) -> int:
    return (x.numerator.bit_length() - x.denominator.bit_length()) - (
        x < Fraction(2) ** (x.numerator.bit_length() - x.denominator.bit_length())
    )


def _within_a_turn(head: jax.Array, tail: jax.Array) -> tuple[jax.Array, jax.Array]:
    """head + tail without its whole turns (at most 4,096 of them), as two floats."""
    turns = jnp.round(head * float(1 / _TWO_PI))
    first, *others = (turns * piece for piece in _pieces(12 if jnp.finfo(head.dtype).bits == 32 else 26))
    head, rest = _two_sum(head, -first)
    for other in others:
        head, lost = _two_sum(head, -other)
        rest = rest + lost
    return _two_sum(head, tail + rest)


def check_method(method: Any) -> None:
    """Raises the ValueError for an unknown rule."""
    choose("method", method, METHODS)
