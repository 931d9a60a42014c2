"""Induction heads: say what followed the marker, trained on 256 tokens and read at up to 4,096 times as many, by a gated linear recurrence (minGRU).

Reproduces: the length extrapolation of Mamba (Gu and Dao 2023, arXiv 2312.00752, section 4.1.2), trained at 256 and right to 2^20 tokens, at a CPU's size: one layer, 1,200 updates.
What is kept over n tokens fades as (1 - z)^n, z being how far the gate stays open at ordinary tokens. A z of 1e-3 is good enough for 256 tokens, where the loss then asks for no
more. Dropout makes it ask: a gate that closes when three features in ten are missing is closed far more firmly when none are. And the gate learns ten times as fast as
the rest. Without both (--model.dropout 0 --optim.groups ".*: lr_multiplier=1"): 1.000 at 256 tokens, 0.453 at 4,096, 0.172 at 16,384. No row of training is longer than
256; near answers come more often there (gap-power 0.01), while the further evaluations ask for all places alike.
A state-space model in its place: --model.mixer mamba --model.width 32 --model.state-size 8 --model.conv-width 0 --model.use-bias False --model.dropout 0
--optim.groups "mixer/step/: lr_multiplier=10" ".*: lr_multiplier=1" --train.steps 800: 1.000 at 256 tokens and at 4,096, 0.766 at 16,384.
Mamba's size, on an accelerator: python train.py induction-heads --model.mixer mamba --model.layers 2 --model.state-size 16 --model.conv-width 0 --model.use-bias False
--model.dropout 0 --optim.groups ".*: lr_multiplier=1" --train.steps 100000.
Expected: accuracy of 1.000 at every length, 256 to 1,048,576; measured so with --train.seed 0, 1 and 2 (64 rows of each length, 16 of the longest; the loss, 1e-5 to 3e-5, is the same
at all lengths); a guess is right 1 time in 15.
Hardware: one x86 core, about a minute and a half; measured 64 to 87 s beside other work, half of them the long evaluations (2026-11-27).
Command: python train.py induction-heads
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    also = ["data.gap-power=1"] + [
        f"data.gap-power=1, data.context={256 * factor}, data.batch-size={rows}, data.validation-examples={examples}"
        for factor, rows, examples in ((16, 16, 64), (64, 8, 64), (256, 2, 64), (4096, 1, 16))
    ]
    model = ModelConfig(
        layers=1, width=64, heads=1, mixer="min_gru", conv_width=3, positions="none", mlp_ratio=1.0, use_bias=True, dropout=0.3
    )  # fmt: skip
    optim = OptimConfig(
        learning_rate=5e-3, final_learning_rate=1e-5, groups=("mixer/gate: lr_multiplier=10", ".*: lr_multiplier=1")
    )
    return Config(
        model=model,
        data=DataConfig(task="induction_heads", batch_size=16, context=256, gap_power=0.01, validation_examples=256),
        optim=optim,
        train=TrainConfig(
            steps=1200, eval_every=400, checkpoint_every=1200, eval_batches=None, eval_also=tuple(also), sample_tokens=0
        ),
    )
