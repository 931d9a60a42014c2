"""Efficient sequence mixing in JAX: attention, recurrences, positions and training tricks as pure functions under one contract.

Importing this package, or any of its rooms of kernels, needs jax and numpy only and does no work on a device.

Dimension letters, used in suffix names (`q_BxTxNxH`) and in docstrings everywhere in the package:

    B batch      T query length   S key length      N query heads    K key/value heads
    H head dim   V value dim      M features        P state size     D model width
    C chunk      W window         L layers          F feed-forward   A vocabulary
    G query heads to one key/value head (N = K G)
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
