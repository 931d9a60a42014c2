# %% [markdown]
# # Attention in linear time: one recurrence, three forms
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# This notebook shows what `effattn_jax` is about, with every claim beside the cell that checks it: linear attention is a recurrence, its
# parallel, chunked and step-by-step forms agree, the future cannot leak into the past, and a small language model trains on it. It needs no
# download of data and runs in about a minute on a CPU, and unchanged on a GPU or a TPU.

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
import csv
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from effattn_jax import attention
from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig, train

QUICK = os.environ.get("QUICK", "") not in ("", "0")  # the same cells, shorter: what the tests run
jax.devices()

# %% [markdown]
# ## The recurrence
#
# With a positive feature map $\phi$, linear attention keeps a matrix and a vector instead of all past keys and values:
#
# $$S_t = S_{t-1} + \phi(k_t)\, v_t^\top, \qquad z_t = z_{t-1} + \phi(k_t), \qquad y_t = \frac{\phi(q_t)^\top S_t}{\phi(q_t)^\top z_t}$$
#
# That is ten lines of JAX, and a loop over time. It is the definition that everything below is measured against.


# %%
def phi(x):
    return jax.nn.elu(x) + 1


def by_definition(query_TxH, key_TxH, value_TxV):
    def step(state, inputs):
        S_HxV, z_H = state
        q_H, k_H, v_V = inputs
        S_HxV = S_HxV + jnp.outer(phi(k_H), v_V)
        z_H = z_H + phi(k_H)
        return (S_HxV, z_H), (phi(q_H) @ S_HxV) / (phi(q_H) @ z_H)

    start = jnp.zeros_like(jnp.outer(key_TxH[0], value_TxV[0])), jnp.zeros_like(key_TxH[0])
    return jax.lax.scan(step, start, (query_TxH, key_TxH, value_TxV))[1]


# For the comparisons: a TPU would round the factors of a product to bfloat16.
jax.config.update("jax_default_matmul_precision", "float32")

B, T, N, H = 2, 256, 4, 32
query, key, value = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
over_heads = jax.vmap(jax.vmap(by_definition, in_axes=1, out_axes=1))
expected = over_heads(query, key, value)

# %% [markdown]
# ## Three forms of one function
#
# `linear_attention` has the layout of `jax.nn.dot_product_attention`: (batch, time, heads, features). Training uses the chunked form, matrix
# products within a chunk and the recurrence between chunks. Decoding uses the recurrent form: a call with one token and the state. All of them
# are the function above.


# %%
def error(got, expected):
    return float(jnp.sqrt(jnp.mean((got - expected) ** 2) / jnp.mean(expected**2)))


linear = functools.partial(attention.linear_attention, is_causal=True)
chunked = jax.jit(functools.partial(linear, chunk_size=64))(query, key, value)


@jax.jit
def one_by_one(query, key, value):
    def step(state, inputs):
        y, state = linear(*(x[:, None] for x in inputs), initial_state=state, return_state=True)
        return state, y[:, 0]

    first = [x[:, :1] for x in (query, key, value)]
    y, state = linear(*first, return_state=True)
    rest = [jnp.moveaxis(x[:, 1:], 1, 0) for x in (query, key, value)]
    return jnp.concatenate([y, jnp.moveaxis(jax.lax.scan(step, state, rest)[1], 0, 1)], axis=1)


stepped = one_by_one(query, key, value)
first, state = linear(query[:, :100], key[:, :100], value[:, :100], return_state=True)
second = linear(query[:, 100:], key[:, 100:], value[:, 100:], initial_state=state)

for name, got in {
    "chunked": chunked,
    "step by step": stepped,
    "split at 100 and resumed": jnp.concatenate([first, second], 1),
}.items():
    print(f"{name:25} relative error {error(got, expected):.1e}")
    assert error(got, expected) < 1e-5

# %% [markdown]
# The gradients agree as well; the backward pass is a recurrence in the other direction and keeps no $T \times T$ matrix.


# %%
def loss(function, *inputs):
    return jnp.sum(jnp.sin(function(*inputs)))


got = jax.jit(jax.grad(functools.partial(loss, linear), argnums=(0, 1, 2)))(query, key, value)
wanted = jax.jit(jax.grad(functools.partial(loss, over_heads), argnums=(0, 1, 2)))(query, key, value)
for name, g, w in zip(("query", "key", "value"), got, wanted):
    print(f"gradient of the {name:6} relative error {error(g, w):.1e}")
    assert error(g, w) < 1e-4

# %% [markdown]
# ## The future does not leak, to the bit
#
# Here the keys and values from position 128 on are NaN. What comes before them is not close to what it was, it is the same.

# %%
poisoned = jax.jit(linear)(query, key.at[:, 128:].set(jnp.nan), value.at[:, 128:].set(jnp.nan))
clean = jax.jit(linear)(query, key, value)
assert np.array_equal(poisoned[:, :128], clean[:, :128])
print("128 outputs identical to the bit")

# %% [markdown]
# ## A language model
#
# The same function as a layer: `--model.mixer linear` on the command line, `mixer="linear"` here. The text is what every CPython carries, the
# help topics of `pydoc_data`; a token is a byte.

# %%
jax.config.update("jax_default_matmul_precision", None)  # training has no need of it
run_dir = pathlib.Path(tempfile.mkdtemp()) / "notebook"
steps = 60 if QUICK else 300
config = Config(
    model=ModelConfig(layers=2, width=128, heads=4, mixer="linear", conv_width=4),
    data=DataConfig(batch_size=8, context=64) if QUICK else DataConfig(batch_size=16, context=128),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=steps // 10),
    train=TrainConfig(
        steps=steps, run_dir=str(run_dir), eval_every=steps // 3, sample_prompt="The ", tensorboard=False
    ),
)
final = train(config, "notebook")

# %% [markdown]
# The run folder holds the metrics as a table, the samples, the checkpoints and the configuration. `python -m effattn_jax.generate` writes more text from it.

# %%
with open(run_dir / "metrics.csv") as file:
    rows = list(csv.DictReader(file))
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, style in {"train/loss": "-", "val/loss": "o"}.items():
    points = [(int(row["step"]), float(row[name]) / np.log(2)) for row in rows if row[name]]
    axes.plot(*zip(*points), style, label={"train/loss": "training", "val/loss": "validation"}[name])
axes.set(xlabel="step", ylabel="bits per byte", title=f"Linear attention on {jax.devices()[0].device_kind}")
axes.legend(frameon=False)
plt.show()
assert final["val/bits_per_byte"] < 5  # bytes at random are 8

# %%
print((run_dir / "samples.txt").read_text().split("=== step ")[-1])

# %% [markdown]
# From here: `python train.py --help` lists the presets, `WORKSPACE.md` shows where things are and how to add a mixer.
