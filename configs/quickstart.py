"""Byte-level language model on the English text that every CPython carries: offline, about a minute on 2 cores.

Reproduces: nothing published; it shows the whole house at work on `pydoc_data.topics`, Python's language reference.
Expected: at most 2.6 validation bits/byte, and samples with English words in them; measured 2.068.
Hardware: 2 x86 cores, 60 to 94 s with installation and compiling (2026-11-27).
Command: python train.py
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=4, width=128, heads=4, positions="rotary"),
        data=DataConfig(task="text", batch_size=8, context=128),
        optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=50),
        train=TrainConfig(steps=600, eval_every=200, checkpoint_every=200, sample_tokens=300, sample_prompt="The "),
    )
