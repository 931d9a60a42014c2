"""The laws of members without a causal form, as far as they make sense: no states, no segments, the rest as for all."""

import functools

import jax
import numpy as np
import pytest

from . import checks, references, test_law_01_forms, test_law_04_masks, test_law_09_memory, transformations
from .subjects import UNORDERED, _refuses, by_form, by_kind, label

CHECKS = [
    pytest.param(subject, form, name, id="-".join([subject.name, label(form), name]))
    for subject in UNORDERED
    for name in transformations.CHECKS
    for form in transformations.forms_of(subject, name)
]
EACH = pytest.mark.parametrize("subject, form", by_form(UNORDERED))
ONCE = pytest.mark.parametrize("subject, form", by_kind(UNORDERED)[-1:])


def compare(subject, inputs, **options):
    """Values and gradients against the reference."""
    form = options.pop("form", {})
    actual = checks.value_and_grads(functools.partial(subject.call, **options, **form), inputs)
    expected = checks.oracle(functools.partial(references.reference_of(subject), **options), inputs)
    checks.assert_same(actual, expected)


@pytest.mark.parametrize("subject", UNORDERED, ids=repr)
def test_what_it_is_exempt_from_is_refused(subject):
    inputs = subject.inputs(length=3)
    assert _refuses(subject, inputs, "is_causal", is_causal=True)
    assert _refuses(subject, inputs, "return_state", return_state=True)
    assert _refuses(subject, inputs, "segment_ids", segment_ids=np.zeros((2, 3), np.int32))


@pytest.mark.parametrize("dtype", test_law_01_forms.DTYPES)
@EACH
def test_form_equals_reference(subject, form, dtype):
    function = functools.partial(subject.call, **form)
    test_law_01_forms.check_against_reference(subject, {}, 11, dtype, function)


@ONCE
def test_weights_get_gradients(subject, form):
    test_law_01_forms.test_weights_get_gradients(subject, form)


@pytest.mark.parametrize("poison", [np.nan, -np.inf], ids=str)
@ONCE
def test_masked_keys_do_not_exist(subject, form, poison):
    test_law_04_masks.test_masked_keys_do_not_exist(subject, form, poison)


@ONCE
def test_rows_with_nothing_to_attend(subject, form):
    inputs, mask = subject.inputs(length=9), np.ones((2, 1, 1, 9), bool)
    mask[0] = False
    output, gradients = checks.value_and_grads(functools.partial(subject.call, mask=mask, **form), inputs)
    assert not np.any(np.asarray(output)[0]) and np.all(np.isfinite(output))
    for gradient in gradients:
        assert not np.any(np.asarray(gradient)[0]) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("length, keys", [(5, 12), (12, 5), (9, 1), (0, 4), (4, 0), (65, 1000)])
@ONCE
def test_other_numbers_of_keys(subject, form, length, keys):
    compare(subject, subject.inputs(length=length, keys=keys), form=form)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2)])
@ONCE
def test_grouped_heads(subject, form, heads, kv_heads):
    compare(subject, subject.inputs(length=7, heads=heads, kv_heads=kv_heads), form=form)


@pytest.mark.parametrize("batch", [(), (2, 1, 3), (0,)], ids=str)
@ONCE
def test_batch_axes(subject, form, batch):
    flat = subject.inputs(length=7, batch=int(np.prod(batch)))
    shaped = {name: array.reshape(batch + array.shape[1:]) for name, array in flat.items()}
    call = jax.jit(functools.partial(subject.call, **form))
    expected = np.asarray(call(flat))
    checks.assert_close(call(shaped), expected.reshape(batch + expected.shape[1:]), checks.OUTPUT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@ONCE
def test_output_has_the_value_dtype(subject, form, dtype):
    inputs = {name: jax.numpy.asarray(array, dtype) for name, array in subject.inputs(length=6).items()}
    output, gradients = checks.value_and_grads(functools.partial(subject.call, **form), inputs)
    assert output.dtype == dtype and {gradient.dtype for gradient in gradients} == {np.dtype(dtype)}
    exact = jax.jit(subject.call)({name: np.asarray(array, np.float32) for name, array in inputs.items()})
    checks.assert_close(np.asarray(output, np.float32), exact, 1e-2)


@pytest.mark.parametrize("subject, form, name", CHECKS)
def test_transformation(subject, form, name):
    transformations.CHECKS[name](subject, form)


@pytest.mark.parametrize("subject", UNORDERED, ids=repr)
def test_temporaries_are_linear_in_the_length(subject):
    test_law_09_memory.test_temporaries_are_linear_in_the_length(subject, "bidirectional", True)
