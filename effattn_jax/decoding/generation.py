"""Generation: the prompt in one call, then one token a step.

logits, state = step(params, prompt, state);   token ~ logits[:, -1];   logits, state = step(params, token, state);
... The whole loop is one compiled program; a step costs what the model's state costs, whatever has been generated
before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.decoding.sampling import check_key, check_limits, is_greedy, sample_logits, whole_number


def generate(
    step: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    state: Any,
    prompt: jax.Array,
    num_tokens: int,
    *,
    key: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    stop_token: int | None = None,
    prompt_mask: jax.Array | None = None,
) -> jax.Array:
    """Continues a batch of prompts by `num_tokens` tokens each.

    Prompts of one batch have equal lengths, or are padded on the left with `prompt_mask` False there; the model must
    then honour a mask, as `models.LanguageModel` does. The state must have room for T + num_tokens - 1 tokens.

    Args:
      step: step(params, tokens (B, T), state) -> (logits (B, T, A), state), with `mask=` (B, T) as well where
        prompt_mask is given; must be hashable and the same object from call to call, or each call compiles anew
        (`LanguageModel.step` is).
      params: the first argument of step, any pytree.
      state: the state before the prompt, with shapes that step keeps (`LanguageModel.init_state`).
      prompt: (B, T) integers, T >= 1.
      num_tokens: how many to make, >= 0.
      key: a typed key; needed unless temperature is 0.
      temperature, top_k, top_p: see `sample_logits`. Their values may change without a new compilation, except top_k's.
      stop_token: once a row has produced it, the rest of the row is filled with it.
      prompt_mask: (B, T) bool, True where the prompt is real.

    Returns:
      (B, num_tokens) int32, without the prompt; a step that joins rows (`NaiveBayesStep`) returns as many as it leaves.

    Raises:
      ValueError: an empty prompt, a wrong rank or mask shape, a prompt whose last token is padding (where that can be
        seen), or what `sample_logits` raises.

    Cost: one call of step on the prompt and num_tokens - 1 calls on one token.

    >>> import jax.numpy as jnp
    >>> count = lambda params, tokens, state: (jax.nn.one_hot(tokens + params, 10), state)
    >>> generate(count, 1, None, jnp.array([[3], [5]]), 4, temperature=0.0).tolist()
    [[4, 5, 6, 7], [6, 7, 8, 9]]
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt must be integers of shape (B, T) with T >= 1; got {prompt.dtype}{list(prompt.shape)}")
    num_tokens = whole_number("num_tokens", num_tokens)
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0; got {num_tokens}")
    _check_prompt_mask(prompt, prompt_mask)
    top_k, stop_token = check_limits(top_k, top_p), whole_number("stop_token", stop_token, "no stop")
    greedy = is_greedy(temperature)
    if not greedy:
        check_key(key)
    if num_tokens == 0:
        return jnp.zeros((prompt.shape[0], 0), jnp.int32)
    sampling = {} if greedy else {"temperature": temperature, "top_p": top_p}
    return _generate(step, params, state, prompt, num_tokens, key, sampling, top_k, stop_token, prompt_mask)


@partial(jax.jit, static_argnums=(0, 4, 7, 8))
def _generate(step, params, state, prompt, num_tokens, key, sampling, top_k, stop_token, prompt_mask):
    def sample(logits_BxTxA, index, done):
        if not sampling:
            token = jnp.argmax(logits_BxTxA[:, -1], axis=-1).astype(jnp.int32)
        else:
            token = sample_logits(logits_BxTxA[:, -1], jax.random.fold_in(key, index), top_k=top_k, **sampling)
        if stop_token is None:
            return token, done
        token = jnp.where(done, stop_token, token)
        return token, done | (token == stop_token)

    def advance(carry, index):
        token, done, state = carry
        logits, state = step(params, token[:, None], state)
        token, done = sample(logits, index, done)
        return (token, done, state), token

    masked = {} if prompt_mask is None else {"mask": prompt_mask}
    logits, state = step(params, prompt, state, **masked)
    first, done = sample(logits, 0, jnp.zeros_like(logits[:, -1, 0], dtype=bool))
    _, rest = jax.lax.scan(advance, (first, done, state), jnp.arange(1, num_tokens))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _check_prompt_mask(prompt: jax.Array, prompt_mask: jax.Array | None) -> None:
    if prompt_mask is None:
        return
    if prompt_mask.shape != prompt.shape or prompt_mask.dtype != bool:
        rule = f"prompt_mask must be bool of the prompt's shape {list(prompt.shape)}"
        raise ValueError(f"{rule}; got {prompt_mask.dtype}{list(prompt_mask.shape)}")
    if not isinstance(prompt_mask, jax.core.Tracer) and not bool(prompt_mask[:, -1].all()):
        raise ValueError("prompt_mask must be True in the last column: prompts are padded on the left")
