# %% [markdown]
# # The attention family: patterns, errors, scaling
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# Every kernel of `effattn_jax.attention` keeps one contract, f(query, key, value, bias, mask, *, is_causal, ...). This notebook walks through the
# family: each claim stands beside the equation it comes from and in an assertion that runs. It needs no data, and runs in about a minute on a CPU.

# %%
import importlib.util
import os
import subprocess
import sys

# A clone of the repository has the package already. SOURCE may be a wheel or a git address too; a jax that is there is kept.
SOURCE = os.environ.get("EFFATTN_JAX_SOURCE", "effattn-jax[train]")
if importlib.util.find_spec("effattn_jax") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", SOURCE])

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from effattn_jax import attention as ea
from effattn_jax import mixing
from effattn_jax.plot import plot_attention

# For the comparisons: a TPU would round the factors of a product to bfloat16.
jax.config.update("jax_default_matmul_precision", "float32")

QUICK = os.environ.get("QUICK", "") not in ("", "0")  # the same cells, shorter: what the tests run
T, N, H = 24, 1, 16
query, key, value = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))

# %% [markdown]
# ## Who sees whom
#
# A sparse kernel computes $o_i = \sum_{j \in A_i} \mathrm{softmax}_j(q_i \cdot k_j / \sqrt{H})\, v_j$ for a pattern $A_i$, by blocks: nothing outside
# the pattern is computed. Applied to the identity in place of the values, a kernel shows its weights; `attention_weights` does that for every
# kernel of the table.

# %%
causal = functools.partial(ea.attention_weights, is_causal=True)
patterns = {
    "softmax": causal("softmax", query, key),
    "local, window 3": causal("local", query, key, window=3),
    "atrous, dilation 4": causal("atrous", query, key, dilation=4),
    "sparse, both": causal("sparse", query, key, window=3, dilation=4),
    "strided, 4": causal("strided", query, key, stride=4),
    "fixed, block 6": causal("fixed", query, key, block=6, summary=1),
}
figure = plot_attention(jnp.concatenate([w[0] for w in patterns.values()]) > 0, titles=list(patterns))
figure

# %% [markdown]
# The pictures are the definitions, and each row is one softmax: its weights sum to one, a pair that belongs to both parts of a union counts once.

# %%
i, j = np.arange(T)[:, None], np.arange(T)[None]
expected = {
    "local, window 3": i - j <= 3,
    "atrous, dilation 4": (i - j) % 4 == 0,
    "sparse, both": (i - j <= 3) | ((i - j) % 4 == 0),
    "strided, 4": (i - j < 4) | ((i - j) % 4 == 0),
    "fixed, block 6": (i // 6 == j // 6) | (j % 6 == 5),
}
for name, pattern in expected.items():
    assert np.array_equal(np.asarray(patterns[name][0, 0]) > 0, pattern & (j <= i)), name
for name, weights in patterns.items():
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5, err_msg=name)

# %% [markdown]
# ## Linear attention is attention with a factorised similarity
#
# $$o_i = \frac{\sum_{j \le i} \phi(q_i) \cdot \phi(k_j)\, v_j}{\sum_{j \le i} \phi(q_i) \cdot \phi(k_j)}$$
#
# The implied weights exist, though no kernel ever forms them. Bounded feature maps give flat rows, products and exponentials sharper ones.

# %%
maps = ("elu", "relu", "exp", "cosine", "taylor", "dpfp")


@jax.jit
def both(query, key, value):
    """The weights, and the output without them, by every map."""
    linear = {name: functools.partial(ea.linear_attention, is_causal=True, feature_map=name) for name in maps}
    weights = {name: causal("linear", query, key, feature_map=name)[0] for name in maps}
    return weights, {name: attend(query, key, value) for name, attend in linear.items()}


implied, outputs = both(2 * query, 2 * key, value)
for (name, weights), out in zip(implied.items(), outputs.values()):
    np.testing.assert_allclose(jnp.einsum("nts,bsnv->btnv", weights, value), out, atol=1e-4, err_msg=name)
figure = plot_attention(jnp.concatenate(list(implied.values())), titles=list(implied))
figure

# %% [markdown]
# ## Performer: an estimate, and where it is one
#
# $$e^{q \cdot k} = \mathbb{E}_{\omega \sim N(0, I)}\!\left[e^{\omega \cdot q - |q|^2/2}\; e^{\omega \cdot k - |k|^2/2}\right]$$
#
# With $M$ random features the error falls as $1/\sqrt{M}$, and grows with $e^{|q + k|^2}$: the estimate is useful while queries and keys are short. For
# head dim 64 and the usual scale of $1/\sqrt{H}$, entries of size 0.5 are near the limit.

# %%
L, D = 256, 64
features, stds = (64, 256, 1024), (0.25, 0.5, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def relative_error(num_features, std):
    def one(rng):
        keys = jax.random.split(rng, 2)
        q, k, v = jax.random.normal(keys[0], (3, 1, L, 1, D))
        q, k = std * q, std * k
        projection = ea.random_features(keys[1], num_features, D)
        exact = ea.dot_product_attention(q, k, v)
        estimate = ea.performer_attention(q, k, v, projection=projection)
        return jnp.sqrt(jnp.mean((estimate - exact) ** 2) / jnp.mean(exact**2))

    return jnp.median(jax.vmap(one)(jax.random.split(jax.random.key(1), 4)))


errors = np.array([[relative_error(m, std) for m in features] for std in stds])
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for std, row in zip(stds, errors):
    axes.loglog(features, row, marker="o", label=f"std {std}")
axes.set(xlabel="features M", ylabel="relative RMS error")
axes.legend()
figure

# %%
assert np.all(np.diff(errors[:2], axis=1) < 0), "more features, less error, where the norms are small"
assert np.all(np.diff(errors, axis=0) > 0), "longer queries and keys, more error"

# %% [markdown]
# ## The future cannot leak
#
# The published causal Performer subtracts the largest key exponent of the whole row, and an additive constant then carries it back in time. Here a
# row's outputs are the same bits whatever stands behind them, for every causal kernel of the table.

# %%
loud = [
    jnp.concatenate([x[:, :12], change], axis=1)
    for x, change in ((key, 100 * key[:, 12:]), (value, value[:, 12:] * jnp.nan))
]
projection = ea.random_features(jax.random.key(2), 64, H)
kernels = {
    "softmax": ea.dot_product_attention,
    "local": functools.partial(ea.local_attention, window=3),
    "linear": ea.linear_attention,
    "efficient": ea.efficient_attention,
    "performer": functools.partial(ea.performer_attention, projection=projection),
}
for name, kernel in kernels.items():
    run = jax.jit(functools.partial(kernel, is_causal=True))
    clean, noisy = run(query, key, value)[:, :12], run(query, *loud)[:, :12]
    assert np.asarray(clean).tobytes() == np.asarray(noisy).tobytes(), name

# %% [markdown]
# ## The delta rule writes what is missing
#
# $$S_t = S_{t-1} + \beta_t\, k_t\, (v_t - S_{t-1}^\top k_t)^\top$$
#
# Linear attention adds; the delta rule replaces. A key written twice answers with its last value, where the sum answers with both.

# %%
keys = jnp.eye(4)[jnp.array([0, 1, 2, 0])][None, :, None]
values = jnp.arange(1.0, 5.0)[None, :, None, None]
asked = jnp.eye(4)[jnp.array([3, 3, 3, 0])][None, :, None]
delta = ea.delta_rule_attention(asked, keys, values, beta=jnp.ones((1, 4, 1)), is_causal=True)
added = ea.linear_attention(asked, keys, values, feature_map="identity", normalize=False, is_causal=True)
assert float(delta[0, -1, 0, 0]) == 4.0 and float(added[0, -1, 0, 0]) == 5.0

# %% [markdown]
# ## Decays
#
# $$o_i = \sum_{j \le i} \gamma^{\,i-j}\; q_i \cdot k_j\; v_j$$
#
# Retention forgets at a fixed rate a head, gated linear attention at one that it reads from each token. At rates that do not change the two are one.

# %%
gamma = float(ea.retention_decay(N)[0])
scores = jnp.einsum("btnh,bsnh->bnts", query, key) * jnp.where(j <= i, gamma ** (i - j), 0)
kept = ea.retention_attention(query, key, value, is_causal=True)
gated = ea.gated_linear_attention(query, key, value, log_decay=jnp.full((1, T, N), jnp.log(gamma)), is_causal=True)
np.testing.assert_allclose(kept, jnp.einsum("bnts,bsnv->btnv", scores, value), atol=1e-4)
np.testing.assert_allclose(kept, gated, atol=1e-4)

# %% [markdown]
# ## RealFormer: scores that add up through the layers
#
# $$A_n = Q_n K_n^\top + A_{n-1} = [Q_1, \ldots, Q_n]\,[K_1, \ldots, K_n]^\top$$
#
# Two layers of residual scores are one attention over their concatenated features.

# %%
second_query, second_key = jax.random.normal(jax.random.key(3), (2, 1, T, N, H))
_, first_scores = ea.residual_attention(query, key, value, is_causal=True)
residual, _ = ea.residual_attention(second_query, second_key, value, previous_scores=first_scores, is_causal=True)
joined = [jnp.concatenate(pair, axis=-1) for pair in ((query, second_query), (key, second_key))]
expected = ea.dot_product_attention(*joined, value, scale=H**-0.5, is_causal=True)
np.testing.assert_allclose(residual, expected, atol=1e-5)

# %% [markdown]
# ## Synthesizers: weights without products of queries and keys
#
# $$o_i = \sum_j \mathrm{softmax}_j(R_{ij})\, v_j$$
#
# A random Synthesizer's weights are a table by place: what queries and keys hold does not matter, and with a table of scores it is softmax attention.

# %%
scaled = jnp.einsum("btnh,bsnh->tns", query, key) * H**-0.5
by_place = ea.synthesizer_random(query, key, value, table=scaled, is_causal=True)
np.testing.assert_array_equal(by_place, ea.synthesizer_random(-query, 0 * key, value, table=scaled, is_causal=True))
np.testing.assert_allclose(by_place, ea.dot_product_attention(query, key, value, is_causal=True), atol=1e-5)

# %% [markdown]
# ## Fewer keys: the largest scores, mixtures, a memory
#
# Top-k keeps the $k$ largest scores of a row. Linformer looks at $R$ mixtures of keys and values, $\mathrm{softmax}(q (Ek)^\top)(Fv)$: with $E = F = I$
# it is softmax attention. External attention has a learned memory in their place, normalised over tokens first and over its slots then.

# %%
top = causal("topk", query, key, k=5)
assert np.array_equal(np.count_nonzero(top[0, 0], axis=-1), np.minimum(np.arange(T) + 1, 5))

eye = jnp.eye(T)
mixed = ea.linformer_attention(query, key, value, key_projection=eye, value_projection=eye)
np.testing.assert_allclose(mixed, ea.dot_product_attention(query, key, value), atol=1e-5)

slots = jax.random.normal(jax.random.key(4), (8, 1, H))
over_tokens = jax.nn.softmax(jnp.einsum("btnh,snh->btns", query, slots), axis=1)
over_slots = over_tokens / over_tokens.sum(-1, keepdims=True)
external = ea.external_attention(query, slots, slots)
np.testing.assert_allclose(external, jnp.einsum("btns,snv->btnv", over_slots, slots), atol=1e-5)

# %% [markdown]
# ## Without attention
#
# Tokens can be mixed by maps that are not attention at all: $W_2\, \mathrm{gelu}(W_1 x)$ over time (MLP-Mixer), a gate (gMLP), an affine map and one
# matrix (ResMLP), the real part of a Fourier transform (FNet), convolutions with softmax kernels (light-weight), branches that merge into one matrix (RepMLP).
# Those with a causal form keep the law above: a later token reaches no earlier output.

# %%
x = jax.random.normal(jax.random.key(5), (T, 8))
np.testing.assert_allclose(mixing.fnet(x), jnp.fft.fft2(x).real, atol=1e-4)

taps = jax.random.normal(jax.random.key(6), (1, 3))
light = mixing.lightweight_convolution(x, taps, is_causal=True)
padded = jnp.pad(x, [(2, 0), (0, 0)])
np.testing.assert_allclose(
    light, sum(w * padded[2 - d : 2 - d + T] for d, w in enumerate(jax.nn.softmax(taps[0]))), atol=1e-5
)

square = jax.random.normal(jax.random.key(7), (1, T, T))
branches = mixing.rep_mlp(x, square, [taps])
np.testing.assert_allclose(branches, mixing.token_mixing(x, *mixing.merge_rep_mlp(square, [taps])), atol=1e-5)

changed = x.at[12:].set(jnp.nan)
for name in ("mlp_mixer", "gmlp", "res_mlp", "lightweight_convolution", "rep_mlp"):
    line = mixing.MIXERS[name]
    weights = line.weights(jax.random.key(8), 8, T, 2)
    mix = jax.jit(functools.partial(line.function, is_causal=True))
    assert np.array_equal(mix(x, **weights)[:12], mix(changed, **weights)[:12]), name

# %% [markdown]
# ## Memory grows with T, not with its square
#
# XLA says what a compiled program needs beside its inputs and outputs. Gradients included, no T x S array is among it.


# %%
def temporaries(kernel, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    slope = jax.jit(jax.grad(lambda x: kernel(x, x, x, is_causal=True).sum()))
    return slope.lower(shape).compile().memory_analysis().temp_size_in_bytes


lengths = (2048, 4096) if QUICK else (1024, 2048, 4096)
measured = {
    "softmax": ea.dot_product_attention,
    "local, window 64": functools.partial(ea.local_attention, window=64),
    "linear": ea.linear_attention,
    "jax.nn": jax.nn.dot_product_attention,
}
table = {name: [temporaries(kernel, n) for n in lengths] for name, kernel in measured.items()}
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, sizes in table.items():
    axes.loglog(lengths, np.array(sizes) / 1e6, marker="o", label=name)
axes.set(xlabel="T", ylabel="MB of temporaries, gradient")
axes.legend()
figure

# %%
for name, sizes in table.items():
    growth = np.log2(sizes[-1] / sizes[-2])
    assert growth > 1.8 if name == "jax.nn" else growth < 1.2, (name, sizes)
