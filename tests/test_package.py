"""The console script: every command of the package under one name."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import retool_jax.__main__ as retool
from retool_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "retool_jax"


def test_help_and_a_misspelt_command_load_nothing():
    code = (
        "import sys, retool_jax.__main__ as retool\n"
        "for words in ([], ['-h'], ['--help']): retool.main(words)\n"
        "try: retool.main(['trian', 'config=grpo'])\n"
        "except retool.UserError as error: print(error)\n"
        "print(*{'jax', 'numpy', 'omegaconf', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *helps, error, loaded = done.stdout.splitlines()
    assert helps == 3 * retool.help_text().splitlines()
    assert error == f"unknown command 'trian'; did you mean train? there are: {', '.join(retool.COMMANDS)}"
    assert loaded == ""


@pytest.mark.parametrize(
    ("word", "meant"),
    [("Prepair", "prepare"), ("server", "sandbox-server"), ("sandbox.image", "sandbox-image"), ("config=grpo", None)],
)
def test_an_unknown_command_is_told_the_nearest_one(word, meant):
    with pytest.raises(UserError) as caught:
        retool.main([word])
    hint = f"did you mean {meant}? " if meant else ""
    assert str(caught.value) == f"unknown command {word!r}; {hint}there are: {', '.join(retool.COMMANDS)}"


def test_every_command_of_the_package_is_there():
    folder = Path(retool.__file__).parent
    runs = [path for path in folder.rglob("*.py") if "\n    run_command(main)\n" in path.read_text()]
    modules = {".".join(path.relative_to(folder).with_suffix("").parts) for path in runs} - {"__main__"}
    assert sorted(module for module, _ in retool.COMMANDS.values()) == sorted(modules)
    lines = retool.help_text().splitlines()
    assert all(f"    {name} " in "\n".join(lines) for name in retool.COMMANDS)
    assert max(map(len, lines)) <= 100


def test_a_command_gets_the_words_behind_its_name(capsys):
    retool.main(["convert", "--help"])
    assert capsys.readouterr().out.rstrip("\n") == import_module("retool_jax.convert").HELP
    for words, error in (
        (["trian"], "unknown command 'trian'; did"),
        (["convert", "form=x"], "cannot read 'form=x': "),
    ):
        done = subprocess.run([sys.executable, "-m", PACKAGE, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1
