"""Law 3, causality is exact: whatever stands in the future, earlier outputs are the same bits."""

import functools

import jax
import numpy as np
import pytest

from . import checks
from .subjects import (
    CAUSAL,
    MIXER_SUBJECTS,
    by_form,
    by_kind,
    by_stateful_kind,
    by_table_form,
    by_variant_and_form,
    time_slice,
)

FUTURES = {
    "x100": lambda x: 100 * x,
    "nan": lambda x: x * np.nan,
    "inf": lambda x: x * 0 + np.inf,
    "-inf": lambda x: x * 0 - np.inf,
}


def with_future(inputs: dict, start: int, change, names=None) -> dict:
    """The inputs with every array (or those named) changed from step `start` on."""
    changed = {}
    with np.errstate(all="ignore"):
        for name, array in inputs.items():
            tail = change(array[:, start:]).astype(array.dtype) if names is None or name in names else array[:, start:]
            changed[name] = np.concatenate([array[:, :start], tail], axis=1)
    return changed


def check_future(function, inputs, positions, offset=0, names=None):
    clean = np.asarray(function(inputs))
    for start in positions:
        for what, change in FUTURES.items():
            output = np.asarray(function(with_future(inputs, start, change, names)))
            seen = max(start - offset, 0)
            checks.assert_identical(
                output[:, :seen], clean[:, :seen], f"outputs before a future of {what} from step {start}"
            )


@pytest.mark.parametrize("subject, variant, form", by_variant_and_form(CAUSAL))
def test_every_position_of_a_short_row(subject, variant, form):
    inputs = subject.inputs(length=11)
    function = jax.jit(functools.partial(subject.call, **variant, **form))
    check_future(function, inputs, range(1, 11))


@pytest.mark.parametrize("subject, form", by_table_form(CAUSAL))
def test_borders_of_the_table_chunks(subject, form):
    """The chunk length the table names, or the kernel's own choice, at T = 300."""
    inputs = subject.inputs(length=300, batch=1, heads=2, kv_heads=1)
    check_future(jax.jit(functools.partial(subject.call, **form)), inputs, (1, 15, 16, 17, 64, 100, 128, 255, 256, 299))


@pytest.mark.parametrize("subject, form", by_form(tuple(s for s in MIXER_SUBJECTS if s.crosswise)))
def test_fewer_queries_than_keys(subject, form):
    """Causal with T < S aligns the ends: query i sees the keys j <= i + S - T."""
    inputs = subject.inputs(length=5, keys=12)
    function = jax.jit(functools.partial(subject.call, **form))
    check_future(function, inputs, range(7, 12), offset=7, names=("key", "value"))
    whole = jax.jit(functools.partial(subject.call, **form))
    query = np.concatenate([np.zeros((2, 7, *inputs["query"].shape[2:]), np.float32), inputs["query"]], axis=1)
    checks.assert_close(function(inputs), whole({**inputs, "query": query})[:, 7:], checks.OUTPUT)


@pytest.mark.parametrize("subject, form", by_stateful_kind())
def test_resumed_calls_too(subject, form):
    """With a state handed in, the same bits again, and the state of the past does not change."""
    inputs = subject.inputs(length=9)
    _, state = jax.jit(functools.partial(subject.call, return_state=True))(time_slice(inputs, 0, 3))
    function = jax.jit(lambda x: subject.call(x, initial_state=state, **form))
    check_future(function, time_slice(inputs, 3, 9), (1, 3, 5))


@pytest.mark.parametrize("subject, form", by_kind(CAUSAL))
def test_future_inputs_get_no_gradient(subject, form):
    """d output_t / d input_s is exactly 0 for s > t."""
    inputs = subject.inputs(length=10)
    for stop in (1, 7):
        _, gradients = checks.value_and_grads(lambda x, stop=stop: subject.call(x, **form)[:, :stop], inputs)
        for gradient in gradients:
            assert not np.any(np.asarray(gradient)[:, stop:])
