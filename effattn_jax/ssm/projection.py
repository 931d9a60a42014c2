"""Online projection of signals onto HiPPO's bases: every measure, every method, with regular or irregular samples held for a step.

    scaled memories     t x' = A x + B u        LegS exactly (`_legs_exact.py`) or by bilinear rules at O(P) a step (`_legs_steps.py`);
                                                cosine and Fourier in their eigenbasis, as a diagonal recurrence
    sliding, fading       x' = A x + B u        x_t = A_bar x_(t-1) + B_bar u_t, several steps to a product of matrices

State: P numbers a channel, and the time. Sources: Gu et al., arXiv:2008.07669; Su, kexue.fm/archives/10137.
"""

from functools import lru_cache, partial
from math import inf, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._contract import ArrayLike, accumulator, choose
from effattn_jax._derivatives import tie
from effattn_jax.recurrence import diagonal_recurrence
from effattn_jax.ssm import _legs_exact, _legs_steps
from effattn_jax.ssm._calls import number
from effattn_jax.ssm._measures import MEASURES, change_of, find
from effattn_jax.ssm.discretization import METHODS, alpha_of, dense, discretize
from effattn_jax.ssm.hippo import hippo_matrices

__all__ = ["HippoState", "hippo_project"]


class HippoState(NamedTuple):
    """Where a projection stands: coefficients (*rest, P), and the time behind them, a number of samples (int32) or, with timestamps, a duration."""

    coefficients: jax.Array
    time: jax.Array


class _Way(NamedTuple):
    """How to project: everything that a program is compiled for."""

    measure: str
    size: int
    options: tuple[tuple[str, Any], ...]
    alpha: float | None  # None: exactly
    step: float | None
    is_regular: bool
    final_only: bool


class _Run(NamedTuple):
    """What to project: coefficients x (R, P) after the time `start`, the cells that follow, u (T, R)."""

    x: jax.Array
    start: jax.Array
    cut: _legs_exact.Grid | None
    u: jax.Array


def _ratios(run: _Run) -> tuple[jax.Array, jax.Array]:
    """width / time at the beginning of each cell, and whether that time is 0."""
    if run.cut is None:
        time, width = run.start + jnp.arange(run.u.shape[0], dtype=run.start.dtype), 1
    else:
        time, width = run.start + run.cut.before, run.cut.width
    return width / jnp.where(time > 0, time, 1), time <= 0


def _legs(run: _Run, way: _Way) -> tuple[jax.Array | None, jax.Array]:
    if way.alpha is not None:
        return _legs_steps.waves(run.x, *_ratios(run), run.u, way.alpha, way.final_only)
    if not way.final_only:
        states = _legs_exact.every(run.x, run.start, run.cut, run.u, way.is_regular)
        states = states if way.is_regular else _started(run, states, slice(None))
        return states, states[-1]
    if way.is_regular:
        return None, _legs_exact.last_regular(run.x, run.start, run.u)
    return None, _started(run, _legs_exact.last(run.x, run.start, run.cut, run.u), -1)


def _started(run: _Run, states: jax.Array, which: Any) -> jax.Array:
    """States (..., R, P) after some samples, where no time has passed yet those of constants, as a memory begins."""
    passed = run.start + run.cut.before[which] + run.cut.width[which]
    constant = jnp.pad(run.u[which][..., None], [(0, 0)] * (states.ndim - 1) + [(0, states.shape[-1] - 1)])
    return jnp.where(passed.reshape(*passed.shape, 1, 1) > 0, states, constant)


@lru_cache(maxsize=32)
def _eigenbasis(measure: str, size: int) -> tuple[np.ndarray, ...]:
    """(eigenvalues, V^-1 B, V, V^-1, V^-1 of the state of a constant 1)."""
    A, B = hippo_matrices(measure, size)
    values, V = np.linalg.eig(A.astype(complex))
    back = np.linalg.inv(V)
    return values, back @ B, V, back, back @ np.linalg.solve(A, -B)


def _diagonal_scaled(run: _Run, way: _Way) -> tuple[jax.Array | None, jax.Array]:
    kind = jnp.result_type(run.x.dtype, jnp.complex64)
    values, drive, V, back, constant = (jnp.asarray(a.astype(kind)) for a in _eigenbasis(way.measure, way.size))
    ratio, is_first = _ratios(run)
    if way.alpha is None:
        power = jnp.log1p(ratio)[:, None] * values[None]
        decay, weight = jnp.exp(power), -jnp.expm1(power) * constant[None]
    else:
        z = ratio[:, None] * values[None]
        inverse = 1 / (1 - way.alpha * z)
        decay, weight = (1 + (1 - way.alpha) * z) * inverse, ratio[:, None] * inverse * drive[None]
    decay = jnp.where(is_first[:, None], 0, decay)
    weight = jnp.where(is_first[:, None], constant[None], weight)
    state = jnp.matmul(run.x.astype(kind), back.T, precision="highest")
    inputs = weight[:, None] * run.u[..., None]
    h, last = diagonal_recurrence(decay[None, :, None], inputs[None], initial_state=state[None], return_state=True)

    def own(h):
        x = jnp.matmul(h, V.T, precision="highest")
        return x if jnp.iscomplexobj(run.x) else x.real

    return None if way.final_only else own(h[0]), own(last[0])


@lru_cache(maxsize=32)
def _chunk_matrices(
    measure: str, size: int, step: float, alpha: float | None, chunk: int, options: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """(A_bar^(j + 1) (C, P, P), A_bar^(j - i) B_bar (C, C, P) for i <= j, else 0)."""
    method = ("zoh",) if alpha is None else ("generalized", alpha)
    A, B = discretize(*hippo_matrices(measure, size, **dict(options)), step, *method)
    powers, responses = [A], [B]
    for _ in range(1, chunk):
        powers.append(A @ powers[-1])
        responses.append(A @ responses[-1])
    i = np.arange(chunk)
    lag = i[:, None] - i[None]
    toeplitz = np.where((lag >= 0)[..., None], np.stack(responses)[np.maximum(lag, 0)], 0)
    return np.stack(powers), toeplitz


def _invariant(run: _Run, way: _Way) -> tuple[jax.Array | None, jax.Array]:
    """Several steps at a time: within a chunk the states are a matrix times its inputs plus a power of A_bar times its first state."""
    length = run.u.shape[0]
    chunk = max(1, min(length, 64, 2**19 // way.size**2))
    matrices = _chunk_matrices(way.measure, way.size, way.step, way.alpha, chunk, way.options)
    powers, responses = (m.astype(run.x.dtype) for m in matrices)
    einsum = partial(jnp.einsum, precision="highest")

    def body(x, u):
        count = u.shape[0]
        if way.final_only:
            response = responses[count - 1, :count]
            return einsum("pq,rq->rp", powers[count - 1], x) + einsum("ip,ir->rp", response, u), None
        states = einsum("jpq,rq->jrp", powers[:count], x) + einsum("jip,ir->jrp", responses[:count, :count], u)
        return states[-1], states

    whole = length // chunk * chunk
    x, states = lax.scan(body, run.x, run.u[:whole].reshape(-1, chunk, run.u.shape[1]))
    parts = [] if way.final_only else [states.reshape(whole, *run.x.shape)]
    if whole < length:
        x, states = body(x, run.u[whole:])
        parts.append(states)
    return (None if way.final_only else jnp.concatenate(parts)), x


def _invariant_irregular(run: _Run, way: _Way) -> tuple[jax.Array | None, jax.Array]:
    A, B = (jnp.asarray(m.astype(run.x.dtype)) for m in hippo_matrices(way.measure, way.size, **dict(way.options)))

    def step(x, inputs):
        width, u = inputs
        A_bar, B_bar = dense(jnp, A, B, width, way.alpha)
        x = jnp.einsum("pq,rq->rp", A_bar, x, precision="highest") + u[:, None] * B_bar[None]
        return x, None if way.final_only else x

    x, states = lax.scan(step, run.x, (run.cut.width, run.u))
    return states, x


@partial(jax.jit, static_argnames=("way",))
def _project(run: _Run, way: _Way) -> tuple[jax.Array | None, jax.Array]:
    """(states (T, R, P), None if only the last is asked for; the last state (R, P))."""
    x, start, u = tie((run.x, run.start, run.u))
    run = run._replace(x=x, start=start, u=u)
    if 0 in u.shape:
        return None if way.final_only else jnp.zeros_like(x, shape=(u.shape[0], *x.shape)), x
    found, options = find(way.measure, way.size, dict(way.options))
    if not found.is_scaled(**options):
        return (_invariant if way.is_regular else _invariant_irregular)(run, way)
    if way.measure in ("cosine_scaled", "fourier_scaled"):
        return _diagonal_scaled(run, way)
    change = change_of(found, way.size, options)
    if change is None:
        return _legs(run, way)

    def times(x, matrix):
        return None if x is None else jnp.matmul(x, matrix.T.astype(x.dtype), precision="highest")

    states, last = _legs(run._replace(x=times(x, np.linalg.inv(change))), way)
    return times(states, change), times(last, change)


def _edges(timestamps: Any, length: int) -> Any:
    """The T + 1 edges, float64 NumPy or as they are traced."""
    rule = f"timestamps must be the T + 1 edges of the samples, real numbers of shape {(length + 1,)}"
    is_traced = isinstance(timestamps, jax.core.Tracer)
    try:
        edges = timestamps if is_traced else np.asarray(timestamps)
        edges = edges if is_traced or np.iscomplexobj(edges) else edges.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}; got {timestamps!r}"[:400]) from error
    if np.iscomplexobj(edges) or edges.shape != (length + 1,):
        raise ValueError(f"{rule}; got {edges.dtype} {edges.shape}")
    if not is_traced and not (np.all(np.isfinite(edges)) and np.all(np.diff(edges) >= 0)):
        raise ValueError(f"timestamps must be finite and not decrease; got {edges}"[:400])
    return edges


def _width(step: Any, length: int) -> float:
    """The width of a sample, known before any trace: the matrices of a step are made from it."""
    if step is None:
        return 1 / max(length, 1)
    if not 0 < number(step) < inf:
        rule = "step must be one positive number that is not traced (traced times are timestamps)"
        raise ValueError(f"{rule}; got {step!r}"[:400])
    return number(step)


def _alphas(measure: str, method: str, alpha: Any, rule_alpha: Any) -> tuple[dict[str, Any], Any]:
    """(the measure's own alpha as an option, where it has one and it is given; the weight of the new state)."""
    choose("measure", measure, MEASURES)
    if "alpha" not in MEASURES[measure].defaults:
        if alpha is not None and rule_alpha is not None:
            what = f"must not come with rule_alpha, which it stands for where measure={measure!r}"
            raise ValueError(f"alpha {what}; got alpha={alpha!r}, rule_alpha={rule_alpha!r}")
        rule_alpha, alpha = (alpha if rule_alpha is None else rule_alpha), None
    elif method == "generalized" and alpha is not None and rule_alpha is None:
        what = f"is the option of measure={measure!r}; with method='generalized' say the weight too, as rule_alpha"
        raise ValueError(f"alpha {what}; got alpha={alpha!r} alone")
    return {} if alpha is None else {"alpha": alpha}, 0.5 if rule_alpha is None else rule_alpha


def _clock(timestamps: Any, length: int, state: HippoState | None, dtype: Any) -> tuple[jax.Array, Any, jax.Array]:
    """(start, edges counted from it or None for samples of width 1, time afterwards)."""
    if timestamps is None:
        time = jnp.zeros((), jnp.int32) if state is None else jnp.asarray(state.time)
        return time.astype(dtype), None, time + length
    edges = _edges(timestamps, length)
    start = jnp.zeros((), dtype) if state is None else jnp.asarray(state.time).astype(dtype)
    edges = edges - edges[:1]
    return start, edges, start + jnp.asarray(edges[-1].astype(dtype))


def _check_signal(signal: Any, state: Any, size: int, is_complex: bool) -> tuple[jax.Array, jax.Array]:
    """(u (T, R), coefficients before it (R, P)) in the dtype of states."""
    signal = jnp.asarray(signal)
    if signal.ndim < 1 or not jnp.issubdtype(signal.dtype, jnp.floating):
        raise ValueError(f"signal must be real floating of shape (T, *rest); got {signal.dtype} {signal.shape}")
    rest = signal.shape[1:]
    dtype = accumulator(signal)
    kind = jnp.result_type(dtype, jnp.complex64) if is_complex else dtype
    u = signal.reshape(signal.shape[0], prod(rest)).astype(dtype)
    if state is None:
        zero = jnp.zeros_like(u.sum(0), kind)  # sharded as the signal is
        return u, jnp.broadcast_to(zero[:, None], (u.shape[1], size))
    if not isinstance(state, HippoState) or jnp.shape(state.coefficients) != (*rest, size):
        shape = jnp.shape(getattr(state, "coefficients", state))
        raise ValueError(
            f"initial_state must be a HippoState with coefficients (*rest, P) = {(*rest, size)}; got {type(state).__name__} with {shape}"
        )
    return u, jnp.asarray(state.coefficients, kind).reshape(u.shape[1], size)


def hippo_project(
    signal: ArrayLike,
    measure: str,
    size: int,
    *,
    method: str = "bilinear",
    alpha: float | None = None,
    rule_alpha: float | None = None,
    step: float | None = None,
    timestamps: ArrayLike | None = None,
    initial_state: HippoState | None = None,
    return_state: bool = False,
    final_only: bool = False,
    **options: Any,
) -> Any:
    """Projects the history of a signal onto a HiPPO basis, at every sample.

    Args:
      signal: (T, *rest), real; each sample is held until the next.
      measure, size, options: as for :func:`hippo_matrices`.
      method: "forward", "backward", "bilinear", "generalized" (with rule_alpha), or "exact" = "zoh": no approximation of the held signal.
        The scaled measures (legs, cosine_scaled, fourier_scaled, chebyshev with window=None) start from u_1 e_0, then take A / t and B / t on both sides with t = 1 for the
        second sample, or width / time of its first edge.
      alpha: the option of "glagt", which has one of that name; for every other measure it stands for `rule_alpha`.
      rule_alpha: the weight of the new state in "generalized", in [0, 1]; None is 1/2. :func:`discretize` calls it alpha.
      step: width of a sample in the unit of the window, a positive number; None is 1 / T. The scaled measures do not depend on it.
      timestamps: (T + 1,) finite ascending edges, traced ones unchecked, in the same unit; sample i is held on [t_i, t_(i+1)). Not with `step`. Scaled measures count from the first edge.
      initial_state: the `HippoState` to go on from; timestamps go on from their own first edge.
      return_state: also return the last `HippoState`.
      final_only: return the last coefficients only, (*rest, P), in memory independent of T P; "exact" LegS then needs no recurrence.

    Returns:
      coefficients (T, *rest, P), or (*rest, P), float32 at least (complex for fourier_scaled); with `return_state` the pair (coefficients, state).

    Raises:
      ValueError: for an unknown name, shapes that do not fit, a step that is not positive or comes with timestamps, alpha without rule_alpha where both are needed.

    Cost a step: LegS O(P) (exact: O(P^2), of the final state alone O(P)), cosine and Fourier scaled O(P) and a product with V, sliding O(P^2), O(P^3) with irregular timestamps.
    Source: Gu et al., arXiv:2008.07669; Su, kexue.fm/archives/10137; the exact form is the Legendre projection of the held signal itself.

    >>> import jax.numpy as jnp
    >>> x = hippo_project(jnp.array([1.0, 3.0]), "legs", 2, method="exact")
    >>> print(x.round(4))                                    # means 1 and 2, slopes 0 and sqrt 3 / 2
    [[1.    0.   ]
     [2.    0.866]]
    """
    own, weight = _alphas(measure, method, alpha, rule_alpha)
    found, options = find(measure, size, {**options, **own})
    is_scaled = found.is_scaled(**options)
    choose("method", method, (*METHODS, "exact"))
    name = "alpha" if rule_alpha is None else "rule_alpha"
    weight = alpha_of("zoh" if method == "exact" else method, weight, name)
    if step is not None and timestamps is not None:
        raise ValueError(f"step has no meaning with timestamps, which say every width; got step={step!r}")
    u, x = _check_signal(signal, initial_state, size, measure == "fourier_scaled")
    rest, length = jnp.shape(signal)[1:], u.shape[0]
    start, edges, time = _clock(timestamps, length, initial_state, u.dtype)
    width = _width(step, length)
    width = None if is_scaled or edges is not None else width
    way = _Way(measure, size, tuple(options.items()), weight, width, edges is None, final_only)
    needs_cells = edges is not None or (is_scaled and weight is None and not final_only)
    cut = None
    if needs_cells and length:
        cut = _legs_exact.grid(np.arange(length + 1.0) if edges is None else edges, size, u.dtype)
    states, last = _project(_Run(x, start, cut, u), way)
    out = last.reshape(*rest, size) if final_only else states.reshape(length, *rest, size)
    return (out, HippoState(last.reshape(*rest, size), time)) if return_state else out
