"""Our positions against transformers' attention layers on the same weights: RoFormer, Llama with scaled frequencies, T5, BLOOM, DeBERTa.

Skipped where torch and transformers are absent, as in the suite's own environment. To run it, in an environment with this package and pytest:
`pip install torch transformers && python -m pytest tests/test_position_peers.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.attention import dot_product_attention
from effattn_jax.position import (
    Alibi,
    T5Bias,
    disentangled_attention,
    rotary,
    rotary_frequencies,
    yarn_temperature,
)

torch = pytest.importorskip("torch", reason="the peers are in PyTorch")
transformers = pytest.importorskip("transformers", reason="the peers are transformers' layers")

B, T, N, H = 2, 11, 4, 8
D = N * H


def tokens(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32))


def drawn(module):
    """The module with weights large enough for positions to count, and no dropout."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module.eval()


def heads(linear, x):
    return jnp.asarray(linear(x).detach().numpy()).reshape(B, T, N, H)


def causal_mask():
    return torch.triu(torch.full((T, T), float("-inf")), diagonal=1)[None, None]


def check(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours).reshape(B, T, -1), theirs.detach().numpy(), atol=1e-5)


def test_roformer():
    from transformers.models.roformer import modeling_roformer as peer

    config = transformers.RoFormerConfig(hidden_size=D, num_attention_heads=N, rotary_value=False)
    layer, x = drawn(peer.RoFormerSelfAttention(config)), tokens()
    waves = peer.RoFormerSinusoidalPositionalEmbedding(64, H)
    waves.weight = torch.nn.Parameter(waves.create_weight(), requires_grad=False)
    theirs = layer(x, sinusoidal_pos=waves((B, T))[None, None])[0]
    q, k, v = (heads(linear, x) for linear in (layer.query, layer.key, layer.value))
    q, k = (rotary(y, jnp.arange(T), interleaved=True) for y in (q, k))
    check(dot_product_attention(q, k, v), theirs)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn"])
def test_llama(scaling):
    from transformers.models.llama import modeling_llama as peer

    kind = {"none": "default", "ntk": "dynamic"}.get(scaling, scaling)
    length, factor = 16, 4.0
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": factor, "original_max_position_embeddings": length}
    config = transformers.LlamaConfig(
        hidden_size=D, num_attention_heads=N, num_key_value_heads=N, max_position_embeddings=length, rope_parameters=rope,
        attn_implementation="eager",
    )  # fmt: skip
    layer, x = drawn(peer.LlamaAttention(config, layer_idx=0)), tokens()
    turn = peer.LlamaRotaryEmbedding(config)
    positions = torch.arange(T)[None] + (
        64 - T if scaling == "ntk" else 0
    )  # dynamic scaling acts beyond the trained length
    theirs = layer(x, position_embeddings=turn(x, positions), attention_mask=causal_mask())[0]
    stretch = factor * 64 / length - (factor - 1) if scaling == "ntk" else factor
    w = rotary_frequencies(H, scaling=scaling, factor=stretch, train_length=length)
    q, k, v = (heads(linear, x) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (rotary(y, jnp.asarray(positions.numpy()), frequencies=w) for y in (q, k))
    q = q * (yarn_temperature(factor) ** 2 if scaling == "yarn" else 1)
    out = dot_product_attention(q, k, v, is_causal=True)
    check(np.asarray(out).reshape(B, T, D) @ layer.o_proj.weight.detach().numpy().T, theirs)


@pytest.mark.parametrize("decoder", [False, True])
def test_t5(decoder):
    from transformers.models.t5 import modeling_t5 as peer

    config = transformers.T5Config(
        d_model=D, d_kv=H, num_heads=N, is_decoder=decoder, relative_attention_num_buckets=8,
        relative_attention_max_distance=10, attn_implementation="eager",
    )  # fmt: skip
    layer, x = drawn(peer.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)), tokens()
    mask = causal_mask() if decoder else torch.zeros(1, 1, T, T)
    theirs = layer(x, mask=mask)[0]
    table = jnp.asarray(layer.relative_attention_bias.weight.detach().numpy())
    q, k, v = (heads(linear, x) for linear in (layer.q, layer.k, layer.v))
    bias = T5Bias(table, bidirectional=not decoder, max_distance=10)
    out = dot_product_attention(q, k, v, bias, scale=1.0, is_causal=decoder, chunk_size=4)
    check(np.asarray(out).reshape(B, T, D) @ layer.o.weight.detach().numpy().T, theirs)


def test_bloom():
    from transformers.models.bloom import modeling_bloom as peer

    config = transformers.BloomConfig(hidden_size=D, n_head=N)
    layer, x = drawn(peer.BloomAttention(config, layer_idx=0)), tokens()
    alibi = peer.build_alibi_tensor(torch.ones(B, T, dtype=torch.long), N, torch.float32)
    mask = torch.triu(torch.full((T, T), torch.finfo(torch.float32).min), diagonal=1)[None, None]
    theirs = layer(x, torch.zeros_like(x), alibi, mask)[0]
    q, k, v = (jnp.asarray(y.transpose(1, 2).detach().numpy()) for y in layer._reshape(layer.query_key_value(x)))
    out = dot_product_attention(q, k, v, Alibi.initial(N), is_causal=True, chunk_size=4)
    dense = np.asarray(out).reshape(B, T, D) @ layer.dense.weight.detach().numpy().T + layer.dense.bias.detach().numpy()
    check(dense, theirs)


def test_deberta():
    """Its code reads the second table at i - j where the paper has j - i, so the rows go in backwards."""
    from transformers.models.deberta import modeling_deberta as peer

    config = transformers.DebertaConfig(
        hidden_size=D,
        num_attention_heads=N,
        relative_attention=True,
        max_relative_positions=T + 2,
        pos_att_type=["c2p", "p2c"],
    )
    layer, x = drawn(peer.DisentangledSelfAttention(config)), tokens()
    embeddings = torch.randn(2 * (T + 2), D)
    relative = (torch.arange(T)[:, None] - torch.arange(T)[None])[None]
    theirs = layer(x, torch.ones(B, 1, T, T), relative_pos=relative, rel_embeddings=embeddings)[0]
    q, k, v = layer.transpose_for_scores(layer.in_proj(x)).chunk(3, dim=-1)
    q, v = (y + layer.transpose_for_scores(b[None, None]) for y, b in ((q, layer.q_bias), (v, layer.v_bias)))
    q, k, v = (jnp.asarray(y.transpose(1, 2).detach().numpy()) for y in (q, k, v))
    seen = embeddings[2 : 2 + 2 * T]
    tables = [f(seen).detach().numpy().reshape(2 * T, N, H) for f in (layer.pos_proj, layer.pos_q_proj)]
    backwards = tables[1][np.minimum(2 * T - np.arange(2 * T), 2 * T - 1)]
    out = disentangled_attention(q, k, v, key_table=tables[0], query_table=backwards, chunk_size=4)
    check(out, theirs)
