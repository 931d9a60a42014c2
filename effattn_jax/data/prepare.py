"""Turns text into a memory-mapped token file: `python -m effattn_jax.data.prepare INPUT OUTPUT [--tokenizer FILE]`.

It writes OUTPUT.bin (ids), OUTPUT.json (their meaning) and, with a tokenizer, OUTPUT.tokenizer.json (its copy), each
under a temporary name first, the meta file last: whatever is interrupted leaves no file that loads.
Train on it with `python train.py PRESET --data.task tokens --data.path OUTPUT`.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effattn_jax._command_line import bound
from effattn_jax.data import codecs
from effattn_jax.data.config import invalid
from effattn_jax.data.text import text_files
from effattn_jax.data.tokens import DTYPES, FORMAT, token_paths

PIECE = 1 << 20  # bytes read at a time; pieces end at a line where one ends
LONGEST_LINE = 1 << 12  # bytes that the boundary between training and validation moves at most to find a line's end


def pieces(files: list[Path], size: int = PIECE) -> Iterator[bytes]:
    """The files' bytes, joined by newlines, in pieces of about `size` that end at a line or at least a character.

    Concatenated they are the whole, whatever the size.
    """
    for number, file in enumerate(files):
        if number:
            yield b"\n"
        with file.open("rb") as stream:
            rest = b""
            while block := stream.read(size):
                cut = _last_end(rest + block)
                yield (rest + block)[:cut]
                rest = (rest + block)[cut:]
            yield rest


def _last_end(block: bytes) -> int:
    """Where to cut: behind the last newline, else before the last character, which may be incomplete."""
    line = block.rfind(b"\n") + 1
    if line:
        return line
    cut = len(block) - 1
    while cut > max(0, len(block) - 4) and block[cut] & 0xC0 == 0x80:
        cut -= 1
    return max(cut, 0)


def split_pieces(stream: Iterator[bytes], boundary: int) -> Iterator[tuple[bytes, bool]]:
    """Pieces with whether they are validation: all from byte `boundary` on.

    The boundary moves to the next end of a line, or of a character where no line ends within 4 KiB.

    >>> list(split_pieces(iter([b"ab\\ncd\\n", b"ef"]), 4))
    [(b'ab\\ncd\\n', False), (b'', True), (b'ef', True)]
    """
    done, validation = 0, False
    for piece in stream:
        cut = boundary - done
        done += len(piece)
        if validation or len(piece) <= cut:
            yield piece, validation
            continue
        line = piece.find(b"\n", cut, cut + LONGEST_LINE) + 1
        while not line and cut < len(piece) and piece[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
        cut = line or cut
        yield piece[:cut], False
        validation = True
        yield piece[cut:], True


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def prepare(
    source: str,
    output: str,
    *,
    tokenizer: str | None = None,
    validation_fraction: float = 0.1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the token file of a text file or folder and returns its meta data.

    Without a tokenizer the ids are bytes, and a file may hold any bytes; with one, the text must be UTF-8 and is
    tokenized in pieces of about a megabyte that end at a line. The last `validation_fraction` of the bytes, from the
    next line on, is for validation. Folders as in `data.load_text`, without the output's files.
    Memory: a few pieces; time: the tokenizer's.

    Args:
      progress: called with (bytes done, all bytes).

    Raises:
      ValueError: a missing or empty input, an output that exists, a broken tokenizer, text that is no UTF-8.
      OSError: what the disk answers; the output does not exist then.
    """
    if not 0 < validation_fraction < 1:
        raise invalid("validation_fraction", validation_fraction, "must lie strictly between 0 and 1")
    ids, meta_path = token_paths(output, "output")
    copy = ids.with_name(ids.stem + ".tokenizer.json")
    own = {path.resolve() for path in (ids, meta_path, copy)}
    files = [file for file in text_files(source) if file.resolve() not in own]
    if not files:
        raise invalid("path", source, f"must hold text besides the files of the output {output!r}")
    total = sum(file.stat().st_size for file in files) + len(files) - 1
    if total <= len(files) - 1:
        raise invalid("path", source, "must hold text, and is empty")
    written = (ids, meta_path) if tokenizer is None else (ids, meta_path, copy)
    existing = next((path for path in written if path.exists()), None)
    if existing is not None and not overwrite:
        raise ValueError(f"output: {output!r} given, {existing} exists already: choose another or pass --overwrite")
    codec = _codec(tokenizer)
    ids.parent.mkdir(parents=True, exist_ok=True)
    small = "uint8" if codec.vocab_size <= 1 << 8 else "uint16" if codec.vocab_size <= 1 << 16 else "uint32"
    meta = {"format": FORMAT, "dtype": small, "vocab_size": codec.vocab_size, "tokenizer": None}
    with atomic(ids) as file:
        stream = split_pieces(pieces(files), int(total * (1 - validation_fraction)))
        meta |= _write(file, stream, _encoder(codec, source), DTYPES[small], lambda done: progress(done, total))
        meta_path.unlink(missing_ok=True)  # an old one must not describe the new ids
    if isinstance(codec, codecs.Tokenizer):
        meta["tokenizer"] = copy.name
        with atomic(copy) as file:
            file.write(codec.spec()["json"].encode("utf-8"))
    with atomic(meta_path) as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")
    return meta


def _codec(tokenizer: str | None) -> codecs.Codec:
    if tokenizer is None:
        return codecs.Bytes()
    try:
        return codecs.Tokenizer(Path(tokenizer).expanduser().read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {tokenizer!r} given, must be a readable tokenizers file") from error


def _encoder(codec: codecs.Codec, source: str) -> Callable[[bytes, int], np.ndarray]:
    if isinstance(codec, codecs.Bytes):
        return lambda piece, offset: np.frombuffer(piece, np.uint8)

    def encode(piece: bytes, offset: int) -> np.ndarray:
        try:
            return codec.encode(piece.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise invalid("path", source, f"must be UTF-8 text, and byte {offset + error.start} is not") from error

    return encode


def _write(
    file: BinaryIO,
    stream: Iterator[tuple[bytes, bool]],
    encode: Callable[[bytes, int], np.ndarray],
    dtype: np.dtype,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    counts, sizes, checksum = [0, 0], [0, 0], hashlib.sha256()
    for piece, validation in stream:
        tokens = encode(piece, sum(sizes)).astype(dtype)
        file.write(tokens.tobytes())
        checksum.update(tokens.tobytes())
        counts[validation] += len(tokens)
        sizes[validation] += len(piece)
        progress(sum(sizes))
    return {
        "tokens": sum(counts),
        "training_tokens": counts[0],
        "training_bytes": sizes[0],
        "validation_bytes": sizes[1],
        "sha256": checksum.hexdigest(),
    }


def command(
    input: str,
    output: str,
    /,
    *,
    tokenizer: str | None = None,
    validation_fraction: float = 0.1,
    overwrite: bool = False,
) -> None:
    """Turn a text file or folder into a token file for `--data.task tokens`.

    Args:
      input: INPUT, a text file, or a folder whose text files are joined.
      output: OUTPUT, where to write: OUTPUT.bin and OUTPUT.json.
      tokenizer: A Hugging Face tokenizers file (tokenizer.json); empty: bytes.
      validation_fraction: Share of the text, at its end, that is kept for validation.
      overwrite: Replace an output that exists.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("tokenizing", total=None)
        meta = prepare(
            input,
            output,
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(
        f"{token_paths(output)[0]}: {meta['tokens']:,} tokens of {meta['dtype']}, vocabulary {meta['vocab_size']:,}, "
        f"{meta['tokens'] - meta['training_tokens']:,} for validation"
    )


def main(argv: list[str] | None = None) -> None:
    """The command line; bad input ends it with one line on stderr and exit code 1."""
    try:
        bound(command, "python -m effattn_jax.data.prepare", argv)()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
