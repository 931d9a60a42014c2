"""Law 10, clear errors, early: a ValueError that names the argument, what was given and the rule, under jit as well."""

import functools

import jax
import numpy as np
import pytest

from .subjects import (
    CAUSAL,
    KEYWISE,
    MASKED,
    MIXER_SUBJECTS,
    PLACES,
    RECURRENCE_SUBJECTS,
    SUBJECTS,
    TOKEN_SUBJECTS,
    time_slice,
)

B, T, N, K, H = 2, 6, 4, 2, 4


def replaced(name, change):
    """A mistake in one input array."""
    return lambda inputs: (inputs | {name: change(inputs[name])}, {})


def given(**options):
    """A mistake in an option."""
    return lambda inputs: (inputs, options)


# id: (the mistake, words the message must hold, each of them one or several alternatives)
MIXER_MISTAKES = {
    "query of rank 2": (replaced("query", lambda x: x[0, 0]), ["query", f"({N}, {H})"]),
    "key of another rank": (replaced("key", lambda x: x[0]), ["key", f"({T}, {K}, {H})"]),
    "value of rank 1": (replaced("value", lambda x: x[0, 0, 0]), ["value", "(3,)"]),
    "another batch": (replaced("key", lambda x: x[:1]), ["key", f"(1, {T}, {K}, {H})"]),
    "heads that do not divide": (
        lambda x: (x | {n: x[n][:, :, [0, 1, 0]] for n in ("key", "value")}, {}),
        ["head", "3", "4"],
    ),
    "value of other heads": (replaced("value", lambda x: x[:, :, :1]), ["value", f"({B}, {T}, 1, 3)"]),
    "another head dim": (replaced("key", lambda x: x[..., :3]), ["key", f"({B}, {T}, {K}, 3)"]),
    "value of another length": (replaced("value", lambda x: x[:, :4]), ["value", f"({B}, 4, {K}, 3)"]),
    "integer query": (replaced("query", lambda x: x.astype(np.int32)), ["query", "int32"]),
    "integer value": (replaced("value", lambda x: x.astype(np.int32)), ["value", "int32"]),
    "boolean key": (replaced("key", lambda x: x > 0), ["key", "bool"]),
    "mask of another length": (given(mask=np.ones((B, 1, 1, T + 1), bool)), ["mask", f"({B}, 1, 1, {T + 1})"]),
    "mask of another batch": (given(mask=np.ones((3, 1, 1, T), bool)), ["mask", f"(3, 1, 1, {T})"]),
    "mask of too many axes": (given(mask=np.ones((1, B, 1, 1, T), bool)), ["mask", f"(1, {B}, 1, 1, {T})"]),
    "mask of integers": (given(mask=np.ones((B, 1, 1, T), np.int32)), ["mask", "int32"]),
    "segment_ids of another length": (
        given(segment_ids=np.zeros((B, T + 1), np.int32)),
        ["segment_ids", f"({B}, {T + 1})"],
    ),
    "segment_ids of rank 1": (given(segment_ids=np.zeros((T,), np.int32)), ["segment_ids", f"({T},)"]),
    "segment_ids of floats": (given(segment_ids=np.zeros((B, T), np.float32)), ["segment_ids", "float32"]),
    "state without causality": (given(is_causal=False, return_state=True), ["return_state", "is_causal"]),
    "unknown implementation": (given(implementation="fastest"), ["implementation", "fastest"]),
    "is_causal as text": (given(is_causal="no"), ["is_causal", "no"]),
}
OPTION_MISTAKES = {
    "window": [(-1, "-1"), ((2, -3), "-3"), ((1, 2, 3), "(1, 2, 3)"), (1.5, "1.5")],
    "logits_soft_cap": [(0.0, "0.0"), (-2.0, "-2.0"), ("warm", "warm")],
    "scale": [("large", "large"), (np.ones((2, 1), np.float32), "(2, 1)")],
    "chunk_size": [(0, "0"), (-4, "-4")],
    "feature_map": [("eluu", "eluu")],
    "dilation": [(0, "0"), (1.5, "1.5")],
    "num_global": [(-1, "-1"), (0.5, "0.5")],
    "stride": [(0, "0"), (-2, "-2")],
    "block": [(0, "0")],
    "summary": [(0, "0"), (4, "4")],
    "k": [(0, "0"), (2.5, "2.5")],
}
RECURRENCE_MISTAKES = {
    "segment_ids of another length": (
        given(segment_ids=np.zeros((B, T + 1), np.int32)),
        ["segment_ids", f"({B}, {T + 1})"],
    ),
    "segment_ids of floats": (given(segment_ids=np.zeros((B, T), np.float32)), ["segment_ids", "float32"]),
    "unknown implementation": (given(implementation="fastest"), ["implementation", "fastest"]),
}
TOKEN_MISTAKES = {
    "inputs of rank 1": (replaced("inputs", lambda x: x[0, 0]), ["inputs", f"({2 * H},)"]),
    "mask of another length": (given(mask=np.ones((B, T + 1), bool)), ["mask", f"({B}, {T + 1})"]),
    "mask of another batch": (given(mask=np.ones((3, T), bool)), ["mask", f"(3, {T})"]),
    "mask of integers": (given(mask=np.ones((B, T), np.int32)), ["mask", "int32"]),
    "state without causality": (given(is_causal=False, return_state=True), ["return_state", "is_causal"]),
    **{name: mistake for name, mistake in RECURRENCE_MISTAKES.items() if name.startswith("segment_ids")},
}


def check(subject, inputs, options, words, mode):
    """The call fails as it should: eagerly, while jit traces it, and with the options closed over."""
    call = functools.partial(subject.call, **options)
    if mode == "jit":
        call = jax.jit(call)
    with pytest.raises(ValueError) as caught:
        call(inputs)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in the message: {message}"
    assert len(message) < 600, "a message is a line or two"


MODES = pytest.mark.parametrize("mode", ["eager", "jit"])


@MODES
@pytest.mark.parametrize("mistake", MIXER_MISTAKES)
@pytest.mark.parametrize("subject", MIXER_SUBJECTS, ids=repr)
def test_mixer_mistakes(subject, mistake, mode):
    change, words = MIXER_MISTAKES[mistake]
    words = words if subject.bidirectional or "is_causal" not in words else ["is_causal"]  # the first mistake is said
    check(subject, *change(subject.inputs(length=T)), words, mode)


@MODES
@pytest.mark.parametrize("mistake", RECURRENCE_MISTAKES)
@pytest.mark.parametrize("subject", RECURRENCE_SUBJECTS, ids=repr)
def test_recurrence_mistakes(subject, mistake, mode):
    if mistake != "unknown implementation" or "implementation" in subject.parameters:
        change, words = RECURRENCE_MISTAKES[mistake]
        check(subject, *change(subject.inputs(length=T)), words, mode)


@MODES
@pytest.mark.parametrize("mistake", TOKEN_MISTAKES)
@pytest.mark.parametrize("subject", TOKEN_SUBJECTS, ids=repr)
def test_token_mixer_mistakes(subject, mistake, mode):
    if not (mistake == "state without causality" and not subject.causal):  # it has no such argument
        change, words = TOKEN_MISTAKES[mistake]
        inputs, options = change(subject.inputs(length=T))
        weights = subject.weights(subject.inputs(length=T))  # those of the right inputs
        check(subject, inputs, weights | options, words, mode)


@functools.cache
def nearly_full(subject):
    """The state after all places but one."""
    return jax.jit(functools.partial(subject.call, return_state=True))(subject.inputs(length=PLACES - 1))[1]


@MODES
@pytest.mark.parametrize("subject", [s for s in TOKEN_SUBJECTS if s.longest], ids=repr)
def test_more_tokens_than_places(subject, mode):
    """A row, or a state and what comes after it, longer than the weights: both numbers named, or NaN where jit hides the count."""
    check(subject, subject.inputs(length=PLACES + 1), {}, [f"{PLACES}", f"{PLACES + 1}"], mode)
    state = nearly_full(subject)
    if mode == "eager":
        check(subject, subject.inputs(length=2), {"initial_state": state}, ["initial_state", f"{PLACES}"], mode)
    else:
        output = jax.jit(lambda x, s: subject.call(x, initial_state=s))(subject.inputs(length=2), state)
        assert np.all(np.isnan(output[:, 1]))


@pytest.mark.parametrize("subject", [s for s in TOKEN_SUBJECTS if s.weights(s.inputs())], ids=repr)
def test_each_weight_is_checked(subject):
    """Every array among the weights, with an axis too many or of integers: a ValueError before anything is computed."""
    inputs = subject.inputs(length=T)
    leaves, tree = jax.tree.flatten(subject.weights(inputs))
    for index, leaf in enumerate(leaves):
        for bad in (leaf[None, None], leaf.astype(np.int32)):
            changed = tree.unflatten([*leaves[:index], bad, *leaves[index + 1 :]])
            with pytest.raises(ValueError):
                jax.eval_shape(lambda x, changed=changed: subject.call(x, **changed), inputs)


@MODES
@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_option_mistakes(subject, mode):
    for option, mistakes in OPTION_MISTAKES.items():
        for bad, shown in mistakes if option in subject.parameters else ():
            check(subject, subject.inputs(length=T), {option: bad}, [option, shown], mode)


@MODES
@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_each_input_is_checked(subject, mode):
    """Every array input: one of too low a rank, one of another length, one of integers, each named in the error."""
    inputs = subject.inputs(length=T)
    for name in inputs:
        for bad in (inputs[name][0, 0], inputs[name][:, :4], inputs[name].real.astype(np.int32)):
            if name == "query" and subject.crosswise and bad.shape[1:2] == (4,):
                continue  # fewer queries than keys are a valid call
            if len(inputs) == 1 and bad.shape[1:2] == (4,):
                continue  # and so is a shorter row
            shown = str(bad.dtype) if bad.dtype == np.int32 else str(bad.shape)
            with pytest.raises(ValueError) as caught:
                (jax.jit(subject.call) if mode == "jit" else subject.call)(inputs | {name: bad})
            assert shown in str(caught.value), f"{name} {shown}: {caught.value}"


def state_after(subject, inputs):
    """A state of the right structure, shapes and dtypes, and zeros in it."""
    _, state = jax.eval_shape(functools.partial(subject.call, return_state=True), inputs)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)


@MODES
@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_a_state_of_other_sizes(subject, mode):
    """A state made for another batch is refused, naming initial_state."""
    state = state_after(subject, subject.inputs(length=T, batch=1))
    check(subject, subject.inputs(length=T, batch=3), {"initial_state": state}, ["initial_state"], mode)


@pytest.mark.parametrize("subject", [s for s in MASKED if s.causal], ids=repr)
def test_a_state_needs_causality(subject):
    state = state_after(subject, subject.inputs(length=T))
    check(
        subject,
        subject.inputs(length=T),
        {"initial_state": state, "is_causal": False},
        ["is_causal", *["initial_state"] * subject.bidirectional],  # XPOS has no other form
        "eager",
    )


@MODES
@pytest.mark.parametrize("subject", [s for s in MIXER_SUBJECTS if s.pairwise], ids=repr)
def test_bias_mistakes(subject, mode):
    for bias in (
        np.zeros((B, N, T, T + 1), np.float32),
        np.zeros((3, 1, 1, T), np.float32),
        np.zeros((B, N, T, T), np.int32),
    ):
        shown = "int32" if bias.dtype == np.int32 else str(bias.shape)
        check(subject, subject.inputs(length=T), {"bias": bias}, ["bias", shown], mode)


@pytest.mark.parametrize("subject", [s for s in MIXER_SUBJECTS if s.pairwise], ids=repr)
def test_a_full_cache_is_an_error(subject):
    """More tokens than the cache has room for: a ValueError that names both numbers, or NaN where jit hides the count."""
    state = subject.entry.empty_state(B, 8, N, K, H, 3, np.float32)
    call = jax.jit(lambda x, s: subject.call(x, initial_state=s, return_state=True))
    _, state = call(subject.inputs(length=6), state)
    with pytest.raises(ValueError, match="8"):
        subject.call(subject.inputs(length=3), initial_state=state, return_state=True)
    assert np.all(np.isnan(call(subject.inputs(length=3), state)[0]))


@pytest.mark.parametrize("subject", KEYWISE, ids=repr)
def test_keys_of_another_length_are_refused_where_they_mean_nothing(subject):
    if not subject.crosswise:
        inputs = subject.inputs(length=T)
        inputs |= time_slice({name: inputs[name] for name in ("key", "value")}, 0, 4)
        check(subject, inputs, {}, [f"({B}, 4, {K}, {H})"], "eager")
