"""Flax Linen modules over the pure functions of the rooms below: mixers by name, feed-forward layers, norms,
embeddings.

`MIXERS` is the table that the models, the command line and the tests follow: one line makes a mixer usable everywhere
by its name, and by its name with options (`make_mixer`). Every mixer takes (B, T, D) to (B, T, D) under the contract of `nn.mixer.SequenceMixer`.
"""

from collections.abc import Callable
from functools import partial

from effattn_jax.nn.attention_free import AttentionFree
from effattn_jax.nn.convolution import ShortConvolution
from effattn_jax.nn.external import ExternalAttention
from effattn_jax.nn.layers import Embedding, FeedForward, make_norm
from effattn_jax.nn.mixer import SequenceMixer
from effattn_jax.nn.multi_head import MultiHeadAttention
from effattn_jax.nn.named import make_mixer, parse_mixer, split_mixers
from effattn_jax.nn.placing import Placing
from effattn_jax.nn.recurrent import MinGRU
from effattn_jax.nn.selective import RGLRU, Mamba, Mamba2
from effattn_jax.nn.state_space import LRU, S4, S4D, S5

MIXERS: dict[str, Callable[..., SequenceMixer]] = {
    "softmax": partial(MultiHeadAttention, kernel="softmax"),
    "linear": partial(MultiHeadAttention, kernel="linear"),
    **{
        f"linear_{name}": partial(MultiHeadAttention, kernel="linear", options={"feature_map": name})
        for name in ("relu", "cosine", "exp", "taylor", "dpfp")
    },
    "linear_identity": partial(
        MultiHeadAttention,
        kernel="linear",
        options={"feature_map": "identity", "normalize": False},
        head_norm=True,
    ),
    "linear_hedgehog": partial(MultiHeadAttention, kernel="linear_hedgehog"),
    "efficient": partial(MultiHeadAttention, kernel="efficient"),
    "gated_linear": partial(
        MultiHeadAttention,
        kernel="gated_linear",
        gates=("log_decay",),
        head_norm=True,
        output_gate=True,
    ),
    "retention": partial(MultiHeadAttention, kernel="retention", head_norm=True, output_gate=True),
    "delta_rule": partial(
        MultiHeadAttention, kernel="delta_rule", gates=("beta",), unit_keys=True, head_norm=True, output_gate=True
    ),
    "gated_delta_rule": partial(
        MultiHeadAttention,
        kernel="gated_delta_rule",
        gates=("beta", "log_decay"),
        head_decay=True,
        unit_keys=True,
        head_norm=True,
        output_gate=True,
    ),
    "local": partial(MultiHeadAttention, kernel="local", window=128),
    "atrous": partial(MultiHeadAttention, kernel="atrous", options={"dilation": 4}),
    "sparse": partial(MultiHeadAttention, kernel="sparse", window=32, options={"dilation": 16, "num_global": 1}),
    "strided": partial(MultiHeadAttention, kernel="strided", options={"stride": 32}),
    "fixed": partial(MultiHeadAttention, kernel="fixed", options={"block": 32, "summary": 4}),
    "topk": partial(MultiHeadAttention, kernel="topk", options={"k": 32}),
    "linformer": partial(MultiHeadAttention, kernel="linformer"),
    "performer": partial(MultiHeadAttention, kernel="performer", frozen=("projection",)),
    "performer_relu": partial(
        MultiHeadAttention,
        kernel="performer",
        options={"kernel": "relu"},
        frozen=("projection",),
    ),
    "min_gru": MinGRU,
    "s4": S4,
    "s4d": S4D,
    "s5": S5,
    "lru": LRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": partial(Mamba2, trapezoid=True),
    "rg_lru": RGLRU,
    "mlp_mixer": partial(AttentionFree, kernel="mlp_mixer"),
    "ffn_stack": partial(AttentionFree, kernel="ffn_stack"),
    "res_mlp": partial(AttentionFree, kernel="res_mlp"),
    "gmlp": partial(AttentionFree, kernel="gmlp"),
    "amlp": partial(AttentionFree, kernel="amlp"),
    "fnet": partial(AttentionFree, kernel="fnet", options={"orthonormal": True}),
    "lightweight_convolution": partial(AttentionFree, kernel="lightweight_convolution", projections=True),
    "dynamic_convolution": partial(AttentionFree, kernel="dynamic_convolution", projections=True),
    "rep_mlp": partial(AttentionFree, kernel="rep_mlp"),
    "residual": partial(MultiHeadAttention, kernel="residual"),
    "synthesizer_dense": partial(MultiHeadAttention, kernel="synthesizer_dense"),
    "synthesizer_random": partial(MultiHeadAttention, kernel="synthesizer_random"),
    "synthesizer_random_fixed": partial(MultiHeadAttention, kernel="synthesizer_random", frozen=("table",)),
    "synthesizer_factorized_dense": partial(MultiHeadAttention, kernel="synthesizer_factorized_dense"),
    "synthesizer_factorized_random": partial(MultiHeadAttention, kernel="synthesizer_factorized_random"),
    "synthesizer_mixed": partial(MultiHeadAttention, kernel="synthesizer_mixed"),
    "external": ExternalAttention,
    **{name: partial(MultiHeadAttention, kernel=name) for name in ("shaw", "xl", "tupe", "disentangled", "xpos")},
    "rerope": partial(MultiHeadAttention, kernel="rerope", options={"window": 64}),
}

__all__ = [
    "LRU",
    "MIXERS",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "AttentionFree",
    "Embedding",
    "ExternalAttention",
    "FeedForward",
    "Mamba",
    "Mamba2",
    "MinGRU",
    "MultiHeadAttention",
    "Placing",
    "SequenceMixer",
    "ShortConvolution",
    "make_mixer",
    "make_norm",
    "parse_mixer",
    "split_mixers",
]
