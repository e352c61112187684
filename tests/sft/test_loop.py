"""The cold start on a file: a reproducible order, exact masks, epochs, and rows that do not fit."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from retool_jax.checkpoint import Checkpoints
from retool_jax.data.instructions import INSTRUCTION
from retool_jax.errors import UserError
from retool_jax.learn.optimizer import TrainState, learning_rate
from retool_jax.metrics import read_metrics
from retool_jax.models.decoder import init_params
from retool_jax.models.huggingface import save_params
from retool_jax.run.build import demonstrations_of, mesh_of, model_for
from retool_jax.run.folder import claim_folder
from retool_jax.run.load import load
from retool_jax.run.schema import SFTRun
from retool_jax.run.sft import finished_weights, train
from retool_jax.run.weights import abstract_state
from retool_jax.sft.loop import optimizer_of
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer

TINY = ["mesh.data=1", "mesh.fsdp=8", "sft.rows_per_micro=8", "model.hidden_size=32", "model.intermediate_size=48"]


def conversation(number: int, steps: int = 1) -> dict:
    """A conversation with `steps` calls about `number`, so that rows differ in length and content."""
    messages = [{"role": "user", "content": f"What is {number} times {number}?\n\n{INSTRUCTION}"}]
    for _ in range(steps):
        call = {"name": "code_interpreter", "arguments": {"code": f"print({number} * {number})"}}
        messages.append({"role": "assistant", "content": "I compute:", "tool_calls": [{"function": call}]})
        messages.append({"role": "tool", "content": str(number * number)})
    messages.append({"role": "assistant", "content": f"It is \\boxed{{{number * number}}}."})
    return {"messages": messages}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [conversation(100 + i, steps=i % 4) for i in range(10)]


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def run_of(data: Path, *words: str):
    sizes = ["sft.steps=0", "sft.epochs=3", "sft.batch_size=4", "sft.row_length=512", "sft.optimizer.decay_steps=0"]
    return load(["config=sft", *TINY, f"sft.data={data}", *sizes, "sft.optimizer.warmup_steps=0", *words])


def texts(tokenizer, batch) -> list[str]:
    """The sequences of a packed batch, decoded, in any order."""
    found = []
    for tokens, segments in zip(
        batch.tokens.reshape(-1, batch.tokens.shape[-1]),
        batch.segments.reshape(-1, batch.tokens.shape[-1]),
        strict=True,
    ):
        found += [tokenizer.decode(tokens[segments == s]) for s in range(1, segments.max() + 1)]
    return sorted(found)


def lengths(batch) -> list[int]:
    """The lengths of the sequences of a packed batch."""
    rows = batch.segments.reshape(-1, batch.tokens.shape[-1])
    return [int((row == s).sum()) for row in rows for s in range(1, row.max() + 1)]


def numbers(tokenizer, batch) -> list[int]:
    return sorted(int(text.split("What is ")[1][:3]) for text in texts(tokenizer, batch))


def test_an_epoch_has_every_row_at_most_once_in_an_order_of_its_own(data, tokenizer):
    batches = demonstrations_of(run_of(data), tokenizer)
    assert (batches.per_step, batches.steps) == (4, 6), "10 rows are 2 whole steps of 4, three times"
    epochs = [numbers(tokenizer, batches.at(2 * e)) + numbers(tokenizer, batches.at(2 * e + 1)) for e in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert set().union(*epochs) == set(range(100, 110)), "what one epoch leaves out another has"
    # Batch i is a function of config and i: another object, called in reverse order, gives the same arrays.
    again = demonstrations_of(run_of(data), tokenizer)
    for index in reversed(range(6)):
        for left, right in zip(batches.at(index), again.at(index), strict=True):
            np.testing.assert_array_equal(left, right)
    other = demonstrations_of(run_of(data, "seed=1"), tokenizer)
    assert [numbers(tokenizer, other.at(i)) for i in range(6)] != [numbers(tokenizer, again.at(i)) for i in range(6)]
    assert len({batches.at(i).tokens.shape for i in range(6)}) == 1, "one compiled update serves every batch"


def test_steps_go_on_through_the_epochs(data, tokenizer):
    by_steps = demonstrations_of(run_of(data, "sft.epochs=0", "sft.steps=5"), tokenizer)
    by_epochs = demonstrations_of(run_of(data), tokenizer)
    assert by_steps.steps == 5
    for index in range(5):
        np.testing.assert_array_equal(by_steps.at(index).tokens, by_epochs.at(index).tokens)


def test_the_mask_covers_words_calls_and_ends_of_turns_and_nothing_else(data, tokenizer):
    batch = demonstrations_of(run_of(data), tokenizer).at(0)
    for row in np.argwhere(batch.segments.max(-1) > 0):
        tokens, segments, sampled = (x[tuple(row)] for x in (batch.tokens, batch.segments, batch.sampled))
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            number = int(tokenizer.decode(tokens[here]).split("What is ")[1][:3])
            said = tokenizer.decode(tokens[here & sampled])
            call = f'{{"name": "code_interpreter", "arguments": {{"code": "print({number} * {number})"}}}}'
            turn = f"I compute:\n<tool_call>\n{call}\n</tool_call><|im_end|>"
            assert said == turn * ((number - 100) % 4) + f"It is \\boxed{{{number**2}}}.<|im_end|>"
    assert not batch.sampled[batch.segments == 0].any() and not batch.columns


def test_the_batch_follows_from_tokens_where_no_size_is_given(data, tokenizer):
    lengths = [len(tokenizer.encode(text)) for text in all_texts(data, tokenizer)]
    batches = demonstrations_of(run_of(data, "sft.batch_size=0", "sft.batch_tokens=512"), tokenizer)
    assert batches.per_step == round(512 / np.mean(lengths))
    assert len(texts(tokenizer, batches.at(0))) == batches.per_step


def all_texts(data: Path, tokenizer) -> list[str]:
    return texts(tokenizer, demonstrations_of(run_of(data, "sft.batch_size=10"), tokenizer).at(0))


def test_the_longest_rows_in_one_batch_still_fit(tmp_path, tokenizer):
    """All batches have the same number of micro-batches, so it must be enough for any combination of rows."""
    rows = [conversation(100 + i, steps=8 if i < 16 else 0) for i in range(160)]
    data = write(tmp_path / "rows.jsonl", rows)
    longest = max(len(tokenizer.encode(text)) for text in all_texts(data, tokenizer))
    run = run_of(data, "sft.batch_size=16", f"sft.row_length={longest}", "sft.rows_per_micro=8")
    batches = demonstrations_of(run, tokenizer)
    batches._members = lambda index: range(16)  # the worst order
    assert batches.at(0).micro_batches == 2


@pytest.mark.parametrize(("length", "steps"), [(160, (0,)), (128, (0, 23))])
def test_demonstrations_that_are_made_fit_in_rows_of_any_length(tokenizer, length, steps):
    """If two seldom fit into a row, half of it is padding, and some batches need many rows."""
    batches = demonstrations_of(load(["config=sft", f"sft.row_length={length}"]), tokenizer)
    for step in steps:
        batch = batches.at(step)
        assert batch.micro_batches <= len(batch.tokens) <= -(-batches.per_step // 4)
        assert len(texts(tokenizer, batch)) == batches.per_step


def test_rows_are_no_longer_than_the_data_needs(data, tmp_path, tokenizer):
    """16,384 tokens a row are only a limit: attention over such rows would need hundreds of gigabytes."""
    longest = max(len(tokenizer.encode(text)) for text in all_texts(data, tokenizer))
    rows = -(-longest // 128) * 128
    assert 128 < rows < 512
    batches = demonstrations_of(run_of(data, "sft.row_length=16384"), tokenizer)
    assert batches.row_length == rows and f"in rows of {rows}," in batches.description
    assert {batches.at(i).tokens.shape[1:] for i in range(6)} == {(8, rows)}
    assert demonstrations_of(run_of(data, f"sft.row_length={longest}"), tokenizer).row_length == longest
    short = write(tmp_path / "short.jsonl", ROWS[::4])
    assert demonstrations_of(run_of(short, "sft.row_length=16384", "sft.batch_size=2"), tokenizer).row_length < rows
    assert demonstrations_of(load(["config=sft", "sft.row_length=16384"]), tokenizer).row_length == 16384


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_a_template_with_tools_shows_the_schema_of_rl(data, tokenizer, published_template, name):
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = published_template(name)
    shown = texts(tokenizer, demonstrations_of(run_of(data, "sft.row_length=2048"), Tokenizer(hf)).at(0))
    assert all('"name": "code_interpreter"' in text.split("<|im_start|>user")[0] for text in shown)


# ------------------------------------------------------------------------------------------------- what does not fit


def test_overlong_rows_are_an_error_or_dropped(data, tokenizer, capsys):
    longest = max(len(tokenizer.encode(text)) for text in all_texts(data, tokenizer))
    tight = f"sft.row_length={longest - 1}"
    with pytest.raises(UserError) as caught:
        demonstrations_of(run_of(data, tight), tokenizer)
    assert f"row 8 has {longest} tokens, and 2 row(s) more than {tight}" in str(caught.value)  # 103 and 107
    batches = demonstrations_of(run_of(data, tight, "sft.overlong=drop"), tokenizer)
    assert batches.steps == 6 and len(numbers(tokenizer, batches.at(0))) == 4
    assert "dropped 2 row(s)" in capsys.readouterr().out
    seen = {number for index in range(20) for number in numbers(tokenizer, batches.at(index))}
    assert seen == set(range(100, 110)) - {103, 107}
    with pytest.raises(UserError, match="has no rows to learn from"):
        demonstrations_of(run_of(data, "sft.row_length=8", "sft.overlong=drop"), tokenizer)


def test_made_demonstrations_that_are_too_long_are_an_error_or_have_others_in_their_places(tokenizer):
    whole = demonstrations_of(load(["config=sft"]), tokenizer)
    known = [length for step in range(8) for length in lengths(whole.at(step))]
    longest = max(known)
    tight = ["config=sft", f"sft.row_length={longest - 1}"]
    with pytest.raises(UserError, match=r"sft.data=arithmetic number \d+ has \d+ tokens, and \d+ row\(s\) more"):
        demonstrations_of(load(tight), tokenizer)
    with pytest.raises(UserError, match=r"of the first 256 demonstrations of sft.data=arithmetic have more than"):
        demonstrations_of(load(["config=sft", "sft.row_length=20", "sft.overlong=drop"]), tokenizer)
    batches = demonstrations_of(load([*tight, "sft.overlong=drop", f"sft.batch_size={whole.per_step}"]), tokenizer)
    assert not whole.left_out and batches.left_out
    for step in range(8):
        ours, theirs = texts(tokenizer, batches.at(step)), texts(tokenizer, whole.at(step))
        assert len(ours) == len(theirs) and max(lengths(batches.at(step))) < longest
        replaced = lengths(whole.at(step)).count(longest)
        assert len(set(theirs) - set(ours)) <= replaced, "the others stay where they are"
    again = demonstrations_of(load([*tight, "sft.overlong=drop", f"sft.batch_size={whole.per_step}"]), tokenizer)
    np.testing.assert_array_equal(again.at(7).tokens, batches.at(7).tokens)


def test_rows_that_are_no_conversations_are_named(tmp_path, data, tokenizer):
    rows = [conversation(100), {"messages": conversation(100)["messages"][:2]}]
    with pytest.raises(UserError, match=r"rows.jsonl row 2: no final answer; python -m retool_jax.prepare"):
        demonstrations_of(run_of(write(data, rows)), tokenizer)
    with pytest.raises(UserError, match=r"no data file nowhere.jsonl; .* or one of arithmetic, word_problems"):
        demonstrations_of(run_of(Path("nowhere.jsonl")), tokenizer)
    with pytest.raises(UserError, match=r"has 2 demonstrations, fewer than the 4 of one step; lower sft.batch_size"):
        demonstrations_of(run_of(write(data, [conversation(100)] * 2)), tokenizer)
    with pytest.raises(UserError, match=r"row 1 calls a tool, which tools=none has not"):
        demonstrations_of(run_of(data, "tools=none"), tokenizer)
    plain = write(tmp_path / "plain.jsonl", [conversation(100 + i, steps=0) for i in range(4)])
    assert demonstrations_of(run_of(plain, "tools=none"), tokenizer).steps == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft.steps=5"], "sft.steps=5 and sft.epochs=3 are both set; set one of them, and 0 for the other"),
        (["sft.epochs=0"], "sft.steps=0 and sft.epochs=0 are both 0"),
        (["sft.epochs=-1"], "sft.epochs=-1 must be at least 0"),
        (["sft.data=arithmetic"], "sft.epochs=3: sft.data=arithmetic has no end"),
        (["sft.overlong=cut"], "sft.overlong=cut is not one of: error, drop"),
        (["sft.warmup_fraction=1"], "sft.warmup_fraction=1.0 must be between 0 and 0.99"),
        (
            ["sft.warmup_fraction=0.1", "sft.optimizer.decay_steps=3"],
            "decides sft.optimizer.warmup_steps and decay_steps",
        ),
    ],
)
def test_keys_that_contradict_each_other(words, message):
    with pytest.raises(UserError) as caught:
        run_of(Path("rows.jsonl"), *words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_reinforcement_learning_does_not_count_its_cold_start_in_epochs():
    words = ["config=grpo", "sft.data=x.jsonl", "sft.steps=0", "sft.epochs=2"]
    with pytest.raises(UserError, match=r"give its folder as init_from, or use sft.steps"):
        load(words)
    assert load([*words, "init_from=runs/sft"]).sft.epochs == 2


# ------------------------------------------------------------------------------------------- schedule, training, resume


def test_the_recipes_schedule():
    """372 steps, as the name of its final checkpoint says: 37 of warm-up, then a cosine that ends at 0."""
    sft = load(["config=sft_qwen2.5_32b"]).sft
    optimizer = optimizer_of(sft, sft.epochs * (2000 // sft.batch_size))
    assert (optimizer.warmup_steps, optimizer.decay_steps) == (37, 335)
    rate = learning_rate(optimizer)
    assert float(rate(36)) == pytest.approx(1e-5) and float(rate(37 + 335 / 2)) == pytest.approx(5e-6, rel=1e-2)
    assert float(rate(372)) == pytest.approx(0, abs=1e-12)
    fixed = replace(sft, warmup_fraction=0.0, optimizer=replace(sft.optimizer, final_fraction=0.1))
    assert optimizer_of(fixed, 372) is fixed.optimizer


# All settings that determine the update's program, so that the runs below share a compiled one.
SMALL = ["sft.row_length=256", "sft.epochs=2", "sft.warmup_fraction=0.5", "model.num_layers=1", "model.head_dim=8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[SFTRun, TrainState]:
    """A finished run with all its checkpoints, and its final state; it has its own `sft.data`."""
    folder = tmp_path_factory.mktemp("whole")
    data = write(folder / "rows.jsonl", ROWS)
    run = run_of(data, f"run={folder / 'run'}", "checkpoint.every=1", "checkpoint.keep=9", *SMALL)
    return run, train(run)


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the run in the test's own folder; its data is restored when the test has ended."""
    run, _ = whole
    shutil.copytree(run.run, tmp_path / "run")
    yield replace(run, run=str(tmp_path / "run"))
    write(Path(run.sft.data), ROWS)


def test_a_run_on_a_file_resumes_exactly_and_refuses_other_data(whole, copied, tokenizer):
    run, state = whole
    assert [line["step"] for line in read_metrics(Path(run.run))] == [1, 2, 3, 4]
    # A killed run leaves only the state after step 2; a new process continues from it.
    for step in (3, 4):
        shutil.rmtree(Path(copied.run) / "checkpoints" / str(step))
    data = Path(run.sft.data)
    write(data, [conversation(500 + i) for i in range(10)])
    with pytest.raises(UserError, match=r"is not what .*run began with; restore it, or choose another run="):
        train(copied)
    write(data, ROWS)
    resumed = train(copied)
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(left, right)
    losses = [[line["loss"] for line in read_metrics(Path(each.run))] for each in (run, copied)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]

    # The logged rate is over the tokens of all batches of this process, which have different numbers of tokens.
    batches = demonstrations_of(run, tokenizer)
    tokens = [int((batches.at(i).segments > 0).sum()) for i in range(4)]
    assert len(set(tokens)) > 1
    abstract = abstract_state(run, mesh_of(run))

    def notes(of: SFTRun, step: int) -> dict:
        return Checkpoints(Path(of.run) / "checkpoints", None).restore(step, abstract)[1]

    half, last, again = notes(run, 2), notes(run, 4), notes(copied, 4)
    assert last["tokens_per_s"] * last["seconds"]["update"] == pytest.approx(sum(tokens))
    taken = again["seconds"]["update"] - half["seconds"]["update"]
    assert again["tokens_per_s"] * taken == pytest.approx(sum(tokens[2:]))
    assert Checkpoints(Path(run.run) / "checkpoints", None).latest() == 4


def test_a_finished_run_gives_its_weights_and_nothing_else(whole, copied, tmp_path):
    new = replace(copied, run=str(tmp_path / "new"))
    assert finished_weights(new) is None and not (tmp_path / "new").exists()
    folder = Path(copied.run)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with claim_folder(copied):  # readers need no lock
        for left, right in zip(
            jax.tree.leaves(finished_weights(copied)), jax.tree.leaves(whole[1].params), strict=True
        ):
            np.testing.assert_array_equal(left, right)
    changed = {path for path, time in before.items() if path.name != "lock" and path.stat().st_mtime_ns != time}
    assert not changed
    with pytest.raises(UserError, match="holds another run: seed is 0 there and 1 here"):
        finished_weights(replace(copied, seed=1))
    write(Path(copied.sft.data), [conversation(500 + i) for i in range(10)])
    with pytest.raises(UserError, match=r"is not what .*run began with"):
        finished_weights(copied)
    shutil.rmtree(folder / "checkpoints" / "4")
    assert finished_weights(copied) is None


def test_nothing_is_written_when_the_data_is_bad(tmp_path):
    with pytest.raises(UserError, match="no data file"):
        train(run_of(tmp_path / "nowhere.jsonl", f"run={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()


def test_the_miniature_is_as_it_was():
    """Published numbers depend on its batches: 2048 tokens a step on average, the tokens of the plain render."""
    run = load(["config=sft"])
    batches = demonstrations_of(run, load_tokenizer("miniature"))
    assert batches.steps == 800 and batches.digest == "" and batches.at(0).tokens.shape == (7, 4, 192)
    batch = batches.at(7)
    assert 0.7 * 2048 < (batch.segments > 0).sum() < 1.3 * 2048


def test_training_begins_from_a_hugging_face_folder(data, tmp_path):
    """With a learning rate of 0 the weights after training equal the folder's, and padding ids are recognised."""
    words = [*SMALL, "sft.optimizer.learning_rate=0.0", "sft.epochs=1", "model.vocab_size=400"]
    run = run_of(data, *words, f"run={tmp_path / 'run'}", f"init_from={tmp_path / 'hf'}")
    params = init_params(run.model, jax.random.key(5))
    with pytest.raises(UserError, match="no checkpoint"):
        train(run)
    assert not (tmp_path / "run").exists()
    save_params(run.model, params, tmp_path / "hf")
    state = train(run)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert model_for(run, load_tokenizer("miniature")).real_vocab == len(load_tokenizer("miniature"))
