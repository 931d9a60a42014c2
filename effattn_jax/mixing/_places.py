"""Places of tokens in their documents, products with weights over places, and the state that remembers a document by place.

    y_t = sum_s W[p_t, p_s] x_s        over the tokens s of t's document, p_t the number of real tokens before t in it

The weight of a pair follows from the two places, so padding and packed documents change nothing: a document has the outputs that it
has alone. Without them, and without a state, the places are 0 ... T - 1 and the product is one with W[:T, :T].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn_jax._compiled import when_known
from effattn_jax._contract import ArrayLike
from effattn_jax._places import count_positions
from effattn_jax.attention._pairs import poisoned
from effattn_jax.mixing._tokens import Tokens, adopt, check_tokens, require

__all__ = ["PastTokens"]


class PastTokens(NamedTuple):
    """What a mixer with weights over places remembers: the document so far.

    Attributes:
      values: arrays (*B, T_max, ...) in the inputs' dtype, one entry a place, 0 where no token has stood.
      count: real tokens of the document, (*B,) int32.
      segment: id of the segment in progress, (*B,) int32.
    """

    values: tuple[jax.Array, ...]
    count: jax.Array
    segment: jax.Array


class Places(NamedTuple):
    """Where the tokens of a call stand, and whom each of them sees.

    `fixed` says that the places are 0 ... T - 1 in every row and that there is no past.
    """

    position: jax.Array  # (B | 1, T)
    document: jax.Array | None  # (B, T), 0 for the document of the state; None where all are one
    sees: jax.Array | None  # (B | 1, T, T); None where every token sees every one
    sees_past: jax.Array | None  # (B, T, T_max)
    fixed: bool


def places_of(tokens: Tokens, past: PastTokens | None, length: int, is_causal: bool) -> Places:
    """The places of the tokens of a call in weights of `length` places."""
    count = tokens.inputs.shape[1]
    require(
        count <= length,
        f"inputs must have at most T_max = {length} tokens, the places that the weights have; got T = {count}",
    )
    first, last = (None, None) if past is None else (past.count, past.segment)
    segments = _segments(tokens, past)
    position = count_positions((tokens.inputs.shape[0], count), tokens.mask, segments, first, last)
    if past is not None:
        when_known(partial(_require_room, length), jnp.max(position, initial=-1) + 1)
    sees = jnp.tri(count, dtype=bool)[None] if is_causal else None
    document = None
    if segments is not None:
        before = segments[:, :1] if past is None else past.segment[:, None]
        before = jnp.concatenate([before, segments[:, :-1]], axis=1)[:, :count]
        document = jnp.cumsum(segments != before, axis=1)
        same = document[:, :, None] == document[:, None, :]
        sees = same if sees is None else sees & same
    if tokens.mask is not None:
        sees = tokens.mask[:, None, :] if sees is None else sees & tokens.mask[:, None, :]
        sees = jnp.broadcast_to(sees, (sees.shape[0], count, count))
    sees_past = None
    if past is not None:
        sees_past = (jnp.arange(length)[None] < past.count[:, None])[:, None]
        sees_past = jnp.broadcast_to(sees_past, (sees_past.shape[0], count, length))
        sees_past = sees_past if document is None else sees_past & (document == 0)[:, :, None]
    fixed = tokens.mask is None and segments is None and past is None
    return Places(position, document, sees, sees_past, fixed)


def _segments(tokens: Tokens, past: PastTokens | None) -> jax.Array | None:
    """Segment ids (B, T); a row of padding alone stays in the document of the state."""
    if past is None or tokens.mask is None or tokens.segments is None:
        return tokens.segments
    return jnp.where(jnp.any(tokens.mask, axis=1, keepdims=True), tokens.segments, past.segment[:, None])


def _require_room(length: int, count: np.ndarray) -> None:
    require(
        count <= length,
        f"initial_state is full: a document of {count} tokens does not fit the {length} places that the weights have",
    )


def mix(weight: jax.Array, x: jax.Array, places: Places, past: jax.Array | None = None) -> jax.Array:
    """sum_s W[n, p_t, p_s] x_s for each group n of channels: weight (N, T_max, T_max), x (B, T, N, D), past (B, T_max, N, D).

    What is not finite where it may not be seen leaves no trace; a token beyond the last place is NaN.
    """
    count = x.shape[1]
    if count == 0:
        return x
    if places.fixed:
        weight = weight[:, :count, :count]
        weight = weight if places.sees is None else jnp.where(places.sees, weight, 0)
        return seen(lambda x: jnp.einsum("nts,bsnd->btnd", weight, x), x, places.sees)
    length = weight.shape[1]
    if past is None:
        weight = weight[:, :count, :count]
    rows = take(jnp.moveaxis(weight, 0, 1), places.position)  # (B, T, N, T_max)
    columns = jnp.where(places.sees[:, :, None], _columns(rows, places.position), 0)
    out = seen(lambda x: jnp.einsum("btns,bsnd->btnd", columns, x), x, places.sees)
    if past is not None:
        rows = jnp.where(places.sees_past[:, :, None], rows, 0)
        out += seen(lambda x: jnp.einsum("btns,bsnd->btnd", rows, x), past.astype(x.dtype), places.sees_past)
    beyond = places.position >= length
    return jnp.where(beyond[:, :, None, None], jnp.nan, out)


def _is_sharded(x: jax.Array) -> bool:
    """Is x sharded over an Explicit mesh? JAX then refuses to look entries up by it, so products with one-hot rows do that."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def take(table: jax.Array, position: jax.Array) -> jax.Array:
    """table (T_max, ...) at the positions (B, T): (B, T, ...); those beyond the end read its last entry, or zeros."""
    if _is_sharded(position):
        return jnp.einsum("btl,l...->bt...", jax.nn.one_hot(position, table.shape[0], dtype=table.dtype), table)
    return jnp.take(table, position, axis=0, mode="clip")


def _columns(rows: jax.Array, position: jax.Array) -> jax.Array:
    """rows (B, T, N, T_max) at the positions (B, S) of their last axis."""
    if _is_sharded(position):
        return jnp.einsum("btnl,bsl->btns", rows, jax.nn.one_hot(position, rows.shape[3], dtype=rows.dtype))
    position = jnp.broadcast_to(position[:, None, None], (*rows.shape[:3], position.shape[1]))
    return jnp.take_along_axis(rows, position, axis=3, mode="clip")


def seen(product: Callable, x: jax.Array, sees: jax.Array | None) -> jax.Array:
    """product(x) (B, T, ...) in which a row is NaN for what it sees only: 0 * NaN does not come from the others."""
    if sees is None:
        return product(x)
    finite = jnp.isfinite(x)
    bad = ~jnp.all(finite, axis=tuple(range(2, x.ndim)))  # no reshape first: the last axis may be sharded
    spoiled = poisoned(sees[:, None, None], bad[:, None])[:, 0, 0]
    out = product(jnp.where(finite, x, 0))
    return jnp.where(spoiled.reshape(spoiled.shape + (1,) * (out.ndim - 2)), jnp.nan, out)


def at_places(bias: jax.Array, places: Places) -> jax.Array:
    """The entries (N, T_max) of the tokens' places, (B | 1, T, N)."""
    if places.fixed:
        return bias.T[None, : places.position.shape[1]]
    return take(bias.T, places.position)


def empty_past(tokens: Tokens, length: int, *shapes: tuple[int, ...]) -> PastTokens:
    """The state before the first token, made from the inputs; `shapes` are those of one token's values."""
    zero = jnp.sum(tokens.inputs[..., :0], axis=(1, 2))  # (B,)

    def zeros(shape):
        return jnp.broadcast_to(zero.reshape((-1, 1) + (1,) * len(shape)), (zero.shape[0], length, *shape))

    count = zero.astype(jnp.int32)
    # `count + 0` is a buffer of its own, so that both can be donated.
    return PastTokens(tuple(zeros(shape) for shape in shapes), count, count + 0)


def remember(past: PastTokens, values: tuple[jax.Array, ...], tokens: Tokens, places: Places) -> PastTokens:
    """The state after a call: its last document, with what the state held of it."""
    count = places.position.shape[1]
    if count == 0:
        return past
    length = past.values[0].shape[1]
    # A sum is sharded as the batch is, where a broadcast would not be.
    position = places.position + jnp.zeros_like(past.count)[:, None]
    real = jnp.ones_like(position, bool) if tokens.mask is None else tokens.mask
    last = real if places.document is None else real & (places.document == places.document[:, -1:])
    slot = jnp.where(last, position, length)  # the place beyond the last one is dropped

    def write(old, new):
        if places.document is not None:
            goes_on = places.document[:, -1] == 0
            old = jnp.where(goes_on.reshape((-1,) + (1,) * (old.ndim - 1)), old, 0)
        return _write(old, slot, new.astype(old.dtype))

    written = tuple(write(old, new) for old, new in zip(past.values, values, strict=True))
    segments = _segments(tokens, past)
    segment = past.segment if segments is None else segments[:, -1]
    return PastTokens(written, (position[:, -1] + real[:, -1]).astype(jnp.int32), segment)


def _write(old: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
    """old (B, T_max, ...) with new (B, T, ...) at the slots (B, T); slots beyond the end are dropped."""
    if slot.shape[0] == 0:  # jax 0.7 cannot transpose this
        return old
    if not (_is_sharded(slot) or _is_sharded(old) or _is_sharded(new)):
        return jax.vmap(lambda o, s, n: o.at[s].set(n, mode="drop"))(old, slot, new)
    hit = jax.nn.one_hot(slot, old.shape[1], axis=1, dtype=old.dtype)  # (B, T_max, T)
    new = seen(lambda x: jnp.einsum("blt,bt...->bl...", hit, x), new, hit > 0)
    written = jnp.any(hit > 0, axis=2)
    return jnp.where(written.reshape(written.shape + (1,) * (old.ndim - 2)), new, old)


def over_places(
    body: Callable,
    inputs: ArrayLike,
    length: int,
    shapes: tuple[tuple[int, ...], ...],
    *,
    is_causal: bool,
    mask: ArrayLike | None,
    segment_ids: ArrayLike | None,
    initial_state: Any,
    return_state: bool,
) -> Any:
    """A call of a mixer whose weights have `length` places: checks, places, state, and `body` in between.

    Args:
      body: body(x, places, past) -> (out, values): x (B, T, D), past a tuple of (B, T_max, ...) or None, values what to remember.
      shapes: of one token's values, one for each array of the state.
    """
    stateful = return_state or initial_state is not None
    tokens = check_tokens(inputs, mask, segment_ids, is_causal=is_causal, stateful=stateful)
    empty = empty_past(tokens, length, *shapes) if stateful else None
    past = None if initial_state is None else adopt(initial_state, empty, tokens.batch)
    places = places_of(tokens, past, length, is_causal)
    out, values = body(tokens.inputs, places, None if past is None else past.values)
    out = tokens.finish(out)
    if not return_state:
        return out
    state = remember(empty if past is None else past, values, tokens, places)
    return out, jax.tree.map(tokens.restore, state)
