"""An answer as items of a response, and the events of their stream.

The order follows the Open Responses specification: an item has one id from its first event to the final object,
`output_index` has no gaps, and `sequence_number` increases.
"""

import uuid
from collections import deque
from collections.abc import Iterator
from typing import Any

from retool_jax.rollout.trajectory import ToolUse
from retool_jax.sandbox.text import encodable
from retool_jax.serving.answer import DrawnTokens, Event, ToolEnded, ToolStarted
from retool_jax.serving.reader import CallPiece, FunctionCall, TextPiece
from retool_jax.serving.wire import logprobs_of
from retool_jax.tokens.grammar import ToolCall
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import INVALID

EventData = dict[str, Any]
# For each channel: the type of the item, and the type of its part, which is also the name of its events.
_TEXTS = {"content": ("message", "output_text"), "reasoning": ("reasoning", "reasoning_text")}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class Items:
    """Builds a response's `output` from an answer's events.

    Args:
        container: id of the container that programs run in.
        outputs: whether items of programs have their output.
        logprobs: whether texts have the log-probabilities of their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, container: str, outputs: bool, logprobs: bool) -> None:
        self.output: list[dict] = []
        self._tokenizer, self._container, self._outputs, self._logprobs = tokenizer, container, outputs, logprobs
        self._number = 0
        self._open: dict | None = None  # the item that the next event may belong to
        self._entries: list[dict] = []  # log-probabilities of tokens whose text is not visible yet
        self._waiting: deque[ToolCall] = deque()  # calls of a turn, whose items follow one after another

    def event(self, kind: str, **fields: Any) -> EventData:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1} | fields

    def take(self, happened: Event) -> Iterator[EventData]:
        """The response's events for an event of the answer."""
        if isinstance(happened, DrawnTokens):
            yield from self._drawn(happened)
        elif isinstance(happened, ToolStarted):
            self._entries = []  # tokens of a call have no log-probabilities
            self._waiting.append(happened.call)
            if len(self._waiting) == 1:
                yield from self._run(happened.call)
        elif isinstance(happened, ToolEnded):
            self._waiting.popleft()
            yield from self._ran(happened.use)
            if self._waiting:
                yield from self._run(self._waiting[0])

    def close(self, cut: bool = False, whole: bool = True) -> Iterator[EventData]:
        """End the open item; if the call of a program was `cut` off, add an item for it first."""
        if cut:
            yield from self._run(ToolCall())
        if self._open is not None:
            yield from self._end("completed" if whole else "incomplete")

    # --- texts and calls of the client's functions ---

    def _drawn(self, drawn: DrawnTokens) -> Iterator[EventData]:
        done = 0
        for count, seen in drawn.seen:
            self._note(drawn, done, count)
            done = count
            if isinstance(seen, TextPiece):
                yield from self._say(seen)
            else:
                yield from self._call(seen)
            self._entries = []
        self._note(drawn, done, len(drawn.ids))

    def _note(self, drawn: DrawnTokens, start: int, stop: int) -> None:
        if self._logprobs:
            self._entries += logprobs_of(self._tokenizer, drawn.ids[start:stop], drawn.logprobs[start:stop])

    def _say(self, said: TextPiece) -> Iterator[EventData]:
        (kind, part), words = _TEXTS[said.channel], said.text
        if self._open is None or self._open["type"] != kind:
            yield from self._end("completed")
            words = words.lstrip("\n")  # newlines between this text and the one before
            while words in "".join(entry["token"] for entry in self._entries[1:]):
                del self._entries[0]  # entries of marks before the text
            about = {"role": "assistant"} if kind == "message" else {"summary": [], "encrypted_content": None}
            yield self._begin({"type": kind, "id": new_id("msg" if kind == "message" else "rs"), "content": []} | about)
            more = {"annotations": [], "logprobs": []} if kind == "message" else {}
            yield self._of("content_part.added", content_index=0, part={"type": part, "text": ""} | more)
            self._open["content"] = [{"type": part, "text": ""} | more]
        (text,) = self._open["content"]
        text["text"] += words
        more = {}
        if kind == "message":
            text["logprobs"] = text["logprobs"] + self._entries
            more = {"logprobs": self._entries}
        yield self._of(f"{part}.delta", content_index=0, delta=words, **more)

    def _call(self, called: CallPiece) -> Iterator[EventData]:
        call: FunctionCall = called.call
        if called.what == "begins":
            yield from self._end("completed")
            about = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield self._begin({"type": "function_call", "id": new_id("fc")} | about)
        elif called.what == "grows":
            self._open["arguments"] += called.piece
            yield self._of("function_call_arguments.delta", delta=called.piece)
        else:
            yield from self._end("completed")

    # --- programs ---

    def _run(self, call: ToolCall) -> Iterator[EventData]:
        """Begin the item of a program, with its whole code, when the program begins to run."""
        yield from self._end("completed")
        about = {"container_id": self._container, "code": "", "outputs": None}
        yield self._begin({"type": "code_interpreter_call", "id": new_id("ci")} | about)
        yield self._of("code_interpreter_call.in_progress")
        code = self._open["code"] = encodable(call.code)
        if code:
            yield self._of("code_interpreter_call_code.delta", delta=code)
        yield self._of("code_interpreter_call_code.done", code=code)
        if call.name is not None:
            yield self._of("code_interpreter_call.interpreting")

    def _ran(self, use: ToolUse) -> Iterator[EventData]:
        if self._outputs:
            self._open["outputs"] = [{"type": "logs", "logs": use.output}]
        if use.status == INVALID:
            yield from self._end("failed")
            return
        yield self._of("code_interpreter_call.completed")
        yield from self._end("completed")

    # --- items ---

    def _begin(self, item: dict) -> EventData:
        self._open = item | {"status": "in_progress"}
        self.output.append(self._open)
        return self.event("output_item.added", output_index=len(self.output) - 1, item=dict(self._open))

    def _of(self, kind: str, **fields: Any) -> EventData:
        """An event of the open item."""
        return self.event(kind, item_id=self._open["id"], output_index=len(self.output) - 1, **fields)

    def _end(self, status: str) -> Iterator[EventData]:
        item = self._open
        if item is None:
            return
        item["status"] = status
        if "content" in item:
            (part,) = item["content"]
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._of(f"{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._of("content_part.done", content_index=0, part=dict(part))
        elif item["type"] == "function_call":
            yield self._of("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield self.event("output_item.done", output_index=len(self.output) - 1, item=dict(item))
        self._open = None
