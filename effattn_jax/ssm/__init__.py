"""State-space models: HiPPO matrices, discretisation, and the recurrences built on them.

The room holds, as pure functions of arrays: HiPPO matrices and projections, discretisation rules, diagonal plus low-rank (S4) and diagonal
(S4D, S5, LRU) systems in their convolution and recurrence forms, the selective scan (Mamba) and state-space duality (Mamba-2). They stand
on :mod:`effattn_jax.recurrence` and import jax and numpy only. `MIXERS` is the table that the law tests run over.
"""

from effattn_jax._contract import Recurrence
from effattn_jax.ssm import _lines
from effattn_jax.ssm.diagonal import diagonal_kernel, diagonal_ssm, dss_kernel
from effattn_jax.ssm.discretization import discretize
from effattn_jax.ssm.dplr import dplr_kernel, dplr_ssm
from effattn_jax.ssm.duality import TrapezoidState, mamba3_trapezoid, state_space_duality
from effattn_jax.ssm.hippo import hippo_from_basis, hippo_matrices, hippo_reconstruct
from effattn_jax.ssm.initial import diagonal_init
from effattn_jax.ssm.linear_recurrent import lru, rg_lru, s5_ssm
from effattn_jax.ssm.nplr import hippo_dplr, legs_dplr
from effattn_jax.ssm.projection import HippoState, hippo_project
from effattn_jax.ssm.selective import selective_scan

__all__ = [
    "MIXERS",
    "HippoState",
    "TrapezoidState",
    "diagonal_init",
    "diagonal_kernel",
    "diagonal_ssm",
    "discretize",
    "dplr_kernel",
    "dplr_ssm",
    "dss_kernel",
    "hippo_dplr",
    "hippo_from_basis",
    "hippo_matrices",
    "hippo_project",
    "hippo_reconstruct",
    "legs_dplr",
    "lru",
    "mamba3_trapezoid",
    "rg_lru",
    "s5_ssm",
    "selective_scan",
    "state_space_duality",
]

_SCANS = ({"implementation": "associative"}, {"implementation": "scan"})
_CHUNKS = ({"implementation": "parallel", "chunk_size": 5}, {"implementation": "chunked", "chunk_size": 5})
_MODES = (
    {"mode": "recurrence", "implementation": "scan"},
    {"mode": "recurrence", "implementation": "associative"},
    {"mode": "chunked", "chunk_size": 5},
)
_LINEAR = _lines.sample(_lines.CHANNELS)

MIXERS: dict[str, Recurrence] = {
    "diagonal_ssm": Recurrence(diagonal_ssm, _MODES, _LINEAR, "diagonal", _lines.diagonal),
    "dplr_ssm": Recurrence(dplr_ssm, ({"mode": "recurrence"},), _LINEAR, "diagonal", _lines.low_rank),
    "s5_ssm": Recurrence(s5_ssm, _SCANS, _LINEAR, "diagonal", _lines.shared),
    "lru": Recurrence(lru, _SCANS, _LINEAR, "diagonal", _lines.linear_unit),
    "rg_lru": Recurrence(rg_lru, _SCANS, _lines.GATED, "diagonal", _lines.gated_unit),
    "selective_scan": Recurrence(
        selective_scan,
        ({"implementation": "associative"}, {"chunk_size": 5}),
        _lines.SELECTIVE,
        "diagonal",
        _lines.selective,
    ),
    "state_space_duality": Recurrence(state_space_duality, _CHUNKS, _lines.HEADED, "outer_product_decay", _lines.heads),
    "mamba3_trapezoid": Recurrence(mamba3_trapezoid, _CHUNKS, _lines.TRAPEZOID, "outer_product_decay", _lines.heads),
}
