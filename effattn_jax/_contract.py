"""The contract every sequence mixer keeps: what a line of a table says, and the checks that come before any tracing.

f(query, key, value, bias=None, mask=None, *, scale, is_causal, segment_ids, initial_state, return_state, ...)

query (*B, T, N, H)   key (*B, S, K, H)   value (*B, S, K, V)   ->   out (*B, T, N, V)
"""

import numbers
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__: list[str] = []

ArrayLike = Any


class Mixer(NamedTuple):
    """One line of a room's table of mixers; tests, benchmarks, docs and `--model.mixer` follow from it.

    Attributes:
      function: the mixer, under the contract.
      forms: keyword sets whose results must agree: the parallel form, the chunked one, and so on.
      pairwise: whether it takes a bias and any mask over (query, key) pairs; if not, only masks over keys.
      empty_state: `empty_state(batch, capacity, num_heads, num_kv_heads, head_dim, value_dim, dtype)` -> the state before the first token,
        whose shapes stay the same from call to call.
      extras: `extras(rng, query)` -> samples of further inputs with time on the axis that query has it, by argument name, as NumPy arrays from
        a NumPy generator (to draw with JAX would compile a program a shape); None where there are none.
      weights: `weights(rng, num_heads, num_kv_heads, head_dim)` -> further float32 inputs without a time axis, such as projections, by
        argument name; None where there are none. With a keyword `length` they are tables for sequences up to that long; of two lengths
        up to which it is not exempt, the shorter has the first rows of the longer.
      unread: of "query" and "key", those whose numbers do not count; modules then make no projection for them.
      with_scores: the function that also takes `previous_scores` and returns (out, [state,] scores); None where scores are not handed on.
      runs_on: the name of the member whose loops over time it runs on, "" for its own. Tests hold it to every law, but to the variants that
        those loops decide (`tests/laws/conftest.py`) only under LAWS=all.
      exempt: laws that mathematics rules out for it, each with the reason: "memory" (a T x S array is part of what it is), "length"
        (it has no form for the long rows of laws 6 and 7), "removal" (cutting a masked key out moves queries or keys behind it), "padding" (and so does cutting a masked token out, query and key),
        "window state" (a window is not all that it looks back to), "shards of heads" (it tells heads apart by their number), "causality" (it mixes all positions: no causal form, no state, no segments;
        `tests/laws/test_without_causality.py` holds it to the rest).
      options: what it cannot be called without, as small as tests need it.
      keys_seen: `keys_seen(context, is_causal, **options)` -> how many keys a query's pattern gives it, for counts of operations; None: all.
    """

    function: Callable
    forms: tuple[dict[str, Any], ...]
    pairwise: bool
    empty_state: Callable
    extras: Callable | None = None
    weights: Callable | None = None
    unread: tuple[str, ...] = ()
    with_scores: Callable | None = None
    runs_on: str = ""
    exempt: Mapping[str, str] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})
    keys_seen: Callable | None = None


class Recurrence(NamedTuple):
    """One line of the table of recurrences.

    Attributes:
      function: the recurrence.
      forms: keyword sets whose results must agree.
      sample: `sample(rng, batch, length, dtype)` -> its array inputs by argument name, in order, time on axis 1, from a NumPy generator.
      runs_on: as for `Mixer`.
      weights: `weights(rng)` -> float32 or complex64 inputs without a time axis, by argument name, likewise; None where there are none.
    """

    function: Callable
    forms: tuple[dict[str, Any], ...]
    sample: Callable
    runs_on: str = ""
    weights: Callable | None = None


class TokenMixer(NamedTuple):
    """One line of the table of attention-free mixers.

    Attributes:
      function: f(inputs (*B, T, D), **weights, is_causal, mask (*B, T), segment_ids (*B, T), initial_state, return_state) -> out or
        (out, state); one without a causal form has no state and refuses is_causal.
      weights: `weights(rng, width, length, heads)` -> initial float32 weights by argument name, pytrees of arrays, for sequences of at
        most `length` tokens.
      flops: `flops(width, length, heads)` -> operations a token of a sequence of `length` tokens; a multiply-add is two.
      fixes_length: whether its weights have a place for each step, which makes `length` the longest sequence.
      output: the weight whose scale is that of the output; "" where there is none.
      exempt: as in `Mixer`.
    """

    function: Callable
    weights: Callable
    flops: Callable
    fixes_length: bool
    output: str = ""
    exempt: Mapping[str, str] = MappingProxyType({})


class Call(NamedTuple):
    """The arguments of a mixer with batch axes flattened to one; sizes by the package's legend."""

    query: jax.Array  # (B, T, N, H)
    key: jax.Array  # (B, S, K, H)
    value: jax.Array  # (B, S, K, V)
    bias: Any  # (B | 1, N | 1, T | 1, S | 1) as broadcast or full, or a bias by position, or None
    mask: jax.Array | None  # the same of booleans
    query_segments: jax.Array | None  # (B, T)
    key_segments: jax.Array | None  # (B, S)
    batch: tuple[int, ...]

    def restore(self, x: jax.Array) -> jax.Array:
        """Puts the caller's batch axes back in place of axis 0."""
        return x.reshape(*self.batch, *x.shape[1:])


def accumulator(*dtypes: Any) -> Any:
    """The dtype of states, normalisers and softmaxes: float32, float64 or complex where an input is."""
    return jnp.result_type(jnp.float32, *dtypes)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def nearest(name: str, known: Any) -> str:
    """The known names as text, the closest one suggested first."""
    import difflib

    known = [k for k in known if k is not None]
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def choose(argument: str, name: Any, known: Any) -> None:
    """Raises the ValueError for a name that is not in a table."""
    known = tuple(known)  # a name may be anything, of which a table would ask the hash
    _require(name in known, f"{argument}={name!r} is unknown; {nearest(name, known)}")


def floating(**arrays: ArrayLike) -> list[jax.Array]:
    """Arrays of floating dtype, or the ValueError that names the one that is not."""
    out = []
    for name, given in arrays.items():
        try:
            array = jnp.asarray(given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be a floating array; got {given!r}"[:400]) from error
        _require(
            jnp.issubdtype(array.dtype, jnp.floating),
            f"{name} must be a floating array; got {array.dtype} of shape {array.shape}",
        )
        out.append(array)
    return out


def flags(**values: Any) -> None:
    """Raises a ValueError for a value that is neither True nor False."""
    for name, value in values.items():
        _require(isinstance(value, bool | np.bool_), f"{name} must be True or False; got {value!r}"[:400])


def scale_or(default: float, scale: Any, name: str = "scale") -> Any:
    """The default for None; a factor that is neither a number nor an array of one is a ValueError."""
    if scale is None:
        return default
    if not isinstance(scale, numbers.Real):
        real = hasattr(scale, "dtype") and (
            jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
        )
        _require(real, f"{name} must be a number; got {scale!r}"[:400])
        hint = ". Factors of heads or tokens go into the query" if name == "scale" else ""
        _require(scale.ndim == 0, f"{name} must be one number, an array of shape (); got shape {scale.shape}{hint}")
    return scale


def scaled(query: jax.Array, scale: Any) -> jax.Array:
    """The query times a scale, in the dtype of sums: half the precision has neither the range of scores nor digits for another rounding."""
    dtype = accumulator(query)
    return query.astype(dtype) * jnp.asarray(scale, dtype)


def is_whole(x: Any, least: int) -> bool:
    """Whether x is an integer of at least `least`, of Python or of NumPy; True and False are none.

    >>> import numpy as np
    >>> is_whole(np.int64(3), 1), is_whole(True, 0)
    (True, False)
    """
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= least


def positive(**sizes: int | None) -> None:
    """Raises a ValueError for a size that is given and is not a positive integer."""
    for name, size in sizes.items():
        _require(size is None or is_whole(size, 1), f"{name} must be a positive int; got {size!r}")


def _pair_shape(
    name: str, array: jax.Array, batch: tuple[int, ...], pair: tuple[int, int, int], totals: tuple[int, ...]
) -> jax.Array:
    """A bias or mask broadcastable to (*B, N, T, S) as (B | 1, N | 1, T | 1, S | 1)."""
    full = (*batch, *pair)
    rule = f"{name} must broadcast to (*B, N, T, S) = {full}; got shape {array.shape}"
    _require(1 <= array.ndim <= len(full), rule)
    shape = (1,) * (len(full) - array.ndim) + array.shape
    sizes_ok = all(a in (1, b) for a, b in zip(shape[:-1], full[:-1], strict=True)) and shape[-1] in (
        1,
        full[-1],
        *totals,
    )
    _require(sizes_ok, rule)
    array = array.reshape(shape)
    lead, tail = shape[: len(batch)], shape[len(batch) :]
    if prod(lead) == 1:
        return array.reshape(1, *tail)
    return jnp.broadcast_to(array, (*batch, *tail)).reshape(prod(batch), *tail)


def _position_bias(bias: Any, heads: int) -> Any:
    """A bias by position, with its leaves as arrays, or the ValueError that says what it should have been."""
    rule = "bias must be an array or a pytree of floating arrays, callable as bias(query_positions, key_positions) -> (N, T, S)"
    leaves, tree = jax.tree.flatten(bias)
    opaque = len(leaves) == 1 and leaves[0] is bias
    wrong = [x for x in leaves if opaque or not jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    _require(not wrong, f"{rule}; got {bias!r}")
    bias = tree.unflatten([jnp.asarray(x) for x in leaves])
    places = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        shape = jax.eval_shape(bias, places, places).shape
    except (TypeError, ValueError) as error:
        raise ValueError(f"{rule}; {type(bias).__name__} cannot be called so: {str(error).splitlines()[0]}") from error
    _require(
        shape in ((heads, 1, 1), (1, 1, 1)), f"{rule} with N={heads}; {type(bias).__name__} gives {shape} for T = S = 1"
    )
    return bias


def _segments(
    segment_ids: Any, batch: tuple[int, ...], length: int, keys: int
) -> tuple[jax.Array | None, jax.Array | None]:
    if segment_ids is None:
        return None, None
    is_pair = isinstance(segment_ids, tuple | list)
    if not is_pair:
        _require(
            length == keys,
            f"segment_ids must be a pair (query ids, key ids) when T != S; got one array with T={length}, S={keys}",
        )
    pair = tuple(segment_ids) if is_pair else (segment_ids, segment_ids)
    _require(len(pair) == 2, f"segment_ids must be one array or a pair; got {len(pair)} entries")
    out = []
    for ids, size, what in zip(pair, (length, keys), ("query", "key"), strict=True):
        ids = jnp.asarray(ids)
        want = (*batch, size)
        _require(
            ids.shape == want and jnp.issubdtype(ids.dtype, jnp.integer),
            f"segment_ids of the {what} must be integers of shape (*B, {'T' if what == 'query' else 'S'}) = {want}; got {ids.dtype} {ids.shape}",
        )
        out.append(ids.astype(jnp.int32).reshape(prod(batch), size))
    if not is_pair:
        return out[0], out[0]
    # a pair is one whatever it holds: whether both are the same array is not seen under jit
    return out[0], (jnp.array(out[1]) if out[1] is out[0] else out[1])


def check_call(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    is_causal: bool,
    segment_ids: Any,
    stateful: bool,
    totals: tuple[int, ...] = (),
) -> Call:
    """The arguments of a mixer, checked and with one batch axis.

    Args:
      stateful: whether a state comes in or goes out, which needs `is_causal=True`.
      totals: further sizes that the key axis of a bias or mask may have (the slots of a cache).

    Raises:
      ValueError: names the argument, its shape and the rule it breaks.
    """
    query, key, value = floating(query=query, key=key, value=value)
    for name, array, dims in (
        ("query", query, "(*B, T, N, H)"),
        ("key", key, "(*B, S, K, H)"),
        ("value", value, "(*B, S, K, V)"),
    ):
        _require(array.ndim >= 3, f"{name} must have shape {dims}; got rank {array.ndim}, shape {array.shape}")
    (*batch, length, heads, dim), (*key_batch, keys, kv_heads, key_dim) = query.shape, key.shape
    batch = tuple(batch)
    _require(
        batch == tuple(key_batch) == value.shape[:-3],
        f"query, key and value must share their batch axes *B; got shapes {query.shape}, {key.shape}, {value.shape}",
    )
    _require(dim == key_dim, f"key must have the head dim H of query; got query {query.shape}, key {key.shape}")
    _require(
        value.shape[-3:-1] == (keys, kv_heads),
        f"value must have the length S and heads K of key; got key {key.shape}, value {value.shape}",
    )
    _require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"the heads of key must divide those of query (K divides N); got N={heads} in query {query.shape}, K={kv_heads} in key {key.shape}",
    )
    flags(is_causal=is_causal)
    _require(
        is_causal or not stateful, "initial_state and return_state need is_causal=True: a state holds the past only"
    )
    pair = (heads, length, keys)
    if callable(bias):
        bias = _position_bias(bias, heads)
    elif bias is not None:
        bias = _pair_shape("bias", floating(bias=bias)[0], batch, pair, totals)
    if mask is not None:
        mask = jnp.asarray(mask)
        _require(
            mask.dtype == jnp.bool_,
            f"mask must be boolean, True = attend; got {mask.dtype} of shape {mask.shape} (a float array is a bias)",
        )
        mask = _pair_shape("mask", mask, batch, pair, totals)
    q_ids, k_ids = _segments(segment_ids, batch, length, keys)
    flat = [x.reshape(prod(batch), *x.shape[-3:]) for x in (query, key, value)]
    return Call(*flat, bias, mask, q_ids, k_ids, batch)


def _described(bias: Any) -> str:
    return f"by position ({type(bias).__name__})" if callable(bias) else f"of shape {getattr(bias, 'shape', ())}"


def key_mask(call: Call, name: str, bias: ArrayLike, mask: ArrayLike) -> jax.Array | None:
    """The mask of a linear-time mixer, (B, S) over keys; a mask over pairs, or a bias, is refused with what to pass instead.

    `bias` and `mask` are as the caller gave them.
    """
    _require(
        call.bias is None,
        f"{name} has no pairwise scores to add a bias to; got bias {_described(bias)}. "
        "Use dot_product_attention, or put the bias into query and key",
    )
    if call.mask is None:
        return None
    _require(
        call.mask.shape[1] == call.mask.shape[2] == 1,
        f"{name} runs in linear time and cannot honour a mask over (query, key) pairs; got mask of shape {None if mask is None else jnp.shape(mask)}. "
        "Pass a mask over keys, (*B, 1, 1, S), with is_causal or segment_ids for the rest",
    )
    return jnp.broadcast_to(call.mask[:, 0, 0, :], (call.key.shape[0], call.key.shape[1]))
