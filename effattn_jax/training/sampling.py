"""What the model has learned, for people: text that it writes, or its answers beside the expected ones."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax.data import Dataset
from effattn_jax.decoding import NaiveBayesStep, generate

EMPTY = "the prompt is empty: it must hold at least one token of what the model was trained on."
NUMBERS_SHOWN = 8  # the last ones of a row that is answered with numbers


def continue_tokens(
    model: Any,
    params: Any,
    prompt: np.ndarray,
    num_tokens: int,
    context: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """Continue a prompt by any number of tokens without leaving the positions that the model was trained on.

    The text is made in pieces: each starts from the last half context as its prompt, and fills the other half, so a
    token costs at most two steps of the model and one program serves every length.

    Args:
      model: a `LanguageModel`.
      params: its parameters.
      prompt: token ids (T,), T >= 1; its last half context is used.
      num_tokens: how many to add.
      context: longest sequence that the model was trained on.
      key: source of the samples.
      temperature, top_k, top_p: as in `decoding.generate`.

    Returns:
      The new tokens (num_tokens,), int32.

    Raises:
      ValueError: for an empty prompt, a negative number of tokens, or what `decoding.generate` refuses.
    """
    if prompt.size == 0:
        raise ValueError(EMPTY)
    if num_tokens < 0:
        raise ValueError(f"the number of tokens must not be negative, got {num_tokens}.")
    half = max(context // 2, 1)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    text = np.asarray(prompt, np.int32)
    end = text.size + num_tokens
    while text.size < end:
        seen = text[-half:]
        padded = np.pad(seen, (half - seen.size, 0))
        key, use = jax.random.split(key)
        state = model.init_state(1, min(2 * half, context))  # the last token is not read again
        given = (np.arange(half) >= half - seen.size)[None]
        piece = _piece(model, params, state, padded[None], given, use, half, options)
        text = np.concatenate([text, np.asarray(piece)[0]])
    return text[prompt.size : end]


def _piece(model, params, state, prompt, mask, key, half, options):
    make = partial(generate, model.step, params, state, num_tokens=half, key=key, **options)
    return make(prompt=jnp.asarray(prompt), prompt_mask=jnp.asarray(mask))


def sample_text(model: Any, params: Any, codec: Any, prompt: str, num_tokens: int, context: int, **options: Any) -> str:
    """`continue_tokens` from text to text; the prompt is not repeated."""
    asked = np.asarray(codec.encode(prompt), np.int32)
    return _text_after(codec, asked, continue_tokens(model, params, asked, num_tokens, context, **options))


def _text_after(codec: Any, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text of tokens behind a prompt, with what a codec writes between the two, such as a blank between words."""
    before, whole = codec.decode(prompt), codec.decode(np.concatenate([prompt, tokens]))
    return whole[len(before) :] if whole.startswith(before) else codec.decode(tokens)


def sample_from_contexts(
    model: Any, params: Any, codec: Any, prompt: str, contexts: Sequence[str], num_tokens: int, context: int, *,
    naive_bayes: Mapping[str, Any], **options: Any,
) -> str:  # fmt: skip
    """Text after a prompt that stands behind each of several contexts, which the model reads apart (`NaiveBayesStep`).

    Args:
      naive_bayes: options of `NaiveBayesStep`.
      The others: as in `continue_tokens`, with texts for tokens.

    Raises:
      ValueError: a context that does not fit together with the prompt and what is added, or what `decoding.generate` refuses.
    """
    asked = np.asarray(codec.encode(prompt), np.int32)
    rows = [asked, *(np.concatenate([np.asarray(codec.encode(text), np.int32), asked]) for text in contexts)]
    longest = max(row.size for row in rows)
    if asked.size == 0:
        raise ValueError(EMPTY)
    if longest + num_tokens > context:
        given = f"{longest} with the prompt, and {num_tokens} to add"
        raise ValueError(f"each context must fit the {context} tokens that the model reads; the longest has {given}.")
    padded = np.stack([np.pad(row, (longest - row.size, 0)) for row in rows])
    mask = np.arange(longest) >= longest - np.array([[row.size] for row in rows])
    step = NaiveBayesStep(model.step, len(contexts), **naive_bayes)
    state = model.init_state(len(rows), longest + num_tokens)
    tokens = generate(
        step, params, state, jnp.asarray(padded), num_tokens, prompt_mask=jnp.asarray(mask), **options
    )  # fmt: skip
    return _text_after(codec, asked, np.asarray(tokens)[0])


def show_answers(task: Any, params: Any, dataset: Dataset, rows: int = 3) -> str:
    """A few validation rows of a task that is no text: what was asked, what was expected, what the model says."""
    rows = min(rows, dataset.num_validation_items)
    batch = dataset.validation_items(np.arange(rows))
    predicted = np.asarray(jax.jit(task.predict)(params, batch))
    lines = []
    for row in range(rows):
        if dataset.kind == "classification":
            lines.append(f"expected {batch['labels'][row]}  model says {predicted[row]}")
            continue
        asked = batch["weights"][row] > 0
        if dataset.kind == "regression":
            pair = (x[row][asked][-NUMBERS_SHOWN:].ravel() for x in (batch["targets"], predicted))
            lines += [f"{name} {' '.join(f'{x:.3f}' for x in xs)}" for name, xs in zip(("expected", "model   "), pair)]
            continue
        lines.append(f"input    {dataset.decode(batch['tokens'][row])}")
        lines.append(f"expected {dataset.decode(batch['targets'][row][asked])}")
        lines.append(f"model    {dataset.decode(predicted[row][asked])}")
    return "\n".join(lines)
