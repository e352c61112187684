"""Fixtures that many tests share: a tiny model on one device, the miniature's tokenizer, a compiled engine."""

import atexit
import fcntl
import gc
import importlib.metadata
import os
import re
import shutil
import tempfile
import threading

# Programs of tests are compiled more often than run, so the compiler is told to hurry: 21 instead of 78 s of processor
# time for test_step.py. `fully_compiled` undoes it. Before jax is imported, as all of this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "RETOOL_TESTS_FLAGS" not in os.environ:  # a worker has all this from the process that started it
    # The first switch is gone from jaxlib 0.11, which ends at a flag that it does not know. The second keeps a program,
    # which is small here, from being cut into parts that are compiled apart.
    known = importlib.metadata.version("jaxlib").startswith("0.10.")
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["RETOOL_TESTS_FLAGS"] = flags if known else ""
    # Eight virtual devices for the tests of meshes; everything else asks for the first one.
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            os.environ["RETOOL_TESTS_FLAGS"],
            "--xla_force_host_platform_device_count=8",
        ]
    )
os.environ["JAX_PLATFORMS"] = "cpu"
# Nobody reads in a program which lines it came from, and a test's traceback is better whole.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_TRACEBACK_FILTERING"] = "off"
# Each worker, and each command of a test, is a process that imports the same modules. They are compiled once, also
# where the machine asks for no bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A folder for all workers of this session.
if "RETOOL_TESTS_FOLDER" not in os.environ:
    os.environ["RETOOL_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="retool-tests-")
    atexit.register(shutil.rmtree, os.environ["RETOOL_TESTS_FOLDER"], ignore_errors=True)
# One program is compiled once, by whichever worker or command of a test comes first.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(os.environ["RETOOL_TESTS_FOLDER"], "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from xdist.scheduler import LoadScopeScheduling

from retool_jax.engine.engine import Engine, EngineConfig, Parked, Turn, Turns
from retool_jax.engine.pages import Pages
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params, forward, init_params, logits
from retool_jax.rl.algorithms import ALGORITHMS
from retool_jax.rl.batches import kept_and_groups, scored_of
from retool_jax.rl.config import RLConfig
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.tokens.tokenizer import load_tokenizer

# Tracing makes many objects that live on and are looked at again and again: a tenth of test_step.py's processor time.
gc.set_threshold(100_000, 50, 1000)


def reuse_contexts(programs: int = 10) -> None:
    """Let each thread lower several programs in one MLIR context, as jax 0.12 does by itself.

    A new context costs 4 ms of processor time, the rest of a small program 14 ms. A worker lowers thousands of them.
    """
    make, own = mlir.make_ir_context, threading.local()

    def used_again() -> mlir.ir.Context:
        context, left = getattr(own, "context", (None, 0))
        if not left:
            context, left = make(), programs
        own.context = context, left - 1
        return context

    mlir.make_ir_context = used_again


if jax.__version_info__[:2] == (0, 10):
    reuse_contexts()

# Groups that take long, the longest of each kind first, with their seconds beside others'. What is not named takes 7.
SECONDS = {
    **{"test_blame.py": 115, "attacks on gvisor": 115, "attacks on bubblewrap": 70, "test_pool.py": 65},
    **{"test_benchmarks.py": 60, "test_gvisor.py": 20, "test_crew.py": 18, "test_semantics.py": 18},
    **{"whole runs": 180, "engine": 135, "test_parity.py": 55, "test_step.py": 50, "test_train.py": 37},
    **{"test_workers.py": 33, "test_functions.py": 30, "test_huggingface.py": 18, "test_package.py": 18},
    **{"test_hosts.py": 17},
}
WHOLE_RUNS = "run/test_every_algorithm.py", "run/test_hosts.py", "run/test_resume.py"


def group_of(nodeid: str) -> str:
    """Group tests that run on the same worker: by file, since a file's tests share fixtures. The attacks on two
    back-ends share none; files of whole runs share a process that trains; those of the engine share engines, which take
    long to trace."""
    path, _, test = nodeid.partition("::")
    room, _, name = path.rpartition("/")
    if path.endswith(WHOLE_RUNS):
        return "whole runs"
    if room.endswith("/engine"):
        return "engine"
    backend = next((backend for backend in ("gvisor", "bubblewrap") if f"[{backend}" in test), None)
    return f"attacks on {backend}" if name == "test_attacks.py" and backend else name


class ByGroup(LoadScopeScheduling):
    """Hands out groups in their order. xdist's own groups do not work here: pytest 9.2 leaves their names out of its
    ids."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByGroup:
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the sandbox mostly wait and the others mostly compute. Both kinds are spread over the whole time, so
    that workers do not all wait at once. Long groups come first, so that all workers end together."""
    kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}
    kind_of: dict[str, bool] = {}
    for item in items:
        group = group_of(item.nodeid)
        kind_of[group] = "sandbox" in item.path.parts or group == "test_benchmarks.py"
        kinds[kind_of[group]][group] = None
    place: dict[str, float] = {}
    for names in kinds.values():
        ordered = [name for name in SECONDS if name in names] + [name for name in names if name not in SECONDS]
        begins = [0, *accumulate(SECONDS.get(name, 7) for name in ordered)]
        place |= {name: begin / begins[-1] for name, begin in zip(ordered, begins, strict=False)}
    items.sort(key=lambda item: place[group_of(item.nodeid)])


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """A test's turn among those of all workers: beside others, or alone on the machine.

    A worker that waits to be alone blocks new turns of the others, so that it gets its own.
    """
    folder = Path(os.environ["RETOOL_TESTS_FOLDER"])
    with open(folder / "door", "w") as door, open(folder / "room", "w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


KEPT: list[ExitStack] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Run a test marked `alone` while no other worker runs one, since it looks at the whole machine. If the next test
    is marked, too, it shares the turn: each turn makes the others wait."""
    alone, again = (test is not None and test.get_closest_marker("alone") is not None for test in (item, nextitem))
    kept = bool(KEPT)
    with KEPT.pop() if kept else ExitStack() as own:
        if not kept:
            own.enter_context(turn(alone))
        result = yield
        if alone and again:
            KEPT.append(own.pop_all())
    return result


def pytest_sessionfinish() -> None:
    """Collect no garbage at the end: pytest does so five times and Python some more, each time over all objects of
    jax."""
    gc.freeze()


@pytest.fixture(scope="session")
def one_device() -> dict[str, str]:
    """The environment of a command on one device."""
    return os.environ | {"XLA_FLAGS": os.environ["RETOOL_TESTS_FLAGS"]}


@pytest.fixture(scope="session")
def fully_compiled() -> dict[str, str]:
    """The environment of a command on one device whose run time matters more than its compile time."""
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("miniature")


@pytest.fixture(scope="session")
def wheel_file() -> Callable[[str, str], Path]:
    """A file from the wheel of a package that is installed but not imported: `wheel_file("dashscope", NAME)`."""

    def locate(package: str, name: str) -> Path:
        try:
            return Path(importlib.metadata.distribution(package).locate_file(name))
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"no {name}: install the test extra, which brings {package}")

    return locate


@pytest.fixture(scope="session")
def published_template(wheel_file) -> Callable[[str], str]:
    """A chat template as a model is published with it, or one repaired for training: `published_template("qwen3")`."""
    return lambda name: wheel_file("trl", f"trl/chat_templates/{name}.jinja").read_text()


@pytest.fixture(scope="session")
def local_data() -> Callable[[str], Path]:
    """A whole public data set, which is in no package: `local_data("math500/math500.jsonl")`.

    It is in the folder `shared/data` beside the checkout. Only tests of whole sets use it; tests of a set's form make
    rows of their own.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"

    def locate(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"a test of whole public data sets: no {name} in ../shared/data")
        return folder / name

    return locate


@pytest.fixture(scope="session")
def undefined() -> Callable[[Iterable[str]], set[str]]:
    """The names of a run's numbers that docs/metrics.md does not define: `undefined(names)`."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    patterns = [re.sub(r"<\w+>", r"[^/@]+", re.escape(row)) for row in rows]
    return lambda names: {name for name in names if not any(re.fullmatch(p, name) for p in patterns)}


@pytest.fixture(scope="session")
def model(tokenizer):
    """A decoder small enough to run token by token; N / K = 2, so that errors in grouping heads show."""
    return ModelConfig(
        vocab_size=len(tokenizer) + len(tokenizer) % 2,  # for tp=2
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )


@pytest.fixture(scope="session")
def params(model):
    """Random weights, including norms and biases, larger than at initialisation: nearly uniform logits would hide
    differences."""
    rng = np.random.default_rng(1)
    fresh = jax.device_get(init_params(model, jax.random.key(1)))  # added up by numpy, which compiles nothing
    return jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0.0, 0.2, x.shape).astype(x.dtype)), fresh)


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def make_engine(model, params, mesh, tokenizer):
    """Build an engine on one device: `make_engine(slots=4, seed=7)`."""

    def make(seed: int = 0, stop_ids: Sequence[int] | None = None, **config) -> Engine:
        sizes = {"slots": 4, "max_length": 96, "decode_steps": 8} | config
        stops = tokenizer.stop_ids if stop_ids is None else stop_ids
        return Engine(model, EngineConfig(**sizes), params, mesh, stops, seed)

    return make


@pytest.fixture(scope="session")
def fresh_logits(model, params):
    """The reference for everything that extends a cache: `fresh_logits(lists of ids)`, one forward pass over each whole
    list. Returns [len(ids), V] per list, from the plain packed forward with one list a row; of other weights if
    given."""

    @jax.jit
    def compute(params: Params, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return logits(model, params, forward(model, params, tokens, positions, segments))

    def run(sequences: Sequence[Sequence[int]], params: Params = params) -> list[np.ndarray]:
        rows, length = 4, 96
        results = []
        for at in range(0, len(sequences), rows):
            part = sequences[at : at + rows]
            tokens, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
            for row, ids in enumerate(part):
                tokens[row, : len(ids)] = ids
                segments[row, : len(ids)] = 1
            values = np.asarray(compute(params, tokens, segments))
            results += [values[row, : len(ids)] for row, ids in enumerate(part)]
        return results

    return run


@pytest.fixture(scope="session")
def alive() -> Callable[[], int]:
    """Bytes of all live arrays of jax: `alive()`. Garbage of earlier tests is collected first, since it might go
    between two calls."""

    def count() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    return count


@pytest.fixture(scope="session")
def compiles() -> list[str]:
    """Gets an entry for every program that XLA compiles from now on."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


class ScriptedEngine:
    """An engine without a model: a request's turns are the ids that a test wrote, one after another.

    It keeps what rows hold as lists. Where a turn's script has no stop id at its end, the policy talks on.

    Attributes:
        left: what each row held when it was let go, in that order.
    """

    def __init__(self, stop_ids: Sequence[int], script: dict[int, list[list[int]]], **sizes) -> None:
        self.config = EngineConfig(**{"slots": 8, "max_length": 256, "decode_steps": 8} | sizes)
        self.stop_ids = frozenset(stop_ids)
        self.version = self.written = self.places = 0
        self.pages = Pages(10_000, 16)
        self.left: list[list[int]] = []
        self._script = {request: list(turns) for request, turns in script.items()}
        self._held: dict[object, list[int]] = {}
        self._turns: dict[int, tuple[Turn, list[int]]] = {}  # of the rows that draw: what is left of budget and script
        self._unread: list[SimpleNamespace] = []

    def append(self, rows: Sequence[int], tokens: Sequence[list[int]]) -> None:
        for row, ids in zip(rows, tokens, strict=True):
            self._held.setdefault(row, []).extend(ids)
            assert row not in self._turns and len(self._held[row]) <= self.config.max_length

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for source, target in zip(sources, targets, strict=True):
            self._held[target] = list(self._held[source])

    def start(self, row: int, turn: Turn) -> None:
        assert 1 <= turn.budget <= self.config.max_length - len(self._held[row])
        self._turns[row] = turn, self._script[turn.request].pop(0)

    def decode(self) -> SimpleNamespace:
        shape = self.config.slots, self.config.decode_steps
        tokens, logprobs = np.zeros(shape, np.int32), np.full(shape, -0.5, np.float32)
        counts, ended = np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)
        for row, (turn, script) in list(self._turns.items()):
            drawn = (script + [1] * shape[1])[: min(shape[1], turn.budget)]
            stop = next((i + 1 for i, token in enumerate(drawn) if token in self.stop_ids), None)
            drawn = drawn[:stop]
            tokens[row, : len(drawn)], counts[row] = drawn, len(drawn)
            ended[row] = stop is not None or len(drawn) == turn.budget
            self._held[row] += drawn[:-1] if ended[row] else drawn
            self._turns[row] = turn._replace(budget=turn.budget - len(drawn)), script[len(drawn) :]
            if ended[row]:
                del self._turns[row]
        result = SimpleNamespace(ints=tokens, floats=logprobs, turns=Turns(tokens, logprobs, logprobs, counts, ended))
        self._unread.append(result)
        return result

    def read(self, drawn: SimpleNamespace) -> Turns:
        assert self._unread.pop(0) is drawn
        return drawn.turns

    def truncate(self, row: int, length: int) -> None:
        self._turns.pop(row, None)
        for drawn in self._unread:
            drawn.turns.counts[row] = 0
        del self._held[row][length:]

    def free(self, row: int) -> None:
        self.left.append(self._held.pop(row))

    def park(self, row: int) -> Parked:
        parked = Parked(len(self._held[row]))
        self._held[parked.name] = self._held.pop(row)
        return parked

    def resume(self, parked: Parked, row: int) -> None:
        self._held[row] = self._held.pop(parked.name)

    def share(self, source: int | Parked, length: int) -> Parked:
        parked = Parked(length)
        self._held[parked.name] = self._held[source.name if isinstance(source, Parked) else source][:length]
        return parked

    def drop(self, parked: Parked) -> None:
        self.left.append(self._held.pop(parked.name))


@pytest.fixture(scope="session")
def scripted_engine() -> type[ScriptedEngine]:
    return ScriptedEngine


@pytest.fixture(scope="session")
def advantages() -> Callable[[Sequence[Trajectory], int], list[list[float]]]:
    """The advantages that GRPO gives to trajectories, by group: of those that carry signal, in groups that train."""

    def of(trajectories: Sequence[Trajectory], group_size: int) -> list[list[float]]:
        kept, groups = kept_and_groups(trajectories, group_size)
        columns = ALGORITHMS["grpo"].advantage(scored_of(kept, groups, {}), RLConfig())["advantages"]
        found: dict[int, list[float]] = {}
        for trajectory, group, values in zip(kept, groups.tolist(), columns, strict=True):
            if values.any():
                found.setdefault(group, []).append(float(values[trajectory.sampled][0]))
        return list(found.values())

    return of
