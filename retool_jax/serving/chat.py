"""`/v1/chat/completions`: messages in, an answer out, whole or streamed.

Without `tools` the policy calls the server's tools, which run inside of the request: the message then has a list
`server_tool_calls` (an extension), and ends with `stop`. With `tools` of the client, calls of these are returned to it.
`"tool_choice": "none"` turns both off. Whole and streamed answers are made of the same pieces, `deltas`.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from retool_jax.engine.conversation import SamplingParams
from retool_jax.sandbox.text import encodable
from retool_jax.serving.answer import Answer, DrawnTokens, Event, ToolEnded, ToolStarted
from retool_jax.serving.messages import functions_of, messages_of
from retool_jax.serving.prompts import MOST, prompt_logprobs
from retool_jax.serving.reader import CallPiece, TextPiece
from retool_jax.serving.requests import Refused, an_object, read, refuse_unserved, stops_of
from retool_jax.serving.server import AnswerOptions, KeptAnswer, RequestInfo, Server, usage_of
from retool_jax.serving.wire import DONE, event, logprobs_of

PATH = "/v1/chat/completions"
# Fields that would change the answer, with the values that are served.
_SERVED = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "functions": ([],),
    "modalities": (["text"],),
}
_LEAST_TEMPERATURE = 0.01  # below it logits overflow


class Chat:
    """One request."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.server, self.info = server, RequestInfo(f"chatcmpl-{uuid.uuid4().hex}", PATH)
        refuse_unserved(body, _SERVED)
        self.messages = messages_of(server.tokenizer, body.get("messages"))
        self.options = options_of(server, body)
        self.count = read(body, "n", int, 1, 1, server.config.choices)
        self.stream = read(body, "stream", bool, False)
        self.info.keep = read(body, "store", bool, True)
        stream_options = an_object(body.get("stream_options") or {}, "stream_options")
        self.with_usage = read(stream_options, "include_usage", bool, False)
        self.with_logprobs = read(body, "logprobs", bool, False)
        self.with_ids = read(body, "return_token_ids", bool, False)
        self.prompt_top = read(body, "prompt_logprobs", int, None, 0, MOST)
        if self.prompt_top is not None and self.stream:
            message = "prompt_logprobs is not served with stream=true; leave one of them out"
            raise Refused(400, message, "prompt_logprobs")
        self.answers: list[Answer] = []
        self._head = {"id": self.info.id, "created": int(time.time()), "model": server.model}

    async def begin(self) -> None:
        """Encode the prompt. Raises Refused."""
        prompt = await self.server.prompt(self.messages, self.options)
        self.answers = self.server.answers(self.info, self.messages, prompt, self.options, self.count)

    async def events(self) -> AsyncGenerator[str, None]:
        """The streamed answer; events that come together are one text."""
        left, text = self.count, "".join(self._first_chunks())  # sent with the first tokens
        try:
            async with aclosing(self.server.batches(self.info, self.answers)) as batches:
                async for batch in batches:
                    text += "".join(chunk for number, happened in batch for chunk in self._chunks(number, happened))
                    left -= sum(happened is None for _, happened in batch)
                    if left and text:
                        yield text
                        text = ""
        except Refused as refused:
            yield text + event(refused.body()) + DONE
            return
        self._keep()
        if self.with_usage:
            text += self._chunk([], usage_written(self.answers))
        yield text + DONE

    def _first_chunks(self) -> Iterator[str]:
        first = {"prompt_token_ids": self.answers[0].prompt} if self.with_ids else {}
        for number in range(self.count):
            yield self._chunk([_choice(number, {"role": "assistant", "content": ""})], **first)

    def _chunks(self, number: int, happened: Event | None) -> Iterator[str]:
        """The chunks for an event."""
        if happened is None:
            yield self._chunk([_choice(number, {}, self.answers[number].finish)])
            return
        pieces, details = deltas(happened), self._token_details(happened)
        if details and not pieces:
            pieces = [{}]
        for place, delta in enumerate(pieces, 1):
            yield self._chunk([_choice(number, delta) | (details if place == len(pieces) else {})])

    def _chunk(self, choices: list[dict], usage: dict | None = None, **fields: Any) -> str:
        head = self._head | {"object": "chat.completion.chunk"} | fields | {"choices": choices}
        return event(head | {"usage": usage} if self.with_usage else head)

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises Refused."""
        choices: list[dict] = [
            {"index": number, "message": {"role": "assistant", "content": None}} for number in range(self.count)
        ]
        prompt_details = await self._prompt_details()
        async with aclosing(self.server.run(self.info, self.answers)) as run:
            async for number, happened in run:
                choice = choices[number]
                if happened is None:
                    choice["finish_reason"] = self.answers[number].finish
                    continue
                for delta in deltas(happened):
                    merge(choice["message"], delta)
                merge(choice, self._token_details(happened))
        for choice in choices:
            choice.setdefault("logprobs", None)
            if choice["message"]["content"] is None and not choice["message"].get("tool_calls"):
                choice["message"]["content"] = ""
        self._keep()
        head = self._head | {"object": "chat.completion", "choices": choices}
        return head | prompt_details | {"usage": usage_written(self.answers)}

    async def _prompt_details(self) -> dict[str, Any]:
        """Ids and log-probs of the prompt's tokens, if the client asks for them."""
        prompt = self.answers[0].prompt
        details: dict[str, Any] = {"prompt_token_ids": prompt} if self.with_ids else {}
        if self.prompt_top is not None:
            scores = await self.server.score_prompt(prompt)
            details["prompt_logprobs"] = prompt_logprobs(self.server.tokenizer, prompt, scores, self.prompt_top)
        return details

    def _token_details(self, happened: Event) -> dict[str, Any]:
        """Ids and log-probs of an event's tokens, if the client asks for them."""
        if not isinstance(happened, DrawnTokens) or not happened.ids:
            return {}
        details: dict[str, Any] = {"token_ids": happened.ids} if self.with_ids else {}
        if self.with_logprobs:
            details["logprobs"] = {"content": logprobs_of(self.server.tokenizer, happened.ids, happened.logprobs)}
        return details

    def _keep(self) -> None:
        if self.info.keep:
            self.server.keep(self.info.id, KeptAnswer([answer.trajectory for answer in self.answers]))


def _choice(number: int, delta: dict, finish: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}


def options_of(server: Server, body: dict[str, Any]) -> AnswerOptions:
    """Sampling, limits and tools of an answer, from the fields of a request. Raises Refused."""
    temperature = read(body, "temperature", float, 1.0, 0, 2)
    if 0 < temperature < _LEAST_TEMPERATURE:
        limit = f"0, which is greedy, or {_LEAST_TEMPERATURE} to 2"
        raise Refused(400, f"temperature is {temperature}; it must be {limit}", "temperature")
    top_p = read(body, "top_p", float, 1.0, 0.001, 1)
    sampling = SamplingParams(temperature, read(body, "top_k", int, 0, 0, 1 << 30), top_p)
    names = ("max_completion_tokens", "max_output_tokens")
    most = next((name for name in names if body.get(name) is not None), "max_tokens")
    options = AnswerOptions(
        sampling,
        read(body, "seed", int, None, -(2**63), 2**63 - 1),
        read(body, most, int, None, 1),
        stops_of(body),
    )
    if body.get("tool_choice") == "none":
        return options
    if body.get("tools"):
        options.functions = functions_of(server.tokenizer, body["tools"], nested=True)
    elif body.get("tools") is None:
        options.tools = server.tools
    return options


def deltas(happened: Event) -> list[dict[str, Any]]:
    """The parts that an event adds to a message."""
    if isinstance(happened, ToolStarted):
        call = happened.call
        name = call.name if isinstance(call.name, str) else ""
        begun = {"index": happened.index, "name": name, "arguments": encodable(call.code), "status": "in_progress"}
        return [{"server_tool_calls": [begun]}]
    if isinstance(happened, ToolEnded):
        ended = {"index": happened.index, "status": happened.use.status, "output": happened.use.output}
        return [{"server_tool_calls": [ended]}]
    return [_written(seen) for _, seen in happened.seen if not (isinstance(seen, CallPiece) and seen.what == "ends")]


def _written(seen: TextPiece | CallPiece) -> dict[str, Any]:
    if isinstance(seen, TextPiece):
        if seen.channel == "content":
            return {"content": seen.text}
        return {"reasoning": seen.text, "reasoning_content": seen.text}  # some clients read one, some the other
    call = {"index": seen.call.index}
    if seen.what == "begins":
        call |= {"id": seen.call.id, "type": "function", "function": {"name": seen.call.name, "arguments": ""}}
    else:
        call |= {"function": {"arguments": seen.piece}}
    return {"tool_calls": [call]}


def merge(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to a message: texts and lists are extended, calls are matched by their index."""
    for key, value in delta.items():
        if key in ("tool_calls", "server_tool_calls"):
            for part in value:
                calls = message.setdefault(key, [])
                if part["index"] == len(calls):
                    calls.append({})
                merge(calls[part["index"]], part)
        elif isinstance(value, dict):
            merge(message.setdefault(key, {}), value)
        elif key in ("index", "status") or message.get(key) is None:
            message[key] = value[:] if isinstance(value, list) else value
        else:
            message[key] = message[key] + value


def usage_written(answers: Sequence[Answer]) -> dict[str, Any]:
    """Usage in OpenAI's form. Tokens that tools wrote count as prompt."""
    usage = usage_of(answers)
    inputs = usage["prompt"] + usage["tool"]
    return {
        "prompt_tokens": inputs,
        "completion_tokens": usage["policy"],
        "total_tokens": inputs + usage["policy"],
        "prompt_tokens_details": {"cached_tokens": usage["cached"], "tool_tokens": usage["tool"]},
        "completion_tokens_details": {"reasoning_tokens": usage["thought"]},
    }
