"""Synthesizers beyond the laws: scores as the paper writes them, their accounting, and what a maximum length means."""

import functools

import jax
import numpy as np
import pytest

from effattn_jax import attention as a

B, T, N, H, D, L = 2, 5, 2, 4, 6, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def naive(scores, value, allowed):
    """softmax(B) V by NumPy in float64, rows without columns 0."""
    scores = np.where(allowed, np.asarray(scores, np.float64)[..., : value.shape[1]], -np.inf)
    top = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnv->btnv", weights / np.where(total == 0, 1, total), value)


def test_attention_by_given_scores():
    scores, value = normal(0, B, N, T, L), normal(1, B, T, N, 3)
    mask = np.random.default_rng(2).random((B, 1, T, T)) < 0.5
    lower = np.tri(T, dtype=bool)
    run = functools.partial(jax.jit, static_argnames="is_causal")(a.synthesizer_attention)
    np.testing.assert_allclose(run(scores, value), naive(scores, value, True), atol=1e-6)
    np.testing.assert_allclose(run(scores, value, mask, is_causal=True), naive(scores, value, mask & lower), atol=1e-6)
    shared = run(scores[0], value)  # a table serves every row of the batch
    np.testing.assert_allclose(shared, naive(np.broadcast_to(scores[:1], scores.shape), value, True), atol=1e-6)


def test_scores_are_those_of_the_paper():
    x, w1, b1, w2, b2 = normal(0, B, T, D), normal(1, D, N, H), normal(2, N, H), normal(3, N, H, L), normal(4, N, L)
    table, left, right = normal(5, N, L, L), normal(6, N, L, 3), normal(7, N, L, 3)

    @jax.jit
    def run():
        low_rank = a.factorized_random_scores(left, right, T, 7)
        return a.dense_scores(x, w1, b1, w2, b2), a.random_scores(table, T, 3), low_rank

    dense, fixed, low_rank = map(np.asarray, run())
    for n in range(N):
        expected = np.maximum(x @ w1[:, n] + b1[n], 0) @ w2[n] + b2[n]
        np.testing.assert_allclose(dense[:, n], expected[..., :T], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(fixed, table[:, :T, :3])
    np.testing.assert_allclose(low_rank, (left @ np.swapaxes(right, 1, 2))[:, :T, :7], rtol=1e-4, atol=1e-5)


def test_factorised_products_are_all_distinct():
    """Also where a and b share a factor, which collide when both sides are tiled."""
    left, right = normal(0, B, N, T, 4), normal(1, B, N, T, 6)
    scores = np.asarray(jax.jit(lambda: a.factorized_dense_scores(left, right, 24))())
    for column in range(24):
        u, v = divmod(column, 6)
        np.testing.assert_allclose(scores[..., column], left[..., u] * right[..., v], rtol=1e-6)
    assert len({float(x) for x in scores[0, 0, 0]}) == 24


def test_mixtures_have_one_softmax_and_weights_that_add_up():
    one, two, value = normal(0, B, N, T, T), normal(1, N, T, T), normal(2, B, T, N, 3)
    logits = normal(3, N, 2)
    alpha = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = alpha[:, 0, None, None] * one + alpha[:, 1, None, None] * two

    @jax.jit
    def run():
        mixed = a.mix_scores(logits, one, two)
        return mixed, a.mix_scores(np.zeros(2, np.float32), one, two), a.synthesizer_attention(mixed, value)

    mixed, halves, out = run()
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(halves, (one + two) / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out, naive(expected, value, True), atol=1e-6)


def test_members_equal_the_functions():
    """The dense member with q = x W_1 is the paper's dense Synthesizer; the others likewise."""
    x, w1, b1, w2, b2 = normal(0, B, T, D), normal(1, D, N, H), normal(2, N, H), normal(3, N, H, L), normal(4, N, L)
    value, query, key = normal(5, B, T, N, 3), np.einsum("btd,dnh->btnh", x, w1), normal(6, B, T, N, H)
    causal = {"is_causal": True}
    few, many, logits = normal(7, 2, N, H), normal(8, 4, N, H), normal(11, N, 2)
    left, right = normal(9, N, L, 3), normal(10, N, L, 3)
    tables = {"left": np.swapaxes(left, 0, 1), "right": np.swapaxes(right, 0, 1)}
    hidden = np.maximum(query + b1, 0)
    factors = [np.einsum("btnh,anh->bnta", hidden, factor) for factor in (few, many)]
    products = np.einsum("btnh,bsnh->bnts", query, key) / H**0.5

    @jax.jit
    def run():
        columns = {"hidden_bias": b1, "columns": np.transpose(w2, (2, 0, 1)), "column_bias": b2.T}
        members = (
            a.synthesizer_dense(query, key, value, **columns, **causal),
            a.synthesizer_factorized_dense(query, key, value, hidden_bias=b1, left=few, right=many, **causal),
            a.synthesizer_factorized_random(query, key, value, **tables, **causal),
            a.synthesizer_mixed(query, key, value, mixture=logits, **tables, **causal),
        )
        fixed = a.factorized_random_scores(left, right, T)
        scores = (
            a.dense_scores(x, w1, b1, w2, b2),
            a.factorized_dense_scores(*factors),
            fixed,
            a.mix_scores(logits, products, fixed),
        )
        return members, [a.synthesizer_attention(each, value, **causal) for each in scores]

    for member, written in zip(*run(), strict=True):
        np.testing.assert_allclose(member, written, atol=1e-5)


def test_parameters_by_the_papers_accounting():
    """A head of width H and L places: dense H L (beside the projection), random L^2, factorised random 2 L k, factorised dense (a + b) H."""

    def count(name):
        make = functools.partial(a.MIXERS[f"synthesizer_{name}"].weights, length=64)
        return sum(x.size for x in jax.eval_shape(lambda key: make(key, 1, 1, 16), jax.random.key(0)).values())

    counts = {name: count(name) for name in ("dense", "random", "factorized_dense", "factorized_random")}
    assert counts == {
        "dense": 16 * 64 + 16 + 64,
        "random": 64**2,
        "factorized_dense": (2 + 32) * 16 + 16,
        "factorized_random": 2 * 64 * 8,
    }


def test_a_shorter_table_has_the_first_rows_of_a_longer_one():
    names = ("dense", "factorized_dense", "factorized_random", "mixed")

    @jax.jit
    def draw(key):
        makes = [a.MIXERS[f"synthesizer_{name}"].weights for name in names]
        return [[make(key, N, N, H, length=length) for length in (64, 96)] for make in makes]

    for short, long in jax.tree.map(np.asarray, draw(jax.random.key(0))):
        for key, table in short.items():
            np.testing.assert_array_equal(table, long[key][: table.shape[0]])


ONE = {"left": np.ones((L, N, 2), np.float32), "right": np.ones((L, N, 2), np.float32)}


def test_beyond_the_last_place():
    """A ValueError wherever the count is known, NaN where jit hides it; packed documents may be longer together than the tables."""
    x = normal(0, 1, L + 2, N, H)
    call = functools.partial(a.synthesizer_factorized_random, is_causal=True, **ONE)
    for run in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=f"at most {L} tokens.*got a sequence of {L + 2}"):
            run(x, x, x)
    _, state = jax.jit(functools.partial(call, return_state=True))(x[:, :6], x[:, :6], x[:, :6])
    with pytest.raises(ValueError, match=f"at most {L} tokens.*got a sequence of {L + 1}"):
        call(x[:, :3], x[:, :3], x[:, :3], initial_state=state)
    hidden = np.asarray(jax.jit(call)(x[:, :3], x[:, :3], x[:, :3], initial_state=state))
    assert np.all(np.isfinite(hidden[:, :2])) and np.all(np.isnan(hidden[:, 2]))
    packed = call(x, x, x, segment_ids=np.array([[0] * 5 + [1] * 5], np.int32))
    assert np.all(np.isfinite(packed))
    padded = call(x, x, x, mask=np.arange(L + 2)[None, None, None] < L)
    assert np.all(np.isfinite(padded))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: a.synthesizer_factorized_random(x, x, x, **{**ONE, "left": ONE["left"][:, :1]}),
            "left must have shape",
        ),
        (
            lambda x: a.synthesizer_factorized_random(x, x, x, **{**ONE, "right": ONE["right"][:5]}),
            "right must have shape",
        ),
        (lambda x: a.synthesizer_mixed(x, x, x, mixture=np.zeros(2, np.float32), **ONE), "mixture must have shape"),
        (lambda x: a.synthesizer_attention(np.ones((N, T, T - 1), np.float32), x), "a column for each of the 5 steps"),
        (lambda x: a.synthesizer_attention(np.ones((3, N, T, T), np.float32), x), "scores must have shape"),
        (
            lambda x: a.mix_scores(np.zeros(3, np.float32), np.ones((N, T, T), np.float32)),
            "one entry for each of the 1",
        ),
        (
            lambda x: a.random_scores(np.ones((N, 4, 4), np.float32), T),
            "from 0 to that of table: 5 places wanted, 4 there",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(0, B, T, N, H))
