"""Linear recurrent units whose states all channels share (S5, LRU), and Griffin's gated unit of one state a channel (RG-LRU).

    S5       x_t = e^{dt lambda} x_{t-1} + gain B u_t          y_t = 2 Re(C x_t) + D u_t
    LRU      x_t = lambda x_{t-1} + gamma B u_t                y_t = Re(C x_t) + D u_t          lambda = exp(-e^nu + i e^theta)
    RG-LRU   h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t       a_t = exp(-c softplus(Lambda) r_t)

Cost O(T D P) for the products with B and C, O(T P) for the recurrence, RG-LRU O(T D); state P, or D.
Source: Smith et al., arXiv:2208.04933; Orvieto et al., arXiv:2303.06349; De et al., arXiv:2402.19427.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, scale_or
from effattn_jax.recurrence import diagonal_recurrence
from effattn_jax.ssm._calls import Row, as_wide, check_options, inexact, open_row, open_state, passing, require
from effattn_jax.ssm._poles import check_method, transition

__all__ = ["lru", "rg_lru", "s5_ssm"]


def _shared_states(
    row: Row, system: tuple, state: jax.Array, implementation: str | None, factor: int
) -> tuple[jax.Array, jax.Array]:
    """y (B, T, D) and the last state of x_t = a_t x_{t-1} + gain_t B u_t, y_t = factor Re(C x_t)."""
    decay, gain, B, C = system
    u = row.arrays["u"]
    new = gain * _product(u, B.T)
    decay = jnp.broadcast_to(decay, new.shape).astype(state.dtype)
    x, state = diagonal_recurrence(
        decay, new.astype(state.dtype), initial_state=state, segment_ids=row.segments, return_state=True,
        implementation=implementation,
    )  # fmt: skip
    if not jnp.iscomplexobj(x):
        return x @ C.T, state
    parts = jnp.concatenate([x.real, x.imag], axis=-1)
    return parts @ (factor * jnp.concatenate([C.real, -C.imag], axis=1)).T, state


def _product(u: jax.Array, B: jax.Array) -> jax.Array:
    """u (B, T, D) times B (D, P), real products whatever B is."""
    return jax.lax.complex(u @ B.real, u @ B.imag) if jnp.iscomplexobj(B) else u @ B


def _steps(step: ArrayLike | None, last: int) -> dict:
    """A step for each time as an array of the row, (*B, T, last), last 1 where all states share it."""
    if step is None or jnp.ndim(step) < 2:
        return {}
    size = jnp.shape(step)[-1]
    require(size in (1, last), f"step must have shape (), ({last},) or (*B, T, 1 | {last}); got {jnp.shape(step)}")
    return {"step": (step, (size,))}


@compiled
def s5_ssm(
    u: ArrayLike,
    Lambda: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    step: ArrayLike,
    *,
    method: str = "zoh",
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """A diagonal state-space model with many inputs and outputs (S5): all channels write into and read from the same P states.

    x_t = e^{dt lambda} x_{t-1} + (e^{dt lambda} - 1) / lambda B u_t, y_t = 2 Re(C x_t) + D u_t.

    Args:
      u: (*B, T, D).
      Lambda: (P,), one pole of each conjugate pair; real poles have no factor 2.
      B: (P, D).   C: (D, P).   D: (D,), or None.
      step: dt, a scalar, (P,), or, one a step of time, (*B, T, 1) or (*B, T, P).
      method: "zoh" or "bilinear".
      segment_ids: (*B, T) integers; the state restarts wherever the id changes. The initial state belongs to the first segment.
      reverse: run from the last step to the first.
      initial_state: (*B, P); zeros when None.
      return_state: also return the last state.
      implementation: of `diagonal_recurrence`.

    Returns:
      y (*B, T, D) in the dtype of u, or (y, state).

    Raises:
      ValueError: shapes or dtypes that do not fit; it names the argument, its shape and the rule.

    Cost O(T D P), state P. Source: arXiv:2208.04933.

    >>> import jax.numpy as jnp
    >>> pole, one = jnp.log(jnp.full(1, 0.5)), jnp.ones((1, 1))
    >>> y = s5_ssm(jnp.ones((1, 3, 1)), pole, one, one, None, 1.0)
    >>> print(y[0, :, 0] / y[0, 0, 0])
    [1.   1.5  1.75]
    """
    check_method(method)
    check_options(implementation)
    Lambda = inexact("Lambda", Lambda, ("P",), True)
    size = Lambda.shape[0]
    B = inexact("B", B, (size, "D"), True)
    C = inexact("C", C, B.shape[::-1], True)
    require(
        jnp.iscomplexobj(Lambda) or not (jnp.iscomplexobj(B) or jnp.iscomplexobj(C)),
        f"B and C must be real where Lambda is; got Lambda {Lambda.dtype}, B {B.dtype}, C {C.dtype}",
    )
    row = open_row({"u": (u, B.shape[1:]), **_steps(step, size)}, segment_ids, reverse, wide=(Lambda, B, C))
    u = row.arrays["u"]
    passed = passing(D, u)
    Lambda, B, C = (as_wide(x, u) for x in (Lambda, B, C))
    state = open_state(initial_state, row, (size,), u.sum((1, 2))[:, None] * Lambda[None])
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)
    dt = row.arrays.get("step")
    if dt is None:
        dt = as_wide(inexact("step", step, () if jnp.ndim(step) == 0 else (size,)), u).reshape(1, 1, -1)
    decay, gain = transition(dt, Lambda[None, None], method)
    out, state = _shared_states(row, (decay, gain, B, C), state, implementation, 2)
    return row.finish(passed(out), state, return_state)


@compiled
def lru(
    u: ArrayLike,
    nu_log: ArrayLike,
    theta_log: ArrayLike,
    gamma_log: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    *,
    step: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """The linear recurrent unit: x_t = lambda x_{t-1} + e^{gamma_log} B u_t, y_t = Re(C x_t) + D u_t, lambda = exp(-e^{nu_log} + i e^{theta_log}).

    Args:
      u: (*B, T, D).
      nu_log, theta_log, gamma_log: (P,) real: |lambda| < 1 whatever they are.
      B: (P, D), C: (D, P), complex.   D: (D,), or None.
      step: another sampling rate: the input held for `step` of the steps that lambda is meant for, a factor (lambda^step - 1) / (lambda - 1)
        on it; a scalar, or, one a step of time, (*B, T, 1). None is 1; 0 leaves the state as it is.
      segment_ids, reverse, initial_state, return_state, implementation: as `s5_ssm`; the state is complex, (*B, P).

    Returns:
      y (*B, T, D) in the dtype of u, or (y, state).

    Raises:
      ValueError: shapes or dtypes that do not fit; it names the argument, its shape and the rule.

    Cost O(T D P), state P. Source: arXiv:2303.06349.

    >>> import jax.numpy as jnp
    >>> zero, one = jnp.zeros(1), jnp.ones((1, 1), jnp.complex64)
    >>> lru(jnp.ones((1, 3, 1)), zero, zero, zero, one, one, None).shape
    (1, 3, 1)
    """
    check_options(implementation)
    nu_log = inexact("nu_log", nu_log, ("P",))
    size = nu_log.shape[0]
    theta_log, gamma_log = (inexact(n, x, (size,)) for n, x in (("theta_log", theta_log), ("gamma_log", gamma_log)))
    B = inexact("B", B, (size, "D"), True)
    C = inexact("C", C, B.shape[::-1], True)
    row = open_row({"u": (u, B.shape[1:]), **_steps(step, 1)}, segment_ids, reverse, wide=(nu_log, B, C))
    u = row.arrays["u"]
    passed = passing(D, u)
    nu_log, theta_log, gamma_log, B, C = (as_wide(x, u) for x in (nu_log, theta_log, gamma_log, B, C))
    log_pole = jax.lax.complex(-jnp.exp(nu_log), jnp.exp(theta_log))[None, None]
    state = open_state(initial_state, row, (size,), u.sum((1, 2))[:, None] * log_pole[0])
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)
    dt, gain = row.arrays.get("step"), jnp.exp(gamma_log)[None, None]
    if dt is None and step is not None:
        dt = as_wide(inexact("step", step, ()), u).reshape(1, 1, 1)
    if dt is None:
        decay = jnp.exp(log_pole)
    else:
        decay, held = transition(dt, log_pole, "zoh")
        gain = gain * held / transition(jnp.ones_like(dt), log_pole, "zoh")[1]
    out, state = _shared_states(row, (decay, gain, B, C), state, implementation, 1)
    return row.finish(passed(out), state, return_state)


@jax.custom_jvp
def _root(x: jax.Array) -> jax.Array:
    """sqrt(x), whose slope grows no further below the dtype's epsilon: at a = 1 its own has no bound (Griffin's code stops it at 1,000)."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _root(x), tangent / (2 * jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).eps)))


@compiled
def rg_lru(
    u: ArrayLike,
    recurrence_gate: ArrayLike,
    input_gate: ArrayLike,
    Lambda: ArrayLike,
    *,
    sharpness: float = 8.0,
    step: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """Griffin's real-gated linear recurrent unit: h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t, a_t = exp(-c softplus(Lambda) r_t).

    Args:
      u: (*B, T, D).
      recurrence_gate: r, (*B, T, D) in [0, 1], after its sigmoid.
      input_gate: i, the same.
      Lambda: (D,).
      sharpness: c.
      step: factor on the exponent, for another sampling rate: a scalar, or, one a step of time, (*B, T, 1). 0 leaves the state as it is.
      segment_ids, reverse, implementation: as `s5_ssm`. A segment's first input is scaled as all others are.
      initial_state: (*B, D); zeros when None.
      return_state: also return the last state.

    Returns:
      h (*B, T, D) in the dtype of u, or (h, state).

    Raises:
      ValueError: shapes or dtypes that do not fit; it names the argument, its shape and the rule.

    Cost O(T D), state D. Source: arXiv:2402.19427.

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones((1, 2, 1))
    >>> print(rg_lru(ones, 0 * ones, ones, jnp.zeros(1), initial_state=jnp.ones((1, 1)))[0, :, 0])
    [1. 1.]
    """
    check_options(implementation)
    Lambda = inexact("Lambda", Lambda, ("D",))
    width = Lambda.shape[0]
    gates = {"recurrence_gate": (recurrence_gate, (width,)), "input_gate": (input_gate, (width,))}
    row = open_row({"u": (u, (width,)), **gates, **_steps(step, 1)}, segment_ids, reverse, wide=(Lambda,))
    u, recurrence_gate, input_gate, *dt = row.arrays.values()
    state = open_state(initial_state, row, (width,), u.sum(1))
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)
    exponent = (
        -scale_or(8.0, sharpness, "sharpness") * jax.nn.softplus(as_wide(Lambda, u))[None, None] * recurrence_gate
    )
    if step is not None:
        exponent = exponent * (dt[0] if dt else as_wide(inexact("step", step, ()), u))
    new = _root(-jnp.expm1(2 * exponent)) * (input_gate * u)
    h, state = diagonal_recurrence(
        jnp.exp(exponent), new, initial_state=state, segment_ids=row.segments, return_state=True, implementation=implementation
    )  # fmt: skip
    return row.finish(h, state, return_state)
