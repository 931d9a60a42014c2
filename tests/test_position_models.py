"""Encodings and extrapolation as options of the language model: steps equal the whole, padding and packing change nothing, settings at inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax._places import count_positions
from effattn_jax.generate import _settings
from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.nn import MIXERS, MultiHeadAttention, Placing
from effattn_jax.position import alibi_slopes, rotary, rotary_frequencies, rotary_linear_attention, xpos_decay
from effattn_jax.training.errors import UserError
from tests.laws.checks import assert_close
from tests.random_parameters import random_parameters

SMALL = {"layers": 1, "width": 16, "heads": 2, "mlp_ratio": 1.0}
TRAINED = {  # settings that decide parameters or how a model is trained
    "alibi": {"positions": "alibi"},
    "kerple_log": {"positions": "kerple_log", "window": 5},
    "kerple_power": {"positions": "kerple_power"},
    "sandwich": {"positions": "sandwich"},
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned", "max_length": 12},
    "hierarchical": {"positions": "learned", "max_length": 4, "hierarchical_alpha": 0.4},
    "t5": {"positions": "t5", "mixer": "local", "window": 3},
    "xpos": {"positions": "xpos"},
    "xpos in linear time": {"positions": "xpos", "mixer": "gated_linear"},
    "rotary in linear time": {"mixers": "linear,linear_hedgehog", "layers": 2},
    "t5 in TUPE": {"positions": "t5", "mixer": "tupe", "max_length": 12},
    "alibi with sinks": {"positions": "alibi", "window": 3, "sinks": 2},
    "log n": {"log_scale": "train", "train_length": 8},
    "HWFA": {"layers": 2, "window": 3, "full_layers": 1, "full_rotary": False, "log_scale": "train", "train_length": 8},
}
AT_INFERENCE = {  # settings of a model trained with plain rotary positions
    "window": {"window": 5},
    "log n at inference": {"log_scale": "inference", "train_length": 4},
    **{s: {"rotary_scaling": s, "rotary_factor": 8.0, "train_length": 64} for s in ("ntk_mixed", "yarn")},
    "rerope": {"rerope_window": 4, "log_scale": "inference", "train_length": 4},
    "leaky": {"rerope_window": 3, "rerope_leak": 0.25, "rotary_scaling": "ntk", "rotary_factor": 2.0},
    "sinks": {"window": 3, "sinks": 2},
    "ntk in linear time": {"rotary_scaling": "ntk", "rotary_factor": 8.0},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 20, (2, 12))
MASK = np.arange(12) >= np.array([[3], [0]])


def stepwise(model, params, tokens, mask):
    """A prompt of six, then a token a call."""
    logits, state = model.step(params, tokens[:, :6], model.init_state(2, 12), mask=mask[:, :6])

    def step(state, t):
        one, seen = (jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in (tokens, mask))
        logits, state = model.step(params, one, state, mask=seen)
        return state, logits[:, 0]

    rest = jax.lax.scan(step, state, jnp.arange(6, 12))[1]
    return jnp.concatenate([logits, jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize("name", [*TRAINED, *AT_INFERENCE])
def test_steps_equal_the_whole_and_padding_nothing(name):
    linear = {"mixer": "linear"} if name == "ntk in linear time" else {}
    config = ModelConfig(**{**SMALL, **linear, **TRAINED.get(name, {})})
    model = LanguageModel(config, 20)
    used = LanguageModel(config.at_inference(**AT_INFERENCE[name]), 20) if name in AT_INFERENCE else model

    @jax.jit
    def run(params, tokens, mask):
        whole = used.apply({"params": params}, tokens, mask=mask)
        alone = used.apply({"params": params}, tokens[:1, 3:])
        plain = whole if used is model else model.apply({"params": params}, tokens, mask=mask)
        return whole, stepwise(used, params, tokens, mask), alone, plain

    whole, steps, alone, plain = map(np.asarray, run(random_parameters(model, TOKENS[:, :0]), TOKENS, MASK))
    assert_close(np.where(MASK[..., None], steps, 0), np.where(MASK[..., None], whole, 0), 5e-6)
    assert_close(alone[0], whole[0, 3:], 5e-6)
    if name in AT_INFERENCE:
        assert np.abs(whole - plain).max() > 1e-5  # the setting does something


def test_models_at_shifted_positions():
    """Outputs at positions from 10^3 and 10^6 on are those from 0: turned inputs, turned features, scaled frequencies."""
    relative = {
        "softmax": {},
        "yarn": {"rotary_scaling": "yarn", "rotary_factor": 8.0, "train_length": 64},
        "features": {"mixers": "linear,linear_hedgehog", "layers": 2},
        "delta rule": {"mixers": "gated_linear,gated_delta_rule,retention", "layers": 3},
    }
    models = {name: LanguageModel(ModelConfig(**{**SMALL, **options}), 20) for name, options in relative.items()}
    params = {name: random_parameters(model, TOKENS[:, :0]) for name, model in models.items()}

    @jax.jit
    def run(params, start):
        at = start + jnp.broadcast_to(jnp.arange(12), (2, 12))
        return {n: m.apply({"params": params[n]}, TOKENS, positions=at) for n, m in models.items()}

    here = run(params, 0)
    for start in (1_000, 1_000_000):
        for name, out in run(params, start).items():
            assert_close(out, here[name], 1e-5, f"{name} from {start}")


@pytest.mark.parametrize(
    "options", [{"positions": p} for p in ("alibi", "t5", "xpos", "kerple_log", "sandwich")]
    + [{"mixer": "xpos"}, {"rerope_window": 4}, {"window": 3, "sinks": 1}, {"log_scale": "train", "train_length": 8}],
)  # fmt: skip
def test_positions_that_no_kernel_would_read_are_refused(options):
    with pytest.raises(ValueError, match=r"positions must be None where kernels count .*; got \(2, 12\)"):
        model = LanguageModel(ModelConfig(**{**SMALL, **options}), 20)
        jax.eval_shape(lambda at: model.init(jax.random.key(0), TOKENS, positions=at), np.zeros((2, 12), np.int32))


IDS = np.array([[0] * 5 + [1] * 7, [3] * 12])
SEEN = {
    "causal, sinks": ({"window": 2, "sinks": 2}, True, {}),
    "causal, packed, sinks": ({"window": 2, "sinks": 2}, True, {"segment_ids": IDS}),
    "all": ({}, False, {}),
    "packed, hidden": ({}, False, {"segment_ids": IDS, "mask": np.arange(12) % 4 > 0}),
    "window": ({"window": 3}, False, {}),
    "wide window": ({"window": 40}, False, {"segment_ids": IDS}),
    "window, packed, hidden": ({"window": 2}, False, {"segment_ids": IDS, "mask": np.arange(12) % 4 > 0}),
    "sinks, packed, padded": ({"window": 1, "sinks": 2}, False, {"segment_ids": IDS, "mask": MASK}),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN)
def test_log_n_counts_the_keys_that_the_kernel_shows(case):
    """n of each real row against the weights above 0 of the module's own kernel."""
    options, causal, marks = SEEN[case]
    marks = {name: np.broadcast_to(x, (2, 12)) for name, x in marks.items()}
    placing = Placing(log_scale="train", train_length=8, sinks=options.get("sinks", 0))
    window, keep = options.get("window"), marks.get("mask", np.ones((2, 12), bool))

    @jax.jit
    def run(marks):
        factor = placing.query_factor("softmax", {}, count_positions((2, 12), **marks), window, causal=causal, **marks)
        kernel, chosen = placing.kernel("softmax", {}, window, 4, None)
        zeros, values = jnp.zeros((2, 12, 1, 4)), jnp.broadcast_to(jnp.eye(12)[None, :, None], (2, 12, 1, 12))
        hidden = {"mask": keep[:, None, None], "segment_ids": marks.get("segment_ids"), "is_causal": causal}
        return factor, kernel(zeros, zeros, values, **hidden, **chosen)

    factor, weights = run(marks)
    seen = np.count_nonzero(weights[:, :, 0], axis=-1)
    found = np.broadcast_to(np.exp(np.asarray(factor)[..., 0, 0] * np.log(8)), seen.shape)
    np.testing.assert_allclose(found[keep], seen[keep], rtol=1e-5)


def test_log_n_in_a_model_both_ways():
    """Reversing the row reverses the outputs; a packed row is its documents alone, counted without given positions in a causal one too."""
    x = np.random.default_rng(0).normal(size=(1, 12, 8)).astype(np.float32)
    placing = Placing(log_scale="train", train_length=16)
    one, other = (MultiHeadAttention(8, causal=causal, placing=placing) for causal in (False, True))

    @jax.jit
    def run(params, x):
        packed = [m.apply(params, x, segment_ids=jnp.asarray(IDS[:1])) for m in (one, other)]
        return one.apply(params, x), one.apply(params, x[:, ::-1]), packed, [m.apply(params, x[:, 5:]) for m in (one, other)]  # fmt: skip

    params = {"params": random_parameters(one, x)}
    whole, back, packed, alone = jax.tree.map(np.asarray, run(params, x))
    assert_close(back[:, ::-1], whole, 1e-6)
    assert_close([y[:, 5:] for y in packed], alone, 1e-6)


def test_random_and_stretched_positions():
    """Training draws positions, evaluation counts them; a stretched table begins as it was and goes on."""
    learned = ModelConfig(**SMALL, positions="learned", max_length=8)
    model, short = LanguageModel(ModelConfig(**SMALL, random_positions=64), 20), LanguageModel(learned, 20)
    stretched = LanguageModel(learned.at_inference(hierarchical_alpha=0.4), 20)

    @jax.jit
    def run(params, table):
        rngs = [{"dropout": jax.random.key(i)} for i in (1, 2)]
        drawn = [model.apply(params, TOKENS, deterministic=False, rngs=rng) for rng in rngs]
        return model.apply(params, TOKENS), *drawn, stretched.apply(table, TOKENS), short.apply(table, TOKENS[:, :8])

    params, table = ({"params": random_parameters(m, TOKENS[:, :0])} for m in (model, short))
    counted, *drawn, longer, whole = map(np.asarray, run(params, table))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4 and np.abs(drawn[0] - counted).max() > 1e-4
    assert_close(longer[:, :8], whole, 1e-5)
    with pytest.raises(ValueError, match="at most 64 long with learned positions; got 65"):
        stretched.apply(table, np.ones((1, 65), np.int32))


def test_xpos_in_linear_time_is_the_sum_written_out():
    """gated_linear with rotary queries and keys and XPOS's factors as decays: unnormalised scores q . R k x^(i - j)."""
    from effattn_jax.attention import gated_linear_attention

    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 7, 1, 8)).astype(np.float32)
    decay = np.broadcast_to(np.tile(np.asarray(xpos_decay(8), np.float32), 2), q.shape)

    @jax.jit
    def run(q, k, v):
        turned, later = ([rotary(x, start + jnp.arange(7)) for x in (q, k)] for start in (0, 1_000_000))
        return turned, gated_linear_attention(*later, v, log_decay=decay, is_causal=True)

    turned, out = jax.tree.map(np.asarray, run(q, k, v))
    r = np.arange(7)[:, None] - np.arange(7)[None]
    fading = np.exp(np.tile(xpos_decay(8), 2) * np.maximum(r, 0)[..., None])
    scores = np.einsum("tnh,snh,tsh->ts", *(x[0] for x in turned), fading) * (r >= 0)
    np.testing.assert_allclose(out[0, :, 0], scores @ v[0, :, 0], atol=2e-5)


def test_rotary_positions_in_linear_attention():
    """The quotient written out, for a whole row and a token a call."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 7, 2, 4)).astype(np.float32)
    phi = [np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k)]
    options = {"is_causal": True, "return_state": True}

    @jax.jit
    def run(q, k, v):
        whole = rotary_linear_attention(q, k, v, query_positions=jnp.arange(7), **options)[0]
        first, state = rotary_linear_attention(q[:, :4], k[:, :4], v[:, :4], query_positions=jnp.arange(4), **options)
        later = {"query_positions": 4 + jnp.arange(3), "initial_state": state, **options}
        turned = [rotary(x, jnp.arange(7)) for x in phi]
        return whole, first, rotary_linear_attention(q[:, 4:], k[:, 4:], v[:, 4:], **later)[0], turned

    whole, first, rest, turned = jax.tree.map(np.asarray, run(q, k, v))
    causal = np.tril(np.ones((7, 7)))
    above = np.einsum("btnh,bsnh,ts,bsnv->btnv", *turned, causal, v)
    below = np.einsum("btnh,bsnh,ts->btn", *phi, causal)[..., None]
    np.testing.assert_allclose(whole, above / below, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([first, rest], axis=1), whole, atol=1e-5)


MAPS = {
    "linear": lambda x, w: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "linear_relu": lambda x, w: np.maximum(x, 0),
    "linear_dpfp": lambda x, w: (lambda r: r * np.roll(r, -1, -1))(np.maximum(np.concatenate([x, -x], -1), 0)),
    "linear_hedgehog": lambda x, w: np.concatenate(
        [np.exp(y) / np.exp(y).sum(-1, keepdims=True) for s in (1, -1) for y in [s * np.einsum("btnh,nhp->btnp", x, w)]], -1
    ),
    "linear_cosine": lambda x, w: np.concatenate([np.ones_like(x[..., :1]), x / np.linalg.norm(x, axis=-1, keepdims=True)], -1),
}  # fmt: skip


def numerator(x):
    """R(t) x in float64, for halves of the features."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half))[None, :, None]
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def initial(modules, x):
    """The first parameters of each module, in one program."""
    return jax.jit(lambda: {name: module.init(jax.random.key(0), x)["params"] for name, module in modules.items()})()


@pytest.mark.parametrize("causal", [True, False])
def test_rotary_positions_act_where_the_map_lets_them(causal):
    """The module against its projections and the quotient written out: features turned above alone, but where products are functions of q . k."""
    x, width, heads = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32), 16, 2
    modules = {name: MIXERS[name](width, heads=heads, kv_heads=2, causal=causal, rotary_base=1e4) for name in MAPS}
    params = initial(modules, x)
    run = jax.jit(lambda params: {name: module.apply({"params": params[name]}, x) for name, module in modules.items()})
    order = np.tril(np.ones((7, 7))) if causal else np.ones((7, 7))
    for name, found in run(params).items():
        p = jax.tree.map(np.float64, params[name])
        q, k, v = (np.reshape(x @ p[part]["kernel"], (2, 7, heads, 8)) for part in ("query", "key", "value"))
        if name == "linear_cosine":
            q, k = numerator(q), numerator(k)
        phi = [MAPS[name](y, p.get(f"{part}_weights")) for y, part in ((q, "query"), (k, "key"))]
        turned = phi if name == "linear_cosine" else [numerator(f) for f in phi]
        above = np.einsum("btnm,bsnm,ts,bsnv->btnv", *turned, order, v)
        below = np.einsum("btnm,bsnm,ts->btn", *phi, order)[..., None]
        expected = np.divide(above, below, out=np.zeros_like(above), where=below != 0).reshape(2, 7, width)
        assert_close(found, (expected @ p["out"]["kernel"]).astype(np.float32), 1e-5, name)


def test_hidden_keys_and_packed_rows_with_turned_features():
    """A NaN in a hidden key enters neither outputs nor gradients; documents are as if alone, wherever they stand."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 9, 2, 4)).astype(np.float32)
    k[0, 2], v[0, 2] = np.nan, np.nan
    keep, ids = (np.arange(9) != 2)[None, None, None], np.array([[0] * 5 + [1] * 4])

    def call(arrays, at, **options):
        return rotary_linear_attention(*arrays, query_positions=at, is_causal=True, normalize=True, **options)

    def loss(arrays):
        return jnp.sum(call(arrays, jnp.arange(9), mask=keep, segment_ids=ids) ** 2)

    @jax.jit
    def run(arrays):
        tail = call([x[:, 5:] for x in arrays], jnp.arange(4))
        return jax.grad(loss)(arrays), call(arrays, jnp.arange(9), mask=keep, segment_ids=ids), tail

    (of_query, of_key, of_value), packed, tail = jax.tree.map(np.asarray, run([q, k, v]))
    assert all(np.isfinite(g).all() for g in (of_query, of_key, of_value, packed))
    assert np.abs(of_key[0, 2]).max() == np.abs(of_value[0, 2]).max() == 0
    assert_close(tail, packed[:, 5:], 5e-6)
    with pytest.raises(ValueError, match="rotary_linear_attention has no pairwise scores to add a bias to"):
        call([q, k, v], np.arange(9), bias=np.zeros((9, 9), np.float32))


def test_mixers_with_positions_of_their_own():
    """Their weights learn and begin where the papers have them; rerope and xpos are softmax with those positions."""
    x = np.random.default_rng(0).normal(size=(1, 9, 64)).astype(np.float32)
    names = ("shaw", "xl", "tupe", "disentangled")
    modules = {name: MIXERS[name](64, heads=2, kv_heads=1, max_length=64, rotary_base=1e4) for name in names}
    plain = MIXERS["softmax"](64, heads=2, kv_heads=1, rotary_base=1e4)
    params, shared = initial(modules, x), random_parameters(plain, x)
    pairs = {
        "rerope": ({"placing": Placing(rerope_window=3, rerope_leak=0.5)},) * 2,
        "xpos": ({}, {"placing": Placing("xpos")}),
    }

    @jax.jit
    def run(params, shared):
        grads = {n: jax.grad(lambda p, m=m: jnp.sum(m.apply({"params": p}, x) ** 2))(params[n]) for n, m in modules.items()}  # fmt: skip
        equal = {
            name: [m.clone(**o).apply({"params": shared}, x) for m, o in zip((MIXERS[name](64, heads=2), plain), options)]
            for name, options in pairs.items()
        }  # fmt: skip
        return grads, equal

    grads, equal = run(params, shared)
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).max() > 0
    for name, (ours, softmax) in equal.items():
        assert_close(ours, softmax, 5e-6, name)
    spread = {name: {k: np.std(w) for k, w in p.items() if hasattr(w, "shape")} for name, p in params.items()}
    expected = {
        "shaw": dict.fromkeys(("key_table", "value_table"), (2 / (33 + 32)) ** 0.5),
        "xl": {"relative_key": 0.02 * 2**0.5, "content_bias": 0.02, "position_bias": 0.02},
        "tupe": {"position_query": 0.16, "position_key": 0.16, "first_token": 0.0},
        "disentangled": dict.fromkeys(("key_table", "query_table"), 0.16),
    }
    for name, stds in expected.items():
        assert spread[name].keys() == stds.keys()
        assert all(abs(spread[name][k] - std) <= 0.2 * std for k, std in stds.items()), (name, spread[name])


def test_published_parts():
    """The module's slopes are ALiBi's and not trained; its frequencies are those of `rotary_frequencies`."""
    module = MultiHeadAttention(16, heads=2, kv_heads=2, placing=Placing("alibi"))
    params = jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 4, 16), np.float32))["params"]
    assert not any("bias" in name for name in params)
    np.testing.assert_array_equal(Placing("alibi").bias(4, True, None).slopes, alibi_slopes(4))
    scaled = Placing(scaling="ntk", factor=4.0).frequencies(8, 10000.0)
    np.testing.assert_array_equal(scaled, rotary_frequencies(8, scaling="ntk", factor=4.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "alibi", "mixer": "linear"}, "linear has no pairwise scores to add a bias to"),
        ({"positions": "alibi", "mixer": "min_gru"}, "no queries and keys"),
        ({"positions": "xpos", "mixer": "performer"}, "performer cannot fade with the distance"),
        ({"positions": "xpos", "window": 3}, "xpos has no window of its own"),
        ({"rerope_window": 4, "mixer": "topk"}, "rerope and sinks are a form of softmax attention"),
        ({"log_scale": "train", "train_length": 8, "mixer": "linear_relu"}, "no temperature in linear"),
        (
            {"positions": "learned", "mixer": "shaw"},
            "positions must be rotary or none, since shaw has its own; got 'learned'",
        ),
        ({"positions": "alibi", "mixer": "tupe"}, "tupe has positions of its own and takes no alibi"),
        (
            {"rotary_scaling": "ntk", "rotary_factor": 2.0, "mixer": "xl"},
            "xl has positions of its own, which rotary_scaling",
        ),
        ({"log_scale": "train", "train_length": 8, "mixer": "xl"}, "does not reach all terms of the scores of xl"),
        ({"window": 4, "mixer": "rerope"}, "window must be None, since no layer can limit itself to a window: rerope"),
        ({"random_positions": 9, "mixer": "shaw"}, "random_positions must be 0 where kernels count"),
        ({"log_scale": "train"}, "train_length must be above 1"),
        ({"rotary_scaling": "yarn", "rotary_factor": 2.0}, "train_length must be above 1"),
        ({"rotary_scaling": "ntk", "positions": "none"}, "rotary_scaling must be none without rotary"),
        (
            {"rotary_base": 1.0, "rotary_scaling": "yarn", "rotary_factor": 4.0, "train_length": 16},
            "rotary_base must be above 1 with yarn; got 1.0",
        ),
        (
            {"positions": "none", "mixer": "xpos", "width": 12},
            "mixer must be another option, since the head .* 3 is odd",
        ),
        (
            {"positions": "none", "mixers": "rerope", "layers": 1, "width": 12},
            "mixers must be another .* 3 is odd; got 'rerope'",
        ),
        ({"rotary_factor": 0.5}, "rotary_factor must be at least 1"),
        ({"rotary_factor": 8.0}, "rotary_factor must be 1 without rotary_scaling"),
        ({"rerope_leak": 0.1}, "rerope_leak must be 0 without rerope_window"),
        ({"rerope_window": 4, "positions": "learned"}, "rerope_window must be None without rotary"),
        ({"sinks": 2}, "sinks must be 0 without a window"),
        ({"full_layers": 1}, "full_layers must be None without a window"),
        ({"full_layers": 5, "window": 4}, r"full_layers must be in 0 \.\.\. layers=4; got 5"),
        ({"hierarchical_alpha": 0.5, "positions": "learned"}, "hierarchical_alpha must be"),
        ({"random_positions": 9, "positions": "alibi"}, "random_positions must be 0 where kernels count"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options).validate()


def test_settings_at_inference():
    with pytest.raises(ValueError, match="the setting to change at inference is 'windoww'. Perhaps you meant 'window'"):
        ModelConfig().at_inference(windoww=3)
    given = _settings(["rotary_scaling=ntk_mixed", "rotary-factor=8", "window=None"])
    assert given == {"rotary_scaling": "ntk_mixed", "rotary_factor": 8, "window": None}
    with pytest.raises(UserError, match="NAME=VALUE"):
        _settings(["window"])
