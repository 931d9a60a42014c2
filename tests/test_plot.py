"""The picture of attention weights: what is drawn, and that matplotlib is imported when asked for, not before."""

import subprocess
import sys

import numpy as np
import pytest

from effattn_jax.plot import plot_attention


def maps(figure):
    return [axes for axes in figure.axes if axes.images and axes.get_title()]


def test_one_map_a_head_with_labelled_axes(tmp_path):
    weights = np.random.default_rng(0).random((6, 4, 5)).astype(np.float32)
    weights[0, 1, 2] = -np.inf
    figure = plot_attention(weights, query_labels=list("abcd"), key_labels=list("vwxyz"))
    drawn = maps(figure)
    assert [axes.get_title() for axes in drawn] == [f"head {n}" for n in range(6)]
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == list("vwxyz")
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == list("abcd")
    assert drawn[0].get_ylabel() == "query" and drawn[4].get_xlabel() == "key"
    np.testing.assert_allclose(np.asarray(drawn[3].images[0].get_array()), weights[3])
    assert np.isnan(np.ma.filled(drawn[0].images[0].get_array(), np.nan)[1, 2])
    figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 5000


def test_patterns_are_black_on_white():
    (axes,) = maps(plot_attention(np.tri(7, dtype=bool)))
    assert axes.images[0].get_cmap().name == "Greys" and axes.images[0].get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (np.ones(3), {}, "weights must have shape"),
        (np.ones((0, 3, 3)), {}, "weights must have shape"),
        (np.ones((2, 3, 3)), {"titles": ["one"]}, "titles must have 2 entries"),
        (np.ones((2, 3, 4)), {"key_labels": "abc"}, "key_labels must have 4 entries"),
    ],
)
def test_mistakes(weights, options, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(weights, **options)


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = "import sys, effattn_jax.plot; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
