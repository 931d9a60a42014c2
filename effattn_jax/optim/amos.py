r"""Amos: Adam's step with a weight decay and a learning-rate decay derived from the expected scale of each leaf.

    s = mean of g^2 over the axes that the slot v lacks;   v <- beta v + (1 - beta) s;   r = (1 - beta^t) / v
    gamma = c xi^2 r s,    c = (1 + c_coef sqrt(xi) b)^(-1/2),    d = 1 / (1 + d_coef sqrt(xi eta) b)
    theta <- theta - d [xi eta sqrt(r) g + (gamma / 2 + extra_l2) theta];    b <- b + gamma (1 + b)

with xi the learning rate, eta the scale that the entries of the leaf are expected to end at. Cost: two reads of gradient
and parameters. State: v and b, from one scalar a leaf up to its shape, and the momentum where there is one.
Source: Tian and Parikh 2022 (arXiv 2210.11693).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from effattn_jax.optim._trees import Path, axis_names, is_float, map_leaves, named_leaves, number, varying, wide
from effattn_jax.optim.scales import AmosLeaf, Rule, Shape, plan

TINY = 2.0**-125


class AmosState(NamedTuple):
    """`count` of updates, second moments `v` and decay `b` in their reduced shapes, `momentum` of the update or an empty state."""

    count: jax.Array
    v: Any
    b: Any
    momentum: Any


def amos(
    learning_rate: float | optax.Schedule,
    *,
    scale_fn: Rule = None,
    shape_fn: Rule = None,
    beta: float = 0.999,
    momentum: float | None = None,
    clip_value: float | None = None,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Amos with momentum and clipping by value; the equations stand at the head of the file.

    Entries of g are clipped to [-clip_value, clip_value] before, and the update is averaged after,
    m <- momentum m + (1 - momentum) update, its decay included. Updates have sign and learning rate in them: nothing may
    scale them afterwards (no `optax.scale_by_learning_rate` behind it). Slots and arithmetic are float32 (float64 for float64 leaves);
    an update has the dtype of its gradient.

    Args:
      learning_rate: xi, about 1 / sqrt(number of batches in the data); or a schedule of the number of the update, which sees 1 first.
      scale_fn: eta by `scale_fn(path, shape)`, path a tuple of names; or {regular expression: number, or function of the
        shape}, where the first found in the '/'-joined path counts. None reads it from names and shapes (`amos_table` prints it).
      shape_fn: shape of v and b in the same two forms: (), or the leaf's with some axes 1. None takes (1, out) for
        matrices, (rows, 1) for embeddings, () elsewhere; `lambda path, shape: shape` is the full one.
      beta: decay of v; 1 - beta is of the order of xi.
      momentum: None for none, which leaves the state at a thousandth of Adam's.
      clip_value: None for none; 1 for losses that are means.
      extra_l2: further weight decay.
      c_coef, d_coef: of the two decays.
      axis_name: mapped axes over which leaves are split along their first axis (inside `shard_map` or `pmap`); or a tree of
        PartitionSpec as given to shard_map, where they are split otherwise. Scales and means are then those of the whole leaf.

    Returns:
      An optax transformation with state `AmosState`.

    Raises:
      ValueError: a negative rate, beta or momentum outside [0, 1), a leaf without a rule, a slot that does not fit, no params.

    Example:
      >>> optimizer = amos(0.1, momentum=0.9)
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> print(updates["kernel"][0], state.v["kernel"].shape)
      [-0.00757107 -0.00757107 -0.00757107] (1, 3)
    """
    _check(clip_value=clip_value is None or number(clip_value) > 0, given=clip_value, rule="positive or None")
    _check(momentum=momentum is None or 0 <= number(momentum) < 1, given=momentum, rule="in [0, 1) or None")
    options = _Options(beta, momentum, clip_value, extra_l2, c_coef, d_coef)
    return _transformation(learning_rate, scale_fn, shape_fn, options, axis_name)


def scale_by_amos(
    learning_rate: float | optax.Schedule,
    *,
    scale_fn: Rule = None,
    shape_fn: Rule = None,
    beta: float = 0.999,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Amos alone, without momentum and clipping: for chains that bring their own. Arguments and state are as in `amos`.

    Example:
      >>> optimizer = optax.chain(optax.clip(1.0), scale_by_amos(0.1, shape_fn=lambda path, shape: shape))
      >>> state = optimizer.init(jnp.ones(3))
      >>> print(optimizer.update(jnp.zeros(3), state, jnp.ones(3))[0])
      [-0. -0. -0.]
    """
    return _transformation(
        learning_rate, scale_fn, shape_fn, _Options(beta, None, None, extra_l2, c_coef, d_coef), axis_name
    )


class _Options(NamedTuple):
    beta: float
    momentum: float | None
    clip_value: float | None
    extra_l2: float
    c_coef: float
    d_coef: float


def _transformation(
    learning_rate: float | optax.Schedule, scale_fn: Rule, shape_fn: Rule, options: _Options, axis_name: Any
) -> optax.GradientTransformationExtraArgs:
    for name in ("extra_l2", "c_coef", "d_coef"):
        _check(**{name: number(getattr(options, name)) >= 0}, given=getattr(options, name), rule="at least 0")
    _check(beta=0 <= number(options.beta) < 1, given=options.beta, rule="in [0, 1)")
    _check(learning_rate=callable(learning_rate) or number(learning_rate) >= 0, given=learning_rate, rule="at least 0")

    def init(params: Any) -> AmosState:
        split = _Split(params, axis_name if _is_mapped(axis_name) else None)
        planned = plan(params, scale_fn, shape_fn, split.whole)

        def slots(path: Path, p: jax.Array) -> tuple:
            if not is_float(p):
                return None, None, None
            zeros = jnp.zeros_like(wide(p))
            # Made as the first update makes it, so that its sharding is the same from the start.
            slot = _mean_square(zeros, planned[path], split.axes[path])
            return slot, slot + 0, zeros

        v, b, momentum = map_leaves(slots, 3, params)
        kept = optax.EmptyState() if options.momentum is None else momentum
        return AmosState(jnp.zeros((), jnp.int32), v, b, kept)

    def update(updates: Any, state: AmosState, params: Any = None, **extra: Any) -> tuple[Any, AmosState]:
        del extra
        if params is None:
            raise ValueError("amos needs the parameters: call update(updates, state, params).")
        split = _Split(params, axis_name)
        planned = plan(params, scale_fn, shape_fn, split.whole)
        count = optax.safe_increment(state.count)
        rate = learning_rate(count) if callable(learning_rate) else learning_rate

        def one(path: Path, g: jax.Array, p: jax.Array, v: jax.Array, b: jax.Array, m: jax.Array | None) -> tuple:
            if v is None:
                return g, None, None, None
            mean_square = partial(_mean_square, leaf=planned[path], axes=split.axes[path])
            return _step(options, count, rate, planned[path].scale, mean_square, g, p, v, b, m)

        momentum = jax.tree.map(lambda p: None, params) if options.momentum is None else state.momentum
        updates, v, b, momentum = map_leaves(one, 4, updates, params, state.v, state.b, momentum)
        kept = state.momentum if options.momentum is None else momentum
        return updates, AmosState(count, v, b, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    o: _Options,
    count: jax.Array,
    rate: Any,
    scale: Any,
    mean_square: Callable[[jax.Array], jax.Array],
    g: jax.Array,
    p: jax.Array,
    v: jax.Array,
    b: jax.Array,
    m: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(update, v, b, momentum) of one leaf."""
    dtype, g, p = g.dtype, wide(g), wide(p)
    xi, eta = jnp.asarray(rate, v.dtype), jnp.asarray(scale, v.dtype)
    if o.clip_value is not None:
        g = _clipped(g, o.clip_value)
    s = mean_square(g)
    v = o.beta * v + (1 - o.beta) * s
    r = _debias(o.beta, count, v.dtype) / jnp.maximum(v, TINY)
    c, slower = jax.lax.rsqrt(1 + o.c_coef * jnp.sqrt(xi) * b), 1 + o.d_coef * jnp.sqrt(xi * eta) * b
    gamma = c * xi**2 * r * s
    of_g, of_p = xi * eta * jnp.sqrt(r) / slower, (gamma / 2 + o.extra_l2) / slower
    if v.size < g.size:  # once a slot; the compiler would take these roots again at each entry
        of_g, of_p = jax.lax.optimization_barrier((of_g, of_p))
    step = -(of_g * g + of_p * p)
    if m is not None:
        m = step = o.momentum * m + (1 - o.momentum) * step
    return step.astype(dtype), v, b + gamma * (1 + b), m


def _clipped(g: jax.Array, most: Any) -> jax.Array:
    """Entries of size `most` at most; NaN passes."""
    if jnp.iscomplexobj(g):
        return g * jnp.where(jnp.abs(g) > most, most / jnp.abs(g), 1)
    # Comparisons vectorise where jnp.clip's minimum and maximum, which look for NaN, do not.
    return jnp.where(g > most, most, jnp.where(g < -most, -most, g))


class _Split:
    """Which axes of which leaves lie on which mapped axes; `axes[path]` has a tuple of names an axis."""

    def __init__(self, params: Any, axis_name: Any):
        leaves = [(path, x) for path, x in named_leaves(params)]
        if axis_name is None or isinstance(axis_name, str) or _are_names(axis_name):
            specs = [(varying(x, axis_name),) if axis_name and jnp.ndim(x) else () for _, x in leaves]
        else:
            spread = jax.tree.broadcast(axis_name, params, is_leaf=lambda x: isinstance(x, PartitionSpec))
            specs = jax.tree.leaves(spread, is_leaf=lambda x: isinstance(x, PartitionSpec))
        self.axes = {path: _names_by_axis(spec, jnp.ndim(x)) for (path, x), spec in zip(leaves, specs)}

    def whole(self, path: Path, shape: Shape) -> Shape:
        """The shape of the leaf of which this device has a part."""
        return tuple(n * math.prod(jax.lax.psum(1, name) for name in names) for n, names in zip(shape, self.axes[path]))


def _are_names(axis_name: Any) -> bool:
    is_plain = isinstance(axis_name, tuple) and not isinstance(axis_name, PartitionSpec)
    return is_plain and all(isinstance(name, str) for name in axis_name)


def _names_by_axis(spec: Any, rank: int) -> tuple[tuple[str, ...], ...]:
    named = tuple(axis_names(entry) for entry in spec)
    return named + ((),) * (rank - len(named))


def _is_mapped(axis_name: Any) -> bool:
    """Whether this runs inside the mapped function; outside, leaves are whole."""
    entries = jax.tree.leaves(axis_name, is_leaf=lambda x: isinstance(x, PartitionSpec))
    specs = [entry if isinstance(entry, PartitionSpec) else (entry,) for entry in entries]
    names = {name for spec in specs for entry in spec for name in axis_names(entry)}
    try:
        return bool([jax.lax.axis_index(name) for name in names])
    except NameError:
        return False


def _mean_square(x: jax.Array, leaf: AmosLeaf, axes: tuple[tuple[str, ...], ...]) -> jax.Array:
    """The mean of |x|^2 over the axes that the slot lacks, over all devices that have a part of them."""
    reduced = [i for i in range(x.ndim) if not leaf.slot or (leaf.slot[i] == 1 and leaf.shape[i] != 1)]
    squares = (x * jnp.conj(x)).real
    mean = jnp.zeros(leaf.slot, squares.dtype)
    if x.size:
        mean = jnp.mean(squares, axis=tuple(reduced), keepdims=bool(leaf.slot))
    names = tuple(name for i in reduced for name in axes[i])
    return jax.lax.pmean(mean, names) if names else mean


def _debias(beta: float, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - beta^count, exact for large beta: in float32, 1 - 0.999 has an error of 5e-5."""
    if isinstance(beta, int | float):
        log = math.log(beta) if beta else -math.inf
    else:
        log = jnp.log(beta)
    return -jnp.expm1(count.astype(dtype) * jnp.asarray(log, dtype))


def _check(*, given: Any, rule: str, **argument: bool) -> None:
    [(name, ok)] = argument.items()
    if not ok:
        raise ValueError(f"{name} must be {rule}, got {given}.")
