"""Arguments against a schema: what fits, what does not, and what is said about it."""

import pytest

from retool_jax.tools.arguments import declared, fault_of, shape_of

ONE = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
TWO = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 9},
        "unit": {"enum": ["m", "km"]},
        "points": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        (ONE, {"code": ""}),
        (ONE, {"code": "1", "more": 5}),
        (TWO, {"a": 9}),
        (TWO, {"a": 0, "unit": "km", "points": [{"x": 1}, {"x": 0.5}, {}]}),
        ({}, {}),
        ({"type": "object"}, {"any": [None]}),
        ({"properties": {"x": {"type": ["number", "null"]}}}, {"x": None}),
    ],
)
def test_what_fits_has_no_fault(schema, arguments):
    assert fault_of(arguments, schema) == ""


SHAPE = '{"a": 0, "unit"?: "m" | "km", "points"?: [...]}'


@pytest.mark.parametrize(
    ("schema", "arguments", "said"),
    [
        (ONE, None, 'malformed call: arguments must be {"code": "..."}'),
        (ONE, "print(1)", 'malformed call: arguments must be {"code": "..."}'),
        (ONE, {}, 'malformed call: arguments must be {"code": "..."}'),
        (ONE, {"code": 5}, 'malformed call: arguments must be {"code": "..."}'),
        (TWO, [], f"malformed call: arguments must be {SHAPE}"),
        (TWO, {"unit": "m"}, f"malformed call: arguments must be {SHAPE}; a is missing"),
        (TWO, {"a": True}, f"malformed call: arguments must be {SHAPE}; a must be a whole number"),
        (TWO, {"a": 1.0}, f"malformed call: arguments must be {SHAPE}; a must be a whole number"),
        (TWO, {"a": 10}, f"malformed call: arguments must be {SHAPE}; a must be at least 0 and at most 9"),
        (TWO, {"a": 1, "unit": "mm"}, f'malformed call: arguments must be {SHAPE}; unit must be one of "m" | "km"'),
        (TWO, {"a": 1, "points": {}}, f"malformed call: arguments must be {SHAPE}; points must be a list"),
        (
            TWO,
            {"a": 1, "points": [{"x": float("nan")}]},
            f"malformed call: arguments must be {SHAPE}; each of points.x must be a finite number",
        ),
        (
            TWO | {"additionalProperties": False},
            {"a": 1, "b\ud800": 2},
            f"malformed call: arguments must be {SHAPE}; there is no 'b\\ud800'",
        ),
    ],
)
def test_what_does_not_fit_is_named_with_what_there_is(schema, arguments, said):
    assert fault_of(arguments, schema) == said


def test_only_declared_arguments_are_passed_on():
    assert declared({"code": "1", "more": 5}, ONE) == {"code": "1"}
    assert declared({"more": 5}, {"type": "object"}) == {"more": 5}
    assert declared({"a": 1, "more": 5}, TWO | {"additionalProperties": True}) == {"a": 1, "more": 5}


def test_shapes_read_like_json():
    nested = {"type": "object", "properties": {"at": {"properties": {"x": {"type": "number"}}}, "any": {}}}
    assert shape_of(nested) == '{"at"?: {"x"?: 0.0}, "any"?: any value}'
    assert shape_of({"type": ["string", "null"]}) == '"..." | null'
