"""Text to ids and back. A codec is rebuilt from its `spec()`, plain JSON, so a run can be sampled without its data."""

from typing import Any, Protocol

import numpy as np


class Codec(Protocol):
    """Anything with these four members."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of a text."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids."""
        ...

    def spec(self) -> dict[str, Any]:
        """JSON from which `from_spec` makes the same codec."""
        ...


class Bytes:
    """The 256 bytes of UTF-8; broken sequences decode to the replacement character.

    >>> Bytes().decode(Bytes().encode("naïve"))
    'naïve'
    """

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """The bytes of the text, int32.

        Raises:
          ValueError: a text that UTF-8 cannot write.
        """
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of the bytes."""
        return np.asarray(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        """{"codec": "bytes"}."""
        return {"codec": "bytes"}


class Characters:
    """The distinct characters of a text in code-point order.

    >>> Characters("hello").encode("hole").tolist()
    [1, 3, 2, 0]
    """

    def __init__(self, text: str):
        self._points = np.unique(code_points(text))
        self.vocab_size = len(self._points)

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of the characters.

        Raises:
          ValueError: a character that the training text does not have.
        """
        points = code_points(text)
        ids = np.searchsorted(self._points, points)
        known = self._points[np.minimum(ids, self.vocab_size - 1)] == points
        if not known.all():
            strange = "".join(dict.fromkeys(np.array(list(text))[~known].tolist()))
            raise ValueError(f"text: {strange!r} given, must be among the {self.vocab_size} characters of the data")
        return ids.astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids."""
        return self._points[np.asarray(ids)].tobytes().decode("utf-32-le")

    def spec(self) -> dict[str, Any]:
        """The characters, joined."""
        return {"codec": "characters", "characters": self._points.tobytes().decode("utf-32-le")}


class Symbols:
    """A list of words, separated by blanks: the readable form of a procedural task.

    >>> Symbols(["_", "a", "b"]).decode([1, 0, 2])
    'a _ b'
    """

    def __init__(self, symbols: list[str]):
        self._symbols = list(symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}
        self.vocab_size = len(self._symbols)

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of the words.

        Raises:
          ValueError: a word that is no symbol of the task.
        """
        strange = [word for word in text.split() if word not in self._ids]
        if strange:
            shown = " ".join(self._symbols[:20]) + (" ..." if self.vocab_size > 20 else "")
            raise ValueError(f"text: {strange[0]!r} given, must be among the symbols {shown}")
        return np.array([self._ids[word] for word in text.split()], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The words of the ids, separated by blanks."""
        return " ".join(self._symbols[i] for i in np.asarray(ids).tolist())

    def spec(self) -> dict[str, Any]:
        """The list of words."""
        return {"codec": "symbols", "symbols": self._symbols}


class Tokenizer:
    """A Hugging Face `tokenizers` file, given as its JSON text. Needs the package `tokenizers`."""

    def __init__(self, json_text: str):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError("tokenizer: needs the package 'tokenizers' (pip install tokenizers)") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"tokenizer: not a Hugging Face tokenizers file ({error})") from error
        # What a file says of batches of sentences would cut a corpus short, or pad it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json_text = json_text
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes
        if not self.vocab_size:
            raise ValueError("tokenizer: the vocabulary is empty, must have at least one token")

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of the whole text, no special tokens added.

        Raises:
          ValueError: a text that UTF-8 cannot write.
        """
        utf8(text)  # the package's own error is a TypeError that says something else
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of the ids."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def spec(self) -> dict[str, Any]:
        """The whole tokenizer file."""
        return {"codec": "tokenizer", "json": self._json_text}


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
      ValueError: a lone surrogate, which is what bytes of a command line that are no UTF-8 become.

    >>> utf8("é")
    b'\xc3\xa9'
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: {text[error.start]!r} given, must be characters that UTF-8 has") from error


def code_points(text: str) -> np.ndarray:
    """Unicode code points, little-endian uint32.

    >>> code_points("aé").tolist()
    [97, 233]
    """
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")


def from_spec(spec: dict[str, Any]) -> Codec:
    """The codec whose `spec()` this is.

    Raises:
      ValueError: an unknown kind of codec.

    >>> from_spec(Characters("hello").spec()).decode([1, 0])
    'he'
    """
    makers = {
        "bytes": lambda: Bytes(),
        "characters": lambda: Characters(spec["characters"]),
        "symbols": lambda: Symbols(spec["symbols"]),
        "tokenizer": lambda: Tokenizer(spec["json"]),
    }
    if spec.get("codec") not in makers:
        raise ValueError(f"codec: {spec.get('codec')!r} given, must be one of {', '.join(makers)}")
    return makers[spec["codec"]]()
