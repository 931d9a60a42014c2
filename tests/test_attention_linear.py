"""Linear attention beyond the laws: every feature map, numbers of any size, what the delta rule remembers, the weights of any kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention
from effattn_jax.attention import delta_rule_attention, efficient_attention, gated_linear_attention, linear_attention
from effattn_jax.position import rotary_linear_attention
from tests.laws import checks, references
from tests.laws.subjects import MIXER_SUBJECTS, time_slice

LINEAR = next(s for s in MIXER_SUBJECTS if s.name == "linear")
MASK = np.random.default_rng(0).random((2, 1, 1, 9)) < 0.7
SEGMENTS = np.array([[0] * 4 + [1] * 5, [2] * 3 + [0] + [5] * 5], np.int32)
MAPS = sorted(references.PHI)
CALLS = {
    "causal": {},
    "packed": {"mask": MASK, "segment_ids": SEGMENTS},
    "both ways": {"is_causal": False, "mask": MASK},
    "both ways, packed": {"is_causal": False, "mask": MASK, "segment_ids": SEGMENTS},
}


def rows(seed=0, length=7, batch=1, heads=2, dim=4):
    return np.random.default_rng(seed).normal(size=(3, batch, length, heads, dim)).astype(np.float32)


# Feature maps


@functools.cache
def reference_of_map(name):
    """Values and gradients under any mask of pairs, compiled once for all calls."""
    reference = functools.partial(references.linear, feature_map=name, normalize=name != "identity", is_causal=False)
    return jax.jit(lambda inputs, mask: checks.value_and_grads(functools.partial(reference, mask=mask), inputs))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_its_reference(name, call):
    """Values and gradients to 1e-12, with grouped heads; "identity" as it is meant to be used, without a normaliser."""
    options = {"is_causal": True, **CALLS[call]}
    inputs = checks.widened(LINEAR.inputs(length=9))
    function = functools.partial(
        linear_attention, feature_map=name, normalize=name != "identity", chunk_size=4, **options
    )
    with checks.x64():
        expected = reference_of_map(name)(inputs, np.asarray(references.allowed(inputs, **options)))
        actual = checks.value_and_grads(lambda x: function(**x), inputs)
        checks.assert_close(actual, expected, checks.DOUBLE)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_resumes_from_its_state(name):
    inputs = LINEAR.inputs(length=9)
    attend = functools.partial(linear_attention, feature_map=name, is_causal=True, normalize=name != "identity")

    @jax.jit
    def resumed(inputs):
        head, state = attend(**time_slice(inputs, 0, 4), return_state=True)
        middle, state = attend(**time_slice(inputs, 4, 5), initial_state=state, return_state=True)
        tail = attend(**time_slice(inputs, 5, 9), initial_state=state)
        return jnp.concatenate([head, middle, tail], axis=1), attend(**inputs)

    checks.assert_close(*resumed(inputs), checks.OUTPUT)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "identity"])
def test_the_normaliser_has_a_gradient(name):
    """With all values 1 the output is 1 whatever the keys: what the numerator's gradient gives, the normaliser's takes back."""
    query, key, value = rows(length=20)
    loss = lambda q, k: linear_attention(q, k, np.ones_like(value), feature_map=name, is_causal=True).sum()  # noqa: E731
    slopes = jax.jit(jax.grad(loss, (0, 1)))(np.abs(query), np.abs(key))
    for slope in slopes:
        np.testing.assert_allclose(slope, 0, atol=2e-5)


@jax.jit
def at_scale(scale, query, key, value):
    """With scaled features and without: in both directions, and of a map without sizes."""
    maps = lambda x: scale * attention.elu_plus_one(x), attention.elu_plus_one  # noqa: E731
    pairs = [
        [linear_attention(query, key, value, feature_map=one, is_causal=is_causal) for one in maps]
        for is_causal in (True, False)
    ]
    cosine = functools.partial(linear_attention, feature_map="cosine", is_causal=True)
    return pairs, [cosine(scale * query, key / scale, value), cosine(query, key, value)]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_features_cancels(scale):
    """Nothing is added to a normaliser that a small sum would drown in."""
    pairs, cosine = at_scale(scale, *rows(length=20))
    for pair in pairs:
        checks.assert_close(*pair, checks.OUTPUT)
    checks.assert_close(*cosine, 1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["linear", "performer", "rotary_linear"])
def test_an_id_that_comes_again_is_another_document(name, is_causal):
    """In every form, as a state begins anew at each boundary: what a pair of arrays of ids would bring together stays apart."""
    inputs, member = LINEAR.inputs(length=7), next((s.call for s in MIXER_SUBJECTS if s.name == name), None)
    member = member or (lambda x, **options: rotary_linear_attention(**x, query_positions=np.arange(7), **options))
    again, fresh = (np.array([ids] * 2, np.int32) for ids in ([4, 4, 1, 1, 1, 4, 4], [4, 4, 1, 1, 1, 7, 7]))
    every = jax.jit(lambda ids: [member(inputs, is_causal=is_causal, segment_ids=ids, **f) for f in LINEAR.entry.forms])
    for form, *outputs in zip(LINEAR.entry.forms, every(again), every(fresh), strict=True):
        checks.assert_close(*outputs, checks.OUTPUT, str(form))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["linear", "performer", "rotary_linear"])
def test_a_pair_of_ids_is_a_pair_whatever_it_holds(name, is_causal):
    """One array twice is read as two equal ones, compiled or not; a query without a key of its id may hold NaN."""
    inputs, member = LINEAR.inputs(length=7), next((s.call for s in MIXER_SUBJECTS if s.name == name), None)
    member = member or (lambda x, **options: rotary_linear_attention(**x, query_positions=np.arange(7), **options))
    ids, copy = (jnp.asarray(np.array([[4, 4, 1, 1, 2, 4, 4]] * 2, np.int32)) for _ in range(2))
    mask = np.array([1, 0, 1, 1, 0, 1, 1], bool)[None, None, None]

    def values(x, query_ids, key_ids):
        call = functools.partial(member, is_causal=is_causal, mask=mask, segment_ids=(query_ids, key_ids))
        return checks.value_and_grads(lambda x: call(x), x)

    inputs["query"][:, 4] = np.nan
    once, twice = values(inputs, ids, ids), values(inputs, ids, copy)
    checks.assert_close(once, twice, checks.OUTPUT)
    checks.assert_close(jax.jit(values)(inputs, ids, ids), twice, checks.GRADIENT)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(twice))
    assert np.all(np.asarray(twice[0])[:, 4] == 0) and np.any(np.asarray(twice[0])[:, 5])


def test_cosine_of_zero_has_value_and_gradient():
    x = np.array([[0, 0, 0], [3e-30, 0, 4e-30]], np.float32)

    @jax.jit
    def run(x):
        features, pull = jax.vjp(attention.cosine_features, x)
        return features, pull(jnp.ones_like(features))[0]

    features, slope = map(np.asarray, run(x))
    np.testing.assert_allclose(features, [[1, 0, 0, 0], [1, 0.6, 0, 0.8]], rtol=1e-6)
    assert np.all(np.isfinite(slope)) and not np.any(slope[0])


def test_learned_maps_for_queries_and_keys():
    """hedgehog by name with weights, and the same as a pair of functions; a map may be one function of both."""
    query, key, value = rows()
    w_query, w_key = np.random.default_rng(1).normal(size=(2, 2, 4, 3)).astype(np.float32)

    @jax.jit
    def outputs(query, key, value):
        weights = {"query_weights": w_query, "key_weights": w_key}
        named = linear_attention(query, key, value, feature_map="hedgehog", **weights, is_causal=True)
        pair = tuple(attention.hedgehog_features(w) for w in (w_query, w_key))
        by_functions = linear_attention(query, key, value, feature_map=pair, is_causal=True)
        return (
            named,
            by_functions,
            linear_attention(query, key, value, feature_map=lambda x: attention.dpfp_features(x) + 1),
        )

    named, by_functions, one = outputs(query, key, value)
    checks.assert_close(named, by_functions, checks.OUTPUT)
    assert jax.eval_shape(functools.partial(attention.dpfp_features, order=3), query).shape[-1] == 24
    assert np.all(np.isfinite(one))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_map": "hedgehog"}, "query_weights must be given"),
        (
            {"feature_map": "hedgehog", "query_weights": np.ones((4, 4)), "key_weights": np.ones((3, 4))},
            r"key_weights must have shape \(2, 4, 'P'\)",
        ),
        (
            {"feature_map": "hedgehog", "query_weights": np.ones((4, 4)), "key_weights": np.ones((4, 5))},
            "one size P",
        ),
        ({"feature_map": "elu", "key_weights": np.ones((4, 4))}, "key_weights belongs to feature_map='hedgehog'"),
        ({"feature_map": (np.exp,)}, "a pair must hold two functions"),
        ({"feature_map": "taylr"}, "did you mean 'taylor'"),
        ({"normalize": "no"}, "normalize must be True or False; got 'no'"),
    ],
)
def test_mistakes_with_maps(options, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*rows(), **options)


# Exponentials


def exp_reference(inputs):
    """Linear attention with phi = exp by logarithms alone: log w_ij = logsumexp_a(q_ia + k_ja)."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    logs = jax.nn.logsumexp(query[:, :, None] + key[:, None], axis=-1)  # (B, T, S, N)
    causal = np.tri(query.shape[1], dtype=bool)[None, :, :, None]
    return jnp.einsum("btsn,bsnv->btnv", jax.nn.softmax(jnp.where(causal, logs, -jnp.inf), axis=2), value)


@functools.cache
def exponentials():
    """(values and gradients, values of the reference) of both kernels, compiled once for numbers of any size."""

    def kernel(function):
        return jax.jit(functools.partial(checks.value_and_grads, lambda x: function(**x, is_causal=True)))

    linear = functools.partial(linear_attention, feature_map="exp")
    return (kernel(linear), jax.jit(exp_reference)), (kernel(efficient_attention), jax.jit(references.efficient))


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e3])
def test_exponentials_of_any_size(norm):
    """Queries and keys of norms from 1e-3 to 1e3: outputs equal those of logarithms in float64, gradients are finite."""
    query, key, value = rows(length=40)
    query, key = (norm * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    inputs = {"query": query, "key": key, "value": value}
    tolerance = 2e-6 * max(1, norm / 10)  # q + k is rounded at its own size
    for kernel, reference in exponentials():
        output, slopes = kernel(inputs)
        with checks.x64():
            expected = np.asarray(reference(checks.widened(inputs)))
        checks.assert_close(output, expected, tolerance)
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("length, keys, batch", [(4, 0, 2), (0, 4, 2), (3, 5, 0)])
def test_exponentials_of_nothing(length, keys, batch):
    """No keys give 0, in both directions; no queries and no batch give nothing."""
    query, key, value = np.ones((batch, length, 2, 4)), np.ones((batch, keys, 1, 4)), np.ones((batch, keys, 1, 3))
    for function in (efficient_attention, functools.partial(linear_attention, feature_map="exp")):
        for is_causal in (True, False):
            out = jax.jit(functools.partial(function, is_causal=is_causal))(query, key, value)
            assert out.shape == (batch, length, 2, 3) and not np.any(out)


def test_exponentials_shift_with_a_growing_maximum():
    """Keys that rise by 50 a step: each step forgets the last but for exp(-50), in whatever order maxima come."""
    _, _, value = rows(length=30)
    key = np.broadcast_to(50.0 * np.arange(30, dtype=np.float32)[None, :, None, None], value.shape)
    for function in (efficient_attention, functools.partial(linear_attention, feature_map="exp")):
        function = jax.jit(functools.partial(function, is_causal=True))
        np.testing.assert_allclose(function(np.zeros_like(key), key, value), value, rtol=1e-6)
        falling = function(np.zeros_like(key), -key, value)
        np.testing.assert_allclose(falling, np.broadcast_to(value[:, :1], value.shape), rtol=1e-6)


# Decays


DECAYS = [0.0, -1e-8, -50.0, -np.inf]


@functools.cache
def decayed(subject, reference):
    """Values and gradients of both, compiled once for all decays."""
    kernel = functools.partial(subject.call, chunk_size=4)
    return tuple(jax.jit(functools.partial(checks.value_and_grads, function)) for function in (kernel, reference))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated_linear", "gated_delta_rule"])
def test_decays_from_nothing_to_everything(gated, decay):
    """0, -1e-8, -50 and -inf in the middle of a row: the step-by-step recurrence, in gradients too."""
    subject = next(s for s in MIXER_SUBJECTS if s.name == ("gated_linear" if gated else "gated_delta_rule"))
    inputs = subject.inputs(length=9)
    inputs["log_decay"] = inputs["log_decay"].copy()
    inputs["log_decay"][:, 3:6] = decay
    kernel, reference = decayed(subject, references.outer_product if gated else references.delta_rule)
    actual = kernel(inputs)
    with checks.x64():
        expected = jax.tree.map(np.asarray, reference(checks.widened(inputs)))
    checks.assert_same(actual, expected)


def normalised(inputs, feature_map, **pattern):
    """The gated sum over that of the weights, which are those of values of 1."""
    features = {name: references.PHI[feature_map](inputs[name]) for name in ("query", "key")}
    ones = jnp.ones_like(inputs["value"][..., :1])
    values = {"value": jnp.concatenate([inputs["value"], ones], axis=-1)}
    both = references.gated_linear(inputs | features | values, **pattern)
    return both[..., :-1] / jnp.where(both[..., -1:] == 0, 1.0, both[..., -1:])


@pytest.mark.parametrize("case", ["by head", "by feature", "by head, taylor"])
def test_decays_by_head_and_feature_with_a_normaliser(case):
    """Both ways along a packed, padded row, values and gradients in float64; the features are positive, so weights are."""
    rng = np.random.default_rng(0)
    inputs = checks.widened(LINEAR.inputs(length=9))
    inputs |= {name: np.abs(inputs[name]) for name in ("query", "key")}
    inputs["log_decay"] = -rng.exponential(size=(2, 9, 4, 4) if case == "by feature" else (2, 9, 4))
    options = {"feature_map": "taylor" if "taylor" in case else "identity"}

    def both(function, inputs):
        return [function(inputs, mask=MASK, segment_ids=SEGMENTS, is_causal=way, **options) for way in (True, False)]

    def kernel(inputs, **options):
        return gated_linear_attention(**inputs, normalize=True, chunk_size=4, **options)

    with checks.x64():
        actual = checks.value_and_grads(functools.partial(both, kernel), inputs)
        checks.assert_close(actual, checks.value_and_grads(functools.partial(both, normalised), inputs), checks.DOUBLE)


def test_retention_is_a_gated_form():
    query, key, value = rows(heads=3)
    np.testing.assert_array_equal(attention.retention_decay(3), 1 - 0.5 ** np.arange(5, 8))
    log_decay = np.broadcast_to(np.log(attention.retention_decay(3)).astype(np.float32), query.shape[:3])
    gated = jax.jit(functools.partial(gated_linear_attention, is_causal=True))
    retained = jax.jit(functools.partial(attention.retention_attention, is_causal=True))
    checks.assert_close(retained(query, key, value), gated(query, key, value, log_decay=log_decay), checks.OUTPUT)
    half = retained(query, key, value, decay=np.full(3, 0.5, np.float32))
    expected = gated(query, key, value, log_decay=np.full_like(log_decay, np.log(0.5)))
    checks.assert_close(half, expected, checks.OUTPUT)
    with pytest.raises(ValueError, match=r"decay must have shape \(N,\) = \(3,\)"):
        attention.retention_attention(query, key, value, decay=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="num_heads"):
        attention.retention_decay(0)


# The delta rule


def test_delta_rule_recalls_stored_pairs():
    """Orthonormal keys and beta = 1: every stored value comes back, the newest where a key was written twice."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0].astype(np.float32)
    order = np.concatenate([np.arange(64), np.arange(64)[::-1], np.arange(64)])
    key = basis[order][None, :, None]
    value = np.random.default_rng(1).normal(size=(1, 192, 1, 8)).astype(np.float32)
    value[:, 128:] = 0  # asked for, and not written
    beta = np.where(np.arange(192) < 128, 1, 0).astype(np.float32)[None, :, None]
    out = jax.jit(functools.partial(delta_rule_attention, is_causal=True))(key, key, value, beta=beta)
    np.testing.assert_allclose(np.asarray(out)[0, 128:, 0], value[0, 64:128, 0][::-1], atol=1e-5)


def test_delta_rule_with_one_key_again_and_again():
    """A power series of the triangle would reach 1e18 here; the blocks of its inverse stay as small as the answer."""
    value = np.random.default_rng(1).normal(size=(1, 200, 1, 4)).astype(np.float32)
    key = np.broadcast_to(np.float32([0.6, 0.8]), (1, 200, 1, 2))
    kernel, reference = (
        jax.jit(functools.partial(checks.value_and_grads, function))
        for function in (lambda x: delta_rule_attention(**x, is_causal=True), references.delta_rule)
    )
    for strength in (1.0, 1.9):
        beta = np.full((1, 200, 1), strength, np.float32)
        inputs = {"query": key, "key": key, "value": value, "beta": beta}
        out, slopes = kernel(inputs)
        with checks.x64():
            expected = jax.tree.map(np.asarray, reference(checks.widened(inputs)))
        checks.assert_close(out, expected[0], 1e-5)
        checks.assert_close(slopes, expected[1], 1e-4)
        if strength == 1:
            np.testing.assert_allclose(out, value, atol=1e-5)


LONG_DELTA_RULE = jax.jit(functools.partial(delta_rule_attention, is_causal=True, return_state=True))


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.99])
def test_delta_rule_is_stable_with_unit_keys(strength):
    """|k| = 1 and beta in (0, 2): after 8,192 steps the state is as large as values, and float32 is float64 to 1e-4."""
    query, key, value = rows(length=8192, heads=1, dim=16)
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    beta = np.full((1, 8192, 1), strength, np.float32)
    out, state = LONG_DELTA_RULE(query, key, value, beta=beta)
    assert np.abs(state.kv).max() < 100
    with checks.x64():
        wide, _ = LONG_DELTA_RULE(*(x.astype(np.float64) for x in (query, key, value)), beta=beta.astype(np.float64))
        wide = np.asarray(wide)
    checks.assert_close(out, wide, 1e-4)


def test_delta_rule_that_overflows_leaves_the_past_alone():
    """Keys so large that their own products overflow: NaN or Inf from there on, the same bits before."""
    query, key, value = rows(length=70)
    beta = np.ones((1, 70, 2), np.float32) / 4
    attend = jax.jit(functools.partial(delta_rule_attention, is_causal=True))
    clean = np.asarray(attend(query, key, value, beta=beta))
    for size in (1e4, 1e15, 1e30):
        large = np.concatenate([key[:, :40], size * key[:, 40:]], axis=1)
        checks.assert_identical(np.asarray(attend(query, large, value, beta=beta))[:, :40], clean[:, :40])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": np.ones((1, 7), np.float32)}, r"beta must have shape \(\*B, S, N\) = \(1, 7, 2\); got \(1, 7\)"),
        (
            {"beta": np.ones((1, 7, 2), np.float32), "log_decay": np.zeros((1, 7, 2, 4), np.float32)},
            "one decay a head; got one a feature",
        ),
    ],
)
def test_mistakes_with_the_delta_rule(options, message):
    with pytest.raises(ValueError, match=message):
        delta_rule_attention(*rows(), **options)


# Weights


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("subject", MIXER_SUBJECTS, ids=repr)
def test_weights_times_values_are_the_output(subject, is_causal):
    if not is_causal and not subject.bidirectional:
        pytest.skip("it has no form without causality")
    inputs = subject.inputs(length=9)
    options = {"mask": MASK, "segment_ids": SEGMENTS, "is_causal": is_causal}

    @jax.jit
    def weights_and_output(inputs):
        more = {name: array for name, array in inputs.items() if name != "value"} | subject.weights(inputs)
        weights = attention.attention_weights(subject.function, **more, **subject.options, **options)
        own = subject.call(inputs, **options, return_weights=True)[-1] if returns_weights else weights
        return weights, own, subject.call(inputs, **options)

    returns_weights = "return_weights" in subject.parameters
    assert returns_weights or subject.name not in ("softmax", "local", "sparse", "topk", "synthesizer_mixed", "shaw")
    weights, own, output = map(np.asarray, weights_and_output(inputs))
    checks.assert_close(own, weights, checks.OUTPUT)
    value = np.repeat(inputs["value"], 2, axis=2)
    checks.assert_close(np.einsum("bnts,bsnv->btnv", weights, value), output, checks.OUTPUT)
    if subject.name in ("softmax", "linear", "linear_hedgehog", "efficient"):
        seen = np.asarray(references.allowed(inputs, **options)).any(-1)
        np.testing.assert_allclose(weights.sum(-1), np.broadcast_to(seen, weights.shape[:3]), atol=1e-6)


@pytest.mark.parametrize("length, keys", [(3, 0), (0, 3)], ids=["no keys", "no queries"])
@pytest.mark.parametrize("form", [{}, {"implementation": "dense"}, {"segment_ids": "a pair"}], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        linear_attention,
        functools.partial(linear_attention, feature_map="exp"),
        functools.partial(attention.performer_attention, projection=np.ones((8, 4), np.float32)),
    ],
    ids=["elu", "exp", "performer"],
)
def test_nothing_to_see_is_zero_whatever_the_query_holds(call, form, length, keys):
    query, key = np.full((1, length, 2, 4), np.nan, np.float32), np.ones((1, keys, 2, 4), np.float32)
    if "segment_ids" in form:
        form = {"segment_ids": tuple(np.zeros((1, size), np.int32) for size in (length, keys))}
    out, slope = jax.value_and_grad(lambda q: call(q, key, key, **form).sum())(query)
    assert out == 0 and slope.shape == query.shape and not np.any(slope)
    assert call(query, key, key, **form).shape == query.shape


def test_weights_refuse_states():
    query, key, _ = rows()
    for options in ({"return_state": True}, {"initial_state": ()}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must not be given"):
            attention.attention_weights("linear", query, key, is_causal=True, **options)
    with pytest.raises(ValueError, match="kernel='liner' is unknown; did you mean 'linear'"):
        attention.attention_weights("liner", query, key)
    with pytest.raises(ValueError, match="kernel must return the output alone; got 2 results"):
        attention.attention_weights(attention.residual_attention, query, key)
