"""Decoding: from a step function and its state to tokens. Pure functions of jax; the model is whatever `step` says it is."""

from effattn_jax.decoding.generation import generate
from effattn_jax.decoding.sampling import filter_logits, sample_logits

__all__ = ["filter_logits", "generate", "sample_logits"]
