"""Kernels called outside `jax.jit`: one program, the same answers and the same errors."""

import dataclasses
import functools
import logging
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax._compiled import NESTS, compiled, when_known
from effattn_jax.attention import cache, dot_product_attention
from tests.laws.subjects import SUBJECTS

WIDTH = 13  # which no other test has, so that nothing here is compiled already


@pytest.fixture
def programs(caplog):
    """`programs(function, *args)`: names of the programs that a call compiles."""

    def names(function, *args):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
            jax.block_until_ready(function(*args))
        words = [record.getMessage().split() for record in caplog.records]
        return [name[1].removeprefix("jit(").removesuffix(")") for name in words if name[0] == "Compiling"]

    return names


def scaled_sum(x, factor=1.0, *, twice=False, weights=None, shift=None, limit=None):
    """A kernel of several operations, which asks for numbers below a limit."""
    if not isinstance(twice, bool):
        raise ValueError(f"twice must be a bool; got {twice!r}")
    if limit is not None:
        when_known(functools.partial(below, limit), x)
    out = jnp.tanh(x) * factor * (2 if twice else 1)
    out = out if weights is None else out * weights.sum()
    return out if shift is None else shift(out)


def below(limit, x):
    if x.max() > limit:
        raise ValueError(f"x must lie below {limit}; got {x.max()}")


X = np.linspace(0, 1, WIDTH, dtype=np.float32)


def test_a_call_is_one_program_for_each_form(programs):
    kernel = compiled(scaled_sum)
    assert programs(kernel, X) == ["scaled_sum"]
    assert programs(kernel, 2 * X) == []
    assert programs(functools.partial(kernel, twice=True), X) == ["scaled_sum"]
    np.testing.assert_allclose(kernel(X, twice=True), 2 * np.tanh(X), rtol=1e-6)
    np.testing.assert_allclose(kernel(X, factor=3), 3 * np.tanh(X), rtol=1e-6)


def test_derivatives_are_programs_too(programs):
    kernel = compiled(scaled_sum)
    slope = jax.grad(lambda x: kernel(x).sum())
    slope(X)
    assert programs(slope, X + 1) == []
    np.testing.assert_allclose(slope(X), 1 - np.tanh(X) ** 2, rtol=1e-5)


def test_types_of_settings_count():
    kernel = compiled(scaled_sum)
    kernel(X, twice=True)
    with pytest.raises(ValueError, match="twice must be a bool; got 1"):
        kernel(X, twice=1)


def test_a_function_among_the_arguments_is_called_each_time():
    """What it reads may change between two calls."""
    kernel, by = compiled(scaled_sum), [1.0]
    for by[0] in (1.0, 2.0):
        np.testing.assert_allclose(kernel(X, shift=lambda out: out + by[0]), np.tanh(X) + by[0], rtol=1e-6)


def test_a_function_in_a_structure_is_called_each_time():
    """`jax.tree_util.Partial` has its function in its structure."""
    by = [1.0]

    def shift(add, out):
        return out + add * by[0]

    kernel = compiled(scaled_sum)
    for by[0] in (1.0, 2.0):
        out = kernel(X, shift=jax.tree_util.Partial(shift, jnp.ones(())))
        np.testing.assert_allclose(out, np.tanh(X) + by[0], rtol=1e-6)


def test_classes_of_one_structure_are_told_apart():
    """JAX takes the structures of two dataclasses with the same fields to be equal."""

    def made(name, power):
        return dataclasses.make_dataclass(
            name, [("scale", Any)], frozen=True, namespace={"__call__": lambda self, out: self.scale * out**power}
        )

    kernel = compiled(scaled_sum)
    for power in (1, 2):
        kind = jax.tree_util.register_dataclass(made(f"Power{power}", power), ["scale"], [])
        np.testing.assert_allclose(kernel(X, shift=kind(np.float32(3))), 3 * np.tanh(X) ** power, rtol=1e-6)


def test_numbers_of_numpy_are_settings_and_lists_are_data(programs):
    kernel = compiled(scaled_sum)
    assert programs(functools.partial(kernel, factor=np.float64(3)), X) == ["scaled_sum"]
    kernel = compiled(lambda x, weights: x * jnp.asarray(weights))
    kernel(X, [1.0] * WIDTH)
    assert programs(kernel, X, [2.0] * WIDTH) == []


def test_numbers_of_the_other_byte_order_are_refused_as_ever():
    """Once the program stands, `jax.jit` reads them as if they were of this one."""
    x = np.ones((1, 2, 1, 2), np.float32)
    for _ in range(2):
        dot_product_attention(x, x, x)
        with pytest.raises(ValueError, match="query"):
            dot_product_attention(*[x.astype(x.dtype.newbyteorder())] * 3)


def test_constants_stay_numpy_arrays():
    kinds = []

    def kernel(x, *, weights):
        kinds.append(type(weights))
        return x * weights

    held = compiled(kernel, constants=("weights",))
    weights = np.arange(WIDTH, dtype=np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(held(X, weights=weights.copy()), X * weights)
    assert kinds == [np.ndarray]
    weights[0] = 7
    np.testing.assert_array_equal(held(X, weights=weights), X * weights)
    np.testing.assert_array_equal(held(X, weights=jnp.asarray(weights)), X * weights)


def test_numbers_are_asked_about_at_each_call():
    kernel = compiled(scaled_sum)
    outer = compiled(lambda x: kernel(x, limit=1.5) + kernel(x, limit=3))
    for call in (functools.partial(kernel, limit=1.5), outer, functools.partial(scaled_sum, limit=1.5)):
        call(X)
        with pytest.raises(ValueError, match="x must lie below 1.5; got 2.0"):
            call(2 * X)
        call(X)
    with pytest.raises(ValueError, match=r"below 1\.5"):
        jax.value_and_grad(lambda w: kernel(2 * X, limit=1.5, weights=w).sum())(X)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.make_jaxpr], ids=["jit", "vmap", "make_jaxpr"])
def test_nobody_asks_where_numbers_stay_unknown(transform):
    kernel = compiled(scaled_sum)
    transform(functools.partial(kernel, limit=1.5))(2 * X)
    kernel(X, limit=1.5)  # and nothing of that trace is left


def test_what_is_known_to_a_program_is_asked_there():
    """A constant of the caller's program, in a kernel within a kernel and though that has been traced before."""
    kernel = compiled(scaled_sum)
    outer = compiled(lambda x: kernel(x, limit=1.5))
    jax.jit(outer)(X)
    jax.jit(lambda: outer(X))()
    with pytest.raises(ValueError, match="below 1.5"):
        jax.jit(lambda: outer(2 * X))()


def test_a_full_cache_is_an_error_in_a_program_that_knows_it():
    x = np.ones((1, 2, 1, 2), np.float32)
    full = cache(1, 2, 1, 2, 2)._replace(length=jnp.int32(2))
    with pytest.raises(ValueError, match="initial_state is full: 2 tokens"):
        jax.jit(lambda x: dot_product_attention(x, x, x, is_causal=True, initial_state=full))(x)


def test_errors_come_from_the_kernel():
    with pytest.raises(ValueError, match="twice") as caught:
        compiled(scaled_sum)(X, twice="yes")
    assert caught.value.__cause__ is None
    assert not getattr(caught.value, "__notes__", [])
    assert not [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "/jax/" in frame.filename]


def counted():
    """A kernel that adds 1, and what it was traced with."""
    traces = []

    def kernel(x):
        traces.append(x)
        return x + 1

    return compiled(kernel), traces


def test_in_a_program_equal_calls_are_one_function():
    """The first is written out, so a program of one call is what it would be without."""
    layer, traces = counted()
    steps = np.arange(WIDTH)
    np.testing.assert_array_equal(jax.jit(lambda x: layer(layer(layer(layer(x)))))(steps), steps + 4)
    assert len(traces) == (2 if NESTS else 4)
    assert "jit" not in str(jax.make_jaxpr(layer)(steps))


def test_other_traces_between_equal_calls_do_not_hide_them():
    layer, traces = counted()

    @jax.jit
    def model(x):
        for scale in range(4):
            x = jax.lax.fori_loop(0, 2, lambda _, y, scale=scale: layer(y) * scale, layer(x))
        return x

    jax.block_until_ready(model(np.arange(WIDTH)))
    assert len(traces) == (6 if NESTS else 8)  # two in the model, and the one in each loop


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_every_member_is_one_program(subject, programs):
    """Where nothing is compiled yet, a call outside `jax.jit` waits for one program; a further one for none."""
    inputs = subject.inputs(length=WIDTH, batch=3)
    subject.weights(inputs)  # drawn once
    function = subject.function
    while isinstance(function, functools.partial):
        function = function.func
    assert programs(subject.call, inputs) == [function.__name__]
    assert programs(subject.call, inputs) == []
