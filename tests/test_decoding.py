"""Sampling rules on small distributions, and generation against calls made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.decoding import filter_logits, generate, sample_logits
from effattn_jax.models import LanguageModel, ModelConfig

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))


def kept(logits, **limits):
    return np.flatnonzero(np.isfinite(filter_logits(jnp.asarray(logits), **limits))).tolist()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
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
    ],
)
def test_filter_keeps_the_right_set(limits, expected):
    assert kept(LOGITS, **limits) == expected


def test_filter_ties_keep_exactly_k_and_the_lowest_ids():
    assert kept(np.zeros(6, np.float32), top_k=2) == [0, 1]
    assert kept(np.zeros(4, np.float32), top_p=0.5) == [0, 1]
    assert kept(np.array([0.0, 1.0, 1.0, 1.0], np.float32), top_k=2) == [1, 2]


def test_filter_leaves_what_it_keeps_and_rows_apart():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 9))
    out = filter_logits(logits, top_k=5, top_p=0.8)
    rows = [filter_logits(row, top_k=5, top_p=0.8) for row in logits.reshape(-1, 9)]
    np.testing.assert_array_equal(out, jnp.stack(rows).reshape(out.shape))
    assert jnp.all((out == logits) | (out == -jnp.inf))


def test_top_p_of_one_keeps_all_of_a_large_vocabulary():
    logits = jax.random.normal(jax.random.key(0), (50_000,))
    assert jnp.all(filter_logits(logits, top_p=1.0) == logits)


def test_samples_follow_the_distribution():
    rows = jnp.tile(LOGITS, (40_000, 1))
    tempered = PROBABILITIES ** (1 / 0.7)
    for options, expected in [
        ({}, PROBABILITIES),
        ({"temperature": 0.7}, tempered / tempered.sum()),
        ({"top_k": 2}, np.array([0, 0.4, 0, 0.25, 0]) / 0.65),
        ({"top_p": 0.7}, np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85),
    ]:
        ids = sample_logits(rows, jax.random.key(3), **options)
        np.testing.assert_allclose(np.bincount(ids, minlength=5) / len(ids), expected, atol=0.01)


def test_extreme_temperatures_and_excluded_tokens():
    assert int(sample_logits(LOGITS, temperature=0.0)) == 1
    assert int(sample_logits(LOGITS * 1e3, jax.random.key(0), temperature=1e-30)) == 1
    alone = jnp.full((64, 5), -jnp.inf).at[:, 2].set(0.0)
    assert jnp.all(sample_logits(alone, jax.random.key(1), temperature=100.0, top_p=0.9) == 2)
    assert int(sample_logits(jnp.zeros(4), temperature=0.0)) == 0


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
        generate(counting, 1, jnp.zeros((1,)), jnp.ones((1, 2), jnp.int32), 3, **options)


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
    prompt = jax.random.randint(jax.random.key(1), (2, 6), 0, 13)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0), prompt)["params"])
    out = generate(model.step, params, model.init_state(2, 11), prompt, 6, temperature=0.0)
    full = jnp.concatenate([prompt, out], axis=1)
    logits = jax.jit(model.apply)({"params": params}, full[:, :-1])
    np.testing.assert_array_equal(out, jnp.argmax(logits[:, 5:], -1))

    padded = jnp.concatenate([jnp.full((2, 3), 99), prompt], axis=1)
    mask = jnp.arange(9)[None] >= jnp.array([[3], [3]])
    state = model.init_state(2, 14)
    np.testing.assert_array_equal(
        generate(model.step, params, state, padded, 6, temperature=0.0, prompt_mask=mask), out
    )
