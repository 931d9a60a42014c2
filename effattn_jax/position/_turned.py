"""The chunked form of linear attention with turned features: both sums of a chunk while its features are in cache.

    S_i = S_{i-1} + (R_i f_i) v_i^T,   z_i = z_{i-1} + f_i,   f = phi(k)          o_i = S_i^T R_i phi(q_i) / z_i . phi(q_i)

The sum below is the recurrence with values of no columns: M numbers a step, and no second outer product.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._contract import accumulator
from effattn_jax._derivatives import Fixed
from effattn_jax._products import row_products
from effattn_jax.recurrence._outer_chunks import Marks, Options, chunk, masked, normalized
from effattn_jax.recurrence._outer_kernel import SHORT, kept_states, over_chunks
from effattn_jax.recurrence._outer_pull import pull_chunk

__all__: list[str] = []

_FEW = 128  # features up to which a product that swaps them costs less than what follows


class Turned(NamedTuple):
    """What is done to a chunk, fixed at trace time."""

    feature_map: Callable  # of the last axis, for queries and for keys
    above: Options  # of the sum with turned features; without a normaliser
    below: Options | None  # of the sum of features as they are; None leaves it out
    split: bool  # whether sums are returned to be added to others: both apart, in the state's dtype
    by_product: bool = False  # how features are turned, see `turn_even`

    def kernel(
        self, query, key, value, extras, carry, *, size, strict=False, implementation=None, **marks
    ) -> tuple[Any, Any]:
        """The recurrence as a kernel of `attention._frame`; `extras` are cos and sin of queries and of keys, or of both."""
        arrays = (query, key, value, *extras)
        state = _start(self, *arrays[:3]) if carry is None else carry[:2]
        plan = self._replace(
            above=self.above._replace(strict=strict), below=self.below and self.below._replace(strict=strict)
        )
        if implementation is None and value.shape[1] > SHORT:

            def form(name):
                return lambda arrays, state, marks: plan._run(arrays, state, marks, size, name)

            forms = {"cpu": form("chunked"), "default": form("parallel")}
            out, state = jax.lax.platform_dependent(arrays, state, marks, **forms)
        else:
            out, state = plan._run(arrays, state, marks, size, implementation)
        return (out if self.split or self.below is None else out[0]), (*state, None)

    def _run(self, arrays, state, marks, size, implementation):
        parallel, value = implementation == "parallel", arrays[2]
        wide = state[0].shape[-2] > 256  # fewer, longer chunks then cost less memory in states than they cost in pairs
        size = min(size or (128 if parallel or wide else 64), value.shape[1])
        plan = self._replace(by_product=not parallel)
        if parallel and arrays[1].dtype == value.dtype == jnp.bfloat16:
            plan = plan._replace(above=self.above._replace(operands=value.dtype))
        body, pull = Fixed(_chunk, plan, value.dtype), Fixed(_pull, plan)

        kept = Fixed(_kept, state[0].dtype, state[1] is not None) if parallel else None
        return over_chunks(body, state, arrays, size=size, pull=pull, kept=kept, **marks)


def _start(plan: Turned, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Sums of nothing, made from the inputs."""
    dtype = accumulator(query, key, value)
    total = jnp.zeros_like(plan.feature_map(key[:, 0].astype(dtype)))
    state = jnp.zeros_like(jnp.einsum("bkm,bkv->bkmv", total, value[:, 0].astype(dtype)))
    return state, None if plan.below is None else total


def _kept(dtype: Any, normalized: bool, inputs: Any, marks: Marks) -> Any:
    return kept_states(dtype, normalized, (*inputs[:3], None), marks)


def _features(plan: Turned, marks: Marks, dtype: Any, inputs: Any) -> tuple:
    """Features as they are, features turned, and values of one chunk, each (B, C, heads, ...); what is masked is 0."""
    query, key, value, *waves = inputs
    key, value = (masked(x, marks.key_mask).astype(dtype) for x in (key, value))
    plain = plan.feature_map(query.astype(dtype)), masked(plan.feature_map(key), marks.key_mask)
    turned = tuple(turn_even(x, *w, plan.by_product) for x, w in zip(plain, (waves[:2], waves[-2:])))
    return plain, turned, value


def turn_even(features: jax.Array, cos: jax.Array, sin: jax.Array, by_product: bool = False) -> jax.Array:
    """Features (..., heads, M) turned by angles of these cosines and sines, (..., M div 2); an odd last one is left as it is.

    `by_product` swaps the halves of few features by a product with a matrix of 0 and 1: XLA for CPUs takes several times longer to join halves.
    """
    even = 2 * cos.shape[-1]
    cos, sin = (wave[..., None, :].astype(features.dtype) for wave in (cos, sin))
    if by_product and features.shape[-1] == even <= _FEW:
        half = np.eye(even // 2)
        swap = jnp.asarray(np.block([[0 * half, half], [-half, 0 * half]]), features.dtype)
        cos, sin = (jnp.concatenate([wave, wave], axis=-1) for wave in (cos, sin))
        return features * cos + jnp.matmul(features, swap, precision=jax.lax.Precision.HIGHEST) * sin
    first, second, rest = jnp.split(features, (even // 2, even), axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)


def _chunk(plan: Turned, out_dtype: Any, carry: Any, inputs: Any, marks: Marks) -> tuple[Any, Any]:
    """One chunk: states (B, K, M, V) and (B, K, M) before it, its steps, the states after it and the outputs."""
    state, total = carry
    plain, turned, value = _features(plan, marks, state.dtype, inputs)
    (state, _), above = chunk(plan.above, state.dtype, (state, None), (*turned, value, None), marks)
    if plan.below is None:
        return (state, None), above if plan.split else above.astype(out_dtype)
    (_, total), (_, below) = chunk(plan.below, state.dtype, *_without_columns(state, total, plain, value), marks)
    if plan.split:
        return (state, total), (above, below)
    return (state, total), (normalized(above, below).astype(out_dtype), below)


def _without_columns(state: jax.Array, total: Any, plain: tuple, value: jax.Array) -> tuple[tuple, tuple]:
    """(carry, inputs) of the sum below."""
    return (state[..., :0], total), (*plain, value[..., :0], None)


def _pull(plan: Turned, carry: Any, inputs: Any, marks: Marks, outputs: Any, d_carry: Any, d_out: Any) -> Any:
    """Cotangents of (carry, inputs) of one chunk."""
    (state, total), (d_state, d_total) = carry, d_carry
    (plain, turned, value), back = jax.vjp(partial(_features, plan, marks, state.dtype), inputs)
    d_above, d_below = _cotangents(plan, outputs, d_out, state.dtype)
    (d_state, _), (*d_turned, d_value, _) = pull_chunk(
        plan.above, (state, None), (*turned, value, None), marks, None, (d_state, None), d_above
    )
    d_plain = jax.tree.map(jnp.zeros_like, plain)
    if plan.below is not None:
        none = d_above[..., :0]
        (_, d_total), (*d_plain, _, _) = pull_chunk(
            plan.below, *_without_columns(state, total, plain, value), marks, None, (d_state[..., :0], d_total), (none, d_below)
        )  # fmt: skip
    (d_inputs,) = back((tuple(d_plain), tuple(d_turned), d_value))
    return (d_state, d_total), d_inputs


def _cotangents(plan: Turned, outputs: Any, d_out: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """Those of the sums above and below."""
    if plan.below is None:
        return d_out.astype(dtype), None
    if plan.split:
        return d_out
    (out, below), (d_out, d_below) = outputs, d_out
    # A row of 0 for want of keys, or of NaN, passes nothing back.
    some = (below != 0)[..., None] & jnp.isfinite(out)
    share = jnp.where(some, d_out.astype(dtype) / jnp.where(below == 0, 1, below)[..., None], 0)
    return share, d_below - row_products(share, jnp.where(some, out.astype(dtype), 0))
