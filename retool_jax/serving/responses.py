"""`/v1/responses`: items in, items out, with the server's Python as the built-in tool `code_interpreter`.

A response that names an earlier one goes on from the ids that were kept of it, so what the policy has sampled is never
encoded again; only the new input is.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from retool_jax.rollout.trajectory import End, Segment, Trajectory
from retool_jax.sandbox.types import shown
from retool_jax.serving.answer import Answer
from retool_jax.serving.chat import wish_of
from retool_jax.serving.items import Items, Told, new_id
from retool_jax.serving.messages import called, functions_of, messages_of, text_of
from retool_jax.serving.requests import Refused, a_list, an_object, read, refuse_unserved
from retool_jax.serving.server import KeptAnswer, Server, Visit, Wish, usage_of
from retool_jax.serving.wire import DONE, event
from retool_jax.tokens.chat import next_segment
from retool_jax.tokens.grammar import CODE_TOOL

PATH = "/v1/responses"
LOGS, LOGPROBS = "code_interpreter_call.outputs", "message.output_text.logprobs"
NOT_RUN = "not run: a turn that calls a function of the caller's runs no other call; call it again"
_FUNCTION = {"description": None, "parameters": None, "strict": None}  # what a response says of each in any case
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
    """One request, read and begun."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.server, self.visit = server, Visit(new_id("resp"), PATH)
        refuse_unserved(body, _SERVED)
        self.body = body
        self.stream = read(body, "stream", bool, False)
        self.visit.keep = read(body, "store", bool, True)
        include = a_list(body.get("include") or [], "include")
        self.previous = self._previous()
        self.wish = self._wish()
        self.container = self._container()
        self.visit.container = self.container if self.wish.tools else ""
        self.items = Items(server.tokenizer, self.container, LOGS in include, LOGPROBS in include)
        self.instructions = read(body, "instructions", str, None)
        given = body.get("input")
        self.input = [{"role": "user", "content": given}] if isinstance(given, str) else a_list(given, "input")
        self.answer: Answer | None = None
        self._created = int(time.time())

    # --- what is asked ---

    def _previous(self) -> KeptAnswer | None:
        name = read(self.body, "previous_response_id", str, None)
        if name is None:
            return None
        kept = self.server.kept.get(name)
        if kept is None or kept.wish is None:
            raise Refused(
                404,
                f"previous_response_id={name[:100]!r} is no response that is kept: the newest"
                f" {self.server.config.keep} are (serve.keep); send the whole conversation as input",
                "previous_response_id",
                "previous_response_not_found",
            )
        return kept

    def _wish(self) -> Wish:
        tools = a_list(self.body.get("tools") or [], "tools")
        tools = [an_object(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
        if not tools and self.previous is not None:
            tools = self.previous.tools
        wish = wish_of(self.server, self.body | {"tools": []})
        self.tools = tools
        code = [tool for tool in tools if tool.get("type") == "code_interpreter"]
        if self.body.get("tool_choice") != "none":
            wish.functions = functions_of(
                self.server.tokenizer, [tool for tool in tools if tool not in code], nested=False
            )
            if code and (self.server.tools is None or CODE_TOOL not in self.server.tools.names):
                raise Refused(400, "code_interpreter is not served here (tools has no python); leave it out", "tools")
            wish.tools = self.server.tools.of([CODE_TOOL], "tools") if code else None
        if wish.tools and CODE_TOOL in wish.functions:
            raise Refused(400, f"a function is called {CODE_TOOL}, as the built-in tool is; rename it", "tools")
        if self.previous is not None and names_of(wish) != names_of(self.previous.wish):
            raise Refused(
                400,
                f"tools are {names_of(wish)}, and the previous response's prompt, which is kept, has"
                f" {names_of(self.previous.wish)}; leave tools and tool_choice out, or send the whole conversation as"
                " input",
                "tools",
            )
        return wish

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
        """Encode what is new. Raises Refused."""
        if self.previous is None:
            head = [{"role": "system", "content": self.instructions}] if self.instructions else []
            messages = messages_of(self.server.tokenizer, [*head, *chat_messages(self.input)])
            prompt = await self.server.prompt(messages, self.wish)
        else:
            messages = [{"role": "user", "content": ""}]
            prompt = [*self.previous.trajectories[0].ids, *self._more(self.previous)]
        (self.answer,) = self.server.answers(self.visit, messages, prompt, self.wish)

    def _more(self, previous: KeptAnswer) -> list[int]:
        """Ids of the input behind a kept conversation."""
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
                    f"{name} is {shown(item)}; behind a previous response stand outputs of its function calls, then"
                    " messages of the user",
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
        said = "\n\n".join(texts) if texts else None
        return next_segment(self.server.tokenizer, outputs, said, ids[-1] in stops)

    # --- the answer ---

    async def events(self) -> AsyncGenerator[str, None]:
        """The answer as it comes: what came together is one text."""
        async with aclosing(self._told()) as told:
            async for batch in told:
                text = "".join(event(each, each["type"]) for each in batch)
                yield text + DONE if batch[-1]["type"] in _ENDS else text

    async def whole(self) -> dict[str, Any]:
        """The answer when it is there. Raises Refused."""
        last: list[Told] = []
        async with aclosing(self._told(refuse=True)) as told:
            async for batch in told:
                last = batch
        return last[-1]["response"]

    async def _told(self, refuse: bool = False) -> AsyncGenerator[list[Told], None]:
        """Every event, the last with the whole response. With `refuse` a fault is raised and not told."""
        items, answer = self.items, self.answer
        yield [items.event(kind, response=self._response("in_progress")) for kind in ("created", "in_progress")]
        batch: list[Told] = []
        try:
            async with aclosing(self.server.batches(self.visit, [answer])) as batches:
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

    def _closed(self) -> Iterator[Told]:
        """The last events of an answer that ended by itself or for want of tokens."""
        answer = self.answer
        whole = answer.finish != "length"
        half = answer.reader.inside  # of a call, whose name says whose it is
        is_program = half is not None and (CODE_TOOL in half or not self.wish.functions)
        yield from self.items.close(not whole and self.wish.tools is not None and is_program, whole)
        if self.visit.keep:
            self.server.keep(self.visit.id, self._kept())
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
        if [call for call in turn if call] != calls:  # a reader and a grammar may differ over marks inside of thoughts
            turn = calls
        before = self.previous.trajectories[0] if self.previous is not None else None
        whole = joined(before, answer.trajectory) if before is not None else answer.trajectory
        instructions = self.previous.instructions if self.previous is not None else self.instructions
        return KeptAnswer([whole], self.wish, calls, turn, instructions, self.tools, self.container)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        """The response object as it is now."""
        ended = status in ("completed", "incomplete")
        body, output = self.body, [dict(item) for item in self.items.output]
        return {
            "id": self.visit.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.wish.max_tokens,
            "max_tool_calls": None,
            "metadata": body.get("metadata") or {},
            "model": self.server.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.visit.keep,
            "temperature": self.wish.sampling.temperature,
            "top_p": self.wish.sampling.top_p,
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


def names_of(wish: Wish) -> list[str]:
    """Names of the tools and functions that a prompt shows."""
    return [*(wish.tools.names if wish.tools else ()), *wish.functions]


def chat_messages(items: list) -> list[dict]:
    """Items of a conversation as chat messages; calls that follow each other are those of one turn."""
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
                told = "\n".join(each for each in logs if isinstance(each, str))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": told})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # thoughts of earlier turns, which templates leave out
            raise Refused(400, f"{name}.type is {shown(kind)}, which is not served", name)
    return messages


def joined(before: Trajectory, after: Trajectory) -> Trajectory:
    """A conversation and what followed it, whose prompt it is: with everything that is known of both."""
    start = len(before.ids)
    first = after.segments[0]
    after.sampled[:start], after.logprobs[:start] = before.sampled, before.logprobs
    after.versions[:start] = before.versions
    after.segments[:1] = [*before.segments, Segment("prompt", start, first.stop)]
    after.tool_uses = [*before.tool_uses, *after.tool_uses]
    return after


def usage_written(answer: Answer) -> dict[str, Any]:
    """What tools wrote into the context counts as input."""
    usage = usage_of([answer])
    read_in = usage["prompt"] + usage["tool"]
    return {
        "input_tokens": read_in,
        "input_tokens_details": {"cached_tokens": usage["cached"]},
        "output_tokens": usage["policy"],
        "output_tokens_details": {"reasoning_tokens": usage["thought"]},
        "total_tokens": read_in + usage["policy"],
    }
