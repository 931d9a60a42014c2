"""The driver: config, step, loop, checkpoints, start-up of several processes, logging, sampling.

From Python: `train(Config(...))`; from a shell: `python train.py PRESET`.
"""

from effattn_jax.training.config import Config, MeshConfig, OptimConfig, TrainConfig
from effattn_jax.training.errors import Interrupted, UserError

__all__ = ["Config", "Interrupted", "MeshConfig", "OptimConfig", "TrainConfig", "UserError", "train"]


def train(config: Config, name: str = "run") -> dict[str, float]:
    """Train a run to its end, from whatever its folder already holds; what `python train.py` calls.

    Args:
      config: the run.
      name: shown on the screen and on the plot; with `train.run_dir=None` the folder is runs/NAME.

    Returns:
      The last validation metrics: `val/loss` in nats a token, `val/accuracy`, and `val/bits_per_byte` for text.

    Raises:
      UserError: something that a person can put right, a loss that is not finite included; nothing on disk is lost.
      Interrupted: SIGTERM or SIGINT; the state is saved.

    Example:
      >>> train(Config(train=TrainConfig(steps=0)))
      Traceback (most recent call last):
      effattn_jax.training.errors.UserError: train.steps must be positive, got 0.
    """
    from effattn_jax.training.loop import train as run  # the loop's libraries take a second to import

    return run(config, name)
