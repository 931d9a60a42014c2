"""Device time of the kernels on an accelerator, beside cuDNN's attention through JAX and PyTorch's, in one run.

    python -m benchmarks.accelerator [--shapes 1,8192,96,128 2,16384,16,128 8,16384,16,64] [--repeats 20] [--name NAME]

Writes benchmarks/results/NAME.json and prints the table. A shape is (batch, T, heads, head dim); all is causal and bfloat16. Each figure is the
median of `--rounds` means over `--repeats` calls queued one behind the other, so that launching hides behind computing; contenders take turns. The
floor is the larger of the bytes that must move over `--bandwidth` and the operations over `--flops`.
"""

import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from effattn_jax.attention import dot_product_attention, gated_linear_attention, linear_attention

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    shapes: tuple[str, ...] = ("1,8192,96,128", "2,16384,16,128", "8,16384,16,64")
    """Shapes, each batch,T,heads,dim."""
    repeats: int = 20
    """Calls queued for one mean."""
    rounds: int = 3
    """Means of which the median counts."""
    bandwidth: float = 3.0e12
    """Bytes a second that the device copies, read and written."""
    flops: float = 790e12
    """Operations a second of a bfloat16 matrix product."""
    forms: tuple[str, ...] = ()
    """Only contenders whose name holds one of these; empty is all."""
    name: str = "accelerator"
    """Name of the result file."""


def jax_contenders() -> dict[str, Callable]:
    """Functions of (query, key, value, log_decay)."""
    softmax = partial(dot_product_attention, is_causal=True)
    linear = partial(linear_attention, is_causal=True)
    gated = partial(gated_linear_attention, is_causal=True)
    return {
        "linear": lambda q, k, v, g: linear(q, k, v),
        "linear, chunks of 64": lambda q, k, v, g: linear(q, k, v, chunk_size=64),
        "linear, chunks of 256": lambda q, k, v, g: linear(q, k, v, chunk_size=256),
        "linear, one chunk after the other": lambda q, k, v, g: linear(q, k, v, implementation="chunked"),
        "gated_linear": lambda q, k, v, g: gated(q, k, v, log_decay=g),
        "softmax, cudnn": lambda q, k, v, g: softmax(q, k, v, implementation="cudnn"),
        "softmax, chunked": lambda q, k, v, g: softmax(q, k, v),
        "softmax, pallas": lambda q, k, v, g: softmax(q, k, v, implementation="pallas"),
        "jax.nn, cudnn": lambda q, k, v, g: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        ),
    }


def jax_calls(function: Callable, shape: tuple[int, ...]) -> tuple[Callable, Callable, dict]:
    """forward(n) and both(n), each n calls and a wait; and the temporaries of both programs in MB."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, ct = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    g = jax.nn.log_sigmoid(4 + jax.random.normal(keys[4], shape[:3], jnp.float32))

    def both(q, k, v, g, ct):
        out, pull = jax.vjp(lambda *x: function(*x, g), q, k, v)
        return out, pull(ct)

    programs = [
        jax.jit(function).lower(q, k, v, g).compile(),
        jax.jit(both).lower(q, k, v, g, ct).compile(),
    ]
    memory = {n: p.memory_analysis().temp_size_in_bytes / 1e6 for n, p in zip(("forward", "both"), programs)}

    def repeat(program, *arguments):
        def run(count):
            for _ in range(count):
                out = program(*arguments)
            jax.block_until_ready(out)

        return run

    return repeat(programs[0], q, k, v, g), repeat(programs[1], q, k, v, g, ct), memory


def torch_calls(backend: str, shape: tuple[int, ...]) -> tuple[Callable, Callable, dict]:
    """The same for torch.nn.functional.scaled_dot_product_attention with one of its GPU backends."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    batch, length, heads, dim = shape
    x = [
        torch.randn(batch, heads, length, dim, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
        for i in range(4)
    ]
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def forward(count):
        with torch.no_grad(), sdpa_kernel(kind):
            for _ in range(count):
                scaled_dot_product_attention(*x[:3], is_causal=True)
        torch.cuda.synchronize()

    def both(count):
        with sdpa_kernel(kind):
            for _ in range(count):
                out = scaled_dot_product_attention(*x[:3], is_causal=True)
                torch.autograd.grad(out, x[:3], x[3])
        torch.cuda.synchronize()

    return forward, both, {}


def floors(shape: tuple[int, ...], settings: Settings) -> dict[str, float]:
    """Milliseconds below which neither kind of attention can run forward."""
    batch, length, heads, dim = shape
    moved = 4 * 2 * batch * length * heads * dim / settings.bandwidth
    return {"linear": 1e3 * moved, "softmax": 1e3 * max(moved, 2 * batch * heads * length**2 * dim / settings.flops)}


def measure(shape: tuple[int, ...], settings: Settings) -> list[dict]:
    """Rows of one shape."""
    builders = {name: partial(jax_calls, function) for name, function in jax_contenders().items()}
    builders |= {f"torch SDPA, {backend}": partial(torch_calls, backend) for backend in ("flash", "cudnn")}
    ready = {}
    for name, build in builders.items():
        if settings.forms and not any(word in name for word in settings.forms):
            continue
        try:
            forward, both, memory = build(shape)
            forward(2), both(2)
            ready[name] = (forward, both, memory)
        except Exception as error:  # noqa: BLE001 - a contender that cannot run here is named and left out
            print(
                f"  {name}: left out at {shape}, {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True
            )
    times: dict[str, tuple[list, list]] = {name: ([], []) for name in ready}
    for _ in range(settings.rounds):
        for name, (forward, both, _) in ready.items():
            for call, seconds in zip((forward, both), times[name], strict=True):
                started = time.perf_counter()
                call(settings.repeats)
                seconds.append((time.perf_counter() - started) / settings.repeats)
    rows = []
    for name, (forward, both) in times.items():
        ms = [1e3 * statistics.median(x) for x in (forward, both)]
        rows.append(
            {"shape": shape, "name": name, "forward_ms": ms[0], "both_ms": ms[1], "temporaries_mb": ready[name][2]}
        )
        print(f"{shape!s:24} {name:36} forward {ms[0]:8.3f} ms   both {ms[1]:8.3f} ms   {ready[name][2]}", flush=True)
    print(f"{shape!s:24} floors, forward: {floors(shape, settings)}", flush=True)
    return rows


def main(settings: Settings) -> None:
    """Measures, prints, and writes the JSON."""
    rows = []
    for text in settings.shapes:
        shape = tuple(int(n) for n in text.split(","))
        rows += measure(shape, settings)
    record = {
        "device": jax.devices()[0].device_kind, "date": datetime.date.today().isoformat(), "jax": jax.__version__,
        "settings": dataclasses.asdict(settings), "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{settings.name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Settings, description=__doc__))
