"""ReRoPE: rotary positions whose distances stop growing, or grow slower, outside a window, so that none exceeds those of training.

    score at distance r = i - j:   q_i . R(f(r)) k_j,     f(r) = r for r < w,   w + (r - w) / k beyond;   k infinite: w

The pairs inside the window and those outside are two parts of one softmax, each with its own turn of queries and keys (outside: queries turned by
w, keys not at all), merged by their normalisers: each pair costs one product, not two. Memory O(T); state: the cache, of keys as they came.
Sources: kexue.fm/archives/9708 (ReRoPE, Leaky), 9728 (its inverse: k < 1 in training); sinks: Xiao et al., arXiv:2309.17453.
"""

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, is_whole, positive
from effattn_jax.attention._pairs import whole_rows
from effattn_jax.attention._patterns import Part, View, documents, merge, part, run
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.position.angles import angles, given_frequencies, inverse_frequencies, wide_positions
from effattn_jax.position.rotation import turn

__all__ = ["rerope_attention"]


class _ReRope(NamedTuple):
    """The pattern: a window of true distances, and the rest."""

    window: int
    leak: float  # 1 / k
    frequencies: np.ndarray | None  # (H/2,); None leaves queries and keys as they are
    interleaved: bool
    sinks: int | None

    def within(self, places: int) -> "_ReRope":
        """See `_patterns.Pattern`."""
        sinks = None if self.sinks is None else min(self.sinks, places)
        return self._replace(window=min(self.window, places), sinks=sinks)

    def dense(self, view: View) -> tuple[jax.Array, None]:
        """See `_patterns.Pattern`; its parts are softmaxes of their own."""
        return merge(self._parts(view, _all_rows)), None

    def chunked(self, view: View) -> jax.Array:
        """See `_patterns.Pattern`."""
        return merge(self._parts(view, part))

    def _parts(self, view: View, attend: Callable[..., Part]) -> list[Part]:
        inside = self._turned(view, 1.0, 0.0)
        near = self.window - 1
        parts = [attend(inside, left=near, right=0 if view.is_causal else near)]
        jump = self.window * (1 - self.leak)
        parts += self._far(self._turned(view, self.leak, jump), attend, right=-self.window)
        if not view.is_causal:
            parts += self._far(self._turned(view, self.leak, -jump), attend, left=-self.window)
        return parts

    def _far(self, view: View, attend: Callable[..., Part], **bound: int) -> list[Part]:
        """One side beyond the window: all of its keys, or only the first of each document."""
        if self.sinks is None:
            return [attend(view, **bound)]
        if view.marks.key_segments is None and view.marks.key_mask is None:
            length, keys = view.lengths
            return [attend(view.cut((0, length), (0, min(self.sinks, keys))), **bound)]
        return [attend(view.marked(key_mask=documents(view).keys < self.sinks), **bound)]

    def _turned(self, view: View, rate: float, jump: float) -> View:
        """Queries turned by rate t + jump, keys by rate t, not rounded back to their dtype, which would cost more than its last bit."""
        if self.frequencies is None:
            return view
        query, key = view.arrays[:2]
        wide = jnp.promote_types(query.dtype, jnp.float32)
        further = jnp.asarray(np.mod(self.frequencies * jump, 2 * np.pi), wide)[None, None]
        places = (view.positions()[None], jnp.arange(view.lengths[1], dtype=jnp.int32)[None])
        for_query, for_key = (angles(wide_positions(x, wide), self.frequencies * rate) for x in places)
        query, key = (
            turn(x.astype(wide), angle[..., None, :], self.interleaved)
            for x, angle in ((query, for_query + further), (key, for_key))
        )
        return view._replace(arrays=view.arrays._replace(query=query, key=key))


def _all_rows(view: View, **changes: Any) -> Part:
    """A part from all its scores at once."""
    arrays = view.arrays._replace(value=view.arrays.value.astype(view.spec.dtype))
    return whole_rows(view.spec._replace(**changes), arrays, view.marks)[:2]


@partial(compiled, constants=("frequencies",))
def rerope_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    window: int,
    leak: float = 0.0,
    sinks: int | None = None,
    base: float = 10000.0,
    frequencies: np.ndarray | None = None,
    dim: int | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Softmax attention with rotary positions at the distances min(r, w), or w + (r - w) leak beyond the window.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids, initial_state, return_state, implementation, chunk_size: as in
        `dot_product_attention`; queries and keys without positions, which are turned here. Without causality the future has -f(-r).
        Distances count slots: padding inside a row counts, before and behind it does not.
      window: w >= 1; a quarter to a half of the trained length.
      leak: 1 / k of Leaky ReRoPE; 0 is ReRoPE, 1 plain rotary positions, above 1 the training form of InvLeaky.
      sinks: beyond the window only so many first tokens of a document are seen; None: all are.
      base: of the angles.
      frequencies: (H/2,) numpy instead, see `rotary_frequencies`.
      dim: 0 turns nothing, for windows with sinks alone; None is all of H.
      interleaved: the layout of pairs, see `rotary`.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state).

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S (H + V)) a head, O(T (w + sinks)) with sinks and no marks; memory O(T); state: the cache. Sources: kexue.fm/archives/9708, 9728.

    >>> import jax, jax.numpy as jnp
    >>> from effattn_jax.attention import dot_product_attention
    >>> from effattn_jax.position import rotary
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> turned = rotary(x, jnp.arange(6))
    >>> plain = dot_product_attention(turned, turned, x, is_causal=True)
    >>> bool(jnp.allclose(rerope_attention(x, x, x, window=3, leak=1.0, is_causal=True), plain, atol=1e-5))
    True
    """
    positive(window=window)
    if not (isinstance(leak, numbers.Real) and 0 <= leak < math.inf):
        raise ValueError(
            f"leak must be a finite number, at least 0: how fast distances grow beyond the window; got {leak!r}"
        )
    if sinks is not None and not is_whole(sinks, 1):
        raise ValueError(f"sinks must be an int >= 1, or None for all keys; got {sinks!r}")
    if dim not in (None, 0):
        raise ValueError(f"dim must be 0, which turns nothing, or None; got {dim}")
    size = jnp.shape(query)[-1] if jnp.ndim(query) else 0
    if frequencies is None and dim is None:
        frequencies = inverse_frequencies(size, base)
    elif frequencies is not None:
        frequencies = given_frequencies(frequencies, size // 2, "(H/2,)")
    return run(
        _ReRope(window, float(leak), frequencies if dim is None else None, interleaved, sinks),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
