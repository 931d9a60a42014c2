"""The diagonal recurrence where the laws do not look: decays of exactly 0 beside a state, NaN beside cotangents and tangents of 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention, mixing, ssm
from effattn_jax.recurrence import diagonal_recurrence, outer_product_recurrence


@pytest.mark.parametrize("implementation", ["scan", "associative", "chunked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_slope_by_a_decay_of_zero_counts_the_state_before_it(implementation, reverse):
    """h = (0 * 5 + 1, 0.5 h_0 + 1): the slopes of the sum by the two decays are (1 + 0.5) 5 and h_0."""
    decay = jnp.array([[0.5, 0.0] if reverse else [0.0, 0.5]])
    options = {"initial_state": jnp.array([5.0]), "implementation": implementation, "reverse": reverse}
    slope = jax.grad(lambda a: diagonal_recurrence(a, jnp.ones((1, 2)), **options).sum())(decay)
    np.testing.assert_allclose(slope, [[1.0, 7.5] if reverse else [7.5, 1.0]])


def test_tangents_of_a_document_behind_one_with_nan():
    ids, decay = jnp.array([[1, 1, 2, 2]]), jnp.full((1, 4), 0.5)
    x = jnp.array([[1.0, jnp.nan, 3.0, 4.0]])
    tangent = jax.jvp(lambda a, x: diagonal_recurrence(a, x, segment_ids=ids), (decay, x), (decay, decay))[1]
    np.testing.assert_allclose(tangent[:, 2:], [[0.5, 0.5 * 3 + 0.5 * 0.5 + 0.5]])

    def loss(a, x):
        return (jnp.where(ids == 2, diagonal_recurrence(a, x, segment_ids=ids), 0) ** 2).sum()

    assert np.all(np.isfinite(jax.jvp(jax.grad(loss), (decay, x), (decay, decay))[1]))


ONES, STEP, ROWS = jnp.ones((1, 4, 1, 1)), jnp.ones((1, 4, 1)), jnp.arange(1.0, 5)[None, :, None, None]
KERNEL, MEMORY = jnp.ones((4, 2, 3)), jnp.array([[[1.0, 2.0]], [[3.0, 1.0]]])
PASTS = {
    **{
        f"outer product, {form}": (lambda x, nan, f=form: outer_product_recurrence(nan, x, x, implementation=f), ROWS)
        for form in ("scan", "chunked", "parallel")
    },
    "selective scan": (lambda x, nan: ssm.selective_scan(x, STEP, -jnp.ones((1, 1)), STEP, nan[..., 0]), ROWS[..., 0]),
    "mamba 3": (lambda x, nan: ssm.mamba3_trapezoid(x, nan[..., 0], -jnp.ones(1), ONES, ONES, STEP / 2), ROWS),
    "diagonal": (lambda x, nan: diagonal_recurrence(nan / 2, x), ROWS),
    "external": (lambda x, nan: attention.external_attention(x * nan, MEMORY, MEMORY, is_causal=True), jnp.tile(ROWS, 2)),
    "dynamic convolution": (lambda x, nan: mixing.dynamic_convolution(x * nan[..., 0], KERNEL, is_causal=True), jnp.tile(ROWS[..., 0], 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", PASTS)
def test_a_future_of_nan_leaves_the_gradients_of_the_past_alone(name):
    """The loss reads the first three of four steps; what stands at the fourth does not matter to it."""
    function, x = PASTS[name]

    def slope(last):
        nan = ONES.at[:, 3].set(last)
        return jax.grad(lambda x: (function(x, nan)[:, :3] * ROWS[:, :3, 0, 0].reshape(1, 3, *[1] * (x.ndim - 2))).sum())(x)[:, :3]  # fmt: skip

    np.testing.assert_allclose(slope(jnp.nan), slope(1.0), rtol=1e-6)
