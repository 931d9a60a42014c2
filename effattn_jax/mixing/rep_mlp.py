"""RepMLP over time: a linear map and convolutions in parallel, which one linear map replaces.

    y = norm_0(W x + b) + sum_i norm_i(k_i * x)  =  W' x + b'

A convolution is a linear map whose matrix is constant along diagonals (what it makes of the identity), and a norm with fixed statistics
is a scale and an offset, so the branches add up to one matrix. Source: Ding et al., arXiv:2105.01883.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, floating
from effattn_jax.mixing._tokens import check_weight, require
from effattn_jax.mixing.token_mlp import token_mixing

__all__ = ["BranchNorm", "merge_rep_mlp", "rep_mlp"]


class BranchNorm(NamedTuple):
    """Batch normalisation of a branch with fixed statistics, (N,) each: scale (z - mean) / sqrt(variance + epsilon) + offset."""

    scale: ArrayLike
    offset: ArrayLike
    mean: ArrayLike
    variance: ArrayLike


def _affine(norm: BranchNorm, groups: int, epsilon: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The norm as (factor, offset)."""
    named = BranchNorm(*norm)._asdict().items()
    scale, offset, mean, variance = (check_weight(f"norms: {name}", x, (groups,)).astype(dtype) for name, x in named)
    factor = scale * jax.lax.rsqrt(variance + epsilon)
    return factor, offset - mean * factor


def _matrix_of(kernel: jax.Array, length: int, is_causal: bool) -> jax.Array:
    """What the convolutions with kernels (N, W) make of the identity: (N, T_max, T_max)."""
    width = kernel.shape[1]
    step = jnp.arange(length)
    lag = step[:, None] - step[None, :] + (0 if is_causal else width // 2)
    inside = (lag >= 0) & (lag < width)
    return jnp.where(inside, jnp.take(kernel, jnp.clip(lag, 0, width - 1), axis=1), 0)


def merge_rep_mlp(
    kernel: ArrayLike,
    convolutions: Sequence[ArrayLike],
    bias: ArrayLike | None = None,
    norms: Sequence[BranchNorm] | None = None,
    *,
    is_causal: bool = False,
    epsilon: float = 1e-5,
    dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The one kernel and bias of `token_mixing` that do what the parallel branches of RepMLP do.

    W' = f_0 W + sum_i f_i M(k_i),   b' = f_0 b + sum_i o_i,   M(k)[t, s] = k[t - s], centred t - s + W_i // 2

    Args:
      kernel: W of the linear branch, (N, T_max, T_max), or (T_max, T_max) for one group of channels.
      convolutions: k_i of the convolutions, (N, W_i) each, k[:, j] the weight of x_{t - j}.
      bias: of the linear branch, (N, T_max) or (T_max,); zeros when None.
      norms: one for the linear branch and one for each convolution, in this order; None for none.
      is_causal: of the calls that the result is for: convolutions of the past only.
      epsilon: of the norms.
      dtype: that the sums are made in at least, for inputs wider than the weights.

    Returns:
      (kernel (N, T_max, T_max), bias (N, T_max)).

    Raises:
      ValueError: shapes that do not fit, or another number of norms.

    Cost O(N T_max^2) for each branch. Source: Ding et al., arXiv:2105.01883.

    >>> import jax.numpy as jnp
    >>> kernel, bias = merge_rep_mlp(jnp.zeros((3, 3)), [jnp.array([[1.0, 2.0]])], is_causal=True)
    >>> kernel[0].tolist()
    [[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
    """
    kernel = jnp.asarray(kernel)
    groups = kernel.shape[0] if kernel.ndim == 3 else 1
    length = kernel.shape[-1] if kernel.ndim else 0
    lead = kernel.shape[:-2]
    kernel = check_weight("kernel", kernel, (*lead[:1], length, length)).reshape(groups, length, length)
    bias = jnp.zeros_like(kernel[:, 0]) if bias is None else check_weight("bias", bias, (*lead, length))
    branches = [check_weight(f"convolutions[{i}]", k, (groups, "W")) for i, k in enumerate(convolutions)]
    ok = norms is None or len(norms) == len(branches) + 1
    require(
        ok,
        f"norms must be one for the linear branch and one a convolution, {len(branches) + 1}; got {len(norms or ())}",
    )
    dtype = accumulator(kernel, bias, *branches, *([] if dtype is None else [dtype]))
    kernel, bias, *branches = (x.astype(dtype) for x in (kernel, bias.reshape(groups, length), *branches))
    matrices = [kernel] + [_matrix_of(k, length, is_causal) for k in branches]
    if norms is None:
        return sum(matrices), bias
    affine = [_affine(norm, groups, epsilon, dtype) for norm in norms]
    merged = sum(factor[:, None, None] * matrix for (factor, _), matrix in zip(affine, matrices, strict=True))
    return merged, affine[0][0][:, None] * bias + sum(offset for _, offset in affine)[:, None]


@compiled
def rep_mlp(
    inputs: ArrayLike,
    kernel: ArrayLike,
    convolutions: Sequence[ArrayLike],
    bias: ArrayLike | None = None,
    norms: Sequence[BranchNorm] | None = None,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
    epsilon: float = 1e-5,
) -> Any:
    """RepMLP's mixing of tokens: a linear map over time and convolutions beside it, y = norm_0(W x + b) + sum_i norm_i(k_i * x).

    The branches are merged in every call, which costs less than one of them would: their sum over places is one T x T product. To merge
    once and for all, give the result of `merge_rep_mlp` to `token_mixing`.

    Args:
      inputs: (*B, T, D), T <= T_max; N groups of D / N neighbouring channels.
      kernel to norms, epsilon: see `merge_rep_mlp`.
      The others, the errors and the state: see `token_mixing`.

    Cost O(T^2 D + N T_max^2), state T_max D numbers. Source: Ding et al., arXiv:2105.01883, whose images are rows of tokens here.

    >>> import jax.numpy as jnp
    >>> rep_mlp(jnp.ones((3, 2)), jnp.eye(4), [jnp.ones((1, 3))])[:, 0].tolist()
    [3.0, 4.0, 3.0]
    """
    (inputs,) = floating(inputs=inputs)
    options = {"is_causal": is_causal, "epsilon": epsilon, "dtype": inputs.dtype}
    merged = merge_rep_mlp(kernel, convolutions, bias, norms, **options)
    return token_mixing(
        inputs, *merged, is_causal=is_causal, mask=mask, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state,
    )  # fmt: skip
