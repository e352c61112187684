"""What clients see of sampled ids, whatever the pieces in which the ids come."""

import random

import pytest

from retool_jax.serving.reader import CallPiece, Reader
from retool_jax.tokens.grammar import GRAMMARS

CALL = '<tool_call>\n{"name": "shout", "arguments": {"text": "a } \\" é"}}\n</tool_call>'
TEXTS = {
    "words": "Grüße, 世界 🌍!\nThe answer is 6.",
    "a thought": "<think>\nHm, <tool_call> is no call here.\n</think>\n\nThe answer.",
    "two calls": f"Let me see.\n{CALL}\n{CALL}",
    "half marks": "a < b <thin <tool_cal <<think>x</think",
    "an open call": '<tool_call>\n{"name": "shout", "arguments": {"text": "a',
    "another spelling": '<tool_call>{"arguments": {"text": "x"}, "name": "shout"}</tool_call>',
    "not for the client": '<tool_call>{"name": "other", "arguments": {}}</tool_call><tool_call>[]</tool_call> end',
    "a list for a name": '<tool_call>{"name": [], "arguments": {}}</tool_call>',
}


def seen(reader: Reader, pieces: list[list[int]], skims: bool = False) -> dict:
    """Everything that is visible at the end."""
    found = {"content": "", "reasoning": "", "calls": []}
    for piece in [*pieces, None]:
        events = reader.skim(piece) if skims and piece else None
        if events is None:
            events = reader.end_turn() if piece is None else reader.feed(piece)
        for event in events:
            if isinstance(event, CallPiece):
                if event.what == "begins":
                    found["calls"].append([event.call.name, "", False])
                entry = found["calls"][event.call.index]
                entry[1] += event.piece
                entry[2] |= event.what == "ends"
            else:
                found[event.channel] += event.text
    return found


@pytest.fixture
def read(tokenizer):
    """`read(text, size=..., stops=...)`: the visible pieces of a text whose ids come `size` at a time."""

    def run(text: str, size: int = 1, skims: bool = False, **options) -> dict:
        ids = tokenizer.encode(text)
        reader = Reader(tokenizer, GRAMMARS["hermes"], {"shout"}, **options)
        return seen(reader, [ids[at : at + size] for at in range(0, len(ids), size)], skims)

    return run


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_seen_does_not_depend_on_the_pieces(read, name):
    once = read(TEXTS[name])
    assert all(read(TEXTS[name], size, skims) == once for size in (1, 2, 7, 1000) for skims in (False, True))


def test_words_thoughts_and_calls_are_told_apart(read):
    assert read(TEXTS["words"])["content"] == TEXTS["words"]
    thought = read(TEXTS["a thought"])
    assert (thought["reasoning"], thought["content"]) == ("Hm, <tool_call> is no call here.", "The answer.")
    given = '{"text": "a } \\" é"}'
    assert read(TEXTS["two calls"]) == {
        "content": "Let me see.",
        "reasoning": "",
        "calls": [["shout", given, True], ["shout", given, True]],
    }
    assert read(TEXTS["half marks"])["content"] == "a < b <thin <tool_cal <"
    assert read(TEXTS["half marks"])["reasoning"] == "x</think"
    assert read(TEXTS["an open call"])["calls"] == [["shout", '{"text": "a', False]]
    assert read(TEXTS["another spelling"])["calls"] == [["shout", '{"text": "x"}', True]]
    assert read(TEXTS["not for the client"]) == {"content": " end", "reasoning": "", "calls": []}
    assert read(TEXTS["a list for a name"])["calls"] == []


def test_nothing_that_a_policy_writes_stops_a_reader(read):
    """Marks in any order, parts of them, and everything that JSON allows: read to the end, with equal results for all
    sizes."""
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<code>", "</code>", "<tool_", "call>", "STOP", "\n"]
    heads = [
        '{"name": "shout", "arguments": ',
        '{"text": "',
        '"}',
        "}",
        "[",
        '{"name": [], "arguments": 3}',
        "\\",
        '"',
        "é",
    ]
    drawn = random.Random(0)
    for _ in range(150):
        text = "".join(drawn.choices(marks + heads, k=drawn.randint(1, 12)))
        assert read(text, stops=["STOP"]) == read(text, 1000, stops=["STOP"]), text


def test_arguments_come_as_they_are_sampled(tokenizer):
    reader = Reader(tokenizer, GRAMMARS["hermes"], {"shout"})
    events = [event for index in tokenizer.encode(CALL) for event in reader.feed([index])]
    assert [event.what for event in events[:1] + events[-1:]] == ["begins", "ends"]
    assert len(events) > 8 and events[0].call.id.startswith("call_")


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_stop_string_is_not_shown_nor_what_follows(read, size):
    assert read("one STOP two", size, stops=["STOP"])["content"] == "one "
    assert read("one STO two", size, stops=["STOP"])["content"] == "one STO two"
    assert read("<think>a STOP b</think>c", size, stops=["b<", "STOP"]) == {
        "content": "",
        "reasoning": "a ",
        "calls": [],
    }


def test_bytes_that_are_no_characters_are_shown_in_the_end(read, tokenizer):
    broken = [index for index in tokenizer.encode("世") if tokenizer.decode([index]) == "\ufffd"][:1]
    assert len(broken) == 1
    reader = Reader(tokenizer, None)
    assert seen(reader, [broken, tokenizer.encode("a")])["content"] == "\ufffda"
    reader = Reader(tokenizer, None)
    assert seen(reader, [broken] * 20)["content"] == "\ufffd" * 20


def test_thoughts_are_counted_and_marks_of_calls_are_words_where_there_are_none(tokenizer):
    reader = Reader(tokenizer, None)
    assert seen(reader, [tokenizer.encode("<tool_call>x")])["content"] == "<tool_call>x"
    ids, thought = tokenizer.encode("<think>abc</think>d"), []
    for skims in (False, True):
        reader = Reader(tokenizer, None)
        seen(reader, [[index] for index in ids], skims)
        thought.append(reader.thought)
    assert thought[0] == thought[1] and 0 < thought[0] <= len(ids)
