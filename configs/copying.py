"""Copying: remember ten tokens over a hundred blanks, by a diagonal state-space model.

Reproduces: the copying task at the sizes of S4's code (Gu et al. 2022, arXiv 2111.00396): 10 symbols, 10 tokens, 100 blanks. A time-invariant model can
do it, since the tokens come back after a fixed delay. Its steps start between 4e-3 and 0.4 (rate=4).
Longer, on an accelerator: --data.context 1020 --model.rate 1 --model.state-size 128.
Expected: validation accuracy of at least 0.99; measured 1.000, from step 250 on; a guess is right 1 time in 8.
Hardware: one x86 core, 1 to 2 minutes; measured 110 s beside other work (2026-11-26).
Command: python train.py copying
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=2, width=64, heads=1, mixer="s4d", positions="none", state_size=64, rate=4.0),
        data=DataConfig(task="copying", batch_size=32, context=120, num_tokens=10),
        optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50),
        train=TrainConfig(steps=500, eval_every=250, checkpoint_every=500, eval_batches=None, sample_tokens=1),
    )
