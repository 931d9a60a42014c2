"""Attention with relative positions against all scores written out, in both forms, packed, masked, and step by step; embeddings and frequencies."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import attention, position
from effattn_jax.position import (
    complex_order_embedding,
    disentangled_attention,
    floater_embedding,
    hierarchical_embedding,
    log_length_scale,
    random_positions,
    rerope_attention,
    rotary,
    rotary_frequencies,
    shaw_attention,
    tupe_attention,
    xl_attention,
    xpos,
    xpos_attention,
    yarn_temperature,
)
from tests.laws.checks import assert_close, value_and_grads

B, T, N, H, V = 2, 13, 2, 8, 6
IDS = np.array([[0] * 5 + [1] * 8, [3] * 13])
MASK = ((np.random.default_rng(3).random((2, 1, 1, T)) > 0.2) | (np.arange(T) == 0)).astype(bool)
PADDED = np.broadcast_to(np.arange(T) >= np.array([[3], [0]]), (2, T))[:, None, None]  # in front: no pattern moves


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs():
    return [draw(i, B, T, N, size) for i, size in enumerate((H, H, V))]


def turned(x, positions):
    """R(t) x for halves of features, t of any shape (..., 1 for heads) by complex products."""
    w = 10000.0 ** (-np.arange(0, H, 2) / H)
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * jnp.exp(1j * (positions[..., None] * w))
    return jnp.concatenate([z.real, z.imag], axis=-1)


def product(query, key):
    return jnp.einsum("btnh,bsnh->bnts", query, key)


def distances(p):
    """i - j, (B, T, S)."""
    return p[:, :, None] - p[:, None, :]


def shaw(q, k, v, p, w):
    d = np.clip(-distances(p), -3, 3) + 3
    scores = product(q, k) + jnp.einsum("btnh,btsnh->bnts", q, w["key_table"][d])
    return scores / math.sqrt(H), jnp.moveaxis(w["value_table"][d], 3, 1)


def disentangled(q, k, v, p, w):
    d, e = (np.clip(x + 4, 0, 7) for x in (distances(p), -distances(p)))
    scores = product(q, k) + jnp.einsum("btnh,btsnh->bnts", q, w["key_table"][d])
    return (scores + jnp.einsum("bsnh,btsnh->bnts", k, w["query_table"][e])) / math.sqrt(3 * H), None


def xl(q, k, v, p, w):
    angle = distances(p)[..., None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    relative = jnp.einsum("btsm,mnh->btsnh", waves, w["relative_key"])
    far = jnp.einsum("btnh,btsnh->bnts", q + w["position_bias"][None, None], relative)
    return (product(q + w["content_bias"][None, None], k) + far) / math.sqrt(H), None


def tupe(q, k, v, p, w):
    rows, columns = w["position_query"][p], w["position_key"][p]
    place = product(rows, columns) / math.sqrt(2 * H)
    first, second = (w["first_token"][:, i][None, :, None, None] for i in (0, 1))
    row, column = (p == 0)[:, None, :, None], (p == 0)[:, None, None, :]
    return product(q, k) / math.sqrt(2 * H) + jnp.where(row, first, jnp.where(column, second, place)), None


def by_distance(f):
    """Scores q . R(f(r)) k from a function of distances."""

    def scores(q, k, v, p, w):
        r = f(distances(p).astype(float))
        moved = turned(jnp.broadcast_to(k[:, None], (B, T, T, N, H)), -r[..., None])
        return jnp.einsum("btnh,btsnh->bnts", q, moved) / math.sqrt(H), None

    return scores


def leaky(w, leak):
    return by_distance(lambda r: np.sign(r) * np.where(abs(r) < w, abs(r), w + (abs(r) - w) * leak))


def faded(q, k, v, p, w):
    r = distances(p)
    x = (2 * np.arange(H // 2) / H + 0.4) / 1.4
    moved = turned(jnp.broadcast_to(k[:, None], (B, T, T, N, H)), -r.astype(float)[..., None])
    fading = np.tile(x, 2) ** (r[..., None] / 512)
    return jnp.einsum("btnh,btsnh,btsh->bnts", q, moved, np.where(r[..., None] < 0, 1, fading)) / math.sqrt(H), None


MEMBERS = {
    "shaw": (shaw_attention, shaw, {"key_table": draw(4, 7, N, H), "value_table": draw(5, 7, N, V)}, {}),
    "disentangled": (disentangled_attention, disentangled, {"key_table": draw(4, 8, N, H), "query_table": draw(5, 8, N, H)}, {}),
    "xl": (xl_attention, xl, {"relative_key": draw(4, 6, N, H), "content_bias": draw(5, N, H), "position_bias": draw(6, N, H)}, {}),
    "tupe": (tupe_attention, tupe, {"position_query": draw(4, T, N, 4), "position_key": draw(5, T, N, 4), "first_token": draw(6, N, 2)}, {}),
    "rerope": (rerope_attention, leaky(4, 0.0), {}, {"window": 4}),
    "leaky": (rerope_attention, leaky(3, 0.25), {}, {"window": 3, "leak": 0.25}),
    "sinks": (rerope_attention, leaky(4, 0.0), {}, {"window": 4, "sinks": 2}),
    "xpos": (xpos_attention, faded, {}, {}),
}  # fmt: skip


def places(mask, ids):
    real = np.ones((B, T), int) if mask is None else np.broadcast_to(mask[:, 0, 0], (B, T)).astype(int)
    before = np.cumsum(real, axis=1) - real
    if ids is None:
        return before
    start = np.array([[before[b, np.argmax(ids[b] == ids[b, t])] for t in range(T)] for b in range(B)])
    return before - start


def reference(name, arrays, weights, *, is_causal, mask=None, segment_ids=None):
    _, scores, _, options = MEMBERS[name]
    q, k, v = arrays
    p = places(mask, segment_ids)
    s, extra = scores(q, k, v, p, weights)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    see = np.ones((B, 1, T, T), bool) & (~np.array(is_causal) | (j <= i))
    if mask is not None:
        see = see & mask
    if segment_ids is not None:
        see = see & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if "sinks" in options:
        see = see & ((abs(i - j) < options["window"]) | (p < options["sinks"])[:, None, None, :])
    s = jnp.where(see, s, -1e30)
    weight = jnp.where(see, jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True))), 0)
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-30)
    out = jnp.einsum("bnts,bsnv->btnv", weight, v)
    return out if extra is None else out + jnp.einsum("bnts,bntsv->btnv", weight, extra)


CASES = {
    "by blocks": ({"is_causal": True}, {"chunk_size": 5}),
    "both ways": ({"is_causal": False}, {"chunk_size": 5}),
    "packed": ({"is_causal": True, "segment_ids": IDS, "mask": PADDED}, {"chunk_size": 5}),
    "dense": ({"is_causal": True}, {"implementation": "dense"}),
}


@pytest.mark.parametrize(
    "length, keys, rows, reach, is_causal",
    [(13, 13, 3, 6, True), (5, 11, 2, 20, False), (9, 4, 4, 1, True), (1, 9, 1, 3, True)],
)
@pytest.mark.parametrize("name", ["shaw", "disentangled"])
def test_moved_diagonals_are_what_is_gathered(name, length, keys, rows, reach, is_causal):
    """Without a mask tables are looked up along diagonals, under one that hides nothing by a gather: the same numbers and gradients."""
    tables = {"key_table": draw(3, 2 * reach + (name == "shaw"), H)}
    tables |= (
        {"value_table": draw(4, 2 * reach + 1, N, V)} if name == "shaw" else {"query_table": draw(5, 2 * reach, N, H)}
    )
    rows_of = {"query": draw(0, 1, length, N, H), "key": draw(1, 1, keys, N, H), "value": draw(2, 1, keys, N, V)}
    options = {"is_causal": is_causal, "implementation": "chunked", "chunk_size": rows}

    def call(mask, inputs):
        return position.MIXERS[name].function(**inputs, mask=mask, **options)

    @jax.jit
    def both(arrays):
        masks = None, np.ones((1, 1, 1, keys), bool)
        return [value_and_grads(functools.partial(call, mask), arrays) for mask in masks]

    (moved, slopes), (gathered, expected) = both(rows_of | tables)
    assert_close(moved, gathered, 2e-6)
    assert_close(slopes, expected, 1e-5, "gradient")


def every_member(call, is_causal):
    """Outputs and gradients of call(name, arrays, weights), all members that have the form in one program."""
    names = [name for name in MEMBERS if is_causal or name != "xpos"]

    trees = {name: (inputs(), MEMBERS[name][2]) for name in names}
    return jax.jit(lambda trees: {n: value_and_grads(lambda x, n=n: call(n, *x), trees[n]) for n in names})(trees)


@functools.cache
def written_out(is_causal, packed):
    seen = {"segment_ids": IDS, "mask": PADDED} if packed else {}
    return every_member(functools.partial(reference, is_causal=is_causal, **seen), is_causal)


@pytest.mark.parametrize("case", CASES)
def test_scores_written_out(case):
    """Outputs and the gradients of everything, all members in one program."""
    seen, form = CASES[case]
    is_causal = seen["is_causal"]

    def ours(name, arrays, weights):
        function, _, _, options = MEMBERS[name]
        return function(*arrays, **weights, **options, **seen, **form)

    whole = written_out(is_causal, "mask" in seen)
    for name, found in every_member(ours, is_causal).items():
        assert_close(found, whole[name], 2e-5, name)


def test_steps_with_a_cache_and_a_nan_ahead():
    """A token a call equals the whole, with keys masked in between; a NaN behind the end of a row changes no bit before it."""
    counted = [name for name in MEMBERS if name not in ("rerope", "leaky", "sinks")]

    @jax.jit
    def run(arrays, spoiled, weights):
        def step(options, function):
            def one(state, t):
                now = [jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in arrays]
                more = {"mask": jax.lax.dynamic_slice_in_dim(jnp.asarray(options["mask"]), t, 1, 3)}
                out, state = function(*now, initial_state=state, return_state=True, **{**options, **more})
                return state, out[:, 0]

            return one

        results = {}
        for name, (function, _, _, options) in MEMBERS.items():
            mask = MASK if name in counted else PADDED
            options = {**options, **weights[name], "is_causal": True, "mask": mask}
            steps = jax.lax.scan(step(options, function), attention.cache(B, T, N, H, V), jnp.arange(T))[1]
            results[name] = function(*arrays, **options), jnp.moveaxis(steps, 0, 1), function(*spoiled, **options)
        return results

    arrays = inputs()
    spoiled = [x.copy() for x in arrays]
    for x in spoiled[1:]:
        x[:, -1] = np.nan
    weights = {name: member[2] for name, member in MEMBERS.items()}
    for name, found in run(arrays, spoiled, weights).items():
        whole, steps, after = map(np.asarray, found)
        assert_close(steps, whole, 5e-6, name)
        np.testing.assert_array_equal(after[:, :-1], whole[:, :-1], err_msg=name)


@pytest.mark.parametrize("name", ["shaw", "xl", "tupe", "disentangled", "rerope", "xpos"])
def test_no_buffer_of_all_pairs(name):
    """Both passes at T = 16,384, one head, gradients of the weights too: far less than one T x T array of bytes."""
    length = 16_384
    arrays = [jax.ShapeDtypeStruct((1, length, 1, size), np.float32) for size in (H, H, V)]
    function, _, weights, options = MEMBERS[name]
    heads = {"first_token": 0, "content_bias": 0, "position_bias": 0}  # which axis is that of heads, 1 elsewhere
    shapes = {n: [1 if axis == heads.get(n, 1) else size for axis, size in enumerate(x.shape)] for n, x in weights.items()}  # fmt: skip
    shapes = {n: [length, *shape[1:]] if name == "tupe" and n != "first_token" else shape for n, shape in shapes.items()}  # fmt: skip
    weights = {n: jax.ShapeDtypeStruct(tuple(shape), np.float32) for n, shape in shapes.items()}

    def loss(arrays, weights):
        return jnp.sum(function(*arrays, **weights, **options, is_causal=True))

    used = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(arrays, weights).compile().memory_analysis()
    assert used.temp_size_in_bytes < 0.1 * length**2, used


def test_rerope_rounds_its_result_alone():
    """Large scores of bfloat16: queries and keys stay wide once they are turned."""
    query, key, value = 4 * jax.random.normal(jax.random.key(0), (3, 1, 32, 2, 64), jnp.bfloat16)
    run = jax.jit(functools.partial(rerope_attention, window=8, is_causal=True))
    out, wide = run(query, key, value), run(*(x.astype(jnp.float32) for x in (query, key, value)))
    assert out.dtype == jnp.bfloat16
    assert jnp.max(jnp.abs(out - wide)) < 2**-8 * jnp.max(jnp.abs(wide))


def test_published_distances_of_rerope():
    """r = 0 .. 9, w = 4: what the scores of one pair say about the distance used."""
    keys = np.eye(2)[None, [0] * 10, None].astype(np.float32)  # one pair of features, turned by t
    for leak, expected in ((0.0, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]), (0.5, [0, 1, 2, 3, 4, 4.5, 5, 5.5, 6, 6.5])):
        options = {"window": 4, "leak": leak, "frequencies": np.array([0.1]), "scale": 1.0, "is_causal": True}
        values = np.eye(10)[None, :, None].astype(np.float32)
        weights = np.asarray(jax.jit(lambda x, v, o=options: rerope_attention(x, x, v, **o))(keys, values))[0, -1, 0]
        scores = np.cos(0.1 * np.array(expected))[::-1]
        np.testing.assert_allclose(weights, np.exp(scores) / np.exp(scores).sum(), atol=1e-6)


def test_frequencies():
    """The golden values of the article, and that each scaling keeps what it says."""
    plain = rotary_frequencies(128)
    ntk = rotary_frequencies(128, scaling="ntk", factor=8)
    assert abs(ntk[1] ** -64 - 82_684.6) < 0.5 and ntk[0] == 1 and np.isclose(ntk[-1] * 8, plain[-1])
    mixed = plain / rotary_frequencies(128, scaling="ntk_mixed", factor=8)
    np.testing.assert_allclose(mixed[[0, 31, 63]], [1.16714, 3.85107, 8], atol=1e-5)
    fixed = [rotary_frequencies(128, scaling=s, factor=8, exponent=1.0) for s in ("ntk_fixed", "ntk_mixed")]
    np.testing.assert_allclose(*fixed, rtol=1e-12)
    linear = [rotary_frequencies(128, scaling=s, factor=8, exponent=0.0) for s in ("linear", "ntk_mixed")]
    np.testing.assert_allclose(*linear, rtol=1e-12)
    yarn = rotary_frequencies(128, scaling="yarn", factor=8, train_length=2048)
    np.testing.assert_allclose([yarn[0], yarn[-1] * 8], [plain[0], plain[-1]])
    for short in ({"train_length": 4}, {"train_length": 16, "slow": 4.0}):  # no pair makes so much as `slow` turns
        np.testing.assert_allclose(rotary_frequencies(128, scaling="yarn", factor=8, **short), plain / 8)
    fast = rotary_frequencies(8, base=2.0, scaling="yarn", factor=8, train_length=10**6)  # every pair makes above 32
    np.testing.assert_allclose(fast, rotary_frequencies(8, base=2.0))
    assert yarn_temperature(1) == 1 and np.isclose(yarn_temperature(np.e**10), 2)
    scale = jax.jit(lambda n: (log_length_scale(n, 512), log_length_scale(n, 512, at_least_one=True)))
    free, at_least_one = scale(np.array([16, 64, 512, 1024, 4096]))
    np.testing.assert_allclose(free, [0.4444, 0.6667, 1, 1.1111, 1.3333], atol=1e-4)
    np.testing.assert_allclose(np.asarray(at_least_one)[[0, -1]], [1, 4 / 3], rtol=1e-6)


@jax.jit
def scores_from(start):
    """Of rotary positions with every scaling, and of XPOS's pair."""
    q, k, at = draw(0, 1, 6, 2, 16), draw(1, 1, 6, 2, 16), start + jnp.arange(6)
    results = {}
    for scaling in ("none", "linear", "ntk", "ntk_fixed", "ntk_mixed", "yarn"):
        w = rotary_frequencies(16, scaling=scaling, factor=8, train_length=64)
        results[scaling] = product(*(rotary(x, at, frequencies=w) for x in (q, k)))
    centered, plain = xpos(q, k, at, at, center=start + 2), xpos(q, k, at - start, at - start)
    return results, product(*centered), product(*plain)


@pytest.mark.parametrize("start", [0, 1_000, 1_000_000])
def test_shifts_change_nothing(start):
    """Rotary positions with every scaling, and XPOS's pair: scores at a start are those at 0."""
    found, shifted, _ = scores_from(start)
    expected, _, plain = scores_from(0)
    for scaling in found:
        np.testing.assert_allclose(found[scaling], expected[scaling], atol=1e-5, err_msg=scaling)
    np.testing.assert_allclose(shifted, plain, atol=1e-5)


@pytest.mark.parametrize("length", [T, 11])
def test_places_of_tupe_at_hidden_keys(length):
    """A query there stands where the next token would, at the last place of a full table; it is no first token."""
    arrays, weights = [x[:, :length] for x in inputs()], {**MEMBERS["tupe"][2]}
    keep = np.broadcast_to(~np.isin(np.arange(T), [4, 11, 12]), (B, 1, 1, T))
    weights |= {name: weights[name][:10] for name in ("position_query", "position_key")}
    padded = {n: np.concatenate([x, x[-1:]]) if n != "first_token" else x for n, x in weights.items()}

    @jax.jit
    def both(arrays, weights, padded):
        expected = reference("tupe", inputs(), padded, is_causal=True, mask=keep)[:, :length]
        return tupe_attention(*arrays, mask=keep[..., :length], is_causal=True, **weights), expected

    out, expected = both(arrays, weights, padded)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_xpos_at_the_end_of_a_long_row():
    """Finite, and the last rows those of a row that begins near them, where the absolute form has left the range of float32."""
    length = 80_000
    x = draw(0, 1, length, 1, 2)
    call = jax.jit(functools.partial(xpos_attention, is_causal=True, scale_base=64.0))
    tail = np.asarray(call(x[:, -1:], x, x))
    near = call(x[:, -1:], x[:, -9_000:], x[:, -9_000:])
    assert np.isfinite(tail).all()
    np.testing.assert_allclose(near.shape, tail.shape)
    decayed = np.exp(np.log(0.4 / 1.4) / 64 * 9_000)
    assert decayed == 0 or decayed < 1e-30  # scores of farther keys are 0 in both
    scores = np.zeros(length)
    scores[-9_000:] = np.asarray(_xpos_scores(x[0, :, 0]))[-9_000:]
    weight = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(tail[0, 0, 0], weight @ x[0, :, 0], atol=1e-5)


def _xpos_scores(x):
    r = np.arange(len(x))[::-1].astype(float)
    cos, sin = np.cos(r), np.sin(r)
    q = x[-1].astype(float)
    turned_ = q[0] * (x[:, 0] * cos + x[:, 1] * sin) + q[1] * (x[:, 1] * cos - x[:, 0] * sin)
    return turned_ * (0.4 / 1.4) ** (r / 64) / np.sqrt(2)


def test_absolute_embeddings():
    table = draw(0, 6, 4)

    embed = jax.jit(hierarchical_embedding)
    whole = np.asarray(embed(table, np.arange(36)))
    np.testing.assert_allclose(whole[:6], table, atol=1e-6)
    np.testing.assert_allclose(whole[6], 2 / 3 * table[1] + 1 / 3 * table[0], atol=1e-6)
    assert len(np.unique(np.round(whole, 5), axis=0)) == 36
    assert np.isnan(embed(table, np.array([36]))).all()
    for wrong in ({"alpha": 0.5}, {"alpha": 1.2}):
        with pytest.raises(ValueError, match="alpha must lie between 0 and 1 and not be 1/2"):
            hierarchical_embedding(table, np.array([1]), **wrong)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, n\^2\) = \[0, 36\)"):
        hierarchical_embedding(table, np.array([36]))
    with pytest.raises(ValueError, match="got from -3 to 2"):
        hierarchical_embedding(table, np.array([2, -3]))
    narrow, wide = np.array([3, 35], np.int8), draw(0, 20, 4)  # n^2 is beyond int8
    found, expected = (hierarchical_embedding(wide, positions) for positions in (narrow, narrow.astype(int)))
    np.testing.assert_array_equal(found, expected)
    factors, (r, w, theta) = draw(7, 5, 4), (draw(seed, 3, 5, 4) for seed in (1, 2, 3))

    @jax.jit
    def others():
        scaled = position.multiplicative_embedding(factors[None], factors[None])
        turn = floater_embedding(jnp.array([1.0, 0.0]), lambda t, p: jnp.stack([-p[1], p[0]]), 7, step=0.5, substeps=4)
        waves = complex_order_embedding(r, w, theta, jnp.arange(5))
        return scaled, turn, waves, random_positions(jax.random.key(0), 8, 64, batch=3)

    scaled, turn, waves, drawn = map(np.asarray, others())
    np.testing.assert_allclose(scaled, (factors * (1 + factors))[None])
    np.testing.assert_allclose(turn, np.stack([np.cos(np.arange(7) / 2), np.sin(np.arange(7) / 2)], -1), atol=1e-5)
    np.testing.assert_allclose(waves, r * np.exp(1j * (w * np.arange(5)[:, None] + theta)), atol=1e-5)
    assert drawn.shape == (3, 8) and (np.diff(drawn) > 0).all() and drawn.min() >= 0 and drawn.max() < 64


UNSEEN = {
    "a mask over pairs": (np.ones((1, 1, 6, 6), bool), None),
    "a mask over pairs, documents": (np.ones((1, 1, 6, 6), bool), np.array([[0, 0, 0, 1, 1, 1]] * 2)),
    "an id that no key has": (None, (np.array([[0, 0, 0, 1, 7, 1]] * 2), np.array([[0, 0, 0, 1, 1, 1]] * 2))),
    "an id whose keys are masked": (
        np.array([1, 1, 1, 0, 0, 1], bool)[None, None, None],
        (np.array([[0, 0, 0, 1, 2, 1]] * 2), np.array([[0, 0, 0, 1, 2, 1]] * 2)),
    ),
}
UNSEEN["a mask over pairs"][0][..., 4, :] = UNSEEN["a mask over pairs, documents"][0][..., 4, :] = False


@pytest.mark.parametrize("implementation", ["dense", "chunked"])
@pytest.mark.parametrize("unseen", UNSEEN)
@pytest.mark.parametrize("name", ["shaw", "disentangled", "xl", "tupe", "rerope", "xpos"])
def test_a_query_that_sees_nothing_may_hold_nan(name, unseen, implementation):
    """Its output is 0, and no gradient of keys, values or tables hears of it."""
    q, k, v = (draw(seed, 2, 6, N, H) for seed in range(3))
    q[:, 4] = np.nan
    mask, ids = UNSEEN[unseen]
    line, more = position.MIXERS[name], {"length": 6} if name == "tupe" else {}
    shapes = jax.eval_shape(lambda: line.weights(jax.random.key(0), N, N, H, **more)) if line.weights else {}
    weights = {key: draw(3, *leaf.shape) for key, leaf in shapes.items()}
    options = {"mask": mask, "segment_ids": ids, "is_causal": True, "implementation": implementation, **line.options}

    def loss(q, k, v, weights):
        out = line.function(q, k, v, **weights, **options)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, weights)
    assert np.all(np.asarray(out)[:, 4] == 0) and np.all(np.isfinite(out))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))


def test_mistakes():
    q, k, v = inputs()
    calls = {
        "key_table must have shape (2 D + 1, 8)": lambda: shaw_attention(q, k, v, key_table=draw(0, 6, H)),
        "value_table must have shape (2 D + 1, 6)": lambda: shaw_attention(q, k, v, key_table=draw(0, 7, H), value_table=draw(0, 7, H)),
        "query_table must have shape (2 D, 8)": lambda: disentangled_attention(q, k, v, key_table=None, query_table=draw(0, 7, H)),
        "relative_key must have shape": lambda: xl_attention(q, k, v, relative_key=draw(0, 6, H)),
        "the places of position_key": lambda: tupe_attention(q, k, v, position_query=draw(0, 4, N, 2), position_key=draw(0, 4, N, 2)),
        "window must be a positive int": lambda: rerope_attention(q, k, v, window=0),
        "a finite number, at least 0: how fast distances grow beyond the window; got -1.0": lambda: rerope_attention(q, k, v, window=2, leak=-1.0),
        "leak must be a finite number, at least 0: how fast distances grow beyond the window; got 'a'": lambda: rerope_attention(q, k, v, window=2, leak="a"),
        "got True": lambda: rerope_attention(q, k, v, window=2, sinks=True),
        "sinks must be an int >= 1": lambda: rerope_attention(q, k, v, window=2, sinks=0),
        "is_causal must be True": lambda: xpos_attention(q, k, v, is_causal=False),
        "scaling='ntkk' is unknown": lambda: rotary_frequencies(8, scaling="ntkk"),
        "factor must be at least 1": lambda: rotary_frequencies(8, scaling="ntk", factor=0.5),
        "train_length must be given": lambda: rotary_frequencies(8, scaling="yarn", factor=2.0),
        "base must be above 1": lambda: rotary_frequencies(8, base=1.0, scaling="yarn", factor=2.0, train_length=8),
        "with 0 < slow < fast; got slow=0, fast=0": lambda: rotary_frequencies(8, scaling="yarn", train_length=8, fast=0, slow=0),
        "with 0 < slow < fast; got slow=32, fast=1": lambda: rotary_frequencies(8, scaling="yarn", train_length=8, fast=1, slow=32),
        "exponent must be at least 0 and finite": lambda: rotary_frequencies(8, scaling="ntk_mixed", factor=2.0, exponent=-1.0),
        "with scaling='ntk_mixed'; got nan": lambda: rotary_frequencies(8, scaling="ntk_mixed", factor=2.0, exponent=math.nan),
        "query and key must be": lambda: xpos(q, k[..., :4], np.arange(T), np.arange(T)),
        "embedding must broadcast to x, (1, 2)": lambda: position.multiplicative_embedding(np.ones((1, 2)), np.ones((5, 3, 2))),
        "embedding must broadcast to x, (2, 1)": lambda: position.multiplicative_embedding(np.ones((2, 1)), np.ones((2, 3))),
        "must all be (*B, T, D), of one shape": lambda: complex_order_embedding(v[0], v[0], v[0, :, :, :2], np.arange(T)),
        "positions must broadcast to (*B, T) = (13, 2)": lambda: complex_order_embedding(v[0], v[0], v[0], np.ones((3, 13, 2))),
        "(*B, T) = (13, 2); got (3,)": lambda: complex_order_embedding(v[0], v[0], v[0], np.arange(3)),
        "frequencies must have shape (H/2,) = (4,); got (2,)": lambda: rerope_attention(q, k, v, window=2, frequencies=[1.0, 0.1]),
        "frequencies must have shape": lambda: position.rotary(q, np.arange(T), frequencies=np.ones(3)),
        "train_length must be above 1": lambda: log_length_scale(3, 1),
        "length must be at most max_length": lambda: random_positions(jax.random.key(0), 5, 4),
    }  # fmt: skip
    for words, call in calls.items():
        with pytest.raises(ValueError) as error:
            jax.eval_shape(call)
        assert words in str(error.value), (words, str(error.value))


def test_queries_that_see_nothing_in_rows_of_several_blocks():
    """Which they are is asked block by block, 128 rows each; the last block is not a whole one."""
    length = 300
    q, k, v = (draw(seed, 1, length, N, H) for seed in range(3))
    mask = np.random.default_rng(0).random((1, N, length, length)) < 0.3
    blind = [0, 127, 128, 255, 257, 299]
    mask[:, :, blind], mask[:, 0, 40] = False, False
    q[:, blind], q[:, 40, 0] = np.nan, np.nan

    def loss(table):
        out = shaw_attention(q, k, v, mask=mask, key_table=table)
        return jnp.sum(out**2), out

    (_, out), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(draw(3, 7, H))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(slope)) and np.any(slope)
    assert not np.any(np.asarray(out)[:, blind]) and not np.any(np.asarray(out)[:, 40, 0])
    assert np.all(np.any(np.asarray(out), axis=(0, 2, 3)) == ~np.isin(np.arange(length), blind))
