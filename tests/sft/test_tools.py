"""Demonstrations in the grammar and with the tools of their run."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.traces import messages_of
from retool_jax.errors import UserError
from retool_jax.run.build import demonstrations_of
from retool_jax.run.cold_start import cold_start_of
from retool_jax.run.load import load
from retool_jax.sft.config import SFTConfig
from retool_jax.sft.demonstrations import to_example
from retool_jax.tokens.grammar import GRAMMARS
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import load_tools

WORDS = ["sft.steps=0", "sft.epochs=1", "sft.batch_size=1", "sft.row_length=1024", "sft.overlong=error"]
WORDS += ["sft.optimizer.decay_steps=0", "sft.optimizer.warmup_steps=0"]


def conversation(name: str = "code_interpreter", **given: str) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": given or {"code": "print(6 * 7)"}}}
    messages = [
        {"role": "user", "content": f"What is 6 * 7?\n\n{INSTRUCTION}"},
        {"role": "assistant", "content": "I compute:", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is \\boxed{42}."},
    ]
    return {"messages": messages}


@pytest.fixture
def texts(tmp_path, tokenizer):
    """`texts(rows, words...)`: the decoded text of each row that a run learns from, and the policy's part of it."""

    def read(rows: list[dict], *words: str) -> list[tuple[str, str]]:
        path = Path(tmp_path / "rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        batches = demonstrations_of(load(["config=sft", f"sft.data={path}", *WORDS, *words]), tokenizer)
        found = []
        for index in range(batches.steps):
            batch = batches.at(index)
            here = batch.segments > 0
            found.append((tokenizer.decode(batch.tokens[here]), tokenizer.decode(batch.tokens[batch.sampled])))
        return found

    return read


def test_the_same_rows_are_learned_in_either_grammar(texts, tokenizer):
    (hermes,), (retool,) = texts([conversation()]), texts([conversation()], "sft.grammar=retool")
    assert hermes[1].startswith('I compute:\n<tool_call>\n{"name": "code_interpreter"')
    assert retool[1] == (
        "I compute:\n<code>\n```python\nprint(6 * 7)\n```\n</code>It is\n<answer>\n\\boxed{42}\n</answer><|im_end|>"
    )
    assert "wrapped like this:\n<code>" in retool[0] and "<interpreter>\n42\n</interpreter>\nIt is" in retool[0]


def test_the_miniatures_cold_start_can_be_read_by_its_policys_grammar(tokenizer):
    sizes = ["rollout.max_prompt_tokens=560", "engine.max_length=704", "rl.row_length=704", "sft.row_length=704"]
    run = cold_start_of(load(["config=grpo", "rollout.grammar=retool", *sizes]))
    batch = demonstrations_of(run, tokenizer).at(0)
    calls = GRAMMARS["retool"].calls(tokenizer.decode(batch.tokens[batch.sampled].tolist()))
    assert calls and not any(call.error for call in calls)
    assert all("print(" in call.code for call in calls)


def test_rows_may_call_every_tool_of_the_run_and_no_other(texts):
    rows = [conversation("calculator", expression="6 * 7")]
    ((_, said),) = texts(rows, "tools=[python,calculator]")
    assert '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>' in said
    with pytest.raises(UserError, match="row 1: a call of another tool"):
        texts(rows)
    with pytest.raises(UserError, match="row 1: a call of another tool"):  # the prompt would not show its schema
        texts([rows[0] | {"tools": ["python"]}], "tools=[python,calculator]")
    with pytest.raises(UserError, match="row 1 names the tool 'browser', and this run has code_interpreter"):
        texts([conversation() | {"tools": ["browser"]}])
    assert texts([conversation() | {"tools": [{"type": "function", "function": {"name": "x"}}]}])


def test_a_row_that_a_grammar_cannot_write_is_reported(texts):
    rows = [conversation(), conversation(code="print('</code>')")]
    with pytest.raises(UserError, match=r"rows.jsonl row 2: a turn cannot be written in the retool grammar"):
        texts(rows, "sft.grammar=retool")


def test_the_miniature_has_no_demonstrations_without_the_interpreter(tokenizer):
    with pytest.raises(UserError, match=r"arithmetic calls code_interpreter, and tools has calculator; add python"):
        demonstrations_of(load(["config=sft", "tools=calculator"]), tokenizer)


THINKS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
THINKS += "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize("grammar", ["hermes", "retool"])
def test_a_header_that_opens_thinking_is_not_opened_again(tokenizer, grammar):
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = THINKS
    opening = Tokenizer(hf)
    row = conversation()
    row["messages"][1]["reasoning_content"] = "Six times seven."
    example = to_example(opening, messages_of(row), load_tools("python"), SFTConfig(grammar=grammar))
    ids, sampled = np.asarray(example.ids), np.asarray(example.sampled)
    text, said = tokenizer.decode(ids), tokenizer.decode(ids[sampled])
    assert "<|im_start|>assistant\n<think>\nSix times seven.\n</think>\n\nI compute:\n<" in text
    assert said.startswith("Six times seven.\n</think>\n\nI compute:")
    # A turn with its own header and no thinking closes it; a continued turn has no header.
    assert ("<think>\n\n</think>\n\nIt is" in text) == (grammar == "hermes") and text.count("<think>") == said.count(
        "</think>"
    )
    plain = to_example(tokenizer, messages_of(row), load_tools("python"), SFTConfig(grammar=grammar))
    assert "assistant\n<think>\nSix times seven.\n</think>\n\nI compute:" in tokenizer.decode(plain.ids)


@pytest.mark.parametrize("text", ["<think>\n{}", "<think>{}", "\n\n<think>{}", "{}"])
def test_a_thought_goes_on_after_a_header_that_opens_it_however_the_row_begins(tokenizer, text):
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = THINKS
    said = "Six times seven.\n</think>\n\nIt is \\boxed{42}."
    turns = [{"role": "user", "content": "What is 6 * 7?"}, {"role": "assistant", "content": text.replace("{}", said)}]
    example = to_example(Tokenizer(hf), messages_of({"messages": turns}), None, SFTConfig())
    sampled = np.asarray(example.ids)[np.asarray(example.sampled)]
    assert tokenizer.decode(example.ids).endswith(f"assistant\n<think>\n{said}<|im_end|>")
    assert tokenizer.decode(sampled) == f"{said}<|im_end|>"
