"""Induction heads by Mamba: after the special token, repeat what followed it before; trained at 256 tokens, right at any length.

Reproduces: the task and the model of Mamba's appendix E.1 (Gu and Dao 2023, arXiv 2312.00752): two layers of width 64, 256 tokens, a vocabulary of 16. Longer
rows: python -m benchmarks.longer_rows runs/induction-heads-mamba
Expected: validation accuracy of at least 0.99.
Hardware: 2 x86 cores, some minutes.
Command: python train.py induction-heads-mamba
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=2, width=64, heads=1, mixer="mamba", positions="none", mlp_ratio=1.0),
        data=DataConfig(task="induction_heads", batch_size=16, context=256, vocab_size=16, validation_examples=256),
        optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100),
        train=TrainConfig(steps=1200, eval_every=200, checkpoint_every=400, eval_batches=None, sample_tokens=1),
    )
