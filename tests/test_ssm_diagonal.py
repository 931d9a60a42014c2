"""Diagonal state spaces: exact angles, kernels, and one set of parameters in every mode; S5 and LRU at other sampling rates."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import ssm
from effattn_jax.ssm import _poles
from tests.laws import checks

WIDTH, PAIRS = 2, 3
MODES = (
    {"mode": "chunked"},
    {"mode": "recurrence", "implementation": "scan"},
    {"mode": "recurrence", "implementation": "associative"},
    {"mode": "convolution"},
)


def system(length, *, real=False, dtype=np.float32, batch=2):
    """u, Lambda, B, C, D, step, state."""
    rng = np.random.default_rng(0)
    kind = dtype if real else np.result_type(dtype, np.complex64)

    def draw(*shape):
        return (rng.normal(size=shape) + (0 if real else 1j * rng.normal(size=shape))).astype(kind)

    Lambda = np.tile(ssm.diagonal_init("real" if real else "inv", 2 * PAIRS), (WIDTH, 1)).astype(kind)
    step, D = rng.uniform(0.02, 0.2, WIDTH).astype(dtype), rng.normal(size=WIDTH).astype(dtype)
    u = rng.normal(size=(batch, length, WIDTH)).astype(dtype)
    return u, Lambda, draw(WIDTH, PAIRS), draw(WIDTH, PAIRS), D, step, draw(batch, WIDTH, PAIRS)


def by_hand(u, Lambda, B, C, D, step, state, method="zoh"):
    """Step by step in NumPy, float64."""
    wide = np.complex128 if np.iscomplexobj(Lambda) else np.float64
    Lambda, B, C, x = (a.astype(wide) for a in (Lambda, B, C, state))
    z = step.astype(np.float64)[:, None] * Lambda
    if method == "zoh":
        a, gain = np.exp(z), np.expm1(z) / Lambda
    else:
        a, gain = (1 + z / 2) / (1 - z / 2), step[:, None] / (1 - z / 2)
    out = []
    for t in range(u.shape[1]):
        x = a * x + gain * B * u[:, t, :, None]
        out.append((2 if np.iscomplexobj(Lambda) else 1) * np.sum(C * x, -1).real + D * u[:, t])
    return np.stack(out, 1), x


def run(arrays, **options):
    return ssm.diagonal_ssm(*arrays[:6], initial_state=arrays[6], return_state=True, **options)


@jax.jit
def everywhere(arrays):
    """Outputs and last state in every mode."""
    return [run(arrays, **form) for form in MODES]


def test_initial_poles_are_those_of_the_papers():
    np.testing.assert_allclose(
        ssm.diagonal_init("legs", 8).imag, [0.42748871, 1.95779415, 5.35420852, 19.85741037], rtol=1e-7
    )
    np.testing.assert_allclose(
        ssm.diagonal_init("inv", 8).imag, [17.82535363, 4.24413182, 1.52788745, 0.36378273], rtol=1e-7
    )
    assert round(ssm.diagonal_init("legs", 64).imag.max(), 2) == 1303.27
    assert round(ssm.diagonal_init("inv", 64).imag.max(), 2) == 1283.43
    np.testing.assert_allclose(ssm.diagonal_init("legs", 16).imag, ssm.legs_dplr(16)[0].imag, rtol=1e-10)
    assert ssm.diagonal_init("real", 6).tolist() == [-1, -2, -3]
    for size in (7, 0, 2.0):
        with pytest.raises(ValueError, match="size must be an even positive int"):
            ssm.diagonal_init("lin", size)


def test_angles_are_right_at_a_million_steps():
    """float32, the fastest pole of LegS at N = 64, a step of 0.1: 10^8 radians. Computed without care the error is 1.8."""
    poles = (-1e-4 + 1j * ssm.diagonal_init("legs", 64).imag).astype(np.complex64)[None]
    step = np.float32([[0.1], [0.0123]])
    far, near = _poles.long_table(1 << 20)

    @jax.jit
    def tables(step, poles):
        return [_poles.powers(step, poles, "zoh", *size) for size in ((far, near), (near,))]

    high, low = map(np.asarray, tables(step, poles))
    for lag in (1, 1023, 1024, 10**6, (1 << 20) - 1):
        exact = np.exp(lag * (step.astype(np.longdouble) * poles.astype(np.clongdouble)))
        assert np.abs(high[..., lag // near] * low[..., lag % near] / exact - 1).max() < 1e-6
    with pytest.raises(ValueError, match="at most 16777216"):
        _poles.long_table((1 << 24) + 1)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("real", [False, True])
def test_kernels_equal_powers(real, method):
    _, Lambda, B, C, _, step, _ = system(1, real=real)
    lengths = (0, 1, 2, 17, 1000, 1023)

    @jax.jit
    def run(*arrays):
        kernels = [ssm.diagonal_kernel(*arrays, length, method) for length in lengths]
        return kernels, ssm.diagonal_kernel(*(x[0] for x in arrays), 17, method)

    kernels, one = run(Lambda, B, C, step)
    np.testing.assert_allclose(one, np.asarray(kernels[3])[0], rtol=1e-6)
    for length, kernel in zip(lengths, map(np.asarray, kernels)):
        assert kernel.shape == (WIDTH, length)
        if length:
            impulse = np.zeros((1, length, WIDTH))
            impulse[:, 0] = 1
            expected, _ = by_hand(impulse, Lambda, B, C, np.zeros(WIDTH), step, np.zeros((1, WIDTH, PAIRS)), method)
            assert checks.rms(kernel.T - expected[0]) <= 1e-6 * checks.rms(expected[0])


def test_the_hold_does_not_cancel():
    """(e^z - 1) / z down to z = 0, in value and slope, and past half a turn."""
    z = np.array([0, 1e-9, 1e-5 + 1e-5j, 0.3, 0.49j, 0.51j, -3 + 100j])
    wide = np.where(z == 0, 1, z).astype(np.clongdouble)
    exact = np.where(z == 0, 1, 2 * np.sinh(wide / 2) * np.exp(wide / 2) / wide)
    slope = np.where(np.abs(z) < 1e-4, 0.5 + z / 3, (np.exp(wide) - exact) / wide)
    both = jax.jit(lambda z: (_poles.phi(z), jax.vmap(jax.grad(_poles.phi, holomorphic=True))(z)))
    values, slopes = both(z.astype(np.complex64))
    assert np.abs(np.asarray(values) - exact).max() < 1e-7 and np.abs(np.asarray(slopes) - slope).max() < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 17, 1000, 1023, 1025, 4097])
def test_modes_agree(length):
    """Outputs and last state of every mode, against steps by hand."""
    arrays = system(length)
    expected = by_hand(*arrays)
    for form, actual in zip(MODES, everywhere(arrays)):
        for ours, theirs in zip(actual, expected):
            assert checks.rms(np.asarray(ours) - theirs) <= 1e-5 * checks.rms(theirs), form


@pytest.mark.parametrize("length, dtype", [(2, np.float64), (1025, np.float64), (1025, np.float32)])
def test_gradients_of_modes_agree(length, dtype):
    """By every parameter, the input and the initial state, through the last state too."""
    with checks.x64(dtype == np.float64):
        arrays = system(length, dtype=dtype, batch=1)
        both = jax.jit(lambda a: [checks.value_and_grads(functools.partial(run, **form), a) for form in MODES])(arrays)
        tolerance = 1e-12 if dtype == np.float64 else 1e-5
        for form, other in zip(MODES[1:], both[1:]):
            checks.assert_close(other, both[0], tolerance, str(form))


def test_modes_agree_at_a_million_steps():
    """2^20 steps: chunks and convolution against the scan, float32."""
    arrays = [a[:1] if a.shape[0] == 2 and a.ndim == 3 else a for a in system(1 << 20, batch=1)]
    chunked, scanned, _, convolved = (np.asarray(out) for out, _ in everywhere(arrays))
    for other in (chunked, convolved):
        assert checks.rms(other - scanned) <= 1e-5 * checks.rms(scanned)


@pytest.mark.parametrize("mode", ["chunked", "recurrence"])
def test_irregular_steps(mode):
    """Holding an input for two steps is one step twice as long; a step of 0 changes nothing; the rest is regular."""
    u, Lambda, B, C, D, step, state = system(8)
    twice, weights = np.repeat(u, 2, axis=1), (Lambda, B, C, D)
    steps = np.broadcast_to(step, twice.shape) * np.tile([2, 0], 8)[:, None].astype(np.float32)
    calls = [(twice, *weights, step, state), (u, *weights, 2 * step, state), (twice, *weights, steps, state)]
    every = jax.jit(lambda calls: [run(arrays, mode=mode) for arrays in calls])(calls)
    (fine, last), (coarse, same), (uneven, after) = jax.tree.map(np.asarray, every)
    checks.assert_close((coarse, same), (fine[:, 1::2], last), 1e-5)
    checks.assert_close((uneven[:, ::2], after), (coarse, last), 1e-5)
    assert not np.any(np.diff((uneven - D * twice).reshape(2, 8, 2, WIDTH), axis=2))


def test_reverse_runs_from_the_end():
    arrays = system(1025)  # a program of other tests too
    backwards = jax.jit(lambda arrays: [run(arrays, reverse=True, **form) for form in MODES])(arrays)
    forwards = everywhere((np.flip(arrays[0], 1), *arrays[1:]))
    for (back, first), (out, state) in zip(backwards, forwards):
        checks.assert_close((np.flip(np.asarray(back), 1), first), (out, state), 1e-6)


def test_a_convolution_refuses_what_it_cannot_do():
    u, Lambda, B, C, D, step, state = system(4)
    with pytest.raises(ValueError, match="mode='convolution' has one kernel for all of time; got segment_ids"):
        ssm.diagonal_ssm(u, Lambda, B, C, D, step, mode="convolution", segment_ids=np.zeros((2, 4), int))
    with pytest.raises(ValueError, match="got a step for each time"):
        ssm.diagonal_ssm(u, Lambda, B, C, D, np.broadcast_to(step, u.shape), mode="convolution")
    with pytest.raises(ValueError, match="mode='fft' is unknown"):
        ssm.diagonal_ssm(u, Lambda, B, C, D, step, mode="fft")
    with pytest.raises(ValueError, match="B and C must be real where Lambda is"):
        ssm.diagonal_ssm(u, Lambda.real, B, C, D, step)
    with pytest.raises(ValueError, match="method='euler' is unknown"):
        ssm.diagonal_kernel(Lambda, B, C, step, 3, "euler")


def test_convolutions_lower_for_accelerators():
    arrays = system(9)
    exported = jax.export.export(jax.jit(lambda a: run(a, mode="convolution")), platforms=("tpu", "cuda"))(arrays)
    assert "f64>" not in exported.mlir_module()


def test_the_softmax_form():
    """DSS: powers over their sum over the length."""
    _, Lambda, W, _, _, step, _ = system(1)
    z = (step[:, None] * Lambda)[..., None] * np.arange(11)
    expected = 2 * np.sum((W / Lambda)[..., None] * np.exp(z) / np.exp(z).sum(-1, keepdims=True), 1).real
    kernel = jax.jit(ssm.dss_kernel, static_argnums=3)(Lambda, W, step, 11)
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [3, 1_000, 100_000])
def test_the_softmax_form_of_a_long_row(length):
    """Its sum is a power of `length`: 11,000 turns of this pole."""
    Lambda, step, one = np.array([-0.01 + 700j], np.complex64), np.float32(1e-3), np.ones(1, np.complex64)
    pole, each = complex(Lambda[0]), float(step)
    z = np.exp(each * pole * np.arange(length))
    expected = 2 * (z / pole * np.expm1(each * pole) / np.expm1(length * each * pole)).real
    kernel = jax.jit(ssm.dss_kernel, static_argnums=3)(Lambda, one, step, length)
    assert np.abs(kernel - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("pole", [-1.0, -1.0 + 0j], ids=["real", "complex"])
def test_bilinear_poles_that_forget_at_once(pole, x64):
    """At step lambda = -2 a pole's a is 0: first and second derivatives by the convolution and by chunks are those of the recurrence."""
    u, pole, one = np.random.default_rng(0).normal(size=(1, 5, 1)), np.array([[pole]]), np.ones((1, 1))

    def derivatives(mode, pole, step):
        def loss(pole, step):
            return jnp.sum(jnp.sin(ssm.diagonal_ssm(u, pole, one, one, None, step, mode=mode, method="bilinear")))

        def slopes(step):
            value, (by_pole, by_step) = jax.value_and_grad(loss, (0, 1))(pole, step)
            return by_step, (value, by_pole)

        return jax.jvp(slopes, (step,), (jnp.ones_like(step),), has_aux=True)

    modes = ("recurrence", "chunked", "convolution")
    every = jax.jit(lambda *arrays: [derivatives(mode, *arrays) for mode in modes])
    expected, *others = every(pole, np.array([2.0]))
    for other in others:
        checks.assert_close(other, expected, 1e-11)


@pytest.mark.parametrize("name", ["s5_ssm", "lru", "rg_lru"])
def test_other_sampling_rates(name):
    """A step twice as long on held inputs reads what two steps read; a step a time, 0 for padding, changes nothing else."""
    line = ssm.MIXERS[name]
    weights = line.weights(np.random.default_rng(0))
    inputs = line.sample(np.random.default_rng(1), 2, 5, np.float32)
    step = weights.pop("step", 1.0)
    held = {key: np.repeat(x, 2, axis=1) for key, x in inputs.items()}
    pauses = np.tile(np.float32([2, 0]), 5)[None, :, None] * np.ones((2, 1, 1)) * np.reshape(step, (1, 1, -1))
    calls = {"coarse": {**inputs, "step": 2 * step}, "uneven": {**held, "step": pauses.astype(np.float32)}}
    if name != "rg_lru":  # which scales its inputs by the length of the step, not by holding them
        calls["fine"] = {**held, "step": step}
    function = functools.partial(line.function, return_state=True, **weights)
    every = jax.jit(lambda calls: {key: function(**arrays) for key, arrays in calls.items()})(calls)
    found = jax.tree.map(np.asarray, every)
    if "fine" in found:
        fine, last = found["fine"]
        checks.assert_close((fine[:, 1::2], last), found["coarse"], 1e-5)
    uneven, last = found["uneven"]
    checks.assert_close((uneven[:, ::2], last), found["coarse"], 1e-5)


@functools.cache
def bilinear_by_mode():
    """Of one pole, by every mode, in one program."""
    u, one = np.random.default_rng(0).normal(size=(2, 6, 1)), np.ones((1, 1))
    call = functools.partial(ssm.diagonal_ssm, D=None, step=1.0, method="bilinear")
    modes = ("recurrence", "chunked", "convolution")
    return jax.jit(lambda pole: {mode: call(u, pole[None, None], one, one, mode=mode) for mode in modes})


@pytest.mark.parametrize("mode", ["chunked", "convolution"])
@pytest.mark.parametrize("pole", [-1.0, -3.0, 1.0, 3.0, 5.0])
def test_bilinear_poles_on_either_side(pole, mode, x64):
    """The sign of a one-step factor is that of (2 + z) / (2 - z), on both sides of 2."""
    found = bilinear_by_mode()(np.float64(pole))
    np.testing.assert_allclose(found[mode], found["recurrence"], rtol=1e-10)


def test_one_step_for_all_channels():
    poles = -np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    for kernel in (
        functools.partial(ssm.diagonal_kernel, poles, poles, poles),
        functools.partial(ssm.dss_kernel, poles, poles),
    ):
        both = jax.jit(lambda kernel=kernel: (kernel(0.1, 5), kernel(np.full(2, 0.1, np.float32), 5)))()
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("mode", ["recurrence", "chunked", "convolution"])
def test_no_channels(mode):
    none = np.zeros((0, 2), np.complex64)
    run = jax.jit(functools.partial(ssm.diagonal_ssm, D=None, mode=mode))
    out = run(np.zeros((2, 5, 0), np.float32), none, none, none, step=np.zeros(0, np.float32))
    assert out.shape == (2, 5, 0)
