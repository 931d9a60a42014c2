"""Attention weights as pictures. The one module that may draw, beside the driver: matplotlib is imported when a figure is asked for.

from effattn_jax.plot import plot_attention
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["plot_attention"]

COLUMNS = 4  # heat maps in a row


def plot_attention(
    weights: Any, *, titles: Sequence[str] | None = None, query_labels: Sequence[str] | None = None, key_labels: Sequence[str] | None = None
) -> Any:  # fmt: skip
    """A grid of heat maps, one a head: queries down, keys across.

    Args:
      weights: (N, T, S) or (T, S), weights or scores, or a boolean pattern of who sees whom; -inf and NaN are left white.
      titles: a title for each head; None is its number.
      query_labels, key_labels: the T and S tokens, at the axes of each map; None for their numbers.

    Returns:
      a `matplotlib.figure.Figure`, which `figure.savefig("attention.png")` writes.

    Raises:
      ValueError: another rank, no head, or another number of titles or labels.
      ImportError: without matplotlib, which the extra `[train]` brings.

    >>> import numpy as np
    >>> figure = plot_attention(np.tri(6, dtype=bool), titles=["causal"])
    >>> [axes.get_title() for axes in figure.axes]
    ['causal']
    """
    weights = np.asarray(weights)
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3 or 0 in weights.shape:
        raise ValueError(f"weights must have shape (N, T, S) or (T, S), none of them 0; got {weights.shape}")
    heads, queries, keys = weights.shape
    for name, given, count in (
        ("titles", titles, heads),
        ("query_labels", query_labels, queries),
        ("key_labels", key_labels, keys),
    ):
        if given is not None and len(given) != count:
            raise ValueError(
                f"{name} must have {count} entries, as weights has the shape {weights.shape}; got {len(given)}"
            )
    return _draw(weights, [f"head {n}" for n in range(heads)] if titles is None else titles, query_labels, key_labels)


def _draw(
    weights: np.ndarray, titles: Sequence[str], query_labels: Sequence[str] | None, key_labels: Sequence[str] | None
) -> Any:
    from matplotlib.figure import Figure

    heads, is_pattern = len(weights), weights.dtype == bool
    columns = min(heads, COLUMNS)
    rows = -(-heads // columns)
    figure = Figure(figsize=(0.6 + 2.6 * columns, 0.4 + 2.6 * rows), layout="constrained")
    shown = np.where(np.isfinite(weights), weights, np.nan).astype(np.float32)
    low = 0.0 if is_pattern or np.nanmin(shown, initial=0.0) >= 0 else float(np.nanmin(shown))
    high = 1.0 if is_pattern else max(float(np.nanmax(shown, initial=low)), low + 1e-6)
    for index, (head, title) in enumerate(zip(shown, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        image = axes.imshow(
            head, vmin=low, vmax=high, cmap="Greys" if is_pattern else "viridis", interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
        if index % columns == 0:
            axes.set_ylabel("query")
        if index + columns >= heads:
            axes.set_xlabel("key")
        _label(axes.xaxis, key_labels, rotation=90)
        _label(axes.yaxis, query_labels)
    if not is_pattern:
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def _label(axis: Any, labels: Sequence[str] | None, **style: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    if labels is None:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        axis.set_ticks(range(len(labels)), labels, fontsize=7, **style)
