"""What holds for every task of the table: batches are functions of (seed, step, shard), splits are disjoint."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from effattn_jax.data import TASKS, DataConfig, load
from effattn_jax.data.codecs import from_spec
from effattn_jax.data.prepare import prepare
from effattn_jax.data.sampling import epoch_indices, generator, shard_rows

SIZES = {"validation_examples": 21, "batch_size": 8}  # 21: the last validation batch is not full


@pytest.fixture(scope="module", params=TASKS)
def dataset(request, tmp_path_factory):
    config = DataConfig(task=request.param, **SIZES)
    if request.param == "tokens":
        folder = tmp_path_factory.mktemp("tokens")
        (folder / "in.txt").write_text("".join(f"{i} and " for i in range(900)))
        prepare(str(folder / "in.txt"), str(folder / "out"))
        config = dataclasses.replace(config, path=str(folder / "out"))
    return load(config)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_batches_repeat_bit_for_bit_in_any_order(dataset):
    first = [dataset.batch(3, step) for step in (0, 5, 1)]
    again = [load(dataset.config).batch(3, step) for step in (1, 5, 0)][::-1]
    for a, b in zip(first, again):
        assert equal(a, b)


def test_seeds_and_steps_give_other_batches(dataset):
    batches = [dataset.batch(seed, step) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0), (0, 2**40))]
    for i, one in enumerate(batches):
        assert not any(equal(one, other) for other in batches[:i])


@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_shards_make_up_the_batch(dataset, num_shards):
    whole = dataset.batch(0, 4)
    shards = [dataset.batch(0, 4, i, num_shards) for i in range(num_shards)]
    assert equal(whole, {name: np.concatenate([shard[name] for shard in shards]) for name in whole})
    full = list(dataset.validation_batches(2))
    parts = [list(dataset.validation_batches(2, i, num_shards)) for i in range(num_shards)]
    for step, one in enumerate(full):
        assert equal(one, {name: np.concatenate([part[step][name] for part in parts]) for name in one})


def test_layout(dataset):
    size, length = dataset.batch_size, dataset.context
    for batch in [dataset.batch(0, 0), *dataset.validation_batches()]:
        if dataset.kind == "language":
            assert {name: array.dtype.name for name, array in batch.items()} == {
                "tokens": "int32",
                "targets": "int32",
                "weights": "float32",
            }
            assert {array.shape for array in batch.values()} == {(size, length)}
            ids = np.concatenate([batch["tokens"], batch["targets"]])
            assert 0 <= ids.min() and ids.max() < dataset.vocab_size
        elif dataset.kind == "regression":
            assert dataset.vocab_size is None and batch["targets"].shape == (size, length, dataset.num_outputs)
            assert batch["inputs"].shape[:2] == batch["weights"].shape == (size, length)
            assert batch["inputs"].dtype == batch["targets"].dtype == np.float32
        else:
            assert dataset.kind == "classification"
            assert batch["labels"].shape == batch["weights"].shape == (size,) and batch["labels"].dtype == np.int32
            assert batch["mask"].shape == (size, length) == batch["inputs"].shape[:2] and batch["mask"].dtype == bool
            assert batch["inputs"].dtype == (np.float32 if dataset.vocab_size is None else np.int32)
            assert 0 <= batch["labels"].min() and batch["labels"].max() < dataset.num_classes
        assert batch["weights"].dtype == np.float32 and set(np.unique(batch["weights"])) <= {0, 1}
    assert dataset.batch(0, 0)["weights"].any()


def test_validation_is_fixed_and_each_row_comes_once(dataset):
    once, again = list(dataset.validation_batches()), list(load(dataset.config).validation_batches())
    assert len(once) == -(-dataset.num_validation_items // dataset.batch_size) == len(again)
    assert all(equal(a, b) for a, b in zip(once, again))
    rows = sum(int(batch["weights"].reshape(dataset.batch_size, -1).any(axis=1).sum()) for batch in once)
    assert rows == dataset.num_validation_items
    assert len(list(dataset.validation_batches(max_batches=1))) == 1


def test_a_larger_batch_has_the_same_validation_set(dataset):
    def rows(batch_size):
        batches = load(dataclasses.replace(dataset.config, batch_size=batch_size)).validation_batches()
        rows = [row for b in batches for row in zip(*(b[name] for name in sorted(b))) if np.any(row[-1])]
        return [b"".join(part.tobytes() for part in row) for row in rows]

    assert rows(8) == rows(12)


def test_training_never_meets_validation(dataset):
    name = "tokens" if dataset.kind == "language" else "inputs"
    if hasattr(dataset, "training"):  # a finite set: the two parts are different memory, checked by task elsewhere
        return
    held = {row.tobytes() for batch in dataset.validation_batches() for row in batch[name]}
    assert not held & {row.tobytes() for step in range(20) for row in dataset.batch(0, step)[name]}


def test_fingerprint_and_codec(dataset):
    assert dataset.fingerprint == load(dataset.config).fingerprint
    assert len(dataset.fingerprint) == 16 and int(dataset.fingerprint, 16) >= 0
    other = load(dataclasses.replace(dataset.config, batch_size=4))
    assert other.fingerprint == dataset.fingerprint
    if dataset.kind == "regression":
        assert dataset.codec is None
        return
    ids = dataset.batch(0, 0)["tokens" if dataset.kind == "language" else "labels"].ravel()[:20]
    if dataset.config.task != "text":  # bytes may cut a character
        assert dataset.encode(dataset.decode(ids)).tolist() == ids.tolist()
    assert from_spec(dataset.codec.spec()).decode(ids) == dataset.decode(ids)


def test_frozen(dataset):
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.config = None


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((-1, 0), "seed: -1 given"),
        ((0, -1), "step: -1 given"),
        ((0, 0, 2, 2), "shard: 2 given, must be in 0..1"),
        ((0, 0, 0, 3), "num_shards: 3 given, must be positive and divide the batch size 8"),
    ],
)
def test_bad_calls(dataset, arguments, words):
    with pytest.raises(ValueError, match=words):
        dataset.batch(*arguments)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"task": "mqra"}, "data.task: 'mqra' given.*nearest: mqar"),
        ({"level": "byte"}, "data.level: 'byte' given.*nearest: bytes"),
        ({"batch_size": 0}, "data.batch_size: 0 given"),
        ({"context": 2.5}, "data.context: 2.5 given"),
        ({"validation_fraction": 1.0}, "data.validation_fraction: 1.0 given"),
        ({"validation_examples": 0}, "data.validation_examples: 0 given"),
        ({"task": "copying", "context": 19}, "data.context: 19 given, must be at least 2"),
        ({"task": "copying", "num_tokens": 0}, "data.num_tokens: 0 given"),
        ({"task": "copying", "vocab_size": 3}, "data.vocab_size: 3 given"),
        ({"task": "selective_copying", "context": 19}, "data.context: 19 given"),
        ({"task": "induction_heads", "context": 2}, "data.context: 2 given"),
        ({"task": "induction_heads", "vocab_size": 2}, "data.vocab_size: 2 given"),
        ({"task": "mqar", "context": 63}, "data.context: 63 given, must be even"),
        ({"task": "mqar", "num_pairs": 17}, "data.context: 64 given, must be even and at least 4"),
        ({"task": "mqar", "vocab_size": 64}, "data.vocab_size: 64 given, must be an integer of at least 65"),
        ({"task": "mqar", "gap_power": 0.0}, "data.gap_power: 0.0 given"),
        ({"task": "induction_heads", "gap_power": -1.0}, "data.gap_power: -1.0 given"),
        ({"task": "listops", "min_length": 63}, "data.min_length: 63 given, must be at most"),
        ({"task": "listops", "max_args": 1}, "data.max_args: 1 given"),
        ({"task": "listops", "max_depth": 1}, "data.max_depth: 1 given"),
        ({"task": "listops", "vocab_size": 9}, "data.vocab_size: 9 given"),
        ({"task": "delay", "lag": 64}, "data.lag: 64 given, must be below the context 64"),
        ({"task": "delay", "lag": 0}, "data.lag: 0 given"),
        ({"task": "delay", "bandwidth": 1.5}, "data.bandwidth: 1.5 given, must lie in"),
        ({"task": "adding", "context": 1}, "data.context: 1 given"),
        ({"task": "chirps", "sampling_rate": 0.3}, "data.sampling_rate: 0.3 given, must be finite and at least 0.4"),
        ({"task": "digits", "context": 65}, "data.context: 65 given, must be 64"),
        ({"task": "digits", "validation_fraction": 1e-5}, "data.validation_fraction"),
        ({"task": "tokens"}, "data.path: None given"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        load(DataConfig(**fields))
    assert "\n" not in str(error.value)


def test_generator_streams_are_apart():
    arguments = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (2**32, 0, 0, 0),
        (0, 2**32, 0, 0),
    ]
    assert len({int(generator(*one).integers(1 << 62)) for one in arguments}) == len(arguments)
    with pytest.raises(ValueError, match=r"seed: \d+ given, must be at least 0 and below 2\^64"):
        generator(2**64, 0)


def test_epochs_show_each_item_once():
    seen = np.concatenate([epoch_indices(7, 10, start, 4) for start in range(0, 40, 4)])
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert sorted(epoch_indices(0, 3, 0, 9).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_shards_are_consecutive_rows():
    assert [shard_rows(12, i, 3) for i in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]


def test_import_is_cheap():
    code = "import sys, effattn_jax.data; print([m for m in ('sklearn', 'tokenizers', 'tyro', 'rich', 'flax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
