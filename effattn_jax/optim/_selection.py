"""Which arrays of a loss function's arguments a wrapper perturbs or penalises, and the gradient by them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn_jax.optim._arrays import axis_size, psum, vary
from effattn_jax.optim._trees import Axes, is_float, matches, named_leaves, wide

Select = str | int | tuple[int, str]


def choose(select: Select, arguments: tuple) -> tuple[list[jax.Array], Callable[[list], tuple]]:
    """(the chosen leaves, a function that puts others in their place and returns all arguments)."""
    place, pattern = (0, select) if isinstance(select, str) else (select, "") if isinstance(select, int) else select
    if not 0 <= place < len(arguments):
        raise ValueError(
            f"select={select!r} names argument {place}, but loss_fn was given {len(arguments)} by position."
        )
    named, treedef = named_leaves(arguments[place]), jax.tree.structure(arguments[place])
    leaves = [leaf for _, leaf in named]
    chosen = [i for i, (path, leaf) in enumerate(named) if is_float(leaf) and matches(pattern, path)]
    if not chosen:
        names = ["/".join(path) for path, _ in named]
        raise ValueError(
            f"select={select!r} matches no floating leaf of argument {place}, which has the paths {names}."
        )

    def rebuild(arrays: list) -> tuple:
        filled = list(leaves)
        for i, array in zip(chosen, arrays, strict=True):
            filled[i] = array
        return *arguments[:place], jax.tree.unflatten(treedef, filled), *arguments[place + 1 :]

    return [jnp.asarray(leaves[i]) for i in chosen], rebuild


def is_parameters(select: Select) -> bool:
    """Whether a selection is a pattern over parameter paths, not the place of an input."""
    return isinstance(select, str)


def split_loss(out: Any) -> tuple[jax.Array, tuple]:
    """A loss function's return value as (scalar, its auxiliary output in a tuple of at most one)."""
    return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())


def join_loss(loss: jax.Array, auxiliary: tuple) -> Any:
    """The reverse of `split_loss`."""
    return (loss, *auxiliary) if auxiliary else loss


def value_and_gradients(
    function: Callable[[list], Any], arrays: list, *, parameters: bool, axis_name: Axes = None
) -> tuple[tuple[jax.Array, tuple], list[jax.Array]]:
    """((loss, auxiliary), float32 gradients by the arrays), of the mean over `axis_name` of the devices' losses.

    Parameters are the same on every device and their gradients averaged; other arrays are a device's own part.
    """
    inputs = vary(arrays, axis_name) if parameters else arrays
    out, gradients = jax.value_and_grad(lambda a: split_loss(function(a)), has_aux=True)(inputs)
    devices = axis_size(axis_name)
    gradients = [wide(g) / devices for g in gradients]
    return out, psum(gradients, axis_name) if parameters else gradients


def sum_of_squares(arrays: list, *, axis_name: Axes = None) -> jax.Array:
    """sum |x|^2 in float32, over the devices too where the arrays are parts."""
    return psum(sum(jnp.sum(jnp.abs(x) ** 2) for x in map(wide, arrays)), axis_name)
