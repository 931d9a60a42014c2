"""Mesh, sharding rules and batches: the same numbers on one device and on eight."""

import functools

import jax
import numpy as np
import pytest

from effattn_jax.models import LanguageModel, ModelConfig
from effattn_jax.objectives import cross_entropy
from effattn_jax.parallel import batch_spec, local_shard, make_mesh, place_batch, shard_tree, spec_for
from effattn_jax.parallel.sharding import LARGE
from tests.random_parameters import random_parameters


def test_mesh_takes_what_is_left():
    assert dict(make_mesh(tensor=2).shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}
    assert make_mesh(batch_size=12).size == 6
    assert make_mesh(data=1).size == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 3, "tensor": 4}, "needs 12 devices, and there are 8"),
        ({"fsdp": 0}, "mesh axis fsdp must be positive, got 0"),
        ({"data": 0}, "mesh axis data must be positive or -1, got 0"),
        ({"data": -2}, "mesh axis data must be positive or -1, got -2"),
        ({"data": 4, "batch_size": 6}, "a batch of 6 rows does not divide over data x fsdp = 4 x 1"),
    ],
)
def test_mesh_errors(axes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**axes)


def test_rules_follow_names_and_shapes():
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    assert tuple(spec_for("stack/layers_0/mixer/query/kernel", (64, 64), mesh)) == ("fsdp", "tensor")
    assert tuple(spec_for("stack/layers_0/mlp/out/kernel", (256, 64), mesh)) == ("tensor", "fsdp")
    assert tuple(spec_for("tokens/embedding", (256, 64), mesh)) == ("tensor", "fsdp")
    assert tuple(spec_for("1/0/mu/stack/layers/mlp/in/kernel", (3, 64, 256), mesh)) == (None, "fsdp", "tensor")
    assert tuple(spec_for("tokens/embedding", (65, 64), mesh)) == (None, "fsdp")
    assert tuple(spec_for("stack/norm/scale", (64,), mesh)) == ()
    assert tuple(spec_for("stack/layers_0/mixer/table", (3, 256, 256), mesh)) == (None, None, "fsdp")
    assert tuple(spec_for("stack/layers_0/mixer/table", (512, 255), mesh)) == ("fsdp", None)
    assert tuple(spec_for("stack/layers_0/mixer/table", (255, 513), mesh)) == ()
    assert tuple(spec_for("stack/layers_0/mixer/table", (64, 64), mesh)) == ()


def test_a_batch_is_placed_by_rows_and_time():
    mesh = make_mesh(data=2, fsdp=2, sequence=2)
    rows = {"tokens": np.arange(32).reshape(8, 4), "labels": np.arange(8), "odd": np.ones((8, 3))}
    assert local_shard(mesh, 8) == (0, 1)
    placed = place_batch(mesh, rows, 8)
    assert placed["tokens"].sharding.spec == batch_spec(2)
    for name in rows:
        np.testing.assert_array_equal(placed[name], rows[name])
        assert len(placed[name].addressable_shards) == 8


AXES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "tensor": 2, "sequence": 2},
]


PLAIN = ModelConfig(layers=2, width=32, heads=4)


def loss_fn(params, batch, config=PLAIN):
    logits = LanguageModel(config, 64).apply({"params": params}, batch["tokens"])
    loss, weight = cross_entropy(logits, batch["targets"])
    return loss / weight


@functools.cache
def one_device():
    """Parameters, a batch, and the gradients."""
    tokens = np.random.default_rng(1).integers(0, 64, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    params = random_parameters(LanguageModel(PLAIN, 64), batch["tokens"])
    return params, batch, jax.jit(jax.grad(loss_fn))(params, batch)


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()))
def test_gradients_are_those_of_one_device(axes):
    params, batch, expected = one_device()
    mesh = make_mesh(**axes)
    shardings = shard_tree(params, mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss_fn), out_shardings=shardings)
        gradients = step(jax.device_put(params, shardings), place_batch(mesh, batch, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), gradients, expected)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("mixer", ["synthesizer_random", "mlp_mixer", "tupe"])
def test_tables_of_places_are_shared_out(mixer):
    """The weights that hold most of the parameters lie over fsdp, and gradients are those of one device."""
    config = ModelConfig(
        layers=1, width=32, heads=4, mixer=mixer, max_length=2048 if mixer == "tupe" else 512, positions="none"
    )
    tokens = np.random.default_rng(1).integers(0, 64, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    params = random_parameters(LanguageModel(config, 64), batch["tokens"])
    slope = functools.partial(jax.grad(loss_fn), config=config)
    expected = jax.jit(slope)(params, batch)
    mesh = make_mesh(data=1, fsdp=8)
    shardings = shard_tree(params, mesh)
    sizes = [
        (leaf.size, leaf.size // np.prod(s.shard_shape(leaf.shape)))
        for leaf, s in zip(*map(jax.tree.leaves, (params, shardings)))
    ]
    assert all(parts == 8 for size, parts in sizes if size >= LARGE) and max(sizes)[0] >= LARGE
    with jax.set_mesh(mesh):
        gradients = jax.jit(slope, out_shardings=shardings)(
            jax.device_put(params, shardings), place_batch(mesh, batch, 8)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6), gradients, expected)
