"""Efficient attention: one softmax over the features of a query, one over the positions of a key's feature.

    o_i = sum_a p_i[a] sum_j r_j[a] v_j      p_i = softmax_a(q_i)      r_j[a] = exp(k_j[a]) / sum_j' exp(k_j'[a])        j, j' <= i when causal

Cost O(T (C H + H V)) a head for chunks of C, memory O(T), state H V + 2 H. Source: Shen et al., arXiv:1812.01243.
"""

from typing import Any

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike
from effattn_jax.attention import _exponential, _frame

__all__ = ["efficient_attention"]


@compiled
def efficient_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    segment_ids: Any = None,
    initial_state: _frame.LinearState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Two softmaxes: o_i = sum_a softmax_a(q_i)[a] sum_j softmax_j(k[a])[j] v_j; weights of a row sum to 1 by themselves.

    Causal, each feature has a running normaliser: o_i = sum_a p_ia (sum_{j<=i} exp(k_ja) v_j) / z_ia with z_ia = sum_{j<=i} exp(k_ja).
    That is not linear attention with phi = exp, where all features share one normaliser. Sums are kept relative to a running maximum.

    Args:
      query, key, value: (*B, T, N, H), (*B, S, K, H), (*B, S, K, V); K divides N.
      bias, mask: as for `linear_attention`: no bias; a mask over keys only, which enter no normaliser.
      scale: factor on query before its softmax; None is 1.
      is_causal: query i sees keys up to i, ends aligned: with T < S the last query sees every key.
      segment_ids: (*B, T), as for `linear_attention`; a pair of different arrays is refused.
      initial_state, return_state: as for `linear_attention`.
      implementation: "chunked" or None.
      chunk_size: steps a chunk; None is 32.

    Returns:
      out (*B, T, N, V) in the dtype of value, or (out, state); 0 where there is no key.

    Raises:
      ValueError: names the argument, its shape and the rule.

    Cost O(T (C H + H V)) a head, state H V + 2 H. Source: arXiv:1812.01243.

    >>> import jax.numpy as jnp
    >>> key, value = jnp.log(jnp.array([1.0, 2.0, 1.0])), jnp.array([4.0, 1.0, 2.0])
    >>> print(efficient_attention(*(x.reshape(1, 3, 1, 1) for x in (key, key, value)), is_causal=True)[0, :, 0, 0])
    [4. 2. 2.]
    """
    _frame.refuse("efficient_attention", implementation, "dense", "parallel")
    call, mask = _frame.open_call(
        "efficient_attention", (query, key, value, bias, mask), scale=scale, is_causal=is_causal, segment_ids=segment_ids,
        initial_state=initial_state, return_state=return_state, implementation=implementation, chunk_size=chunk_size,
    )  # fmt: skip
    parts = {"total": True, "maximum": True}
    state = _frame.check_state(initial_state, call, call.key.shape[3], **parts)
    if max(call.query.shape[1], call.key.shape[1]) == 0 or (call.query.shape[1] == 0 and not return_state):
        out, state = _frame.nothing(call, state, call.key.shape[3], **parts)
    else:
        out, state = _exponential.attend(call, mask, is_causal, state, chunk_size, joint=False)
    return _frame.close_call(call, out, state, return_state)
