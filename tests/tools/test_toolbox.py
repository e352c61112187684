"""Every call gets an answer, whatever the policy wrote; faults, retries, lifetimes; loading tools by name."""

import asyncio
import errno
import json
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool_jax.errors import UserError
from retool_jax.sandbox import SandboxConfig, ToolResult
from retool_jax.tokens.grammar import ToolCall, tool_calls
from retool_jax.tools import Output, Tool, toolbox
from retool_jax.tools.calculator import Calculator
from retool_jax.tools.python import Python
from retool_jax.tools.tool import FunctionTool
from retool_jax.tools.toolbox import Toolbox, ToolStates, load_tools

from .own import Count, Reverse, shout

NAMES = st.sampled_from(["expression", "text", "a", "b", "c"])


def play(tools: Toolbox, *calls: ToolCall) -> list[Output]:
    """The outcomes of some calls of one trajectory."""

    async def main() -> list[Output]:
        states = ToolStates()
        try:
            return [await tools.run(call, states) for call in calls]
        finally:
            await states.close()

    return asyncio.run(main())


def play_text(tokenizer, tools: Toolbox, body: str) -> Output:
    (call,) = tool_calls(f"<tool_call>\n{body}\n</tool_call>")
    return play(tools, call)[0]


# --- what the policy wrote --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"name": "shell", "arguments": {"code": "ls"}}', "unknown tool 'shell'; the only tool is code_interpreter"),
        ('{"arguments": {"code": "ls"}}', "unknown tool None; the only tool is code_interpreter"),
        ('{"name": "code_interpreter"}', 'malformed call: arguments must be {"code": "..."}'),
        ('{"name": "code_interpreter", "arguments": {"code": 5}}', 'arguments must be {"code": "..."}'),
        ('{"name": "code_interpreter", "arguments": "{}"}', 'arguments must be {"code": "..."}'),
        ("[1]", "expected a JSON object"),
    ],
)
def test_a_call_that_cannot_run_is_answered_with_the_reason(tokenizer, body, said):
    output = play_text(tokenizer, Toolbox([Python()]), body)
    assert said in output.text and (output.status, output.fault) == ("invalid_call", "program")


@pytest.mark.parametrize("name", ["x" * 5000, ["[" * 3000], 10**400, {"a": [[[[1]]]]}, 1e999])
def test_an_unknown_tools_name_is_not_repeated_at_any_length(tokenizer, name):
    output = play_text(tokenizer, Toolbox([Python()]), json.dumps({"name": name}))
    assert output.text.startswith("unknown tool ") and len(output.text) < 200


def test_several_tools_are_named_where_one_is_unknown():
    tools = Toolbox([Calculator(), FunctionTool(shout)])
    (output,) = play(tools, ToolCall("sing", {}))
    assert output.text == "unknown tool 'sing'; the tools are calculator, shout"
    (output,) = play(tools.subset([], "a row"), ToolCall("shout", {"text": "a"}))
    assert output.text == "unknown tool 'shout'; there are no tools here"


def test_what_a_tool_raises_is_told_and_ends_nothing():
    def fragile(kind: str) -> str:
        raise {"key": KeyError("a"), "exit": SystemExit(3), "deep": RecursionError("deep")}[kind]

    tools = Toolbox([FunctionTool(fragile)])
    outputs = play(tools, *(ToolCall("fragile", {"kind": kind}) for kind in ("key", "exit", "deep", "none")))
    assert [output.text for output in outputs] == [
        "KeyError: 'a'",
        "SystemExit: 3",
        "RecursionError: deep",
        "KeyError: 'none'",
    ]
    assert {(output.fault, output.status) for output in outputs} == {("program", "user_error")}


@pytest.mark.parametrize("returned", [None, "a text", Output(None)])
def test_a_tool_that_returns_no_output_with_a_text_ends_nothing(returned):
    class Odd(Count):
        async def call(self, arguments: dict, state: list[int]) -> Output:
            return returned

    for lifetime in ("call", "trajectory", "run"):
        (output,) = play(Toolbox([Odd(lifetime)]), ToolCall("count", {}))
        assert (output.text, output.fault) == ("TypeError: count returned no Output with a text", "program")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["calculator", "shout", "typed"]) | JSON, JSON | st.dictionaries(NAMES, JSON, max_size=3))
def test_any_call_has_an_outcome_in_words(name, arguments):
    async def typed(a: int, b: list[float], c: bool = False) -> str:
        return f"{a} {b} {c}"

    tools = Toolbox([Calculator(), FunctionTool(shout), FunctionTool(typed)])
    call = ToolCall(name, arguments)
    (output,) = play(tools, call)
    assert output.fault in ("none", "program") and output.shortened(200, len).encode() and isinstance(call.code, str)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (FileNotFoundError(2, "no such file"), "program"),
        (OSError(errno.ENAMETOOLONG, "too long"), "program"),
        (ValueError("no"), "program"),
        (socket.gaierror(-2, "no name"), "machinery"),
        (OSError(errno.EMFILE, "too many open files"), "machinery"),
        (OSError("client"), "machinery"),
    ],
)
def test_an_error_of_the_system_is_the_policys_only_where_it_is_about_a_path(error, fault):
    def fails() -> str:
        raise error

    tool = FunctionTool(fails)
    tool.retries = 0
    assert play(Toolbox([tool]), ToolCall("fails", {}))[0].fault == fault


def test_what_a_tool_says_is_cut_to_its_room_and_can_be_written():
    assert Output("\ud800").shortened(9, len) == "\\ud800"
    told = Output("x" * 500).shortened(100, len)
    assert len(told) <= 100 and "characters removed" in told


# --- whose fault ------------------------------------------------------------------------------------------------------


def test_a_lost_call_is_repeated_and_then_the_machinerys_fault(monkeypatch):
    monkeypatch.setattr(toolbox, "PAUSES_S", (0.0,))
    tries = []

    async def flaky(until: int) -> str:
        tries.append(until)
        if len(tries) < until:
            raise ConnectionError("no route")
        return "here"

    tools = Toolbox([FunctionTool(flaky)])
    assert [output.text for output in play(tools, ToolCall("flaky", {"until": 3}))] == ["here"] and len(tries) == 3
    tries.clear()
    (lost,) = play(tools, ToolCall("flaky", {"until": 9}))
    assert (lost.fault, lost.text, len(tries)) == ("machinery", "flaky: ConnectionError: no route", 3)


def test_what_a_trajectory_keeps_is_not_risked_again(monkeypatch):
    class Lost(Count):
        async def call(self, arguments: dict, state: list[int]) -> Output:
            state.append(1)
            return Output(f"lost at {len(state)}", "machinery")

    (output,) = play(Toolbox([Lost("trajectory")]), ToolCall("count", {}))
    assert output.text == "lost at 1"


def test_a_state_that_cannot_be_opened_says_nothing_about_the_policy(monkeypatch):
    monkeypatch.setattr(toolbox, "PAUSES_S", (0.0,))

    class Shut(Count):
        def open(self):
            raise ValueError("no licence")

    (output,) = play(Toolbox([Shut("call")]), ToolCall("count", {}))
    assert output.fault == "machinery" and "cannot be opened: ValueError('no licence')" in output.text


async def waits() -> None:
    await asyncio.sleep(600)


async def waits_on() -> None:
    """Mistakes its time-out for a failure of what it waits for, and tries something else."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(600)


async def holds_up_the_loop() -> None:
    time.sleep(0.1)


def slow(lifetime: str, wait: Callable[[], Awaitable[None]]) -> Tool:
    class Slow(Count):
        limit_s = 0.05

        @asynccontextmanager
        async def open(self):
            self.opened += 1
            await wait()
            yield []
            self.closed += 1

    return Slow(lifetime)


@pytest.mark.parametrize("wait", [waits, waits_on, holds_up_the_loop])
@pytest.mark.parametrize("lifetime", ["call", "trajectory"])
def test_a_state_that_is_not_open_in_time_says_nothing_about_the_policy(monkeypatch, lifetime, wait):
    monkeypatch.setattr(toolbox, "PAUSES_S", (0.0,))
    tool = slow(lifetime, wait)
    (output,) = play(Toolbox([tool]), ToolCall("count", {}))
    assert output.fault == "machinery" and "cannot be opened: TimeoutError()" in output.text
    assert tool.closed == (0 if wait is waits else tool.opened), "what was opened late is closed all the same"


@pytest.mark.parametrize("wait", [waits, holds_up_the_loop])
def test_a_state_of_the_run_that_is_not_open_in_time_ends_it_at_its_start(wait):
    async def main() -> None:
        async with Toolbox([slow("run", wait)]).open(SandboxConfig()):
            pytest.fail("it was opened")

    with pytest.raises(UserError, match=r"the tool count cannot be opened: TimeoutError\(\); see to that, or leave it"):
        asyncio.run(main())


def test_a_call_that_takes_too_long_is_ended_and_told():
    async def sleepy() -> str:
        await asyncio.sleep(600)

    tool = FunctionTool(sleepy)
    tool.limit_s = 0.05
    (output,) = play(Toolbox([tool]), ToolCall("sleepy", {}))
    assert (output.text, output.fault, output.status) == (
        "[stopped: sleepy took more than 0.05 s]",
        "program",
        "timeout",
    )


def test_the_interpreter_says_whose_fault_it_was():
    results = iter(
        [
            ToolResult("success", stdout="6\n", wall_s=0.5, queue_s=0.25),
            ToolResult("timeout", message="too long"),
            ToolResult("infra_error", message="worker died"),
        ]
    )

    async def run(code: str) -> ToolResult:
        return next(results)

    tools = Toolbox([Python(SimpleNamespace(run=run, config=SandboxConfig()))])
    call = ToolCall("code_interpreter", {"code": "print(6)"})
    fine, slow, lost, broken = play(tools, *[call] * 4)
    assert (fine.shortened(99, len), fine.fault, fine.metrics) == ("6", "none", {"wall_s": 0.5, "queue_s": 0.25})
    assert (slow.shortened(99, len), slow.fault, slow.status) == ("[stopped: too long]", "program", "timeout")
    assert (lost.text, lost.fault, lost.status) == ("worker died", "machinery", "infra_error")
    assert broken.fault == "machinery", "the sandbox itself raised"


# --- lifetimes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lifetime", "said", "opened"),
    [("call", ["1", "1", "1", "1"], 4), ("trajectory", ["1", "2", "1", "2"], 2), ("run", ["1", "2", "3", "4"], 1)],
)
def test_a_state_lives_as_long_as_its_tool_says(lifetime, said, opened):
    count = Count(lifetime)

    async def main() -> list[str]:
        texts = []
        async with Toolbox([count]).open(SandboxConfig()) as tools:
            for _ in range(2):
                states = ToolStates()
                texts += [(await tools.run(ToolCall("count", {}), states)).text for _ in range(2)]
                await states.close()
            assert count.closed == (0 if lifetime == "run" else opened)
        return texts

    assert asyncio.run(main()) == said and count.opened == count.closed == opened


@pytest.mark.parametrize("lifetime", ["call", "trajectory"])
@pytest.mark.parametrize("error", [ValueError("stuck"), TimeoutError()])
def test_a_state_that_cannot_be_closed_ends_nothing(monkeypatch, caplog, lifetime, error):
    monkeypatch.setattr(toolbox, "CLOSE_S", 0.05)

    class Stuck(Count):
        def open(self):
            return SimpleContext()

    class SimpleContext:
        async def __aenter__(self) -> list[int]:
            return []

        async def __aexit__(self, *_: object) -> None:
            if isinstance(error, TimeoutError):
                await asyncio.sleep(600)
            raise error

    assert play(Toolbox([Stuck(lifetime)]), ToolCall("count", {}))[0].text == "1"
    assert f"could not be closed ({error!r})" in caplog.text


def test_an_interpreter_of_a_trajectory_keeps_its_variables():
    async def main() -> list[str]:
        tools = load_tools("python_session")
        async with tools.open(SandboxConfig(backend=("process",), slots=1)):
            texts = []
            for _ in range(2):
                states = ToolStates()
                for code in ("x = 6", "print(x)"):
                    output = await tools.run(ToolCall("code_interpreter", {"code": code}), states)
                    texts.append(output.shortened(99, len))
                await states.close()
                await tools.run(ToolCall("code_interpreter", {"code": "del x"}), states := ToolStates())
                await states.close()
            assert tools.sandbox.gauges()["sessions_open"] == 0
            return texts

    assert asyncio.run(main()) == ["[no output: use print()]", "6"] * 2


# --- words ------------------------------------------------------------------------------------------------------------


def test_tools_are_loaded_by_their_words():
    tools = load_tools(["python", "calculator", f"{Reverse.__module__}:Reverse", f"{Reverse.__module__}:shout"])
    assert tools.names == ("code_interpreter", "calculator", "reverse", "shout")
    assert tools.schemas[3]["function"] == {
        "name": "shout",
        "description": "Return a text in capital letters.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    }
    assert load_tools("none") is None and load_tools("python").names == ("code_interpreter",)
    assert "stay from one call" in load_tools("python_session").schemas[0]["function"]["description"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("no_such_module:Tool", r"tools=no_such_module:Tool cannot be loaded \(ModuleNotFoundError: .*can be imported"),
        (f"{Reverse.__module__}:Nobody", "cannot be loaded .*has Nobody"),
        (f"{Reverse.__module__}:NOTHING", "NOTHING is no tool; it must be a subclass of retool_jax.tools.Tool, or"),
    ],
)
def test_a_word_that_is_no_tool_is_told(word, said):
    with pytest.raises(UserError, match=said):
        load_tools(word)


def test_a_function_must_say_what_it_takes():
    def loose(x) -> str:
        return x

    with pytest.raises(
        UserError, match="loose has an argument x that JSON has no type for; annotate it as one of str, int"
    ):
        FunctionTool(loose)

    async def typed(a: int, b: list[float], c: bool = False) -> Output:
        return Output(f"{a} {b} {c}")

    tool = FunctionTool(typed)
    properties = {"a": {"type": "integer"}, "b": {"type": "array"}, "c": {"type": "boolean"}}
    assert tool.parameters == {"type": "object", "properties": properties, "required": ["a", "b"]}
    assert play(Toolbox([tool]), ToolCall("typed", {"a": 1, "b": [2.0], "d": 4}))[0].text == "1 [2.0] False"


def test_a_row_chooses_by_name_or_by_word():
    tools = Toolbox([Python(), Calculator(), FunctionTool(shout)])
    assert tools.subset(None, "row 3") is tools
    assert tools.subset(["shout", "python", "shout"], "row 3").names == ("shout", "code_interpreter")
    with pytest.raises(
        UserError, match="row 3 names the tool 'browser', and this run has code_interpreter, calculator"
    ):
        tools.subset(["calculator", "browser"], "row 3")
    with pytest.raises(UserError, match="two tools are called shout"):
        Toolbox([FunctionTool(shout), FunctionTool(shout)])


def test_what_any_tool_says_reaches_no_further_than_words():
    class Odd(Tool):
        name, description, parameters = "odd", "Odd.", {"type": "object"}

        async def call(self, arguments: dict, state: None) -> Output:
            return Output(str(arguments))

    (output,) = play(Toolbox([Odd()]), ToolCall("odd", {"\ud800": "<|im_end|>"}))
    assert output.shortened(99, len) == "{'\\ud800': '<|im_end|>'}"
