"""The outer-product recurrence folded over chunks of time: padding, segments, states, and both passes of a chunk."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax._contract import accumulator
from effattn_jax._derivatives import Fixed, tie
from effattn_jax.recurrence._chunks import at_once, scan_chunks
from effattn_jax.recurrence._outer_chunks import Marks, Options, chunk, decays_of, heads_first, keep_steps, masked
from effattn_jax.recurrence._outer_pull import pull_chunk
from effattn_jax.recurrence.diagonal import forget

__all__: list[str] = []

_DEFAULT = Options()
_SECTION = 16384  # steps that are side by side at most: enough to fill an accelerator, and a bound on its memory
SHORT = 512  # steps up to which a handful of chunks one after the other is the best form everywhere


def runs(segment_ids: jax.Array, last_id: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array]:
    """Segments numbered along time (a state before the first step has number 0), and the number at each chunk's start."""
    before = segment_ids[:, :1] if last_id is None else last_id[:, None]
    change = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    run = jnp.cumsum(change.astype(jnp.int32), axis=1)
    ends = jnp.concatenate([jnp.zeros_like(run[:, :1]), run[:, size - 1 : -1 : size]], axis=1)
    return run, jnp.broadcast_to(ends[:, :, None], (*ends.shape, size)).reshape(run.shape)


def outer_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    state: tuple[jax.Array, jax.Array | None] | None,
    *,
    segments: jax.Array | None = None,
    last_segment: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    size: int | None = None,
    options: Options = _DEFAULT,
    implementation: str | None = None,
) -> tuple[Any, tuple[jax.Array, jax.Array | None]]:
    """The chunked kernel behind every member of the family: query (B, T, N, H), key (B, T, K, H), value (B, T, K, V), T >= 1.

    Returns (out, (S, z)): out (B, T, N, V); with `options.split` as wide as sums, with a normaliser (numerator, denominator). `implementation`: "chunked" one chunk after the
    other, "parallel" all at once; None is the first for a CPU and for short rows, the second for accelerators.
    """
    length = query.shape[1]
    per_feature = log_decay is not None and log_decay.ndim == 4
    if implementation is None and length > SHORT:
        arrays = (query, key, value, log_decay, state, segments, last_segment, key_mask)

        def form(name):
            def run(query, key, value, log_decay, state, segments, last_segment, key_mask):
                return outer_product(
                    query, key, value, log_decay, state, segments=segments, last_segment=last_segment, key_mask=key_mask,
                    size=size, options=options, implementation=name,
                )  # fmt: skip

            return run

        return jax.lax.platform_dependent(*arrays, cpu=form("chunked"), default=form("parallel"))
    parallel = implementation == "parallel"
    size = min(size or (32 if per_feature else 128 if parallel else 64), length)
    dtype = accumulator(query, key, value)
    if state is None:
        k0 = key[:, 0] if options.feature_map is None else options.feature_map(key[:, 0].astype(dtype))
        z = jnp.zeros_like(k0, dtype)
        state = (
            jnp.zeros_like(jnp.einsum("bkh,bkv->bkhv", z, value[:, 0].astype(dtype))),
            z if options.normalize else None,
        )
    if parallel and key.dtype == value.dtype == jnp.bfloat16:
        options = options._replace(operands=value.dtype)
    body, pull = Fixed(chunk, options, value.dtype), Fixed(pull_chunk, options)
    kept = Fixed(kept_states, state[0].dtype, state[1] is not None) if parallel else None
    marked = {"segments": segments, "last_segment": last_segment, "key_mask": key_mask}
    out, state = over_chunks(body, state, (query, key, value, log_decay), **marked, size=size, pull=pull, kept=kept)
    return out[0] if options.normalize and not options.split else out, state


def over_chunks(
    body: Callable, state: Any, arrays: tuple, *, segments: jax.Array | None = None, last_segment: jax.Array | None = None,
    key_mask: jax.Array | None = None, size: int, pull: Callable | None = None, kept: Callable | None = None, weights: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Folds `body(state, arrays, marks) -> (state, out)` over chunks of `size` steps of arrays (B, T, ...); returns (out, state).

    `weights`, without a time axis, are what the body takes last.

    One chunk after the other (`scan_chunks`), or, given `kept` and then `pull` too, all together (`side_by_side`). A last chunk that is
    not full, or a last section of them, is padded with masked steps of the last segment.
    """
    length = arrays[0].shape[1]
    tied = tie((arrays, state, segments, last_segment, key_mask, weights))
    arrays, state, segments, last_segment, key_mask, weights = tied
    missing = -length % (section_of(length, size) if kept else size)

    def pad(x):
        return x if x is None or missing == 0 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    if missing and key_mask is None:
        key_mask = jnp.zeros_like(arrays[0].sum((2, 3))) == 0  # all True: the feature map of a padded key need not be 0
    if missing and segments is not None:
        segments = jnp.concatenate([segments, jnp.broadcast_to(segments[:, -1:], (segments.shape[0], missing))], axis=1)
    marks = Marks(*(runs(segments, last_segment, size) if segments is not None else (None, None)), pad(key_mask))
    arrays = tuple(map(pad, arrays))
    if kept is None:
        state, out = scan_chunks(body, state, arrays, marks, size=size, pull=pull, weights=weights)
    else:
        state, out = side_by_side(body, pull, kept, state, arrays, marks, size)
    return (jax.tree.map(lambda x: x[:, :length], out) if missing else out), state


def kept_states(dtype: Any, normalized: bool, inputs: Any, marks: Marks) -> tuple[jax.Array, jax.Array | None]:
    """The factors that each of the chunks (axis 0) puts on the two parts of the state before it, of that dtype; a normaliser is the second."""
    log_decay = inputs[3]
    if log_decay is None:
        kept = jnp.ones_like(inputs[1][:, 0, :, :1], dtype)
    else:
        kept = decays_of(keep_steps(heads_first(log_decay, dtype), marks.key_mask)).kept
    if marks.run is not None:
        kept = masked(kept, (marks.run[:, -1:] == marks.run_before[:, -1:])[:, 0])
    return kept[..., None], kept if normalized else None


# The parts of `side_by_side`. Chunks are an axis of their own, not part of the batch: that may be sharded. `_every` runs a function over them.
_every = partial(jax.vmap, in_axes=1, out_axes=1)


def _split(tree: Any, size: int) -> Any:
    """Arrays (B, T, ...) as (B, T / C, C, ...)."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]), tree)


def _join(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), tree)


def _between(state: Any, factors: Any, sums: Any, reverse: bool = False) -> tuple[Any, Any]:
    """The last state, and the states before each chunk (after it in reverse), from the sums that the chunks add."""

    def step(state, x):
        return jax.tree.map(lambda f, s, new: forget(f, s) + new, x[0], state, x[1]), state

    over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (factors, sums))
    state, seen = jax.lax.scan(step, state, over_time, reverse=reverse)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), seen)


def _states(body: Callable, kept: Callable, state: Any, inputs: Any, marks: Marks) -> tuple[Any, ...]:
    """A zero state and the factors of each chunk, the last state, the states before each chunk."""
    count = inputs[1].shape[1]
    zero = jax.tree.map(
        lambda x: jnp.broadcast_to(jnp.zeros_like(x)[:, None], (x.shape[0], count, *x.shape[1:])), state
    )
    factors = _every(kept)(inputs, marks)
    return zero, factors, *_between(state, factors, _every(body)(zero, inputs, marks)[0])


def _forward(body: Callable, kept: Callable, size: int, state: Any, inputs: Any, marks: Marks) -> tuple[Any, Any]:
    inputs, marks = _split((inputs, marks), size)
    _, _, state, before = _states(body, kept, state, inputs, marks)
    return state, _join(_every(body)(before, inputs, marks)[1])


def _pull(
    body: Callable, pull: Callable, kept: Callable, size: int, state: Any, inputs: Any, marks: Marks, outputs: Any, d_state: Any, d_out: Any
) -> tuple[Any, Any]:  # fmt: skip
    inputs, marks, outputs, d_out = _split((inputs, marks, outputs, d_out), size)
    zero, factors, _, before = _states(body, kept, state, inputs, marks)
    sums = _every(pull)(before, inputs, marks, outputs, zero, d_out)[0]
    d_state, after = _between(d_state, factors, sums, reverse=True)
    return d_state, _join(_every(pull)(before, inputs, marks, outputs, after, d_out)[1])


def section_of(length: int, size: int) -> int:
    """Steps of a section of rows in chunks of that size: sections as few as `_SECTION` allows, and alike."""
    chunks = -(-length // size)
    return -(-chunks // -(-chunks // max(1, _SECTION // size))) * size


def side_by_side(
    body: Callable, pull: Callable, kept: Callable, state: Any, inputs: Any, marks: Marks, size: int
) -> Any:
    """All chunks at once: what each adds to the state, a scan over these sums for the states between, then every chunk from its own.

    The scan is over T / C states; all else is batched over chunks. Memory O(T (C + H V / C)) in both passes; the backward pass scans the
    cotangents of the states the other way. `kept(inputs, marks)` is the factor that a chunk puts on the state before it, for each part of it.
    Longer rows, a whole number of sections (`section_of`), go section after section.
    """
    forward, backward = Fixed(_forward, body, kept, size), Fixed(_pull, body, pull, kept, size)
    length, section = inputs[1].shape[1], section_of(inputs[1].shape[1], size)
    if section < length:
        return scan_chunks(forward, state, inputs, marks, size=section, pull=backward)
    return at_once(forward, backward, (state, inputs), marks)
