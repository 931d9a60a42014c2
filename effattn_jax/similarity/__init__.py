"""Similarities between sets of vectors.

The room holds the earth mover's, word mover's and word rotator's distances, the Hilbert-Schmidt independence criterion, and whitening of
embeddings. It imports jax and numpy only.
"""

__all__: list[str] = []
