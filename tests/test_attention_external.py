"""External attention against its definition in NumPy: forms, masks, segments, states, exact causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import external_attention
from tests.laws import checks

B, T, N, K, H, S, V = 2, 9, 4, 2, 3, 5, 6
IDS = np.array([[4, 4, 4, 4, 1, 1, 7, 7, 7], [2, 0, 0, 0, 0, 0, 0, 0, 3]], np.int32)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 0, 1, 0]], bool)[:, None, None]


def arrays(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (S, K, H), (S, K, V))
    return [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def naive(query, key, value, mask=None, segment_ids=None, is_causal=False, scale=1.0):
    """Softmax over the tokens that a token shares its normaliser with, for each slot; then l1 over slots. One row at a time, float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = np.repeat(key, N // K, axis=1), np.repeat(value, N // K, axis=1)
    scores = scale * np.einsum("btnh,snh->btns", query, key)
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, i in np.ndindex(query.shape[:2]):
        together = np.ones(T, bool) if mask is None else mask[b, 0, 0].copy()
        if not together[i]:
            continue
        together &= True if segment_ids is None else segment_ids[b] == segment_ids[b, i]
        together &= np.arange(T) <= i if is_causal else True
        weights = 1 / np.exp(scores[b, together] - scores[b, i]).sum(0)
        out[b, i] = np.einsum("ns,snv->nv", weights / weights.sum(-1, keepdims=True), value)
    return out


PATTERNS = [{}, {"mask": MASK}, {"segment_ids": IDS}, {"mask": MASK, "segment_ids": IDS}]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "+".join(p) or "plain")
def test_equals_the_definition(pattern, is_causal, x64):
    inputs = [x.astype(np.float64) for x in arrays()]
    out = jax.jit(functools.partial(external_attention, is_causal=is_causal, **pattern))(*inputs)
    np.testing.assert_allclose(out, naive(*inputs, **pattern, is_causal=is_causal), rtol=1e-12, atol=1e-12)


def test_the_papers_two_steps():
    """softmax over tokens, then l1 over slots, as published; and a memory shared by all heads."""
    query, key, value = arrays(1)
    key, value = key[:, :1], value[:, :1]
    weights = np.exp(np.einsum("btnh,sh->btns", query, key[:, 0], dtype=np.float64))
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("btns,sv->btnv", weights / (1e-9 + weights.sum(-1, keepdims=True)), value[:, 0])
    np.testing.assert_allclose(jax.jit(external_attention)(query, key, value), expected, rtol=1e-4, atol=1e-5)


def test_scores_of_any_size():
    """In the thousands: finite, and weights over slots still add up to one."""
    query, key, value = arrays(2, scale=60.0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(is_causal, *arrays):
        out, pull = jax.vjp(functools.partial(external_attention, is_causal=is_causal), *arrays)
        return out, pull(2 * out)  # by the sum of squares

    for is_causal in (True, False):
        np.testing.assert_allclose(run(is_causal, query, key, np.ones_like(value))[0], 1.0, rtol=1e-5)
        slopes = run(is_causal, query, key, value)[1]
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


@functools.cache
def poisoned_programs():
    def loss(*arrays):
        return jnp.sum(external_attention(*arrays, mask=MASK) ** 2)

    causal = jax.jit(functools.partial(external_attention, is_causal=True))
    return causal, jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e4])
def test_causality_is_exact_and_padding_and_other_documents_do_not_exist(poison):
    query, key, value = arrays(3)
    causal, grad = poisoned_programs()
    clean = np.asarray(causal(query, key, value))
    for start in range(1, T):
        bad = query.copy()
        bad[:, start:] = poison
        np.testing.assert_array_equal(np.asarray(causal(bad, key, value))[:, :start], clean[:, :start])
    bad = np.where(MASK[:, 0, 0, :, None, None], query, np.float32(poison))
    jax.tree.map(
        np.testing.assert_array_equal, grad(bad, key, value), grad(np.where(np.isfinite(bad), query, query), key, value)
    )
    slope = np.asarray(grad(bad, key, value)[1][0])
    assert not np.any(slope[~MASK[:, 0, 0]]) and np.any(slope)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
def test_second_derivatives_beside_a_masked_document(is_causal, x64):
    """A Hessian times a direction is the slope of the gradient along it; a document of padding alone adds nothing, not NaN."""
    rng = np.random.default_rng(6)
    inputs, along = ([rng.normal(size=shape) for shape in ((1, 5, 2, 2), (3, 1, 2), (3, 1, 2))] for _ in range(2))
    pattern = {"mask": np.array([1, 1, 0, 0, 1], bool)[None, None, None], "segment_ids": np.array([[0, 0, 1, 1, 2]])}

    @jax.jit
    def both(inputs):
        gradient = jax.grad(lambda x: jnp.sin(external_attention(*x, is_causal=is_causal, **pattern)).sum())
        return jax.jvp(gradient, (inputs,), (along,))

    step = 1e-5
    ahead, behind = (both([x + h * a for x, a in zip(inputs, along, strict=True)])[0] for h in (step, -step))
    slope = jax.tree.map(lambda a, b: np.asarray(a - b) / (2 * step), ahead, behind)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), both(inputs)[1], slope)


def test_a_score_of_inf_belongs_to_one_token():
    """What comes before and after it in a causal row, and other documents, stay numbers."""
    query = np.ones((1, 5, 1, 1), np.float32)
    query[0, 2] = 3e38
    key, value = np.full((2, 1, 1), 10, np.float32), np.ones((2, 1, 1), np.float32)
    run = jax.jit(external_attention, static_argnames="is_causal")
    causal = np.asarray(run(query, key, value, is_causal=True)).ravel()
    packed = np.asarray(run(query, key, value, segment_ids=np.array([[0, 0, 1, 2, 2]]))).ravel()
    for out in (causal, packed):
        assert np.isfinite(out).tolist() == [True, True, False, True, True], out


@pytest.mark.parametrize("with_ids", [False, True])
def test_gradients_in_a_shard_map(with_ids):
    """Rows split over devices: values and gradients of one device."""
    inputs = arrays(7)
    ids = IDS if with_ids else np.zeros_like(IDS)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def both(query, key, value, ids):
        out, pull = jax.vjp(lambda q: external_attention(q, key, value, is_causal=not with_ids, segment_ids=ids), query)
        return out, pull(jnp.cos(out))[0]

    rows, whole = jax.P("rows"), jax.P()
    split = jax.shard_map(both, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=rows)
    checks.assert_close(jax.jit(split)(*inputs, ids), jax.jit(both)(*inputs, ids), checks.OUTPUT)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("split", [0, 1, 4, 5, 9])
def test_split_and_resume(split, with_ids):
    query, key, value = arrays(4)

    def pattern(part):
        return {"mask": MASK[..., part]} | ({"segment_ids": IDS[:, part]} if with_ids else {})

    @jax.jit
    def resumed(query, key, value):
        state, outputs = None, []
        for part in (slice(0, split), slice(split, 7), slice(7, T)) if split < 7 else (slice(0, T), slice(T, T)):
            out, state = external_attention(
                query[:, part], key, value, is_causal=True, initial_state=state, return_state=True, **pattern(part)
            )
            outputs.append(out)
        return jnp.concatenate(outputs, axis=1), state

    out, state = resumed(query, key, value)
    np.testing.assert_allclose(
        out, naive(query, key, value, is_causal=True, **pattern(slice(None))), rtol=1e-4, atol=1e-5
    )
    assert state.log_total.shape == (B, N, S)


def test_batch_axes_types_and_long_rows():
    query, key, value = arrays(5)
    causal = functools.partial(external_attention, is_causal=True)

    @jax.jit
    def run(query, key, value):
        deep = causal(query[None, :, None], key, value)
        return causal(query, key, value), causal(query[0], key, value), deep

    whole, one, deep = map(np.asarray, run(query, key, value))
    np.testing.assert_allclose(one, whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deep[0, :, 0], whole, rtol=1e-5, atol=1e-6)
    half = (query.astype(jnp.bfloat16), key, value.astype(np.float16))
    assert jax.jit(external_attention)(*half).dtype == jnp.float16
    long = np.random.default_rng(0).normal(size=(1, 20_000, 1, H)).astype(np.float32)
    memory = key[:, :1], value[:, :1]
    last = np.asarray(jax.jit(causal)(long, *memory))[0, -1, 0]
    scores = np.einsum("th,sh->ts", long[0, :, 0].astype(np.float64), memory[0][:, 0])
    weights = 1 / np.exp(scores - scores[-1]).sum(0)
    np.testing.assert_allclose(last, weights / weights.sum() @ memory[1][:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_key": np.ones((S, 3, H), np.float32)}, "memory_key must have shape"),
        ({"memory_value": np.ones((S, 1, V), np.float32)}, "memory_value must have shape"),
        ({"query": np.ones((T, H), np.float32)}, "query must have shape"),
        ({"mask": np.ones((B, T), np.int32)}, "mask must be boolean"),
        ({"mask": np.ones((B, 1, T, T), bool)}, r"broadcast to \(\*B, 1, 1, T\)"),
        ({"segment_ids": IDS[:, 1:]}, "segment_ids must be integers of shape"),
        ({"return_state": True, "is_causal": False}, "need is_causal=True"),
        ({"initial_state": 3}, "initial_state must be an ExternalState"),
    ],
)
def test_mistakes(change, message):
    inputs = dict(zip(("query", "memory_key", "memory_value"), arrays(), strict=True))
    with pytest.raises(ValueError, match=message):
        external_attention(**{"is_causal": True, **inputs, **change})
