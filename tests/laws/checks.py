"""Comparison by relative RMS, float64 contexts, and values with gradients of a whole pytree."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

OUTPUT, GRADIENT, DOUBLE = 2e-6, 1e-5, 1e-12  # the tolerances of law 1: float32 outputs, float32 gradients, float64


@contextlib.contextmanager
def x64(enabled: bool = True):
    """Double precision inside the block, on every supported version of jax."""
    switch = getattr(jax, "enable_x64", None)
    if switch is None:
        from jax.experimental import enable_x64 as switch
    with switch(enabled):
        yield


def precision_of(dtype) -> tuple[float, float]:
    """(tolerance of outputs, tolerance of gradients) for inputs of this dtype."""
    return (DOUBLE, DOUBLE) if np.dtype(dtype) == np.float64 else (OUTPUT, GRADIENT)


def rms(array) -> float:
    """Root mean square over all entries, 0 for none."""
    array = np.asarray(array)
    wide = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    return float(np.sqrt(np.mean(np.abs(wide) ** 2))) if array.size else 0.0


def assert_close(actual, expected, tolerance: float, what: str = "output") -> None:
    """Leaf by leaf: RMS(actual - expected) <= tolerance * RMS(expected).

    A leaf far smaller than the tree's largest (a gradient that cancels to nothing, as query's with one key to see) is measured
    against a hundredth of the largest, for there rounding is relative to what cancelled.
    """
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves), (
        f"{what}: {len(actual_leaves)} leaves, expected {len(expected_leaves)}"
    )
    floor = 1e-2 * max([rms(leaf) for leaf in expected_leaves], default=0.0)
    for index, (a, e) in enumerate(zip(actual_leaves, expected_leaves)):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape, f"{what}[{index}]: shape {a.shape}, expected {e.shape}"
        assert np.all(np.isfinite(a)), f"{what}[{index}]: not finite"
        wide = np.complex128 if np.iscomplexobj(e) else np.float64
        error, scale = rms(a.astype(wide) - e.astype(wide)), max(rms(e), floor)
        assert error <= tolerance * scale, (
            f"{what}[{index}]: relative RMS {error / max(scale, 1e-300):.2e} > {tolerance:.0e}"
        )


def assert_same(actual, expected) -> None:
    """(output, gradients) against (output, gradients), in float32."""
    assert_close(actual[0], expected[0], OUTPUT)
    assert_close(actual[1], expected[1], GRADIENT, "gradient")


def assert_identical(actual, expected, what: str = "output") -> None:
    """Bit for bit, the sign of zero included."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape and a.dtype == e.dtype, f"{what}: {a.dtype}{a.shape}, expected {e.dtype}{e.shape}"
        changed = np.count_nonzero(a.ravel().view(np.uint8) != e.ravel().view(np.uint8))
        assert changed == 0, f"{what}: {changed} bytes differ"


def is_float(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split_floats(tree):
    """(the real and complex leaves, a function that puts such leaves back)."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [index for index, leaf in enumerate(leaves) if is_float(leaf)]

    def rebuild(floats):
        filled = list(leaves)
        for index, leaf in zip(places, floats, strict=True):
            filled[index] = leaf
        return jax.tree.unflatten(treedef, filled)

    return [leaves[index] for index in places], rebuild


def probe(tree, seed: int = 1):
    """A scalar that weighs every entry of every real or complex leaf with its own random weight."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for leaf in split_floats(tree)[0]:
        weights = rng.normal(size=leaf.shape)
        if jnp.iscomplexobj(leaf):
            weights = weights + 1j * rng.normal(size=leaf.shape)
        total = total + jnp.sum(jnp.real(leaf * jnp.asarray(weights, leaf.dtype)))
    return total


def value_and_grads(function, tree, *others):
    """(function(tree), gradients of its probe by the real and complex leaves of tree), in one compiled program; of further trees alike, all in a list."""
    _, rebuild = split_floats(tree)

    def loss(floats):
        output = function(rebuild(floats))
        return probe(output), output

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = [program(split_floats(each)[0]) for each in (tree, *others)]
    results = [(output, grads) for (_, output), grads in results]
    return results if others else results[0]


def widened(tree):
    """The same numbers in float64 or complex128; other leaves as they are."""

    def widen(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype.kind == "c":
            return leaf.astype(np.complex128)
        return leaf.astype(np.float64) if is_float(leaf) else leaf

    return jax.tree.map(widen, tree)


def oracle(reference, tree):
    """Values and gradients of a naive reference in float64, as NumPy arrays."""
    with x64():
        return jax.tree.map(np.asarray, value_and_grads(reference, jax.tree.map(jnp.asarray, widened(tree))))


def assert_sharding_changes_nothing(
    function, inputs: dict, axes: tuple[str, str], gradients: bool = True, shape: tuple[int, int] = (4, 2)
) -> None:
    """On an Explicit mesh of that shape the values, and gradients, of function(**arrays) are those of one device; inputs: (array, its spec) by name."""

    def run(arrays):
        if not gradients:
            return jax.jit(lambda arrays: (function(**arrays), []))(arrays)
        return value_and_grads(lambda arrays: function(**arrays), arrays)

    expected = jax.tree.map(np.asarray, run({name: array for name, (array, _) in inputs.items()}))
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(array, NamedSharding(mesh, spec)) for name, (array, spec) in inputs.items()}
        actual = jax.tree.map(np.asarray, run(placed))
    assert_same(actual, expected)
