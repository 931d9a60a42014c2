"""Rotary and sinusoidal positions against float64, and the law that scores depend on distances only."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.position import rotary, sinusoidal_embedding, xpos, xpos_decay
from effattn_jax.position.angles import angles, inverse_frequencies

turn = jax.jit(rotary, static_argnames=("interleaved", "dim"))
OFFSETS = (0, 1_000, 1_000_000)


def oracle(x, positions, *, base=10000.0, interleaved=False, scaling=1.0):
    """Rotation as complex multiplication in float64."""
    dim = x.shape[-1]
    angle = np.asarray(positions, np.float64)[..., None] * scaling * base ** (-np.arange(0, dim, 2) / dim)
    x = np.asarray(x, np.float64)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, axis=-1)
    turned = (a + 1j * b) * np.exp(1j * angle)[..., None, :]
    if interleaved:
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    return np.concatenate([turned.real, turned.imag], -1)


@pytest.fixture
def qk():
    return np.random.default_rng(0).normal(size=(2, 2, 6, 3, 16)).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", (*OFFSETS, -1_000_000))
def test_rotary_is_the_float64_rotation_at_any_position(qk, offset, interleaved):
    positions = offset + np.array([0, 1, 2, 3, 5, 8])
    turned = turn(qk[0], positions, interleaved=interleaved)
    np.testing.assert_allclose(turned, oracle(qk[0], positions, interleaved=interleaved), atol=2e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", OFFSETS)
def test_rotary_scores_depend_on_distances_only(qk, offset, interleaved):
    def scores(start):
        query, key = (turn(x, start + np.arange(6), interleaved=interleaved) for x in qk)
        return np.einsum("btnh,bsnh->bnts", query, key)

    np.testing.assert_allclose(scores(offset), scores(0), atol=1e-5)


def test_rotary_layouts_are_a_permutation_of_features(qk):
    order = np.arange(16).reshape(8, 2).T.reshape(-1)
    paired = np.asarray(turn(qk[0], np.arange(6), interleaved=True))
    np.testing.assert_allclose(paired[..., order], turn(qk[0][..., order], np.arange(6)), atol=1e-6)


def test_rotary_positions_broadcast_and_may_be_floats(qk):
    rows = np.stack([np.arange(6), np.arange(6) + 3])
    alone = np.concatenate([turn(qk[0][i : i + 1], rows[i]) for i in range(2)])
    np.testing.assert_array_equal(turn(qk[0], rows), alone)
    np.testing.assert_allclose(turn(qk[0], np.arange(6) * 0.5), oracle(qk[0], np.arange(6) * 0.5), atol=2e-6)


def test_rotary_scaling_and_partial_dimensions(qk):
    def scaled(factors):
        return jax.jit(lambda x: rotary(x, np.arange(6), scaling=factors))(qk[0])

    np.testing.assert_allclose(scaled(0.125), oracle(qk[0], np.arange(6), scaling=0.125), atol=2e-6)
    factors = np.linspace(0.1, 1, 8)
    expected = oracle(qk[0], np.arange(6), scaling=factors)
    np.testing.assert_allclose(scaled(jnp.asarray(factors)), expected, atol=2e-6)
    partial = np.asarray(turn(qk[0], np.arange(6), dim=4))
    np.testing.assert_array_equal(partial[..., 4:], qk[0][..., 4:])
    np.testing.assert_allclose(partial[..., :4], oracle(qk[0][..., :4], np.arange(6)), atol=2e-6)


def test_rotary_keeps_the_type_and_computes_in_float32(qk):
    x = qk[0].astype(jnp.bfloat16)
    turned = turn(x, 100_000 + np.arange(6))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(turned, np.float32), oracle(x, 100_000 + np.arange(6)), atol=0.02)


@pytest.mark.usefixtures("x64")
def test_rotary_in_float64(qk):
    x, positions = qk[0].astype(np.float64), np.arange(6) + 1_000_000
    np.testing.assert_allclose(turn(x, positions), oracle(x, positions), atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_xpos_in_float64(qk):
    q, k = np.asarray(qk, np.float64)
    decay = np.tile((np.arange(0, 16, 2) / 16 + 0.4) / 1.4, 2) ** (
        (np.arange(6)[:, None] - np.arange(6))[..., None] / 512
    )
    expected = np.einsum("btnh,bsnh,tsh->bnts", *(oracle(x, np.arange(6)) for x in (q, k)), decay)
    at = 1_000 + np.arange(6)
    turned = map(np.asarray, jax.jit(xpos)(q, k, at, at))
    np.testing.assert_allclose(np.einsum("btnh,bsnh->bnts", *turned), expected, atol=1e-11)


def test_angles_are_right_to_float32_up_to_the_last_position():
    """Against 50 digits."""
    places, w = [10**8 + 7, 2**31 - 1, 1 - 2**31], inverse_frequencies(64, 10000.0)
    found = np.asarray(jax.jit(lambda places: angles(places, w))(np.array(places)))
    with localcontext() as digits:
        digits.prec = 50
        turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
        apart = [[(t * Decimal(f) - Decimal(float(a))) / turn for f, a in zip(w, row)] for t, row in zip(places, found)]
        worst = max(abs(x - x.to_integral_value()) for row in apart for x in row) * turn
    assert worst < 6e-7


def test_rotary_frequencies_may_be_a_list(qk):
    w = inverse_frequencies(16, 10000.0)
    at = 1_000_000 + np.arange(6)
    both = jax.jit(lambda x: [rotary(x, at, frequencies=frequencies) for frequencies in (w.tolist(), w)])
    np.testing.assert_array_equal(*both(qk[0]))


def test_rotary_gradient_is_the_turn_back(qk):
    x, cotangent = qk
    positions = np.arange(6) * 1000
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(rotary(x, positions) * cotangent)))(x)
    np.testing.assert_allclose(gradient, turn(cotangent, -positions), atol=2e-6)


def test_xpos_errors():
    for options in ({"gamma": "a"}, {"scale_base": 0}, {"dim": 3}):
        with pytest.raises(ValueError, match="gamma and scale_base positive numbers"):
            xpos_decay(**{"dim": 4, **options})


def test_rotary_errors():
    x = np.ones((1, 4, 2, 6), np.float32)
    with pytest.raises(ValueError, match="dim must be even"):
        rotary(x, np.arange(4), dim=3)
    with pytest.raises(ValueError, match="dim must be at most the head dimension 6; got 8"):
        rotary(x, np.arange(4), dim=8)
    with pytest.raises(ValueError, match=r"positions must broadcast to .* = \(1, 4\); got \(5,\)"):
        rotary(x, np.arange(5))
    with pytest.raises(ValueError, match="base must be positive"):
        rotary(x, np.arange(4), base=0.0)
    with pytest.raises(ValueError, match=r"\(\*B, T, N, H\)"):
        rotary(np.ones((4, 6), np.float32), np.arange(4))
    refused = {
        r"scaling must be a number or of shape \(dim/2,\) = \(3,\); got \(2,\)": {"scaling": np.ones(2)},
        "scaling must be None where frequencies": {"scaling": 0.5, "frequencies": np.ones(3)},
        "dim must be even and at least 2": {"dim": 5, "frequencies": np.ones(2)},
        r"frequencies must have shape \(dim/2,\) = \(3,\); got \(2,\)": {"frequencies": [1.0, 0.1]},
        "frequencies must be real numbers; got complex": {"frequencies": np.ones(3, complex)},
        "x must be a floating array; got int32": {"x": np.ones((1, 4, 2, 6), np.int32)},
        "positions must be integers or real floats; got complex64": {"positions": np.ones(4, np.complex64)},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            rotary(**{"x": x, "positions": np.arange(4), **options})


@pytest.mark.parametrize("offset", OFFSETS)
def test_sinusoidal_embedding_is_the_formula(offset):
    positions = offset + np.arange(12).reshape(3, 4)
    angle = positions[..., None].astype(np.float64) * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    expected = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(3, 4, 8)
    embedding = np.asarray(jax.jit(sinusoidal_embedding, static_argnums=1)(positions, 8))
    np.testing.assert_allclose(embedding, expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(embedding**2, -1), 4.0, rtol=1e-5)


def test_sinusoidal_embedding_errors():
    with pytest.raises(ValueError, match="dim must be even and at least 2"):
        sinusoidal_embedding(jnp.arange(3), 7)
