"""Clipping and accumulation: exact where mathematics says so, finite everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from effattn_jax.optim import accumulate_gradients, clip_by_global_norm, global_norm


def _clip(updates, max_norm=1.0, **options):
    clip = clip_by_global_norm(max_norm, **options)
    return clip.update(updates, clip.init(updates))


# ---------------------------------------------------------------- clipping


@jax.jit
def _both_clips(tree):
    expected, _ = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())
    return expected, *_clip(tree)


@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0, 30.0])
def test_clip_equals_optax(scale):
    tree = {"a": np.float32(scale) * np.arange(6, dtype=np.float32).reshape(2, 3), "b": (np.float32(-scale),)}
    expected, updates, state = _both_clips(tree)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), updates, expected)
    np.testing.assert_allclose(state.norm, np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))), rtol=1e-6)
    np.testing.assert_allclose(state.factor, min(1.0, 1.0 / float(state.norm)), rtol=1e-6)


def test_clip_jacobian_at_zero_is_identity():
    jacobian = jax.jit(jax.jacobian(lambda g: _clip({"w": g})[0]["w"]))
    zeros = np.zeros(3, np.float32)
    np.testing.assert_array_equal(jacobian(zeros), np.eye(3))
    assert np.isfinite(jacobian(np.float32([0.6, 0.8, 0.0]))).all()
    assert np.isfinite(jax.jit(jax.grad(global_norm))({"w": zeros})["w"]).all()


def test_norm_of_many_bfloat16_leaves():
    """More than 256, where adding 1 in bfloat16 would stop."""
    leaves = [np.ones(1, jnp.bfloat16) for _ in range(260)]
    np.testing.assert_allclose(jax.jit(global_norm)(leaves), 260**0.5, rtol=1e-6)


@pytest.mark.parametrize("value", [1e30, 1e-30, 2.0**-70])
def test_norm_at_the_ends_of_the_range(value):
    norm = jax.jit(global_norm)({"w": np.full(1000, value, np.float32)})
    np.testing.assert_allclose(norm, value * 1000**0.5, rtol=1e-5)


def test_float16_that_would_overflow_is_clipped_not_zeroed():
    updates, _ = jax.jit(_clip)({"w": np.full(1000, 300.0, np.float16)})
    assert updates["w"].dtype == jnp.float16
    np.testing.assert_allclose(updates["w"], 1000**-0.5, rtol=1e-3)


def test_a_norm_that_is_not_finite_stays_visible():
    clip = jax.jit(_clip)
    updates, state = clip({"a": np.float32([1.0, np.inf]), "b": np.float32(2.0)})
    assert np.isinf(state.norm) and state.factor == 1
    np.testing.assert_array_equal(updates["a"], [1.0, np.inf])
    assert np.isnan(clip({"a": np.float32([1.0, np.nan]), "b": np.float32(2.0)})[1].norm)


def test_any_tree_passes():
    tree = {
        "none": None,
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(3.0),
        "count": np.int32(7),
        "masked": optax.MaskedNode(),
    }
    updates, state = jax.jit(_clip)(tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert updates["count"] == 7 and state.norm == 3
    assert _clip({})[1].norm == 0


def test_state_keeps_its_types_in_a_chain():
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.adam(1e-3))
    params = {"w": np.ones((2, 3), np.float32)}
    state = jax.jit(optimizer.init)(params)
    _, new = jax.jit(optimizer.update)(params, state, params)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, state, new)
    assert jax.tree.all(same)


def test_norm_is_global_over_shards():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.P("x")
    clip = jax.jit(jax.shard_map(lambda g: _clip(g, axis_name="x")[0], mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_allclose(np.linalg.norm(clip(np.ones(16, np.float32))), 1.0, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_threshold_must_be_positive(value):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_by_global_norm(value)


# ---------------------------------------------------------------- accumulation


def _loss(params, batch):
    errors = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return jnp.sum(batch["m"] * errors), jnp.sum(batch["m"])


def _problem(rows=84, seed=0):
    rng = np.random.default_rng(seed)
    batch = {"x": rng.normal(size=(rows, 5)), "y": rng.normal(size=rows), "m": (rng.random(rows) < 0.3).astype(float)}
    return {"w": rng.normal(size=5)}, batch


@pytest.mark.parametrize("parts", [1, 3, 7, 12])
def test_equals_the_whole_batch_in_double_precision(x64, parts):
    params, batch = _problem()

    def mean(p):
        loss, weight = _loss(p, batch)
        return loss / weight

    loss, gradients = jax.jit(accumulate_gradients(_loss, parts))(params, batch)
    expected, whole = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(gradients["w"], whole["w"], rtol=1e-11)


def test_equals_a_loop_in_the_same_order():
    params, batch = jax.tree.map(np.float32, _problem())
    grad = jax.jit(jax.value_and_grad(_loss, has_aux=True))
    total, weights = np.zeros(5, np.float32), []
    for part in range(4):
        (_, weight), gradient = grad(params, jax.tree.map(lambda x, i=part: x[i::4], batch))
        total, weights = total + np.asarray(gradient["w"]), [*weights, np.asarray(weight)]
    _, gradients = jax.jit(accumulate_gradients(_loss, 4))(params, batch)
    np.testing.assert_allclose(gradients["w"], total / np.sum(weights), rtol=5e-7)  # XLA may fuse the two otherwise


def test_weight_zero_gives_zero():
    params, batch = _problem()
    loss, gradients = jax.jit(accumulate_gradients(_loss, 3))(params, batch | {"m": np.zeros(84)})
    assert loss == 0 and not np.any(gradients["w"])


def test_accumulates_in_float32():
    def loss_fn(w, batch):
        return jnp.sum(w[None] * batch).astype(jnp.float32), jnp.array(1.0)

    rows = np.ones((1024, 1), jnp.bfloat16)
    _, gradient = jax.jit(accumulate_gradients(loss_fn, 1024))(np.ones(1, jnp.bfloat16), rows)
    assert gradient.dtype == jnp.float32 and gradient[0] == 1.0


def test_each_part_has_its_own_key():
    def loss_fn(w, batch, key):
        return jax.random.uniform(key) * w * jnp.sum(batch), jnp.array(1.0)

    @jax.jit
    def losses_and_draws(w, batch, key):
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        losses = [accumulate_gradients(loss_fn, parts)(w, batch, key)[0] for parts in (2, 1)]
        return losses, [jax.random.uniform(k) for k in (*keys, key)]

    (of_two, of_one), draws = losses_and_draws(np.float32(1), np.ones(2, np.float32), jax.random.key(3))
    np.testing.assert_allclose(of_two, np.mean(draws[:2]), rtol=1e-6)
    np.testing.assert_allclose(of_one, 2 * draws[2], rtol=1e-6)


def test_a_sharded_batch_stays_sharded():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, batch = jax.tree.map(np.float32, _problem(rows=16))
    sharded = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
    params_everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    step = jax.jit(accumulate_gradients(_loss, 4))
    np.testing.assert_allclose(step(params_everywhere, sharded)[1]["w"], step(params, batch)[1]["w"], rtol=1e-5)
    compiled = step.lower(params_everywhere, sharded).compile().as_text()
    assert "all-to-all" not in compiled and "all-gather" not in compiled


def test_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, batch = jax.tree.map(np.float32, _problem(rows=16))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=(jax.P(), jax.P()))
    def step(params, batch):
        def loss_fn(p, part):
            return jax.tree.map(lambda x: jax.lax.psum(x, "data"), _loss(p, part))

        return accumulate_gradients(loss_fn, 2)(params, batch)

    (_, got), (_, expected) = jax.jit(lambda *args: (step(*args), accumulate_gradients(_loss, 1)(*args)))(params, batch)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_microbatches must be a positive integer, got 0"):
        accumulate_gradients(_loss, 0)
    params, batch = _problem()
    with pytest.raises(ValueError, match="num_microbatches=5 must divide the batch axis"):
        accumulate_gradients(_loss, 5)(params, batch)
