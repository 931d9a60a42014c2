"""Explicit meshes beyond law 8: arrays over pairs, tables and biases of their own, sharded or on every device, in values and gradients."""

import functools

import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effattn_jax import attention, position
from tests.laws import checks

B, T, N, H = 8, 11, 4, 4
CHUNKED = {"is_causal": True, "implementation": "chunked", "chunk_size": 5}
ROWS, BOTH = P("data"), P("data", None, "heads")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, N, H)).astype(np.float32)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def pattern(name, **options):
    return lambda x, **arrays: attention.MIXERS[name].function(x, x, x, **arrays, **CHUNKED, **options)


def shaw(x, table, **options):
    return position.shaw_attention(x, x, x, key_table=table, value_table=table, is_causal=True, **options)


def with_kerple(x, scale, rate):
    return attention.dot_product_attention(x, x, x, position.KerpleLog(scale, rate), **CHUNKED)


PAIRS = RNG.random((B, 1, T, T)) < 0.8
PATTERNS = {
    "atrous": pattern("atrous", dilation=3),
    "strided": pattern("strided", stride=3),
    "sparse": pattern("sparse", window=2, dilation=3, num_global=1),
}
CASES = {
    **{f"{name}, mask": (f, {"x": (X, BOTH), "mask": (PAIRS, ROWS)}) for name, f in PATTERNS.items()},
    **{
        f"{name}, bias": (f, {"x": (X, BOTH), "bias": (normal(B, N, T, T), P("data", "heads"))})
        for name, f in PATTERNS.items()
    },
    "shaw, dense": (shaw, {"x": (X, ROWS), "table": (normal(7, H), P())}),
    "shaw, chunked": (
        functools.partial(shaw, implementation="chunked", chunk_size=5),
        {"x": (X, ROWS), "table": (normal(7, H), P())},
    ),
    "kerple": (with_kerple, {"x": (X, BOTH), "scale": (np.ones(N, np.float32), P()), "rate": (np.ones(N, np.float32), P())}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(case):
    checks.assert_sharding_changes_nothing(*CASES[case], ("data", "heads"))
