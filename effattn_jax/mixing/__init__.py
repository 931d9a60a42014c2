"""Attention-free mixers of a sequence: f(inputs, <weights>, *, is_causal, mask, segment_ids, initial_state, return_state).

Inputs (*B, T, D) come first, weights have no time axis. Those with a weight for each pair of places fix the longest sequence, T_max; shorter
ones take the leading part. Places are counted in documents, so padding and packed documents change nothing. The room imports jax and numpy
only. `MIXERS` is the table that the law tests, the models and `--model.mixer NAME` follow from.
"""

from effattn_jax._contract import TokenMixer
from effattn_jax.mixing import _lines
from effattn_jax.mixing._places import PastTokens
from effattn_jax.mixing.convolution import ConvolutionState, dynamic_convolution, lightweight_convolution
from effattn_jax.mixing.ffn_stack import ffn_stack
from effattn_jax.mixing.fourier import fnet
from effattn_jax.mixing.gating import AMLPState, amlp, gmlp, spatial_gating
from effattn_jax.mixing.rep_mlp import BranchNorm, merge_rep_mlp, rep_mlp
from effattn_jax.mixing.token_mlp import mlp_mixer, res_mlp, token_mixing

__all__ = [
    "MIXERS",
    "AMLPState",
    "BranchNorm",
    "ConvolutionState",
    "PastTokens",
    "amlp",
    "dynamic_convolution",
    "ffn_stack",
    "fnet",
    "gmlp",
    "lightweight_convolution",
    "merge_rep_mlp",
    "mlp_mixer",
    "rep_mlp",
    "res_mlp",
    "spatial_gating",
    "token_mixing",
]

_PAIRS = {"memory": "a weight for each pair of places, T_max x T_max, is what it is made of"}
_LENGTHS = {"memory": "rows with lengths of their own have transforms of their own, each a matrix of their pairs"}

MIXERS: dict[str, TokenMixer] = {
    "mlp_mixer": TokenMixer(mlp_mixer, _lines.mlp(1), _lines.mlp_flops(1), True, "out_kernel", _PAIRS),
    "ffn_stack": TokenMixer(ffn_stack, _lines.ffn_stack, _lines.ffn_stack_flops, True, "", _PAIRS),
    "res_mlp": TokenMixer(res_mlp, _lines.res_mlp, _lines.square_flops, True, "layer_scale", _PAIRS),
    "gmlp": TokenMixer(gmlp, _lines.gmlp, _lines.gmlp_flops, True, "out_kernel", _PAIRS),
    "amlp": TokenMixer(amlp, _lines.amlp, _lines.amlp_flops, True, "out_kernel", _PAIRS),
    "fnet": TokenMixer(fnet, _lines.fnet, _lines.fnet_flops, False, "", _LENGTHS),
    "lightweight_convolution": TokenMixer(lightweight_convolution, _lines.lightweight, _lines.lightweight_flops, False),
    "dynamic_convolution": TokenMixer(dynamic_convolution, _lines.dynamic, _lines.dynamic_flops, False),
    "rep_mlp": TokenMixer(rep_mlp, _lines.rep_mlp, _lines.square_flops, True, "kernel", _PAIRS),
}
