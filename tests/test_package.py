"""The installed package: the wheel holds every file of it, and its console script works from any folder."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import retool_jax.__main__ as retool
from retool_jax.errors import UserError
from retool_jax.metrics import read_metrics

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
    [
        ("Prepair", "prepare"),
        ("server", "serve"),
        ("sandbox.server", "sandbox-server"),
        ("sandbox.image", "sandbox-image"),
        ("config=grpo", None),
    ],
)
def test_an_unknown_command_is_told_the_nearest_one(word, meant):
    with pytest.raises(UserError) as caught:
        retool.main([word])
    hint = f"did you mean {meant}? " if meant else ""
    assert str(caught.value) == f"unknown command {word!r}; {hint}there are: {', '.join(retool.COMMANDS)}"


def test_the_console_script_finds_modules_of_the_current_folder(monkeypatch, tmp_path):
    """As `python -m` does; a script's own path has only the folder of the script."""
    (tmp_path / "my_own_tools.py").write_text("shout = str.upper\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.setattr("sys.argv", ["retool", "--help"])
    retool.run()
    assert import_module("my_own_tools").shout("a") == "A"


def test_every_command_of_the_package_is_there():
    folder = Path(retool.__file__).parent
    runs = [path for path in folder.rglob("*.py") if "\n    run_command(main)\n" in path.read_text()]
    modules = {".".join(path.relative_to(folder).with_suffix("").parts) for path in runs}
    modules = {module.removesuffix(".__main__") for module in modules} - {"__main__"}
    assert sorted(module for module, _ in retool.COMMANDS.values()) == sorted(modules)
    lines = retool.help_text().splitlines()
    assert all(f"    {name} " in "\n".join(lines) for name in retool.COMMANDS)
    assert max(map(len, lines)) <= 100


def test_a_command_gets_the_words_behind_its_name(capsys):
    retool.main(["convert", "--help"])
    assert capsys.readouterr().out.rstrip("\n") == import_module("retool_jax.convert").HELP
    for words, error in (
        (["trian"], "unknown command 'trian'; did"),
        (["convert", "form=x"], "cannot read 'form=x'; "),
    ):
        done = subprocess.run([sys.executable, "-m", PACKAGE, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- as installed


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file of the package with its content, links followed, except files that Python itself writes."""
    paths = (Path(above, name) for above, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = (path for path in paths if path.parent.name != "__pycache__")
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in paths}


def python(*words: str | Path, at: Path) -> str:
    """Run Python with these words in a folder and return its output."""
    done = subprocess.run([sys.executable, *words], cwd=at, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source archive, and the wheel that pip builds from it, made from a copy, since building leaves files in the
    source."""
    if missing := [name for name in ("pip", "setuptools") if not find_spec(name)]:
        pytest.skip(
            f"building a wheel needs {' and '.join(missing)}: python -m ensurepip; pip install 'setuptools>=77'"
        )
    folder = tmp_path_factory.mktemp("built")
    for name in (PACKAGE, "configs"):
        shutil.copytree(
            ROOT / name, folder / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "copy")
    python("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", at=folder / "copy")
    (archive,) = folder.glob("*.tar.gz")
    python(*("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"), archive, at=folder)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The folder that the wheel is installed to."""
    folder = tmp_path_factory.mktemp("installed")
    python(*("-m", "pip", "install", "--no-deps", "--no-index", "--target"), folder, built[1], at=folder)
    return folder


@pytest.fixture
def command(installed, one_device, tmp_path):
    """Run the console script in an empty folder, on one device, with the wheel before all other packages."""

    def run(*words: str) -> subprocess.CompletedProcess:
        environment = one_device | {"PYTHONPATH": str(installed)}
        script = [installed / "bin" / "retool", *words]
        return subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


def test_the_archives_hold_every_file_of_the_package(built):
    archive, wheel = built
    expected = files_below(ROOT / PACKAGE)
    assert {
        "run/load.py",
        "report/page.html.jinja",
        "report/reader.js",
        "report/page.css",
        "configs/grpo.yaml",
        "data/miniature/tokenizer.json",
    } <= {name.removeprefix(f"{PACKAGE}/") for name in expected}
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if not member.isdir()]
        assert all(member.isreg() for member in members)
        found = {member.name.partition("/")[2]: file.extractfile(member).read() for member in members}
    assert {name: text for name, text in found.items() if name.startswith(f"{PACKAGE}/")} == expected
    with zipfile.ZipFile(wheel) as file:
        members = [member for member in file.infolist() if ".dist-info/" not in member.filename]
        assert all(stat.S_ISREG(member.external_attr >> 16) for member in members)
        assert sorted(member.filename for member in members) == sorted(expected), "each once, and nothing else"
        assert {member.filename: file.read(member) for member in members} == expected


def test_the_console_script_runs_what_the_wheel_brought(command, installed):
    done = command("--help")
    assert (done.returncode, done.stdout.rstrip("\n"), done.stderr) == (0, retool.help_text(), "")
    done = command("train", "config=gppo")
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").iterdir()))
    missing = installed / PACKAGE / "configs" / "gppo.yaml"
    assert (done.returncode, done.stderr) == (2, f"error: no config 'gppo' ({missing}); there are: {names}\n")


def test_the_installed_miniature_trains(command, tmp_path):
    # In shape the runs of test_resume.py, so that whoever comes first compiles for both.
    tiny = [
        *("model.num_layers=1", "model.hidden_size=64", "model.intermediate_size=128", "model.head_dim=16"),
        *("sft.steps=2", "sft.batch_tokens=256", "rl.steps=2", "rl.prompts_per_step=4", "rl.group_size=4"),
        *("engine.slots=16", "evaluation.problems=4", "evaluation.every=3", "evaluation.final_split=dev"),
        "sandbox.backend=[process]",
    ]
    done = command("train", "config=grpo", *tiny, "run=mine")
    assert done.returncode == 0, done.stderr + done.stdout
    lines = read_metrics(tmp_path / "mine")
    assert [line["step"] for line in lines if line["kind"] == "rl"] == [1, 2]
    done = command("report", "run=mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "report.html").is_file()


def test_programs_run_in_the_installed_sandbox(command, tmp_path):
    text = "<code>\n```python\nprint(6 * 7)\n```\n</code>\n<interpreter>\n42\n</interpreter>\n\nSo \\boxed{42}"
    turns = [{"role": "user", "content": "What is 6 * 7?"}, {"role": "assistant", "content": text}]
    (tmp_path / "traces.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    done = command("prepare", "source=traces.jsonl", "out=kept.jsonl", "verify=true", "sandbox=process")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "kept.report.json").read_text())
    assert (report["kept"], report["outputs"]) == (1, {"same": 1})
