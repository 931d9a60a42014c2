"""Adding: say at the end of a row the sum of its two marked numbers, by a selective state-space model (Mamba).

Reproduces: the adding problem (Hochreiter and Schmidhuber 1997) with 512 steps; S4's code has 1,000. No norms, which would hide the numbers' size. It stays
near 0.17 for the first steps before it learns. A time-invariant model cannot weigh its input by the marks; with a layer to multiply them before, it learns too, later:
--model.mixer s4d --model.layers 2 --model.mlp gated --model.rate 1 --model.state-size 32 --train.steps 2800: 0.17 at step 900, 0.0099 at 1,500, 1.6e-3 at the end, 549 s beside the test suite (2026-11-27).
Longer: --data.context 1000.
Expected: mean squared error of at most 1e-3; measured 4.6e-4; saying 1 gives 0.167.
Hardware: one x86 core, about 2 minutes; measured 119 s beside other work (2026-11-26).
Command: python train.py adding
"""

from effattn_jax.data import DataConfig
from effattn_jax.models import ModelConfig
from effattn_jax.training import Config, OptimConfig, TrainConfig


def get_config() -> Config:
    """The preset."""
    return Config(
        model=ModelConfig(
            layers=1,
            width=32,
            heads=1,
            mixer="mamba",
            state_size=8,
            rate=0.3,
            positions="none",
            norm="none",
            use_bias=True,
        ),
        data=DataConfig(task="adding", batch_size=16, context=512, validation_examples=512),
        optim=OptimConfig(learning_rate=4e-3, final_learning_rate=1e-5, warmup_steps=50, weight_decay=0.0),
        train=TrainConfig(steps=1200, eval_every=300, checkpoint_every=1200, eval_batches=None, sample_tokens=1),
    )
