"""One derivative rule for every kernel: a fast forward pass, a hand-arranged backward pass, and still every JAX transformation.

`jax.custom_vjp` gives reverse mode a backward pass of its own and takes forward mode away; `jax.custom_jvp` keeps both but lets JAX
arrange the backward pass. Here the tangent map L of a kernel enters as the linear system

    [ I   0 ] [t]   [t]
    [-L   I ] [y] = [0]          so that  y = L t

given to `jax.lax.custom_linear_solve`, whose solution is differentiable to any order, batches under vmap, and whose transposed
solution is ours to write: that is where the O(T)-memory backward pass goes.

A kernel is traced many times in a program and its derivatives. Its parts are functions under `jax.jit` where that is right (`traced_once`), so
each is traced once; and a kernel made of the same parts again (`Fixed`) is the same kernel, whose traces of other calls serve.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__: list[str] = []


@functools.partial(jax.jit, inline=True)
def linear_zero(*arrays: jax.Array) -> jax.Array:
    """The scalar 0 as a function of all arrays: sums over nothing, so that no NaN of theirs enters.

    Adding it makes a constant depend on the arrays: inside `jax.shard_map` it then varies over every mesh axis that one of them
    varies over, and in a tangent map it counts as linear.
    """
    zero = jnp.float32(0)
    for array in arrays:
        nothing = lax.slice_in_dim(jnp.atleast_1d(array), 0, 0, axis=-1)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            nothing = nothing.astype(jnp.float32)
        zero = zero + lax.reduce(nothing, np.zeros((), nothing.dtype), lax.add, range(nothing.ndim))
    return zero


def tie(tree: Any) -> Any:
    """The same pytree of arrays, each varying over every mesh axis that any of them varies over."""
    return _add_zero(tree, linear_zero(*jax.tree.leaves(tree)))


def _add_zero(tree: Any, zero: jax.Array) -> Any:
    return jax.tree.map(lambda x: _plus(x, zero), tree)


def _plus(array: jax.Array, zero: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array ^ (zero.real > 0)
    return array + _like(zero, array)


def _like(zero: jax.Array, array: jax.Array) -> jax.Array:
    """The zero in the dtype of an array, real where that is."""
    return (zero if jnp.iscomplexobj(array) else zero.real).astype(array.dtype)


class Fixed:
    """A function with its first arguments. Two with the same ones are equal, and so are what JAX has traced of them."""

    def __init__(self, function: Callable, *arguments: Any):
        self.parts = (function, *arguments)

    def __call__(self, *arguments: Any) -> Any:
        return self.parts[0](*self.parts[1:], *arguments)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Fixed) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def _lasts(part: Any) -> bool:
    """Whether something may be kept for other calls: constants, and functions that hold no arrays (a closure may)."""
    if isinstance(part, Fixed):
        return _lasts(part.parts)
    if isinstance(part, tuple):
        return all(map(_lasts, part))
    if isinstance(part, types.FunctionType):
        return part.__closure__ is None
    return part is None or isinstance(part, bool | int | float | str | type | np.dtype)


def with_backward(forward: Callable, plain: Callable, backward: Callable) -> Callable:
    """A function `f(arrays, aux)` computed by `forward`, differentiated backwards by `backward` and in every other way through `plain`.

    Args:
      forward: `forward(arrays, aux) -> out`; pytrees of inexact arrays of rank >= 1 in and out. `aux` is a pytree of integer or
        boolean arrays, which carry no derivative.
      plain: the same function in operations that JAX can differentiate any number of times (scan and checkpoint, no while loop).
        It is traced but never compiled in a first-order gradient.
      backward: `backward(arrays, aux, out, cotangents_of_out) -> cotangents_of_arrays`.
    """
    parts = (forward, plain, backward)
    return _known(*parts) if _lasts(parts) else _made(*parts)


# With jax 0.7.2 a compiled gradient of a gradient comes out wrong where parts are jitted (not compiled, it is right); with 0.10 and 0.12 it is right.
traced_once = jax.jit if jax.__version_info__ >= (0, 10) else lambda part, **_: part


def _made(forward: Callable, plain: Callable, backward: Callable) -> Callable:
    @traced_once
    def kernel(arrays, aux):
        return forward(arrays, aux)

    @traced_once
    def tangent_map(arrays, aux, t):
        return jax.jvp(lambda a: plain(a, aux), (arrays,), (t,))[1]

    @traced_once
    def transposed(arrays, aux, out, cotangents):
        return backward(arrays, aux, out, cotangents)

    @traced_once
    def tangents_of_out(arrays, aux, out, tangents):
        # JAX transposes a solve only if every leaf of its right side is linear in what is differentiated. Zeros that depend on
        # everything see to that: `zero` in the matrix for derivatives by the arrays, `linear_zero` below for those by the tangents.
        zero = linear_zero(*jax.tree.leaves(arrays))

        def matvec(x):
            t, y = jax.tree.map(lambda leaf: leaf + _like(zero, leaf) * leaf, x)
            return t, jax.tree.map(jnp.subtract, y, tangent_map(arrays, aux, x[0]))

        def solve(_, b):
            t, y = b
            return t, jax.tree.map(jnp.add, y, tangent_map(arrays, aux, t))

        def transpose_solve(_, c):
            ct_in, ct_out = c
            return jax.tree.map(jnp.add, ct_in, transposed(arrays, aux, out, ct_out)), ct_out

        nothing = jax.tree.map(jnp.zeros_like, out)
        right_side = _add_zero((tangents, nothing), linear_zero(*jax.tree.leaves(tangents)))
        solution = jax.lax.custom_linear_solve(matvec, right_side, solve, transpose_solve)
        return _add_zero(solution[1], linear_zero(*jax.tree.leaves(solution)))

    @jax.custom_jvp
    def call(arrays: Any, aux: Any) -> Any:
        return kernel(arrays, aux)

    @call.defjvp
    def rule(primals, tangents):
        (arrays, aux), (tangents, _) = primals, tangents
        out = call(arrays, aux)
        # Tangents that JAX fills in as zeros come without the sharding of their array (jax 0.7); the sum has it.
        tangents = jax.tree.map(lambda t, array: t + jnp.zeros_like(array), tangents, arrays)
        return out, tangents_of_out(arrays, aux, out, tangents)

    return call


_known = functools.lru_cache(maxsize=256)(_made)
