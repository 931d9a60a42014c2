"""Which lines of `nn.MIXERS` a test of models runs: one of each wiring, for the kernels themselves are the laws' business.

Two lines are wired alike if they make the same module with the same fields (other values), around kernels with the same needs and a state of the same
structure: all feature maps of linear attention, say. LAWS=all runs every line.
"""

import os
from functools import partial
from typing import Any

import jax

from effattn_jax import attention, mixing, nn, position

KERNELS = {**mixing.MIXERS, **attention.MIXERS, **position.MIXERS}


def wiring(name: str) -> tuple[Any, ...]:
    """What tells one line of the table from another, the kernel apart."""
    line = nn.MIXERS[name]
    module, fields = (line.func, line.keywords) if isinstance(line, partial) else (line, {})
    mixer, kernel = line(16, heads=2, kv_heads=2, max_length=16, parent=None), KERNELS.get(fields.get("kernel"))
    needs = tuple(bool(getattr(kernel, need, None)) for need in ("extras", "weights"))
    kind = mixer.accepts_causal(), mixer.has_positions(), mixer.fixes_length()
    state = jax.tree.structure(jax.eval_shape(lambda: mixer.init_state(1, 16))) if mixer.accepts_causal() else None
    return module, frozenset(fields) - {"options"}, needs, kind, state


def representatives() -> tuple[str, ...]:
    """The first line of each wiring."""
    if os.environ.get("LAWS") == "all":
        return tuple(nn.MIXERS)
    first: dict[tuple, str] = {}
    for name in nn.MIXERS:
        first.setdefault(wiring(name), name)
    return tuple(first.values())


REPRESENTATIVES = representatives()
# One of each kind of module and of state, for what does not depend on the kernel.
KINDS = ("softmax", "linear", "gated_linear", "min_gru", "residual", "external", "gmlp", "dynamic_convolution")


def conv_width(mixer: str) -> int:
    """Short convolutions are the stack's, whatever the mixer: one of each kind is run behind one, the others without."""
    return 3 if mixer in KINDS else 0
