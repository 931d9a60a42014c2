"""Law 1, three forms agree: every form of the table and the steps equal a naive float64 reference, gradients included."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from . import checks, references
from .subjects import (
    BIDIRECTIONAL,
    CAUSAL,
    EVERYTHING,
    MASKED,
    MIXER_SUBJECTS,
    RECURRENCE_SUBJECTS,
    by_form,
    by_table_form,
    by_variant_and_form,
    label,
    param,
    scanned,
    stepwise,
    time_slice,
)

DTYPES = [pytest.param(np.float32, id="float32"), pytest.param(np.float64, id="float64")]
LENGTH = 11


@functools.cache
def expected(subject, variant: str, length: int, **options):
    """The reference's values and gradients, computed once for all the forms of a variant."""
    options |= next(v for v in subject.variants if label(v) == variant)
    reference = functools.partial(references.reference_of(subject), **options)
    return checks.oracle(reference, subject.inputs(length=length))


def check_against_reference(subject, variant, length, dtype, function, **options):
    inputs = subject.inputs(length=length)
    output, gradients = expected(subject, label(variant), length, **options)
    with checks.x64(dtype == np.float64):
        inputs = checks.widened(inputs) if dtype == np.float64 else inputs
        actual = checks.value_and_grads(function, inputs)
        actual = jax.tree.map(np.asarray, actual)
    tolerance = checks.precision_of(dtype)
    checks.assert_close(actual[0], output, tolerance[0])
    checks.assert_close(actual[1], gradients, tolerance[1], "gradient")


def in_float32(subject, variant: dict, form: dict) -> bool:
    """Rounding is looked at once an implementation; random problems, rows of many chunks, and options in law 2 are in float32 too."""
    return EVERYTHING or (not variant and form in subject.kinds)


@pytest.mark.parametrize(
    "subject, variant, form, dtype",
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype.__name__}")
        for case in by_variant_and_form()
        for dtype in (np.float32, np.float64)
        if dtype == np.float64 or in_float32(*case.values)
    ],
)
def test_form_equals_reference(subject, variant, form, dtype):
    function = functools.partial(subject.call, **variant, **form)
    check_against_reference(subject, variant, LENGTH, dtype, function)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("subject, form", by_form(BIDIRECTIONAL))
def test_bidirectional_form_equals_reference(subject, form, dtype):
    function = functools.partial(subject.call, is_causal=False, **form)
    check_against_reference(subject, {}, LENGTH, dtype, function, is_causal=False)


@pytest.mark.parametrize(
    "subject, variant, dtype",
    [
        pytest.param(s, v, dtype, id=f"{s.name}-{label(v)}-{dtype.__name__}")
        for s in CAUSAL
        for v in s.variants
        for dtype in ((np.float64,) if v else (np.float32, np.float64))
    ],
)
def test_steps_equal_reference(subject, variant, dtype):
    """T = 1 calls that hand the state on, gradients through the whole chain of states."""
    length = 4

    def function(inputs):
        return stepwise(subject, inputs, **variant)[0]

    check_against_reference(subject, variant, length, dtype, function)


@functools.cache
def by_steps(subject):
    """(inputs, an initial state), and what the steps make of them: outputs, final state, gradients by both.

    Steps of a brief member are one program in a scan, so its state has the room that they need.
    """
    inputs = checks.widened(subject.inputs(length=7, dtype=np.float64))
    room = {"initial_state": checks.widened(subject.empty_state(7))} if subject.brief else {}
    _, initial = jax.jit(functools.partial(subject.call, return_state=True))(time_slice(inputs, 0, 3), **room)
    start, steps = (time_slice(inputs, 3, None), initial), scanned if subject.brief else stepwise
    return start, jax.tree.map(np.asarray, checks.value_and_grads(lambda tree: steps(subject, *tree), start))


@pytest.mark.parametrize("subject, form", [param(s, f) for s in CAUSAL for f in s.stateful_forms])
def test_states_and_their_gradients_agree_with_the_steps(subject, form):
    """From one initial state: outputs, final state, and gradients by inputs and initial state equal those of the steps."""
    with checks.x64():
        start, expected = by_steps(subject)
        actual = checks.value_and_grads(
            lambda tree: subject.call(tree[0], initial_state=tree[1], return_state=True, **form), start
        )
        checks.assert_close(actual, expected, checks.DOUBLE, "output, final state and gradients")
        assert jax.tree.structure(actual[0]) == jax.tree.structure(expected[0])


@pytest.mark.parametrize("subject, form", by_table_form())
def test_many_chunks_equal_reference(subject, form):
    """A length of several default chunks and a ragged one, as users call it."""
    inputs = subject.inputs(length=150, batch=1, heads=2, kv_heads=1)
    actual = checks.value_and_grads(functools.partial(subject.call, **form), inputs)
    if references.is_looped(subject):
        with checks.x64():
            expected = checks.value_and_grads(
                functools.partial(subject.call, **subject.forms[0]), checks.widened(inputs)
            )
            expected = jax.tree.map(np.asarray, expected)
    else:
        expected = checks.oracle(references.reference_of(subject), inputs)
    checks.assert_same(actual, expected)


@pytest.mark.parametrize("subject, form", by_form(tuple(s for s in RECURRENCE_SUBJECTS if "normalize" in s.parameters)))
def test_normalised_recurrences(subject, form):
    """With positive queries and keys, as feature maps make them, so that the normaliser stays away from 0."""
    inputs = subject.inputs(length=LENGTH)
    inputs |= {name: np.abs(inputs[name]) for name in ("query", "key")}
    actual = checks.value_and_grads(functools.partial(subject.call, normalize=True, **form), inputs)
    expected = checks.oracle(functools.partial(references.reference_of(subject), normalize=True), inputs)
    checks.assert_same(actual, expected)


@pytest.mark.parametrize("subject, form", by_form(tuple(s for s in MASKED if s.weights(s.inputs()))))
def test_weights_get_gradients(subject, form):
    """Inputs without a time axis, projections and the like, are differentiable as all others are."""
    inputs = subject.inputs(length=LENGTH)
    weights = subject.weights(inputs)
    actual = checks.value_and_grads(lambda w: subject.call(inputs, **w, **form), weights)
    wide = checks.widened(inputs)
    expected = checks.oracle(lambda w: references.reference_of(subject)(wide, **w), weights)
    checks.assert_close(actual[1], expected[1], checks.GRADIENT, "gradient by weights")


@st.composite
def problems(draw):
    """Random shapes, options and patterns of a mixer call."""
    kv_heads = draw(st.integers(1, 3))
    return {
        "shape": {
            "batch": draw(st.integers(1, 3)),
            "length": draw(st.integers(1, 14)),
            "kv_heads": kv_heads,
            "heads": kv_heads * draw(st.integers(1, 3)),
            # With one feature a normalised output does not depend on the query: its gradient is 0 but for rounding.
            "head_dim": draw(st.integers(2, 6)),
            "value_dim": draw(st.integers(1, 6)),
        },
        "keys": draw(st.one_of(st.none(), st.integers(1, 14))),
        "is_causal": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "segmented": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("subject", MIXER_SUBJECTS, ids=repr)
@settings(
    max_examples=5 if EVERYTHING else 2,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(problem=problems())
def test_random_problems_equal_reference(subject, problem):
    keys = problem["keys"] if subject.crosswise else None
    shape = problem["shape"] | ({"head_dim": problem["shape"]["head_dim"] // 2 * 2} if subject.pairs_features else {})
    inputs = subject.inputs(seed=problem["seed"], keys=keys, **shape)
    rng = np.random.default_rng(problem["seed"])
    B, T, S = problem["shape"]["batch"], problem["shape"]["length"], inputs["key"].shape[1]
    options = {"is_causal": problem["is_causal"] or not subject.bidirectional}
    if problem["masked"]:
        options["mask"] = rng.random((B, 1, 1, S)) < 0.7
    if problem["segmented"]:
        ids = np.sort(rng.integers(0, 3, (B, max(S, T))), axis=1).astype(np.int32)
        if T == S or subject.takes_pairs_of_ids:
            options["segment_ids"] = ids if T == S else (ids[:, :T], ids[:, :S])
    form = subject.forms[problem["seed"] % len(subject.forms)]
    actual = checks.value_and_grads(functools.partial(subject.call, **options, **form), inputs)
    expected = checks.oracle(functools.partial(references.reference_of(subject), **options), inputs)
    checks.assert_same(actual, expected)
