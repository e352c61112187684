"""The engine: rows of a live KV cache on the device, and the few programs that extend them.

A row holds the keys and values of one trajectory for its whole life, tool calls included. A decode step *samples first
and forwards afterwards*: it draws a token from the hidden state of the row's last token, and then writes the new token
to the cache. So the last token of a turn is recorded but not in the cache; the next append writes it.

The device decides when a row stops (lengths, budgets, stop ids); the host decides in which pages its tokens are
(`pages.py`). So the host can dispatch before it has read earlier results, with a page table for the longest that each
row may become.

Buffers are donated to every call, so only one thread may use an engine: the one that built it or called `take_over`.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.engine.ahead import Shapes, begin_to_compile, compile_all
from retool_jax.engine.compiled import Layouts, Program, Programs, decode_mesh
from retool_jax.engine.config import EngineConfig, bucket, calls
from retool_jax.engine.pages import OutOfPages, Pages
from retool_jax.engine.programs import CHANGES
from retool_jax.engine.turns import STOPS, Drawn, Parked, Prefix, Turn, Turns
from retool_jax.engine.weights import Weights, make_adopt
from retool_jax.models.config import ModelConfig
from retool_jax.models.decoder import Params
from retool_jax.models.rows import Rows


@lru_cache(maxsize=8)
def compiled_for(
    model: ModelConfig, config: EngineConfig, own: Mesh, stop_ids: tuple[int, ...], trainer: Mesh
) -> tuple[Layouts, Programs, Callable[[Weights | None, Params], Weights]]:
    """The programs of an engine of these sizes. Later engines of the same sizes in this process share them."""
    layouts = Layouts.of(model, config, own)
    return layouts, Programs.of(model, config, layouts, stop_ids), make_adopt(model, layouts, trainer)


def compile_ahead(model: ModelConfig, config: EngineConfig, mesh: Mesh, stop_ids: Sequence[int]) -> ThreadPoolExecutor:
    """Start compiling every program that an engine with these arguments can need; returns the compiling threads."""
    config = shape_of(config)
    own = decode_mesh(model, mesh, config.tp)
    layouts, programs, _ = compiled_for(model, config, own, tuple(stop_ids), mesh)
    return begin_to_compile(Shapes(model, config, layouts), programs)


def shape_of(config: EngineConfig) -> EngineConfig:
    """The config with fields that only affect the host reset, so that engines which differ in these share programs."""
    return replace(config, read_late=1, tool_lag=1, stale_rows="rewrite")


class Engine:
    """Holds the engine's buffers and weights. Methods dispatch work and return; only `read` waits for the device.

    Attributes:
        mesh: the devices of the given mesh that the engine uses (`decode_mesh`).
        pages: which row owns which pages of the cache.
        weights: its own copy, in its own layout.
        written: how many tokens `append` and `write_prefix` have written so far.
        places: how many positions the model computed for them, padding included.
        version: of the weights. It starts at 0 and `update_params` increments it; a caller may set it.
    """

    def __init__(
        self, model: ModelConfig, config: EngineConfig, params: Params, mesh: Mesh, stop_ids: Sequence[int], seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.mesh = decode_mesh(model, mesh, config.tp)
        self.stop_ids = frozenset(stop_ids)
        self.layouts, self._programs, self._adopt = compiled_for(
            model, shape_of(config), self.mesh, tuple(stop_ids), mesh
        )
        self.sizes = self.layouts.sizes
        self.pages = Pages(self.sizes.pages, self.sizes.page_size)
        self.version = 0
        self.written = self.places = 0
        self._released: deque[Hashable] = deque()  # names of prefixes to free; any thread may append
        self._run_key = jax.device_put(jax.random.key(seed), self.layouts.everywhere)
        # The host's view of each row: tokens written and budget left as of the last results that were read.
        self._length = np.zeros(config.slots, np.int64)
        self._budget = np.zeros(config.slots, np.int64)
        self._drawable = np.zeros(config.slots, bool)  # the device has the hidden state of the row's last token
        self._changes = np.zeros((config.slots, CHANGES), np.int32)  # turns that begin with the next dispatch
        self._unread: deque[Drawn] = deque()
        self._rows: Rows | None = None
        self._stale = np.ones(config.slots, bool)  # rows whose dense copy differs from their pages
        self.take_over()
        with jax.set_mesh(self.mesh):
            self._state = self._programs.init_state()
            self.weights = self._adopt(None, params)

    def take_over(self) -> None:
        """Make the calling thread the one that may use the engine. No other thread may be using it now."""
        self._thread = threading.current_thread()

    def wait(self) -> None:
        """Wait until the device has done everything that was dispatched; for benchmarks."""
        jax.block_until_ready(self._state)

    # --- weights and programs ---

    def update_params(self, params: Params) -> None:
        """Take new weights from the trainer, resharded and cast; nothing is recompiled.

        Rows still hold keys and values of the old weights; a running scheduler applies `config.stale_rows`. A row that
        is kept draws its next token from the old weights' hidden state with the new weights' head.
        """
        self._check_thread()
        self.version += 1
        with jax.set_mesh(self.mesh):
            self.weights = self._adopt(self.weights, params)

    def warm_up(self) -> None:
        """Compile every program that this engine can need, so that none is compiled later."""
        for pages in self.sizes.reads:
            self._fit_rows(pages)
        compile_all(Shapes(self.model, self.config, self.layouts), self._programs)

    def _check_thread(self) -> None:
        if threading.current_thread() is not self._thread:
            raise RuntimeError(
                f"the engine is used by thread {self._thread.name}, and {threading.current_thread().name} called it;"
                " hand the work to that thread (Service.from_thread), or take the engine over (Engine.take_over)"
            )

    def _run(self, program: Program, *arguments):
        self._check_thread()
        return program(*arguments)

    # --- rows ---

    def append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Write tokens at the ends of rows. The rows do not draw until `start`.

        Raises:
            OutOfPages: the cache cannot hold them; nothing was written.
        """
        for row, ids in zip(rows, tokens, strict=True):
            length = self._idle_length(row)
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
        """Make row `targets[i]` a copy of row `sources[i]` that shares its pages: one prefill serves a group."""
        slots = self.config.slots
        rows = np.zeros((2, slots), np.int32)
        rows[1] = slots
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            self._idle_length(target)  # raises if it is drawing
            self.pages.fork(source, target, self._idle_length(source))
            self._length[target], self._drawable[target] = self._length[source], self._drawable[source]
            self._budget[target] = 0
            self._stale[target] = True
            rows[:, i] = source, target
        if len(targets):
            self._state = self._run(self._programs.copy_rows, self._state, rows)

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; it needs an append before it can draw again.

        Needs no work on the device: the next append passes its start position. Results in flight for the row are
        ignored.
        """
        self._check_thread()
        if not 0 <= length <= (reach := int(self._max_lengths()[row])):
            raise ValueError(f"row {row} cannot keep {length} tokens: it holds at most {reach}")
        under_way = any(drawn.live[row] for drawn in self._unread)
        self._drawable[row] &= length == self._length[row] and not under_way
        self._end_turn(row)
        self._changes[row] = 0
        self._changes[row, 0] = 1
        self._length[row] = length
        self.pages.truncate(row, length)

    def free(self, row: int) -> None:
        """Empty a row and free its pages."""
        self.truncate(row, 0)
        self.pages.free(row)

    def clear(self) -> None:
        """Free every row, after reading all results in flight."""
        while self._unread:
            self.read(self._unread[0])
        for row in range(self.config.slots):
            self.free(row)

    # --- rows without a slot ---

    def park(self, row: int) -> Parked:
        """Take a row whose turn has ended out of its slot. It keeps its pages, and `resume` puts it into any slot."""
        parked = Parked(self._idle_length(row))
        self.pages.move(row, parked.name)
        self._length[row], self._drawable[row] = 0, False
        return parked

    def resume(self, parked: Parked, row: int) -> None:
        """Put a parked row into a free slot; it needs an append before it can draw."""
        self.free(row)
        self.pages.move(parked.name, row)
        self._length[row] = parked.length

    def share(self, source: int | Parked, length: int) -> Parked:
        """A parked row that shares the first `length` tokens of a row; it keeps them whatever happens to that row."""
        parked = Parked(length)
        self.pages.fork(source.name if isinstance(source, Parked) else source, parked.name, length)
        return parked

    def drop(self, parked: Parked) -> None:
        """Free a parked row's pages."""
        self.pages.free(parked.name)

    def write_prefix(self, tokens: Sequence[int], behind: Prefix | None = None) -> Prefix:
        """Write tokens outside the slots, from position 0 or after another prefix, which is not changed.

        Raises:
            OutOfPages: the cache cannot hold them; nothing was written.
        """
        start = behind.length if behind else 0
        length = start + len(tokens)
        if not len(tokens) or length > self.config.max_length:
            raise ValueError(f"a prefix of {length} tokens, {len(tokens)} of them new: 1 to {self.config.max_length}")
        name = object()
        if behind:
            self.pages.fork(behind.name, name, start)
        try:
            ((hidden, at),) = self._write([name], [start], [tokens], [self.config.slots])
        except OutOfPages:
            self.pages.free(name)
            raise
        prefix = Prefix(length, hidden, at, name)
        prefix.release = weakref.finalize(prefix, self._released.append, name)
        return prefix

    def place(self, prefix: Prefix, row: int) -> None:
        """Make a row a copy of a prefix that shares its pages, ready to draw. A prefix may be placed many times."""
        self.free(row)
        self.pages.fork(prefix.name, row, prefix.length)
        place = np.array([prefix.at, row, prefix.length], np.int32)
        self._state = self._run(self._programs.place_row, self._state, prefix.hidden, place)
        self._length[row] = prefix.length
        self._drawable[row] = self._stale[row] = True

    # --- the host's view ---

    def length(self, row: int) -> int:
        """The number of tokens that a row holds, as of the last results that were read."""
        return int(self._length[row])

    def counts(self) -> dict[str, int]:
        """Pages and rows in use, for leak tests."""
        self._free_released()
        return self.pages.counts()

    # --- drawing ---

    def start(self, row: int, turn: Turn) -> None:
        """Let a row draw from the next dispatch on, until a stop id or the end of its budget."""
        length = self._idle_length(row)
        if not 0 <= turn.budget <= self.config.max_length - length:
            raise ValueError(
                f"row {row} has {length} of {self.config.max_length} tokens and cannot draw {turn.budget} more"
            )
        if not self._drawable[row]:
            raise ValueError(f"row {row} was truncated to {length} tokens; append some before it can draw")
        self._budget[row] = turn.budget
        self._changes[row, :3] = 1, np.uint32(turn.request).view(np.int32), turn.budget
        self._changes[row, 3:6] = (
            np.float32(turn.temperature).view(np.int32),
            turn.top_k,
            np.float32(turn.top_p).view(np.int32),
        )
        self._changes[row, 6:] = [*turn.stop_ids, *[-1] * (STOPS - len(turn.stop_ids))]

    def decode(self, steps: int | None = None) -> Drawn:
        """Dispatch a fused decode of at most `steps` tokens a row; the next may be dispatched before `read`.

        Raises:
            OutOfPages: the cache may be too small for the live rows; nothing was dispatched.
        """
        most = self.config.decode_steps
        steps = most if steps is None else steps
        if not 1 <= steps <= most:
            raise ValueError(f"{steps} steps were asked for; a dispatch has 1 to {most} (engine.decode_steps)")
        live = self._budget > 0
        rows = np.flatnonzero(live).tolist()
        reaches = self._max_lengths(steps)[live].tolist()
        self._take_pages(rows, self._length[live].tolist(), reaches, self._max_lengths()[live].tolist())
        farthest = max(reaches, default=1)
        width = bucket(self.pages.pages_for(farthest), self.sizes.reads)
        arguments = self._decode_arguments(steps, width, live)
        self._state, self._rows, ints, floats = self._run(self._programs.decode, *arguments)
        self._changes = np.zeros_like(self._changes)
        ints.copy_to_host_async()
        floats.copy_to_host_async()
        drawn = Drawn(ints, floats, live, steps)
        self._unread.append(drawn)
        return drawn

    def read(self, drawn: Drawn) -> Turns:
        """Wait for a dispatch's results, in the order of dispatch, and update the host's view of the rows."""
        self._check_thread()
        if not self._unread or self._unread[0] is not drawn:
            raise ValueError("results are read once each, in the order in which they were dispatched")
        self._unread.popleft()  # before the next line, which raises if the device has failed
        ints, floats = np.asarray(drawn.ints), np.asarray(drawn.floats)
        n = self.config.decode_steps
        tokens, real, length = ints[:, :n], ints[:, n : 2 * n], ints[:, 2 * n]
        counts = np.where(drawn.live, real.sum(1), 0)
        drew = counts > 0
        ended = drew & (length - self._length < counts)  # the last token of a turn is not written
        self._budget -= counts
        self._length[drew] = length[drew]
        for row in np.flatnonzero(ended).tolist():
            self._end_turn(row)
        reaches = self._max_lengths().tolist()
        for row in np.flatnonzero(drew).tolist():
            self.pages.truncate(row, reaches[row])
        return Turns(tokens, floats[:, :n], floats[:, n:], counts, ended)

    # --- helpers ---

    def _decode_arguments(self, steps: int, width: int, live: np.ndarray) -> tuple:
        """The arguments of a decode of rows of `width` pages; creates the dense copy if it is missing or too short."""
        slots = self.config.slots
        stale, count = np.zeros(slots, np.int32), 0
        if self.layouts.rows:
            self._fit_rows(width)
            which = np.flatnonzero(live & self._stale)
            count = len(which)
            stale[:count] = which
            self._stale[which] = False
        table = self.pages.table(range(slots), width)
        return (
            self._state,
            self._rows,
            self.weights,
            self._run_key,
            np.int32(steps),
            self._changes,
            table,
            stale,
            np.int32(count),
        )

    def _fit_rows(self, pages: int) -> None:
        """Create the dense copy again if its length is not that of rows of so many pages."""
        length = pages * self.sizes.page_size
        if self.layouts.rows and (self._rows is None or self._rows.length != length):
            self._rows = None  # frees its memory first
            with jax.set_mesh(self.mesh):
                self._rows = self._programs.init_rows(length)
            self._stale[:] = True

    def _max_lengths(self, more: int = 0) -> np.ndarray:
        """The most tokens that each row can hold after all dispatches in flight and `more` steps."""
        ahead = sum((drawn.steps * drawn.live for drawn in self._unread), start=np.full(self.config.slots, more))
        return self._length + np.maximum(np.minimum(ahead, self._budget - 1), 0)

    def _idle_length(self, row: int) -> int:
        """A row's length; raises if the row is drawing."""
        if self._budget[row]:
            raise ValueError(f"row {row} is drawing; wait for its turn to end, or truncate it")
        return int(self._length[row])

    def _end_turn(self, row: int) -> None:
        """End a row's turn and ignore the results in flight for it."""
        self._budget[row] = 0
        for drawn in self._unread:
            drawn.live[row] = False

    def _write(
        self, names: list[Hashable], starts: list[int], tokens: Sequence[Sequence[int]], slots: list[int]
    ) -> list[tuple[jax.Array, int]]:
        """Write tokens to rows of the page tables; returns each row's hidden states [b,D] and its index in them."""
        reaches = [start + len(ids) for start, ids in zip(starts, tokens, strict=True)]
        self._take_pages(names, starts, reaches, starts)
        found: list = [None] * len(names)
        for size, blocks in calls(self.sizes, [len(ids) for ids in tokens]):
            rows = self.sizes.rows[size]
            padded = np.zeros((rows, self.sizes.tokens[size]), np.int32)
            where = np.zeros((rows, 3), np.int32)
            where[:, 2] = self.config.slots  # no such row: dropped
            for place, (i, start, count) in enumerate(blocks):
                padded[place, :count] = tokens[i][start : start + count]
                is_last = start + count == len(tokens[i])
                where[place] = starts[i] + start, count, slots[i] if is_last else self.config.slots
            width = bucket(self.pages.pages_for(int((where[:, 0] + where[:, 1]).max())), self.sizes.reads)
            table = np.zeros((rows, width), np.int32)
            table[: len(blocks)] = self.pages.table([names[block.text] for block in blocks], width)
            arguments = self._state, self.weights, padded, where, table
            self._state, hidden = self._run(self._programs.extend[size], *arguments)
            at_once = self.sizes.at_once[size]
            self.written += int(where[:, 1].sum())
            self.places += -(-len(blocks) // at_once) * at_once * self.sizes.tokens[size]
            for place, block in enumerate(blocks):
                found[block.text] = hidden, place
        return found

    def _take_pages(
        self, names: Sequence[Hashable], starts: Sequence[int], reaches: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Give every row pages to write start .. reach; if the cache is too small, cut all back to `kept` and raise."""
        self._free_released()
        copies = []
        try:
            for name, start, reach in zip(names, starts, reaches, strict=True):
                copies += self.pages.ensure(name, start, reach)
        except OutOfPages:
            self._copy_pages(copies)  # these rows already have their own page instead of the shared one
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
            count = np.int32(len(part))
            self._state = self._run(self._programs.copy_pages, self._state, pages, count)

    def _free_released(self) -> None:
        """Free the pages of prefixes that are not used any more."""
        while self._released:
            self.pages.free(self._released.popleft())
