"""Check a call's arguments against a schema: the part of JSON Schema that tools need, with readable errors."""

import json
import math
from collections.abc import Mapping
from typing import Any

# For each JSON type: the classes of its values, an example, and its name in errors. A boolean is not a number here.
TYPES: dict[str, tuple[tuple[type, ...], str, str]] = {
    "string": ((str,), '"..."', "a string"),
    "integer": ((int,), "0", "a whole number"),
    "number": ((int, float), "0.0", "a finite number"),
    "boolean": ((bool,), "true", "true or false"),
    "array": ((list,), "[...]", "a list"),
    "object": ((dict,), "{...}", "an object"),
    "null": ((type(None),), "null", "null"),
}


def fault_of(arguments: object, schema: Mapping[str, Any]) -> str:
    """Why arguments do not fit the schema of an object, with the expected shape; empty if they fit.

    Known are `type`, `enum`, `properties`, `required`, `additionalProperties` as true or false, `items`, `minimum` and
    `maximum`. For a tool with several arguments the message also names the wrong one.
    """
    fault = _fault(arguments, {"type": "object"} | dict(schema), "")
    if not fault:
        return ""
    several = isinstance(arguments, dict) and len(schema.get("properties", ())) > 1
    return f"malformed call: arguments must be {shape_of(schema)}" + (f"; {fault}" if several else "")


def declared(arguments: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that the schema names; all arguments if it names none or allows additional ones."""
    properties = schema.get("properties")
    if not properties or schema.get("additionalProperties"):
        return arguments
    return {name: value for name, value in arguments.items() if name in properties}


def shape_of(schema: Mapping[str, Any]) -> str:
    """An example of what fits a schema, such as `{"code": "..."}`; a `?` marks an optional argument."""
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    kinds = _kinds(schema)
    if "object" not in kinds and (kinds or "properties" not in schema):
        return " | ".join(TYPES[kind][1] for kind in kinds) or "any value"
    required = schema.get("required", ())
    parts = [
        f"{json.dumps(name)}{'' if name in required else '?'}: {shape_of(value)}"
        for name, value in schema.get("properties", {}).items()
    ]
    return f"{{{', '.join(parts)}}}"


def is_readable(schema: object) -> bool:
    """Whether `fault_of` can check arguments against a schema that somebody else wrote."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    forms = {"enum": list, "required": list, "properties": dict, "minimum": int | float, "maximum": int | float}
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in TYPES for kind in kinds):
        return False
    if not all(isinstance(schema[key], form) for key, form in forms.items() if key in schema):
        return False
    inside = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return all(map(is_readable, inside))


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def _fault(value: object, schema: Mapping[str, Any], name: str) -> str:
    """What is wrong with the value called `name`; empty if nothing is. The recursion is as deep as the schema."""
    kinds = _kinds(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{name} must be {' or '.join(TYPES[kind][2] for kind in kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name} must be one of {shape_of(schema)}"
    if _is(value, "number") and not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        limits = [f"at least {schema['minimum']}"] if "minimum" in schema else []
        limits += [f"at most {schema['maximum']}"] if "maximum" in schema else []
        return f"{name} must be {' and '.join(limits)}"
    if isinstance(value, dict):
        properties, inside = schema.get("properties", {}), f"{name}." if name else ""
        faults = [f"{inside}{key} is missing" for key in schema.get("required", ()) if key not in value]
        if schema.get("additionalProperties") is False:
            faults += [f"there is no {inside}{repr(key)[:80]}" for key in value if key not in properties]
        faults += [_fault(value[key], part, f"{inside}{key}") for key, part in properties.items() if key in value]
        return next(filter(None, faults), "")
    if isinstance(value, list) and "items" in schema:
        return next(filter(None, (_fault(item, schema["items"], f"each of {name}") for item in value)), "")
    return ""


def _is(value: object, kind: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return kind == "boolean" and isinstance(value, bool)
    return isinstance(value, TYPES[kind][0])
