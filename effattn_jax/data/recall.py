"""Tasks of remembering: copying, selective copying, induction heads, multi-query associative recall."""

import dataclasses

import numpy as np

from effattn_jax.data.config import at_least, invalid
from effattn_jax.data.procedural import Procedural, check_vocab, distinct, language_batch
from effattn_jax.data.sampling import Batch


@dataclasses.dataclass(frozen=True, eq=False)
class Copying(Procedural):
    """M tokens, then blanks, then M markers: at marker i say token i.

    With A symbols, tokens are uniform in 1..A-2, 0 is the blank and A-1 the marker; a row of T has T - 2M blanks.
    Uses `num_tokens` (M) and `vocab_size` (A, usually 10). A guess is right 1 time in A - 2.
    The copying task of S4's code (Gu et al., arXiv 2111.00396), after Arjovsky et al., arXiv 1511.06464.

    >>> from effattn_jax.data import DataConfig, load
    >>> task = load(DataConfig(task="copying", context=8, num_tokens=3))
    >>> row = task.batch(seed=0, step=0)
    >>> task.decode(row["tokens"][0]), task.decode(row["targets"][0])
    ('1 5 8 _ _ ? ? ?', '_ _ _ _ _ 1 5 8')
    """

    usual_vocab_size = 10

    def check(self) -> None:
        """Raises ValueError unless A >= 4, M >= 1 and T >= 2 M."""
        check_vocab(self, 4)
        at_least("num_tokens", self.config.num_tokens, 1)
        if self.context < 2 * self.config.num_tokens:
            rule = f"must be at least 2 * num_tokens = {2 * self.config.num_tokens}"
            raise invalid("context", self.context, rule)

    def symbols(self) -> list[str]:
        """Blank _, tokens by number, marker ?."""
        return ["_", *map(str, range(1, self.vocab_size - 1)), "?"]

    def places(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Where the tokens stand, ascending (count, M)."""
        return np.broadcast_to(np.arange(self.config.num_tokens), (count, self.config.num_tokens))

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        size = self.config.num_tokens
        answers = rng.integers(1, self.vocab_size - 1, (count, size), dtype=np.int32)
        tokens = np.zeros((count, self.context), np.int32)
        np.put_along_axis(tokens, self.places(rng, count), answers, axis=1)
        tokens[:, -size:] = self.vocab_size - 1
        markers = np.broadcast_to(np.arange(self.context - size, self.context), (count, size))
        return language_batch(tokens, markers, answers)


@dataclasses.dataclass(frozen=True, eq=False)
class SelectiveCopying(Copying):
    """As copying, but the M tokens stand at random places among the blanks, a new choice in each row.

    The places are a uniform random subset of the first T - M. A model without input-dependent steps cannot skip the
    blanks. Uses `num_tokens` (M; Mamba's run: 16) and `vocab_size` (A, usually 16). A guess is right 1 time in A - 2.
    Mamba, appendix E.1 (Gu and Dao, arXiv 2312.00752): T = 4096 there.

    >>> from effattn_jax.data import DataConfig, load
    >>> task = load(DataConfig(task="selective_copying", context=8, num_tokens=2))
    >>> row = task.batch(seed=0, step=0)
    >>> task.decode(row["tokens"][0]), task.decode(row["targets"][0])
    ('_ _ 1 _ 8 _ ? ?', '_ _ _ _ _ _ 1 8')
    """

    usual_vocab_size = 16

    def places(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Where the tokens stand, ascending (count, M)."""
        size = self.config.num_tokens
        return np.sort(distinct(rng, count, self.context - size, size), axis=1)


def check_gap_power(power: float) -> None:
    """Raises ValueError unless the exponent of a power law is positive and finite."""
    if not 0 < power < float("inf"):
        raise invalid("gap_power", power, "must be positive and finite")


@dataclasses.dataclass(frozen=True, eq=False)
class InductionHeads(Procedural):
    """Random tokens with one marker among them and one at the end: say what followed the first.

    With A symbols, tokens are uniform in 0..A-2 and A-1 is the marker, which stands at a place in 0..T-3, the gap behind
    its successor having p(gap) ~ a (gap + 1)^(a - 1), and at T-1; only the last position is asked. Uses `vocab_size` (A,
    usually 16) and `gap_power` (a, usually 1: a uniform place). A guess is right 1 time in A - 1.
    Fu et al., arXiv 2212.14052 (there 20 symbols, 30 tokens); Mamba trains at T = 256 and tests up to 2^20.

    >>> from effattn_jax.data import DataConfig, load
    >>> task = load(DataConfig(task="induction_heads", context=8))
    >>> row = task.batch(seed=0, step=0)
    >>> task.decode(row["tokens"][0]), int(row["targets"][0, -1])
    ('=> 8 13 14 13 7 1 =>', 8)
    """

    usual_vocab_size = 16

    def check(self) -> None:
        """Raises ValueError unless A >= 3 and T >= 3."""
        check_vocab(self, 3)
        at_least("context", self.context, 3)
        check_gap_power(self.gap_power)

    @property
    def gap_power(self) -> float:
        """a."""
        return 1.0 if self.config.gap_power is None else self.config.gap_power

    def symbols(self) -> list[str]:
        """Tokens by number, marker =>."""
        return [*map(str, range(self.vocab_size - 1)), "=>"]

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        length, marker = self.context, self.vocab_size - 1
        tokens = rng.integers(0, marker, (count, length), dtype=np.int32)
        place = length - 3 - self.gaps(rng, count)[:, None]
        np.put_along_axis(tokens, place, np.int32(marker), axis=1)
        tokens[:, -1] = marker
        answers = np.take_along_axis(tokens, place + 1, axis=1)
        return language_batch(tokens, np.full((count, 1), length - 1), answers)

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Tokens between the answer and the last marker (count,), by the power law."""
        if self.gap_power == 1:
            return self.context - 3 - rng.integers(0, self.context - 2, count)
        below = np.cumsum((np.arange(1, self.context - 1) / (self.context - 2)) ** (self.gap_power - 1))
        return np.searchsorted(below, rng.random(count) * below[-1], side="right")


@dataclasses.dataclass(frozen=True, eq=False)
class AssociativeRecall(Procedural):
    """Key-value pairs, then the keys again, far apart: say the value at each key (MQAR).

    With A symbols, n pairs and rows of T: keys are n different ones of 1..A/2-1, values n different ones of A/2..A-1;
    the row starts k1 v1 ... kn vn; of the (T - 2n)/2 two-token slots behind, key i takes number g_i, drawn without
    replacement with p(g) ~ a (g + 1)^(a - 1); all else is 0 (or any token, with `random_non_queries`). The value is the
    target at the key's own position, and accuracy counts those positions only.
    Uses `num_pairs` (n), `vocab_size` (A, usually 256; the paper: 8192), `gap_power` (a), `random_non_queries`.
    Saying any value of the row is right 1 time in n. Published: (T, n) = (64, 4), (128, 8), (256, 16), (512, 64)
    without random tokens; attention solves all (Arora et al., arXiv 2312.04927, figure 2, rules of their code zoology).

    >>> from effattn_jax.data import DataConfig, load
    >>> task = load(DataConfig(task="mqar", context=12, num_pairs=2, vocab_size=16))
    >>> row = task.batch(seed=0, step=0)
    >>> task.decode(row["tokens"][0]), row["targets"][0].tolist()
    ('k4 v8 k3 v13 k3 _ _ _ _ _ k4 _', [0, 0, 0, 0, 13, 0, 0, 0, 0, 0, 8, 0])
    """

    usual_vocab_size = 256

    def check(self) -> None:
        """Raises ValueError unless T is even and at least 4 n, A > T, and there are n keys."""
        pairs = self.config.num_pairs
        at_least("num_pairs", pairs, 1)
        if self.context % 2 or self.context < 4 * pairs:
            raise invalid("context", self.context, f"must be even and at least 4 * num_pairs = {4 * pairs}")
        check_vocab(self, max(self.context + 1, 2 * pairs + 2))
        check_gap_power(self.gap_power)

    @property
    def gap_power(self) -> float:
        """a."""
        return 0.01 if self.config.gap_power is None else self.config.gap_power

    def symbols(self) -> list[str]:
        """Blank _, keys k1 ..., values v128 ... ."""
        half = self.vocab_size // 2
        return ["_", *(f"k{i}" for i in range(1, half)), *(f"v{i}" for i in range(half, self.vocab_size))]

    def draw(self, rng: np.random.Generator, count: int) -> Batch:
        """`count` independent rows."""
        half, pairs = self.vocab_size // 2, self.config.num_pairs
        keys = 1 + rng.permuted(distinct(rng, count, half - 1, pairs), axis=1)
        values = half + rng.permuted(distinct(rng, count, self.vocab_size - half, pairs), axis=1)
        places = 2 * pairs + 2 * self.gaps(rng, count)
        tokens = np.zeros((count, self.context), np.int32)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        np.put_along_axis(tokens, places, keys.astype(np.int32), axis=1)
        if self.config.random_non_queries:
            noise = rng.integers(0, self.vocab_size, tokens.shape, dtype=np.int32)
            tokens = np.where(tokens == 0, noise, tokens)
        return language_batch(tokens, places, values)

    def gaps(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """The slots (count, n) of the keys, drawn one after the other without replacement by the power law."""
        space = (self.context - 2 * self.config.num_pairs) // 2
        # a race of exponentials with these rates arrives in the order of successive draws without replacement; in logarithms, for
        # the rates of a large power are not floats
        arrival = np.log(rng.standard_exponential((count, space))) - (self.gap_power - 1) * np.log(
            np.arange(1, space + 1)
        )
        return np.argsort(arrival, axis=1)[:, : self.config.num_pairs]
