"""From plain values to an instance of a schema, each with its type and within its range; and back."""

import difflib
from dataclasses import Field, asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from flowtrain.errors import UsageError


def validate(schema, values: dict, prefix: str = ""):
    """An instance of ``schema`` from plain ``values``: 1 becomes 1.0 where the type is float.

    Keys that ``schema`` does not declare become its ``parts``, where it has that field.

    Raises:
        UsageError: a key is missing or unknown, or a value has another type or is out of range.
    """
    names = key_names(schema)
    others = {name: value for name, value in values.items() if name not in names}
    keeps_others = any(item.name == "parts" for item in fields(schema))
    for name in () if keeps_others else others:
        near = difflib.get_close_matches(str(name), names, 1)
        raise UsageError(f"no key '{prefix}{name}'" + (f"; did you mean '{prefix}{near[0]}'?" if near else ""))
    found: dict[str, Any] = {"parts": others} if keeps_others else {}
    for item in fields(schema):
        if _key(item) not in names:
            continue
        name = _key(item)
        key = prefix + name
        if name not in values:
            raise UsageError(f"{key}: is missing")
        value, nested = values[name], _nested_schema(item.type)
        if nested and isinstance(value, dict):
            found[item.name] = validate(nested, value, f"{key}.")
            continue
        try:
            found[item.name] = _convert(value, item.type, item.metadata)
        except ValueError:
            raise UsageError(f"{key}={format_value(value)}: must be {_describe(item.type, item.metadata)}") from None
    return schema(**found)


def to_dict(config) -> dict:
    """The plain values that :func:`validate` makes an equal instance of."""
    values = asdict(config)
    parts = values.pop("parts", {})
    return {name.removesuffix("_"): value for name, value in values.items()} | parts


def key_names(schema) -> list[str]:
    """The keys that a schema declares at its root."""
    return [_key(item) for item in fields(schema) if item.name != "parts"]


def _key(item: Field) -> str:
    """The key of a field: a word of Python's own, such as from, has an underscore after it."""
    return item.name.removesuffix("_")


def dotted_keys(schema, prefix: str = "") -> list[str]:
    """The keys of a schema, and those of the schemas within it with dots."""
    out = []
    for item in fields(schema):
        if item.name != "parts":
            out.append(prefix + _key(item))
            nested = _nested_schema(item.type)
            out += dotted_keys(nested, f"{prefix}{item.name}.") if nested else []
    return out


def format_value(value) -> str:
    """A value as a person types it: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _nested_schema(kind):
    """The dataclass that a type is or may be, or None."""
    return next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)


def _convert(value, kind, limits):
    """The value as ``kind``, or ValueError."""
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal and value in options:
        return value
    if origin in (Union, UnionType):
        for option in options:
            try:
                return _convert(value, option, limits)
            except ValueError:
                continue
    if origin is list and isinstance(value, list):
        return [_convert(item, options[0], limits) for item in value]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or isinstance(value, int | float) and not _is_within(value, limits):
        raise ValueError
    return value


def _is_within(value, limits) -> bool:
    least, above, below = limits.get("least"), limits.get("above"), limits.get("below")
    return (least is None or value >= least) and (above is None or value > above) and (below is None or value < below)


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Any: "anything",
}


def _describe(kind, limits) -> str:
    """A type in plain words: "a whole number of at least 1, or null"."""
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(options[:-1]), options[-1])))
    if origin in (Union, UnionType):
        return ", or ".join(_describe(option, limits) for option in options)
    if origin is list:
        return f"a list of these: {_describe(options[0], limits)}"
    if is_dataclass(kind):
        return "keys and values, such as {" + fields(kind)[0].name + ": …}"
    words = {"least": "of at least", "above": "above", "below": "below"}
    bounds = [f"{words[name]} {limit:g}" for name, limit in limits.items() if limit is not None]
    return _WORDS[kind] + (" " + " and ".join(bounds) if bounds and kind in (int, float) else "")
