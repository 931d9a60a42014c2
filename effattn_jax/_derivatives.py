"""One derivative rule for every kernel: a fast forward pass, a hand-arranged backward pass, and still every JAX transformation.

`jax.custom_vjp` gives reverse mode a backward pass of its own and takes forward mode away; `jax.custom_jvp` keeps both but lets JAX
arrange the backward pass. Here the tangents of a kernel's output are the linear map

    y = L(arrays) t     with the transpose     ct_t = L(arrays)^T ct_y

of `_linear_map`: L is the derivative that JAX makes of a plain form of the kernel, and L^T the backward pass written for it, which is where
O(T) memory comes from. A first-order gradient never traces the plain form.

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

from effattn_jax._compiled import NESTS
from effattn_jax._linear_map import Side, apply

__all__: list[str] = []


@functools.partial(jax.jit, inline=True)
def _zero_of(*arrays: jax.Array) -> jax.Array:
    """The scalar 0 as a function of all arrays: sums over nothing, so that no NaN of theirs enters.

    Inside `jax.shard_map` it varies over every mesh axis that one of them varies over, and so does what it is added to.
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
    if not jax.sharding.get_abstract_mesh().manual_axes:  # outside `jax.shard_map` nothing varies
        return tree
    zero = _zero_of(*jax.tree.leaves(tree))
    return jax.tree.map(lambda x: _plus(x, zero), tree)


def _plus(array: jax.Array, zero: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        return array ^ (zero.real > 0)
    return array + (zero if jnp.iscomplexobj(array) else zero.real).astype(array.dtype)


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
        A first-order gradient does without it.
      backward: `backward(arrays, aux, out, cotangents_of_out) -> cotangents_of_arrays`.
    """
    parts = (forward, plain, backward)
    return _known(*parts) if _lasts(parts) else _made(*parts)


traced_once = jax.jit if NESTS else lambda part, **_: part


def _made(forward: Callable, plain: Callable, backward: Callable) -> Callable:
    @traced_once
    def kernel(arrays, aux):
        return forward(arrays, aux)

    @traced_once
    def tangents_of_out(arrays, aux, _, tangents):
        return jax.jvp(lambda a: plain(a, aux), (arrays,), (tangents,))[1]

    @traced_once
    def transposed(arrays, aux, out, cotangents):
        return backward(arrays, aux, out, cotangents)

    @traced_once
    def plainly_transposed(arrays, aux, _, cotangents):
        return jax.vjp(lambda a: plain(a, aux), arrays)[1](cotangents)[0]

    ahead, back = Side(tangents_of_out, tangents_of_out), Side(transposed, plainly_transposed)

    @jax.custom_jvp
    def call(arrays: Any, aux: Any) -> Any:
        return kernel(arrays, aux)

    @call.defjvp
    def rule(primals, tangents):
        (arrays, aux), (tangents, _) = primals, tangents
        # Both vary over what the output varies over, so that a cotangent is summed over a mesh axis once: where it leaves here.
        arrays = tie(arrays)
        out = call(arrays, aux)
        tangents = tie(jax.tree.map(_typed_as, tangents, arrays))
        return out, apply((ahead, back), (arrays, aux, out), tangents, out)

    return call


def _typed_as(tangent: jax.Array, array: jax.Array) -> jax.Array:
    """Tangents that JAX fills in as zeros come without the sharding of their array (jax 0.7); the sum has it."""
    return tangent if jax.typeof(tangent) == jax.typeof(array) else tangent + jnp.zeros_like(array)


_known = functools.lru_cache(maxsize=256)(_made)
