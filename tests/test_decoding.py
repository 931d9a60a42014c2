"""Sampling rules on small distributions, and generation against calls made one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.decoding import filter_logits, generate, sample_logits
from effattn_jax.models import LanguageModel, ModelConfig

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def kept(*calls):
    """The ids that are left of each call's logits by its limits."""
    every = jax.jit(lambda rows: [filter_logits(row, **limits) for row, (_, limits) in zip(rows, calls)])
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in every([logits for logits, _ in calls])]


LIMITS = (
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 1}, [1]),
    ({"top_k": 2}, [1, 3]),
    ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.0}, [1]),
    ({"top_p": 0.39}, [1]),
    ({"top_p": 0.41}, [1, 3]),
    ({"top_p": 0.84}, [1, 3, 4]),
    ({"top_p": 0.86}, [0, 1, 3, 4]),
    ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
    ({"top_k": 3, "top_p": 0.75}, [1, 3]),  # of the three kept, 0.4 + 0.25 are 0.76 of 0.85
    ({"top_k": 2, "top_p": 1.0}, [1, 3]),
)


def test_filter_keeps_the_right_set():
    for found, (limits, expected) in zip(kept(*((LOGITS, limits) for limits, _ in LIMITS)), LIMITS, strict=True):
        assert found == expected, limits


def test_filter_ties_keep_exactly_k_and_the_lowest_ids():
    ties, uneven = np.zeros(6, np.float32), np.float32([0, 1, 1, 1])
    found = kept((ties, {"top_k": 2}), (ties[:4], {"top_p": 0.5}), (uneven, {"top_k": 2}))
    assert found == [[0, 1], [0, 1], [1, 2]]


def test_filter_leaves_what_it_keeps_and_rows_apart():
    logits = np.random.default_rng(0).normal(size=(3, 4, 9)).astype(np.float32)
    limit = jax.jit(functools.partial(filter_logits, top_k=5, top_p=0.8))
    out = np.asarray(limit(logits))
    rows = [limit(row) for row in logits.reshape(-1, 9)]
    np.testing.assert_array_equal(out, np.stack(rows).reshape(out.shape))
    assert np.all((out == logits) | (out == -np.inf))


def test_top_p_of_one_keeps_all_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(functools.partial(filter_logits, top_p=1.0))(logits), logits)


def test_samples_follow_the_distribution():
    rows, tempered = np.tile(LOGITS, (40_000, 1)), PROBABILITIES ** (1 / 0.7)
    cases = [
        ({}, PROBABILITIES),
        ({"temperature": 0.7}, tempered / tempered.sum()),
        ({"top_k": 2}, np.array([0, 0.4, 0, 0.25, 0]) / 0.65),
        ({"top_p": 0.7}, np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85),
    ]
    every = jax.jit(lambda rows: [sample_logits(rows, jax.random.key(3), **options) for options, _ in cases])
    for ids, (_, expected) in zip(every(rows), cases):
        np.testing.assert_allclose(np.bincount(ids, minlength=5) / len(ids), expected, atol=0.01)


def test_extreme_temperatures_and_excluded_tokens():
    alone = np.full((64, 5), -np.inf, np.float32)
    alone[:, 2] = 0

    @jax.jit
    def run():
        greedy = [sample_logits(logits, temperature=0.0) for logits in (LOGITS, np.zeros(4, np.float32))]
        cold = sample_logits(LOGITS * 1e3, jax.random.key(0), temperature=1e-30)
        return *greedy, cold, sample_logits(alone, jax.random.key(1), temperature=100.0, top_p=0.9)

    first, of_ties, cold, hot = run()
    assert (int(first), int(cold), int(of_ties)) == (1, 1, 0)
    assert np.all(np.asarray(hot) == 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 2.5}, "top_k must be a whole number, or None for no limit; got 2.5"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"temperature": "a"}, "temperature must be at least 0"),
        ({"temperature": np.ones(2)}, "temperature must be at least 0"),
        ({"top_p": np.ones(2)}, r"top_p must lie in \[0, 1\]"),
        ({"top_p": 1.5}, r"top_p must lie in \[0, 1\]"),
        ({"top_p": -0.1}, r"top_p must lie in \[0, 1\]"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": float("inf")}, "and finite; got inf"),
        ({"key": None}, "key must be given"),
        ({"key": 0}, "key must be one of jax.random.key; got 0"),
    ],
)
def test_sampling_errors(options, message):
    options = {"key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        sample_logits(LOGITS, **options)
    with pytest.raises(ValueError, match=message):
        generate(counting, 1, np.zeros(1, np.float32), np.ones((1, 2), np.int32), 3, **options)


TRACES = []


def counting(params, tokens, state):
    """The next token is the last plus params; the state counts calls."""
    TRACES.append(tokens.shape)
    return 9.0 * jax.nn.one_hot((tokens + params) % 10, 10), state + 1


def test_generate_feeds_back_and_stops():
    prompt = jnp.array([[1, 3], [8, 5]])
    out = generate(counting, 1, jnp.zeros((2,)), prompt, 4, temperature=0.0)
    assert out.tolist() == [[4, 5, 6, 7], [6, 7, 8, 9]]
    out = generate(counting, 1, jnp.zeros((2,)), prompt, 5, temperature=jnp.bfloat16(0), stop_token=jnp.int32(7))
    assert out.tolist() == [[4, 5, 6, 7, 7], [6, 7, 7, 7, 7]]
    with pytest.raises(ValueError, match="stop_token must be a whole number, or None for no stop; got 7.5"):
        generate(counting, 1, jnp.zeros((2,)), prompt, 5, temperature=0.0, stop_token=7.5)
    assert generate(counting, 1, jnp.zeros((2,)), prompt, 0, temperature=0.0).shape == (2, 0)
    assert generate(counting, 1, jnp.zeros((2,)), prompt, 1, temperature=0.0).tolist() == [[4], [6]]


def test_generate_is_determined_by_its_key_and_compiles_once():
    def run(seed, temperature, top_p):
        options = {"temperature": temperature, "top_p": top_p, "top_k": 8}
        return generate(counting, 1, jnp.zeros((2,)), jnp.array([[1], [2]]), 20, key=jax.random.key(seed), **options)

    first = run(0, 5.0, 0.9)
    traced = len(TRACES)
    assert first.tolist() == run(0, 5.0, 0.9).tolist()
    assert first.tolist() != run(1, 5.0, 0.9).tolist()
    run(0, 2.0, 0.5)
    assert len(TRACES) == traced


def test_generate_errors():
    state = jnp.zeros((1,))
    with pytest.raises(ValueError, match="prompt must be integers of shape"):
        generate(counting, 1, state, jnp.ones((1, 0), jnp.int32), 3, temperature=0.0)
    for count, rule in {-1: "at least 0", 2.5: "a whole number; got 2.5", None: "a whole number; got None"}.items():
        with pytest.raises(ValueError, match=f"num_tokens must be {rule}"):
            generate(counting, 1, state, jnp.ones((1, 2), jnp.int32), count, temperature=0.0)
    for logits in (jnp.zeros(()), jnp.zeros((3, 0))):
        with pytest.raises(ValueError, match=r"logits must have shape \(..., A\) with A >= 1"):
            sample_logits(logits, jax.random.key(0))
    with pytest.raises(ValueError, match="padded on the left"):
        mask = jnp.array([[True, False]])
        generate(counting, 1, state, jnp.ones((1, 2), jnp.int32), 3, temperature=0.0, prompt_mask=mask)
    with pytest.raises(ValueError, match="prompt_mask must be bool of the prompt's shape"):
        generate(
            counting, 1, state, jnp.ones((1, 2), jnp.int32), 3, temperature=0.0, prompt_mask=jnp.ones((1, 3), bool)
        )


def test_generate_with_a_model_is_the_argmax_of_full_passes_and_left_padding_changes_nothing():
    config = ModelConfig(layers=2, width=16, heads=2, mixers="softmax,gated_linear", conv_width=3)
    model = LanguageModel(config, 13)
    prompt = np.random.default_rng(1).integers(0, 13, (2, 6)).astype(np.int32)
    params = jax.tree.map(lambda x: 3 * np.asarray(x), jax.jit(model.init)(jax.random.key(0), prompt)["params"])
    out = generate(model.step, params, model.init_state(2, 11), prompt, 6, temperature=0.0)
    full = np.concatenate([prompt, out], axis=1)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, full[:, :-1]))
    np.testing.assert_array_equal(out, np.argmax(logits[:, 5:], -1))

    padded = np.concatenate([np.full((2, 3), 99, np.int32), prompt], axis=1)
    mask = np.arange(9)[None] >= np.array([[3], [3]])
    state = model.init_state(2, 14)
    np.testing.assert_array_equal(
        generate(model.step, params, state, padded, 6, temperature=0.0, prompt_mask=mask), out
    )
