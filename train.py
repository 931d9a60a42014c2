"""Train a preset: `python train.py`, `python train.py --help`, `python train.py PRESET --model.mixer linear`.

The presets are the files of configs/, the driver is effattn_jax.training; this file only joins the two.
"""

import sys
from pathlib import Path

from effattn_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent / "configs"))
