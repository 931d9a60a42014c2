"""What the compilers for TPUs and GPUs make of every mixer, on a machine that has neither: seconds of compiling, and memory beside arguments and results.

    make compiled ACCELERATOR=tpu VENV=.venv-tpu         for one TPU v5e, by libtpu
    make compiled ACCELERATOR=cuda VENV=.venv-cuda       for one H100, by jax's CUDA plugin and NVIDIA's compilers
    python -m benchmarks.compiled tpu [--lengths 4096 65536] [--groups ...] [--dtype bfloat16] [--name NAME]

The programs are those that such a device would run, Pallas kernels included; nothing is run. Writes benchmarks/results/compiled_TARGET.json, prints the
table, and exits with 1 where a program is refused, but for those that need a T x S array by what they are, which are left out beyond 4,096.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: the device compiled for is not here
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from benchmarks.attention import RESULTS, more_inputs
from benchmarks.peers import OPTIONS
from benchmarks.state_spaces import GROUPS
from effattn_jax import attention, position
from effattn_jax.recurrence import diagonal_recurrence

SQUARE = 4096  # the longest row of what has a T x S array
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the compilation."""

    target: tyro.conf.Positional[Literal["tpu", "cuda"]]
    """What to compile for."""
    lengths: tuple[int, ...] = (4096, 65536)
    """Sequence lengths."""
    heads: int = 8
    """Attention heads."""
    dim: int = 64
    """Width of a head."""
    dtype: str = "bfloat16"
    """Input dtype of attention; state spaces are in float32."""
    groups: tuple[str, ...] = ()
    """Only these, beside the rows that the result file has of the others; empty is all."""
    name: str | None = None
    """Name of the result file; compiled_TARGET if None."""


def device(target: str) -> jax.Device:
    """One device of the kind, to compile for."""
    try:
        if target == "tpu":
            return topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
        return topologies.get_topology_desc("1x1x1", "cuda", target_config=H100, topology="1x1x1").devices[0]
    except Exception as error:
        raise SystemExit(
            f"error: this environment cannot compile for {target}: {str(error).splitlines()[0]} "
            f"(make compiled ACCELERATOR={target} VENV=.venv-{target} makes one that can)"
        ) from None


def programs(settings: Settings, length: int) -> dict[str, Callable[[], tuple[Callable, tuple]]]:
    """By name, what makes a function and the arguments whose shapes it is compiled for."""
    made: dict[str, Callable] = {}
    shape = (1, length, settings.heads, settings.dim)
    query = jax.ShapeDtypeStruct(shape, settings.dtype)

    def member(name, mixer):
        options = dict(OPTIONS.get(name) or mixer.options)
        more = more_inputs(mixer, jax.random.key(0), jax.numpy.zeros(shape, settings.dtype))
        call = partial(mixer.function, is_causal="causality" not in mixer.exempt, **options)
        return lambda q, k, v, more: call(q, k, v, **more), (query, query, query, more)

    for name, mixer in (attention.MIXERS | position.MIXERS).items():
        if length <= (
            1024 if "length" in mixer.exempt else SQUARE if {"memory", "causality"} & {*mixer.exempt} else length
        ):
            made[name] = partial(member, name, mixer)
    flash = partial(attention.dot_product_attention, is_causal=True, implementation="pallas")
    made["softmax, pallas"] = lambda: (flash, (query, query, query))
    ids = jax.ShapeDtypeStruct(shape[:2], np.int32)
    made["softmax, pallas, documents"] = lambda: (
        lambda q, k, v, ids: flash(q, k, v, segment_ids=ids),
        (query, query, query, ids),
    )
    for group, (inputs, members) in GROUPS.items():
        made[group] = lambda inputs=inputs, members=members: (members["effattn_jax"], inputs(jax.random.key(0), length))
    steps = jax.ShapeDtypeStruct((1, length, 512), np.float32)
    made["diagonal, pallas"] = lambda: (partial(diagonal_recurrence, implementation="pallas"), (steps, steps))
    return made


def both(function: Callable) -> Callable:
    """The function with its vector-Jacobian product by the arguments that are not integers."""

    def run(*arguments):
        floats = [
            i
            for i, x in enumerate(arguments)
            if all(jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in jax.tree.leaves(x))
        ]

        def of_floats(*some):
            chosen = dict(zip(floats, some, strict=True))
            return function(*(chosen.get(i, x) for i, x in enumerate(arguments)))

        out, pull = jax.vjp(of_floats, *(arguments[i] for i in floats))
        return out, pull(out)

    return run


def compiled(function: Callable, arguments: tuple, mesh: Mesh) -> dict[str, float]:
    """Seconds of tracing and compiling, and megabytes of temporaries."""
    here = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
    started = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells Pallas the kind of device
        program = jax.jit(function).lower(*shapes).compile()
    return {"seconds": time.perf_counter() - started, "mb": program.memory_analysis().temp_size_in_bytes / 1e6}


def rows(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """A row for each program and length; one that is refused has the first line of the reason."""
    target = device(settings.target)
    mesh = Mesh(np.array([target]), ("x",), axis_types=(AxisType.Auto,))
    found = []
    for length in settings.lengths:
        made = programs(settings, length)
        unknown = sorted(set(settings.groups) - set(made))
        if unknown:
            raise SystemExit(f"error: no group {', '.join(unknown)}; there are {', '.join(made)}")
        for name in settings.groups or made:
            row: dict[str, Any] = {"name": name, "length": length, "date": today()}
            try:
                function, arguments = made[name]()
                row["forward"] = compiled(function, arguments, mesh)
                row["both"] = compiled(both(function), arguments, mesh)
            except Exception as error:
                row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            console.print(f"T={length}: {name} {row.get('refused', 'compiled')}")
            found.append(row)
    return found


def today() -> str:
    """The date, as it stands in each row."""
    return datetime.date.today().isoformat()


def others(path: pathlib.Path, record: dict, found: list[dict]) -> list[dict]:
    """The rows of an earlier compilation with the same settings that were not compiled again."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(name) != value for name, value in record.items()):
        return []
    again = {(row["name"], row["length"]) for row in found}
    return [row for row in earlier["rows"] if (row["name"], row["length"]) not in again]


def main(settings: Settings) -> int:
    """Compiles, prints and writes; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = rows(settings, console)
    kind = {"tpu": "TPU v5e", "cuda": "H100"}[settings.target]
    record = {
        "target": kind, "jax": jax.__version__, "dtype": settings.dtype,
        "shape": {"batch": 1, "heads": settings.heads, "dim": settings.dim},
    }  # fmt: skip
    path: pathlib.Path = RESULTS / f"{settings.name or f'compiled_{settings.target}'}.json"
    kept = others(path, record, found) if settings.groups else []
    path.write_text(json.dumps(record | {"rows": kept + found}, indent=1) + "\n")
    table = Table(
        title=f"compiled for one {kind}, {settings.heads} heads of {settings.dim}, {settings.dtype}, jax {jax.__version__}, {today()}"
    )
    for column in ("", "T", "forward, s", "MB", "both passes, s", "MB"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in found:
        cells = [f"{row[part][what]:.1f}" for part in ("forward", "both") for what in ("seconds", "mb") if part in row]
        table.add_row(row["name"], f"{row['length']:,}", *(cells or [row["refused"]]))
    console.print(table)
    return int(any("refused" in row for row in found))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
