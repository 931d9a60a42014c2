"""What plain and gated linear attention share: feature maps, decays, the forms without a state.

    o_i = sum_j w_ij phi(q_i).phi(k_j) v_j  /  sum_j w_ij phi(q_i).phi(k_j)       w_ij = exp(sum of decays in between)

Causal calls are one run of the outer-product recurrence, calls in both directions two, calls without order one product.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._contract import Call, accumulator, flags
from effattn_jax._places import by_runs, split_heads, split_like
from effattn_jax._products import quiet
from effattn_jax.attention import _exponential, _frame
from effattn_jax.attention.features import Maps, hedgehog, resolve
from effattn_jax.recurrence._outer_chunks import Options, chunk, masked, normalized, repeat_heads
from effattn_jax.recurrence._outer_kernel import outer_product, over_chunks
from effattn_jax.recurrence.outer_product import check_decay

__all__: list[str] = []


def _kernel(maps: Maps, normalize: bool, split: bool, implementation: str | None) -> Any:
    """The recurrence as a kernel of the frame; `split` returns sums to be added to others."""

    def kernel(query, key, value, extras, carry, *, size, strict=False, **marks):
        options = Options(normalize, split, strict, maps.inside, maps.of_products)
        carry = None if carry is None else carry[:2]
        if maps.weights is not None:
            out, carry = _learned(options, maps.weights, (query, key, value), carry, size=size or 128, **marks)
        else:
            (decay,) = extras
            size = size or (128 if _wide(maps, key) else None)
            out, carry = outer_product(
                query, key, value, decay, carry, size=size, options=options, implementation=implementation, **marks
            )
        return out, (*carry, None)

    return kernel


def _wide(maps: Maps, key: jax.Array) -> bool:
    """Whether there are so many features that fewer, longer chunks cost less memory in states than they cost in pairs."""
    if maps.inside is None:
        return key.shape[-1] > 256
    return jax.eval_shape(maps.inside, jax.ShapeDtypeStruct(key.shape[-1:], jnp.float32)).shape[-1] > 256


def _learned(
    options: Options, weights: Any, rows: tuple, carry: Any, *, size: int, key_mask: Any = None, **marks
) -> Any:
    """A recurrence whose features come from weights, which each chunk makes for itself."""
    value = rows[2]

    def body(state, inputs, marks, weights):
        x = (inputs[0], masked(inputs[1], marks.key_mask))
        query, key = (hedgehog(a.astype(state[0].dtype), w) for a, w in zip(x, weights, strict=True))
        state, out = chunk(options, value.dtype, state, (query, key, inputs[2], None), marks)
        return state, out[0] if options.normalize and not options.split else out

    if carry is None:
        dtype = accumulator(*rows)
        total = jnp.zeros_like(hedgehog(rows[1][:, 0].astype(dtype), weights[1]))
        kv = jnp.zeros_like(total[..., None] * value[:, 0, :, None].astype(dtype))
        carry = (kv, total if options.normalize else None)
    weights = tuple(w.astype(carry[0].dtype) for w in weights)
    return over_chunks(body, carry, rows, size=min(size, value.shape[1]), key_mask=key_mask, weights=weights, **marks)


def features_of(call: Call, mask: jax.Array | None, maps: Maps) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query features by key head (B, T, K, G, M), key features (B, S, K, M) and value in the accumulator's dtype, masked keys as 0."""
    dtype = accumulator(call.query, call.key, call.value)
    query, key, value = (x.astype(dtype) for x in (call.query, masked(call.key, mask), masked(call.value, mask)))
    query, key = maps.query(query), masked(maps.key(key), mask)
    heads = key.shape[2]
    return query.reshape(*query.shape[:2], heads, query.shape[2] // heads, query.shape[-1]), key, value


def _exponentials(call: Call, mask: jax.Array | None) -> tuple[jax.Array, ...]:
    """Features exp(x), those of keys with their level, exp(level_j) being a factor on them; that of a query cancels where it is normalised."""
    query, key, value = features_of(call, mask, Maps(_same, _same))
    query = jnp.exp(query - lax.stop_gradient(jnp.max(query, axis=-1, keepdims=True)))
    level = lax.stop_gradient(jnp.max(key, axis=-1))
    key = masked(jnp.exp(key - level[..., None]), mask)
    return query, key, value, level if mask is None else jnp.where(mask[..., None], level, _frame.lowest(level.dtype))


def _all_keys(call: Call, mask: jax.Array | None, maps: Maps, normalize: bool) -> jax.Array:
    """Without causality or segments one state serves every query."""
    query, key, value = features_of(call, mask, maps)
    out = jnp.einsum("btkgm,bkmv->btkgv", query, jnp.einsum("bskm,bskv->bkmv", key, value))
    if normalize:
        out = normalized(out, jnp.einsum("btkgm,bkm->btkg", query, key.sum(1)))
    return merge_heads(out).astype(call.value.dtype)


def all_pairs(
    call: Call, features: tuple, is_causal: bool, normalize: bool = True, level: jax.Array | None = None
) -> jax.Array:
    """All pairs, a block of queries at a time: the form to check the others by, and the way for segments that are not aligned in time.

    `features` are those of queries (B, T, K, G, M) and keys (B, S, K, M), and the values; exp(level), (B, S, K), is a factor on a key's.
    """
    call, length, keys = by_runs(call), call.query.shape[1], call.key.shape[1]
    if min(length, keys) == 0:
        return jnp.zeros((*call.query.shape[:3], call.value.shape[-1]), call.value.dtype)
    query, key, value = features
    finite = jnp.isfinite(value)

    def block(xs):
        query, row, ids = xs  # (B, R, K, G, M), (R,), (B, R)
        allowed = row[:, None] >= jnp.arange(keys)[None] if is_causal else jnp.ones((row.shape[0], keys), bool)
        allowed = jnp.broadcast_to(allowed, (key.shape[0], *allowed.shape))
        if call.key_segments is not None:
            allowed = allowed & (ids[:, :, None] == call.key_segments[:, None, :])
        scores = quiet(partial(jnp.einsum, "bikgm,bjkm->bkgij"))(query, key)
        if level is not None:
            level_of_key = jnp.moveaxis(level, 2, 1)[:, :, None]
            seen = jnp.where(allowed[:, None], level_of_key, jnp.finfo(level.dtype).min)
            below = jnp.where(allowed[:, None], level_of_key - jnp.max(seen, axis=-1, keepdims=True), -jnp.inf)
            scores = scores * jnp.exp(below)[:, :, None]
        scores = jnp.where(allowed[:, None, None], scores, 0)
        out = jnp.einsum("bkgij,bjkv->bikgv", scores, jnp.where(finite, value, 0))
        if normalize:
            out = normalized(out, jnp.moveaxis(scores.sum(-1), 3, 1))
        poisoned = jnp.einsum("bij,bjk->bik", allowed.astype(query.dtype), (~finite).any(-1).astype(query.dtype)) > 0
        return jnp.where(poisoned[..., None, None], jnp.nan, out).astype(call.value.dtype)

    rows = min(_BLOCK, length)
    missing = -length % rows
    row = jnp.arange(length + missing) + keys - length
    ids = jnp.zeros(query.shape[:2], jnp.int32) if call.query_segments is None else call.query_segments

    def blocks(x, axis):
        x = jnp.pad(x, [(0, missing if a == 1 else 0) for a in range(x.ndim)]) if axis else x
        return jnp.moveaxis(x.reshape(*x.shape[:axis], x.shape[axis] // rows, rows, *x.shape[axis + 1 :]), axis, 0)

    out = lax.map(jax.checkpoint(block), (blocks(query, 1), blocks(row, 0), blocks(ids, 1)))
    return merge_heads(jnp.moveaxis(out, 0, 1).reshape(query.shape[0], length + missing, *out.shape[3:])[:, :length])


def merge_heads(out: jax.Array) -> jax.Array:
    """(B, T, K, G, V) as (B, T, N, V)."""
    return out.reshape(*out.shape[:2], out.shape[2] * out.shape[3], out.shape[-1])


_BLOCK = 128  # query rows at a time where all pairs are formed


def outside(call: Call, mask: jax.Array | None, maps: Maps) -> tuple[Call, Maps]:
    """The call with features in place of queries and keys, for maps that close over arrays and so may not run inside a chunk."""
    dtype = accumulator(call.query, call.key)
    key = masked(maps.key(masked(call.key, mask).astype(dtype)), mask)
    query = maps.query(call.query.astype(dtype))
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"feature_map must give queries and keys one size M; got {query.shape[-1]} and {key.shape[-1]}"
        )
    return call._replace(query=query, key=key), Maps(_same, _same, inside=_same)


def _same(x: jax.Array) -> jax.Array:
    return x


def _attend(
    call: Call, mask: jax.Array | None, log_decay: jax.Array | None, maps: Maps, normalize: bool,
    is_causal: bool, state: Any, return_state: bool, size: int | None, implementation: str | None,
) -> Any:  # fmt: skip
    """The call behind both members of the family; all arrays have one batch axis."""
    length, keys = call.query.shape[1], call.key.shape[1]
    features = features_in(call, maps)
    running = normalize and maps.exponential and log_decay is None and implementation != "dense"
    parts = {"total": normalize, "maximum": running and call.query_segments is call.key_segments}
    state = _split_state(_frame.check_state(state, call, features, **parts), call.key)
    if max(length, keys) == 0 or (length == 0 and not return_state):
        return _frame.nothing(call, state, features, **parts)
    if implementation == "dense" or call.query_segments is not call.key_segments:
        if normalize and maps.exponential:
            *features, level = _exponentials(call, mask)
            return all_pairs(call, features, is_causal, level=level), None
        return all_pairs(call, features_of(call, mask, maps), is_causal, normalize), None
    if running:
        return _exponential.attend(call, mask, is_causal, state, size, joint=True)
    if not is_causal and call.query_segments is None and log_decay is None:
        return _all_keys(call, mask, maps, normalize), None
    if maps.inside is None and maps.weights is None:
        call, maps = outside(call, mask, maps)
    problem = _frame.align(call, mask, (log_decay,))
    if is_causal:
        out, state = _frame.causal(_kernel(maps, normalize, False, implementation), problem, state, size)
    else:
        past, future = _frame.both_ways(_kernel(maps, normalize, True, implementation), problem, size)
        out = jax.tree.map(jnp.add, past, future)
        out = (normalized(*out) if normalize else out).astype(call.value.dtype)
    return out[:, problem.skipped :], state


def _split_state(state: _frame.LinearState | None, key: jax.Array) -> _frame.LinearState | None:
    """The state with its heads on the devices of those of the keys."""

    def split(x):
        return None if x is None else split_like(x, 1, key, 2)

    if state is None:
        return None
    return state._replace(kv=split(state.kv), total=split(state.total), maximum=split(state.maximum))


def features_in(call: Call, maps: Maps) -> int:
    """M, the features that the map makes of a key."""
    x = jax.ShapeDtypeStruct(call.key.shape[2:], accumulator(call.key))
    return jax.eval_shape(maps.key, x).shape[-1]


def run(
    name: str, arrays: tuple, *, scale: Any, is_causal: bool, segment_ids: Any, initial_state: Any, return_state: bool,
    implementation: str | None, chunk_size: int | None, feature_map: Any, normalize: bool, log_decay: Any = None,
    query_weights: Any = None, key_weights: Any = None,
) -> Any:  # fmt: skip
    """Checks, batch axes, and the result with or without its state."""
    flags(normalize=normalize)
    call, mask = _frame.open_call(
        name, arrays, scale=scale, is_causal=is_causal, segment_ids=segment_ids, initial_state=initial_state,
        return_state=return_state, implementation=implementation, chunk_size=chunk_size, one_sequence=log_decay is not None,
    )  # fmt: skip
    heads, dim = call.query.shape[2:]
    call = call._replace(key=split_heads(call.key, call.query), value=split_heads(call.value, call.query))
    if feature_map in ("exp", "hedgehog"):
        _frame.refuse(f"feature_map={feature_map!r}", implementation, "parallel")
    maps = resolve(feature_map, query_weights, key_weights, (heads, call.key.shape[2]), dim)
    log_decay = check_decay(log_decay, call.key, heads, call.batch)
    if log_decay is not None:
        call = call._replace(key=repeat_heads(call.key, call.query), value=repeat_heads(call.value, call.query))
        if log_decay.ndim == 4 and features_in(call, maps) != dim:
            raise ValueError(
                f"log_decay must be (*B, T, N), one a head, with a feature map of H = {dim} to M = {features_in(call, maps)} features"
            )
    out, state = _attend(
        call, mask, log_decay, maps, normalize, is_causal, initial_state, return_state, chunk_size, implementation
    )
    return _frame.close_call(call, out, state, return_state)
