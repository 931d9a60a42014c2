"""NBCE: its formula, its limits, and facts spread over contexts that together exceed what the model was trained to read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effattn_jax.decoding import NaiveBayesStep, generate, naive_bayes_logits
from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.objectives import cross_entropy

PAIRS, CONTEXTS, KEYS = 4, 6, 24  # facts a context, contexts, and as many keys as values
VOCAB = 2 * KEYS + 1


def rows(seed=0, n=3, tokens=7):
    return np.random.default_rng(seed).normal(size=(n + 1, tokens)).astype(np.float32)


def test_formula():
    z = rows()
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    entropy = -(np.exp(log_p) * log_p).sum(-1)[1:]
    k = int(entropy.argmin())
    pools = {"entropy": log_p[1 + k], "mean": log_p[1:].mean(0), "max": log_p[1:].max(0)}

    @jax.jit
    def run(z):
        found = {name: naive_bayes_logits(z, pooling=name, beta=0.7, top_p=None) for name in pools}
        bayes = naive_bayes_logits(z, pooling="mean", beta=2.0, top_p=None)[0]
        return found, bayes, naive_bayes_logits(z, beta=-1.0, top_p=None)[0]

    found, bayes, ignored = run(z)
    for pooling, pooled in pools.items():
        out, chosen = found[pooling]
        np.testing.assert_allclose(out, 1.7 * pooled - 0.7 * log_p[0], atol=1e-5)
        assert int(chosen) == k
    np.testing.assert_allclose(bayes, log_p[1:].sum(0) - 2 * log_p[0], atol=1e-5)
    np.testing.assert_allclose(ignored, log_p[0], atol=1e-5)


def test_truncation_and_transitions():
    """Outside the nucleus of the empty context nothing is subtracted, outside that of the chosen one a token has no chance; ties stay."""
    z = np.log(np.float32([[0.97, 0.01, 0.02], [0.02, 0.97, 0.01], [0.96, 0.02, 0.02]]))
    penalties = {0.0: 0, 1.0: 1}

    @jax.jit
    def run(z):
        cut = naive_bayes_logits(z, beta=0.5, top_p=0.95, pooling="entropy")
        picked = [naive_bayes_logits(z, jnp.array(1), transition_penalty=x, top_p=None)[1] for x in penalties]
        return cut, picked

    (out, chosen), picked = jax.tree.map(np.asarray, run(z))
    assert int(chosen) == 0 and np.isneginf(out[0]) and np.isclose(out[1], np.log(0.97), atol=1e-5)
    assert [int(x) for x in picked] == list(penalties.values())


POOLINGS = ("entropy", "mean", "max")


def test_contexts_that_have_no_likely_token_in_common():
    """beta = -1 is the empty row whatever was cut; contexts whose nuclei share nothing are pooled whole."""
    p = np.array([[0.5, 0.3, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01]])

    @jax.jit
    def run(z, weight):
        ignored = [
            naive_bayes_logits(z, pooling=pooling, beta=beta)[0] for beta in (-1.0, weight) for pooling in POOLINGS
        ]
        return ignored, naive_bayes_logits(z, pooling="mean", beta=0.0)[0]

    ignored, pooled = run(np.log(p).astype(np.float32), -1.0)  # the weight may be traced
    for out in ignored:
        np.testing.assert_allclose(out, np.log(p[0]), atol=1e-5)
    np.testing.assert_allclose(pooled, np.log(p[1:]).mean(0), atol=1e-5)


def test_contexts_have_no_order_and_copies_no_weight():
    orders = [0, 1, 2, 3], [0, 3, 1, 2], [0, 1], [0, 1, 1, 1]

    @jax.jit
    def run(z):
        return [[naive_bayes_logits(z[np.array(o)], pooling=pooling)[0] for o in orders] for pooling in POOLINGS]

    for out, moved, one, copies in run(rows()):
        np.testing.assert_allclose(moved, out, atol=1e-6)
        np.testing.assert_allclose(copies, one, atol=1e-6)


def facts(rng, count, pairs):
    """Distinct keys 1.., each with a value KEYS + 1.., as rows key value key value ..."""
    keys = np.argsort(rng.random((count, KEYS)), axis=1)[:, :pairs] + 1
    values = rng.integers(KEYS + 1, VOCAB, keys.shape)
    return keys, values, np.stack([keys, values], axis=2).reshape(count, 2 * pairs)


def training_batch(rng, count=64):
    """PAIRS facts, then their keys and one more in any order; the answer to that one, and to all where the facts are padding, is any value."""
    keys, values, row = facts(rng, count, PAIRS + 1)
    order = np.argsort(rng.random(keys.shape), axis=1)
    empty = rng.random((count, 1)) < 0.2
    noise = rng.integers(KEYS + 1, VOCAB, keys.shape)
    answer = np.where((order < PAIRS) & ~empty, np.take_along_axis(values, order, axis=1), noise)
    tokens = np.concatenate([row[:, : 2 * PAIRS], np.take_along_axis(keys, order, axis=1)], axis=1)
    mask = np.broadcast_to(~empty | (np.arange(tokens.shape[1]) >= 2 * PAIRS), tokens.shape)
    return tokens.astype(np.int32), mask, answer.astype(np.int32)


def trained():
    """A one-layer model that has learned to look up keys among PAIRS facts, never more."""
    shape = {"layers": 1, "width": 64, "heads": 1, "conv_width": 2, "mlp_ratio": 1.0, "positions": "none"}
    model, optimizer, rng = LanguageModel(ModelConfig(**shape), VOCAB), optax.adam(3e-3), np.random.default_rng(0)

    @jax.jit
    def update(params, memory, tokens, mask, answer):
        def loss(params):
            logits = model.apply({"params": params}, tokens, mask=mask)[:, -PAIRS - 1 :]
            return cross_entropy(logits, answer, jnp.ones(answer.shape))[0] / answer.size

        updates, memory = optimizer.update(jax.grad(loss)(params), memory)
        return optax.apply_updates(params, updates), memory

    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    memory = optimizer.init(params)
    for _ in range(200):
        params, memory = update(params, memory, *training_batch(rng))
    return model, params


def test_facts_spread_over_contexts_longer_than_the_model_reads():
    """Truncation knows the last context alone, NBCE all of them."""
    model, params = trained()
    questions = 64
    rng = np.random.default_rng(1)
    keys, values, row = facts(rng, questions, PAIRS * CONTEXTS)
    asked = rng.integers(0, PAIRS * CONTEXTS, questions)
    key, answer = keys[np.arange(questions), asked], values[np.arange(questions), asked]
    contexts = row.reshape(questions, CONTEXTS, 2 * PAIRS)
    prompts = np.concatenate([np.zeros_like(contexts[:, :1]), contexts], axis=1)
    prompts = np.concatenate([prompts, np.broadcast_to(key[:, None, None], (questions, CONTEXTS + 1, 1))], axis=2)
    mask = (np.arange(CONTEXTS + 1)[:, None] > 0) | (np.arange(2 * PAIRS + 1)[None] == 2 * PAIRS)
    mask = np.broadcast_to(mask, prompts.shape)
    prompts, mask = (x.reshape(-1, 2 * PAIRS + 1) for x in (prompts, mask))

    def accuracy(step, tokens, mask):
        state = model.init_state(tokens.shape[0], tokens.shape[1])
        found = generate(step, params, state, tokens, 1, temperature=0.0, prompt_mask=mask)
        return float((np.asarray(found)[:, 0] == answer).mean())

    last = prompts.reshape(questions, CONTEXTS + 1, -1)[:, -1]
    truncated = accuracy(model.step, last, np.ones(last.shape, bool))
    extended = accuracy(NaiveBayesStep(model.step, CONTEXTS, beta=0.25), prompts, mask)
    assert truncated < 0.4 and extended > 0.85, (truncated, extended)


MODELS = {
    "softmax": {"positions": "rotary"},
    "linear": {"positions": "rotary", "mixer": "linear"},
    "min_gru": {"positions": "none", "mixer": "min_gru"},
    "window": {"positions": "rotary", "window": 3, "sinks": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_any_language_model_through_its_state(name):
    """Greedy tokens from states and left padding are those of whole rows without either, pooled with the context before."""
    model = LanguageModel(ModelConfig(layers=1, width=16, heads=2, mlp_ratio=1.0, **MODELS[name]), 20)
    rng = np.random.default_rng(0)
    asked, texts = rng.integers(1, 20, 2), [rng.integers(1, 20, n) for n in (5, 3)]
    rows = [asked, *(np.concatenate([text, asked]) for text in texts)]
    params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 3), np.int32))["params"]
    params = jax.tree.map(lambda x: 3 * np.asarray(x), params)  # so that tokens differ from step to step
    padded = np.stack([np.pad(row, (7 - row.size, 0)) for row in rows])
    mask = np.arange(7) >= 7 - np.array([[row.size] for row in rows])
    options = {"pooling": "entropy", "beta": 0.5, "top_p": 0.9, "transition_penalty": 0.2}
    step = NaiveBayesStep(model.step, 2, **options)
    state = model.init_state(3, 12)
    found = generate(step, params, state, padded, 6, temperature=0.0, prompt_mask=mask)

    @jax.jit
    def pooled(params, rows, lengths, previous):
        logits = model.apply({"params": params}, rows)[jnp.arange(3), lengths - 1]  # behind its end: nothing seen
        return naive_bayes_logits(logits, previous, **options)

    expected, previous = [], None
    for _ in range(6):
        whole = [np.concatenate([row, expected]).astype(np.int32) for row in rows]
        ends = np.stack([np.pad(row, (0, 13 - row.size)) for row in whole])
        logits, previous = pooled(params, ends, np.array([row.size for row in whole]), previous)
        expected.append(int(np.argmax(logits)))
    assert found.tolist() == [expected] and len(set(expected)) > 1


def test_steps_and_mistakes():
    """Sampling, stop tokens and later steps go through `generate`; what does not fit is refused."""

    def step(params, tokens, state):  # every row counts on by its own stride, the first does not know
        stride = jnp.array([1, 2, 2])[:, None]
        sure = jnp.array([0.0, 9.0, 9.0])[:, None, None]
        return sure * jax.nn.one_hot(tokens + stride, 12), state + 1

    tokens = np.array([[1], [1], [1]])
    got = generate(
        NaiveBayesStep(step, 2), None, np.zeros(3, np.float32), tokens, 4, key=jax.random.key(0), temperature=0.01
    )
    assert got.tolist() == [[3, 5, 7, 9]]
    got = generate(NaiveBayesStep(step, 2), None, np.zeros(3, np.float32), tokens, 4, temperature=0.0, stop_token=5)
    assert got.tolist() == [[3, 5, 5, 5]]
    with pytest.raises(ValueError, match="prompt must have contexts . 1 = 3 rows a question; got 2 rows"):
        generate(NaiveBayesStep(step, 2), None, np.zeros(3, np.float32), tokens[:2], 4, temperature=0.0)
    for words, call in {
        "pooling='mode' is unknown": lambda: NaiveBayesStep(step, 2, pooling="mode"),
        "contexts must be a positive int": lambda: NaiveBayesStep(step, 0),
        "beta must be at least -1": lambda: naive_bayes_logits(np.ones((2, 3), np.float32), beta=-2.0),
        "and finite; got inf": lambda: naive_bayes_logits(np.ones((2, 3), np.float32), beta=np.inf),
        "transition_penalty must be a finite": lambda: naive_bayes_logits(
            np.ones((2, 3), np.float32), transition_penalty=np.nan
        ),
        r"previous must have shape \(\)": lambda: naive_bayes_logits(
            np.ones((2, 3), np.float32), np.zeros(5, np.float32)
        ),
        "n >= 1 contexts": lambda: naive_bayes_logits(np.ones((1, 3), np.float32)),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
