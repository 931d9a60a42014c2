"""Clipping, layer adaptation, schedules, Lookahead, lazy rows, skipped steps: equal to optax where it is right, and right where it is not.

The defects D1 ... D16 of known code are named where a test shows that ours has not got them.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from effattn_jax.optim import (
    accumulate_in_momentum,
    accumulate_updates,
    amos_schedules,
    clip_by_block_norm,
    clip_by_global_norm,
    decoupled_weight_decay,
    exclude,
    global_norm,
    in_float32,
    lamb,
    lars,
    layer_adaptation,
    lazy_updates,
    log_norms,
    logged_norms,
    lookahead,
    parameter_groups,
    piecewise_linear_schedule,
    skip_nonfinite,
    soft_clip_by_global_norm,
)

CLIPS = {"hard": clip_by_global_norm, "soft": soft_clip_by_global_norm, "block": clip_by_block_norm}
CLIPS["soft block"] = functools.partial(clip_by_block_norm, soft=True)


def once(optimizer, updates, params=None):
    """(updates, state) of the first update."""
    return optimizer.update(updates, optimizer.init(updates if params is None else params), params)


def problem(dtype=jnp.float64, steps=12, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (4, 6), "bias": (6,), "norm": {"scale": (3,)}}

    def draw(lead=()):
        return jax.tree.map(
            lambda s: rng.normal(size=(*lead, *s)).astype(dtype), shapes, is_leaf=lambda s: isinstance(s, tuple)
        )

    return draw(), draw((steps,))


def trajectory(optimizer, params, gradients):
    """Parameters after each step, and the last state, in one compiled scan."""

    @jax.jit
    def run(params, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), path = jax.lax.scan(step, (params, optimizer.init(params)), gradients)
        return path, state

    return run(params, gradients)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def mesh_of_four():
    return jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])


# ---------------------------------------------------------------- equal to optax


def optax_lookahead():
    """optax' form of it, with its doubled parameters."""
    inner = optax.lookahead(optax.adam(0.1), 3, 0.5)

    def run(params, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = inner.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params.fast

        both = optax.LookaheadParams.init_synced(params)
        return jax.lax.scan(step, (both, inner.init(both)), gradients)[1]

    return run


MASK = exclude("bias", "norm")
PAIRS = {
    "lamb": (lamb(0.1, weight_decay=0.01), optax.lamb(0.1, eps=1e-6, weight_decay=0.01)),
    "lamb, decay masked": (
        lamb(0.1, weight_decay=0.3, weight_decay_mask=MASK),
        optax.lamb(0.1, eps=1e-6, weight_decay=0.3, mask=MASK),
    ),
    "lars": (
        lars(0.1, 0.01, weight_decay_mask=MASK, trust_ratio_mask=MASK),
        optax.lars(0.1, 0.01, MASK, trust_ratio_mask=MASK),
    ),
    "adamw": (
        in_float32(optax.adamw(0.1, weight_decay=0.1, mask=MASK)),
        optax.adamw(0.1, weight_decay=0.1, mask=MASK),
    ),
    "clip": (
        optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_optax(x64, name):
    params, gradients = problem()
    ours, theirs = (trajectory(optimizer, params, gradients)[0] for optimizer in PAIRS[name])
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lookahead_equals_optax(x64):
    params, gradients = problem()
    path, state = trajectory(lookahead(optax.adam(0.1), 3, 0.5), params, gradients)
    assert_close(path, jax.jit(optax_lookahead())(params, gradients), rtol=1e-12, atol=1e-12)
    assert state.count == 12


# ---------------------------------------------------------------- clipping


@jax.jit
def _both(tree, threshold):
    hard, _ = once(clip_by_global_norm(threshold), tree)
    soft, state = once(soft_clip_by_global_norm(threshold), tree)
    return *map(global_norm, (tree, hard, soft)), state.factor, hard, soft


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=7, max_size=7), st.floats(2.0**-50, 2.0**50, width=32)
)
def test_soft_clipping_lies_between_half_and_all_of_hard_clipping(entries, threshold):
    """hard / 2 <= soft <= hard entry by entry, and the norm after soft clipping is below the threshold."""
    tree = {"a": np.array(entries[:4], np.float32).reshape(2, 2), "b": np.array(entries[4:], np.float32)}
    norm, hard_norm, soft_norm, factor, hard, soft = jax.device_get(_both(tree, np.float32(threshold)))
    slack, tiny = 1 + 1e-5, 1e-37  # below which float32 flushes to zero
    assert hard_norm <= threshold * slack and soft_norm <= threshold * slack and 0 < factor <= 1
    for h, s in zip(jax.tree.leaves(hard), jax.tree.leaves(soft)):
        h, s = np.abs(np.asarray(h, float)), np.abs(np.asarray(s, float))
        assert np.all(h / 2 <= s * slack + tiny) and np.all(s <= h * slack + tiny)


def test_soft_clipping_on_many_random_trees():
    """The same on 10^4 trees of all scales, and that half is reached at |g| = c."""
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-12, 12, (10_000, 1))
    draws = (size * rng.normal(size=(10_000, 8))).astype(np.float32)
    trees = {"a": draws[:, :6].reshape(-1, 3, 2), "b": draws[:, 6:]}
    norm, hard, soft = map(np.asarray, jax.jit(jax.vmap(lambda tree: _both(tree, 1.0)[:3]))(trees))
    assert np.all(hard / 2 <= soft * (1 + 1e-6)) and np.all(soft <= hard * (1 + 1e-6)) and np.all(soft < 1 + 1e-6)
    updates, _ = jax.jit(lambda tree: once(soft_clip_by_global_norm(5.0), tree))({"w": np.float32([3.0, 4.0])})
    np.testing.assert_allclose(updates["w"], [1.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_safe_at_both_ends(name):
    """D1: the Jacobian at 0 is the identity. D2: bfloat16 leaves are summed in float32. D3: no overflow, underflow or zeroing. D12: integers pass."""
    make = CLIPS[name]
    jacobian = jax.jit(jax.jacobian(lambda g: once(make(1.0), {"w": g})[0]["w"]))
    np.testing.assert_array_equal(jacobian(np.zeros(3, np.float32)), np.eye(3))
    assert np.isfinite(jacobian(np.float32([0.6, 0.8, 0.0]))).all()

    ends = [np.full(1000, *given) for given in ((300.0, jnp.float16), (1e20, jnp.float32), (2.0**-70, jnp.float32))]
    mixed = {"w": np.ones(4, np.float32), "count": np.int32(7), "none": None, "empty": np.zeros((0, 2), np.float32)}
    inf = np.float32([1.0, np.inf])
    beyond = np.float32([2e38, 1e38, 0.0])  # whose reciprocal is no normal number
    trees = [(0.5, {"w": np.ones(400, jnp.bfloat16)}), (1.0, mixed), (np.inf, {"w": np.float32([3.0, 4.0])})]
    trees += [(1.0, {"w": w}) for w in (inf, beyond, *ends)]
    clips = [make(threshold) for threshold, _ in trees]
    found = jax.jit(lambda trees: [once(clip, tree) for clip, tree in zip(clips, trees)])([tree for _, tree in trees])
    (half, half_state), (updates, state), (unclipped, _), (infinite, _), (longest, longest_state), *ends_found = found

    np.testing.assert_allclose(jax.tree.leaves(half_state.norm)[0], 20.0, rtol=1e-3)
    assert half["w"].dtype == jnp.bfloat16
    assert updates["count"] == 7 and updates["none"] is None and updates["count"].dtype == mixed["count"].dtype
    assert np.linalg.norm(jax.tree.leaves(state.norm)) == 2.0
    np.testing.assert_array_equal(unclipped["w"], [3.0, 4.0])
    np.testing.assert_array_equal(infinite["w"], [1.0, np.inf])
    np.testing.assert_allclose(longest["w"], np.asarray([2.0, 1.0, 0.0]) / 5**0.5, rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(longest_state.norm)[0], 5**0.5 * 1e38, rtol=1e-6)
    for given, (updates, state) in zip(ends, ends_found):
        np.testing.assert_allclose(jax.tree.leaves(state.norm)[0], float(given[0]) * 1000**0.5, rtol=1e-3)
        assert np.all(np.asarray(updates["w"]) > 0)


def steps_to_flatten_a_quartic(clip, rate):
    """Updates of gradient descent on x^4 from 10 until |f'| <= 1e-3."""
    optimizer = optax.chain(clip, optax.sgd(rate))

    def step(carry):
        x, state, count = carry
        updates, state = optimizer.update(4 * x**3, state, x)
        return x + updates, state, count + 1

    def run(x):
        return jax.lax.while_loop(lambda c: 4 * abs(c[0]) ** 3 > 1e-3, step, (x, optimizer.init(x), 0))[2]

    return int(jax.jit(run)(10.0))


def test_the_quartic(x64):
    """x^4 is (16, 1)-smooth: soft clipping at its best rate needs 509 steps, hard clipping 5,112, gradient descent 37,789."""
    l0, l1, lipschitz = 16.0, 1.0, 12 * 10.0**2
    assert steps_to_flatten_a_quartic(soft_clip_by_global_norm(l0 / l1), 1 / l0) == 509
    assert steps_to_flatten_a_quartic(clip_by_global_norm(l0 / l1), 1 / (10 * l0)) == 5112
    assert steps_to_flatten_a_quartic(optax.identity(), 1 / lipschitz) == 37789


def test_norms_and_ratios_are_those_of_the_whole_leaf_in_shard_map():
    """D11. A leaf that is the same on all devices counts once."""
    tree = {"split": np.arange(16, dtype=np.float32).reshape(8, 2) + 1, "same": np.ones(3, np.float32)}
    specs = {"split": jax.P("d"), "same": jax.P()}

    def run(tree, axis_name):
        clips = {name: once(make(1.0, axis_name=axis_name), tree)[0] for name, make in CLIPS.items()}
        ratio = once(layer_adaptation(axis_name=axis_name), tree, jax.tree.map(lambda x: 3 * x, tree))
        return clips | {"ratio": ratio[0], "ratios": ratio[1].ratio}

    out = {name: specs for name in [*CLIPS, "ratio"]} | {"ratios": {"split": jax.P(), "same": jax.P()}}
    mapped = jax.shard_map(lambda t: run(t, "d"), mesh=mesh_of_four(), in_specs=(specs,), out_specs=out)
    assert_close(*jax.jit(lambda t: (mapped(t), run(t, None)))(tree), rtol=1e-6)


def test_integer_leaves_keep_the_types_of_the_state():
    """In a scan, where optax.adam's first moment of an integer leaf becomes floating; also in windows."""
    params, gradients = problem(jnp.float32, 3)
    params, gradients = (
        tree | {"count": np.zeros((*lead, 1), np.int32)} for tree, lead in ((params, ()), (gradients, (3,)))
    )
    adam = in_float32(optax.adam(0.1))
    expected = trajectory(adam, params, gradients)[0]
    for optimizer in (lamb(0.1), parameter_groups({"": {}}), skip_nonfinite(adam), accumulate_updates(adam, 1)):
        path, _ = trajectory(optimizer, params, gradients)
        assert path["count"].dtype == jnp.int32 and not np.any(path["count"])
    assert_close(path, expected, rtol=1e-6)


def test_bounds_may_be_injected():
    injected = optax.inject_hyperparams(lambda low: layer_adaptation(bounds=(low, 10.0)))(low=2.0)
    params = {"w": np.float32([0.6, 0.8])}
    updates, _ = jax.jit(lambda p: injected.update(p, injected.init(p), p))(params)
    np.testing.assert_allclose(updates["w"], [1.2, 1.6], rtol=1e-6)


def test_devices_whose_parts_are_of_other_sizes():
    """Each device sums as its own part needs it: 0, 1e-30, an entry whose square overflows, an infinite one."""
    norm = jax.shard_map(
        lambda g: global_norm(g, axis_name="d"), mesh=mesh_of_four(), in_specs=jax.P("d"), out_specs=jax.P()
    )
    norm = jax.jit(norm)
    for parts in ([0, 0, 0, 0], [0, 1e-30, 0, 2e-30], [1e-30, 3, 0, 4], [1e19, 3e19, 1, 0], [1e30, np.inf, 1, 0]):
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(norm(np.array(parts, np.float32)), np.linalg.norm(parts), rtol=1e-6)


def test_norms_of_sharded_leaves_gather_nothing():
    sharding = jax.NamedSharding(mesh_of_four(), jax.P("d"))
    params = {"kernel": np.ones((8, 4), np.float32), "other": np.ones((4, 2), np.float32)}
    params = jax.device_put(params, sharding)
    optimizer = optax.chain(clip_by_global_norm(1.0), lamb(0.1))
    state = optimizer.init(params)
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile().as_text()
    assert "all-reduce" in compiled and "all-gather" not in compiled and "all-to-all" not in compiled


def test_norms_of_all_leaves_are_one_decision():
    """On a GPU each `cond` waits for the device: LAMB, clipping and logs have one, however many leaves."""
    params = {str(i): np.ones((2, 3), np.float32) for i in range(5)}
    for optimizer in (lamb(0.1), clip_by_global_norm(1.0), clip_by_block_norm(1.0), log_norms("g", per_leaf=True)):
        state = optimizer.init(params)
        assert str(jax.make_jaxpr(optimizer.update)(params, state, params)).count("cond[") == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_clip_by_global_norm(0.0), "threshold must be positive, got 0.0"),
        (lambda: clip_by_block_norm(-1.0), "max_norm must be positive, got -1.0"),
        (lambda: layer_adaptation(coefficient=0.0), "coefficient must be positive, got 0.0"),
        (lambda: layer_adaptation(bounds=(2.0, 1.0)), "bounds must be"),
        (lambda: layer_adaptation(bounds=(1.0,)), "bounds must be"),
        (lambda: once(layer_adaptation(), jnp.ones(1)), "layer_adaptation needs the parameters"),
        (lambda: decoupled_weight_decay(-1.0), "rate must be at least 0, got -1.0"),
        (lambda: once(decoupled_weight_decay(1.0), jnp.ones(1)), "decoupled_weight_decay needs the parameters"),
        (lambda: lookahead(optax.sgd(1.0), 0), "period must be a positive integer, got 0"),
        (lambda: lookahead(optax.sgd(1.0), 2, 0.0), "slow_step must be in"),
        (lambda: once(lookahead(optax.sgd(1.0)), jnp.ones(1)), "lookahead needs the parameters"),
        (lambda: lazy_updates(optax.sgd(1.0), moments="none"), "moments must be 'frozen' or 'decay', got 'none'"),
        (lambda: log_norms("params"), "name must be a text other than"),
        (lambda: piecewise_linear_schedule({}), "points must be a non-empty"),
        (lambda: piecewise_linear_schedule({-1: 1.0}), "points must be a non-empty"),
        (lambda: piecewise_linear_schedule({0.5: 1.0, 10: 2.0}), "whole steps from 0 to 2"),
        (lambda: piecewise_linear_schedule({2**31: 1.0}), "whole steps from 0 to 2"),
        (
            lambda: lazy_updates(accumulate_updates(optax.sgd(1.0), 2)).init(jnp.ones((2, 1))),
            "inner must step at every call",
        ),
        (
            lambda: lazy_updates(optax.MultiSteps(optax.sgd(1.0), 2)).init(jnp.ones((2, 1))),
            "inner must step at every call",
        ),
        (lambda: amos_schedules(0.0, 0.5), "alpha0 must be positive"),
        (lambda: amos_schedules(0.1, 2.0), "p must be a cosine"),
        (lambda: amos_schedules(0.1, 0.5, "other"), "law must be 'constant' or 'decaying'"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- layer adaptation and decay


def test_leaves_that_start_at_zero_keep_their_step():
    """D14: after the first update, plain LAMB moves a bias that started at 0 by a lr-th of that; with a lower bound of phi it goes on."""
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    gradients = jax.tree.map(lambda p: np.ones((4, *p.shape), p.dtype), params)

    def steps(optimizer):
        path, _ = trajectory(optimizer, params, gradients)
        return np.abs(np.diff(np.asarray(path["bias"])[:, 0], prepend=0.0))

    plain, bounded = steps(lamb(0.01)), steps(lamb(0.01, bounds=(1.0, 10.0)))
    assert plain[1] < 0.05 * plain[0]
    np.testing.assert_allclose(bounded, bounded[0], rtol=1e-4)
    masked = steps(lamb(0.01, trust_ratio_mask=exclude("bias")))
    np.testing.assert_allclose(masked, masked[0], rtol=1e-4)


@pytest.mark.parametrize("make", [lamb, lars, lambda rate: layer_adaptation(coefficient=rate)])
def test_stacked_layers_have_ratios_of_their_own(make):
    """A scan over layers is the same optimizer as layers one by one, at the ends of the range too."""
    rng = np.random.default_rng(0)
    layers = [(size * rng.normal(size=(3, 4))).astype(np.float32) for size in (1.0, 10.0, 1e-30, 1e30)]
    optimizer = make(0.1)
    stacked = {"layers": {"mlp": {"kernel": np.stack(layers)}}}
    apart = {f"layers_{i}": {"mlp": {"kernel": p}} for i, p in enumerate(layers)}
    got, expected = jax.jit(lambda *trees: [once(optimizer, tree, tree)[0] for tree in trees])(stacked, apart)
    expected = np.stack([expected[f"layers_{i}"]["mlp"]["kernel"] for i in range(4)])
    np.testing.assert_allclose(got["layers"]["mlp"]["kernel"], expected, rtol=1e-5)


def test_masks_bounds_and_ratios():
    params = {
        "a": np.float32([3.0, 4.0]),
        "b": np.float32([3.0, 4.0]),
        "zero": np.zeros(2, np.float32),
        "half": np.ones(4, jnp.bfloat16),
    }
    updates = jax.tree.map(lambda p: np.full_like(p, 0.5), params)
    bounded = layer_adaptation(mask=exclude("^b"), bounds=(0.0, 2.5), coefficient=2.0)
    masked = layer_adaptation(mask={"a": False, "b": True, "zero": True, "half": True})
    (scaled, state), (_, other) = jax.jit(lambda u, p: (once(bounded, u, p), once(masked, u, p)))(updates, params)
    ratio = {"a": 2 * 2.5 / 0.5**0.5, "b": 1.0, "zero": 1.0, "half": 2 * 2.0 / 1.0}
    assert_close(state.ratio, ratio, rtol=1e-6)
    assert scaled["half"].dtype == jnp.bfloat16
    assert_close(
        jax.tree.map(lambda u: np.asarray(u, float), scaled),
        {k: np.full(params[k].shape, 0.5 * r) for k, r in ratio.items()},
        rtol=5e-3,
    )
    assert other.ratio["a"] == 1 and other.ratio["b"] != 1


def test_moments_of_bfloat16_parameters_do_not_stall():
    params = {"w": np.ones(4, jnp.bfloat16)}
    gradients = {"w": np.ones((1000, 4), jnp.bfloat16)}
    _, state = trajectory(lamb(1e-3), params, gradients)
    nu = state[0].nu["w"]
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, 1 - 0.999**1000, rtol=1e-3)
    _, stalled = trajectory(optax.scale_by_adam(), params, gradients)
    assert np.asarray(stalled.nu["w"])[0] < 0.55


def test_decoupled_decay_follows_its_own_course(x64):
    params = {"kernel": np.ones(2), "bias": np.ones(2)}
    decay = amos_schedules(0.1, 0.5)
    optimizer = optax.chain(optax.sgd(0.0), decoupled_weight_decay(lambda t: 0.2 * decay(t), mask=exclude("bias")))
    path, _ = trajectory(optimizer, params, jax.tree.map(lambda p: np.zeros((3, 2)), params))
    expected = np.cumprod([1 - 0.2 / (0.05 * t + 1) ** 2 for t in range(3)])
    np.testing.assert_allclose(np.asarray(path["kernel"])[:, 0], expected, rtol=1e-12)
    np.testing.assert_array_equal(path["bias"], 1.0)


# ---------------------------------------------------------------- schedules


def test_piecewise_linear_is_interpolation_of_absolute_values(x64):
    """D16: from 0 it rises, and 0.1 -> 1.0 gets to 1.0. Any order, steps as text, constant behind the end."""
    points = {"30": 0.2, 10: 1.0, 100: 0.0}
    schedule = piecewise_linear_schedule(points)
    steps = np.arange(120)
    expected = np.interp(steps, [0, 10, 30, 100], [0.0, 1.0, 0.2, 0.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(steps), expected, rtol=1e-12, atol=1e-15)
    others = (
        (piecewise_linear_schedule({0: 0.1, 10: 1.0}), 10),
        (piecewise_linear_schedule({0: 1.0}), 7),
        (piecewise_linear_schedule({10: 0.5}, from_zero=False), 0),
        (piecewise_linear_schedule({2**28: 0.0, 2**28 + 4: 1.0}, from_zero=False), 2**28 + 1),
    )
    to_end, flat, before, far = jax.jit(lambda: [schedule(step) for schedule, step in others])()
    np.testing.assert_allclose([to_end, far], [1.0, 0.25])
    assert flat == 1.0 and before == 0.5


def test_amos_schedules_halve_when_they_should():
    assert abs(float(amos_schedules(1e-2, 0.5)((2**0.5 - 1) / 5e-3)) - 0.5) < 1e-6
    assert abs(float(amos_schedules(1e-2, 0.5, "decaying")(1 / 1e-2)) - 0.5) < 1e-6
    optimizer = optax.sgd(amos_schedules(1e-2, 0.5))
    np.testing.assert_allclose(once(optimizer, np.ones(1, np.float32))[0], -1.0)


# ---------------------------------------------------------------- Lookahead


def micro_steps(optimizer, gradients):
    """Scalar parameter and state after each call."""

    @jax.jit
    def run(gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            carry = (optax.apply_updates(params, updates), state)
            return carry, carry

        params = jnp.zeros(())
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    path, states = jax.device_get(run(np.float32(gradients)))
    return [(float(params), jax.tree.map(lambda x, i=i: x[i], states)) for i, params in enumerate(path)]


def test_lookahead_composes_with_what_wraps_it():
    """D8: inside MultiSteps and apply_if_finite, with extra arguments, on plain parameters."""
    wrapped = optax.MultiSteps(lookahead(optax.sgd(1.0), 2), 2)
    assert [p for p, _ in micro_steps(wrapped, [-1.0] * 4)] == [0.0, 1.0, 1.0, 1.0]
    finite = optax.apply_if_finite(lookahead(optax.sgd(1.0), 2), 3)
    assert micro_steps(finite, [-1.0, np.nan, -1.0])[-1][0] == 1.0
    polyak = lookahead(optax.polyak_sgd(), 2)
    updates, _ = jax.jit(lambda g, p: polyak.update(g, polyak.init(p), p, value=0.5))(1.0, 0.0)
    assert updates == -0.5


def test_lookahead_counts_updates_in_both_orders():
    """D10: with windows of 3 micro-steps and a period of 2, it pulls at micro-step 6, not at 2, 4 and 6; skipped steps are none."""
    inside = micro_steps(lookahead(optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation(), 2), [-1.0] * 6)
    outside = micro_steps(optax.MultiSteps(lookahead(optax.sgd(1.0), 2), 3), [-1.0] * 6)
    assert [p for p, _ in inside] == [p for p, _ in outside] == [0, 0, 1, 1, 1, 1]
    assert inside[-1][1].count == 2 and inside[-1][1].slow == 1
    for nest in (
        optax.chain,
        lambda inner: optax.named_chain(("a", inner)),
        lambda inner: optax.partition({"a": inner}, "a"),
    ):
        nested = micro_steps(lookahead(nest(accumulate_updates(optax.sgd(1.0), 3)), 2), [-1.0] * 6)
        assert nested[-1][1].count == 2
    skipping = micro_steps(lookahead(skip_nonfinite(optax.sgd(1.0)), 2), [-1.0, np.nan, -1.0, -1.0])
    assert [p for p, _ in skipping] == [1, 1, 1, 2] and skipping[-1][1].count == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fast_and_slow_weights_are_equal_to_the_bit_after_a_pull(dtype):
    """D9: after the pulls of 60 steps, on 20,000 entries, and in between they are not."""
    optimizer = lookahead(optax.adam(0.01), 5)
    params, *gradients = ({"w": w} for w in np.random.default_rng(0).normal(size=(16, 20_000)).astype(dtype))

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for number, gradient in enumerate(gradients, start=1):
        params, state = step(params, state, gradient)
        same = np.asarray(params["w"]).tobytes() == np.asarray(state.slow["w"]).tobytes()
        assert same == (number % 5 == 0), number


@pytest.mark.parametrize(
    "optimizer",
    [lookahead(optax.sgd(0.1)), accumulate_updates(optax.sgd(0.1), 2), accumulate_in_momentum(optax.sgd(0.1), 2)],
)
def test_parameters_and_state_can_be_donated_together(optimizer):
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    step = jax.jit(lambda p, s: optimizer.update(p, s, p), donate_argnums=(0, 1))
    step(params, state)


# ---------------------------------------------------------------- lazy rows


@pytest.mark.parametrize("moments", ["frozen", "decay"])
def test_lazy_rows(x64, moments):
    """Against Adam by hand on one table: untouched rows stay, their moments too or not."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 3))
    gradients = rng.normal(size=(5, 4, 3)) * (rng.random((5, 4, 1)) < 0.5)
    m, v, expected = np.zeros((4, 3)), np.zeros((4, 3)), table.copy()
    for t, g in enumerate(gradients, start=1):
        rows = np.any(g != 0, axis=-1, keepdims=True)
        new_m, new_v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        m, v = (np.where(rows | (moments == "decay"), a, b) for a, b in ((new_m, m), (new_v, v)))
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.1 * expected
        expected = np.where(rows, expected - 0.1 * step, expected)
    optimizer = lazy_updates(optax.adamw(0.1, 0.9, 0.99, weight_decay=0.1), moments=moments)
    tree = {"embedding": table, "bias": np.zeros(2)}
    path, state = trajectory(optimizer, tree, {"embedding": gradients, "bias": np.zeros((5, 2))})
    np.testing.assert_allclose(np.asarray(path["embedding"])[-1], expected, rtol=1e-10)
    np.testing.assert_allclose(state[0].mu["embedding"], m, rtol=1e-10)
    assert state[0].count == 5


def test_lazy_rows_are_chosen_and_found_behind_masks():
    params = {"table": np.ones((2, 2), np.float32), "kernel": np.ones((2, 2), np.float32)}
    inner = optax.masked(optax.trace(0.9), {"table": True, "kernel": False})
    optimizer = optax.chain(lazy_updates(inner, select="table"), optax.scale(-1.0))
    gradients = {"table": np.float32([[[1, 1], [1, 1]], [[1, 1], [0, 0]]]), "kernel": np.zeros((2, 2, 2), np.float32)}
    path, state = trajectory(optimizer, params, gradients)
    np.testing.assert_allclose(np.asarray(state[0].inner_state.trace["table"])[:, 0], [1.9, 1.0], rtol=1e-6)
    by_path = lazy_updates(optax.sgd(1.0, momentum=0.0), select=lambda path: path[-1] == "kernel")
    rows = jax.jit(lambda params: once(by_path, params, params)[0])(params)
    assert_close(rows, jax.tree.map(lambda p: -p, params))


# ---------------------------------------------------------------- steps that are not finite, logs


def test_skipped_steps_leave_no_trace_and_are_never_written():
    """D13: after any number of bad steps the parameters are finite and the next good step is taken."""
    optimizer = skip_nonfinite(optax.adam(0.1))
    good, bad = [-1.0, -2.0], [np.nan, np.inf] * 5
    _, expected = micro_steps(optax.adam(0.1), good)[-1]
    reached, state = micro_steps(optimizer, [good[0], *bad, good[1]])[-1]
    assert np.isfinite(reached) and state.count == 2 and state.skipped == 10 and state.consecutive == 0
    assert_close(state.inner, expected, rtol=1e-6)
    # What the inner transformation makes of a finite gradient counts too, and so does the loss.
    broken = skip_nonfinite(optax.stateless(lambda u, p: jax.tree.map(lambda x: x / 0, u)))
    assert jax.jit(lambda g: once(broken, g)[0])(np.ones(1, np.float32)) == 0
    updates, _ = jax.jit(lambda g, p, value: optimizer.update(g, optimizer.init(p), p, value=value))(1.0, 0.0, np.nan)
    assert updates == 0


def test_the_decision_to_skip_is_the_same_on_all_devices():
    optimizer = skip_nonfinite(optax.sgd(1.0), axis_name="d")

    def run(g):
        updates, state = once(optimizer, g)
        return updates, state.count[None]

    specs = {"in_specs": jax.P("d"), "out_specs": (jax.P("d"), jax.P())}
    mapped = jax.jit(jax.shard_map(run, mesh=mesh_of_four(), **specs))
    updates, count = mapped(np.float32([1.0, np.nan, 1.0, 1.0]))
    assert not np.any(updates) and count == 0
    updates, count = mapped(np.ones(4, np.float32))
    assert np.all(np.asarray(updates) == -1) and count == 1


def test_logged_norms_do_not_break_a_scan():
    """D15: the measurements are in the state from the start; and inside MultiSteps."""
    optimizer = optax.chain(
        log_norms("gradients", per_leaf=True), clip_by_global_norm(1.0), optax.sgd(0.1), log_norms("updates")
    )
    params, gradients = problem(jnp.float32, 3)
    path, state = trajectory(optimizer, params, gradients)
    norms = logged_norms(state)
    last, params_before = jax.tree.map(lambda g: g[-1], gradients), jax.tree.map(lambda p: np.asarray(p)[-2], path)
    norm = jax.jit(global_norm)
    np.testing.assert_allclose(norms["gradients"], norm(last), rtol=1e-6)
    np.testing.assert_allclose(norms["updates"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(norms["params"], norm(params_before), rtol=1e-6)
    np.testing.assert_allclose(norms["gradients/leaves"]["bias"], np.linalg.norm(last["bias"]), rtol=1e-6)
    trajectory(optax.MultiSteps(optimizer, 2), params, gradients)
