"""Sparse attention beyond the laws: exactly the stated pairs, each once; steps by absolute position; linear memory; ties; Linformer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn_jax import attention
from effattn_jax.attention import _unions
from tests.laws import checks


def distance_of(queries, keys):
    i = np.arange(queries)[:, None] + keys - queries
    return i, np.arange(keys)[None]


def atrous_pairs(i, j, is_causal):
    return (i - j) % 3 == 0


def sparse_pairs(i, j, is_causal):
    near = (i - j <= 4) & (j - i <= 1)
    return near | ((i - j) % 3 == 0) | (j < 2) | ((0 <= i) & (i < 2) & (not is_causal))


def strided_pairs(i, j, is_causal):
    return (abs(i - j) < 4) | ((i - j) % 4 == 0)


def fixed_pairs(i, j, is_causal):
    complete = j // 5 * 5 + 5 <= j.shape[1]
    return (i // 5 == j // 5) | ((j % 5 >= 3) & complete)


def local_pairs(i, j, is_causal):
    return (i - j <= 3) & (j - i <= 2)


PATTERNS = {
    "local": (functools.partial(attention.local_attention, window=(3, 2)), local_pairs),
    "atrous": (functools.partial(attention.atrous_attention, dilation=3), atrous_pairs),
    "sparse": (
        functools.partial(attention.sparse_attention, window=(4, 1), dilation=3, num_global=2),
        sparse_pairs,
    ),
    "strided": (functools.partial(attention.strided_attention, stride=4), strided_pairs),
    "fixed": (functools.partial(attention.fixed_attention, block=5, summary=2), fixed_pairs),
}
EVERY = pytest.mark.parametrize("name", PATTERNS)
BOTH = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def pairs(name, queries, keys, is_causal):
    i, j = distance_of(queries, keys)
    seen = PATTERNS[name][1](i, j, is_causal)
    return seen & (j <= i) if is_causal else seen


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def on_explicit_mesh(run, arrays, specs):
    """run(*arrays) of arrays (or None) that are sharded in the types, over 4 x 2 devices, and the shardings of what it gives."""
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        actual = run(*placed)
        return jax.tree.map(np.asarray, actual), jax.tree.map(lambda x: jax.typeof(x).sharding, actual)


@BOTH
@EVERY
def test_influence_is_the_pattern_and_each_pair_counts_once(name, is_causal):
    """The Jacobian by values is the matrix of weights: positive on the stated pairs, 0 elsewhere, rows of sum 1; by keys 0 elsewhere too."""
    length = 17
    query, key, value = (random(seed, length, 1, 4) for seed in range(3))
    call = functools.partial(PATTERNS[name][0], is_causal=is_causal, implementation="chunked", chunk_size=4)

    @jax.jit
    def influence(key, value):
        _, pull = jax.vjp(lambda k, v: call(query, k, v)[:, 0, 0], key, value)
        return jax.lax.map(pull, jnp.eye(length))  # `jacrev`, a row after the other: less to trace and lower

    by_key, by_value = (np.asarray(x) for x in influence(key, value))
    seen, weights = pairs(name, length, length, is_causal), by_value[:, :, 0, 0]
    np.testing.assert_array_equal(weights > 0, seen)
    np.testing.assert_array_equal(by_value[..., 1:], 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    moved = np.abs(by_key).max((2, 3)) > 0
    np.testing.assert_array_equal(moved, seen & (seen.sum(1, keepdims=True) > 1))


@pytest.mark.parametrize("queries, keys", [(67, 67), (29, 53), (53, 29)], ids=str)
@BOTH
@EVERY
def test_equals_the_dense_mask(name, is_causal, queries, keys):
    query, key, value = random(0, 2, queries, 4, 8), random(1, 2, keys, 4, 8), random(2, 2, keys, 4, 8)
    seen = pairs(name, queries, keys, is_causal)
    scores = np.where(seen, np.einsum("btnh,bsnh->bnts", query, key, dtype=np.float64) / 8**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, where=seen, initial=-1e30))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)  # 0 where nothing is seen
    expected = np.einsum("bnts,bsnh->btnh", weights, value)
    call = functools.partial(PATTERNS[name][0], is_causal=is_causal)

    @jax.jit
    def run(*arrays):
        return [call(*arrays, implementation=form) for form in ("dense", "chunked")]

    for output in run(query, key, value):
        np.testing.assert_allclose(output, expected, atol=2e-6)


@pytest.mark.parametrize(
    "is_causal, queries, keys, count", [(True, 23, 23, 3), (False, 23, 23, 3), (False, 11, 23, 1), (False, 23, 11, 40)]
)
def test_global_tokens_where_a_mask_says_which_keys_come_first(is_causal, queries, keys, count, x64):
    """Padding in front, behind, between, and of everything: brought together, the first keys give what all pairs under a mask give."""
    real = np.ones((5, keys), bool)
    real[0, :4], real[1, -4:], real[2], real[3, ::2] = False, False, False, False
    arrays = (
        random(0, 5, queries, 4, 8),
        random(1, 5, keys, 2, 8),
        random(2, 5, keys, 2, 8),
        random(3, 4, queries, keys),
    )
    arrays = tuple(x.astype(np.float64) for x in arrays)

    def run(form):
        options = {"window": (2, 1), "dilation": 5, "num_global": count, "implementation": form, "chunk_size": 4}
        options |= {"mask": real[:, None, None], "is_causal": is_causal}
        return checks.value_and_grads(lambda arrays: attention.sparse_attention(*arrays, **options), arrays)

    checks.assert_close(run("chunked"), run("dense"), 1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@BOTH
def test_global_tokens_of_documents_in_any_order(is_causal, masked, x64):
    """Ids that come again later in a row: its documents share their global tokens, as runs of one id share all else."""
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 3, (2, 13)), rng.integers(1, 7, 13), axis=1).astype(np.int32)
    length = ids.shape[1]
    arrays = tuple(random(seed, 2, length, heads, 4).astype(np.float64) for seed, heads in enumerate((4, 2, 2)))
    mask = rng.random((2, 1, 1, length)) < 0.6 if masked else None

    def run(form):
        options = {"window": (2, 1), "dilation": 5, "num_global": 2, "implementation": form, "chunk_size": 8}
        options |= {"mask": mask, "segment_ids": ids, "is_causal": is_causal}
        return checks.value_and_grads(lambda arrays: attention.sparse_attention(*arrays, **options), arrays)

    checks.assert_close(run("chunked"), run("dense"), 1e-12)


def test_global_tokens_of_padded_rows_on_an_explicit_mesh():
    """Rows and heads sharded in the types, as batches of `train.py` are, a bias of keys over heads: gradients as on one device."""
    mask = (np.arange(16)[None] >= np.array([0, 3, 5, 2])[:, None])[:, None, None]
    inputs = (*(random(seed, 4, 16, 2, 4) for seed in range(3)), random(3, 1, 2, 1, 16))

    def run(*inputs, **form):
        *inputs, mask = inputs
        call = functools.partial(attention.sparse_attention, mask=mask, window=2, dilation=5, num_global=3, **form)
        return checks.value_and_grads(lambda x: call(*x), inputs)

    expected = run(*inputs, mask, implementation="dense")  # which compiles in less time than the same by chunks
    chunked = functools.partial(run, implementation="chunked", chunk_size=4)
    for mask_spec in (P("data"), P()):
        specs = [P("data", None, "heads")] * 3 + [P(None, "heads"), mask_spec]
        actual, shardings = on_explicit_mesh(chunked, [*inputs, mask], specs)
        assert shardings[0].spec[0] == "data"
        checks.assert_close(actual, expected, 1e-5, f"mask {mask_spec}")


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (4, 1, 8, 8), (4, 2, 1, 8)])
def test_a_replicated_bias_beside_sharded_arrays(shape):
    """Rows and heads sharded in the types, and a bias that is not: its gradient comes back as the bias lies."""
    options = {"is_causal": True, "implementation": "chunked", "chunk_size": 4}
    inputs = (*(random(seed, 4, 8, 2, 4) for seed in range(3)), random(3, *shape))

    def run(*inputs):
        return checks.value_and_grads(lambda x: attention.dot_product_attention(*x, **options), inputs)

    actual, shardings = on_explicit_mesh(run, inputs, [P("data", None, "heads")] * 3 + [P()])
    assert not any(shardings[1][3].spec)
    checks.assert_close(actual, run(*inputs), 1e-5)


@BOTH
def test_global_tokens_of_padded_rows_are_few_pairs(is_causal, monkeypatch):
    """No part of the union has all queries against all keys but those limited to a band."""
    seen, part = [], _unions.part

    def noted(view, **options):
        if "left" not in options:
            seen.append(view.lengths)
        return part(view, **options)

    monkeypatch.setattr(_unions, "part", noted)
    x, mask = jax.ShapeDtypeStruct((2, 4096, 1, 4), np.float32), jax.ShapeDtypeStruct((2, 1, 1, 4096), bool)
    options = {"window": 16, "dilation": 64, "num_global": 8, "is_causal": is_causal, "implementation": "chunked"}
    jax.eval_shape(lambda x, mask: attention.sparse_attention(x, x, x, mask=mask, **options), x, mask)
    assert seen == ([(4096, 8)] if is_causal else [(4096, 8), (16, 4096)])


def test_global_tokens_of_an_empty_batch_with_a_mask():
    x = np.ones((0, 9, 2, 4), np.float32)
    options = {"window": 2, "dilation": 3, "num_global": 2, "implementation": "chunked", "chunk_size": 4}
    run = jax.jit(functools.partial(attention.sparse_attention, mask=np.ones((0, 1, 1, 9), bool), **options))
    assert run(x, x, x).shape == x.shape


@EVERY
def test_steps_against_a_cache_keep_to_the_pattern(name):
    """A prefill and steps of one token, in a cache of fixed size, by the parts and by the mask."""
    query, key, value = (random(seed, 2, 17, 2, 4) for seed in range(3))
    call = functools.partial(PATTERNS[name][0], is_causal=True)

    def stepwise(query, key, value, form):
        def step(state, now):
            output, state = call(*now, initial_state=state, return_state=True, **form)
            return state, output

        state, first = step(attention.cache(2, 20, 2, 4), [x[:, :11] for x in (query, key, value)])
        later = [jnp.moveaxis(x[:, 11:, None], 1, 0) for x in (query, key, value)]
        rest = jax.lax.scan(step, state, later)[1][:, :, 0]
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)

    @jax.jit
    def run(*arrays):
        forms = ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 4})
        return call(*arrays), [stepwise(*arrays, form) for form in forms]

    whole, outputs = run(query, key, value)
    for output in outputs:
        np.testing.assert_allclose(output, whole, atol=2e-6)


LONG = {
    "local": {"window": 64},
    "atrous": {"dilation": 64},
    "sparse": {"window": 64, "dilation": 64, "num_global": 4},
    "strided": {"stride": 64},
    "fixed": {"block": 64, "summary": 4},
    "topk": {"k": 32},
}


@pytest.mark.parametrize("name", LONG)
def test_temporaries_grow_linearly(name):
    """Gradients at T = 1,024, 4,096 and 16,384: four times the length, about four times the temporaries, blocks of a fixed size among them; at the
    last a mask of one byte a pair would take 268 MB.
    """
    function = functools.partial(
        attention.MIXERS[name].function, is_causal=True, implementation="chunked", **LONG[name]
    )

    def loss(x):
        return function(x, x, x).sum()

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis().temp_size_in_bytes

    used = [temporaries(length) for length in (1024, 4096, 16_384)]
    assert used[2] - used[1] <= 4.4 * max(used[1] - used[0], 2**18), used
    assert used[2] < 16_384**2 // 4, used


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_summary_columns_are_brought_together_once(masked):
    """Gradients with 64 columns of 128 and with 1: keys and values of the columns and their gradients are 4 c / l = 2 arrays of the size of the keys.
    The bound is four times that, for copies on the way; a copy of the keys a column is 64.
    """
    x, mask = jax.ShapeDtypeStruct((1, 4096, 1, 64), np.float32), jax.ShapeDtypeStruct((1, 1, 1, 4096), bool)

    def temporaries(summary):
        def loss(x, mask):
            options = {"block": 128, "summary": summary, "is_causal": True, "implementation": "chunked"}
            return attention.fixed_attention(*x, mask=mask if masked else None, **options).sum()

        return jax.jit(jax.grad(loss)).lower((x, x, x), mask).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(1), temporaries(64)
    assert many - few <= 8 * x.size * 4, (few, many)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("batch", [1, 4])
def test_summary_columns_on_an_explicit_mesh(padded, batch):
    """Rows and heads sharded in the types, beside a bias and a mask that are not: values and gradients as on one device."""
    mask = (np.arange(17)[None] >= np.array([0, 3, 5, 2])[:, None])[:, None, None] if padded else None
    inputs = (*(random(seed, 4, 17, 2, 4) for seed in range(3)), random(3, batch, 2, 1, 17))

    def run(*inputs, **form):
        *inputs, mask = inputs
        call = functools.partial(attention.fixed_attention, mask=mask, block=5, summary=2, **form)
        return checks.value_and_grads(lambda x: call(*x), inputs)

    chunked = functools.partial(run, implementation="chunked", chunk_size=4)
    actual, shardings = on_explicit_mesh(chunked, [*inputs, mask], [P("data", None, "heads")] * 3 + [P(), P()])
    assert shardings[0].spec[0] == "data"
    checks.assert_close(actual, run(*inputs, mask, implementation="dense"), 1e-5)


def test_top_k_keeps_the_largest_and_all_that_tie():
    scores = np.array([[3, 1, 2, 2, 0], [5, 4, 3, 2, 1]], np.float32)
    key = value = np.eye(5, dtype=np.float32)[:, None]
    expected = np.array([[True, False, True, True, False], [True, True, False, False, False]])
    shares = np.where(expected, np.exp(scores), 0)
    shares /= shares.sum(1, keepdims=True)
    for form in ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 1}):
        call = jax.jit(functools.partial(attention.topk_attention, scale=1, k=2, **form))
        weights = np.asarray(call(scores[:, None], key, value))[:, 0]
        np.testing.assert_array_equal(weights > 0, expected)
        np.testing.assert_allclose(weights, shares, rtol=1e-6)


def test_top_k_of_all_keys_is_softmax():
    query, key, value = (random(seed, 2, 9, 2, 4) for seed in range(3))

    @jax.jit
    def run(*arrays):
        several = [attention.topk_attention(*arrays, k=k, is_causal=True) for k in (9, 50)]
        return attention.dot_product_attention(*arrays, is_causal=True), several

    expected, several = run(query, key, value)
    for output in several:
        np.testing.assert_allclose(output, expected, atol=1e-6)


def test_top_k_shows_a_nan_where_it_enters():
    query, key, value = (random(seed, 6, 1, 4) for seed in range(3))
    query[2] = np.nan
    bad = np.asarray(jax.jit(functools.partial(attention.topk_attention, k=2))(query, key, value))
    assert np.isnan(bad[2]).all() and np.isfinite(np.delete(bad, 2, axis=0)).all()


def linformer_problem():
    query, key, value = random(0, 2, 7, 4, 8), random(1, 2, 9, 2, 8), random(2, 2, 9, 2, 3)
    return query, key, value, random(3, 5, 12), random(4, 2, 5, 12)


def linformer_reference(query, key, value, first, second):
    """By explicit products; E shared by the heads, F one for each key head."""
    keys = jnp.repeat(jnp.einsum("rs,bskh->brkh", first[:, :9], key), 2, axis=2)
    values = jnp.repeat(jnp.einsum("krs,bskh->brkh", second[:, :, :9], value), 2, axis=2)
    weights = jax.nn.softmax(jnp.einsum("btnh,brnh->bntr", query, keys) / np.sqrt(8), axis=-1)
    return jnp.einsum("bntr,brnv->btnv", weights, values)


def test_linformer_is_softmax_over_mixtures():
    problem = linformer_problem()

    def ours(query, key, value, first, second):
        return attention.linformer_attention(query, key, value, key_projection=first, value_projection=second)

    def with_gradients(function):
        return jax.jit(lambda *x: jax.vjp(function, *x)[1](jnp.ones((2, 7, 4, 3))) + (function(*x),))(*problem)

    for actual, expected in zip(with_gradients(ours), with_gradients(linformer_reference), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


def test_linformer_masked_keys_do_not_exist():
    query, key, value, first, second = linformer_problem()
    real = np.array([[1, 0, 1, 1, 1, 0, 1, 1, 0], [0] * 9], bool)
    call = functools.partial(
        attention.linformer_attention, mask=real[:, None, None], key_projection=first, value_projection=second
    )
    spoiled = [np.where(real[..., None, None], x, np.float32(np.nan)) for x in (key, value)]
    moved = [np.pad(x[:1, real[0]], ((0, 1), (0, 3), (0, 0), (0, 0))) for x in (key, value)]
    clean = jax.jit(linformer_reference)(query, *moved, first, second)

    @jax.jit
    def output_and_slopes(*x):
        return call(*x), jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2))(*x)

    output, slopes = jax.tree.map(np.asarray, output_and_slopes(query, *spoiled))
    np.testing.assert_allclose(output, clean, atol=1e-5)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert not np.any(output[1]) and not any(np.any(slope[1]) for slope in slopes)
    assert not any(np.any(slope[~real]) for slope in slopes[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"is_causal": True}, "is_causal must be False.*mixes all positions"),
        ({"return_state": True}, "return_state"),
        ({"segment_ids": np.zeros((2, 9), np.int32)}, "segment_ids must be None.*mask over keys"),
        ({"bias": np.zeros((2, 4, 7, 9), np.float32)}, "bias"),
        ({"mask": np.ones((7, 9), bool)}, r"mask.*\(7, 9\).*1, 1, S"),
        (
            {"key_projection": np.zeros((5, 8), np.float32)},
            r"key_projection must have shape.*S = 9; got shape \(5, 8\)",
        ),
        ({"value_projection": np.zeros((3, 5, 9), np.float32)}, r"value_projection .* got shape \(3, 5, 9\)"),
        ({"value_projection": np.zeros((6, 9), np.float32)}, "same number of rows R; got 5 and 6"),
    ],
)
def test_linformer_refusals(options, message):
    query, key, value, first, second = linformer_problem()
    options = {"key_projection": first, "value_projection": second} | options
    with pytest.raises(ValueError, match=message):
        attention.linformer_attention(query, key, value, **options)


def test_queries_before_the_keys_of_a_call_need_what_a_window_has_dropped():
    x = np.random.default_rng(0).normal(size=(1, 8, 2, 4)).astype(np.float32)
    run = functools.partial(attention.local_attention, is_causal=True, window=1)
    _, state = run(*[x[:, :7]] * 3, return_state=True)
    with pytest.raises(ValueError, match="query must have at most the S = 1 tokens of key .* the 1 keys before"):
        run(x[:, 4:], x[:, 7:], x[:, 7:], initial_state=state)
    _, whole = run(*[x[:, :7]] * 3, initial_state=attention.cache(1, 8, 2, 4, 4), return_state=True)
    out = run(x[:, 4:], x[:, 7:], x[:, 7:], initial_state=whole)
    np.testing.assert_allclose(out, run(x[:, 4:], x, x), rtol=1e-5, atol=1e-6)
