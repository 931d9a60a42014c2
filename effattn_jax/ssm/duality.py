"""State-space duality (Mamba-2) and the trapezoid (Mamba-3): one decay a head, so that chunks are masked products, as in linear attention.

    S_t = e^{delta_t A} S_{t-1} + delta_t B_t x_t^T          y_t = S_t^T C_t + D x_t

Both run on the outer-product recurrence with query C, key B, value delta x. Cost O(T (C + P) V) a head, state P x V.
Source: Dao and Gu, arXiv:2405.21060; Mamba-3's rule as in the authors' published code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, positive
from effattn_jax._products import quiet, row_products, scaled_rows
from effattn_jax.recurrence._outer_chunks import Options, repeat_heads
from effattn_jax.recurrence._outer_kernel import outer_product
from effattn_jax.ssm._calls import as_wide, inexact, open_row, open_state, passing, require
from effattn_jax.ssm._fold import begins

__all__ = ["TrapezoidState", "mamba3_trapezoid", "state_space_duality"]


class TrapezoidState(NamedTuple):
    """S (*B, N, P, V), and B and x of the last step, (*B, N, P) and (*B, N, V): half of that pair is still to be written."""

    state: jax.Array
    key: jax.Array
    value: jax.Array


def _open(
    x: ArrayLike, delta: ArrayLike, A: ArrayLike, B: ArrayLike, C: ArrayLike, segment_ids: Any, **more: Any
) -> Any:
    """The checked row, and (query, key, x, delta, log decay, ...) with N heads each."""
    require(jnp.ndim(B) >= 3, f"B must have shape (*B, T, K, P); got {jnp.shape(B)}")
    require(jnp.ndim(x) >= 3, f"x must have shape (*B, T, N, V); got rank {jnp.ndim(x)}, shape {jnp.shape(x)}")
    heads, dim = jnp.shape(x)[-2:]
    groups, size = jnp.shape(B)[-2:]
    require(
        groups > 0 and heads % groups == 0, f"the groups of B must divide the heads of x; got N={heads}, K={groups}"
    )
    arrays = {"x": (x, (heads, dim)), "delta": (delta, (heads,)), "B": (B, (groups, size)), "C": (C, (groups, size))}
    arrays |= {name: (array, (heads,)) for name, array in more.items()}
    A = inexact("A", A, (heads,))
    row = open_row(arrays, segment_ids, wide=(A,))
    x, delta, B, C, *rest = row.arrays.values()
    decay = delta * as_wide(A, x)[None, None]
    return row, (repeat_heads(C, x), repeat_heads(B, x), x, delta, decay, *rest)


@compiled
def state_space_duality(
    x: ArrayLike,
    delta: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Mamba-2's recurrence by chunks: S_t = e^{delta_t A} S_{t-1} + delta_t B_t x_t^T, y_t = S_t^T C_t + D x_t.

    Args:
      x: (*B, T, N, V), N heads.
      delta: (*B, T, N), not negative: after its bias and softplus. A delta of 0 leaves the state as it is.
      A: (N,), not positive.
      B, C: (*B, T, K, P), K groups, K dividing N.
      D: (N,), or None.
      segment_ids: (*B, T) integers; the state restarts wherever the id changes. The initial state belongs to the first segment.
      initial_state: (*B, N, P, V); zeros when None.
      return_state: also return the last state.
      chunk_size: steps a chunk; None is 64 (128 in the parallel form).
      implementation: "chunked" (one chunk after the other) or "parallel" (all side by side, for accelerators); None picks by the platform.

    Returns:
      y (*B, T, N, V) in the dtype of x, or (y, state), which is float32 at least.

    Raises:
      ValueError: shapes or dtypes that do not fit; it names the argument, its shape and the rule.

    Cost O(T (C + P) V) a head in chunks of C, state P V a head. Source: arXiv:2405.21060.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 3, 1, 1))
    >>> print(state_space_duality(ones, jnp.ones((1, 3, 1)), jnp.log(jnp.full(1, 0.5)), ones, ones)[0, :, 0, 0])
    [1.   1.5  1.75]
    """
    positive(chunk_size=chunk_size)
    _check_form(implementation)
    row, (query, key, x, delta, decay) = _open(x, delta, A, B, C, segment_ids)
    passed = passing(D, x)
    shape = (x.shape[2], key.shape[3], x.shape[3])
    state = open_state(initial_state, row, shape, key.sum(1)[..., None] * x.sum(1)[:, :, None])
    if x.shape[1] == 0:
        return row.finish(x, state, return_state)
    out, (state, _) = outer_product(
        query, key, scaled_rows(delta, x), decay, (state, None), segments=row.segments, size=chunk_size, implementation=implementation
    )  # fmt: skip
    return row.finish(passed(out), state, return_state)


@compiled
def mamba3_trapezoid(
    x: ArrayLike,
    delta: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    trapezoid: ArrayLike,
    D: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
    initial_state: TrapezoidState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Mamba-3's recurrence: each step writes its own pair and, decayed, the pair before it.

    S_t = a_t S_{t-1} + (1 - l_t) delta_t a_t B_{t-1} x_{t-1}^T + l_t delta_t B_t x_t^T,  a_t = e^{delta_t A},  y_t = S_t^T C_t + D x_t.
    One pass: pair j counts l_j delta_j + (1 - l_{j+1}) delta_{j+1} for later steps, and l_j delta_j for its own.

    Args:
      trapezoid: l, (*B, T, N) in [0, 1]; 1 is `state_space_duality`.
      initial_state, return_state: a `TrapezoidState`.
      The others: see `state_space_duality`. A delta of 0 leaves out the step's own pair, but also half of the pair before it: padding is
        cut out before the call instead. Rotations of B and C, which make the states complex, are the caller's (`position.rotary`).

    Returns:
      y (*B, T, N, V), or (y, state).

    Raises:
      ValueError: as `state_space_duality`.

    Cost as `state_space_duality`; state P V + P + V a head. Source: the published code of Mamba-3.

    >>> import jax.numpy as jnp
    >>> ones, gate = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1))
    >>> print(mamba3_trapezoid(ones, gate, jnp.log(jnp.full(1, 0.5)), ones, ones, gate / 2)[0, :, 0, 0])
    [0.5   1.    1.25]
    """
    positive(chunk_size=chunk_size)
    _check_form(implementation)
    row, (query, key, x, delta, decay, own) = _open(x, delta, A, B, C, segment_ids, trapezoid=trapezoid)
    passed = passing(D, x)
    batch, length, heads, dim = x.shape
    shapes = TrapezoidState((heads, key.shape[3], dim), (heads, key.shape[3]), (heads, dim))
    zeros = TrapezoidState(key.sum(1)[..., None] * x.sum(1)[:, :, None], key.sum(1), x.sum(1))
    if initial_state is None:
        state = TrapezoidState(*map(jnp.zeros_like, zeros))
    else:
        require(
            isinstance(initial_state, TrapezoidState),
            f"initial_state must be the TrapezoidState of an earlier call; got {type(initial_state).__name__}",
        )
        state = TrapezoidState(*(open_state(part, row, *rest) for part, *rest in zip(initial_state, shapes, zeros)))
    if length == 0:
        return _finish(row, x, state, return_state)
    begin = begins(row.segments)
    other = (1 - own) * delta if begin is None else jnp.where(begin[..., None], 0, (1 - own) * delta)
    own = own * delta
    first = state.state + other[:, 0, :, None, None] * state.key[..., None] * state.value[:, :, None]
    counted = own + jnp.concatenate([other[:, 1:], jnp.zeros_like(other[:, :1])], axis=1)
    past, (last, _) = outer_product(
        query, key, quiet(scaled_rows)(counted, x), decay, (first, None), segments=row.segments, size=chunk_size,
        options=Options(strict=True), implementation=implementation,
    )  # fmt: skip
    present = row_products(query, key) * own
    out = passed(past + scaled_rows(present, x))
    return _finish(row, out, TrapezoidState(last, key[:, -1], x[:, -1]), return_state)


def _finish(row: Any, out: jax.Array, state: TrapezoidState, return_state: bool) -> Any:
    out, state_ = row.finish(out, state.state, True)
    pair = (part.reshape(*row.batch, *part.shape[1:]) for part in state[1:])
    return (out, TrapezoidState(state_, *pair)) if return_state else out


def _check_form(implementation: str | None) -> None:
    known = (None, "chunked", "parallel")
    require(implementation in known, f"implementation={implementation!r} is unknown; known: chunked, parallel")
