"""Linformer: attention over keys and values projected along time to a fixed number.

    o_i = sum_r p_ir (F v)_r      p_i = softmax_r(scale q_i . (E k)_r)          E, F (R, L), a column for the first key, the second, ...

Cost O((T + S) R) a head, memory O(T + S), with a mask S R in a row; no state. Source: Wang et al., arXiv:2006.04768.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, accumulator, check_call, floating, key_mask
from effattn_jax._places import count_positions, rows_of_table, split_like
from effattn_jax.attention.softmax import dot_product_attention

__all__ = ["linformer_attention"]


@compiled
def linformer_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: None = None,
    return_state: bool = False,
    implementation: str | None = None,
    key_projection: ArrayLike,
    value_projection: ArrayLike,
) -> jax.Array:
    r"""Softmax attention over R mixtures of the keys and values: softmax(scale q (E k)^T) (F v).

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias: refused: a score belongs to a mixture of keys.
      mask: boolean over keys, broadcastable to (*B, 1, 1, S); True = attend. Keys that are masked do not exist:
        the columns of E and F are those of a key's place among the others.
      scale: factor on the scores; None is 1 / sqrt(H).
      is_causal: refused, as are segment_ids, initial_state and return_state: every row of E mixes all positions, later ones too.
      implementation: of the softmax over the R mixtures, as in `dot_product_attention`.
      key_projection, value_projection: E and F, (R, L) or one for each key head (K, R, L), the same array to share it; L bounds S.

    Returns:
      out (*B, T, N, V) in the dtype of value.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O((T + S) R (H + V)) a head, memory O(T + S), with a mask S R in a row. Source: arXiv:2006.04768.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> mean = jnp.full((1, 8), 1 / 6)
    >>> out = jax.jit(linformer_attention)(x, x, x, key_projection=mean, value_projection=mean)
    >>> bool(jnp.allclose(out, x.mean(1, keepdims=True), atol=1e-6))
    True
    """
    if is_causal or initial_state is not None or return_state:
        raise ValueError(
            f"is_causal must be False, without initial_state and return_state; got is_causal={is_causal}: key_projection mixes all "
            "positions, later ones too, so that linformer_attention has no causal form"
        )
    if segment_ids is not None:
        raise ValueError(
            f"segment_ids must be None; got {type(segment_ids).__name__}: key_projection mixes positions of all segments. Give each "
            "document a row of its own, padded and with a mask over keys, (*B, 1, 1, S)"
        )
    call = check_call(query, key, value, bias, mask, is_causal=False, segment_ids=None, stateful=False)
    real = key_mask(call, "linformer_attention", bias, mask)
    keys = _project("key_projection", key_projection, call.key, real)
    values = _project("value_projection", value_projection, call.value, real)
    if keys.shape[1] != values.shape[1]:
        raise ValueError(
            f"key_projection and value_projection must have the same number of rows R; got {keys.shape[1]} and {values.shape[1]}"
        )
    some = None  # a row without real keys sees none of its mixtures, which are all 0
    if real is not None or call.key.shape[1] == 0:
        some = jnp.zeros(call.key.shape[:1], bool) if real is None else real.any(-1)
        some = some[:, None, None, None]
    out = dot_product_attention(call.query, keys, values, mask=some, scale=scale, implementation=implementation)
    return call.restore(out.astype(call.value.dtype))


def _project(name: str, projection: ArrayLike, x: jax.Array, real: jax.Array | None) -> jax.Array:
    """(B, S, K, H) -> (B, R, K, H), in the accumulator's dtype."""
    projection = floating(**{name: projection})[0]
    (_, length, heads, _), shape = x.shape, projection.shape
    if not (projection.ndim == 2 or (projection.ndim == 3 and shape[0] == heads)) or shape[-1] < length:
        raise ValueError(
            f"{name} must have shape (R, L) or (K, R, L) = ({heads}, R, L) with L at least S = {length}; got shape {shape}"
        )
    dtype = accumulator(x, projection)
    table = jnp.moveaxis(projection, -1, 0).astype(dtype)
    if projection.ndim == 3:
        table = split_like(table, 1, x, 2)
    if real is None:
        columns = table[:length]
        return jnp.einsum("sr,bskh->brkh" if projection.ndim == 2 else "skr,bskh->brkh", columns, x.astype(dtype))
    real = split_like(real, 0, x, 0)
    columns = rows_of_table(table, jnp.where(real, count_positions(real.shape, real), 0))
    x = jnp.where(real[..., None, None], x, 0).astype(dtype)
    return jnp.einsum("bsr,bskh->brkh" if projection.ndim == 2 else "bskr,bskh->brkh", columns, x)
