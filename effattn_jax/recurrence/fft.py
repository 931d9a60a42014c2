"""Causal convolution by the fast Fourier transform: how a time-invariant linear recurrence runs when its kernel is known.

    y_t = sum_{j <= t} k_j x_{t-j}                       Y = X K on a period of at least T + T' - 1, so that nothing wraps around

Cost O((T + T') log(T + T')) a channel; state: none, a convolution has no last state.
"""

from math import ceil, log2

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, accumulator

__all__ = ["fft_convolution"]


def smooth(size: int) -> int:
    """The least 2^a 3^b 5^c >= size, whose transform is fast."""
    odd = (3**b * 5**c for b in range(9) for c in range(7) if 3**b * 5**c < 2 * size)
    return min(factor << max(0, ceil(log2(size / factor))) for factor in odd)


def fft_convolution(inputs: ArrayLike, kernel: ArrayLike) -> jax.Array:
    """Convolves every channel with its kernel: y_t = sum_{j <= t} kernel_j * inputs_{t-j}.

    Args:
      inputs: (*B, T, D), real or complex.
      kernel: (T', D) or (T', 1), real or complex; what is behind its first T steps is never reached.

    Returns:
      y (*B, T, D) in the dtype of inputs (complex if kernel is). Transforms run in float32 at least.

    Raises:
      ValueError: for shapes that do not fit; it names the argument, its shape and the rule.

    Cost O((T + T') log(T + T')) a channel. Rounding is relative to the largest product in the row, not to the output beside it: an input of 1e4
    leaves about 1e-3 in all outputs in float32, earlier ones too, and a NaN spoils its whole row. Where causality must hold to the bit, use a recurrence.

    >>> import jax.numpy as jnp
    >>> y = fft_convolution(jnp.ones((4, 1)), jnp.array([[1.0], [0.5]]))
    >>> print(jnp.round(y[:, 0], 5))
    [1.  1.5 1.5 1.5]
    """
    inputs, kernel = jnp.asarray(inputs), jnp.asarray(kernel)
    for name, array in (("inputs", inputs), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise ValueError(f"{name} must be real or complex floating; got {array.dtype} of shape {array.shape}")
    if inputs.ndim < 2:
        raise ValueError(f"inputs must have shape (*B, T, D); got {inputs.shape}")
    length, width = inputs.shape[-2:]
    if kernel.ndim != 2 or kernel.shape[1] not in (1, width):
        raise ValueError(f"kernel must have shape (T', D) with D = {width}, or (T', 1); got {kernel.shape}")
    out_dtype = jnp.result_type(inputs, kernel) if jnp.iscomplexobj(kernel) else inputs.dtype
    if 0 in (length, kernel.shape[0]):
        return jnp.zeros_like(inputs, out_dtype)
    dtype = accumulator(inputs, kernel)
    kernel = kernel[:length].astype(dtype)
    kernel = kernel.reshape((1,) * (inputs.ndim - 2) + kernel.shape)
    period = smooth(length + kernel.shape[-2] - 1)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    forward, back = (jnp.fft.fft, jnp.fft.ifft) if is_complex else (jnp.fft.rfft, jnp.fft.irfft)
    spectrum = forward(inputs.astype(dtype), period, axis=-2) * forward(kernel, period, axis=-2)
    return back(spectrum, period, axis=-2)[..., :length, :].astype(out_dtype)
