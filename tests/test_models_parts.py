"""Configuration, classifier, counting of operations, and the layers on their own."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention, nn, position
from effattn_jax._places import count_positions
from effattn_jax.models import LanguageModel, ModelConfig, SequenceClassifier, SequenceRegressor, flops_per_token
from effattn_jax.nn.layers import EMBEDDING_STD
from effattn_jax.nn.products import dense_product, float32_product, table_product
from effattn_jax.parallel import make_mesh, shard_tree
from tests.random_parameters import random_parameters
from tests.wirings import REPRESENTATIVES, conv_width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must be a divisor of the width 128; got 3"),
        ({"kv_heads": 3}, "kv_heads must be a divisor of the heads 4; got 3"),
        ({"kv_heads": 0}, "kv_heads must be at least 1; got 0"),
        ({"mixer": "gated_liner"}, "'gated_liner'. Perhaps you meant 'gated_linear'"),
        (
            {"mixers": "softmax, linaer,softmax,softmax"},
            "mixers is 'linaer'. Perhaps you meant 'linear'. It must be among softmax, ",
        ),
        ({"mixers": "softmax,linear"}, "mixers must be one name a layer: layers is 4, names are 2"),
        (
            {"mixers": "softmax,linear,softmax,softmax", "scan_layers": True},
            "mixers must be the same mixer in every layer",
        ),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'. It must be among layernorm, rmsnorm"),
        ({"residual": "pree"}, "residual is 'pree'. Perhaps you meant 'pre'. It must be among pre, post, rezero"),
        ({"positions": "rotery"}, "Perhaps you meant 'rotary'"),
        ({"dtype": "float23"}, "Perhaps you meant 'float32'"),
        ({"width": 12}, "head dimension width / heads = 3 is odd"),
        ({"width": 5, "heads": 1, "positions": "sinusoidal"}, "width must be even for sinusoidal positions; got 5"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"window": -1}, "window must be at least 0; got -1"),
        ({"window": 4, "mixer": "linear"}, "window must be None, since no layer can limit itself to a window: linear"),
        (
            {"residual_scores": True},
            "residual_scores must be False, since softmax has no scores to hand on; .*; got True",
        ),
        ({"residual_scores": True, "mixer": "min_gru"}, "since min_gru has no scores"),
        ({"conv_width": -1}, "conv_width must be at least 0; got -1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive; got 0.0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"rotary_base": 0.0}, "rotary_base must be positive; got 0.0"),
        (
            {"mixer": "local(windo=3)"},
            "mixer 'local' has no option 'windo'. Perhaps you meant 'window'. It has chunk_size",
        ),
        ({"mixer": "min_gru(window=3)"}, "mixer 'min_gru' has no option 'window'. It has none"),
        ({"mixer": "linear(window=3)"}, "mixer 'linear' has no option 'window'"),
        ({"mixer": "local(window=3"}, r"mixer must be NAME or NAME\(OPTION=VALUE, ...\); got 'local\(window=3'"),
        ({"mixer": "local(window=3, window=4)"}, "each option once; got 'window=4'"),
        ({"mixer": "local(window=abc)"}, r"mixer 'local\(window=abc\)' cannot be built: window must be an int >= 0"),
        (
            {"mixer": "linear(feature_map=reluu)"},
            "cannot be built: feature_map='reluu' is unknown; did you mean 'relu'",
        ),
        ({"mixer": "performer(num_features=0)"}, "cannot be built: num_features must be a positive int; got 0"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options).validate()


CHOSEN = (
    "softmax(logits_soft_cap=2.0, scale=0.7)",
    "local(window=2)",
    "sparse(window=1, dilation=3, num_global=2)",
    "fixed(block=4, summary=1)",
    "topk(k=2)",
    "linear(feature_map=relu, normalize=False)",
    "performer(kernel=trigonometric, num_features=24)",
    "performer(seed=3)",
    "synthesizer_random_fixed(seed=1)",
    "rerope(window=3)",
    "xpos(gamma=0.9)",
    "external(slots=8)",
    "s4d(state_size=8)",
    "mamba(expand=1, conv_width=2)",
    "linformer(rows=8)",
    "fnet(orthonormal=False)",
)


@pytest.mark.parametrize("text", CHOSEN)
def test_options_behind_a_name_are_those_of_the_mixer(text):
    """They change the mixer, are counted, and what decodes does so as it reads; gradients are finite."""
    name = text.partition("(")[0]
    causal = nn.MIXERS[name](8, parent=None).accepts_causal()
    fields = {"width": 16, "heads": 2, "kv_heads": 2, "causal": causal, "max_length": 12}
    mixer, plain = nn.make_mixer(text, **fields), nn.make_mixer(name, **fields)
    x = np.random.default_rng(0).normal(size=(2, 11, 16)).astype(np.float32)
    params, usual = ({"params": random_parameters(m, x[:, :0])} for m in (mixer, plain))
    alike = jax.tree.map(np.shape, params) == jax.tree.map(np.shape, usual)

    @jax.jit
    def run(params):
        def loss(params):
            out = mixer.apply(params, x)
            return jnp.sum(out**2), out

        slopes, out = jax.grad(loss, has_aux=True)(params)
        state, parts = mixer.init_state(2, 11) if causal else None, []
        for start, stop in ((0, 9), (9, 10), (10, 11)) if causal else ():
            part, state = mixer.apply(params, x[:, start:stop], state=state, return_state=True)
            parts.append(part)
        return out, plain.apply(params, x) if alike else None, slopes, parts

    out, other, slopes, parts = jax.tree.map(np.asarray, run(params))
    assert not alike or not np.allclose(out, other, atol=1e-4)
    assert mixer.flops_per_token(64) > 0
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(slopes))
    if causal:
        np.testing.assert_allclose(np.concatenate(parts, axis=1), out, atol=2e-4, rtol=2e-4)


def test_layers_have_options_of_their_own():
    config = ModelConfig(layers=3, mixers="local(window=8), local, softmax", window=5).validate()
    assert [config.make_mixer(layer, parent=None).window for layer in range(3)] == [8, 5, 5]
    assert config.layer_mixers() == ("local(window=8)", "local", "softmax")


def test_every_config_field_says_what_it_is():
    import ast
    import inspect

    (record,) = ast.parse(inspect.getsource(ModelConfig)).body
    followed = {
        node.target.id
        for node, after in zip(record.body, record.body[1:])
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert followed == {field.name for field in dataclasses.fields(ModelConfig)}


def test_positions_count_real_tokens_and_restart_at_boundaries():
    mask = jnp.array([[False, True, True, False, True, True]])
    segment_ids = jnp.array([[3, 3, 3, 3, 5, 5]])
    assert count_positions((1, 6)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert count_positions((1, 6), mask).tolist() == [[0, 0, 1, 2, 2, 3]]
    assert count_positions((1, 6), mask, segment_ids).tolist() == [[0, 0, 1, 2, 0, 1]]
    first, last = jnp.array([10]), jnp.array([3])
    assert count_positions((1, 6), mask, segment_ids, first, last).tolist() == [[10, 10, 11, 12, 0, 1]]
    assert count_positions((1, 6), None, segment_ids, first, jnp.array([9])).tolist() == [[0, 1, 2, 3, 0, 1]]
    assert count_positions((1, 0), None, segment_ids[:, :0], first, last).shape == (1, 0)


@pytest.mark.parametrize("mixer", [*REPRESENTATIVES, *({"atrous"} - {*REPRESENTATIVES})])
def test_classifier_reads_both_ways_and_no_padding(mixer):
    positions = "none" if mixer in position.MIXERS else "sinusoidal"
    shape = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1}
    config = ModelConfig(**shape, mixer=mixer, positions=positions, conv_width=conv_width(mixer))
    model, rng = SequenceClassifier(config, num_classes=3, vocab_size=10), np.random.default_rng(1)
    tokens, x = rng.integers(0, 10, (2, 7), np.int32), rng.normal(size=(1, 7, 16)).astype(np.float32)
    if mixer == "xpos":
        with pytest.raises(ValueError, match="is_causal must be True: XPOS's factors grow towards the future"):
            jax.eval_shape(model.init, jax.random.key(0), tokens)
        return
    params = random_parameters(model, tokens[:, :0], seed=3)  # with which every token has features above 0
    mixing = config.make_mixer(0, causal=False)
    weights = {"params": params["stack"]["layers_0"].get("mixer", {})}

    left = np.concatenate([np.full((2, 2), 77, np.int32), tokens], axis=1)
    real = np.broadcast_to(np.arange(9) >= 2, (2, 9))
    rows = np.concatenate([left, np.roll(left, -2, axis=1), left])
    masks = np.concatenate([real, np.roll(real, -2, axis=1), np.zeros_like(real)])
    step = np.eye(7, dtype=np.float32)[:, :, None]  # of one token a row: small for softmax, large for what forgets fast
    changed = np.concatenate([x, x + step, x + 1000 * step])

    @jax.jit
    def run(params, weights):
        padded = model.apply({"params": params}, rows, mask=masks).reshape(3, 2, 3)
        return model.apply({"params": params}, tokens), padded, mixing.apply(weights, changed)[:, 3]

    plain, (left, right, empty), seen = jax.tree.map(np.asarray, run(params, weights))
    assert plain.shape == (2, 3) and plain.dtype == np.float32
    np.testing.assert_allclose(left, plain, atol=1e-5)
    np.testing.assert_allclose(right, plain, atol=1e-5)
    np.testing.assert_allclose(empty, np.broadcast_to(params["head"]["bias"], (2, 3)), atol=1e-6)
    reached = np.arange(7) % 4 == 3 if mixer == "atrous" else np.full(7, True)
    assert np.all((np.abs(seen[1:] - seen[0]) > 0).reshape(2, 7, 16).any((0, 2)) == reached)


def test_classifier_of_features_and_its_errors():
    model = SequenceClassifier(ModelConfig(layers=1, width=8, heads=2), num_classes=4)
    params = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 5, 2), np.float32))
    assert jax.eval_shape(model.apply, params, np.ones((3, 5, 2), np.float32)).shape == (3, 4)
    with pytest.raises(ValueError, match=r"inputs must be floats of shape \(B, T, F\)"):
        model.apply(params, np.ones((3, 5), np.int32))
    with pytest.raises(ValueError, match=r"inputs must be integers of shape \(B, T\)"):
        SequenceClassifier(model.config, 4, vocab_size=5).init(jax.random.key(0), jnp.ones((1, 5, 2)))


def test_regressor_streams_packs_and_keeps_amplitudes():
    """Step by step as at once, packed rows as alone; without norms twice the input is told from the input; errors."""
    config = ModelConfig(
        layers=1, width=8, heads=2, mixer="s4d", state_size=4, conv_width=2, norm="none", use_bias=True
    )
    model = SequenceRegressor(dataclasses.replace(config, positions="none"), num_outputs=3)
    inputs = np.random.default_rng(1).normal(size=(1, 7, 2)).astype(np.float32)
    params = random_parameters(model, inputs)

    @jax.jit
    def run(params):
        ids = jnp.array([[0] * 3 + [1] * 4])
        full, packed, twice = (
            model.apply({"params": params}, x, segment_ids=s)
            for x, s in ((inputs, None), (inputs, ids), (2 * inputs, None))
        )
        alone = jnp.concatenate([model.apply({"params": params}, x) for x in (inputs[:, :3], inputs[:, 3:])], 1)
        first, state = model.step(params, inputs[:, :5], model.init_state(1, 7))
        second, state = model.step(params, inputs[:, 5:], state)
        return full, packed, alone, jnp.concatenate([first, second], 1), twice, state.position

    full, packed, alone, parts, twice, position = map(np.asarray, run(params))
    assert full.shape == (1, 7, 3) and full.dtype == np.float32 and position.tolist() == [7]
    np.testing.assert_allclose(parts, full, atol=1e-5)
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    assert np.abs(twice - full).max() > 0.1
    with pytest.raises(ValueError, match=r"inputs must be floats of shape \(B, T, F\)"):
        model.apply({"params": params}, jnp.ones((3, 5)))


@pytest.mark.parametrize("mixer", ["fnet", "linformer"])
def test_a_mixer_without_causal_form_is_refused_in_a_language_model(mixer):
    model = LanguageModel(ModelConfig(layers=1, width=8, heads=2, mixer=mixer), 5)
    with pytest.raises(
        ValueError, match=f"mixer must have a causal form in a causal model; '{mixer}' reads all tokens"
    ):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match=f"'{mixer}' reads all tokens"):
        model.init_state(1, 3)


def test_weights_for_each_place_limit_the_length():
    model = LanguageModel(ModelConfig(layers=1, width=8, heads=2, mixer="res_mlp", max_length=6), 5)
    rule = "at most max_length=6 long with the mixer res_mlp; got 7"
    with pytest.raises(ValueError, match=rule):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 7), np.int32))
    with pytest.raises(ValueError, match=rule):
        model.init_state(1, 7)
    with pytest.raises(ValueError, match="max_length must be given: the weights of 'gmlp' have a place for each step"):
        jax.eval_shape(nn.MIXERS["gmlp"](8).init, jax.random.key(0), np.ones((1, 3, 8)))
    with pytest.raises(ValueError, match="capacity must be at most max_length=6; got 7"):
        nn.MIXERS["gmlp"](8, max_length=6).init_state(1, 7)
    with pytest.raises(ValueError, match="kernel must be among"):
        jax.eval_shape(nn.AttentionFree(8, kernel="gmpl").init, jax.random.key(0), np.ones((1, 3, 8)))


@pytest.mark.parametrize("mixer", nn.MIXERS)
def test_bidirectional_mixers_have_no_state(mixer):
    module = ModelConfig(layers=1, width=8, heads=2, mixer=mixer).make_mixer(0, causal=False)
    with pytest.raises(ValueError, match="need causal=True"):
        jax.eval_shape(partial(module.init, return_state=True), jax.random.key(0), np.ones((1, 3, 8)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp": "gated", "kv_heads": 2, "positions": "none"},
        {"mixer": "min_gru", "conv_width": 4},
        {"mixer": "gmlp", "max_length": 64},
        {"mixer": "ffn_stack", "max_length": 64},
        {"mixer": "dynamic_convolution"},
        {"mixer": "xl"},
        {"mixer": "tupe", "max_length": 64},
        {"mixer": "disentangled"},
    ],
    ids=["mlp", "gated", "min_gru", "gmlp", "ffn_stack", "dynamic_convolution", "xl", "tupe", "disentangled"],
)
def test_flops_agree_with_the_compiler(options):
    config = ModelConfig(layers=2, width=512, heads=8, **options)
    model, batch, context = LanguageModel(config, 512), 1, 64
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    analysis = jax.jit(model.apply).lower(params, tokens).cost_analysis()
    counted = flops_per_token(config, 512, context)
    assert counted == pytest.approx(analysis["flops"] / (batch * context), rel=0.02)


def test_flops_of_recurrences_do_not_depend_on_the_context_and_windows_limit_it():
    for mixer in nn.MIXERS:
        config = ModelConfig(mixer=mixer)
        causal = nn.MIXERS[mixer](128, parent=None).accepts_causal()
        few, many = (flops_per_token(config, 65, context, causal=causal) for context in (100, 10_000))
        line = (attention.MIXERS | position.MIXERS).get(mixer)
        reads_all_keys = line is not None and line.pairwise
        grows = config.fixes_length or reads_all_keys or mixer == "fnet"
        assert (few != many) == (grows and mixer != "linformer")
    windowed = ModelConfig(window=63)
    assert flops_per_token(windowed, 65, 10_000) == flops_per_token(ModelConfig(), 65, 64)
    assert flops_per_token(ModelConfig(), None, 64) == flops_per_token(ModelConfig(), 65, 64) - 2 * 128 * 65


def test_parameters_have_the_names_that_sharding_rules_read():
    config = ModelConfig(
        layers=1, width=8, heads=2, mixer="gated_linear", conv_width=2, tie_embeddings=False, use_bias=True
    )
    model = LanguageModel(config, 5)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)}
    assert {name.rsplit("/", 1)[-1] for name in names} == {"kernel", "bias", "scale", "embedding"}
    assert {"tokens/embedding", "head/kernel", "stack/norm/scale", "stack/layers_0/mixer/query/kernel"} <= names


@pytest.mark.parametrize("mixer", ["gmlp", "amlp"])
def test_weights_of_functions_are_sharded_as_layers_are(mixer):
    """A projection back into the width contracts what the one before it splits."""
    module = nn.MIXERS[mixer](8, heads=2, max_length=4)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 8)))["params"]
    specs = {name: tuple(sharding.spec) for name, sharding in shard_tree(params, make_mesh()).items()}
    assert specs["in_kernel"] == ("fsdp", "tensor") and specs["out_kernel"] == ("tensor", "fsdp")


def test_a_window_for_a_kernel_without_one_and_missing_positions_are_errors():
    def init(module, **options):
        return jax.eval_shape(partial(module.init, **options), jax.random.key(0), np.ones((1, 3, 8)))

    with pytest.raises(ValueError, match="the kernel 'linear' has no window; got 2"):
        init(nn.MIXERS["linear"](8, heads=2, kv_heads=2, window=2))
    turned = nn.MIXERS["softmax"](8, heads=2, kv_heads=2, rotary_base=1e4)
    with pytest.raises(ValueError, match="positions must be given"):
        init(turned, state=jax.eval_shape(lambda: turned.init_state(1, 4)), return_state=True)
    with pytest.raises(ValueError, match="heads must divide width"):
        init(nn.MIXERS["softmax"](8, heads=3, kv_heads=3))
    with pytest.raises(ValueError, match=r"options must give \['stride'\] to the kernel 'strided'"):
        init(nn.MultiHeadAttention(8, kernel="strided"))
    with pytest.raises(ValueError, match="kernel must be among"):
        init(nn.MultiHeadAttention(8, kernel="sofmax"))


@pytest.mark.parametrize("product", [dense_product, float32_product, lambda x, kernel: table_product(x, kernel.T)])
def test_dense_product_has_the_derivatives_of_a_product(product):
    rng = np.random.default_rng(0)
    x, kernel, t = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 3, 4), (4, 5), (4, 5)])

    @jax.jit
    def run(x, kernel, t):
        out, pull = jax.vjp(product, x, kernel)
        tangent = jax.jvp(lambda k: product(x, k), (kernel,), (t,))[1]
        return out, pull(out), tangent, jax.vmap(product, (0, None))(x, kernel)

    out, (of_x, of_kernel), tangent, mapped = jax.tree.map(np.asarray, run(x, kernel, t))
    np.testing.assert_allclose(out, x @ kernel, rtol=1e-5)
    np.testing.assert_allclose(of_x, out @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, np.einsum("bti,btj->ij", x, out), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tangent, x @ t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mapped, x @ kernel, rtol=1e-5, atol=1e-5)


def test_an_embedding_takes_numpy_parameters():
    """Outside `jax.jit` too, as every other layer does."""
    table = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    layer, params = nn.Embedding(5, 4), {"params": {"embedding": table}}
    rows = np.asarray(layer.apply(params, np.array([[3, 1, -1]])))
    np.testing.assert_allclose(rows[0, :2], table[[3, 1]] / EMBEDDING_STD, rtol=1e-6)
    assert np.isnan(rows[0, 2]).all()
    np.testing.assert_allclose(layer.apply(params, rows[:, :2], method="attend")[0], rows[0, :2] @ table.T, rtol=1e-5)
