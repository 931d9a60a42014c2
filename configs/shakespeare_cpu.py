"""Character-level language model of Shakespeare: nanoGPT's published CPU run.

Reproduces: the CPU command of nanoGPT's README (github.com/karpathy/nanoGPT, train_shakespeare_char with 4 layers,
4 heads, 128 wide, context 64, batch 12, 2000 steps, no dropout), whose validation loss is 1.88 nats a character. The
text is tinyshakespeare.txt of github.com/karpathy/char-rnn, its first 90 % for training; all of the rest is evaluated.
Expected: validation loss of at most 1.88 nats a character; measured 1.867 over the whole validation text.
Hardware: 2 x86 cores, less than 2 minutes; measured 117 s with start, compiling and evaluation (2026-11-27).
Command: python train.py shakespeare-cpu --data.path tinyshakespeare.txt
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(layers=4, width=128, heads=4, positions="learned", max_length=64),
        data=DataConfig(task="text", level="characters", path="tinyshakespeare.txt", batch_size=12, context=64),
        optim=OptimConfig(
            learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=100, beta2=0.99, weight_decay=0.1, clip_norm=1.0
        ),
        train=TrainConfig(steps=2000, eval_every=500, checkpoint_every=500, eval_batches=None, sample_prompt="\n"),
    )
