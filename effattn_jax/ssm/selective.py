"""Selective state spaces (S6, the recurrence of Mamba): each token chooses its step, and what it writes and reads.

    x_t = e^{delta_t A} x_{t-1} + delta_t u_t B_t          y_t = C_t . x_t + D u_t             a state of P numbers for each of D channels

Cost O(T D P), state D P; states exist for one chunk at a time in both passes. Source: Gu and Dao, arXiv:2312.00752.
"""

from typing import Any

import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, positive
from effattn_jax.ssm._calls import as_wide, inexact, open_row, open_state
from effattn_jax.ssm._fold import begins, real_part, scan_states

__all__ = ["selective_scan"]


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
      chunk_size: steps a chunk; None is 64.
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
    positive(chunk_size=chunk_size)
    A = inexact("A", A, ("D", "P"), True)
    width, size = A.shape
    pairs = ("B", "C") if jnp.iscomplexobj(A) else ()
    arrays = {"u": (u, (width,)), "delta": (delta, (width,)), "B": (B, (size,)), "C": (C, (size,))}
    row = open_row(arrays, segment_ids, reverse, pairs, wide=(A,))
    u = row.arrays["u"]
    A = as_wide(A, u)
    state = open_state(initial_state, row, (width, size), u.sum(1)[..., None] * A[None] * row.arrays["B"].sum(1)[:, None])
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)

    def make(inputs, weights):
        u, delta, B, _ = inputs
        return jnp.exp(delta[..., None] * weights[None, None]), (delta * u)[..., None] * B[:, :, None]

    def read(x, inputs, weights):
        return real_part(jnp.sum(x * inputs[3][:, :, None], axis=-1), weights)

    state, out = scan_states(
        make, read, state, tuple(row.arrays.values()), begins(row.segments), A, size=chunk_size, implementation=implementation
    )  # fmt: skip
    if D is not None:
        out = out + as_wide(inexact("D", D, (width,)), u)[None, None] * u
    return row.finish(out, state, return_state)
