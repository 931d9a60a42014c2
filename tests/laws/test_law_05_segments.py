"""Law 5, segments are independent: a packed row equals its documents run alone, gradients too."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from . import checks, references
from .subjects import BIDIRECTIONAL, CHUNK, MASKED, SUBJECTS, by_form, by_kind, by_variant_and_form, label, time_slice

# Boundaries beside, on and away from chunk borders (CHUNK = 3), a document of one step, ids in no order.
CUTS = (0, 2, 3, 6, 10, 11)
IDS = np.repeat([7, 2, 9, 0, 3], np.diff(CUTS)).astype(np.int32)[None]
assert CHUNK in CUTS and 2 * CHUNK in CUTS
BOTH_WAYS = tuple(s for s in BIDIRECTIONAL if s.packs_both_ways)


@functools.cache
def alone(subject, variant: str, is_causal: bool):
    """Each document by itself in the reference, joined; values and gradients."""
    options = next(v for v in subject.variants if label(v) == variant) | ({} if is_causal else {"is_causal": False})
    reference = functools.partial(references.reference_of(subject), **options)
    documents = first_in_a_row if is_causal and subject.causal else each
    return checks.oracle(functools.partial(documents, reference), subject.inputs(length=CUTS[-1], batch=1))


def each(reference, inputs):
    """One call a document."""
    return jnp.concatenate([reference(time_slice(inputs, a, b)) for a, b in zip(CUTS, CUTS[1:])], axis=1)


def first_in_a_row(reference, inputs):
    """One call of a causal reference: a row for each document, which begins it, so that nothing of what follows is seen."""
    rows = {name: jnp.concatenate([jnp.roll(x, -a, axis=1) for a in CUTS[:-1]]) for name, x in inputs.items()}
    output = reference(rows)
    return jnp.concatenate([output[i, : b - a] for i, (a, b) in enumerate(zip(CUTS, CUTS[1:]))])[None]


def check_packed(subject, variant, form, is_causal):
    options = {**variant, **form} | ({} if is_causal else {"is_causal": False})
    inputs = subject.inputs(length=CUTS[-1], batch=1)

    def call(inputs):
        if not (subject.brief and subject.any_batch):
            return subject.call(inputs, segment_ids=IDS, **options)
        # Without a batch axis, which law 6 asks of the others.
        rows = {name: array[0] for name, array in inputs.items()}
        return subject.call(rows, segment_ids=IDS[0], **options)[None]

    packed, spoiled = checks.value_and_grads(call, inputs, with_nan(inputs))
    expected = alone(subject, label(variant), is_causal)
    checks.assert_same(packed, expected)
    check_others(spoiled, packed)


def with_nan(inputs):
    """The inputs with NaN in one document."""
    inside = (IDS[0] == 9)[None, :, None, None]
    return {
        name: np.where(inside.reshape(inside.shape[: x.ndim] + (1,) * (x.ndim - 4)), np.nan, x).astype(x.dtype)
        for name, x in inputs.items()
    }


def check_others(spoiled, packed):
    """NaN in one document leaves the bits of the others alone, before and after it, and their gradients."""
    (actual, expected), (slopes, known) = zip(spoiled, packed)
    others = IDS[0] != 9
    checks.assert_identical(actual[:, others], expected[:, others])
    checks.assert_close(*([np.asarray(x)[:, others] for x in grads] for grads in (slopes, known)), 1e-6, "gradient")


@pytest.mark.parametrize("subject, variant, form", by_variant_and_form())
def test_packed_equals_alone(subject, variant, form):
    check_packed(subject, variant, form, is_causal=True)


@pytest.mark.parametrize("subject, form", by_form(BOTH_WAYS))
def test_packed_equals_alone_without_causality(subject, form):
    check_packed(subject, {}, form, is_causal=False)


@pytest.mark.parametrize("subject, form", by_form(tuple(s for s in SUBJECTS if "reverse" in s.parameters)))
def test_packed_equals_alone_in_reverse(subject, form):
    inputs = subject.inputs(length=CUTS[-1], batch=1)
    call = functools.partial(subject.call, segment_ids=IDS, reverse=True, **form)
    packed, spoiled = checks.value_and_grads(call, inputs, with_nan(inputs))
    reference = functools.partial(references.reference_of(subject), reverse=True)
    expected = checks.oracle(functools.partial(each, reference), inputs)
    checks.assert_same(packed, expected)
    check_others(spoiled, packed)


@pytest.mark.parametrize("subject, form", by_form(tuple(s for s in BOTH_WAYS if s.takes_pairs_of_ids)))
def test_pairs_of_ids_for_cross_attention(subject, form):
    """(query ids, key ids): a query sees the keys of its own id only; an id without keys gives 0."""
    query_ids = np.array([[1, 1, 2, 2, 2, 4, 4], [3, 3, 3, 3, 5, 5, 5]], np.int32)
    key_ids = np.array([[1, 2, 2, 2, 3, 3, 3, 3, 3], [3, 3, 4, 4, 4, 5, 5, 6, 6]], np.int32)
    inputs = subject.inputs(length=7, keys=9)
    options = {"is_causal": False, "segment_ids": (query_ids, key_ids)}
    actual = checks.value_and_grads(functools.partial(subject.call, **options, **form), inputs)
    expected = checks.oracle(functools.partial(references.reference_of(subject), **options), inputs)
    checks.assert_same(actual, expected)
    assert not np.any(np.asarray(actual[0])[0, 5:])


@pytest.mark.parametrize("subject, form", by_kind(MASKED))
def test_segments_and_a_key_mask_together(subject, form):
    """Padding inside a packed row, a document that is all padding included."""
    inputs = subject.inputs(length=CUTS[-1], batch=1)
    mask = np.ones((1, 1, 1, CUTS[-1]), bool)
    mask[..., [2, 4, 10]] = False
    options = {"mask": mask, "segment_ids": IDS}
    actual = checks.value_and_grads(functools.partial(subject.call, **options, **form), inputs)
    expected = checks.oracle(functools.partial(references.reference_of(subject), **options), inputs)
    checks.assert_same(actual, expected)
