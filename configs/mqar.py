"""Multi-query associative recall: attention looks up values by their keys in its context.

Reproduces: the easiest cell of Zoology's figure 2 (Arora et al. 2023, arXiv 2312.04927), where attention is at 1.00:
64 tokens, 4 pairs, 2 layers of width 64; with a vocabulary of 256 instead of 8,192, for a CPU, and the convolution of
width 3 before each mixer that Zoology's later runs have. Other mixers: --model.mixer linear.
Expected: validation accuracy of at least 0.99, measured 1.000; guessing one of the values in the context gives 0.25.
Hardware: 2 x86 cores, less than 10 minutes; measured 47 s with start and compiling (2026-11-27).
Command: python train.py mqar
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=2, width=64, heads=1, positions="rotary", conv_width=3),
        data=DataConfig(task="mqar", batch_size=64, context=64, num_pairs=4, vocab_size=256),
        optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100),
        train=TrainConfig(steps=600, eval_every=200, checkpoint_every=200, eval_batches=None, sample_tokens=1),
    )
