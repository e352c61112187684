"""The processes of one run, one on each host: joining them, exchanging values, and noticing a host that fails.

All hosts must call the functions of this file in the same order, as with computations over the whole mesh. With one
process, the usual case, all of them return their input at once.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import cloud_tpu_init, distributed  # the client of the key-value store that all hosts of a job share
from jax.experimental import multihost_utils

from retool_jax.errors import UserError, one_line
from retool_jax.fields import show
from retool_jax.hosts_config import HostsConfig

T = TypeVar("T")

BEAT_S = 2.0  # between two heartbeats
PATIENCE_MS = 30 * 24 * 3600 * 1000  # to wait for a slow host; a dead one is noticed by its missing heartbeats
GONE = "cannot be reached any more"  # said of the first host
ALIVE, FAILED, NAMES = "retool/alive", "retool/failed", "retool/names"  # folders of the store, an entry for each host
LEAST_BYTES = 1 << 12  # of an exchange; sizes are powers of two from here on, so that few shapes are compiled

_calls = count()  # numbers the calls of `gather`, equally on all hosts

# The first host has the store. When it is gone, jax aborts the other processes at once, usually before they can print
# why. So each of them has a witness, a small process that prints the reason instead. It prints nothing if its process
# has ended in another way: then its process told it so, or the first host can still be reached.
WITNESS = """
import socket, sys
message, ended = sys.stdin.readline(), sys.stdin.readline()
try:
    message and not ended and socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
except OSError:
    print(message, end="", file=sys.stderr)
"""


def is_first() -> bool:
    """Whether this process writes the files of which a run has one: metrics, config, trajectories, summary."""
    return jax.process_index() == 0


def is_mine(number: int) -> bool:
    """Whether this host works on the item of that number. Items are assigned round-robin."""
    return number % jax.process_count() == jax.process_index()


def with_host_name(text: str) -> str:
    """A text with this host's name in front if there are several hosts."""
    return f"{_name(jax.process_index())}: {text}" if jax.process_count() > 1 else text


def gather(value: T) -> list[T]:
    """The values that the hosts pass (anything picklable), in the order of the hosts. Waits for the slowest one."""
    if jax.process_count() == 1:
        return [value]
    # Wait here and not in a collective, whose time-out depends on the backend.
    distributed.global_state.client.wait_at_barrier(f"retool/gather/{next(_calls)}", PATIENCE_MS)
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    room = max(LEAST_BYTES, 1 << int(sizes.max() - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(own, (0, room - len(own))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: T) -> T:
    """The first host's value. For the state of files, which one host may see earlier than another."""
    return gather(value if is_first() else None)[0]


def require_same(values: Mapping[str, object]) -> None:
    """Check that this host has the same values, by name, as the first one.

    Otherwise the computations of a run would mix what the hosts have, or wait for each other without an end.

    Raises:
        UserError: a value differs; the message names it.
    """
    there = broadcast(dict(values))
    for name in [*there, *values]:
        if there.get(name) != values.get(name):
            raise UserError(
                f"{name} is {show(values.get(name))} on {_name(jax.process_index())} and {show(there.get(name))} on the"
                " first one; start the same command with the same files on all of them"
            )


def global_arrays(values: Any, shardings: Any) -> Any:
    """Host arrays that are equal in all processes, as global arrays of which each process holds its part."""
    if jax.process_count() == 1:
        return values

    def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(value), sharding, lambda part: np.asarray(value)[part])

    return jax.tree.map(put, values, shardings)


# --- beginning and end ------------------------------------------------------------------------------------------------


@contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Run the block as one process of a job: alone or with other hosts, as the environment says.

    When another host fails or sends no heartbeats any more, this process ends, whatever it waits for, with a line that
    names that host. Call this before anything is computed.

    Raises:
        UserError: the environment is incomplete, or the other hosts cannot be reached.
    """
    place = distributed_arguments(os.environ)
    if place is None or jax.distributed.is_initialized():
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, which must end a process
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=config.start_s,
            heartbeat_timeout_seconds=config.silent_s + 30,  # later than ours, since jax's message names no host
            shutdown_timeout_seconds=config.silent_s,
        )
        client, own = distributed.global_state.client, jax.process_index()
        client.key_value_set(f"{NAMES}/{own}", f"{socket.gethostname()}, process {os.getpid()}")
        client.blocking_key_value_get(f"{NAMES}/0", 1000 * config.start_s)
        witness = None if is_first() else _start_witness(_last_words(_name(0), GONE))
        client.wait_at_barrier("retool/begin", 1000 * config.start_s)
    except Exception as error:  # from jax, the network, or the machine's metadata
        raise UserError(
            f"cannot join the other hosts within hosts.start_s={config.start_s} s ({one_line(error)}); start the same"
            " command on all of them, or set JAX_NUM_PROCESSES=1 to run it on this one alone"
        ) from error
    watch = _Watch(config.silent_s, witness)
    print(f"this is {_name(own)} of {jax.process_count()}; the first one is {_name(0)}")
    try:
        yield
        client.wait_at_barrier("retool/end", PATIENCE_MS)
    except BaseException as error:
        watch.report(error)
        # At exit jax would wait for the other hosts, and abort when they do not come.
        atexit.register(_end, {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))
        raise
    watch.stop()
    jax.distributed.shutdown()


def distributed_arguments(environment: os._Environ | dict[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`, empty if it finds them itself; None for a process that is alone.

    Raises:
        UserError: the variables are incomplete or wrong.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = values = [environment.get(name, "") for name in names]
    if numbers[0] == "1":
        return None
    if not any(values):
        return {} if cloud_tpu_init.running_in_cloud_tpu_vm else None
    shown = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    if not all(values) or not all(number.isdecimal() for number in numbers) or ":" not in address:
        raise UserError(f"{shown}: several hosts need all three, HOST:PORT of the first one and two numbers; set them")
    processes, own = map(int, numbers)
    if own >= processes:
        raise UserError(f"{shown}: hosts are numbered from 0 to {processes - 1}; give each its own number")
    return {
        "coordinator_address": address,
        "num_processes": processes,
        "process_id": own,
        "cluster_detection_method": "deactivate",
    }


def _name(host: int) -> str:
    with suppress(Exception):  # without the store, the number has to do
        return f"host {host} ({distributed.global_state.client.key_value_try_get(f'{NAMES}/{host}')})"
    return f"host {host}"


def _last_words(name: str, what: str) -> str:
    """The line that this host prints when it ends because of another one."""
    return (
        f"error: {name} {what}, so this one, host {jax.process_index()}, ends too; the same command on all hosts"
        " goes on from what was saved"
    )


def _start_witness(line: str) -> subprocess.Popen:
    """Start a process that prints this line if jax aborts this one because the first host is gone."""
    address, port = distributed.global_state.coordinator_address.rsplit(":", 1)
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITNESS, address.strip("[]"), port],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C in the terminal does not end it
    )
    witness.stdin.write(line + "\n")
    witness.stdin.flush()
    return witness


class _Watch:
    """Sends heartbeats, and ends this process when another host has failed or sends none.

    It uses threads, since the main thread may wait in a computation for a host that is gone.
    """

    def __init__(self, silent_s: float, witness: subprocess.Popen | None) -> None:
        self._silent_s, self._witness = silent_s, witness
        self._over = threading.Event()
        self._client, self._own = distributed.global_state.client, jax.process_index()
        self._names = [_name(host) for host in range(jax.process_count())]
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._beat, self._listen)]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        """Send heartbeats, and check those of the other hosts."""
        last = {host: ("", time.monotonic()) for host in range(len(self._names))}  # the last beat, and when it came
        for beat in count():
            if self._over.wait(BEAT_S):
                return
            alive: list[tuple[str, str]] = []
            with suppress(jax.errors.JaxRuntimeError):  # no store: then the first host counts as silent
                self._client.key_value_set(f"{ALIVE}/{self._own}", str(beat), allow_overwrite=True)
                alive = self._client.key_value_dir_get(ALIVE)
            now = time.monotonic()
            for key, theirs in alive:
                host = int(key.rpartition("/")[2])
                if last[host][0] != theirs:
                    last[host] = theirs, now
            for host, (_, since) in last.items():
                if host != self._own and now - since > self._silent_s and not self._over.is_set():
                    self._leave(host, f"has said nothing for hosts.silent_s={self._silent_s} s and counts as dead", 1)

    def _listen(self) -> None:
        """Wait for the message of a host that has failed."""
        try:
            host, status, what = self._client.blocking_key_value_get(FAILED, PATIENCE_MS).split(" ", 2)
        except jax.errors.JaxRuntimeError:  # jax ends the process for that, too, but its message names no host
            host, status, what = "0", "1", GONE
        if what and not self._over.is_set():
            self._leave(int(host), what, int(status))

    def _leave(self, host: int, what: str, status: int) -> NoReturn:
        """End this process, whatever its other threads are waiting for."""
        self._over.set()
        print(_last_words(self._names[host], what), file=sys.stderr, flush=True)
        self._dismiss_witness()
        if is_first():
            time.sleep(3 * BEAT_S)  # the store ends with this process, and the others have to read it first
        _end(status)

    def _dismiss_witness(self) -> None:
        """Stop the watch, and tell the witness that this process ends by itself."""
        self._over.set()
        if self._witness:
            with suppress(OSError):
                self._witness.stdin.write("\n")
                self._witness.stdin.close()

    def report(self, error: BaseException) -> None:
        """Tell the other hosts why this one ends."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            # The error may come from a computation with a host that is gone; it has no type of its own. Then `_beat`
            # ends this process during this wait, and names that host.
            time.sleep(self._silent_s + 2 * BEAT_S)
        self._dismiss_witness()
        status = 2 if isinstance(error, UserError) else 1
        with suppress(jax.errors.JaxRuntimeError):  # another host has reported already
            what = f"has ended ({type(error).__name__}: {one_line(error, 1000)})"
            self._client.key_value_set(FAILED, f"{self._own} {status} {what}")
        if is_first():
            time.sleep(3 * BEAT_S)

    def stop(self) -> None:
        """End the threads, also those of the other hosts: all hosts have finished."""
        self._dismiss_witness()
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(FAILED, "0 0 ", allow_overwrite=True)  # no message: no host has failed
        for thread in self._threads:
            thread.join()


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
