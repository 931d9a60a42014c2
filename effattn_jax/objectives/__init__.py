"""Objectives: losses over logits, as sums with their weights so that any split of a batch adds up exactly."""

from effattn_jax.objectives.classification import accuracy, cross_entropy

__all__ = ["accuracy", "cross_entropy"]
