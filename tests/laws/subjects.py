"""Every line of the five tables, seen through one interface.

A law is written once, against `Subject`; a new line of a table is tested with no new test code. What a member can do beyond the contract is read from its signature (options such as `window`) or found by asking it once
(`bidirectional`, `crosswise`): a refusal must be a ValueError that names the matter; with anything else the law is tried, and fails.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from effattn_jax import mixing, position, ssm
from effattn_jax._contract import Mixer, Recurrence, TokenMixer
from effattn_jax.attention import MIXERS
from effattn_jax.recurrence import RECURRENCES

# Sample values of the options that a member may have; each is one more variant of the member in the laws on exactness.
OPTION_SAMPLES: dict[str, tuple] = {
    "window": (3, (2, 0), 0),
    "logits_soft_cap": (1.5,),
    "normalize": (False,),
}
# With LAWS=all, members that run on another's loops go through all their forms and transformations too.
EVERYTHING = os.environ.get("LAWS") == "all"
PLACES = 300  # T_max of the members whose weights have a place for each step
SHORTEST_TABLE = 128  # places of the tables of members that have such, more where a call needs more
CHUNK = 3  # the longest chunk in most laws, so that a dozen steps make several chunks and a ragged last one


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A member of a table, with inputs made for it and its calls in causal form."""

    name: str
    entry: Any

    def __repr__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable:
        return self.entry.function

    @property
    def is_mixer(self) -> bool:
        """Does it mix query, key and value, as attention does?"""
        return isinstance(self.entry, Mixer)

    @property
    def is_token_mixer(self) -> bool:
        """Does it mix one array of inputs, with weights?"""
        return isinstance(self.entry, TokenMixer)

    @property
    def exempt(self) -> frozenset[str]:
        """The laws that mathematics rules out for it."""
        return frozenset(getattr(self.entry, "exempt", ()))

    @property
    def longest(self) -> int | None:
        """The longest row that it takes, where there is one."""
        return PLACES if self.is_token_mixer and self.entry.fixes_length else None

    @property
    def pairwise(self) -> bool:
        """True when the member takes a bias and any T x S mask."""
        return self.is_mixer and self.entry.pairwise

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    @property
    def brief(self) -> bool:
        """True for a member without loops of its own: those are tested where they are, it in its last form."""
        return (self.is_token_mixer or bool(self.entry.runs_on)) and not EVERYTHING

    @property
    def table_forms(self) -> tuple[dict, ...]:
        """The forms that the table lists, or the last of them for a brief member."""
        if self.is_token_mixer:
            return ({},)
        return self.entry.forms[-1:] if self.brief else self.entry.forms

    @property
    def forms(self) -> tuple[dict, ...]:
        """The same with chunks small enough that a dozen steps fill several."""
        small = [
            {**form, "chunk_size": min(form["chunk_size"], CHUNK)} if "chunk_size" in form else form
            for form in self.table_forms
        ]
        return tuple(form for index, form in enumerate(small) if form not in small[:index])

    @functools.cached_property
    def stateful_forms(self) -> tuple[dict, ...]:
        """The forms that take and give a state; a parallel form may refuse, by a ValueError that says so."""
        if not self.causal:
            return ()
        inputs = self.inputs(length=0)
        return tuple(form for form in self.forms if not _refuses(self, inputs, "state", return_state=True, **form))

    @functools.cached_property
    def kinds(self) -> tuple[dict, ...]:
        """One form of each implementation, with the longest chunks."""
        kinds = {form.get("implementation", form.get("mode")): form for form in reversed(self.forms)}
        return tuple(kinds.values())[::-1]

    @functools.cached_property
    def stateful_kinds(self) -> tuple[dict, ...]:
        """The same, of those that hand states on."""
        return tuple(form for form in self.kinds if form in self.stateful_forms)

    @functools.cached_property
    def variants(self) -> tuple[dict, ...]:
        """The options that change what is computed, one at a time, the plain call first."""
        options = [{}]
        if self.brief:
            return tuple(options)
        for option, samples in OPTION_SAMPLES.items():
            if option in self.parameters:
                default = self.options.get(option, inspect.signature(self.function).parameters[option].default)
                taken = (sample for sample in samples if sample != default)
                if (
                    option in self.options
                ):  # a member that cannot do without it may have a rule of its own: ReRoPE's window is an int
                    taken = (s for s in taken if not _refuses(self, self.inputs(length=0), option, **{option: s}))
                options += [{option: sample} for sample in taken]
        return tuple(options)

    @property
    def carries_ids(self) -> bool:
        """Does a state know its last segment id? A recurrence's is the bare array of DESIGN's conventions, so it belongs to the next id."""
        return self.is_mixer or self.is_token_mixer

    @property
    def keeps_inputs(self) -> bool:
        """Does a state hold inputs as they came, rather than sums, which are kept wide?"""
        return self.pairwise or self.is_token_mixer

    @property
    def independent_channels(self) -> bool:
        """Is the axis after time one of heads or channels that do not meet?"""
        return not self.is_token_mixer and not self.is_weighted_recurrence

    @property
    def any_batch(self) -> bool:
        """Does it take any number of batch axes?"""
        return "query" in self.parameters or self.is_token_mixer or self.is_weighted_recurrence

    @property
    def is_weighted_recurrence(self) -> bool:
        """Is it a recurrence with weights, its channels among their axes?"""
        return isinstance(self.entry, Recurrence) and self.entry.weights is not None

    def inputs(
        self, *, seed=0, batch=2, length=9, keys=None, heads=4, kv_heads=2, head_dim=4, value_dim=3, dtype=np.float32
    ):
        """Arrays by argument name, time on axis 1 of each; `keys` gives another length to key and value."""
        if self.is_token_mixer:
            shape = (batch, length, 2 * head_dim)
            return {"inputs": np.random.default_rng(seed).normal(size=shape).astype(dtype)}
        if not self.is_mixer:
            return self.entry.sample(np.random.default_rng(seed), batch, length, dtype)
        rng = np.random.default_rng(seed)
        keys = length if keys is None else keys
        shapes = {
            "query": (batch, length, heads, head_dim),
            "key": (batch, keys, kv_heads, head_dim),
            "value": (batch, keys, kv_heads, value_dim),
        }
        arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
        if self.entry.extras is not None:
            arrays |= self.entry.extras(rng, np.zeros((batch, keys, heads, head_dim), dtype))
        return arrays

    def weights(self, inputs: dict) -> dict:
        """Its inputs without a time axis, the same numbers for all calls of one shape."""
        if self.is_token_mixer:
            return _token_weights(self, inputs["inputs"].shape[-1])
        if self.is_weighted_recurrence:
            return _recurrence_weights(self)
        if not self.is_mixer or self.entry.weights is None:
            return {}
        query, key = inputs["query"], inputs["key"]
        sizes = (query.shape[-2], key.shape[-2], query.shape[-1])
        if "length" not in inspect.signature(self.entry.weights).parameters:
            return _weights(self, *sizes)
        keys = key.shape[-3] if key.ndim > 2 else 1
        return _weights(self, *sizes, max(SHORTEST_TABLE, 1 << (keys - 1).bit_length()))

    def call(self, inputs: dict, **options):
        """The member's call, causal where it can be unless said otherwise; a key mask may have the shape (B, 1, 1, S)."""
        if (self.is_mixer or self.is_token_mixer) and "is_causal" not in options:
            options["is_causal"] = self.causal
        if self.is_token_mixer and getattr(options.get("mask"), "ndim", 0) == 4:
            options["mask"] = options["mask"][:, 0, 0]
        return self.function(**inputs, **{**self.weights(inputs), **self.options, **options})

    @property
    def options(self) -> dict:
        """What it cannot be called without."""
        return dict(self.entry.options) if self.is_mixer else {}

    def batch_of(self, inputs: dict) -> int:
        return next(iter(inputs.values())).shape[0]

    def empty_state(self, capacity: int):
        """The state before the first token of two rows of `inputs`, with room for `capacity` tokens."""
        if self.is_mixer:
            return self.entry.empty_state(2, capacity, 4, 2, 4, 3, np.float32)
        return jax.jit(functools.partial(self.call, return_state=True))(self.inputs(length=0))[1]

    @functools.cached_property
    def causal(self) -> bool:
        """Does it have a causal form, and with it a state?"""
        if self.is_mixer:
            return "causality" not in self.entry.exempt
        return not self.is_token_mixer or not _refuses(self, self.inputs(length=0), "is_causal", is_causal=True)

    @functools.cached_property
    def packs_both_ways(self) -> bool:
        """Does its form without causality take segments?"""
        ids = np.zeros((2, 0), np.int32)
        return self.bidirectional and not _refuses(
            self, self.inputs(length=0), "segment_ids", is_causal=False, segment_ids=ids
        )

    @functools.cached_property
    def bidirectional(self) -> bool:
        """Does it have a non-causal form?"""
        mixes = self.is_mixer or self.is_token_mixer
        return mixes and not _refuses(self, self.inputs(length=0), "is_causal", is_causal=False)

    @functools.cached_property
    def crosswise(self) -> bool:
        """Does it take keys of another length than the queries'? Its extras then have one entry a key."""
        return self.is_mixer and not _refuses(self, self.inputs(length=2, keys=3), "length")

    @functools.cached_property
    def pairs_features(self) -> bool:
        """Does it turn features in pairs, so that their number is even?"""
        return _refuses(self, self.inputs(length=2, head_dim=3), "even")

    @functools.cached_property
    def takes_pairs_of_ids(self) -> bool:
        """Does it take other segment ids for keys than for queries?"""
        ids = tuple(np.zeros((2, 0), np.int32) for _ in "qk")
        return (
            self.is_mixer
            and self.bidirectional
            and not _refuses(self, self.inputs(length=0), "segment_ids", is_causal=False, segment_ids=ids)
        )


@functools.cache
def _weights(subject: Subject, heads: int, kv_heads: int, head_dim: int, length: int | None = None) -> dict:
    options = {} if length is None else {"length": length}
    return _drawn(functools.partial(subject.entry.weights, **options), heads, kv_heads, head_dim)


@functools.cache
def _recurrence_weights(subject: Subject) -> dict:
    return subject.entry.weights(np.random.default_rng(0))


@functools.cache
def _token_weights(subject: Subject, width: int) -> dict:
    return _drawn(subject.entry.weights, width, PLACES, 2)


def _drawn(made: Callable, *sizes: int) -> dict:
    """Weights of the shapes that a member makes, none near 0 or like another: vectors about 1, the rest about 0.

    To draw them with JAX would compile a program a size. Each has numbers of its own, of which a longer table only has more.
    """
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: made(jax.random.key(0), *sizes)))
    drawn = [(w.ndim == 1) + 0.4 * np.random.default_rng(i).normal(size=w.shape) for i, w in enumerate(leaves)]
    return structure.unflatten([w.astype(np.float32) for w in drawn])


def _refuses(subject: Subject, inputs: dict, word: str, **options) -> bool:
    try:
        jax.eval_shape(functools.partial(subject.call, **options), inputs)
    except ValueError as error:
        return word in str(error)
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
        output, state = subject.call(
            time_slice(inputs, t, t + 1), initial_state=state, return_state=True, **now, **options
        )
        outputs.append(output)
    return jax.numpy.concatenate(outputs, axis=1), state


def scanned(subject: Subject, inputs: dict, state):
    """The same in `lax.scan`, from a state that does not grow."""

    def step(state, now):
        now = {name: x[:, None] for name, x in now.items()}
        output, state = subject.call(now, initial_state=state, return_state=True)
        return state, output[:, 0]

    over_time = {name: jax.numpy.moveaxis(x, 1, 0) for name, x in inputs.items()}
    state, outputs = jax.lax.scan(step, state, over_time)
    return jax.numpy.moveaxis(outputs, 0, 1), state


def slice_key(array, start: int | None, stop: int | None):
    """The part of a key mask (B, 1, 1, S) or of segment ids (B, T) that belongs to the steps [start, stop)."""
    return array[..., start:stop]


ALL_MIXERS = tuple(Subject(name, entry) for name, entry in (MIXERS | position.MIXERS).items())
MIXER_SUBJECTS = tuple(subject for subject in ALL_MIXERS if subject.causal)
UNORDERED = tuple(subject for subject in ALL_MIXERS if not subject.causal)  # see test_without_causality
RECURRENCE_SUBJECTS = tuple(Subject(name, entry) for name, entry in (RECURRENCES | ssm.MIXERS).items())
TOKEN_SUBJECTS = tuple(Subject(name, entry) for name, entry in mixing.MIXERS.items())
SUBJECTS = MIXER_SUBJECTS + RECURRENCE_SUBJECTS + TOKEN_SUBJECTS
CAUSAL = tuple(subject for subject in SUBJECTS if subject.causal)  # those with states
MASKED = MIXER_SUBJECTS + TOKEN_SUBJECTS  # those that take masks
BIDIRECTIONAL = tuple(subject for subject in MASKED if subject.bidirectional)
PAIRWISE = tuple(subject for subject in MIXER_SUBJECTS if subject.pairwise)
KEYWISE = tuple(subject for subject in MIXER_SUBJECTS if not subject.pairwise)


def label(options: dict) -> str:
    """A test id for a set of keyword arguments."""
    return ",".join(f"{name}={value}".replace(" ", "") for name, value in options.items()) or "plain"


def by_form(subjects=SUBJECTS) -> list:
    """(subject, form) pairs with readable ids, for `pytest.mark.parametrize`."""
    return [param(subject, form) for subject in subjects for form in subject.forms]


def by_kind(subjects=SUBJECTS) -> list:
    """The same with one form of each implementation."""
    return [param(subject, form) for subject in subjects for form in subject.kinds]


def by_stateful_kind(subjects=SUBJECTS) -> list:
    """The same, of those that hand states on."""
    return [param(subject, form) for subject in subjects for form in subject.stateful_kinds]


def by_table_form(subjects=SUBJECTS) -> list:
    """The same with chunks as long as the table says."""
    return [param(subject, form) for subject in subjects for form in subject.table_forms]


def by_variant_and_form(subjects=SUBJECTS) -> list:
    """(subject, variant, form) triples with readable ids; each option with the longest-chunked form of each implementation."""
    return [
        param(subject, variant, form)
        for subject in subjects
        for variant in subject.variants
        for form in (subject.kinds if variant else subject.forms)
    ]


def param(subject: Subject, *options: dict):
    import pytest

    return pytest.param(subject, *options, id="-".join([subject.name, *map(label, options)]))
