"""Selective state spaces (S6, the recurrence of Mamba): each token chooses its step, and what it writes and reads.

    x_t = e^{delta_t A} x_{t-1} + delta_t u_t B_t          y_t = C_t . x_t + D u_t             a state of P numbers for each of D channels

Cost O(T D P), state D P; states exist for one chunk at a time in both passes. Source: Gu and Dao, arXiv:2312.00752.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax._derivatives import Fixed, tie
from effattn_jax._products import finite
from effattn_jax.recurrence import diagonal_recurrence
from effattn_jax.recurrence.diagonal import forget
from effattn_jax.ssm._calls import as_wide, check_options, inexact, open_row, open_state, passing
from effattn_jax.ssm._fold import begins, fold, real_part

__all__ = ["selective_scan"]

_CHUNK = 32


@compiled
def selective_scan(
    u: ArrayLike,
    delta: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Mamba's recurrence: x_t = e^{delta_t A} x_{t-1} + delta_t u_t B_t, y_t = C_t . x_t + D u_t.

    A zero-order hold for A and Euler's rule for B, as in the source. A delta of 0 leaves the state as it is, which is how to leave out padding;
    delta times a factor is another sampling rate.

    Args:
      u: (*B, T, D).
      delta: (*B, T, D), not negative: after its bias and softplus.
      A: (D, P), real parts below 0. Complex A keeps one of each conjugate pair, and then y_t = 2 Re(C_t . x_t) + D u_t.
      B, C: (*B, T, P), complex only where A is.
      D: (D,), or None.
      segment_ids: (*B, T) integers; the state restarts wherever the id changes. The initial state belongs to the first segment.
      reverse: run from the last step to the first.
      initial_state: (*B, D, P); zeros when None.
      return_state: also return the last state.
      chunk_size: steps a chunk; None is 32.
      implementation: of `diagonal_recurrence`, inside a chunk.

    Returns:
      y (*B, T, D) in the dtype of u, or (y, state), which is float32 at least. There is no gate inside.

    Raises:
      ValueError: shapes or dtypes that do not fit; it names the argument, its shape and the rule.

    Cost O(T D P), state D P, memory beside inputs and outputs O(C D P + T D P / C) in both passes. Source: arXiv:2312.00752.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 3, 1))
    >>> print(selective_scan(ones, ones, jnp.full((1, 1), jnp.log(0.5)), ones, ones)[0, :, 0])
    [1.   1.5  1.75]
    """
    check_options(implementation, chunk_size)
    channels = jnp.shape(u)[-1] if jnp.ndim(u) else "D"
    A = inexact("A", A, (channels, "P"), True, f" beside u {jnp.shape(u)}")
    width, size = A.shape
    pairs = ("B", "C") if jnp.iscomplexobj(A) else ()
    arrays = {"u": (u, (width,)), "delta": (delta, (width,)), "B": (B, (size,)), "C": (C, (size,))}
    row = open_row(arrays, segment_ids, reverse, pairs, wide=(A,))
    u = row.arrays["u"]
    A, passed = as_wide(A, u), passing(D, u)
    state = open_state(initial_state, row, (width, size), u.sum(1)[..., None] * A[None])
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)

    begin = begins(row.segments)
    state, A, inputs, begin = tie((jnp.swapaxes(state, 1, 2), A.T, tuple(row.arrays.values()), begin))
    body, pull = (Fixed(f, implementation) for f in (_chunk, _pull))
    state, out = fold(body, state, inputs, begin, A, chunk_size or _CHUNK, pull)
    state = jnp.swapaxes(state, 1, 2)
    return row.finish(passed(out), state, return_state)


# Inside, channels come last: (B, C, P, D). Sums over states or channels are written as products with a vector, which XLA vectorises on a CPU;
# a sum over an axis it does not.


def _states(
    implementation: str | None, state: jax.Array, inputs: tuple, begin: jax.Array | None, A: jax.Array
) -> tuple:
    """(a, x, last x) of a chunk from the state (B, P, D) before it."""
    u, delta, B, _ = inputs
    decay = jnp.exp(delta[:, :, None] * A[None, None])
    if begin is not None:
        decay = jnp.where(begin[:, :, None, None], 0, decay)
    new = jnp.einsum("bcd,bcp->bcpd", delta * u, B).astype(decay.dtype)
    return decay, *diagonal_recurrence(
        decay, new, initial_state=state, return_state=True, implementation=implementation
    )


def _chunk(implementation, state, inputs, begin, A):
    """Steps of one chunk: (last state, outputs)."""
    _, x, state = _states(implementation, state, inputs, begin, A)
    return state, real_part(jnp.einsum("bcpd,bcp->bcd", x, inputs[3].astype(x.dtype)), A)


def _pull(implementation, state, inputs, begin, out, d_state, d_out, A):
    """The backward pass of a chunk: g_t = C_t y'_t + a_{t+1} g_{t+1} is the cotangent of x_t, and all others follow from it."""
    # What is not finite is 0 here, and an output that is not passes nothing back: beside a cotangent of 0 it would make NaN.
    state, inputs = jax.tree.map(finite, (state, inputs))
    d_out = jnp.where(jnp.isfinite(out), d_out, 0)
    u, delta, B, C = inputs
    decay, x, _ = _states(implementation, state, inputs, begin, A)
    factor = 2 if jnp.iscomplexobj(A) else 1
    written, read = (delta * u).astype(x.dtype), factor * d_out.astype(x.dtype)
    d_x = jnp.einsum("bcd,bcp->bcpd", read, C)
    later = jnp.concatenate([decay[:, 1:], jnp.ones_like(decay[:, :1])], axis=1)
    g, _ = diagonal_recurrence(
        later, d_x, initial_state=d_state, reverse=True, return_state=True, implementation=implementation
    )
    before = jnp.concatenate([state[:, None], x[:, :-1]], axis=1)
    if begin is not None:
        before = jnp.where(begin[:, :, None, None], 0, before)
    d_exponent = g * before * decay
    d_written = jnp.einsum("bcpd,bcp->bcd", g, B.astype(g.dtype)).real
    d_delta = jnp.einsum("bcpd,bcp->bcd", d_exponent * A[None, None], jnp.ones_like(B, g.dtype)).real
    d_B, d_C = (_over_channels(y * z[:, :, None]) for y, z in ((g, written), (x, read)))
    ones = jnp.ones_like(B[:, :, 0], g.dtype)
    d_A = jnp.einsum("bc,bcpd->bpd", ones, d_exponent * delta[:, :, None]).sum(0)
    d_B, d_C = (y if jnp.iscomplexobj(z) else y.real for y, z in ((d_B, B), (d_C, C)))
    return forget(decay[:, 0], g[:, 0]), (d_written * delta, d_delta + d_written * u, d_B, d_C), d_A


def _over_channels(x: jax.Array) -> jax.Array:
    """The sum over the last axis."""
    return jnp.einsum("bcpd,d->bcp", x, jnp.ones(x.shape[-1:], x.dtype))
