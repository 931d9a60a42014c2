"""The arguments of this room's recurrences, checked: batch axes flattened to one, time turned around where asked."""

import numbers
from collections.abc import Callable
from functools import partial
from math import nan, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import ArrayLike, accumulator, choose, floating, positive
from effattn_jax._products import quiet, scaled_axis
from effattn_jax.recurrence.diagonal import _FORMS

__all__: list[str] = []


class Row(NamedTuple):
    """Sequences with one batch axis, in the order in which they are run."""

    arrays: dict[str, jax.Array]  # (B, T, ...) in the accumulator's dtype
    segments: jax.Array | None  # (B, T)
    batch: tuple[int, ...]
    dtype: Any  # of the output
    reverse: bool

    def finish(self, out: jax.Array, state: jax.Array, return_state: bool) -> Any:
        """The output as the caller gets it, alone or with its state."""
        out = jnp.flip(out, 1) if self.reverse else out
        out, state = (x.reshape(*self.batch, *x.shape[1:]) for x in (out.astype(self.dtype), state))
        return (out, state) if return_state else out


def require(ok: bool, message: str) -> None:
    """Raises the ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def number(value: Any) -> float:
    """A real number as a float; NaN, which lies in no range, for what is none: text, True, an array of several, a traced value."""
    if isinstance(value, bool | jax.core.Tracer) or not isinstance(value, numbers.Real | np.ndarray | jax.Array):
        return nan
    return float(value) if np.ndim(value) == 0 and np.isrealobj(value) else nan


def check_options(implementation: str | None, chunk_size: int | None = None) -> None:
    """Raises the ValueError for an unknown form of `diagonal_recurrence`, or a chunk that is no positive int."""
    choose("implementation", implementation, _FORMS)
    positive(chunk_size=chunk_size)


def inexact(
    name: str, array: ArrayLike, shape: tuple[int | str, ...], is_complex: bool = False, beside: str = ""
) -> jax.Array:
    """A floating (or complex) array of this shape, in which a letter stands for any size; `beside` says what it must fit."""
    kind, dtype = ("real or complex floating", jnp.inexact) if is_complex else ("a floating array", jnp.floating)
    try:
        array = jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {kind}; got {array!r}"[:400]) from error
    require(jnp.issubdtype(array.dtype, dtype), f"{name} must be {kind}; got {array.dtype} of shape {array.shape}")
    fits = array.ndim == len(shape) and all(isinstance(w, str) or w == n for w, n in zip(shape, array.shape))
    written = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    require(fits, f"{name} must have shape {written}{beside}; got {array.shape}")
    return array


def open_row(
    arrays: dict[str, tuple[ArrayLike, tuple[int | str, ...]]], segment_ids: ArrayLike | None, reverse: bool = False,
    complex_names: tuple[str, ...] = (), wide: tuple = (),
) -> Row:  # fmt: skip
    """The sequences of a call; the first gives batch, length and output dtype.

    Args:
      arrays: name -> (array (*B, T, ...), its axes after T, letters standing for any size). Equal letters are not compared here.
      complex_names: which of them may be complex.
      wide: further arrays whose precision the sums must have.
    """
    first = next(iter(arrays))
    lead = jnp.ndim(arrays[first][0]) - len(arrays[first][1])
    shape = jnp.shape(arrays[first][0])
    axes = ", ".join(map(str, ("*B", "T", *arrays[first][1])))
    require(lead >= 1, f"{first} must have shape ({axes}); got rank {len(shape)}, shape {shape}")
    batch, length = shape[: lead - 1], shape[lead - 1]
    checked = {
        name: inexact(name, array, (*shape[:lead], *rest), name in complex_names, f" beside {first} {shape}")
        for name, (array, rest) in arrays.items()
    }
    (main,) = floating(**{first: arrays[first][0]})
    dtype = accumulator(*(x.real.dtype for x in (*checked.values(), *wide)))
    flat = {name: _flat(x, lead, dtype) for name, x in checked.items()}
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        require(
            ids.shape == (*batch, length) and jnp.issubdtype(ids.dtype, jnp.integer),
            f"segment_ids must be integers of shape (*B, T) = {(*batch, length)}; got {ids.dtype} {ids.shape}",
        )
        segment_ids = ids.reshape(prod(batch), length)
    if reverse:
        flat = {name: jnp.flip(x, 1) for name, x in flat.items()}
        segment_ids = None if segment_ids is None else jnp.flip(segment_ids, 1)
    return Row(flat, segment_ids, tuple(batch), main.dtype, reverse)


def _flat(x: jax.Array, lead: int, dtype: Any) -> jax.Array:
    x = x.reshape(prod(x.shape[: lead - 1]), *x.shape[lead - 1 :])
    return x.astype(jnp.result_type(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype)


def as_wide(x: jax.Array, like: jax.Array) -> jax.Array:
    """A weight in the precision of the sums, real or complex as it is."""
    return x.astype(jnp.result_type(like.real.dtype, jnp.complex64) if jnp.iscomplexobj(x) else like.real.dtype)


def passing(D: ArrayLike | None, u: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The map y -> y + D u of an output, D (N,) for u (B, T, N, ...): checked here, before the recurrence runs. y itself where D is None."""
    if D is None:
        return lambda out: out
    direct = quiet(partial(scaled_axis, axis=2))(as_wide(inexact("D", D, u.shape[2:3]), u), u)
    return lambda out: out + direct


def open_state(state: ArrayLike | None, row: Row, shape: tuple[int, ...], zero: jax.Array) -> jax.Array:
    """The state (B, *shape) before the first step, zeros where none is given, which have the dtype of `zero`, an array (B, *shape)."""
    if state is None:
        return jnp.zeros_like(zero)
    state = jnp.asarray(state)
    want = (*row.batch, *shape)
    require(state.shape == want, f"initial_state must have shape (*B, ...) = {want}; got {state.shape}")
    require(
        jnp.iscomplexobj(zero) or not jnp.iscomplexobj(state),
        f"initial_state must be real where Lambda is; got {state.dtype}",
    )
    return state.reshape(zero.shape).astype(zero.dtype)
