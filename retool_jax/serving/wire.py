"""Output over HTTP: JSON objects, streams of events that end when the client goes away, log-probabilities."""

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retool_jax.sandbox.remote.web import while_connected
from retool_jax.tokens.tokenizer import Tokenizer

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON does not have


def event(data: dict[str, Any], name: str = "") -> str:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def as_json(data: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response in ASCII, since a client's text may hold half of a surrogate pair."""
    return Response(json.dumps(data), status, headers, "application/json")


class Events(Response):
    """Server-sent events until they end or the client goes away; then `close` is called."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for text in self.events:  # the last text ends with DONE
                more = not text.endswith(DONE)
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            await while_connected(receive, write())
        finally:
            await self.events.aclose()
            self.close()


def logprobs_of(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float]) -> list[dict[str, Any]]:
    """One entry for each drawn token, including marks."""
    entries = []
    for index, logprob in zip(ids, logprobs, strict=True):
        token = tokenizer.decode([index])
        entry = {"token": token, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(token.encode())}
        entries.append(entry | {"top_logprobs": []})
    return entries
