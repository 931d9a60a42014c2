"""Pallas kernels for whatever platform a program is compiled for: Mosaic on a TPU, Triton on a GPU, interpreted on a CPU.

One body serves all three. It is written for what they share: programs that do not depend on each other, loops inside the body whose
state is in registers, blocks whose sizes are powers of two, and arrays whose last two axes are one block each, so that whatever
index moves at run time stands before them. Pallas is imported where a kernel is called, so that the package
imports without it. jax 0.12 lowers for a GPU with a DeprecationWarning: its Triton backend is to go, and the GPU branch with it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__: list[str] = []

_WARPS = 4  # of a program on a GPU
_STAGES = 2  # blocks that a loop on a GPU has under way


class Tile(NamedTuple):
    """What one program sees of an array: axes that are None are left out, and `index(*program)` says which block of each axis it is."""

    shape: tuple[int | None, ...]  # Mosaic wants the last two to be those of the array, or multiples of 8 and 128
    index: Callable


def launch(
    platform: str, body: Callable, grid: tuple[int, ...], inputs: Sequence[Tile], outputs: Sequence[Tile], shapes: Sequence[Any], arrays: Any,
    numbers: Sequence[jax.Array] = (), kept: Sequence[Any] = (),
) -> list[jax.Array]:  # fmt: skip
    """Runs `body(*number_refs, *input_refs, *output_refs, *kept_refs)` for every program of the grid; `shapes` are (shape, dtype) of the outputs.

    `numbers`, vectors of int32, are at hand before anything else is fetched: on a TPU the tiles' indices may depend on them. `kept`: (shape, dtype)
    of what a program finds as the one before it along the second axis left it.

    The first axis of the grid is parallel. A second one is for a TPU, which runs it in order: a program finds in an output that has the same
    block for all of them what the one before it wrote there.

    Inside `jax.shard_map` all arrays vary over the same mesh axes, as `_derivatives.tie` makes them, and the outputs do too.
    """
    from jax.experimental import pallas as pl

    kind = jax.typeof(arrays[0])
    if any(kind.sharding.spec):
        raise ValueError(
            f"implementation='pallas' takes no arrays that an Explicit mesh shards, as {kind.sharding.spec} does: a kernel sees one device. "
            "Call it inside jax.shard_map"
        )
    name = "vma" if hasattr(kind, "vma") else "manual_axis_type"  # its older and its newer name
    varies = {name: getattr(kind, name)}
    specs = {
        "in_specs": [pl.BlockSpec(*tile) for tile in inputs],
        "out_specs": [pl.BlockSpec(*tile) for tile in outputs],
    }
    if platform == "gpu":
        specs["in_specs"] = [pl.BlockSpec(x.shape, lambda *_: (0,)) for x in numbers] + specs["in_specs"]
        placed = {"grid": grid} | specs
    else:
        from jax.experimental.pallas import tpu

        memory = [tpu.VMEM(*each) for each in kept]
        spec = tpu.PrefetchScalarGridSpec(num_scalar_prefetch=len(numbers), grid=grid, scratch_shapes=memory, **specs)
        placed = {"grid_spec": spec}
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(*shape, **varies) for shape in shapes],
        interpret=platform == "cpu",
        compiler_params=_parameters(platform, len(grid)),
        **placed,
    )(*numbers, *arrays)


def _parameters(platform: str, axes: int) -> Any:
    if platform == "tpu":
        from jax.experimental.pallas import tpu

        return tpu.CompilerParams(dimension_semantics=("parallel", *("arbitrary",) * (axes - 1)))
    if platform == "gpu":
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES)
    return None


def loop(low: Any, high: Any, step: Callable, state: Any) -> Any:
    """`lax.fori_loop` inside a body, with bounds that are not known when it is traced.

    With known ones it would be a scan, whose carry, blocks included, the interpreter would find to vary over other axes of a mesh than its result.
    """
    from jax.experimental import pallas as pl

    return lax.fori_loop(low + lax.min(pl.program_id(0), np.int32(0)), high, step, state)


def by_platform(function: Callable, *arrays: Any) -> Any:
    """`function(platform, *arrays)`, platform being "cpu", "tpu" or "gpu", and decided when the program is compiled."""
    return lax.platform_dependent(
        *arrays, cpu=partial(function, "cpu"), tpu=partial(function, "tpu"), default=partial(function, "gpu")
    )


def folding(function: Callable) -> Callable:
    """`function(*arrays) -> tuple of arrays`, under vmap called once, with the mapped axis folded into the first axis of everything.

    Pallas itself would put the mapped axis in front of the grid, of which Triton takes three axes at most and the later ones short.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return function(*arrays)

    @call.def_vmap
    def _(size, mapped, *arrays):
        wide = [x if m else jnp.broadcast_to(x[None], (size, *x.shape)) for x, m in zip(arrays, mapped, strict=True)]
        out = call(*(x.reshape(size * x.shape[1], *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in out), (True,) * len(out)

    return call
