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

from effattn_jax._unit_axes import without_unit_axes

try:
    from jax.extend.core import get_opaque_trace_state as trace_now
    from jax.extend.core import unsafe_am_i_under_a_jit_DO_NOT_USE as in_program
except ImportError:  # jax 0.7
    from jax.core import get_opaque_trace_state as trace_now
    from jax.core import unsafe_am_i_under_a_jit_DO_NOT_USE as in_program

__all__: list[str] = []

# With jax 0.7.2 a compiled gradient of a gradient comes out wrong where parts are jitted (not compiled, it is right); with 0.10 and 0.12 it is right.
NESTS = jax.__version_info__ >= (0, 10)

# .kernel: the `_Trace` of the kernel that this thread is tracing; .traces: the caller's, the last one first, each with the calls made in it
_tracing = threading.local()
_TRACES = 4  # a layer may be traced in parts (loops, parts of `jax.jit`), and the next one is still found to be equal


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
    nodes: tuple[type, ...]  # of the tree, which by itself is equal to one of other classes of the same fields
    settings: tuple[tuple[type, Any] | None, ...]  # None where an array stands

    def arguments(self, arrays: tuple) -> Any:
        given = iter(arrays)
        leaves = [next(given) if setting is None else setting[1] for setting in self.settings]
        leaves = [leaf.value if isinstance(leaf, _Constant) else leaf for leaf in leaves]
        return jax.tree.unflatten(self.tree, leaves)


class _Question(NamedTuple):
    """What is asked of some values; `sources` are the places of those that are inputs of the program as they are, None for others."""

    ask: Callable[..., None]
    sources: tuple[int | None, ...]


@jax.tree_util.register_pytree_node_class
class _Asked(list):
    """Pairs (question, values), with the values as children."""

    def tree_flatten(self):
        return [values for _, values in self], tuple(question for question, _ in self)

    @classmethod
    def tree_unflatten(cls, questions, values):
        return cls(zip(questions, values))


class _Trace(NamedTuple):
    """A kernel that is being traced: its inputs, and what it has asked."""

    inputs: tuple
    asked: _Asked

    def place(self, value: Any) -> int | None:
        return next((i for i, x in enumerate(self.inputs) if x is value), None)


def when_known(ask: Callable[..., None], *values: Any) -> None:
    """Calls `ask(*values)` with NumPy arrays, to raise a ValueError about them; never, where only a program of the caller's will know them.

    To be said of a kernel's own values, not of those inside its loops. What comes from several processes must be reduced to a number before.
    """
    kernel = getattr(_tracing, "kernel", None)
    if not any(isinstance(value, jax.core.Tracer) for value in values):
        ask(*map(np.asarray, values))
    elif kernel is not None:
        kernel.asked.append((_Question(ask, tuple(map(kernel.place, values))), values))


def _traced(function: Callable, form: _Form, *arrays: Any) -> tuple[Any, _Asked]:
    outer, _tracing.kernel = getattr(_tracing, "kernel", None), _Trace(arrays, _Asked())
    try:
        args, kwargs = form.arguments(arrays)
        return function(*args, **kwargs), _tracing.kernel.asked
    finally:
        _tracing.kernel = outer


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _is_plain(x: Any) -> bool:
    if _is_array(x):  # compiled programs misread numbers of the other byte order
        return isinstance(x, jax.Array) or x.dtype.isnative
    return isinstance(x, np.generic) or type(x) in _PLAIN


def _is_list_of_numbers(x: Any) -> bool:
    """A list that stands for an array: as settings, its numbers would make a program each time."""
    return isinstance(x, list) and not any(map(_is_array, jax.tree.leaves(x)))


def _holds_function(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return any(map(_holds_function, x))
    return callable(x) and not isinstance(x, type)


def _nodes(tree: Any) -> tuple[type, ...] | None:
    """The classes of a structure; None where one holds a function, which may read what changes."""
    data = tree.node_data()
    if data is None:
        return ()
    below = [_nodes(child) for child in tree.children()]
    if None in below or _holds_function(data[1]):
        return None
    return (data[0], *(kind for nodes in below for kind in nodes))


def _form(args: tuple, kwargs: dict) -> tuple[_Form | None, list]:
    """The form of a call and its arrays; no form where something is neither an array nor a plain setting."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_list_of_numbers)
    nodes = _nodes(tree) if all(map(_is_plain, leaves)) else None
    if nodes is None or (not NESTS and any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)):
        return None, []
    settings = tuple(None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    return _Form(tree, nodes, settings), [leaf for leaf in leaves if _is_array(leaf)]


def _comes_again(program: Callable, form: _Form, arrays: list) -> bool:
    """Whether the program being traced has made an equal call before."""
    trace, call = trace_now(), (program, form, *map(jax.typeof, arrays))
    traces = getattr(_tracing, "traces", [])
    calls = next((calls for other, calls in traces if other == trace), set())
    _tracing.traces = [(trace, calls), *(pair for pair in traces if pair[1] is not calls)][:_TRACES]
    known = call in calls
    calls.add(call)
    return known


def compiled(function: Callable, constants: tuple[str, ...] = ()) -> Callable:
    """The function as one program for each form of its call; inside a program of the caller's as it is written, and when an equal call comes again,
    as a function that is traced once for all further ones.

    Arrays are inputs of the program, plain settings (numbers, texts, flags) and NumPy arrays given by the names in `constants` a part of it. A call
    with anything else, such as a function or a list of numbers, runs as it is written, and so does one that JAX cannot trace: then its error comes from here.
    """
    named = functools.partial(_traced, function)
    named.__name__ = function.__name__  # what profiles and dumps call the program
    program = jax.jit(named, static_argnums=0)

    def enter(args: tuple, kwargs: dict) -> Any:
        held = {name: _Constant(kwargs[name]) for name in constants if isinstance(kwargs.get(name), np.ndarray)}
        try:
            form, arrays = _form(args, kwargs | held)
            if form is None or (in_program() and not _comes_again(program, form, arrays)):
                return None
            out, asked = program(form, *arrays)
        except (TypeError, ValueError):
            return None
        for (ask, sources), values in asked:
            when_known(ask, *(value if i is None else arrays[i] for i, value in zip(sources, values)))
        return out

    def run(args: tuple, kwargs: dict) -> Any:
        args, kwargs, named = without_unit_axes(args, kwargs)
        out = enter(args, kwargs)
        return named(function(*args, **kwargs) if out is None else out)

    def call(*args, **kwargs):
        return run(args, kwargs)

    # With the function's own globals: doctest takes a function to be of the module whose globals it has.
    call = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
    return functools.wraps(function)(call)
