"""The core: h_t = a_t h_{t-1} + x_t elementwise, and S_t = diag(a_t) S_{t-1} + k_t v_t^T.

`RECURRENCES` is the table that the law tests and the benchmark run over.
"""

import jax
import jax.numpy as jnp

from effattn_jax._contract import Recurrence
from effattn_jax.recurrence.diagonal import diagonal_recurrence
from effattn_jax.recurrence.fft import fft_convolution
from effattn_jax.recurrence.outer_product import outer_product_recurrence

__all__ = ["RECURRENCES", "diagonal_recurrence", "fft_convolution", "outer_product_recurrence"]


def _diagonal(rng, batch, length, dtype):
    key_a, key_x = jax.random.split(rng)
    shape = (batch, length, 8)
    decay = jax.random.uniform(key_a, shape, jnp.float32, 0.5, 1.0)
    return {"decay": decay.astype(dtype), "inputs": jax.random.normal(key_x, shape, jnp.float32).astype(dtype)}


def _diagonal_complex(rng, batch, length, dtype):
    key_phase, rest = jax.random.split(rng)
    real = _diagonal(rest, batch, length, jnp.float32)
    phase = jax.random.uniform(key_phase, real["decay"].shape, jnp.float32, -jnp.pi, jnp.pi)
    decay = real["decay"] * jnp.exp(1j * phase)
    kind = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    return {"decay": decay.astype(kind), "inputs": (real["inputs"] * jnp.exp(2j * phase)).astype(kind)}


def _outer_product(decay_axes):
    def sample(rng, batch, length, dtype):
        keys = jax.random.split(rng, 4)
        shape = (batch, length, 2, 8)
        query, key, value = (jax.random.normal(k, shape, jnp.float32).astype(dtype) for k in keys[:3])
        inputs = {"query": query, "key": key, "value": value}
        if decay_axes:
            log_decay = jax.nn.log_sigmoid(2 + jax.random.normal(keys[3], shape[:decay_axes], jnp.float32))
            inputs["log_decay"] = log_decay.astype(dtype)
        return inputs

    return sample


_DIAGONAL_FORMS = ({"implementation": "scan"}, {"implementation": "associative"}, {"implementation": "chunked"})
_CHUNKED_FORMS = ({"implementation": "scan"}, {"implementation": "parallel", "chunk_size": 5}, {"chunk_size": 5})

RECURRENCES: dict[str, Recurrence] = {
    "diagonal": Recurrence(diagonal_recurrence, _DIAGONAL_FORMS, _diagonal),
    "diagonal_complex": Recurrence(diagonal_recurrence, _DIAGONAL_FORMS, _diagonal_complex, runs_on="diagonal"),
    "outer_product": Recurrence(
        outer_product_recurrence, _CHUNKED_FORMS, _outer_product(0), runs_on="outer_product_decay"
    ),
    "outer_product_decay": Recurrence(outer_product_recurrence, _CHUNKED_FORMS, _outer_product(3)),
    "outer_product_feature_decay": Recurrence(
        outer_product_recurrence, _CHUNKED_FORMS, _outer_product(4), runs_on="outer_product_decay"
    ),
}
