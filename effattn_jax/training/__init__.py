"""The driver: config, step, loop, checkpoints, start-up of several processes, logging, sampling.

From Python: `train(Config(...))`; from a shell: `python train.py PRESET`.
"""

from effattn_jax.training.config import Config, MeshConfig, OptimConfig, TrainConfig
from effattn_jax.training.errors import Interrupted, UserError

__all__ = ["Config", "Interrupted", "MeshConfig", "OptimConfig", "TrainConfig", "UserError", "train"]


def train(config: Config, name: str = "run") -> dict[str, float]:
    """Train a run to its end and return its last validation metrics; see `effattn_jax.training.loop.train`."""
    from effattn_jax.training.loop import train as run  # the loop's libraries take a second to import

    return run(config, name)
