"""The derivative rule of the kernels (`_derivatives.with_backward`) on a function small enough to see: every order, map and transformation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn_jax._derivatives import with_backward
from tests.laws.checks import assert_close


def plain(arrays, keep):
    x, w = arrays
    return {"y": jnp.tanh(x @ w) * keep, "sum": jnp.sum(x * x, axis=-1)}


def backward(arrays, keep, out, cotangents):
    x, w = arrays
    slope = (keep - out["y"] ** 2) * cotangents["y"]  # keep is 0 or 1
    return slope @ w.T + 2 * x * cotangents["sum"][..., None], x.T @ slope


RULE = with_backward(plain, plain, backward)


def loss(function, x, w, keep):
    out = function((x, w), keep)
    return jnp.sum(jnp.sin(out["y"])) + jnp.sum(out["sum"] ** 3)


ours, expected = functools.partial(loss, RULE), functools.partial(loss, plain)


@pytest.fixture
def arguments(x64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 2)), rng.normal(size=(2, 4)), np.array([[1, 0, 1, 1]])


ORDERS = [modes for order in (1, 2) for modes in itertools.product(("fwd", "rev"), repeat=order)]


@pytest.mark.parametrize("modes", [*ORDERS, ("rev", "fwd", "rev")], ids="-".join)
def test_derivatives_of_every_order(arguments, modes):
    ways = {"fwd": jax.jacfwd, "rev": jax.jacrev}

    def derivative(function):
        for mode in modes:
            function = ways[mode](function, argnums=(0, 1))
        return function

    if len(modes) == 1:  # outside jit too
        assert_close(derivative(ours)(*arguments), jax.jit(derivative(expected))(*arguments), 1e-11)
    both = jax.jit(lambda *arguments: (derivative(ours)(*arguments), derivative(expected)(*arguments)))
    assert_close(*both(*arguments), 1e-11)


def test_reverse_mode_runs_the_backward_pass_and_traces_no_other(arguments):
    def twice(*args):
        return jax.tree.map(lambda ct: 2 * ct, backward(*args))

    def untraced(*_):
        raise AssertionError("the plain form was traced")

    doubled = functools.partial(loss, with_backward(plain, untraced, twice))
    both = jax.jit(lambda *arguments: [jax.grad(f, argnums=(0, 1))(*arguments) for f in (doubled, expected)])
    gradient, single = both(*arguments)
    assert_close(gradient, [2 * np.asarray(g) for g in single], 1e-12)
    with pytest.raises(AssertionError, match="the plain form was traced"):
        jax.jacfwd(doubled)(*arguments)


@pytest.mark.parametrize("axes", [(0, None), (1, 0)], ids=str)
@pytest.mark.parametrize("way", [jax.grad, jax.hessian], ids=lambda way: way.__name__)
def test_batches(arguments, way, axes):
    """Both in and around the derivative, two deep, and with an operand that has no batch."""
    x, w, keep = arguments
    x, w = (a if axis is None else np.stack([a, 2 * a, -a], axis) for a, axis in zip((x, w), axes))
    xs, ws = (a if axis is None else np.stack([a, a + 1]) for a, axis in zip((x, w), axes))
    outer = tuple(axis if axis is None else 0 for axis in axes)

    def around(function):
        return jax.vmap(jax.vmap(way(function), (*axes, None)), (*outer, None))

    def inside(function):
        return way(lambda *args: jnp.sum(jax.vmap(function, (*axes, None))(*args)))

    @jax.jit
    def run(x, w, xs, ws):
        pairs = [[around(function)(xs, ws, keep), inside(function)(x, w, keep)] for function in (ours, expected)]
        return tuple(pairs)

    assert_close(*run(x, w, xs, ws), 1e-11)


def test_batches_that_an_explicit_mesh_shards(arguments):
    """Beside an operand without a batch, whose tangents have one."""
    x, w, keep = arguments
    x = np.stack([x, 2 * x])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        actual = jax.jit(jax.vmap(jax.grad(ours, (0, 1)), (0, None, None)))(placed, w, keep)
        assert all(jax.typeof(leaf).sharding.spec[0] == "data" for leaf in actual)
    assert_close(actual, jax.jit(jax.vmap(jax.grad(expected, (0, 1)), (0, None, None)))(x, w, keep), 1e-12)


@pytest.mark.parametrize("way", [jax.grad, jax.hessian], ids=lambda way: way.__name__)
def test_a_whole_operand_beside_a_sharded_one(arguments, way):
    """The gradient by what every device holds is the sum over the devices, once."""
    x, w, keep = np.concatenate([arguments[0], arguments[0][:1]]), *arguments[1:]

    def sharded(x, w, keep):
        part = jax.shard_map(
            lambda x, w, keep: jax.lax.psum(ours(x, w, keep), "data"),
            mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"), P(), P()),
            out_specs=P(),
        )
        return part(x, w, keep)

    both = jax.jit(lambda *arrays: (way(sharded, (0, 1))(*arrays), way(expected, (0, 1))(*arrays)))
    assert_close(*both(x, w, keep), 1e-11)


def test_other_transformations(arguments):
    x, w, keep = arguments

    def scanned(function, w):
        return jax.lax.scan(lambda carry, row: (carry + function(row[None], w * carry, keep), None), 1.0, x)[0]

    @jax.jit
    def run(x, w):
        saved, kept = (jax.grad(f, (0, 1))(x, w, keep) for f in (jax.checkpoint(ours), expected))
        loops = [jax.grad(scanned, 1)(function, w) for function in (ours, expected)]
        out, along = jax.linearize(lambda w: RULE((x, w), keep)["y"], w)
        (back,) = jax.linear_transpose(along, w)(out)
        pulled = jax.vjp(lambda w: plain((x, w), keep)["y"], w)[1](out)[0]
        of_sum = jax.grad(lambda x: jnp.sum(RULE((x, w), keep)["sum"]))(x)
        return (saved, kept), loops, (back, pulled), of_sum

    (saved, kept), loops, (back, pulled), of_sum = run(x, w)
    assert_close(saved, kept, 1e-12)
    assert_close(*loops, 1e-11)
    assert_close(back, pulled, 1e-12)
    assert_close(of_sum, 2 * x, 1e-12)
