"""Stateless random numbers and the shape of a dataset: a batch is a pure function of (seed, step)."""

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from effattn_jax.data.codecs import Codec
from effattn_jax.data.config import DataConfig, at_least

Batch = dict[str, np.ndarray]

TRAINING, VALIDATION, SPLIT = 0, 1, 2  # streams: no two purposes ever share random numbers


def generator(seed: int, step: int, stream: int = TRAINING, row: int = 0) -> np.random.Generator:
    """A NumPy generator that depends on nothing but its four arguments.

    Each number fills a fixed count of 32-bit words of the seed sequence, so that no two different
    arguments share a sequence. About 15 microseconds.

    Raises:
      ValueError: a negative number, or a seed or step of 2^64 or more.

    >>> int(generator(0, 7).integers(1000)) == int(generator(0, 7).integers(1000))
    True
    """
    words = []
    for name, value, width in (("seed", seed, 2), ("step", step, 2), ("stream", stream, 1), ("row", row, 1)):
        value = operator.index(value)
        if not 0 <= value < 1 << (32 * width):
            raise ValueError(f"{name}: {value} given, must be at least 0 and below 2^{32 * width}")
        words += [(value >> (32 * i)) & 0xFFFFFFFF for i in range(width)]
    return np.random.default_rng(np.random.SeedSequence(words))


def shard_rows(batch_size: int, shard: int, num_shards: int) -> slice:
    """Rows [i B/n, (i+1) B/n) of the global batch, which shard i of n holds.

    Raises:
      ValueError: n does not divide B, or i is not in 0..n-1.

    >>> shard_rows(64, 1, 4)
    slice(16, 32, None)
    """
    if num_shards < 1 or batch_size % num_shards:
        raise ValueError(f"num_shards: {num_shards} given, must be positive and divide the batch size {batch_size}")
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard: {shard} given, must be in 0..{num_shards - 1}")
    rows = batch_size // num_shards
    return slice(shard * rows, (shard + 1) * rows)


def epoch_indices(seed: int, size: int, start: int, count: int) -> np.ndarray:
    """Items number start..start+count-1 of an endless sequence of epochs, each a new permutation of 0..size-1.

    >>> sorted(epoch_indices(0, 5, 10, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    first, last = start // size, (start + count - 1) // size
    order = np.concatenate([generator(seed, epoch).permutation(size) for epoch in range(first, last + 1)])
    return order[start - first * size :][:count]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """What the trainer sees of any task; subclasses add `batch` and `validation_items`.

    Language batches are {"tokens": int32 (B, T), "targets": int32 (B, T), "weights": float32 (B, T)}: the
    target stands at the position whose output must predict it, the weight is 1 where a prediction is asked
    for and 0 elsewhere. Classification batches are {"inputs": int32 (B, T) or float32 (B, T, features),
    "labels": int32 (B,), "mask": bool (B, T), "weights": float32 (B,)}: the mask is False on padding,
    the weight 0 on rows that only fill up the last validation batch. Regression batches are {"inputs": float32
    (B, T, features), "targets": float32 (B, T, outputs), "weights": float32 (B, T)}, with weights as in language.

    Attributes:
      kind: "language", "classification" or "regression".
      codec: text to ids and back; None in regression.
      vocab_size: number of ids, None for real-valued features.
      num_classes: classification only, else None.
      num_outputs: regression only, else None.
      bytes_per_token: UTF-8 bytes of validation text a token, to turn nats a token into bits a byte; None
        where that has no meaning.
    """

    config: DataConfig
    kind: ClassVar[str] = "language"
    num_classes: ClassVar[int | None] = None
    num_outputs: ClassVar[int | None] = None

    @property
    def codec(self) -> Codec | None:
        """Text to ids and back, None in regression; `codec.spec()` is JSON from which `codecs.from_spec` makes it again."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int | None:
        """Number of ids (None for real-valued features)."""
        return self.codec.vocab_size

    @property
    def context(self) -> int:
        """T, tokens in a row."""
        return self.config.context

    @property
    def batch_size(self) -> int:
        """B, rows of the global batch."""
        return self.config.batch_size

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of validation text a token; None where that has no meaning."""
        return None

    @property
    def num_validation_items(self) -> int:
        """Rows of the whole validation set."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the data do: contents, split and task sizes, not paths or batches."""
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        """Ids (int32) of a text.

        Raises:
          ValueError: text that the vocabulary cannot express.
        """
        return self.codec.encode(text)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids."""
        return self.codec.decode(ids)

    def batch(self, seed: int, step: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """The training batch of (seed, step): rows [i B/n, (i+1) B/n) of it for shard i of n.

        Raises:
          ValueError: negative seed or step, a shard out of range, or a count that does not divide B.
        """
        raise NotImplementedError

    def validation_items(self, indices: np.ndarray) -> Batch:
        """Rows of the validation set by number, in the layout of a batch."""
        raise NotImplementedError

    def validation_batches(
        self, max_batches: int | None = None, shard: int = 0, num_shards: int = 1
    ) -> Iterator[Batch]:
        """The fixed validation set in batches of constant shape; with `max_batches`, evenly spaced rows of it.

        No row comes twice; rows that fill up the last batch have weight 0.

        Raises:
          ValueError: max_batches below 1, a shard out of range, or a count that does not divide B.
        """
        rows, count = shard_rows(self.batch_size, shard, num_shards), self.num_validation_items
        if max_batches is not None:
            at_least("max_batches", max_batches, 1)
            count = min(count, max_batches * self.batch_size)
        # floor(i n / count) is strictly increasing for count <= n: no repeats, whole range covered
        chosen = np.arange(count) * self.num_validation_items // count
        return (self._padded(chosen[i : i + self.batch_size], rows) for i in range(0, count, self.batch_size))

    def _padded(self, indices: np.ndarray, rows: slice) -> Batch:
        real = len(indices)
        filled = np.pad(indices, (0, self.batch_size - real), mode="edge")
        batch = self.validation_items(filled[rows])
        keep = (np.arange(self.batch_size) < real)[rows].astype(np.float32)
        batch["weights"] = batch["weights"] * keep.reshape((-1,) + (1,) * (batch["weights"].ndim - 1))
        return batch


def digest(*parts: object) -> str:
    """16 hexadecimal digits of arrays, bytes and JSON-able values.

    >>> digest("text", 1) == digest("text", 1) != digest("text", 2)
    True
    """
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(str(part.dtype.str).encode())
            state.update(np.ascontiguousarray(part))
        else:
            state.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
        state.update(b"\0")
    return state.hexdigest()[:16]
