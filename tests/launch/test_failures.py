"""What launch_tpu.sh does and prints when the cloud refuses a request, preempts a TPU or does not answer."""

import shutil

import pytest

ACTIVE, LOST = ("ACTIVE\n", "", 0), ("SUSPENDED\n", "", 0)
NO_NETWORK = ("", "ERROR: network is unreachable", 1)
REQUEST = "gcloud compute tpus queued-resources run"  # what BACKEND=queued creates
STATE, ENDS = "value(state.state)", "storage cat*/status/"  # the calls that ask for its state and its workers' status
TRAINING = ("config=grpo_qwen2.5_32b", "rl.steps=150")


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
def test_a_refusal_of_the_cloud_is_explained(cloud, said, told):
    cloud.plan({"queued-resources create": [("", said, 1)]})
    done = cloud.run("up")
    assert done.returncode == 1 and told in done.stderr and said in done.stderr
    assert "left over: bucket gs://proj-retool, service account tpu-run@" in done.stderr


def test_a_missing_login_gcloud_or_kubectl_is_reported(cloud):
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


def test_a_failed_up_lists_what_it_created_and_down_removes_it(cloud):
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


def test_down_removes_the_rest_when_one_removal_fails(cloud):
    cloud.has(REQUEST, "gcloud iam service-accounts tpu-run")
    cloud.plan({"queued-resources delete": [("", "ERROR: busy", 1)]})
    done = cloud.run("down")
    assert done.returncode == 1 and "could not remove: queued resource run" in done.stderr
    assert any("service-accounts delete" in line for line in cloud.lines())


def test_down_without_a_connection_does_not_report_that_all_is_removed(cloud):
    cloud.has(REQUEST)
    cloud.plan({"queued-resources describe": [NO_NETWORK]})
    done = cloud.run("down")
    assert done.returncode == 1 and "queued resource run, if it exists" in done.stderr


def test_up_waits_requests_again_and_finally_gives_up(cloud):
    cloud.plan({STATE: [("WAITING_FOR_RESOURCES\n", "", 0), ("FAILED\n", "", 0), None]})
    done = cloud.run("up")
    assert done.returncode == 0 and "Requesting it again, 1 of at most 10" in done.stderr
    cloud.plan({STATE: [("WAITING_FOR_RESOURCES\n", "", 0)]})
    done = cloud.run("up", "MAX_WAIT_MINUTES=0")
    assert done.returncode == 1 and "no TPU after MAX_WAIT_MINUTES=0" in done.stderr
    cloud.plan({STATE: [LOST]})
    done = cloud.run("up", "MAX_REQUEUES=2")
    assert done.returncode == 1 and "requested again 2 times (MAX_REQUEUES)" in done.stderr


@pytest.mark.parametrize(
    "backend, lost",
    [
        ("queued", {STATE: [ACTIVE, ACTIVE, LOST, None]}),
        ("mig", {"list-instances*instanceStatus": [None, None, ("RUNNING\n", "", 0), None]}),
    ],
)
def test_a_preempted_run_restarts_on_a_new_tpu_with_the_same_command(cloud, backend, lost):
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


def test_a_worker_that_fails_because_of_a_preemption_does_not_fail_the_run(cloud):
    cloud.has(REQUEST)
    ends = [("host-0 exit 143\n", "", 0), ("host-0 exit 0\n", "", 0)]
    cloud.plan({STATE: [ACTIVE, ACTIVE, ACTIVE, ACTIVE, LOST, None], ENDS: ends})
    done = cloud.run("run", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 0 and "was taken away: GONE (SUSPENDED)" in done.stderr
    cloud.plan({STATE: [ACTIVE, ACTIVE, LOST], ENDS: [("host-0 exit 143\n", "", 0)]})
    done = cloud.run("run", "TYPE=v5p-8", "SPOT=0", *TRAINING)
    assert done.returncode == 1 and "host-0 ended with status 143" in done.stderr  # without spot there is no preemption


def test_a_failed_worker_ends_the_watch_with_its_name_and_log(cloud):
    cloud.has(REQUEST)
    cloud.ended(0, 2)
    cloud.plan({"logs/host-1.log": [("error: config has no key rl.step\n", "", 0)]})
    done = cloud.run("run", "TYPE=v5p-16", *TRAINING)
    assert done.returncode == 1 and "worker host-1 ended with status 2" in done.stderr
    assert "host-0 exit 0" in done.stderr and "no key rl.step" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_a_watcher_that_loses_its_connection_removes_nothing(cloud):
    cloud.has(REQUEST)
    cloud.plan({STATE: [NO_NETWORK, NO_NETWORK, None], ENDS: [NO_NETWORK, NO_NETWORK, ("host-0 exit 0\n", "", 0)]})
    done = cloud.run("watch", "TYPE=v5p-8")
    assert done.returncode == 0 and "UNKNOWN (ERROR: network is unreachable)" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_warnings_and_unknown_states_do_not_count_as_a_loss(cloud):
    cloud.has(REQUEST)
    warned, new = ("ACTIVE\n", "WARNING: updates are available", 0), ("REPAIRING\n", "", 0)
    cloud.plan({STATE: [warned, new, warned], ENDS: [NO_NETWORK, NO_NETWORK, ("host-0 exit 0\n", "", 0)]})
    done = cloud.run("run", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 0 and "UNKNOWN (REPAIRING)" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_watch_does_not_request_another_tpu(cloud):
    cloud.has(REQUEST)
    cloud.plan({STATE: [LOST]})
    done = cloud.run("watch")
    assert done.returncode == 1 and "with the same words requests another TPU" in done.stderr
    assert not any(" delete " in line for line in cloud.lines())


def test_ssh_is_retried_and_its_final_failure_explained(cloud):
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


def test_an_incomplete_instance_group_starts_no_worker(cloud):
    words = ("BACKEND=mig", "TYPE=v5p-16")
    cloud.plan({"basename": [("only-one\n", "", 0)], "instanceStatus": [("RUNNING\nRUNNING\n", "", 0)]})
    done = cloud.run("run", *words, *TRAINING)
    assert done.returncode == 1 and "slice 0 has 1 of 2 machines" in done.stderr
    assert not any(" ssh " in line for line in cloud.lines())


def test_a_jobset_that_failed_fails_the_run(cloud):
    cloud.ended(1)
    cloud.plan({"terminalState": [("", "", 0), ("Failed", "", 0)]})
    done = cloud.run("run", "BACKEND=gke", "TYPE=v5p-8", *TRAINING)
    assert done.returncode == 1 and "ended as Failed" in done.stderr and "host-0 exit 1" in done.stderr


def test_an_existing_cluster_is_neither_created_nor_removed(cloud):
    words = ("BACKEND=gke", "TYPE=v5p-8", "CLUSTER=theirs")
    assert cloud.run("up", *words).returncode == 0 and cloud.run("down", *words).returncode == 0
    lines = cloud.lines()
    assert not [line for line in lines if "clusters create" in line or "clusters delete" in line]
    assert sum("node-pools delete run-0 --cluster=theirs" in line for line in lines) == 1
