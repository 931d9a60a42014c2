"""Sample text from a run: `python -m effattn_jax.generate RUN --prompt "..."`.

The run folder is all that is needed: its config, its codec and one of its checkpoints; the data are not.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from effattn_jax.data import codecs
from effattn_jax.decoding.naive_bayes import POOLING
from effattn_jax.models import ModelConfig
from effattn_jax.parallel import make_mesh, shard_tree
from effattn_jax.training.checkpoints import restore_named
from effattn_jax.training.cli import quiet
from effattn_jax.training.config import Config, at_inference
from effattn_jax.training.errors import UserError, user_errors
from effattn_jax.training.folder import RunFolder
from effattn_jax.training.optimizer import make_optimizer
from effattn_jax.training.options import read_fields
from effattn_jax.training.sampling import sample_from_contexts, sample_text
from effattn_jax.training.startup import use_compile_cache
from effattn_jax.training.step import TrainState, init_state
from effattn_jax.training.tasks import LanguageTask, make_task

NAIVE_BAYES = ("pooling", "beta", "context_top_p", "transition_penalty")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    quiet()
    try:
        text = sample(
            options.run,
            options.prompt,
            options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            step=options.step,
            settings=_settings(options.set),
            contexts=_texts(options.contexts),
            naive_bayes={name: getattr(options, name) for name in NAIVE_BAYES if getattr(options, name) is not None},
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.prompt + text)
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m effattn_jax.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("run", help="run folder, such as runs/quickstart")
    parser.add_argument(
        "--prompt",
        default="\n",
        help="text to continue, of which the last half context is read (default: a line break)",
    )
    parser.add_argument("--tokens", type=int, default=300, help="number of tokens to add (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="sample among the most probable tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts (default: %(default)s)")
    parser.add_argument("--step", default="best", help="best, last or a number (default: %(default)s)")
    note = "a setting of the model at inference, such as rotary_scaling=ntk_mixed, rotary_factor=8 or context=1024; repeatable"
    files = "texts that are each read apart before the prompt (naive-Bayes context extension), so that together they may be longer than the model reads"
    parser.add_argument("--contexts", nargs="+", default=[], metavar="FILE", help=files)
    parser.add_argument(
        "--pooling", choices=POOLING, help="of contexts: the one of least entropy (default), or token by token"
    )
    parser.add_argument("--beta", type=float, help="weight of what the model says without a context (default: 0.25)")
    parser.add_argument(
        "--context-top-p", type=float, help="nucleus of each context, cut before entropies (default: 0.95)"
    )
    parser.add_argument("--transition-penalty", type=float, help="what leaving the last context costs (default: 0.1)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=note)
    return parser


def _texts(files: list[str]) -> list[str]:
    with user_errors("--contexts"):
        return [Path(file).read_text(encoding="utf-8") for file in files]


def _settings(given: list[str]) -> dict[str, object]:
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
