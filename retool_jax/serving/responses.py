"""`/v1/responses`: items in, items out, with the server's Python as the built-in tool `code_interpreter`.

A response that names an earlier one continues from that one's stored ids: only the new input is encoded, and what the
policy sampled is never encoded again.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from retool_jax.rollout.trajectory import End, Segment, Trajectory
from retool_jax.sandbox.types import shown
from retool_jax.serving.answer import Answer
from retool_jax.serving.chat import options_of
from retool_jax.serving.items import EventData, Items, new_id
from retool_jax.serving.messages import called, functions_of, messages_of, text_of
from retool_jax.serving.requests import Refused, a_list, an_object, read, refuse_unserved
from retool_jax.serving.server import AnswerOptions, KeptAnswer, RequestInfo, Server, usage_of
from retool_jax.serving.wire import DONE, event
from retool_jax.tokens.chat import next_segment
from retool_jax.tokens.grammar import CODE_TOOL

PATH = "/v1/responses"
LOGS, LOGPROBS = "code_interpreter_call.outputs", "message.output_text.logprobs"
NOT_RUN = "not run: a turn that calls a function of the caller's runs no other call; call it again"
_FUNCTION = {"description": None, "parameters": None, "strict": None}  # fields that each function of a response has
_ENDS = {"response.completed", "response.incomplete", "response.failed"}
_SERVED = {
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "text": ({}, {"format": {"type": "text"}}),
    "prompt": (),
    "conversation": (),
    "max_tool_calls": (),
}


class Responses:
    """One request."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.server, self.info = server, RequestInfo(new_id("resp"), PATH)
        refuse_unserved(body, _SERVED)
        self.body = body
        self.stream = read(body, "stream", bool, False)
        self.info.keep = read(body, "store", bool, True)
        include = a_list(body.get("include") or [], "include")
        self.previous = self._previous()
        self.options = self._options()
        self.container = self._container()
        self.info.container = self.container if self.options.tools else ""
        self.items = Items(server.tokenizer, self.container, LOGS in include, LOGPROBS in include)
        self.instructions = read(body, "instructions", str, None)
        given = body.get("input")
        self.input = [{"role": "user", "content": given}] if isinstance(given, str) else a_list(given, "input")
        self.answer: Answer | None = None
        self._created = int(time.time())

    # --- reading the request ---

    def _previous(self) -> KeptAnswer | None:
        name = read(self.body, "previous_response_id", str, None)
        if name is None:
            return None
        kept = self.server.kept.get(name)
        if kept is None or kept.options is None:
            raise Refused(
                404,
                f"previous_response_id={name[:100]!r} is no response that is kept: the newest"
                f" {self.server.config.keep} are (serve.keep); send the whole conversation as input",
                "previous_response_id",
                "previous_response_not_found",
            )
        return kept

    def _options(self) -> AnswerOptions:
        tools = a_list(self.body.get("tools") or [], "tools")
        tools = [an_object(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
        if not tools and self.previous is not None:
            tools = self.previous.tools
        options = options_of(self.server, self.body | {"tools": []})
        self.tools = tools
        code = [tool for tool in tools if tool.get("type") == "code_interpreter"]
        if self.body.get("tool_choice") != "none":
            options.functions = functions_of(
                self.server.tokenizer, [tool for tool in tools if tool not in code], nested=False
            )
            if code and (self.server.tools is None or CODE_TOOL not in self.server.tools.names):
                raise Refused(400, "code_interpreter is not served here (tools has no python); leave it out", "tools")
            options.tools = self.server.tools.subset([CODE_TOOL], "tools") if code else None
        if options.tools and CODE_TOOL in options.functions:
            raise Refused(400, f"a function is called {CODE_TOOL}, as the built-in tool is; rename it", "tools")
        if self.previous is not None and names_of(options) != names_of(self.previous.options):
            raise Refused(
                400,
                f"tools are {names_of(options)}, and the previous response's prompt, which is kept, has"
                f" {names_of(self.previous.options)}; leave tools and tool_choice out, or send the whole conversation"
                " as input",
                "tools",
            )
        return options

    def _container(self) -> str:
        """The id of the container: a new one, or the one that the request names."""
        for tool in self.tools:
            if tool.get("type") == "code_interpreter" and isinstance(tool.get("container"), str):
                if tool["container"] not in self.server.containers:
                    raise Refused(
                        404,
                        f"there is no container {tool['container'][:100]!r}, or not any more; say {{'type': 'auto'}}",
                        "tools",
                    )
                return tool["container"]
        return self.previous.container if self.previous is not None else new_id("cntr")

    async def begin(self) -> None:
        """Encode the new input. Raises Refused."""
        if self.previous is None:
            head = [{"role": "system", "content": self.instructions}] if self.instructions else []
            messages = messages_of(self.server.tokenizer, [*head, *chat_messages(self.input)])
            prompt = await self.server.prompt(messages, self.options)
        else:
            messages = [{"role": "user", "content": ""}]
            prompt = [*self.previous.trajectories[0].ids, *self._new_ids(self.previous)]
        (self.answer,) = self.server.answers(self.info, messages, prompt, self.options)

    def _new_ids(self, previous: KeptAnswer) -> list[int]:
        """Ids of the input, to follow a stored conversation."""
        if self.instructions not in (None, previous.instructions):
            raise Refused(
                400,
                "instructions differ from those of the previous response, whose prompt is kept as it is; leave them"
                " out, or send the whole conversation as input",
                "instructions",
            )
        given, texts = {}, []
        for number, item in enumerate(self.input):
            name = f"input[{number}]"
            item = an_object(item, name)
            if item.get("type") == "function_call_output" and not texts:
                given[str(item.get("call_id"))] = text_of(item.get("output"), f"{name}.output")
            elif item.get("type", "message") == "message" and item.get("role") == "user":
                texts.append(text_of(item.get("content"), f"{name}.content"))
            else:
                raise Refused(
                    400,
                    f"{name} is {shown(item)}; after a previous response the input has outputs of its function calls,"
                    " then messages of the user",
                    name,
                )
        if given.keys() != set(previous.calls):
            raise Refused(
                400,
                f"input has outputs of the calls {sorted(given)}, and the previous response waits for"
                f" {sorted(previous.calls)}; send one function_call_output for each of them",
                "input",
            )
        if not (given or texts):
            raise Refused(400, "input is empty; send a message, or outputs of function calls", "input")
        outputs = [given[call] if call else NOT_RUN for call in previous.turn] if given else []
        ids, stops = previous.trajectories[0].ids, self.server.tokenizer.stop_ids
        message = "\n\n".join(texts) if texts else None
        return next_segment(self.server.tokenizer, outputs, message, ids[-1] in stops)

    # --- the answer ---

    async def events(self) -> AsyncGenerator[str, None]:
        """The streamed answer; events that come together are one text."""
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                text = "".join(event(each, each["type"]) for each in batch)
                yield text + DONE if batch[-1]["type"] in _ENDS else text

    async def whole(self) -> dict[str, Any]:
        """The whole answer. Raises Refused."""
        last: list[EventData] = []
        async with aclosing(self._batches(refuse=True)) as batches:
            async for batch in batches:
                last = batch
        return last[-1]["response"]

    async def _batches(self, refuse: bool = False) -> AsyncGenerator[list[EventData], None]:
        """All events, the last with the whole response. A fault is raised with `refuse`, otherwise it is an event."""
        items, answer = self.items, self.answer
        yield [items.event(kind, response=self._response("in_progress")) for kind in ("created", "in_progress")]
        batch: list[EventData] = []
        try:
            async with aclosing(self.server.batches(self.info, [answer])) as batches:
                async for happened in batches:
                    batch = [each for _, event in happened if event is not None for each in items.take(event)]
                    if batch and happened[-1][1] is not None:
                        yield batch
        except Refused as refused:
            if refuse:
                raise
            error = {"code": refused.code or "server_error", "message": str(refused)}
            failed = [*items.close(whole=False)]
            yield [*failed, items.event("failed", response=self._response("failed", error=error))]
            return
        yield [*batch, *self._closed()]

    def _closed(self) -> Iterator[EventData]:
        """The last events of an answer that ended by itself or at a limit of tokens."""
        answer = self.answer
        whole = answer.finish != "length"
        cut = answer.reader.inside  # text of an unfinished call; its name says whether it is a program
        is_program = cut is not None and (CODE_TOOL in cut or not self.options.functions)
        yield from self.items.close(not whole and self.options.tools is not None and is_program, whole)
        if self.info.keep:
            self.server.keep(self.info.id, self._kept())
        if whole:
            yield self.items.event("completed", response=self._response("completed"))
        else:
            reason = "max_tool_calls" if answer.trajectory.end == End.TURN_LIMIT else "max_output_tokens"
            incomplete = self._response("incomplete", incomplete_details={"reason": reason})
            yield self.items.event("incomplete", response=incomplete)

    def _kept(self) -> KeptAnswer:
        answer = self.answer
        calls = [call.id for call in answer.open_calls] if answer.finish == "tool_calls" else []
        waiting = iter(calls)
        turn = [next(waiting, "") if answer.reader.is_for_client(call) else "" for call in answer.dialogue.calls()]
        if [call for call in turn if call] != calls:  # reader and grammar may disagree on marks inside of thoughts
            turn = calls
        before = self.previous.trajectories[0] if self.previous is not None else None
        whole = joined(before, answer.trajectory) if before is not None else answer.trajectory
        instructions = self.previous.instructions if self.previous is not None else self.instructions
        return KeptAnswer([whole], self.options, calls, turn, instructions, self.tools, self.container)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        """The current response object."""
        ended = status in ("completed", "incomplete")
        body, output = self.body, [dict(item) for item in self.items.output]
        return {
            "id": self.info.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.options.max_tokens,
            "max_tool_calls": None,
            "metadata": body.get("metadata") or {},
            "model": self.server.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.info.keep,
            "temperature": self.options.sampling.temperature,
            "top_p": self.options.sampling.top_p,
            "top_logprobs": 0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [_FUNCTION | tool if tool.get("type") == "function" else tool for tool in self.tools],
            "truncation": "disabled",
            "safety_identifier": body.get("safety_identifier"),
            "prompt_cache_key": body.get("prompt_cache_key"),
            "user": body.get("user"),
            "usage": usage_written(self.answer) if ended else None,
        } | fields


def names_of(options: AnswerOptions) -> list[str]:
    """Names of the tools and functions in a prompt."""
    return [*(options.tools.names if options.tools else ()), *options.functions]


def chat_messages(items: list) -> list[dict]:
    """Items of a conversation as chat messages; adjacent calls become one turn."""
    messages: list[dict] = []
    for number, item in enumerate(items):
        name = f"input[{number}]"
        item = an_object(item, name)
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind in ("function_call", "code_interpreter_call"):
            program = kind == "code_interpreter_call"
            if program:
                call = called(CODE_TOOL, {"code": text_of(item.get("code"), name)}) | {"id": item.get("id")}
            else:
                call = called(item.get("name"), item.get("arguments")) | {"id": item.get("call_id")}
            if not messages or messages[-1]["role"] != "assistant" or (program and messages[-1].get("tool_calls")):
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
            if program:
                logs = [an_object(each, name).get("logs") for each in a_list(item.get("outputs") or [], name)]
                output = "\n".join(each for each in logs if isinstance(each, str))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # templates leave out thoughts of earlier turns
            raise Refused(400, f"{name}.type is {shown(kind)}, which is not served", name)
    return messages


def joined(before: Trajectory, after: Trajectory) -> Trajectory:
    """A conversation and its continuation, whose prompt it is, as one, with the sampled tokens and calls of both.

    Its temperature is None if they were not sampled in the same way.
    """
    start = len(before.ids)
    first = after.segments[0]
    ways = [(each.temperature, each.top_p, each.top_k) for each in (before, after)]
    return replace(
        after,
        sampled=[*before.sampled, *after.sampled[start:]],
        logprobs=[*before.logprobs, *after.logprobs[start:]],
        versions=[*before.versions, *after.versions[start:]],
        segments=[*before.segments, Segment("prompt", start, first.stop), *after.segments[1:]],
        tool_uses=[*before.tool_uses, *after.tool_uses],
        room=before.room,
        temperature=after.temperature if ways[0] == ways[1] else None,
    )


def usage_written(answer: Answer) -> dict[str, Any]:
    """Usage in the form of Responses. Tokens that tools wrote count as input."""
    usage = usage_of([answer])
    inputs = usage["prompt"] + usage["tool"]
    return {
        "input_tokens": inputs,
        "input_tokens_details": {"cached_tokens": usage["cached"]},
        "output_tokens": usage["policy"],
        "output_tokens_details": {"reasoning_tokens": usage["thought"]},
        "total_tokens": inputs + usage["policy"],
    }
