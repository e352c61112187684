"""The files that deploy a server agree with each other, with the command line and with the sandbox's files."""

import json
import shlex
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from retool_jax.run.load import load
from retool_jax.run.schema import ServeRun
from retool_jax.sandbox.types import TOKEN_VARIABLE as SANDBOX_TOKEN

yaml = pytest.importorskip("yaml", reason="reading the manifest needs pyyaml")
command = pytest.importorskip("retool_jax.run.serve", reason="the server needs retool_jax[serve]")

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy/serve.Dockerfile"


def instructions(name: str) -> list[str]:
    """Instructions of one kind with their arguments, continued lines joined."""
    lines = IMAGE.read_text().replace("\\\n", " ").split("\n")
    pairs = [line.partition(" ") for line in lines if line.strip() and not line.startswith("#")]
    return [rest.strip() for word, _, rest in pairs if word == name]


def manifest(name: str = "serve.yaml") -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((ROOT / "deploy" / name).read_text())}


def pod() -> dict:
    return manifest()["Deployment"]["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


def run_of(words: list[str]) -> ServeRun:
    run = load(words)
    assert isinstance(run, ServeRun)
    return run


def routes() -> set[str]:
    from retool_jax.serving.app import build_app

    return {route.path for route in build_app(SimpleNamespace()).routes}


def test_the_image_starts_the_server_with_words_that_it_knows():
    (entry,), (words,), (ports,), (user,) = map(instructions, ("ENTRYPOINT", "CMD", "EXPOSE", "USER"))
    assert json.loads(entry) == ["python", "-m", "retool_jax.serve"] and user != "0"
    run = run_of(json.loads(words))
    assert f"{run.serve.port} {run.serve.grpc_port}" == ports and run.serve.host == "0.0.0.0"
    (health,) = instructions("HEALTHCHECK")
    code = json.loads(health[health.index("[") :])[2]
    compile(code, "health", "exec")
    assert f"127.0.0.1:{run.serve.port}/health" in code and "/health" in routes()


def test_the_image_installs_what_the_project_asks_for():
    for source in instructions("COPY"):
        *files, _ = shlex.split(source)
        assert all((ROOT / file).exists() for file in files), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = instructions("ARG")
    assert set(default.removeprefix("EXTRAS=").split(",")) <= extras.keys()
    named = IMAGE.read_text().partition("FROM")[0] + (ROOT / "deploy/serve.yaml").read_text()
    assert all(set(part.split()[0].rstrip(".").split(",")) <= extras.keys() for part in named.split("EXTRAS=")[1:])
    installed = shlex.split(" && ".join(instructions("RUN")))
    assert "/src[${EXTRAS}]" in installed and extras["jetstream"][0] in installed


def test_the_manifest_hangs_together():
    parts, sandbox = manifest(), manifest("kubernetes.yaml")
    assert set(parts) == {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    deployment = parts["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    policy = parts["NetworkPolicy"]["spec"]
    selectors = [deployment["selector"]["matchLabels"], parts["Service"]["spec"]["selector"]]
    selectors += [policy["podSelector"]["matchLabels"], parts["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]]
    assert all(selector == labels for selector in selectors)
    named = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert {port["targetPort"] for port in parts["Service"]["spec"]["ports"]} == set(named)
    assert {port["port"] for port in policy["ingress"][0]["ports"]} == set(named)
    reached = policy["egress"][0]
    box = sandbox["Deployment"]["spec"]["template"]
    assert reached["to"][0]["podSelector"]["matchLabels"] == box["metadata"]["labels"]
    assert reached["ports"][0]["port"] == box["spec"]["containers"][0]["ports"][0]["containerPort"]
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(named["http"]) and annotations["prometheus.io/path"] in routes()


def test_the_manifest_runs_the_server_as_it_can_be_run():
    run, box, sandbox = run_of(container()["args"]), container(), manifest("kubernetes.yaml")
    assert [run.serve.port, run.serve.grpc_port] == [port["containerPort"] for port in box["ports"]]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = box[probe]["httpGet"]
        assert get["path"] in routes() and get["port"] == "http"
    assert pod()["terminationGracePeriodSeconds"] > run.serve.drain_s
    live = box["livenessProbe"]
    assert live["periodSeconds"] * live["failureThreshold"] > run.serve.drain_s, "closing is no reason to be killed"
    secrets = {each["name"]: each["valueFrom"]["secretKeyRef"]["name"] for each in box["env"] if "valueFrom" in each}
    assert secrets == {command.TOKEN_VARIABLE: "retool-serve", SANDBOX_TOKEN: "retool-sandbox"}
    assert not run.serve.log_text and not run.serve.record, "no prompts in a log or a file"
    mounted = {each["name"]: each["mountPath"] for each in box["volumeMounts"]}
    assert mounted["checkpoint"] == run.init_from and {each["name"] for each in pod()["volumes"]} == set(mounted)
    assert box["securityContext"]["readOnlyRootFilesystem"] and not box["securityContext"]["allowPrivilegeEscalation"]
    assert pod()["securityContext"]["runAsNonRoot"]
    assert run.sandbox.backend == ("remote",), "programs run on other machines"
    (url,) = run.sandbox.urls
    service = sandbox["Service"]
    assert url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
