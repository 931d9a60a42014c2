"""Law 8, every transformation: the checks of `transformations` for every form of every member, and a few that are mixers' own."""

import functools

import jax
import numpy as np
import pytest

from tests.traces import counted_jit, programs

from . import checks, transformations
from .subjects import KEYWISE, MASKED, MIXER_SUBJECTS, PAIRWISE, SUBJECTS, by_form, label

CASES = [
    pytest.param(subject, form, name, id="-".join([subject.name, label(form), name]))
    for subject in SUBJECTS
    for name in transformations.names_of(subject)
    for form in transformations.forms_of(subject, name)
]


@pytest.mark.parametrize("subject, form, name", CASES)
def test_transformation(subject, form, name):
    transformations.CHECKS[name](subject, form)


@pytest.mark.parametrize("shape", [(2, 4, 9, 9), (9, 9)], ids=str)
@pytest.mark.parametrize("subject, form", by_form(PAIRWISE))
def test_vmap_over_the_bias_alone(subject, form, shape):
    inputs = subject.inputs(length=9)
    biases = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)

    def call(bias):
        return checks.value_and_grads(lambda b: subject.call(inputs, bias=b, **form), bias)

    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *[call(bias) for bias in biases])
    checks.assert_same(jax.jit(jax.vmap(call))(biases), expected)


@pytest.mark.parametrize("subject, form", by_form(MIXER_SUBJECTS))
def test_vmap_over_the_mask_alone(subject, form):
    inputs = subject.inputs(length=9)
    masks = np.random.default_rng(0).random((3, 2, 1, 1, 9)) < 0.7

    def call(mask):
        return checks.value_and_grads(functools.partial(subject.call, mask=mask, **form), inputs)

    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *[call(mask) for mask in masks])
    checks.assert_same(jax.jit(jax.vmap(call))(masks), expected)


@pytest.mark.parametrize("subject", [s for s in MASKED if s.causal], ids=repr)
def test_decoding_compiles_once(subject):
    """Every step of a decode loop runs the same program: nothing in the state's shape or type depends on the position."""
    inputs = subject.inputs(length=1)
    state = subject.empty_state(6)
    step = counted_jit(lambda x, s: subject.call(x, initial_state=s, return_state=True))
    for _ in range(6):
        _, state = step(inputs, state)
    assert programs(step) == 1


@pytest.mark.parametrize("subject", KEYWISE, ids=repr)
def test_decoding_cost_does_not_grow(subject):
    """A linear-time mixer's step costs the same after any number of steps: its state is no larger."""
    sizes = set()
    for length in (4, 400):
        _, state = jax.eval_shape(lambda x: subject.call(x, return_state=True), subject.inputs(length=length))
        sizes.add(sum(leaf.size for leaf in jax.tree.leaves(state)))
    assert len(sizes) == 1
