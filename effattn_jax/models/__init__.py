"""Models: stacks of blocks over the mixers of `nn.MIXERS`, described by one `ModelConfig`."""

from effattn_jax.models.causal import LanguageState
from effattn_jax.models.classifier import SequenceClassifier
from effattn_jax.models.config import ModelConfig
from effattn_jax.models.flops import flops_per_token
from effattn_jax.models.language import LanguageModel
from effattn_jax.models.regressor import SequenceRegressor

__all__ = [
    "LanguageModel",
    "LanguageState",
    "ModelConfig",
    "SequenceClassifier",
    "SequenceRegressor",
    "flops_per_token",
]
