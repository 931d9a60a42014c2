"""Selective scan, duality and the trapezoid beyond the laws: complex poles, gradients by weights, memory, and the layers in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import nn, ssm
from tests.laws import checks, state_space_references

NAMES = ("selective_scan", "state_space_duality", "mamba3_trapezoid", "rg_lru", "lru", "s5_ssm")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_weights(name):
    """In float64, across chunks and segments."""
    line, reference = ssm.MIXERS[name], state_space_references.STATE_SPACE_REFERENCES[name]
    ids = np.repeat([[3, 1], [2, 2]], [4, 7], axis=1).astype(np.int32)
    with checks.x64():
        weights = checks.widened(line.weights(np.random.default_rng(0)))
        inputs = checks.widened(line.sample(np.random.default_rng(1), 2, 11, np.float32))

        @jax.jit
        def both(weights, inputs):
            ours = functools.partial(line.function, **inputs, segment_ids=ids, **line.forms[-1])
            theirs = functools.partial(reference, inputs, segment_ids=ids)
            return [checks.value_and_grads(lambda w, f=f: f(**w), weights) for f in (ours, theirs)]

        checks.assert_close(*both(weights, inputs), 1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_griffin_s_gate_at_small_steps(dtype, x64):
    """sqrt(1 - a^2) is exact however near to 1 a is, and its slope down to epsilon; at a = 1 both orders of derivatives are finite."""
    ones = np.ones((1, 1, 1), dtype)
    rate = 8 * np.log1p(np.exp(-6.0))
    call = functools.partial(ssm.rg_lru, ones, ones, ones)

    @jax.jit
    def derivatives(step):
        value = lambda step: call(np.full(1, -6, dtype), step=step).sum()  # noqa: E731
        return value(step), jax.grad(value)(step), jax.hessian(value)(step)

    for step in (1.0, 1e-3, 1e-6, 1e-12, 0.0):
        exact = np.sqrt(-np.expm1(-2 * rate * step))
        gate, slope, bend = derivatives(dtype(step))
        np.testing.assert_allclose(gate, exact, rtol=10 * np.finfo(dtype).eps)
        assert np.isfinite(slope) and np.isfinite(bend)
        if exact**2 > np.finfo(dtype).eps:
            np.testing.assert_allclose(slope, rate * np.exp(-2 * rate * step) / exact, rtol=1e-5)


def test_complex_poles_of_a_selective_scan():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape) + 1j * rng.normal(size=shape)

    inputs = {
        "u": rng.normal(size=(2, 11, 3)),
        "delta": rng.random((2, 11, 3)),
        "B": draw(2, 11, 4),
        "C": draw(2, 11, 4),
    }
    weights = {"A": -np.exp(rng.normal(size=(3, 4))) + 1j * rng.normal(size=(3, 4)), "D": rng.normal(size=3)}
    with checks.x64():

        def ours(x):
            return ssm.selective_scan(**x, reverse=True, chunk_size=4)

        def reference(x):
            given = {name: x[name] for name in inputs}
            return state_space_references.selective_scan(given, A=x["A"], D=x["D"], reverse=True)

        both = jax.jit(lambda x: [checks.value_and_grads(function, x) for function in (ours, reference)])
        checks.assert_close(*both(inputs | weights), 1e-12)


def test_memory_of_a_selective_scan():
    """Mamba's shape, 512 channels of 16 states at T = 4,096: a trajectory of states would be 134 MB."""
    shapes = {"u": (1, 4096, 512), "delta": (1, 4096, 512), "B": (1, 4096, 16), "C": (1, 4096, 16), "A": (512, 16)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def both(arrays):
        out, pull = jax.vjp(lambda x: ssm.selective_scan(**x), arrays)
        return out, pull(arrays["u"])

    assert jax.jit(both).lower(arrays).compile().memory_analysis().temp_size_in_bytes <= 20e6


def test_groups_and_head_mistakes():
    ones = np.ones((1, 3, 4, 2), np.float32)
    with pytest.raises(ValueError, match="the groups of B must divide the heads of x; got N=4, K=3"):
        ssm.state_space_duality(ones, ones[..., 0], np.ones(4), ones[:, :, :3], ones[:, :, :3])
    with pytest.raises(ValueError, match="initial_state must be the TrapezoidState"):
        ssm.mamba3_trapezoid(*(ones, ones[..., 0], -np.ones(4), ones, ones, ones[..., 0]), initial_state=ones)
    with pytest.raises(ValueError, match="D must have shape"):
        jax.eval_shape(lambda: ssm.state_space_duality(ones, ones[..., 0], -np.ones(4), ones, ones, np.ones(3)))


def dense(params, name, linear):
    """A PyTorch linear layer's weights as ours."""
    params[name] = {"kernel": linear.weight.detach().numpy().T} | (
        {} if linear.bias is None else {"bias": linear.bias.detach().numpy()}
    )


def convolution(params, conv):
    """A PyTorch depthwise convolution's weights, whose last tap is the newest step."""
    params["convolution"] = {"kernel": conv.weight.detach().numpy()[:, 0, ::-1].T}
    params["convolution_bias"] = conv.bias.detach().numpy()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_equal_to_transformers(name):
    """The slow path of transformers' PyTorch layers with random weights. To run it: pip install torch transformers."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    width, size, params = 32, 8, {}
    if name == "mamba":
        from transformers.models.mamba import configuration_mamba, modeling_mamba

        config = configuration_mamba.MambaConfig(hidden_size=width, state_size=size, num_hidden_layers=1)
        theirs = modeling_mamba.MambaMixer(config, layer_idx=0)
        layer = nn.Mamba(width, state_size=size)
        for ours, linear in (("select", theirs.x_proj), ("step", theirs.dt_proj)):
            dense(params, ours, linear)
    else:
        from transformers.models.mamba2 import configuration_mamba2, modeling_mamba2

        config = configuration_mamba2.Mamba2Config(
            hidden_size=width, state_size=size, num_heads=4, head_dim=16, n_groups=2, chunk_size=16, num_hidden_layers=1
        )  # fmt: skip
        theirs = modeling_mamba2.Mamba2Mixer(config, layer_idx=0)
        torch.nn.init.normal_(theirs.dt_bias)
        layer = nn.Mamba2(width, heads=4, groups=2, state_size=size)
        params["step_bias"] = theirs.dt_bias.detach().numpy()
        params["norm_scale"] = theirs.norm.weight.detach().numpy()
    dense(params, "in", theirs.in_proj)
    dense(params, "out", theirs.out_proj)
    convolution(params, theirs.conv1d)
    params |= {key: getattr(theirs, key).detach().numpy() for key in ("A_log", "D")}
    x = np.random.default_rng(0).normal(size=(2, 37, width)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    actual = layer.apply({"params": params}, x)
    checks.assert_close(actual, expected, 1e-5)
