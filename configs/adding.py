"""Adding: say at the end of a row the sum of its two marked numbers, by a diagonal state-space model.

Reproduces: the adding problem (Hochreiter and Schmidhuber 1997) with 512 steps; S4's code has 1,000. No norms, which would hide the numbers' size.
Longer: --data.context 1000.
Expected: mean squared error of at most EXPECT; measured MEASURED; saying 1 gives 0.167.
Hardware: one x86 core, about WALL (2026-11-26).
Command: python train.py adding
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(
            layers=2, width=32, heads=1, mixer="s4d", state_size=16, positions="none", norm="none", use_bias=True
        ),
        data=DataConfig(task="adding", batch_size=16, context=512, validation_examples=512),
        optim=OptimConfig(learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=50, weight_decay=0.0),
        train=TrainConfig(steps=600, eval_every=200, checkpoint_every=600, eval_batches=None, sample_tokens=1),
    )
