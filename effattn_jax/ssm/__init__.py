"""State-space models: HiPPO matrices, discretisation, and the recurrences built on them.

The room holds, as pure functions of arrays: HiPPO matrices and projections, discretisation rules, diagonal plus low-rank (S4) and diagonal
(S4D, S5, LRU) systems in their convolution and recurrence forms, the selective scan (Mamba) and state-space duality (Mamba-2). They stand
on :mod:`effattn_jax.recurrence` and import jax and numpy only.
"""

from effattn_jax.ssm.discretization import discretize
from effattn_jax.ssm.dplr import dplr_kernel, dplr_ssm
from effattn_jax.ssm.hippo import hippo_from_basis, hippo_matrices, hippo_reconstruct
from effattn_jax.ssm.nplr import hippo_dplr, legs_dplr
from effattn_jax.ssm.projection import HippoState, hippo_project

__all__ = [
    "HippoState",
    "discretize",
    "dplr_kernel",
    "dplr_ssm",
    "hippo_dplr",
    "hippo_from_basis",
    "hippo_matrices",
    "hippo_project",
    "hippo_reconstruct",
    "legs_dplr",
]
