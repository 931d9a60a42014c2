"""Embeddings of absolute positions beyond a learned table: the table stretched, positions by an equation, by factors, by phases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import floating, positive
from effattn_jax.position.angles import given_positions, signed

__all__ = ["complex_order_embedding", "floater_embedding", "hierarchical_embedding", "multiplicative_embedding"]


def hierarchical_embedding(table: Any, positions: Any, *, alpha: float = 0.4) -> jax.Array:
    """A learned table of n positions stretched to n^2, its first n rows unchanged.

    q_t = alpha u_(t div n) + (1 - alpha) u_(t mod n),   u_j = (p_j - alpha p_0) / (1 - alpha)

    Args:
      table: p, (n, D), as trained.
      positions: integers in [0, n^2), any shape; NaN beyond, a ValueError where the numbers are known.
      alpha: weight of the coarse digit, between 0 and 1, not 1/2, where t div n and t mod n could be exchanged; below 1/2 near positions differ most.

    Returns:
      (*positions.shape, D) in the table's dtype, computed in float32 at least.

    Raises:
      ValueError: alpha outside (0, 1) or 1/2, positions that are no integers or out of range, a table of another rank.

    Cost O(D) a position. Source: kexue.fm/archives/7947.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(np.asarray(hierarchical_embedding(3 * jnp.eye(2), jnp.array([1, 2]))).round(2) + 0)
    [[0. 3.]
     [1. 2.]]
    """
    (table,) = floating(table=table)
    positions = signed(positions)
    if table.ndim != 2 or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"table must be (n, D) and positions integers; got {table.shape} and {positions.dtype}")
    if not 0 < alpha < 1 or alpha == 0.5:
        raise ValueError(f"alpha must lie between 0 and 1 and not be 1/2, where both digits count alike; got {alpha}")
    size = table.shape[0]
    if not isinstance(positions, jax.core.Tracer) and positions.size:
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= size * size:
            raise ValueError(f"positions must lie in [0, n^2) = [0, {size * size}); got from {least} to {most}")
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    digits = (wide - alpha * wide[:1]) / (1 - alpha)
    coarse = digits.at[jnp.where(positions < 0, size, positions // size)].get(mode="fill", fill_value=jnp.nan)
    fine = jnp.take(digits, positions % size, axis=0)
    return (alpha * coarse + (1 - alpha) * fine).astype(table.dtype)


def floater_embedding(
    start: Any,
    dynamics: Callable[[jax.Array, jax.Array], jax.Array],
    length: int,
    *,
    step: float = 0.1,
    substeps: int = 1,
) -> jax.Array:
    """Positions by an equation of motion, p_k = p_0 + int_0^(k step) h(t, p_t) dt: a position follows from the one before.

    Integrated by the classical Runge-Kutta method, differentiable by everything that `dynamics` closes over.

    Args:
      start: p_0, (D,).
      dynamics: h(t, p (D,)) -> (D,).
      length: how many positions, 0 .. length - 1.
      step: time between positions.
      substeps: Runge-Kutta steps between positions.

    Returns:
      (length, D), like start; gather rows for other positions.

    Raises:
      ValueError: start that is no vector, sizes that are not positive.

    Cost: 4 substeps calls of dynamics a position, one after the other. Source: Liu et al., arXiv:2003.09229.

    >>> import jax.numpy as jnp, numpy as np
    >>> print(np.asarray(floater_embedding(jnp.ones(1), lambda t, p: -p, 2, step=1.0, substeps=8))[:, 0].round(3))
    [1.    0.368]
    """
    (start,) = floating(start=start)
    positive(length=length, substeps=substeps)
    if start.ndim != 1 or not step > 0:
        raise ValueError(f"start must be a vector (D,) and step positive; got {start.shape} and {step}")
    width = jnp.asarray(step / substeps, start.dtype)

    def forward(p, n):
        t = n.astype(p.dtype) * width
        first = dynamics(t, p)
        second = dynamics(t + width / 2, p + width / 2 * first)
        third = dynamics(t + width / 2, p + width / 2 * second)
        fourth = dynamics(t + width, p + width * third)
        return p + width / 6 * (first + 2 * second + 2 * third + fourth), None

    def position(p, k):
        return jax.lax.scan(forward, p, k * substeps + jnp.arange(substeps))[0], p

    return jax.lax.scan(position, start, jnp.arange(length))[1]


def multiplicative_embedding(x: jax.Array, embedding: jax.Array) -> jax.Array:
    """Positions as factors, x (1 + p), where others add them.

    Args:
      x: (*B, T, D).
      embedding: p, broadcastable to x with the same number of axes; 0 leaves x as it is.

    Returns:
      like x.

    Raises:
      ValueError: arrays that are not floating, an embedding that does not broadcast to x.

    Source: the survey kexue.fm/archives/8130.

    >>> import jax.numpy as jnp
    >>> multiplicative_embedding(jnp.ones((1, 2)), jnp.array([[0.0, 0.5]])).tolist()
    [[1.0, 1.5]]
    """
    x, embedding = floating(x=x, embedding=embedding)
    if x.ndim != embedding.ndim or not all(a in (1, b) for a, b in zip(embedding.shape, x.shape, strict=True)):
        raise ValueError(f"embedding must broadcast to x, {x.shape}, with as many axes; got {embedding.shape}")
    return x * (1 + embedding).astype(x.dtype)


def complex_order_embedding(amplitude: Any, frequency: Any, phase: Any, positions: Any) -> jax.Array:
    """Words as waves over positions: entry d of a word at position t is r_d exp(i (w_d t + theta_d)), three vectors a word.

    Args:
      amplitude, frequency, phase: r, w, theta, (*B, T, D): what the tokens of a row look up in three tables.
      positions: (*B, T), or any shape that broadcasts to it such as (T,).

    Returns:
      (*B, T, D), complex; the model that reads it is complex too.

    Raises:
      ValueError: tables that are not alike or no (*B, T, D), positions that do not broadcast to (*B, T).

    Cost O(D) a token. Source: Wang et al., arXiv:1912.12333.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((2, 1))
    >>> complex_order_embedding(one, jnp.pi * one, 0 * one, jnp.arange(2)).real.round(3).tolist()
    [[1.0], [-1.0]]
    """
    amplitude, frequency, phase = floating(amplitude=amplitude, frequency=frequency, phase=phase)
    shapes = amplitude.shape, frequency.shape, phase.shape
    if amplitude.ndim < 2 or len(set(shapes)) > 1:
        raise ValueError(f"amplitude, frequency and phase must all be (*B, T, D), of one shape; got {shapes}")
    places = given_positions(positions, frequency.shape[:-1]).astype(jnp.promote_types(frequency.dtype, jnp.float32))
    angle = places[..., None] * frequency + phase
    return amplitude * jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
