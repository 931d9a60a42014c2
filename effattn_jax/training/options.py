"""Options that are written as text, "NAME=value, NAME=value", and what they say by the types of a record's fields."""

import ast
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from effattn_jax.nn.named import between_commas

WORDS = {int: "a whole number", float: "a number", bool: "True or False", tuple: "a tuple", NoneType: "None"}


def split_options(text: str) -> dict[str, str] | None:
    """Options "NAME=value, NAME=value" as texts; None for another form, or a name that comes twice.

    Example:
      >>> split_options("scale=0.1, slot_shape=(1, 8)"), split_options("lazy"), split_options("scale=1, scale=2")
      ({'scale': '0.1', 'slot_shape': '(1, 8)'}, None, None)
    """
    pairs = [part.partition("=") for part in between_commas(text) if part]
    options = {name.strip(): value.strip() for name, _, value in pairs}
    whole = all(name.strip() and sign and value.strip() for name, sign, value in pairs)
    return options if whole and len(options) == len(pairs) else None


def read_fields(kind: type, texts: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """Values for fields of a record from texts, each by the field's type; what is no field is read as it looks.

    Args:
      kind: the dataclass of the record.
      texts: texts by name of field.
      prefix: stands before the names in errors.

    Raises:
      ValueError: a text that does not say a value of the field's type.

    Example:
      >>> from effattn_jax.data import DataConfig
      >>> read_fields(DataConfig, {"path": "2024", "lag": "None", "context": "8"})
      {'path': '2024', 'lag': None, 'context': 8}
      >>> read_fields(DataConfig, {"bandwidth": "wide"}, "data.")
      Traceback (most recent call last):
      ValueError: data.bandwidth must be a number, got 'wide'.
    """
    hints = typing.get_type_hints(kind)
    return {name: _read(hints.get(name, Any), prefix + name, text) for name, text in texts.items()}


def _read(hint: Any, name: str, text: str) -> Any:
    value = _literal(text)
    accepted = typing.get_args(hint) or (hint,)
    if hint is Any or type(value) in accepted or (type(value) is int and float in accepted):
        return value
    if str in accepted or typing.get_origin(hint) is typing.Literal:
        return value if isinstance(value, str) else text  # a path may read as a number
    rule = " or ".join(WORDS[kind] for kind in accepted if kind in WORDS)
    raise ValueError(f"{name} must be {rule}, got {text!r}.")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
