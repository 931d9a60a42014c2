"""Attention kernels under one contract: f(query, key, value, bias=None, mask=None, *, scale, is_causal, segment_ids, initial_state, ...).

`MIXERS` is the table that the law tests, the benchmark, the models and `--model.mixer NAME` follow from.
"""

from functools import partial

import jax
import jax.numpy as jnp

from effattn_jax._contract import Mixer
from effattn_jax.attention._calls import window_bounds
from effattn_jax.attention._linear import LinearState, empty_state
from effattn_jax.attention._unions import Fixed, Union
from effattn_jax.attention.adapters import as_attention_fn
from effattn_jax.attention.features import FEATURE_MAPS, elu_plus_one
from effattn_jax.attention.gated import gated_linear_attention
from effattn_jax.attention.kv_cache import Cache, cache
from effattn_jax.attention.linear import linear_attention
from effattn_jax.attention.linformer import linformer_attention
from effattn_jax.attention.softmax import dot_product_attention
from effattn_jax.attention.sparse import (
    atrous_attention,
    fixed_attention,
    local_attention,
    sparse_attention,
    strided_attention,
)
from effattn_jax.attention.topk import topk_attention

__all__ = [
    "FEATURE_MAPS",
    "MIXERS",
    "Cache",
    "LinearState",
    "as_attention_fn",
    "atrous_attention",
    "cache",
    "dot_product_attention",
    "elu_plus_one",
    "fixed_attention",
    "gated_linear_attention",
    "linear_attention",
    "linformer_attention",
    "local_attention",
    "sparse_attention",
    "strided_attention",
    "topk_attention",
]


def _softmax_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype):
    del num_heads
    return cache(batch, capacity, num_kv_heads, head_dim, value_dim, dtype)


def _log_decay(rng: jax.Array, query: jax.Array) -> dict[str, jax.Array]:
    noise = jax.random.normal(rng, query.shape[:-1], jnp.float32)
    return {"log_decay": jax.nn.log_sigmoid(2 + noise).astype(query.dtype)}


_MOVES = {"removal": "its pattern counts positions: cutting a key out moves those behind it"}


def _sparse(function, keys_seen=None, *, runs_on="", exempt=_MOVES, **options) -> Mixer:
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


def _projections(rng, num_heads, num_kv_heads, head_dim):
    """E and F for up to 4,096 keys, as random projections that keep lengths."""
    del num_heads, num_kv_heads, head_dim
    first, second = jax.random.normal(rng, (2, 64, 4096)) / 8
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
    "local": _sparse(local_attention, runs_on="softmax", window=3),
    "atrous": _sparse(
        atrous_attention, lambda n, _, dilation: Union(None, dilation).keys_seen(n), runs_on="sparse", dilation=3
    ),
    "sparse": _sparse(
        sparse_attention,
        _sparse_keys,
        exempt={**_MOVES, "window state": "every r-th key and the global ones are seen from any distance"},
        window=2,
        dilation=3,
        num_global=1,
    ),
    "strided": _sparse(strided_attention, _strided_keys, runs_on="sparse", stride=3),
    "fixed": _sparse(
        fixed_attention, lambda n, _, **options: Fixed(**options).keys_seen(n), runs_on="softmax", block=3, summary=1
    ),
    "topk": _sparse(topk_attention, exempt={}, k=3),
    "linformer": Mixer(
        linformer_attention,
        ({"implementation": "dense"}, {"implementation": "chunked"}),
        pairwise=False,
        empty_state=_no_state,
        weights=_projections,
        exempt={"causality": "its projections mix all positions, later ones too", **_MOVES},
    ),
}
