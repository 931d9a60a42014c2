"""The core: h_t = a_t h_{t-1} + x_t elementwise, and S_t = diag(a_t) S_{t-1} + k_t v_t^T.

`RECURRENCES` is the table that the law tests and the benchmark run over.
"""

import numpy as np

from effattn_jax._contract import Recurrence
from effattn_jax.recurrence.diagonal import diagonal_recurrence
from effattn_jax.recurrence.fft import fft_convolution
from effattn_jax.recurrence.outer_product import outer_product_recurrence

__all__ = ["RECURRENCES", "diagonal_recurrence", "fft_convolution", "outer_product_recurrence"]


def _diagonal(rng, batch, length, dtype):
    shape = (batch, length, 8)
    return {"decay": rng.uniform(0.5, 1.0, shape).astype(dtype), "inputs": rng.normal(size=shape).astype(dtype)}


def _diagonal_complex(rng, batch, length, dtype):
    real = _diagonal(rng, batch, length, np.float64)
    phase = rng.uniform(-np.pi, np.pi, real["decay"].shape)
    kind = np.complex128 if dtype == np.float64 else np.complex64
    return {
        "decay": (real["decay"] * np.exp(1j * phase)).astype(kind),
        "inputs": (real["inputs"] * np.exp(2j * phase)).astype(kind),
    }


def _outer_product(decay_axes):
    def sample(rng, batch, length, dtype):
        shape = (batch, length, 2, 8)
        inputs = {name: rng.normal(size=shape).astype(dtype) for name in ("query", "key", "value")}
        if decay_axes:
            inputs["log_decay"] = -np.logaddexp(0, -2 - rng.normal(size=shape[:decay_axes])).astype(dtype)
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
