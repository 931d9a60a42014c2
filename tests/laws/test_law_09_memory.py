"""Law 9, O(T) memory: no T x S buffer in the compiled program of a call that does not ask for weights, gradients included.

Programs are compiled for shapes alone and never run; sizes are those of the compiler's own account of temporaries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import checks
from .subjects import CAUSAL, KEYWISE, MIXER_SUBJECTS, PAIRWISE, RECURRENCE_SUBJECTS, SUBJECTS, time_slice

EXEMPT = [s for s in SUBJECTS if "memory" in s.exempt]
SUBJECTS, CAUSAL, MIXER_SUBJECTS, KEYWISE, PAIRWISE = (
    tuple(s for s in subjects if s not in EXEMPT) for subjects in (SUBJECTS, CAUSAL, MIXER_SUBJECTS, KEYWISE, PAIRWISE)
)
SHORT, LONG, ALONE = 2048, 4096, 8192
HEADS = 2


def shapes(subject, length: int, **sizes) -> dict:
    """Shapes and dtypes of the member's inputs, without the numbers."""
    inputs = subject.inputs(length=2, batch=1, **sizes)
    return {name: jax.ShapeDtypeStruct((a.shape[0], length, *a.shape[2:]), a.dtype) for name, a in inputs.items()}


def temporaries(function, *arguments) -> int:
    """Bytes of temporary buffers of the compiled function, inputs and outputs not counted."""
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def patterns_of(subject) -> dict:
    """Calls that must stay linear in T: name -> f(inputs, extra), and the shape of extra (or None) as a function of T."""
    calls = {"plain": (lambda x, _: subject.call(x), None)}
    calls["segments"] = (
        lambda x, ids: subject.call(x, segment_ids=ids),
        lambda T: jax.ShapeDtypeStruct((1, T), np.int32),
    )
    if subject.is_mixer or subject.is_token_mixer:
        calls["key mask"] = (
            lambda x, m: subject.call(x, mask=m),
            lambda T: jax.ShapeDtypeStruct((1, 1, 1, T), np.bool_),
        )
    if "window" in subject.parameters:
        calls["window"] = (lambda x, _: subject.call(x, window=128), None)
    if subject.pairwise:
        calls["bias"] = (
            lambda x, b: subject.call(x, bias=b),
            lambda T: jax.ShapeDtypeStruct((1, HEADS, 1, T), np.float32),
        )
    if subject.bidirectional:
        calls["bidirectional"] = (lambda x, _: subject.call(x, is_causal=False), None)
    return calls


CASES = [
    pytest.param(s, name, differentiated, id=f"{s.name}-{name}-{'gradient' if differentiated else 'value'}")
    for s in SUBJECTS
    for name in patterns_of(s)
    for differentiated in ((False, True) if name == "plain" else (True,))
]


def gradient_of(call):
    """The gradient of half the square of the output by every real or complex input, the bias too.

    Its cotangent is the output: a constant one would be folded by the compiler, for seconds at these sizes.
    """

    def function(inputs, extra):
        floats, rebuild = checks.split_floats((inputs, extra))

        def energy(floats):
            outputs = checks.split_floats(call(*rebuild(floats)))[0]
            return sum(jnp.sum(jnp.real(x * jnp.conj(x))) for x in outputs) / 2

        return jax.grad(energy)(floats)

    return function


@pytest.mark.parametrize("subject, name, differentiated", CASES)
def test_temporaries_are_linear_in_the_length(subject, name, differentiated):
    """Twice the length, at most 2.2 times the temporaries, and less growth than one T x S array's; on another's loops, at one length less than such an array."""
    call, extra = patterns_of(subject)[name]
    function = gradient_of(call) if differentiated else call
    sizes = {"heads": HEADS, "kv_heads": 1, "head_dim": 16, "value_dim": 16}
    lengths = (ALONE,) if subject.brief else (SHORT, LONG)
    used = {T: temporaries(function, shapes(subject, T, **sizes), extra and extra(T)) for T in lengths}
    if subject.brief:
        assert used[ALONE] < ALONE**2, f"{used[ALONE]} bytes: room for a T x S mask of one byte a pair"
        return
    assert used[LONG] <= 2.2 * used[SHORT] + 2**17, used
    if subject.is_mixer:
        grown = used[LONG] - used[SHORT]
        assert grown < LONG**2 - SHORT**2, f"grown by {grown} bytes: room for a T x S mask of one byte a pair"


@pytest.mark.parametrize("subject", CAUSAL, ids=repr)
def test_resumed_calls_are_linear_too(subject):
    """A second half that starts from the state of the first, differentiated through the state."""

    def resumed(inputs, _):
        half = next(iter(inputs.values())).shape[1] // 2
        first, state = subject.call(time_slice(inputs, 0, half), return_state=True)
        return first, subject.call(time_slice(inputs, half, None), initial_state=state)

    sizes = {"heads": HEADS, "kv_heads": 1, "head_dim": 16, "value_dim": 16}
    used = {T: temporaries(gradient_of(resumed), shapes(subject, T, **sizes), None) for T in (SHORT, LONG)}
    assert used[LONG] <= 2.2 * used[SHORT] + 2**17, used


@pytest.mark.parametrize("subject", KEYWISE, ids=repr)
def test_gradient_of_a_linear_mixer_at_65536(subject):
    """8 heads, 64 wide, float32: at most 0.5 GB of temporaries."""
    inputs = shapes(subject, 65_536, heads=8, kv_heads=8, head_dim=64, value_dim=64)
    assert temporaries(gradient_of(lambda x, _: subject.call(x)), inputs, None) <= 0.5e9


@pytest.mark.parametrize("subject", PAIRWISE, ids=repr)
def test_gradient_of_a_pairwise_mixer_at_16384(subject):
    """One head, 64 wide, float32: at most 0.2 GB of temporaries, by default and in chunks."""
    inputs = shapes(subject, 16_384, heads=1, kv_heads=1, head_dim=64, value_dim=64)
    for form in ({}, {"implementation": "chunked"}):
        call = functools.partial(subject.call, **form)
        assert temporaries(gradient_of(lambda x, _, call=call: call(x)), inputs, None) <= 0.2e9, form


@pytest.mark.parametrize("subject", RECURRENCE_SUBJECTS, ids=repr)
def test_gradient_of_a_recurrence_keeps_inputs_and_outputs_only(subject):
    """At T = 16,384 the temporaries are a few times what goes in and out, states of all steps not among them."""
    inputs = shapes(subject, 16_384)
    output = jax.eval_shape(subject.call, inputs)
    traffic = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((inputs, output)))
    assert temporaries(gradient_of(lambda x, _: subject.call(x)), inputs, None) <= 3 * traffic


@pytest.mark.parametrize("subject", MIXER_SUBJECTS, ids=repr)
def test_nothing_is_unrolled_over_time(subject):
    """The program of a sixteen times longer row is no longer than twice: compile time does not grow with T."""
    sizes = [len(jax.jit(subject.call).lower(shapes(subject, T)).as_text().splitlines()) for T in (1024, 16_384)]
    assert sizes[1] <= 2 * sizes[0], sizes
