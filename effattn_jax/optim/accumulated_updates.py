r"""Gradient accumulation as a transformation that is called once a micro-batch.

    G <- [i > 0] G + w_i g_i,    W <- [i > 0] W + w_i,    after `every` calls: inner.update(G / W)

State: one float32 gradient G beside the inner state. Between the ends of windows the inner transformation is not run
at all, so that its moments, schedules and counters know updates only, and nothing it would make of half a window
reaches the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax._contract import is_whole
from effattn_jax.optim._arrays import all_finite_everywhere, psum, scaled, vary
from effattn_jax.optim._trees import Axes, is_float, number, wide


class AccumulationState(NamedTuple):
    """Where a window stands.

    `microbatch` counts the calls in this window (0 right after its end), `count` the updates made; `weight`, `value` and
    `gradients` are the window's sums, void while `microbatch` is 0; `inner` is the inner transformation's state.
    """

    microbatch: jax.Array
    count: jax.Array
    weight: jax.Array
    value: jax.Array
    gradients: Any
    inner: Any


class AccumulatedTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation with two further functions.

    `apply(gradients, state, params, **extra) -> (params, state)` is `update` and `optax.apply_updates` in one, and leaves
    the parameters alone between the ends of windows, where adding zeros would cost as much as accumulating.
    `flush(state, params, **extra) -> (updates, state)` ends a window early, with the weight it has; between windows it
    gives zeros.
    """

    def __new__(cls, init: Callable, update: Callable, apply: Callable, flush: Callable) -> "AccumulatedTransformation":
        made = super().__new__(cls, init, update)
        made.apply, made.flush = apply, flush
        return made


class _Ending(NamedTuple):
    """What a window ends in: updates of the types of `like`, or, without one, the parameters after them.

    The two branches give (result, whether the inner update ran, count, inner state).
    """

    params: Any
    like: Any
    axis_name: Axes

    def idle(self, state: Any) -> tuple:
        """Nothing happens. The result is a buffer at hand, which costs nothing; `close` makes zeros of it."""
        if self.like is None:
            result = self.params
        elif self.axis_name is None or self.params is None:
            result = self.like
        else:  # the gradients are a device's own, the updates the same everywhere, as the parameters are
            result = jax.tree.map(lambda p, g: jnp.zeros_like(p, dtype=jnp.result_type(g)), self.params, self.like)
        return result, jnp.array(False), state.count, state.inner

    def run(self, inner: Any, gradients: Any, state: Any, extra: dict) -> tuple:
        """The inner update, made of `gradients`."""
        params = None if self.params is None else jax.tree.map(wide, self.params)
        updates, inner_state = inner.update(gradients, state.inner, params, **extra)
        if self.like is None:
            result = optax.apply_updates(self.params, updates)
        else:
            result = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), updates, self.like)
        return result, jnp.array(True), optax.safe_increment(state.count), inner_state

    def run_where(self, ready: jax.Array, inner: Any, gradients: Any, state: Any, extra: dict) -> tuple:
        """`run` where ready, else `idle`."""
        return jax.lax.cond(ready, lambda state: self.run(inner, gradients, state, extra), self.idle, state)

    def close(self, branch: tuple, state: Any) -> tuple[Any, Any]:
        """(updates or parameters, the state with what the branch left)."""
        result, ran, count, inner_state = branch
        if self.like is not None:
            result = jax.tree.map(lambda u: jnp.where(ran, u, jnp.zeros((), u.dtype)), result)
        return result, state._replace(count=count, inner=inner_state)


def accumulate_updates(
    inner: optax.GradientTransformation,
    every: int | Callable[[jax.Array], Any],
    *,
    axis_name: Axes = None,
    reduce_at_end: bool = False,
    drop_nonfinite: str = "microbatch",
) -> AccumulatedTransformation:
    r"""Hand the weighted mean gradient of `every` micro-batches to the inner transformation: sum w_i g_i / sum w_i.

    `update(gradients, state, params, weight=w)` takes the gradient of a micro-batch's *mean* loss and its weight (its
    number of tokens, say; 1 when left out), and returns zeros, or the inner updates at the end of the window. The inner
    transformation sees float32 gradients and parameters (float64 where they are) whatever the types outside; an update
    has the type of its gradient. A micro-batch with a gradient, weight or value that is not finite has weight 0 (or its
    window has, see `drop_nonfinite`); a window of weight 0 gives a zero update and is not counted. `value=` (a loss), where given, reaches the inner
    transformation as its weighted mean too; other extra arguments are those of the window's last call.
    `flush(state, params)` ends a window early; `apply` is `update` and `optax.apply_updates` in one, and faster.

    Args:
      inner: any optax transformation.
      every: micro-batches in a window: a positive integer, or a function of the number of updates made.
      axis_name: mapped axis or axes over which gradients and weights are each device's own (inside `shard_map` or
        `pmap`): the mean goes over the devices too. A device's micro-batch that is not finite is left out alone. Axes over
        which leaves are split need no name under shard_map's default checks.
      reduce_at_end: False reduces over `axis_name` at every call, and the state is the same on all devices. True reduces
        once a window; `state.weight`, `.value` and `.gradients` are then each device's own (`init` inside the mapped function).
      drop_nonfinite: "microbatch" leaves out the micro-batches that are not finite, at the price of waiting for the whole
        gradient before any of it is added; "window" leaves out the windows they are in, by one look at their sums.

    Returns:
      An `AccumulatedTransformation` with state `AccumulationState`.

    Raises:
      ValueError: if `every` is neither a positive integer nor a function, or `drop_nonfinite` neither word.

    Cost: one multiply-add a micro-batch; the inner update once a window. State: the inner one and one float32 gradient.
    `python -m benchmarks.accumulation` (2-core x86 CPU, 2026-11-27), in times of a bare scan over gradients with one AdamW
    update, over several runs: `apply` 1.05 to 1.14, `update` 1.14 to 1.26; by window `apply` 0.92 to 1.00 and `update` 1.06
    to 1.16; optax.MultiSteps 1.76 to 1.93.

    Source: Su, "Gradient accumulation" (kexue.fm 6794); the counting of updates, as in MaxText's loop.

    Example:
      >>> optimizer = accumulate_updates(optax.sgd(1.0), every=2)
      >>> params = jnp.array(0.0)
      >>> state = optimizer.init(params)
      >>> first, state = optimizer.update(jnp.array(1.0), state, params, weight=3)
      >>> second, state = optimizer.update(jnp.array(5.0), state, params, weight=1)
      >>> print(first, second, state.count)
      0.0 -2.0 1
    """
    if not callable(every) and not is_whole(every, 1):
        raise ValueError(f"every must be a positive integer or a function of the number of updates, got {every!r}.")
    by_window = _is_by_window(drop_nonfinite)
    inner = optax.with_extra_args_support(inner)
    late = axis_name if reduce_at_end else None

    def init(params: Any) -> AccumulationState:
        zero = jnp.zeros((), jnp.result_type(float))
        sums = (zero, zero + 0, jax.tree.map(lambda p: wide(jnp.zeros_like(p)), params))
        counters = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        return AccumulationState(*counters, *_vary_where_mapped(sums, late), inner.init(jax.tree.map(wide, params)))

    def counts(weight: jax.Array, value: jax.Array, gradients: Any) -> jax.Array:
        good = weight > 0
        return good & all_finite_everywhere(gradients, weight, value, apart=axis_name) if by_window else good

    def end(ready: jax.Array, state: AccumulationState, ending: _Ending, extra: dict) -> tuple[Any, AccumulationState]:
        def run(state: AccumulationState) -> tuple:
            weight, value, gradients = _psum_floats((state.weight, state.value, state.gradients), late)
            reciprocal = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
            given = dict(extra, value=value * reciprocal) if "value" in extra else extra
            mean = jax.tree.map(lambda g: _times(g, reciprocal), gradients)
            if late is None:
                return ending.run(inner, mean, state, given)
            return ending.run_where(counts(weight, value, gradients), inner, mean, state, given)

        if late is None:  # the sums are at hand, so that one branch is enough
            sums = state.weight, state.value, state.gradients
            ready = jax.lax.cond(ready, counts, lambda *_: jnp.array(False), *sums)
        return ending.close(jax.lax.cond(ready, run, ending.idle, state), state)

    def add(updates: Any, state: AccumulationState, weight: Any, extra: dict) -> tuple[jax.Array, AccumulationState]:
        state = _add(state, updates, weight, extra.get("value", 0), reduce_at_end, axis_name, by_window)
        return state.microbatch >= (every(state.count) if callable(every) else every), state

    def update(updates: Any, state: AccumulationState, params: Any = None, *, weight: Any = 1, **extra: Any):
        ready, state = add(updates, state, weight, extra)
        updates, state = end(ready, state, _Ending(params, updates, axis_name), extra)
        return updates, state._replace(microbatch=jnp.where(ready, 0, state.microbatch))

    def apply(gradients: Any, state: AccumulationState, params: Any, *, weight: Any = 1, **extra: Any):
        ready, state = add(gradients, state, weight, extra)
        params, state = end(ready, state, _Ending(params, None, axis_name), extra)
        return params, state._replace(microbatch=jnp.where(ready, 0, state.microbatch))

    def flush(state: AccumulationState, params: Any = None, **extra: Any):
        like = state.gradients if params is None else params
        updates, state = end(state.microbatch > 0, state, _Ending(params, like, axis_name), extra)
        return updates, state._replace(microbatch=jnp.zeros_like(state.microbatch))

    return AccumulatedTransformation(init, update, apply, flush)


def accumulate_in_momentum(
    inner: optax.GradientTransformation, every: int, decay: float = 0.9, *, axis_name: Axes = None
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulate in the momentum itself, without a buffer of gradients.

        m <- (decay if a window begins, else 1) m + (1 - decay) g / every,    at its end: inner.update(m)

    After `every` calls m = decay m + (1 - decay) mean(g): exactly the momentum of the whole batch. So it is exact for
    whatever depends on the gradient through m alone, SGD with momentum (`inner = optax.scale(-lr)`) or the sign of m
    (`optax.sign`, then Tiger's scaling); not for Adam, whose second moment needs the gradients apart. Micro-batches weigh
    the same; one that is not finite adds nothing. `optax.trace` is m / (1 - decay).

    Args:
      inner: what is done with m once a window; zeros are returned in between, and `inner` is not run.
      every: micro-batches in a window.
      decay: the momentum's factor in [0, 1).
      axis_name: mapped axis or axes over which gradients are each device's own; their mean is taken.

    Raises:
      ValueError: if `every` is no positive integer or `decay` not in [0, 1).

    Cost: one multiply-add a micro-batch. State: the momentum in float32 that there would be anyway, and a counter.

    Source: Su, "Gradient accumulation hidden in momentum" (kexue.fm 8634).

    Example:
      >>> optimizer = accumulate_in_momentum(optax.scale(-1.0), every=2, decay=0.5)
      >>> state = optimizer.init(jnp.array(0.0))
      >>> _, state = optimizer.update(jnp.array(1.0), state)
      >>> print(optimizer.update(jnp.array(3.0), state)[0])
      -1.0
    """
    if not is_whole(every, 1):
        raise ValueError(f"every must be a positive integer, got {every!r}.")
    if not 0 <= number(decay) < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> MomentumAccumulationState:
        momentum = jax.tree.map(lambda p: wide(jnp.zeros_like(p)), params)
        zero = jnp.zeros((), jnp.int32)
        return MomentumAccumulationState(zero, zero + 0, momentum, inner.init(jax.tree.map(wide, params)))

    def update(updates: Any, state: MomentumAccumulationState, params: Any = None, **extra: Any):
        finite = all_finite_everywhere(updates, apart=axis_name)
        share = (1 - decay) / (every if axis_name is None else every * jax.lax.psum(1, axis_name))
        added = jax.tree.map(lambda g: jnp.where(finite, _times(wide(g), share), 0), updates)
        kept = jnp.where(state.microbatch == 0, decay, 1.0)
        momentum = jax.tree.map(lambda m, g: _plus(_times(m, kept), g), state.momentum, _psum_floats(added, axis_name))
        state = state._replace(microbatch=state.microbatch + 1, momentum=momentum)
        ready = state.microbatch >= every
        ending = _Ending(params, updates, axis_name)
        updates, state = ending.close(ending.run_where(ready, inner, momentum, state, extra), state)
        return updates, state._replace(microbatch=jnp.where(ready, 0, state.microbatch))

    return optax.GradientTransformationExtraArgs(init, update)


class MomentumAccumulationState(NamedTuple):
    """As `AccumulationState`; the window's sums are part of `momentum`."""

    microbatch: jax.Array
    count: jax.Array
    momentum: Any
    inner: Any


def _is_by_window(drop_nonfinite: str) -> bool:
    if drop_nonfinite not in ("microbatch", "window"):
        raise ValueError(f'drop_nonfinite must be "microbatch" or "window", got {drop_nonfinite!r}.')
    return drop_nonfinite == "window"


def _add(
    state: AccumulationState, updates: Any, weight: Any, value: Any, late: bool, axis_name: Axes, by_window: bool
) -> AccumulationState:
    """The state with one micro-batch in its sums; the sums of a finished window are overwritten.

    They are reduced over `axis_name` unless that comes late; a micro-batch that is not finite is left out unless that is
    decided by window.
    """
    weight, value = (jnp.asarray(x).astype(s.dtype) for x, s in ((weight, state.weight), (value, state.value)))
    added, begun = jax.tree.map(lambda g: _times(wide(g), weight), updates), state.microbatch > 0
    added = (weight, value * weight, added)
    if not by_window:
        finite = all_finite_everywhere(updates, weight, value, apart=axis_name)
        added = jax.tree.map(lambda x: jnp.where(finite, x, 0), added)
    if not late:
        added = _psum_floats(added, axis_name)

    def plus(total, x):
        return _plus(jnp.where(begun, total, 0), x)

    weight, value, gradients = jax.tree.map(plus, (state.weight, state.value, state.gradients), added)
    return state._replace(microbatch=state.microbatch + 1, weight=weight, value=value, gradients=gradients)


# Integer leaves are no gradients: the last of them is kept, as it is.


def _times(x: jax.Array, factor: Any) -> jax.Array:
    return scaled(x, jnp.asarray(factor)) if is_float(x) else x


def _plus(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(total.dtype) if is_float(total) else x.astype(total.dtype)


def _psum_floats(tree: Any, axis_name: Axes) -> Any:
    summed = psum(jax.tree.map(lambda x: x if is_float(x) else None, tree), axis_name)
    return jax.tree.map(lambda x, total: x if total is None else total, tree, summed)


def _vary_where_mapped(tree: Any, axis_name: Axes) -> Any:
    try:
        return vary(tree, axis_name)
    except NameError:  # made outside the mapped function, which will split it
        return tree
