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
    return jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.normal(size=(2, 4))), jnp.asarray([[1, 0, 1, 1]])


ORDERS = [modes for order in (1, 2) for modes in itertools.product(("fwd", "rev"), repeat=order)]


@pytest.mark.parametrize("modes", [*ORDERS, ("rev", "fwd", "rev")], ids="-".join)
def test_derivatives_of_every_order(arguments, modes):
    compiled, ways = len(modes) == 2, {"fwd": jax.jacfwd, "rev": jax.jacrev}

    def derivative(function):
        for mode in modes:
            function = ways[mode](function, argnums=(0, 1))
        return jax.jit(function) if compiled else function

    assert_close(derivative(ours)(*arguments), derivative(expected)(*arguments), 1e-11)


def test_reverse_mode_runs_the_backward_pass_and_traces_no_other(arguments):
    def twice(*args):
        return jax.tree.map(lambda ct: 2 * ct, backward(*args))

    def untraced(*_):
        raise AssertionError("the plain form was traced")

    gradient = jax.jit(jax.grad(functools.partial(loss, with_backward(plain, untraced, twice)), argnums=(0, 1)))
    assert_close(gradient(*arguments), jax.tree.map(lambda g: 2 * g, jax.grad(expected, (0, 1))(*arguments)), 1e-12)
    with pytest.raises(AssertionError, match="the plain form was traced"):
        jax.jacfwd(functools.partial(loss, with_backward(plain, untraced, twice)))(*arguments)


@pytest.mark.parametrize("axes", [(0, None), (1, 0)], ids=str)
@pytest.mark.parametrize("way", [jax.grad, jax.hessian], ids=lambda way: way.__name__)
def test_batches(arguments, way, axes):
    """Both in and around the derivative, two deep, and with an operand that has no batch."""
    x, w, keep = arguments
    x, w = (a if axis is None else jnp.stack([a, 2 * a, -a], axis) for a, axis in zip((x, w), axes))
    xs, ws = (a if axis is None else jnp.stack([a, a + 1]) for a, axis in zip((x, w), axes))
    outer = tuple(axis if axis is None else 0 for axis in axes)

    def around(function):
        return jax.vmap(jax.vmap(way(function), (*axes, None)), (*outer, None))

    def inside(function):
        return way(lambda *args: jnp.sum(jax.vmap(function, (*axes, None))(*args)))

    assert_close(jax.jit(around(ours))(xs, ws, keep), around(expected)(xs, ws, keep), 1e-11)
    assert_close(jax.jit(inside(ours))(x, w, keep), inside(expected)(x, w, keep), 1e-11)


def test_batches_that_an_explicit_mesh_shards(arguments):
    """Beside an operand without a batch, whose tangents have one."""
    x, w, keep = arguments
    x = jnp.stack([x, 2 * x])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        actual = jax.jit(jax.vmap(jax.grad(ours, (0, 1)), (0, None, None)))(placed, w, keep)
        assert all(jax.typeof(leaf).sharding.spec[0] == "data" for leaf in actual)
    assert_close(actual, jax.vmap(jax.grad(expected, (0, 1)), (0, None, None))(x, w, keep), 1e-12)


@pytest.mark.parametrize("way", [jax.grad, jax.hessian], ids=lambda way: way.__name__)
def test_a_whole_operand_beside_a_sharded_one(arguments, way):
    """The gradient by what every device holds is the sum over the devices, once."""
    x, w, keep = jnp.concatenate([arguments[0], arguments[0][:1]]), *arguments[1:]

    def sharded(x, w, keep):
        part = jax.shard_map(
            lambda x, w, keep: jax.lax.psum(ours(x, w, keep), "data"),
            mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"), P(), P()),
            out_specs=P(),
        )
        return part(x, w, keep)

    assert_close(jax.jit(way(sharded, (0, 1)))(x, w, keep), way(expected, (0, 1))(x, w, keep), 1e-11)


def test_other_transformations(arguments):
    x, w, keep = arguments
    gradient = jax.grad(expected, (0, 1))(*arguments)
    assert_close(jax.grad(jax.checkpoint(ours), (0, 1))(*arguments), gradient, 1e-12)

    def scanned(function, w):
        return jax.lax.scan(lambda carry, row: (carry + function(row[None], w * carry, keep), None), 1.0, x)[0]

    assert_close(jax.grad(scanned, 1)(ours, w), jax.grad(scanned, 1)(expected, w), 1e-11)
    out, along = jax.linearize(lambda w: RULE((x, w), keep)["y"], w)
    (back,) = jax.linear_transpose(along, w)(out)
    assert_close(back, jax.vjp(lambda w: plain((x, w), keep)["y"], w)[1](out)[0], 1e-12)
    assert_close(jax.grad(lambda x: jnp.sum(RULE((x, w), keep)["sum"]))(x), 2 * x, 1e-12)
