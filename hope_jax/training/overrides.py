"""`key=value` overrides for nested frozen dataclasses, parsed by the type of the field.

`model.dim=64` sets a field of a field; `model=transformer` sets the `name` of a field that has one. Every
mistake is a `UserError` that says which key or value was wrong, what is nearest to it, and what there is.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from hope_jax.training.errors import UserError


def apply_overrides[T](config: T, overrides: Iterable[str], changes: Mapping[str, Any] = MappingProxyType({})) -> T:
    """A copy of a config with some fields replaced.

    Args:
      config: a dataclass, possibly holding others.
      overrides: "key=value" strings; later ones win.
      changes: dotted key -> value of fields that are replaced too, where no override does it.
    Returns:
      A config of the same type.
    Raises:
      UserError: an unknown key, a value that does not parse, or values that the dataclass refuses.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...     steps: int = 10
    >>> apply_overrides(Config(), ["steps=1_000"])
    Config(steps=1000)
    """
    kinds = leaf_types(type(config))
    changes = dict(changes)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r} is not an override; write key=value, for example steps=100")
        target = f"{key}.name" if f"{key}.name" in kinds else key
        if target not in kinds:
            raise UserError(unknown("key", key, sorted(kinds)))
        changes[target] = parse(kinds[target], text, key)
    return _build(config, changes)  # all at once: two changes may be valid only together


def leaf_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every field that is not itself a dataclass."""
    kinds: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            kinds |= leaf_types(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            kinds[prefix + field.name] = kind
    return kinds


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every field that is not itself a dataclass."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= leaves(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_dict[T](default: T, values: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; keys that are missing keep their value in `default`.

    Raises:
      UserError: a key that the dataclass does not have, or values that it refuses.
    """
    kinds = leaf_types(type(default))
    changes: dict[str, Any] = {}
    for key, value in _flatten(values).items():
        if key not in kinds:
            raise UserError(unknown("key", key, sorted(kinds)))
        changes[key] = parse(kinds[key], _text(value), key)  # a file is checked like a command line
    return _build(default, changes)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(item) for item in value)
    return "none" if value is None else str(value)


def _build[T](default: T, flat: Mapping[str, Any], prefix: str = "") -> T:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(default):  # type: ignore[arg-type]
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _build(value, flat, f"{prefix}{field.name}.")
        elif prefix + field.name in flat:
            changes[field.name] = flat[prefix + field.name]
    try:
        return dataclasses.replace(default, **changes)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error


def parse(kind: Any, text: str, key: str) -> Any:
    """A value of type `kind` from its text.

    Raises:
      UserError: the text does not parse; the message shows the key, the text and what would.
    """
    options = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        if text not in [str(option) for option in options]:
            raise UserError(unknown(f"value of {key}", text, [str(option) for option in options]))
        return next(option for option in options if str(option) == text)
    if origin in (typing.Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        return _first_that_parses([option for option in options if option is not type(None)], text, key)
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
        kinds = [options[0]] * len(items) if options[1:] == (Ellipsis,) else list(options)
        if len(kinds) != len(items):
            raise UserError(f"{key}={text}: expected {len(kinds)} numbers with commas between them")
        return tuple(parse(item_kind, item, key) for item_kind, item in zip(kinds, items, strict=True))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise UserError(f"{key}={text}: expected true or false")
        return words[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(
                f"{key}={text}: expected {expected}, for example {key}={'8' if kind is int else '1e-3'}"
            ) from None
    return text


def _first_that_parses(kinds: list[Any], text: str, key: str) -> Any:
    messages = []
    for kind in kinds:
        try:
            return parse(kind, text, key)
        except UserError as error:
            messages.append(str(error))
    raise UserError("; or ".join(messages))


def unknown(what: str, given: str, available: list[str]) -> str:
    """ "unknown key 'sterps'; did you mean 'steps'? keys: ..." """
    near = difflib.get_close_matches(given, available, n=1, cutoff=0.5)
    # `dim` for `model.dim`: the last part of a dotted key is what people remember.
    near = near or [name for name in available if name.rpartition(".")[2] == given.rpartition(".")[2]][:1]
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {given!r}; {hint}there are: {', '.join(available)}"


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
