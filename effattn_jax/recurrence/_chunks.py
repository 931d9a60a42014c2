"""A loop over chunks of time that reads its inputs where they lie and writes its outputs where they belong.

    carry, out[:, c] = body(carry, inputs[:, c], aux[:, c])        c = 0, 1, ..., n - 1

`lax.scan` wants time first and stacks its outputs into fresh memory; here every chunk is a slice of axis 1 and every output chunk is
written into one carried buffer. The backward pass walks the chunks again: once forwards for the carries at the chunk starts, once
backwards through the vector-Jacobian product of one chunk. The carries wait where the cotangents of the inputs will be written, if they fit
there (`_Shelves`); if not, the memory beside the gradients is one carry a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._derivatives import Fixed, with_backward
from effattn_jax._products import finite

__all__: list[str] = []


def _chunk(tree: Any, index: jax.Array | int, size: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis=1), tree)


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as integers: XLA for CPUs has no bfloat16, and would convert a carried buffer whole for every chunk written to it."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(buffers: Any, like: Any) -> Any:
    """The inverse of `_bits`, of a pytree of buffers; `like` has their dtypes."""
    return jax.tree.map(lambda b, x: lax.bitcast_convert_type(b, x.dtype) if b.dtype != x.dtype else b, buffers, like)


def _store(buffers: Any, chunks: Any, like: Any, index: jax.Array, size: int) -> Any:
    """Chunks written to where they belong in buffers of `_bits`; `like` has the dtypes before."""

    def write(buffer, x, like):
        return lax.dynamic_update_slice_in_dim(buffer, _bits(x.astype(like.dtype)), index * size, axis=1)

    return jax.tree.map(write, buffers, chunks, like)


def _over_time(chunks: Any, count: int) -> Any:
    """Buffers for `count` chunks, made from one chunk so that sharding and varying axes are its own.

    Every element will be overwritten. The fill differs from buffer to buffer, or XLA would make one and copy it for each.
    """

    def widen(fill, x):
        wide = jnp.broadcast_to(jnp.full_like(x, fill)[:, None], (x.shape[0], count, *x.shape[1:]))
        return wide.reshape(x.shape[0], count * x.shape[1], *x.shape[2:])

    leaves, tree = jax.tree.flatten(chunks)
    return jax.tree.unflatten(tree, map(widen, range(len(leaves)), leaves))


def _split(size: int, x: jax.Array) -> jax.Array:
    """(B, T, ...) as chunks in front, (T / size, B, size, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def pull_by_vjp(
    body: Callable, carry: Any, inputs: Any, aux: Any, outputs: Any, d_carry: Any, d_out: Any, *weights: Any
) -> tuple[Any, ...]:
    """The backward pass of one chunk by differentiating `body`.

    What is not finite is 0 here, and an output that is not passes nothing back: beside the cotangent of 0 of another document it would make NaN.
    """
    carry, inputs = jax.tree.map(finite, (carry, inputs))
    d_out = jax.tree.map(lambda d, out: jnp.where(jnp.isfinite(out), d, 0), d_out, outputs)
    return jax.vjp(lambda c, x, *w: body(c, x, aux, *w), carry, inputs, *weights)[1]((d_carry, d_out))


def _forward(body: Callable, size: int, count: int, arrays: Any, aux: Any) -> tuple[Any, Any]:
    """All chunks one after the other."""
    carry, inputs, *shared = arrays
    _, first = body(carry, _chunk(inputs, 0, size), _chunk(aux, 0, size), *shared)

    def step(i, state):
        carry, buffers = state
        carry, out = body(carry, _chunk(inputs, i, size), _chunk(aux, i, size), *shared)
        return carry, _store(buffers, out, first, i, size)

    buffers = jax.tree.map(_bits, _over_time(first, count))
    carry, buffers = lax.fori_loop(0, count, step, (carry, buffers))
    return carry, _from_bits(buffers, first)


def _plain(body: Callable, size: int, arrays: Any, aux: Any) -> tuple[Any, Any]:
    """The same by `lax.scan`, which JAX differentiates to any order."""
    carry, inputs, *shared = arrays
    step = jax.checkpoint(lambda carry, x: body(carry, *x, *shared))
    carry, out = lax.scan(step, carry, jax.tree.map(partial(_split, size), (inputs, aux)))
    return carry, jax.tree.map(_join, out)


class _Shelves:
    """Where the carries at the chunk starts wait for the way back.

    Cotangents of inputs are written from the last chunk to the first, so the rows of a chunk are free until its turn comes. A leaf (B, K, R, V)
    of the carry is R rows of an input (B, T, K, V): it waits in the cotangent of one that is alike, or of several where a chunk has fewer rows
    than R. Which one does not matter. Whatever fits nowhere gets an array of its own. The store is a pair (such arrays, cotangents), both lists.
    """

    def __init__(self, carry: Any, inputs: Any, size: int):
        leaves, self.tree = jax.tree.flatten(carry)
        self.size, free = size, dict(enumerate(jax.tree.leaves(inputs)))
        self.places: list[list[tuple[int, int, int]]] = []  # of each leaf: (input, first row, one past the last)
        for c in leaves:
            starts = range(0, c.shape[2], size) if c.ndim == 4 else ()
            alike = [n for n, x in free.items() if starts and _alike(jnp.moveaxis(c, 2, 1), x)]
            fits = len(alike) >= len(starts)
            parts = zip(alike, starts, strict=False) if fits else ()
            self.places.append([(n, start, min(start + size, c.shape[2])) for n, start in parts])
            free = {n: x for n, x in free.items() if n not in [place[0] for place in self.places[-1]]}

    def apart(self, carry: Any, count: int) -> list[Any]:
        """Arrays for what fits nowhere."""
        pairs = zip(jax.tree.leaves(carry), self.places, strict=True)
        return [None if at else jnp.broadcast_to(jnp.zeros_like(c), (count, *c.shape)) for c, at in pairs]

    def put(self, store: tuple[list, list], carry: Any, i: jax.Array) -> tuple[list, list]:
        """The store with the carry of chunk i in it."""
        apart, cotangents = map(list, store)
        for leaf, (c, places) in enumerate(zip(jax.tree.leaves(carry), self.places, strict=True)):
            if not places:
                apart[leaf] = lax.dynamic_update_index_in_dim(apart[leaf], c, i, axis=0)
            for n, start, stop in places:
                rows = jnp.moveaxis(c[:, :, start:stop], 2, 1)
                cotangents[n] = lax.dynamic_update_slice_in_dim(cotangents[n], rows, i * self.size, axis=1)
        return apart, cotangents

    def take(self, store: tuple[list, list], i: jax.Array | int) -> Any:
        """The carry of chunk i."""

        def one(apart, places):
            if not places:
                return lax.dynamic_index_in_dim(apart, i, keepdims=False)
            rows = [
                lax.dynamic_slice_in_dim(store[1][n], i * self.size, stop - start, axis=1) for n, start, stop in places
            ]
            return jnp.moveaxis(jnp.concatenate(rows, axis=1), 1, 2)

        return jax.tree.unflatten(self.tree, map(one, store[0], self.places))


def _alike(rows: jax.Array, x: jax.Array) -> bool:
    """Whether rows may be written over those of x; what varies over the axes of a mesh is the same for both (`tie`)."""
    kinds = [(a.dtype, a.shape[:1], a.shape[2:], jax.typeof(a).sharding) for a in (rows, x)]
    return x.dtype != jnp.bfloat16 and kinds[0] == kinds[1]


def _backward(
    body: Callable, pull: Callable, size: int, count: int, arrays: Any, aux: Any, results: Any, cotangents: Any
) -> tuple[Any, ...]:
    """Cotangents of (carry, inputs, weights): the chunks forwards for the carries at their starts, then backwards."""
    first, inputs, *shared = arrays
    outputs, (d_carry, d_out) = results[1], cotangents
    leaves, tree = jax.tree.flatten(inputs)
    d_inputs = [_bits(jnp.full_like(x, fill + 100)) for fill, x in enumerate(leaves)]  # unlike forward's
    shelves = _Shelves(first, inputs, size)

    def keep(i, state):
        carry, store = state
        store = shelves.put(store, carry, i)
        return body(carry, _chunk(inputs, i, size), _chunk(aux, i, size), *shared)[0], store

    _, (apart, d_inputs) = lax.fori_loop(0, count, keep, (first, (shelves.apart(first, count), d_inputs)))

    def step(j, state):
        i = count - 1 - j
        carry, d_carry, d_inputs, *d_shared = state
        chunks = (_chunk(x, i, size) for x in (inputs, aux, outputs))
        d_out_chunk = _chunk(d_out, i, size)
        d_carry, d_chunk, *more = pull(carry, *chunks, d_carry, d_out_chunk, *shared)
        d_inputs = _store(d_inputs, jax.tree.leaves(d_chunk), leaves, i, size)
        # The next carry is read from what was just written: were it read beside the writing, XLA would copy the whole array first. After
        # chunk 0 nothing asks for it.
        carry = shelves.take((apart, d_inputs), i - 1)
        return carry, d_carry, d_inputs, *jax.tree.map(jnp.add, d_shared, more)

    carry = shelves.take((apart, d_inputs), count - 1)
    nothing = jax.tree.map(jnp.zeros_like, shared)
    _, d_carry, d_inputs, *d_shared = lax.fori_loop(0, count, step, (carry, d_carry, d_inputs, *nothing))
    return d_carry, _from_bits(jax.tree.unflatten(tree, d_inputs), inputs), *d_shared


def scan_chunks(
    body: Callable, carry: Any, inputs: Any, aux: Any, *, size: int, pull: Callable | None = None, weights: Any = None
) -> tuple[Any, Any]:
    """Runs `body(carry, inputs, aux) -> (carry, outputs)` over chunks of `size` steps; time is axis 1 and a multiple of `size`.

    `inputs` is a pytree of inexact arrays, `aux` one of integer or boolean arrays. `pull(carry, inputs, aux, outputs, d_carry, d_outputs) ->
    (d_carry, d_inputs)` is the backward pass of one chunk; None is the vjp of `body`. `weights`, inexact arrays without a time axis, are
    handed to every call of `body` and `pull` as a last argument, and get a last cotangent. Returns the last carry and the outputs over all of time.
    """
    count = jax.tree.leaves(inputs)[0].shape[1] // size
    arrays, pull = (carry, inputs, *(() if weights is None else (weights,))), pull or Fixed(pull_by_vjp, body)
    if count == 1:
        return at_once(body, pull, arrays, aux)
    forms = Fixed(_forward, body, size, count), Fixed(_plain, body, size)
    return with_backward(*forms, Fixed(_backward, body, pull, size, count))(arrays, aux)


def at_once(body: Callable, pull: Callable, arrays: tuple, aux: Any) -> tuple[Any, Any]:
    """One call of `body` over all of time, with `pull` as its backward pass; arrays (carry, inputs[, weights])."""
    form = Fixed(_whole, body)
    return with_backward(form, form, Fixed(_pull_whole, pull))(arrays, aux)


def _whole(body: Callable, arrays: tuple, aux: Any) -> tuple[Any, Any]:
    carry, inputs, *shared = arrays
    return body(carry, inputs, aux, *shared)


def _pull_whole(pull: Callable, arrays: tuple, aux: Any, results: Any, cotangents: Any) -> tuple[Any, ...]:
    carry, inputs, *shared = arrays
    return pull(carry, inputs, aux, results[1], *cotangents, *shared)
