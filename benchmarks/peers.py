"""What we are measured against: each peer by name, built where it is installed and left out, by name, where it is not.

A builder takes (length, heads, dim) and returns a `Contender`. Peers in PyTorch run on the CPU in the same process; their memory is not
reported, since only XLA says what a compiled program needs.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax.attention import elu_plus_one, linear_attention, random_features
from effattn_jax.position import rotary

WINDOW = 256
DOCUMENTS = 16  # in a packed row
# What the members that name their pairs are measured with.
OPTIONS: dict[str, dict[str, int]] = {
    "local": {"window": WINDOW},
    "atrous": {"dilation": 64},
    "sparse": {"window": 64, "dilation": 64, "num_global": 4},
    "strided": {"stride": 64},
    "fixed": {"block": 64, "summary": 4},
    "topk": {"k": 64},
}


class Contender(NamedTuple):
    """Something to time.

    Attributes:
      forward: runs the forward pass and waits for it.
      both: runs forward and backward and waits; None where there is no backward pass.
      memory: temporaries in bytes of the compiled (forward, forward + backward), None where unknown.
      compile_seconds: of both programs together, None where nothing is compiled.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any] | None
    memory: tuple[int, int] | None
    compile_seconds: float | None


def compiled(forward: Callable, inputs: tuple, cotangent: jax.Array) -> Contender:
    """A function of arrays in JAX: both passes compiled, with what the compiler says of their memory."""

    def both(inputs, cotangent):
        out, pull = jax.vjp(forward, *inputs)
        return out, pull(cotangent)

    started = time.perf_counter()
    run_forward = jax.jit(forward).lower(*inputs).compile()
    run_both = jax.jit(both).lower(inputs, cotangent).compile()
    seconds = time.perf_counter() - started
    memory = tuple(run.memory_analysis().temp_size_in_bytes for run in (run_forward, run_both))
    return Contender(
        lambda: jax.block_until_ready(run_forward(*inputs)),
        lambda: jax.block_until_ready(run_both(inputs, cotangent)),
        memory,
        seconds,
    )


def token_scan(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal linear attention one token at a time by lax.scan, what JAX codes do that have no chunked form."""
    query, key = (jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))) for x in (query, key))
    return _scan_tokens(query, key, value)


def performer_token_scan(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal FAVOR+ as published: features of all tokens at once with one stabiliser for all keys, then one token at a time by lax.scan.

    Its keys are stabilised by the greatest projection over positions and features, so outputs depend on later keys.
    """
    dim = query.shape[-1]
    projection = random_features(jax.random.key(0), 4 * dim, dim)

    def features(x, axes):
        x = x * dim**-0.25
        dots = jnp.einsum("btnh,mh->btnm", x, projection)
        exponent = dots - jnp.sum(x * x, axis=-1, keepdims=True) / 2 - jnp.max(dots, axis=axes, keepdims=True)
        return (jnp.exp(exponent) + 1e-6) * projection.shape[0] ** -0.5

    return _scan_tokens(features(query, -1), features(key, (1, 3)), value)


def _scan_tokens(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Sums over the past, and the same of ones as what they are divided by."""
    return _sums(query, key, value) / _sums(query, key, jnp.ones_like(value[..., :1]))


@jax.custom_vjp
def _sums(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """sum over j <= i of (q_i . k_j) v_j, one token at a time, with the published backward pass: the state runs backwards by subtraction."""
    return _sums_forward(query, key, value)[0]


def _sums_forward(query, key, value):
    def step(state, x):
        q, k, v = x
        state = state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bnm,bnmv->bnv", q, state)

    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    state, out = lax.scan(step, jnp.zeros((*key[:, 0].shape, value.shape[-1]), value.dtype), over_time)
    return jnp.moveaxis(out, 0, 1), (query, key, value, state)


def _sums_backward(kept, cotangent):
    *inputs, state = kept

    def step(carry, x):
        state, d_state = carry
        q, k, v, d_out = x
        d_q = jnp.einsum("bnmv,bnv->bnm", state, d_out)
        d_state = d_state + q[..., None] * d_out[..., None, :]
        d_k, d_v = jnp.einsum("bnmv,bnv->bnm", d_state, v), jnp.einsum("bnmv,bnm->bnv", d_state, k)
        return (state - k[..., None] * v[..., None, :], d_state), (d_q, d_k, d_v)

    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (*inputs, cotangent))
    _, gradients = lax.scan(step, (state, jnp.zeros_like(state)), over_time, reverse=True)
    return tuple(jnp.moveaxis(x, 0, 1) for x in gradients)


_sums.defvjp(_sums_forward, _sums_backward)


def with_positions(function: Callable, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """A kernel that takes the positions of queries."""
    return function(query, key, value, query_positions=jnp.arange(query.shape[1]))


def document_ids(length: int) -> np.ndarray:
    """(T,) ids of documents of lengths 1, 3, 5, ... in proportion, packed into a row."""
    return np.floor(DOCUMENTS * np.sqrt(np.arange(length) / length)).astype(np.int32)


def packed(function: Callable, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """A kernel that takes segment ids, over a packed row."""
    return function(query, key, value, segment_ids=jnp.asarray(document_ids(query.shape[1]))[None])


def two_passes(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Linear attention with turned features as two calls: turned ones over values, and those as they are over ones, for the sum below."""
    plain = elu_plus_one(query), elu_plus_one(key)
    above, below = (
        linear_attention(*features, x, is_causal=True, feature_map="identity", normalize=False)
        for features, x in (
            ([rotary(x, jnp.arange(x.shape[1])) for x in plain], value),
            (plain, jnp.ones_like(value[..., :1])),
        )
    )
    return above / below


def jax_nn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention, causal."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def jax_nn_window(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention, causal with a window."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(WINDOW, 0))


def jax_nn_masked(pairs: Callable) -> Callable:
    """jax.nn.dot_product_attention with the mask `pairs(i, j)` of query and key numbers, causal: every score is computed."""

    def function(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        number = jnp.arange(query.shape[1])
        mask = pairs(number[:, None], number[None, :])[None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)

    return function


def same_document(i: jax.Array, j: jax.Array) -> jax.Array:
    """The pairs inside the documents of a packed row."""
    ids = document_ids(i.size)
    return ids[:, None] == ids[None]


def sparse_pairs(i: jax.Array, j: jax.Array, *, window: int, dilation: int, num_global: int = 0) -> jax.Array:
    """The causal part of sparse attention's pattern."""
    return (i - j <= window) | ((i - j) % dilation == 0) | (j < num_global)


def fixed_pairs(i: jax.Array, j: jax.Array, *, block: int, summary: int) -> jax.Array:
    """The causal part of fixed attention's pattern."""
    return (i // block == j // block) | (j % block >= block - summary)


def dense_top(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention over the largest scores, all of them in one array."""
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    scores = jnp.where(jnp.tri(query.shape[1], dtype=bool), scores, -jnp.inf)
    least = lax.top_k(lax.stop_gradient(scores), OPTIONS["topk"]["k"])[0][..., -1:]
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(jnp.where(scores < least, -jnp.inf, scores)), value)


def _torch_contender(function: Callable, length: int, heads: int, dim: int) -> Contender:
    import torch

    generator = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (torch.randn(1, heads, length, dim, generator=generator) for _ in range(4))

    def forward():
        with torch.no_grad():
            return function(query, key, value)

    def both():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        function(*leaves).backward(cotangent)
        return leaves[0].grad

    return Contender(forward, both, None, None)


def torch_sdpa(length: int, heads: int, dim: int) -> Contender:
    """torch.nn.functional.scaled_dot_product_attention, causal."""
    from torch.nn.functional import scaled_dot_product_attention

    return _torch_contender(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), length, heads, dim)


def torch_linear(length: int, heads: int, dim: int) -> Contender:
    """linear-attention-transformer's causal linear attention in buckets of 64."""
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn

    return _torch_contender(lambda q, k, v: causal_linear_attn(q, k, v, bucket_size=64), length, heads, dim)


def torch_window(length: int, heads: int, dim: int) -> Contender:
    """local-attention with an exact causal window."""
    from local_attention import LocalAttention

    layer = LocalAttention(
        window_size=WINDOW,
        causal=True,
        look_backward=1,
        look_forward=0,
        autopad=True,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return _torch_contender(layer, length, heads, dim)


def _flex(mask: Callable, length: int, heads: int, dim: int) -> Contender:
    """torch's flex_attention over the pairs `mask(batch, head, i, j)`, compiled; on a CPU it has no backward pass."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    started = time.perf_counter()
    blocks = create_block_mask(mask, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)  # sizes that vary do not compile with ids
    contender = _torch_contender(lambda q, k, v: compiled(q, k, v, block_mask=blocks), length, heads, dim)
    contender.forward()
    return contender._replace(both=None, compile_seconds=time.perf_counter() - started)


def torch_flex_window(length: int, heads: int, dim: int) -> Contender:
    """flex_attention over a causal window."""
    return _flex(lambda batch, head, i, j: (i >= j) & (i - j <= WINDOW), length, heads, dim)


def torch_flex_packed(length: int, heads: int, dim: int) -> Contender:
    """flex_attention over the documents of a packed row, causal."""
    import torch

    ids = torch.from_numpy(document_ids(length))
    return _flex(lambda batch, head, i, j: (i >= j) & (ids[i] == ids[j]), length, heads, dim)


TORCH_PEERS: dict[str, dict[str, Callable[[int, int, int], Contender]]] = {
    "softmax": {"torch SDPA": torch_sdpa},
    "window 256": {"local-attention": torch_window, "flex_attention, compiled": torch_flex_window},
    "packed": {"flex_attention, compiled": torch_flex_packed},
    "linear": {"linear-attention-transformer": torch_linear},
}
JAX_PEERS: dict[str, dict[str, Callable]] = {
    "softmax": {"jax.nn": jax_nn},
    "window 256": {"jax.nn": jax_nn_window},
    "packed": {"jax.nn, mask": jax_nn_masked(same_document)},
    "local": {"jax.nn, mask": jax_nn_masked(lambda i, j: i - j <= WINDOW)},
    "atrous": {"jax.nn, mask": jax_nn_masked(lambda i, j: (i - j) % OPTIONS["atrous"]["dilation"] == 0)},
    "sparse": {"jax.nn, mask": jax_nn_masked(partial(sparse_pairs, **OPTIONS["sparse"]))},
    "strided": {"jax.nn, mask": jax_nn_masked(partial(sparse_pairs, window=63, dilation=64))},
    "fixed": {"jax.nn, mask": jax_nn_masked(partial(fixed_pairs, **OPTIONS["fixed"]))},
    "topk": {"dense scores": dense_top},
    "linear": {"token scan": token_scan},
    "performer": {"token scan": performer_token_scan},
    "rotary_linear": {"no positions": partial(linear_attention, is_causal=True), "two calls": two_passes},
}
