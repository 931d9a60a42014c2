"""The language model over the table of mixers: one call, calls in parts, packed rows, padding, options and errors."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention, nn, position
from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.objectives import cross_entropy
from tests.random_parameters import random_parameters
from tests.wirings import KINDS, REPRESENTATIVES, conv_width

VOCAB = 13
SMALL = ModelConfig(layers=1, width=16, heads=4, kv_heads=2, max_length=16)
CAUSAL = tuple(name for name, mixer in nn.MIXERS.items() if mixer(16, parent=None).accepts_causal())
POSITIONS = ("none", "learned", "sinusoidal", "rotary")


def make(vocab=VOCAB, **options):
    """A model with random parameters in which every part has a say in the logits; nothing is compiled."""
    model = LanguageModel(dataclasses.replace(SMALL, **options), vocab)
    return model, random_parameters(model, np.zeros((1, 0), np.int32))


def random_tokens(shape, seed=5):
    return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)


def by_parts(model, params, tokens, prefill, segment_ids=None, capacity=16):
    """Logits of a first call on `prefill` tokens and of one call for each further token."""
    ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids

    def step(state, inputs):
        options = {} if segment_ids is None else {"segment_ids": inputs[1][:, None]}
        logits, state = model.step(params, inputs[0][:, None], state, **options)
        return state, logits[:, 0]

    options = {} if segment_ids is None else {"segment_ids": ids[:, :prefill]}
    first, state = model.step(params, tokens[:, :prefill], model.init_state(tokens.shape[0], capacity), **options)
    state, rest = jax.lax.scan(step, state, (tokens[:, prefill:].T, ids[:, prefill:].T))
    return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1), state


@pytest.mark.parametrize("mixer, positions", [(m, p) for m in KINDS for p in POSITIONS[0 if m in KINDS[:3] else -1 :]])
def test_prefill_and_steps_are_the_full_pass(mixer, positions):
    """Of every mixer `test_packed_rows_padding_and_causality` tests it, in rows of two documents."""
    model, params = make(mixer=mixer, positions=positions)
    tokens = random_tokens((2, 12))

    @jax.jit
    def run(params):
        full = model.apply({"params": params}, tokens)
        parts, state = by_parts(model, params, tokens, prefill=5)
        return full, parts, state.position

    full, parts, position = run(params)
    assert full.dtype == np.float32 and np.std(full) > 0.1
    np.testing.assert_allclose(parts, full, atol=1e-5)
    assert position.tolist() == [12, 12]


@pytest.mark.parametrize("mixer", [name for name in REPRESENTATIVES if name in CAUSAL])
def test_packed_rows_padding_and_causality(mixer):
    positions = "rotary" if mixer in position.MIXERS else "learned"
    model, params = make(mixer=mixer, positions=positions, conv_width=conv_width(mixer))
    documents = random_tokens((2, 6))
    tokens = documents.reshape(1, 12)
    segment_ids = np.repeat([[4, 2]], 6, axis=1)
    padding = np.full((1, 6), 999)  # out of range: not even the embedding of padding may matter
    real = np.arange(12)[None] >= 6
    changed = np.where(np.arange(12) == 8, (tokens + 1) % VOCAB, tokens)
    left, right = (np.concatenate(pair, axis=1) for pair in ((padding, documents[1:]), (documents[1:], padding)))
    everything = np.ones_like(real)

    @jax.jit
    def run(params):
        logits = model.apply(
            {"params": params},
            np.concatenate([tokens, changed, left, right]),
            segment_ids=np.concatenate([segment_ids, segment_ids, *[np.ones_like(segment_ids)] * 2]),
            mask=np.concatenate([everything, everything, real, real[:, ::-1]]),
        )
        stepped, _ = by_parts(model, params, jnp.asarray(tokens), prefill=3, segment_ids=jnp.asarray(segment_ids))
        return logits, stepped, model.apply({"params": params}, documents)

    (packed, changed, left, right), (stepped,), alone = jax.tree.map(np.asarray, run(params))
    alone = alone.reshape(12, VOCAB)
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    np.testing.assert_allclose(stepped, alone, atol=1e-5)
    np.testing.assert_allclose(left[6:], alone[6:], atol=1e-5)
    np.testing.assert_allclose(right[:6], alone[6:], atol=1e-5)
    np.testing.assert_allclose(changed[:8], packed[:8], atol=1e-6)
    assert np.abs(changed - packed)[8:].max() > 1e-3


@pytest.mark.parametrize("ids", [None, 0], ids=["plain", "ids"])
@pytest.mark.parametrize("mixer", ["softmax", "gated_linear", "dynamic_convolution", "lightweight_convolution"])
def test_padding_inside_and_behind_a_prompt(mixer, ids):
    """Is as if absent, for short convolutions too, whatever its id, and the row goes on from its last real token."""
    model, params = make(mixer=mixer, conv_width=3)
    tokens, (row,) = random_tokens((1, 6)), np.nonzero([1, 1, 0, 1, 0, 1, 1, 0, 0])
    padded, mask = np.zeros((1, 9), np.int32), np.zeros((1, 9), bool)
    padded[:, row], mask[:, row] = tokens[:, :5], True

    first_ids, second_ids = {}, {}
    if ids is not None:
        first_ids, second_ids = {"segment_ids": np.where(mask, 3, ids)}, {"segment_ids": np.full((1, 1), 3)}

    @jax.jit
    def run(params):
        first, state = model.step(params, padded, model.init_state(1, 16), mask=mask, **first_ids)
        second, _ = model.step(params, tokens[:, 5:], state, **second_ids)
        return jnp.concatenate([first[:, row], second], axis=1), model.apply({"params": params}, tokens)

    np.testing.assert_allclose(*run(params), atol=1e-5)


@pytest.mark.parametrize("mixer", KINDS)
def test_gradients_are_finite_with_rows_of_padding_alone(mixer):
    model, params = make(mixer=mixer, positions="rotary", conv_width=2)
    tokens = np.concatenate([random_tokens((1, 6)), np.full((1, 6), -7, np.int32)])
    mask = np.array([[True] * 6, [False] * 6])

    def loss(params):
        logits = model.apply({"params": params}, tokens, mask=mask)
        return cross_entropy(logits, tokens, mask.astype(np.float32))[0], logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.all(np.isfinite(logits))
    assert all(np.all(np.isfinite(g)) and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("mixer", CAUSAL)
def test_state_shapes_never_change(mixer):
    options = {"mixer": mixer, "conv_width": conv_width(mixer), "max_length": 1000}
    if mixer in KINDS:  # states in a stack are the stack's business, whatever the mixer
        options |= {"scan_layers": True, "layers": 2}
    model = LanguageModel(dataclasses.replace(SMALL, **options), VOCAB)
    init = partial(model.init_with_output, jax.random.key(0), return_state=True)
    state, larger = (jax.eval_shape(lambda c=c: model.init_state(2, c)) for c in (10, 1000))
    for length in (0, 7) if mixer in KINDS else (7,):  # one token: the scans of `by_parts`
        (_, after), _ = jax.eval_shape(init, np.zeros((2, length), np.int32), state=state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(state)
        ]
    if model.config.fixes_length:
        return  # its state has a place for each step up to max_length, and no more
    # A recurrence's state, and so the cost of a token, does not depend on the capacity.
    line = (attention.MIXERS | position.MIXERS).get(mixer)
    grows = line is not None and line.pairwise
    small, large = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state, larger))
    assert (large > small) == grows


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "pre", "norm": "rmsnorm", "mlp": "gated"},
        {"residual": "post", "norm": "layernorm", "use_bias": True},
        {"residual": "rezero", "tie_embeddings": False},
    ],
    ids=lambda options: options["residual"],
)
def test_block_forms_start_near_the_uniform_distribution_and_learn(options):
    config = ModelConfig(layers=2, width=32, heads=2, max_length=16, positions="learned", **options)
    model = LanguageModel(config, 50)
    tokens = np.tile(np.arange(5)[None], (2, 3))
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def loss(params):
        total, weight = cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])
        return total / weight

    def descend(params, _):
        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(
            lambda p, g: p - 0.02 * jnp.sign(g) * jnp.minimum(1, jnp.abs(g) * 1e3), params, gradient
        ), value

    values = np.asarray(jax.jit(lambda params: jax.lax.scan(descend, params, length=30)[1])(params))
    assert abs(float(values[0]) - math.log(50)) < 0.2
    assert float(values[-1]) < 0.4 * float(values[0])


def test_layers_of_different_mixers_decode():
    mixers = ("softmax", "gated_linear", "external", "gmlp")  # a cache, a matrix, sums a slot, and all inputs
    model, params = make(mixers=",".join(mixers), layers=len(mixers), conv_width=2)
    tokens = random_tokens((1, 8))

    @jax.jit
    def run(params):
        return model.apply({"params": params}, tokens), by_parts(model, params, tokens, prefill=4)[0]

    full, parts = run(params)
    np.testing.assert_allclose(parts, full, atol=1e-5)


def test_scan_over_layers_and_remat_are_the_same_model():
    tokens = random_tokens((2, 6))
    model, params = make(layers=2, conv_width=2)
    blocks = [params["stack"][f"layers_{i}"] for i in range(2)]
    stacked = params | {
        "stack": {"layers": jax.tree.map(lambda *x: np.stack(x), *blocks), "norm": params["stack"]["norm"]}
    }

    scanned_model = LanguageModel(dataclasses.replace(model.config, scan_layers=True), VOCAB)

    def loss(params, **options):
        model = LanguageModel(dataclasses.replace(SMALL, layers=2, conv_width=2, **options), VOCAB)
        return cross_entropy(model.apply({"params": params}, tokens), tokens)[0]

    @jax.jit
    def run(params, stacked):
        plain, plain_gradient = jax.value_and_grad(loss)(params)
        scanned, gradient = jax.value_and_grad(lambda p: loss(p, scan_layers=True, remat=True))(stacked)
        full = model.apply({"params": params}, tokens)
        parts, _ = by_parts(scanned_model, stacked, tokens, prefill=3)
        return plain, scanned, plain_gradient, gradient, full, parts

    plain, scanned, plain_gradient, gradient, full, parts = jax.tree.map(np.asarray, run(params, stacked))
    np.testing.assert_allclose(plain, scanned, rtol=1e-6)
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], gradient["stack"]["layers"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), layer, plain_gradient["stack"][f"layers_{i}"]
        )
    np.testing.assert_allclose(parts, full, atol=1e-5)


def test_dropout_follows_its_key():
    model, params = make(dropout=0.5, layers=2)
    tokens = random_tokens((1, 6))

    @jax.jit
    def run(params, key):
        return model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key})

    first, again, other = (np.asarray(run(params, jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_bfloat16_computes_near_float32_and_returns_float32():
    model, params = make(layers=2, conv_width=2, norm="rmsnorm")
    half = LanguageModel(dataclasses.replace(model.config, dtype="bfloat16"), VOCAB)
    tokens = random_tokens((2, 8))

    def loss(params, model):
        logits = model.apply({"params": params}, tokens)
        return cross_entropy(logits, tokens)[0], logits

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (full, _), gradient = run(params, model)
    (value, logits), half_gradient = run(params, half)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(value, full, rtol=0.02)
    norms = [math.hypot(*(np.linalg.norm(g) for g in jax.tree.leaves(tree))) for tree in (gradient, half_gradient)]
    np.testing.assert_allclose(*norms, rtol=0.05)
    assert jax.tree.leaves(jax.eval_shape(lambda: half.init_state(1, 4)).blocks)[0].dtype == jnp.bfloat16


def test_window_limits_what_a_layer_sees():
    model, params = make(window=2, positions="none")
    tokens = random_tokens((1, 9))
    changed = np.where(np.arange(9) == 3, (tokens + 1) % VOCAB, tokens)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens))
    difference = np.abs(np.subtract(run(params, tokens), run(params, changed))).max(-1)[0]
    assert (difference > 0).tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_a_mesh_with_automatic_axes_changes_nothing():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    model, params = make(positions="rotary", mixer="linear")
    tokens = random_tokens((4, 6))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.tree.map(lambda x: jax.P(None, "tensor") if x.ndim == 2 and x.shape[1] % 2 == 0 else jax.P(), params)
    sharded = jax.device_put(params, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), spec))
    rows = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(lambda p, t: model.apply({"params": p}, t))
    with jax.set_mesh(mesh):
        out = run(sharded, rows)
    np.testing.assert_allclose(out, run(params, tokens), atol=1e-5)


@pytest.mark.parametrize("mixer", ["softmax", "gated_linear"])
def test_a_mesh_of_explicit_axes_changes_nothing(mixer):
    """Rows sharded in the types, parameters on every device: logits, gradients, and calls from a fresh state."""
    model, params = make(positions="rotary", mixer=mixer, conv_width=2)
    tokens = random_tokens((4, 6))

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)
        return cross_entropy(logits, tokens)[0], logits

    def by_rows(x):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P("data") if x.ndim else jax.P()))

    run, step = jax.jit(jax.grad(loss, has_aux=True)), jax.jit(model.step)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        rows = by_rows(tokens)
        gradient, logits = run(placed, rows)
        fresh = jax.jit(lambda: model.init_state(4, 8))()
        first, state = step(placed, by_rows(tokens[:, :3]), jax.tree.map(by_rows, fresh))
        second, _ = step(placed, by_rows(tokens[:, 3:]), state)
        assert jax.typeof(logits).sharding.spec[0] == "data"
    expected_gradient, expected = run(params, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([np.asarray(first), np.asarray(second)], axis=1), expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected_gradient)


def test_call_errors():
    model, params = make(positions="learned")
    tokens = random_tokens((1, 4))

    def apply(*args, **inputs):
        return model.apply({"params": params}, *args, **inputs)

    with pytest.raises(ValueError, match=r"tokens must be integers of shape \(B, T\); got float32"):
        apply(tokens.astype(np.float32))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(B, T\) = \(1, 4\)"):
        apply(tokens, mask=np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"segment_ids must be integers of shape \(B, T\) = \(1, 4\)"):
        apply(tokens, segment_ids=np.zeros((1, 5), np.int32))
    with pytest.raises(ValueError, match="at most max_length=16"):
        apply(np.zeros((1, 17), np.int32))
    with pytest.raises(ValueError, match="at most max_length=16"):
        model.init_state(1, 17)
    run = jax.jit(apply)
    for outside in (VOCAB, -1):
        assert np.all(np.isnan(run(np.where(np.arange(4) == 0, outside, tokens))))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_scores_that_add_up_over_the_layers(scan_layers):
    """Prefill and steps equal the full pass, remat changes nothing, and layer 2 sees the scores of layer 1."""
    options = {
        "mixer": "residual",
        "layers": 2,
        "residual": "post",
        "residual_scores": True,
        "scan_layers": scan_layers,
    }
    model, params = make(**options)
    tokens = random_tokens((2, 8))

    @jax.jit
    def run(params):
        def outputs(**changes):
            changed = LanguageModel(dataclasses.replace(model.config, **changes), VOCAB)
            return changed.apply({"params": params}, tokens)

        parts, _ = by_parts(model, params, tokens, prefill=3)
        return outputs(), parts, outputs(remat=True), outputs(residual_scores=False)

    full, parts, remat, apart = map(np.asarray, run(params))
    np.testing.assert_allclose(parts, full, atol=1e-5)
    np.testing.assert_allclose(remat, full, atol=1e-6)
    assert np.abs(full - apart).max() > 1e-3


def test_a_model_longer_than_its_tables_is_an_error():
    model, params = make(mixer="synthesizer_dense")
    with pytest.raises(ValueError, match="sequences must be at most max_length=16 long"):
        jax.eval_shape(model.apply, {"params": params}, np.zeros((1, 17), np.int32))
    with pytest.raises(ValueError, match="sequences must be at most max_length=16 long"):
        model.init_state(1, 17)
