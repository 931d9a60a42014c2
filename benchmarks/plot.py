"""Draws benchmarks/results/*.json: `python -m benchmarks.plot` rebuilds every plot from the committed measurements."""

import json
import pathlib

import matplotlib

from benchmarks import extrapolation

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OURS, BLUE, OTHERS = "effattn_jax", COLOURS[0], (*COLOURS[1:5], COLOURS[6])  # no second blue beside ours
COLUMNS = 8  # groups side by side


def plot(path: pathlib.Path) -> pathlib.Path:
    """A panel a group: time of forward + backward above, temporaries of the compiled program below."""
    record = json.loads(path.read_text())
    rows = record["rows"]
    groups = list(dict.fromkeys(r["group"] for r in rows))
    names = list(dict.fromkeys(r["name"] for r in rows))
    columns = max(1, min(COLUMNS, len(groups)))
    bands = -(-len(groups) // columns)
    size = (max(2.5 * columns + 1, 7), 5 * bands + 0.6)
    figure, axes = plt.subplots(2 * bands, columns, figsize=size, squeeze=False, layout="constrained")
    fields = {"both_ms": "forward + backward, ms", "both_mb": "temporaries, MB"}
    used = [[], []]
    for index, group in enumerate(groups):
        band, column = divmod(index, columns)
        for kind, field in enumerate(fields):
            axis = axes[2 * band + kind, column]
            used[kind].append(axis)
            _draw(axis, [r for r in rows if r["group"] == group and r[field]], names, field)
            if column == 0:
                axis.set_ylabel(fields[field])
        axes[2 * band, column].set_title(group, fontsize=9)
        axes[2 * band + 1, column].set_xlabel("sequence length T")
    for kind in used:
        _share(kind)
    for axis in set(axes.flat) - set(used[0]) - set(used[1]):
        axis.set_axis_off()
    handles = dict(pair[::-1] for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels()))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), columns), frameon=False
    )
    shape = record["shape"]
    caption = record.get("caption") or f"causal, batch {shape['batch']}, {shape['heads']} heads of {shape['dim']}"
    dates = " and ".join(sorted({r.get("date", record["date"]) for r in rows}))
    caption = f"{caption}, {record['dtype']}; {record['device']}, jax {record['jax']}, {dates}"
    figure.supxlabel(caption, fontsize=8)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def _draw(axis, rows: list[dict], names: list[str], field: str) -> None:
    """One panel: a line a contender, ours the widest and the only blue one; contenders beyond the palette are dashed."""
    order = [OURS, *(name for name in names if name != OURS)]
    for name in names:
        points = [(r["length"], r[field]) for r in rows if r["name"] == name]
        if points:
            turn, colour = divmod(max(order.index(name) - 1, 0), len(OTHERS))
            colour = BLUE if name == OURS else OTHERS[colour]
            style = {"color": colour, "linestyle": ("-", "--", ":")[turn], "marker": "o", "markersize": 4}
            axis.plot(*zip(*points), **style, label=name, linewidth=2.2 if name == OURS else 1.2)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _share(axes: list) -> None:
    """The same limits for all of them; numbers on the left of each row alone."""
    for limits, change in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        drawn = [getattr(axis, limits)() for axis in axes if axis.lines]
        for axis in axes if drawn else ():
            getattr(axis, change)(min(low for low, _ in drawn), max(high for _, high in drawn))
    for axis in axes:
        axis.tick_params(labelleft=axis.get_subplotspec().is_first_col())


if __name__ == "__main__":
    for result in sorted((pathlib.Path(__file__).parent / "results").glob("*.json")):
        content = json.loads(result.read_text())
        if "shape" in content and all("group" in row for row in content.get("rows", [{}])):
            print(plot(result).name)
        elif "methods" in content:
            extrapolation.plot(content, result)
            print(result.with_suffix(".png").name)
