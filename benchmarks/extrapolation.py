"""Length extrapolation in miniature: trained at N tokens, evaluated at N, 2 N, 4 N and 8 N, on real and on repeated text.

    python -m benchmarks.extrapolation [--data.path FILE] [--models rotary rotary_logn ...] [--context 64] [--steps 600] [--name NAME]

One small byte-level language model for each way of training; every method of inference that belongs to it is tried on its parameters alone. The figure
is next-token accuracy on the last N tokens of each row: the same targets at every length, with more text before them ("real"), or with those same N
tokens over and over before them ("repeated", which a model that can use the distance copies). "logn" is the factor log n / log N in training, "logn*" at
inference only; the factor of scaled frequencies is the ratio of lengths. Writes benchmarks/results/NAME.json, a model at a time, and its plot.
"""

import dataclasses
import datetime
import json
import pathlib
import time

RESULTS = pathlib.Path(__file__).parent / "results"
RATIOS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read."""

    path: str | None = None
    """A text; empty: the documentation that Python carries."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the benchmark."""

    data: Data = dataclasses.field(default_factory=Data)
    """The text."""
    models: tuple[str, ...] = ()
    """Which trained models, see `trainings`; empty is all."""
    context: int = 64
    """N, the length of training."""
    width: int = 64
    """Of the model."""
    layers: int = 2
    """Of the model."""
    batch_size: int = 32
    """Rows of a step."""
    steps: int = 600
    """Updates a model."""
    rows: int = 48
    """Evaluated rows."""
    name: str = "extrapolation"
    """Name of the result files."""


def trainings(n: int, layers: int) -> dict[str, dict]:
    """How each model differs from rotary positions in training."""
    window = max(1, (3 * n // 4 - 1) // max(layers - 1, 1))
    return {
        "rotary": {},
        "rotary_logn": {"log_scale": "train"},
        "alibi": {"positions": "alibi"},
        "hwfa": {"window": window, "full_layers": 1, "full_rotary": False, "log_scale": "train"},
        "hwfa2": {"window": n // 2, "full_layers": 1, "log_scale": "train"},
        "kerple_log": {"positions": "kerple_log"},
        "kerple_power": {"positions": "kerple_power"},
        "inv_leaky": {"rerope_window": n // 4, "rerope_leak": 16.0, "log_scale": "train"},
        "random": {"random_positions": 8 * n},
        "xpos": {"positions": "xpos"},
        "t5": {"positions": "t5"},
        "sandwich": {"positions": "sandwich"},
        "learned": {"positions": "learned", "max_length": n},
        "sinusoidal": {"positions": "sinusoidal"},
        "none": {"positions": "none"},
    }


def methods(model: str, n: int) -> dict[str, dict | str]:
    """Settings at inference of the methods that belong to a trained model; a string is a scaling, whose factor follows the ratio."""
    last, half = {"log_scale": "inference"}, {"rerope_window": n // 2}
    if model == "rotary":
        return {
            "rotary": {}, "logn*": last, "window": {"window": n - 1}, "sinks + window": {"window": n - 5, "sinks": 4},
            "PI": "linear", "NTK-old": "ntk", "NTK-fixed": "ntk_fixed", "NTK-mixed": "ntk_mixed", "YaRN": "yarn", "NTK-mixed-logn*": "ntk_mixed logn",
            "ReRoPE-n/2": half, "ReRoPE-n/4": {"rerope_window": n // 4}, "ReRoPE-n/2-logn*": {**half, **last},
            "Leaky-n/4-k16-logn*": {"rerope_window": n // 4, "rerope_leak": 1 / 16, **last},
        }  # fmt: skip
    if model == "rotary_logn":
        return {
            "logn": {},
            "PI-logn": "linear",
            "NTK-mixed-logn": "ntk_mixed",
            "ReRoPE-n/2-logn": half,
            "window-logn": {"window": n - 1},
        }
    if model == "inv_leaky":
        return {"InvLeaky-logn": {"rerope_window": None, "rerope_leak": 0.0}}
    if model == "random":
        return {"random": {}, "random-logn*": last}
    if model == "hwfa2":
        return {"HWFA2-logn": {}, "HWFA2-ReRoPE-n/2-logn": half}
    if model == "learned":
        return {"hierarchical-0.4": {"hierarchical_alpha": 0.4}}
    return {{"hwfa": "HWFA-logn"}.get(model, model): {}}


def settings_at(method: dict | str, ratio: int) -> dict:
    """The settings of a method at a length."""
    if isinstance(method, dict):
        return method
    scaling, *more = method.split()
    found = {"rotary_scaling": scaling, "rotary_factor": float(ratio)} if ratio > 1 else {}
    return {**found, **({"log_scale": "inference"} if more else {})}


def trained(config, dataset, settings: Settings):
    """Parameters after training, and the seconds it took."""
    import jax
    import optax

    from effattn_jax.models import LanguageModel
    from effattn_jax.objectives import cross_entropy

    model = LanguageModel(config, dataset.vocab_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, settings.steps // 10, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))

    @jax.jit
    def update(params, memory, batch, key):
        def loss(params):
            logits = model.apply({"params": params}, batch["tokens"], deterministic=False, rngs={"dropout": key})
            total, weight = cross_entropy(logits, batch["targets"], batch["weights"])
            return total / weight

        updates, memory = optimizer.update(jax.grad(loss)(params), memory, params)
        return optax.apply_updates(params, updates), memory

    begin = time.perf_counter()
    params = model.init(jax.random.key(0), dataset.batch(0, 0)["tokens"])["params"]
    memory = optimizer.init(params)
    for step in range(settings.steps):
        params, memory = update(params, memory, dataset.batch(0, step), jax.random.fold_in(jax.random.key(1), step))
    jax.block_until_ready(params)
    return params, time.perf_counter() - begin


def rows_of(dataset, settings: Settings, ratio: int) -> dict:
    """Rows of ratio N tokens and one more, by kind; all end at the same places."""
    import numpy as np

    n, text = settings.context, dataset.validation
    ends = np.linspace(n * RATIOS[-1] + 1, len(text) - 1, settings.rows).astype(int)
    block = text[ends[:, None] - n + np.arange(n)].astype(np.int32)
    repeated = np.concatenate([block] * ratio + [block[:, :1]], axis=1)
    real = text[ends[:, None] - ratio * n + np.arange(ratio * n + 1)].astype(np.int32)
    return {"real": real, "repeated": repeated}


def accuracy(config, params, dataset, settings: Settings, ratio: int) -> dict[str, float]:
    """Share of the last N tokens predicted, for both kinds of text."""
    import jax
    import jax.numpy as jnp

    from effattn_jax.models import LanguageModel

    model, n = LanguageModel(config, dataset.vocab_size), settings.context

    @jax.jit
    def right(params, tokens):
        guess = jnp.argmax(model.apply({"params": params}, tokens[:, :-1])[:, -n:], axis=-1)
        return jnp.mean(guess == tokens[:, -n:])

    return {kind: round(float(right(params, x)), 4) for kind, x in rows_of(dataset, settings, ratio).items()}


def plot(record: dict, path: pathlib.Path) -> None:
    """Accuracy against length, a line a method, a panel a kind of text; the legend in the order of the longest real text."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained", sharex=True)
    colours, n = plt.get_cmap("tab20"), record["settings"]["context"]
    for axes, kind in zip(panels, ("real", "repeated")):
        for index, row in enumerate(sorted(record["methods"], key=lambda row: -row["real"][-1])):
            style = {"color": colours(index % 20), "marker": "os^Dv<>"[index // 4 % 7], "markersize": 4, "linewidth": 1}
            axes.plot([r * n for r in RATIOS], [100 * x for x in row[kind]], label=row["method"], **style)
        axes.set(
            xscale="log", xlabel="tokens", ylabel="next-token accuracy of the last N tokens, %", title=f"{kind} text"
        )
        axes.set_xticks([r * n for r in RATIOS], [f"{r * n}" for r in RATIOS])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    settings, date = record["settings"], record["date"]
    what = f"{settings['text']}: {settings['layers']} layers of width {settings['width']}, {settings['steps']} updates at N = {n}"
    figure.suptitle(f"{what}; {record['device']}, jax {record['jax']}, {date}", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def show(record: dict) -> str:
    """The table."""
    lines = [f"{'method':22}" + "".join(f"{f'{kind} {r}x':>14}" for kind in ("real", "repeated") for r in RATIOS)]
    for row in record["methods"]:
        figures = [f"{100 * x:14.2f}" for kind in ("real", "repeated") for x in row[kind]]
        lines.append(f"{row['method']:22}" + "".join(figures))
    return "\n".join(lines)


def main() -> None:
    """Trains, evaluates, writes; models already in the file with the same settings are kept."""
    import jax
    import tyro

    from effattn_jax.data import DataConfig, load
    from effattn_jax.models import ModelConfig

    settings = tyro.cli(Settings)
    n, path = settings.context, RESULTS / f"{settings.name}.json"
    dataset = load(DataConfig(path=settings.data.path, context=n, batch_size=settings.batch_size))
    kept = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("models", "name", "data")}
    kept["text"] = pathlib.Path(settings.data.path).name if settings.data.path else "pydoc topics"
    record = {"settings": kept, "methods": []}
    if path.exists() and (old := json.loads(path.read_text()))["settings"] == kept:
        record = old
    base = ModelConfig(layers=settings.layers, width=settings.width, heads=4, train_length=n)
    for name, options in trainings(n, settings.layers).items():
        if settings.models and name not in settings.models:
            continue
        config = dataclasses.replace(base, **options)
        params, seconds = trained(config, dataset, settings)
        record["methods"] = [row for row in record["methods"] if row["model"] != name]
        for method, chosen in methods(name, n).items():
            found = [
                accuracy(config.at_inference(**settings_at(chosen, r)), params, dataset, settings, r) for r in RATIOS
            ]
            row = {"method": method, "model": name, "seconds": round(seconds, 1), "date": str(datetime.date.today())}
            record["methods"].append(row | {kind: [f[kind] for f in found] for kind in ("real", "repeated")})
        record |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "date": str(datetime.date.today())}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)
    plot(record, path)
    print(show(record))


if __name__ == "__main__":
    main()
