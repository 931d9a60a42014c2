"""Mixers that multiply with learned weights along time: a linear map, and an MLP.

    token mixing   y_t = sum_s W[t, s] x_s + b_t
    MLP-Mixer      y = W_2 gelu(W_1 x + b_1) + b_2 over time, each channel alone
    ResMLP         y = gamma (W (alpha x + beta) + b)

Cost O(T^2 D) for T tokens; the weights fix the longest sequence, T_max. State of the causal forms: the document so far, T_max D numbers.
Sources: Tolstikhin et al., arXiv:2105.01601; Touvron et al., arXiv:2105.03404.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax._products import scaled_axis
from effattn_jax.mixing._places import Places, at_places, mix, over_places, take
from effattn_jax.mixing._tokens import along, check_weight, require, wide

__all__ = ["mlp_mixer", "res_mlp", "token_mixing"]


def _square(kernel: ArrayLike, bias: ArrayLike | None, width: int) -> tuple[jax.Array, jax.Array]:
    """The weights of a linear map over time as (N, T_max, T_max) and (N, T_max)."""
    kernel = jnp.asarray(kernel)
    grouped = kernel if kernel.ndim == 3 else kernel[None]
    ok = grouped.ndim == 3 and grouped.shape[1] == grouped.shape[2] and grouped.shape[0] > 0
    require(ok, f"kernel must have shape (T_max, T_max) or (N, T_max, T_max); got {kernel.shape}")
    groups, length = grouped.shape[:2]
    require(width % groups == 0, f"the groups of kernel must divide the width D = {width}; got kernel {kernel.shape}")
    grouped = check_weight("kernel", grouped, grouped.shape)
    if bias is None:
        return grouped, jnp.zeros_like(grouped[:, 0])
    bias = check_weight("bias", bias, (*kernel.shape[:-2], length))
    return grouped, bias.reshape(groups, length)


def _linear(kernel: jax.Array, bias: jax.Array, x: jax.Array, places: Places, past: jax.Array | None) -> jax.Array:
    """The linear map over time, in groups of channels; x (B, T, D)."""

    def grouped(x):
        return None if x is None else x.reshape(*x.shape[:2], kernel.shape[0], x.shape[2] // kernel.shape[0])

    out = mix(kernel, grouped(x), places, grouped(past))
    return (out + at_places(bias, places)[..., None]).reshape(x.shape)


@compiled
def token_mixing(
    inputs: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """A linear map over time, y_t = sum_s W[p_t, p_s] x_s + b[p_t], p_t the place of a token in its document.

    Args:
      inputs: (*B, T, D), T <= T_max; shorter ones take the leading part of the weights.
      kernel: W, (T_max, T_max), or (N, T_max, T_max) with a map for each of N groups of D / N neighbouring channels.
      bias: b, (T_max,) or (N, T_max); zeros when None.
      is_causal: only s <= t: the lower triangle of W.
      mask: (*B, T) bool, False at padding, which takes no part and no place; its outputs are 0.
      segment_ids: (*B, T) integers; a packed document has the outputs that it has alone.
      initial_state: of an earlier call, whose document goes on.
      return_state: also return the state, a `PastTokens`; needs is_causal.

    Returns:
      (*B, T, D) in the inputs' dtype, or (out, state). Sums run in float32 at least.

    Raises:
      ValueError: shapes or dtypes that do not fit, T > T_max, a state without causality, or one without room left (NaN
        instead where jit hides how much it holds).

    Cost O(T^2 D), state T_max D numbers; padding, segments and states read the weights by place, (N, B, T, T_max) numbers.

    >>> import jax.numpy as jnp
    >>> token_mixing(jnp.ones((3, 1)), jnp.ones((4, 4)), is_causal=True)[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """
    width = jnp.shape(inputs)[-1] if jnp.ndim(inputs) else 0
    kernel, bias = _square(kernel, bias, width)

    def body(x, places, past):
        wide_kernel, wide_bias, wide_x = wide(kernel, bias, x)
        return _linear(wide_kernel, wide_bias, wide_x, places, None if past is None else past[0]), (x,)

    return over_places(
        body, inputs, kernel.shape[1], ((width,),), is_causal=is_causal, mask=mask, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip


@compiled
def res_mlp(
    inputs: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike,
    scale: ArrayLike,
    shift: ArrayLike,
    layer_scale: ArrayLike,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """ResMLP's mixing of tokens, y = gamma (W (alpha x + beta) + b): what is added to x.

    An affine map in place of a norm, one linear map over time, and LayerScale, which starts near 0 (0.1 up to 18 layers, 1e-5 up to 24,
    1e-6 beyond).

    Args:
      inputs: (*B, T, D), T <= T_max.
      kernel, bias: W (T_max, T_max) and b (T_max,).
      scale, shift, layer_scale: alpha, beta and gamma, (D,) each.
      The others, the errors, the cost and the state: see `token_mixing`.

    Source: Touvron et al., arXiv:2105.03404.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones(2)
    >>> res_mlp(jnp.ones((3, 2)), jnp.eye(4), jnp.zeros(4), 2 * one, one, 0.1 * one).shape
    (3, 2)
    """
    width = jnp.shape(inputs)[-1] if jnp.ndim(inputs) else 0
    kernel, bias = _square(kernel, bias, width)
    vectors = {"scale": scale, "shift": shift, "layer_scale": layer_scale}
    scale, shift, layer_scale = (check_weight(name, array, (width,)) for name, array in vectors.items())

    def body(x, places, past):
        w, b, alpha, beta, gamma, wide_x = wide(kernel, bias, scale, shift, layer_scale, x)

        def affine(x):
            return None if x is None else scaled_axis(alpha, x) + along(beta, x)

        out = _linear(w, b, affine(wide_x), places, affine(None if past is None else past[0].astype(wide_x.dtype)))
        return scaled_axis(gamma, out), (x,)

    return over_places(
        body, inputs, kernel.shape[1], ((width,),), is_causal=is_causal, mask=mask, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip


@compiled
def mlp_mixer(
    inputs: ArrayLike,
    in_kernel: ArrayLike,
    in_bias: ArrayLike,
    out_kernel: ArrayLike,
    out_bias: ArrayLike,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: Any = None,
    return_state: bool = False,
) -> Any:
    """MLP-Mixer's mixing of tokens, y = W_2 gelu(W_1 x + b_1) + b_2 over time: what is added to x.

    Causal: F is a multiple r of T_max, and the hidden units r t ... r t + r - 1 belong to step t. They see the tokens up to t and are read
    by the outputs from t on: block-triangular W_1 and W_2.

    Args:
      inputs: (*B, T, D), T <= T_max, usually after a norm.
      in_kernel, in_bias: W_1 (F, T_max) and b_1 (F,).
      out_kernel, out_bias: W_2 (T_max, F) and b_2 (T_max,).
      segment_ids: with is_causal only: without it all hidden units belong to one document.
      The others and the errors: see `token_mixing`.

    Cost O(T F D), state T_max D + F D numbers. Source: Tolstikhin et al., arXiv:2105.01601 (F = T_max / 2 there).

    >>> import jax.numpy as jnp
    >>> mlp_mixer(jnp.ones((3, 2)), jnp.ones((6, 4)), jnp.zeros(6), jnp.ones((4, 6)), jnp.zeros(4)).shape
    (3, 2)
    """
    width = jnp.shape(inputs)[-1] if jnp.ndim(inputs) else 0
    in_kernel = check_weight("in_kernel", in_kernel, ("F", "T_max"))
    hidden, length = in_kernel.shape
    in_bias = check_weight("in_bias", in_bias, (hidden,))
    out_kernel, out_bias = check_weight("out_kernel", out_kernel, (length, hidden)), check_weight(
        "out_bias", out_bias, (length,)
    )  # fmt: skip
    ratio = hidden // max(length, 1)
    if is_causal:
        require(
            hidden == ratio * length and ratio > 0,
            f"in_kernel must have a multiple of T_max rows where is_causal: F / T_max hidden units a step; got {in_kernel.shape}",
        )
    else:
        require(
            segment_ids is None,
            "segment_ids need is_causal=True: without it the hidden units of a row belong to one document",
        )

    def body(x, places, past):
        w1, b1, w2, b2, wide_x = wide(in_kernel, in_bias, out_kernel, out_bias, x)
        if not is_causal:
            return _both_ways(w1, b1, w2, b2, wide_x, places, x.dtype), (x,)
        w1, b1 = jnp.moveaxis(w1.reshape(length, ratio, length), 1, 0), b1.reshape(length, ratio).T
        w2 = jnp.moveaxis(w2.reshape(length, length, ratio), 2, 0)

        def repeated(x):
            return None if x is None else jnp.broadcast_to(x[:, :, None], (*x.shape[:2], ratio, x.shape[2]))

        early, late = (None, None) if past is None else past
        units = mix(w1, repeated(wide_x), places, repeated(early)) + at_places(b1, places)[..., None]
        units = jax.nn.gelu(units).astype(x.dtype)
        out = jnp.sum(mix(w2, units.astype(wide_x.dtype), places, late), axis=2)
        return out + at_places(b2[None], places), (x, units)

    return over_places(
        body, inputs, length, ((width,), (ratio, width)), is_causal=is_causal, mask=mask, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip


def _both_ways(w1, b1, w2, b2, x, places, dtype):
    """All hidden units from all tokens of the row; padding is 0 in x."""
    count = x.shape[1]
    if places.fixed:
        units = jnp.einsum("fs,bsd->bfd", w1[:, :count], x)
    else:
        units = jnp.einsum("bsf,bsd->bfd", take(w1.T, places.position), x)
    units = jax.nn.gelu(units + b1[None, :, None]).astype(dtype).astype(x.dtype)
    if places.fixed:
        out = jnp.einsum("tf,bfd->btd", w2[:count], units)
    else:
        out = jnp.einsum("btf,bfd->btd", take(w2, places.position), units)
    return out + at_places(b2[None], places)
