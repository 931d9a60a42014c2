"""Norms out of a chain, in its state from the start, so that loops over steps keep their types."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim._trees import Axes, map_leaves
from effattn_jax.optim.clipping import norms_of


class NormsState(NamedTuple):
    """{name: norm that the last update saw there}."""

    norms: dict[str, Any]


def log_norms(name: str, *, per_leaf: bool = False, axis_name: Axes = None) -> optax.GradientTransformationExtraArgs:
    r"""Put the norm of what passes here, and of the parameters, where a program can read it; nothing is changed.

    First in a chain it sees gradients, last in it updates. `logged_norms` reads them from the state of any chain.

    Args:
      name: of what passes here; "params" is the parameters', where `update` is given them.
      per_leaf: a norm a leaf, as a tree, beside the global one, under `name + "/leaves"`.
      axis_name: mapped axis or axes over which leaves are split.

    Returns:
      An optax transformation with state `NormsState`; the norms are 0 before the first update.

    Raises:
      ValueError: a name that is not a text, or "params".

    Example:
      >>> optimizer = optax.chain(log_norms("gradients"), optax.sgd(0.1), log_norms("updates"))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> print({name: round(float(norm), 3) for name, norm in logged_norms(state).items()})
      {'gradients': 5.0, 'params': 5.0, 'updates': 0.5}
    """
    if not isinstance(name, str) or name in ("", "params"):
        raise ValueError(f'name must be a text other than "params", got {name!r}.')

    def init(params: Any) -> NormsState:
        norms = {name: jnp.zeros((), jnp.float32), "params": jnp.zeros((), jnp.float32)}
        if per_leaf:
            norms[f"{name}/leaves"] = map_leaves(lambda path, p: (jnp.zeros((), jnp.float32),), 1, params)[0]
        return NormsState(norms)

    def update(updates: Any, state: NormsState, params: Any = None, **extra: Any) -> tuple[Any, NormsState]:
        del extra
        leaves = jax.tree.leaves(updates)
        groups = [leaves, jax.tree.leaves(params), *([x] for x in leaves if per_leaf)]
        passing, of_params, *each = (x.astype(jnp.float32) for x in norms_of(groups, axis_name))
        norms = {name: passing, "params": state.norms["params"] if params is None else of_params}
        if per_leaf:
            rest = iter(each)
            norms[f"{name}/leaves"] = map_leaves(lambda path, u: (next(rest),), 1, updates)[0]
        return updates, NormsState(norms)

    return optax.GradientTransformationExtraArgs(init, update)


def logged_norms(state: Any) -> dict[str, Any]:
    """All that `log_norms` has put into an optimizer's state, by name; of two with one name the later one.

    Example:
      >>> logged_norms(optax.chain(log_norms("gradients"), optax.sgd(0.1)).init(jnp.ones(2)))["gradients"]
      Array(0., dtype=float32)
    """
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, NormsState))
    return {name: norm for log in found if isinstance(log, NormsState) for name, norm in log.norms.items()}
