# %% [markdown]
# # Memories of the past: HiPPO and S4
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/)
#
# A HiPPO memory is a linear system whose state holds the best approximation of everything its input has been. This notebook draws what each memory
# remembers, measures how well, and follows LegS into S4. Each claim stands beside its equation and in an assertion that runs, on a CPU in about a minute.

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

from effattn_jax import ssm

QUICK = bool(os.environ.get("QUICK"))
jax.config.update("jax_default_matmul_precision", "float32")  # a TPU would round the factors to bfloat16

T, P = 1000, 32 if QUICK else 64
s = (np.arange(T) + 0.5) / T
rng = np.random.default_rng(0)
frequencies, phases = rng.uniform(0, 5, 8), rng.uniform(0, 2 * np.pi, 8)
u = np.sin(2 * np.pi * s[:, None] * frequencies + phases).sum(1).astype(np.float32)


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


# %% [markdown]
# ## What a state remembers
#
# $$t\,x' = A x + B u \quad\text{(all of the past)} \qquad\qquad x' = A x + B u \quad\text{(a window, or a fading past)}$$
#
# $x_n(t)$ is the coefficient of the $n$-th basis function in the history of $u$. So the history can be drawn from the state, at any time: LegS keeps all of it at
# one resolution, LegT and Fourier the last window, Laguerre functions a past that fades.

# %%
window = 0.25
memories = {
    "legs": ("exact", {}, {}),
    "legt": ("zoh", {"window": window}, {"step": 1 / T}),
    "fourier": ("zoh", {"window": window}, {"step": 1 / T}),
    "lagt": ("zoh", {}, {"step": 40 / T}),
}
states = {
    name: ssm.hippo_project(u, name, P, method=method, **options, **step)
    for name, (method, options, step) in memories.items()
}
places = np.linspace(0.004, 1, 400)
figure, axes = plt.subplots(4, 3, figsize=(9, 7), sharex=True, sharey=True, layout="constrained")
for row, (name, (_, options, _)) in zip(axes, memories.items()):
    for axis, now in zip(row, (T // 3, 2 * T // 3, T)):
        age = {"legs": now / T * (1 - places), "lagt": -np.log(places) / 40}.get(name, window * (1 - places))
        axis.plot(s, u, color="0.8")
        axis.plot(now / T - age, ssm.hippo_reconstruct(states[name][now - 1], name, places, **options), lw=1)
        axis.axvline(now / T, color="0.5", lw=0.5)
        axis.set(ylim=(-7, 7), ylabel=name if axis is row[0] else "")
figure

# %% [markdown]
# ## Exactly
#
# With $u$ held between samples, LegS has a closed form at every time: $x_n = \sum_k u_k \int_{k/T}^{(k+1)/T} g_n(s)\, ds$ with the orthonormal Legendre polynomials $g_n$. `method="exact"`
# is that, with no approximation, no matrix exponential and no solve; what is left of its error is what holding the samples costs.

# %%
x = np.asarray(states["legs"][-1])
edges = np.arange(T + 1) / T
values = np.polynomial.legendre.legvander(2 * edges - 1, P)
integrals = np.concatenate([edges[:, None], (values[:, 2:] - values[:, :-2]) / (4 * np.arange(1, P) + 2)], axis=1)
closed = u.astype(np.float64) @ np.diff(integrals, axis=0) * np.sqrt(2 * np.arange(P) + 1)
assert np.abs(x - closed).max() < 5e-6 * np.abs(closed).max()

errors = {}
for method in ("exact", "bilinear", "backward"):
    last = ssm.hippo_project(u, "legs", P, method=method, final_only=True)
    errors[method] = rms(ssm.hippo_reconstruct(last, "legs", s) - u) / rms(u)
print(errors)
assert errors["exact"] < 2e-4 and 30 * errors["exact"] < errors["bilinear"] < errors["backward"]

# %% [markdown]
# The half-range cosines are another memory of all the past, whose matrix is diagonalisable: each step costs $O(P)$, and all steps can run in parallel. Like the Legendre memory's, its
# error falls with $P$ until the signal is resolved.

# %%
sizes = (4, 8, 16, 32) if QUICK else (4, 8, 16, 32, 64)
table = {}
for name in ("legs", "cosine_scaled"):
    finals = [ssm.hippo_project(u, name, size, method="exact", final_only=True) for size in sizes]
    table[name] = [rms(ssm.hippo_reconstruct(x, name, s) - u) / rms(u) for x in finals]
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name, row in table.items():
    axes.loglog(sizes, row, marker="o", label=name)
axes.set(xlabel="state size P", ylabel="relative RMS error")
axes.legend()
figure

# %%
assert np.all(np.diff(table["legs"][:4]) < 0) and table["legs"][-1] < table["cosine_scaled"][-1]

# %% [markdown]
# ## Spectra
#
# $A$ of LegS has the eigenvalues $-1, -2, \dots, -P$ and eigenvectors too ill-conditioned to use. But $A + A^\top = -I - B B^\top$: with $B B^\top / 2$ added, $A$ is normal, and
# `hippo_dplr` writes it as $V(\Lambda - P P^*)V^*$ with $V$ unitary and $\mathrm{Re}\,\Lambda = -\tfrac12$.

# %%
A, B = ssm.hippo_matrices("legs", 64)
np.testing.assert_allclose(A + A.T, -np.eye(64) - np.outer(B, B), atol=1e-10)
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
for name in ("legs", "legt", "fourier", "cosine_scaled"):
    Lambda, low_rank, _, V = ssm.hippo_dplr(name, 64)
    axes.semilogy(np.maximum(Lambda.imag, 1e-1), label=f"{name}, rank {np.atleast_2d(low_rank).shape[0]}")
    both = np.concatenate([V, V.conj()], axis=1)
    np.testing.assert_allclose(both @ both.conj().T, np.eye(64), atol=1e-10)
axes.set(xlabel="mode", ylabel="imaginary part of $\\Lambda$")
axes.legend()
figure

# %% [markdown]
# ## S4: kernels
#
# As a time-invariant system, LegS answers an impulse with exponentially warped Legendre polynomials, $e^{tA}B = e^{-t}\sqrt{2n+1}\,P_n(2e^{-t}-1)$. Discretised by the bilinear rule its kernels are
# $K_l = C \bar A^l \bar B$, which `dplr_kernel` computes from Cauchy sums in float32 with the accuracy of float64.

# %%
size, length, step = 16, 512, 0.01
Lambda, low_rank, b, V = ssm.legs_dplr(size)
rows = jnp.asarray(V.astype(np.complex64))  # one output a coefficient: C = V[n]
spread = [jnp.broadcast_to(x.astype(np.complex64), rows.shape) for x in (Lambda, low_rank, b)]
kernels = np.asarray(ssm.dplr_kernel(*spread, rows, jnp.float32(step), length))
t = step * (np.arange(length) + 0.5)
warped = (
    np.exp(-t) * (np.polynomial.legendre.legvander(2 * np.exp(-t) - 1, size - 1) * np.sqrt(2 * np.arange(size) + 1)).T
)
figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
axes.plot(t, kernels[:6].T / step)
axes.set(xlabel="t", ylabel="kernels of LegS")
figure

# %%
assert np.abs(kernels[:4] / step - warped[:4]).max() < 0.02 * np.abs(warped[:4]).max()

A, B = ssm.hippo_matrices("legs", size)
A_bar, B_bar = ssm.discretize(A, B, step)
expected, x = [], B_bar
for _ in range(length):
    expected.append(x)
    x = A_bar @ x
error = np.abs(kernels - np.stack(expected, 1)).max() / np.abs(expected).max()
print(f"float32 kernel against float64 powers: {error:.1e}")
assert error < 2e-6

# %% [markdown]
# The same parameters run as a convolution and step by step, with a state to go on from.

# %%
inputs = jnp.asarray(rng.normal(size=(1, 200, size)), jnp.float32)
arguments = (*spread, rows, None, step)
parallel = ssm.dplr_ssm(inputs, *arguments, mode="convolution")
first, state = ssm.dplr_ssm(inputs[:, :120], *arguments, mode="recurrence", return_state=True)
second = ssm.dplr_ssm(inputs[:, 120:], *arguments, mode="recurrence", initial_state=state)
np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), parallel, atol=1e-5)
