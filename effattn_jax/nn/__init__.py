"""Flax Linen modules over the pure functions of the rooms below: mixers by name, feed-forward layers, norms,
embeddings.

`MIXERS` is the table that the models, the command line and the tests follow: one line makes a mixer usable everywhere
by its name. Every mixer takes (B, T, D) to (B, T, D) under the contract of `nn.mixer.SequenceMixer`.
"""

from collections.abc import Callable
from functools import partial

from effattn_jax.nn.convolution import ShortConvolution
from effattn_jax.nn.layers import Embedding, FeedForward, make_norm
from effattn_jax.nn.mixer import SequenceMixer
from effattn_jax.nn.multi_head import MultiHeadAttention
from effattn_jax.nn.recurrent import MinGRU

MIXERS: dict[str, Callable[..., SequenceMixer]] = {
    "softmax": partial(MultiHeadAttention, kernel="softmax"),
    "linear": partial(MultiHeadAttention, kernel="linear"),
    "gated_linear": partial(
        MultiHeadAttention,
        kernel="gated_linear",
        gates=("log_decay",),
        head_norm=True,
        output_gate=True,
    ),
    "performer": partial(MultiHeadAttention, kernel="performer", frozen=("projection",)),
    "performer_relu": partial(
        MultiHeadAttention,
        kernel="performer",
        options={"kernel": "relu"},
        frozen=("projection",),
    ),
    "min_gru": MinGRU,
}

__all__ = [
    "MIXERS",
    "Embedding",
    "FeedForward",
    "MinGRU",
    "MultiHeadAttention",
    "SequenceMixer",
    "ShortConvolution",
    "make_norm",
]
