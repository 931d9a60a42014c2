"""Wrappers of losses: what their sources say of them, second derivatives through the kernels, and several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from effattn_jax.attention import dot_product_attention, linear_attention
from effattn_jax.optim import (
    accumulate_gradients,
    accumulate_updates,
    fgm,
    flooding,
    gradient_penalty,
    hidden_noise,
    implicit_gradient_regularization,
    input_noise,
    label_noise,
    lazy_updates,
    mean_to_sum,
    pgd,
    scale_by_flooding,
    sharpness_aware,
    virtual_adversarial,
    weight_noise,
)
from tests.laws.checks import assert_close


def _slopes(errors):
    """Orders of convergence of errors at steps that halve."""
    return np.log2(np.asarray(errors)[:-1] / np.asarray(errors)[1:])


def _toy(theta):
    """Barrett and Dherin's: (0.6 - ab)^2 / 2."""
    return 0.5 * (0.6 - theta[0] * theta[1]) ** 2


# ---------------------------------------------------------------- penalties


def test_gradient_descent_follows_the_modified_flow(x64):
    """Local errors of one step: order 2 from the flow of L, order 3 from the flow of L + h/4 |dL|^2."""
    start = jnp.array([2.8, 3.5])

    @jax.jit
    def errors(h):
        def flow(loss, pieces=8):
            def velocity(theta):
                return -h / pieces * jax.grad(loss)(theta)

            def runge_kutta(theta, _):
                a = velocity(theta)
                b = velocity(theta + a / 2)
                c = velocity(theta + b / 2)
                return theta + (a + 2 * b + 2 * c + velocity(theta + c)) / 6, None

            return jax.lax.scan(runge_kutta, start, None, length=pieces)[0]

        step = start - h * jax.grad(_toy)(start)
        losses = (_toy, implicit_gradient_regularization(_toy, h / 4))
        return jnp.stack([jnp.linalg.norm(step - flow(loss)) for loss in losses])

    plain, modified = np.stack([errors(h) for h in (4e-4, 2e-4, 1e-4)]).T
    np.testing.assert_allclose(_slopes(plain), 2, atol=0.05)
    np.testing.assert_allclose(_slopes(modified), 3, atol=0.05)


def test_penalty_on_a_quadratic(x64):
    """L = x^T A x / 2: the penalised gradient is A x + c A^2 x, by two derivatives and by differences of first ones."""
    a = np.random.default_rng(0).normal(size=(4, 4))
    a, x = a + a.T, np.arange(4.0) - 1.3

    def loss_fn(params, b):
        return 0.5 * params["x"] @ b @ params["x"], {"half": params["x"] / 2}

    @jax.jit
    def values(params, b):
        penalised = [gradient_penalty(loss_fn, "^x$", 0.3, step=step) for step in (None, 0.1)]
        by_input = gradient_penalty(loss_fn, 1, 2.0)(params, b)[0]
        return [jax.value_and_grad(loss, has_aux=True)(params, b) for loss in penalised], by_input

    penalised, by_input = values({"x": x}, a)
    for (value, aux), gradient in penalised:
        np.testing.assert_allclose(value, 0.5 * x @ a @ x + 0.15 * np.sum((a @ x) ** 2), rtol=1e-12)
        np.testing.assert_allclose(gradient["x"], a @ x + 0.3 * a @ a @ x, rtol=1e-9)
        np.testing.assert_allclose(aux["half"], x / 2)
    # dL/dA = x x^T / 2
    np.testing.assert_allclose(by_input, 0.5 * x @ a @ x + np.sum(x**2) ** 2 / 4, rtol=1e-12)


def test_one_descent_and_one_ascent(x64):
    """Flooding around its level: theta - e^2/2 d|g|^2 + O(e^3), in either order (Su 7643)."""
    start = np.array([0.7, -0.4])

    def loss(theta):
        return jnp.sum(jnp.sin(theta) ** 2) + theta[0] * theta[1] ** 2

    @jax.jit
    def error(e, first):
        theta = jnp.asarray(start)
        for sign in (first, -first):  # the level above, then below
            theta = theta - e * jax.grad(flooding(loss, loss(theta) - sign))(theta)
        penalty = jax.grad(lambda t: jnp.sum(jax.grad(loss)(t) ** 2))(start)
        return jnp.linalg.norm(theta - (start - e**2 / 2 * penalty))

    for first in (1.0, -1.0):
        np.testing.assert_allclose(_slopes([error(e, first) for e in (4e-3, 2e-3, 1e-3)]), 3, atol=0.05)


def test_flooding_at_the_level():
    value, gradient = jax.jit(jax.value_and_grad(flooding(lambda w: (w**2, "aux")[0], 4.0)))(2.0)
    assert value == 4.0 and gradient == 0.0  # jnp.abs would descend
    assert flooding(lambda w: (w, "aux"), 1.0)(0.25) == (1.75, "aux")


def test_flooding_of_a_window_is_that_of_the_whole_batch():
    """Parts on both sides of the level: the mean of the window decides, once."""
    optimizer = accumulate_updates(optax.chain(scale_by_flooding(1.0), optax.sgd(1.0)), 2)
    params = np.float32(0)
    state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
    for loss, gradient in [(0.5, 1.0), (2.5, 3.0)]:
        updates, state = update(gradient, state, params, value=loss)
    assert updates == -2.0
    with pytest.raises(ValueError, match="needs the loss"):
        scale_by_flooding(1.0).update(params, optax.EmptyState())


def _naive(q, k, v, linear):
    """Causal attention of one head group, token by token in matrices."""
    mask = np.tril(np.ones((q.shape[1], k.shape[1])))[None, None]
    if linear:
        scores = jnp.einsum("btnh,bsnh->bnts", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1) * mask
    else:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
        scores = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)) * mask
    return jnp.einsum("bnts,bsnv->btnv", scores / jnp.sum(scores, axis=-1, keepdims=True), v)


@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
def test_second_derivatives_through_the_kernels(x64, linear):
    """Penalties by parameters and by the input, whose gradients differentiate the kernels' own backward passes."""
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 2, 3)) for name in ("q", "k", "v")}
    x = rng.normal(size=(1, 5, 3))
    if linear:
        kernel = functools.partial(linear_attention, is_causal=True, chunk_size=2)
    else:
        kernel = functools.partial(dot_product_attention, is_causal=True, chunk_size=2, implementation="chunked")

    def loss_with(attend):
        def loss(params, x):
            return jnp.mean(jnp.tanh(attend(*(jnp.einsum("btd,dnh->btnh", x, params[name]) for name in "qkv"))) ** 2)

        return loss

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(attend, params, x):
        loss = loss_with(attend)

        def total(params, x):
            sharp = virtual_adversarial(
                lambda x: attend(*(jnp.einsum("btd,dnh->btnh", x, params[n]) for n in "qkv")), epsilon=0.5
            )
            penalties = (gradient_penalty(loss, "[qk]", 0.5), gradient_penalty(loss, 1, 0.5))
            return sum(penalty(params, x) for penalty in penalties) + sharp(x, jax.random.key(0))

        return jax.value_and_grad(total)(params, x)

    expected = gradients(lambda q, k, v: _naive(q, k, v, linear), params, x)
    assert_close(gradients(kernel, params, x), expected, 1e-9)


# ---------------------------------------------------------------- adversarial points


def _regression(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def _data(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 4)).astype(dtype), "v": rng.normal(size=4).astype(dtype)}
    return params, rng.normal(size=(8, 3)).astype(dtype), rng.normal(size=8).astype(dtype)


def test_fgm_and_pgd_equal_loops():
    params, x, y = _data()
    gradient, loss = jax.jit(jax.grad(_regression, argnums=(0, 1))), jax.jit(_regression)
    attacks = {
        "weights": fgm(_regression, "^w$", 0.5),
        "each row": fgm(_regression, 1, 0.5, per_example=True),
        "signs": fgm(_regression, 1, 0.1, norm="inf"),
        "one step": fgm(_regression, 1, 0.3),
        "steps": pgd(_regression, 1, 0.5, step_size=0.3, num_steps=4),
    }
    found = jax.jit(lambda *args: {name: attack(*args) for name, attack in attacks.items()})(params, x, y)

    g = np.asarray(gradient(params, x, y)[0]["w"])
    moved = params | {"w": params["w"] + 0.5 * g / np.linalg.norm(g)}
    np.testing.assert_allclose(found["weights"], loss(moved, x, y), rtol=1e-6)

    g = np.asarray(gradient(params, x, y)[1])
    each = 0.5 * g / np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(found["each row"], loss(params, x + each, y), rtol=1e-6)
    np.testing.assert_allclose(found["signs"], loss(params, x + np.float32(0.1) * np.sign(g), y), rtol=1e-6)

    d = np.zeros_like(x)
    for _ in range(4):
        g = np.asarray(gradient(params, x + d, y)[1])
        d = d + 0.3 * g / np.linalg.norm(g)
        d = d * min(1, 0.5 / np.linalg.norm(d))
    np.testing.assert_allclose(found["steps"], loss(params, x + d, y), rtol=1e-5)
    assert found["steps"] > found["one step"] > loss(params, x, y)


def test_fgm_on_embeddings_leaves_unused_rows_and_what_it_was_given():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 4)).astype(jnp.bfloat16)

    @jax.jit
    def attacked(table, tokens):
        seen = []

        def loss_fn(params, tokens):
            seen.append(params["embedding"])
            return jnp.sum(params["embedding"][tokens].astype(jnp.float32) ** 3)

        params = {"embedding": table, "count": 3}
        fgm(loss_fn, "embedding", 1.0)(params, tokens)
        assert params["embedding"] is table
        return seen[-1]

    seen = np.asarray(attacked(table, np.array([1, 2, 2])))
    np.testing.assert_array_equal(np.any(seen != table, axis=1), [False, True, True, False, False, False])
    assert seen.dtype == jnp.bfloat16


def test_fgm_is_a_penalty_to_first_order(x64):
    """The gradient at s + e g is that of L + e/2 |g|^2 up to e^2 (Su 7234); stopping the displacement's gradient is part of it."""
    params, x, y = _data(dtype=np.float64)

    def difference(a, b):
        return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))

    @jax.jit
    def error(e):
        perturbed = jax.grad(
            lambda p: _regression(p, x + jax.lax.stop_gradient(e * jax.grad(_regression, 1)(p, x, y)), y)
        )
        penalised = jax.grad(lambda p: _regression(p, x, y) + e / 2 * jnp.sum(jax.grad(_regression, 1)(p, x, y) ** 2))
        return difference(perturbed(params), penalised(params))

    @jax.jit
    def ours(params):
        penalised = gradient_penalty(_regression, 1, 0.02)
        attacked = fgm(_regression, 1, 0.02, norm="none")
        return difference(jax.grad(attacked)(params, x, y), jax.grad(penalised)(params, x, y))

    np.testing.assert_allclose(_slopes([error(e) for e in (0.02, 0.01, 0.005)]), 2, atol=0.1)
    assert ours(params) <= 1.01 * float(error(0.02))


def _real_parts(loss):
    """The same loss as a function of real and imaginary parts along a first axis."""
    return lambda parts: loss(parts[0] + 1j * parts[1])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: sharpness_aware(loss, 0.5),
        lambda loss: fgm(loss, "", 0.1),
        lambda loss: pgd(loss, "", 0.5, step_size=0.2, num_steps=3),
        lambda loss: gradient_penalty(loss, "", 1.0),
        lambda loss: gradient_penalty(loss, "", 1.0, step=1e-3),
    ],
)
def test_complex_arrays_are_pairs_of_real_ones(x64, wrap):
    """Value and gradient; JAX's gradient by a complex array is the conjugate of the pair's."""
    z = np.array([1 + 1j, 2 - 0.5j, 0.3j])

    def loss(z):
        return jnp.sum(jnp.abs(z - np.array([3 + 4j, 1j, -2])) ** 2) + jnp.real(z[0] * z[1] ** 2)

    both = jax.jit(
        lambda z, parts: [jax.value_and_grad(wrap(f))(x) for f, x in ((loss, z), (_real_parts(loss), parts))]
    )
    (value, gradient), pair = jax.device_get(both(z, np.stack([z.real, z.imag])))
    np.testing.assert_allclose(value, pair[0], rtol=1e-9)
    np.testing.assert_allclose(np.stack([gradient.real, -gradient.imag]), pair[1], rtol=1e-6)


def test_sharpness_aware():
    params, x, y = _data()
    gradient = jax.jit(jax.grad(_regression))
    g = jax.device_get(gradient(params, x, y))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(g)))
    moved = jax.tree.map(lambda p, g: p + np.float32(0.05) * g / norm, params, g)
    assert_close(jax.jit(jax.grad(sharpness_aware(_regression)))(params, x, y), gradient(moved, x, y), 1e-5)
    at_zero = jax.jit(jax.grad(sharpness_aware(lambda w: jnp.sum(w**2))))(np.zeros(3, np.float32))
    assert not np.any(at_zero)  # optax.contrib.sam: NaN


# ---------------------------------------------------------------- virtual adversarial directions


def _cosines(direction, top):
    d = direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-30)
    return float(np.mean(np.abs(np.sum(d * top, axis=1))))


def test_virtual_adversarial_direction_in_float32():
    """|cos| with the Hessian's top vector rises .14, .83, .92, 1.00, over 0, 1, 2, 10 iterations."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(32, 64)) / 32**0.5, 3 * rng.normal(size=(64, 4)) / 8
    w1, w2 = w1.astype(np.float32), w2.astype(np.float32)
    x = rng.normal(size=(256, 32)).astype(np.float32)

    def last_point(x, count):
        seen = []

        def logits(x):
            seen.append(x)
            return jnp.tanh(x @ w1) @ w2

        virtual_adversarial(logits, epsilon=1.0, num_iterations=count)(x, jax.random.key(1))
        return seen[-1]

    hidden = np.tanh(x @ w1)
    jacobian = np.einsum("bk,dk,kc->bcd", 1 - hidden**2, w1, w2)
    p = np.exp(hidden @ w2)
    p /= p.sum(axis=-1, keepdims=True)
    middle = p[:, :, None] * np.eye(4) - p[:, :, None] * p[:, None, :]  # diag(p) - p p^T
    top = np.linalg.eigh(jacobian.swapaxes(1, 2) @ middle @ jacobian)[1][:, :, -1]
    points = jax.jit(lambda x: [last_point(x, count) for count in (0, 1, 2, 10)])(x)
    found = [_cosines(np.asarray(point) - x, top) for point in points]
    np.testing.assert_allclose(found, [0.14, 0.83, 0.92, 1.0], atol=0.025)


def test_virtual_adversarial_loss():
    params, x, _ = _data()

    def loss(params, x, batch_axes=1):
        def logits(x):
            return jnp.tanh(x @ params["w"])

        return virtual_adversarial(logits, epsilon=0.5, batch_axes=batch_axes)(x, jax.random.key(0))

    both = jax.jit(lambda params, x: (jax.value_and_grad(loss)(params, x), loss(params, x, batch_axes=0)))
    (by_row, gradient), together = both(params, x)
    assert by_row > 0 and np.all(np.isfinite(gradient["w"]))
    assert by_row > together > 0  # one length for all rows together is a shorter way
    (flat, _), _ = both(jax.tree.map(np.zeros_like, params), x)
    assert flat == 0  # a flat function: nothing is NaN
    with pytest.raises(ValueError, match="x must be floating"):
        loss(params, np.arange(3))


# ---------------------------------------------------------------- noise


def test_small_noise_is_a_laplacian():
    """E L(x + s n) = L + s^2/2 tr d2L/dx2, for inputs and for weights."""
    w, x = 2.0, np.array([0.3, -0.7])

    def loss(w, x):
        return jnp.sum(jnp.sin(w * x) ** 2) + w * x[0] * x[1]

    @jax.jit
    def rises(x):
        keys = jax.random.split(jax.random.key(0), 1 << 15)
        noisy = [
            jax.vmap(lambda key, n=noise: n(loss, 0.1)(w, x, key=key))(keys) for noise in (input_noise, weight_noise)
        ]
        return jnp.mean(jnp.stack(noisy), axis=1) - loss(w, x)

    # The second derivatives of sin(w x)^2 are 2 cos(2 w x) times w^2 and x^2; the product has none.
    laplacians = [np.sum(2 * np.cos(2 * w * x) * factor**2) for factor in (w, x)]
    np.testing.assert_allclose(rises(x), 0.005 * np.array(laplacians), rtol=0.2, atol=3e-4)


def test_label_noise_is_smoothing():
    log_p = np.array([2.0, 0.0, -1.0, 0.5], np.float32)
    log_p -= np.log(np.sum(np.exp(log_p)))
    labels = np.where(np.arange(1 << 16) % 8 == 7, -1, 2)

    def loss(log_p, _, labels):
        return jnp.sum(jnp.where(labels >= 0, -log_p[labels], 0)) / jnp.sum(labels >= 0)

    mean = jax.jit(label_noise(loss, 0.2, 4))(log_p, None, labels, key=jax.random.key(0))
    np.testing.assert_allclose(mean, -0.8 * log_p[2] - 0.05 * np.sum(log_p), rtol=5e-3)


def test_kinds_of_noise_keep_the_mean_and_keys_differ():
    x = np.full(1 << 14, 2.0, jnp.bfloat16)
    nested = weight_noise(input_noise(lambda w, x: (w, x), 1.0), 1.0, forward_key=True)

    @jax.jit
    def draw(x, zeros, key):
        of_kinds = [hidden_noise(x, key, 0.3, kind=kind) for kind in ("gaussian", "uniform", "dropout")]
        return of_kinds, nested(zeros, zeros, key=key)

    of_kinds, (w, other) = jax.device_get(draw(x, np.zeros(4, np.float32), jax.random.key(0)))
    for noisy in of_kinds:
        assert noisy.dtype == x.dtype and np.std(np.asarray(noisy, np.float32)) > 0.1
        np.testing.assert_allclose(np.mean(np.asarray(noisy, np.float32)), 2.0, rtol=0.03)
    assert np.all(w != 0) and np.all(other != 0) and np.all(w != other)


# ---------------------------------------------------------------- composition

WRAPPERS = {
    "flooding": lambda loss, axis: flooding(loss, 1e3, axis_name=axis),
    "implicit_gradient_regularization": lambda loss, axis: implicit_gradient_regularization(loss, 0.1, axis_name=axis),
    "penalty by weights": lambda loss, axis: gradient_penalty(loss, "v", 0.3, axis_name=axis),
    "penalty by inputs": lambda loss, axis: gradient_penalty(loss, 1, 0.3, axis_name=axis),
    "penalty by differences": lambda loss, axis: gradient_penalty(loss, "w", 0.3, step=1e-2, axis_name=axis),
    "fgm on weights": lambda loss, axis: fgm(loss, "w", 0.5, axis_name=axis),
    "fgm on inputs": lambda loss, axis: fgm(loss, 1, 0.5, axis_name=axis),
    "pgd on inputs": lambda loss, axis: pgd(loss, 1, 0.5, num_steps=2, axis_name=axis),
    "sharpness_aware": lambda loss, axis: sharpness_aware(loss, axis_name=axis),
}


def _all_wrappers(axis):
    def values_and_gradients(params, x, y):
        out = {}
        for name, wrapper in WRAPPERS.items():
            inside = params if axis is None else jax.tree.map(lambda p: p + 0 * jax.lax.axis_index(axis), params)
            out[name] = jax.value_and_grad(wrapper(_regression, axis))(inside, x, y)
        return out if axis is None else jax.lax.pmean(out, axis)

    return values_and_gradients


_on_one_device = jax.jit(_all_wrappers(None))


@pytest.mark.parametrize("mapped", ["shard_map", "pmap"])
def test_four_devices_equal_one(mapped):
    """Each device has a part of the batch; values and gradients are those of the whole batch."""
    params, x, y = _data()
    expected = _on_one_device(params, x, y)
    if mapped == "pmap":
        cut = (x.reshape(4, 2, 3), y.reshape(4, 2))
        got = jax.pmap(_all_wrappers("d"), axis_name="d", in_axes=(None, 0, 0), devices=jax.devices()[:4])(params, *cut)
        got = jax.tree.map(lambda leaf: np.asarray(leaf)[3], got)
    else:
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        specs = (jax.P(), jax.P("d"), jax.P("d"))
        got = jax.jit(jax.shard_map(_all_wrappers("d"), mesh=mesh, in_specs=specs, out_specs=jax.P()))(params, x, y)
    for name in WRAPPERS:
        assert_close(got[name], expected[name], 2e-3 if "differences" in name else 2e-5, name)


def test_accumulated_wrappers_are_the_mean_of_the_parts():
    params, x, y = _data()
    wrappers = {name: wrapper for name, wrapper in WRAPPERS.items() if "by differences" not in name}

    @jax.jit
    def both(params, x, y):
        ours, loops = {}, {}
        for name, wrapper in wrappers.items():
            wrapped = wrapper(_regression, None)

            def mean(p, batch, wrapped=wrapped):
                return wrapped(p, *batch), batch[0].shape[0]

            ours[name] = accumulate_gradients(mean_to_sum(mean), 2)(params, (x, y))[1]
            parts = [jax.grad(wrapped)(params, x[i::2], y[i::2]) for i in range(2)]
            loops[name] = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
        return ours, loops

    assert_close(*both(params, x, y), 1e-5)


def test_strengths_may_be_traced():
    """Annealed inside a program."""
    step = jax.jit(lambda e, w: fgm(lambda w: jnp.sum(w**2), "", e)(w) + hidden_noise(w, jax.random.key(0), e).sum())
    np.testing.assert_allclose(step(0.0, np.array([3.0, 4.0], np.float32)), 32.0)


def test_flooding_leaves_integers_alone():
    flood = scale_by_flooding(5.0)
    updates = {"w": np.ones(1, np.float32), "n": np.int32(7)}
    updates, _ = jax.jit(flood.update)(updates, flood.init(None), value=1.0)
    assert updates["w"] == -1 and updates["n"] == 7


def test_errors_name_the_argument():
    params, x, y = _data()
    with pytest.raises(
        ValueError, match=r"select='u' matches no floating leaf of argument 0, which has the paths \['v', 'w'\]"
    ):
        fgm(_regression, "u", 1.0)(params, x, y)
    with pytest.raises(ValueError, match="select=5 names argument 5"):
        gradient_penalty(_regression, 5, 1.0)(params, x, y)
    for make, match in [
        (lambda: fgm(_regression, "w", -1.0), "epsilon must not be negative"),
        (lambda: fgm(_regression, "w", 1.0, norm="l1"), "norm must be one of"),
        (lambda: pgd(_regression, "w", 1.0, num_steps=0), "pgd needs"),
        (lambda: sharpness_aware(_regression, -1.0), "radius must not be negative"),
        (lambda: virtual_adversarial(_regression, epsilon=1.0, num_iterations=-1), "epsilon and num_iterations"),
        (lambda: input_noise(_regression, 1.0, kind="dropout"), "below 1 for dropout"),
        (lambda: hidden_noise(jnp.ones(2), jax.random.key(0), 1.0, kind="pink"), "kind must be one of"),
        (lambda: hidden_noise(jnp.arange(2), jax.random.key(0), 1.0), "x must be floating"),
        (lambda: virtual_adversarial(_regression, epsilon=1.0, batch_axes=-1), "batch_axes must be"),
        (lambda: label_noise(_regression, 2.0, 4), "rate must be in"),
        (lambda: label_noise(_regression, 0.5, 0), "num_classes must be positive"),
        (
            lambda: label_noise(_regression, 0.5, 4, argument=5)(params, x, y, key=jax.random.key(0)),
            "argument must be the place",
        ),
        (lambda: label_noise(_regression, 0.5, 4)(params, x, y, key=jax.random.key(0)), "labels must be integers"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()


def test_lazy_slots_of_parameters_that_are_called_as_slots_are():
    """A parameter `mu/w` beside `w`: each first moment follows the rows of its own."""
    params = {"mu": {"w": np.ones((2, 1), np.float32)}, "w": np.ones((2, 1), np.float32)}
    grads = {"mu": {"w": np.float32([[1], [0]])}, "w": np.float32([[0], [1]])}
    optimizer = lazy_updates(optax.adam(0.1))
    state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[1])(grads, params)
    for slots, expected in ((state[0].mu, 0.1), (state[0].nu, 0.001)):
        assert_close(slots["w"], np.array([[0.0], [expected]]), 1e-6)
        assert_close(slots["mu"]["w"], np.array([[expected], [0.0]]), 1e-6)
