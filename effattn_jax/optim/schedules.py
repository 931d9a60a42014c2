"""Schedules: factors between given steps, and the decays that follow from Amos' argument."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax


def piecewise_linear_schedule(points: Mapping[int, float], *, from_zero: bool = True) -> optax.Schedule:
    r"""Linear from point to point, constant after the last: absolute values, not factors upon factors.

    Warm-up over 1000 steps and decay until 20000 are {1000: 1.0, 20000: 0.0}.

    Args:
      points: {step: value}, in any order; a step may be a string of digits, as JSON has it.
      from_zero: where the first step is not 0, whether the value starts from 0 at step 0; else it is constant before.

    Returns:
      A function of the step (number of updates done, from 0) -> value, float32.

    Raises:
      ValueError: no points, or a step that is negative, no whole number, beyond int32 or given twice.

    Source: Su, "Six derived optimizers" (kexue.fm 7094).

    Example:
      >>> schedule = piecewise_linear_schedule({10: 1.0, 30: 0.2})
      >>> print([round(float(schedule(t)), 3) for t in (0, 5, 10, 20, 30, 99)])
      [0.0, 0.5, 1.0, 0.6, 0.2, 0.2]
    """
    given = sorted((int(step), float(value)) for step, value in points.items())
    whole = all(step == int(step) for step in points if not isinstance(step, str))
    if not given or not whole or not 0 <= given[0][0] <= given[-1][0] < 2**31 or len(dict(given)) < len(given):
        raise ValueError(
            f"points must be a non-empty {{step: value}} with different whole steps from 0 to 2^31 - 1, got {points}."
        )
    if from_zero and given[0][0] != 0:
        given = [(0, 0.0), *given]
    steps, values = np.array([s for s, _ in given], np.int32), np.array([v for _, v in given])

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step)
        right = jnp.searchsorted(jnp.asarray(steps), step, side="right")
        a, b = jnp.maximum(right - 1, 0), jnp.minimum(right, len(steps) - 1)
        first, last = jnp.asarray(steps)[a], jnp.asarray(steps)[b]
        level = jnp.asarray(values, jnp.result_type(float))
        # Steps are subtracted as integers: above 2^24 float32 does not hold them.
        done, length = ((x - first).astype(level.dtype) for x in (step, last))
        return level[a] + (level[b] - level[a]) * jnp.where(last > first, done / jnp.where(last > first, length, 1), 0)

    return schedule


def amos_schedules(alpha0: float, p: float, law: str = "constant") -> Callable[[jax.Array], jax.Array]:
    r"""The decay over time that suits a relative step alpha0 and a cosine p between update and error.

    theta_{t+1} = theta_t - alpha_t u_t - rho_t theta_t,    alpha_t = alpha0 |e_0| / |u_t| decay(t),    rho_t = alpha0^2 / (2 q) decay(t)

    with |e_0| the expected distance to go (sqrt(entries) times the scale of a kernel's initialisation, 0.5 for biases and norms), q
    about 1. For Adam |u_t| is about sqrt(entries): learning rate alpha0 * scale * decay(t), decoupled decay rho_t.

        "constant": p stays         decay(t) = 1 / (alpha0 p t + 1)^2       half at t = (sqrt 2 - 1) / (alpha0 p)
        "decaying": p falls as |e|   decay(t) = 1 / (2 alpha0 p t + 1)       half at t = 1 / (2 alpha0 p)

    Args:
      alpha0: relative step, 1e-3 as a rule, 1e-2 for easy tasks; positive.
      p: cosine between update and error at the start, in (0, 1].
      law: "constant" or "decaying".

    Returns:
      decay(t), 1 at t = 0.

    Raises:
      ValueError: alpha0 or p out of range, or an unknown law.

    Source: Su, "Amos" (kexue.fm 9344).

    Example:
      >>> decay = amos_schedules(1e-3, 0.5, law="decaying")
      >>> print(decay(0), decay(1000))
      1.0 0.5
    """
    if not alpha0 > 0:
        raise ValueError(f"alpha0 must be positive, got {alpha0}.")
    if not 0 < p <= 1:
        raise ValueError(f"p must be a cosine in (0, 1], got {p}.")
    if law not in ("constant", "decaying"):
        raise ValueError(f"law must be 'constant' or 'decaying', got {law!r}.")

    def decay(t: jax.Array) -> jax.Array:
        t = jnp.asarray(t, jnp.result_type(float))
        return 1 / (alpha0 * p * t + 1) ** 2 if law == "constant" else 1 / (2 * alpha0 * p * t + 1)

    return decay
