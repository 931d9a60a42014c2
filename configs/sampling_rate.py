"""Another sampling rate: chirps learned at one rate are told apart at half and at double of it, by rescaled steps alone.

Reproduces: the change of sampling rate without training of S4 and S5 on spoken commands (Gu et al. 2022, arXiv 2111.00396; Smith et al. 2023, arXiv 2208.04933),
which lose 2 points from 16 kHz to 8 kHz, on synthetic signals: ten chirps in noise. The last evaluation leaves the steps as they were.
Expected: at most 1 point lost; measured accuracy 0.985 at the rate of training, 0.977 at half and 0.985 at double of it, and 0.072 at double where the steps stay.
Hardware: one x86 core, about 2 minutes; measured 117 s beside other work (2026-11-26).
Command: python train.py sampling-rate
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    also = (
        "data.context=64, data.sampling-rate=0.5, model.rate=4",
        "data.context=256, data.sampling-rate=2, model.rate=1",
        "data.context=256, data.sampling-rate=2",
    )
    return Config(
        model=ModelConfig(layers=2, width=32, heads=1, mixer="s4d", positions="none", state_size=16, rate=2.0),
        data=DataConfig(task="chirps", batch_size=32, context=128, validation_examples=2048),
        optim=OptimConfig(learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=50),
        train=TrainConfig(
            steps=600, eval_every=200, checkpoint_every=600, eval_batches=None, eval_also=also, sample_tokens=1
        ),
    )
