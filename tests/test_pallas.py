"""The Pallas kernels: the laws in the interpreter, and programs for TPU and GPU lowered from here."""

import contextlib
import dataclasses
import functools

import jax
import jax.export  # jax 0.7 does not import it by itself
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from effattn_jax.attention import _flash, cache, dot_product_attention
from effattn_jax.attention._flash_bodies import Setting
from effattn_jax.position import Alibi
from effattn_jax.recurrence import _diagonal_kernel, diagonal_recurrence
from tests.laws import checks
from tests.laws.softmax_references import softmax

attention = functools.partial(dot_product_attention, implementation="pallas")
recurrence = functools.partial(diagonal_recurrence, implementation="pallas")
B, N, K, H, V = 2, 4, 2, 6, 5


def sample(length, keys=None, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    shapes = {"query": (B, length, N, H), "key": (B, keys, K, H), "value": (B, keys, K, V)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def ids_of(length, seed=1):
    return np.sort(np.random.default_rng(seed).integers(0, 3, (B, length)), axis=1).astype(np.int32)


def key_mask(keys, seed=2):
    return np.random.default_rng(seed).random((B, 1, 1, keys)) < 0.6


# Attention

CASES = {
    "causal, more keys": (37, 53, {"is_causal": True, "logits_soft_cap": 2.0}),
    "causal, fewer keys": (53, 37, {"is_causal": True, "mask": key_mask(37)}),
    "window on both sides": (70, 70, {"window": (40, 3), "scale": 0.3}),
    "causal window, segments": (53, 53, {"is_causal": True, "window": 7, "segment_ids": ids_of(53)}),
    "pair of segments": (37, 20, {"segment_ids": (ids_of(37), ids_of(20, 3)), "mask": key_mask(20)}),
}


@functools.cache
def expected_of(case):
    """Outputs and gradients of the reference in float64."""
    length, keys, options = CASES[case]
    reference = functools.partial(softmax, **{"is_causal": False} | options)
    return checks.oracle(reference, sample(length, keys, np.float64))


def assert_equals_reference(case):
    length, keys, options = CASES[case]
    with checks.x64():
        inputs = sample(length, keys, np.float64)
        actual = checks.value_and_grads(lambda x: attention(**x, **options, chunk_size=16), inputs)
        checks.assert_close(actual, expected_of(case), checks.DOUBLE, case)


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_reference(case):
    """Outputs and gradients in float64, several blocks on each side, neither length a multiple of them."""
    assert_equals_reference(case)


@pytest.mark.parametrize("case", CASES)
def test_attention_in_sections(case, monkeypatch):
    """What a program sees comes in sections, as VMEM holds on a TPU: two blocks of 16 places and more, the last one not full."""
    monkeypatch.setitem(_flash._SECTION, "cpu", 500_000)
    assert_equals_reference(case)


def test_attention_computes_its_documents_alone(monkeypatch):
    """Blocks of rows, and of keys, are left the blocks that their documents and the mask leave, in each row of the batch; no others are visited."""
    ids = np.stack([np.repeat([0, 1, 2], [32, 48, 16]), np.repeat([0, 1, 2], [16, 16, 64])]).astype(np.int32)
    mask = np.arange(96) < 80
    setting = Setting(None, 0, 0, None, 1.0, 16, 16, 6, 6, np.float32, True)
    extra = np.broadcast_to(np.where(mask, 0, -np.inf), (B * K, 96))
    both = jax.jit(lambda: [_flash._bounds(setting, extra, True, (ids, ids), axis) for axis in (2, 1)])
    of_rows, of_keys = ([np.reshape(x, (B, 6)) for x in one] for one in both())
    np.testing.assert_array_equal(of_rows[0], [[0, 0, 2, 2, 2, 0], [0, 1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(of_rows[1], [[2, 2, 5, 5, 5, 0], [1, 2, 5, 5, 5, 5]])
    np.testing.assert_array_equal(of_keys[0], [[0, 0, 2, 2, 2, 0], [0, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(of_keys[1], [[2, 2, 5, 5, 5, 0], [1, 2, 6, 6, 6, 0]])

    def run(**options):  # each time with others, so that it is traced again
        call = functools.partial(attention, is_causal=True, segment_ids=ids, mask=mask[None, None, None], chunk_size=16)
        return jax.tree.leaves(checks.value_and_grads(lambda x: call(**x, **options), sample(96)))

    assert all(np.any(x) for x in run(scale=1.0))
    bounds = _flash._bounds
    monkeypatch.setattr(_flash, "_bounds", lambda *arguments: [0 * x for x in bounds(*arguments)])
    assert not any(np.any(x) for x in run(scale=0.5))


@pytest.mark.parametrize("length", [0, 1, 3, 65, 200])
def test_attention_of_any_length(length):
    inputs = sample(length)
    actual = checks.value_and_grads(lambda x: attention(**x, is_causal=True), inputs)
    expected = checks.oracle(lambda x: softmax(x), inputs)
    checks.assert_same(actual, expected)


def test_attention_without_rows():
    """An empty batch, and keys that are none."""
    inputs = sample(3)
    assert attention(**{name: x[:0] for name, x in inputs.items()}).shape == (0, 3, N, V)
    np.testing.assert_array_equal(attention(**sample(3, 0)), 0)


def test_attention_is_causal_to_the_bit():
    """What stands in later keys and values does not reach an output or a gradient of earlier rows."""
    length, cut = 40, 21

    @jax.jit
    def run(x):
        def loss(x):
            out = attention(**x, is_causal=True, chunk_size=16)
            return checks.probe(out[:, :cut]), out[:, :cut]

        return jax.grad(loss, has_aux=True)(x)

    inputs = sample(length)
    gradients, out = run(inputs)
    for later in (np.nan, np.inf, 100.0):
        poisoned = jax.tree.map(np.copy, inputs)
        for name in ("key", "value"):
            poisoned[name][:, cut:] *= later
        gradients_poisoned, out_poisoned = run(poisoned)
        checks.assert_identical(out_poisoned, out)
        checks.assert_identical(gradients_poisoned, gradients)


def test_attention_masks_are_total():
    """Rows that see nothing are 0 and give no gradient; hidden keys may hold NaN; a NaN that is seen spoils the rows that see it alone."""
    length = 20
    mask = key_mask(length)
    mask[0] = False

    @jax.jit
    def values(x, ct):
        out, pull = jax.vjp(lambda x: attention(**x, window=4, mask=mask, chunk_size=16), x)
        return out, pull(ct)[0]

    def run(x, ct):
        return jax.tree.map(np.asarray, values(x, ct))

    inputs = sample(length)
    ct = np.random.default_rng(3).normal(size=(B, length, N, V)).astype(np.float32)
    out, gradients = run(inputs, ct)
    assert np.all(out[0] == 0) and all(np.all(g[0] == 0) for g in gradients.values())
    hidden = ~mask[:, 0, 0]
    assert all(np.all(gradients[name][hidden] == 0) for name in ("key", "value"))
    poisoned = jax.tree.map(np.copy, inputs)
    poisoned["key"][hidden], poisoned["value"][hidden] = np.nan, np.inf
    checks.assert_identical(run(poisoned, ct), (out, gradients))

    spoil = int(np.flatnonzero(mask[1, 0, 0])[3])
    for name, what in (("key", np.nan), ("value", np.inf)):
        poisoned = jax.tree.map(np.copy, inputs)
        poisoned[name][1, spoil, 0] = what
        out_poisoned, gradients_poisoned = run(poisoned, ct)
        sees = np.abs(np.arange(length) - spoil) <= 4
        assert np.all(np.isnan(out_poisoned[1, sees][:, : N // K]))
        checks.assert_identical(out_poisoned[1, ~sees], out[1, ~sees])
        checks.assert_identical(out_poisoned[:, :, N // K :], out[:, :, N // K :])
        assert np.all(gradients_poisoned["value"][hidden] == 0) and np.all(gradients_poisoned["key"][hidden] == 0)
        far = np.abs(np.arange(length) - spoil) > 8
        checks.assert_identical(gradients_poisoned["key"][1, far], gradients["key"][1, far])


WINDOWED = jax.jit(functools.partial(checks.value_and_grads, functools.partial(softmax, window=100)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_attention_in_half_precision(dtype):
    inputs = sample(150)
    half = jax.tree.map(lambda x: x.astype(dtype), inputs)
    actual = checks.value_and_grads(lambda x: attention(**x, is_causal=True, window=100), half)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(actual))
    with checks.x64():
        expected = jax.tree.map(np.asarray, WINDOWED(checks.widened(half)))
    checks.assert_close(actual, expected, 1e-2)


def test_attention_resumes_from_a_state():
    """A cache that grows: prefill, then one step more, against the whole."""
    inputs, ids = sample(20), ids_of(20)

    @jax.jit
    def both(inputs):
        whole = attention(**inputs, is_causal=True, window=6, segment_ids=ids)
        parts, state = [], None
        for start, stop in ((0, 13), (13, 14), (14, 20)):
            here = {name: x[:, start:stop] for name, x in inputs.items()}
            part, state = attention(
                **here, is_causal=True, window=6, segment_ids=ids[:, start:stop], initial_state=state, return_state=True
            )
            parts.append(part)
        return whole, jnp.concatenate(parts, axis=1)

    checks.assert_close(*both(inputs), checks.OUTPUT)


def test_attention_under_nested_vmap_and_shard_map():
    """The same as the chunked form, gradients included; mapped axes join the batch."""
    length, ids = 12, ids_of(12)
    many = jax.tree.map(lambda *x: np.stack(x), *[sample(length, seed=seed) for seed in range(8)])
    many = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), many)

    def values(function, x):
        return checks.value_and_grads(lambda x: function(**x, is_causal=True, segment_ids=ids), x)

    expected, actual = (
        jax.tree.map(np.asarray, jax.jit(jax.vmap(jax.vmap(functools.partial(values, function))))(many))
        for function in (dot_product_attention, attention)
    )
    checks.assert_close(actual, expected, checks.GRADIENT)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    flat = jax.tree.map(lambda x: x[0, 0], many)
    rows = PartitionSpec("data")

    def call(inputs, ids):
        return attention(**inputs, is_causal=True, segment_ids=ids)

    sharded = jax.shard_map(call, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    actual = checks.value_and_grads(lambda x: sharded(x, ids), flat)
    checks.assert_close(actual, jax.tree.map(lambda x: x[0, 0], expected), checks.GRADIENT, "shard_map")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": np.zeros((1, 1, 9, 9), np.float32)}, "bias, an array. implementation='chunked'"),
        ({"bias": Alibi(np.ones(N, np.float32))}, "bias, Alibi. implementation='chunked'"),
        ({"mask": np.ones((9, 9), bool)}, r"mask, \(1, 1, 9, 9\) of .* implementation='chunked'"),
        ({"return_weights": True}, "return_weights=True. implementation='dense'"),
        ({"chunk_size": 24}, "chunk_size a power of two, 16 at least; got 24"),
        ({"initial_state": cache(B, 9, K, H, V), "is_causal": True}, "initial_state a cache that grows"),
    ],
)
def test_what_the_kernel_does_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        attention(**sample(9), **options)


def test_an_explicit_mesh_is_an_error():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="inside jax.shard_map"):
        placed = jax.device_put(sample(9), jax.NamedSharding(mesh, PartitionSpec("data")))
        attention(**placed)


# The recurrence


def recurrence_sample(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    decay, inputs, state = rng.uniform(0.3, 1, shape), rng.normal(size=shape), rng.normal(size=shape[:1] + shape[2:])
    if np.dtype(dtype).kind == "c":
        decay, inputs = decay * np.exp(1j * rng.normal(size=shape)), inputs * (1 + 2j)
    return decay.astype(dtype), inputs.astype(dtype), state.astype(dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_recurrence_equals_scan(dtype, reverse):
    """Values, final state and gradients, several blocks of steps and of channels, from a state, over segments."""
    arrays, ids = recurrence_sample((2, 37, 3, 50), dtype), ids_of(37)

    def values(implementation):
        return checks.value_and_grads(
            lambda x: diagonal_recurrence(
                *x[:2], initial_state=x[2], segment_ids=ids, reverse=reverse, return_state=True, implementation=implementation
            ),
            arrays,
        )  # fmt: skip

    with checks.x64():
        checks.assert_close(values("pallas"), values("scan"), checks.DOUBLE)


def test_recurrence_divided_as_on_each_platform():
    """All of time in one program, as on a GPU, and in stretches that hand on the state, as on a TPU, are the same to the bit."""
    decay, inputs, _ = recurrence_sample((2, 1100, 20), np.float32)
    for reverse in (False, True):
        run = jax.jit(functools.partial(_diagonal_kernel._run, reverse, "cpu"), static_argnames="form")
        for form in ("gpu", "tpu"):
            checks.assert_identical(run(decay, inputs, form=form), run(decay, inputs, form="cpu"), form)


def test_recurrence_of_any_length_forgets_exactly():
    """A decay of 0 forgets NaN; NaN does not go back in time; bfloat16 in and out; no steps and no channels are no error."""
    by_kernel, by_scan = jax.jit(recurrence), jax.jit(diagonal_recurrence)
    for length in (0, 1, 9):
        decay, inputs, _ = recurrence_sample((1, length, 2, 2), np.float32)
        checks.assert_close(by_kernel(decay, inputs), by_scan(decay, inputs), checks.OUTPUT)
    assert by_kernel(decay[..., :0], inputs[..., :0]).shape == (1, 9, 2, 0)
    poisoned = inputs.copy()
    poisoned[:, 4] = np.nan
    decay[:, 7] = 0
    seen = np.asarray(by_kernel(decay, poisoned))
    checks.assert_identical(seen[:, :4], np.asarray(by_kernel(decay, inputs))[:, :4])
    assert np.all(np.isnan(seen[:, 4:7])) and np.all(np.isfinite(seen[:, 7:]))
    half = by_kernel(decay.astype(jnp.bfloat16), inputs.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_recurrence_under_vmap():
    decay, inputs, _ = recurrence_sample((6, 9, 4), np.float32)
    decay, inputs = (x.reshape(2, 3, *x.shape[1:]) for x in (decay, inputs))
    actual, expected = (jax.jit(jax.vmap(function))(decay, inputs) for function in (recurrence, diagonal_recurrence))
    checks.assert_close(actual, expected, checks.OUTPUT)


# What accelerators would run


def device(kind, platform):
    """An abstract device to lower for, where this jax asks for one (from 0.10)."""
    if "platform" not in [field.name for field in dataclasses.fields(AbstractDevice)]:
        return contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((), (), axis_types=(), abstract_device=AbstractDevice(kind, 1, platform)))


PROGRAMS = {
    "attention": (
        lambda q, k, ids: jnp.sum(
            attention(q, k, k, is_causal=True, window=200, segment_ids=ids, logits_soft_cap=30.0, mask=ids[:, None, None] > 0).astype(jnp.float32)
        ),
        [((1, 300, 4, 96), jnp.bfloat16), ((1, 300, 2, 96), jnp.bfloat16), ((1, 300), jnp.int32)],
        3,
    ),
    "attention, float32, all see all": (
        lambda q, k: jnp.sum(attention(q, k, k)),
        [((2, 70, 4, 64), jnp.float32), ((2, 300, 1, 64), jnp.float32)],
        3,
    ),
    "recurrence": (
        lambda a, x: jnp.sum(recurrence(a, x)),
        [((2, 1000, 3, 96), jnp.float32)] * 2,
        2,
    ),
    "recurrence, complex, reverse": (
        lambda a, x: jnp.sum(recurrence(a, x, reverse=True).imag),
        [((2, 70, 300), jnp.complex64)] * 2,
        2,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    ("platform", "kind", "target"), [("tpu", "TPU v5 lite", "tpu_custom_call"), ("cuda", "NVIDIA H100", "__gpu$xla.gpu.triton")]
)  # fmt: skip
@pytest.mark.parametrize("program", PROGRAMS)
def test_lowers(program, platform, kind, target):
    """Values and gradients lower to kernels of the platform: one forward, and in the gradient of attention two more."""
    loss, shapes, kernels = PROGRAMS[program]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    with device(kind, "gpu" if platform == "cuda" else platform):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        text = jax.export.export(run, platforms=[platform], disabled_checks=allowed)(*arguments).mlir_module()
    assert text.count(f"@{target}(") == kernels
