"""How far Performer's estimate is from softmax attention, by the size of queries and keys, features and draw.

    python -m benchmarks.performer [--trials 16] [--length 512] [--name NAME]

Queries and keys are N(0, std^2), heads of 64, not causal; an entry is the relative RMS error of the output over `trials` draws of both data and
features, with its 95 % bounds. Writes benchmarks/results/NAME.json and prints the table.
"""

import dataclasses
import datetime
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.attention import RESULTS, device_name
from effattn_jax.attention import dot_product_attention, performer_attention, random_features

# name -> (options of random_features, estimator)
VARIANTS: dict[str, tuple[dict, str]] = {
    "iid": ({"orthogonal": False}, "plain"),
    "orthogonal": ({}, "plain"),
    "optimal": ({}, "optimal"),
    "tempered": ({"antithetic": True, "norms": "fixed"}, "tempered"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the table."""

    trials: int = 16
    """Draws of data and features an entry."""
    length: int = 512
    """Queries and keys."""
    dim: int = 64
    """Width of a head."""
    features: tuple[int, ...] = (64, 256, 1024)
    """Numbers of features M."""
    stds: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Standard deviations of queries and keys."""
    seed: int = 0
    """Of everything drawn."""
    name: str = "performer"
    """Name of the result file."""


def errors(variant: str, std: float, num_features: int, settings: Settings) -> np.ndarray:
    """Squared relative error of each trial."""
    options, estimator = VARIANTS[variant]

    def trial(rng):
        rng_data, rng_features = jax.random.split(rng)
        q, k, v = jax.random.normal(rng_data, (3, settings.length, 1, settings.dim))
        w = random_features(rng_features, num_features, settings.dim, **options)
        out = performer_attention(std * q, std * k, v, projection=w, estimator=estimator, input_scale=std)
        exact = dot_product_attention(std * q, std * k, v)
        return jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)

    keys = jax.random.split(jax.random.key(settings.seed), settings.trials)
    return np.asarray(jax.jit(partial(jax.lax.map, trial))(keys), np.float64)


def bounds(squares: np.ndarray) -> tuple[float, float]:
    """(root of the mean, half the width of its 95 % interval)."""
    root = float(np.sqrt(squares.mean()))
    return root, float(1.96 * squares.std(ddof=1) / np.sqrt(len(squares)) / (2 * root))


def main(settings: Settings) -> None:
    """Measures, prints and writes."""
    rows = []
    table = Table(title=f"relative RMS error, T = {settings.length}, H = {settings.dim}, {device_name()}")
    for column in ("std", "draw", *(f"M = {m}" for m in settings.features)):
        table.add_column(column, justify="left" if column == "draw" else "right")
    for std in settings.stds:
        for variant in VARIANTS:
            entries = [bounds(errors(variant, std, m, settings)) for m in settings.features]
            table.add_row(str(std), variant, *(f"{root:.3f} ± {half:.3f}" for root, half in entries))
            for m, (root, half) in zip(settings.features, entries, strict=True):
                rows.append({"std": std, "draw": variant, "features": m, "error": root, "half_width": half})
    Console().print(table)
    record = {"device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__, "rows": rows}
    path = RESULTS / f"{settings.name}.json"
    path.write_text(json.dumps(record | {"settings": dataclasses.asdict(settings)}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
