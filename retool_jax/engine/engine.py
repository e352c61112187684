"""The engine: rows of a live KV cache on the device, and the few programs that grow them.

A row holds one trajectory's keys and values for as long as it lives, tool calls included. Prefill, append and decode
are the same model call (`decoder.extend`) with different numbers of tokens. A decode step *samples first and
forwards after*: the state keeps the hidden state behind each row's last token, a token is drawn from it and only
then written. So a row that stops leaves nothing to repair: its last token is recorded but not yet in the cache,
and comes with whatever is appended next.

What decides when a row stops lives on the device (lengths, budgets, stop ids), and what decides where its tokens lie
lives on the host (`pages.py`). So a dispatch needs nothing from the one before it: the host sends a page table that
reaches as far as a row may have come, and reads what was drawn when it likes.
"""

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.engine.layouts import EngineConfig, Layouts, bucket, functions
from retool_jax.engine.pages import OutOfPages, Pages
from retool_jax.engine.programs import EngineState
from retool_jax.models.cache import Rows
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params


class Turn(NamedTuple):
    """What a row draws next, until a stop id or its budget ends it; a row of the host's changes."""

    request: int  # uint32: names the stream of random draws
    budget: int  # tokens; 0 parks the row
    temperature: float = 1.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off


@dataclass(eq=False)
class Drawn:
    """A decode dispatch's results on their way to the host; `Engine.read` waits for them."""

    ints: jax.Array  # int32 [B, 2n+1]: tokens, whether they are real, the row's length
    floats: jax.Array  # float32 [B, 2n]: log-probs of the distribution drawn from, and plain ones
    live: np.ndarray  # bool [B]: rows whose results count
    steps: int  # at most


class Turns(NamedTuple):
    """What a dispatch drew, on the host."""

    tokens: np.ndarray  # int32 [B,n]
    logprobs: np.ndarray  # float32 [B,n]: of the distribution drawn from
    plain_logprobs: np.ndarray  # float32 [B,n]: of softmax(logits / temperature)
    counts: np.ndarray  # int32 [B]: how many of the n are real
    ended: np.ndarray  # bool [B]: the row drew a stop id or the last token of its budget, and is parked


@dataclass(eq=False)
class Prefix:
    """A prefilled list of tokens outside the slots; its pages are given back when nobody refers to it any more."""

    length: int
    hidden: jax.Array  # [R,D] of a chunk
    at: int  # its row in that chunk
    name: object = field(default_factory=object)  # its row in the page tables


@dataclass(eq=False)
class Parked:
    """A row without a slot: how many tokens it holds, and its name in the page tables."""

    length: int
    name: object = field(default_factory=object)


class Engine:
    """Holds the engine's buffers and weights. Methods dispatch work and return; only `read` waits for the device.

    Attributes:
        pages: who owns which pages of the cache.
        version: how often the weights were replaced.
        compiles: programs compiled since `warm_up`; any at all means that a bucket is missing.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, params: Params, mesh: Mesh, stop_ids: Sequence[int], seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.mesh = mesh
        self.stop_ids = frozenset(stop_ids)
        self.layouts = Layouts.of(model, config, mesh)
        self.sizes = self.layouts.sizes
        self.pages = Pages(self.sizes.pages, self.sizes.page_size)
        self.compiles = 0
        self.version = 0
        self._functions = functions(model, config, self.layouts, stop_ids)
        self._programs: dict[tuple, Callable] = {}
        self._run_key = jax.device_put(jax.random.key(seed), self.layouts.everywhere)
        # What the host knows of each row: tokens written and budget left when everything dispatched had been read.
        self._length = np.zeros(config.slots, np.int64)
        self._budget = np.zeros(config.slots, np.int64)
        self._drawable = np.zeros(config.slots, bool)  # the hidden state is that behind the row's last token
        self._changes = np.zeros((config.slots, 6), np.int32)
        self._unread: deque[Drawn] = deque()
        self._rows: Rows | None = None
        self._stale = np.ones(config.slots, bool)  # rows whose dense copy is not what their pages hold
        with jax.set_mesh(mesh):
            self._state = self._functions["state"]()
            self._params = self._functions["adopt"](None, params)

    def wait(self) -> None:
        """Wait until the device has done everything that was dispatched; for benchmarks."""
        jax.block_until_ready(self._state)

    # --- weights and programs ---

    def update_params(self, params: Params) -> None:
        """Take new weights from the trainer, resharded and cast; nothing is recompiled.

        What rows hold is of the old weights then: a scheduler at work follows `config.stale_rows`.
        """
        self.version += 1
        with jax.set_mesh(self.mesh):
            self._params = self._functions["adopt"](self._params, params)

    def warm_up(self) -> None:
        """Compile every program that this engine can need, so that none is compiled while it works."""
        slots, sizes = self.config.slots, self.sizes
        ints = partial(np.zeros, dtype=np.int32)
        for reads in sizes.reads:
            self._program("decode", *self._decode_arguments(0, reads, np.zeros(slots, bool)))
            for rows in sizes.rows:
                for tokens in sizes.tokens:
                    if tokens <= bucket(min(reads * sizes.page_size, sizes.tokens[-1]), sizes.tokens):
                        arguments = ints((rows, tokens)), ints((rows, 3)), ints((rows, reads))
                        self._program("extend", self._state, self._params, *arguments)
        self._program("copy rows", self._state, ints((2, slots)))
        self._program("copy pages", self._state, ints((2, slots)), ints(()))
        for rows in sizes.rows:
            hidden = jax.ShapeDtypeStruct((rows, self.model.hidden_size), self.model.compute_dtype)
            self._program("place row", self._state, hidden, ints(3))
        self._program("first", ints((slots, 2 * self.config.decode_steps + 1)))
        self.compiles = 0

    def _program(self, name: str, *arguments) -> Callable:
        """The compiled form of a function for arguments of these shapes."""
        key = name, *(x.shape for x in arguments if hasattr(x, "shape"))
        if key not in self._programs:
            self.compiles += 1

            def abstract(x) -> jax.ShapeDtypeStruct:
                where = x.sharding if isinstance(x, jax.Array) else self.layouts.everywhere
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

            with jax.set_mesh(self.mesh):
                lowered = self._functions[name].lower(*jax.tree.map(abstract, arguments))
                self._programs[key] = lowered.compile()
        return self._programs[key]

    def _run(self, name: str, *arguments):
        return self._program(name, *arguments)(*arguments)

    # --- rows ---

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Write tokens behind what rows hold, which parks them until `start`.

        Cost is proportional to the tokens given, not to what the rows hold already; lists longer than the largest
        bucket are written in pieces.

        Raises:
            OutOfPages: the cache cannot hold them; nothing was written.
        """
        for row, ids in zip(rows, tokens, strict=True):
            length = self._settled(row)
            if not ids:
                raise ValueError(f"row {row} was given no tokens: there would be nothing to draw the next from")
            if length + len(ids) > self.config.max_length:
                raise ValueError(f"row {row} would hold {length + len(ids)} of {self.config.max_length} tokens")
        starts = [int(self._length[row]) for row in rows]
        self._write(list(rows), starts, tokens, list(rows))
        for row, ids in zip(rows, tokens, strict=True):
            self._length[row] += len(ids)
            self._drawable[row] = self._stale[row] = True

    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make row `targets[i]` the trajectory of row `sources[i]`, sharing its pages: one prefill serves a group."""
        slots = self.config.slots
        rows = np.zeros((2, slots), np.int32)
        rows[1] = slots
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            self._settled(target)
            self.pages.fork(source, target, self._settled(source))
            self._length[target], self._drawable[target] = self._length[source], self._drawable[source]
            self._budget[target] = 0
            self._stale[target] = True
            rows[:, i] = source, target
        if len(targets):
            self._state = self._run("copy rows", self._state, rows)

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; it needs an append before it can draw again.

        Free of device work: the next append says where it begins. What dispatches in flight still draw for the row
        is of no account, and its rows of their results are to be ignored.
        """
        if not 0 <= length <= self._reach(row):
            raise ValueError(f"row {row} cannot keep {length} tokens: it holds at most {self._reach(row)}")
        under_way = any(drawn.live[row] for drawn in self._unread)
        self._drawable[row] &= length == self._length[row] and not under_way
        self._end_turn(row)
        self._changes[row] = 1, 0, 0, 0, 0, 0
        self._length[row] = length
        self.pages.truncate(row, length)

    def free(self, row: int) -> None:
        """Let go of a row and its pages."""
        self.truncate(row, 0)
        self.pages.free(row)

    # --- rows without a slot ---

    def park(self, row: int) -> Parked:
        """Take a row whose turn has ended out of its slot; its pages stay, and `resume` puts them into any slot."""
        parked = Parked(self._settled(row))
        self.pages.move(row, parked.name)
        self._length[row], self._drawable[row] = 0, False
        return parked

    def resume(self, parked: Parked, row: int) -> None:
        """Put a parked row into a free slot; it needs an append before it can draw."""
        self.free(row)
        self.pages.move(parked.name, row)
        self._length[row] = parked.length

    def share(self, source: int | Parked, length: int) -> Parked:
        """Another holder of the first `length` tokens of a row, which it keeps when that row goes on or goes away."""
        parked = Parked(length)
        self.pages.fork(source.name if isinstance(source, Parked) else source, parked.name, length)
        return parked

    def drop(self, parked: Parked) -> None:
        """Let go of a parked row's pages."""
        self.pages.free(parked.name)

    # --- what the host knows ---

    def length(self, row: int) -> int:
        """Tokens that a row holds, as far as results were read."""
        return int(self._length[row])

    def counts(self) -> dict[str, int]:
        """Pages and rows in use, for leak tests."""
        return self.pages.counts()

    # --- drawing ---

    def start(self, row: int, turn: Turn) -> None:
        """Let a row draw from the next dispatch on, until a stop id or its budget."""
        length = self._settled(row)
        if not 0 <= turn.budget <= self.config.max_length - length:
            raise ValueError(
                f"row {row} has {length} of {self.config.max_length} tokens and cannot draw {turn.budget} more"
            )
        if not self._drawable[row]:
            raise ValueError(f"row {row} was truncated to {length} tokens; append some before it can draw")
        self._budget[row] = turn.budget
        self._changes[row, :3] = 1, np.uint32(turn.request).view(np.int32), turn.budget
        self._changes[row, 3:] = (
            np.float32(turn.temperature).view(np.int32),
            turn.top_k,
            np.float32(turn.top_p).view(np.int32),
        )

    def decode(self, steps: int | None = None) -> Drawn:
        """Begin one fused decode of at most `steps` tokens a row; the next may begin before its results are read.

        Raises:
            OutOfPages: the live rows may outgrow the cache; nothing was dispatched.
        """
        most = self.config.decode_steps
        steps = most if steps is None else steps
        if not 1 <= steps <= most:
            raise ValueError(f"{steps} steps were asked for; a dispatch has 1 to {most} (engine.decode_steps)")
        live = self._budget > 0
        rows = np.flatnonzero(live).tolist()
        reaches = [self._reach(row, steps) for row in rows]
        self._take_pages(rows, [self.length(row) for row in rows], reaches, [self._reach(row) for row in rows])
        farthest = max(reaches, default=1)
        width = bucket(self.pages.pages_for(farthest), self.sizes.reads)
        arguments = self._decode_arguments(steps, width, live)
        self._state, self._rows, ints, floats = self._run("decode", *arguments)
        self._changes = np.zeros_like(self._changes)
        ints.copy_to_host_async()
        floats.copy_to_host_async()
        drawn = Drawn(ints, floats, live, steps)
        self._unread.append(drawn)
        return drawn

    def read(self, drawn: Drawn) -> Turns:
        """Wait for a dispatch's results, in the order of dispatch, and take note of how far rows have come."""
        if not self._unread or self._unread[0] is not drawn:
            raise ValueError("results are read once each, in the order in which they were dispatched")
        ints, floats = np.asarray(drawn.ints), np.asarray(drawn.floats)
        self._unread.popleft()
        n = self.config.decode_steps
        tokens, real, length = ints[:, :n], ints[:, n : 2 * n], ints[:, 2 * n]
        counts = np.where(drawn.live, real.sum(1), 0)
        ended = np.zeros(self.config.slots, bool)
        for row in np.flatnonzero(drawn.live & (counts > 0)).tolist():
            self._budget[row] -= counts[row]
            self._length[row] = length[row]
            ended[row] = not self._budget[row] or int(tokens[row, counts[row] - 1]) in self.stop_ids
            if ended[row]:
                self._end_turn(row)
            self.pages.truncate(row, self._reach(row))
        return Turns(tokens, floats[:, :n], floats[:, n:], counts, ended)

    # --- JetStream's names: google-jetstream 0.2.2, engine/engine_api.py ---
    # The engine holds weights and state itself: `params` and `decode_state` are what its callers pass around.

    def load_params(self) -> Params:
        return self._params

    def init_decode_state(self) -> EngineState:
        """Let go of every row."""
        while self._unread:
            self.read(self._unread[0])
        for row in range(self.config.slots):
            self.free(row)
        return self._state

    def prefill(
        self,
        *,
        params: Params | None = None,
        existing_prefix: Prefix | None = None,
        padded_tokens: Sequence[int] | jax.Array,
        true_length: int,
    ) -> Prefix:
        """Write the first `true_length` of some tokens behind an existing prefix, which stays as it is, or from 0."""
        start = existing_prefix.length if existing_prefix else 0
        length = start + true_length
        if not true_length or length > self.config.max_length:
            raise ValueError(f"a prefix of {length} tokens, {true_length} of them new: 1 to {self.config.max_length}")
        name = object()
        if existing_prefix:
            self.pages.fork(existing_prefix.name, name, start)
        tokens = np.asarray(padded_tokens)[:true_length].tolist()
        try:
            ((hidden, at),) = self._write([name], [start], [tokens], [self.config.slots])
        except OutOfPages:
            self.pages.free(name)
            raise
        prefix = Prefix(length, hidden, at, name)
        weakref.finalize(prefix, self.pages.free, name)
        return prefix

    def insert(
        self, prefix: Prefix, decode_state: EngineState | None = None, slot: int = 0, turn: Turn | None = None
    ) -> EngineState:
        """Make a slot the trajectory of a prefix, sharing its pages; by default it draws greedily to the row's end."""
        self.free(slot)
        self.pages.fork(prefix.name, slot, prefix.length)
        place = np.array([prefix.at, slot, prefix.length], np.int32)
        self._state = self._run("place row", self._state, prefix.hidden, place)
        self._length[slot] = prefix.length
        self._drawable[slot] = self._stale[slot] = True
        self.start(slot, turn or Turn(slot, self.config.max_length - prefix.length, temperature=0.0))
        return self._state

    def generate(self, params: Params | None = None, decode_state: EngineState | None = None):
        """One step of every row, as (state, int32 [B,3]: token, whether it is real, length of the row)."""
        while len(self._unread) > 1:
            self.read(self._unread[0])
        drawn = self.decode(1)
        return self._state, self._run("first", drawn.ints)

    @property
    def max_concurrent_decodes(self) -> int:
        return self.config.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.config.max_length

    # --- how it is done ---

    def _decode_arguments(self, steps: int, width: int, live: np.ndarray) -> tuple:
        """What a decode of rows of `width` pages is called with; the dense copy is made or remade as they need it."""
        slots = self.config.slots
        stale, count = np.zeros(slots, np.int32), 0
        if self.layouts.rows:
            length = width * self.sizes.page_size
            if self._rows is None or self._rows.v[0].shape[2] != length:
                self._rows = None  # its memory goes first
                with jax.set_mesh(self.mesh):
                    self._rows = self._functions["rows"](length)
                self._stale[:] = True
            which = np.flatnonzero(live & self._stale)
            count = len(which)
            stale[:count] = which
            self._stale[which] = False
        table = self.pages.table(range(slots), width)
        return (
            self._state,
            self._rows,
            self._params,
            self._run_key,
            np.int32(steps),
            self._changes,
            table,
            stale,
            np.int32(count),
        )

    def _reach(self, row: int, more: int = 0) -> int:
        """The most tokens that a row can hold once all in flight, and `more` steps, are done."""
        ahead = more + sum(drawn.steps for drawn in self._unread if drawn.live[row])
        return int(self._length[row]) + max(min(ahead, int(self._budget[row]) - 1), 0)

    def _settled(self, row: int) -> int:
        """A row's length, when it is not drawing."""
        if self._budget[row]:
            raise ValueError(f"row {row} is drawing; wait for its turn to end, or truncate it")
        return int(self._length[row])

    def _end_turn(self, row: int) -> None:
        """Forget what is in flight for a row."""
        self._budget[row] = 0
        for drawn in self._unread:
            drawn.live[row] = False

    def _write(
        self, names: list[Hashable], starts: list[int], tokens: Sequence[Sequence[int]], slots: list[int]
    ) -> list[tuple[jax.Array, int]]:
        """Extend rows of the page tables; returns where each one's last hidden state is."""
        reaches = [start + len(ids) for start, ids in zip(starts, tokens, strict=True)]
        self._take_pages(names, starts, reaches, starts)
        found: list = [None] * len(names)
        piece = self.sizes.tokens[-1]
        left = list(range(len(names)))
        done = 0
        while left:
            for at in range(0, len(left), self.config.chunk_rows):
                part = left[at : at + self.config.chunk_rows]
                ids = [tokens[i][done : done + piece] for i in part]
                hidden = self._chunk(
                    [names[i] for i in part], [starts[i] + done for i in part], ids, [slots[i] for i in part]
                )
                for place, i in enumerate(part):
                    found[i] = hidden, place
            done += piece
            left = [i for i in left if len(tokens[i]) > done]
        return found

    def _chunk(
        self, names: list[Hashable], starts: list[int], tokens: list[Sequence[int]], slots: list[int]
    ) -> jax.Array:
        """One call of the model on at most a chunk of rows."""
        rows = bucket(len(names), self.sizes.rows)
        padded = np.zeros((rows, bucket(max(map(len, tokens)), self.sizes.tokens)), np.int32)
        where = np.zeros((rows, 3), np.int32)
        where[:, 2] = self.config.slots  # no such row: dropped
        for i, ids in enumerate(tokens):
            padded[i, : len(ids)] = ids
            where[i] = starts[i], len(ids), slots[i]
        reach = max(start + len(ids) for start, ids in zip(starts, tokens, strict=True))
        width = bucket(self.pages.pages_for(reach), self.sizes.reads)
        table = np.zeros((rows, width), np.int32)
        table[: len(names)] = self.pages.table(names, width)
        self._state, hidden = self._run("extend", self._state, self._params, padded, where, table)
        return hidden

    def _take_pages(
        self, names: Sequence[Hashable], starts: Sequence[int], reaches: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Let every row write start .. reach, or, when the cache cannot hold them all, none: back to `kept` tokens."""
        copies = []
        try:
            for name, start, reach in zip(names, starts, reaches, strict=True):
                copies += self.pages.ensure(name, start, reach)
        except OutOfPages:
            self._copy_pages(copies)  # those rows have parted from what they shared
            for name, length in zip(names, kept, strict=True):
                self.pages.truncate(name, length)
            raise
        self._copy_pages(copies)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        slots = self.config.slots
        for at in range(0, len(copies), slots):
            part = copies[at : at + slots]
            pages = np.zeros((2, slots), np.int32)
            pages[:, : len(part)] = np.transpose(part)
            self._state = self._run("copy pages", self._state, pages, np.int32(len(part)))
