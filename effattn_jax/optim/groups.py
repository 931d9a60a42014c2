r"""Parameter groups: one table from regular expressions to what an optimizer does with the leaves that match.

    g -> clip by the norm of the clip group -> inner direction -> + weight_decay theta -> trust ratio -> * -lr * multiplier

with a row-wise (lazy) form and slots of another dtype where asked; one state, one counter for all groups.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effattn_jax._contract import nearest
from effattn_jax.optim._trees import Axes, Path, is_float, map_leaves, map_named, matches, named_leaves, wide
from effattn_jax.optim.adaptation import in_float32, layer_adaptation
from effattn_jax.optim.clipping import clip_by_global_norm, soft_clip_by_global_norm
from effattn_jax.optim.scales import table as text_table
from effattn_jax.optim.wrappers import lazy_updates, map_slots


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """What is done with the leaves of one rule; `parameter_groups` takes it as a dictionary too.

    Attributes:
      lr_multiplier: of the learning rate; a number, or a function of the path (a tuple of names).
      weight_decay: lambda, times the learning rate; a number or a function of the path.
      trust_ratio: whether the step is scaled to the norm of the leaf.
      clip_norm: longest norm of the gradient of the clip group, None for none.
      clip_group: leaves that share one norm; None is the leaves of this rule.
      soft_clip: the soft form of it.
      lazy: None, or "frozen" or "decay" as in `lazy_updates`.
      state_dtype: in which slots shaped as the leaf are kept: bfloat16, or None for float32. Arithmetic is float32 all the same, but a
        bfloat16 has eight bits: an average whose decay is above .995 (Adam's b2 = .999, Amos' b) moves too slowly in it, or not at all.
      scale, slot_shape: Amos' expected scale and slots: a value, or a function of the shape.
    """

    lr_multiplier: float | Callable[[Path], float] = 1.0
    weight_decay: float | Callable[[Path], float] = 0.0
    trust_ratio: bool = False
    clip_norm: float | None = None
    clip_group: str | None = None
    soft_clip: bool = False
    lazy: str | None = None
    state_dtype: Any = None
    scale: float | Callable[[tuple[int, ...]], Any] | None = None
    slot_shape: tuple | Callable[[tuple[int, ...]], Any] | None = None


Table = Mapping[str, Mapping[str, Any] | GroupOptions]


def parameter_groups(
    table: Table,
    *,
    learning_rate: float | optax.Schedule | None = 1e-3,
    inner: optax.GradientTransformation | Callable[..., optax.GradientTransformation] | None = None,
    axis_name: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    r"""One optimizer over all leaves, with options by the first rule whose regular expression is found in the path.

    Layer-wise learning rates in one line: `lr_multiplier=lambda path: 0.9 ** (11 - int(path[0].split("_")[1]))`.

    Args:
      table: {regular expression: options}, searched in the '/'-joined path, in order; options as `GroupOptions` or a
        dictionary of its fields. `group_table` prints what matched.
      learning_rate: a number or a schedule of the number of updates done; None where the inner updates have sign and learning rate in them (Amos, Tiger).
      inner: the direction, `optax.scale_by_adam()` by default; or a function that makes it, given `scale_fn` and `shape_fn` of the
        table, such as `functools.partial(amos, 0.01)`.
      axis_name: mapped axis or axes over which leaves are split.

    Returns:
      An optax transformation. `init(params)` checks the table against the parameters.

    Raises:
      ValueError: an unknown option or value; at `init`, a leaf that no rule matches, or a rule that is the first for no leaf.

    Example:
      >>> table = {"bias$": {}, "kernel$": {"weight_decay": 0.1, "lr_multiplier": 2.0}}
      >>> optimizer = parameter_groups(table, learning_rate=0.5, inner=optax.identity())
      >>> params = {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> print(updates["kernel"], updates["bias"])
      [-1.1] [-0.5]
    """
    groups = Groups(table)
    if inner is not None and not isinstance(inner, optax.GradientTransformation):
        inner = inner(scale_fn=groups.scale_fn, shape_fn=groups.shape_fn)
    elif any(rule.scale is not None or rule.slot_shape is not None for rule in groups.rules.values()):
        raise ValueError("scale and slot_shape need an inner that takes them, such as functools.partial(amos, 0.01).")
    if learning_rate is None and any(_may_act(rule.weight_decay) or rule.trust_ratio for rule in groups.rules.values()):
        raise ValueError("weight_decay and trust_ratio need a learning_rate; with None the inner updates are final.")
    stages = [_stored(inner or optax.scale_by_adam(), groups)]
    if any(_may_act(rule.weight_decay) for rule in groups.rules.values()):
        stages.append(_decay(groups))
    if any(rule.trust_ratio for rule in groups.rules.values()):
        adapted = lambda params: groups.by_leaf(params, lambda path, rule: rule.trust_ratio)  # noqa: E731
        stages.append(layer_adaptation(mask=adapted, axis_name=axis_name))
    if learning_rate is not None:
        stages.append(optax.scale_by_learning_rate(learning_rate))
    stepped = optax.chain(*stages, _multiply(groups))
    for moments in ("frozen", "decay"):
        if any(rule.lazy == moments for rule in groups.rules.values()):
            select = lambda path, kind=moments: groups.of(path).lazy == kind  # noqa: E731
            stepped = lazy_updates(stepped, moments=moments, select=select, axis_name=axis_name)
    chain = in_float32(optax.chain(*_clips(groups, axis_name), stepped))

    def init(params: Any) -> Any:
        groups.check(params)
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)


def group_table(table: Table, params: Any) -> str:
    """What `parameter_groups` makes of a table and a model, to be printed: each rule with its leaves and options.

    Raises:
      ValueError: as `parameter_groups(table).init(params)`.

    Example:
      >>> shapes = {"up": {"kernel": jnp.ones((2, 8)), "bias": jnp.ones(8)}}
      >>> print(group_table({"bias$": {}, "kernel$": {"weight_decay": 0.1}}, shapes))
      rule     leaves  parameters  options           first leaf
      bias$         1           8  defaults          up/bias
      kernel$       1          16  weight_decay=0.1  up/kernel
    """
    groups = Groups(table)
    groups.check(params)
    rows = [("rule", "leaves", "parameters", "options", "first leaf")]
    for pattern, rule in groups.rules.items():
        leaves = [(path, leaf) for path, leaf in named_leaves(params) if groups.pattern_of(path) == pattern]
        changed = [
            f"{f.name}={_shown(getattr(rule, f.name))}"
            for f in dataclasses.fields(rule)
            if getattr(rule, f.name) != f.default
        ]
        size = sum(math.prod(np.shape(leaf)) for _, leaf in leaves)
        rows.append((pattern, str(len(leaves)), str(size), ", ".join(changed) or "defaults", "/".join(leaves[0][0])))
    return text_table(rows, right=(1, 2))


class Groups:
    """A checked table, asked by path."""

    def __init__(self, table: Table):
        if not table:
            raise ValueError("table must have a rule; {'': {}} matches every leaf.")
        self.rules = {pattern: _options(pattern, given) for pattern, given in table.items()}
        clips = {}
        for pattern, rule in self.rules.items():
            if rule.clip_norm is None and rule.clip_group is None:
                continue
            group = pattern if rule.clip_group is None else rule.clip_group
            if clips.setdefault(group, (rule.clip_norm, rule.soft_clip)) != (rule.clip_norm, rule.soft_clip):
                raise ValueError(f"clip_group {group!r} must have one clip_norm and soft_clip in all its rules.")
        self.clips = clips

    def pattern_of(self, path: Path) -> str | None:
        """The first rule that matches."""
        return next((pattern for pattern in self.rules if matches(pattern, path)), None)

    def of(self, path: Path) -> GroupOptions:
        """The options of a leaf."""
        pattern = self.pattern_of(path)
        if pattern is None:
            raise ValueError(f"no rule matches {'/'.join(path)}; rules: {', '.join(map(repr, self.rules))}.")
        return self.rules[pattern]

    def by_leaf(self, tree: Any, function: Callable[[Path, GroupOptions], Any]) -> Any:
        """A tree of function(path, options)."""
        return map_named(lambda path, _: function(path, self.of(path)), tree)

    def check(self, params: Any) -> None:
        """Raises for leaves without a rule and for rules without a leaf."""
        found = {path: self.pattern_of(path) for path, _ in named_leaves(params)}
        lost = ["/".join(path) for path, pattern in found.items() if pattern is None]
        if lost:
            raise ValueError(
                f"no rule matches {len(lost)} of {len(found)} leaves: {_some(lost)}; rules: {', '.join(map(repr, self.rules))}."
            )
        idle = [pattern for pattern in self.rules if pattern not in found.values()]
        if idle:
            leaves = ["/".join(path) for path in found]
            raise ValueError(f"rule {idle[0]!r} is idle: it is the first match of no leaf; leaves: {_some(leaves)}.")

    def scale_fn(self, path: Path, shape: tuple[int, ...]) -> Any:
        """Amos' scale by the table; None is its own rule."""
        scale = self.of(path).scale
        return scale(shape) if callable(scale) else scale

    def shape_fn(self, path: Path, shape: tuple[int, ...]) -> Any:
        """Amos' slots by the table; None is its own rule."""
        slot = self.of(path).slot_shape
        return slot(shape) if callable(slot) else slot


def _options(pattern: str, given: Mapping[str, Any] | GroupOptions) -> GroupOptions:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} must be a regular expression: {error}.") from error
    if not isinstance(given, GroupOptions):
        known = [f.name for f in dataclasses.fields(GroupOptions)]
        for name in given:
            if name not in known:
                raise ValueError(f"option {name!r} of rule {pattern!r} is unknown; {nearest(name, known)}.")
        given = GroupOptions(**given)
    if not _holds_moments("float32" if given.state_dtype is None else given.state_dtype):
        raise ValueError(
            f"state_dtype of rule {pattern!r} must be bfloat16, a wider floating dtype or None, got {given.state_dtype!r}."
        )
    if given.lazy not in (None, "frozen", "decay"):
        raise ValueError(f"lazy of rule {pattern!r} must be None, 'frozen' or 'decay', got {given.lazy!r}.")
    if given.clip_norm is not None and not given.clip_norm > 0:
        raise ValueError(f"clip_norm of rule {pattern!r} must be positive, got {given.clip_norm}.")
    for name in ("lr_multiplier", "weight_decay"):
        value = getattr(given, name)
        if not callable(value) and not 0 <= value < math.inf:
            raise ValueError(
                f"{name} of rule {pattern!r} must be a finite number of at least 0 or a function of the path, got {value}."
            )
    if given.soft_clip and given.clip_norm is None:
        raise ValueError(f"soft_clip of rule {pattern!r} needs a clip_norm.")
    return given


def _holds_moments(dtype: Any) -> bool:
    """Whether it names a dtype with float32's range: others round a small second moment to 0, which divides the first."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        return False
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).tiny <= jnp.finfo(jnp.float32).tiny


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _shown(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def _may_act(value: Any) -> bool:
    return callable(value) or value != 0


def _value(option: Any, path: Path) -> float:
    return option(path) if callable(option) else option


def _clips(groups: Groups, axis_name: Axes) -> list[optax.GradientTransformation]:
    """A clipping by norm a clip group, over its leaves alone."""
    made = []
    for group, (norm, soft) in groups.clips.items():
        if norm is None:
            raise ValueError(f"clip_group {group!r} needs a clip_norm.")
        clip = (soft_clip_by_global_norm if soft else clip_by_global_norm)(norm, axis_name=axis_name)

        def inside(tree: Any, group: str = group) -> Any:
            return map_named(lambda path, _: group == _clip_group(groups, path), tree)

        made.append(optax.masked(clip, inside))
    return made


def _clip_group(groups: Groups, path: Path) -> str | None:
    rule = groups.of(path)
    if rule.clip_group is not None:
        return rule.clip_group
    return groups.pattern_of(path) if rule.clip_norm is not None else None


def _decay(groups: Groups) -> optax.GradientTransformation:
    def add(path: Path, u: jax.Array, p: jax.Array) -> tuple:
        rate = _value(groups.of(path).weight_decay, path)
        return (u + rate * p if is_float(u) and rate else u,)

    return optax.stateless(lambda updates, params: map_leaves(add, 1, updates, params)[0])


def _multiply(groups: Groups) -> optax.GradientTransformation:
    def multiply(path: Path, u: jax.Array) -> tuple:
        factor = _value(groups.of(path).lr_multiplier, path)
        return (u * factor if is_float(u) and factor != 1 else u,)

    return optax.stateless(lambda updates, params: map_leaves(multiply, 1, updates)[0])


def _stored(inner: optax.GradientTransformation, groups: Groups) -> optax.GradientTransformationExtraArgs:
    """The inner transformation with its slots kept in each group's state_dtype."""
    inner = optax.with_extra_args_support(inner)
    if all(rule.state_dtype is None for rule in groups.rules.values()):
        return inner

    def cast(state: Any, params: Any, back: bool) -> Any:
        dtypes = map_named(lambda path, p: _Stored(groups.of(path).state_dtype, jnp.shape(p)), params)
        return map_slots(lambda kept, slot: _cast(slot, kept, back), dtypes, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), params, back=False)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, updates, back=True), params, **extra)
        return updates, cast(state, updates, back=False)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """How the slots of a leaf are kept; a leaf of a tree itself."""

    dtype: Any
    shape: tuple[int, ...]


def _cast(slot: jax.Array, kept: _Stored, back: bool) -> jax.Array:
    if kept.dtype is None or not is_float(slot) or slot.ndim != len(kept.shape):
        return slot
    return wide(slot) if back else slot.astype(kept.dtype)
