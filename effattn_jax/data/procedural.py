"""Tasks drawn by rule, without end: training and validation are told apart by a hash of the row itself."""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from effattn_jax.data import codecs
from effattn_jax.data.config import at_least, invalid
from effattn_jax.data.sampling import SPLIT, TRAINING, VALIDATION, Batch, Dataset, digest, generator, shard_rows

MOST_TOKENS = 1 << 22  # drawn at a time, which bounds the memory of a large validation set
MOST_EXPECTED = 30.0  # rows that should have been found since the last one: a miss by chance has probability e^-30


@functools.lru_cache(maxsize=8)
def _multipliers(length: int) -> np.ndarray:
    return generator(0, 0, SPLIT).integers(0, 1 << 63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def held_out(rows: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each row (N, ...), of ids or of float32 numbers, belongs to validation: a fixed hash of it is below `fraction`.

    Equal rows get equal answers, so no row that training ever draws is in the validation set, however small the
    task is. The hash is sum_t m_t x_t mod 2^64 with fixed odd m, mixed once, x_t being an id or a float's 32 bits; O(N T).

    >>> held_out(np.zeros((2, 5), np.int32), 0.5).tolist() in ([True, True], [False, False])
    True
    """
    rows = rows.reshape(len(rows), -1)
    if np.issubdtype(rows.dtype, np.floating):
        rows = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    mixed = (rows.astype(np.uint64) * _multipliers(rows.shape[1])).sum(axis=1, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53


def distinct(rng: np.random.Generator, count: int, population: int, size: int) -> np.ndarray:
    """`count` uniform random subsets of `size` of 0..population-1, in no particular order (Floyd's algorithm).

    A loop over `size` only: O(count size^2), whatever the population.

    >>> sorted(distinct(np.random.default_rng(0), 1, 4, 4)[0].tolist())
    [0, 1, 2, 3]
    """
    chosen = np.empty((count, size), np.int64)
    for i, top in enumerate(range(population - size, population)):
        guess = rng.integers(0, top + 1, count)
        taken = (chosen[:, :i] == guess[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, guess)
    return chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Procedural(Dataset):
    """A task given by `draw`; subclasses also state `usual_vocab_size`, `check` and `symbols`.

    A process draws the whole global batch and keeps its rows, so a batch does not depend on the number of shards.
    """

    usual_vocab_size: ClassVar[int]
    identifying: ClassVar[str] = "tokens"  # the array whose rows tell training from validation

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError for sizes that the task cannot have."""
        raise NotImplementedError

    def symbols(self) -> list[str]:
        """A readable word for each id."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows of the task."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.usual_vocab_size if self.config.vocab_size is None else self.config.vocab_size

    @functools.cached_property
    def codec(self) -> codecs.Codec:
        """Words separated by blanks."""
        return codecs.Symbols(self.symbols())

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the task and its sizes."""
        sizes = dataclasses.asdict(self.config)
        return digest({name: sizes[name] for name in sorted(sizes) if name not in ("path", "level", "batch_size")})

    def rows(self, seed: int, step: int, count: int, kept: slice, validation: bool) -> Batch:
        """The rows `kept` of the `count` that (seed, step) stands for, of one side of the split.

        Raises:
          ValueError: the task has too few different rows to find any on this side.
        """
        rng = generator(seed, step, VALIDATION if validation else TRAINING)
        share = self.config.validation_fraction if validation else 1 - self.config.validation_fraction
        found: list[Batch] = []
        missing, expected = count, 0.0
        while missing and expected < MOST_EXPECTED:
            tries = min(int(1.1 * missing / share) + 8, max(8, MOST_TOKENS // self.context))
            batch = self.draw(rng, tries)
            side = held_out(batch[self.identifying], self.config.validation_fraction) == validation
            chosen = np.flatnonzero(side)[:missing]
            found.append({name: array[chosen] for name, array in batch.items()})
            missing -= len(chosen)
            expected = 0.0 if len(chosen) else expected + tries * share
        if missing:
            raise self.too_small(validation)
        return {name: np.concatenate([batch[name] for batch in found])[kept] for name in found[0]}

    def too_small(self, validation: bool) -> ValueError:
        """The error of a task with too few different rows to split."""
        rule = (
            f"must leave rows for {'validation' if validation else 'training'}, and {self.config.task} of these sizes "
            "has too few different rows: take a larger task or a fraction nearer 0.5"
        )
        return invalid("validation_fraction", self.config.validation_fraction, rule)

    def batch(self, seed: int, step: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """Fresh rows (see `Dataset.batch`)."""
        kept = shard_rows(self.batch_size, shard, num_shards)
        return self.rows(seed, step, self.batch_size, kept, validation=False)

    @property
    def num_validation_items(self) -> int:
        """`config.validation_examples`."""
        return self.config.validation_examples

    @functools.cached_property
    def _validation(self) -> Batch:
        return self.rows(0, 0, self.num_validation_items, slice(None), validation=True)

    def validation_items(self, indices: np.ndarray) -> Batch:
        """Rows of the fixed validation set, which is drawn once, at the first call."""
        return {name: array[indices] for name, array in self._validation.items()}


def check_vocab(task: Procedural, smallest: int) -> None:
    """Raises ValueError unless the vocabulary has at least `smallest` symbols."""
    at_least("vocab_size", task.vocab_size, smallest)


def language_batch(tokens: np.ndarray, places: np.ndarray, answers: np.ndarray) -> Batch:
    """Rows (N, T) whose positions `places` (N, Q) must predict `answers` (N, Q), and nothing else.

    >>> language_batch(np.zeros((1, 3)), np.array([[1]]), np.array([[7]]))["targets"].tolist()
    [[0, 7, 0]]
    """
    targets, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
    np.put_along_axis(targets, places, answers.astype(np.int32), axis=1)
    np.put_along_axis(weights, places, np.float32(1), axis=1)
    return {"tokens": tokens.astype(np.int32), "targets": targets, "weights": weights}
