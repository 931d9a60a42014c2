"""Law 4, masks are total: empty rows give 0, nothing masked leaks, and what cannot be honoured is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from . import checks, references
from .subjects import KEYWISE, MASKED, MIXER_SUBJECTS, PAIRWISE, by_form, by_kind, by_stateful_kind, label, time_slice

B, T, N = 2, 9, 4
KEY_MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1, 0, 0, 0]], bool)[:, None, None, :]
# Where extras such as a decay make the distance in time count, cutting keys out moves the queries too, so that it is another problem.
UNPADDABLE = tuple(
    s for s in MIXER_SUBJECTS if s.bidirectional and s.entry.extras is None and "padding" not in s.entry.exempt
)
REMOVABLE = tuple(
    s
    for s in MIXER_SUBJECTS
    if s.bidirectional and s.crosswise and s.entry.extras is None and "removal" not in s.entry.exempt
)


def pair_mask(seed=0):
    """A random (B, N, T, S) mask with an empty row, an empty head and an empty column."""
    mask = np.random.default_rng(seed).random((B, N, T, T)) < 0.6
    mask[0, 1, 4] = mask[1, 2] = mask[:, :, :, 5] = False
    return mask


def poisoned(inputs: dict, hidden: np.ndarray, poison: float) -> dict:
    """The inputs with poison in whatever belongs to the keys that `hidden` (B, S) marks: key, value and extras."""

    def poison_in(array):
        return np.where(hidden.reshape(hidden.shape + (1,) * (array.ndim - 2)), np.float32(poison), array)

    return {name: array if name == "query" else poison_in(array) for name, array in inputs.items()}


@functools.cache
def masked_program(subject, form: str):
    """f(inputs, mask): values and gradients, one program for all numbers and masks of one shape."""
    options = next(f for f in subject.forms if label(f) == form)
    return jax.jit(lambda inputs, mask: checks.value_and_grads(lambda x: subject.call(x, mask=mask, **options), inputs))


def check(actual, reference, inputs, **options) -> dict:
    """Values and gradients against the reference on clean inputs; returns the gradients by input name."""
    expected = checks.oracle(functools.partial(reference, **options), inputs)
    checks.assert_same(actual, expected)
    return dict(zip(sorted(inputs), actual[1], strict=True))


@pytest.mark.parametrize("poison", [np.nan, -np.inf], ids=str)
@pytest.mark.parametrize("subject, form", by_form(MASKED))
def test_masked_keys_do_not_exist(subject, form, poison):
    """Neither their numbers nor NaN in them reach an output, a normaliser or a gradient; their own gradient is exactly 0."""
    inputs = subject.inputs(length=T)
    bad = poisoned(inputs, ~KEY_MASK[:, 0, 0], poison)
    actual = masked_program(subject, label(form))(bad, KEY_MASK)
    gradients = check(actual, references.reference_of(subject), inputs, mask=KEY_MASK)
    for name in set(inputs) - {"query"}:
        assert not np.any(np.asarray(gradients[name])[~KEY_MASK[:, 0, 0]]), f"a masked {name} has a gradient"


@pytest.mark.parametrize("subject, form", by_kind(REMOVABLE))
def test_masking_equals_removing(subject, form):
    """Without causality a masked key may as well be cut out."""
    inputs = subject.inputs(length=T, batch=1)
    keep = KEY_MASK[0, 0, 0]
    cut = inputs | {name: inputs[name][:, keep] for name in ("key", "value")}
    call = functools.partial(subject.call, is_causal=False, **form)
    masked = checks.value_and_grads(functools.partial(call, mask=KEY_MASK[:1]), inputs)
    removed = checks.value_and_grads(call, cut)
    checks.assert_close(masked[0], removed[0], checks.OUTPUT)
    masked, removed = (dict(zip(sorted(inputs), result[1])) for result in (masked, removed))
    for name in ("key", "value"):
        masked[name] = masked[name][:, keep]
    checks.assert_close(masked, removed, checks.GRADIENT, "gradient")


@pytest.mark.parametrize("subject, form", by_kind(UNPADDABLE))
def test_padding_equals_removing(subject, form):
    """A token that is masked may as well be cut out, its query too."""
    inputs = subject.inputs(length=T, batch=1)
    keep = KEY_MASK[0, 0, 0]
    call = functools.partial(subject.call, is_causal=False, **form)
    masked = checks.value_and_grads(lambda x: call(x, mask=KEY_MASK[:1])[:, keep], inputs)
    removed = checks.value_and_grads(call, {name: x[:, keep] for name, x in inputs.items()})
    masked = (masked[0], [x[:, keep] for x in masked[1]])
    checks.assert_same(masked, removed)


@pytest.mark.parametrize("subject, form", by_kind(MASKED))
def test_rows_with_nothing_to_attend(subject, form):
    """One batch row fully masked, and first keys masked under causality: 0, with zero gradients, and finite for the others."""
    inputs = subject.inputs(length=T)
    mask = np.ones((B, 1, 1, T), bool)
    mask[0], mask[1, ..., :3] = False, False
    output, gradients = masked_program(subject, label(form))(inputs, mask)
    assert not np.any(np.asarray(output)[0]) and not np.any(np.asarray(output)[1, :3])
    for name, gradient in zip(sorted(inputs), gradients, strict=True):
        assert not np.any(np.asarray(gradient)[0]), f"{name}: gradient of a fully masked row"
        assert np.all(np.isfinite(gradient)), f"{name}: gradient is not finite"
        if name in ("query", "key", "value", "inputs"):
            assert not np.any(np.asarray(gradient)[1, :3]), f"{name}: gradient of rows without keys, or of masked keys"


@pytest.mark.parametrize("subject, form", by_kind(MIXER_SUBJECTS))
@pytest.mark.parametrize("shape", [(1, 1, 1, T), (B, 1, 1, T), (1, 1, T), (T,)], ids=str)
def test_key_masks_broadcast(subject, form, shape):
    mask = np.broadcast_to(KEY_MASK[:1] if np.prod(shape) == T else KEY_MASK, (B, 1, 1, T))
    call = jax.jit(functools.partial(subject.call, **form))
    narrow = call(subject.inputs(length=T), mask=mask[:1].reshape(shape) if np.prod(shape) == T else mask)
    checks.assert_identical(narrow, call(subject.inputs(length=T), mask=mask))


@pytest.mark.parametrize(
    "subject, form, is_causal",
    [
        pytest.param(*pair.values, is_causal, id=f"{pair.id}-{'causal' if is_causal else 'bidirectional'}")
        for pair in by_form(PAIRWISE)
        for is_causal in ((True, False) if pair.values[0].bidirectional else (True,))
    ],
)
def test_any_mask_of_pairs(subject, form, is_causal):
    """An empty row, an empty head and an empty column among random pairs, with NaN in the key that nobody sees."""
    inputs = subject.inputs(length=T)
    hidden = np.zeros((B, T), bool)
    hidden[:, 5] = True
    bad = poisoned(inputs, hidden, np.nan)
    options = {"mask": pair_mask(), "is_causal": is_causal}
    actual = checks.value_and_grads(functools.partial(subject.call, **options, **form), bad)
    gradients = check(actual, references.reference_of(subject), inputs, **options)
    assert not np.any(np.asarray(gradients["key"])[:, 5]) and not np.any(np.asarray(gradients["value"])[:, 5])


@pytest.mark.parametrize(
    "shape", [(B, 1, T, T), (1, N, T, T), (1, 1, T, T), (T, T), (N, T, T), (B, N, 1, T), (B, N, T, 1)], ids=str
)
@pytest.mark.parametrize("subject, form", by_form(PAIRWISE))
def test_masks_of_pairs_broadcast(subject, form, shape):
    inputs, mask = subject.inputs(length=T), np.random.default_rng(1).random(shape) < 0.6
    call = jax.jit(functools.partial(subject.call, **form))
    checks.assert_close(call(inputs, mask=mask), call(inputs, mask=np.broadcast_to(mask, (B, N, T, T))), checks.OUTPUT)


@pytest.mark.parametrize("shape", [(B, N, T, T), (B, 1, T, T), (1, 1, 1, T), (N, 1, T), (T, T)], ids=str)
@pytest.mark.parametrize("subject, form", by_form(PAIRWISE))
def test_biases_broadcast_and_learn(subject, form, shape):
    """A bias of any broadcastable shape, and its gradient in that shape."""
    inputs = subject.inputs(length=T) | {"bias": np.random.default_rng(2).normal(size=shape).astype(np.float32)}

    def reference(inputs):
        tokens = {name: array for name, array in inputs.items() if name != "bias"}
        return references.reference_of(subject)(tokens, bias=inputs["bias"])

    actual = checks.value_and_grads(functools.partial(subject.call, **form), inputs)
    expected = checks.oracle(reference, inputs)
    checks.assert_same(actual, expected)


@pytest.mark.parametrize("subject, form", by_form(PAIRWISE))
def test_minus_infinity_in_a_bias(subject, form):
    """Single pairs, a whole row and a whole column of -inf: excluded, and nobody else is poisoned."""
    bias = np.random.default_rng(3).normal(size=(B, N, T, T)).astype(np.float32)
    bias[np.random.default_rng(4).random(bias.shape) < 0.3] = -np.inf
    bias[0, 1, 4], bias[1, 2], bias[1, :, :, 0] = -np.inf, -np.inf, -np.inf
    inputs = subject.inputs(length=T)
    output, gradients = checks.value_and_grads(lambda x: subject.call(x[0], bias=x[1], **form), (inputs, bias))
    expected = checks.oracle(functools.partial(references.reference_of(subject), bias=bias), inputs)
    checks.assert_close(output, expected[0], checks.OUTPUT)
    checks.assert_close(gradients[:-1], expected[1], checks.GRADIENT, "gradient")
    assert np.all(np.isfinite(gradients[-1])) and not np.any(np.asarray(gradients[-1])[np.isinf(bias)])


@pytest.mark.parametrize("subject, form", by_form(PAIRWISE))
def test_logits_of_any_size(subject, form):
    """Scores in the thousands neither overflow nor lose rows, and finite floors in a bias act as masks do."""
    inputs = subject.inputs(length=T)
    inputs |= {"query": 300 * inputs["query"], "key": 300 * inputs["key"]}
    actual = checks.value_and_grads(functools.partial(subject.call, **form), inputs)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(actual))
    weights_of_one = jax.jit(functools.partial(subject.call, **form))(inputs | {"value": np.ones_like(inputs["value"])})
    np.testing.assert_allclose(weights_of_one, 1.0, atol=1e-6)
    floor = np.where(pair_mask(), 0.0, np.finfo(np.float32).min).astype(np.float32)
    call = jax.jit(functools.partial(subject.call, **form))
    floored, masked = (call(subject.inputs(length=T), **seen) for seen in ({"bias": floor}, {"mask": pair_mask()}))
    some = np.any(pair_mask() & np.tri(T, dtype=bool), axis=-1).swapaxes(1, 2)
    seen = some & np.any(
        np.asarray(masked) != 0, axis=-1
    )  # a pattern may leave a row nothing, which is 0 under a mask alone
    assert np.all(seen == some) or (subject.entry.options and seen.sum() > some.sum() / 2)
    checks.assert_close(np.asarray(floored)[seen], np.asarray(masked)[seen], checks.OUTPUT)


@pytest.mark.parametrize("under_jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("subject", KEYWISE, ids=repr)
def test_linear_time_mixers_refuse_pairs(subject, under_jit):
    """An arbitrary T x S mask, a mask by head and a bias are errors that say what to pass instead."""
    inputs = subject.inputs(length=T)
    for refused in (
        {"mask": np.ones((B, 1, T, T), bool)},
        {"mask": np.ones((T, T), bool)},
        {"bias": np.zeros((B, N, T, T), np.float32)},
    ):
        (name, array), call = next(iter(refused.items())), subject.call
        call = jax.jit(functools.partial(call, **refused)) if under_jit else functools.partial(call, **refused)
        with pytest.raises(ValueError, match=name) as caught:
            call(inputs)
        message = str(caught.value)
        if name == "mask":
            assert str(array.shape) in message, message
            assert "segment_ids" in message or "1, 1, S" in message or "is_causal" in message, message


@pytest.mark.parametrize("subject, form", by_stateful_kind(MASKED))
def test_nan_in_a_masked_prefix_does_not_enter_the_state(subject, form):
    """Left padding: poisoned padding before a prompt changes neither the state's effect nor its gradient."""
    inputs = subject.inputs(length=T)
    mask = np.ones((B, 1, 1, T), bool)
    mask[..., :3] = False
    bad = poisoned(inputs, ~mask[:, 0, 0], np.nan)

    def resumed(inputs):
        _, state = subject.call(time_slice(inputs, 0, 5), mask=mask[..., :5], return_state=True, **form)
        return subject.call(time_slice(inputs, 5, T), mask=mask[..., 5:], initial_state=state, **form)

    output, gradients = checks.value_and_grads(resumed, bad)
    whole = jax.jit(functools.partial(subject.call, mask=mask, **form))(inputs)
    checks.assert_close(output, whole[:, 5:], checks.OUTPUT)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)
