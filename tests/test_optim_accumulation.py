"""Accumulation over calls: equal to the whole batch, counted in updates, and no NaN gets through."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from effattn_jax.optim import (
    accumulate_gradients,
    accumulate_in_momentum,
    accumulate_updates,
    lazy_updates,
    lookahead,
    mean_to_sum,
    tiger,
)
from tests.laws.checks import assert_identical
from tests.traces import counted_jit

ROWS = 84


def _problem(seed=0):
    """Masked least squares on 84 rows, a third of which count."""
    rng = np.random.default_rng(seed)
    batch = {"x": rng.normal(size=(ROWS, 5)), "y": rng.normal(size=ROWS), "m": (rng.random(ROWS) < 0.3).astype(float)}
    return {"w": rng.normal(size=5), "b": np.zeros(())}, batch


def _loss(params, batch):
    errors = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    return jnp.sum(batch["m"] * errors), jnp.sum(batch["m"])


def _mean_gradient(params, batch):
    """(gradient of the mean, weight)."""

    def mean(p):
        loss, weight = _loss(p, batch)
        return loss / jnp.maximum(weight, 1), weight

    return jax.grad(mean, has_aux=True)(params)


def _windows(optimizer, every, parts, params, batches, apply=False):
    """Parameters after windows of `parts` micro-batches for each of `batches`, and the updates made."""

    def step(carry, part):
        params, state = carry
        gradient, weight = _mean_gradient(params, part)
        if apply:
            return optimizer.apply(gradient, state, params, weight=weight), None
        updates, state = optimizer.update(gradient, state, params, weight=weight)
        return (optax.apply_updates(params, updates), state), None

    def window(carry, batch):
        cut = jax.tree.map(lambda x: jnp.stack([x[i::parts] for i in range(parts)]), batch)
        params, state = jax.lax.scan(step, carry, cut)[0]
        if parts < every:
            updates, state = optimizer.flush(state, params)
            params = optax.apply_updates(params, updates)
        return (params, state), None

    batches = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    params, state = jax.lax.scan(window, (params, optimizer.init(params)), batches)[0]
    return params, state.count


@functools.partial(jax.jit, static_argnums=0)
def _whole(optimizer, params, batches):
    state = optimizer.init(params)
    for batch in batches:
        updates, state = optimizer.update(_mean_gradient(params, batch)[0], state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_equals_the_whole_batch_in_double_precision(x64):
    """Splits 1, 3, 7 and 12, with a schedule and moments; the last as a window of 20 flushed after 12; update and apply."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.1, 0.3, 2)))
    batches, params = [_problem(seed)[1] for seed in range(2)], _problem()[0]
    cases = [(1, 1, False), (3, 3, True), (7, 7, False), (20, 12, False)]

    @jax.jit
    def all_splits(params, batches):
        return [_windows(accumulate_updates(inner, e), e, p, params, batches, apply) for e, p, apply in cases]

    expected = _whole(inner, params, batches)
    for got, count in all_splits(params, batches):
        assert count == 2
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), got, expected)


@functools.cache
def _compiled(optimizer, weighted):
    """Init and update, which is one program for calls with weights and one for calls without."""
    return jax.jit(optimizer.init), counted_jit(optimizer.update)


def _steps(optimizer, gradients, weights=None, params=None):
    """The updates of consecutive calls, and the state after each."""
    params = jax.tree.map(np.zeros_like, gradients[0]) if params is None else params
    init, update = _compiled(optimizer, weights is not None)
    state, out, before = init(params), [], len(update.traces)
    for index, gradient in enumerate(gradients):
        extra = {} if weights is None else {"weight": np.float32(weights[index])}
        updates, state = update(gradient, state, params, **extra)
        out.append((updates, state))
    # One program in all, which the conftest may have thrown away since the last test.
    assert len(update.traces) <= before + 1 and update._cache_size() <= 1
    return out


def _poisoned(place, bad):
    """Gradients of two windows of three, and the same with one entry of the first that is `bad`."""
    gradients = [np.float32(g) for g in ([1, 2], [3, 4], [5, 9])] * 2
    return gradients, [np.float32([bad, g[1]]) if i == place else g for i, g in enumerate(gradients)]


SGD_OF_3, ADAM_OF_3 = (accumulate_updates(inner, 3) for inner in (optax.sgd(1.0), optax.adam(1.0)))
ADAM_BY_WINDOW = accumulate_updates(optax.adam(1.0), 3, drop_nonfinite="window")
flush_by_window = jax.jit(ADAM_BY_WINDOW.flush)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_micro_batch_that_is_not_finite_has_weight_zero(place, bad):
    """optax.MultiSteps makes the parameters NaN at once (D4), and its accumulator for ever."""
    gradients, poisoned = _poisoned(place, bad)
    out = _steps(SGD_OF_3, poisoned)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))
    rest = [g for i, g in enumerate(gradients[:3]) if i != place]
    np.testing.assert_allclose(out[2][0], -np.mean(rest, axis=0), rtol=1e-6)
    np.testing.assert_allclose(out[5][0], -np.mean(gradients[:3], axis=0), rtol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_window_that_is_not_finite_is_no_update(place, bad):
    """Where the decision is by window: nothing of it reaches parameters and moments, and the next begins from nothing."""
    gradients, poisoned = _poisoned(place, bad)
    out = _steps(ADAM_BY_WINDOW, poisoned)
    assert not any(np.any(updates) for updates, _ in out[:5])
    assert [int(state.count) for _, state in out] == [0, 0, 0, 0, 0, 1]
    clean = _steps(ADAM_OF_3, gradients[:3])[-1]
    assert_identical((clean[0], clean[1].inner), (out[5][0], out[5][1].inner))
    weights = [1, bad, 1, 1, 1, 1]
    assert [int(state.count) for _, state in _steps(ADAM_BY_WINDOW, gradients, weights)] == [0, 0, 0, 0, 0, 1]
    updates, state = flush_by_window(_steps(ADAM_BY_WINDOW, poisoned[: place + 1])[-1][1])
    assert not np.any(updates) and state.count == 0 and state.microbatch == 0


def test_the_inner_transformation_runs_at_ends_only():
    """One that makes NaN of half a window never sees one (D5); counts are of updates (D10 of schedules)."""
    inner = optax.chain(optax.normalize_by_update_norm(), optax.scale_by_schedule(lambda count: 1.0 + count))
    out = _steps(accumulate_updates(inner, 2), [np.zeros(2, np.float32), np.float32([3, 4])] * 2)
    np.testing.assert_allclose([updates for updates, _ in out], [[0, 0], [0.6, 0.8], [0, 0], [1.2, 1.6]], rtol=1e-6)
    assert [int(state.count) for _, state in out] == [0, 1, 1, 2]
    assert [int(state.microbatch) for _, state in out] == [1, 0, 1, 0]


def test_a_window_of_weight_zero_is_no_update():
    out = _steps(accumulate_updates(optax.adam(1.0), 2), [np.ones(2, np.float32)] * 4, weights=[0, 0, 0, 3])
    assert not np.any(out[1][0]) and out[1][1].count == 0
    assert out[3][1].count == 1 and np.all(np.asarray(out[3][0]) < -0.9)


def test_every_may_follow_the_updates():
    out = _steps(accumulate_updates(optax.sgd(1.0), lambda count: count + 1), [np.float32(1)] * 6)
    assert [int(state.count) for _, state in out] == [1, 1, 2, 2, 2, 3]


def test_windows_of_one_change_no_bit():
    gradients = [np.float32([1e-3, 2.0]) * (i + 1) for i in range(3)]
    ours, plain = _steps(accumulate_updates(optax.adam(0.1), 1), gradients), _steps(optax.adam(0.1), gradients)
    assert_identical([u for u, _ in ours], [u for u, _ in plain])


def test_bfloat16_outside_float32_inside():
    """The accumulator stays float32 up to the inner transformation, which MultiSteps casts before (D6)."""
    seen = []

    def spy(updates, state, params=None):
        seen.append((updates.dtype, params.dtype))
        return updates, state

    optimizer = accumulate_updates(optax.GradientTransformation(lambda p: optax.EmptyState(), spy), 256)
    state = optimizer.init(jnp.ones(1, jnp.bfloat16))
    assert state.gradients.dtype == jnp.float32

    def body(state, gradient):
        updates, state = optimizer.update(gradient, state, jnp.ones(1, jnp.bfloat16))
        return state, updates

    gradients = np.tile(np.array([[2.0], [1.0]], jnp.bfloat16), (128, 1))
    updates = np.asarray(jax.jit(lambda *args: jax.lax.scan(body, *args)[1])(state, gradients))
    assert set(seen) == {(jnp.dtype("float32"),) * 2} and updates.dtype == jnp.bfloat16 and updates[-1, 0] == 1.5


def test_value_reaches_the_inner_transformation_as_its_mean():
    seen = optax.GradientTransformationExtraArgs(
        lambda p: optax.EmptyState(), lambda u, s, p=None, *, value, **_: (jax.tree.map(lambda g: value + 0 * g, u), s)
    )
    optimizer = accumulate_updates(seen, 2)
    (init, update), zero = _compiled(optimizer, True), np.float32(0)
    state = init(zero)
    for value, weight in [(1.0, 3), (5.0, 1)]:
        updates, state = update(zero, state, zero, weight=weight, value=value)
    assert updates == 2.0


def test_restored_at_every_microbatch_it_goes_on_to_the_bit(tmp_path):
    """All places of a window of three in one Orbax checkpoint."""
    import orbax.checkpoint as ocp

    optimizer = accumulate_updates(optax.adamw(0.1), 3)
    gradients = [np.float32([1e-3, 2.0]) * (i + 1) for i in range(6)]
    out = _steps(optimizer, gradients)
    states = {str(i): state for i, (_, state) in enumerate(out[:4])}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.device_put(jax.tree.map(np.zeros_like, states)))
    update = jax.jit(optimizer.update)
    for start in range(4):
        state = restored[str(start)]
        for index in range(start + 1, 6):
            updates, state = update(gradients[index], state, np.zeros(2, np.float32), weight=1.0)
            jax.tree.map(np.testing.assert_array_equal, (updates, state), out[index])


@pytest.mark.parametrize("order", ["lookahead outside", "lookahead inside"])
def test_lookahead_counts_updates(order):
    """D10: windows of three, a pull every second update, at micro-batch 6 only, after which fast is slow to the bit."""
    outside, sgd = order == "lookahead outside", optax.sgd(0.1)
    optimizer = lookahead(accumulate_updates(sgd, 3), 2) if outside else accumulate_updates(lookahead(sgd, 2), 3)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jnp.array([1.0, 3.0]), state, params)
        return optax.apply_updates(params, updates), state

    params, seen = np.float32([1.0, -2.0]), []
    state = jax.jit(optimizer.init)(params)
    for _ in range(6):
        params, state = step(params, state)
        seen.append(params)
    np.testing.assert_array_equal(seen[1], [1.0, -2.0])
    np.testing.assert_allclose(seen[4], [0.9, -2.3], rtol=1e-6)
    np.testing.assert_allclose(seen[5], [0.9, -2.3], rtol=1e-6)  # half of two steps
    np.testing.assert_array_equal(seen[5], (state if outside else state.inner).slow)


def test_lazy_rows_are_decided_for_the_window():
    """A row that any micro-batch reads moves once, at the end; others have neither step nor decay."""
    optimizer = accumulate_updates(lazy_updates(optax.adamw(0.1, weight_decay=0.1)), 2)
    rows = [np.float32([[i == 0] * 2, [i == 1] * 2, [0, 0]]) for i in range(2)]
    (first, _), (second, _) = jax.device_get(_steps(optimizer, rows, params=np.ones((3, 2), np.float32)))
    assert not np.any(first) and np.all(second[:2] < 0) and not np.any(second[2])


def test_flush_between_windows_gives_zeros():
    optimizer = accumulate_updates(optax.adam(1.0), 2)
    state = _compiled(optimizer, False)[0](np.zeros(2, np.float32))
    updates, after = jax.jit(optimizer.flush)(state, np.zeros(2, np.float32))
    assert not np.any(updates)
    jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize("drop_nonfinite", ["microbatch", "window"])
@pytest.mark.parametrize("reduce_at_end", [False, True])
@pytest.mark.parametrize("mapped", ["shard_map", "pmap"])
def test_each_devices_own_gradients(mapped, reduce_at_end, drop_nonfinite):
    """The mean over devices and micro-batches by weight, one of them not finite. Counters stay in step (D7)."""
    options = {"axis_name": "data", "reduce_at_end": reduce_at_end, "drop_nonfinite": drop_nonfinite}
    optimizer = accumulate_updates(optax.sgd(1.0), 3, **options)

    def run(params, gradients, weights):
        def body(carry, inputs):
            params, state = carry
            updates, state = optimizer.update(inputs[0][0], state, params, weight=inputs[1][0])
            return (optax.apply_updates(params, updates), state), None

        params, state = jax.lax.scan(body, (params, optimizer.init(params)), (gradients, weights))[0]
        return params, state.count

    rng = np.random.default_rng(0)
    gradients, weights = rng.normal(size=(3, 4, 2)).astype(np.float32), rng.integers(1, 9, (3, 4)).astype(np.float32)
    clean = weights.copy()
    clean[1, 2] = 0
    expected = -np.einsum("kd,kdi->i", clean, gradients) / clean.sum() * (drop_nonfinite == "microbatch")
    gradients[1, 2, 0] = np.nan
    if mapped == "pmap":
        run = jax.pmap(run, axis_name="data", in_axes=(None, 1, 1), devices=jax.devices()[:4])
        gradients, weights = gradients[:, :, None], weights[:, :, None]
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        split = (jax.P(), jax.P(None, "data"), jax.P(None, "data"))
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=jax.P()))
    params, count = run(np.zeros(2, np.float32), gradients, weights)
    assert np.all(np.asarray(count) == (drop_nonfinite == "microbatch"))
    np.testing.assert_allclose(np.atleast_2d(params), np.broadcast_to(expected, np.atleast_2d(params).shape), rtol=1e-5)


def test_lowers_for_accelerators():
    optimizer = accumulate_updates(optax.adam(0.1), 2)
    params = np.zeros(2, np.float32)
    step = jax.jit(lambda g, s, p: optimizer.apply(g, s, p, weight=2.0))
    jax.export.export(step, platforms=["tpu", "cuda"])(params, jax.eval_shape(optimizer.init, params), params)


def _programs(jaxpr):
    """(the text of all scans inside, the text without them)."""
    inside, outside = "", ""
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
        if equation.primitive.name == "scan":
            inside += str(equation)
        elif inner:
            for found in inner:
                more = _programs(getattr(found, "jaxpr", found))
                inside, outside = inside + more[0], outside + more[1]
        else:
            outside += str(equation)
    return inside, outside


def test_accumulate_gradients_reduces_once_and_carries_metrics():
    params, batch = jax.tree.map(np.float32, _problem())
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def loss_fn(params, batch):
        return *_loss(params, batch), {"rows": jnp.sum(batch["m"] > 0), "y": jnp.sum(batch["m"] * batch["y"])}

    step = accumulate_gradients(loss_fn, 3, axis_name="data")
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P()))
    (loss, metrics), gradients = step(params, batch)
    (total, weight), (expected, _) = jax.jit(lambda *args: (_loss(*args), _mean_gradient(*args)))(params, batch)
    np.testing.assert_allclose(loss, total / weight, rtol=1e-5)
    np.testing.assert_allclose(metrics["rows"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["y"], np.sum(batch["m"] * batch["y"]) / weight, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)
    inside, outside = _programs(jax.make_jaxpr(step)(params, batch).jaxpr)
    assert "psum" in outside and inside and "psum" not in inside


def test_mean_to_sum_keeps_the_weights():
    params, batch = jax.tree.map(np.float32, _problem())

    def mean(p, part):
        loss, weight = _loss(p, part)
        return loss / jnp.maximum(weight, 1), weight

    ways = accumulate_gradients(mean_to_sum(mean), 7), accumulate_gradients(_loss, 1)
    (loss, gradients), (expected, reference) = jax.jit(lambda *args: [way(*args) for way in ways])(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["w"], reference["w"], rtol=1e-5, atol=1e-6)


PLAIN = accumulate_in_momentum(optax.identity(), 3, 0.8)


def test_momentum_without_a_buffer(x64):
    """Su 8634: SGD with momentum and its sign, on the mean of 3, at 1e-12; m is optax.trace's times 1 - decay."""
    rng = np.random.default_rng(1)
    gradients = list(rng.normal(size=(12, 4)))
    means = [sum(gradients[i : i + 3]) / 3 for i in range(0, 12, 3)]
    signs = accumulate_in_momentum(optax.scale_by_sign(), 3, 0.8)
    for inner, accumulated in ((optax.identity(), PLAIN), (optax.scale_by_sign(), signs)):
        small = _steps(accumulated, gradients)
        large = _steps(optax.chain(optax.ema(0.8, debias=False), inner), means)
        for index, (updates, _) in enumerate(small):
            expected = large[index // 3][0] if index % 3 == 2 else 0 * gradients[0]
            np.testing.assert_allclose(updates, expected, rtol=1e-12, atol=1e-15)
    small = _steps(accumulate_in_momentum(tiger(0.1, beta=0.0), 3, 0.8), gradients, params=np.ones(4))
    large = _steps(tiger(0.1, beta=0.8), means, params=np.ones(4))
    np.testing.assert_allclose(small[-1][0], large[-1][0], rtol=1e-12)
    trace = np.asarray(_steps(optax.trace(0.8), means)[-1][0])
    np.testing.assert_allclose(0.2 * trace, _steps(PLAIN, gradients)[-1][0])


def test_momentum_survives_a_bad_micro_batch():
    out = _steps(accumulate_in_momentum(optax.identity(), 2, 0.5), np.float32([[np.nan, 1], [1, 1]]))
    np.testing.assert_array_equal(out[1][0], [0.25, 0.25])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match='drop_nonfinite must be "microbatch" or "window", got \'step\''):
        accumulate_updates(optax.sgd(1.0), 2, drop_nonfinite="step")
    with pytest.raises(ValueError, match="every must be a positive integer"):
        accumulate_updates(optax.sgd(1.0), 0)
    with pytest.raises(ValueError, match="decay must be in"):
        accumulate_in_momentum(optax.identity(), 2, 1.0)
    with pytest.raises(ValueError, match="loss_fn must return"):
        accumulate_gradients(lambda p, b: jnp.sum(p), 2)(jnp.zeros(1), jnp.zeros(2))
