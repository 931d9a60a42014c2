"""Law 6, any length: empty, tiny, odd, long, keys fewer or more than queries, no batch axis or three, grouped heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import checks, references
from .subjects import CAUSAL, MIXER_SUBJECTS, by_kind, by_table_form, param, time_slice

LENGTHS = (0, 1, 2, 3, 63, 64, 65, 127, 1000, 4097)
BRIEF_LENGTHS = (0, 1, 65, 1000)
CROSSWISE = tuple(s for s in MIXER_SUBJECTS if s.crosswise)
LONG = tuple(s for s in CAUSAL if not (s.is_mixer and "length" in s.entry.exempt))
LEADING = tuple(s for s in CAUSAL if s.any_batch)


def lengths_of(subject) -> tuple[int, ...]:
    """The lengths up to the longest that a member takes, that one included."""
    lengths = BRIEF_LENGTHS if subject.brief else LENGTHS
    if subject.longest is None:
        return lengths
    return (*(length for length in lengths if length < subject.longest), subject.longest)


@functools.cache
def longest(subject):
    """One row of the greatest length, and the reference over it: in float64, through the states of the first form."""
    inputs = subject.inputs(length=lengths_of(subject)[-1], batch=1, heads=1, kv_heads=1)
    with checks.x64():
        return inputs, np.asarray(
            jax.jit(functools.partial(subject.call, **subject.table_forms[0]))(checks.widened(inputs))
        )


def check_lengths(subject, lengths, form):
    """A causal row's first T outputs are those of its first T inputs."""
    inputs, expected = longest(subject)
    call = jax.jit(functools.partial(subject.call, **form))
    for length in lengths:
        output = call(time_slice(inputs, 0, length))
        assert output.shape[1] == length
        checks.assert_close(output, expected[:, :length], checks.OUTPUT, f"T = {length}")


@pytest.mark.parametrize("subject", LONG, ids=repr)
def test_every_length(subject):
    check_lengths(subject, lengths_of(subject), {})


@pytest.mark.parametrize("subject, form", by_table_form(LONG))
def test_every_form(subject, form):
    """Less than a chunk and several, at the chunks of the table."""
    check_lengths(subject, (2, 65), form)


@pytest.mark.parametrize("subject", LONG, ids=repr)
def test_the_long_row_is_right(subject):
    """The float64 row that the lengths are held against, against the naive reference on its last steps."""
    if references.is_looped(subject):
        inputs = subject.inputs(length=20, batch=1)
        expected, _ = checks.oracle(references.reference_of(subject), inputs)
        checks.assert_close(jax.jit(subject.call)(inputs), expected, checks.OUTPUT)
        return
    inputs, row = longest(subject)
    if subject.is_mixer:  # T x S weights: of the last queries only
        inputs = {name: array[:, -5:] if name == "query" else array for name, array in inputs.items()}
    expected, _ = checks.oracle(references.reference_of(subject), inputs)
    checks.assert_close(row[:, -5:], expected[:, -5:], checks.DOUBLE)


def both_ways(subject, function, **options):
    """The causal call and, where there is one, the other."""
    ways = (True, False) if subject.bidirectional else (True,)
    return lambda inputs: [function(inputs, is_causal=is_causal, **options) for is_causal in ways]


@functools.cache
def expected_of_lengths(subject, length, keys):
    return checks.oracle(both_ways(subject, references.reference_of(subject)), subject.inputs(length=length, keys=keys))


@pytest.mark.parametrize("length, keys", [(5, 12), (12, 5), (9, 1), (0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("subject, form", by_kind(CROSSWISE))
def test_other_numbers_of_keys(subject, form, length, keys):
    """S != T both ways; no keys at all give 0, and queries before the first aligned key too."""
    inputs = subject.inputs(length=length, keys=keys)
    actual = checks.value_and_grads(both_ways(subject, subject.call, **form), inputs)
    checks.assert_same(actual, expected_of_lengths(subject, length, keys))


@pytest.mark.parametrize("subject", [s for s in CROSSWISE if s.causal], ids=repr)
def test_more_queries_than_keys_before_empty_slots(subject):
    """Queries in front of the first key stand there too where a cache has room behind its keys."""
    inputs = subject.inputs(length=4, keys=3)
    ways = [
        jax.jit(functools.partial(subject.call, return_state=True, initial_state=s))
        for s in (None, subject.empty_state(8))
    ]
    alone, cached = (way(inputs)[0] for way in ways)
    checks.assert_close(cached, alone, checks.OUTPUT)
    none = subject.inputs(length=4, keys=0)  # traced alone: what it is, every form of the others says
    assert jax.eval_shape(ways[0], none)[0].shape == jax.eval_shape(ways[1], none)[0].shape == alone.shape


@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_empty_rows_have_states_and_gradients(subject):
    """T = 0: an empty output, gradients of the inputs' shapes, and a state from which a call starts afresh."""
    inputs = subject.inputs(length=5)
    empty = time_slice(inputs, 0, 0)
    output, gradients = checks.value_and_grads(subject.call, empty)
    assert output.shape[1] == 0
    assert [g.shape for g in gradients] == [empty[name].shape for name in sorted(empty)]
    _, state = jax.jit(functools.partial(subject.call, return_state=True))(empty)
    call = jax.jit(subject.call)
    checks.assert_close(call(inputs, initial_state=state), call(inputs), checks.OUTPUT)


@pytest.mark.parametrize("batch", [(), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("subject, form", [param(s, s.stateful_kinds[-1]) for s in LEADING])
def test_batch_axes(subject, form, batch):
    """No batch axis, three of them, or an empty one: the flat batch, reshaped; states and segment ids too."""
    flat = subject.inputs(length=7, batch=int(np.prod(batch)))
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (int(np.prod(batch)), 7)), axis=1).astype(np.int32)
    shaped = {name: array.reshape(batch + array.shape[1:]) for name, array in flat.items()}
    axis = len(batch)

    def resumed(inputs, ids, axis):
        head = {name: jax.lax.slice_in_dim(array, 0, 3, axis=axis) for name, array in inputs.items()}
        tail = {name: jax.lax.slice_in_dim(array, 3, 7, axis=axis) for name, array in inputs.items()}
        first, state = subject.call(head, segment_ids=ids[..., :3], return_state=True, **form)
        second, _ = subject.call(tail, segment_ids=ids[..., 3:], initial_state=state, return_state=True, **form)
        return jnp.concatenate([first, second], axis=axis)

    if 0 in batch:  # nothing to compute, but programs that must be made

        def loss(inputs):
            output = resumed(inputs, ids.reshape(*batch, 7), axis)
            return checks.probe(output), output

        slopes, output = jax.eval_shape(jax.grad(loss, has_aux=True), shaped)
        assert output.shape[: len(batch) + 1] == (*batch, 7)
        assert jax.tree.map(jnp.shape, slopes) == jax.tree.map(jnp.shape, shaped)
        return
    expected = jax.jit(resumed, static_argnums=2)(flat, ids, 1)
    output = jax.jit(resumed, static_argnums=2)(shaped, ids.reshape(*batch, 7), axis)
    checks.assert_close(output, np.asarray(expected).reshape(batch + expected.shape[1:]), checks.OUTPUT)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("subject, form", by_kind(MIXER_SUBJECTS))
def test_grouped_heads(subject, form, heads, kv_heads):
    """Query head n reads key head n // (N / K), in values and in the gradients that the groups share."""
    inputs = subject.inputs(length=7, heads=heads, kv_heads=kv_heads)
    actual = checks.value_and_grads(functools.partial(subject.call, **form), inputs)
    expected = checks.oracle(references.reference_of(subject), inputs)
    checks.assert_same(actual, expected)


@pytest.mark.parametrize("subject, form", by_kind(MIXER_SUBJECTS))
def test_grouped_heads_equal_repeated_heads(subject, form):
    inputs = subject.inputs(length=7)
    repeated = inputs | {name: np.repeat(inputs[name], 2, axis=2) for name in ("key", "value")}
    call = jax.jit(functools.partial(subject.call, **form))
    checks.assert_close(call(inputs), call(repeated), checks.OUTPUT)
