"""Convolutions over time whose kernels are softmaxes, shared by heads of channels: lightweight, and dynamic where each step makes its own.

    lightweight   y_t = sum_{j < W} softmax(k[n])_j x_{t - j}               n the head of the channel
    dynamic       y_t = sum_{j < W} softmax(x_t K[:, n])_j x_{t - j}

Cost O(T W D), dynamic O(T D N W) more; state: the last W - 1 inputs. Centred where not causal: x_{t + W // 2 - j}.
Source: Wu et al., arXiv:1901.10430; as mixers of pretrained models Tay et al., arXiv:2105.03322.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax._places import number_runs
from effattn_jax._products import quiet, scaled_axis, scaled_rows, softmax
from effattn_jax.mixing._tokens import Tokens, adopt, check_tokens, check_weight, require, wide

__all__ = ["ConvolutionState", "dynamic_convolution", "lightweight_convolution"]


class ConvolutionState(NamedTuple):
    """The last W - 1 inputs (*B, W - 1, D), padding not counted, 0 where there were none, and the segment of each (*B, W - 1)."""

    inputs: jax.Array
    segment_ids: jax.Array


def convolve(
    x: jax.Array,
    taps: Callable,
    width: int,
    own: jax.Array | None = None,
    *,
    is_causal: bool,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None,
    state: ConvolutionState | None,
) -> tuple[jax.Array, ConvolutionState]:
    """sum_j taps(j, x_{t - j}, own_t) over j < width, and the state after it; x (B, T, D), zeros outside and in other segments.

    Not causal: x_{t + width // 2 - j}. Padding (mask (B, T) False) is as if absent: it is moved in front of the state, and its outputs mean nothing.
    """
    length = x.shape[1]
    before = ConvolutionState(*_nothing(x, width - 1)) if state is None else state
    ids = _ids(before, length, segment_ids, state)
    past_x, past_ids = before.inputs.astype(x.dtype), before.segment_ids
    all_x, all_ids = jnp.concatenate([past_x, x], axis=1), jnp.concatenate([past_ids, ids], axis=1)
    if mask is not None:
        order, back = _padding_first(mask, width - 1)
        all_x, all_ids = _reordered(all_x, order), jnp.take_along_axis(all_ids, order, axis=1)
        own = None if own is None else _reordered(own, jnp.maximum(order[:, width - 1 :] - (width - 1), 0))
    after = ConvolutionState(all_x[:, length:], all_ids[:, length:])
    ahead = 0 if is_causal else width // 2
    run = number_runs(all_ids)
    own_run = run[:, width - 1 :]
    all_x, run = (jnp.pad(a, [(0, 0), (0, ahead)] + [(0, 0)] * (a.ndim - 2)) for a in (all_x, run))
    y = 0
    for lag in range(width):
        start = width - 1 + ahead - lag
        shifted = all_x[:, start : start + length]
        if segment_ids is not None or state is not None:
            shifted = jnp.where((run[:, start : start + length] == own_run)[..., None], shifted, 0)
        y += taps(lag, shifted, own)
    return (y if mask is None else _reordered(y, back)), after


def _padding_first(mask: jax.Array, before: int) -> tuple[jax.Array, jax.Array]:
    """The order (B, before + T) of a state and its row, padding first and all else as it was; and where in that row, counted behind the first
    `before` places, each token (B, T) then stands, padding anywhere."""
    real = jnp.pad(mask, [(0, 0), (before, 0)], constant_values=True)
    latest = mask.shape[1] - jnp.sum(mask, axis=1, keepdims=True) - 1
    return jnp.argsort(real, axis=1, stable=True), jnp.maximum(latest + jnp.cumsum(mask, axis=1), 0)


def _reordered(x: jax.Array, order: jax.Array) -> jax.Array:
    """x (B, T, ...) with the tokens that `order` (B, T') names."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _nothing(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Zeros (B, count, D) and ids (B, count) made from x, so that sharding and varying axes are its own."""
    row = jnp.sum(x[:, :0], axis=1, keepdims=True)
    zeros = jnp.broadcast_to(row, (x.shape[0], count, x.shape[2]))
    return zeros, jnp.broadcast_to(jnp.sum(row[..., :0], axis=2).astype(jnp.int32), (x.shape[0], count))


def _ids(before: ConvolutionState, length: int, segment_ids: Any, state: Any) -> jax.Array:
    if segment_ids is not None:
        return segment_ids.astype(jnp.int32)
    shape = (before.inputs.shape[0], length)
    if state is None or before.segment_ids.shape[1] == 0:
        return jnp.broadcast_to(jnp.sum(before.segment_ids[:, :0], axis=1, keepdims=True).astype(jnp.int32), shape)
    return jnp.broadcast_to(before.segment_ids[:, -1:], shape)


def _run(
    tokens: Tokens, taps: Callable, width: int, is_causal: bool, state: Any, return_state: bool, own: jax.Array | None = None
) -> Any:  # fmt: skip
    """The convolution of checked tokens, in the accumulator's dtype; its state keeps the inputs' own."""
    x = tokens.inputs
    if state is not None:
        state = adopt(state, ConvolutionState(*_nothing(x, width - 1)), tokens.batch)
    # Computed again in the backward pass, which then keeps the inputs and not their W shifted copies.
    run = jax.checkpoint(partial(convolve, taps=taps, width=width, is_causal=is_causal))
    y, after = run(x, own=own, mask=tokens.mask, segment_ids=tokens.segments, state=state)
    y = tokens.finish(y)
    return (y, jax.tree.map(tokens.restore, after)) if return_state else y


def _by_heads(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Channels of x (B, T, D) times the weight (B, T, N), or (N,), of their head."""
    heads = weight.shape[-1]
    x = x.astype(weight.dtype).reshape(*x.shape[:2], heads, x.shape[2] // heads)
    y = quiet(scaled_rows)(weight, x) if weight.ndim == 3 else scaled_axis(weight, x, 2)
    return y.reshape(*x.shape[:2], heads * x.shape[3])


@compiled
def lightweight_convolution(
    inputs: ArrayLike,
    kernel: ArrayLike,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: ConvolutionState | None = None,
    return_state: bool = False,
) -> Any:
    """Depthwise convolution with softmax-normalised kernels, shared by the channels of a head.

    y_t = sum_{j < W} softmax(k[n])_j x_{t - j}, n the head of the channel; not causal: x_{t + W // 2 - j}. Outside of the row and of the
    segment there are zeros, and the softmax is over all W in any case, as in the source.

    Args:
      inputs: (*B, T, D), any T; in the source the output of a projection and a GLU.
      kernel: k, (N, W) before the softmax; N divides D, head n has the D / N channels from n D / N on.
      is_causal: only the past.
      mask: (*B, T) bool, False at padding, which is as if absent; its outputs are 0.
      segment_ids: (*B, T) integers; a packed document has the outputs that it has alone.
      initial_state: of an earlier call, which this one goes on from.
      return_state: also return the state; needs is_causal.

    Returns:
      (*B, T, D) in the inputs' dtype, or (out, state). Softmax and sums run in float32 at least.

    Raises:
      ValueError: shapes or dtypes that do not fit, a state without causality.

    Cost O(T W D), state (W - 1) D numbers. Source: Wu et al., arXiv:1901.10430.

    >>> import jax.numpy as jnp
    >>> lightweight_convolution(jnp.ones((4, 1)), jnp.zeros((1, 2)), is_causal=True)[:, 0].tolist()
    [0.5, 1.0, 1.0, 1.0]
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    kernel = check_weight("kernel", kernel, ("N", "W"))
    _check_heads(*kernel.shape, tokens.inputs.shape[-1])
    kernel, _ = wide(kernel, tokens.inputs)
    weights = jax.nn.softmax(kernel, axis=-1)

    def taps(lag, shifted, _):
        return _by_heads(weights[:, lag], shifted)

    return _run(tokens, taps, kernel.shape[1], is_causal, initial_state, return_state)


@compiled
def dynamic_convolution(
    inputs: ArrayLike,
    kernel: ArrayLike,
    *,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: ConvolutionState | None = None,
    return_state: bool = False,
) -> Any:
    """A lightweight convolution whose kernel each step makes from its own input.

    y_t = sum_{j < W} softmax(x_t K[:, n])_j x_{t - j}, n the head of the channel.

    Args:
      inputs: (*B, T, D).
      kernel: K, (D, N, W); N divides D.
      The others, the errors and the state: see `lightweight_convolution`.

    Cost O(T D N W + T W D). Source: Wu et al., arXiv:1901.10430.

    >>> import jax.numpy as jnp
    >>> dynamic_convolution(jnp.ones((4, 1)), jnp.zeros((1, 1, 2)), is_causal=True)[:, 0].tolist()
    [0.5, 1.0, 1.0, 1.0]
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    kernel = check_weight("kernel", kernel, (tokens.inputs.shape[-1], "N", "W"))
    _check_heads(*kernel.shape[1:], tokens.inputs.shape[-1])
    kernel, x = wide(kernel, tokens.inputs)
    weights = softmax(jnp.einsum("btd,dnw->btnw", x, kernel))[0]

    def taps(lag, shifted, weights):
        return _by_heads(weights[..., lag], shifted)

    return _run(tokens, taps, kernel.shape[2], is_causal, initial_state, return_state, weights)


def _check_heads(heads: int, width: int, channels: int) -> None:
    require(heads > 0 and channels % heads == 0, f"the heads N of kernel must divide D = {channels}; got N = {heads}")
    require(width > 0, f"kernel must be at least one step wide; got W = {width}")
