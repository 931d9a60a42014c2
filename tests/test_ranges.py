"""Types and sizes of numbers that calls must not break on: sums in half precision, extreme features, scales and states."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import (
    MIXERS,
    cosine_features,
    delta_rule_attention,
    dot_product_attention,
    efficient_attention,
    linear_attention,
    linformer_attention,
    performer_attention,
    random_features,
    retention_attention,
)
from effattn_jax.mixing import gmlp
from effattn_jax.position import rotary_linear_attention


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BOTH_WAYS = {
    "retention": lambda q, k, v: retention_attention(q, k, v, decay=jnp.full(1, 0.9)),
    "delta rule": lambda q, k, v: delta_rule_attention(q, k, v, beta=jnp.full(k.shape[:3], 0.5)),
    "efficient": lambda q, k, v: efficient_attention(q, k, v, segment_ids=np.zeros((1, 11), np.int32)),
    "rotary linear": lambda q, k, v: rotary_linear_attention(
        q, k, v, query_positions=jnp.zeros((1, 11), int), normalize=False, feature_map="relu", segment_ids=np.zeros((1, 11), np.int32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_past_and_future_are_added_before_they_are_rounded(name):
    """Values that cancel: rounding each of the two sums leaves an error as large as the result, or Inf - Inf in float16."""
    ones, call = np.full((1, 11, 1, 2), 0.5, np.float32), jax.jit(BOTH_WAYS[name])
    for dtype, size in ((jnp.bfloat16, 100.3), (jnp.float16, 3e4)):
        value = np.array([size] * 5 + [0.5] + [-size] * 5, dtype).reshape(1, 11, 1, 1)
        got = call(ones.astype(dtype), ones.astype(dtype), value)
        wide = call(ones, ones, value.astype(np.float32))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, np.asarray(wide).astype(dtype))


@pytest.mark.parametrize("size", [1e-10, 1e10])
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {}, {"implementation": "dense"}, {"segment_ids": np.zeros((1, 6), np.int32)}],
    ids=["causal", "all", "dense", "segments"],
)
def test_gradients_of_a_quotient_at_every_size_of_features(size, options):
    """The sums are 1e-20 or 1e20, whose squares float32 does not hold; first and second derivatives are those at size 1."""
    query, key, value = (
        jnp.abs(normal(0, 1, 6, 1, 4)) + 0.5,
        jnp.abs(normal(1, 1, 6, 1, 4)) + 0.5,
        normal(2, 1, 6, 1, 4),
    )

    @jax.jit
    def derivatives(size):
        def loss(query, key):
            out = linear_attention(query * size, key * size, value, feature_map="relu", **options)
            return jnp.sum(out**2)

        def slope(query, key):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(loss, (0, 1))(query, key))

        return [*jax.grad(loss, (0, 1))(query, key), *jax.grad(slope, (0, 1))(query, key)]

    for got, expected in zip(derivatives(size), derivatives(1.0), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_performer_has_gradients_where_it_has_weights():
    """Norms of 30, at which sums of features leave the range of float32's square root."""
    projection = random_features(jax.random.key(0), 32, 8)
    query, key, value = (normal(i, 1, 5, 1, 8) for i in range(3))
    query, key = (x * 30 / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))

    def loss(query, key):
        out = performer_attention(query, key, value, projection=projection, is_causal=True)
        return jnp.sum(out * jnp.cos(out))

    assert all(jnp.isfinite(g).all() for g in jax.grad(loss, (0, 1))(query, key))


@pytest.mark.parametrize("kernel", [linear_attention, efficient_attention, dot_product_attention])
def test_scales_that_half_precision_does_not_hold(kernel):
    half = [normal(i, 1, 6, 1, 4).astype(jnp.float16) for i in range(3)]
    wide = [x.astype(jnp.float32) for x in half]
    options = {"feature_map": "relu"} if kernel is linear_attention else {}
    for scale in (1e5, jnp.float32(1e5)):
        got, expected = kernel(*half, scale=scale, **options), kernel(*wide, scale=1e5, **options)
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_exponentials_of_large_keys_pair_by_pair():
    """Segments that queries and keys have apart, and the dense form, which go through all pairs."""
    query, key, value = normal(0, 1, 6, 1, 4), normal(1, 1, 6, 1, 4) + 100, normal(2, 1, 6, 1, 4)
    ids, exp = np.zeros((1, 6), np.int32), {"feature_map": "exp"}
    expected = linear_attention(query, key - 100, value, **exp)
    for options in ({"segment_ids": (ids, ids.copy())}, {"implementation": "dense"}):
        np.testing.assert_allclose(
            linear_attention(query, key, value, **exp, **options), expected, rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", ["linear", "efficient", "delta_rule", "performer"])
def test_a_narrow_state_does_not_narrow_the_sums(name):
    """A state that was cast to bfloat16 is a rounded one; what is added to it is added in float32, and in float64 to float64."""
    mixer = MIXERS[name]
    query, key, value = (normal(i, 1, 9, 2, 4) for i in range(3))
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), query)
    weights = {} if mixer.weights is None else mixer.weights(jax.random.key(4), 2, 2, 4)

    @jax.jit
    def call(state):
        return mixer.function(
            query,
            key,
            value,
            is_causal=True,
            initial_state=state,
            return_state=True,
            **mixer.options,
            **extras,
            **weights,
        )

    def floats(state, dtype):
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    _, state = call(None)
    narrow = floats(state, jnp.bfloat16)
    for got, expected in zip(
        jax.tree.leaves(call(narrow)), jax.tree.leaves(call(floats(narrow, jnp.float32))), strict=True
    ):
        assert got.dtype == expected.dtype != jnp.bfloat16
        np.testing.assert_array_equal(got, expected)


def test_gmlp_in_float16_where_what_is_inside_is_larger():
    kernel = 100 * jax.random.uniform(jax.random.key(1), (4, 8), minval=0.5)
    inputs, ones = jnp.linspace(100, 900, 12).reshape(3, 4), jnp.ones
    rest = (kernel, jnp.zeros(8), jnp.zeros((3, 3)), ones(3), ones(4), jnp.zeros(4), 1e-3 * ones((4, 4)), jnp.zeros(4))
    np.testing.assert_allclose(gmlp(inputs.astype(jnp.float16), *rest), gmlp(inputs, *rest), rtol=2e-3)


def test_decay_zero_has_a_gradient():
    query, key, value = (normal(i, 1, 6, 2, 4) for i in range(3))
    gradient = jax.grad(lambda d: retention_attention(query, key, value, decay=d, is_causal=True).sum())(
        jnp.array([0.0, 1.0])
    )
    assert gradient[0] == 0 and jnp.isfinite(gradient[1])


def test_cosines_of_the_largest_numbers():
    for size in (9e37, 3.4e38):
        np.testing.assert_allclose(cosine_features(jnp.full(2, size)), [1, 0.5**0.5, 0.5**0.5], rtol=1e-6)


def weights_of(mixer):
    if mixer.weights is None:
        return {}
    length = {"length": 8} if "length" in inspect.signature(mixer.weights).parameters else {}
    return mixer.weights(jax.random.key(4), 2, 2, 4, **length)


# Of the table all with segments.
ALIGNED = sorted(n for n in MIXERS if "causality" not in MIXERS[n].exempt)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ALIGNED)
def test_padding_in_front_may_hold_nan_in_queries_too(name, is_causal):
    """A query that sees no key gives 0 and passes nothing back, whatever it holds; a state that came in is something to see."""
    mixer, mask = MIXERS[name], np.array([False, False, True, True, True])
    arrays = [normal(i, 1, 5, 2, 4) for i in range(3)]
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), arrays[0])
    hidden = {} if is_causal else {"segment_ids": jnp.array([[0, 0, 1, 1, 1]])}
    weights = {**weights_of(mixer), "scale": np.float32(0.7)}

    def loss(arrays, weights):
        options = {**mixer.options, **extras, **weights, **hidden}
        out = mixer.function(*arrays, mask=mask[None, None, None], is_causal=is_causal, **options)
        return jnp.sum(out**2), out

    padding = np.array([True, True, False, False, False])[None, :, None, None]
    poisoned, clean = ([np.where(padding, fill, x).astype(np.float32) for x in arrays] for fill in (np.nan, 0))
    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    got, expected = (gradient(xs, weights) for xs in (poisoned, clean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert not np.any(got[1][:, :2])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ["softmax", "synthesizer_dense", "synthesizer_factorized_dense", "synthesizer_mixed"])
def test_a_document_that_goes_on_after_another_is_seen(name, is_causal):
    """The last token's own key is hidden, and so is the whole of its stretch; those of its id before another document are not."""
    arrays, ids = [normal(i, 1, 5, 2, 4) for i in range(3)], jnp.array([[1, 1, 2, 2, 1]])
    shown = jnp.array([True] * 4 + [False])
    options = {"scale": jnp.array(0.7), "segment_ids": ids, "is_causal": is_causal, **weights_of(MIXERS[name])}
    call = jax.jit(functools.partial(MIXERS[name].function, **options))
    by_keys, by_pairs = (
        call(*arrays, mask=mask) for mask in (shown[None, None, None], jnp.broadcast_to(shown, (1, 1, 5, 5)))
    )
    np.testing.assert_allclose(by_keys[:, 4], by_pairs[:, 4], atol=1e-6)


@pytest.mark.parametrize("keys", [3, 0])
def test_linformer_without_any_key(keys):
    """A row of padding alone gives 0 and passes nothing back, whatever its queries hold."""
    query, key = jnp.full((1, 2, 1, 4), jnp.nan), jnp.ones((1, keys, 1, 4))

    def loss(query, table):
        mask, tables = jnp.zeros((1, 1, 1, keys), bool), {"key_projection": table, "value_projection": table}
        return linformer_attention(query, key, key, mask=mask, **tables).sum()

    value, grads = jax.value_and_grad(loss, (0, 1))(query, jnp.ones((2, 5)))
    assert value == 0 and not any(jnp.any(g != 0) for g in grads)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("lengths", [(1, 4), (4, 2)])
@pytest.mark.parametrize("name", ["linear", "performer", "delta_rule"])
def test_masks_where_lengths_differ(name, lengths, is_causal):
    """A mask of all keys changes nothing, and a hidden key in front neither."""
    mixer, (length, keys) = MIXERS[name], lengths
    query, key, value = normal(0, 1, length, 2, 4), normal(1, 1, keys, 2, 4), normal(2, 1, keys, 2, 4)
    extras = {} if mixer.extras is None else mixer.extras(np.random.default_rng(3), key)
    weights = {} if mixer.weights is None else mixer.weights(jax.random.key(4), 2, 2, 4)
    call = jax.jit(functools.partial(mixer.function, is_causal=is_causal, **mixer.options, **weights))
    plain = call(query, key, value, **extras)
    whole = call(query, key, value, mask=jnp.ones((1, 1, 1, keys), bool), **extras)
    np.testing.assert_allclose(whole, plain, rtol=1e-6, atol=1e-7)
    if length > keys:
        return  # queries would move to other keys
    key, value = (jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)], constant_values=jnp.nan) for x in (key, value))
    extras = {name: jnp.pad(x, [(0, 0), (1, 0), (0, 0)]) for name, x in extras.items()}
    mask = (jnp.arange(keys + 1) > 0)[None, None, None]
    np.testing.assert_allclose(call(query, key, value, mask=mask, **extras), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, option",
    [("local", "window"), ("sparse", "window"), ("atrous", "dilation"), ("fixed", "block"), ("topk", "k")],
)
def test_patterns_larger_than_any_row(name, option):
    """Up to sys.maxsize and beyond: as a number that is just larger than the row, in both forms."""
    mixer, x = MIXERS[name], normal(0, 1, 9, 1, 4)
    for form in ({"implementation": "dense"}, {"implementation": "chunked"}):
        calls = [
            jax.jit(functools.partial(mixer.function, is_causal=True, **mixer.options | {option: n}, **form))(x, x, x)
            for n in (2**31 - 1, 2**65, 30)
        ]
        for got in calls[:2]:
            np.testing.assert_allclose(got, calls[2], atol=1e-6)


def test_a_call_of_no_tokens_leaves_the_segment_in_progress():
    x, ids = normal(0, 1, 4, 2, 4), jnp.full((1, 4), 7)
    _, state = dot_product_attention(x, x, x, is_causal=True, segment_ids=ids, return_state=True)
    none = x[:, :0]
    _, after = dot_product_attention(
        none, none, none, is_causal=True, segment_ids=ids[:, :0], initial_state=state, return_state=True
    )
    assert after.last == 7
