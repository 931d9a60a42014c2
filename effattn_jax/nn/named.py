"""Mixers by their names, to which options may be appended: "local(window=64)", "performer(estimator=optimal, num_features=128)"."""

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any

from effattn_jax.nn.mixer import SequenceMixer

__all__: list[str] = []

_MIXER = re.compile(r"\s*([\w-]*)\s*(?:\((.*)\)\s*)?", re.DOTALL)


def between_commas(text: str) -> list[str]:
    """The parts of a text between its commas, but for those inside parentheses.

    >>> between_commas("a=1, b=(2, 3)")
    ['a=1', 'b=(2, 3)']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def split_mixers(text: str) -> tuple[str, ...]:
    """One text a layer from texts separated by commas.

    >>> split_mixers("softmax, sparse(window=8, dilation=4)")
    ('softmax', 'sparse(window=8, dilation=4)')
    """
    return tuple(between_commas(text))


def parse_mixer(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options; a value is a number, True, False, None, or a word.

    >>> parse_mixer("linear(feature_map=relu, normalize=False)")
    ('linear', {'feature_map': 'relu', 'normalize': False})
    """
    found = _MIXER.fullmatch(text)
    if found is None:
        raise ValueError(f"mixer must be NAME or NAME(OPTION=VALUE, ...); got {text!r}")
    name, inside = found.groups()
    options: dict[str, Any] = {}
    for part in between_commas(inside) if (inside or "").strip() else []:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and option and value) or option in options:
            raise ValueError(
                f"mixer must be NAME or NAME(OPTION=VALUE, ...), each option once; got {part!r} in {text!r}"
            )
        options[option] = _value(value)
    return name, options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_mixer(text: str, **fields: Any) -> SequenceMixer:
    """The module of `nn.MIXERS` of that name, with its options and the fields of `SequenceMixer` given.

    Raises:
      ValueError: an unknown name, or an option that this mixer does not have.

    >>> make_mixer("local(window=16)", width=8, parent=None).window
    16
    """
    from effattn_jax.nn import MIXERS

    name, options = parse_mixer(text)
    check_name("mixer", name, MIXERS)
    if not options:
        return MIXERS[name](**fields)
    mixer = MIXERS[name](**{**fields, "parent": None})
    known = mixer.own_options()
    for option in options:
        if option not in known:
            have = f"It has {', '.join(sorted(known))}" if known else "It has none"
            raise ValueError(f"mixer {name!r} has no option {option!r}. {_nearest(option, known)}{have}; got {text!r}")
    own = {option: value for option, value in options.items() if known[option] == "field"}
    for_kernel = {option: value for option, value in options.items() if known[option] == "kernel"}
    if for_kernel:
        own["options"] = {**(mixer.options or {}), **for_kernel}
    return MIXERS[name](**{**fields, **own})


def check_name(field: str, given: str, known: Iterable[str]) -> None:
    """Raises the ValueError for a name that is not among those known, with the nearest of them."""
    if given not in known:
        raise ValueError(f"{field} is {given!r}. {_nearest(given, known)}It must be among {', '.join(known)}")


def _nearest(given: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(given), list(known), n=1)
    return f"Perhaps you meant {nearest[0]!r}? " if nearest else ""
