"""Attention kernels under one contract: f(query, key, value, bias=None, mask=None, *, scale, is_causal, segment_ids, initial_state, ...).

`MIXERS` is the table that the law tests, the benchmark, the models and `--model.mixer NAME` follow from.
"""

from functools import partial

import jax
import numpy as np

from effattn_jax._contract import Mixer
from effattn_jax.attention import _synthetic as synthetic
from effattn_jax.attention._calls import window_bounds
from effattn_jax.attention._frame import LinearState, empty_state
from effattn_jax.attention._unions import Fixed, Union
from effattn_jax.attention.adapters import as_attention_fn
from effattn_jax.attention.delta import delta_rule_attention
from effattn_jax.attention.efficient import efficient_attention
from effattn_jax.attention.external import ExternalState, external_attention
from effattn_jax.attention.features import (
    FEATURE_MAPS,
    cosine_features,
    dpfp_features,
    elu_plus_one,
    hedgehog_features,
    hedgehog_weights,
    taylor_features,
)
from effattn_jax.attention.gated import gated_linear_attention
from effattn_jax.attention.kv_cache import Cache, cache
from effattn_jax.attention.linear import linear_attention
from effattn_jax.attention.linformer import linformer_attention
from effattn_jax.attention.performer import draw, performer_attention
from effattn_jax.attention.performer import empty_state as performer_state
from effattn_jax.attention.random_features import random_features
from effattn_jax.attention.residual import one_layer, residual_attention
from effattn_jax.attention.retention import retention_attention, retention_decay
from effattn_jax.attention.softmax import dot_product_attention
from effattn_jax.attention.sparse import (
    atrous_attention,
    fixed_attention,
    local_attention,
    sparse_attention,
    strided_attention,
)
from effattn_jax.attention.synthesizer import (
    dense_scores,
    factorized_dense_scores,
    factorized_random_scores,
    mix_scores,
    random_scores,
    synthesizer_attention,
)
from effattn_jax.attention.synthesizer_mixers import (
    synthesizer_dense,
    synthesizer_factorized_dense,
    synthesizer_factorized_random,
    synthesizer_mixed,
    synthesizer_random,
)
from effattn_jax.attention.topk import topk_attention
from effattn_jax.attention.weights import attention_weights

__all__ = [
    "FEATURE_MAPS",
    "MIXERS",
    "Cache",
    "ExternalState",
    "LinearState",
    "as_attention_fn",
    "atrous_attention",
    "attention_weights",
    "cache",
    "cosine_features",
    "delta_rule_attention",
    "dense_scores",
    "dot_product_attention",
    "dpfp_features",
    "efficient_attention",
    "elu_plus_one",
    "external_attention",
    "factorized_dense_scores",
    "factorized_random_scores",
    "fixed_attention",
    "gated_linear_attention",
    "hedgehog_features",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "mix_scores",
    "performer_attention",
    "random_features",
    "random_scores",
    "residual_attention",
    "retention_attention",
    "retention_decay",
    "sparse_attention",
    "strided_attention",
    "synthesizer_attention",
    "synthesizer_dense",
    "synthesizer_factorized_dense",
    "synthesizer_factorized_random",
    "synthesizer_mixed",
    "synthesizer_random",
    "taylor_features",
    "topk_attention",
]


def _softmax_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype):
    del num_heads
    return cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)


def _log_decay(rng: np.random.Generator, query: jax.Array) -> dict[str, np.ndarray]:
    noise = rng.normal(size=query.shape[:-1])
    return {"log_decay": -np.logaddexp(0, -2 - noise).astype(query.dtype)}


_SYNTHESIZER_FORMS = ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5})
_MOVES = "a query's score depends on its place among the tokens that are there"


def _beta(rng: np.random.Generator, query: jax.Array) -> dict[str, np.ndarray]:
    """Writes in (0, 1 / H), which keep the state bounded for keys of H entries of unit variance."""
    noise = rng.normal(size=query.shape[:-1])
    return {"beta": (1 / (1 + np.exp(-noise)) / query.shape[-1]).astype(query.dtype)}


def _beta_and_decay(rng: np.random.Generator, query: jax.Array) -> dict[str, np.ndarray]:
    return _beta(rng, query) | _log_decay(rng, query)


_unnormalised_state = partial(empty_state, normalize=False, gated=True)


_SHIFTS = dict.fromkeys(("removal", "padding"), "its pattern counts positions: cutting a key out moves those behind it")


def _sparse(function, keys_seen=None, *, runs_on="", exempt=_SHIFTS, **options) -> Mixer:
    """A line for a pattern of pairs: softmax's cache is its state, and its forms are softmax's."""
    return Mixer(
        function,
        ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5}),
        pairwise=True,
        empty_state=_softmax_state,
        runs_on=runs_on,
        exempt=exempt,
        options=options,
        keys_seen=keys_seen,
    )


def _sparse_keys(context, is_causal, *, window, dilation, num_global=0):
    return Union(window_bounds(window, is_causal), dilation, num_global).keys_seen(context)


def _strided_keys(context, is_causal, *, stride):
    return _sparse_keys(context, is_causal, window=stride - 1, dilation=stride)


def _no_state(*sizes, **options):
    raise ValueError("linformer_attention has no state: it has no causal form")


LINFORMER_ROWS = 64


def _projections(rng, num_heads, num_kv_heads, head_dim):
    """E and F for up to 4,096 keys, as random projections that keep lengths."""
    del num_heads, num_kv_heads, head_dim
    first, second = jax.random.normal(rng, (2, LINFORMER_ROWS, 4096)) / LINFORMER_ROWS**0.5
    return {"key_projection": first, "value_projection": second}


MIXERS: dict[str, Mixer] = {
    "softmax": Mixer(
        dot_product_attention,
        ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5}),
        pairwise=True,
        empty_state=_softmax_state,
    ),
    "linear": Mixer(
        linear_attention,
        ({"implementation": "dense"}, {"implementation": "parallel", "chunk_size": 5}, {"chunk_size": 5}),
        pairwise=False,
        empty_state=empty_state,
    ),
    "gated_linear": Mixer(
        gated_linear_attention,
        ({"chunk_size": 5}, {"chunk_size": 1}),
        pairwise=False,
        empty_state=_unnormalised_state,
        extras=_log_decay,
        runs_on="linear",
    ),
    "residual": Mixer(
        one_layer,
        ({"implementation": "dense"},),
        pairwise=True,
        empty_state=_softmax_state,
        with_scores=residual_attention,
        runs_on="softmax",
        exempt={"memory": "its scores, T x S numbers a head, are part of what it returns"},
    ),
    "synthesizer_dense": Mixer(
        synthesizer_dense,
        _SYNTHESIZER_FORMS,
        pairwise=True,
        empty_state=synthetic.empty_state,
        weights=synthetic.dense_weights,
        unread=("key",),
        runs_on="softmax",
    ),
    "synthesizer_random": Mixer(
        synthesizer_random,
        _SYNTHESIZER_FORMS,
        pairwise=True,
        empty_state=synthetic.empty_state,
        weights=synthetic.random_weights,
        unread=("query", "key"),
        runs_on="softmax",
        exempt={
            "memory": "its table, a score for each pair of places, is a T x S array",
            "length": "its table has the square of the longest sequence of entries a head",
            "removal": _MOVES,
        },
    ),
    "synthesizer_factorized_dense": Mixer(
        synthesizer_factorized_dense,
        _SYNTHESIZER_FORMS,
        pairwise=True,
        empty_state=synthetic.empty_state,
        weights=synthetic.factorized_dense_weights,
        unread=("key",),
        runs_on="softmax",
    ),
    "synthesizer_factorized_random": Mixer(
        synthesizer_factorized_random,
        _SYNTHESIZER_FORMS,
        pairwise=True,
        empty_state=synthetic.empty_state,
        weights=synthetic.factorized_random_weights,
        unread=("query", "key"),
        runs_on="softmax",
        exempt={"removal": _MOVES},
    ),
    "synthesizer_mixed": Mixer(
        synthesizer_mixed,
        _SYNTHESIZER_FORMS,
        pairwise=True,
        empty_state=_softmax_state,
        weights=synthetic.mixed_weights,
        runs_on="softmax",
        exempt={"removal": _MOVES},
    ),
    "linear_hedgehog": Mixer(
        partial(linear_attention, feature_map="hedgehog"),
        ({"chunk_size": 5},),
        pairwise=False,
        empty_state=partial(empty_state, feature_map="hedgehog"),
        weights=hedgehog_weights,
        runs_on="linear",
    ),
    "efficient": Mixer(
        efficient_attention,
        ({"chunk_size": 5},),
        pairwise=False,
        empty_state=partial(empty_state, feature_map="exp"),
        runs_on="linear",
    ),
    "retention": Mixer(
        retention_attention,
        ({"chunk_size": 5},),
        pairwise=False,
        empty_state=_unnormalised_state,
        runs_on="linear",
        exempt={
            "shards of heads": "its decays go by the number of the head: a shard hands in its own",
            "removal": "its decays go by the number of tokens between query and key: cutting a key alone out moves queries",
        },
    ),
    "delta_rule": Mixer(
        delta_rule_attention,
        ({"chunk_size": 1}, {"chunk_size": 5}),
        pairwise=False,
        empty_state=_unnormalised_state,
        extras=_beta,
        runs_on="linear",
    ),
    "gated_delta_rule": Mixer(
        delta_rule_attention,
        ({"chunk_size": 5},),
        pairwise=False,
        empty_state=_unnormalised_state,
        extras=_beta_and_decay,
        runs_on="delta_rule",
    ),
    "local": _sparse(local_attention, runs_on="softmax", window=3),
    "atrous": _sparse(
        atrous_attention, lambda n, _, dilation: Union(None, dilation).keys_seen(n), runs_on="softmax", dilation=3
    ),
    "sparse": _sparse(
        sparse_attention,
        _sparse_keys,
        runs_on="softmax",
        exempt={**_SHIFTS, "window state": "every r-th key and the global ones are seen from any distance"},
        window=2,
        dilation=3,
        num_global=1,
    ),
    "strided": _sparse(strided_attention, _strided_keys, runs_on="softmax", stride=3),
    "fixed": _sparse(
        fixed_attention, lambda n, _, **options: Fixed(**options).keys_seen(n), runs_on="softmax", block=3, summary=1
    ),
    "topk": _sparse(topk_attention, runs_on="softmax", exempt={}, k=3),
    "linformer": Mixer(
        linformer_attention,
        ({"implementation": "dense"}, {"implementation": "chunked"}),
        pairwise=False,
        empty_state=_no_state,
        weights=_projections,
        keys_seen=lambda context, is_causal, rows=LINFORMER_ROWS: rows,
        exempt={"causality": "its projections mix all positions, later ones too"},
    ),
    "performer": Mixer(
        performer_attention,
        ({"implementation": "dense"}, {"chunk_size": 1}, {"chunk_size": 5}),
        pairwise=False,
        empty_state=performer_state,
        weights=draw,
        runs_on="linear",
    ),
}
