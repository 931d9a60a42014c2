"""Every JAX transformation as a check that a member passes or not; `table` writes the outcome into the documentation.

Each check takes the same call, as hard as the contract allows: packed segments, a key mask for mixers, several chunks and a ragged
one, and (all but the derivative checks and the scan) split in two with the state handed on: members with loops of their own, and all recurrences.
Its docstring is its line in the legend of the generated table.
"""

import functools
import re
from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.export  # jax 0.7 does not import it by itself
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import checks
from .subjects import EVERYTHING, Subject, slice_key, time_slice

LENGTH, SPLIT = 11, 5
PATTERNS = ("mask", "segment_ids")
CHECKS: dict[str, Callable] = {}
BRIEF = ("one compile", "Explicit mesh", "export")  # the checks of a member that runs on another's loops
BY_FORM: set[str] = set()  # checks whose outcome may differ between the implementations of a member
OFTEN = ("vmap", "Explicit mesh", "export")  # those of them that are made of every implementation without LAWS=all too


def check(name: str, *, by_form: bool = False):
    """Enters a check under the name it has in the table."""

    def enter(function):
        CHECKS[name] = function
        if by_form:
            BY_FORM.add(name)
        return function

    return enter


def names_of(subject: Subject) -> tuple[str, ...]:
    """The checks that a test run makes of a member; `table` makes all of every member."""
    return BRIEF if subject.brief else tuple(CHECKS)


def kinds_of(subject: Subject) -> tuple[dict, ...]:
    """One form of each implementation, with a state where there is one."""
    return subject.stateful_kinds if subject.causal else subject.kinds


def forms_of(subject: Subject, name: str) -> tuple[dict, ...]:
    """The forms that a check runs over: one of each implementation, or the last of these, which is the chunked one.

    None for shards of channels where the channels of a member meet, or where it tells them apart by their number.
    """
    if name == "shard_map, heads" and (not subject.independent_channels or "shards of heads" in subject.exempt):
        return ()
    return kinds_of(subject) if name in (BY_FORM if EVERYTHING else OFTEN) else kinds_of(subject)[-1:]


@functools.cache
def plain_program(subject: Subject, form_index: int):
    """Values and gradients on one device, one compiled program for all checks that run the same call in another way; and its traces."""
    call, traces = call_of(subject, kinds_of(subject)[form_index]), []

    def run(inputs):
        traces.append(None)
        return checks.value_and_grads(call, inputs)

    return jax.jit(run), traces


def plain(subject: Subject, form: dict, inputs: dict):
    return jax.tree.map(np.asarray, plain_program(subject, kinds_of(subject).index(form))[0](inputs))


@functools.cache
def _of_sample(subject: Subject, form_index: int):
    return plain(subject, kinds_of(subject)[form_index], sample(subject))


def expected_of(subject: Subject, form: dict):
    """Values and gradients of `sample`."""
    return _of_sample(subject, kinds_of(subject).index(form))


def sample(subject: Subject, *, batch=8) -> dict:
    """Inputs, key mask and segment ids of one call, whose batch and whose axis after time divide among eight devices."""
    inputs = subject.inputs(length=LENGTH, batch=batch)
    copies = 2 if subject.independent_channels else 1
    inputs = {name: np.concatenate([array] * copies, axis=2) for name, array in inputs.items()}
    rng = np.random.default_rng(7)
    inputs["segment_ids"] = np.sort(rng.integers(0, 3, (batch, LENGTH)), axis=1).astype(np.int32)
    if subject.is_mixer or subject.is_token_mixer:
        inputs["mask"] = rng.random((batch, 1, 1, LENGTH)) < 0.8
    return inputs


def cuts_of(subject: Subject) -> tuple[int, ...]:
    """Where a brief member's state is that of the frame it shares, and knows its segment, one call will do, in half the program."""
    return (0, LENGTH) if subject.brief and subject.carries_ids else (0, SPLIT, LENGTH)


def call_of(subject: Subject, form: dict, cuts: tuple[int, ...] | None = None) -> Callable:
    """f(inputs, weights): two calls, the second from the state of the first; one call where there is no state. Weights stand for its own."""
    cuts = cuts or cuts_of(subject)

    def whole(inputs, weights=MappingProxyType({})):
        known = ("mask",) if subject.is_mixer else PATTERNS  # without causality a mixer has no segments
        patterns = {name: inputs[name] for name in known if name in inputs}
        arrays = {name: a for name, a in inputs.items() if name not in PATTERNS}
        return subject.call(arrays, **patterns, **form, **weights)

    def call(inputs, weights=MappingProxyType({})):
        outputs, state = [], None
        for start, stop in zip(cuts, cuts[1:]):
            patterns = {name: slice_key(inputs[name], start, stop) for name in PATTERNS if name in inputs}
            arrays = time_slice({name: a for name, a in inputs.items() if name not in PATTERNS}, start, stop)
            output, state = subject.call(arrays, initial_state=state, return_state=True, **patterns, **form, **weights)
            outputs.append(output)
        return jnp.concatenate(outputs, axis=1)

    return call if subject.causal else whole


def rolled(inputs: dict, shift: int = 1) -> dict:
    """The same rows in another order."""
    return jax.tree.map(lambda a: np.roll(a, shift, axis=0), inputs)


def stacked(trees) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@check("jit", by_form=True)
def jit(subject, form):
    """compiled equals eager"""
    call, inputs = call_of(subject, form), sample(subject)
    checks.assert_close(call(inputs), expected_of(subject, form)[0], checks.OUTPUT)


@check("one compile")
def one_compile(subject, form):
    """one trace and one program for all calls of one shape, whatever the numbers, masks and ids"""
    (function, traces), inputs = plain_program(subject, kinds_of(subject).index(form)), sample(subject)
    function(inputs)
    programs = function._cache_size()  # other checks may have called it with arrays placed otherwise
    for shift in (1, 2):
        function(rolled(inputs, shift))
    assert len(traces) == 1 and function._cache_size() == programs


@functools.cache
def problem(subject: Subject, form_index: int):
    """In float64: (real and complex inputs, a scalar loss of them, random directions), then compiled: the loss, its gradient."""
    floats, rebuild = checks.split_floats(checks.widened(sample(subject, batch=2)))
    call, rng = call_of(subject, kinds_of(subject)[form_index], (0, LENGTH)), np.random.default_rng(3)

    def loss(floats):
        return checks.probe(jnp.tanh(call(rebuild(floats))))

    tangents = [
        rng.normal(size=x.shape) + (1j * rng.normal(size=x.shape) if x.dtype.kind == "c" else 0) for x in floats
    ]
    tangents = [jnp.asarray(t, x.dtype) for t, x in zip(tangents, floats)]
    return [jnp.asarray(x) for x in floats], loss, tangents, jax.jit(loss), jax.jit(jax.grad(loss))


def problem_of(subject: Subject, form: dict):
    return problem(subject, kinds_of(subject).index(form))


def difference(function, floats, tangents, step=1e-6):
    """The central difference of a compiled function along the tangents."""
    ahead, behind = (function([x + s * step * t for x, t in zip(floats, tangents)]) for s in (1, -1))
    return jax.tree.map(lambda a, b: np.asarray(a - b) / (2 * step), ahead, behind)


def along(slopes, tangents):
    """The derivative along the tangents, from the slopes."""
    return sum(jnp.sum(jnp.real(slope * tangent)) for slope, tangent in zip(slopes, tangents))


@check("grad")
def grad(subject, form):
    """compiled gradients equal central differences in float64"""
    with checks.x64():
        floats, _, tangents, loss, gradient = problem_of(subject, form)
        expected = difference(loss, floats, tangents)
        np.testing.assert_allclose(along(gradient(floats), tangents), expected, rtol=1e-6)


@check("jvp")
def jvp(subject, form):
    """forward mode equals central differences in float64, and reverse mode to 1e-12"""
    with checks.x64():
        floats, plain_loss, tangents, loss, gradient = problem_of(subject, form)
        value, forward = jax.jit(lambda x, t: jax.jvp(plain_loss, (x,), (t,)))(floats, tangents)
        np.testing.assert_allclose(forward, along(gradient(floats), tangents), rtol=1e-10)
        np.testing.assert_allclose(forward, difference(loss, floats, tangents), rtol=1e-6)
        np.testing.assert_allclose(value, loss(floats), rtol=1e-12)


@check("grad of grad")
def second_order(subject, form):
    """Hessian-vector products, reverse over reverse and forward over reverse, equal differences of the gradient in float64"""
    with checks.x64():
        floats, plain_loss, tangents, loss, gradient = problem_of(subject, form)

        def curved(x):
            return plain_loss(x) ** 2

        def slope_along(x):
            return along(jax.grad(curved)(x), tangents)

        def curved_gradient(x):
            return [2 * loss(x) * slope for slope in gradient(x)]

        mixed = jax.jit(lambda x, t: jax.jvp(jax.grad(curved), (x,), (t,))[1])(floats, tangents)
        expected = difference(curved_gradient, floats, tangents, step=1e-5)
        checks.assert_close(mixed, expected, 1e-6)
        if not any(jnp.iscomplexobj(x) for x in floats):
            twice_reverse = jax.jit(jax.grad(slope_along))(floats)
            checks.assert_close(twice_reverse, expected, 1e-6)


@check("vmap", by_form=True)
def vmap(subject, form):
    """an added axis in front, or an inner axis of one input alone, in values and gradients"""
    call = call_of(subject, form)
    rows = [sample(subject), rolled(sample(subject))]
    expected = [plain(subject, form, row) for row in rows]
    gradients = jax.jit(jax.vmap(lambda row: checks.value_and_grads(call, row)))(stacked(rows))
    checks.assert_same(gradients, jax.tree.map(lambda *leaves: np.stack(leaves), *expected))
    name = [name for name in rows[0] if name not in PATTERNS][-1]
    one = np.stack([rows[0][name], rows[1][name]], axis=2)
    axes = {other: 2 if other == name else None for other in rows[0]}
    output = jax.jit(jax.vmap(call, in_axes=(axes,), out_axes=1))(rows[0] | {name: one})
    checks.assert_close(output[:, 0], expected[0][0], checks.OUTPUT)


@check("remat")
def remat(subject, form):
    """`jax.checkpoint` around the call, gradients unchanged"""
    call, inputs = call_of(subject, form), sample(subject)
    checks.assert_same(checks.value_and_grads(jax.checkpoint(call), inputs), expected_of(subject, form))


@check("scan")
def scan(subject, form):
    """`lax.scan` over layers, with and without remat, gradients equal a Python loop's"""
    call, layers = call_of(subject, form, (0, LENGTH)), stacked([sample(subject)] * 2)

    def layer(carry, inputs):
        scaled = {
            name: array if name in PATTERNS else array * (1 + 0.1 * jnp.tanh(carry)) for name, array in inputs.items()
        }
        output = call(scaled)
        return jnp.mean(jnp.real(output)), output

    def looped(layers):
        carry, outputs = jnp.float32(0), []
        for index in range(2):
            carry, output = layer(carry, jax.tree.map(lambda a, index=index: a[index], layers))
            outputs.append(output)
        return jnp.stack(outputs)

    expected = checks.value_and_grads(looped, layers)
    for body in (layer, jax.checkpoint(layer)):
        scanned = functools.partial(jax.lax.scan, body, jnp.float32(0))
        checks.assert_same(checks.value_and_grads(lambda layers, scanned=scanned: scanned(layers)[1], layers), expected)


@check("pmap", by_form=True)
def pmap(subject, form):
    """eight devices, gradients inside"""
    call, devices = call_of(subject, form), jax.device_count()
    inputs = sample(subject, batch=8 * devices)
    split = jax.tree.map(lambda a: a.reshape(devices, 8, *a.shape[1:]), inputs)
    output, gradients = jax.pmap(lambda x: checks.value_and_grads(call, x))(split)
    one = [plain(subject, form, jax.tree.map(lambda a, i=i: a[i], split)) for i in (0, devices - 1)]
    for index, expected in zip((0, devices - 1), one):
        checks.assert_same((output[index], [gradient[index] for gradient in gradients]), expected)


def specs(subject: Subject, inputs: dict, batch: str | None, heads: str | None, time: str | None = None) -> dict:
    """Partition specs: the batch is axis 0 of everything, time axis 1 and heads (or channels that do not meet) axis 2 of the sequences."""
    heads = heads if subject.independent_channels else None
    return {name: P(batch) if name in PATTERNS else P(batch, time, heads) for name in inputs}


def weights_by_head(subject: Subject, inputs: dict, heads: str | None) -> tuple[dict, dict]:
    """A mixer's weights, which a shard of heads has its part of, and their specs: an axis that halves with the heads is one of heads."""
    if heads is None or not subject.is_mixer:
        return {}, {}
    half = {name: array[:, :, : array.shape[2] // 2] for name, array in inputs.items() if name not in PATTERNS}
    weights, fewer = subject.weights(inputs), subject.weights(half)
    return weights, {
        name: P(*(None if a == b else heads for a, b in zip(array.shape, fewer[name].shape, strict=True)))
        for name, array in weights.items()
    }


def over_shards(subject, form, shape, batch, heads):
    """The call inside shard_map (check_vma on), differentiated inside and outside of it."""
    mesh = jax.make_mesh(shape, ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs, call = sample(subject), call_of(subject, form)
    spec = specs(subject, inputs, batch, heads)
    weights, weight_specs = weights_by_head(subject, inputs, heads)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=(spec, weight_specs), out_specs=P(batch, None, heads))
    expected = expected_of(subject, form)
    checks.assert_same(checks.value_and_grads(lambda inputs: sharded(inputs, weights), inputs), expected)

    def pulled_back(inputs, weights, cotangents):
        """Gradients taken inside each shard, for cotangents handed in."""
        floats, rebuild = checks.split_floats(inputs)
        return jax.vjp(lambda floats: call(rebuild(floats), weights), floats)[1](cotangents)[0]

    names = sorted(name for name in inputs if name not in PATTERNS)
    cotangents = jax.grad(checks.probe)(jnp.asarray(expected[0]))
    inside = jax.shard_map(
        pulled_back,
        mesh=mesh,
        in_specs=(spec, weight_specs, P(batch, None, heads)),
        out_specs=[spec[name] for name in names],
    )
    checks.assert_close(jax.jit(inside)(inputs, weights, cotangents), expected[1], checks.GRADIENT, "gradient inside")


@check("shard_map, batch", by_form=True)
def shard_batch(subject, form):
    """`jax.shard_map` with check_vma over eight shards of the batch, gradients inside and outside"""
    over_shards(subject, form, (8, 1), "data", None)


@check("shard_map, heads", by_form=True)
def shard_heads(subject, form):
    """the same over two shards of heads or channels, masks and ids replicated"""
    over_shards(subject, form, (4, 2), None, "heads")


@check("Explicit mesh", by_form=True)
def explicit_mesh(subject, form):
    """batch and heads sharded in the types (`AxisType.Explicit`), time on an axis of one device, in values and gradients; the output keeps the sharding"""
    mesh = jax.make_mesh((4, 2, 1), ("data", "heads", "time"), axis_types=(AxisType.Explicit,) * 3)
    inputs, call = sample(subject), call_of(subject, form)
    expected = expected_of(subject, form)
    with jax.set_mesh(mesh):
        spec = specs(subject, inputs, "data", "heads", "time")
        placed = {name: jax.device_put(array, NamedSharding(mesh, spec[name])) for name, array in inputs.items()}
        actual = checks.value_and_grads(call, placed)
        assert jax.typeof(actual[0]).sharding.spec[:2] == ("data", "time")
        actual = jax.tree.map(np.asarray, actual)
    checks.assert_same(actual, expected)


@check("sharded jit", by_form=True)
def sharded_jit(subject, form):
    """`jax.jit` over an Auto mesh with batch and heads sharded: no collective in the forward program but, with segments or masks, a bit for each pair of blocks that
    says whether any row sees it; same values and gradients"""
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs, call = sample(subject), call_of(subject, form)
    spec = specs(subject, inputs, "data", "heads")
    placed = {name: jax.device_put(array, NamedSharding(mesh, spec[name])) for name, array in inputs.items()}
    program = jax.jit(call).lower(placed).compile().as_text()
    program = re.sub(r"= \(?(pred\[\d,\d\]\{1,0\}(, )?)+\)? all-reduce\(", "", program)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in program and f"{collective}-start(" not in program, f"{collective} between shards"
    actual = jax.tree.map(np.asarray, checks.value_and_grads(call, placed))
    checks.assert_same(actual, expected_of(subject, form))


@check("eval_shape")
def eval_shape(subject, form):
    """shapes and dtypes without arrays, state included"""
    arrays = {name: array for name, array in sample(subject).items() if name not in PATTERNS}
    state = {"return_state": True} if subject.causal else {}
    call = functools.partial(subject.call, **state, **form)
    shapes, run = jax.eval_shape(call, arrays), jax.jit(call)(arrays)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), run)


@check("export", by_form=True)
def export(subject, form):
    """`jax.export` of the value and of the gradients for cpu, cuda and tpu from a CPU host; read back, it gives the same numbers"""
    floats, rebuild = checks.split_floats(sample(subject))
    call = call_of(subject, form)

    def value_and_slopes(floats):
        return checks.value_and_grads(lambda x: call(rebuild(x)), floats)

    exported = jax.export.export(jax.jit(value_and_slopes), platforms=("cpu", "cuda", "tpu"))(floats)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    written = jax.export.deserialize(exported.serialize())
    if not subject.brief:  # what runs on another's loops has their branches for platforms, which are read back there
        checks.assert_same(written.call(floats), expected_of(subject, form))
