"""A teacher scores the student's ids, so it must read them as the student does."""

import json
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.run.load import load
from retool_jax.run.weights import check_teacher, load_teacher


@pytest.fixture
def run():
    return load(["config=opd"])


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    """A copy of the student's tokenizer."""
    tokenizer.hf.save_pretrained(tmp_path)
    return tmp_path


def test_a_copy_of_the_students_tokenizer_is_the_same(run, folder):
    check_teacher(run, "teacher", run.tokenizer)
    check_teacher(run, "teacher", str(folder))


def test_another_template_is_refused(run, folder):
    for path in folder.glob("chat_template*"):
        path.write_text(path.read_text() + " ")
    settings = folder / "tokenizer_config.json"
    told = json.loads(settings.read_text())
    if "chat_template" in told:
        settings.write_text(json.dumps(told | {"chat_template": told["chat_template"] + " "}))
    with pytest.raises(
        UserError, match=r"rl.teacher.init_from=teacher has another chat template \(tokenizer=/.*family"
    ):
        check_teacher(run, "teacher", str(folder))


def test_another_vocabulary_is_refused(run, tokenizer, folder):
    tokenizer.hf.save_pretrained(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    words = rules["model"]["vocab"]
    one, other = list(words)[-2:]
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"rl\.teacher\.init_from=teacher has another vocabulary"):
        check_teacher(run, "teacher", str(folder))


def test_a_model_does_not_learn_from_itself(tmp_path, mesh):
    words = [f"init_from={tmp_path}", f"rl.teacher.init_from={tmp_path / '..' / tmp_path.name}"]
    with pytest.raises(UserError, match="a model has nothing to learn from itself"):
        load_teacher(load(["config=opd", *words]), mesh)
