"""Diagonal state-space models of one channel each (S4D, DSS): one set of parameters, run as a convolution, in chunks, as a scan or step by step.

    x_t = e^{dt lambda} x_{t-1} + dt phi(dt lambda) B u_t        y_t = 2 Re(C x_t) + D u_t        phi(z) = (e^z - 1) / z

Cost O(T (C + P)) in chunks of C, O(T log T + sqrt(T) P) as a convolution, O(T P) as a scan; state P numbers a channel.
Source: Gu et al., arXiv:2206.11893 (S4D); Gupta et al., arXiv:2203.14343 (DSS).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, choose, is_whole
from effattn_jax._derivatives import Fixed
from effattn_jax.ssm import _toeplitz
from effattn_jax.ssm._calls import as_wide, check_options, inexact, open_row, open_state, passing, require
from effattn_jax.ssm._fold import begins, real_part, scan_states
from effattn_jax.ssm._poles import check_method, power_minus_one, transition

__all__ = ["diagonal_kernel", "diagonal_ssm", "dss_kernel"]

_MODES = (None, "convolution", "recurrence", "chunked")


def _system(shape: tuple[int | str, ...], Lambda: ArrayLike, **weights: ArrayLike) -> list[jax.Array]:
    """Poles and their weights, checked against one another."""
    Lambda = inexact("Lambda", Lambda, shape, True)
    weights = {name: inexact(name, x, Lambda.shape, True) for name, x in weights.items()}
    got = ", ".join(f"{name} {x.dtype}" for name, x in {"Lambda": Lambda, **weights}.items())
    require(
        jnp.iscomplexobj(Lambda) or not any(map(jnp.iscomplexobj, weights.values())),
        f"{' and '.join(weights)} must be real where Lambda is; got {got}",
    )
    return [Lambda, *weights.values()]


def _kernel_system(Lambda: ArrayLike, step: ArrayLike, length: int, **weights: ArrayLike) -> list[jax.Array]:
    """Poles, their weights and the step of a kernel of that length, of one system or one a channel."""
    require(is_whole(length, 0), f"length must be a non-negative int; got {length!r}")
    system = _system(("P",) if np.ndim(Lambda) == 1 else ("D", "P"), Lambda, **weights)
    shape = system[0].shape[:-1]
    step = inexact("step", step, () if np.ndim(step) == 0 else shape, beside=f" beside Lambda {system[0].shape}")
    return [*system, jnp.broadcast_to(step, shape)]


@compiled
def diagonal_kernel(
    Lambda: ArrayLike, B: ArrayLike, C: ArrayLike, step: ArrayLike, length: int, method: str = "zoh"
) -> jax.Array:
    """The convolution kernel of a diagonal state-space model.

    K_l = 2 Re sum_n C_n gain_n B_n a_n^l,  l = 0 ... length - 1; no factor 2 where Lambda is real. With a zero-order hold a = e^{dt lambda} and
    gain = (e^{dt lambda} - 1) / lambda. Angles are right to 1e-6 at l = 10^6 in float32; lags are split in two, so this is a product of matrices.

    Args:
      Lambda, B, C: (P,) or, one system a channel, (D, P); one pole of each conjugate pair.
      step: dt, a scalar or (D,), positive.
      length: of the kernel, at most 2^24.
      method: "zoh" or "bilinear".

    Returns:
      (length,) or (D, length), real.

    Raises:
      ValueError: shapes that do not fit, an unknown method, a negative length.

    Cost O(D P length) multiplications in a product of matrices, O(D P sqrt(length)) exponentials. Source: arXiv:2206.11893.

    >>> import jax.numpy as jnp
    >>> pole, one = jnp.array([jnp.log(0.5)]), jnp.ones(1)
    >>> kernel = diagonal_kernel(pole, one, one, 1.0, 3)
    >>> print(kernel / kernel[0])
    [1.   0.5  0.25]
    """
    check_method(method)
    Lambda, B, C, step = _kernel_system(Lambda, step, length, B=B, C=C)
    single = Lambda.ndim == 1
    if single:
        Lambda, B, C, step = (x[None] for x in (Lambda, B, C, step))
    dtype = jnp.result_type(jnp.float32, *(x.real.dtype for x in (Lambda, B, C, step)))
    Lambda, B, C, step = (as_wide(x, jnp.zeros((), dtype)) for x in (Lambda, B, C, step))
    weights = C * B * transition(step[:, None], Lambda, method)[1]
    kernel = _toeplitz.kernel(weights, step, Lambda, method, length)
    return kernel[0] if single else kernel


@compiled
def dss_kernel(Lambda: ArrayLike, W: ArrayLike, step: ArrayLike, length: int) -> jax.Array:
    """The kernel of a diagonal state space whose powers are normalised over the length (DSS, softmax form).

    K_l = 2 Re sum_n (W_n / lambda_n) e^{l dt lambda_n} / sum_{r < length} e^{r dt lambda_n}: a zero-order hold whose C is W / (e^{length dt lambda} - 1)
    and whose B is 1.

    Args:
      Lambda, W: (P,) or (D, P), complex, one pole of each conjugate pair, real parts below 0.
      step: a scalar or (D,).
      length: of the kernel and of the normalisation.

    Returns:
      (length,) or (D, length).

    Raises:
      ValueError: as `diagonal_kernel`.

    Cost as `diagonal_kernel`. Source: Gupta et al., arXiv:2203.14343.

    >>> import jax, jax.numpy as jnp
    >>> kernel = jax.jit(dss_kernel, static_argnames="length")
    >>> kernel(jnp.array([-1.0 + 1j]), jnp.ones(1), 0.1, length=5).shape
    (5,)
    """
    Lambda, W, step = _kernel_system(Lambda, step, length, W=W)
    total = power_minus_one(step[..., None], Lambda, length)
    return diagonal_kernel(Lambda, jnp.ones_like(W), W / total, step, length)


@compiled
def diagonal_ssm(
    u: ArrayLike,
    Lambda: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    step: ArrayLike,
    *,
    mode: str | None = None,
    method: str = "zoh",
    segment_ids: ArrayLike | None = None,
    reverse: bool = False,
    initial_state: ArrayLike | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """A diagonal state-space model a channel: x_t = a x_{t-1} + gain B u_t, y_t = 2 Re(C x_t) + D u_t.

    a = e^{dt lambda} and gain = (e^{dt lambda} - 1) / lambda with a zero-order hold; a step of 0 leaves the state as it is.

    Args:
      u: (*B, T, D).
      Lambda, B, C: (D, P), one pole of each conjugate pair; all real for real poles, and then without the factor 2.
      D: (D,), or None for no direct term.
      step: dt, a scalar, (D,) or, one a step of time (irregular sampling), (*B, T, D).
      mode: "chunked" (products of matrices inside chunks, states in between; a scan of each chunk's states where steps or segments are given),
        "recurrence" (a scan of the states, chunk by chunk) or "convolution" (FFT; not causal to the bit, so a later NaN spoils all); None is "chunked".
      method: "zoh" or "bilinear".
      segment_ids: (*B, T) integers; the state restarts wherever the id changes. The initial state belongs to the first segment.
      reverse: run from the last step to the first: the initial state enters at the end, the returned one is that at the start.
      initial_state: (*B, D, P), complex where Lambda is; zeros when None.
      return_state: also return the last state.
      chunk_size: steps a chunk; None is 32, or 64 where chunks are scanned.
      implementation: of `diagonal_recurrence`, in what is scanned.

    Returns:
      y (*B, T, D) in the dtype of u, or (y, state); sums run in float32 at least.

    Raises:
      ValueError: shapes that do not fit, an unknown mode, segments or steps of time with mode="convolution".

    Cost O(T (C + 4 P)) a channel in chunks of C; state P. Source: arXiv:2206.11893.

    >>> import jax, jax.numpy as jnp
    >>> pole, one = jnp.array([[jnp.log(0.5)]]), jnp.ones((1, 1))
    >>> y = jax.jit(diagonal_ssm)(jnp.ones((1, 3, 1)), pole, one, one, None, jnp.ones(1))
    >>> print(y[0, :, 0] / y[0, 0, 0])
    [1.   1.5  1.75]
    """
    choose("mode", mode, _MODES)
    check_method(method)
    check_options(implementation, chunk_size)
    Lambda, B, C = _system(("D", "P"), Lambda, B=B, C=C)
    width, size = Lambda.shape
    step = jnp.broadcast_to(inexact("step", step, ()), (width,)) if np.ndim(step) == 0 else step
    steps = {"step": (step, (width,))} if np.ndim(step) != 1 else {}
    row = open_row({"u": (u, (width,)), **steps}, segment_ids, reverse, wide=(Lambda, B, C))
    u = row.arrays["u"]
    if mode == "convolution" and (steps or segment_ids is not None):
        what = "a step for each time" if steps else "segment_ids"
        raise ValueError(f"mode='convolution' has one kernel for all of time; got {what}: use mode='chunked'")
    Lambda, B, C = (as_wide(x, u) for x in (Lambda, B, C))
    state = open_state(initial_state, row, (width, size), u.sum(1)[..., None] * Lambda[None])
    passed = passing(D, u)
    if u.shape[1] == 0:
        return row.finish(u, state, return_state)
    scanned = steps or segment_ids is not None or mode == "recurrence"
    if steps:
        out, state = _irregular(row, Lambda, B, C, state, method, chunk_size, implementation)
    else:
        step = as_wide(inexact("step", step, (width,)), u)
        decay, gain = transition(step[:, None], Lambda, method)
        if scanned:
            out, state = _regular(row, (decay, gain * B, C), state, chunk_size, implementation)
        else:
            run = _toeplitz.convolved if mode == "convolution" else _toeplitz.in_chunks
            out, state = run(u, state, (Lambda, gain * B, C, step), method, chunk_size or 32)
    return row.finish(passed(out), state, return_state)


def _regular(row, weights, state, size, implementation):
    """One step for all of time; weights are a, what u enters by, and C."""
    state, out = scan_states(
        _same_steps, _read, state, (row.arrays["u"],), begins(row.segments), weights, size=size,
        implementation=implementation,
    )  # fmt: skip
    return out, state


def _same_steps(inputs, weights):
    decay, enter, _ = weights
    return decay[None, None], inputs[0][..., None] * enter[None, None]


def _read(x, inputs, weights):
    del inputs
    return real_part(jnp.sum(x * weights[2][None, None], axis=-1), weights[0])


def _irregular(row, poles, B, C, state, method, size, implementation):
    """A step for each time."""
    inputs = (row.arrays["u"], row.arrays["step"])
    state, out = scan_states(
        Fixed(_own_steps, method), _read, state, inputs, begins(row.segments), (poles, B, C), size=size,
        implementation=implementation,
    )  # fmt: skip
    return out, state


def _own_steps(method, inputs, weights):
    u, step = inputs
    decay, gain = transition(step[..., None], weights[0][None, None], method)
    return decay, gain * weights[1][None, None] * u[..., None]
