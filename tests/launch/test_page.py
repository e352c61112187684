"""The commands in docs/tpu.md and README.md are accepted, and the dry run and messages that they show are real."""

import re
import shlex
from pathlib import Path

import pytest

from retool_jax.run.load import load

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"PROJECT": "my-project", "ZONE": "us-east5-a", "TYPE": "v5p-64", "NAME": "big"}


def shell(cloud, *words: str, **more: str):
    return cloud.paste(shlex.join(["./launch_tpu.sh", *words]), DRY_RUN="1", **SETTINGS | more)


@pytest.mark.parametrize("page, least", [("docs/tpu.md", 7), ("README.md", 3)])
def test_the_commands_of_a_page_and_their_training_configs_are_accepted(cloud, page, least):
    text = (ROOT / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^ {4}(?:\w+=\S+ )*(?:HF_TOKEN=\S+ \S+ )?\./launch_tpu\.sh ([^#\n]*)", text, re.MULTILINE)
    assert len(commands) >= least
    for command in commands:
        words = shlex.split(command)
        assert shell(cloud, *words).returncode == 0, command
        if words[0] == "run":
            load([word for word in words[1:] if not word[0].isupper()])


def test_the_page_shows_what_a_dry_run_of_up_prints(cloud):
    (block,) = re.findall(r"prints this.*?\n\n((?: {4}.*\n)+)", (ROOT / "docs/tpu.md").read_text())
    shown = [" ".join(line.split()) for line in re.sub(r"\\\n", " ", block).splitlines()]
    printed = shell(cloud, "up", HF_TOKEN="secret").stdout.splitlines()
    assert shown == [" ".join(line.split()) for line in printed]


def test_the_messages_that_the_page_explains_exist():
    source = "".join(path.read_text() for path in (ROOT / "launch_tpu.sh", *(ROOT / "deploy/tpu").glob("*.sh")))
    table = (ROOT / "docs/tpu.md").read_text().split("## When it fails")[1]
    messages = [text for text in re.findall(r"`([^`]+)`", table) if "…" in text or text.endswith(":")]
    parts = [part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 3]
    assert len(parts) >= 6 and [part for part in parts if part not in source] == []
