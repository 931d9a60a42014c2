"""Text as bytes or characters: random crops for training, windows that cover the rest once for validation."""

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np

from effattn_jax.data import codecs
from effattn_jax.data.config import DataConfig, invalid
from effattn_jax.data.sampling import Batch, Dataset, digest, generator, shard_rows

SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".csv", ".json", ".jsonl", ".html", ".xml", ".py", ".c", ".h")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Windows(Dataset):
    """A long row of tokens, cut into training and validation parts that share no token.

    Training rows are crops that start anywhere, uniformly: the start is in [0, n - T - 1]. Validation windows lie
    end to end, and each validation token but the first is a target exactly once. A batch costs one gather.

    Attributes:
      training, validation: one-dimensional unsigned integer arrays (memory-mapped ones are read only where needed).
      text_codec, identity, text_bytes: the codec, the fingerprint, and the UTF-8 bytes of the validation text.
    """

    training: np.ndarray
    validation: np.ndarray
    text_codec: codecs.Codec
    identity: str
    text_bytes: float

    def __post_init__(self) -> None:
        for part, tokens in (("training", self.training), ("validation", self.validation)):
            if len(tokens) <= self.context:
                raise invalid(
                    "context",
                    self.context,
                    f"must be less than the {len(tokens)} tokens of the {part} part: the data are too short "
                    "(take a smaller context, a longer text or another validation_fraction)",
                )

    @property
    def codec(self) -> codecs.Codec:
        """Text to ids and back."""
        return self.text_codec

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the contents, their reading and their split."""
        return self.identity

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of validation text a token."""
        return self.text_bytes / len(self.validation)

    def batch(self, seed: int, step: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """Crops of the training part (see `Dataset.batch`)."""
        rows = shard_rows(self.batch_size, shard, num_shards)
        starts = generator(seed, step).integers(0, len(self.training) - self.context, self.batch_size)[rows]
        crops = self.training[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)
        return {
            "tokens": crops[:, :-1],
            "targets": crops[:, 1:],
            "weights": np.ones((len(starts), self.context), np.float32),
        }

    @property
    def num_validation_items(self) -> int:
        """Windows needed to make each validation token but the first a target."""
        return -(-(len(self.validation) - 1) // self.context)

    def validation_items(self, indices: np.ndarray) -> Batch:
        """Windows by number; the end of the last one is filled up with weight 0."""
        places = np.asarray(indices)[:, None] * self.context + np.arange(self.context + 1)
        inside = places < len(self.validation)
        crops = np.where(inside, self.validation[np.where(inside, places, 0)], 0).astype(np.int32)
        return {"tokens": crops[:, :-1], "targets": crops[:, 1:], "weights": inside[:, 1:].astype(np.float32)}


def load_text(config: DataConfig) -> Dataset:
    """Bytes or characters of `path`, or of the documentation that Python itself carries.

    A file is read as UTF-8. Of a folder, all files below it with a text suffix (`SUFFIXES`) are read in the order of
    their relative paths, hidden ones and what describes a token file left out, and joined by a newline. The first
    1 - validation_fraction of the characters are for training and the rest for validation, as in nanoGPT's Shakespeare
    run. The default text is split by topics instead (see `python_topics`). The vocabulary of `level="characters"` is
    that of the whole text.

    Raises:
      ValueError: missing, unreadable, empty or too short text, bytes that are no UTF-8, a folder without text files.

    >>> load_text(DataConfig(context=32)).batch(seed=0, step=0)["tokens"].shape
    (32, 32)
    """
    if config.path is None:
        training, validation = python_topics(config.validation_fraction)
    else:
        whole = read_text(config.path)
        cut = int(len(whole) * (1 - config.validation_fraction))
        training, validation = whole[:cut], whole[cut:]
    codec = codecs.Bytes() if config.level == "bytes" else codecs.Characters(training + validation)
    small = np.uint8 if codec.vocab_size <= 256 else np.uint16 if codec.vocab_size <= 65536 else np.uint32
    train_tokens, validation_tokens = (codec.encode(part).astype(small) for part in (training, validation))
    return Windows(
        config=config,
        training=train_tokens,
        validation=validation_tokens,
        text_codec=codec,
        identity=digest("text", codec.spec(), train_tokens, validation_tokens),
        text_bytes=len(validation.encode()),
    )


def read_text(path: str) -> str:
    """The text of a file or folder (rules at `load_text`), line ends as they are.

    Raises:
      ValueError: one line that names path and, for broken UTF-8, the byte offset.
    """
    files = text_files(path)
    whole = "\n".join(_decoded(file) for file in files)
    if not whole.strip():
        raise invalid("path", path, "must hold text, and is empty")
    return whole


def text_files(path: str) -> list[Path]:
    """The file itself, or the text files below a folder in the order of their relative paths.

    Raises:
      ValueError: nothing there, or a folder without text files.
    """
    root = Path(path).expanduser()
    try:
        if root.is_file():
            return [root]
        is_folder = root.is_dir()
    except OSError as error:
        raise invalid("path", path, f"must be an existing file or folder ({error.strerror})") from error
    if not is_folder:
        raise invalid("path", path, "must be an existing file or folder")
    found = [file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    found = [file for file in found if not _describes_tokens(file)]
    if not found:
        raise invalid("path", path, f"must hold at least one text file ({' '.join(SUFFIXES)}), and has none")
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _describes_tokens(file: Path) -> bool:
    """Whether it is CORPUS.json or CORPUS.tokenizer.json beside CORPUS.bin: no text of a person's."""
    stem = file.name.removesuffix(".json")
    return stem != file.name and file.with_name(stem.removesuffix(".tokenizer") + ".bin").is_file()


def _decoded(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid("path", str(file), f"must be UTF-8 text, and byte {error.start} is not") from error
    except OSError as error:
        raise invalid("path", str(file), f"must be readable ({error.strerror})") from error


def python_topics(validation_fraction: float) -> tuple[str, str]:
    """Training and validation text from `pydoc_data.topics`, the language reference in every CPython.

    Many topics repeat parts of others word for word, so each paragraph is kept only once, in the longest
    topic that has it, and a topic of which less than half is left is dropped. Whole topics then go to validation, in an order fixed by a hash of their names, as long as they
    fit into the fraction: the validation text is spread over the subjects, and shares no paragraph with training.
    About 370,000 characters; they differ a little from one Python version to the next.

    >>> training, validation = python_topics(0.1)
    >>> 0.08 < len(validation) / len(training + validation) < 0.11
    True
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(p.split()): p for p in re.split(r"\n\s*\n", topics[name].strip("\n"))}
        new = "\n\n".join(p for key, p in paragraphs.items() if key not in seen)
        seen.update(paragraphs)
        if 2 * len(new) >= len(topics[name]):  # else a few leftovers of a topic that stands elsewhere
            kept[name] = new
    room = validation_fraction * sum(map(len, kept.values()))
    validation = set()
    for name in sorted(kept, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if len(kept[name]) <= room:
            validation.add(name)
            room -= len(kept[name])
    parts = [[kept[name] for name in sorted(kept) if (name in validation) is held] for held in (False, True)]
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])
