# %% [markdown]
# # Positions: biases, rotary spectra, and lengths never seen in training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# How a token's place reaches attention, and what happens beyond the length of training. Each claim stands beside its equation, and in an assertion
# that runs. No data are needed; about a minute on a CPU.

# %%
import importlib.util
import os
import subprocess
import sys

# A clone of the repository has the package already. SOURCE may be a wheel or a git address too; a jax that is there is kept.
SOURCE = os.environ.get("EFFATTN_JAX_SOURCE", "effattn-jax[train]")
if importlib.util.find_spec("effattn_jax") is None:
    subprocess.check_call([sys.executable, "-m", "pip", "install", "--quiet", SOURCE])
QUICK = os.environ.get("QUICK") == "1"  # a shorter training, for tests

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from effattn_jax import position
from effattn_jax.attention import dot_product_attention
from effattn_jax.data import DataConfig, load
from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.objectives import cross_entropy

jax.config.update("jax_default_matmul_precision", "float32")

# %% [markdown]
# ## Biases
#
# A bias adds $b_h(j - i)$ to the score of query $i$ and key $j$. ALiBi's is linear, KERPLE's logarithmic or a power with learned parameters, Sandwich's
# the product of two sinusoidal embeddings, T5's a table of buckets.

# %%
N = 4
biases = {
    "ALiBi": position.Alibi.initial(N),
    "KERPLE log": position.KerpleLog(jnp.array([2.0, 1.0, 0.5, 0.2]), jnp.array([0.5, 0.5, 0.5, 0.5])),
    "KERPLE power": position.KerplePower(jnp.array([0.5, 0.3, 0.2, 0.1]), jnp.array([0.5, 0.7, 0.9, 1.1])),
    "Sandwich": position.Sandwich(jnp.array([0.1, 0.05, 0.03, 0.01])),
    "T5": position.T5Bias.initial(N, jax.random.key(0)),
}
distance = jnp.arange(-150, 1)
figure, panels = plt.subplots(1, 5, figsize=(15, 2.6), layout="constrained")
for axes, (name, bias) in zip(panels, biases.items()):
    axes.plot(-distance, bias.at_distance(distance).T, linewidth=1)
    axes.set(title=name, xlabel="distance to the key")
figure

# %% [markdown]
# They are pytrees with gradients and go into any softmax kernel as `bias=`. There they are evaluated a block at a time, on the $R + C - 1$ distances of
# an $R \times C$ block: the compiled program has no $T \times T$ array, in either pass.

# %%
T = 8192
arrays = [jax.ShapeDtypeStruct((1, T, N, 16), jnp.float32)] * 3


def loss(bias, query, key, value):
    return jnp.sum(dot_product_attention(query, key, value, bias, is_causal=True))


compiled = jax.jit(jax.grad(loss)).lower(biases["T5"], *arrays).compile()
used = compiled.memory_analysis().temp_size_in_bytes
print(f"{used / 1e6:.0f} MB of temporaries; one T x T float array a head would be {4 * T * T / 1e6:.0f} MB")
assert used < T * T

# %% [markdown]
# ## Rotary spectra
#
# Rotary positions turn pair $m$ of features by $t\, w_m$, $w_m = b^{-2m/d}$. A model that is to read $k$ times its length gets other frequencies:
# interpolation divides all of them, which blurs near distances too; the NTK forms keep the fast ones and divide the slowest by $k$.

# %%
d, k = 64, 8
scalings = ("none", "linear", "ntk", "ntk_fixed", "ntk_mixed", "yarn")
spectra = {s: position.rotary_frequencies(d, scaling=s, factor=k, train_length=512) for s in scalings}
figure, panels = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
for name, w in spectra.items():
    panels[0].plot(w, label=name, linewidth=1)
    panels[1].plot(spectra["none"] / w, label=name, linewidth=1)
panels[0].set(yscale="log", xlabel="pair of features m", title="frequency, radians a position")
panels[1].set(xlabel="pair of features m", title="how many times slower")
panels[1].legend(fontsize=8)
assert np.isclose(spectra["ntk"][-1] * k, spectra["none"][-1]) and spectra["ntk"][0] == spectra["none"][0]
figure

# %% [markdown]
# A score depends on the distance alone, wherever the row begins: angles of whole positions are computed in fixed point.

# %%
q, key_ = jax.random.normal(jax.random.key(1), (2, 1, 8, 1, d))


def scores(start):
    at = start + jnp.arange(8)
    return jnp.einsum("btnh,bsnh->ts", position.rotary(q, at), position.rotary(key_, at))


print({start: float(jnp.abs(scores(start) - scores(0)).max()) for start in (1_000, 1_000_000)})
assert jnp.allclose(scores(1_000_000), scores(0), atol=1e-4)

# %% [markdown]
# ReRoPE leaves the frequencies and stops the distance: $r$ up to a window $w$, then $w$, or in its leaky form $w + (r - w)/k$.

# %%
r = np.arange(0, 200)
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for leak, name in ((1.0, "rotary"), (1 / 8, "leaky, k = 8"), (0.0, "ReRoPE")):
    axes.plot(r, np.where(r < 64, r, 64 + (r - 64) * leak), label=name, linewidth=1)
axes.set(xlabel="distance", ylabel="distance that is used")
axes.legend(fontsize=8)
figure

# %% [markdown]
# ## Beyond the length of training
#
# A byte-level model is trained at 32 tokens, with rotary positions and nothing else, and read at up to eight times that: each setting below is one of
# inference, on the same parameters. The figure is the accuracy of the last 32 tokens, the same ones at each length.

# %%
CONTEXT, RATIOS = 32, (1, 4) if QUICK else (1, 2, 4, 8)
dataset = load(DataConfig(context=CONTEXT, batch_size=32))
config = ModelConfig(layers=1 if QUICK else 2, width=48, heads=4, train_length=CONTEXT)
model = LanguageModel(config, dataset.vocab_size)
optimizer = optax.adam(4e-3)


@jax.jit
def update(params, memory, batch):
    def loss(params):
        total, weight = cross_entropy(
            model.apply({"params": params}, batch["tokens"]), batch["targets"], batch["weights"]
        )
        return total / weight

    updates, memory = optimizer.update(jax.grad(loss)(params), memory)
    return optax.apply_updates(params, updates), memory


params = model.init(jax.random.key(0), dataset.batch(0, 0)["tokens"])["params"]
memory = optimizer.init(params)
for step in range(100 if QUICK else 1500):
    params, memory = update(params, memory, dataset.batch(0, step))

# %%
settings = {
    "rotary": lambda ratio: {},
    "window": lambda ratio: {"window": CONTEXT - 1},
    "interpolation": lambda ratio: {"rotary_scaling": "linear", "rotary_factor": float(ratio)},
    "NTK-mixed": lambda ratio: {"rotary_scaling": "ntk_mixed", "rotary_factor": float(ratio)},
    "ReRoPE, log n": lambda ratio: {"rerope_window": CONTEXT // 2, "log_scale": "inference"},
}
ends = np.linspace(CONTEXT * 8 + 1, len(dataset.validation) - 1, 32).astype(int)


@functools.partial(jax.jit, static_argnums=0)
def right(used, params, tokens):
    guess = jnp.argmax(used.apply({"params": params}, tokens[:, :-1])[:, -CONTEXT:], axis=-1)
    return jnp.mean(guess == tokens[:, -CONTEXT:])


figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
found = {}
for name, at in settings.items():
    for ratio in RATIOS:
        rows = dataset.validation[ends[:, None] - ratio * CONTEXT + np.arange(ratio * CONTEXT + 1)].astype(np.int32)
        used = LanguageModel(config.at_inference(**at(ratio)), dataset.vocab_size)
        found[name, ratio] = float(right(used, params, rows))
    axes.plot(
        [ratio * CONTEXT for ratio in RATIOS], [100 * found[name, ratio] for ratio in RATIOS], marker="o", label=name
    )
axes.set(xscale="log", xlabel="tokens", ylabel="accuracy of the last 32, %")
axes.legend(fontsize=8)
assert all(
    abs(found[name, 1] - found["rotary", 1]) < 0.05 for name in settings
)  # nothing changes at the trained length
figure

# %% [markdown]
# `python -m benchmarks.extrapolation` is the same with a model for each way of training, on real and on repeated text.
