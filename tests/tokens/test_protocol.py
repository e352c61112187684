import json

import pytest

from retool_jax.tokens.protocol import tool_calls

GOOD = json.dumps({"name": "code_interpreter", "arguments": {"code": "print(1)\nprint('é')"}})


def wrap(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_calls_of_a_turn_in_order(tokenizer):
    other = GOOD.replace("print(1)", "print(2)")
    calls = tool_calls(tokenizer, tokenizer.encode(f"Both.\n{wrap(GOOD)}\n{wrap(other)}<|im_end|>"))
    assert [c.code for c in calls] == ["print(1)\nprint('é')", "print(2)\nprint('é')"]
    assert [c.error for c in calls] == [None, None]


def test_raw_newlines_in_the_code_are_accepted(tokenizer):
    body = '{"name": "code_interpreter", "arguments": {"code": "a = 1\nprint(a)"}}'
    assert tool_calls(tokenizer, tokenizer.encode(wrap(body)))[0].code == "a = 1\nprint(a)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (wrap("{"), "malformed call"),
        (wrap("[1]"), "expected a JSON object"),
        (wrap('{"name": "shell", "arguments": {"code": "ls"}}'), "unknown tool 'shell'"),
        (wrap('{"name": "code_interpreter"}'), "arguments must be"),
        (wrap('{"name": "code_interpreter", "arguments": {"code": 5}}'), "arguments must be"),
        (f"<tool_call>\n{GOOD}<|im_end|>", "without </tool_call>"),
        ("<tool_call><tool_call></tool_call>", "without </tool_call>"),
    ],
)
def test_a_call_that_cannot_run_is_answered_with_the_reason(tokenizer, text, said):
    call = tool_calls(tokenizer, tokenizer.encode(text))[0]
    assert said in call.error and call.code == ""


def test_text_without_a_call_has_none(tokenizer):
    assert tool_calls(tokenizer, tokenizer.encode("The answer is \\boxed{4}.</tool_call><|im_end|>")) == []
    assert tool_calls(tokenizer, []) == []
