"""Attention-free mixers of a sequence.

The room holds, under the contract of the attention kernels where it applies: MLP-Mixer, ResMLP, gMLP and aMLP, FNet, stacks of feed-forward
layers, lightweight and dynamic convolutions, and RepMLP. It imports jax and numpy only.
"""

__all__: list[str] = []
