"""Print the JobSet of a training run on GKE: `python3 deploy/tpu/jobset.py --name=... -- WORDS OF worker.sh`.

It needs only the standard library and prints JSON, which is also YAML: `kubectl apply -f -` reads it.

One replica of the job is one slice, with a pod for each of its machines; all its nodes belong to one node pool. The
fields are those of the JobSet API (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/), and labels, resources
and annotations those of GKE (https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice and
https://cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-setup).
"""

import argparse
import json
import sys

MOUNT = "/mnt/retool"  # where worker.sh looks for the bucket
BAD_INPUT = 2  # exit status of a command that would fail in the same way again
PORTS = {"libtpu": 8471, "slices": 8080, "coordinator": 8482}


def jobset(
    name: str,
    gke_type: str,
    topology: str,
    hosts: int,
    slices: int,
    chips_per_host: int,
    restarts: int,
    bucket: str,
    image: str,
    spot: bool,
    secrets: dict[str, str],
    command: list[str],
) -> dict:
    """The manifest as plain data.

    `secrets` maps names of variables to the Kubernetes secrets that hold them under the same key; if a secret does not
    exist, its variable stays unset. `command` holds the words for `worker.sh work`.
    """
    chips = str(chips_per_host)
    selector = {"cloud.google.com/gke-tpu-accelerator": gke_type, "cloud.google.com/gke-tpu-topology": topology}
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    keys = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": variable, "optional": True}}}
        for variable, secret in secrets.items()
    ]
    container = {
        "name": "train",
        "image": image,
        "command": ["bash", f"{MOUNT}/{name}/worker.sh", "work", *command],
        "env": keys,
        "ports": [{"name": port, "containerPort": number} for port, number in PORTS.items()],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "securityContext": {"privileged": True},  # gVisor makes its own namespaces and control groups
        "volumeMounts": [{"name": "bucket", "mountPath": MOUNT}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    # As on virtual machines: what other hosts write is not cached, and fsync puts a file into the bucket.
    options = "implicit-dirs,metadata-cache:ttl-secs:0,write:enable-streaming-writes:false"
    volumes = [
        {
            "name": "bucket",
            "csi": {
                "driver": "gcsfuse.csi.storage.gke.io",
                "volumeAttributes": {"bucketName": bucket, "mountOptions": options},
            },
        },
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    limits = {f"gke-gcsfuse/{kind}-limit": "0" for kind in ("cpu", "memory", "ephemeral-storage")}  # no limit
    pod = {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true", **limits}},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": name,
            "terminationGracePeriodSeconds": 90,
            "nodeSelector": selector,
            "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
            "containers": [container],
            "volumes": volumes,
        },
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a lost pod means a lost slice: all start again
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": [BAD_INPUT]},
                }
            ]
        },
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": restarts,
                "rules": [{"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("name", "gke-type", "topology", "bucket", "image"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("hosts", "slices", "chips-per-host", "restarts"):
        parser.add_argument(f"--{option}", type=int, required=True)
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--secret", action="append", default=[], metavar="VARIABLE=SECRET", dest="secrets")
    words, command = sys.argv[1:], []
    if "--" in words:  # only the first one is ours
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    options = vars(parser.parse_args(words))
    options["secrets"] = dict(secret.split("=", 1) for secret in options["secrets"])
    print(json.dumps(jobset(**options, command=command), indent=2))


if __name__ == "__main__":
    main()
