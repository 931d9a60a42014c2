"""Explicit meshes where law 8 does not look: states carried from call to call, and arrays on every device beside sharded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn_jax import mixing, ssm
from tests.laws import checks

B, T, D, CUT = 4, 9, 8, 5
ROWS, BOTH = P("data"), P("data", None, "tensor")
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def in_two(function, x, *, axis=1, **rest):
    """Outputs and last state of two calls, the second from the state of the first."""
    head, tail = jnp.split(x, [CUT], axis)
    first, state = function(head, return_state=True, **rest)
    return first, *function(tail, return_state=True, initial_state=state, **rest)


def mixer(name):
    weights = mixing.MIXERS[name].weights(jax.random.key(0), D, T, 2)
    return functools.partial(in_two, mixing.MIXERS[name].function, is_causal=True, **jax.tree.map(np.asarray, weights))


def memory(measure):
    return functools.partial(in_two, lambda x, **state: ssm.hippo_project(x, measure, 3, step=0.1, **state), axis=0)


CASES = {
    "gmlp": (mixer("gmlp"), {"x": (normal(B, T, D), ROWS)}),
    "ffn_stack": (mixer("ffn_stack"), {"x": (normal(B, T, D), BOTH)}),
    "hippo, legs": (memory("legs"), {"x": (normal(T, B), P(None, "data"))}),
    "hippo, legt": (memory("legt"), {"x": (normal(T, B, 2), P(None, "data", "tensor"))}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case):
    function, inputs = CASES[case]

    def loss(arrays):
        return checks.value_and_grads(lambda arrays: function(**arrays), arrays)

    expected = jax.tree.map(np.asarray, loss({name: array for name, (array, _) in inputs.items()}))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(array, NamedSharding(mesh, spec)) for name, (array, spec) in inputs.items()}
        actual = jax.tree.map(np.asarray, loss(placed))
    checks.assert_close(actual[0], expected[0], checks.OUTPUT)
    checks.assert_close(actual[1], expected[1], checks.GRADIENT, "gradient")
