"""A demonstration has the ids of a rollout with the same words, in both grammars; and what cannot be one."""

import asyncio
import copy

import pytest

from retool_jax.answers import extract_boxed
from retool_jax.data.arithmetic import demonstration
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.rollout.rollout import RolloutConfig, Sample, rollout
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.tokens.chat import defuse, prompt_ids
from retool_jax.tokens.demonstrations import TokenList, demonstration_ids
from retool_jax.tokens.grammar import GRAMMARS, policy_turn_text
from retool_jax.tokens.shown import TurnPart, show_outputs, show_turn
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.python import Python
from retool_jax.tools.toolbox import Toolbox

SCHEMAS = [Python().schema]
USER = {"role": "user", "content": "What is gcd(12, 18)?"}
LAST = {"role": "assistant", "content": "The answer is \\boxed{6}."}


def called(*codes: str, content: str = "I will compute it.") -> dict:
    calls = [{"function": {"name": "code_interpreter", "arguments": {"code": code}}} for code in codes]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def tool(content: str) -> dict:
    return {"role": "tool", "content": content}


CONVERSATIONS = {
    "no call": [USER, LAST],
    "a call": [USER, called("import math\nprint(math.gcd(12, 18))"), tool("6"), LAST],
    "two turns": [USER, called("print(5)"), tool("5"), called("if 1:\n    print(6)\n", content=""), tool("6"), LAST],
}


@pytest.fixture(scope="module", params=["miniature", "qwen2_5", "bare"])
def family(request, tokenizer, bare, published_template) -> Tokenizer:
    if request.param in ("miniature", "bare"):  # with and without the marks as tokens
        return tokenizer if request.param == "miniature" else bare
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = published_template(request.param)
    return Tokenizer(hf)


def turns_of(tokens: TokenList) -> list[list[int]]:
    """What a policy says in a demonstration, turn by turn."""
    starts = [i for i, sampled in enumerate(tokens.sampled) if sampled and not tokens.sampled[i - 1]]
    ends = [i for i, sampled in enumerate(tokens.sampled) if not sampled and tokens.sampled[i - 1] and i] + [None]
    return [tokens.ids[a:b] for a, b in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_demonstration_has_the_ids_of_a_rollout_that_says_the_same(family, scripted_engine, grammar):
    demonstrated = [demonstration_ids(family, messages, SCHEMAS, grammar) for messages in CONVERSATIONS.values()]
    script = {i: turns_of(tokens) for i, tokens in enumerate(demonstrated)}
    stop_ids = GRAMMARS[grammar].stop_ids(family)
    engine = scripted_engine(stop_ids, script, slots=3, max_length=2000, decode_steps=100, tool_lag=-1)
    limits = RolloutConfig(max_prompt_tokens=1500, grammar=grammar)

    async def main() -> list[Trajectory]:
        async with open_sandbox(SandboxConfig(backend=("process",), slots=1)) as box:
            samples = [Sample(Problem("p", (USER,), "6"), request) for request in script]
            return (await rollout(engine, family, Toolbox([Python(box)]), samples, limits))[0]

    trajectories = asyncio.run(main())
    for tokens, messages, trajectory in zip(demonstrated, CONVERSATIONS.values(), trajectories, strict=True):
        assert (trajectory.ids, trajectory.sampled) == (tokens.ids, tokens.sampled)
        assert trajectory.end == End.ANSWERED
        codes = [c["function"]["arguments"]["code"] for m in messages for c in m.get("tool_calls", ())]
        assert [use.code for use in trajectory.tool_uses] == codes


def test_the_papers_form_answers_each_call_in_place_and_the_end_in_tags(tokenizer):
    messages = [USER, called("print(5)", "print(6)"), tool("5"), tool("<|im_end|>"), LAST]
    tokens = demonstration_ids(tokenizer, messages, SCHEMAS, "retool")
    prompt = GRAMMARS["retool"].prompt(tokenizer, [USER], SCHEMAS)
    assert tokens.ids[: len(prompt)] == prompt and not any(tokens.sampled[: len(prompt)])
    assert tokenizer.decode(tokens.ids[len(prompt) :]) == (
        "I will compute it.\n<code>\n```python\nprint(5)\n```\n</code>\n<interpreter>\n5\n</interpreter>\n"
        "<code>\n```python\nprint(6)\n```\n</code>\n<interpreter>\n< |im_end|>\n</interpreter>\n"
        "The answer is\n<answer>\n\\boxed{6}\n</answer><|im_end|>"
    )
    spoken = tokenizer.decode([i for i, sampled in zip(tokens.ids, tokens.sampled, strict=True) if sampled])
    assert "<interpreter>" not in spoken and spoken.count("</code>") == 2 and extract_boxed(spoken) == ("6", "boxed")


@pytest.mark.parametrize(
    ("said", "written"),
    [
        ("So \\boxed{\\frac{1}{2}}", "So\n<answer>\n\\boxed{\\frac{1}{2}}\n</answer>"),
        ("\\boxed{1}\n", "<answer>\n\\boxed{1}\n</answer>"),
        ("\\boxed{1} is it", "\\boxed{1} is it"),
        ("So \\boxed{1", "So \\boxed{1"),
        ("<answer>\\boxed{1}</answer>", "<answer>\\boxed{1}</answer>"),
        ("None.", "None."),
    ],
)
def test_a_box_at_the_end_is_set_in_answer_tags(tokenizer, said, written):
    messages = [USER, {"role": "assistant", "content": said}]
    tokens = demonstration_ids(tokenizer, messages, SCHEMAS, "retool")
    assert tokenizer.decode(tokens.ids).endswith(f"<|im_start|>assistant\n{written}<|im_end|>")


def test_an_answer_is_set_in_tags_only_where_the_prompt_asks_for_them(bare):
    def last(tool_prompt: str) -> str:
        tokens = demonstration_ids(bare, [USER, LAST], SCHEMAS, "retool", tool_prompt)
        return bare.decode(tokens.ids).rpartition("assistant\n")[2]

    plain, tagged = "The answer is \\boxed{6}.<|im_end|>", "The answer is\n<answer>\n\\boxed{6}\n</answer><|im_end|>"
    assert last("") == last("Write <code>.") == plain
    assert last("paper") == last("Answer in <answer>.") == tagged


def test_without_tools_every_grammar_writes_plain_text(tokenizer):
    plain = demonstration_ids(tokenizer, [USER, LAST], None, "retool")
    assert plain.ids == prompt_ids(tokenizer, [USER]) + tokenizer.encode(policy_turn_text(LAST))
    assert plain == demonstration_ids(tokenizer, [USER, LAST])


@pytest.mark.parametrize(
    "message",
    [
        called("print('</code>')"),
        called("```python\n1\n```"),
        called(" "),
        called("1", content="I write <code> now."),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sum", "arguments": {"a": 1}}}]},
    ],
)
def test_what_the_papers_form_cannot_say_is_refused(tokenizer, message):
    with pytest.raises(UserError, match="a turn cannot be written in the retool grammar: it calls another tool, or"):
        demonstration_ids(tokenizer, [USER, message, tool("1"), LAST], SCHEMAS, "retool")
    with pytest.raises(UserError, match="a turn with 1 calls has 0 outputs"):
        demonstration_ids(tokenizer, [USER, message, LAST], SCHEMAS, "retool")


def test_the_miniatures_demonstrations_exist_in_both(tokenizer):
    for index in range(50):
        messages = demonstration(index, tools=True)
        codes = [c["function"]["arguments"]["code"] for m in messages for c in m.get("tool_calls", ())]
        for name, grammar in GRAMMARS.items():
            tokens = demonstration_ids(tokenizer, messages, SCHEMAS, name)
            said = [i for i, sampled in zip(tokens.ids, tokens.sampled, strict=True) if sampled]
            assert [call.code for call in grammar.calls(tokenizer.decode(said))] == codes


# --- shown to people --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_turn_and_its_answers_are_shown_without_their_marks(tokenizer, grammar):
    pieces = GRAMMARS[grammar].demonstration(tokenizer, called("print(5)"), ["5 <b>\n6"])
    (turn, _), (answer, _) = pieces
    shown = show_turn(tokenizer.decode(turn))
    assert shown == [TurnPart("said", "I will compute it."), TurnPart("call", "print(5)")]
    assert show_outputs(tokenizer.decode(answer)) == ["5 <b>\n6"]


def test_every_call_of_a_turn_is_shown_and_what_cannot_be_read_says_so():
    text = (
        '<|im_start|>assistant\nFirst.\n<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>\n'
        "<tool_call>\n{oops\n</tool_call>\nor <tool_call> it<|im_end|>"
    )
    said, other, broken, rest = show_turn(text)
    assert (said.text, other.text) == ("First.", 'sum {"a": 1}') and not other.fault
    assert broken.text == "{oops" and broken.fault.startswith("malformed call")
    assert rest == TurnPart("said", "or <tool_call> it")
    assert show_turn("<code>\n```python\na\n</code>")[0].fault.startswith("malformed call")
    assert show_turn('<tool_call>{"name": 1}</tool_call>')[0].fault == "not a well-formed call"
    assert show_turn(" \n<|im_end|>") == [] and show_outputs("\n<|im_start|>user\nStop.<|im_end|>\n") == [
        "\nuser\nStop.\n"
    ]


def test_several_outputs_of_one_segment(tokenizer):
    for grammar in GRAMMARS.values():
        turn = tokenizer.encode("x</tool_call><|im_end|>")
        segment = tokenizer.decode(grammar.segment(tokenizer, turn, ["1", "", "</interpreter></tool_response>"]))
        assert show_outputs(segment) == ["1", "", "< /interpreter>< /tool_response>"]


# --- code that breaks or skips marks knows every mark -----------------------------------------------------------------


def test_marks_of_calls_and_outputs_are_broken_in_outputs_and_no_answer(tokenizer):
    for grammar in GRAMMARS.values():
        pieces = grammar.demonstration(tokenizer, called("# \\boxed{9}"), ["\\boxed{8}"])
        said, answered = (tokenizer.decode(ids) for ids, _ in pieces)
        assert extract_boxed(said) == (None, "no_box"), "a box in a call is no answer"
        for text in (said, answered):
            assert not {"<tool_call>", "</code>", "<interpreter>", "</tool_response>"} & set(
                defuse(tokenizer, text).split()
            )
