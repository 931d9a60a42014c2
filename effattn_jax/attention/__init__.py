"""Attention kernels under one contract: f(query, key, value, bias=None, mask=None, *, scale, is_causal, segment_ids, initial_state, ...).

`MIXERS` is the table that the law tests, the benchmark, the models and `--model.mixer NAME` follow from.
"""

from functools import partial

import jax
import jax.numpy as jnp

from effattn_jax._contract import Mixer
from effattn_jax.attention import _synthetic as synthetic
from effattn_jax.attention._linear import LinearState, empty_state
from effattn_jax.attention.adapters import as_attention_fn
from effattn_jax.attention.external import ExternalState, external_attention
from effattn_jax.attention.features import FEATURE_MAPS, elu_plus_one
from effattn_jax.attention.gated import gated_linear_attention
from effattn_jax.attention.kv_cache import Cache, cache
from effattn_jax.attention.linear import linear_attention
from effattn_jax.attention.residual import one_layer, residual_attention
from effattn_jax.attention.softmax import dot_product_attention
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

__all__ = [
    "FEATURE_MAPS",
    "MIXERS",
    "Cache",
    "ExternalState",
    "LinearState",
    "as_attention_fn",
    "cache",
    "dense_scores",
    "dot_product_attention",
    "elu_plus_one",
    "external_attention",
    "factorized_dense_scores",
    "factorized_random_scores",
    "gated_linear_attention",
    "linear_attention",
    "mix_scores",
    "random_scores",
    "residual_attention",
    "synthesizer_attention",
    "synthesizer_dense",
    "synthesizer_factorized_dense",
    "synthesizer_factorized_random",
    "synthesizer_mixed",
    "synthesizer_random",
]


def _softmax_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype):
    del num_heads
    return cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)


def _log_decay(rng: jax.Array, query: jax.Array) -> dict[str, jax.Array]:
    noise = jax.random.normal(rng, query.shape[:-1], jnp.float32)
    return {"log_decay": jax.nn.log_sigmoid(2 + noise).astype(query.dtype)}


_SYNTHESIZER_FORMS = ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5})
_MOVES = "a query's score depends on its place among the tokens that are there"

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
        empty_state=partial(empty_state, normalize=False, gated=True),
        extras=_log_decay,
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
}
