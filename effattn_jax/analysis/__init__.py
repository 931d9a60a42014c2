"""Tools that look at a trained model, or at arithmetic itself.

The room holds the path kernel, by which a model trained with gradient descent is a kernel machine, and Mitchell's logarithmic
multiplication. It imports jax and numpy only.
"""

__all__: list[str] = []
