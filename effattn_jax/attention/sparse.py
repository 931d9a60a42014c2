"""Sparse attention: a stated set of pairs, one softmax over it, each pair once.

    o_i = sum_j p_ij v_j      p_i = softmax_j(scale q_i . k_j + b_ij)  over the keys j that the pattern gives to i, among those i may see

Cost O(T P) for P keys a query, memory O(T); state: the cache, (H + V) K numbers a token (a window: the last W). Sources: Child et al.,
arXiv:1904.10509; Beltagy et al., arXiv:2004.05150 (global tokens).
"""

from typing import Any

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, is_whole, positive
from effattn_jax.attention._calls import FAR, window_bounds
from effattn_jax.attention._patterns import run
from effattn_jax.attention._unions import Fixed, Union
from effattn_jax.attention.kv_cache import Cache
from effattn_jax.attention.softmax import dot_product_attention

__all__ = ["atrous_attention", "fixed_attention", "local_attention", "sparse_attention", "strided_attention"]


@compiled
def local_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    window: int | tuple[int, int],
    logits_soft_cap: float | None = None,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Softmax attention over a window: query i sees keys j with i - left <= j <= i + right.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids, initial_state, logits_soft_cap, chunk_size, implementation, return_weights: as in
        `dot_product_attention`, of which this is the form with a window.
      return_state: also return the last `left` keys and values (or the cache that came in).
      window: W neighbours on each side, the query's own key besides (causal: to the left), or (left, right).

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T W (H + V)) a head, memory O(T), state W (H + V) K numbers.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> alone = local_attention(x, x, x, is_causal=True, window=0)
    >>> bool(jnp.allclose(alone, x))
    True
    """
    if window is None:
        raise ValueError("window must be an int >= 0 or a pair (left, right) of them; got None")
    return dot_product_attention(
        query, key, value, bias, mask, scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, window=window, logits_soft_cap=logits_soft_cap, chunk_size=chunk_size, implementation=implementation,
        return_weights=return_weights,
    )  # fmt: skip


@compiled
def atrous_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    dilation: int,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Softmax attention over every r-th key: query i sees keys j with (i - j) % dilation == 0, its own among them.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids: as in `dot_product_attention`. Positions count from the first key, in each
        document of a packed row anew and padding in front left out; with T != S the ends are aligned.
      initial_state, return_state: its cache, of all keys.
      implementation: "dense" (all scores at once, masked) or "chunked" (the pairs of the pattern only, O(T) memory); None picks by size.
      dilation: r; 1 is full attention.
      chunk_size: rows and columns of a block; None picks.
      return_weights: also return the weights, (*B, N, T, S), from the dense form.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T S / r (H + V)) a head: each class of positions modulo r is a sequence of its own. Memory O(T); state: the cache.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    >>> out = atrous_attention(x, x, x, dilation=2)
    >>> bool(jnp.allclose(out[:, 1::2], dot_product_attention(*[x[:, 1::2]] * 3), atol=1e-6))
    True
    """
    positive(dilation=dilation)
    return run(
        Union(None, dilation),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        return_weights=return_weights,
    )  # fmt: skip


@compiled
def sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    window: int | tuple[int, int],
    dilation: int,
    num_global: int = 0,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""One softmax over the union of a window, every r-th key, and global tokens; a pair that several of them give counts once.

    Query i sees key j if i - left <= j <= i + right, or (i - j) % dilation == 0, or j < num_global, or (without causality) 0 <= i < num_global.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids: as in `dot_product_attention`. Positions count from the first key, in each
        document of a packed row anew and padding in front left out; with T != S the ends are aligned.
      initial_state, return_state: its cache, of all keys.
      implementation: "dense" (all scores at once, masked) or "chunked" (the pairs of the pattern only, O(T) memory); None picks by size.
      window: W neighbours on each side, the query's own key besides (causal: to the left), or (left, right).
      dilation: r.
      num_global: the first so many keys of a document are seen by all of it, and its first so many queries see all that they may.
      chunk_size: rows and columns of a block; None picks.
      return_weights: also return the weights, (*B, N, T, S), from the dense form.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (W + S / r + num_global) (H + V)) a head, packed rows and padding included; a bias or mask of all pairs is O(T S) by itself.
    Memory O(T); state: the cache. Sources: arXiv:1904.10509, arXiv:2004.05150.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    >>> out = sparse_attention(x, x, jnp.ones_like(x), is_causal=True, window=2, dilation=3, num_global=1)
    >>> bool(jnp.allclose(out, 1))
    True
    """
    positive(dilation=dilation)
    bounds = window_bounds(window, is_causal)
    if window is None or (isinstance(window, tuple | list) and None in window):
        raise ValueError(f"window must be an int >= 0 or a pair (left, right) of them; got {window!r}")
    left, right = (FAR if w is None else w for w in bounds)
    if not is_whole(num_global, 0):
        raise ValueError(f"num_global must be an int >= 0; got {num_global!r}")
    return run(
        Union((left, right), dilation, num_global),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        return_weights=return_weights,
    )  # fmt: skip


@compiled
def strided_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    stride: int,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""OpenAI's strided pattern, merged in one softmax: the last l keys, {i - l < j <= i}, and every l-th, {(i - j) % l == 0}.

    Without causality: {|i - j| < l} and every l-th. With l near the square root of T each query sees about 2 l keys.

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids: as in `dot_product_attention`. Positions count from the first key, in each
        document of a packed row anew and padding in front left out; with T != S the ends are aligned.
      initial_state, return_state: its cache, of all keys.
      implementation: "dense" (all scores at once, masked) or "chunked" (the pairs of the pattern only, O(T) memory); None picks by size.
      stride: l.
      chunk_size: rows and columns of a block; None picks.
      return_weights: also return the weights, (*B, N, T, S), from the dense form.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (l + S / l) (H + V)) a head, memory O(T); state: the cache. Source: arXiv:1904.10509.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    >>> strided_attention(x, x, x, is_causal=True, stride=3).shape
    (1, 9, 2, 4)
    """
    positive(stride=stride)
    reach = min(stride - 1, FAR)
    return run(
        Union((reach, 0 if is_causal else reach), stride),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        return_weights=return_weights,
    )  # fmt: skip


@compiled
def fixed_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: Cache | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    block: int,
    summary: int,
    chunk_size: int | None = None,
    return_weights: bool = False,
) -> Any:
    r"""OpenAI's fixed pattern, merged in one softmax: the query's own block of l positions, and the last c columns of every earlier block.

    Query i sees key j if j // l == i // l, or j % l >= l - c for a j in another complete block (causal: an earlier one, always complete).

    Args:
      query, key, value, bias, mask, scale, is_causal, segment_ids: as in `dot_product_attention`. Positions count from the first key, in each
        document of a packed row anew and padding in front left out; with T != S the ends are aligned.
      initial_state, return_state: its cache, of all keys.
      implementation: "dense" (all scores at once, masked) or "chunked" (the pairs of the pattern only, O(T) memory); None picks by size.
      block: l.
      summary: c, at most l.
      chunk_size: rows and columns of a block of the computation; None picks.
      return_weights: also return the weights, (*B, N, T, S), from the dense form.

    Returns:
      out (*B, T, N, V) in the dtype of value; (out, state); with `return_weights` the weights last.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (l + c S / l) (H + V)) a head, memory O(T); state: the cache. Source: arXiv:1904.10509.

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    >>> fixed_attention(x, x, x, is_causal=True, block=3, summary=1).shape
    (1, 9, 2, 4)
    """
    positive(block=block, summary=summary)
    if summary > block:
        raise ValueError(
            f"summary must be at most block: the last columns of a block; got summary={summary}, block={block}"
        )
    return run(
        Fixed(block, summary),
        (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
        return_weights=return_weights,
    )  # fmt: skip
