"""The JobSet of a run on GKE has what the JobSet API and GKE ask for; deploy/tpu/jobset.py names their pages."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
TRAINING = ("config=grpo_qwen2.5_32b", "rl.steps=150")


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
