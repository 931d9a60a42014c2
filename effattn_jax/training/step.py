r"""One update, as a pure function of (state, batch, number of the step).

    key = fold_in(seed, step);  g = grad of the weighted mean loss;  state <- optimizer(clip(g))

The update is taken only if the loss, the gradient and the new parameters are finite and the state is the one that the
step was made for. So after a bad step the state stands still at the last good one, though later steps may already be on
their way to the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effattn_jax.optim import accumulate_gradients, global_norm
from effattn_jax.optim.clipping import norms_of


class TrainState(NamedTuple):
    """All that a run is, besides its config: the step is the position in the data, the seed gives every random number.

    Attributes:
      step: number of updates done, int32.
      seed: of initialisation and dropout, uint32.
      params: the model's parameters.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    opt_state: Any


def init_state(task: Any, optimizer: optax.GradientTransformation, seed: jax.Array, batch: Any) -> TrainState:
    """The state before the first step; `batch` gives shapes only."""
    params = task.init(jax.random.key(seed), batch)
    opt_state = optimizer.init(jax.tree.map(_wide, params))
    return TrainState(jnp.zeros((), jnp.int32), jnp.asarray(seed, jnp.uint32), params, opt_state)


def make_train_step(
    task: Any, optimizer: optax.GradientTransformation, schedule: optax.Schedule, num_microbatches: int = 1
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """The function (state, batch, step) -> (state, metrics), to be compiled with the state donated.

    Metrics: `loss` of the step; `grad_norm` before clipping, `update_norm` of what is added to the parameters and
    `param_norm` of them before; the `learning_rate`; and `good`, whether the update was taken.
    """
    gradients_of = accumulate_gradients(task.loss, num_microbatches)

    def train_step(state, batch, step):
        # Initialisation has used the seed's key itself; each step's key comes from a child that it never saw.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), 1), state.step)
        loss, gradients = gradients_of(state.params, batch, key)
        norm = global_norm(gradients)
        # The optimizer sees float32 throughout, whatever the type of the parameters.
        params = jax.tree.map(_wide, state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        new = TrainState(state.step + 1, state.seed, optax.apply_updates(state.params, updates), opt_state)
        trees = (updates, params, new.params)
        update_norm, param_norm, new_norm = norms_of([jax.tree.leaves(tree) for tree in trees])
        numbers = {"loss": loss, "grad_norm": norm, "update_norm": update_norm, "param_norm": param_norm}
        # The new parameters tell of the update too, and a finite one may lead beyond float16's largest number.
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(new_norm) & (state.step == step)
        state = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
        return state, numbers | {"learning_rate": jnp.asarray(schedule(step)), "good": good}

    return train_step


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
