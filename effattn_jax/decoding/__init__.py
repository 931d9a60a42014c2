"""Decoding: from a step function and its state to tokens. The model is whatever `step` says it is."""

from effattn_jax.decoding.generation import generate
from effattn_jax.decoding.naive_bayes import NaiveBayesStep, naive_bayes_logits
from effattn_jax.decoding.sampling import filter_logits, sample_logits

__all__ = ["NaiveBayesStep", "filter_logits", "generate", "naive_bayes_logits", "sample_logits"]
