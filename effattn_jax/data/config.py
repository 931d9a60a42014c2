"""What a run reads: one frozen record, every field documented where it stands."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Choice of a task, of its files and of its sizes.

    Every field has a default, so `DataConfig()` is the offline text that each CPython carries. A field
    that a task does not name in its own docstring has no effect on it.

    Raises:
      ValueError: from `validate` (called by `load`), naming field, value and rule.

    >>> DataConfig(task="mqar", num_pairs=8).context
    64
    """

    task: str = "text"
    """What to learn: text, tokens, copying, selective_copying, induction_heads, mqar, listops, digits, delay, adding or chirps."""

    path: str | None = None
    """Text: a file, or a folder whose text files are joined; None: Python's own documentation. Tokens: a file
    made by `python -m effattn_jax.data.prepare`."""

    level: Literal["bytes", "characters"] = "bytes"
    """Text only: 256 bytes, or the distinct characters of the text."""

    batch_size: int = 32
    """Rows of the global batch, over all devices and processes."""

    context: int = 64
    """Tokens in a row. Digits takes 64 only; ListOps pads to it and takes expressions shorter than it."""

    validation_fraction: float = 0.1
    """Share kept for validation: the end of a text, a fixed choice of digits, a hash class of a procedural task."""

    validation_examples: int = 1024
    """Procedural tasks: size of the fixed validation set."""

    vocab_size: int | None = None
    """Procedural language tasks: number of symbols; None: the task's usual one."""

    num_tokens: int = 10
    """Copying and selective copying: how many tokens to remember."""

    num_pairs: int = 4
    """Associative recall (mqar): how many key-value pairs to remember."""

    gap_power: float | None = None
    """Associative recall and induction heads: exponent a of the power law p(gap) ~ a (gap + 1)^(a - 1) of the distances
    that are asked; None: 0.01 in associative recall, which favours near ones, and 1 in induction heads, all alike."""

    random_non_queries: bool = False
    """Associative recall: fill the places between queries with random tokens instead of zeros."""

    min_length: int | None = None
    """ListOps: expressions are longer than this; None: a quarter of the context (500 of 2000, as in LRA)."""

    max_depth: int = 10
    """ListOps: deepest nesting."""

    max_args: int = 10
    """ListOps: most arguments of an operator."""

    lag: int | None = None
    """Delay: how many steps late the signal is to be said; None: a quarter of the context."""

    bandwidth: float = 0.5
    """Delay: the signal's highest frequency over that of Nyquist."""

    sampling_rate: float = 1.0
    """Chirps: steps a unit of time; the context over it is how long a row lasts."""

    def validate(self) -> None:
        """Checks what holds for every task; each task checks its own fields when it is loaded.

        Raises:
          ValueError: one line that names the field, what was given and the rule.

        >>> DataConfig(batch_size=0).validate()
        Traceback (most recent call last):
        ValueError: data.batch_size: 0 given, must be an integer of at least 1
        """
        for name in ("batch_size", "context", "validation_examples"):
            at_least(name, getattr(self, name), 1)
        if not 0 < self.validation_fraction < 1:
            raise invalid("validation_fraction", self.validation_fraction, "must lie strictly between 0 and 1")
        choice("level", self.level, ("bytes", "characters"))
        if self.path == "":
            raise invalid("path", "", "must be a file or a folder, or None")


def invalid(field: str, given: object, rule: str) -> ValueError:
    """The error of every room-mate: field, what was given, the rule.

    >>> invalid("context", -1, "must be positive")
    ValueError('data.context: -1 given, must be positive')
    """
    return ValueError(f"data.{field}: {given!r} given, {rule}")


def at_least(field: str, given: object, smallest: int) -> None:
    """Raises ValueError unless `given` is an integer of at least `smallest`.

    >>> at_least("num_pairs", 4, 1)
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < smallest:
        raise invalid(field, given, f"must be an integer of at least {smallest}")


def choice(field: str, given: object, known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known name, unless `given` is one of `known`.

    >>> choice("task", "mqra", ["text", "mqar"])
    Traceback (most recent call last):
    ValueError: data.task: 'mqra' given, must be one of text, mqar; nearest: mqar
    """
    known = tuple(known)
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
        raise invalid(field, given, f"must be one of {', '.join(known)}{hint}")
