"""The processes of one run, one on each host: which this one is, and what they tell each other.

Each calls the same functions of this file in the same order, as it does with computations over the whole mesh. With one
process, as nearly always, all of them return at once what they were given.
"""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import cloud_tpu_init, distributed  # the one key-value store that all hosts of a job have, and its client
from jax.experimental import multihost_utils

from retool_jax.errors import UserError, one_line
from retool_jax.hosts_config import HostsConfig

T = TypeVar("T")

BEAT_S = 2.0  # between two signs of life
PATIENCE_MS = 30 * 24 * 3600 * 1000  # with a host that lives and is slow: who is dead is found out by its silence
GONE = "cannot be reached any more"  # the first host
ALIVE, FAILED, NAMES = "retool/alive", "retool/failed", "retool/names"  # folders of the store, an entry for each host
LEAST_BYTES = 1 << 12  # that are exchanged at once; with powers of two above it a handful of shapes is compiled

_calls = count()  # of `gather`, which are the same ones on all hosts

# The first host has the store. When it is gone, jax aborts the other processes at once, most often before they can say
# anything. So each has a witness, a small process that says it in their place. It says nothing where its process ended
# in another way: it was told so, or the first host can still be reached.
WITNESS = """
import socket, sys
said, ended = sys.stdin.readline(), sys.stdin.readline()
try:
    said and not ended and socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
except OSError:
    print(said, end="", file=sys.stderr)
"""


def is_first() -> bool:
    """Whether this process writes what a run keeps once: metrics, config, trajectories, summary."""
    return jax.process_index() == 0


def is_mine(number: int) -> bool:
    """Whether this host works on the item of that number. They are dealt out in turn."""
    return number % jax.process_count() == jax.process_index()


def here(text: str) -> str:
    """A text with the host that it is of in front, where there are several."""
    return f"{_name(jax.process_index())}: {text}" if jax.process_count() > 1 else text


def gather(value: T) -> list[T]:
    """What each host gives here, in the order of the hosts; anything that can be pickled. Waits for the slowest one."""
    if jax.process_count() == 1:
        return [value]
    # Waited for here and not in a collective, whose patience depends on the backend.
    distributed.global_state.client.wait_at_barrier(f"retool/gather/{next(_calls)}", PATIENCE_MS)
    told = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(told)))
    room = max(LEAST_BYTES, 1 << int(sizes.max() - 1).bit_length())
    rows = multihost_utils.process_allgather(np.pad(told, (0, room - len(told))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(value: T) -> T:
    """What the first host gives here: for what a file system may show to one host earlier than to another."""
    return gather(value if is_first() else None)[0]


def placed(values: Any, shardings: Any) -> Any:
    """Arrays of the host, the same on each, as arrays of which each process holds its part."""
    if jax.process_count() == 1:
        return values

    def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(np.shape(value), sharding, lambda part: np.asarray(value)[part])

    return jax.tree.map(put, values, shardings)


# --- beginning and end ------------------------------------------------------------------------------------------------


@contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Run the block as one process of a job, as the environment says: alone, or with those of other hosts.

    A host that fails tells the others why, and one that says nothing any more is missed. Either ends this process,
    whatever it waits for, with a line that names that host. To be called before anything is computed.

    Raises:
        UserError: the environment says half of it, or the others cannot be reached.
    """
    place = place_in(os.environ)
    if place is None or jax.distributed.is_initialized():
        yield
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which is to end a process
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=config.start_s,
            heartbeat_timeout_seconds=config.silent_s + 30,  # jax's own, which names nobody
            shutdown_timeout_seconds=config.silent_s,
        )
        client, own = distributed.global_state.client, jax.process_index()
        client.key_value_set(f"{NAMES}/{own}", f"{socket.gethostname()}, process {os.getpid()}")
        client.blocking_key_value_get(f"{NAMES}/0", 1000 * config.start_s)
        witness = None if is_first() else _witness(_farewell(_name(0), GONE))
        client.wait_at_barrier("retool/begin", 1000 * config.start_s)
    except Exception as error:  # jax's, of the network, or of the machine's metadata
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
        watch.tell(error)
        # jax would wait for the others at its exit, and abort when they do not come.
        atexit.register(_end, {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1))
        raise
    watch.stop()
    jax.distributed.shutdown()


def place_in(environment: os._Environ | dict[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told, nothing where it finds out; None for a process that is alone.

    Raises:
        UserError: it is said in part, or is no place.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = said = [environment.get(name, "") for name in names]
    if numbers[0] == "1":
        return None
    if not any(said):
        return {} if cloud_tpu_init.running_in_cloud_tpu_vm else None
    shown = " ".join(f"{name}={value}" for name, value in zip(names, said, strict=True))
    if not all(said) or not all(number.isdecimal() for number in numbers) or ":" not in address:
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
    with suppress(Exception):  # it is only a name
        return f"host {host} ({distributed.global_state.client.key_value_try_get(f'{NAMES}/{host}')})"
    return f"host {host}"


def _farewell(name: str, what: str) -> str:
    """What this host says when it ends because of another one."""
    return (
        f"error: {name} {what}, so this one, host {jax.process_index()}, ends too; the same command on all hosts"
        " goes on from what was saved"
    )


def _witness(line: str) -> subprocess.Popen:
    """A process that says this line should this one end without a word when the first host is gone."""
    address, port = distributed.global_state.coordinator_address.rsplit(":", 1)
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITNESS, address.strip("[]"), port],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # what ends this process from a terminal is not meant for it
    )
    witness.stdin.write(line + "\n")
    witness.stdin.flush()
    return witness


class _Watch:
    """Gives signs of life, and ends this process when another host has failed or gives none.

    Its threads do so since the main one may wait in a computation for a host that is gone.
    """

    def __init__(self, silent_s: float, witness: subprocess.Popen | None) -> None:
        self._silent_s, self._witness = silent_s, witness
        self._over = threading.Event()
        self._client, self._own = distributed.global_state.client, jax.process_index()
        self._names = [_name(host) for host in range(jax.process_count())]
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._listen)]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        """Give signs of life, and look for those of the others."""
        heard = {host: ("", time.monotonic()) for host in range(len(self._names))}  # the last sign, and when it came
        for beat in count():
            if self._over.wait(BEAT_S):
                return
            alive: list[tuple[str, str]] = []
            with suppress(jax.errors.JaxRuntimeError):  # the first host has the store, and is silent then
                self._client.key_value_set(f"{ALIVE}/{self._own}", str(beat), allow_overwrite=True)
                alive = self._client.key_value_dir_get(ALIVE)
            now = time.monotonic()
            for key, sign in alive:
                host = int(key.rpartition("/")[2])
                if heard[host][0] != sign:
                    heard[host] = sign, now
            for host, (_, since) in heard.items():
                if host != self._own and now - since > self._silent_s and not self._over.is_set():
                    self._leave(host, f"has said nothing for hosts.silent_s={self._silent_s} s and counts as dead", 1)

    def _listen(self) -> None:
        """Hear of a host that has failed, at once."""
        try:
            host, status, said = self._client.blocking_key_value_get(FAILED, PATIENCE_MS).split(" ", 2)
        except jax.errors.JaxRuntimeError:  # jax ends the process for that, too, and names nobody
            host, status, said = "0", "1", GONE
        if said and not self._over.is_set():
            self._leave(int(host), said, int(status))

    def _leave(self, host: int, what: str, status: int) -> NoReturn:
        """End this process, whatever others of its threads are waiting for."""
        self._over.set()
        print(_farewell(self._names[host], what), file=sys.stderr, flush=True)
        self._end_of_watch()
        if is_first():
            time.sleep(3 * BEAT_S)  # with it goes the store, which tells the others
        _end(status)

    def _end_of_watch(self) -> None:
        """Note that this process ends by itself, so that the witness has nothing to say."""
        self._over.set()
        if self._witness:
            with suppress(OSError):
                self._witness.stdin.write("\n")
                self._witness.stdin.close()

    def tell(self, error: BaseException) -> None:
        """Tell the others why this host ends."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            # What a computation meets whose other end is gone has no type of its own: if another host is silent, this
            # process ends here, with its name.
            time.sleep(self._silent_s + 2 * BEAT_S)
        self._end_of_watch()
        status = 2 if isinstance(error, UserError) else 1
        with suppress(jax.errors.JaxRuntimeError):  # another host was first
            said = f"has ended ({type(error).__name__}: {one_line(error, 1000)})"
            self._client.key_value_set(FAILED, f"{self._own} {status} {said}")
        if is_first():
            time.sleep(3 * BEAT_S)

    def stop(self) -> None:
        """End the threads, those of the other hosts as well: all of them have come to their end."""
        self._end_of_watch()
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(FAILED, "0 0 ", allow_overwrite=True)  # nothing is said of a host
        for thread in self._threads:
            thread.join()


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
