"""Delay: say at each step what a band-limited signal was 128 steps ago, by a state-space model (S4).

Reproduces: the delay task of S4's code and of the HiPPO framework (Gu et al., arXiv 2206.12037), there with 4,000 steps and a lag of 1,000, at a CPU's size: 512
steps of white noise below half of the Nyquist frequency, so that 64 numbers must be kept. One layer without norms, which would hide the signal's size.
Full size, on an accelerator: python train.py delay --data.context 4000 --model.state-size 1024 --model.rate 0.125.
Expected: mean squared error of at most 5e-4; measured 2.8e-4, 0.028 of the root mean square of what is asked; saying 0 gives 0.37.
Hardware: one x86 core, 2 to 4 minutes; measured 218 s beside other work (2026-11-26).
Command: python train.py delay
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(
            layers=1, width=16, heads=1, mixer="s4", state_size=128, positions="none", norm="none", use_bias=True
        ),
        data=DataConfig(task="delay", batch_size=16, context=512, validation_examples=128),
        optim=OptimConfig(learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=50, weight_decay=0.0),
        train=TrainConfig(steps=1500, eval_every=500, checkpoint_every=1500, eval_batches=None, sample_tokens=1),
    )
