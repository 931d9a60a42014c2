"""Explicit meshes where law 8 does not look: states carried from call to call, and arrays on every device beside sharded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effattn_jax import attention, mixing, position, ssm
from tests.laws import checks
from tests.laws.subjects import SUBJECTS

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
    weights = jax.jit(lambda key: mixing.MIXERS[name].weights(key, D, T, 2))(jax.random.key(0))
    return functools.partial(in_two, mixing.MIXERS[name].function, is_causal=True, **jax.tree.map(np.asarray, weights))


def memory(measure):
    return functools.partial(in_two, lambda x, **state: ssm.hippo_project(x, measure, 3, step=0.1, **state), axis=0)


def selective(delta, A, **arrays):
    return ssm.selective_scan(delta=jnp.abs(delta), A=-jnp.abs(A), chunk_size=4, **arrays)


def duality(delta, A, **arrays):
    return ssm.state_space_duality(delta=jnp.abs(delta), A=-jnp.abs(A), chunk_size=4, **arrays)


def dplr(u, poles, step):
    return in_two(
        lambda u, **state: ssm.dplr_ssm(u, -jnp.exp(poles), poles, poles, poles, None, jnp.exp(step), **state), u
    )


def grouped(name, key, **arrays):
    form = {"is_causal": True, "implementation": "chunked", "chunk_size": 5}
    return attention.MIXERS[name].function(key=key, value=jnp.sin(key), **arrays, **form)


def tupe(x, table, first):
    tables = {"position_query": table, "position_key": jnp.sin(table), "first_token": first}
    return position.tupe_attention(x, x, x, **tables, is_causal=True)


SHARED = {name: (normal(B, T, 3), ROWS) for name in "BC"}  # on every device of "tensor"
CASES = {
    "gmlp": (mixer("gmlp"), {"x": (normal(B, T, D), ROWS)}),
    "ffn_stack": (mixer("ffn_stack"), {"x": (normal(B, T, D), BOTH)}),
    "hippo, legs": (memory("legs"), {"x": (normal(T, B), P(None, "data"))}),
    "hippo, legt": (memory("legt"), {"x": (normal(T, B, 2), P(None, "data"))}),
    "selective": (
        selective,
        {name: (normal(B, T, 4), BOTH) for name in ("u", "delta")} | {"A": (normal(4, 3), P("tensor"))} | SHARED,
    ),
    "duality": (
        duality,
        {"x": (normal(B, T, 2, 3), BOTH), "delta": (normal(B, T, 2), BOTH), "A": (normal(2), P("tensor"))}
        | {name: (normal(B, T, 1, 3), ROWS) for name in "BC"},
    ),
    "dplr": (
        dplr,
        {
            "u": (normal(B, T, 2), BOTH),
            "poles": (normal(2, 3) + 1j * normal(2, 3), P("tensor")),
            "step": (normal(2), P("tensor")),
        },
    ),
    **{
        f"{name}, {heads} heads of {keys}": (
            functools.partial(grouped, name),
            {"query": (normal(B, T, heads, 4), BOTH), "key": (normal(B, T, keys, 4), ROWS)} | more,
        )
        for name, heads, keys, more in (
            ("linear", 2, 1, {}),
            ("linear", 4, 2, {}),
            ("softmax", 2, 1, {}),
            ("softmax", 4, 2, {}),
            ("gated_linear", 2, 1, {"log_decay": (-abs(normal(B, T, 2)), BOTH)}),
        )
    },
    "tupe": (
        tupe,
        {
            "x": (normal(B, T, 2, 4), BOTH),
            "table": (normal(T, 2, 3), P(None, "tensor")),
            "first": (normal(2, 2), P("tensor")),
        },
    ),
}
# jax 0.7 has no sharding for a tangent of zeros that it concatenates, nor for the chunks of an array with an axis of size 1: no gradients there.
VALUES_ONLY = {"hippo, legs", "linear, 2 heads of 1"} if jax.__version_info__ < (0, 8) else set()


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case):
    checks.assert_sharding_changes_nothing(*CASES[case], ("data", "tensor"), gradients=case not in VALUES_ONLY)


@pytest.mark.parametrize("name", ["gated_linear", "synthesizer_dense", "fixed", "sparse"])
def test_one_packed_row_of_whole_chunks_on_an_axis_of_one_device(name):
    """Axes of size 1 on a mesh axis of one device, whose name JAX's types would lose on the way."""
    subject = next(subject for subject in SUBJECTS if subject.name == name)
    form = next(form for form in subject.kinds if "chunk_size" in form)
    inputs = {name: (array, P("data", None, "tensor")) for name, array in subject.inputs(length=T, batch=1).items()}
    inputs["segment_ids"] = np.array([[0] * CUT + [1] * (T - CUT)], np.int32), ROWS
    inputs["mask"] = np.arange(T)[None, None, None] != 2, ROWS

    def whole(mask, segment_ids, **arrays):
        return subject.call(arrays, mask=mask, segment_ids=segment_ids, **form)

    checks.assert_sharding_changes_nothing(whole, inputs, ("data", "tensor"), shape=(1, 2))


def test_one_row_on_an_axis_of_one_device():
    """It stays where it lies, and so do its gradients, beside weights of features that are summed over rows."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:1])
    rows = jax.sharding.NamedSharding(mesh, ROWS)
    x, delta, b, c = (jnp.asarray(normal(1, *shape)) for shape in ((T, 2, 3), (T, 2), (T, 1, 3), (T, 1, 3)))
    weights = (-jnp.ones(2), jnp.arange(1.0, 3))  # A and D

    def both(x, delta, b, c, weights):
        def run(x, weights):
            return ssm.state_space_duality(x, jax.nn.softplus(delta), weights[0], b, c, weights[1])

        out, pull = jax.vjp(run, x, weights)
        return out, pull(jnp.cos(out))

    expected = jax.jit(both)(x, delta, b, c, weights)
    with jax.set_mesh(mesh):
        out, (slope, slopes) = jax.jit(both)(*(jax.device_put(a, rows) for a in (x, delta, b, c)), weights)
    assert out.sharding.spec[0] == slope.sharding.spec[0] == "data"
    checks.assert_close((out, (slope, slopes)), expected, checks.OUTPUT)
