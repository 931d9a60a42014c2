"""What the mixers of this room share: checked arguments with one batch axis, states that fit, and small steps over features."""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn_jax._contract import ArrayLike, accumulator, flags, floating
from effattn_jax._places import ids_without_padding
from effattn_jax._products import row_products, scaled_axis, scaled_rows

__all__: list[str] = []


class Tokens(NamedTuple):
    """The arguments of a mixer with one batch axis; padding is 0."""

    inputs: jax.Array  # (B, T, D)
    mask: jax.Array | None  # (B, T)
    segments: jax.Array | None  # (B, T), of padding those of the token before it
    batch: tuple[int, ...]

    def finish(self, out: jax.Array) -> jax.Array:
        """(B, T, ...) as the caller gets it: 0 at padding, the inputs' dtype, the caller's batch axes."""
        return self.restore(self.real(out).astype(self.inputs.dtype))

    def real(self, x: jax.Array) -> jax.Array:
        """x (B, T, ...) with padding set to 0, whatever stood there."""
        if self.mask is None:
            return x
        return jnp.where(self.mask.reshape(self.mask.shape + (1,) * (x.ndim - 2)), x, 0)

    def restore(self, x: jax.Array) -> jax.Array:
        return x.reshape(*self.batch, *x.shape[1:])


def require(ok: bool, message: str) -> None:
    """Raises the ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def check_tokens(
    inputs: ArrayLike, mask: ArrayLike | None, segment_ids: ArrayLike | None, *, is_causal: bool, stateful: bool
) -> Tokens:
    """The arguments, checked and with one batch axis, or the ValueError that names the one that is wrong and the rule."""
    (inputs,) = floating(inputs=inputs)
    require(inputs.ndim >= 2, f"inputs must have shape (*B, T, D); got rank {inputs.ndim}, shape {inputs.shape}")
    flags(is_causal=is_causal)
    require(
        is_causal or not stateful, "initial_state and return_state need is_causal=True: a state holds the past only"
    )
    *batch, length, width = inputs.shape
    flat = (prod(batch), length)
    if mask is not None:
        mask = jnp.asarray(mask)
        rule = f"mask must be boolean of shape (*B, T) = {(*batch, length)}, True where a token is real"
        require(mask.shape == (*batch, length) and mask.dtype == jnp.bool_, f"{rule}; got {mask.dtype} {mask.shape}")
        mask = mask.reshape(flat)
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        ok = ids.shape == (*batch, length) and jnp.issubdtype(ids.dtype, jnp.integer)
        rule = f"segment_ids must be integers of shape (*B, T) = {(*batch, length)}"
        require(ok, f"{rule}; got {ids.dtype} {ids.shape}")
        segment_ids = ids.astype(jnp.int32).reshape(flat)
        segment_ids = segment_ids if mask is None else ids_without_padding(segment_ids, mask)
    tokens = Tokens(inputs.reshape(*flat, width), mask, segment_ids, tuple(batch))
    return tokens._replace(inputs=tokens.real(tokens.inputs))


def check_weight(name: str, array: ArrayLike, shape: tuple[int | str, ...]) -> jax.Array:
    """A floating array of this shape, in which a letter stands for any size."""
    (array,) = floating(**{name: array})
    ok = len(array.shape) == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, array.shape)
    )
    written = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
    require(ok, f"{name} must have shape {written}; got {array.shape}")
    return array


def adopt(state: Any, empty: Any, batch: tuple[int, ...]) -> Any:
    """The caller's state with one batch axis, or the ValueError that says which one it should have been."""
    same = jax.tree.structure(state) == jax.tree.structure(empty) and type(state) is type(empty)
    wanted = [(*batch, *x.shape[1:]) for x in jax.tree.leaves(empty)]
    got = [jnp.shape(x) for x in jax.tree.leaves(state)]
    require(
        same and got == wanted,
        f"initial_state must be what an earlier call returned, a {type(empty).__name__} of arrays {wanted}; "
        f"got {type(state).__name__} of {got}",
    )
    return jax.tree.map(lambda x, like: jnp.asarray(x).reshape(like.shape), state, empty)


def wide(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays in the dtype that sums are kept in."""
    dtype = accumulator(*arrays)
    return [array.astype(dtype) for array in arrays]


def normalize(x: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Layer normalisation over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = scaled_rows(jax.lax.rsqrt(row_products(x, x) / x.shape[-1] + epsilon), x)
    return scaled_axis(scale, x) + along(shift, x)


def along(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A weight of the last axes of x, with leading axes of one."""
    return weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
