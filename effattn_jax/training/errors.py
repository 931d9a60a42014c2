"""What a person can put right: reported in one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a command, a file or a folder; the command line prints its one line and exits with code 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the command line prints the line and exits with `code`."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextmanager
def user_errors(doing: str = "") -> Iterator[None]:
    """Turn the ValueErrors and OSErrors of a phase that only reads what a person gave into a `UserError`.

    Example:
      >>> with user_errors("reading x"):
      ...     raise ValueError("it is empty")
      Traceback (most recent call last):
      effattn_jax.training.errors.UserError: reading x: it is empty
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"{doing}: {one_line(error)}" if doing else one_line(error)) from error


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 400 characters; of an OSError, the reason and the file.

    Example:
      >>> one_line(OSError(28, "No space left on device", "a.txt"))
      'No space left on device: a.txt'
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
