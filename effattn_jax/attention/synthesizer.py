"""Synthesizer: attention weights that are not products of queries and keys.

    o_i = sum_j softmax_j(B_ij) v_j        B = relu(x W_1 + b_1) W_2 + b_2 (dense), a table R (random), or factors and mixtures of these

B has a column for each place up to a maximum length L; columns are cut to the sequence. Here: B as an array, and attention by it, both
as written in the paper. The members of the table, which form no B where none is needed, are in `synthesizer_mixers`.
Source: Tay et al., arXiv:2005.00743.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._compiled import compiled
from effattn_jax._contract import ArrayLike, floating
from effattn_jax.attention.softmax import run

__all__ = [
    "dense_scores",
    "factorized_dense_scores",
    "factorized_random_scores",
    "mix_scores",
    "random_scores",
    "synthesizer_attention",
]


@compiled
def synthesizer_attention(
    scores: ArrayLike, value: ArrayLike, mask: ArrayLike | None = None, *, is_causal: bool = False
) -> jax.Array:
    r"""Attention by given scores: o_i = sum_j softmax_j(B_ij) v_j, without a factor 1 / sqrt(H).

    Args:
      scores: B, (*B, N, T, L) or, the same for the whole batch, (N, T, L); L >= S, of which the first S columns are used.
      value: (*B, S, K, V), K dividing N.
      mask: boolean, broadcastable to (*B, N, T, S), True = attend; a row with nothing to attend gives 0.
      is_causal: row i sees columns up to its own, ends aligned.

    Returns:
      (*B, T, N, V) in the dtype of value.

    Raises:
      ValueError: scores with fewer columns than value has steps, or other axes.

    Cost O(T S V) a head. Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> value = jnp.arange(3.0).reshape(1, 3, 1, 1)
    >>> print(synthesizer_attention(jnp.zeros((1, 3, 8)), value, is_causal=True)[0, :, 0, 0])
    [0.  0.5 1. ]
    """
    scores, value = floating(scores=scores, value=value)
    if value.ndim < 3 or scores.ndim not in (3, value.ndim) or scores.shape[:-3] not in ((), value.shape[:-3]):
        raise ValueError(
            f"scores must have shape (N, T, L) or (*B, N, T, L) with the batch axes of value (*B, S, K, V); got scores {scores.shape}, value {value.shape}"
        )
    keys = value.shape[-3]
    if scores.shape[-1] < keys:
        raise ValueError(
            f"scores must have a column for each of the {keys} steps of value; got {scores.shape[-1]} columns, scores {scores.shape}"
        )
    rows = jnp.swapaxes(scores[..., :0], -3, -2)
    query = jnp.broadcast_to(rows, (*value.shape[:-3], *rows.shape[-3:]))
    return run(
        (query, value[..., :0], value, scores[..., :keys], mask), scale=1.0, is_causal=is_causal, segment_ids=None,
        initial_state=None, return_state=False, implementation="dense",
    )[0]  # fmt: skip


def dense_scores(
    inputs: ArrayLike,
    kernel_in: ArrayLike,
    bias_in: ArrayLike,
    kernel_out: ArrayLike,
    bias_out: ArrayLike,
    length: int | None = None,
) -> jax.Array:
    r"""Scores that each token predicts from itself alone: B_i = relu(x_i W_1 + b_1) W_2 + b_2.

    Args:
      inputs: x, (*B, T, D).
      kernel_in, bias_in: (D, N, F) and (N, F), F hidden features a head.
      kernel_out, bias_out: (N, F, L) and (N, L), L the longest sequence.
      length: columns wanted, at most L; None is T.

    Returns:
      (*B, N, T, length).

    Raises:
      ValueError: more columns wanted than there are.

    Cost O(T N F (D + L)). Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> dense_scores(jnp.ones((5, 3)), jnp.ones((3, 2, 4)), jnp.ones((2, 4)), jnp.ones((2, 4, 8)), jnp.ones((2, 8))).shape
    (2, 5, 5)
    """
    (inputs,) = floating(inputs=inputs)
    if inputs.ndim < 2:
        raise ValueError(f"inputs must have shape (*B, T, D); got {inputs.shape}")
    kernel_in, bias_in, kernel_out, bias_out = _tables(
        ("kernel_in", kernel_in, (inputs.shape[-1], "N", "F")), ("bias_in", bias_in, ("N", "F")),
        ("kernel_out", kernel_out, ("N", "F", "L")), ("bias_out", bias_out, ("N", "L")),
    )  # fmt: skip
    length = _columns(inputs.shape[-2] if length is None else length, kernel_out.shape[-1], "kernel_out")
    hidden = jnp.einsum("...td,dnf->...tnf", inputs, kernel_in)
    hidden = jax.nn.relu(hidden + _lead(bias_in, hidden.ndim))
    scores = jnp.einsum("...tnf,nfs->...nts", hidden, kernel_out[..., :length])
    return scores + _lead(bias_out[:, None, :length], scores.ndim)


def random_scores(table: ArrayLike, length: int, keys: int | None = None) -> jax.Array:
    r"""Scores that depend on places alone: B_ij = R_ij, R learned or left as drawn.

    Args:
      table: R, (N, L, L).
      length: rows wanted, T <= L.
      keys: columns wanted, S <= L; None is T.

    Returns:
      (N, T, S).

    Raises:
      ValueError: more wanted than there is.

    Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> random_scores(jnp.ones((2, 8, 8)), 5).shape
    (2, 5, 5)
    """
    (table,) = _tables(("table", table, ("N", "L", "L")))
    keys = length if keys is None else keys
    return table[:, : _columns(length, table.shape[1], "table"), : _columns(keys, table.shape[2], "table")]


def factorized_dense_scores(left: ArrayLike, right: ArrayLike, length: int | None = None) -> jax.Array:
    r"""Two short predictions multiplied out: B_ij = A_iu C_iv with j = u b + v, so that all a b products are distinct.

    A is repeated element by element and C as a whole; with both tiled, products would coincide wherever a and b share a factor.

    Args:
      left: A, (*B, N, T, a), such as `dense_scores` with L = a makes.
      right: C, (*B, N, T, b).
      length: columns wanted, at most a b; None is T.

    Returns:
      (*B, N, T, length).

    Raises:
      ValueError: more columns wanted than there are products.

    Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> print(factorized_dense_scores(jnp.array([[[1.0, 2.0]]]), jnp.array([[[1.0, 10.0, 100.0]]]), 6)[0, 0])
    [  1.  10. 100.   2.  20. 200.]
    """
    left, right = floating(left=left, right=right)
    if left.ndim < 3 or left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"left and right must have shapes (*B, N, T, a) and (*B, N, T, b); got {left.shape} and {right.shape}"
        )
    length = left.shape[-2] if length is None else length
    # As a product of matrices: the derivative of a plain one is a sum over a short axis, which XLA for CPUs does entry by entry.
    products = jnp.einsum("...u,...v->...uv", left, right, precision=lax.Precision.HIGHEST)
    products = products.reshape(*products.shape[:-2], left.shape[-1] * right.shape[-1])
    return products[..., : _columns(length, products.shape[-1], "left and right")]


def factorized_random_scores(left: ArrayLike, right: ArrayLike, length: int, keys: int | None = None) -> jax.Array:
    r"""A table of low rank: B = R_1 R_2^T.

    Args:
      left, right: R_1 and R_2, (N, L, k).
      length, keys: rows and columns wanted, at most L; None is as many as rows.

    Returns:
      (N, T, S).

    Raises:
      ValueError: more wanted than there is.

    Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> factorized_random_scores(jnp.ones((2, 8, 3)), jnp.ones((2, 8, 3)), 5, 4).shape
    (2, 5, 4)
    """
    left, right = _tables(("left", left, ("N", "L", "k")), ("right", right, ("N", "L", "k")))
    keys = length if keys is None else keys
    left, right = (
        left[:, : _columns(length, left.shape[1], "left")],
        right[:, : _columns(keys, right.shape[1], "right")],
    )
    return jnp.einsum("nik,njk->nij", left, right)


def mix_scores(logits: ArrayLike, *scores: ArrayLike) -> jax.Array:
    r"""B = sum_m alpha_m B_m with alpha = softmax(logits); the one softmax over columns comes afterwards.

    Args:
      logits: (m,) or, for each head, (N, m), m the number of scores.
      *scores: (*B, N, T, S) each, or of shapes that broadcast to it.

    Returns:
      (*B, N, T, S).

    Raises:
      ValueError: another number of logits than of scores.

    Source: arXiv:2005.00743.

    >>> import jax.numpy as jnp
    >>> mix_scores(jnp.zeros(2), jnp.full((1, 2, 2), 4.0), jnp.zeros((1, 2, 2)))[0].tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    (logits,) = floating(logits=logits)
    if logits.ndim not in (1, 2) or logits.shape[-1] != len(scores):
        raise ValueError(
            f"logits must have one entry for each of the {len(scores)} scores, (m,) or (N, m); got shape {logits.shape}"
        )
    arrays = floating(**{f"scores_{m}": score for m, score in enumerate(scores)})
    alpha = jax.nn.softmax(logits, axis=-1)[..., None, None, :]
    rank = max(array.ndim for array in arrays)
    parts = [_lead(alpha[..., m], rank) * _lead(array, rank) for m, array in enumerate(arrays)]
    return sum(parts[1:], parts[0])


def _lead(x: jax.Array, rank: int) -> jax.Array:
    """x with leading axes of size 1 up to the rank."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _columns(wanted: int, known: int, name: Any) -> int:
    if isinstance(wanted, bool | float | str) or not 0 <= wanted <= known:  # a symbolic size of an export is no int
        raise ValueError(f"the length must be from 0 to that of {name}: {wanted!r} places wanted, {known} there")
    return wanted


def _tables(*shapes: tuple[str, ArrayLike, tuple[int | str, ...]]) -> list[jax.Array]:
    """Floating arrays (name, array, shape) whose shapes hold; a letter stands for one size throughout."""
    sizes: dict[str, int] = {}
    arrays = []
    for name, array, shape in shapes:
        (array,) = floating(**{name: array})
        ok = len(shape) == array.ndim and all(
            got == (sizes.setdefault(want, got) if isinstance(want, str) else want)
            for want, got in zip(shape, array.shape)
        )
        if not ok:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise ValueError(
                f"{name} must have shape ({', '.join(map(str, shape))}), {known or 'any sizes'}; got {array.shape}"
            )
        arrays.append(array)
    return arrays
