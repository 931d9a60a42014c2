"""Decoding: from a step function and its state to tokens. The model is whatever `step` says it is."""

from effattn_jax.decoding.generation import generate
from effattn_jax.decoding.sampling import filter_logits, sample_logits

__all__ = ["filter_logits", "generate", "sample_logits"]
