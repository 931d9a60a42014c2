"""LegS by the generalized bilinear rule, O(P) a step without a solve: z = (I - a l A)^-1 (x + (1 - a) l A x + l B u), l = width / time.

    (A x)_n = -(n + 1) x_n - r_n sum_(k < n) r_k x_k        z_n = (v_n - a l r_n sum_(k < n) r_k z_k) / (1 + a l (n + 1))        r_n = sqrt(2n + 1)

Both sums run over degrees, the recurrence over time. Degree n of time t is taken up in wave t + n: all degrees of a wave are then independent, and a wave is a few operations on
vectors of P. Source of the sums: Gu et al., arXiv:2008.07669, appendix E; Su, kexue.fm/archives/10137.
"""

import jax
import jax.numpy as jnp
from jax import lax

__all__: list[str] = []


def waves(
    x: jax.Array, ratio: jax.Array, is_first: jax.Array, u: jax.Array, alpha: float, final_only: bool
) -> tuple[jax.Array | None, jax.Array]:
    """(states (T, R, P) or None, the last state (R, P)) from the state x; ratio = width / time and is_first (T,), u (T, R).

    The very first sample has no time behind it: its state is u e_0.
    """
    size, length = x.shape[-1], u.shape[0]
    n = jnp.arange(size, dtype=x.dtype)
    r = jnp.sqrt(2 * n + 1)
    constant = (jnp.arange(size) == 0).astype(x.dtype)[None]

    def shift(register, value):
        return jnp.concatenate([value[..., None], register[..., :-1]], axis=-1)

    def wave(carry, inputs):
        x, before, after, ratios, firsts, samples, valid = carry
        ratio, is_first, u, is_valid = inputs
        ratios, firsts, valid = shift(ratios, ratio), shift(firsts, is_first), shift(valid, is_valid)
        samples = shift(samples, u)
        sum_z = shift(after, jnp.zeros_like(u))
        v = x - (1 - alpha) * ratios[None] * ((n + 1)[None] * x + r[None] * before) + (ratios * r)[None] * samples
        z = (v - alpha * (ratios * r)[None] * sum_z) / (1 + alpha * ratios * (n + 1))[None]
        z = jnp.where(firsts[None], constant * samples, z)
        x, before = jnp.where(valid[None], z, x), jnp.where(valid[None], sum_z, before)
        return (x, before, sum_z + r[None] * x, ratios, firsts, samples, valid), None if final_only else x

    before = jnp.cumsum(r[None] * x, axis=-1) - r[None] * x
    none = jnp.zeros_like(x.sum(0))  # not x[0], of an axis that may be sharded
    start = (x, before, jnp.zeros_like(x), none, none > 0, jnp.zeros_like(x), none > 0)

    def late(a):
        return jnp.pad(a, [(0, size - 1)] + [(0, 0)] * (a.ndim - 1))

    is_valid = late(jnp.ones_like(is_first))
    (x, *_), skewed = lax.scan(wave, start, (late(ratio), late(is_first), late(u), is_valid))
    if final_only:
        return None, x
    # Row n of (P, T + P - 1) begins n places late: rows one longer, laid out anew, begin together.
    rows = jnp.moveaxis(skewed, -1, 0).swapaxes(1, 2)  # (P, R, W)
    flat = jnp.moveaxis(rows, 1, 0).reshape(rows.shape[1], -1)
    flat = jnp.pad(flat, ((0, 0), (0, size))).reshape(rows.shape[1], size, -1)[:, :, :length]
    return jnp.moveaxis(flat, (0, 1, 2), (1, 2, 0)), x
