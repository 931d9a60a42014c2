"""The rules of the procedural tasks and of digits, checked row by row or by their statistics."""

import itertools
import sys
from functools import partial

import numpy as np
import pytest

from effattn_jax.data import DataConfig, load
from effattn_jax.data.listops import CLOSE, DIGIT, OPERATOR, draw_tree, evaluate
from effattn_jax.data.procedural import distinct, held_out
from effattn_jax.data.signals import white_signal


def rows(task, count=400, **fields):
    return load(DataConfig(task=task, batch_size=count, validation_examples=50, **fields)).batch(0, 0)


def test_copying():
    batch = rows("copying", context=30, num_tokens=7)
    tokens, targets, weights = batch["tokens"], batch["targets"], batch["weights"]
    assert set(np.unique(tokens[:, :7])) == set(range(1, 9))
    assert not tokens[:, 7:23].any() and (tokens[:, 23:] == 9).all()
    assert np.array_equal(targets[:, 23:], tokens[:, :7]) and not targets[:, :23].any()
    assert (weights[:, 23:] == 1).all() and not weights[:, :23].any()


def test_selective_copying():
    batch = rows("selective_copying", context=24, num_tokens=5)
    tokens = batch["tokens"]
    assert (tokens[:, -5:] == 15).all() and ((tokens[:, :-5] > 0).sum(axis=1) == 5).all()
    for row, target in zip(tokens, batch["targets"]):
        assert row[:-5][row[:-5] > 0].tolist() == target[-5:].tolist()
    assert (batch["weights"] == (tokens == 15)).all()
    share = (tokens[:, :-5] > 0).mean(axis=0)  # each place is as likely as another: 5 of 19
    assert np.abs(share - 5 / 19).max() < 5 * (5 / 19 * 14 / 19 / 400) ** 0.5


def test_induction_heads():
    batch = rows("induction_heads", context=12)
    tokens, answers = batch["tokens"], batch["targets"][:, -1]
    assert ((tokens == 15).sum(axis=1) == 2).all() and (tokens[:, -1] == 15).all()
    first = (tokens == 15).argmax(axis=1)
    assert set(first) == set(range(10))
    assert np.array_equal(tokens[np.arange(len(tokens)), first + 1], answers) and set(answers) == set(range(15))
    assert batch["weights"].sum() == len(tokens) == batch["weights"][:, -1].sum()


@pytest.mark.parametrize("noise", [False, True])
def test_associative_recall(noise):
    batch = rows("mqar", context=64, num_pairs=8, vocab_size=100, random_non_queries=noise)
    tokens, targets, asked = batch["tokens"], batch["targets"], batch["weights"] > 0
    keys, values = tokens[:, 0:16:2], tokens[:, 1:16:2]
    assert keys.min() == 1 and keys.max() == 49 and values.min() == 50 and values.max() == 99
    assert all(len(set(row)) == 8 for row in [*keys, *values])
    assert (asked.sum(axis=1) == 8).all() and not asked[:, :16].any() and not asked[:, 1::2].any()
    for key, value, row, target, where in zip(keys, values, tokens, targets, asked):
        assert dict(zip(row[where], target[where])) == dict(zip(key, value))
    rest = tokens[:, 16:][~asked[:, 16:]]
    assert (set(rest) == set(range(100))) if noise else not rest.any()


def test_gaps_follow_the_power_law_without_replacement():
    far = load(DataConfig(task="mqar", context=64, gap_power=400.0)).batch(0, 0)["tokens"]
    assert far[:, -8:].any(axis=1).all(), "a large power asks at the far end"
    marker = load(DataConfig(task="induction_heads", context=64, gap_power=400.0)).batch(0, 0)["tokens"] == 15
    assert np.all(marker.sum(1) == 2) and np.all(marker[:, 0])
    gaps = load(DataConfig(task="mqar", context=16, num_pairs=2, vocab_size=32, gap_power=0.5)).gaps(
        np.random.default_rng(0), 20_000
    )
    weight = np.arange(1, 7) ** -0.5
    p = weight / weight.sum()
    np.testing.assert_allclose(np.bincount(gaps[:, 0]) / 20_000, p, atol=0.015)
    second = [sum(p[i] * p[j] / (1 - p[i]) for i in range(6) if i != j) for j in range(6)]
    np.testing.assert_allclose(np.bincount(gaps[:, 1]) / 20_000, second, atol=0.015)
    assert (gaps[:, 0] != gaps[:, 1]).all()


def test_near_answers_of_induction_heads():
    """Gaps by the power law; every place is still drawn, and the row is as ever."""
    batch = rows("induction_heads", count=20_000, context=8, gap_power=0.5)
    gaps = 5 - (batch["tokens"] == 15).argmax(axis=1)
    weight = np.arange(1, 7) ** -0.5
    np.testing.assert_allclose(np.bincount(gaps, minlength=6) / 20_000, weight / weight.sum(), atol=0.015)
    assert (batch["tokens"][np.arange(20_000), 6 - gaps] == batch["targets"][:, -1]).all()


def test_distinct_draws_every_subset_alike():
    drawn = np.sort(distinct(np.random.default_rng(0), 20_000, 5, 3), axis=1)
    shares = [(drawn == subset).all(axis=1).mean() for subset in itertools.combinations(range(5), 3)]
    np.testing.assert_allclose(shares, 0.1, atol=0.01)


def test_held_out_is_a_fixed_share():
    drawn = np.random.default_rng(0).integers(0, 9, (20_000, 6))
    held = held_out(drawn, 0.1)
    assert abs(held.mean() - 0.1) < 0.01 and np.array_equal(held, held_out(drawn.astype(np.int32), 0.1))
    numbers = np.random.default_rng(0).random((20_000, 3, 2), np.float32)
    assert abs(held_out(numbers, 0.1).mean() - 0.1) < 0.01


@pytest.mark.parametrize("task, fields", [("copying", {"num_tokens": 2}), ("listops", {"max_args": 2})])
def test_small_tasks_are_split_exactly(task, fields):
    dataset = load(DataConfig(task=task, context=6, vocab_size=None, validation_examples=40, **fields))
    name = "tokens" if dataset.kind == "language" else "inputs"
    held = {row.tobytes() for batch in dataset.validation_batches() for row in batch[name]}
    seen = {row.tobytes() for step in range(40) for row in dataset.batch(0, step)[name]}
    assert held and len(seen) > 40 and not held & seen


def test_a_task_too_small_to_split_says_so():
    fields = {"context": 4, "num_tokens": 1, "vocab_size": 4}  # two different rows
    with pytest.raises(ValueError, match="data.validation_fraction: 0.001 given.*too few different rows"):
        list(load(DataConfig(task="copying", validation_fraction=0.001, **fields)).validation_batches())


def python_value(words):
    """The value by Python's own parser, apart from the code under test."""
    source = "".join(word + "(" if word[0] == "[" else ")," if word == "]" else word + "," for word in words)
    names = {
        "MIN": lambda *a: min(a),
        "MAX": lambda *a: max(a),
        "MED": lambda *a: int(np.median(a)),
        "SM": lambda *a: sum(a) % 10,
    }
    return eval(source.replace("[", "").rstrip(","), {"__builtins__": {}}, names)


def test_listops():
    dataset = load(DataConfig(task="listops", context=60, batch_size=150, min_length=10, max_depth=4, max_args=5))
    batch = dataset.batch(0, 0)
    lengths = batch["mask"].sum(axis=1)
    assert lengths.min() > 10 and lengths.max() < 60
    assert (batch["mask"] == (np.arange(60) < lengths[:, None])).all() and not batch["inputs"][~batch["mask"]].any()
    for row, length, label in zip(batch["inputs"], lengths, batch["labels"]):
        assert python_value(dataset.decode(row[:length]).split()) == label == evaluate(row)
        depth = np.cumsum((row >= OPERATOR) & (row < CLOSE)) - np.cumsum(row == CLOSE)
        assert depth.max() <= 3 and depth[length - 1] == 0 and (depth[: length - 1] > 0).all()  # leaves are a level too
    assert len(set(batch["labels"].tolist())) == 10


def test_listops_trees_are_those_of_the_published_rule():
    rng = np.random.default_rng(0)

    def published(depth):
        if depth == 10 or rng.random() > 0.25:
            return 1
        return 2 + sum(published(depth + 1) for _ in range(rng.integers(2, 11)))

    uniforms = iter(lambda: rng.random(), None)
    theirs = np.array([n for n in (published(1) for _ in range(12_000)) if 1 < n < 200])
    ours = np.array([len(t) for t in (draw_tree(uniforms, 199, 10, 10) for _ in range(3000)) if t])
    assert abs(len(ours) / 3000 - len(theirs) / 3000) < 0.06  # 12,000 roots hold 3,000 operators
    for level in (4, 8, 13, 30, 80):
        assert abs((ours <= level).mean() - (theirs <= level).mean()) < 0.06


def test_listops_impossible_lengths():
    dataset = load(DataConfig(task="listops", context=60, max_depth=2, max_args=2, min_length=20))
    with pytest.raises(ValueError, match="data.min_length: 20 given, must leave lengths"):
        dataset.batch(0, 0)
    tiny = load(DataConfig(task="listops", context=5, max_args=2, validation_fraction=1e-7))
    with pytest.raises(ValueError, match="too few different rows"):
        list(tiny.validation_batches())


def test_listops_default_bounds_are_those_of_long_range_arena():
    assert load(DataConfig(task="listops", context=2000)).min_length == 500
    assert load(DataConfig(task="listops")).codec.decode([12, DIGIT + 4, CLOSE]) == "[MAX 4 ]"


def test_white_signal():
    """Nothing beyond the band, the stated power, and one signal in continuous time at every rate."""
    draw = partial(white_signal, count=300)
    signal = draw(np.random.default_rng(0), length=200, bandwidth=0.3, rms=2.0)
    power = (np.abs(np.fft.rfft(signal)) ** 2).mean(axis=0)
    assert power[[0, *range(31, 101)]].max() < 1e-20 and abs((signal**2).mean() / 4 - 1) < 0.05
    np.testing.assert_allclose(power[1:31] / power.mean() * 30 / 101, 1, atol=0.3)  # white: 300 draws of each
    twice = draw(np.random.default_rng(0), length=400, bandwidth=0.15, rms=2.0)
    np.testing.assert_allclose(twice[:, ::2], signal, atol=1e-12)


def test_delay():
    batch = rows("delay", context=30, lag=4, bandwidth=0.5)
    signal, late = batch["inputs"][..., 0], batch["targets"][..., 0]
    for t in range(30):
        np.testing.assert_array_equal(late[:, t], signal[:, t - 4] if t >= 4 else 0)
    assert not signal[:, 0].any() and batch["weights"].all()


def test_adding():
    batch = rows("adding", context=9)
    numbers, marks = batch["inputs"][..., 0], batch["inputs"][..., 1]
    assert (marks[:, :4].sum(1) == 1).all() and (marks[:, 4:].sum(1) == 1).all() and set(np.unique(marks)) == {0, 1}
    assert numbers.min() >= 0 and numbers.max() < 1 and (marks.sum(0) > 0).all()
    np.testing.assert_allclose(batch["targets"][:, -1, 0], (numbers * marks).sum(1), rtol=1e-6)
    assert (batch["weights"] == (np.arange(9) == 8)).all()
    assert abs(((batch["targets"][:, -1] - 1) ** 2).mean() - 1 / 6) < 0.05


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_chirps_have_their_pitch_at_every_rate(monkeypatch, rate):
    """Without noise, crossings of zero in either half of a row are 2 f a unit of time, which tells the class."""
    monkeypatch.setattr("effattn_jax.data.signals.white_signal", lambda *a, **k: 0.0)
    length = round(4000 * rate)
    batch = rows("chirps", context=length, sampling_rate=rate, count=60)
    halves = (batch["inputs"][..., 0] > 0).reshape(60, 2, -1)
    pitch = (halves[..., 1:] != halves[..., :-1]).sum(-1) / 2 / 2000
    k, falls = np.divmod(batch["labels"], 2)
    root = 1.5**0.5  # f grows from 1 to root in one half, from root to 1.5 in the other
    low, high = (0.02 * 1.5**k * (b - a) / np.log(root) for a, b in ((1, root), (root, 1.5)))
    expected = np.where(falls[:, None], np.stack([high, low], 1), np.stack([low, high], 1))
    np.testing.assert_allclose(pitch, expected, atol=1e-3)
    assert set(batch["labels"]) == set(range(10))


def test_digits():
    dataset = load(DataConfig(task="digits", batch_size=100))
    images = np.concatenate([dataset.training[0], dataset.validation[0]])
    assert len(images) == 1797 == len(np.unique(images, axis=0))  # so the two parts share no image
    assert len(dataset.validation[0]) == 180
    np.testing.assert_allclose([dataset.training[0].mean(), dataset.training[0].std()], [0, 1], atol=1e-5)
    epoch = np.concatenate([dataset.batch(0, step)["inputs"] for step in range(17)])[:1617]
    assert len(np.unique(epoch, axis=0)) == 1617
    assert sorted(np.unique(dataset.validation[1])) == list(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="data.task: 'digits' given, needs the package scikit-learn"):
        load(DataConfig(task="digits"))
