"""Law 7, dtype policy: the output has the value's dtype, sums are kept wide, half precision survives 65,536 steps."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from . import checks
from .subjects import MIXER_SUBJECTS, SUBJECTS, by_kind, time_slice

HALVES = [pytest.param(ml_dtypes.bfloat16, id="bfloat16"), pytest.param(np.float16, id="float16")]
LONG = 65_536
# Gradients over long rows run longer than they compile, so LLVM optimises them as it does for users (conftest.py has it stopped).
FAST = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def cast(inputs: dict, dtype) -> dict:
    """Real arrays in this dtype; complex ones, which have no half precision, as they are."""
    return {name: array if array.dtype.kind == "c" else array.astype(dtype) for name, array in inputs.items()}


def is_complex(subject) -> bool:
    return any(array.dtype.kind == "c" for array in subject.inputs(length=1).values())


REAL = tuple(subject for subject in SUBJECTS if not is_complex(subject))
LASTING = tuple(s for s in REAL if not (s.is_mixer and "length" in s.entry.exempt))


@pytest.mark.parametrize("dtype", [*HALVES, pytest.param(np.float32, id="float32")])
@pytest.mark.parametrize("subject, form", by_kind(REAL))
def test_output_has_the_value_dtype(subject, form, dtype):
    inputs = cast(subject.inputs(length=6), dtype)
    output, gradients = jax.eval_shape(
        lambda x: checks.value_and_grads(functools.partial(subject.call, **form), x), inputs
    )
    assert output.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [dtype] * len(gradients)


@pytest.mark.parametrize("subject", MIXER_SUBJECTS, ids=repr)
def test_mixed_dtypes_follow_the_value(subject):
    inputs = subject.inputs(length=6)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        other = np.float32 if dtype != np.float32 else ml_dtypes.bfloat16
        mixed = cast(inputs, other) | {"value": inputs["value"].astype(dtype)}
        assert jax.eval_shape(subject.call, mixed).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("subject", [s for s in REAL if s.causal and not s.pairwise], ids=repr)
def test_states_are_kept_in_float32(subject, dtype):
    """And in float64 under x64, where they are sums; stored inputs keep their dtype. A state that goes around a loop of calls keeps its dtype."""

    def dtypes(inputs):
        state = jax.eval_shape(lambda x: subject.call(x, return_state=True), inputs)[1]
        again = jax.eval_shape(lambda x, s: subject.call(x, initial_state=s, return_state=True), inputs, state)[1]
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), again)
        return {np.zeros(0, leaf.dtype).real.dtype for leaf in jax.tree.leaves(state) if checks.is_float(leaf)}

    wide = np.dtype(dtype if subject.keeps_inputs else np.float32)
    assert dtypes(cast(subject.inputs(length=3), dtype)) == {wide}
    with checks.x64():
        assert dtypes(subject.inputs(length=3, dtype=np.float64)) == {np.dtype(np.float64)}


def long_row(subject):
    """65,536 steps whose features add up far beyond 65,504, in numbers that bfloat16 and float32 hold exactly.

    Only the last queries where each costs a pass over all keys.
    """
    inputs = subject.inputs(length=subject.longest or LONG, batch=1, heads=1, kv_heads=1, head_dim=8, value_dim=8)
    if subject.is_mixer:
        inputs |= {"key": inputs["key"] + 1, "value": inputs["value"] + 1}
    if subject.pairwise:
        inputs |= {"query": inputs["query"][:, -64:]}
    return cast(cast(inputs, ml_dtypes.bfloat16), np.float32)


def mean_of_squares(subject, inputs):
    """A scalar of the last outputs, and those outputs."""
    output = subject.call(inputs)[:, -256:]
    return jnp.mean(output.astype(jnp.promote_types(jnp.float32, output.dtype)) ** 2), output


def compiled(subject, function):
    return jax.jit(function, compiler_options={} if subject.brief else FAST)


@functools.cache
def long_reference(subject):
    with checks.x64():
        mean = compiled(subject, functools.partial(mean_of_squares, subject))
        return np.asarray(mean(checks.widened(long_row(subject)))[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("subject", LASTING, ids=repr)
def test_half_precision_over_65536_steps(subject, dtype):
    """Within 1e-2 of float64 on the same numbers; nothing overflows, in gradients neither: those of shared loops at their owner's."""
    inputs, function = cast(long_row(subject), dtype), functools.partial(mean_of_squares, subject)
    if subject.brief:
        output, slopes = compiled(subject, function)(inputs)[1], ()
    else:
        function = jax.value_and_grad(function, has_aux=True)
        (_, output), slopes = compiled(subject, function)(inputs)
    checks.assert_close(output, long_reference(subject), 1e-2)
    assert all(np.all(np.isfinite(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("subject", LASTING, ids=repr)
def test_float32_over_65536_steps(subject):
    """The same rows in float32 stay within 1e-5 of float64: no sum is one long addition."""
    output = compiled(subject, functools.partial(mean_of_squares, subject))(long_row(subject))[1]
    checks.assert_close(output, long_reference(subject), 1e-5)


@pytest.mark.parametrize("subject", [s for s in REAL if s.causal], ids=repr)
def test_half_precision_resumes_from_a_wide_state(subject):
    """A half-precision row in two calls equals the row in one: the state between them loses nothing."""
    inputs = cast(subject.inputs(length=12), ml_dtypes.bfloat16)

    @jax.jit
    def resumed(inputs):
        first, state = subject.call(time_slice(inputs, 0, 5), return_state=True)
        return jnp.concatenate([first, subject.call(time_slice(inputs, 5, 12), initial_state=state)], axis=1)

    whole = np.asarray(jax.jit(subject.call)(inputs), np.float32)
    checks.assert_close(np.asarray(resumed(inputs), np.float32), whole, 2**-8)
