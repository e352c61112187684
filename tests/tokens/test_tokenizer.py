"""Reading a tokenizer in each of its forms, refusing what cannot be one, and a family other than ChatML."""

# ruff: noqa: RUF001  (DeepSeek writes its marks with full-width bars)

import asyncio
import base64
import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.rollout.rollout import RolloutConfig, Sample, rollout, score
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.run.build import model_for
from retool_jax.run.load import load
from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.tokens.chat import defuse, prompt_ids, tool_segment
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.grammar import GRAMMARS, hermes_prompt, policy_turn_text, tool_calls
from retool_jax.tokens.qwen import QWEN_ADDED, added_after, merges_of_ranks, read_ranks, tokenizer_of_ranks
from retool_jax.tokens.tokenizer import MINIATURE, QWEN, R1, Tokenizer, load_tokenizer
from retool_jax.tools.python import Python
from retool_jax.tools.toolbox import Toolbox

TOOL_SCHEMA = Python().schema

# Tokens in the order of their merges; the last two follow only from merges of lower ranks.
MERGED = ["in", "pr", "prin", "print", " (", "\n\n", "\t\t", "é", "答", "inpr", "printin", "  ", "    ", "12"]
TEXTS = ["print (12)\n\n\tprintin  prin", "é 答案 \x00\x7f\xff", "      inprint", "", "a\r\n\r\n"]
USER = {"role": "user", "content": "What is gcd(12, 18)?"}


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """All bytes in GPT-2's order, and a few merges (a Chinese character takes two)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    tokens = [bytes([byte]) for byte in order]
    for text in MERGED:
        data = text.encode()
        tokens += [data[:2], data] if len(data) == 3 else [data]
    return {token: rank for rank, token in enumerate(tokens)}


def qwen_tokenizer(ranks: dict[bytes, int], model_type: str) -> FastTokenizer:
    return tokenizer_of_ranks(ranks, added_after(len(ranks), QWEN_ADDED[model_type]))


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def reference_encode(ranks: dict[bytes, int], piece: str) -> list[int]:
    """tiktoken's own loop: merge the adjacent pair of lowest rank until none is left."""
    parts = [bytes([byte]) for byte in piece.encode()]
    while len(parts) > 1:
        scored = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not scored:
            break
        _, at = min(scored)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_merges_follow_from_ranks(ranks):
    merges = merges_of_ranks(ranks)
    assert [left + right for left, right in merges] == [token for token in ranks if len(token) > 1]
    assert merges[3] == (b"prin", b"t") and merges[-2] == (b"  ", b"  ")
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=qwen_tokenizer(ranks, "qwen2")))
    for piece in ("printinprint", "inprint", "é", "答", "\n\n", "\t\t", "      "):  # one piece for the pre-tokenizer
        assert tokenizer.encode(piece) == reference_encode(ranks, piece), piece
    assert tokenizer.encode("12") == [ranks[b"1"], ranks[b"2"]], "digits stand alone, whatever the merges say"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_three_forms_of_a_tokenizer_give_the_same_ids(ranks, tmp_path):
    """And a checkpoint's settings decide its template, its special tokens and its added tokens."""
    fast = qwen_tokenizer(ranks, "qwen3")
    declared = {
        str(fast.token_to_id(text)): {"content": text, "special": special, "normalized": False}
        for text, special in QWEN_ADDED["qwen3"].items()
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": declared}
    template = (MINIATURE / "chat_template.jinja").read_text()
    whole, split, tiktoken = (tmp_path / name for name in ("whole", "split", "tiktoken"))
    for folder in (whole, split, tiktoken):
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    fast.save(str(whole / "tokenizer.json"))
    content = json.loads(fast.to_str())["model"]
    (split / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in content["merges"])]
    (split / "merges.txt").write_text("\n".join(merges) + "\n")
    write_ranks(tiktoken / "qwen.tiktoken", ranks)
    tokenizers = [load_tokenizer(str(folder)) for folder in (whole, split, tiktoken)]
    for tokenizer in tokenizers:
        assert tokenizer.hf.backend_tokenizer.to_str() == fast.to_str()
        assert len(tokenizer) == len(ranks) + 26 and tokenizer.hf.eos_token == "<|im_end|>"
        prompt = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt_ids(tokenizer, [USER]) == fast.encode(prompt).ids
    # Without a list of added tokens, the architecture says which they are.
    (tiktoken / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="does not say which added tokens it has"):
        load_tokenizer(str(tiktoken))
    for model_type, count in (("qwen2", 22), ("qwen3", 26)):
        (tiktoken / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert len(load_tokenizer(str(tiktoken))) == len(ranks) + count
    with pytest.raises(UserError, match=r"no chat template; put chat_template\.jinja"):
        prompt_ids(load_tokenizer(str(tiktoken)), [USER])


def test_a_file_is_read_as_it_is_whatever_class_its_settings_name(ranks, tmp_path):
    """DeepSeek's distilled Qwen names Llama's class."""
    fast = qwen_tokenizer(ranks, "qwen2")
    fast.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert [tokenizer.encode(text) for text in TEXTS] == [fast.encode(text).ids for text in TEXTS]
    assert tokenizer.hf.eos_token == "<|im_end|>"


def test_what_is_no_tokenizer_is_refused_in_one_line(ranks, tmp_path):
    def refused(match: str, **files: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        with pytest.raises(UserError, match=match) as caught:
            load_tokenizer(str(folder))
        assert "\n" not in str(caught.value)

    whole = qwen_tokenizer(ranks, "qwen2").to_str()
    bare = json.loads(whole)["model"]
    refused(r"expected tokenizer\.json, vocab\.json with merges\.txt, or qwen\.tiktoken")
    refused(r"cannot read .*tokenizer\.json", tokenizer__json=whole[:500])
    refused(r"cannot read .*tokenizer_config\.json", tokenizer__json=whole, tokenizer_config__json="{")
    refused(r"tokenizer_config\.json is not a JSON object", tokenizer__json=whole, tokenizer_config__json="[]")
    refused(
        r"eos_token '<eos>', which is not in the vocabulary",
        tokenizer__json=whole,
        tokenizer_config__json='{"eos_token": "<eos>"}',
    )
    refused(r"eos_token 3, which is not", tokenizer__json=whole, tokenizer_config__json='{"eos_token": 3}')
    refused(
        r"disagree: '<\|im_end\|>' is id \d+ in the vocabulary and 5 in the settings",
        tokenizer__json=whole,
        tokenizer_config__json='{"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}}',
    )
    refused(
        "cannot read the added tokens",
        tokenizer__json=whole,
        tokenizer_config__json='{"added_tokens_decoder": {"five": {"content": "<|im_end|>"}}}',
    )
    refused(
        "tokenizer_class 'GPT2Tokenizer', and only Qwen2Tokenizer's",
        vocab__json="{}",
        merges__txt="",
        tokenizer_config__json='{"tokenizer_class": "GPT2Tokenizer"}',
    )
    refused(
        "cannot join vocab.json and merges.txt",
        vocab__json=json.dumps(bare["vocab"]),
        merges__txt="in pr ap",
        tokenizer_config__json='{"tokenizer_class": "Qwen2Tokenizer"}',
        config__json='{"model_type": "qwen2"}',
    )
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "tokenizer.json").write_text(whole)
    (tmp_path / "bytes" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot read .*chat_template\.jinja \('utf-8' codec .*; fetch it again"):
        load_tokenizer(str(tmp_path / "bytes"))
    refused(r"qwen\.tiktoken line 2 is not `base64 rank`", qwen__tiktoken="IQ== 0\n??\n")
    refused(r"qwen\.tiktoken has gaps", qwen__tiktoken="IQ== 0\nIg== 2\n")
    nobody = json.loads(whole) | {"added_tokens": []}
    refused(r"the tokenizer has neither <\|im_end\|> nor", tokenizer__json=json.dumps(nobody))
    orphan = ranks | {b"zzzz": len(ranks)}
    write_ranks(tmp_path / "orphan", orphan)
    with pytest.raises(UserError, match=f"token {len(ranks)} of the ranks file follows from no merge"):
        merges_of_ranks(read_ranks(tmp_path / "orphan"))


def test_a_folder_that_is_not_there_is_told_apart_from_a_hub_id():
    with pytest.raises(UserError, match="no tokenizer at /nowhere/at/all"):
        load_tokenizer("/nowhere/at/all")
    with pytest.raises(UserError, match="no tokenizer at checkpoint: expected"):
        load_tokenizer("./checkpoint")
    # Not a legal name on the hub, so the client refuses it before it asks the network.
    with pytest.raises(UserError, match=r"no tokenizer at a--b/c\.\.d: not a folder, and the hub says"):
        load_tokenizer("a--b/c..d")


# --- the output of a template is tested, not assumed ------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief."}


def under(tokenizer: Tokenizer, template: str) -> Tokenizer:
    hf = copy.copy(tokenizer.hf)
    hf.chat_template = template
    return Tokenizer(hf)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_a_template_that_shows_tools_is_taken_at_its_word(tokenizer, published_template, name):
    family = under(tokenizer, published_template(name))
    assert family.family is QWEN and family.writes_tools and family.writes_system
    prompt = family.decode(hermes_prompt(family, [USER], [TOOL_SCHEMA]))
    assert prompt == family.render([USER], [TOOL_SCHEMA], True) and "You may call a function while" not in prompt


def test_where_a_template_leaves_tools_out_they_are_told_in_words(tokenizer, bare):
    assert tokenizer.writes_tools, "the miniature's knows its tool from demonstrations"
    assert hermes_prompt(tokenizer, [USER], [TOOL_SCHEMA]) == prompt_ids(tokenizer, [USER])
    template = bare.hf.chat_template
    # It names tools, but does not say how this grammar calls them.
    named = "{%- for tool in tools or [] -%}{{- tool.function.name + ': call it as JSON\n' -}}{%- endfor -%}" + template
    for family in (bare, under(bare, named)):
        assert not family.writes_tools
        prompt = family.decode(hermes_prompt(family, [SYSTEM, USER], [TOOL_SCHEMA]))
        assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou may call a function while you work")
        assert json.dumps(TOOL_SCHEMA) in prompt and '<tool_call>\n{"name": ' in prompt
    refusing = "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system') -}}{%- endif -%}" + template
    deaf = template.replace(
        '{{- "<|im_start|>" + message.role',
        "{%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}{{- \"<|im_start|>\" + message.role",
    )
    for family in (under(bare, refusing), under(bare, deaf)):
        assert not family.writes_system
        prompt = family.decode(hermes_prompt(family, [USER], [TOOL_SCHEMA]))
        assert "user\nYou may call a function while you work" in prompt and USER["content"] in prompt
    with pytest.raises(UserError, match=r"the chat template refuses turns of system, user \(no system\)"):
        under(bare, refusing).render([SYSTEM, USER], None, True)


def test_a_template_of_another_family_than_the_vocabulary_is_refused(bare_folder, tmp_path):
    """Llama-like turns over a vocabulary that has `<|im_end|>` would have been answered in ChatML."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((bare_folder / name).read_text())
    others = [
        "{%- for m in messages -%}[{{- m.role -}}] {{- m.content -}}\n{%- endfor -%}",
        "{%- for m in messages -%}<|im_start|>{{- m.role + '\n' + m.content -}}<|im_end|>{%- endfor -%}",
        "{{- raise_exception('no') -}}",
    ]
    for template in others:
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=r"the chat template does not write a user's next turn as '<\|im_end\|>"):
            load_tokenizer(str(tmp_path))


# --- DeepSeek-R1-Distill-Qwen: other names for the added tokens, another way to mark turns ---------------------------

R1_ADDED = {
    "<｜end▁of▁sentence｜>": True,
    "<｜User｜>": False,
    "<｜Assistant｜>": False,
    "<｜begin▁of▁sentence｜>": True,
    "<|EOT|>": False,
    "<think>": False,
    "</think>": False,
    "<tool_call>": False,
    "</tool_call>": False,
}
# The shape of the published one: no ChatML, no tools, system text first, thinking taken out of what was said, tool
# outputs in a list whose opening is written once in a conversation, and no header after them.
R1_TEMPLATE = """
{%- set state = namespace(system="", outputs=false, opened=false) -%}
{%- for message in messages if message.role == "system" -%}{%- set state.system = message.content -%}{%- endfor -%}
{{- bos_token + state.system -}}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
        {{- "<｜User｜>" + message.content -}}
    {%- elif message.role == "assistant" and state.outputs -%}
        {{- "<｜tool▁outputs▁end｜>" + message.content + "<｜end▁of▁sentence｜>" -}}
        {%- set state.outputs = false -%}
    {%- elif message.role == "assistant" -%}
        {{- "<｜Assistant｜>" + message.content.split("</think>")[-1] + "<｜end▁of▁sentence｜>" -}}
    {%- elif message.role == "tool" -%}
        {{- "\\n" if state.opened else "<｜tool▁outputs▁begin｜>" -}}
        {{- "<｜tool▁output▁begin｜>" + message.content + "<｜tool▁output▁end｜>" -}}
        {%- set state.outputs = true -%}{%- set state.opened = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if state.outputs -%}
    {{- "<｜tool▁outputs▁end｜>" -}}
{%- elif add_generation_prompt -%}
    {{- "<｜Assistant｜><think>\\n" -}}
{%- endif -%}
"""


@pytest.fixture(scope="module")
def distilled(ranks, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("r1")
    added = {len(ranks) + i: AddedToken(t, special=s, normalized=False) for i, (t, s) in enumerate(R1_ADDED.items())}
    tokenizer_of_ranks(ranks, added).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    config = {name: {"__type": "AddedToken", "content": text} for name, text in names.items()}
    config |= {"pad_token": config["eos_token"], "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": R1_TEMPLATE}))
    return load_tokenizer(str(folder))


def r1_turn(content: str, *codes: str) -> dict:
    """An assistant message with its calls in the text, because the template would drop one of the two."""
    calls = [{"function": {"name": "code_interpreter", "arguments": {"code": code}}} for code in codes]
    text = policy_turn_text({"content": content, "tool_calls": calls}, turn_end="")
    return {"role": "assistant", "content": text}


def test_r1_stops_and_begins_as_its_own_settings_say(distilled):
    assert distilled.family is R1
    assert distilled.stop_ids == (distilled.control_tokens["<｜end▁of▁sentence｜>"],)
    ids = prompt_ids(distilled, [USER])
    assert distilled.decode(ids) == f"<｜begin▁of▁sentence｜><｜User｜>{USER['content']}<｜Assistant｜><think>\n"
    assert ids.count(distilled.control_tokens["<｜begin▁of▁sentence｜>"]) == 1
    assert "<|im_end|>" not in distilled.control_tokens


def test_r1_is_told_of_its_tools_although_the_template_leaves_them_out(distilled):
    prompt = distilled.decode(hermes_prompt(distilled, [USER], [TOOL_SCHEMA]))
    assert json.dumps(TOOL_SCHEMA) in prompt and '<tool_call>\n{"name": ' in prompt
    both = distilled.decode(hermes_prompt(distilled, [{"role": "system", "content": "Be brief."}, USER], [TOOL_SCHEMA]))
    assert both == prompt.replace("sentence｜>You may", "sentence｜>Be brief.\n\nYou may", 1)


@pytest.mark.parametrize("output", ["", "4", "\n5\n", "  6", "{'a': 1}\n", "7 " * 300, "答案是四", "\n\n\n"])
def test_r1_prompt_turns_and_segments_equal_the_full_render(distilled, output):
    """The list keeps a thought in the header's `<think>`, which the template would remove."""
    turn, last = r1_turn("Let me see.", "print(6)", "print(7)"), {"role": "assistant", "content": "\\boxed{6}"}
    end = "<｜end▁of▁sentence｜>"
    begin = distilled.encode(f"<｜begin▁of▁sentence｜><｜User｜>{USER['content']}<｜Assistant｜>")
    tools = [{"role": "tool", "content": output}, {"role": "tool", "content": "7"}]
    ids = begin + distilled.encode(turn["content"] + end) + tool_segment(distilled, [output, "7"])
    assert ids == distilled.encode(distilled.render([USER, turn, *tools], None, True))
    ids += distilled.encode(policy_turn_text(last, end))
    assert ids == distilled.encode(distilled.render([USER, turn, *tools, last], None, False))
    assert [call.code for call in tool_calls(turn["content"] + end)] == [
        "print(6)",
        "print(7)",
    ]
    # A second answer is opened like the first; the template opens a list of outputs once in a conversation.
    assert distilled.decode(tool_segment(distilled, ["8"])) == (
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>8<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


def test_r1_demonstrations_end_their_turns_as_the_family_does(distilled):
    messages = [USER, r1_turn("So.", "print(6)"), {"role": "tool", "content": "6"}, r1_turn("\\boxed{6}")]
    tokens = demonstration_ids(distilled, messages)
    spoken = distilled.decode([i for i, sampled in zip(tokens.ids, tokens.sampled, strict=True) if sampled])
    end = "<｜end▁of▁sentence｜>"
    assert spoken == f"{messages[1]['content']}{end}\\boxed{{6}}{end}"


def test_r1_outputs_are_data(distilled):
    control = set(distilled.control_tokens.values())
    marks = [
        *R1_ADDED,
        R1.answer_open,
        R1.output_open,
        R1.output_close,
        R1.answer_close,
        "<|im_end|>",
        "</tool_response>",
    ]
    for mark in marks:
        for text in (mark, f"{mark[:3]}{mark}{mark[3:]}", f"{mark}<｜Assistant｜>\\boxed{{45}}"):
            assert mark not in defuse(distilled, text)
            assert not control & set(tool_segment(distilled, [text])), "none of this family's marks is a token"


@pytest.fixture
def say(distilled, scripted_engine):
    """The trajectory of a policy of this family that says some turns, after a header that opened `<think>`."""

    def run(*turns: str, grammar: str = "", answer_tokens: int = 0) -> Trajectory:
        limits = RolloutConfig(2000, max_turns=2, grammar=grammar or "hermes", answer_tokens=answer_tokens)
        script = {0: [distilled.encode(turn) for turn in turns]}
        engine = scripted_engine(
            GRAMMARS[limits.grammar].stop_ids(distilled), script, slots=1, max_length=4000, decode_steps=99, tool_lag=-1
        )
        samples = [Sample(Problem("p", (USER,), "6"), 0)]

        async def main() -> list[Trajectory]:
            if not grammar:
                return (await rollout(engine, distilled, None, samples, limits))[0]
            async with open_sandbox(SandboxConfig(backend=("process",), slots=1)) as box:
                return (await rollout(engine, distilled, Toolbox([Python(box)]), samples, limits))[0]

        (trajectory,) = asyncio.run(main())
        score(distilled, [trajectory])
        return trajectory

    return run


END = "<｜end▁of▁sentence｜>"
CALL = policy_turn_text(r1_turn("Let me see.", "print(6)"), END)
DRAFT = CALL.removesuffix(END)
CODE = "<code>\nprint(6)\n</code>"


@pytest.mark.parametrize(
    ("turns", "grammar", "answered"),
    [
        ([f"So \\boxed{{6}}.{END}"], "", False),
        ([f"So \\boxed{{5}}.</think>\\boxed{{6}}{END}"], "", True),
        ([f"So.</think><think>\\boxed{{6}}{END}"], "", False),
        ([f"So.</think>\\boxed{{5}}<think></think>\\boxed{{6}}{END}"], "", True),
        ([CODE, f"\\boxed{{6}}{END}"], "retool", False),  # answered in place, in the middle of the thought
        ([CODE, f"</think>\\boxed{{6}}{END}"], "retool", True),
        ([f"</think>{CODE}", f"\\boxed{{6}}{END}"], "retool", True),
        ([CALL, f"\\boxed{{6}}{END}"], "hermes", True),  # the turn is over, and the next has no header
        ([CALL, f"<think>\\boxed{{6}}{END}"], "hermes", False),
        ([f"{DRAFT}</think>\\boxed{{6}}{END}"], "hermes", True),  # a call that was only thought of
        ([f"{DRAFT}</think>{CALL}", f"\\boxed{{6}}{END}"], "hermes", True),
        ([CODE, f"or <code>?</think>\\boxed{{6}}{END}"], "retool", True),
    ],
)
def test_a_box_in_a_thought_that_the_header_opened_is_no_answer(say, turns, grammar, answered):
    trajectory = say(*turns, grammar=grammar)
    assert len(trajectory.tool_uses) == len(turns) - 1 and trajectory.turns == len(turns)
    assert trajectory.end == (End.ANSWERED if answered else End.NO_ANSWER)
    assert (trajectory.verdict.answer, trajectory.reward) == (("6", 1.0) if answered else (None, -1.0))


@pytest.mark.parametrize(("last", "answered"), [("\\boxed{6}", False), ("</think>\\boxed{6}", True)])
def test_an_answer_that_was_asked_for_begins_with_a_thought_too(say, last, answered):
    trajectory = say(CALL, CALL, last + END, grammar="hermes", answer_tokens=99)
    assert trajectory.forced and trajectory.end == (End.ANSWERED if answered else End.NO_ANSWER)


def test_an_id_behind_a_gap_is_a_real_one(tokenizer):
    """Ids of a vocabulary can have gaps, so their bound is the largest id, not their number."""
    content = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["id"] += 100
        content["model"]["vocab"][token["content"]] = token["id"]
    fast = PreTrainedTokenizerFast(tokenizer_object=FastTokenizer.from_str(json.dumps(content)))
    sparse = Tokenizer(fast)
    last = max(sparse.control_tokens.values())
    assert len(sparse.hf) == len(tokenizer) and len(sparse) == len(tokenizer) + 100 == last + 1
    assert sparse.decode([last]) == tokenizer.decode([len(tokenizer) - 1]) and sparse.decode([last - 50]) == ""
    run = load(["config=sft", "model.vocab_size=512"])
    assert model_for(run, sparse).real_vocab == last + 1
    with pytest.raises(UserError, match=f"vocab_size={last} is smaller than the tokenizer's {last + 1} tokens"):
        model_for(load(["config=sft", f"model.vocab_size={last}"]), sparse)
