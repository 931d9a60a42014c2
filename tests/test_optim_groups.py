"""Parameter groups: one table against optimizers put together by hand, its mistakes, and its text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effattn_jax.optim import amos, exclude, group_table, lamb, lazy_updates, parameter_groups
from effattn_jax.optim.groups import Groups

PARAMS = {
    "embed": {"embedding": np.arange(6.0).reshape(3, 2) / 6},
    "block_0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)},
    "block_1": {"kernel": 2 * np.ones((2, 2)), "bias": np.ones(2)},
}


def after(optimizer, params=PARAMS, steps=3, dtype=None):
    """Parameters and state after some steps with the same random gradients."""
    rng, dtype = np.random.default_rng(0), dtype or jnp.result_type(float)
    gradients = jax.tree.map(lambda p: rng.normal(size=(steps, *p.shape)).astype(dtype), params)
    gradients["embed"]["embedding"][:, 1] = 0

    @jax.jit
    def run(params, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0]

    return run(jax.tree.map(lambda p: p.astype(dtype), params), gradients)


def assert_close(a, b, rtol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


def test_lamb_with_exclusions_is_a_table(x64):
    table = {"bias": {}, "": {"weight_decay": 0.1, "trust_ratio": True}}
    grouped, state = after(parameter_groups(table, learning_rate=0.1, inner=optax.scale_by_adam(eps=1e-6)))
    mask = exclude("bias")
    assert_close(grouped, after(lamb(0.1, weight_decay=0.1, weight_decay_mask=mask, trust_ratio_mask=mask))[0])
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "count" in str(path[-1])]
    assert len(counts) == 1, "one counter for all groups"


def test_multipliers_decays_and_clip_groups(x64):
    """Against optax.partition with an optimizer a group; two rules share one norm."""
    table = {
        "bias": {"lr_multiplier": 0.5, "clip_group": "body", "clip_norm": 0.5},
        "kernel": {"weight_decay": 0.1, "clip_group": "body", "clip_norm": 0.5},
        "embedding": {"clip_norm": 0.1, "lr_multiplier": lambda path: 0.1 * len(path)},
    }
    grouped, _ = after(parameter_groups(table, learning_rate=0.1))
    labels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, PARAMS)
    body = jax.tree.map(lambda label: label != "embedding", labels)
    parts = {
        "bias": optax.adam(0.05),
        "kernel": optax.adamw(0.1, weight_decay=0.1),
        "embedding": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1 * 0.2)),
    }
    by_hand = optax.chain(optax.masked(optax.clip_by_global_norm(0.5), body), optax.partition(parts, labels))
    assert_close(grouped, after(by_hand)[0])


def test_lazy_rows_and_slot_dtypes():
    table = {"embedding": {"lazy": "frozen"}, "kernel": {"state_dtype": jnp.bfloat16}, "": {}}
    grouped, state = after(parameter_groups(table, learning_rate=0.1))
    row, expected = (np.asarray(p["embed"]["embedding"], np.float32)[1] for p in (grouped, PARAMS))
    np.testing.assert_array_equal(row, expected)
    assert_close(grouped["embed"], after(lazy_updates(optax.adam(0.1), select="embed"))[0]["embed"], rtol=1e-6)
    slots = [(path[-1].key, x) for path, x in jax.tree_util.tree_leaves_with_path(state) if hasattr(path[-1], "key")]
    dtypes = {name: x.dtype for name, x in slots}
    assert dtypes["kernel"] == jnp.bfloat16 and dtypes["bias"] == jnp.float32 and dtypes["embedding"] == jnp.float32
    expected = after(optax.adam(0.1))[0]
    assert_close(grouped["block_0"]["kernel"], expected["block_0"]["kernel"], rtol=0.02)
    # bfloat16 parameters have float32 slots unless the table says otherwise.
    _, state = after(parameter_groups({"": {}}), dtype=jnp.bfloat16, steps=1)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim)


def test_amos_takes_its_scales_and_slots_from_the_table():
    table = {"kernel": {"scale": lambda shape: 1 / shape[0], "slot_shape": (2, 1)}, "bias": {"scale": 0.25}, "": {}}
    grouped, state = after(parameter_groups(table, learning_rate=None, inner=functools.partial(amos, 0.1)))
    scales, slots = {"kernel": 0.5, "bias": 0.25, "embedding": 1.0}, {"kernel": (2, 1), "bias": (), "embedding": (3, 1)}
    expected, other = after(amos(0.1, scale_fn=scales, shape_fn=slots))
    assert_close(grouped, expected, rtol=1e-6)


def test_the_table_is_printed_with_what_matched():
    text = group_table({"bias": {}, "kernel|embed": {"weight_decay": 0.1, "trust_ratio": True}}, PARAMS)
    first, bias, rest = text.splitlines()
    assert first.split()[:3] == ["rule", "leaves", "parameters"]
    assert bias.split() == ["bias", "2", "4", "defaults", "block_0/bias"]
    assert rest.split() == ["kernel|embed", "3", "14", "weight_decay=0.1,", "trust_ratio=True", "block_0/kernel"]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({}, {}, "table must have a rule"),
        (
            {"bias": {}},
            {},
            r"no rule matches 3 of 5 leaves: block_0/kernel, block_1/kernel, embed/embedding; rules: 'bias'",
        ),
        ({"": {}, "bias": {}}, {}, "rule 'bias' is idle: it is the first match of no leaf; leaves: block_0/bias"),
        ({"": {}, "norm": {}}, {}, "rule 'norm' is idle"),
        ({"": {"weight_decy": 0.1}}, {}, "option 'weight_decy' of rule '' is unknown; did you mean 'weight_decay'"),
        ({"": {"weight_decay": -0.1}}, {}, "weight_decay of rule '' must be a finite number of at least 0"),
        ({"": {"lazy": "yes"}}, {}, "lazy of rule '' must be None, 'frozen' or 'decay'"),
        ({"": {"state_dtype": "int8"}}, {}, "state_dtype of rule '' must be bfloat16, a wider .* or None, got 'int8'"),
        ({"": {"state_dtype": bool}}, {}, "state_dtype of rule '' must be bfloat16"),
        # A second moment below 6e-8 would be 0.
        ({"": {"state_dtype": "float16"}}, {}, "state_dtype of rule '' must be bfloat16"),
        ({"": {"state_dtype": "float8_e4m3fn"}}, {}, "state_dtype of rule '' must be bfloat16"),
        ({"": {"lr_multiplier": float("inf")}}, {}, "lr_multiplier of rule '' must be a finite number"),
        ({"": {"soft_clip": True}}, {}, "soft_clip of rule '' needs a clip_norm"),
        (
            {"": {"scale": -1.0}},
            {"inner": functools.partial(amos, 0.1)},
            "scale_fn must give a positive, finite scale of",
        ),
        ({"": {"clip_norm": 0.0}}, {}, "clip_norm of rule '' must be positive"),
        ({"": {"clip_group": "a"}}, {}, "clip_group 'a' needs a clip_norm"),
        (
            {"bias": {"clip_group": "a", "clip_norm": 1.0}, "": {"clip_group": "a", "clip_norm": 2.0}},
            {},
            "clip_group 'a' must have one clip_norm",
        ),
        ({"": {"scale": 1.0}}, {}, "scale and slot_shape need an inner that takes them"),
        ({"": {"weight_decay": 0.1}}, {"learning_rate": None}, "weight_decay and trust_ratio need a learning_rate"),
    ],
)
def test_mistakes(table, options, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(table, **options).init(PARAMS)


def test_the_first_rule_counts():
    groups = Groups({"block_0": {"weight_decay": 1.0}, "bias": {"weight_decay": 2.0}, "": {}})
    found = [groups.of(path).weight_decay for path in (("block_0", "bias"), ("block_1", "bias"), ("x",))]
    assert found == [1.0, 2.0, 0.0]
