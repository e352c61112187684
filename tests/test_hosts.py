"""Hosts of one job: their environment, the exchange of values, and how one host ends the others."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retool_jax import hosts
from retool_jax.errors import UserError
from retool_jax.hosts_config import HostsConfig

PLACE = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_one_process_gives_back_what_it_is_given():
    batch = {"rows": np.arange(4)}
    assert hosts.gather("x") == ["x"] and hosts.broadcast("x") == "x" and hosts.with_host_name("x") == "x"
    assert hosts.global_arrays(batch, {"rows": None}) is batch
    assert hosts.is_first() and all(map(hosts.is_mine, range(3)))
    with hosts.joined(HostsConfig()):
        assert hosts.gather(1) == [1]


def test_what_the_environment_says_of_a_process():
    assert hosts.distributed_arguments({"HOME": "/"}) is None
    assert hosts.distributed_arguments({"JAX_NUM_PROCESSES": "1"}) is None, (
        "alone, also on a machine that has neighbours"
    )
    place = hosts.distributed_arguments(PLACE)
    assert (place["coordinator_address"], place["num_processes"], place["process_id"]) == ("10.0.0.2:8476", 2, 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID=: several hosts need all three"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "JAX_COORDINATOR_ADDRESS=10.0.0.2 JAX_NUM"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
        ({"JAX_PROCESS_ID": "2"}, "numbered from 0 to 1"),
    ],
)
def test_half_a_place_is_refused(changed, said):
    with pytest.raises(UserError) as error:
        hosts.distributed_arguments(PLACE | changed)
    assert said in str(error.value)


JOB = """
import os
from retool_jax import hosts
from retool_jax.errors import UserError, run_command
from retool_jax.hosts_config import HostsConfig

def main(words):
    with hosts.joined(HostsConfig()):
        own = int(os.environ["JAX_PROCESS_ID"])
        told = hosts.gather({"own": own, "text": "é" * 5000 * own})
        assert told == [{"own": 0, "text": ""}, {"own": 1, "text": "é" * 5000}], told
        assert hosts.broadcast(f"of {own}") == "of 0"
        hosts.require_same({"task": "sft", "seed": 0})
        try:
            hosts.require_same({"task": "sft", "seed": own})
            assert own == 0
        except UserError as error:
            assert own == 1 and str(error).startswith("seed is 1 on host 1 (") and "0 on the first one;" in str(error)
        assert [hosts.is_mine(number) for number in range(4)] == [own == 0, own == 1] * 2
        print(hosts.with_host_name("it is full"), flush=True)
        if own == int(words[0]):
            raise UserError("the disk is full; make room")
        hosts.gather(None)  # waits for a host that does not come

run_command(main)
"""


KILLED = """
import os, signal
from retool_jax import hosts
from retool_jax.hosts_config import HostsConfig

with hosts.joined(HostsConfig()):
    if hosts.is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
"""


def run_pair(environment: dict[str, str], *command: str) -> tuple[list[subprocess.Popen], list[tuple[str, str]]]:
    """Two processes of one job that have ended, and the stdout and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = environment | PLACE | {"JAX_COORDINATOR_ADDRESS": address}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [
        subprocess.Popen([sys.executable, "-c", *command], env=environment | {"JAX_PROCESS_ID": str(own)}, **pipes)
        for own in range(2)
    ]
    try:
        return pair, [process.communicate(timeout=300) for process in pair]
    finally:
        for process in pair:
            process.kill()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_host_that_fails_ends_the_other_one_with_its_reason(one_device, failing):
    pair, said = run_pair(one_device, JOB, str(failing))
    assert [process.returncode for process in pair] == [2, 2], said
    own = f"host {failing} ({socket.gethostname()}, process {pair[failing].pid})"
    assert f"{own}: it is full" in said[failing][0]
    assert said[failing][1].endswith("error: the disk is full; make room\n")
    assert f"error: {own} has ended (UserError: the disk is full; make room)" in said[1 - failing][1]


def test_the_first_host_is_named_when_it_is_killed(one_device):
    """With the first host goes the store of all hosts, and jax aborts the other process because of that."""
    pair, said = run_pair(one_device, KILLED)
    assert pair[1].returncode in (1, -signal.SIGABRT), said
    assert f"error: host 0 ({socket.gethostname()}, process {pair[0].pid}) cannot be reached any more" in said[1][1]
