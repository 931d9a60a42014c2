"""Cross-entropy, accuracy and squared error: values, masks, extremes and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax.objectives import accuracy, cross_entropy, squared_error


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits, weights = 5 * rng.normal(size=(3, 7, 11)), rng.random((3, 7))
    return logits.astype(np.float32), rng.integers(0, 11, (3, 7)).astype(np.int32), weights.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function, predictions, *rest):
    """((loss, weight), gradient of the loss by the predictions)."""
    return jax.value_and_grad(function, has_aux=True)(predictions, *rest)


compiled = jax.jit(cross_entropy)


def oracle(logits, targets, weights):
    logits = np.asarray(logits, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_probability, np.asarray(targets)[..., None], -1)[..., 0]
    return (loss * np.asarray(weights, np.float64)).sum()


def test_values_and_gradient(batch):
    (loss, weight), gradient = value_and_gradient(cross_entropy, *batch)
    np.testing.assert_allclose(loss, oracle(*batch), rtol=1e-5)
    np.testing.assert_allclose(weight, batch[2].sum(), rtol=1e-6)
    p = np.exp(batch[0])
    expected = (p / p.sum(axis=-1, keepdims=True) - np.eye(11)[batch[1]]) * batch[2][..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_parts_of_a_batch_add_up(batch):
    whole = compiled(*batch)
    parts = [compiled(*(x[i] for x in batch)) for i in range(3)]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-5)


def test_weight_zero_is_not_seen(batch):
    logits, targets, weights = batch
    unseen = weights < 0.5
    weights = np.where(unseen, np.float32(0), weights)
    hidden = np.where(unseen[..., None], np.float32(np.nan), logits), np.where(unseen, np.int32(-100), targets)
    found, gradient = jax.device_get(value_and_gradient(cross_entropy, *hidden, weights))
    np.testing.assert_allclose(found, compiled(logits, targets, weights), rtol=1e-6)
    assert np.all(gradient[unseen] == 0) and np.all(np.isfinite(gradient))
    assert compiled(logits, targets, np.zeros_like(weights)) == (0, 0)


@pytest.mark.parametrize(("dtype", "classes"), [(jnp.uint8, 256), (jnp.int8, 128), (jnp.int16, 40000), (jnp.uint32, 7)])
def test_targets_of_any_integer_type(dtype, classes):
    """The number of classes need not fit the type of the targets, as 256 bytes do not fit uint8."""
    targets = np.array([0, 5, jnp.iinfo(dtype).max if classes > 7 and dtype != jnp.int16 else 6], dtype)
    logits, targets = jnp.asarray(np.zeros((3, classes), np.float32)), jnp.asarray(targets)
    for compute in (cross_entropy, compiled):
        found = compute(logits, targets)[0]
        np.testing.assert_allclose(found, 3 * np.log(classes), rtol=1e-6)
    assert np.isnan(compiled(np.zeros((3, 6), np.float32), targets)[0])


@pytest.mark.parametrize("offset", [1e4, -1e6, 1e8])
def test_what_is_common_to_all_classes_changes_nothing(offset):
    logits = np.float32([[0.0, 8.0, 16.0, 24.0]])  # multiples of 8, which float32 holds at 1e8
    expected = compiled(logits, np.array([1]))[0]
    np.testing.assert_allclose(compiled(logits + np.float32(offset), np.array([1]))[0], expected, rtol=1e-6)


def test_no_classes_and_no_outputs_are_refused():
    for function, shape, name in (
        (cross_entropy, (), "logits"),
        (accuracy, (2, 0), "logits"),
        (squared_error, (2, 0), "predictions"),
    ):
        targets = np.zeros(shape) if function is squared_error else np.zeros(shape[:-1], int)
        with pytest.raises(ValueError, match=f"{name} must be"):
            function(np.zeros(shape), targets)


def test_extreme_logits():
    huge = np.float32([[1e30, -1e30, 0.0], [-1e30, 1e30, 0.0]])
    loss, _ = compiled(huge, np.array([0, 1]))
    assert loss == 0
    excluded = np.float32([[0.0, 0.0, -np.inf]])
    (loss, _), gradient = value_and_gradient(cross_entropy, excluded, np.array([0]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.5, 0.5, 0.0]], atol=1e-6)
    assert compiled(excluded, np.array([2]))[0] == np.inf


def test_target_out_of_range_is_nan_not_a_wrong_number(batch):
    logits, targets, _ = batch
    for wrong in (-1, 11):
        targets[0, 0] = wrong
        assert np.isnan(compiled(logits, targets)[0])


def test_bfloat16_logits_are_summed_in_float32(batch):
    loss, weight = compiled(batch[0].astype(jnp.bfloat16), *batch[1:])
    assert loss.dtype == weight.dtype == jnp.float32
    np.testing.assert_allclose(loss, oracle(batch[0].astype(jnp.bfloat16), *batch[1:]), rtol=1e-5)


def test_accuracy(batch):
    logits, targets, weights = batch
    correct, weight = accuracy(logits, targets, weights)
    np.testing.assert_allclose(correct, np.sum(np.asarray(weights)[np.argmax(logits, -1) == targets]), rtol=1e-6)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("function", [cross_entropy, accuracy])
def test_errors(function):
    logits, targets = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"targets must have the shape .* \(2, 3\); got \(2, 4\)"):
        function(logits, np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match="targets must be integers; got float32"):
        function(logits, targets.astype(np.float32))
    with pytest.raises(ValueError, match=r"weights must have the shape .* \(2, 3\); got \(2,\)"):
        function(logits, targets, np.ones(2, np.float32))


def test_squared_error():
    """Against a loop over positions; weight 0 hides NaN from value and gradient; parts add up; float32 sums."""
    rng = np.random.default_rng(0)
    outputs, targets = rng.standard_normal((2, 3, 5, 2)).astype(np.float32)
    weights = np.where(rng.random((3, 5)) < 0.3, 0, rng.random((3, 5))).astype(np.float32)
    expected, gradient = 0.0, np.zeros_like(outputs)
    for i, j in np.ndindex(3, 5):
        expected += weights[i, j] * sum((outputs[i, j, o] - targets[i, j, o]) ** 2 for o in range(2)) / 2
        gradient[i, j] = weights[i, j] * (outputs[i, j] - targets[i, j])
    hidden = (weights == 0)[..., None]
    poisoned = np.where(hidden, np.float32(np.nan), outputs), np.where(hidden, np.float32(np.inf), targets), weights
    (loss, weight), found = value_and_gradient(squared_error, *poisoned)
    np.testing.assert_allclose([loss, weight], [expected, weights.sum()], rtol=1e-5)
    np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)
    compiled = jax.jit(squared_error)
    parts = [compiled(*(x[i] for x in poisoned)) for i in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), [loss, weight], rtol=1e-5)
    half, count = compiled(poisoned[0].astype(jnp.bfloat16), targets)
    assert half.dtype == count.dtype == jnp.float32 and count == 15
    with pytest.raises(ValueError, match=r"targets must have the shape of predictions, \(3, 5, 2\); got \(3, 5\)"):
        squared_error(outputs, weights)
    with pytest.raises(ValueError, match=r"weights must have the shape .* \(3, 5\); got \(3, 5, 2\)"):
        squared_error(outputs, targets, outputs)
