"""State spaces and HiPPO: what is refused, in the words in which it is, and options that share a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn_jax import ssm
from effattn_jax.ssm import discretize, hippo_matrices, hippo_project, hippo_reconstruct

ONES = np.ones(3, np.float32)
POLES = -np.ones((3, 2), np.complex64)


def project(measure="legt", **options):
    return hippo_project(ONES, measure, 4, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hippo_matrices("leg", 4), "did you mean 'leg[st]'"),
        (lambda: hippo_matrices("legs", 4, window=1.0), "window is no option of measure='legs'"),
        (lambda: hippo_matrices("legs", True), "size must be a positive int; got True"),
        (lambda: hippo_matrices("fourier", 5), "size must be even"),
        (lambda: hippo_matrices("fourier_scaled", 4), "size must be odd"),
        (lambda: hippo_matrices("legt", 4, window=-1.0), "window must be a positive number"),
        (lambda: hippo_matrices("legt", 4, window=None), "window must be a positive number; got None"),
        (lambda: hippo_matrices("glagt", 4, alpha="x"), r"alpha must lie in \(-1, 1\); got 'x'"),
        (lambda: hippo_matrices("legs", 4, normalization="s"), "normalization='s' is unknown"),
        (lambda: hippo_matrices("legs", 4, normalization=["a"]), r"normalization=\['a'\] is unknown"),
        (lambda: hippo_matrices("fourier", 4, endpoint=["a"]), r"endpoint=\['a'\] is unknown"),
        (lambda: discretize(np.eye(3), np.ones(2), 0.1), r"got A \(3, 3\) and B \(2,\)"),
        (lambda: discretize(np.eye(3), np.ones(3), 0.1, "tustin"), "method='tustin' is unknown"),
        (lambda: discretize(np.eye(3), np.ones(3), 0.1, "generalized", 2.0), r"alpha must lie in \[0, 1\]"),
        (lambda: discretize(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(5)), r"got step \(5,\) and A \(2, 3\)"),
        (lambda: project(step=0.1, timestamps=np.arange(4)), "step has no meaning"),
        (lambda: project(method="exakt"), "did you mean 'exact'"),
        (lambda: project(initial_state=jnp.ones(4)), "must be a HippoState"),
        (lambda: project("legs", method="generalized", rule_alpha=2.0), r"rule_alpha must lie in \[0, 1\]"),
        (lambda: project("legs", alpha=0.2, rule_alpha=0.3), "alpha must not come with rule_alpha"),
        (lambda: hippo_project(jnp.ones(3, int), "legs", 4), "signal must be real floating"),
        (lambda: hippo_reconstruct(jnp.ones(4), "fourier_diag", [0.5]), "no basis"),
        (lambda: ssm.dss_kernel(-ONES, ONES[:2], 0.1, 4), r"W must have shape \(3,\); got \(2,\)"),
        (lambda: ssm.dss_kernel(-ONES, ONES, ONES, 4), r"step must have shape \(\) beside Lambda \(3,\); got \(3,\)"),
        (lambda: ssm.dss_kernel(-ONES, ONES * 1j, 0.1, 4), "W must be real where Lambda is"),
        (
            lambda: ssm.s5_ssm(ONES[None], -ONES[:1], np.ones((1, 1)) * 1j, np.ones((1, 1)), None, 1.0),
            "B and C must be real where Lambda is",
        ),
        (
            lambda: ssm.s5_ssm(ONES[None], -ONES[:1], np.ones((1, 1)), np.ones((1, 1)) * 1j, None, 1.0),
            "B and C must be real where Lambda is",
        ),
        (lambda: ssm.rg_lru(*[ONES[None, None]] * 3, ONES, sharpness="8"), "sharpness must be a number; got '8'"),
        (lambda: ssm.diagonal_ssm(ONES[None, None], POLES, POLES, POLES, None, None), "step must be a .* got None"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("measure", ["legt", "legs"])
@pytest.mark.parametrize("step", [0.0, -1.0, np.nan, np.inf, True, "a", np.ones(3), 1j], ids=repr)
def test_a_step_is_one_positive_number(step, measure):
    with pytest.raises(ValueError, match="step must be one positive number"):
        project(measure, step=step)


def test_a_traced_step_is_given_as_times():
    with pytest.raises(ValueError, match="traced times are timestamps"):
        jax.jit(lambda step: project(step=step))(0.1)
    traced = jax.jit(lambda step: project(timestamps=step * jnp.arange(4.0)))(0.1)
    np.testing.assert_allclose(traced, project(step=np.float32(0.1)), rtol=1e-5)


@pytest.mark.parametrize(
    "timestamps, message",
    [
        (np.arange(3), r"T \+ 1 edges"),
        ("abcd", r"T \+ 1 edges .* got 'abcd'"),
        (1j * np.arange(4), "real numbers .* got complex128"),
        ([0.0, 1.0, np.nan, 2.0], "finite and not decrease"),
        ([0.0, 1.0, 2.0, np.inf], "finite and not decrease"),
        (jnp.array([0.0, 2.0, 1.0, 3.0]), "finite and not decrease"),
    ],
)
def test_timestamps_are_edges(timestamps, message):
    with pytest.raises(ValueError, match=message):
        project("legs", timestamps=timestamps)


@pytest.mark.parametrize("method", ["zoh", "generalized"])
def test_a_measure_keeps_its_alpha(method):
    """Both have one of that name; alone it is the measure's, or the rule's where the measure has none."""
    weight = {"rule_alpha": 0.8} if method == "generalized" else {}
    options = {"alpha": 0.3, "beta": 0.5}
    A, B = discretize(*hippo_matrices("glagt", 4, **options), 0.1, method, 0.8)
    states = project("glagt", method=method, step=0.1, **options, **weight)
    x = np.zeros(4)
    for state in states:
        x = A @ x + B
        np.testing.assert_allclose(state, x, rtol=1e-5)
    by_rule = project("glagt", method="generalized", rule_alpha=0.8)
    assert np.array_equal(by_rule, project("glagt", method="generalized", alpha=0.0, rule_alpha=0.8))
    with pytest.raises(ValueError, match="with method='generalized' say the weight too, as rule_alpha; got alpha=0.8"):
        project("glagt", method="generalized", alpha=0.8)
    rule = {"method": "generalized", "step": 0.1}
    assert np.array_equal(project(alpha=0.8, **rule), project(rule_alpha=0.8, **rule))
