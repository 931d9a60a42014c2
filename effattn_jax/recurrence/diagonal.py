"""The diagonal linear recurrence, the core of every diagonal state-space model.

    h_t = a_t h_{t-1} + x_t                      elementwise, real or complex, along axis 1

Cost O(T) in every implementation ("associative" O(T log T) work); state: one slice of x. As a linear system (I - a shift) h = x, its
derivatives are the same system again: transposed for reverse mode, whose residuals are a and h only.
Source: Martin and Cundy, arXiv:1709.04057; Blelloch 1990 for the associative form.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, choose
from effattn_jax._derivatives import tie, traced_once
from effattn_jax._products import finite, quiet
from effattn_jax.recurrence._diagonal_kernel import by_kernel

__all__ = ["diagonal_recurrence"]


@jax.custom_jvp
def forget(decay: jax.Array, state: jax.Array) -> jax.Array:
    """decay * state, where a decay of exactly 0 forgets NaN and Inf as well; in the derivative by the decay they count as 0."""
    return jnp.where(decay == 0, 0, decay * state)


@forget.defjvp
def _forget_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (decay, state), (d_decay, d_state) = primals, tangents
    return forget(decay, state), forget(decay, d_state) + d_decay * finite(state)


def _scan(decay: jax.Array, inputs: jax.Array, reverse: bool) -> jax.Array:
    def step(h, ax):
        h = forget(ax[0], h) + ax[1]
        return h, h

    over_time = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(inputs, 1, 0))
    _, h = lax.scan(step, jnp.zeros_like(inputs[:, 0]), over_time, reverse=reverse)
    return jnp.moveaxis(h, 0, 1)


def _compose(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The affine map h -> a2 (a1 h + x1) + x2."""
    return forget(second[0], first[0]), forget(second[0], first[1]) + second[1]


def _associative(decay: jax.Array, inputs: jax.Array, reverse: bool) -> jax.Array:
    return lax.associative_scan(_compose, (decay, inputs), reverse=reverse, axis=1)[1]


def by_chunks(combine: Callable, identity: Any, elements: Any) -> Any:
    """All partial results of an associative `combine` of pytrees (B, T, ...) along axis 1; `identity` is its neutral element, without that axis.

    Chunks side by side, step by step inside; then a scan over their ends; then each takes what was before it.
    """
    length = jax.tree.leaves(elements)[0].shape[1]
    size = max(1, isqrt(length))
    count = -(-length // size)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 2, 0)

    def upto(x, y):
        z = combine(x, y)
        return z, z

    elements = jax.tree.map(split, elements)  # (C, B, T / C, ...)
    empty = jax.tree.map(lambda e, x: jnp.zeros_like(x[0]) + jnp.expand_dims(e, 1), identity, elements)
    ends, local = lax.scan(upto, empty, elements)
    ends = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ends)
    starts = lax.scan(lambda x, y: (combine(x, y), x), identity, ends)[1]
    out = jax.vmap(combine, in_axes=(None, 0))(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), starts), local)
    out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), out)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :length], out)


def _chunked(decay: jax.Array, inputs: jax.Array, reverse: bool) -> jax.Array:
    if reverse:
        return jnp.flip(_chunked(jnp.flip(decay, 1), jnp.flip(inputs, 1), False), 1)
    identity = (jnp.ones_like(decay[:, 0]), jnp.zeros_like(inputs[:, 0]))
    return by_chunks(_compose, identity, (decay, inputs))[1]


def by_platform(decay: jax.Array, inputs: jax.Array, reverse: bool) -> jax.Array:
    """Sequential on a CPU, where it is the fastest and the most exact; parallel in time on accelerators, in O(T) memory when long."""

    def on(form):
        return lambda a, x: form(a, x, reverse)

    return lax.platform_dependent(
        decay, inputs, cpu=on(_scan), default=on(_associative if inputs.shape[1] <= 4096 else _chunked)
    )


_FORMS: dict[str | None, Callable] = {
    None: by_platform,
    "scan": _scan,
    "associative": _associative,
    "chunked": _chunked,
    "pallas": by_kernel,
}


def _shift(x: jax.Array, reverse: bool) -> jax.Array:
    """x_{t-1} (or x_{t+1} in reverse) with zeros at the open end."""
    edge = jnp.zeros_like(x[:, :1])
    return jnp.concatenate([x[:, 1:], edge] if reverse else [edge, x[:, :-1]], axis=1)


@partial(traced_once, static_argnames=("reverse", "form"))
def solve(decay: jax.Array, inputs: jax.Array, reverse: bool, form: Callable) -> jax.Array:
    """h with h - a shift(h) = x; the transposed system runs the other way with decays one step further."""

    def residual(h):
        return h - quiet(jnp.multiply)(decay, _shift(h, reverse))

    def forwards(_, x):
        return form(decay, x, reverse)

    def backwards(_, x):
        return form(finite(_shift(decay, not reverse)), x, not reverse)

    return lax.custom_linear_solve(residual, inputs, forwards, backwards)


@compiled
def diagonal_recurrence(
    decay: ArrayLike,
    inputs: ArrayLike,
    *,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    return_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """Runs h_t = decay_t * h_{t-1} + inputs_t over axis 1.

    Args:
      decay: (B, T, ...) or any shape of rank >= 2 that broadcasts to that of inputs; real or complex. A decay of exactly 0 forgets everything.
      inputs: (B, T, ...), real or complex.
      initial_state: (B, ...), the h before the first step (after the last one when `reverse`); zeros when None.
      segment_ids: (B, T) integers; h restarts from 0 wherever the id changes. The initial state belongs to the first segment.
      reverse: run from the last step to the first.
      return_state: also return the h at which the run ended, (B, ...).
      implementation: "scan" (sequential; the most exact, the fastest on a CPU), "associative" (parallel in time, O(T log T) work),
        "chunked" (parallel over sqrt(T) chunks); None picks by the platform the program is compiled for. "pallas" is a sequential Pallas kernel
        for TPU and GPU (on a CPU interpreted, slowly; float64 there only; on a mesh inside `jax.shard_map`): no device has measured it yet, so None does not pick it.

    Returns:
      h (B, T, ...) in the dtype of inputs (complex if decay is), or (h, state). Sums run in float32 at least, and the state stays so.

    Raises:
      ValueError: for shapes that do not fit or an unknown implementation; it names the argument, its shape and the rule.

    Cost O(T), state one slice. Gradients (decay, inputs, initial state) keep decay and h only; every order and mode of derivative works.

    >>> import jax.numpy as jnp
    >>> h, state = diagonal_recurrence(jnp.full((1, 3), 0.5), jnp.ones((1, 3)), return_state=True)
    >>> print(h, state)
    [[1.   1.5  1.75]] [1.75]
    """
    choose("implementation", implementation, _FORMS)
    decay, inputs = jnp.asarray(decay), jnp.asarray(inputs)
    for name, array in (("decay", decay), ("inputs", inputs)):
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise ValueError(f"{name} must be real or complex floating; got {array.dtype} of shape {array.shape}")
    if inputs.ndim < 2:
        raise ValueError(f"inputs must have shape (B, T, ...); got {inputs.shape}")
    if decay.ndim != inputs.ndim or any(d not in (1, n) for d, n in zip(decay.shape, inputs.shape, strict=True)):
        raise ValueError(
            f"decay must broadcast to inputs (B, T, ...) axis by axis; got decay {decay.shape}, inputs {inputs.shape}"
        )
    slice_shape = inputs.shape[:1] + inputs.shape[2:]
    out_dtype = jnp.result_type(inputs, decay) if jnp.iscomplexobj(decay) else inputs.dtype
    dtype = accumulator(decay, inputs)
    decay, inputs = jnp.broadcast_to(decay, inputs.shape).astype(dtype), inputs.astype(dtype)
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        if initial_state.shape != slice_shape:
            raise ValueError(
                f"initial_state must have the shape of inputs without axis 1, {slice_shape}; got {initial_state.shape}"
            )
        if jnp.iscomplexobj(initial_state) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"initial_state must be real where decay and inputs are; got {initial_state.dtype}")
        initial_state = initial_state.astype(dtype)
    if segment_ids is not None:
        decay = _restart(decay, jnp.asarray(segment_ids), reverse)
    if inputs.shape[1] == 0:
        state = jnp.zeros(slice_shape, dtype) if initial_state is None else initial_state
        return (inputs.astype(out_dtype), state) if return_state else inputs.astype(out_dtype)
    if initial_state is not None:
        decay, inputs, initial_state = tie((decay, inputs, initial_state))
        first = -1 if reverse else 0
        inputs = inputs.at[:, first].add(forget(decay[:, first], initial_state))
    else:
        decay, inputs = tie((decay, inputs))
    h = solve(decay, inputs, reverse, _FORMS[implementation])
    state = h[:, 0 if reverse else -1]
    h = h.astype(out_dtype)
    return (h, state) if return_state else h


def _restart(decay: jax.Array, segment_ids: jax.Array, reverse: bool) -> jax.Array:
    """Decays with an exact 0 wherever a new segment begins."""
    if segment_ids.shape != decay.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers of shape (B, T) = {decay.shape[:2]}; got {segment_ids.dtype} {segment_ids.shape}"
        )
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    no_change = jnp.zeros_like(segment_ids[:, :1], dtype=bool)
    begins = jnp.concatenate([change, no_change] if reverse else [no_change, change], axis=1)
    return jnp.where(begins.reshape(begins.shape + (1,) * (decay.ndim - 2)), 0, decay)
