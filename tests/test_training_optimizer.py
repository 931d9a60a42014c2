"""The optimizer of a run from its configuration: every rule by name, Lookahead, soft clipping, parameter groups."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effattn_jax import nn
from effattn_jax.optim import LookaheadState
from effattn_jax.training import OptimConfig, UserError, loop, train
from effattn_jax.training.optimizer import OPTIMIZERS, decayed, make_optimizer, parse_rule
from effattn_jax.training.step import init_state, make_train_step
from tests.training_runs import rows, tiny

PARAMS = {"embed": {"embedding": jnp.full((4, 3), 0.5)}, "out": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}}
GROUPS = ("bias$:", "embedding$: lazy=frozen, lr_multiplier=0.5", ".*: weight_decay=0.1")


def descent(config, steps=30):
    """Losses of a quadratic, and the last state."""
    optimizer, _ = make_optimizer(config, steps)

    def loss(params):
        return sum(jnp.sum((x - 0.1) ** 2) for x in jax.tree.leaves(params))

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=steps))(PARAMS)
    return values, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_descends(name):
    rate = {"lars": 3.0, "sgd": 0.03, "amos": 0.3}.get(name, 0.03)
    values, _ = descent(OptimConfig(name=name, learning_rate=rate, warmup_steps=5))
    assert values[-1] < 0.5 * values[0] and np.isfinite(values).all()


def test_options_reach_the_chain():
    config = OptimConfig(name="lion", learning_rate=0.1, clip="soft", clip_norm=2.0, lookahead_period=5, groups=GROUPS)
    values, state = descent(config)
    assert values[-1] < 0.5 * values[0]
    assert isinstance(state, LookaheadState) and state.count == 30
    clip = state.inner[0]
    np.testing.assert_allclose(clip.factor, 2 / (2 + clip.norm), rtol=1e-6)
    assert make_optimizer(OptimConfig(name="amos", warmup_steps=10), 100)[1](0) > 0


def test_a_run_with_groups_prints_them_and_logs_norms(tmp_path, capsys):
    rules = ("embedding$: scale=0.02", "scale$:", ".*: lr_multiplier=0.5")
    optim = {"name": "amos", "lookahead_period": 2, "clip": "soft", "groups": rules}
    config = tiny(tmp_path / "run", optim=optim, steps=4, checkpoint_every=2)
    train(config)
    out = capsys.readouterr().out
    assert "rule" in out and "embedding$" in out and "scale=0.02" in out
    for row in rows(tmp_path / "run"):
        assert float(row["train/update_norm"]) > 0 and float(row["train/param_norm"]) > 0
    with pytest.raises(UserError, match="rule 'bias' is idle"):
        train(tiny(tmp_path / "idle", optim={"groups": ("bias:", ".*:")}))


@pytest.mark.parametrize(("dtype", "rate"), [("float32", np.inf), ("float16", 1e6)])
def test_a_step_that_leaves_parameters_infinite_is_not_taken(tmp_path, dtype, rate):
    """In float16 the update itself is finite. Loss and gradient are, so nothing else would notice it in the last step."""
    task = SimpleNamespace(
        init=lambda key, batch: {"w": jnp.ones(3, dtype)},
        loss=lambda params, batch, key: (jnp.sum(params["w"].astype(jnp.float32) ** 2), jnp.ones(())),
    )
    optimizer = optax.adam(rate)
    before = init_state(task, optimizer, np.uint32(0), None)
    step = jax.jit(make_train_step(task, optimizer, optax.constant_schedule(rate)))
    after, numbers = step(before, {"tokens": np.zeros((1, 1), np.int32)}, np.int32(0))
    assert not numbers["good"] and np.isfinite(numbers["loss"]) and np.isfinite(numbers["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)

    saved = []
    kept = SimpleNamespace(save=lambda *a: saved.append(a), wait=lambda: None, folder=SimpleNamespace(path=tmp_path))
    words = f"step 1: an update of norm .* parameters that are not finite, .* is kept as step 0 of {tmp_path}"
    with pytest.raises(UserError, match=words):
        loop._check(None, kept, after, 1, numbers, last=True)
    assert saved == [(0, after)]


@pytest.mark.parametrize(
    ("mixer", "options", "left"),
    [
        ("mlp_mixer", {"max_length": 4}, set()),
        ("ffn_stack", {"max_length": 4}, set()),
        ("gmlp", {"max_length": 4}, set()),
        ("amlp", {"max_length": 4}, set()),
        ("rg_lru", {}, set()),
        ("external", {}, {"memory_key", "memory_value"}),
    ],
)
def test_weight_decay_reaches_every_matrix(mixer, options, left):
    module = nn.MIXERS[mixer](8, heads=2, causal=False, **options)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 8)))["params"]
    decays = jax.tree.leaves_with_path(decayed(params))
    # All of rank 2 and more, and no bias or norm.
    matrices = {path for path, leaf in jax.tree.leaves_with_path(params) if leaf.ndim >= 2}
    skipped = {path for path, decay in decays if not decay} & matrices
    assert {jax.tree_util.keystr(path[-1:], simple=True) for path in skipped} == left
    assert {path for path, decay in decays if decay} <= matrices


def test_rules_as_text():
    assert parse_rule("(?:bias|scale)$: clip_norm=1.5, trust_ratio=True,lazy=decay") == (
        "(?:bias|scale)$",
        {"clip_norm": 1.5, "trust_ratio": True, "lazy": "decay"},
    )
    assert parse_rule("a: slot_shape=(1, 32), scale=2")[1] == {"slot_shape": (1, 32), "scale": 2}
    for text in ("no colon", "a: weight_decay", "a: =1", "a: weight_decay=", "a: weight_decay=1, weight_decay=2"):
        with pytest.raises(ValueError, match="optim.groups must hold rules"):
            make_optimizer(OptimConfig(groups=(text,)), 10)
    for text, words in (
        ("a: lr_multiplier=abc", "optim.groups, rule 'a': lr_multiplier must be a number, got 'abc'"),
        ("a: trust_ratio=5", "trust_ratio must be True or False, got '5'"),
        ("a: scale=abc", "scale must be a number or None, got 'abc'"),
        ("a: state_dtype=abc", "state_dtype of rule 'a' must be bfloat16, a wider floating dtype or None, got 'abc'"),
        ("a: scale=1", "optim.groups, rule 'a': adamw has no scale"),
        ("[: lr_multiplier=1", "rule '\\[' must be a regular expression"),
    ):
        with pytest.raises(ValueError, match=words):
            make_optimizer(OptimConfig(groups=(text,)), 10)
    with pytest.raises(
        ValueError, match="optim.groups needs optim.name to be one of adamw, amos, lamb, lion, sgd, got 'lars'"
    ):
        make_optimizer(OptimConfig(name="lars", groups=(":",)), 10)
    with pytest.raises(ValueError, match="optim.groups must hold each regular expression once, got 'a' twice"):
        make_optimizer(OptimConfig(groups=("a: lazy=frozen", ":", "a: lazy=decay")), 10)
    with pytest.raises(ValueError, match="optim.groups, rule '': amos has no weight_decay"):
        make_optimizer(OptimConfig(name="amos", groups=(": weight_decay=0.1",)), 10)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"amos"}))
def test_every_rule_decays_the_same_parameters(name):
    """Those of `decayed`: not the state matrices of a mixer, whatever their rank. Amos has a decay of its own."""
    params = {"in_kernel": jnp.ones((2, 3)), "A_log": jnp.ones((2, 3)), "key_table": jnp.ones((2, 3)), "b": jnp.ones(3)}
    optimizer, _ = make_optimizer(OptimConfig(name=name, schedule="constant", warmup_steps=0), 10)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert {path for path, update in updates.items() if jnp.any(update != 0)} == {"in_kernel"}
