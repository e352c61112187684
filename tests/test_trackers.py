"""Services get each number once, and none of their faults ends a run. Stand-ins replace the packages; where these are
installed they are tested, too."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.metrics import MetricsLog, read_metrics
from retool_jax.run.folder import claim_folder, differences, may_change, saved_config
from retool_jax.run.load import load
from retool_jax.trackers import TRACKERS_FILE, check_loggers

ROOT = Path(__file__).resolve().parents[1]


class Service:
    """A package with the functions of `wandb` and `trackio` that are used, which records its calls by run."""

    def __init__(self, mode: str = "offline") -> None:
        self.begun: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.fails_at: int | None = None
        self.finished = 0
        self.logged_in = True
        settings = types.SimpleNamespace(mode=mode)
        self.module = types.SimpleNamespace(
            setup=lambda: types.SimpleNamespace(settings=settings),
            login=lambda prompt, verify: self.logged_in,
            Settings=lambda **values: values,
            init=self.init,
        )

    def init(self, **values) -> types.SimpleNamespace:
        self.begun.append(values)
        return types.SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def services(monkeypatch) -> dict[str, Service]:
    made = {name: Service() for name in ("wandb", "trackio")}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, service.module)
    return made


def write_steps(folder: Path, start: int | None, last: int, *loggers: str) -> None:
    with MetricsLog(folder, start, loggers, {"seed": 3}) as log:
        for step in range((start or 0) + 1, last + 1):
            log.write("rl", step, {"loss": 1 / step, "word": "x", "gone": float("nan")})
            if step % 5 == 0:
                log.write("eval", step, {"split": "dev", "accuracy": 0.5})


def test_services_get_the_names_and_steps_of_tensorboard(services, tmp_path):
    write_steps(tmp_path / "mine", None, 5, "wandb", "trackio", "wandb")
    for name, service in services.items():
        assert service.logged[:2] == [(1, {"rl/loss": 1.0}), (2, {"rl/loss": 0.5})]
        assert service.logged[-1] == (5, {"eval/dev/accuracy": 0.5}) and len(service.logged) == 6
        (begun,) = service.begun
        assert begun["config"] == {"seed": 3} and begun["resume"] == "allow" and service.finished == 1
        assert begun["name"].startswith("mine"), name
    assert services["trackio"].begun[0]["private"] is True
    assert not (tmp_path / "mine" / "tensorboard").exists()


def test_a_resumed_run_goes_on_in_the_same_one_and_repeats_no_step(services, tmp_path):
    write_steps(tmp_path, None, 8, "wandb", "trackio")
    write_steps(tmp_path, 5, 10, "wandb", "trackio")  # from a checkpoint
    write_steps(tmp_path, None, 10, "trackio")  # without one, and with one of them
    known = json.loads((tmp_path / TRACKERS_FILE).read_text())
    assert [begun["id"] for begun in services["wandb"].begun] == [known["wandb"]] * 2
    names = [begun["name"] for begun in services["trackio"].begun]
    assert len(names) == 3 and len(set(names)) == 1 and names[0].endswith(known["trackio"])
    for service in services.values():
        steps = [step for step, values in service.logged if "rl/loss" in values]
        assert steps == list(range(1, 11))
        assert [step for step, values in service.logged if "eval/dev/accuracy" in values] == [5, 10]
    assert [record["step"] for record in read_metrics(tmp_path) if record["kind"] == "rl"] == list(range(1, 11))


def test_a_service_that_is_named_later_gets_what_comes_from_then_on(services, tmp_path):
    write_steps(tmp_path, None, 8)
    write_steps(tmp_path, 5, 10, "wandb")
    assert [step for step, values in services["wandb"].logged if "rl/loss" in values] == [6, 7, 8, 9, 10]


def test_a_service_that_fails_is_told_of_once_and_the_run_goes_on(services, tmp_path, capsys):
    services["wandb"].fails_at = 3
    write_steps(tmp_path, None, 6, "wandb", "trackio")
    assert [step for step, _ in services["wandb"].logged] == [1, 2] and services["wandb"].finished == 0
    assert len(services["trackio"].logged) == 7 and len(read_metrics(tmp_path)) == 7
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "wandb gets no more numbers (ConnectionError: the network is gone); the run goes on, and metrics.jsonl has all"
        " of them"
    ]


def test_a_service_that_does_not_open_or_close_ends_nothing(services, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(services["wandb"].module, "init")
    monkeypatch.setattr(services["trackio"], "finish", lambda: 1 / 0)
    services["trackio"].module.init = lambda **values: types.SimpleNamespace(
        log=services["trackio"].log, finish=services["trackio"].finish
    )
    write_steps(tmp_path, None, 2, "wandb", "trackio")
    told = capsys.readouterr().out
    assert told.count("wandb gets no more numbers") == told.count("trackio gets no more numbers (ZeroDivision") == 1
    assert len(read_metrics(tmp_path)) == 2


def test_what_is_missing_is_told_before_anything_is_written(services, monkeypatch, tmp_path):
    check_loggers(["tensorboard", "wandb", "trackio"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"logger=trackio needs the package trackio.*'retool_jax\[trackio\]'"):
        check_loggers(["trackio"])
    services["wandb"].module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
    check_loggers(["wandb"])
    services["wandb"].logged_in = False
    with pytest.raises(UserError, match=r"cannot log in \(there is no key\); run wandb login .* WANDB_MODE=offline"):
        check_loggers(["wandb"])

    def refuse(prompt: bool, verify: bool) -> bool:
        raise PermissionError("no such key")

    services["wandb"].module.login = refuse
    with pytest.raises(UserError, match=r"cannot log in \(PermissionError: no such key\)"):
        check_loggers(["wandb"])


def test_a_damaged_list_of_names_is_told(services, tmp_path):
    (tmp_path / TRACKERS_FILE).write_text("{")
    with pytest.raises(UserError, match="is not JSON; remove it, and each service gets a new run"):
        write_steps(tmp_path, None, 1, "wandb")


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("logger=[tensorboard,wandb]", ("tensorboard", "wandb")),
        ("logger=trackio", ("trackio",)),
        ("logger=[]", ()),
        ("logger=none", ()),
        ("seed=0", ("tensorboard",)),
    ],
)
@pytest.mark.parametrize("config", ["sft", "grpo"])
def test_the_key_is_a_list_of_known_names(config, word, meant):
    assert load([f"config={config}", word]).logger == meant


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("logger=[wandb,console]", "logger=console is not one of: tensorboard, wandb, trackio, none"),
        ("logger=[none,wandb]", r"logger=\[none,wandb\] names none and others"),
    ],
)
def test_other_names_are_refused(word, named):
    with pytest.raises(UserError, match=named):
        load(["config=grpo", word])


def test_the_key_may_change_between_two_starts(tmp_path):
    words = ["config=sft", f"run={tmp_path / 'run'}"]
    with claim_folder(load(words)):
        pass
    changed = load([*words, "logger=[wandb]"])
    assert [key for key, *_ in differences(changed, saved_config(tmp_path / "run"))] == ["logger"]
    assert may_change("logger")
    with claim_folder(changed):
        pass


# --- the packages -----------------------------------------------------------------------------------------------------

TWO_STARTS = """
import sys
from pathlib import Path
from retool_jax.metrics import MetricsLog
from retool_jax.trackers import check_loggers
name, folder = sys.argv[1:3]
check_loggers([name])
for start, last in ((None, 4), (2, 6)):
    with MetricsLog(Path(folder), start, [name], {"rl.steps": 6, "tools": None}) as log:
        for step in range((start or 0) + 1, last + 1):
            log.write("rl", step, {"loss": 1 / step})
"""


NONE = pytest.mark.skip(reason="neither wandb nor trackio is installed: pip install -e '.[wandb,trackio]'")
INSTALLED = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name)]


@pytest.mark.parametrize("name", INSTALLED or [pytest.param("none", marks=NONE)])
def test_the_package_itself_takes_our_numbers(name, tmp_path):
    """In a process of its own, with a secret among its words that must not be recorded anywhere."""
    folder = tmp_path / "run"
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_API_KEY": "k" * 40, "TRACKIO_DIR": str(tmp_path / "io")}
    words = [sys.executable, "-c", TWO_STARTS, name, str(folder), "sandbox.token=hidden-word"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "gets no more numbers" not in done.stdout, done.stderr + done.stdout
    assert [record["step"] for record in read_metrics(folder)] == list(range(1, 7))
    known = json.loads((folder / TRACKERS_FILE).read_text())[name]
    if name == "wandb":
        assert len(list(folder.glob(f"wandb/offline-run-*{known}*/*.wandb"))) == 2
    else:
        with sqlite3.connect(tmp_path / "io" / "retool_jax.db") as table:
            rows = table.execute("select run_name, step, metrics from metrics").fetchall()
        assert [(run, step) for run, step, _ in rows] == [(f"run-{known}", step) for step in range(1, 7)]
        assert json.loads(rows[3][2]) == {"rl/loss": 0.25}
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"hidden-word" not in path.read_bytes() and b"k" * 40 not in path.read_bytes()
