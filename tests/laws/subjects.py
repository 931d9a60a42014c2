"""Every line of the two tables, seen through one interface.

A law is written once, against `Subject`; a new line of `MIXERS` or `RECURRENCES` is tested with no new test code. What a
member can do beyond the contract is read from its signature (options such as `window`) or found by asking it once
(`bidirectional`, `crosswise`): a refusal must be a ValueError, anything else fails where it happens.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from effattn_jax.attention import MIXERS
from effattn_jax.recurrence import RECURRENCES

# Sample values of the options that a member may have; each is one more variant of the member in the laws on exactness.
OPTION_SAMPLES: dict[str, tuple] = {
    "window": (3, (2, 0), 0),
    "logits_soft_cap": (1.5,),
    "normalize": (False,),
}
CHUNK = 4  # so that a dozen steps make several chunks and a ragged last one


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A member of a table, with inputs made for it and its calls in causal form."""

    name: str
    entry: Any
    is_mixer: bool

    def __repr__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable:
        return self.entry.function

    @property
    def pairwise(self) -> bool:
        """True when the member takes a bias and any T x S mask."""
        return self.is_mixer and self.entry.pairwise

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def forms(self) -> tuple[dict, ...]:
        """The table's forms, with chunks small enough that a dozen steps fill several."""
        return tuple({**form, "chunk_size": CHUNK} if "chunk_size" in form else form for form in self.entry.forms)

    @property
    def variants(self) -> tuple[dict, ...]:
        """The options that change what is computed, one at a time, the plain call first."""
        options = [{}]
        for option, samples in OPTION_SAMPLES.items():
            if option in self.parameters:
                options += [{option: sample} for sample in samples]
        return tuple(options)

    def inputs(self, *, seed=0, batch=2, length=9, keys=None, heads=4, kv_heads=2, head_dim=4, value_dim=3, dtype=np.float32):
        """Arrays by argument name, time on axis 1 of each; `keys` gives another length to key and value."""
        if not self.is_mixer:
            sample = self.entry.sample(jax.random.key(seed), batch, length, dtype)
            return {name: np.asarray(array) for name, array in sample.items()}
        rng = np.random.default_rng(seed)
        keys = length if keys is None else keys
        shapes = {
            "query": (batch, length, heads, head_dim),
            "key": (batch, keys, kv_heads, head_dim),
            "value": (batch, keys, kv_heads, value_dim),
        }
        arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        if self.entry.extras is not None:
            extras = self.entry.extras(jax.random.key(seed), arrays["query"])
            arrays |= {name: np.asarray(array) for name, array in extras.items()}
        return arrays

    def call(self, inputs: dict, **options):
        """The member's call, causal unless said otherwise."""
        if self.is_mixer:
            options.setdefault("is_causal", True)
        return self.function(**inputs, **options)

    def batch_of(self, inputs: dict) -> int:
        return next(iter(inputs.values())).shape[0]

    @functools.cached_property
    def bidirectional(self) -> bool:
        """Does it have a non-causal form?"""
        return self.is_mixer and not _refuses(self, self.inputs(length=3), "is_causal", is_causal=False)

    @functools.cached_property
    def crosswise(self) -> bool:
        """Does it take keys of another length than the queries'?"""
        return self.is_mixer and self.entry.extras is None


def _refuses(subject: Subject, inputs: dict, word: str, **options) -> bool:
    try:
        jax.eval_shape(functools.partial(subject.call, **options), inputs)
    except ValueError as error:
        if word not in str(error):
            raise
        return True
    return False


def time_slice(inputs: dict, start: int | None, stop: int | None) -> dict:
    """The inputs of the steps [start, stop)."""
    return {name: array[:, start:stop] for name, array in inputs.items()}


def stepwise(subject: Subject, inputs: dict, state=None, *, per_call: dict | None = None, **options):
    """One call a time step, T = 1 each: the recurrent form. `per_call` arrays (B, T) are sliced along with the inputs."""
    outputs = []
    length = next(iter(inputs.values())).shape[1]
    for t in range(length):
        now = {name: slice_key(array, t, t + 1) for name, array in (per_call or {}).items()}
        output, state = subject.call(time_slice(inputs, t, t + 1), initial_state=state, return_state=True, **now, **options)
        outputs.append(output)
    return jax.numpy.concatenate(outputs, axis=1), state


def slice_key(array, start: int | None, stop: int | None):
    """The part of a key mask (B, 1, 1, S) or of segment ids (B, T) that belongs to the steps [start, stop)."""
    return array[..., start:stop]


MIXER_SUBJECTS = tuple(Subject(name, entry, True) for name, entry in MIXERS.items())
RECURRENCE_SUBJECTS = tuple(Subject(name, entry, False) for name, entry in RECURRENCES.items())
SUBJECTS = MIXER_SUBJECTS + RECURRENCE_SUBJECTS
PAIRWISE = tuple(subject for subject in MIXER_SUBJECTS if subject.pairwise)
KEYWISE = tuple(subject for subject in MIXER_SUBJECTS if not subject.pairwise)


def label(options: dict) -> str:
    """A test id for a set of keyword arguments."""
    return ",".join(f"{name}={value}".replace(" ", "") for name, value in options.items()) or "plain"


def by_form(subjects=SUBJECTS) -> list:
    """(subject, form) pairs with readable ids, for `pytest.mark.parametrize`."""
    return [_param(subject, form) for subject in subjects for form in subject.forms]


def by_variant_and_form(subjects=SUBJECTS) -> list:
    """(subject, variant, form) triples with readable ids."""
    return [
        _param(subject, variant, form)
        for subject in subjects
        for variant in subject.variants
        for form in subject.forms
    ]


def _param(subject: Subject, *options: dict):
    import pytest

    return pytest.param(subject, *options, id="-".join([subject.name, *map(label, options)]))
