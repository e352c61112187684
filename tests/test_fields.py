"""Keys and their messages: secrets are never shown."""

import pytest

from retool_jax.errors import UserError
from retool_jax.run.load import help_text, load

SECRET = "hunter2+/="


def test_a_secret_has_no_part_in_the_folders_name():
    plain = load(["config=grpo", "seed=1"])
    with_token = load(["config=grpo", "seed=1", f"sandbox.token={SECRET}"])
    assert with_token.sandbox.token == SECRET and with_token.run == plain.run == "runs/grpo-seed=1"
    section = [load(["config=grpo", f"sandbox={{token: {token}, slots: 3}}"]) for token in ("aaa", "bbb")]
    assert section[0].run == section[1].run == load(["config=grpo", "sandbox.slots=3"]).run
    assert section[0].sandbox.token == "aaa" and section[0].sandbox.slots == 3
    assert SECRET not in repr(with_token)


@pytest.mark.parametrize(
    "word",
    [
        f"sandbox.token=[{SECRET}",
        f"sandbox.token={{{SECRET}: 1",
        f"sandbox={{token: [{SECRET}",
        f"sandbox={SECRET}",
        f"sandbox.token:{SECRET}",
        f"sandbox.token:{SECRET[:-1]}",
        f"sandbox={{token: {{{SECRET}: 1}}}}",
        f"sandbox={{token: [{SECRET}]}}",
    ],
)
def test_no_error_shows_a_secret(word):
    with pytest.raises(UserError) as caught:
        load(["config=grpo", word])
    message = str(caught.value)
    assert SECRET not in message and "hunter" not in message and "sandbox" in message


def test_help_says_where_a_secret_may_come_from_and_shows_none(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"base: grpo\ntask: grpo\nsandbox: {{token: {SECRET}}}\n")
    text = help_text(["--help", f"config={tmp_path / 'mine.yaml'}"])
    assert "sandbox.token=***" in text and SECRET not in text
    assert "RETOOL_SANDBOX_TOKEN" in text
