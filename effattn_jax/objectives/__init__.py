"""Objectives: losses over logits and predictions, as sums with their weights so that any split of a batch adds up exactly."""

from effattn_jax.objectives.classification import accuracy, cross_entropy
from effattn_jax.objectives.regression import squared_error

__all__ = ["accuracy", "cross_entropy", "squared_error"]
