"""One chunk of the outer-product recurrence.

Pairs inside a chunk by a masked C x C product, everything older through the state at its start. Only sums of decays between two steps are
exponentiated, each <= 0, so nothing overflows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn_jax._places import split_like
from effattn_jax._products import finite, grouped_product, scaled_rows
from effattn_jax.recurrence._feature_pairs import decay_factors, feature_pairs

__all__: list[str] = []

FLOOR = -1000.0  # exp of it is 0 in float32 and float64, and sums of it stay finite where -inf - -inf would not


class Options(NamedTuple):
    """What a chunk does, fixed at trace time."""

    normalize: bool = False  # divide by q . z
    split: bool = False  # return sums to be added to others: numerator and denominator apart, in the state's dtype
    strict: bool = False  # leave out each step's own pair
    feature_map: Callable | None = None  # applied to query and key inside the chunk, where they are still in cache
    of_products: Callable | None = None  # phi(q).phi(k) from q.k, where there is such a form
    operands: Any = None  # dtype of what enters the products of matrices, whose sums are wide; None is the state's


class Marks(NamedTuple):
    """Integers and booleans (B, T) that say which steps may interact; None where all may."""

    run: jax.Array | None = None  # number of the segment a step is in, counted along time
    run_before: jax.Array | None = None  # number of the segment that the state before the step's chunk belongs to
    key_mask: jax.Array | None = None  # whether the step's key and value exist


def _between(decay: jax.Array) -> jax.Array:
    """Sums of decays over (j, i] for every pair of a chunk: (B, K, C) -> (B, K, i, j).

    A product with ones, not a difference of cumulative sums: each entry adds only its own terms, so small sums beside large ones stay exact.
    """
    size = decay.shape[2]
    later = jnp.tril(jnp.ones((size, size), bool), -1)
    terms = jnp.where(later, decay[:, :, :, None], 0)
    upto = jnp.tril(jnp.ones((size, size), decay.dtype))
    return jnp.einsum("im,bkmj->bkij", upto, terms, precision=lax.Precision.HIGHEST)


def allowed_pairs(marks: Marks, size: int, strict: bool) -> jax.Array:
    """Which pairs of a chunk interact, (B | 1, i, j)."""
    allowed = jnp.tril(jnp.ones((1, size, size), bool), -1 if strict else 0)
    if marks.run is not None:
        allowed = allowed & (marks.run[:, :, None] == marks.run[:, None, :])
    return allowed


def repeat_heads(x: jax.Array, like: jax.Array) -> jax.Array:
    """Keys or values (B, S, K, ...) for each of the N heads of queries like (B, T, N, ...), split over devices as those are: (B, S, N, ...)."""
    groups = like.shape[2] // x.shape[2]
    wide = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], groups, *x.shape[3:]))
    return split_like(wide.reshape(*x.shape[:2], x.shape[2] * groups, *x.shape[3:]), 2, like, 2)


def _spread(x: jax.Array, like: jax.Array) -> jax.Array:
    """x with trailing axes of size 1 up to the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x (B, T, ...) with 0 where the mask (B, T) is False, whatever stood there."""
    return x if mask is None else jnp.where(_spread(mask, x), x, 0)


def keep_steps(x: jax.Array, steps: jax.Array | None) -> jax.Array:
    """x (B, K, C, ...) with 0 where steps (B, C) is False."""
    return x if steps is None else jnp.where(_spread(steps[:, None], x), x, 0)


def heads_first(x: jax.Array, dtype: Any) -> jax.Array:
    """(B, C, K, ...) as (B, K, C, ...). What follows is elementwise, so XLA moves and computes in one pass; a product that had
    to move its operands itself would copy them first, slowly."""
    return jnp.moveaxis(x, 1, 2).astype(dtype)


class _Decay(NamedTuple):
    """What a chunk's decays come to: from the chunk's start to each step, from each step to the end, in between, in all."""

    to_step: jax.Array  # factor on a query that reads the state, (B, K, C, 1 | H)
    to_end: jax.Array  # factor on a key that enters the state, same
    between: jax.Array | None  # sums over (j, i], (B, K, i, j); None with a decay for each feature
    kept: jax.Array  # factor on the state, (B, K, 1 | H)
    bad: jax.Array  # steps whose decay is NaN or +inf, (B, K, C): all that passes through them is NaN
    within: Any = None  # with a decay for each feature, factors within the blocks of `feature_pairs`


def decays_of(decay: jax.Array) -> _Decay:
    """What log decays (B, K, C[, H]) of a chunk come to; -inf counts as the floor, and what is no number marks its step bad."""
    decay = jnp.maximum(decay, FLOOR)
    known = jnp.isfinite(decay)
    decay = jnp.where(known, decay, 0)
    if decay.ndim == 4:
        within, to_step, to_end = decay_factors(decay)
        return _Decay(to_step, to_end, None, to_step[:, :, -1], ~known.all(-1), within)
    between, sums = _between(decay), jnp.cumsum(decay, axis=2)
    to_step, to_end = (jnp.exp(x)[..., None] for x in (sums, between[:, :, -1]))
    return _Decay(to_step, to_end, between, to_step[:, :, -1], ~known)


def product(equation: str, a: jax.Array, b: jax.Array, options: Options) -> jax.Array:
    """`grouped_product` of what the options let enter it."""
    return grouped_product(equation, a, b, options.operands)


def weights_of_pairs(
    options: Options, q: jax.Array, k: jax.Array, decay: _Decay | None, allowed: jax.Array
) -> jax.Array:
    """Weights of the pairs of a chunk, (B, K, G, i, j); 0 where they do not interact."""
    if decay is not None and decay.within is not None:
        scores = feature_pairs(q, k, decay.within)
    else:
        scores = product("bkgih,bkjh->bkgij", q, k, options)
        scores = scores if options.of_products is None else options.of_products(scores)
    if decay is not None and decay.within is None:
        scores = scores * jnp.exp(jnp.where(allowed[:, None], decay.between, -jnp.inf))[:, :, None]
    return jnp.where(allowed[:, None, None], scores, 0)


def weighted_values(
    options: Options, scores: jax.Array, v: jax.Array, decay: _Decay | None, allowed: jax.Array
) -> jax.Array:
    """scores @ v, (B, K, G, i, V). 0 * NaN is NaN: values enter the masked product with what is not finite set to 0, and the rows that
    may see such a value, or come after such a decay, become NaN again."""
    finite = jnp.isfinite(v)
    out = product("bkgij,bkjv->bkgiv", scores, jnp.where(finite, v, 0), options)
    bad = jnp.any(~finite, axis=-1)
    bad = bad if decay is None else bad | decay.bad
    none = jnp.zeros_like(v.sum((1, 3)), bool)[
        :, None
    ]  # sharded over the batch as values are, which the product asks for
    sees = (allowed | none).astype(scores.dtype)
    spoiled = jnp.einsum("bij,bkj->bki", sees, bad.astype(scores.dtype)) > 0
    spoiled = spoiled if decay is None else spoiled | decay.bad
    return jnp.where(spoiled[:, :, None, :, None], jnp.nan, out)


def last_segment(marks: Marks) -> tuple[jax.Array, jax.Array]:
    """Which steps (B, C) belong to the segment of the state before the chunk, and which to that of the state after it."""
    return marks.run == marks.run_before, marks.run == marks.run[:, -1:]


def read_state(
    options: Options, q: jax.Array, state: jax.Array, total: jax.Array | None, marks: Marks
) -> tuple[jax.Array, jax.Array | None]:
    """What queries (B, K, G, C, H) get from the state before the chunk, where that belongs to their segment."""
    old = product("bkgih,bkhv->bkgiv", q, state, options)
    old_total = None if total is None else jnp.einsum("bkgih,bkh->bkgi", q, total)
    if marks.run is None:
        return old, old_total
    same = last_segment(marks)[0][:, None, None]
    return jnp.where(same[..., None], old, 0), None if total is None else jnp.where(same, old_total, 0)


def _write(
    options: Options,
    k: jax.Array,
    v: jax.Array,
    state: jax.Array,
    total: jax.Array | None,
    decay: _Decay | None,
    marks: Marks,
) -> Any:
    """The state after the chunk: what it was, decayed, and the keys and values of the segment in progress at its end."""
    bad = None if decay is None else decay.bad
    if decay is not None:
        k, kept = k * decay.to_end, decay.kept
        state, total = state * kept[..., None], None if total is None else total * kept
    if marks.run is not None:
        _, into_end = last_segment(marks)
        k, v = (keep_steps(x, into_end) for x in (k, v))
        bad = None if bad is None else keep_steps(bad, into_end)
        goes_on = marks.run[:, -1:] == marks.run_before[:, -1:]
        state, total = masked(state, goes_on[:, 0]), None if total is None else masked(total, goes_on[:, 0])
    state = state + product("bkjh,bkjv->bkhv", k, v, options)
    total = None if total is None else total + k.sum(2)
    if bad is not None:
        spoiled = bad.any(axis=2)[..., None]
        state = jnp.where(spoiled[..., None], jnp.nan, state)
        total = None if total is None else jnp.where(spoiled, jnp.nan, total)
    return state, total


def time_first(x: jax.Array) -> jax.Array:
    """(B, K, G, C, ...) as (B, C, N, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), 2, 1)


class Chunk(NamedTuple):
    """The inputs of a chunk by head, what is masked 0."""

    q: jax.Array  # features, (B, K, G, C, H)
    k: jax.Array  # (B, K, C, H)
    v: jax.Array  # (B, K, C, V)
    decay: _Decay | None
    rows: tuple[jax.Array, jax.Array]  # what pairs are products of: queries and keys as they came, or their features


def prepared(options: Options, marks: Marks, dtype: Any, inputs: Any) -> Chunk:
    """The inputs (B, C, ...) of a chunk as it needs them."""
    q, k, v, log_decay = inputs
    k, v = (keep_steps(heads_first(x, dtype), marks.key_mask) for x in (k, v))
    q = heads_first(q, dtype)
    q = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])
    rows = q, k
    if options.feature_map is not None:
        q, k = options.feature_map(q), keep_steps(options.feature_map(k), marks.key_mask)
    decay = None if log_decay is None else decays_of(keep_steps(heads_first(log_decay, dtype), marks.key_mask))
    return Chunk(q, k, v, decay, (q, k) if options.of_products is None else rows)


def interacting(options: Options, marks: Marks, size: int) -> jax.Array:
    """Which pairs of a chunk interact, (B | 1, i, j); a masked key has features of 0, but its products need not come to 0."""
    allowed = allowed_pairs(marks, size, options.strict)
    if options.of_products is None or marks.key_mask is None:
        return allowed
    return allowed & marks.key_mask[:, None]


def chunk(options: Options, out_dtype: Any, carry: Any, inputs: Any, marks: Marks) -> tuple[Any, Any]:
    """One chunk: the state (B, K, H, V) [and (B, K, H)] before it, its steps, the state after it and the outputs."""
    state, total = carry
    q, k, v, decay, rows = prepared(options, marks, state.dtype, inputs)
    allowed = interacting(options, marks, q.shape[3])
    scores = weights_of_pairs(options, *rows, decay, allowed)
    old, old_total = read_state(options, q if decay is None else q * decay.to_step[:, :, None], state, total, marks)
    numerator = weighted_values(options, scores, v, decay, allowed) + old
    after = _write(options, k, v, state, total, decay, marks)
    if total is None:
        return after, time_first(numerator).astype(numerator.dtype if options.split else out_dtype)
    denominator = scores.sum(-1) + old_total
    if options.split:
        return after, (time_first(numerator), time_first(denominator))
    out = time_first(normalized(numerator, denominator)).astype(out_dtype)
    return after, (out, time_first(denominator))


def normalized(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 with zero gradient where there was nothing to normalise; a row that is not finite passes nothing back.

    The rule of the quotient has the square of the denominator, which leaves the range of floats long before the quotient does: what is
    differentiated is the quotient by a constant, times a reciprocal of 1.
    """
    empty, known = denominator == 0, jnp.isfinite(denominator)
    constant = lax.stop_gradient(jnp.where(empty | ~known, 1, denominator))
    one = jnp.where(empty | ~known, 1, denominator / constant)
    quotient = scaled_rows(1 / one, finite(numerator) / constant[..., None])
    known = known[..., None] & jnp.isfinite(numerator)
    return jnp.where(
        empty[..., None], 0, jnp.where(known, quotient, lax.stop_gradient(numerator / denominator[..., None]))
    )
