"""Amos and Tiger against naive references in float64, over every kind of tree, dtype and sharding; the rules of scales and slots."""

import dataclasses
import math

import equinox as eqx
import flax
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from effattn_jax.optim import amos, amos_table, scale_by_amos, tiger
from effattn_jax.optim.scales import plan
from tests.laws.checks import x64 as double_precision

SHAPES = {
    "embed/embedding": (5, 3),
    "norm/scale": (6,),
    "out/bias": (6,),
    "out/kernel": (4, 6),
    "conv/kernel": (3, 2, 4),
    "gate": (),
}


def tree(values):
    """The flat dictionary as nested ones."""
    return flax.traverse_util.unflatten_dict(values, sep="/")


def problem(steps=20, seed=0):
    """Parameters and a gradient a step, float64, by '/'-joined path."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [
        {name: rng.normal(size=shape) * 0.3 ** rng.integers(0, 4) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]
    return params, gradients


def reference_amos(params, gradients, rate, scale, slot, *, beta, momentum, clip_value, extra_l2, c_coef, d_coef):
    """The equations of the specification, a leaf and a step at a time."""
    out = {}
    for name, theta in params.items():
        shape = theta.shape
        v, b, m = np.zeros(slot(name, shape)), np.zeros(slot(name, shape)), np.zeros(shape)
        axes = tuple(i for i in range(len(shape)) if v.ndim == 0 or v.shape[i] != shape[i])
        eta = scale(name, shape)
        for t, gradient in enumerate(gradients, start=1):
            g, xi = gradient[name], rate(t)
            if clip_value is not None:
                g = np.clip(g, -clip_value, clip_value)
            s = np.mean(g**2, axis=axes, keepdims=v.ndim > 0)
            v = beta * v + (1 - beta) * s
            r = (1 - beta**t) / np.maximum(v, 2.0**-125)
            c = (1 + c_coef * math.sqrt(xi) * b) ** -0.5
            gamma = c * xi**2 * r * s
            d = 1 / (1 + d_coef * math.sqrt(xi * eta) * b)
            step = d * (-xi * eta * np.sqrt(r) * g - (gamma / 2 + extra_l2) * theta)
            b = b + gamma * (1 + b)
            if momentum is not None:
                m = momentum * m + (1 - momentum) * step
                step = m
            theta = theta + step
        out[name] = theta
    return out


def reference_slot(name, shape):
    if name.endswith("embedding"):
        return (shape[0], 1)
    return (1, shape[1]) if name == "out/kernel" else ()


def reference_scale(name, shape):
    known = {"embedding": math.sqrt(2 / 3), "scale": 1.0, "bias": 0.5, "gate": 0.5}
    return known.get(name.split("/")[-1]) or math.sqrt(1 / math.prod(shape[:-1]))


def trajectory(optimizer, params, gradients, dtype):
    """Parameters and state after all gradients, in one scan."""
    params = tree({k: p.astype(dtype) for k, p in params.items()})
    stacked = tree({k: np.stack([g[k] for g in gradients]).astype(dtype) for k in SHAPES})

    @jax.jit
    def run(params, stacked):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), stacked)[0]

    return run(params, stacked)


def warmup(t):
    return (
        0.1 * jnp.minimum(t.astype(jnp.result_type(float)) / 8, 1) if isinstance(t, jax.Array) else 0.1 * min(t / 8, 1)
    )


DEFAULTS = {"beta": 0.999, "momentum": None, "clip_value": None, "extra_l2": 0.0, "c_coef": 0.25, "d_coef": 0.25}
CASES = {
    "defaults": {},
    "all": {"beta": 0.9, "momentum": 0.9, "clip_value": 0.5, "extra_l2": 1e-3, "c_coef": 0.5, "d_coef": 0.1},
    "full slots": {"full": True, "momentum": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_amos_equals_the_equations(case):
    """20 updates with a scheduled rate: 1e-12 in float64, 1.4e-6 in float32."""
    options = dict(CASES[case])
    full = options.pop("full", False)
    given = options | ({"shape_fn": lambda path, shape: shape} if full else {})
    slot = (lambda name, shape: shape) if full else reference_slot
    params, gradients = problem()
    expected = reference_amos(params, gradients, warmup, reference_scale, slot, **(DEFAULTS | options))
    optimizer = amos(warmup, **given)
    single, _ = trajectory(optimizer, params, gradients, jnp.float32)
    with double_precision():
        double, state = trajectory(optimizer, params, gradients, jnp.float64)
    flat, flat32 = (flax.traverse_util.flatten_dict(jax.device_get(x), sep="/") for x in (double, single))
    for name, value in expected.items():
        np.testing.assert_allclose(flat[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
        error = np.sqrt(np.mean((flat32[name] - value) ** 2) / np.mean(value**2))
        assert error <= 1.4e-6, (name, error)
    assert state.v["out"]["kernel"].shape == ((4, 6) if full else (1, 6)) and state.v["conv"]["kernel"].ndim in (0, 3)


def test_scale_by_amos_in_a_chain_is_amos():
    params, gradients = problem(3)
    chain = optax.chain(optax.clip(0.5), scale_by_amos(0.1), optax.ema(0.9, debias=False))
    one, _ = trajectory(amos(0.1, momentum=0.9, clip_value=0.5), params, gradients, jnp.float32)
    other, _ = trajectory(chain, params, gradients, jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), one, other)


def test_bfloat16_parameters_have_float32_slots():
    """Over 400 steps the slots follow those of float32 parameters within 1 %; a bfloat16 slot stalls at half."""
    gradients = np.random.default_rng(0).normal(size=(400, 4, 8)).astype(np.float32)

    def slots(dtype):
        optimizer = amos(0.01, momentum=0.9)
        params = {"kernel": np.ones((4, 8), dtype)}

        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update({"kernel": g.astype(dtype)}, state, params)
            assert updates["kernel"].dtype == dtype
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0][1])()

    half, single = slots(jnp.bfloat16), slots(jnp.float32)
    for name in ("v", "b"):
        a, b = getattr(half, name)["kernel"], getattr(single, name)["kernel"]
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0.01)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array | None
    count: jax.Array


def test_every_kind_of_tree():
    """dict, FrozenDict, nnx.State, a registered dataclass with None and integers, an Equinox model: the same numbers."""
    kernel, bias = jnp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3) + 1), jnp.asarray(np.ones(3, np.float32))
    given = {"kernel_init": lambda *_, **__: kernel, "bias_init": lambda *_, **__: bias}
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0), **given)
    model = eqx.filter_eval_shape(eqx.nn.Linear, 2, 3, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: (m.weight, m.bias), model, (kernel.T, bias))
    trees = {
        "dict": {"kernel": kernel, "bias": bias},
        "frozen": flax.core.freeze({"kernel": kernel, "bias": bias}),
        "nnx": nnx.state(linear, nnx.Param),
        "dataclass": Layer(kernel, None, jnp.array(3)),
        "equinox": eqx.filter(model, eqx.is_array),
    }
    optimizer = amos(0.1, momentum=0.9)
    seen = {}
    init, update = jax.jit(optimizer.init), jax.jit(optimizer.update)
    for name, params in trees.items():
        state = init(params)
        updates, new = update(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params), name
        assert [x.shape for x in jax.tree.leaves(new)] == [x.shape for x in jax.tree.leaves(state)], name
        seen[name] = next(np.asarray(x) for x in jax.tree.leaves(updates) if x.ndim == 2)
    assert jax.tree.leaves(new.v)[0].shape in ((3, 1), ())
    for name, found in seen.items():
        expected = seen["dict"].T if name == "equinox" else seen["dict"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    # Gradients with None where the parameters have an array.
    updates, _ = update({"kernel": kernel, "bias": None}, init(trees["dict"]), trees["dict"])
    assert updates["bias"] is None


def test_no_gradient_no_update():
    params = {"kernel": np.ones((2, 3), np.float32), "empty": np.zeros((0, 4), np.float32)}
    zeros = jax.tree.map(np.zeros_like, params)
    optimizer = amos(0.1)
    updates, state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, params)
    assert not np.any(updates["kernel"]) and not np.any(state.b["kernel"])
    assert amos(0.1).init({}).v == {}


def test_counts_at_the_end_of_their_range():
    """Past 2^24, where float32 has gaps, and at 2^31 - 1, where the count stays."""
    params = {"kernel": np.ones((2, 3), np.float32)}
    optimizer = amos(lambda t: 1 / t)
    update = jax.jit(lambda p, count: optimizer.update(p, optimizer.init(p)._replace(count=count), p))
    for count in (2**24 + 1, 2**31 - 1):
        updates, state = update(params, np.int32(count))
        assert np.all(np.isfinite(updates["kernel"])) and state.count == min(count + 1, 2**31 - 1)


# ---------------------------------------------------------------- shards


def mesh_of_four(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("d",), axis_types=(kind,), devices=jax.devices()[:4])


@pytest.mark.parametrize("check_vma", [True, False])
def test_amos_in_shard_map_is_amos(check_vma):
    """Leaves split along either axis, or not at all, in a scan: slots are those of the whole leaf (D11)."""
    specs = {"rows": {"kernel": jax.P("d")}, "columns": {"kernel": jax.P(None, "d")}, "bias": jax.P()}
    rng = np.random.default_rng(0)
    params = {"rows": {"kernel": rng.normal(size=(8, 4))}, "columns": {"kernel": rng.normal(size=(4, 8))}}
    params = jax.tree.map(np.float32, params | {"bias": rng.normal(size=3)})

    def run(params, axis_name):
        optimizer = amos(0.1, momentum=0.9, axis_name=axis_name)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.tree.map(lambda p: p * p, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)
        return params, state.v

    slots = {"rows": {"kernel": jax.P()}, "columns": {"kernel": jax.P(None, "d")}, "bias": jax.P()}
    mapped = jax.shard_map(
        lambda p: run(p, specs), mesh=mesh_of_four(), in_specs=(specs,), out_specs=(specs, slots), check_vma=check_vma
    )
    both = jax.jit(lambda p: (mapped(p), run(p, None)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *both)


def test_amos_by_the_name_of_an_axis():
    """A name alone means the first axis, and slots made outside are those of the whole leaf."""
    params = {"kernel": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    optimizer, split = amos(0.1), amos(0.1, axis_name="d")
    state = jax.jit(split.init)(params)
    assert state.v["kernel"].shape == (1, 4)
    spec = {"kernel": jax.P("d")}
    update = jax.shard_map(
        lambda p, s: split.update(p, s, p)[0], mesh=mesh_of_four(), in_specs=(spec, jax.P()), out_specs=spec
    )
    got, expected = jax.jit(lambda p, s: (update(p, s), optimizer.update(p, s, p)[0]))(params, state)
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=2e-6)


def test_explicit_sharding_is_the_same_before_and_after():
    mesh = mesh_of_four(AxisType.Explicit)
    params = {"kernel": jax.device_put(np.ones((4, 8), np.float32), jax.NamedSharding(mesh, jax.P(None, "d")))}
    with jax.set_mesh(mesh):
        optimizer = amos(0.1, momentum=0.9)
        state = optimizer.init(params)
        _, new = jax.jit(optimizer.update)(params, state, params)
    same = jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), state, new)
    assert jax.tree.all(same), same
    assert state.v["kernel"].sharding.spec == jax.P(None, "d")


# ---------------------------------------------------------------- scales and slots


def bert(width=768, mlp=3072, vocabulary=32000, layers=12):
    """Shapes of BERT-base with tied output, by the names of the published run."""
    matrices = {name: (width, width) for name in ("query", "key", "value", "output")}
    block = {f"self_attention/{n}/kernel": s for n, s in matrices.items()}
    block |= {f"self_attention/{n}/bias": (width,) for n in matrices}
    block |= {"mlp_block/dense1/kernel": (width, mlp), "mlp_block/dense1/bias": (mlp,)}
    block |= {"mlp_block/dense2/kernel": (mlp, width), "mlp_block/dense2/bias": (width,)}
    block |= {f"layer_norm_{i}/{n}": (width,) for i in "ab" for n in ("scale", "bias")}
    shapes = {f"layer_{i}/{name}": shape for i in range(layers) for name, shape in block.items()}
    shapes |= {"token/embedding": (vocabulary, width), "position/embedding": (512, width), "type/embedding": (2, width)}
    shapes |= {"layer_norm/scale": (width,), "layer_norm/bias": (width,), "head/bias": (vocabulary,)}
    shapes |= {"head/kernel": (width, width), "relpos_embed/relpos": (32, 12)}
    return tree({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


def size(shapes):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


def test_slots_of_bert_are_half_of_adams_or_a_thousandth():
    params = bert()
    adam = size(jax.eval_shape(optax.adam(1e-3).init, params))
    assert size(jax.eval_shape(amos(0.005, momentum=0.9).init, params)) <= 0.5015 * adam
    assert size(jax.eval_shape(amos(0.005).init, params)) <= 0.0015 * adam


def test_scales_of_the_published_bert():
    by_path = {"/".join(path): leaf for path, leaf in plan(bert(), None, None).items()}
    expected = {
        "layer_0/layer_norm_a/scale": (1.0, ()),
        "layer_0/layer_norm_b/bias": (0.5, ()),
        "layer_3/mlp_block/dense1/kernel": (math.sqrt(1 / 768), (1, 3072)),
        "layer_3/mlp_block/dense2/kernel": (math.sqrt(2 / 3072), (1, 768)),
        "layer_11/self_attention/output/kernel": (math.sqrt(1 / 768), (1, 768)),
        "token/embedding": (math.sqrt(2 / 768), (32000, 1)),
        "position/embedding": (math.sqrt(2 / 768), (512, 1)),
        "head/bias": (0.5, ()),
        "relpos_embed/relpos": (0.5, ()),
    }
    for name, (scale, slot) in expected.items():
        np.testing.assert_allclose(by_path[name].scale, scale, rtol=1e-12, err_msg=name)
        assert by_path[name].slot == slot, name


def test_scales_of_the_published_mnist_network():
    shapes = {"Conv_0": (3, 3, 1, 32), "Conv_1": (3, 3, 32, 64), "Dense_0": (3136, 256), "Dense_1": (256, 10)}
    params = {n: {"kernel": np.zeros(s, np.float32), "bias": np.zeros(s[-1], np.float32)} for n, s in shapes.items()}
    scales = {"/".join(path): leaf.scale for path, leaf in plan(params, None, None).items()}
    fan_in = {"Conv_0": 9, "Conv_1": 288, "Dense_0": 3136, "Dense_1": 256}
    for name, gain in {"Conv_0": 8, "Conv_1": 2, "Dense_0": 2, "Dense_1": 1}.items():
        np.testing.assert_allclose(scales[f"{name}/kernel"], math.sqrt(gain / fan_in[name]), rtol=1e-12)
        assert scales[f"{name}/bias"] == 0.5


def test_stacked_layers_have_slots_of_their_own():
    shapes = {"in": (3, 4, 8), "out": (3, 8, 4)}
    params = {"layers": {"mlp": {n: {"kernel": np.zeros(s, np.float32)} for n, s in shapes.items()}}}
    leaves = {path[-2]: leaf for path, leaf in plan(params, None, None).items()}
    assert leaves["in"].slot == (3, 1, 8) and leaves["out"].scale == math.sqrt(2 / 8)
    norm = plan({"layers": {"norm": {"scale": np.zeros((3, 4), np.float32)}}}, None, None)
    [leaf] = norm.values()
    assert leaf.slot == (3, 1) and leaf.scale == 1.0


def test_rules_of_the_user():
    params = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": {"bias": np.ones(3, np.float32)}}
    by_regex = plan(params, {"kernel": lambda shape: 1 / shape[0], "bias": 0.25}, {"kernel": (2, 1), "": ()})
    assert [leaf.scale for leaf in by_regex.values()] == [0.5, 0.25]
    assert [leaf.slot for leaf in by_regex.values()] == [(2, 1), ()]
    by_path = plan(params, lambda path, shape: len(path) + len(shape), None)
    assert [leaf.scale for leaf in by_path.values()] == [4, 3]
    with pytest.raises(ValueError, match="scale_fn has no rule for b/bias of shape"):
        amos(0.1, scale_fn={"kernel": 1.0}).init(params)
    with pytest.raises(ValueError, match=r"shape_fn must give \(\) or the shape \(2, 3\) of a/kernel"):
        amos(0.1, shape_fn=lambda path, shape: (3,)).init(params)
    assert "a/kernel" in amos_table(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: amos(-1.0), "learning_rate must be at least 0, got -1.0"),
        (lambda: amos(0.1, beta=1.0), "beta must be in"),
        (lambda: amos(0.1, momentum=1.0), "momentum must be in"),
        (lambda: amos(0.1, clip_value=0.0), "clip_value must be positive or None, got 0.0"),
        (lambda: amos(0.1, c_coef=-1.0), "c_coef must be at least 0"),
        (lambda: amos(0.1).update(jnp.ones(1), amos(0.1).init(jnp.ones(1))), "amos needs the parameters"),
        (lambda: tiger(0.1, beta=1.0), "beta must be in"),
        (lambda: tiger(0.1, weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: tiger(0.1).update(jnp.ones(1), tiger(0.1).init(jnp.ones(1))), "tiger needs the parameters"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- Tiger


def reference_tiger(params, gradients, rate, beta, weight_decay):
    out = {}
    for name, theta in params.items():
        m, last = np.zeros(theta.shape), name.split("/")[-1]
        for t, gradient in enumerate(gradients):
            m = beta * m + (1 - beta) * gradient[name]
            if last in ("bias", "scale", "gate"):
                size, decay = 0.5, 0.0
            else:
                axis = -1 if last == "embedding" else None
                size, decay = np.sqrt(np.mean(theta**2, axis=axis, keepdims=True)), weight_decay
            theta = theta - rate(t) * size * (np.sign(m) + decay * theta)
        out[name] = theta
    return out


def test_tiger_equals_the_equations(x64):
    params, gradients = problem()
    expected = reference_tiger(params, gradients, warmup, 0.9, 0.1)
    values, state = trajectory(tiger(warmup, 0.9, 0.1), params, gradients, jnp.float64)
    for name, value in flax.traverse_util.flatten_dict(jax.device_get(values), sep="/").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-12, err_msg=name)
    assert state.count == 20


@pytest.mark.parametrize("optimizer", [amos(0.1), amos(0.1, momentum=0.9, clip_value=0.5), tiger(0.1, 0.9, 0.1)])
def test_complex_parameters_turn_with_their_phase(x64, optimizer):
    """Updates of real arrays times a phase are the real ones times that phase; mean squares are real."""
    phase = np.exp(0.7j)
    kernel, gradient = np.random.default_rng(0).normal(size=(2, 3, 4))

    def path(kernel, gradient):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update({"kernel": gradient}, state, params)
            return (optax.apply_updates(params, updates), state), updates["kernel"]

        params = {"kernel": kernel}
        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=3)[1]

    both = jax.jit(lambda k, g, turned_k, turned_g: (path(k, g), path(turned_k, turned_g)))
    updates, others = jax.device_get(both(kernel, gradient, kernel * phase, gradient * phase))
    np.testing.assert_allclose(others, updates * phase, rtol=1e-12, atol=1e-14)


def test_tiger_shrinks_where_a_gradient_is_not_finite():
    params = {"kernel": np.full((2, 2), 3.0), "scale": np.full(2, 3.0), "bias": np.ones(2)}
    gradients = {"kernel": np.full((2, 2), np.nan), "scale": np.full(2, np.nan), "bias": np.ones(2)}
    optimizer = tiger(0.1, shrink_nonfinite=0.9)
    updates, state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(gradients, params)
    new = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
    np.testing.assert_allclose(new["kernel"], 2.7, rtol=1e-6)
    np.testing.assert_allclose(new["scale"], 1 + 0.9 * 2, rtol=1e-6)
    np.testing.assert_allclose(new["bias"], 0.95, rtol=1e-6)
    assert np.isfinite(state.momentum["kernel"]).all()


def test_tiger_in_shard_map():
    kernel = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    spec = {"kernel": jax.P("d")}

    def run(params, axis_name):
        optimizer = tiger(0.1, axis_name=axis_name)
        return optimizer.update(params, optimizer.init(params), params)[0]

    mapped = jax.shard_map(lambda p: run(p, "d"), mesh=mesh_of_four(), in_specs=(spec,), out_specs=spec)
    got, expected = jax.jit(lambda p: (mapped(p), run(p, None)))({"kernel": kernel})
    np.testing.assert_allclose(got["kernel"], expected["kernel"], rtol=1e-6)
