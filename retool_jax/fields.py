"""Trees of frozen dataclasses as dotted keys: values, types, defaults, comments, and which of them are secret."""

import dataclasses
import functools
import inspect
import re
import typing

HIDDEN = "***"  # what is shown of a secret


def describe(schema: type, prefix: str = "") -> list[tuple[str, str, object, str]]:
    """Every leaf key as (key, type, default, comment from the source)."""
    rows = []
    types = typing.get_type_hints(schema)
    comments = _comments(schema)
    for item in dataclasses.fields(schema):
        key, wanted = prefix + item.name, types[item.name]
        if dataclasses.is_dataclass(wanted):
            rows += describe(wanted, f"{key}.")
        else:
            origin = typing.get_origin(wanted)
            name = getattr(wanted, "__name__", str(wanted)) if origin is None else "list"
            name = name if origin in (None, tuple) else "str or list"
            rows.append((key, name, item.default, comments.get(item.name, "")))
    return rows


def defaults_of(schema: type) -> dict[str, object]:
    """Every leaf key and its default, as YAML holds it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, _, value, _ in describe(schema)}


@functools.cache
def secret_keys(schema: type) -> frozenset[str]:
    """The leaf keys whose fields say `metadata={"secret": True}`: shown to nobody, and in no file and no name."""
    found = set()
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[item.name]):
            found |= {f"{item.name}.{key}" for key in secret_keys(types[item.name])}
        elif item.metadata.get("secret"):
            found.add(item.name)
    return frozenset(found)


def holds_secret(schema: type, key: str) -> bool:
    """Whether a key is a secret, or a section with one in it."""
    return any(secret == key or secret.startswith(f"{key}.") for secret in secret_keys(schema))


@functools.cache  # reading source is slow
def _comments(schema: type) -> dict[str, str]:
    """What the source says about each field: the comment on its line, or the string below it."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        lines = inspect.getsource(cls).splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if match := re.match(r"    (\w+): [^#]*?(?:  # (.*))?$", line):
                below = below.strip()
                found[match[1]] = match[2] or (below.strip('"') if below.startswith('"""') else "")
    return found


def flatten(run: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values of a dataclass tree."""
    flat = {}
    for item in dataclasses.fields(run):
        value = getattr(run, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[f"{prefix}{item.name}"] = value
    return flat


def flatten_dict(values: dict, prefix: str = "") -> dict[str, object]:
    """Dotted keys and values of nested dicts."""
    flat = {}
    for key, value in values.items():
        flat |= flatten_dict(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def show(value: object) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(show, value))}]"
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
