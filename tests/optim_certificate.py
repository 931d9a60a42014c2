"""Every transformation of `effattn_jax.optim` against everything it may be composed with, and optax's on the same matrix.

    python -m tests.optim_certificate [PATH]

Writes docs/optim_certificate.md; exits with 1 when one of ours fails a check, after writing the page.
"""

import dataclasses
import datetime
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # eight devices on the CPU, asked for before jax starts
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from effattn_jax import optim
from tests.traces import counted_jit, programs

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "optim_certificate.md"
STEPS, EVERY = 4, 3
SHAPES = {"embedding": (4, 2), "out": {"bias": (4,), "kernel": (4, 3)}}
CHECKS: dict[str, Callable] = {}


class NotAsked(Exception):
    """The check has no meaning for the transformation."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A transformation and the chain that makes an optimizer of it."""

    factory: Callable[..., optax.GradientTransformation]
    hyper: dict[str, float] = dataclasses.field(default_factory=dict)
    """Its numbers, which `inject_hyperparams` may replace."""
    before: tuple = ()
    after: tuple = ()
    axis: bool = False
    """Whether it takes `axis_name` for split leaves."""
    wrap: Callable = lambda params: params
    """The parameters as it wants them."""
    unwrap: Callable = lambda params: params

    def make(self, **options: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer."""
        made = optax.chain(*self.before, self.factory(**{**self.hyper, **options}), *self.after)
        return optax.with_extra_args_support(made)


SGD, ADAM = (optax.sgd(0.05),), optax.adam(0.05)


def _ours() -> dict[str, Subject]:
    adam = optim.in_float32(ADAM)
    table = {"bias": {"lr_multiplier": 2.0}, "": {"lazy": "frozen", "weight_decay": 0.01, "clip_norm": 1.0}}
    schedule = optim.piecewise_linear_schedule({0: 0.05, 100: 0.02})
    decay = optim.amos_schedules(0.1, 0.1)
    return {
        "accumulate_in_momentum": Subject(
            lambda decay: optim.accumulate_in_momentum(optax.scale(-0.1), 2, decay), {"decay": 0.9}
        ),
        "accumulate_updates": Subject(lambda: optim.accumulate_updates(adam, 2)),
        "amos": Subject(
            lambda learning_rate, axis_name=None: optim.amos(learning_rate, momentum=0.9, axis_name=axis_name),
            {"learning_rate": 0.1},
            axis=True,
        ),
        "amos_schedules": Subject(lambda: optim.in_float32(optax.adam(lambda count: 0.1 * decay(count)))),
        "clip_by_block_norm": Subject(optim.clip_by_block_norm, {"max_norm": 0.5}, after=SGD, axis=True),
        "clip_by_global_norm": Subject(optim.clip_by_global_norm, {"max_norm": 0.5}, after=SGD, axis=True),
        "decoupled_weight_decay": Subject(optim.decoupled_weight_decay, {"rate": 1e-3}, before=(adam,)),
        "in_float32": Subject(lambda: optim.in_float32(ADAM)),
        "lamb": Subject(optim.lamb, {"learning_rate": 0.02, "weight_decay": 1e-3}, axis=True),
        "lars": Subject(optim.lars, {"learning_rate": 20.0, "weight_decay": 1e-5}, axis=True),
        "layer_adaptation": Subject(
            optim.layer_adaptation, {"coefficient": 0.02}, after=(optax.scale(-1.0),), axis=True
        ),
        "lazy_updates": Subject(lambda: optim.lazy_updates(adam)),
        "log_norms": Subject(lambda **o: optim.log_norms("gradients", **o), after=SGD, axis=True),
        "lookahead": Subject(lambda slow_step: optim.lookahead(adam, 2, slow_step), {"slow_step": 0.5}),
        "parameter_groups": Subject(
            lambda learning_rate, axis_name=None: optim.parameter_groups(
                table, learning_rate=learning_rate, axis_name=axis_name
            ),
            {"learning_rate": 0.05},
            axis=True,
        ),
        "piecewise_linear_schedule": Subject(lambda: optim.in_float32(optax.adam(schedule))),
        "scale_by_amos": Subject(optim.scale_by_amos, {"learning_rate": 0.1}, axis=True),
        "scale_by_flooding": Subject(optim.scale_by_flooding, {"level": -1.0}, after=SGD),
        "skip_nonfinite": Subject(lambda **o: optim.skip_nonfinite(adam, **o), axis=True),
        "soft_clip_by_global_norm": Subject(optim.soft_clip_by_global_norm, {"threshold": 0.5}, after=SGD, axis=True),
        "tiger": Subject(
            lambda learning_rate, axis_name=None: optim.tiger(learning_rate, weight_decay=0.0, axis_name=axis_name),
            {"learning_rate": 0.01},
            axis=True,
        ),
    }


def _theirs() -> dict[str, Subject]:
    labels = lambda params: jax.tree_util.tree_map_with_path(lambda k, _: "a" if "bias" in str(k) else "b", params)  # noqa: E731
    groups = {
        "a": optax.adam(0.1),
        "b": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.05, weight_decay=0.01)),
    }
    multi = lambda: optax.MultiSteps(ADAM, 2).gradient_transformation()  # noqa: E731
    return {
        "MultiSteps": Subject(multi),
        "adam": Subject(optax.adam, {"learning_rate": 0.05}),
        "adamw": Subject(optax.adamw, {"learning_rate": 0.05, "weight_decay": 1e-3}),
        "adaptive_grad_clip": Subject(optax.adaptive_grad_clip, {"clipping": 0.1}, after=SGD),
        "apply_every": Subject(lambda: optax.apply_every(2), before=(ADAM,)),
        "apply_if_finite": Subject(lambda: optax.apply_if_finite(ADAM, 5)),
        "clip_by_block_rms": Subject(optax.clip_by_block_rms, {"threshold": 0.1}, after=SGD),
        "clip_by_global_norm": Subject(optax.clip_by_global_norm, {"max_norm": 0.5}, after=SGD),
        "lamb": Subject(optax.lamb, {"learning_rate": 0.02, "weight_decay": 1e-3}),
        "lars": Subject(optax.lars, {"learning_rate": 20.0, "weight_decay": 1e-5}),
        "lion": Subject(optax.lion, {"learning_rate": 0.01}),
        "lookahead": Subject(
            lambda: optax.lookahead(ADAM, 2, 0.5),
            wrap=optax.LookaheadParams.init_synced,
            unwrap=lambda params: getattr(params, "fast", params),
        ),
        "normalize_by_update_norm": Subject(lambda: optax.normalize_by_update_norm(), after=(optax.sgd(0.01),)),
        "partition": Subject(lambda: optax.partition(groups, labels)),
        "piecewise_interpolate_schedule": Subject(
            lambda: optax.adam(optax.piecewise_interpolate_schedule("linear", 0.05, {100: 0.4}))
        ),
        "scale_by_trust_ratio": Subject(lambda: optax.scale_by_trust_ratio(), after=(optax.scale(-0.02),)),
    }


OURS, THEIRS = _ours(), _theirs()


# The problem: a tree of three leaves whose first axes four devices can share, and gradients that do not depend on it.


def _draw(seed: int, lead: tuple = (), dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=(*lead, *s)).astype(dtype), SHAPES, is_leaf=is_shape)


PARAMS, GRADIENTS = _draw(0), _draw(1, (STEPS,))
VALUE = {"value": np.float32(1.0)}


def _step(optimizer: Any) -> Callable:
    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params, **VALUE)
        return (optax.apply_updates(params, updates), state), updates

    return step


def _run(subject: Subject, optimizer: Any, params: Any, gradients: Any) -> Any:
    """Parameters after all gradients, by a scan."""
    params = subject.wrap(params)
    (params, _), _ = jax.lax.scan(_step(optimizer), (params, optimizer.init(params)), gradients)
    return subject.unwrap(params)


@functools.cache
def _reference(subject: Subject) -> Any:
    """Parameters after each step, one compiled update a call; kept."""
    optimizer = subject.make()
    params = subject.wrap(jax.device_put(PARAMS))
    carry, after = (params, jax.jit(optimizer.init)(params)), []
    before, step = carry[1], counted_jit(_step(optimizer))
    for index in range(STEPS):
        carry = step(carry, jax.tree.map(lambda g, i=index: g[i], GRADIENTS))[0]
        after.append(subject.unwrap(carry[0]))
    return after, programs(step), (before, carry[1])


def _close(actual: Any, expected: Any, tolerance: float = 2e-5) -> bool:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    return len(actual) == len(expected) and all(
        np.allclose(np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=tolerance, atol=tolerance)
        for a, e in zip(actual, expected)
    )


def _types(tree: Any) -> list:
    return [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(tree)]


def check(name: str) -> Callable:
    """Enters a check under its column."""

    def enter(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return enter


# The columns


@check("jit")
def jit(subject):
    """Compiled once for all steps; the state keeps its structure, shapes and types"""
    after, compiled, (before, state) = _reference(subject)
    finite = all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    same = jax.tree.structure(before) == jax.tree.structure(state) and _types(before) == _types(state)
    return finite and same and compiled == 1


@check("scan")
def scan(subject):
    """In `lax.scan` over steps, as step by step"""
    got = jax.jit(lambda p, g: _run(subject, subject.make(), p, g))(PARAMS, GRADIENTS)
    return _close(got, _reference(subject)[0][-1])


@check("pmap")
def pmap(subject):
    """In `jax.pmap` on four devices, gradients averaged, as on one"""
    noise = _draw(2, (4, STEPS))
    parts = jax.tree.map(lambda g, n: g[None] + n - np.mean(n, axis=0, keepdims=True), GRADIENTS, noise)

    def run(params, gradients):
        return _run(subject, subject.make(), params, jax.lax.pmean(gradients, "d"))

    got = jax.pmap(run, axis_name="d", in_axes=(None, 0), devices=jax.devices()[:4])(PARAMS, parts)
    return _close(jax.tree.map(lambda x: np.asarray(x)[3], got), _reference(subject)[0][-1], 1e-4)


@check("shard_map")
def shard_map(subject):
    """In `jax.shard_map` with every leaf split over four devices, as whole"""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    options = {"axis_name": "d"} if subject.axis else {}

    def run(params, gradients):
        return _run(subject, subject.make(**options), params, gradients)

    specs = (jax.P("d"), jax.P(None, "d"))
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=jax.P("d")))(PARAMS, GRADIENTS)
    return _close(got, _reference(subject)[0][-1])


@check("explicit mesh")
def explicit_mesh(subject):
    """On a mesh of four devices with explicit axes, every leaf split: as whole, and the state keeps its shardings"""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    optimizer = subject.make()
    with jax.set_mesh(mesh):
        params, gradients = (
            jax.device_put(tree, jax.NamedSharding(mesh, spec))
            for tree, spec in ((PARAMS, jax.P("d")), (GRADIENTS, jax.P(None, "d")))
        )

        @jax.jit
        def run(params, gradients):
            params = subject.wrap(params)
            carry = (params, optimizer.init(params))
            return carry, jax.lax.scan(_step(optimizer), carry, gradients)[0]

        carry, after = run(params, gradients)
    same = jax.tree.map(lambda a, b: jax.typeof(a) == jax.typeof(b), carry, after)
    return jax.tree.all(same) and _close(subject.unwrap(after[0]), _reference(subject)[0][-1])


@check("bfloat16")
def bfloat16(subject):
    """bfloat16 parameters and gradients: the 400th update within 3 % (relative RMS) of float32's, of the gradient's type, from a stable state"""
    length = 400
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, jax.tree.map(lambda g: g[0], GRADIENTS)))

    def last(params, gradient):
        optimizer = subject.make()
        params = subject.wrap(params)

        def step(carry, _):
            state, _ = carry
            updates, state = optimizer.update(gradient, state, params, **VALUE)
            return (state, updates), None

        updates = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(step, (optimizer.init(params), updates), None, length=length)[0][1]

    got, expected = jax.jit(lambda a, b: (last(*a), last(*b)))(narrow, jax.tree.map(np.float32, narrow))
    typed = all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))
    pairs = zip(jax.tree.leaves(subject.unwrap(got)), jax.tree.leaves(subject.unwrap(expected)))
    errors = [(np.asarray(a, np.float64) - np.asarray(b, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return typed and all(np.linalg.norm(d) <= 0.03 * np.linalg.norm(b) + 1e-30 for d, b in errors)


@check("masked")
def masked(subject):
    """In `optax.masked`: what is masked out passes as it is, the rest moves as if alone"""
    mask = {"embedding": False, "out": True}
    inside = optax.masked(subject.make(), mask if subject.wrap(1) == 1 else lambda p: jax.tree.map(lambda _: True, p))

    def both(params, gradients):
        whole = _run(subject, optax.with_extra_args_support(inside), params, gradients)
        alone = _run(subject, subject.make(), {"out": params["out"]}, {"out": gradients["out"]})
        return whole, alone

    whole, alone = jax.jit(both)(PARAMS, GRADIENTS)
    passed = PARAMS["embedding"] + np.sum(GRADIENTS["embedding"], axis=0)
    return _close(whole["out"], alone["out"]) and _close(whole["embedding"], passed)


@functools.cache
def _window(subject: Subject) -> tuple[Any, Callable]:
    """(parameters and state before the first step, the compiled step) of the subject in windows of three; kept."""
    wrapper = (
        optax.MultiSteps(subject.make(), EVERY).gradient_transformation()
        if subject in THEIRS.values()
        else optim.accumulate_updates(subject.make(), EVERY)
    )
    params = subject.wrap(jax.device_put(PARAMS))
    return (params, jax.jit(wrapper.init)(params)), jax.jit(_step(wrapper))


def _two_windows(subject: Subject, parts: Any) -> bool:
    """Whether six micro-batches move the parameters as two whole batches, and leave all types."""
    before, step = _window(subject)
    carry = before
    for index in range(2 * EVERY):
        carry, _ = step(carry, jax.tree.map(lambda p, i=index: p[i], parts))
    same = jax.tree.structure(before) == jax.tree.structure(carry) and _types(before) == _types(carry)
    return same and _close(subject.unwrap(carry[0]), _reference(subject)[0][1], 1e-4)


def _parts() -> Any:
    """Micro-batches of two windows, whose means are the gradients."""
    noise = _draw(3, (STEPS, EVERY))
    parts = jax.tree.map(lambda g, n: g[:, None] + n - np.mean(n, axis=1, keepdims=True), GRADIENTS, noise)
    return jax.tree.map(lambda p: p[:2].reshape(2 * EVERY, *p.shape[2:]), parts)


@check("accumulation")
def accumulation(subject):
    """Inside `accumulate_updates` (optax: `MultiSteps`): two windows of three micro-batches move as two whole batches"""
    return _two_windows(subject, _parts())


@check("NaN micro-batch")
def nan_microbatch(subject):
    """There, with a first micro-batch of NaN: as without it (`MultiSteps` as it stands, without its `should_skip_update_fn`)"""
    parts = _parts()
    for part, gradient in zip(jax.tree.leaves(parts), jax.tree.leaves(GRADIENTS)):
        part[0], part[1:EVERY] = np.nan, gradient[0]  # copies of the mean, so that the rest has the same mean
    return _two_windows(subject, parts)


@check("restore")
def restore(subject):
    """Saved by Orbax in the middle of a window and restored: the same to the bit"""
    import orbax.checkpoint as ocp

    carry, step = _window(subject)
    parts = [jax.tree.map(lambda g, i=i: g[i % STEPS], GRADIENTS) for i in range(2 * EVERY)]
    for part in parts[: EVERY + 1]:
        carry = step(carry, part)[0]
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "state", carry)
        checkpointer.wait_until_finished()
        other = checkpointer.restore(
            pathlib.Path(folder) / "state", jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), carry)
        )
    for part in parts[EVERY + 1 :]:
        carry, other = step(carry, part)[0], step(other, part)[0]
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(other), strict=True))


@check("extra args")
def extra_args(subject):
    """optax's common tests: an argument that it does not know is ignored"""
    optimizer, params = subject.make(), subject.wrap(PARAMS)
    gradient = jax.tree.map(lambda g: g[0], GRADIENTS)

    def update(params):
        return optimizer.update(gradient, optimizer.init(params), params, unexpected_extra_argument=1, **VALUE)

    jax.eval_shape(update, params)
    return True


@check("convergence")
def convergence(subject):
    """optax's common tests: a quadratic is minimised, to 1 % of its loss"""
    optimizer, target = subject.make(), _draw(4)

    def loss(params):
        return optax.tree.norm(jax.tree.map(jnp.subtract, params, target), squared=True)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(subject.unwrap(params))
        updates, state = optimizer.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        params = subject.wrap(params)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=2000)
        return loss(subject.unwrap(params)) <= 0.01 * loss(PARAMS)

    return bool(jax.jit(run)(PARAMS))


@check("inject")
def inject(subject):
    """optax's common tests: in `inject_hyperparams`, as with numbers"""
    if not subject.hyper:
        raise NotAsked
    plain, params = subject.factory(**subject.hyper), subject.wrap(PARAMS)
    injected = optax.inject_hyperparams(subject.factory)
    gradient = jax.tree.map(lambda g: g[0], GRADIENTS)

    def both(params, gradient):
        made = injected(**subject.hyper)
        a = optax.with_extra_args_support(plain).update(gradient, plain.init(params), params, **VALUE)[0]
        return a, made.update(gradient, made.init(params), params, **VALUE)[0]

    return _close(*jax.jit(both)(params, gradient))


@check("dtype")
def dtype(subject):
    """optax's common tests: updates have the type of the parameters, in float16, bfloat16 and float32"""
    return all(
        _types(u) == _types(p)
        for u, p, _, _ in map(lambda d: _abstract(subject, d), (jnp.float16, jnp.bfloat16, jnp.float32))
    )


@check("MultiSteps")
def multi_steps(subject):
    """optax's common tests: in `optax.MultiSteps`, zero before the end of a window, also in bfloat16"""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    optimizer = optax.MultiSteps(subject.make(), 4)

    def first(params):
        params = subject.wrap(params)
        return optimizer.update(subject.unwrap(params), optimizer.init(params), params, **VALUE)[0]

    return not any(np.any(x) for x in jax.tree.leaves(jax.jit(first)(params)))


@check("stable state")
def stable_state(subject):
    """optax's common tests: an update leaves structure, shapes and types of the state, in float16, bfloat16 and float32"""
    found = map(lambda d: _abstract(subject, d), (jnp.float16, jnp.bfloat16, jnp.float32))
    return all(jax.tree.structure(a) == jax.tree.structure(b) and _types(a) == _types(b) for _, _, a, b in found)


@functools.cache
def _abstract(subject: Subject, dtype: Any) -> tuple:
    """(updates, parameters, state before, state after), shapes and types alone."""
    optimizer = subject.make()

    def once(params):
        params = subject.wrap(params)
        state = optimizer.init(params)
        updates, after = optimizer.update(subject.unwrap(params), state, params, **VALUE)
        return updates, params, state, after

    return jax.eval_shape(once, jax.tree.map(lambda x: x.astype(dtype), PARAMS))


@check("schedule")
def schedule(subject):
    """optax's common tests: a constant schedule is as its number"""
    if "learning_rate" not in subject.hyper:
        raise NotAsked
    rate = subject.hyper["learning_rate"]
    optimizer = subject.make(learning_rate=optax.constant_schedule(rate))
    got = jax.jit(lambda p, g: _run(subject, optimizer, p, g))(PARAMS, GRADIENTS)
    return _close(got, _reference(subject)[0][-1])


# The page

HEAD = """# Composition of optimizer transformations

Generated by `python -m tests.optim_certificate` on jax {jax}, optax {optax}, CPU, {date}; not written by hand. A tick: the column's statement (below)
holds; a cross: it does not; a dash: it has no meaning there. A transformation that is no optimizer by itself stands in a chain that makes one of it;
Adam is `in_float32(optax.adam)` in the rows of effattn_jax. `optax.lookahead` is given the parameters it asks for, `LookaheadParams`.

**effattn_jax: {ours} of {ours_all} checks hold. optax, its own transformations on the same matrix: {theirs} of {theirs_all}.**

"""


def outcome(subject: Subject, name: str) -> tuple[str, str]:
    """(a tick, a cross or a dash, what went wrong)."""
    try:
        return ("✓", "") if CHECKS[name](subject) else ("✗", "a false statement")
    except NotAsked:
        return "–", ""
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is what the table has to show
        return "✗", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def count(rows: dict[str, list[str]]) -> tuple[int, int]:
    """(checks that hold, checks asked)."""
    cells = [cell for row in rows.values() for cell in row]
    return cells.count("✓"), len(cells) - cells.count("–")


def _table(rows: dict[str, list[str]]) -> list[str]:
    head = ["| transformation | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    return head + [f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def main(path: pathlib.Path = PAGE) -> int:
    """Runs the matrix, writes the page, and returns the exit code."""
    rows: dict[str, dict[str, list[str]]] = {}
    for title, subjects in (("effattn_jax", OURS), ("optax", THEIRS)):
        rows[title] = {}
        for name, subject in subjects.items():
            found = [outcome(subject, check) for check in CHECKS]
            rows[title][name] = [mark for mark, _ in found]
            print(title, name, *rows[title][name], flush=True)
            for column, (mark, reason) in zip(CHECKS, found):
                if mark == "✗":
                    print(f"  {column}: {reason}", flush=True)
    (ours, ours_all), (theirs, theirs_all) = count(rows["effattn_jax"]), count(rows["optax"])
    text = HEAD.format(
        jax=jax.__version__, optax=optax.__version__, date=datetime.date.today().isoformat(),
        ours=ours, ours_all=ours_all, theirs=theirs, theirs_all=theirs_all,
    )  # fmt: skip
    for title, part in rows.items():
        text += "\n".join([f"## {title}", "", *_table(part), "", ""])
    legend = [f"- **{name}**: {' '.join(function.__doc__.split())}." for name, function in CHECKS.items()]
    path.write_text(text + "\n".join(["## Columns", "", *legend, ""]), encoding="utf-8")
    return int(ours != ours_all)


if __name__ == "__main__":
    sys.exit(main(*map(pathlib.Path, sys.argv[1:2])))
