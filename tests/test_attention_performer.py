"""Performer: the statistics of its features, the leak that published recipes have and this one has not, norms of any size, variants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import dot_product_attention, performer_attention, random_features
from effattn_jax.attention.random_features import KERNELS, best_temper, prepare
from effattn_jax.nn import MIXERS, kernels
from tests.laws import checks, references
from tests.random_parameters import random_parameters


@functools.partial(jax.jit, static_argnums=(3, 4))
def estimates_of(projections, q, k, kernel, damping):
    def one(w):
        weights = prepare(kernel, w, 1.0, damping, jnp.float64)
        offset, half = weights.offset, weights.half
        if kernel == "trigonometric":
            (features, level), query = KERNELS[kernel].key(k, weights), KERNELS[kernel].query(q, weights)
            return query @ features * jnp.exp(level + q @ q / 2) / w.shape[0]
        exponents = weights.projection @ (q + k) + 2 * offset - half[0] * (q @ q + k @ k)
        return jnp.mean(jnp.exp(exponents)) * (1 - 4 * damping) ** (w.shape[1] / 2)

    return jax.lax.map(one, projections, batch_size=512)


def estimates(projections, q, k, kernel="softmax", damping=0.0):
    """Estimates of exp(q.k) by each of the projections (draws, M, H), constant factors included."""
    with checks.x64():
        return np.asarray(estimates_of(projections.astype(np.float64), q, k, kernel, damping))


@functools.cache
def draws(count, num_features, head_dim, **options):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: random_features(key, num_features, head_dim, **options)))(keys))


SETTINGS = ("num_features", "head_dim", "orthogonal", "antithetic", "norms")
FEATURES = jax.jit(random_features, static_argnames=SETTINGS)


def features(seed, num_features, head_dim, **options):
    return np.asarray(FEATURES(jax.random.key(seed), num_features=num_features, head_dim=head_dim, **options))


Q, K = np.array([0.6, -0.3, 0.4, 0.2]), np.array([0.3, 0.1, 0.7, -0.2])
COUNT = 20_000


@pytest.mark.parametrize("options", [{}, {"orthogonal": False}, {"antithetic": True}], ids=str)
@pytest.mark.parametrize("kernel, damping", [("softmax", 0.0), ("softmax", -0.05), ("trigonometric", 0.0)])
def test_estimates_are_unbiased(kernel, damping, options):
    """The mean over draws is exp(q.k) within four standard errors."""
    found = estimates(draws(COUNT, 8, 4, **options), Q, K, kernel, damping)
    assert abs(found.mean() - np.exp(Q @ K)) <= 4 * found.std() / np.sqrt(COUNT)


def test_error_of_independent_and_orthogonal_features():
    """Independent: MSE = exp(|q+k|^2) SM^2 (1 - exp(-|q+k|^2)) / m. Orthogonal, m <= H: below it by at least the paper's term."""
    exact, norm = np.exp(Q @ K), np.exp((Q + K) @ (Q + K))
    independent = norm * exact**2 * (1 - 1 / norm) / 4
    gain = 2 * 3 / (4 * 6) * (exact - np.exp(-(Q @ Q + K @ K) / 2)) ** 2
    for orthogonal in (False, True):
        squares = (estimates(draws(COUNT, 4, 4, orthogonal=orthogonal), Q, K) - exact) ** 2
        bound = 4 * squares.std() / np.sqrt(COUNT)
        if orthogonal:
            assert squares.mean() <= independent - gain + bound
            assert squares.mean() < independent - bound, "orthogonal is better, beyond doubt"
        else:
            assert abs(squares.mean() - independent) <= bound


def output_error(std, num_features, estimator="plain", trials=8, **options):
    def trial(rng):
        rng_data, rng_features = jax.random.split(rng)
        q, k, v = jax.random.normal(rng_data, (3, 128, 1, 64))
        w = random_features(rng_features, num_features, 64, **options)
        out = performer_attention(std * q, std * k, v, projection=w, estimator=estimator, input_scale=std)
        exact = dot_product_attention(std * q, std * k, v)
        return jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)

    return float(np.sqrt(np.mean(jax.jit(jax.vmap(trial))(jax.random.split(jax.random.key(0), trials)))))


def test_orthogonal_output_is_better_than_independent():
    assert output_error(0.25, 64) < 0.93 * output_error(0.25, 64, orthogonal=False)


@pytest.mark.parametrize("std", [0.25, 0.5])
def test_tempered_is_twice_as_good(std):
    plain = output_error(std, 256)
    assert output_error(std, 256, "tempered", antithetic=True, norms="fixed") <= 0.5 * plain
    assert output_error(std, 256, "optimal") < plain


def test_orthogonal_rows():
    """Blocks are orthogonal, the last one cut; norms differ; another key is another draw, the same key the same."""
    w = features(0, 10, 4).astype(np.float64)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    for block in (unit[:4], unit[4:8], unit[8:]):
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)
    assert w.shape == (10, 4) and np.ptp(np.linalg.norm(w, axis=1)) > 0.1
    np.testing.assert_array_equal(w.astype(np.float32), features(0, 10, 4))
    assert np.abs(w - features(1, 10, 4)).max() > 0.1
    pairs = features(0, 7, 4, antithetic=True, norms="fixed")
    np.testing.assert_array_equal(pairs[4:], -pairs[:3])
    np.testing.assert_allclose(np.linalg.norm(pairs, axis=1), 2, rtol=1e-6)


def test_directions_are_uniform():
    """Haar: every entry of a row has mean 0 and variance 1, and the first row is no likelier to point anywhere."""
    rows = draws(20_000, 3, 3)
    np.testing.assert_allclose(rows.mean(0), 0, atol=0.04)
    np.testing.assert_allclose((rows**2).mean(0), 1, atol=0.06)


def recipe(q, k, v, w, epsilon):
    """The published causal form: one stabiliser for all keys and features, and an additive epsilon."""
    q, k = (x * x.shape[-1] ** -0.25 for x in (q, k))
    dots_q, dots_k = q @ w.T, k @ w.T
    phi_q = np.exp(dots_q - dots_q.max(-1, keepdims=True) - (q * q).sum(-1, keepdims=True) / 2) + epsilon
    phi_k = np.exp(dots_k - dots_k.max() - (k * k).sum(-1, keepdims=True) / 2) + epsilon
    weights = np.tril(phi_q @ phi_k.T)
    return weights @ v / weights.sum(-1, keepdims=True)


def test_the_published_stabiliser_leaks_and_ours_does_not():
    """The last key times 2, 3, 4 changes the published recipe's earlier outputs by up to 100 %; ours are the same bits."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    w = features(0, 256, 64)
    call = jax.jit(lambda k: performer_attention(*(x[:, None] for x in (q, k, v)), projection=w, is_causal=True))
    clean, published, leaks = np.asarray(call(k)), recipe(q, k, v, w, 1e-6), []
    for factor in (2, 3, 4, 100):
        later = np.concatenate([k[:-1], factor * k[-1:]])
        leaks.append(np.abs(recipe(q, later, v, w, 1e-6) - published)[:-1].max() / np.abs(published).max())
        checks.assert_identical(np.asarray(call(later))[:-1], clean[:-1])
    assert leaks[1] > 0.1 and max(leaks) > 0.5, leaks


@functools.cache
def of_norms(is_causal):
    """(values and gradients, values of the reference), compiled once for keys of any norm."""
    w = features(0, 32, 16)
    call = functools.partial(performer_attention, projection=w, is_causal=is_causal, chunk_size=16)
    reference = functools.partial(references.performer, projection=w.astype(np.float64), is_causal=is_causal)
    return jax.jit(functools.partial(checks.value_and_grads, lambda x: call(**x))), jax.jit(reference)


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_keys_of_any_norm(is_causal, order):
    """Norms of keys from 1e-3 to 1e3, values and gradients against float64 with the same projection; nothing overflows, nothing is lost."""
    rng = np.random.default_rng(1)
    query, key, value = rng.normal(size=(3, 1, 40, 2, 16)).astype(np.float32)
    sizes = {"random": rng.uniform(-3, 3, 40), "rising": np.linspace(-3, 3, 40), "falling": np.linspace(3, -3, 40)}[
        order
    ]
    key = (key / np.linalg.norm(key, axis=-1, keepdims=True) * 10 ** sizes[None, :, None, None]).astype(np.float32)
    inputs = {"query": query, "key": key, "value": value}
    kernel, reference = of_norms(is_causal)
    output, gradients = kernel(inputs)
    with checks.x64():
        expected = np.asarray(reference(checks.widened(inputs)))
    # The first keys of a falling row are known to half a unit in the last place of |k|^2 / 2, a twentieth: weights among them too.
    checks.assert_close(output, expected, 2e-3 if order == "falling" and is_causal else 1e-5)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_any_factor_on_all_weights_cancels():
    """A shift that multiplies every key's features by one number, from e^-300 to e^300, changes nothing."""
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 1, 20, 1, 8)).astype(np.float32)
    w = features(0, 16, 8)
    call = jax.jit(functools.partial(performer_attention, is_causal=True))
    q, k, w = (
        np.concatenate([x, np.zeros_like(x[..., :1])], axis=-1) for x in (q, k, w)
    )  # a direction nobody looks at
    base = call(q, k, v, projection=w)
    for size in (5.0, 40.0):
        moved = k.copy()
        moved[..., -1] = size  # |k|^2 / 2 grows by the same amount for all keys
        checks.assert_close(call(q, moved, v, projection=w), base, 2e-5)


def test_rows_of_a_batch_do_not_meet():
    """A row alone, or among others, other others, the same bits of randomness: the projection is the caller's."""
    q, k, v = np.random.default_rng(3).normal(size=(3, 4, 30, 2, 8)).astype(np.float32)
    jitted = jax.jit(functools.partial(performer_attention, is_causal=True))
    call = lambda *arrays, projection: np.asarray(jitted(*arrays, projection=projection))  # noqa: E731
    w = features(0, 16, 8)
    whole = call(q, k, v, projection=w)
    for rows in ([2], [2, 0, 1, 1], [2, 3, 3, 0]):
        checks.assert_close(call(q[rows], k[rows], v[rows], projection=w)[0], whole[2], 1e-6)
    other = call(q, k, v, projection=features(1, 16, 8))
    assert checks.rms(other - whole) > 1e-2


@pytest.mark.parametrize("kernel", ["relu", "trigonometric"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_other_kernels(kernel, is_causal):
    """Against their features written out in float64, gradients too, in chunks and as all pairs."""
    rng = np.random.default_rng(4)
    inputs = {name: 0.5 * rng.normal(size=(2, 13, 2, 4)).astype(np.float32) for name in ("query", "key", "value")}
    w = features(0, 32, 4)
    wide = w.T.astype(np.float64)

    def reference(x):
        y = [x[name] * (1.0 if kernel == "relu" else 4**-0.25) for name in ("query", "key")]
        if kernel == "relu":
            q, k = (jnp.maximum(a @ wide, 0) + 1e-3 for a in y)
        else:
            q, k = (
                jnp.concatenate([jnp.cos(a @ wide), jnp.sin(a @ wide)], -1)
                * jnp.exp(jnp.sum(a * a, -1, keepdims=True) / 2)
                for a in y
            )
        weights = jnp.einsum("btnm,bsnm->bnts", q, k)
        weights = jnp.tril(weights) if is_causal else weights
        return jnp.einsum("bnts,bsnv->btnv", weights / weights.sum(-1, keepdims=True), x["value"])

    expected = checks.oracle(reference, inputs)
    for form in ({"chunk_size": 5}, {"implementation": "dense"}):
        call = functools.partial(performer_attention, projection=w, kernel=kernel, is_causal=is_causal, **form)
        actual = checks.value_and_grads(lambda x, call=call: call(**x), inputs)
        checks.assert_close(actual[0], expected[0], 5e-6)
        checks.assert_close(actual[1], expected[1], 3e-5, "gradient")


def test_temper_follows_norms_and_features():
    """Small norms leave the scores alone, large ones shrink them; more features shrink less."""
    assert best_temper(0.01, 64, 256) > 0.95
    assert best_temper(16, 64, 256) < best_temper(4, 64, 256) < best_temper(4, 64, 4096) < best_temper(1, 64, 256)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"projection": np.zeros((4, 5), np.float32)}, ["projection", "(4, 5)"]),
        ({"projection": np.zeros((0, 8), np.float32)}, ["projection", "(0, 8)"]),
        ({"projection": np.zeros((4, 8), np.int32)}, ["projection", "int32"]),
        ({"kernel": "softmin"}, ["kernel", "softmin"]),
        ({"estimator": "best"}, ["estimator", "best"]),
        ({"estimator": "optimal", "kernel": "relu"}, ["estimator", "relu"]),
        ({"input_scale": -1.0}, ["input_scale", "-1.0"]),
        ({"scale": -2.0}, ["scale", "-2.0"]),
    ],
)
def test_mistakes(options, words):
    x = np.zeros((1, 3, 2, 8), np.float32)
    with pytest.raises(ValueError) as caught:
        performer_attention(x, x, x, **{"projection": np.ones((4, 8), np.float32)} | options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["performer", "performer_relu"])
def test_the_module_draws_once_and_trains_nothing(name, monkeypatch):
    """The projection is no parameter, the same under jit and with every init key, and another with another seed."""
    x = np.random.default_rng(5).normal(size=(2, 9, 16)).astype(np.float32)
    draw, seen = kernels.drawn.__wrapped__, []  # without its cache, which would hand on the first draw

    def noted(*sizes, **settings):
        seen.append((draw(*sizes, **settings), sizes, settings))
        return seen[-1][0]

    monkeypatch.setattr(kernels, "drawn", noted)
    mixer, other = MIXERS[name](16, heads=2, kv_heads=1), MIXERS[name](16, heads=2, kv_heads=1, seed=1)
    params, _ = ({"params": random_parameters(mixer, x, seed=key)} for key in (0, 1))
    assert sorted(params["params"]) == ["key", "out", "query", "value"]

    @jax.jit
    def run(params, x):
        head, state = mixer.apply(params, x[:, :4], return_state=True, state=mixer.init_state(2, 9))
        in_two_calls = jnp.concatenate([head, mixer.apply(params, x[:, 4:], state=state)], axis=1)
        return mixer.apply(params, x), other.apply(params, x), in_two_calls

    y, another, in_two_calls = map(np.asarray, run(params, x))
    assert len(seen) >= 5
    for under_jit, sizes, settings in seen:
        checks.assert_identical(under_jit, draw(*sizes, **settings), str(sizes))
    assert checks.rms(another - y) > 1e-4
    checks.assert_close(in_two_calls, y, 2e-6)
