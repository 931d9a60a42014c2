"""Build a Jupyter notebook from its percent-format source: the same file each time, without outputs.

    python scripts/notebook.py notebooks/quickstart.py notebooks/quickstart.ipynb [OWNER/NAME]

With the GitHub repository OWNER/NAME, the Colab badge opens the notebook from there, which then installs the package from there too; without
one it opens Colab, where the file can be uploaded.
"""

import pathlib
import sys

import jupytext
import nbformat

COLAB = "https://colab.research.google.com/"
PACKAGE = '"effattn-jax[train]"'  # what a notebook installs where the package is missing


def build(source: pathlib.Path, repository: str | None = None) -> str:
    """The notebook's JSON text."""
    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # jupytext would draw it at random
        if repository:
            cell.source = cell.source.replace(
                f"]({COLAB})", f"]({COLAB}github/{repository}/blob/main/notebooks/{source.stem}.ipynb)"
            ).replace(PACKAGE, f'{PACKAGE[:-1]} @ git+https://github.com/{repository}"')
    notebook.metadata = {
        "accelerator": "TPU",
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.writes(notebook, version=4) + "\n"


def main() -> None:
    source, target, *repository = sys.argv[1:]
    pathlib.Path(target).write_text(build(pathlib.Path(source), *repository))


if __name__ == "__main__":
    main()
