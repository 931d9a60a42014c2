"""Time of one real update by each way of accumulating gradients, against the bare scan.

    python -m benchmarks.accumulation [--microbatches 4] [--batch-size 32] [--width 1024] [--layers 6] [--rounds 7] [--name NAME]

A ReLU MLP of `layers` square layers under AdamW; a micro-batch has `batch-size` rows, few enough that the optimizer's part shows. The bare scan is
the least that can be done: gradients summed by `lax.scan` in one program, one AdamW update. All ways run in turn, round after round, with state
donated; the figures are medians. "a call each" is one program called once a micro-batch (for the bare loop one that adds and one that updates),
"scanned" the same program in a `lax.scan`; `.apply` is the form that leaves the parameters alone inside a window; "by window" is `drop_nonfinite="window"`. Writes benchmarks/results/NAME.json.
"""

import dataclasses
import datetime
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console
from rich.table import Column, Table

from benchmarks.attention import RESULTS, device_name
from effattn_jax.optim import accumulate_gradients, accumulate_updates
from effattn_jax.training.startup import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    microbatches: int = 4
    """In a window."""
    batch_size: int = 32
    """Rows of a micro-batch."""
    width: int = 1024
    """Of every layer."""
    layers: int = 6
    """Weight matrices."""
    rounds: int = 7
    """Timed rounds; the median counts."""
    name: str = "accumulation"
    """Name of the result file."""


def summed_loss(params, x):
    """(sum of losses, rows)."""
    h = x
    for w in params:
        h = jax.nn.relu(h @ w)
    return jnp.sum(h**2) / 1024, x.shape[0]


def mean_gradient(params, x):
    return jax.grad(lambda p: summed_loss(p, x)[0] / x.shape[0])(params)


def apply(optimizer, gradients, params, state):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def bare_scan(microbatches):
    """Gradients summed in a scan, then one update."""
    optimizer = optax.adamw(1e-5)

    def step(params, state, x):
        def add(total, part):
            return jax.tree.map(jnp.add, total, mean_gradient(params, part)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), x)
        return apply(optimizer, jax.tree.map(lambda g: g / microbatches, total), params, state)

    return optimizer, step


def in_one_step(microbatches):
    """`accumulate_gradients`."""
    optimizer = optax.adamw(1e-5)
    gradients_of = accumulate_gradients(summed_loss, microbatches)

    def step(params, state, x):
        _, gradients = gradients_of(params, x.reshape(-1, x.shape[-1]))
        return apply(optimizer, gradients, params, state)

    return optimizer, step


def wrapped(optimizer, scanned, apply=apply):
    """A transformation called once a micro-batch."""

    def one(params, state, x):
        return apply(optimizer, mean_gradient(params, x), params, state)

    if not scanned:
        return optimizer, one
    return optimizer, lambda params, state, x: jax.lax.scan(lambda c, part: (one(*c, part), None), (params, state), x)[
        0
    ]


def ways(k):
    """name -> (optimizer, step, whether the step takes one micro-batch)."""
    multi = optax.MultiSteps(optax.adamw(1e-5), k).gradient_transformation()
    ours = accumulate_updates(optax.adamw(1e-5), k)
    by_window = accumulate_updates(optax.adamw(1e-5), k, drop_nonfinite="window")

    def whole(optimizer, gradients, params, state):
        return optimizer.apply(gradients, state, params)

    return {
        "bare scan": (*bare_scan(k), False),
        "accumulate_gradients": (*in_one_step(k), False),
        "accumulate_updates, scanned": (*wrapped(ours, True), False),
        "accumulate_updates.apply, scanned": (*wrapped(ours, True, whole), False),
        "accumulate_updates by window, scanned": (*wrapped(by_window, True), False),
        "accumulate_updates.apply by window, scanned": (*wrapped(by_window, True, whole), False),
        "optax.MultiSteps, scanned": (*wrapped(multi, True), False),
        "accumulate_updates, a call each": (*wrapped(ours, False), True),
        "accumulate_updates.apply, a call each": (*wrapped(ours, False, whole), True),
        "accumulate_updates by window, a call each": (*wrapped(by_window, False), True),
        "accumulate_updates.apply by window, a call each": (*wrapped(by_window, False, whole), True),
        "optax.MultiSteps, a call each": (*wrapped(multi, False), True),
    }


def start(settings):
    """(parameters, micro-batches)."""
    keys = jax.random.split(jax.random.key(0), settings.layers + 1)
    scale = (2 / settings.width) ** 0.5
    params = [scale * jax.random.normal(key, (settings.width, settings.width)) for key in keys[1:]]
    return params, jax.random.normal(keys[0], (settings.microbatches, settings.batch_size, settings.width))


def prepare(settings, optimizer, step, single):
    """(a function that makes one real update, temporaries in bytes)."""
    params, x = start(settings)
    carry = [params, jax.jit(optimizer.init)(params)]
    inputs = list(x) if single else [x]
    program = partial(jax.jit, donate_argnums=(0, 1))(step).lower(*carry, inputs[0]).compile()

    def update():
        for part in inputs:
            carry[:] = program(*carry, part)
        jax.block_until_ready(carry)

    update()
    return update, program.memory_analysis().temp_size_in_bytes


def prepare_loop(settings):
    """The same for the least that calls can do: a program that adds, and one that updates after the last."""
    params, x = start(settings)
    optimizer = optax.adamw(1e-5)
    carry = [params, jax.jit(optimizer.init)(params), jax.tree.map(jnp.zeros_like, params)]
    add = partial(jax.jit, donate_argnums=1)(lambda p, g, part: jax.tree.map(jnp.add, g, mean_gradient(p, part)))

    def end(params, state, total):
        mean = jax.tree.map(lambda g: g / settings.microbatches, total)
        return *apply(optimizer, mean, params, state), jax.tree.map(jnp.zeros_like, total)

    add = add.lower(params, carry[2], x[0]).compile()
    end = partial(jax.jit, donate_argnums=(0, 1, 2))(end)

    def update():
        for part in list(x):
            carry[2] = add(carry[0], carry[2], part)
        carry[:] = end(*carry)
        jax.block_until_ready(carry)

    update()
    return update, add.memory_analysis().temp_size_in_bytes


def main(settings: Settings) -> None:
    """Measures, prints and writes."""
    keep_freed_memory()  # as train.py does: fresh pages for temporaries would be timed with the arithmetic
    prepared = {name: prepare(settings, *way) for name, way in ways(settings.microbatches).items()}
    prepared["bare loop, a call each"] = prepare_loop(settings)
    times = {name: [] for name in prepared}
    for _ in range(settings.rounds):
        for name, (update, _) in prepared.items():
            start = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - start)
    base = times["bare scan"]
    table = Table(
        Column("way", no_wrap=True),
        "ms a real update",
        "times the bare scan",
        "temporaries, parameters",
        title=device_name(),
    )
    rows = []
    for name, (_, temporaries) in prepared.items():
        ratio = statistics.median(t / b for t, b in zip(times[name], base))
        copies = temporaries / (4 * settings.layers * settings.width**2)
        milliseconds = 1e3 * statistics.median(times[name])
        rows.append({"way": name, "ms": milliseconds, "ratio": ratio, "temporaries": copies})
        table.add_row(name, f"{milliseconds:.1f}", f"{ratio:.2f}", f"{copies:.2f}")
    Console().print(table)
    result = {"settings": dataclasses.asdict(settings), "device": device_name(), "jax": jax.__version__}
    result |= {"date": datetime.date.today().isoformat(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{settings.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
