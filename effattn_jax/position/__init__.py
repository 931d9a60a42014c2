"""Positions: where a token stands, told to the model by angles, by biases on scores, or by what is added to its embedding.

Every function is pure and needs jax and numpy only. Angles are computed in float32 at least, whatever the type of the
activations, and integer positions are exact far beyond the range where a float32 product would be (see `angles.py`).
`MIXERS` is the table of attention with positions of its own, which the law tests run over.
"""

from functools import partial

from effattn_jax._contract import Mixer
from effattn_jax.position import _lines
from effattn_jax.position.absolute import (
    complex_order_embedding,
    floater_embedding,
    hierarchical_embedding,
    multiplicative_embedding,
)
from effattn_jax.position.biases import (
    Alibi,
    KerpleLog,
    KerplePower,
    PositionBias,
    Sandwich,
    T5Bias,
    alibi_slopes,
    t5_bucket,
)
from effattn_jax.position.frequencies import rotary_frequencies, yarn_temperature
from effattn_jax.position.lengths import log_length_scale, random_positions
from effattn_jax.position.linear import rotary_linear_attention
from effattn_jax.position.relative import disentangled_attention, shaw_attention
from effattn_jax.position.rerope import rerope_attention
from effattn_jax.position.rotation import rotary
from effattn_jax.position.sinusoidal import sinusoidal_embedding
from effattn_jax.position.untied import tupe_attention, xl_attention
from effattn_jax.position.xpos import xpos, xpos_attention, xpos_decay

__all__ = [
    "MIXERS",
    "Alibi",
    "KerpleLog",
    "KerplePower",
    "PositionBias",
    "Sandwich",
    "T5Bias",
    "alibi_slopes",
    "complex_order_embedding",
    "disentangled_attention",
    "floater_embedding",
    "hierarchical_embedding",
    "log_length_scale",
    "multiplicative_embedding",
    "random_positions",
    "rerope_attention",
    "rotary",
    "rotary_frequencies",
    "rotary_linear_attention",
    "shaw_attention",
    "sinusoidal_embedding",
    "t5_bucket",
    "tupe_attention",
    "xl_attention",
    "xpos",
    "xpos_attention",
    "xpos_decay",
    "yarn_temperature",
]

_FORMS = ({"implementation": "dense"}, {"implementation": "chunked", "chunk_size": 5})
_line = partial(Mixer, forms=_FORMS, pairwise=True, empty_state=_lines.cache_of, runs_on="softmax")
_COUNTS = {
    "removal": "its distances are counted among the tokens that are there: cutting a key alone out moves queries"
}

MIXERS: dict[str, Mixer] = {
    "shaw": _line(shaw_attention, weights=_lines.by_distance(7, "key_table"), exempt=_COUNTS),
    "disentangled": _line(
        disentangled_attention, weights=_lines.by_distance(8, "key_table", "query_table"), exempt=_COUNTS
    ),
    "xl": _line(xl_attention, weights=_lines.transformer_xl, exempt=_COUNTS),
    "tupe": _line(
        tupe_attention,
        weights=_lines.tupe,
        exempt=_COUNTS | {"length": "its tables have a row for each place of the longest sequence"},
    ),
    "rerope": _line(
        rerope_attention,
        options={"window": 3, "leak": 0.25},
        exempt=dict.fromkeys(
            ("removal", "padding"), "its distances count slots: cutting a key out moves those behind it"
        ),
    ),
    "xpos": _line(xpos_attention),
}
