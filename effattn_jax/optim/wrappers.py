"""Transformations around transformations: Lookahead, lazy rows, and steps that are not finite.

A wrapper whose inner transformation does not run at every call has a state with fields `count` (of its updates) and
`inner`. `updates_made` reads them, so that what counts updates does so in any order of nesting.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax._contract import is_whole
from effattn_jax.optim._arrays import all_finite
from effattn_jax.optim._trees import Axes, Path, axis_names, is_float, map_leaves, matches, number, path_of, wide


class LookaheadState(NamedTuple):
    """`count` of inner updates, the `slow` weights, and the inner state."""

    count: jax.Array
    slow: Any
    inner: Any


def updates_made(state: Any) -> list[jax.Array]:
    """The counters of all wrappers in a state that may hold updates back: ours, and optax' MultiSteps."""
    counts = [part.count for part in _parts(state) if hasattr(part, "count") and hasattr(part, "inner")]
    return counts + [part.gradient_step for part in _parts(state) if hasattr(part, "gradient_step")]


def _parts(state: Any) -> list[Any]:
    """A state and all states in it, of chains, tuples and dictionaries."""
    inside = state.values() if isinstance(state, Mapping) else state if isinstance(state, tuple | list) else ()
    return [state, *(part for child in inside for part in _parts(child))]


def lookahead(
    inner: optax.GradientTransformation, period: int = 5, slow_step: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    r"""Every `period` updates, pull the weights back towards slow ones that follow them.

    theta <- theta + inner update;    every period updates:  slow <- slow + slow_step (theta - slow),  theta <- slow

    Parameters go in and come out as they are; the slow weights start as the parameters and lie in the state. After a
    pull the two are equal to the bit. What counts is updates of the inner transformation: steps that an accumulating or
    skipping wrapper holds back, inside or outside, are none.

    Args:
      inner: any optax transformation whose updates are added to the parameters; extra arguments reach it.
      period: a positive number of updates.
      slow_step: in (0, 1].

    Returns:
      An optax transformation with state `LookaheadState`.

    Raises:
      ValueError: a period that is no positive integer, a slow_step out of range, no params.

    Cost: one more read of the parameters. State: one copy of them.

    Source: Zhang et al. 2019 (arXiv 1907.08610); Su (kexue.fm 6869).

    Example:
      >>> optimizer = lookahead(optax.sgd(1.0), period=2)
      >>> params, state = jnp.array(0.0), optimizer.init(jnp.array(0.0))
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(jnp.array(-1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, state.slow)
      1.0 1.0
    """
    if not is_whole(period, 1):
        raise ValueError(f"period must be a positive integer, got {period!r}.")
    if not 0 < number(slow_step) <= 1:
        raise ValueError(f"slow_step must be in (0, 1], got {slow_step}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LookaheadState:
        # A copy: parameters and state may be donated together.
        slow = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
        return LookaheadState(jnp.zeros((), jnp.int32), slow, inner.init(params))

    def update(updates: Any, state: LookaheadState, params: Any = None, **extra: Any) -> tuple[Any, LookaheadState]:
        if params is None:
            raise ValueError("lookahead needs the parameters: call update(updates, state, params).")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        counters = zip(updates_made(inner_state), updates_made(state.inner))
        moved = jnp.all(jnp.array([new > old for new, old in counters], bool))
        count = jnp.where(moved, optax.safe_increment(state.count), state.count)
        pull = moved & (count % period == 0)

        def one(path: Path, u: jax.Array, p: jax.Array, slow: jax.Array) -> tuple:
            if not is_float(u):
                return u, slow
            fast = wide(p) + wide(u)
            target = wide(slow) + slow_step * (fast - wide(slow))
            u = jnp.where(pull, (target - wide(p)).astype(u.dtype), u)
            # Where the parameters will be once the update is added, rounding included.
            return u, jnp.where(pull, (p + u).astype(slow.dtype), slow)

        updates, slow = map_leaves(one, 2, updates, params, state.slow)
        return updates, LookaheadState(count, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def lazy_updates(
    inner: optax.GradientTransformation,
    *,
    moments: str = "frozen",
    select: str | Callable[[Path], bool] | None = None,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave the rows of a table alone whose gradient is zero: no step, no decay, and with `frozen` no change of moments.

    row i moves where any(g[i, :] != 0)

    For embeddings, of which a batch reads a few rows: Adam's momentum and weight decay move the others all the same.
    "frozen" keeps the moments of such rows as they are (LazyAdam, SparseAdam); "decay" lets them decay and holds back the step alone
    (Su, who found it slightly better). Counters go on in both. A dense gradient (of a table that is the output layer
    too) touches every row and makes this a no-op. Slots without an axis of rows go on for the whole leaf.

    Args:
      inner: any optax transformation that steps at every call: what accumulates micro-batches goes outside, where rows of the whole window count.
      moments: "frozen" or "decay".
      select: the tables: a regular expression searched in the '/'-joined path, or a function of the path; None takes every
        leaf of rank 2 and more.
      axis_name: mapped axis or axes over which gradients are not summed yet: a row moves where any device touches it.

    Returns:
      An optax transformation with the inner state.

    Raises:
      ValueError: an unknown `moments`; by `init`, where `inner` accumulates micro-batches.

    Cost: one more read of gradient and state.

    Source: Su (kexue.fm 6869).

    Example:
      >>> optimizer = lazy_updates(optax.sgd(1.0, momentum=0.9))
      >>> table = jnp.ones((2, 1))
      >>> _, state = optimizer.update(jnp.array([[1.0], [1.0]]), optimizer.init(table), table)
      >>> updates, state = optimizer.update(jnp.array([[1.0], [0.0]]), state, table)
      >>> print(updates.ravel(), state[0].trace.ravel())
      [-1.9  0. ] [1.9 1. ]
    """
    if moments not in ("frozen", "decay"):
        raise ValueError(f"moments must be 'frozen' or 'decay', got {moments!r}.")
    inner = optax.with_extra_args_support(inner)

    def touched_rows(path: Path, g: jax.Array) -> tuple:
        chosen = select is None or (select(path) if callable(select) else matches(select, path))
        if not chosen or jnp.ndim(g) < 2 or not is_float(g):
            return (None,)
        touched = jnp.any(g != 0, axis=-1, keepdims=True)
        if axis_name is not None:
            touched = jax.lax.pmax(touched.astype(jnp.int32), axis_names(axis_name)) > 0
        return (touched,)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        touched = map_leaves(touched_rows, 1, updates)[0]
        updates, new = inner.update(updates, state, params, **extra)

        def hold(path: Path, u: jax.Array, rows: jax.Array | None) -> tuple:
            return (u if rows is None else jnp.where(rows, u, jnp.zeros_like(u)),)

        updates = map_leaves(hold, 1, updates, touched)[0]
        return updates, new if moments == "decay" else map_slots(_keep_rows, touched, new, state)

    def init(params: Any) -> Any:
        state = inner.init(params)
        if any(hasattr(part, "microbatch") or hasattr(part, "mini_step") for part in _parts(state)):
            raise ValueError(
                "inner must step at every call, and accumulates micro-batches: a row that the last of them does not touch "
                "would lose its gradient. Put lazy_updates inside: accumulate_updates(lazy_updates(inner), every)"
            )
        return state

    return optax.GradientTransformationExtraArgs(init, update)


def _keep_rows(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    if new.ndim != rows.ndim or new.shape[:-1] != rows.shape[:-1]:
        return new
    return jnp.where(rows, new, old)


def map_slots(function: Callable, tree: Any, *states: Any) -> Any:
    """function(leaf of `tree`, leaves of the states) over the leaves of states whose path ends in that of a leaf of `tree`.

    So slots of parameters are found in whatever chains and masks they lie in. Others are those of the first state. A parameter may be called as a
    slot is, `mu/w` beside `w`: where several ends fit, the slots begin where all that follows are parameters.
    """
    by_path = {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(states[0])[0]]
    mixed = {path[:i] for path in paths for i in range(len(path) + 1) if path[i:] not in by_path}

    def visit(keys: tuple, *slots: jax.Array) -> Any:
        path = path_of(keys)
        ends = [i for i in range(len(path) + 1) if path[i:] in by_path]
        if not ends:
            return slots[0]
        begin = next((i for i in ends if path[:i] not in mixed), ends[0])
        return function(by_path[path[begin:]], *slots)

    return jax.tree_util.tree_map_with_path(visit, *states)


class SkipState(NamedTuple):
    """`count` of updates made, of steps `skipped` in all and of those in a row (`consecutive`), and the inner state."""

    count: jax.Array
    skipped: jax.Array
    consecutive: jax.Array
    inner: Any


def skip_nonfinite(
    inner: optax.GradientTransformation, *, axis_name: Axes = None
) -> optax.GradientTransformationExtraArgs:
    r"""Skip a step whose gradient, or what the inner transformation makes of it, is not finite.

    Its update is zero, and the inner state stands still, so that moments and schedules never see it. It never gives in: after any number of bad
    steps the next good one is taken. Watch `consecutive` to stop a run that has diverged.

    Args:
      inner: any optax transformation; extra arguments reach it, and a `value` (a loss) that is not finite is bad too.
      axis_name: mapped axis or axes over which gradients or leaves are each device's own: all devices take the one decision.

    Returns:
      An optax transformation with state `SkipState`.

    Cost: one read of gradient and update.

    Example:
      >>> optimizer = skip_nonfinite(optax.sgd(1.0))
      >>> state = optimizer.init(jnp.zeros(2))
      >>> updates, state = optimizer.update(jnp.array([1.0, jnp.nan]), state)
      >>> print(updates, state.count, state.skipped)
      [0. 0.] 0 1
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipState:
        zero = jnp.zeros((), jnp.int32)
        return SkipState(zero, zero + 0, zero + 0, inner.init(params))

    def update(updates: Any, state: SkipState, params: Any = None, **extra: Any) -> tuple[Any, SkipState]:
        new, inner_state = inner.update(updates, state.inner, params, **extra)
        good = _all_finite((updates, new, extra.get("value")), axis_name)
        new = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), new)
        inner_state = jax.tree.map(lambda n, o: jnp.where(good, n, o), inner_state, state.inner)
        count = jnp.where(good, optax.safe_increment(state.count), state.count)
        skipped = jnp.where(good, state.skipped, optax.safe_increment(state.skipped))
        return new, SkipState(count, skipped, jnp.where(good, 0, state.consecutive + 1), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(tree: Any, axis_name: Axes) -> jax.Array:
    good = all_finite(tree)
    return good if axis_name is None else jax.lax.pmin(good.astype(jnp.int32), axis_names(axis_name)) > 0
