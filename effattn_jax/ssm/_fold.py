"""State-space recurrences over chunks of time: states exist for one chunk at a time, in both passes.

    x_t = a_t x_{t-1} + b_t,   y_t = read(x_t)

Cost O(T) state updates; memory beside inputs and outputs: the states of one chunk, and one state a chunk in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._derivatives import Fixed, tie
from effattn_jax.recurrence import diagonal_recurrence
from effattn_jax.recurrence._chunks import at_once, pull_by_vjp, scan_chunks

__all__: list[str] = []

_CHUNK = 64


def fold(
    body: Callable, carry: Any, inputs: Any, aux: Any, weights: Any, size: int, pull: Callable | None = None
) -> tuple[Any, Any]:
    """`scan_chunks` for any length: a last chunk that is not full is a call of its own, so that nothing is padded."""
    length = jax.tree.leaves(inputs)[0].shape[1]
    whole = length - length % size
    pull = pull or Fixed(pull_by_vjp, body)
    if whole == 0:
        return at_once(body, pull, (carry, inputs, weights), aux)

    def part(tree, start, stop):
        return jax.tree.map(lambda x: x[:, start:stop], tree)

    rows = (part(inputs, 0, whole), part(aux, 0, whole))
    carry, out = scan_chunks(body, carry, *rows, size=size, pull=pull, weights=weights)
    if whole == length:
        return carry, out
    carry, last = at_once(body, pull, (carry, part(inputs, whole, length), weights), part(aux, whole, length))
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), out, last)


def begins(segment_ids: jax.Array | None) -> jax.Array | None:
    """Where a segment begins, (B, T); the first step goes on from the state."""
    if segment_ids is None:
        return None
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.concatenate([jnp.zeros_like(segment_ids[:, :1], bool), change], axis=1)


def scan_states(
    make: Callable, read: Callable, state: jax.Array, inputs: Any, begin: jax.Array | None, weights: Any,
    *, size: int | None = None, implementation: str | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """The recurrence from `state` (B, ...) on: (last state, outputs).

    Args:
      make: make(inputs, weights) -> (a, b) of a chunk, b (B, C, ...), a broadcastable to it.
      read: read(x, inputs, weights) -> outputs (B, C, ...) of the states x (B, C, ...) of a chunk.
      inputs: arrays (B, T, ...), T >= 1; weights: arrays without a time axis.
      begin: (B, T) bool, where the state restarts from 0; None for nowhere.
      size: steps a chunk; None is 64.
      implementation: of `diagonal_recurrence`, inside a chunk.
    """

    state, inputs, begin, weights = tie((state, inputs, begin, weights))
    body = Fixed(_chunk, make, read, implementation)
    return fold(body, state, inputs, begin, weights, size or _CHUNK)


def _chunk(make, read, implementation, state, inputs, begin, weights):
    """Steps of one chunk: (last state, outputs)."""
    decay, new = make(inputs, weights)
    if begin is not None:
        decay = jnp.where(begin.reshape(begin.shape + (1,) * (new.ndim - 2)), 0, jnp.broadcast_to(decay, new.shape))
    x, state = diagonal_recurrence(decay, new, initial_state=state, return_state=True, implementation=implementation)
    return state, read(x, inputs, weights)


def real_part(x: jax.Array, poles: jax.Array) -> jax.Array:
    """What a sum over states comes to: twice the real part where one of each conjugate pair is kept."""
    return 2 * x.real if jnp.iscomplexobj(poles) else x
