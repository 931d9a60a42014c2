"""Induction heads: say what followed the marker, trained on 256 tokens and read far beyond, by a selective state-space model (Mamba).

Reproduces: the length extrapolation of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 4.1.2), whose models are right to 2^20 tokens, at a CPU's size: one
layer. In training near answers come more often (gap-power), without which nothing is learned in these minutes; the further evaluations ask for all
places alike.
Full size, on an accelerator: --model.layers 2 --model.width 64 --model.state-size 16 --train.steps 20000 --train.eval-also
"data.gap-power=1, data.context=1048576, data.batch-size=1, data.validation-examples=16".
Expected: MEASURED; a guess is right 1 time in 15.
Hardware: one x86 core, about WALL (2026-11-26).
Command: python train.py induction-heads
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    also = ["data.gap-power=1"] + [
        f"data.gap-power=1, data.context={256 * factor}, data.batch-size={rows}, data.validation-examples=64"
        for factor, rows in ((4, 16), (16, 16), (64, 8))
    ]
    return Config(
        model=ModelConfig(layers=1, width=32, heads=1, mixer="mamba", state_size=8, positions="none", mlp_ratio=1.0),
        data=DataConfig(task="induction_heads", batch_size=16, context=256, gap_power=0.01, validation_examples=256),
        optim=OptimConfig(learning_rate=5e-3, final_learning_rate=1e-5, warmup_steps=100, weight_decay=0.0),
        train=TrainConfig(
            steps=800, eval_every=200, checkpoint_every=800, eval_batches=None, eval_also=tuple(also), sample_tokens=0
        ),
    )
