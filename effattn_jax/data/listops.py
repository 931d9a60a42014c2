"""ListOps: the value of a nested list expression, as drawn for Long Range Arena (Tay et al., arXiv 2011.04006)."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from effattn_jax.data.config import at_least, invalid
from effattn_jax.data.procedural import Procedural, held_out
from effattn_jax.data.sampling import TRAINING, VALIDATION, Batch, generator

PAD, DIGIT, OPERATOR, CLOSE = 0, 1, 11, 15  # first id of each kind; 16 ids
MOST_TRIES = 20_000  # expressions drawn for one row before the lengths are called impossible
MOST_TREES = 500  # fitting ones, each with 64 choices of digits, before the task is called too small to split
VALUES = {
    OPERATOR: min,
    OPERATOR + 1: max,
    OPERATOR + 2: lambda args: int(np.median(args)),  # of an even count: the half is cut off
    OPERATOR + 3: lambda args: sum(args) % 10,
}


@dataclasses.dataclass(frozen=True, eq=False)
class ListOps(Procedural):
    """Classify `[MAX 4 [SM 7 8 ] 3 ]` by its value, 0 to 9.

    A node above the greatest depth is an operator with probability 1/4, else a uniform digit; an operator is one of
    MIN, MAX, MED (truncated) and SM (sum modulo 10) with 2 to `max_args` children, uniformly. Only expressions with
    `min_length` < tokens < `context` are taken; rows are padded with 0 on the right. LRA: context 2000, min_length
    500, depth 10, 10 arguments: mean length 1040, always saying the commonest label is right 17 times in 100, and one
    level of parsing gives about 52. LRA keeps 96,000 of them; here training never repeats. About 1.5 ms a row there.

    >>> from effattn_jax.data import DataConfig, load
    >>> task = load(DataConfig(task="listops", context=20))
    >>> row = task.batch(seed=0, step=0)
    >>> task.decode(row["inputs"][0][row["mask"][0]]), int(row["labels"][0])
    ('[MIN 6 1 7 2 ]', 1)
    """

    kind = "classification"
    num_classes = 10
    usual_vocab_size = 16
    identifying = "inputs"

    def check(self) -> None:
        """Raises ValueError for lengths that no expression has, or a vocabulary other than the fixed 16."""
        at_least("context", self.context, 5)
        at_least("max_depth", self.config.max_depth, 2)
        at_least("max_args", self.config.max_args, 2)
        at_least("min_length", self.min_length, 1)
        if self.min_length > self.context - 2:
            raise invalid("min_length", self.min_length, f"must be at most context - 2 = {self.context - 2}")
        if self.vocab_size != 16:
            raise invalid("vocab_size", self.vocab_size, "must be 16 or left out for listops")

    @property
    def min_length(self) -> int:
        """Expressions have more tokens than this."""
        return max(1, self.context // 4) if self.config.min_length is None else self.config.min_length

    def symbols(self) -> list[str]:
        """Padding _, digits, operators, closing bracket."""
        return ["_", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]"]

    def rows(self, seed: int, step: int, count: int, kept: slice, validation: bool) -> Batch:
        """As `Procedural.rows`; each row has random numbers of its own, so a shard draws only its rows."""
        stream = VALIDATION if validation else TRAINING
        numbers = range(count)[kept]
        inputs = np.zeros((len(numbers), self.context), np.int32)
        for place, row in enumerate(numbers):
            self._fill(inputs[place], generator(seed, step, stream, row), validation)
        return {
            "inputs": inputs,
            "labels": np.array([evaluate(row) for row in inputs], np.int32),
            "mask": inputs != PAD,
            "weights": np.ones(len(numbers), np.float32),
        }

    def _fill(self, row: np.ndarray, rng: np.random.Generator, validation: bool) -> None:
        uniforms = _uniforms(rng)
        fitting = 0
        for _ in range(MOST_TRIES):
            tokens = draw_tree(uniforms, self.context - 1, self.config.max_depth, self.config.max_args)
            if tokens is None or len(tokens) <= self.min_length:
                continue
            fitting += 1
            if fitting > MOST_TREES:
                raise self.too_small(validation)
            row[: len(tokens)] = tokens
            row[len(tokens) :] = PAD
            leaves = np.flatnonzero(row == DIGIT)
            # The tree is kept and its digits drawn anew until the row falls on its side of the split: the digits are
            # independent of the tree, so this changes no probability and saves most of the work.
            for _ in range(64):
                row[leaves] = rng.integers(DIGIT, DIGIT + 10, len(leaves))
                if held_out(row[None], self.config.validation_fraction)[0] == validation:
                    return
        rule = f"must leave lengths that trees of depth {self.config.max_depth} with at most {self.config.max_args} "
        raise invalid("min_length", self.min_length, rule + f"arguments have, below the context {self.context}")


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.random(256).tolist()


def draw_tree(uniforms: Iterator[float], longest: int, max_depth: int, max_args: int) -> list[int] | None:
    """Ids of one expression that is no bare digit, all digits 0; None as soon as it must exceed `longest`.

    >>> draw_tree(iter([0.0, 0.0, 0.9, 0.9]), longest=9, max_depth=10, max_args=10)
    [11, 1, 1, 15]
    """
    tokens: list[int] = []
    missing = [1]  # children still to come of each open operator; the root has a virtual parent
    least = 1  # tokens so far and those that must still come
    while missing:
        if not missing[-1]:
            missing.pop()
            if missing:
                tokens.append(CLOSE)
            continue
        missing[-1] -= 1
        depth = len(missing)
        if depth > 1 and (depth >= max_depth or next(uniforms) > 0.25):
            tokens.append(DIGIT)
        else:
            tokens.append(OPERATOR + int(next(uniforms) * 4))
            missing.append(2 + int(next(uniforms) * (max_args - 1)))
            least += missing[-1] + 1
            if least > longest:
                return None
    return tokens


def evaluate(row: np.ndarray) -> int:
    """The value of an expression of ids, padding ignored.

    >>> evaluate(np.array([12, 5, 14, 8, 9, 15, 4, 15, 0]))  # [MAX 4 [SM 7 8 ] 3 ]
    5
    """
    stack: list[tuple[int, list[int]]] = [(PAD, [])]
    for token in row.tolist():
        if DIGIT <= token < OPERATOR:
            stack[-1][1].append(token - DIGIT)
        elif OPERATOR <= token < CLOSE:
            stack.append((token, []))
        elif token == CLOSE:
            operator, args = stack.pop()
            stack[-1][1].append(VALUES[operator](args))
    return stack[0][1][0]
