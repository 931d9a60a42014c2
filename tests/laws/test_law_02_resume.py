"""Law 2, split and resume anywhere: f(x[:a]) then f(x[a:], initial_state=state) is f(x), gradients too, for every a.

The last step is always a third call, so the final state is held to what it does, not to how it is laid out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.traces import counted_jit, programs

from . import checks, references
from .subjects import CAUSAL, MASKED, MIXER_SUBJECTS, by_stateful_kind, label, param, scanned, slice_key, time_slice

LENGTH, TAIL = 5, 1
TOTAL = LENGTH + TAIL
SEGMENTS = np.array([[5, 5, 0, 0, 0, 2], [1, 1, 1, 1, 4, 4]], np.int32)
KEY_MASK = np.array([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1]], bool)[:, None, None, :]


def chain(subject, inputs, cuts: tuple[int, ...], *, per_call=None, state=None, **options):
    """A call for each stretch between two cuts, each from the state of the one before."""
    outputs = []
    for start, stop in zip(cuts, cuts[1:]):
        now = {name: slice_key(array, start, stop) for name, array in (per_call or {}).items()}
        piece = time_slice(inputs, start, stop)
        output, state = subject.call(piece, initial_state=state, return_state=True, **now, **options)
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)


@functools.cache
def expected(subject, variant: str, situation: str):
    options = next(v for v in subject.variants if label(v) == variant) | SITUATIONS[situation]
    return checks.oracle(functools.partial(references.reference_of(subject), **options), subject.inputs(length=TOTAL))


SITUATIONS = {
    "plain": {},
    "segments": {"segment_ids": SEGMENTS},
    "key_mask": {"mask": KEY_MASK},
    "both": {"segment_ids": SEGMENTS, "mask": KEY_MASK},
}
EVERY = tuple((0, split, LENGTH, TOTAL) for split in range(LENGTH + 1))
AT_ONCE = (0, 0, 3, 3, LENGTH, TOTAL)  # several splits in one program, calls of no steps among them
BRIEFLY = (0, 4, 4, TOTAL)  # inside a segment of one row and between two of the other, and a call of no steps


def check(subject, variant, situation, cuts, form, gradients=True):
    inputs = subject.inputs(length=TOTAL)
    function = functools.partial(chain, subject, cuts=cuts, per_call=SITUATIONS[situation], **variant, **form)
    values, slopes = expected(subject, label(variant), situation)
    if not gradients:
        checks.assert_close(jax.jit(function)(inputs), values, checks.OUTPUT, f"output, cuts {cuts}")
        return
    actual = checks.value_and_grads(function, inputs)
    checks.assert_close(actual[0], values, checks.OUTPUT, f"output, cuts {cuts}")
    checks.assert_close(actual[1], slopes, checks.GRADIENT, f"gradient, cuts {cuts}")


@pytest.mark.parametrize("subject, form", by_stateful_kind())
def test_every_split(subject, form):
    for cuts in EVERY:
        check(subject, {}, "plain", cuts, form, gradients=cuts[1] == 1)


@pytest.mark.parametrize("subject, form", by_stateful_kind())
def test_every_split_with_segments_and_key_masks(subject, form):
    """Splits inside segments and on their boundaries: a resumed call continues the last segment or starts the next.

    The mask of each call covers that call's keys; masked keys stay masked in every later call.
    """
    if subject.carries_ids:
        for cuts in (BRIEFLY,) if subject.brief else EVERY:
            check(subject, {}, "both", cuts, form, gradients=cuts[1] == 3 or subject.brief)
    else:  # its state belongs to the next id, so it is handed on inside segments only
        check_inside(subject, form)


def check_inside(subject, form):
    """Splits of a row whose segments begin at steps 2 and 5, where no segment begins."""
    inputs, ids = subject.inputs(length=TOTAL), np.array([[3, 3, 1, 1, 1, 2]] * 2, np.int32)
    expected = checks.oracle(functools.partial(references.reference_of(subject), segment_ids=ids), inputs)
    for cuts in ((0, 1, 4, TOTAL),) if subject.brief else tuple((0, split, TOTAL) for split in (1, 3, 4)):
        function = functools.partial(chain, subject, cuts=cuts, per_call={"segment_ids": ids}, **form)
        checks.assert_same(checks.value_and_grads(function, inputs), expected)


@pytest.mark.parametrize(
    "subject, variant, form", [param(s, v, f) for s in MIXER_SUBJECTS for v in s.variants[1:] for f in s.stateful_kinds]
)
def test_options_too(subject, variant, form):
    check(subject, variant, "both", AT_ONCE, form)


@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_resumed_call_without_ids_continues_the_last_segment(subject):
    inputs = subject.inputs(length=8)
    ids = np.array([[1, 1, 3, 3, 3, 3, 3, 3], [2] * 8], np.int32)

    @jax.jit
    def resumed(inputs):
        _, state = subject.call(time_slice(inputs, 0, 5), segment_ids=ids[:, :5], return_state=True)
        return subject.call(time_slice(inputs, 5, 8), initial_state=state)

    whole = jax.jit(functools.partial(subject.call, segment_ids=ids))(inputs)
    checks.assert_close(resumed(inputs), whole[:, 5:], checks.OUTPUT)


@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_segments_may_begin_after_a_call_without_ids(subject):
    """Ids given first on a resumed call: the boundaries inside that call still separate."""
    inputs = subject.inputs(length=8)
    ids = np.array([[7, 7, 7, 9], [7, 9, 9, 9]], np.int32)

    @jax.jit
    def resumed(inputs):
        _, state = subject.call(time_slice(inputs, 0, 4), return_state=True)
        return subject.call(time_slice(inputs, 4, 8), initial_state=state, segment_ids=ids)

    alone = jax.jit(subject.call)(time_slice(inputs, 5, 8))
    assert jnp.all(jnp.isfinite(resumed(inputs)))
    checks.assert_close(resumed(inputs)[1, 1:], alone[1], checks.OUTPUT)


@pytest.mark.parametrize("subject", [s for s in MASKED if s.causal], ids=repr)
@pytest.mark.parametrize("prefill", [0, 4])
@pytest.mark.parametrize("situation", ["plain", "segments", "key_mask"])
def test_prefill_then_decode_in_constant_memory(subject, prefill, situation):
    """From the table's empty state: one prefill, then T = 1 steps in one compiled program, state shapes never changing."""
    inputs = subject.inputs(length=TOTAL)
    per_call = SITUATIONS[situation]
    state = subject.empty_state(TOTAL)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    step = counted_jit(lambda x, now, state: subject.call(x, initial_state=state, return_state=True, **now))
    outputs = []
    for start, stop in [(0, prefill)] + [(t, t + 1) for t in range(prefill, TOTAL)]:
        now = {name: slice_key(array, start, stop) for name, array in per_call.items()}
        output, state = step(time_slice(inputs, start, stop), now, state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        outputs.append(output)
    checks.assert_close(np.concatenate(outputs, axis=1), expected(subject, "plain", situation)[0], checks.OUTPUT)
    assert programs(step) <= 2, "one program for the prefill and one for all steps"


@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_decoding_scans(subject):
    """A recurrence's state, and a cache made beforehand, are valid carries of lax.scan."""
    outputs, _ = jax.jit(functools.partial(scanned, subject))(subject.inputs(length=TOTAL), subject.empty_state(TOTAL))
    checks.assert_close(outputs, expected(subject, "plain", "plain")[0], checks.OUTPUT)


@pytest.mark.parametrize(
    "subject",
    [s for s in MIXER_SUBJECTS if "window" in s.parameters and "window state" not in s.entry.exempt],
    ids=repr,
)
def test_a_window_keeps_only_its_last_keys(subject):
    """The state of a window is its last W keys, however long the history."""
    sizes = set()
    for length in (8, 40):
        _, state = jax.eval_shape(lambda x: subject.call(x, window=3, return_state=True), subject.inputs(length=length))
        sizes.add(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert len(sizes) == 1
