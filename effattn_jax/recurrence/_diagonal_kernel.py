"""The diagonal recurrence as a Pallas kernel: channels side by side, time step by step, the state in registers.

    h_t = a_t h_{t-1} + x_t        complex numbers as their real and imaginary parts

A program has up to so many channels of one row. Steps go in blocks, whose decays and inputs are all asked for before the first of them is used:
what a step waits for is then arithmetic, not memory. On a TPU a program has a stretch of time, as VMEM holds, and hands the state to the next.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effattn_jax._pallas import Tile, by_platform, folding, launch, loop

__all__: list[str] = []

_STEPS = 8  # of a block: a tile of float32 on a TPU
_CHANNELS = {"cpu": 128, "gpu": 128, "tpu": 512}  # of a program at most; not measured
_BLOCKS = {"cpu": None, "gpu": None, "tpu": 64}  # of steps that a program has; None: all


def _parts(x: jax.Array) -> list[jax.Array]:
    return [x.real, x.imag] if jnp.iscomplexobj(x) else [x]


def _step(decay: list[jax.Array], state: list[jax.Array], inputs: list[jax.Array]) -> list[jax.Array]:
    """a h + x; a decay of exactly 0 forgets NaN and Inf as well."""
    if len(decay) == 1:
        kept, nothing = [decay[0] * state[0]], decay[0] == 0
    else:
        (a, b), (c, d) = decay, state
        kept, nothing = [a * c - b * d, a * d + b * c], (a == 0) & (b == 0)
    return [jnp.where(nothing, 0, k) + x for k, x in zip(kept, inputs, strict=True)]


def _body(reverse: bool, stretches: int, parts: int, *refs: Any) -> None:
    """h of a stretch of time, refs (blocks, _STEPS, channels), and the state after it, (1, channels)."""
    from jax.experimental import pallas as pl

    decay, inputs, out, after = (refs[i * parts : (i + 1) * parts] for i in range(4))
    blocks, steps, channels = out[0].shape
    if stretches > 1:

        @pl.when(pl.program_id(1) == 0)
        def _():
            for ref in after:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        state = [ref[...] for ref in after]
    else:
        state = [jnp.zeros((1, channels), ref.dtype) for ref in after]
    order = range(steps)[:: -1 if reverse else 1]

    def block(i, state):
        i = blocks - 1 - i if reverse else i
        given = {t: [[ref[i, t : t + 1] for ref in group] for group in (decay, inputs)] for t in order}
        for t in order:
            state = _step(given[t][0], state, given[t][1])
            for ref, h in zip(out, state, strict=True):
                ref[i, t : t + 1] = h
        return state

    state = loop(np.int32(0), np.int32(blocks), block, state)
    for ref, h in zip(after, state, strict=True):
        ref[...] = h


def _run(reverse: bool, platform: str, *arrays: jax.Array, form: str | None = None) -> tuple[jax.Array, ...]:
    """h (B, T, channels) from decay and inputs likewise, each one array or its two parts; `form`, whose division of the work, if not the platform's."""
    form = form or platform
    parts, (batch, length, channels) = len(arrays) // 2, arrays[0].shape
    wide = min(_CHANNELS[form], max(16, 1 << (channels - 1).bit_length()))
    blocks = -(-length // _STEPS)
    each = min(_BLOCKS[form] or blocks, blocks)
    stretches, groups = -(-blocks // each), -(-channels // wide)
    blocks = stretches * each

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, blocks * _STEPS - length), (0, groups * wide - channels)])
        return x.reshape(batch, blocks, _STEPS, groups * wide)

    def stretch(p, t=0):
        return p // groups, stretches - 1 - t if reverse else t, 0, p % groups

    tile = Tile((None, each, _STEPS, wide), stretch)
    after = Tile((None, 1, wide), lambda p, t=0: (p // groups, 0, p % groups))
    dtype = arrays[0].dtype
    shapes = [((batch, blocks, _STEPS, groups * wide), dtype)] * parts + [((batch, 1, groups * wide), dtype)] * parts
    h = launch(
        platform, partial(_body, reverse, stretches, parts), (batch * groups,) + (stretches,) * (stretches > 1),
        [tile] * (2 * parts), [tile] * parts + [after] * parts, shapes, [cut(x) for x in arrays],
    )[:parts]  # fmt: skip
    return tuple(x.reshape(batch, blocks * _STEPS, groups * wide)[:, :length, :channels] for x in h)


def by_kernel(decay: jax.Array, inputs: jax.Array, reverse: bool) -> jax.Array:
    """h (B, T, ...) by the kernel, T >= 1."""
    batch, length, *rest = inputs.shape
    if 0 in (batch, *rest):
        return inputs
    arrays = [x.reshape(batch, length, prod(rest)) for whole in (decay, inputs) for x in _parts(whole)]
    h = folding(lambda *arrays: by_platform(partial(_run, reverse), *arrays))(*arrays)
    return (h[0] if len(h) == 1 else lax.complex(*h)).reshape(inputs.shape)
