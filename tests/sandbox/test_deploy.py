"""The files for a fleet agree with each other, with the server's command line and with the project."""

import importlib.util
import json
import shlex
import tomllib
from pathlib import Path

import pytest

from retool_jax.sandbox import Limits, SandboxConfig
from retool_jax.sandbox.launch.gvisor import OVERHEAD_MB
from retool_jax.sandbox.words import read_words

yaml = pytest.importorskip("yaml", reason="reading the manifest needs pyyaml")
server = pytest.importorskip("retool_jax.sandbox.server", reason="the server needs retool_jax[sandbox]")

ROOT = Path(__file__).parents[2]


def dockerfile() -> list[tuple[str, str]]:
    """Instructions with their arguments; continued lines are joined."""
    text = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def instruction(name: str) -> list[str]:
    return [rest for word, rest in dockerfile() if word == name]


def manifest() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text())}


def container() -> dict:
    (only,) = manifest()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def arguments(words: list[str]):
    """The command line that a container starts with; the test fails if the server does not know a word of it."""
    return read_words(words, server.Options)


def routes() -> set[str]:
    class Box:
        config = SandboxConfig()

    return {route.path for route in server.build_app(Box(), Limits()).routes}


def test_the_image_starts_the_server_with_words_that_it_knows():
    known = {"FROM", "RUN", "COPY", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in dockerfile()} <= known and dockerfile()[0][0] == "FROM"
    (entry,), (words,), (port,) = instruction("ENTRYPOINT"), instruction("CMD"), instruction("EXPOSE")
    python, option, module = json.loads(entry)
    assert (python, option, module) == ("python", "-m", server.__name__)
    args = arguments(json.loads(words))
    assert (args.host, str(args.port), args.backend) == ("0.0.0.0", port, "auto")
    (health,) = instruction("HEALTHCHECK")
    compile(json.loads(health.removeprefix("CMD "))[2], "health", "exec")
    assert f"127.0.0.1:{port}/v1/ping" in health


def test_the_image_installs_what_the_project_asks_for():
    for source in instruction("COPY"):
        *files, _ = shlex.split(source)
        assert all((ROOT / file).exists() for file in files), source
    runs = " && ".join(instruction("RUN"))
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["sandbox"]
    commands = [shlex.split(command) for command in runs.split("&&")]
    installed = [words[3:] for words in commands if words[:2] == ["pip", "install"]]
    assert sorted(installed[0]) == sorted(extra)
    assert installed[1] == ["--no-deps", "/src"]
    modules = [words[2] for words in commands if words[:2] == ["python", "-m"]]
    assert modules == ["retool_jax.sandbox.image"] and all(map(importlib.util.find_spec, modules))
    assert {"runsc", "bubblewrap"} <= {word for words in commands for word in words}


def test_the_server_needs_nothing_that_the_image_lacks():
    code = (
        "import sys, retool_jax.sandbox.server, retool_jax.sandbox.remote.client, retool_jax.sandbox.image\n"
        "print(*sorted({'jax', 'numpy', 'transformers', 'omegaconf', 'rich'} & set(sys.modules)))"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_manifest_hangs_together():
    parts = manifest()
    assert set(parts) == {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}
    deployment = parts["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    selectors = [
        deployment["selector"]["matchLabels"],
        parts["Service"]["spec"]["selector"],
        parts["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        parts["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    (port,) = container()["ports"]
    (service,) = parts["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    assert parts["NetworkPolicy"]["spec"]["egress"] == []
    annotations = deployment["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert annotations["prometheus.io/path"] in routes()


def test_the_manifest_runs_the_server_as_it_can_be_run():
    args, box = arguments(container()["args"]), container()
    (port,) = box["ports"]
    assert args.port == port["containerPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = box[probe]["httpGet"]
        assert get["path"] in routes() and get["port"] == port["name"]
    grace = manifest()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > args.drain_s >= args.max_wall_s
    (variable,) = box["env"]
    assert variable["name"] == server.TOKEN_VARIABLE and "secretKeyRef" in variable["valueFrom"]
    limits, requests = box["resources"]["limits"], box["resources"]["requests"]
    needed_mb = (args.slots + 1) * (args.memory_mb + OVERHEAD_MB)
    assert int(limits["memory"].removesuffix("Gi")) * 1024 >= needed_mb
    assert float(requests["cpu"]) >= args.slots
    assert box["securityContext"]["privileged"]
    config, _ = server.settings(args)
    assert config.backend == ("auto",), "never less than bubblewrap where others send programs"
