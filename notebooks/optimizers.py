# %% [markdown]
# # Optimizers as chains, and what each part does
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# Everything in `effattn_jax.optim` is an optax transformation, a schedule, or a wrapper of a loss: pure functions that go into one chain. This notebook
# takes the parts one by one; each claim stands in an assertion that runs. It needs no data, and runs in under a minute on a CPU.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from effattn_jax import optim

# For the comparisons: a TPU would round the factors of a product to bfloat16.
jax.config.update("jax_default_matmul_precision", "float32")
STEPS = 200 if os.environ.get("QUICK") else 1000

# %% [markdown]
# A problem small enough to look into: a two-layer network learns another one, from batches with noise in them.

# %%
rng = np.random.default_rng(0)
shapes = {"up": {"kernel": (8, 32), "bias": (32,)}, "down": {"kernel": (32, 4), "bias": (4,)}}
draw = lambda scale: jax.tree.map(  # noqa: E731
    lambda s: jnp.asarray(scale * rng.normal(size=s) / np.sqrt(s[0]), jnp.float32),
    shapes,
    is_leaf=lambda s: isinstance(s, tuple),
)
params, teacher = draw(1.0), draw(2.0)


def apply(p, x):
    return jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"] + p["down"]["bias"]


def batch_of(key, rows=64):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (rows, 8))
    return {"x": x, "y": apply(teacher, x) + 0.3 * jax.random.normal(keys[1], (rows, 4))}


def loss_fn(p, batch):
    return jnp.mean((apply(p, batch["x"]) - batch["y"]) ** 2)


def train(optimizer, steps=STEPS, start=params, loss=loss_fn, log=lambda p, s: ()):
    """Losses, whatever `log` reads from parameters and state at each step, and the last two."""

    def step(carry, key):
        p, state = carry
        value, gradients = jax.value_and_grad(loss)(p, batch_of(key))
        updates, state = optimizer.update(gradients, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), (value, log(p, state))

    keys = jax.random.split(jax.random.key(0), steps)
    last, (losses, logged) = jax.jit(lambda s: jax.lax.scan(step, s, keys))((start, optimizer.init(start)))
    return losses, logged, last


def plots(**curves):
    figure, axes = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
    for name, values in curves.items():
        axes.plot(np.asarray(values), label=name.replace("_", " "), linewidth=1)
    axes.set(xlabel="step")
    axes.legend(frameon=False)
    return figure, axes


# %% [markdown]
# ## Clipping: hard and soft
#
# $$\text{hard: } g \min(1, c / |g|) \qquad \text{soft: } g\, \frac{c}{|g| + c}$$
#
# Where curvature grows with the gradient, $|f''| \le L_0 + L_1 |f'|$, the best step of gradient descent is $1 / (L_0 + L_1 |f'|)$: that *is* soft clipping, with
# learning rate $1/L_0$ and $c = L_0/L_1$. On $x^4$, which is (16, 1)-smooth:


# %%
def updates_needed(optimizer):
    """From x = 10 until |f'| <= 1e-3."""

    def step(carry):
        x, state, count = carry
        updates, state = optimizer.update(4 * x**3, state, x)
        return x + updates, state, count + 1

    start = (jnp.array(10.0), optimizer.init(jnp.array(10.0)), 0)
    return int(jax.jit(lambda s: jax.lax.while_loop(lambda c: 4 * jnp.abs(c[0]) ** 3 > 1e-3, step, s))(start)[2])


needed = {
    "gradient descent, 1 / L": updates_needed(optax.sgd(1 / 1200)),
    "hard clipping": updates_needed(optax.chain(optim.clip_by_global_norm(16.0), optax.sgd(1 / 160))),
    "soft clipping": updates_needed(optax.chain(optim.soft_clip_by_global_norm(16.0), optax.sgd(1 / 16))),
}
assert needed["soft clipping"] < needed["hard clipping"] / 9 < needed["gradient descent, 1 / L"] / 60
needed

# %% [markdown]
# ## What goes through a chain can be read
#
# `log_norms` keeps the norms of what passes in the state, from the first step on, so that a scan over steps keeps its types. A batch with an infinite loss is
# skipped as a whole: moments and schedules never see it.

# %%
chain = optim.skip_nonfinite(
    optax.chain(
        optim.log_norms("gradients"),
        optim.clip_by_global_norm(1.0),
        optim.in_float32(
            optax.adamw(optim.piecewise_linear_schedule({20: 0.02, STEPS: 0.0}), mask=optim.exclude("bias"))
        ),
        optim.log_norms("updates"),
    )
)
losses, norms, (adam_params, state) = train(chain, log=lambda p, s: optim.logged_norms(s))
plots(**norms)[1].set_yscale("log")

# %%
bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params)
updates, after = chain.update(bad, state, params)
assert not any(np.any(u) for u in jax.tree.leaves(updates))
assert int(after.skipped) == 1 and int(after.count) == STEPS
assert losses[-20:].mean() < 0.5 * losses[:20].mean()

# %% [markdown]
# ## Amos: scales from names, slots of a value a column, a decay of its own
#
# Amos moves a leaf in proportion to the scale $\eta$ at which its entries should end, and lets step and weight decay fall as it gets there. Scales and slots
# are read from names and shapes:

# %%
print(optim.amos_table(params))

# %% [markdown]
# The state `b` grows, and with it the learning rate falls as $1 / (1 + \tfrac14 \sqrt{\xi \eta}\, b)$, though $\xi$ is constant.

# %%
amos_losses, decay, (_, amos_state) = train(
    optim.amos(0.1, beta=0.98, momentum=0.9),
    log=lambda p, s: 1 / (1 + 0.25 * jnp.sqrt(0.1 * 0.35) * s.b["up"]["kernel"].mean()),
)
slots = sum(x.size for x in jax.tree.leaves((amos_state.v, amos_state.b)))
assert slots < 0.25 * 2 * sum(x.size for x in jax.tree.leaves(params))
assert decay[-1] < decay[0] and amos_losses[-20:].mean() < 0.5 * amos_losses[:20].mean()
figure, axes = plots(learning_rate_factor=decay)
figure

# %% [markdown]
# ## Layer adaptation: a ratio a leaf, and what it does to zeros
#
# LAMB moves each leaf by the learning rate times its own norm. A bias that starts at zero has a ratio of 1 at first and then nearly none: after one update
# its step is smaller by the learning rate. Leave such leaves out (`exclude`), or bound the norm from below.

# %%
zeroed = params | {"down": {"kernel": params["down"]["kernel"], "bias": jnp.zeros(4)}}
ways = {
    "plain": optim.lamb(0.01),
    "bounded": optim.lamb(0.01, bounds=(1.0, 10.0)),
    "excluded": optim.lamb(0.01, trust_ratio_mask=optim.exclude("bias")),
}
moved = {
    name: train(way, 40, zeroed, log=lambda p, s: jnp.abs(p["down"]["bias"]).mean())[1] for name, way in ways.items()
}
assert moved["plain"][-1] < 0.5 * min(moved["bounded"][-1], moved["excluded"][-1])
plots(**moved)[0]

# %% [markdown]
# ## Lookahead: less variance at the same mean step
#
# Every five updates the weights are pulled half way back to slow ones. On a quadratic with noisy gradients the slow weights rest much nearer to the minimum.
# Parameters go in and come out as they are; after a pull both are equal to the bit.


# %%
def wander(optimizer, steps=2000):
    """Weights of 64 noisy quadratics, sampled at every fifth step."""

    def step(carry, key):
        w, state = carry
        updates, state = optimizer.update(w + jax.random.normal(key, w.shape), state, w)
        return (w + updates, state), w + updates

    keys = jax.random.split(jax.random.key(1), steps)
    start = jnp.ones(64)
    (w, state), path = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys))()
    return path[4::5][-200:], w, state


plain, *_ = wander(optax.sgd(0.1))
pulled, weights, looking = wander(optim.lookahead(optax.sgd(0.1), period=5, slow_step=0.5))
assert np.asarray(weights).tobytes() == np.asarray(looking.slow).tobytes()
assert pulled.var() < 0.6 * plain.var()
float(plain.var()), float(pulled.var())

# %% [markdown]
# ## Lazy rows: embeddings that a batch does not read stay where they are

# %%
table = {"embedding": jnp.ones((4, 2))}
read = {"embedding": jnp.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])}
for moments in ("frozen", "decay"):
    lazy = optim.lazy_updates(optax.adamw(0.1, weight_decay=0.1), moments=moments)
    updates, _ = jax.jit(lazy.update)(read, lazy.init(table), table)
    assert np.array_equal(np.any(np.asarray(updates["embedding"]) != 0, axis=1), [True, False, True, False])

# %% [markdown]
# ## One table for parameter groups
#
# The first rule whose regular expression is found in a leaf's path counts. A leaf without a rule, and a rule without a leaf, are errors.

# %%
rules = {
    "bias$": {"lr_multiplier": 2.0},
    "up/": {"weight_decay": 0.1, "trust_ratio": True},
    "": {"weight_decay": 0.1, "clip_norm": 1.0, "state_dtype": jnp.bfloat16},
}
print(optim.group_table(rules, params))
grouped, *_ = train(optim.parameter_groups(rules, learning_rate=0.01))
assert grouped[-20:].mean() < grouped[:20].mean()
try:
    optim.parameter_groups(rules | {"norm": {}}).init(params)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Accumulation that counts updates
#
# Twelve micro-batches of unequal weight in windows of four are three updates: the same as of three whole batches, schedule, moments and Lookahead's period
# included; a micro-batch that is not finite has weight 0.

# %%
sizes = [8, 24, 16, 16] * 3
inner = optim.lookahead(
    optax.chain(optim.clip_by_global_norm(1.0), optax.adam(optim.piecewise_linear_schedule({3: 0.1}))), period=2
)
whole = batch_of(jax.random.key(5), sum(sizes))
parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
gradient = jax.jit(jax.grad(loss_fn))
rows = lambda index: jax.tree.map(lambda x: x[index], whole)  # noqa: E731


def apply_all(optimizer, indices, bad=()):
    p, state, update = params, optimizer.init(params), jax.jit(optimizer.update)
    for number, index in enumerate(indices):
        g = gradient(p, rows(index))
        g = jax.tree.map(lambda x: x * jnp.nan, g) if number in bad else g
        options = {"weight": len(index)} if len(indices) > 3 else {}
        updates, state = update(g, state, p, **options)
        p = optax.apply_updates(p, updates)
    return p


accumulating = optim.accumulate_updates(inner, every=4)
by_parts = apply_all(accumulating, parts)
by_windows = apply_all(inner, [np.concatenate(parts[i : i + 4]) for i in (0, 4, 8)])
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), by_parts, by_windows)
assert all(np.isfinite(x).all() for x in jax.tree.leaves(apply_all(accumulating, parts, bad=(1, 6))))

# %% [markdown]
# ## Wrappers of the loss
#
# They take a loss and give a loss, so they go under any chain. Flooding keeps the loss of a batch from falling below a level.

# %%
flooded, *_ = train(optax.adam(0.02), loss=optim.flooding(loss_fn, level=0.4))
dry, *_ = train(optax.adam(0.02))
assert dry[-20:].mean() < 0.4 <= flooded.min()
plots(dry=dry, flooded=flooded)[0]
