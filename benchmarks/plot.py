"""Draws benchmarks/results/*.json: `python -m benchmarks.plot` rebuilds every plot from the committed measurements."""

import json
import pathlib

import matplotlib

from benchmarks import extrapolation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot(path: pathlib.Path) -> pathlib.Path:
    """One column a group: time of forward + backward above, temporaries of the compiled program below."""
    record = json.loads(path.read_text())
    rows = record["rows"]
    groups = list(dict.fromkeys(r["group"] for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))
    figure, axes = plt.subplots(
        2, len(groups), figsize=(max(3.1 * len(groups) + 1, 7), 5.6), sharex=True, sharey="row", squeeze=False
    )
    for column, group in enumerate(groups):
        for name in names:
            mine = [r for r in rows if r["group"] == group and r["name"] == name]
            style = {"color": COLOURS[names.index(name) % len(COLOURS)], "marker": "o", "markersize": 4, "label": name}
            style["linewidth"] = 2.2 if name == "effattn_jax" else 1.2
            for axis, field in ((axes[0, column], "both_ms"), (axes[1, column], "both_mb")):
                points = [(r["length"], r[field]) for r in mine if r[field]]
                if points:
                    axis.plot(*zip(*points), **style)
        axes[0, column].set_title(group)
        axes[1, column].set_xlabel("sequence length T")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("temporaries, MB")
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels()))
    figure.legend(handles.values(), handles.keys(), loc="upper center", ncol=len(handles), frameon=False)
    shape = record["shape"]
    caption = record.get("caption") or f"causal, batch {shape['batch']}, {shape['heads']} heads of {shape['dim']}"
    figure.text(
        0.5, 0.005, f"{caption}, {record['dtype']}; {record['device']}, jax {record['jax']}, {record['date']}", ha="center", fontsize=8,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.03, 1, 0.94))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


if __name__ == "__main__":
    for result in sorted((pathlib.Path(__file__).parent / "results").glob("*.json")):
        if "rows" in (content := json.loads(result.read_text())) and "shape" in content:
            print(plot(result).name)
        elif "methods" in content:
            extrapolation.plot(content, result)
            print(result.with_suffix(".png").name)
