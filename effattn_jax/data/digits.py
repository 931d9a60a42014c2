"""scikit-learn's handwritten digits, read pixel by pixel."""

import dataclasses
from typing import ClassVar

import numpy as np

from effattn_jax.data import codecs
from effattn_jax.data.config import DataConfig, invalid
from effattn_jax.data.sampling import SPLIT, Batch, Dataset, digest, epoch_indices, generator, shard_rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Digits(Dataset):
    """8 x 8 images as 64 steps of one feature, row by row, with 10 classes.

    Pixels are shifted and scaled to mean 0 and variance 1 over the training images. Training goes through all of them
    in a new order each epoch; a fixed choice of `validation_fraction` is kept for validation.

    Attributes:
      training, validation: (images (N, 64, 1) float32, labels (N,) int32).
    """

    kind: ClassVar[str] = "classification"
    num_classes: ClassVar[int | None] = 10

    training: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]

    @property
    def vocab_size(self) -> None:
        """None: the inputs are real numbers."""
        return None

    @property
    def codec(self) -> codecs.Codec:
        """Labels to digits and back."""
        return codecs.Symbols([str(i) for i in range(10)])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of images, labels and split."""
        return digest("digits", *self.training, *self.validation)

    def batch(self, seed: int, step: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """The next images of the epochs that `seed` orders (see `Dataset.batch`)."""
        rows = shard_rows(self.batch_size, shard, num_shards)
        chosen = epoch_indices(seed, len(self.training[1]), step * self.batch_size, self.batch_size)
        return _batch(*self.training, chosen[rows])

    @property
    def num_validation_items(self) -> int:
        """Images kept for validation."""
        return len(self.validation[1])

    def validation_items(self, indices: np.ndarray) -> Batch:
        """Validation images by number."""
        return _batch(*self.validation, indices)


def _batch(images: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> Batch:
    return {
        "inputs": images[chosen],
        "labels": labels[chosen],
        "mask": np.ones((len(chosen), 64), bool),
        "weights": np.ones(len(chosen), np.float32),
    }


def load_digits(config: DataConfig) -> Dataset:
    """The 1,797 digits that come with scikit-learn, pixel by pixel; context must be 64. Needs scikit-learn.

    Always saying the commonest label is right about 1 time in 10.

    Raises:
      ValueError: no scikit-learn, another context than 64, or a fraction that leaves either part empty.

    >>> load_digits(DataConfig(task="digits")).batch(seed=0, step=0)["inputs"].shape
    (32, 64, 1)
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise invalid("task", "digits", "needs the package scikit-learn (pip install scikit-learn)") from error
    if config.context != 64:
        raise invalid("context", config.context, "must be 64 for digits, the pixels of an 8 x 8 image")
    images, labels = datasets.load_digits(return_X_y=True)
    order = generator(0, 0, SPLIT).permutation(len(labels))
    held = round(config.validation_fraction * len(labels))
    if not 0 < held < len(labels):
        raise invalid("validation_fraction", config.validation_fraction, f"must split {len(labels)} images in two")
    mean, deviation = images[order[held:]].mean(), images[order[held:]].std()
    pixels = ((images - mean) / deviation).astype(np.float32)[:, :, None]
    labels = labels.astype(np.int32)
    training, validation = ((pixels[part], labels[part]) for part in (order[held:], order[:held]))
    return Digits(config=config, training=training, validation=validation)
