"""What tyro has to say about a command line, for commands that answer every mistake with one line."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__all__ = ["bound", "mistakes_on_one_line"]


def bound(command: Callable, prog: str, arguments: Sequence[str] | None = None) -> Callable[[], Any]:
    """`command` with what a command line (None: this process's) gives for its parameters, not called yet.

    Raises:
      ValueError: a mistake in the arguments, in one line.

    Example:
      >>> def add(a: int, /, b: int = 1) -> int:
      ...     return a + b
      >>> bound(add, "add", ["2", "--b", "3"])()
      5
    """
    import tyro

    @functools.wraps(command)
    def bind(*positional: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(command, *positional, **options)

    with mistakes_on_one_line():
        return tyro.cli(bind, args=arguments, prog=prog)


@contextlib.contextmanager
def mistakes_on_one_line() -> Iterator[None]:
    """Around a call of `tyro.cli`: a mistake in the arguments is a ValueError of one line; `--help` exits as ever.

    Example:
      >>> import tyro
      >>> with mistakes_on_one_line():
      ...     tyro.cli(int, args=["3", "stray"])
      Traceback (most recent call last):
      ValueError: Unrecognized options: stray
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_first_paragraph(errors.getvalue())) from None


def _first_paragraph(text: str) -> str:
    """The first paragraph below the title of an error of tyro, on one line.

    It stands in a box, or below a row of dashes where the terminal has no characters for boxes.
    """
    lines = [re.sub("[│╭╮╰╯]", " ", line).strip() for line in text.splitlines()[1:]]
    parts = [[]]
    for line in lines:
        if re.fullmatch("[─-]{4,}", line) or line.startswith("Argument helptext"):
            parts.append([])
        else:
            parts[-1].append(line)
    return next((joined for part in parts if (joined := " ".join(" ".join(part).split()))), "")
