"""HiPPO: how well each memory reconstructs, how exact a DPLR kernel is, and how many samples a second are projected.

    python -m benchmarks.hippo [--length 1000] [--samples 1000000] [--name NAME]

The signal is a sum of sines of at most `frequency` periods, sampled at the middle of each cell; errors are relative RMS over all of the memory, beside the best projection's.
Writes benchmarks/results/NAME.json and prints the tables.
"""

import dataclasses
import datetime
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.attention import RESULTS, device_name
from effattn_jax.ssm import dplr_kernel, hippo_dplr, hippo_project, hippo_reconstruct

MEMORIES = (("legs", "exact"), ("legs", "bilinear"), ("legs", "backward"), ("cosine_scaled", "exact"), ("legt", "zoh"), ("fourier", "zoh"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the tables."""

    length: int = 1000
    """Samples of the signal that is reconstructed."""
    sizes: tuple[int, ...] = (8, 32, 64)
    """State sizes P of the reconstructions."""
    frequency: float = 5.0
    """Highest frequency of the signal, in periods over all of it."""
    samples: int = 1_000_000
    """Samples of the signal whose last state is timed."""
    size: int = 256
    """State size of the timings."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    name: str = "hippo"
    """Name of the result file."""


def signal(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """(middles of the cells in [0, 1], the samples there), float64."""
    s = (np.arange(settings.length) + 0.5) / settings.length
    rng = np.random.default_rng(0)
    frequencies, phases = rng.uniform(0, settings.frequency, 8), rng.uniform(0, 2 * np.pi, 8)
    return s, np.sin(2 * np.pi * s[:, None] * frequencies + phases).sum(1)


def best(measure: str, s: np.ndarray, u: np.ndarray, size: int) -> float:
    """The error of the least-squares fit by the basis itself."""
    basis = np.asarray(hippo_reconstruct(jnp.eye(size), measure, s)).T.astype(np.float64)
    return relative(basis @ np.linalg.lstsq(basis, u, rcond=None)[0], u)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative RMS error."""
    return float(np.sqrt(np.mean((np.asarray(actual) - expected) ** 2) / np.mean(expected**2)))


def reconstructions(settings: Settings) -> list[dict]:
    """Error of each memory, size and method."""
    s, u = signal(settings)
    rows = []
    for measure, method in MEMORIES:
        for size in settings.sizes:
            x = hippo_project(u.astype(np.float32), measure, size, method=method, final_only=True)
            error = relative(hippo_reconstruct(x, measure, s), u)
            rows.append(
                {"memory": measure, "method": method, "size": size, "error": error, "best": best(measure, s, u, size)}
            )
    return rows


def speed(settings: Settings) -> list[dict]:
    """Samples a second of the last LegS state: exactly, and by the bilinear recurrence at O(P) a step."""
    u = np.random.default_rng(0).normal(size=settings.samples).astype(np.float32)
    rows = []
    for method in ("exact", "bilinear"):
        project = jax.jit(partial(hippo_project, measure="legs", size=settings.size, method=method, final_only=True))
        jax.block_until_ready(project(u))
        times = []
        for _ in range(settings.rounds if method == "exact" else 1):
            start = time.perf_counter()
            jax.block_until_ready(project(u))
            times.append(time.perf_counter() - start)
        rows.append(
            {"method": method, "size": settings.size, "samples_per_second": settings.samples / np.median(times)}
        )
    return rows


def kernels() -> list[dict]:
    """Largest error of a float32 kernel relative to its largest entry, against powers of the dense matrix in float64."""
    rows = []
    for size in (64, 256):
        Lambda, P, B, _ = (x.astype(np.complex64) for x in hippo_dplr("legs", size))
        rng = np.random.default_rng(0)
        C = (rng.normal(size=size // 2) + 1j * rng.normal(size=size // 2)).astype(np.complex64)
        pair = [np.concatenate([x, x.conj()]).astype(np.complex128) for x in (Lambda, P, B, C)]
        for step in np.float32([1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]):
            A, eye = np.diag(pair[0]) - np.outer(pair[1], pair[1].conj()), np.eye(size)
            inverse = np.linalg.inv(eye - float(step) / 2 * A)
            A_bar, x = inverse @ (eye + float(step) / 2 * A), inverse @ pair[2] * float(step)
            expected = np.empty(1024)
            for l in range(1024):
                expected[l], x = (pair[3] @ x).real, A_bar @ x
            for length in (1024, 1023):
                actual = np.asarray(dplr_kernel(Lambda, P, B, C, step, length))
                error = float(np.abs(actual - expected[:length]).max() / np.abs(expected[:length]).max())
                rows.append({"size": size, "step": float(step), "length": length, "error": error})
    return rows


def main(settings: Settings) -> None:
    """Measures, prints and writes."""
    console = Console()
    record = {"device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__}
    record |= {"speed": speed(settings), "reconstruction": reconstructions(settings), "kernels": kernels()}
    for name, rows in record.items():
        if isinstance(rows, list):
            table = Table(*rows[0], title=f"{name}, {record['device']}")
            for row in rows:
                table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
            console.print(table)
    path = RESULTS / f"{settings.name}.json"
    path.write_text(json.dumps(record | {"settings": dataclasses.asdict(settings)}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
