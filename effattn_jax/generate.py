"""Sample text from a run: `python -m effattn_jax.generate RUN --prompt "..."`.

The run folder is all that is needed: its config, its codec and one of its checkpoints; the data are not.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from effattn_jax.data import codecs
from effattn_jax.decoding.naive_bayes import POOLING
from effattn_jax.models import ModelConfig
from effattn_jax.parallel import make_mesh, shard_tree
from effattn_jax.training.checkpoints import restore_named
from effattn_jax.training.cli import run_command
from effattn_jax.training.config import Config, at_inference
from effattn_jax.training.errors import UserError, user_errors
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.options import read_fields
from effattn_jax.training.sampling import sample_from_contexts, sample_text
from effattn_jax.training.startup import use_compile_cache
from effattn_jax.training.step import TrainState, init_state
from effattn_jax.training.tasks import LanguageTask, make_task


def command(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    prompt: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: a line break)")] = "\n",
    tokens: int = 300,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: str = "best",
    contexts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="(default: none)")] = (),
    pooling: Literal[POOLING] | None = None,
    beta: float | None = None,
    context_top_p: float | None = None,
    transition_penalty: float | None = None,
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = (),
) -> None:
    """Print a prompt and the text that a trained language model writes after it.

    Args:
      run: The run folder, such as runs/quickstart.
      prompt: Text to continue, of which the last half context is read.
      tokens: Number of tokens to add.
      temperature: 0 is greedy.
      top_k: Sample among the k most probable tokens.
      top_p: Sample among the most probable tokens that hold this probability.
      seed: Equal seeds give equal texts.
      step: best, last or a number.
      contexts: Texts that are each read apart before the prompt (naive-Bayes context extension).
      pooling: Of contexts: the one of least entropy (None), or token by token.
      beta: Weight of what the model says without a context; None is 0.25.
      context_top_p: Nucleus of each context, cut before entropies; None is 0.95.
      transition_penalty: What leaving the last context costs; None is 0.1.
      set: A setting of the model at inference, such as rotary_scaling=ntk_mixed, rotary_factor=8 or context=1024.
    """
    naive_bayes = {
        "pooling": pooling,
        "beta": beta,
        "context_top_p": context_top_p,
        "transition_penalty": transition_penalty,
    }
    text = sample(
        run,
        prompt,
        tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        step=step,
        settings=_settings(set),
        contexts=_texts(contexts),
        naive_bayes={name: value for name, value in naive_bayes.items() if value is not None},
    )
    print(prompt + text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a mistake."""
    return run_command(command, "python -m effattn_jax.generate", arguments)


def sample(
    run: str,
    prompt: str = "\n",
    tokens: int = 300,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: str = "best",
    settings: Mapping[str, object] | None = None,
    contexts: Sequence[str] = (),
    naive_bayes: Mapping[str, object] | None = None,
) -> str:
    """Text that a trained language model writes after a prompt.

    Args:
      run: the run folder.
      prompt: text to continue, at least one token of it.
      tokens: how many tokens to add.
      temperature, top_k, top_p: as in `decoding.generate`; temperature 0 is greedy.
      seed: equal seeds give equal texts; in 0 ... 2**32 - 1.
      step: "best" by validation loss, "last", or a number.
      settings: of the model at inference alone, `ModelConfig.at_inference`: windows, scaled frequencies and so on; `train_length` is the trained
        context unless given, and `context` how many tokens the model then sees, the trained context by default.
      contexts: texts that are each read apart, before the prompt (naive-Bayes context extension); none is the prompt alone.
      naive_bayes: options of `decoding.NaiveBayesStep`: pooling, beta, context_top_p (its top_p), transition_penalty.

    Returns:
      The new text, without the prompt.

    Raises:
      UserError: no run there, no whole checkpoint, a task without text, or an option out of range.
    """
    folder = RunFolder(run, writes=False)
    config, dataset = folder.config(), folder.read_json("dataset.json")
    if config is None or dataset is None:
        raise UserError(f"{run} is no run folder: it has no config.json and dataset.json.")
    if dataset["kind"] != "language":
        raise UserError(f"{run} is a run of kind {dataset['kind']!r}, which writes no text.")
    use_compile_cache(config.train.compile_cache)
    with user_errors():
        codec = codecs.from_spec(dataset["codec"])
        with user_errors("--prompt"):
            codec.encode(prompt)
        settings = dict(settings or {})
        context = settings.pop("context", dataset["context"])
        if not isinstance(context, int) or context < 1:
            raise ValueError(f"context must be a whole number of at least 1; got {context!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in 0 ... 2**32 - 1, got {seed}.")
        model = at_inference(config, settings) if settings else config.model
        task = make_task(model, SimpleNamespace(**dataset))
        params = _restore(folder, config, task, step).params
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "key": jax.random.key(seed)}
        if naive_bayes and not contexts:
            raise ValueError(f"{', '.join(naive_bayes)} given without contexts")
        if not contexts:
            return sample_text(task.model, params, codec, prompt, tokens, context, **options)
        chosen = {"top_p" if name == "context_top_p" else name: x for name, x in (naive_bayes or {}).items()}
        return sample_from_contexts(
            task.model, params, codec, prompt, contexts, tokens, context, naive_bayes=chosen, **options
        )


def _restore(folder: RunFolder, config: Config, task: LanguageTask, step: str) -> TrainState:
    """The state of a step on this machine's first device, whatever mesh it was trained on."""
    mesh = make_mesh(data=1)
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    shapes = jax.eval_shape(
        partial(init_state, task, optimizer, batch={"tokens": np.zeros((1, 1), np.int32)}), np.uint32(0)
    )
    shardings = shard_tree(shapes, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return restore_named(folder, abstract, step)


def _texts(files: Sequence[str]) -> list[str]:
    with user_errors("--contexts"):
        return [Path(file).read_text(encoding="utf-8") for file in files]


def _settings(given: Sequence[str]) -> dict[str, object]:
    """NAME=VALUE by the types of the model's fields."""
    texts = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set takes NAME=VALUE, got {text}.")
        texts[name.replace("-", "_")] = value
    with user_errors("--set"):
        return read_fields(ModelConfig, texts)


if __name__ == "__main__":
    sys.exit(main())
