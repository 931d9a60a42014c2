"""FNet: tokens are mixed by a discrete Fourier transform, without weights.

    y_t = Re sum_s e^(-2 pi i t s / T) (sum_d e^(-2 pi i d k / D) x_s[d])_k

Cost O(T D log(T D)). There is no causal form and no state: every output reads every token, and T itself.
Source: Lee-Thorp et al., arXiv:2105.03824.
"""

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, flags
from effattn_jax.mixing._places import Places, places_of, seen
from effattn_jax.mixing._tokens import check_tokens, require

__all__ = ["fnet"]


@compiled
def fnet(
    inputs: ArrayLike,
    *,
    orthonormal: bool = False,
    is_causal: bool = False,
    mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> jax.Array:
    """FNet's mixing, the real part of the Fourier transform over time and features: what is added to x.

    Args:
      inputs: (*B, T, D), any T.
      orthonormal: divide by sqrt(T D), so that the transform keeps lengths; the source does not.
      is_causal: must be False: each frequency is a sum over all of time.
      mask: (*B, T) bool, False at padding; the others get the transform of the row without it.
      segment_ids: (*B, T) integers; each document has its own transform.

    Returns:
      (*B, T, D) in the inputs' dtype, 0 at padding; the transform runs in float32 at least.

    Raises:
      ValueError: is_causal, shapes or dtypes that do not fit.

    Cost O(T D log(T D)); with mask or segments, where every row has lengths of its own, a product with a T x T matrix: O(T^2 D). No state.
    Source: Lee-Thorp et al., arXiv:2105.03824.

    >>> import jax.numpy as jnp
    >>> fnet(jnp.ones((3, 2)))[:, 0].tolist()
    [6.0, 0.0, 0.0]
    """
    require(
        not is_causal,
        "is_causal must be False: the Fourier transform has no causal form, each output is a sum over all of time",
    )
    flags(orthonormal=orthonormal)
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=False, stateful=False)
    x = tokens.inputs.astype(accumulator(tokens.inputs))
    length, width = x.shape[1:]
    if length == 0 or width == 0:
        return tokens.finish(x)
    places = places_of(tokens, None, length, False)
    if places.fixed:
        out = jnp.fft.fft(jnp.fft.fft(x, axis=2), axis=1).real
        return tokens.finish(out / (length * width) ** 0.5 if orthonormal else out)
    return tokens.finish(_each_document(x, places, orthonormal))


def _each_document(x: jax.Array, places: Places, orthonormal: bool) -> jax.Array:
    """The transform over time as a matrix of the pairs of each document: its length differs from row to row."""
    sees = jnp.broadcast_to(places.sees, (x.shape[0], *places.sees.shape[1:]))
    count = jnp.maximum(jnp.sum(sees, axis=-1, dtype=jnp.int32), 1)  # (B, T): real tokens of the document
    position = jnp.broadcast_to(places.position, count.shape).astype(jnp.uint32)
    turns = (position[:, :, None] * position[:, None, :]) % count[:, :, None].astype(jnp.uint32)
    angle = turns.astype(x.dtype) * (2 * jnp.pi / count[:, :, None].astype(x.dtype))
    cos, sin = (jnp.where(sees, f(angle), 0) for f in (jnp.cos, jnp.sin))

    def product(x):
        z = jnp.fft.fft(x, axis=2)
        return jnp.einsum("bts,bsd->btd", cos, z.real) + jnp.einsum("bts,bsd->btd", sin, z.imag)

    out = seen(product, x, sees)
    return out / jnp.sqrt(count.astype(x.dtype) * x.shape[2])[:, :, None] if orthonormal else out
