"""Attention kernels under one contract: f(query, key, value, bias=None, mask=None, *, scale, is_causal, segment_ids, initial_state, ...).

`MIXERS` is the table that the law tests, the benchmark, the models and `--model.mixer NAME` follow from.
"""

from functools import partial

import jax
import jax.numpy as jnp

from effattn_jax._contract import Mixer
from effattn_jax.attention._linear import LinearState, empty_state
from effattn_jax.attention.adapters import as_attention_fn
from effattn_jax.attention.features import FEATURE_MAPS, elu_plus_one
from effattn_jax.attention.gated import gated_linear_attention
from effattn_jax.attention.kv_cache import Cache, cache
from effattn_jax.attention.linear import linear_attention
from effattn_jax.attention.performer import draw, performer_attention
from effattn_jax.attention.performer import empty_state as performer_state
from effattn_jax.attention.random_features import random_features
from effattn_jax.attention.softmax import dot_product_attention

__all__ = [
    "FEATURE_MAPS",
    "MIXERS",
    "Cache",
    "LinearState",
    "as_attention_fn",
    "cache",
    "dot_product_attention",
    "elu_plus_one",
    "gated_linear_attention",
    "linear_attention",
    "performer_attention",
    "random_features",
]


def _softmax_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype):
    del num_heads
    return cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)


def _log_decay(rng: jax.Array, query: jax.Array) -> dict[str, jax.Array]:
    noise = jax.random.normal(rng, query.shape[:-1], jnp.float32)
    return {"log_decay": jax.nn.log_sigmoid(2 + noise).astype(query.dtype)}


MIXERS: dict[str, Mixer] = {
    "softmax": Mixer(
        dot_product_attention,
        ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5}),
        pairwise=True,
        empty_state=_softmax_state,
    ),
    "linear": Mixer(
        linear_attention,
        ({"implementation": "dense"}, {"chunk_size": 5}, {"chunk_size": 1}),
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
    "performer": Mixer(
        performer_attention,
        ({"implementation": "dense"}, {"chunk_size": 1}, {"chunk_size": 5}),
        pairwise=False,
        empty_state=performer_state,
        weights=draw,
        runs_on="linear",
    ),
}
