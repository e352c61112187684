"""Sessions for the Hub's viewer of traces: a header, then messages, a file each."""

import json

from huggingface_hub import DatasetCard

from retool_jax.export.command import main

# The Hub's documentation, Session Traces Format.
KEYS = {"role", "content", "reasoningContent", "toolCalls", "toolCallId", "timestamp", "model"}


def sessions(folder) -> list[list[dict]]:
    files = sorted(folder.rglob("*.jsonl"))
    return [[json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] for path in files]


def test_a_session_is_a_header_and_messages(run, tmp_path):
    (tmp_path / "traces").mkdir()  # an empty folder is as good as none
    main([f"run={run}", f"out={tmp_path / 'traces'}", "format=traces", "step=0"])
    found = sessions(tmp_path / "traces")
    assert len(found) == 4 and len({header["id"] for header, *_ in found}) == 4
    for header, *lines in found:
        assert (header["type"], header["harness"], header["name"]) == ("session", "retool_jax", "[right] 12*34?")
        assert all(line["type"] == "message" and line["message"].keys() <= KEYS for line in lines)
        messages = [line["message"] for line in lines]
        assert {message["role"] for message in messages} == {"user", "assistant", "tool"}
        made = [call for message in messages for call in message.get("toolCalls", [])]
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in made)
        assert [call["id"] for call in made] == [m["toolCallId"] for m in messages if m["role"] == "tool"]
        assert messages[1]["reasoningContent"] == "by code" and messages[1]["content"] == "I see."
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "README.md",
        "dev-000000",
        "dev-000000-greedy",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]


def test_the_card_has_the_tags_that_open_the_viewer(run, tmp_path):
    main([f"run={run}", f"out={tmp_path / 'traces'}", "format=traces", "split=dev"])
    card = DatasetCard.load(tmp_path / "traces" / "README.md")
    assert "format:agent-traces" in card.data.tags and card.data.viewer_mode == "traces"
    (config,) = card.data.configs
    assert list((tmp_path / "traces").glob(config["data_files"][0]["path"])) and "8 trajectories" in card.text


def test_no_name_leads_out_of_the_folder(hostile, tmp_path):
    main([f"run={hostile}", f"out={tmp_path / 'traces'}", "format=traces"])
    ((header, *lines),) = sessions(tmp_path / "traces")
    assert header["id"] == "samples/../../x\\ud800/\x00"
    assert lines[2]["message"]["content"].startswith("a\x00b")
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl")]
    assert [str(path) for path in files] == ["traces/samples/000001-_x_ud800_.jsonl"]
