"""Reading requests: fields of a JSON object, checked by type and range, and refusals in OpenAI's form."""

import json
from collections.abc import Collection
from typing import Any

from starlette.requests import Request as HTTPRequest

from retool_jax.sandbox.types import KINDS, is_a, shown

MAX_STOPS = 4
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {413: "invalid_request_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is refused: the HTTP status, the reason and what to do, and the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


async def read_body(http: HTTPRequest, most: int) -> dict[str, Any]:
    """The JSON object of a request's body, which may have `most` bytes."""
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > most:
            raise Refused(413, f"the body is larger than {most} bytes (serve.body_kb); send less", code="too_large")
    try:
        body = json.loads(bytes(data).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON in UTF-8 ({str(error)[:100]}); send an object") from None
    return an_object(body, "the body")


def an_object(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(400, f"{name} is {shown(value)}; it must be an object", name)
    return value


def a_list(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise Refused(400, f"{name} is {shown(value)}; it must be a list", name)
    return value


def read(body: dict[str, Any], key: str, kind: type, default: Any, low: float = 0, high: float | None = None) -> Any:
    """A field of a JSON type, for numbers within a range; the default if it is null or missing."""
    value = body.get(key)
    if value is None:
        return default
    if not is_a(value, kind):
        raise Refused(400, f"{key} is {shown(value)}; it must be {KINDS[kind]}", key)
    if kind in (int, float) and not (low <= value and (high is None or value <= high)):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise Refused(400, f"{key} is {shown(value)}; it must be {limit}", key)
    return float(value) if kind is float else value


def refuse_unserved(body: dict[str, Any], served: dict[str, Collection]) -> None:
    """Refuse fields with values that are not served; `served` has the values that are, by field."""
    for key, values in served.items():
        if body.get(key) is not None and body[key] not in values:
            known = " or ".join(json.dumps(value) for value in values)
            raise Refused(400, f"{key} is {shown(body[key])}, which is not served; leave it out, or say {known}", key)


def stops_of(body: dict[str, Any]) -> tuple[str, ...]:
    """The stop strings of a request: the field `stop`, one text or several, none of them empty."""
    value = body.get("stop")
    texts = [] if value is None else [value] if isinstance(value, str) else a_list(value, "stop")
    if len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        limit = f"it must be at most {MAX_STOPS} texts, none of them empty"
        raise Refused(400, f"stop is {shown(value)}; {limit}", "stop")
    return tuple(texts)
