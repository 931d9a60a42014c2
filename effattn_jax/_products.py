"""Products of rows and of matrices, written so that XLA computes them well on every backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

__all__: list[str] = []


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum_i a_i b_i over the last axis, at full precision.

    On CPU, XLA's fused sum of products takes a hundred times as long where an axis has size 1, as that of a batch often has; a product does not.

    >>> import jax.numpy as jnp
    >>> row_products(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).tolist()
    [11.0]
    """
    axes = "".join(chr(ord("a") + n) for n in range(a.ndim - 1))
    equation = f"{axes}z,{axes}z->{axes}"
    return jnp.einsum(equation, a, b, precision="highest", out_sharding=_sum_sharding(equation, a, b))


def scaled_rows(factors: jax.Array, rows: jax.Array) -> jax.Array:
    """factors (...) times rows (..., H): a product of arrays, whose derivative by the factors is `row_products`, not XLA's fused sum of products.

    >>> import jax.numpy as jnp
    >>> scaled_rows(jnp.array([2.0, 3.0]), jnp.ones((2, 2))).tolist()
    [[2.0, 2.0], [3.0, 3.0]]
    """
    return jnp.einsum("...,...i->...i", factors, rows, precision="highest")


def scaled_axis(weights: jax.Array, x: jax.Array, axis: int = -1) -> jax.Array:
    """x times weights along one of its axes. The derivative by the weights sums over those before it, among which are then none of size 1.

    >>> import jax.numpy as jnp
    >>> scaled_axis(jnp.array([2.0, 3.0]), jnp.ones((1, 1, 2))).tolist()
    [[[2.0, 3.0]]]
    """
    axis %= x.ndim
    spec = jax.typeof(x).sharding.spec  # an axis of size 1 may belong to one of an Explicit mesh, and stays
    ones = tuple(a for a in range(axis) if x.shape[a] == 1 and spec[a] is None)
    weights = weights.reshape(*(1,) * (axis - len(ones)), weights.shape[0], *(1,) * (x.ndim - axis - 1))
    return jnp.expand_dims(weights * jnp.squeeze(x, ones), ones)


@jax.custom_jvp
def softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights, and log-sum-exp, along the last axis; a row of nothing but -inf has weights 0.

    dw = w (ds - w.ds) and dlse = w.ds: left to itself JAX goes back through the quotient, which reads the row twice as often.
    """
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top == -jnp.inf, 0, top)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return p / total, jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    weights, lse = softmax(*primals)
    mean = row_products(weights, tangents[0])
    return (weights, lse), (weights * (tangents[0] - mean[..., None]), mean)


def grouped_product(equation: str, a: jax.Array, b: jax.Array, operands: Any = None) -> jax.Array:
    """einsum with sums in the dtype of a, of factors in the dtype `operands`, None as they are.

    Groups and rows, the axes "gi" of an operand, enter it as one: of an operand with more axes XLA makes a transposed copy on CPU.

    >>> import jax.numpy as jnp
    >>> grouped_product("bkgih,bkjh->bkgij", jnp.ones((1, 2, 3, 4, 5)), jnp.ones((1, 2, 6, 5))).shape
    (1, 2, 3, 4, 6)
    """
    sides, axes = equation.split("->")
    sizes = dict(zip(sides.replace(",", ""), (*a.shape, *b.shape), strict=True))

    def joined(x, axes):
        return x.reshape([sizes["g"] * sizes["i"] if c == "i" else sizes[c] for c in axes if c != "g"])

    a, b = (joined(x, axes) for x, axes in zip((a, b), sides.split(","), strict=True))
    narrow = a.dtype if operands is None else operands
    equation = equation.replace("g", "")
    to = {"preferred_element_type": a.dtype, "out_sharding": _sum_sharding(equation, a, b)}
    out = jnp.einsum(equation, a.astype(narrow), b.astype(narrow), **to)
    return out.reshape([sizes[c] for c in axes])


def finite(x: jax.Array) -> jax.Array:
    """x with 0 in place of NaN and inf."""
    return jnp.where(jnp.isfinite(x), x, 0)


def quiet(bilinear: Callable) -> Callable:
    """A bilinear function of two arrays, in whose derivative what is not finite counts as 0: there it may stand beside a cotangent of 0, and 0 * NaN is NaN.

    So what is NaN in one document stays out of the gradients of the others.

    >>> import jax, jax.numpy as jnp
    >>> slope = jax.grad(lambda x: jnp.where(jnp.array([True, False]), quiet(jnp.multiply)(x, jnp.array([2.0, jnp.nan])), 0).sum())
    >>> slope(jnp.ones(2)).tolist()
    [2.0, 0.0]
    """

    @jax.custom_jvp
    def product(a, b):
        return bilinear(a, b)

    def jvp(primals, tangents):
        (a, b), (da, db) = primals, tangents
        none = jax.custom_derivatives.SymbolicZero
        parts = [] if isinstance(da, none) else [product(da, finite(b))]
        parts += [] if isinstance(db, none) else [product(finite(a), db)]
        out = product(a, b)
        return out, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(out)

    product.defjvp(jvp, symbolic_zeros=True)
    return product


def _sum_sharding(equation: str, a: jax.Array, b: jax.Array) -> PartitionSpec | None:
    """On a mesh of Explicit axes, how a product lies whose sums run over a sharded axis, which einsum asks for; None where none do."""
    sides, axes = equation.split("->")
    specs = [jax.typeof(x).sharding.spec for x in (a, b)]
    names = {c: name for side, spec in zip(sides.split(","), specs, strict=True) for c, name in zip(side, spec) if name}
    return PartitionSpec(*(names.get(c) for c in axes)) if set(names) - set(axes) else None
