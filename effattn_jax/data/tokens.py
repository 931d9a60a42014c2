"""Memory-mapped token files: `corpus.bin`, nothing but ids, beside `corpus.json`, what they mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from effattn_jax.data import codecs
from effattn_jax.data.config import DataConfig, invalid
from effattn_jax.data.sampling import Dataset, digest
from effattn_jax.data.text import Windows

FORMAT = "effattn_jax tokens 1"
DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
META_FIELDS = {
    "dtype": str,
    "vocab_size": int,
    "tokens": int,
    "training_tokens": int,
    "validation_bytes": int,
    "sha256": str,
}


def token_paths(path: str, argument: str = "data.path") -> tuple[Path, Path]:
    """The ids' and the meta file of `corpus`, `corpus.bin` or `corpus.json`; errors name the argument.

    Raises:
      ValueError: a path that names a folder only, such as "." or "/".

    >>> [str(part) for part in token_paths("a/corpus.bin")]
    ['a/corpus.bin', 'a/corpus.json']
    """
    stem = Path(path).expanduser()
    if stem.name in ("", ".."):
        raise ValueError(f"{argument}: {path!r} given, must end in the name of a file, such as corpus")
    if stem.suffix in (".bin", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".json")


def load_tokens(config: DataConfig) -> Dataset:
    """A token file made by `python -m effattn_jax.data.prepare`, read in place.

    The boundary between training and validation is the one that prepare set; `validation_fraction` has no effect.
    Only the rows of a batch are read from disk.

    Raises:
      ValueError: no path, missing files, a meta file of another kind, a file of the wrong size (cut short), too few
        tokens for the context.

    >>> import tempfile
    >>> from effattn_jax.data.prepare import prepare
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("so it goes, " * 100)
    ...     _ = prepare(f"{folder}/a.txt", f"{folder}/a")
    ...     load_tokens(DataConfig(path=f"{folder}/a", batch_size=2)).batch(seed=0, step=0)["tokens"].shape
    (2, 64)
    """
    if config.path is None:
        raise invalid("path", None, "must name a token file for the task tokens")
    ids, meta_path = token_paths(config.path)
    meta = read_meta(meta_path, config.path)
    dtype = DTYPES[meta["dtype"]]
    size, due = (ids.stat().st_size if ids.is_file() else None), meta["tokens"] * dtype.itemsize
    if size != due:
        found = "is missing" if size is None else f"has {size} bytes"
        raise invalid("path", str(ids), f"{found}, must have {due} by its meta file: prepare it again")
    if not meta["tokens"]:
        raise invalid("path", str(ids), "must hold tokens, and is empty")
    stored = np.memmap(ids, dtype=dtype, mode="r")
    return Windows(
        config=config,
        training=stored[: meta["training_tokens"]],
        validation=stored[meta["training_tokens"] :],
        text_codec=_codec(meta, meta_path),
        identity=digest("tokens", meta["sha256"], meta["training_tokens"]),
        text_bytes=meta["validation_bytes"],
    )


def read_meta(meta_path: Path, given: str) -> dict[str, Any]:
    """The checked contents of a meta file.

    Raises:
      ValueError: missing, broken, or of another format.
    """
    if not meta_path.is_file():
        raise invalid("path", given, f"must be made by `python -m effattn_jax.data.prepare`: no file {meta_path}")
    try:
        meta = json.loads(meta_path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise invalid("path", str(meta_path), f"must be readable JSON ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise invalid("path", str(meta_path), f"must be a meta file of format {FORMAT!r}")
    for name, kind in META_FIELDS.items():
        if not isinstance(meta.get(name), kind):
            raise invalid("path", str(meta_path), f"must have a field {name} of type {kind.__name__}")
    if meta["dtype"] not in DTYPES or not 0 <= meta["training_tokens"] <= meta["tokens"]:
        raise invalid("path", str(meta_path), "must have a dtype among uint8, uint16, uint32 and consistent counts")
    return meta


def _codec(meta: dict[str, Any], meta_path: Path) -> codecs.Codec:
    if meta.get("tokenizer") is None:
        return codecs.Bytes()
    file = meta_path.with_name(meta["tokenizer"])
    try:
        return codecs.Tokenizer(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("path", str(file), "must be the tokenizer that prepare put beside the ids") from error
