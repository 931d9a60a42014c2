"""A linear map with a transpose of its own, as a primitive of JAX.

    y = L(r) x     and     x' = L(r)^T y' ,     both functions of residuals r

stand in a program unexpanded until it is compiled: what is not asked for is not even traced. Each transposes to the other, both are
batched under vmap, and both are differentiated by the residuals through a plain form each, to any order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

__all__: list[str] = []


class Side(NamedTuple):
    """One direction of a linear map, as functions of (arrays, aux, out, vector): the one to compile, and one that JAX can differentiate."""

    fast: Callable
    plain: Callable


class _Trees(NamedTuple):
    """The structure of (arrays, aux, out), of the vector that the map is applied to, and of its result."""

    residuals: Any
    vector: Any
    result: Any


def apply(sides: tuple[Side, Side], residuals: Any, vector: Any, like: Any) -> Any:
    """The first side's map of a vector, typed as `like`."""
    trees = _Trees(*map(jax.tree.structure, (residuals, vector, like)))
    avals = tuple(map(jax.typeof, jax.tree.leaves(like)))
    leaves = *jax.tree.leaves(residuals), *jax.tree.leaves(vector)
    return trees.result.unflatten(_linear.bind(*leaves, sides=sides, trees=trees, batches=(), avals=avals))


# Operands: the leaves of the residuals, then those of the vector. Parameters: the side to apply and the one that is its transpose;
# `_Trees`; the axes of every vmap from the inside out, 0 or None an operand; the avals of the results.
_linear = Primitive("kernel_derivative")
_linear.multiple_results = True


def _on_leaves(function: Callable, trees: _Trees, batches: tuple) -> Callable:
    def on_leaves(*leaves):
        size = trees.residuals.num_leaves
        return jax.tree.leaves(
            function(*trees.residuals.unflatten(leaves[:size]), trees.vector.unflatten(leaves[size:]))
        )

    for axes in batches:
        on_leaves = jax.vmap(on_leaves, axes)
    return on_leaves


def _evaluate(*leaves, sides, trees, batches, avals):
    del avals
    return _on_leaves(sides[0].fast, trees, batches)(*leaves)


def _avals(*_, avals, **__):
    return avals


def _derivative(primals, tangents, *, sides, trees, batches, avals):
    """By the vector the map itself; by the arrays what JAX makes of its plain form; nothing by `out`, which is a function of the arrays."""
    size, known = trees.residuals.num_leaves, trees.residuals.children()[0].num_leaves
    bind = functools.partial(_linear.bind, sides=sides, trees=trees, batches=batches, avals=avals)
    parts = []
    if any(type(t) is not ad.Zero for t in tangents[size:]):
        parts.append(bind(*primals[:size], *map(ad.instantiate_zeros, tangents[size:])))
    if any(type(t) is not ad.Zero for t in tangents[:known]):
        plain, rest = _on_leaves(sides[0].plain, trees, batches), primals[known:]
        ahead = tuple(map(ad.instantiate_zeros, tangents[:known]))
        parts.append(jax.jvp(lambda *arrays: plain(*arrays, *rest), tuple(primals[:known]), ahead)[1])
    out = bind(*primals)
    if not parts:
        return out, [ad.Zero(t.to_tangent_aval()) for t in avals]
    return out, [sum(terms[1:], terms[0]) for terms in zip(*parts)]


def _transpose(cotangents, *operands, sides, trees, batches, avals):
    """The other side, applied to the cotangents; a part of the vector that is known (zeros of a tangent) asks for none."""
    size = trees.residuals.num_leaves
    vector = operands[size:]
    asked = [ad.is_undefined_primal(t) for t in vector]
    avals_back = tuple(t.aval if ask else jax.typeof(t) for t, ask in zip(vector, asked))
    axes_back = tuple((*axes[:size], *(0,) * len(avals)) for axes in batches)
    back = _Trees(trees.residuals, trees.result, trees.vector)
    result = _linear.bind(
        *operands[:size],
        *map(ad.instantiate_zeros, cotangents),
        sides=sides[::-1],
        trees=back,
        batches=axes_back,
        avals=avals_back,
    )
    return [None] * size + [ct if ask else None for ct, ask in zip(result, asked)]


def _batch(operands, axes, *, sides, trees, batches, avals):
    """Residuals keep to themselves where they have no batch; the vector and the result always have one."""
    size = trees.residuals.num_leaves
    length, part, mesh = next(
        (x.shape[axis], jax.typeof(x).sharding.spec[axis], jax.typeof(x).sharding.mesh)
        for x, axis in zip(operands, axes)
        if axis is not None
    )

    def sharding_of(aval):  # an Explicit mesh may shard the batch, and then that of every operand
        return NamedSharding(aval.sharding.mesh if part is None else mesh, P(part, *aval.sharding.spec))

    def batched(x, axis):
        if axis is not None:
            return jnp.moveaxis(x, axis, 0)
        return lax.broadcast(x, (length,), out_sharding=None if part is None else sharding_of(jax.typeof(x)))

    residuals = [x if axis is None else batched(x, axis) for x, axis in zip(operands[:size], axes)]
    vector = [batched(x, axis) for x, axis in zip(operands[size:], axes[size:])]
    ours = *(axis if axis is None else 0 for axis in axes[:size]), *(0,) * len(vector)
    avals = tuple(aval.update(shape=(length, *aval.shape), sharding=sharding_of(aval)) for aval in avals)
    result = _linear.bind(*residuals, *vector, sides=sides, trees=trees, batches=(*batches, ours), avals=avals)
    return result, (0,) * len(result)


_linear.def_impl(_evaluate)
_linear.def_abstract_eval(_avals)
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_linear] = _derivative
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
