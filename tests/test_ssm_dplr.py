"""S4: kernels against a dense recurrence in float64, both modes of the layer, states, and what must lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from effattn_jax import ssm
from effattn_jax.recurrence import fft_convolution
from effattn_jax.ssm import dplr_kernel, dplr_ssm
from tests.laws import checks


def both(x, axis=-1):
    """With the conjugate half."""
    return np.concatenate([x, np.conj(x)], axis=axis)


def dense(Lambda, P, step):
    """(A_bar, the matrix that makes B_bar of B) of one feature, all of both halves."""
    P = both(np.atleast_2d(P))
    A = np.diag(both(Lambda)) - P.T @ P.conj()
    eye = np.eye(len(A))
    inverse = np.linalg.inv(eye - step / 2 * A)
    return inverse @ (eye + step / 2 * A), inverse * step


def naive_kernel(Lambda, P, B, C, step, length, stride=16):
    """C A_bar^l B_bar, l = stride j + i: the rows C A_bar^i times the columns A_bar^(stride j) B_bar."""
    A_bar, drive = dense(Lambda, P, step)
    rows, columns = [both(C)], [drive @ both(B)]
    for _ in range(stride - 1):
        rows.append(rows[-1] @ A_bar)
    jump = np.linalg.matrix_power(A_bar, stride)
    for _ in range(0, length - stride, stride):
        columns.append(jump @ columns[-1])
    return (np.stack(columns) @ np.stack(rows).T).real.reshape(-1)[:length]


def parameters(measure, size, count, trained, seed=0):
    """Lambda, P, B, C (count, size / 2) in complex64: what a measure gives, or that with every number off by a tenth or so."""
    rng = np.random.default_rng(seed)
    Lambda, P, B, _ = ssm.hippo_dplr(measure, size)
    half = size // 2
    off = lambda scale: 1 + scale * trained * rng.normal(size=(count, half))  # noqa: E731
    C = rng.normal(size=(count, half)) + 1j * rng.normal(size=(count, half))
    P = np.stack([row * off(0.1) for row in P]) if P.ndim == 2 else P * off(0.1)
    return [x.astype(np.complex64) for x in (Lambda * off(0.1), P, B * (off(0.3) + 0.3j * (off(1.0) - 1)), C)]


kernel_of = jax.jit(dplr_kernel, static_argnames="length")
STEPS = np.float32([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])


@pytest.mark.parametrize("trained", [0, 1], ids=["as initialised", "as trained"])
@pytest.mark.parametrize("measure, size", [("legs", 64), ("legs", 256), ("legt", 64)])
def test_kernels_in_float32_are_those_of_float64(measure, size, trained):
    """Rank 1 and 2, steps from 1e-4 to 10, even and odd lengths: at most 1e-6 of the kernel's largest entry."""
    Lambda, P, B, C = parameters(measure, size, len(STEPS), trained)
    kernels = [np.asarray(kernel_of(Lambda, P, B, C, STEPS, length=length)) for length in (512, 511)]
    for i, step in enumerate(STEPS):
        row = (x.astype(np.complex128) for x in (Lambda[i], P[..., i, :], B[i], C[i]))
        whole = naive_kernel(*row, float(step), 512)
        for actual in kernels:
            length = actual.shape[-1]
            error = np.abs(actual[i] - whole[:length]).max() / np.abs(whole[:length]).max()
            assert error <= 1e-6, (float(step), length, error)


def test_short_kernels_and_no_rank():
    Lambda, P, B, C = parameters("fourier_diag", 8, 2, 0)
    for length in (1, 2, 3):
        actual = np.asarray(kernel_of(Lambda, P, B, C, 0.1, length=length))
        expected = naive_kernel(*(x[0].astype(complex) for x in (Lambda, P, B, C)), 0.1, length)
        np.testing.assert_allclose(actual[0], expected, rtol=2e-6, atol=1e-6)
    one = kernel_of(Lambda[0], P[0], B[0], C[0], 0.1, length=3)
    np.testing.assert_allclose(one, actual[0], rtol=1e-6)


def naive_ssm(x):
    """Outputs and last state by dense matrices, step by step, differentiable."""
    Lambda, P, B, C, step, state = (x[name] for name in ("Lambda", "P", "B", "C", "step", "initial_state"))
    P = P if P.ndim == 3 else P[None]
    pair = lambda a: jnp.concatenate([a, a.conj()], -1)  # noqa: E731
    A = jax.vmap(jnp.diag)(pair(Lambda)) - jnp.einsum("rdi,rdj->dij", pair(P), pair(P).conj())
    eye, h = jnp.eye(A.shape[-1])[None], (step / 2)[:, None, None]
    inverse = jnp.linalg.inv(eye - h * A)
    A_bar, B_bar = inverse @ (eye + h * A), jnp.einsum("dij,dj->di", inverse, pair(B)) * step[:, None]

    def advance(s, u):
        s = jnp.einsum("dij,bdj->bdi", A_bar, s) + B_bar[None] * u[..., None]
        return s, jnp.sum(pair(C)[None] * s, -1).real + x["D"][None] * u

    state, y = jax.lax.scan(advance, pair(state), jnp.moveaxis(x["u"], 1, 0))
    return jnp.moveaxis(y, 0, 1), state[..., : Lambda.shape[-1]]


def layer(measure, size, length, width=3, batch=2):
    rng = np.random.default_rng(7)
    Lambda, P, B, C = parameters(measure, size, width, 1, seed=1)
    state = rng.normal(size=(batch, width, size // 2)) + 1j * rng.normal(size=(batch, width, size // 2))
    return {
        "u": rng.normal(size=(batch, length, width)).astype(np.float32),
        "Lambda": Lambda, "P": P, "B": B, "C": C,
        "D": rng.normal(size=width).astype(np.float32),
        "step": np.float32([0.05, 0.1, 0.3])[:width],
        "initial_state": state.astype(np.complex64),
    }  # fmt: skip


@pytest.mark.parametrize("measure, size, length", [("legs", 16, 200), ("legt", 6, 33)])
def test_both_modes_are_the_dense_recurrence(measure, size, length):
    """Values and gradients by every parameter, the initial state and through the last one; float32 and float64."""
    x = layer(measure, size, length)
    expected = checks.oracle(naive_ssm, x)
    modes = ("recurrence", "convolution")

    def run(x):
        calls = [functools.partial(dplr_ssm, mode=mode, return_state=True) for mode in modes]
        return [checks.value_and_grads(lambda x, call=call: call(**x), x) for call in calls]

    for mode, (out, grads) in zip(modes, jax.jit(run)(x)):
        checks.assert_close(out, expected[0], 5e-6, mode)
        checks.assert_close(grads, expected[1], 2e-5 if mode == "recurrence" else 5e-6, f"gradient of {mode}")
    with checks.x64():
        for mode, wide in zip(modes, jax.jit(run)(checks.widened(x))):
            checks.assert_close(wide, expected, 1e-12, f"{mode} in float64")


compiled = jax.jit(dplr_ssm, static_argnames=("mode", "reverse", "return_state"))


def test_resume_reverse_and_segments():
    x = layer("legs", 8, 24)
    run = functools.partial(compiled, mode="recurrence", return_state=True)
    whole, last = run(**x)
    whole = np.asarray(whole)
    first, state = run(**{**x, "u": x["u"][:, :9]})
    second, state = run(**{**x, "u": x["u"][:, 9:], "initial_state": state})
    checks.assert_close(np.concatenate([first, second], 1), whole, 1e-6)
    checks.assert_close(state, last, 1e-6)
    for mode in ("recurrence", "convolution"):
        back, start = compiled(**{**x, "u": x["u"][:, ::-1]}, mode=mode, reverse=True, return_state=True)
        checks.assert_close(np.asarray(back)[:, ::-1], whole, 2e-6)
        checks.assert_close(start, last, 2e-6)
    ids = np.repeat(np.int32([[0, 1, 0], [5, 5, 2]]), 8, axis=1)
    packed, state = map(np.asarray, compiled(**x, segment_ids=ids, return_state=True))
    none = {**x, "initial_state": None}
    for row, (begin, end) in ((0, (8, 16)), (0, (16, 24)), (1, (16, 24))):
        alone, end_state = run(**{**none, "u": x["u"][row : row + 1, begin:end]})
        checks.assert_close(packed[row : row + 1, begin:end], alone, 1e-6)
    checks.assert_close(state[row : row + 1], end_state, 1e-6)
    reverse = compiled(**{**x, "u": x["u"][:, ::-1]}, segment_ids=ids[:, ::-1], reverse=True)
    checks.assert_close(np.asarray(reverse)[:, ::-1], packed, 1e-6)


def test_shapes_and_dtypes():
    x = layer("legs", 8, 12)
    state = x.pop("initial_state")
    y, last = compiled(**{**x, "u": x["u"][:, :0]}, initial_state=state, return_state=True)
    assert y.shape == (2, 0, 3)
    np.testing.assert_array_equal(last, state)
    expected = np.asarray(compiled(**x, mode="convolution"))
    deep = compiled(**{**x, "u": x["u"].reshape(2, 1, 12, 3)}, mode="convolution")
    checks.assert_close(np.asarray(deep)[:, 0], expected, 1e-6)
    flat = compiled(**{**x, "u": x["u"][0]}, mode="convolution")
    checks.assert_close(flat, expected[0], 1e-6)
    half = compiled(**{**x, "u": x["u"].astype(jnp.bfloat16)})
    assert half.dtype == jnp.bfloat16
    checks.assert_close(np.asarray(half, np.float32), expected, 1e-2)
    many = jax.jit(jax.vmap(lambda u: dplr_ssm(**{**x, "u": u})))(x["u"])
    checks.assert_close(many, expected, 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"Lambda": np.ones((3, 4), np.float32)}, "Lambda must be complex"),
        ({"B": np.ones((3, 5), np.complex64)}, r"B must have the shape of Lambda \(3, 4\); got \(3, 5\)"),
        ({"P": np.ones((3, 3, 4), np.complex64)}, "axis of rank 1 or 2"),
        ({"step": np.ones(2, np.float32)}, r"step must be a scalar or have shape \(D,\) = \(3,\)"),
        ({"u": np.ones((2, 12, 4), np.float32)}, "u must have shape"),
        ({"D": np.ones(2, np.float32)}, "D must have shape"),
        ({"initial_state": np.ones((2, 3, 3), np.complex64)}, "initial_state must have shape"),
        ({"mode": "convolve"}, "mode='convolve' is unknown; did you mean 'convolution'"),
        ({"mode": "convolution", "segment_ids": np.zeros((2, 12), int)}, "segment_ids need mode='recurrence'"),
        ({"segment_ids": np.zeros((2, 11), int)}, "segment_ids must be integers of shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        dplr_ssm(**{**layer("legs", 8, 12), **change})
    with pytest.raises(ValueError, match="length must be a positive int"):
        dplr_kernel(*(np.ones(2, np.complex64),) * 4, 0.1, 0)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_both_modes_lower(platform):
    x = layer("legs", 8, 12)
    for mode in ("recurrence", "convolution"):
        run = lambda x, mode=mode: dplr_ssm(**x, mode=mode, return_state=True)  # noqa: E731
        exported = export.export(jax.jit(lambda x, run=run: checks.value_and_grads(run, x)), platforms=[platform])(x)
        text = exported.mlir_module()
        assert "complex<f64>" not in text and "tensor<f64>" not in text


# The convolution itself


def test_fft_convolution():
    """Against the sum; kernels longer and shorter than the row, real and complex, no batch axis, nothing at all."""
    rng = np.random.default_rng(0)

    @jax.jit
    def convolve(u, k):
        kernels = k, k + 1j * k[::-1]
        return [(fft_convolution(u, x), fft_convolution(u[0], x[:, :1])) for x in kernels]

    for length, taps in ((1, 1), (5, 9), (30, 7), (31, 31)):
        u, k = rng.normal(size=(2, length, 3)).astype(np.float32), rng.normal(size=(taps, 3)).astype(np.float32)
        for kernel, (actual, single) in zip((k, k + 1j * k[::-1]), jax.tree.map(np.asarray, convolve(u, k))):
            expected = np.zeros((2, length, 3), kernel.dtype)
            for lag in range(min(length, taps)):
                expected[:, lag:] += kernel[lag] * u[:, : length - lag]
            assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, atol=1e-5)
            np.testing.assert_allclose(single[:, 0], expected[0, :, 0], atol=1e-5)
    assert fft_convolution(u[:, :0], k).shape == (2, 0, 3)
    assert not np.any(jax.jit(fft_convolution)(u, k[:0]))
    assert jax.jit(fft_convolution)(u.astype(jnp.bfloat16), k).dtype == jnp.bfloat16
    for mistake, message in (((u[0, 0], k), "inputs must have shape"), ((u, k[:, :2]), "kernel must have shape")):
        with pytest.raises(ValueError, match=message):
            fft_convolution(*mistake)
