"""Selective copying: remember the tokens among the blanks, in their order.

Reproduces: the task of Mamba's appendix E.1 (Gu and Dao 2023, arXiv 2312.00752) at a CPU's size: 64 tokens of which 8
are to be copied, instead of 4,096 and 16. Other mixers: --model.mixer gated_linear. A selective state-space model without attention's help, --model.mixer mamba2
--model.positions none --model.conv-width 0 --model.state-size 32 --train.steps 800, is at 0.901 and still learning after 189 s on one core (2026-11-26).
Full size, on an accelerator: python train.py selective-copying --model.mixer mamba --model.positions none --model.conv-width 0 --data.context 4096
--data.num-tokens 16 --optim.learning-rate 1e-4 --optim.final-learning-rate 1e-4 --train.steps 400000.
Expected: validation accuracy of at least 0.99; measured 0.997.
Hardware: 2 x86 cores, about a minute; measured 77 s with compiling beside other work (2026-11-20).
Command: python train.py selective-copying
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=2, width=64, heads=4, positions="rotary", conv_width=3),
        data=DataConfig(task="selective_copying", batch_size=64, context=64, num_tokens=8, vocab_size=16),
        optim=OptimConfig(learning_rate=3e-3, final_learning_rate=1e-4, warmup_steps=100),
        train=TrainConfig(steps=1000, eval_every=250, checkpoint_every=500, eval_batches=None, sample_tokens=1),
    )
