"""Naive-Bayes context extension (NBCE): answers from contexts that together are longer than the model's limit, each read apart.

    log p(t | S_1 .. S_n) = (1 + beta) P_k[log p(t | S_k)] - beta log p(t) + const        P: mean, maximum, or the context of least entropy

One row a context and one without any, whose difference takes out what the model would say anyway; the same new token is appended to all of
them. Cost: n + 1 rows of the model. Sources: kexue.fm/archives/9617 and 9632; Su et al., arXiv:2403.17552.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import choose, positive
from effattn_jax.decoding.sampling import check_limits, filter_logits, number

__all__ = ["NaiveBayesStep", "naive_bayes_logits"]

POOLING = ("entropy", "mean", "max")


def naive_bayes_logits(
    logits: jax.Array,
    previous: jax.Array | None = None,
    *,
    pooling: str = "entropy",
    beta: float = 0.25,
    top_p: float | None = 0.95,
    transition_penalty: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """The next token's logits from those of n contexts and of none.

    Every distribution is cut to its nucleus first, whose tails are unreliable and would be amplified by beta; a token outside that of the empty
    context has nothing subtracted. "mean" leaves the tokens of all nuclei, or takes whole distributions where no token is in all.

    Args:
      logits: (..., n + 1, A); row 0 is the model without a context.
      previous: (...) the context that the last token was taken from, -1 for none; None is none.
      pooling: "entropy" takes the context whose distribution has the least entropy, "mean" and "max" pool token by token.
      beta: weight of the empty context, >= -1: 0 subtracts nothing, n - 1 with "mean" is Bayes' rule, -1 ignores the contexts: the empty one's logits.
      top_p: see `filter_logits`; None cuts nothing.
      transition_penalty: by how much another context's entropy must be lower to leave `previous`.

    Returns:
      (logits (..., A) float32 at least, not normalised; chosen (...) int32: the context of least entropy, from 0).

    Raises:
      ValueError: an unknown pooling, beta below -1, fewer than two rows, what `filter_logits` raises.

    Cost O(n A log A). Sources: kexue.fm/archives/9617 and 9632.

    >>> import jax.numpy as jnp
    >>> rows = jnp.log(jnp.array([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9]]))
    >>> pooled, chosen = naive_bayes_logits(rows, beta=0.0)
    >>> int(chosen), int(pooled.argmax())
    (1, 1)
    """
    choose("pooling", pooling, POOLING)
    if logits.ndim < 2 or logits.shape[-2] < 2:
        raise ValueError(f"logits must have shape (..., n + 1, A) with n >= 1 contexts; got {logits.shape}")
    if not isinstance(beta, jax.core.Tracer) and not -1 <= number(beta) < math.inf:
        raise ValueError(f"beta must be at least -1, which ignores the contexts, and finite; got {beta!r}"[:400])
    if not isinstance(transition_penalty, jax.core.Tracer) and not math.isfinite(number(transition_penalty)):
        raise ValueError(f"transition_penalty must be a finite number; got {transition_penalty!r}"[:400])
    if previous is not None and jnp.shape(previous) != logits.shape[:-2]:
        raise ValueError(
            f"previous must have shape {logits.shape[:-2]}, an index a question; got {jnp.shape(previous)}"
        )
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    whole = log_p[..., 1:, :]
    log_p = filter_logits(log_p, top_p=top_p)
    empty, rows = log_p[..., 0, :], log_p[..., 1:, :]
    entropy = -jnp.sum(jnp.exp(rows) * jnp.where(jnp.isfinite(rows), rows, 0), axis=-1)
    if previous is not None:
        stays = jax.lax.broadcasted_iota(jnp.int32, entropy.shape, entropy.ndim - 1) == jnp.asarray(previous)[..., None]
        entropy = entropy - jnp.where(stays, transition_penalty, 0)
    chosen = jnp.argmin(entropy, axis=-1).astype(jnp.int32)
    if pooling == "entropy":
        pooled = jnp.take_along_axis(rows, chosen[..., None, None], axis=-2)[..., 0, :]
    else:
        pooled = jnp.mean(rows, axis=-2) if pooling == "mean" else jnp.max(rows, axis=-2)
        agree = jnp.any(pooled > -jnp.inf, axis=-1, keepdims=True)
        pooled = jnp.where(agree, pooled, jnp.mean(whole, axis=-2))
    usual = jnp.isfinite(empty)
    less = (1 + beta) * pooled - beta * jnp.where(usual, empty, 0)
    return jnp.where(beta == -1, empty, jnp.where(usual, less, pooled)), chosen


class _State(NamedTuple):
    """The model's state over all rows, and the context that the last token came from, (B,)."""

    model: Any
    chosen: jax.Array


@dataclasses.dataclass(frozen=True)
class NaiveBayesStep:
    """A model's step over several contexts as a step of one row, for `generate`.

    `generate(NaiveBayesStep(model.step, 3), params, model.init_state(4 * B, capacity), prompts, num_tokens, prompt_mask=...)` answers B questions
    from three contexts each, with (B, num_tokens) tokens. Prompts have n + 1 rows a question, one after the other: the question alone first, then
    the question behind each context, all padded on the left to one length. Order of contexts does not matter.

    Attributes:
      step: as for `generate`.
      contexts: n.
      pooling, beta, top_p, transition_penalty: see `naive_bayes_logits`.

    >>> import jax, jax.numpy as jnp
    >>> from effattn_jax.decoding import generate
    >>> count = lambda params, tokens, state: (9.0 * jax.nn.one_hot(tokens + 1, 10), state)
    >>> generate(NaiveBayesStep(count, 2), None, (), jnp.array([[3], [3], [3]]), 3, temperature=0.0).tolist()
    [[4, 5, 6]]
    """

    step: Callable[..., tuple[jax.Array, Any]]
    contexts: int
    pooling: str = "entropy"
    beta: float = 0.25
    top_p: float | None = 0.95
    transition_penalty: float = 0.1

    def __post_init__(self):
        positive(contexts=self.contexts)
        choose("pooling", self.pooling, POOLING)
        check_limits(None, self.top_p)

    def __call__(self, params: Any, tokens: jax.Array, state: Any, **inputs: Any) -> tuple[jax.Array, _State]:
        """(logits (B, 1, A), state) after prompts (B (n + 1), T), or after one more token of each question (B, T)."""
        rows, started = self.contexts + 1, isinstance(state, _State)
        if started:
            tokens, model, previous = jnp.repeat(tokens, rows, axis=0), *state
        else:
            model, previous = state, None
            if tokens.shape[0] % rows:
                raise ValueError(f"prompt must have contexts + 1 = {rows} rows a question; got {tokens.shape[0]} rows")
        logits, model = self.step(params, tokens, model, **inputs)
        last = logits[:, -1].reshape(tokens.shape[0] // rows, rows, logits.shape[-1])
        pooled, chosen = naive_bayes_logits(
            last,
            previous,
            pooling=self.pooling,
            beta=self.beta,
            top_p=self.top_p,
            transition_penalty=self.transition_penalty,
        )
        return pooled[:, None], _State(model, chosen)
