"""HiPPO: matrices against the constructor and their identities, discretisation, projection against closed forms and naive recurrences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from effattn_jax import ssm
from effattn_jax.ssm import _bases as bases
from effattn_jax.ssm import discretize, hippo_from_basis, hippo_matrices, hippo_project, hippo_reconstruct
from effattn_jax.ssm._measures import MEASURES, find
from tests.laws import checks

SCALED = [("legs", {}), ("cosine_scaled", {}), ("chebyshev", {"window": None}), ("fourier_scaled", {})]
SLIDING = [
    ("legt", {"window": 0.5}),
    ("lmu", {}),
    ("cosine", {}),
    ("fourier", {}),
    ("fourier", {"endpoint": "decay", "window": 2.0}),
    ("chebyshev", {}),
]
ORTHONORMAL = {"legs": bases.legendre, "legt": bases.legendre, "cosine_scaled": bases.cosine, "cosine": bases.cosine,
               "fourier_scaled": bases.exponentials}  # fmt: skip


def size_of(measure: str, size: int = 8) -> int:
    return size + 1 if measure == "fourier_scaled" else size


# Matrices


@pytest.mark.parametrize("measure", ORTHONORMAL)
def test_closed_forms_are_the_constructor_s(measure):
    """A and B of an orthonormal basis by quadrature of its derivatives: the general rule behind every measure."""
    for size in (4, 9, 32):
        size = size + 1 - size % 2 if measure == "fourier_scaled" else size
        window = {"legt": 2.0, "cosine": 0.5}.get(measure)
        options = {} if window is None else {"window": window}
        basis = jax.jit(ORTHONORMAL[measure], static_argnums=1)
        made = hippo_from_basis(basis, size, window=window)
        for actual, expected in zip(hippo_matrices(measure, size, **options), made):
            np.testing.assert_allclose(actual, expected, atol=1e-9 * np.abs(expected).max())


def test_the_fourier_memory_is_the_constructor_s_with_the_periodic_endpoint():
    """Without the dummy sine: the constructor reads the oldest value from the basis, S4 doubles the jump in input and output."""
    size, keep = 8, [0, *range(2, 8)]
    basis = jax.jit(lambda s, n: bases.fourier(s, size)[:, np.array(keep)])
    A, B = hippo_from_basis(basis, size - 1, window=1.0)
    decay, periodic = (hippo_matrices("fourier", size, endpoint=name) for name in ("decay", "periodic"))
    g = B[:, None] * B[None]
    np.testing.assert_allclose(decay[0][np.ix_(keep, keep)], A, atol=1e-12)
    np.testing.assert_allclose(periodic[0][np.ix_(keep, keep)], A - g, atol=1e-12)
    np.testing.assert_allclose(periodic[1][keep], 2 * B)


def test_a_basis_with_corners():
    """Orthonormalised hat functions: piecewise linear, not in any table; the DC identity A c = -B for the constant's coefficients c."""
    knots = np.linspace(0, 1, 5)

    @jax.jit
    def hats(s):
        return jnp.maximum(0, 1 - 4 * jnp.abs(s[:, None] - knots[None]))

    gram = np.array([[4 if 0 < i < 4 else 2 if i == j else 0 for j in range(5)] for i in range(5)], float)
    gram = np.diag([2.0, 4, 4, 4, 2]) + np.diag(np.ones(4), 1) + np.diag(np.ones(4), -1)
    root = np.linalg.inv(np.linalg.cholesky(gram / 24))
    A, B = hippo_from_basis(jax.jit(lambda s, n: hats(s) @ root.T), 5, breaks=tuple(knots[1:-1]))
    constant = root @ gram.sum(1) / 24
    np.testing.assert_allclose(A @ constant, -B, atol=1e-12)
    np.testing.assert_allclose(A + A.T, -np.eye(5) - np.outer(B, B), atol=1e-12)
    with pytest.raises(ValueError, match="orthonormal"):
        hippo_from_basis(lambda s, n: hats(s), 5)


def test_identities():
    """A + A^H = -I - B B^H (scaled), A + A^T = -(g0 g0^T + g1 g1^T) / w (sliding), spectra, and A e_0 = -B."""
    for measure in ("legs", "cosine_scaled", "fourier_scaled"):
        A, B = hippo_matrices(measure, 9)
        np.testing.assert_allclose(A + A.conj().T, -np.eye(9) - np.outer(B, B.conj()), atol=1e-12)
        assert np.linalg.norm(2 ** np.linalg.eigvals(A)[0]) <= 2**-0.5
    A, B = hippo_matrices("legt", 9, window=3.0)
    oldest = np.sqrt(2 * np.arange(9) + 1) * (-1) ** np.arange(9)
    np.testing.assert_allclose(A + A.T, -(np.outer(oldest, oldest) + 9 * np.outer(B, B)) / 3, atol=1e-12)
    np.testing.assert_array_equal(np.diag(hippo_matrices("legs", 9)[0]), -np.arange(1, 10))
    np.testing.assert_allclose(np.linalg.eigvals(hippo_matrices("fourier_scaled", 9)[0]).real, -1, atol=1e-9)
    poles = np.sort_complex(np.linalg.eigvals(hippo_matrices("legt", 4)[0]))
    np.testing.assert_allclose(poles[[1, 3]], [-4.787193103 + 1.567476417j, -3.212806897 + 4.773087433j], rtol=1e-8)
    for measure, options in [*SCALED, *SLIDING]:
        if measure != "lmu":
            size = size_of(measure)
            A, B = hippo_matrices(measure, size, **options)
            constant = np.eye(size)[size // 2 if measure == "fourier_scaled" else 0]
            np.testing.assert_allclose(A @ constant, -B, atol=1e-12)


def test_conventions():
    """Windows and normalisations are similarities; S4's and the LMU's own formulas."""
    n = np.arange(6)
    i, j = n[:, None], n[None]
    A, B = hippo_matrices("lmu", 6, window=4.0)
    np.testing.assert_allclose(A, (2 * i + 1) * np.where(i < j, -1.0, (-1.0) ** (i - j + 1)) / 4, atol=1e-12)
    np.testing.assert_allclose(B, (-1.0) ** n * (2 * n + 1) / 4)
    A, B = hippo_matrices("legs", 6, normalization="plain")
    np.testing.assert_allclose(A, -np.where(i > j, 2 * i + 1, np.where(i == j, i + 1, 0)), atol=1e-12)
    np.testing.assert_allclose(B, 2 * n + 1)
    np.testing.assert_allclose(hippo_matrices("legs", 6, normalization="su")[1], np.sqrt(2 * (2 * n + 1)))
    A, B = hippo_matrices("legt", 6, normalization="plain", window=2.0)
    np.testing.assert_allclose(A, -(2 * i + 1) / 2 * np.where(j < i, 1, (-1.0) ** (i - j)), atol=1e-12)
    A, B = hippo_matrices("glagt", 6, alpha=0.0, beta=1.0)
    np.testing.assert_allclose(A, -np.tri(6))
    np.testing.assert_allclose(B, 1)
    half, whole = hippo_matrices("fourier", 6, window=2.0), hippo_matrices("fourier", 6)
    np.testing.assert_allclose(2 * half[0], whole[0])
    np.testing.assert_allclose(half[1], [1, 0, 2**0.5, 0, 2**0.5, 0])


@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"fourier_scaled"}))
def test_normal_plus_low_rank(measure):
    """V (diag(Lambda) - P P^H) V^-1 is A and 2 Re(V B) is B, with conjugates; Re Lambda is one number."""
    for size in (2, 8, 64):
        A, B = hippo_matrices(measure, size)
        Lambda, P, b, V = ssm.hippo_dplr(measure, size)
        both = lambda x, axis=-1: np.concatenate([x, x.conj()], axis=axis)  # noqa: E731
        P = both(np.atleast_2d(P))
        V_both = both(V)
        again = V_both @ (np.diag(both(Lambda)) - P.T @ P.conj()) @ np.linalg.inv(V_both)
        np.testing.assert_allclose(again, A, atol=1e-12 * np.abs(A).max())
        np.testing.assert_allclose(2 * (V @ b).real, B, atol=1e-12 * np.abs(B).max())
        assert np.ptp(Lambda.real) == 0 and np.all(np.diff(Lambda.imag) >= 0) and np.all(b.real >= 0)


def test_legs_spectrum():
    Lambda, P, B, V = ssm.legs_dplr(8)
    np.testing.assert_allclose(Lambda.imag, [0.42748871, 1.95779415, 5.35420852, 19.85741037], atol=1e-8)
    np.testing.assert_allclose(B, 2**0.5 * P)
    assert abs(ssm.legs_dplr(64)[0].imag[-1] - 1303.27) < 0.01
    with pytest.raises(ValueError, match="size must be even"):
        ssm.legs_dplr(7)


# Discretisation


def test_discretize():
    """Dense against the formulas and a long product, diagonal against dense, numbers from the literature, gradients."""
    A, B = hippo_matrices("legt", 6)
    eye = np.eye(6)
    for method, alpha in (("forward", 0.0), ("backward", 1.0), ("bilinear", 0.5), ("generalized", 0.3)):
        A_bar, B_bar = discretize(A, B, 0.1, method, 0.3)
        np.testing.assert_allclose((eye - alpha * 0.1 * A) @ A_bar, eye + (1 - alpha) * 0.1 * A, atol=1e-12)
        np.testing.assert_allclose((eye - alpha * 0.1 * A) @ B_bar, 0.1 * B, atol=1e-12)
    A_bar, B_bar = discretize(A, B, 0.1, "zoh")
    fine, _ = discretize(A, B, 0.1 / 2**20, "bilinear")
    np.testing.assert_allclose(A_bar, np.linalg.matrix_power(fine, 2**20), atol=1e-8)
    np.testing.assert_allclose(A @ B_bar, (A_bar - eye) @ B, atol=1e-12)
    for method in ("bilinear", "zoh"):
        dense = discretize(np.diag([-1.0, 2.0, 0.0]), np.ones(3), 0.3, method)
        diagonal = discretize(np.array([-1.0, 2.0, 0.0]), np.ones(3), 0.3, method)
        np.testing.assert_allclose(np.diag(diagonal[0]), dense[0], atol=1e-14)
        np.testing.assert_allclose(diagonal[1], dense[1], atol=1e-14)
        traced = jax.jit(lambda a, b, s, m=method: discretize(a, b, s, m))(np.float32(A), np.float32(B), 0.1)
        np.testing.assert_allclose(traced[0], discretize(A, B, 0.1, method)[0], atol=1e-5)
    traced = jax.jit(functools.partial(discretize, method="zoh"))
    A_bar, B_bar = traced(np.full((2, 3), -1e-5, np.float32), np.ones((2, 3), np.float32), np.float32([1e-2, 1e-3]))
    np.testing.assert_allclose(np.asarray(B_bar)[:, 0], [1e-2, 1e-3], rtol=1e-6)
    for kind in (np.float32, np.complex64):
        z = np.array([0.0, -1e-6, -1e-3, 1e-4, -1.0], kind)
        held = lambda a: discretize(a[None], jnp.ones_like(a[None]), 1.0, "zoh")[1][0]  # noqa: E731
        slopes = jax.jit(jax.vmap(jax.grad(held, holomorphic=kind == np.complex64)))(z)
        np.testing.assert_allclose(slopes, [0.5, 0.5, 0.499667, 0.500033, 0.264241], rtol=2e-6)
    uneven = discretize(np.array([-1.0, 0.0]), np.ones(2), np.arange(3), "zoh")  # more steps than systems
    narrow = traced(-np.eye(2, dtype=np.float32)[0], np.ones(2, np.float32), np.arange(3))
    np.testing.assert_allclose(np.stack(narrow), uneven, atol=1e-6)
    assert uneven[0].shape == (3, 2)


# Projection


def held_projection(u, edges, basis, size):
    """Coefficients (R, P) of the held signal u (T, R) on all of [0, edges[-1]] by quadrature within each cell, in float64."""
    nodes, weights = np.polynomial.legendre.leggauss(size // 2 + 20)
    at = (edges[:-1, None] + np.diff(edges)[:, None] * (1 + nodes) / 2) / edges[-1]
    values = np.stack([basis(row, size).conj().T @ weights for row in at])
    return np.einsum("tr,tp,t->rp", u, values, np.diff(edges) / edges[-1] / 2)


def legendre_weights(edges, size):
    """(T, P): the integrals of the normalised Legendre polynomials over cells, by their antiderivatives, in float64."""
    values = bases.legendre(edges / edges[-1], size + 1) / np.sqrt(2 * np.arange(size + 1) + 1)
    higher = (values[:, 2:] - values[:, :-2]) / (4 * np.arange(1, size) + 2)
    integrals = np.concatenate([edges[:, None] / edges[-1], higher], axis=1)
    return np.diff(integrals, axis=0) * np.sqrt(2 * np.arange(size) + 1)


def relative(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def noise(length, seed=0, channels=2):
    return np.random.default_rng(seed).normal(size=(length, channels)).astype(np.float32)


@pytest.mark.parametrize("size, length", [(5, 40), (64, 700), (256, 350)])
def test_exact_legs_is_the_projection(size, length):
    """At every sample, at the end only, and with irregular edges; white noise, float64 and float32."""
    u = noise(length)
    regular = np.arange(length + 1.0)
    irregular = np.concatenate([[0], np.cumsum(np.random.default_rng(1).exponential(size=length))])
    for double, tolerance in ((True, 1e-12), (False, 5e-6)):
        with checks.x64(double):
            signal = u.astype(np.float64) if double else u
            for edges, timestamps in ((regular, None), (irregular, irregular)):
                run = functools.partial(hippo_project, measure="legs", size=size, method="exact", timestamps=timestamps)
                states = np.asarray(run(signal))
                for k in (0, 1, length // 2, length - 1):
                    expected = u[: k + 1].astype(np.float64).T @ legendre_weights(edges[: k + 2], size)
                    assert relative(states[k], expected) <= tolerance, (double, k)
                assert relative(run(signal, final_only=True), expected) <= tolerance
    if size == 5:
        np.testing.assert_allclose(
            held_projection(u, regular, bases.legendre, size), expected_at_end(u, size), atol=1e-12
        )


def expected_at_end(u, size):
    return u.astype(np.float64).T @ legendre_weights(np.arange(len(u) + 1.0), size)


def test_the_final_state_of_a_long_signal():
    """Chunks that become points: the projection still, in float32, for noise and for what is smooth."""
    length, size = 20_000, 256
    u = noise(length)
    u[:, 1] = np.sin(np.arange(length) * 30 / length)
    actual = hippo_project(u, "legs", size, method="exact", final_only=True)
    expected = expected_at_end(u, size)
    for channel in range(2):
        assert relative(actual[channel], expected[channel]) <= 5e-6


def test_reconstruction_of_a_band_limited_signal():
    """T = 1000, P = 64: exact LegS errs by what holding the samples costs, 1.4e-4; the bilinear rule by 30 times as much."""
    length, size = 1000, 64
    s = (np.arange(length) + 0.5) / length
    rng = np.random.default_rng(0)
    frequencies, phases = rng.uniform(0, 5, 8), rng.uniform(0, 2 * np.pi, 8)
    u = np.sin(2 * np.pi * s[:, None] * frequencies + phases).sum(1).astype(np.float32)
    errors = {}
    for method in ("exact", "bilinear"):
        x = hippo_project(u, "legs", size, method=method, final_only=True)
        errors[method] = float(np.sqrt(np.mean((hippo_reconstruct(x, "legs", s) - u) ** 2) / np.mean(u**2)))
    assert errors["exact"] <= 1.4e-4 and errors["bilinear"] > 30 * errors["exact"], errors


def naive_scaled(u, A, B, alpha, first):
    """The HiPPO codes' cell: x_1 = u_1 e_0, then the same t on both sides."""
    x = u[0][:, None] * first[None]
    out = [x]
    for k in range(1, len(u)):
        matrix, eye = A / k, np.eye(len(A))
        right = (eye + (1 - alpha) * matrix) @ x.T + np.outer(B / k, u[k])
        x = np.linalg.solve(eye - alpha * matrix, right).T
        out.append(x)
    return np.stack(out)


@pytest.mark.parametrize("measure, options", SCALED, ids=lambda x: x if isinstance(x, str) else "")
def test_scaled_memories_by_every_method(measure, options, x64):
    """Against a solve a step; "exact" against the projection for LegS and Chebyshev, against matrix powers for the others."""
    size = size_of(measure)
    u = noise(30).astype(np.float64)
    A, B = hippo_matrices(measure, size, **options)
    first = np.linalg.solve(A, -B)
    for method, alpha in (("forward", 0.0), ("backward", 1.0), ("bilinear", 0.5), ("generalized", 0.7)):
        actual = hippo_project(u, measure, size, method=method, alpha=0.7, **options)
        assert relative(actual, naive_scaled(u, A, B, alpha, first)) <= 1e-12, method
    x, values, V = u[0][:, None] * first[None], *np.linalg.eig(A.astype(complex))
    for k in range(1, 30):
        power = V @ np.diag(((k + 1) / k) ** values) @ np.linalg.inv(V)
        held = u[k][:, None] * first[None]
        x = held + (x - held) @ power.T
    actual, state = hippo_project(u, measure, size, method="exact", return_state=True, **options)
    assert relative(actual[-1], x) <= 1e-8
    assert int(state.time) == 30


def test_samples_of_the_literature():
    """LegS, P = 8, u = sin(0.1 k), k = 1, ..., 50."""
    u = np.sin(0.1 * np.arange(1, 51)).astype(np.float32)
    for method, expected in (
        ("bilinear", [0.1338995722, -0.6113266773, -0.3100387287]),
        ("exact", [0.1335589106, -0.5985219015, -0.3239239946]),
    ):
        x = hippo_project(u, "legs", 8, method=method, final_only=True)
        np.testing.assert_allclose(x[:3], expected, atol=2e-6)


@pytest.mark.parametrize("measure, options", SLIDING, ids=str)
def test_sliding_memories(measure, options, x64):
    """The recurrence as it is written, by its method; irregular edges that happen to be regular; both equal."""
    u = noise(21).astype(np.float64)
    A, B = hippo_matrices(measure, 6, **options)
    for method in ("bilinear", "zoh"):
        A_bar, B_bar = discretize(A, B, 0.05, method)
        x, expected = np.zeros((2, 6)), []
        for sample in u:
            x = x @ A_bar.T + np.outer(sample, B_bar)
            expected.append(x)
        run = functools.partial(hippo_project, u, measure, 6, method=method, **options)
        assert relative(run(step=0.05), np.stack(expected)) <= 1e-12
        assert relative(run(timestamps=3 + 0.05 * np.arange(22)), np.stack(expected)) <= 1e-10
        assert relative(run(step=0.05, final_only=True), x) <= 1e-12


@pytest.mark.parametrize(
    "measure, options", [("lagt", {}), ("tlagt", {"beta": 0.8}), ("glagt", {"alpha": 0.3, "beta": 0.9})]
)
def test_fading_bases_are_dual_to_impulse_responses(measure, options):
    """int d_m(a) (exp(a A) B)_n da = 1 where m = n, else 0."""
    A, B = hippo_matrices(measure, 5, **options)
    dt = 0.004
    ages = dt * (np.arange(15_000) + 0.5)
    step, response, x = discretize(A, B, dt, "zoh")[0], [], discretize(A, B, dt / 2, "zoh")[0] @ B
    for _ in ages:
        response.append(x)
        x = step @ x
    found, filled = find(measure, 5, options)
    basis = found.basis(np.exp(-ages), 5, **filled) @ np.linalg.inv(np.diag(change_diagonal(found, filled)))
    np.testing.assert_allclose(dt * np.stack(response).T @ basis, np.eye(5), atol=2e-3)


def change_diagonal(found, options):
    return np.ones(5) if found.change is None else found.change(5, **options)


@pytest.mark.parametrize("measure", ["lagt", "tlagt", "legt", "lmu", "fourier", "cosine", "chebyshev"])
def test_reconstruction_is_of_the_past_in_its_order(measure):
    """A slow signal comes back at the right ages: the convention of s, and the duals of the fading measures."""
    length, window = 6000, 2.0
    options = {"window": window} if "window" in MEASURES[measure].defaults else {"beta": 0.8} if measure == "tlagt" else {}  # fmt: skip
    dt = 0.002
    t = dt * (np.arange(length) + 0.5)
    period = 2.0 if measure == "fourier" else 7.0
    signal = lambda t: np.sin(2 * np.pi * t / period) + 0.5  # noqa: E731
    x = hippo_project(np.float32(signal(t)), measure, 40, method="zoh", step=dt, final_only=True, **options)
    s = np.array([0.3, 0.5, 0.7, 0.9])
    age = -np.log(s) if "lag" in measure else window * (1 - s)
    np.testing.assert_allclose(
        hippo_reconstruct(x, measure, s, **options), signal(length * dt - age), atol=0.06, err_msg=measure
    )


@pytest.mark.parametrize("measure", ["legs", "legt", "lmu", "cosine", "chebyshev", "lagt", "tlagt", "glagt"])
def test_reconstruction_has_both_ends(measure):
    """s = 0 is the oldest point there is, for a fading measure the limit of a past without end, which is 0."""
    x = np.random.default_rng(0).normal(size=6)
    for points in (np.array([0.0, 1e-12, 1.0]), jnp.array([0.0, 1e-12, 1.0])):
        first, near, last = np.asarray(hippo_reconstruct(x, measure, points))
        assert np.isfinite(last)
        np.testing.assert_allclose(first, 0 if "lag" in measure else near, atol=1e-5)


@pytest.mark.parametrize(
    "measure, method", [("legs", "exact"), ("legs", "bilinear"), ("cosine_scaled", "exact"), ("legt", "zoh")]
)
def test_resume_and_transformations(measure, method):
    """Split anywhere and go on, the final state only, jit, gradients (the adjoint of a linear map), batches, empty signals."""
    u = noise(40, channels=3)  # both halves are one program
    step = {"step": 0.03} if measure == "legt" else {}
    run = jax.jit(functools.partial(hippo_project, measure=measure, size=6, method=method, **step))
    go = functools.partial(hippo_project, measure=measure, size=6, method=method, return_state=True, **step)
    whole = np.asarray(go(u)[0])
    for cut in (0, 20):
        first, state = go(u[:cut])
        second, state = go(u[cut:], initial_state=state)
        np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=5e-6)
        np.testing.assert_allclose(state.coefficients, whole[-1], atol=5e-6)
    last, state = go(u[:20], final_only=True)
    np.testing.assert_allclose(go(u[20:], final_only=True, initial_state=state)[0], whole[-1], atol=5e-6)
    weights = np.random.default_rng(3).normal(size=whole.shape).astype(np.float32)
    loss = lambda u: jnp.vdot(run(u), weights)  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(loss))(u)
    np.testing.assert_allclose(np.vdot(slope, u), value, rtol=1e-4)
    flat = np.asarray(run(u.reshape(40, 3, 1)))
    assert flat.shape == (40, 3, 1, 6)
    np.testing.assert_allclose(flat[:, :, 0], whole, atol=1e-6)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_projection_lowers(platform):
    u = jax.ShapeDtypeStruct((9, 2), jnp.float32)
    for measure, method in (("legs", "exact"), ("legs", "bilinear"), ("cosine_scaled", "exact"), ("legt", "bilinear")):
        run = jax.jit(functools.partial(hippo_project, measure=measure, size=4, method=method))
        export.export(run, platforms=[platform])(u)


@pytest.mark.parametrize("measure, options", [("legs", {}), ("chebyshev", {"window": None}), ("cosine_scaled", {})])
def test_samples_of_no_width_at_the_beginning(measure, options):
    """Where no time has passed the memory is that of a constant, by any method."""
    u = np.array([1.0, 2.0, 5.0], np.float32)
    for edges in ([0.0, 0.0, 0.0, 1.0], [2.0, 2.0, 3.0, 4.0]):
        exact, rule = (
            np.asarray(hippo_project(u, measure, 3, method=method, timestamps=edges, **options))
            for method in ("exact", "backward")
        )
        last = hippo_project(u, measure, 3, method="exact", timestamps=edges, final_only=True, **options)
        first = [i for i in range(3) if edges[i + 1] == edges[0]]
        np.testing.assert_allclose(exact[first], rule[first], atol=1e-6)
        np.testing.assert_allclose(last, exact[-1], atol=1e-6)
    nothing = hippo_project(u[:2], measure, 3, method="exact", timestamps=[1.0] * 3, final_only=True, **options)
    np.testing.assert_allclose(nothing, exact[:1][0] * 2, atol=1e-6)
    assert hippo_project(np.zeros((3, 0)), measure, 2, **options).shape == (3, 0, 2)
