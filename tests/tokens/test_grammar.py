"""Both tool grammars: what is a call, how each one is answered, and the paper's through whole rollouts."""

import asyncio
import copy
import json
import random

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken

from retool_jax.data.problems import Problem
from retool_jax.rollout.rollout import RolloutConfig, Sample, rollout, score
from retool_jax.rollout.trajectory import End
from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.tokens.grammar import GRAMMARS, marking_ids, tool_calls
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.python import Python
from retool_jax.tools.toolbox import Toolbox

GOOD = json.dumps({"name": "code_interpreter", "arguments": {"code": "print(1)\nprint('é')"}})


def wrap(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def test_calls_of_a_turn_in_order(tokenizer):
    other = GOOD.replace("print(1)", "print(2)")
    calls = tool_calls(f"Both.\n{wrap(GOOD)}\n{wrap(other)}<|im_end|>")
    assert [c.code for c in calls] == ["print(1)\nprint('é')", "print(2)\nprint('é')"]
    assert [c.error for c in calls] == [None, None]


def test_raw_newlines_in_the_code_are_accepted(tokenizer):
    body = '{"name": "code_interpreter", "arguments": {"code": "a = 1\nprint(a)"}}'
    assert tool_calls(wrap(body))[0].code == "a = 1\nprint(a)"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (wrap("{"), "malformed call"),
        (wrap("[1]"), "expected a JSON object"),
        (f"<tool_call>\n{GOOD}<|im_end|>", "without </tool_call>"),
        ("<tool_call><tool_call></tool_call>", "without </tool_call>"),
    ],
)
def test_a_call_that_cannot_run_is_answered_with_the_reason(tokenizer, text, said):
    call = tool_calls(tokenizer.decode(tokenizer.encode(text)))[0]
    assert said in call.error and call.code == ""


def test_text_without_a_call_has_none(tokenizer):
    assert tool_calls("The answer is \\boxed{4}.</tool_call><|im_end|>") == []
    assert tool_calls("") == []


@pytest.mark.parametrize("body", ["[" * 100_000, '{"a":' * 50_000, "9" * 5000], ids=["brackets", "objects", "digits"])
def test_a_call_that_the_json_reader_cannot_finish_is_answered(tokenizer, body):
    (call,) = tool_calls(wrap(body))
    assert "malformed call" in call.error and len(call.error) < 200


def body(arguments: str, name: str = "code_interpreter") -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


EXACT = body('{"code": "print(6)"}')
REPAIRED = [
    (body(json.dumps('{"code": "print(6)"}')), "print(6)", "the arguments are a string"),
    (body(json.dumps('{"code": "print(6)\nprint(7)"}')), "print(6)\nprint(7)", "the arguments are a string"),
    (body('"print(6)"'), "print(6)", "the arguments are a string"),
    (
        body(json.dumps("for i in {1, 2}:\n    print(i)")),
        "for i in {1, 2}:\n    print(i)",
        "the arguments are a string",
    ),
    (body('"7"'), "7", "the arguments are a string"),
    (body(json.dumps({"code": "```python\nprint(6)\n```"})), "print(6)", "the code stands between ```"),
    (body(json.dumps({"code": "```\nprint(6)\n```\n"})), "print(6)", "the code stands between ```"),
    (body(json.dumps({"code": "```Python3\r\nprint(6)\r\nprint(7)\r\n```"})), "print(6)\nprint(7)", "between ```"),
    (body(json.dumps("```py\nprint(6)\n```")), "print(6)", "a string; they must be a JSON object; the code stands"),
    ('{"name": "code_interpreter", "parameters": {"code": "print(6)"}}', "print(6)", "are called parameters"),
    (f'{{"type": "function", "function": {EXACT}}}', "print(6)", "stand inside of function"),
    (f"```json\n{EXACT}\n```", "print(6)", "the JSON stands between ```"),
    (f"{{{EXACT}}}", "print(6)", "the outer braces are doubled"),
    (EXACT[:-1], "print(6)", "a closing brace too many or too few"),
    (f"{EXACT}}}", "print(6)", "a closing brace too many or too few"),
    (body(r'{"code": "re.findall(\'\d+\', s)"}'), r"re.findall('\d+', s)", "a backslash in a string must be doubled"),
    (body('{"code": "print(6)\n"}'), "print(6)\n", "a line's end or a tab in a string must be escaped"),
    (body('{"code": "if x:\n\tprint(6)"}')[:-1], "if x:\n\tprint(6)", "a closing brace too many or too few"),
]


@pytest.mark.parametrize(("text", "code", "words"), REPAIRED)
def test_what_is_really_written_for_a_call_is_read_and_told_apart(text, code, words):
    (call,) = tool_calls(wrap(text))
    assert (call.name, call.arguments, call.error) == ("code_interpreter", {"code": code}, None)
    assert words in call.repaired and call.strict().error == f"malformed call: {call.repaired}"


@pytest.mark.parametrize(
    "text",
    [
        EXACT,
        body('{"code": ""}'),
        body('{"code": "x = 1", "more": 2}'),
        body('{"text": "```a```"}', "shout"),
        body("[]"),
    ],
)
def test_a_call_as_the_grammar_writes_it_is_not_repaired(text):
    (call,) = tool_calls(wrap(text))
    assert not call.repaired and call.strict() is call and call.arguments == json.loads(text)["arguments"]


@pytest.mark.parametrize(
    "text",
    [
        "{'name': 'code_interpreter', 'arguments': {'code': 'print(6)'}}",
        f"{EXACT}\n{EXACT}",
        f"[{EXACT}]",
        "print(6)",
        f"I call {EXACT}",
        f"{EXACT[:-3]}",
        "}}",
        "{{}}",
    ],
)
def test_what_can_mean_several_things_or_none_is_answered_with_what_is_wrong(text):
    (call,) = tool_calls(wrap(text))
    assert call.error.startswith("malformed call: ") and "expected a JSON object" in call.error


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('"print(6)"', "print(6)"),
        ('"{code: 1}"', "{code: 1}"),
        ('""', ""),
        ('{"code": "```bash\\nls\\n```"}', {"code": "```bash\nls\n```"}),
        ('{"code": "a\\n```python\\nb\\n```"}', {"code": "a\n```python\nb\n```"}),
    ],
)
def test_what_another_tool_or_no_program_is_given_stays_as_it_was(given, kept):
    name = "shout" if given == '"print(6)"' else "code_interpreter"
    (call,) = tool_calls(wrap(body(given, name)))
    assert (call.arguments, call.repaired, call.error) == (kept, "", None)


def calling(grammar: str, code: str) -> str:
    return wrap(body(json.dumps({"code": code}))) if grammar == "hermes" else f"<code>\n```python\n{code}\n```\n</code>"


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("<think>I could write A</think>\\boxed{6}", ""),
        ("<think>A</think>B", "B"),
        ("A<think>hm</think>", "A"),
        ("<think>so A", "A"),
        ("<think>A</think><think>B", "B"),
        ("<think><think>A</think>B</think>\\boxed{6}", ""),
        ("<think>the tag <think> and A</think>\\boxed{6}", ""),
        ("<think>so OPEN is how</think>B", "B"),
        ("</think>A", "A"),
        ("<think>a</think>A<think>b</think>B<think>A", "ABA"),
        ("C<think>A</think>", "C"),
        ("<think>A</think>C", "C"),
    ],
)
def test_a_call_that_was_drafted_in_a_thought_is_none(grammar, text, codes):
    programs = {"A": "print(1)", "B": "print(2)", "C": "print('<think>', '</think>')"}
    text = text.replace("OPEN", "<tool_call>" if grammar == "hermes" else "<code>")
    said = "".join(calling(grammar, programs[c]) if c in programs else c for c in text)
    calls = GRAMMARS[grammar].calls(said)
    assert [call.code for call in calls] == [programs[c] for c in codes] and not any(call.error for call in calls)


# --- the paper's grammar ----------------------------------------------------------------------------------------------

RETOOL = GRAMMARS["retool"]
TOOL_SCHEMA = Python().schema
CODE = "import math\nprint(math.gcd(12, 18))"
USER = {"role": "user", "content": "What is gcd(12, 18)?"}


def fenced(code: str, language: str = "python") -> str:
    return f"<code>\n```{language}\n{code}\n```\n</code>"


@pytest.fixture(scope="module")
def with_code(tokenizer) -> Tokenizer:
    """The miniature's vocabulary with `</code>` as one token."""
    hf = copy.deepcopy(tokenizer.hf)
    hf.add_tokens([AddedToken("</code>", special=False, normalized=False)])
    return Tokenizer(hf)


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (f"Let me see.\n{fenced(CODE)}", [CODE]),
        (fenced(CODE, ""), [CODE]),
        (fenced(CODE, "py"), [CODE]),
        (f"<code>\n{CODE}\n</code>", [CODE]),
        (f"<code>```python\n{CODE}```</code>", [CODE]),
        (fenced("if x:\n    pass\n\n    y = 1"), ["if x:\n    pass\n\n    y = 1"]),
        (fenced("print('<code>', '```')"), ["print('<code>', '```')"]),
        (f"{fenced('print(1)')} and {fenced('print(2)')}", ["print(1)", "print(2)"]),
        ("<answer>\n\\boxed{6}\n</answer><|im_end|>", []),
        ("", []),
    ],
)
def test_retool_calls_of_a_turn_in_order(tokenizer, with_code, text, codes):
    for vocabulary in (tokenizer, with_code):  # `</code>` in seven tokens, and in one
        calls = RETOOL.calls(vocabulary.decode(vocabulary.encode(text)))
        assert [call.code for call in calls] == codes and not any(call.error for call in calls)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<code>\n```python\nprint(1)\n<|im_end|>", "opened and never closed"),
        ("print(1)\n```\n</code>", "closed and never opened"),
        ("<code>\n```python\nprint(1)\n</code>", "not closed, or not the only one"),
        ("<code>\n```python\na\n```\nand\n```python\nb\n```\n</code>", "not closed, or not the only one"),
        ("<code>\n```python\n\n```\n</code>", "no code"),
        ("<code></code>", "no code"),
    ],
)
def test_a_retool_call_that_cannot_run_is_answered_with_the_reason(tokenizer, text, said):
    (call,) = RETOOL.calls(text)
    assert said in call.error and call.code == "" and "\n" not in call.error


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (fenced(CODE, "Python"), [CODE]),
        (fenced(CODE, "python3"), [CODE]),
        (fenced(CODE, " PYTHON "), [CODE]),
        (fenced(CODE, "py3.11"), [CODE]),
        (fenced(CODE, "ipython"), [CODE]),
        (fenced(CODE, ""), [CODE]),
        (f"<code>{CODE}</code>", [CODE]),
        (f"<code>\r\n{CODE}\r\n</code>", [CODE]),
        (fenced(CODE, "Python").replace("\n", "\r\n"), [CODE]),
    ],
)
def test_a_program_in_another_fence_is_read_and_told_apart(text, codes):
    calls = RETOOL.calls(text)
    assert [call.code for call in calls] == codes
    assert all("no ```python block" in call.repaired and "```python block" in call.strict().error for call in calls)
    for exact in (fenced(CODE), fenced(CODE).replace("\n", "\r\n"), f"<code>```python\n{CODE}```</code>"):
        (call,) = RETOOL.calls(exact)
        assert (call.code, call.repaired, call.strict()) == (CODE, "", call)


@pytest.mark.parametrize("language", ["bash", "cpp", "python title=x", "json", "text", "`python"])
def test_a_fence_of_another_language_is_answered(language):
    (call,) = RETOOL.calls(fenced(CODE, language))
    assert call.error.startswith(f"malformed call: the code block says {language!r}, and only Python runs")


def test_the_papers_prompt_is_short_and_can_be_set_but_for_the_miniature(tokenizer, bare):
    def asked(vocabulary: Tokenizer, tool_prompt: str) -> str:
        ids = RETOOL.prompt(vocabulary, [USER], [TOOL_SCHEMA], tool_prompt)
        return vocabulary.decode(ids).split("user\n")[1].split("<|im_end|>")[0]

    short, long, own = asked(bare, ""), asked(bare, "paper"), asked(bare, "Write Python in <code>.\n")
    assert own == f"Write Python in <code>.\n\n{USER['content']}"
    assert 2 * len(short) < len(long) and "<code>\n```python\n" in short and "<interpreter>" in short
    assert "<answer>" in long and "<answer>" not in short and "boxed" not in short, "the question says how to answer"
    assert asked(tokenizer, "") == asked(tokenizer, "paper") == long


def test_the_retool_prompt_explains_the_grammar_around_the_question(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    text = tokenizer.decode(RETOOL.prompt(tokenizer, [system, USER], [TOOL_SCHEMA]))
    told = ["<interpreter>", "<code>\n```python\n", "\n```\n</code>", "<answer>\n\\boxed{", USER["content"]]
    assert [text.index(part) for part in told] == sorted(text.index(part) for part in told)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith(f"{USER['content']}<|im_end|>\n<|im_start|>assistant\n")
    assert not [c for c in text if c < " " and c != "\n"], "no control characters from a misread backslash"


@pytest.mark.parametrize("output", ["", "4", "\n5\n", "  6", "7 " * 300, "答案是四", "\n\n\n"])
def test_a_retool_turn_goes_on_in_place(with_code, output):
    """Prompt, turn, answer: the ids of the whole text, in one turn, without a header."""
    text = f"Let me see.\n{fenced(CODE)}"
    prompt, turn = RETOOL.prompt(with_code, [USER], [TOOL_SCHEMA]), with_code.encode(text)
    ids = prompt + turn + RETOOL.segment(with_code, turn, [output])
    assert ids == with_code.encode(f"{with_code.decode(prompt)}{text}\n<interpreter>\n{output}\n</interpreter>\n")
    both = with_code.decode(RETOOL.segment(with_code, turn, [output, "2"]))
    assert both == f"\n<interpreter>\n{output}\n</interpreter>\n<interpreter>\n2\n</interpreter>\n"


def test_a_retool_turn_that_ended_inside_a_call_is_answered_by_the_user(with_code):
    turn = with_code.encode("<code>\nprint(1)<|im_end|>")
    told = with_code.decode(RETOOL.segment(with_code, turn, ["unfinished"]))
    answer = "<interpreter>\nunfinished\n</interpreter>"
    assert told == f"\n<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n"


def test_a_retool_turn_ends_at_code_in_one_token_or_in_many(tokenizer, with_code):
    assert RETOOL.stop_ids(with_code) == (*tokenizer.stop_ids, len(tokenizer))
    assert RETOOL.stop_ids(tokenizer) == GRAMMARS["hermes"].stop_ids(with_code) == tokenizer.stop_ids
    with pytest.raises(ValidationError, match=r"grammar\s.*'hermes' or 'retool'"):
        RolloutConfig(grammar="xml")
    for vocabulary in (tokenizer, with_code):
        turn = vocabulary.encode(f"Let me see.\n{fenced(CODE)}")
        more = vocabulary.encode(f"\nand\n{fenced(CODE)}")
        assert [RETOOL.stop_at(vocabulary, turn + more, seen) for seen in (0, 5, len(turn) - 1)] == [len(turn)] * 3
        assert RETOOL.stop_at(vocabulary, turn[:-1], 0) is None and RETOOL.stop_at(vocabulary, [], 0) is None
        assert GRAMMARS["hermes"].stop_at(vocabulary, turn + more, 0) is None


# --- whole rollouts in the paper's grammar ----------------------------------------------------------------------------


@pytest.fixture
def play(scripted_engine):
    """One trajectory of a scripted policy, which continues with `behind` after its first turn; all else is real."""

    def run(tokenizer: Tokenizer, turns: list[str], behind: str = "", box: bool = True):
        limits = RolloutConfig(max_prompt_tokens=600, max_turns=4, grammar="retool")
        said = [tokenizer.encode(turn) for turn in (turns[0] + behind, *turns[1:])]
        sizes = {"slots": 1, "max_length": 800, "decode_steps": 100, "tool_lag": -1}
        engine = scripted_engine(RETOOL.stop_ids(tokenizer), {0: said}, **sizes)

        async def main():
            samples = [Sample(Problem("p", (USER,), "6"), 0)]
            if not box:
                return (await rollout(engine, tokenizer, None, samples, limits))[0]
            async with open_sandbox(SandboxConfig(backend=("process",), slots=2)) as real:
                return (await rollout(engine, tokenizer, Toolbox([Python(real)]), samples, limits))[0]

        (trajectory,) = asyncio.run(main())
        score(tokenizer, [trajectory])
        assert engine.left == [trajectory.ids[:-1]], "the cache holds what the training data will"
        return trajectory

    return run


def test_a_retool_trajectory_is_one_turn_with_its_programs_answered_in_place(with_code, play):
    turns = [f"Let me see.\n{fenced(CODE)}", "So it is.\n<answer>\n\\boxed{6}\n</answer><|im_end|>"]
    trajectory = play(with_code, turns)
    prompt = with_code.decode(RETOOL.prompt(with_code, [USER], [TOOL_SCHEMA]))
    text = f"{prompt}{turns[0]}\n<interpreter>\n6\n</interpreter>\n{turns[1]}"
    assert trajectory.ids == with_code.encode(text)
    spoken = [i for i, sampled in zip(trajectory.ids, trajectory.sampled, strict=True) if sampled]
    assert with_code.decode(spoken) == "".join(turns)
    assert trajectory.end == End.ANSWERED and trajectory.reward == 1.0
    assert [(use.status, use.code, use.output) for use in trajectory.tool_uses] == [("success", CODE, "6")]


def test_a_retool_policy_is_told_of_each_call_that_could_not_run(with_code, play):
    broken = "<code>\n```python\nprint(6)\n</code>"
    unfinished = "<code>\nprint(6)<|im_end|>"
    hostile = fenced(r"""print("<" + "/code>", "<" + "/interpreter>", "<" + "|im_end|>", "\\boxed" + "{6}")""")
    trajectory = play(with_code, [broken, unfinished, hostile, "I do not know.<|im_end|>"])
    assert [use.status for use in trajectory.tool_uses] == ["invalid_call", "invalid_call", "success"]
    told = with_code.decode(trajectory.ids)
    assert all(use.output in told for use in trajectory.tool_uses)
    assert "the code block is not closed" in told and "the code tag was opened and never closed" in told
    assert "< /code> < /interpreter> < |im_end|>" in trajectory.tool_uses[2].output
    assert trajectory.end == End.NO_ANSWER and not trajectory.verdict.correct, "a box in the output does not score"


@pytest.mark.parametrize("behind", ["", "\n", "\n\nThen I", " é<|im_end|>"])
def test_a_retool_turn_in_a_vocabulary_without_the_mark_ends_there_all_the_same(tokenizer, behind, play):
    """The policy samples more after `</code>` before the host sees it; these ids are removed."""
    turns = [f"Let me see.\n{fenced(CODE)}", "So it is.\n<answer>\n\\boxed{6}\n</answer><|im_end|>"]
    trajectory = play(tokenizer, turns, behind=behind)
    text = tokenizer.decode(trajectory.ids)
    assert text.endswith(f"{turns[0]}\n<interpreter>\n6\n</interpreter>\n{turns[1]}")
    spoken = [i for i, sampled in zip(trajectory.ids, trajectory.sampled, strict=True) if sampled]
    assert tokenizer.decode(spoken) == "".join(turns)
    assert trajectory.end == End.ANSWERED and trajectory.reward == 1.0


def test_without_a_sandbox_there_is_nothing_to_stop_for(tokenizer, play):
    alone = play(tokenizer, ["<code>1</code>\\boxed{6}<|im_end|>"], box=False)
    assert alone.end == End.ANSWERED and not alone.tool_uses
    assert "<interpreter>" not in tokenizer.decode(alone.ids), "the prompt promises no tool"


# --- where calls begin ------------------------------------------------------------------------------------------------


def test_a_call_in_a_thought_that_the_header_opened_begins_where_it_stands(tokenizer):
    """The text of such a turn has a mark that is not among its ids."""
    turn = tokenizer.encode("a < b <tool_call>{}")
    text = "<think>" + tokenizer.decode(turn)
    (call,) = GRAMMARS["hermes"].calls(text)
    (place,) = marking_ids(tokenizer, turn, text, [call.start])
    assert tokenizer.decode(turn[place:]) == "<tool_call>{}"


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_a_call_begins_at_the_id_that_completes_the_text_before_its_mark(grammar, tokenizer):
    """Also if ids hold several marks, or bytes that are not text."""
    hf = copy.deepcopy(tokenizer.hf)
    hf.add_tokens(["<<", "></", ".\n<", "<code>\n<code>"])
    tokenizer = Tokenizer(hf)
    pieces = [
        tokenizer.encode(text) for text in ("<code>", "</code>", "<tool_call>", "</tool_call>", "<<", "></", "é", "{}")
    ]
    pieces += [[i] for i in range(len(tokenizer) - 4, len(tokenizer))]
    rng, seen = random.Random(0), 0
    for _ in range(60):
        turn = [i for _ in range(12) for i in (*rng.choice(pieces), rng.randrange(len(tokenizer)))]
        text = tokenizer.decode(turn)
        starts = [call.start for call in GRAMMARS[grammar].calls(text)]
        whole = [
            next(k for k in range(len(turn)) if tokenizer.decode(turn[: k + 1]).startswith(text[: s + 1]))
            for s in starts
        ]
        assert marking_ids(tokenizer, turn, text, starts) == whole
        seen += len(starts)
    assert seen > 30
