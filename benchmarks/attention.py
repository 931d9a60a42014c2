"""Time and compiled memory of every mixer of the tables against jax.nn.dot_product_attention and the peers that are installed.

    python -m benchmarks.attention [--lengths 1024 4096 16384 65536] [--heads 8] [--dim 64] [--rounds 5] [--name NAME]

Writes benchmarks/results/NAME.json and its plot, and prints the table. All contenders of a group and length run in turn, round after round, in
one process; the figures are medians, so that ratios within a group stand on a noisy machine. A contender whose program would need more
than `--memory-limit` or whose next length would take longer than `--patience` seconds is left out and named.
"""

import dataclasses
import datetime
import inspect
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.peers import JAX_PEERS, OPTIONS, TORCH_PEERS, WINDOW, Contender, compiled, packed, with_positions
from benchmarks.plot import plot
from effattn_jax import mixing
from effattn_jax._contract import Mixer, TokenMixer
from effattn_jax.attention import MIXERS, external_attention, linear_attention
from effattn_jax.attention.features import FEATURE_MAPS
from effattn_jax.attention.random_features import KERNELS
from effattn_jax.position import rotary_linear_attention

RESULTS = pathlib.Path(__file__).parent / "results"
SQUARE = 4096  # the longest rows of members whose weights have a number for each pair of places, or for each place


class TooLong(Exception):
    """A member has no weights for rows of this length."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    """Sequence lengths."""
    heads: int = 8
    """Attention heads."""
    dim: int = 64
    """Width of a head."""
    batch: int = 1
    """Sequences in a batch (peers in PyTorch: 1)."""
    dtype: str = "float32"
    """Input dtype of the JAX contenders."""
    rounds: int = 5
    """Timed rounds; the median counts."""
    memory_limit: float = 8.0
    """GiB of temporaries above which a program is not run."""
    patience: float = 20.0
    """Seconds one pass may take; a contender expected to exceed it is left out."""
    groups: tuple[str, ...] = ()
    """Only these groups, beside what the result files have of others; empty is all."""
    name: str = "attention"
    """Name of the result files."""


def contenders(settings: Settings) -> dict[str, dict[str, Callable[[int], Contender]]]:
    """By group: every mixer of the tables, in its causal form where it has one, and the peers; also softmax with a window and over documents packed
    into a row, linear attention with turned features, gated linear attention with a decay for each feature, and the kinds of features.
    """
    groups: dict[str, dict[str, Callable[[int], Contender]]] = {}
    for name, mixer in MIXERS.items():
        call = partial(
            mixer.function, is_causal="causality" not in mixer.exempt, **(OPTIONS.get(name) or mixer.options)
        )
        groups[name] = {"effattn_jax": partial(_jax_contender, settings, call, mixer)}
    for name in sorted({*FEATURE_MAPS} - {"elu", "hedgehog"}):
        call = partial(linear_attention, is_causal=True, feature_map=name, normalize=name != "identity")
        groups[f"linear, {name}"] = {"effattn_jax": partial(_jax_contender, settings, call, None)}
    for name in sorted({*KERNELS} - {"softmax"}):
        call = partial(MIXERS["performer"].function, is_causal=True, kernel=name)
        groups[f"performer, {name}"] = {"effattn_jax": partial(_jax_contender, settings, call, MIXERS["performer"])}
    groups["external"] = {"effattn_jax": partial(_external, settings)}
    for name, mixer in mixing.MIXERS.items():
        groups[name] = {"effattn_jax": partial(_attention_free, settings, mixer, name != "fnet")}
    softmax = partial(MIXERS["softmax"].function, is_causal=True, window=WINDOW)
    groups["window 256"] = {"effattn_jax": partial(_jax_contender, settings, softmax, None)}
    documents = partial(packed, partial(MIXERS["softmax"].function, is_causal=True))
    groups["packed"] = {"effattn_jax": partial(_jax_contender, settings, documents, None)}
    turned = partial(with_positions, partial(rotary_linear_attention, is_causal=True))
    groups["rotary_linear"] = {"effattn_jax": partial(_jax_contender, settings, turned, None)}
    gated = MIXERS["gated_linear"]
    each = partial(gated.function, is_causal=True)
    groups["gated_linear, features"] = {
        "effattn_jax": partial(_jax_contender, settings, each, gated._replace(extras=_feature_decays))
    }
    for group, members in groups.items():
        both_ways = {"jax.nn, both ways": jax.nn.dot_product_attention} if group in ("linformer", "fnet") else None
        for name, function in (both_ways or JAX_PEERS.get(group, JAX_PEERS["softmax"])).items():
            members[name] = partial(_jax_contender, settings, function, None)
        for name, build in TORCH_PEERS.get(group, {}).items():
            members[name] = lambda length, build=build: build(length, settings.heads, settings.dim)
    return groups


def _feature_decays(rng: np.random.Generator, query: jax.Array) -> dict[str, np.ndarray]:
    """A log decay for each feature, as gated linear attention takes them too."""
    return {"log_decay": -np.logaddexp(0, -2 - rng.normal(size=query.shape)).astype(query.dtype)}


def more_inputs(mixer: Mixer | None, key: jax.Array, query: jax.Array) -> dict[str, jax.Array]:
    """What the mixer reads beside query, key and value."""
    more = {}
    if mixer is not None and mixer.extras is not None:
        more |= jax.tree.map(jnp.asarray, mixer.extras(np.random.default_rng(0), query))
    if mixer is not None and mixer.weights is not None:
        has_tables = "length" in inspect.signature(mixer.weights).parameters
        options = {"length": query.shape[1]} if has_tables else {}
        more |= mixer.weights(key, query.shape[2], query.shape[2], query.shape[3], **options)
    return more


def _jax_contender(settings: Settings, function: Callable, mixer: Mixer | None, length: int) -> Contender:
    if mixer is not None and {"length", "causality"} & {*mixer.exempt} and length > SQUARE:
        raise TooLong
    shape = (settings.batch, length, settings.heads, settings.dim)
    keys = jax.random.split(jax.random.key(0), 5)
    query, key, value, cotangent = (jax.random.normal(k, shape).astype(settings.dtype) for k in keys[:4])
    more = more_inputs(mixer, keys[4], query)

    def forward(query, key, value, more):
        return function(query, key, value, **more)

    return compiled(forward, (query, key, value, more), cotangent)


def _external(settings: Settings, length: int) -> Contender:
    """External attention, whose keys and values are a memory of 64 slots."""
    keys = jax.random.split(jax.random.key(0), 4)
    query, cotangent = (jax.random.normal(k, (settings.batch, length, settings.heads, settings.dim)) for k in keys[:2])
    memory = [jax.random.normal(k, (64, 1, settings.dim)) for k in keys[2:]]
    query, cotangent, *memory = (x.astype(settings.dtype) for x in (query, cotangent, *memory))
    return compiled(partial(external_attention, is_causal=True), (query, *memory), cotangent)


def _attention_free(settings: Settings, mixer: TokenMixer, is_causal: bool, length: int) -> Contender:
    """A mixer of one array as wide as all heads together."""
    if mixer.fixes_length and length > SQUARE:
        raise TooLong
    width = settings.heads * settings.dim
    keys = jax.random.split(jax.random.key(0), 3)
    x, cotangent = (jax.random.normal(k, (settings.batch, length, width)).astype(settings.dtype) for k in keys[:2])
    weights = mixer.weights(keys[2], width, length, settings.heads)

    def forward(x, weights):
        return mixer.function(x, **weights, is_causal=is_causal)

    return compiled(forward, (x, weights), cotangent)


def _timed(function: Callable[[], Any] | None) -> float:
    """Seconds of one call, NaN for a pass that a contender does not have."""
    if function is None:
        return math.nan
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _expected(seen: list[tuple[int, float]], length: int) -> float:
    """Seconds that a pass over `length` steps will take, as it grew between the last two of the (length, seconds); 0 before any."""
    if not seen:
        return 0.0
    (before, first), (last, seconds) = seen[-2:] if len(seen) > 1 else (seen[0], seen[0])
    power = 2.0 if before == last else math.log(seconds / first) / math.log(last / before)
    return seconds * (length / last) ** min(max(power, 1.0), 2.0)


def measure(
    group: str, members: dict[str, Callable], length: int, settings: Settings, last: dict, console: Console
) -> list[dict]:
    """Rows of one group at one length; `last` holds each contender's lengths and slowest passes so far."""
    ready = {}
    for name, build in members.items():
        if _expected(last.get((group, name), []), length) > settings.patience:
            console.print(f"  {group}, {name}: left out at T={length}, it would take too long")
            continue
        try:
            contender = build(length)
            too_large = contender.memory and max(contender.memory) > settings.memory_limit * 2**30
            if not too_large:
                _timed(contender.forward), _timed(contender.both)
        except TooLong:
            console.print(f"  {group}, {name}: left out at T={length}, longer than its weights")
            continue
        except ImportError as error:
            console.print(f"  {group}, {name}: left out, {error.name} is not installed")
            continue
        except (RuntimeError, MemoryError) as error:
            if name == "effattn_jax":
                raise
            console.print(f"  {group}, {name}: left out at T={length}, {[*str(error).splitlines(), repr(error)][0]}")
            continue
        if too_large:
            console.print(
                f"  {group}, {name}: left out at T={length}, {max(contender.memory) / 2**30:.1f} GiB of temporaries"
            )
            continue
        ready[name] = contender
    times = {name: ([], []) for name in ready}
    for _ in range(settings.rounds):
        for name, contender in ready.items():
            _timed(contender.forward)  # untimed: while the system takes back what the one before freed
            times[name][0].append(_timed(contender.forward))
            times[name][1].append(_timed(contender.both))
    rows = []
    for name, (forward, both) in times.items():
        contender = ready[name]
        forward, both = (1e3 * statistics.median(times) for times in (forward, both))
        last.setdefault((group, name), []).append((length, (forward if contender.both is None else both) / 1e3))
        rows.append({
            "group": group, "name": name, "length": length,
            "forward_ms": forward, "both_ms": None if contender.both is None else both,
            "forward_mb": contender.memory and contender.memory[0] / 1e6, "both_mb": contender.memory and contender.memory[1] / 1e6,
            "compile_s": contender.compile_seconds, "date": datetime.date.today().isoformat(),
        })  # fmt: skip
    return rows


def device_name() -> str:
    """The device in words: an accelerator's kind, or the CPU's architecture and cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    import os

    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} {platform.machine()} cores"


def show(rows: list[dict], title: str, console: Console) -> None:
    """Prints the rows as a table; the ratio is to ours in the same group and length."""
    table = Table(title=title)
    for column in ("mixer", "T", "by", "forward ms", "x", "fwd + bwd ms", "x", "MB", "MB fwd + bwd", "compile s"):
        table.add_column(column, justify="left" if column in ("mixer", "by") else "right")
    ours = {(r["group"], r["length"]): r for r in rows if r["name"] == "effattn_jax"}
    previous = None
    for row in sorted(rows, key=lambda r: (r["group"], r["length"])):
        base = ours.get((row["group"], row["length"]), row)
        if previous and previous != row["group"]:
            table.add_section()
        previous = row["group"]

        def number(x, digits=1):
            return "" if x is None else f"{x:,.{digits}f}"

        table.add_row(
            row["group"], f"{row['length']:,}", row["name"],
            number(row["forward_ms"]), number(row["forward_ms"] / base["forward_ms"], 2),
            number(row["both_ms"]), number(row["both_ms"] and row["both_ms"] / base["both_ms"], 2),
            number(row["forward_mb"]), number(row["both_mb"]), number(row["compile_s"]),
        )  # fmt: skip
    console.print(table)


def _stopped(path: pathlib.Path, record: dict, lengths: tuple[int, ...]) -> list[dict]:
    """The rows of the same measurement begun this day and stopped, whose first lengths are whole."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    rows = earlier.pop("rows", [])
    if earlier.pop("complete", True):
        return []
    done = sorted({row["length"] for row in rows})
    same = earlier == json.loads(json.dumps(record)) and done == list(lengths[: len(done)])
    return rows if same else []


def _earlier(path: pathlib.Path, record: dict) -> dict:
    """A finished measurement of the same shape on the same device, its rows with their dates."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    alike = all(earlier.get(name) == record[name] for name in ("device", "jax", "dtype", "shape", "caption"))
    if not alike or not earlier.get("complete"):
        return {}
    return earlier | {"rows": [{**row, "date": row.get("date", earlier["date"])} for row in earlier["rows"]]}


def contest(settings: Any, groups: dict[str, dict[str, Callable]], shape: dict[str, int], caption: str) -> None:
    """Measures the groups, prints the table, and writes JSON and plot under the name in the settings; goes on where the same was stopped."""
    console = Console()
    unknown = sorted(set(settings.groups) - set(groups))
    if unknown:
        raise SystemExit(f"error: no group {', '.join(unknown)}; there are {', '.join(groups)}")
    record = {
        "device": device_name(), "date": datetime.date.today().isoformat(), "jax": jax.__version__, "dtype": settings.dtype,
        "shape": shape, "caption": caption, "rounds": settings.rounds, "settings": dataclasses.asdict(settings),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{settings.name}.json"
    rows = _stopped(path, record, settings.lengths)
    earlier = _earlier(path, record) if settings.groups and not rows else {}
    order = list(groups)
    last: dict = {}
    for row in rows:
        slowest = row["forward_ms"] if row["both_ms"] is None else row["both_ms"]
        last.setdefault((row["group"], row["name"]), []).append((row["length"], slowest / 1e3))
    groups = {name: members for name, members in groups.items() if not settings.groups or name in settings.groups}
    for length in settings.lengths[len({row["length"] for row in rows}) :]:
        for group, members in groups.items():
            rows += measure(group, members, length, settings, last, console)
            console.print(f"T={length}: {group} measured")
        complete = {"complete": length == settings.lengths[-1]}
        done = {(group, n) for group in groups for n in settings.lengths if n <= length}
        kept = [row for row in earlier.get("rows", []) if (row["group"], row["length"]) not in done]
        beside = sorted(kept + rows, key=lambda row: (row["length"], order.index(row["group"])))
        path.write_text(json.dumps(record | complete | (earlier if kept else {}) | {"rows": beside}, indent=1) + "\n")
    show(rows, f"{caption}, {settings.dtype}, {record['device']}, {record['date']}", console)
    console.print(f"{path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path}")
    plot(path)


def main(settings: Settings) -> None:
    """The contest of the attention kernels."""
    shape = {"batch": settings.batch, "heads": settings.heads, "dim": settings.dim}
    caption = f"causal, batch {settings.batch}, {settings.heads} heads of {settings.dim}"
    contest(settings, contenders(settings), shape, caption)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
