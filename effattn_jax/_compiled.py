"""Kernels as one compiled program, outside `jax.jit` too, where JAX would compile each operation by itself: dozens of programs at a first call.

What a kernel checks of numbers rather than of shapes (is the cache full?) is said to `when_known`, which asks now where the numbers are known and
else, if the kernel is being compiled here, as soon as the program has run.
"""

import functools
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

__all__: list[str] = []

# With jax 0.7.2 a compiled gradient of a gradient comes out wrong where parts are jitted (not compiled, it is right); with 0.10 and 0.12 it is right.
NESTS = jax.__version_info__ >= (0, 10)

_tracing = threading.local()  # .asked: the questions of the kernel that this thread is tracing


class _Constant:
    """A NumPy array as a setting: equal ones are one."""

    def __init__(self, value: np.ndarray):
        self.value, self.parts = value.copy(), (value.shape, value.dtype, value.tobytes())

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Constant) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


_PLAIN = (bool, int, float, str, _Constant)


class _Form(NamedTuple):
    """What of a call is no array. The types of settings count too: 1 is not True."""

    tree: Any
    settings: tuple[tuple[type, Any] | None, ...]  # None where an array stands

    def arguments(self, arrays: tuple) -> Any:
        given = iter(arrays)
        leaves = [next(given) if setting is None else setting[1] for setting in self.settings]
        leaves = [leaf.value if isinstance(leaf, _Constant) else leaf for leaf in leaves]
        return jax.tree.unflatten(self.tree, leaves)


@jax.tree_util.register_pytree_node_class
class _Asked(list):
    """Pairs (question, values), with the values as children."""

    def tree_flatten(self):
        return [values for _, values in self], tuple(question for question, _ in self)

    @classmethod
    def tree_unflatten(cls, questions, values):
        return cls(zip(questions, values))


def when_known(question: Callable[..., None], *values: Any) -> None:
    """Calls `question(*values)` with NumPy arrays, to raise a ValueError about them; never, where only a program of the caller's will know them."""
    if not any(isinstance(value, jax.core.Tracer) for value in values):
        question(*map(np.asarray, values))
    elif getattr(_tracing, "asked", None) is not None:
        _tracing.asked.append((question, values))


def _traced(function: Callable, form: _Form, *arrays: Any) -> tuple[Any, _Asked]:
    outer, _tracing.asked = getattr(_tracing, "asked", None), _Asked()
    try:
        args, kwargs = form.arguments(arrays)
        return function(*args, **kwargs), _tracing.asked
    finally:
        _tracing.asked = outer


def _is_plain(setting: tuple[type, Any] | None) -> bool:
    return setting is None or setting[0] in _PLAIN


def _form(args: tuple, kwargs: dict) -> tuple[_Form | None, list]:
    """The form of a call and its arrays; no form where something is neither an array nor a plain setting: a function may hold what changes."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
    settings = tuple(None if isinstance(leaf, jax.Array | np.ndarray) else (type(leaf), leaf) for leaf in leaves)
    is_nested = any(isinstance(array, jax.core.Tracer) for array in arrays)
    if not all(map(_is_plain, settings)) or (is_nested and not NESTS):
        return None, []
    return _Form(tree, settings), arrays


def compiled(function: Callable, constants: tuple[str, ...] = ()) -> Callable:
    """The function as one program for each form of its call; inside a program or a derivative of the caller's, one step of it, traced once.

    Arrays are inputs of the program, plain settings (numbers, texts, flags) and NumPy arrays given by the names in `constants` a part of it. A call
    with anything else, such as a function, runs as it is written, and so does one that JAX cannot trace: then its error comes from here.
    """
    named = functools.partial(_traced, function)
    named.__name__ = function.__name__  # what profiles and dumps call the program
    program = jax.jit(named, static_argnums=0)

    def enter(args: tuple, kwargs: dict) -> Any:
        held = {name: _Constant(kwargs[name]) for name in constants if isinstance(kwargs.get(name), np.ndarray)}
        form, arrays = _form(args, kwargs | held)
        if form is None:
            return function(*args, **kwargs)
        try:
            out, asked = program(form, *arrays)
        except (TypeError, ValueError):
            return None
        for question, values in asked:
            when_known(question, *values)
        return out

    def call(*args, **kwargs):
        out = enter(args, kwargs)
        return function(*args, **kwargs) if out is None else out

    # With the function's own globals: doctest takes a function to be of the module whose globals it has.
    call = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
    return functools.wraps(function)(call)
