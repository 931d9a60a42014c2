"""The kernels that `MultiHeadAttention` goes around: lines of `attention.MIXERS` and `position.MIXERS`, their arguments and first weights.

Tables by distance or place stand for products p U of layer-normalised embeddings and BERT's projections, U ~ N(0, 0.02^2): N(0, 0.02^2 D)
"""

import functools
import inspect
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax import attention, position
from effattn_jax._contract import Mixer

LINES: dict[str, Mixer] = attention.MIXERS | position.MIXERS

BERT_STD = 0.02
SHAW_REACH = 16  # the paper's
DISENTANGLED_REACH = 64
_BY_PLACING = ("base", "leak", "sinks", "interleaved")  # arguments that `Placing` fills in


def line(kernel: str) -> Mixer:
    """The kernel's line of its table, or the ValueError for an unknown name."""
    if kernel not in LINES:
        raise ValueError(f"kernel must be among {tuple(LINES)}; got {kernel!r}")
    return LINES[kernel]


def arguments(kernel: str) -> frozenset[str]:
    """The names of its arguments."""
    return frozenset(inspect.signature(line(kernel).function).parameters)


def options(kernel: str) -> frozenset[str]:
    """The names of its arguments that are settings, not arrays nor states nor what positions decide, and of those of its weights."""
    parameters = inspect.signature(line(kernel).function).parameters.values()
    plain = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and isinstance(p.default, bool | int | float | str)}
    more = {"implementation", "logits_soft_cap", "scale", *line(kernel).options} & arguments(kernel)
    return frozenset(
        (plain | more | weight_options(kernel)) - {"is_causal", "return_state", "return_weights", *_BY_PLACING}
    )


def weight_options(kernel: str) -> frozenset[str]:
    """The names of settings of its weights, such as how many random features there are."""
    make = weights(kernel)
    parameters = inspect.signature(make).parameters.values() if make is not None else ()
    return frozenset(p.name for p in parameters if p.default is not p.empty)


def has_positions(kernel: str) -> bool:
    """Whether positions are part of it."""
    return kernel in position.MIXERS


def takes_window(kernel: str) -> bool:
    """Whether `window` limits what it sees; ReRoPE's is a distance beyond which positions stop growing."""
    return "window" in arguments(kernel) and kernel != "rerope"


def has_causal_form(kernel: str) -> bool:
    """Whether it can look at the past alone."""
    return "causality" not in line(kernel).exempt


def has_tables(kernel: str) -> bool:
    """Whether its weights are tables of places."""
    make = weights(kernel)
    return make is not None and "length" in inspect.signature(make).parameters


def weights(kernel: str) -> Callable | None:
    """How its first weights are made, as `Mixer.weights` says; None where it has none."""
    return _WEIGHTS.get(kernel, line(kernel).weights)


@functools.cache
def drawn(kernel: str, seed: int, *sizes: int, **settings: int) -> Mapping[str, np.ndarray]:
    """The weights of a kernel as constants: drawn once, while the caller is being traced too."""
    with jax.ensure_compile_time_eval():
        return {name: np.asarray(x) for name, x in weights(kernel)(jax.random.key(seed), *sizes, **settings).items()}


def further_flops(kernel: str, heads: int, kv_heads: int, head_dim: int, seen: int) -> int:
    """Operations a token on weights with places: products with the rows of tables, and of further features for each key seen."""
    inner, waves = heads * head_dim, _waves(head_dim)
    return {
        "shaw": 4 * (2 * SHAW_REACH + 1) * inner,
        "disentangled": 8 * DISENTANGLED_REACH * inner,
        "xl": 2 * waves * (inner + heads * seen),
        "tupe": 2 * (head_dim + 2) * heads * seen,
        "linformer": 4 * seen * kv_heads * head_dim,
    }.get(kernel, 0)


def _shaw(rng, num_heads, num_kv_heads, head_dim):
    """One vector a distance for all heads, as in the paper, Glorot's initialisation."""
    shape = (2 * SHAW_REACH + 1, head_dim)
    keys, values = jax.random.split(rng)
    make = jax.nn.initializers.glorot_uniform()
    return {"key_table": make(keys, shape), "value_table": make(values, shape)}


def _disentangled(rng, num_heads, num_kv_heads, head_dim):
    shape = (2, 2 * DISENTANGLED_REACH, num_heads, head_dim)
    keys, queries = BERT_STD * (num_heads * head_dim) ** 0.5 * jax.random.normal(rng, shape)
    return {"key_table": keys, "query_table": queries}


def _transformer_xl(rng, num_heads, num_kv_heads, head_dim):
    """As many sinusoids as a head has features, for the paper's D, and by so much larger weights of them."""
    waves = _waves(head_dim)
    relative, biases = jax.random.split(rng)
    content, place = BERT_STD * jax.random.normal(biases, (2, num_heads, head_dim))
    wide = BERT_STD * (num_heads * head_dim / waves) ** 0.5
    relative = wide * jax.random.normal(relative, (waves, num_heads, head_dim))
    return {"relative_key": relative, "content_bias": content, "position_bias": place}


def _tupe(rng, num_heads, num_kv_heads, head_dim, length):
    """Row by row, so that a longer table begins with the shorter one; the first token's scores begin at 0."""

    def row(place):
        noise = jax.random.normal(jax.random.fold_in(rng, place), (2, num_heads, head_dim))
        return BERT_STD * (num_heads * head_dim) ** 0.5 * noise

    rows = jax.vmap(row)(jnp.arange(length))
    return {"position_query": rows[:, 0], "position_key": rows[:, 1], "first_token": jnp.zeros((num_heads, 2))}


def _linformer(rng, num_heads, num_kv_heads, head_dim, length, rows=attention.LINFORMER_ROWS):
    """E and F with a column a place, shared by the heads; sums of independent keys keep the keys' size whatever the length is."""
    del num_heads, num_kv_heads, head_dim
    first, second = jax.random.normal(rng, (2, rows, length)) / length**0.5
    return {"key_projection": first, "value_projection": second}


def _waves(head_dim: int) -> int:
    return head_dim + head_dim % 2


_WEIGHTS = {
    "shaw": _shaw, "disentangled": _disentangled, "xl": _transformer_xl, "tupe": _tupe, "linformer": _linformer,
}  # fmt: skip
