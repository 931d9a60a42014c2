"""Naive references of the state-space models: the recurrence as it is written, one step at a time."""

import jax
import jax.numpy as jnp


def restarts(segment_ids, length):
    if segment_ids is None:
        return jnp.zeros((1, length), bool)
    return jnp.concatenate(
        [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )


def run(step, state, length, segment_ids=None, reverse=False):
    """step(state, t) -> (state, y_t) over time, from zeros at every segment; outputs (B, T, ...)."""
    ids = segment_ids[:, ::-1] if reverse and segment_ids is not None else segment_ids
    new = restarts(ids, length)

    def one(state, t):
        state = jax.tree.map(lambda s: jnp.where(new[:, t].reshape((-1,) + (1,) * (s.ndim - 1)), 0.0, s), state)
        return step(state, length - 1 - t if reverse else t)

    out = jnp.moveaxis(jax.lax.scan(one, state, jnp.arange(length))[1], 0, 1)
    return out[:, ::-1] if reverse else out


def real(y, poles):
    return 2 * y.real if jnp.iscomplexobj(poles) else y


def hold(z, method):
    """(a, gain / step)."""
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), 1 / (1 - z / 2)
    return jnp.exp(z), (jnp.exp(z) - 1) / z


def diagonal_ssm(inputs, *, Lambda, B, C, D, step, method="zoh", **options):
    u = inputs["u"]
    dt = jnp.broadcast_to(step, u.shape)[..., None]

    def one(x, t):
        a, gain = hold(dt[:, t] * Lambda[None], method)
        x = a * x + dt[:, t] * gain * B[None] * u[:, t, :, None]
        return x, real(jnp.sum(C[None] * x, -1), Lambda) + D[None] * u[:, t]

    return run(one, jnp.zeros((u.shape[0], *Lambda.shape), Lambda.dtype), u.shape[1], **options)


def dplr_ssm(inputs, *, Lambda, P, B, C, D, step, **options):
    """With the whole matrix: both halves of the spectrum, bilinear."""
    u, size = inputs["u"], Lambda.shape[1]

    def both(x):
        return jnp.concatenate([x, x.conj()], axis=1)

    L, P, B, C = map(both, (Lambda, P, B, C))
    A = jax.vmap(jnp.diag)(L) - P[:, :, None] * P.conj()[:, None]
    eye, dt = jnp.eye(2 * size)[None], step[:, None, None]
    backward = jnp.linalg.inv(eye - dt / 2 * A)
    A_bar, B_bar = backward @ (eye + dt / 2 * A), step[:, None] * jnp.einsum("dij,dj->di", backward, B)

    def one(x, t):
        x = jnp.einsum("dij,bdj->bdi", A_bar, x) + B_bar[None] * u[:, t, :, None]
        return x, jnp.sum(C[None] * x, -1).real + D[None] * u[:, t]

    return run(one, jnp.zeros((u.shape[0], u.shape[2], 2 * size), L.dtype), u.shape[1], **options)


def s5_ssm(inputs, *, Lambda, B, C, D, step, **options):
    u = inputs["u"]
    a, gain = hold(step * Lambda, "zoh")

    def one(x, t):
        x = a[None] * x + (step * gain)[None] * (u[:, t] @ B.T)
        return x, real(x @ C.T, Lambda) + D[None] * u[:, t]

    return run(one, jnp.zeros((u.shape[0], len(Lambda)), Lambda.dtype), u.shape[1], **options)


def lru(inputs, *, nu_log, theta_log, gamma_log, B, C, D, **options):
    u = inputs["u"]
    pole = jnp.exp(-jnp.exp(nu_log) + 1j * jnp.exp(theta_log))

    def one(x, t):
        x = pole[None] * x + jnp.exp(gamma_log)[None] * (u[:, t] @ B.T)
        return x, (x @ C.T).real + D[None] * u[:, t]

    return run(one, jnp.zeros((u.shape[0], len(pole)), pole.dtype), u.shape[1], **options)


def rg_lru(inputs, *, Lambda, **options):
    u, r, i = (inputs[name] for name in ("u", "recurrence_gate", "input_gate"))

    def one(h, t):
        a = jnp.exp(-8.0 * jnp.log(1 + jnp.exp(Lambda))[None] * r[:, t])
        h = a * h + jnp.sqrt(1 - a**2) * i[:, t] * u[:, t]
        return h, h

    return run(one, jnp.zeros_like(u[:, 0]), u.shape[1], **options)


def selective_scan(inputs, *, A, D, **options):
    u, delta, B, C = (inputs[name] for name in ("u", "delta", "B", "C"))

    def one(x, t):
        x = jnp.exp(delta[:, t, :, None] * A[None]) * x + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        return x, real(jnp.sum(C[:, t, None] * x, -1), A) + D[None] * u[:, t]

    return run(one, jnp.zeros((u.shape[0], *A.shape), A.dtype), u.shape[1], **options)


def mamba3_trapezoid(inputs, *, A, D, **options):
    """Without a trapezoid among the inputs it is state-space duality."""
    x, delta, B, C = (inputs[name] for name in ("x", "delta", "B", "C"))
    own = inputs.get("trapezoid", jnp.ones_like(delta))
    heads = x.shape[2]
    B, C = (jnp.repeat(y, heads // y.shape[2], axis=2) for y in (B, C))

    def one(state, t):
        S, before = state
        a = jnp.exp(delta[:, t] * A[None])[..., None, None]
        pair = B[:, t, :, :, None] * x[:, t, :, None, :]
        scaled = (delta[:, t] * (1 - own[:, t]))[..., None, None] * a
        S = a * S + scaled * before + (own[:, t] * delta[:, t])[..., None, None] * pair
        return (S, pair), jnp.einsum("bnpv,bnp->bnv", S, C[:, t]) + D[None, :, None] * x[:, t]

    zero = jnp.zeros((x.shape[0], heads, B.shape[-1], x.shape[-1]), x.dtype)
    return run(one, (zero, zero), x.shape[1], **options)


STATE_SPACE_REFERENCES = {
    "diagonal_ssm": diagonal_ssm,
    "dplr_ssm": dplr_ssm,
    "s5_ssm": s5_ssm,
    "lru": lru,
    "rg_lru": rg_lru,
    "selective_scan": selective_scan,
    "state_space_duality": mamba3_trapezoid,
    "mamba3_trapezoid": mamba3_trapezoid,
}
