"""State-space models: HiPPO matrices, discretisation, and the recurrences built on them.

The room holds, as pure functions of arrays: HiPPO matrices and projections, discretisation rules, diagonal plus low-rank (S4) and diagonal
(S4D, S5, LRU) systems in their convolution and recurrence forms, the selective scan (Mamba) and state-space duality (Mamba-2). They stand
on :mod:`effattn_jax.recurrence` and import jax and numpy only.
"""

__all__: list[str] = []
