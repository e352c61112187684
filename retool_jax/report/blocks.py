r"""The trajectories inside a page: an index of all that it shows, and their details in blocks that are opened singly.

A block is compressed JSON in base64, so no text of a model can become markup: the page's script decodes it and writes
it as text. Invisible characters in it are escapes like `\u202e` (`visible`).
"""

import base64
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from retool_jax.errors import UserError
from retool_jax.metrics import Progress
from retool_jax.report.runs import Run
from retool_jax.report.trajectories import (
    Source,
    choose_trajectories,
    outcome,
    read_records,
    readable_parts,
    share_out,
    sources_of,
)
from retool_jax.shapes import map_leaves
from retool_jax.tokens.qwen import byte_alphabet
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer

# Characters that a page must not contain, that end a line in some readers, or that change the direction of text.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
PAGE_BYTES = 18_000_000  # of blocks, so that a page stays below 20 MB
EXPECTED_SHARE = 0.9  # of PAGE_BYTES, since a selection by the size of a few trajectories may turn out larger
BLOCK_CHARACTERS = 400_000  # before compression; such a block opens in some milliseconds
LONG_READING = 50_000_000  # bytes of files above which progress is shown
PROBLEM_CHARACTERS = 160  # of a problem in the list
LOGPROB_SCALE = 64
OUTCOMES = ("right", "wrong", "dropped")


@dataclass
class Blocks:
    """The trajectories of a page. `total` is the number that the runs have, of which the page shows some or all."""

    total: int
    index: dict[str, list] = field(default_factory=dict)  # columns of the list, one value for each shown trajectory
    details: list[str] = field(default_factory=list)  # blocks
    starts: list[int] = field(default_factory=list)  # number of the first trajectory of each block of details
    tables: list[dict[int, str] | str] = field(default_factory=list)  # id -> text by tokenizer, or why it is missing
    table_of_run: list[int] = field(default_factory=list)  # index in `tables`

    @property
    def shown(self) -> int:
        return len(self.index.get("id", ()))


def visible(value: object) -> object:
    """A value as the page shows it: invisible characters in a text become escapes like `\\u202e`."""
    if not isinstance(value, str):
        return value
    return type(value)(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value))  # markup stays markup


def to_block(value: object) -> str:
    """Any JSON value as zlib-compressed base64 text."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def clean(value: object) -> object:
    """A JSON value with `visible` texts, and None for numbers that JSON does not have."""
    return map_leaves(lambda x: None if isinstance(x, float) and not math.isfinite(x) else visible(x), value)


def run_lengths(flags: Sequence[int]) -> list[int]:
    """Lengths of the alternating runs of 0 and 1, beginning with 0."""
    edges = np.flatnonzero(np.diff([0, *map(bool, flags)])) if len(flags) else np.zeros(0, int)
    return np.diff([0, *edges, len(flags)]).tolist()


def logprob_codes(logprobs: Sequence[float]) -> list[int]:
    """Log-probabilities as one byte each, to about 3 %: 64 sqrt(-logprob); 255 for -15.8 and below, and for NaN."""
    roots = np.sqrt(np.maximum(-np.asarray(logprobs, float), 0))
    return np.nan_to_num(np.rint(LOGPROB_SCALE * roots), nan=255).clip(0, 255).astype(int).tolist()


def detail(record: dict, with_texts: bool) -> dict:
    """What the page shows of an opened trajectory; with the texts of its segments if the tokens have no texts."""
    names = ("answer", "verdict", "reward", "reward_terms", "fault", "forced", "turns", "prompt_tokens")
    timings = record.get("timings") or {}
    logprobs = [p for p, sampled in zip(record["logprobs"], record["sampled"], strict=True) if sampled]
    segments = [[s["role"], s["start"], s["stop"]] + [s["text"]] * with_texts for s in record["segments"]]
    return clean(
        {name: record.get(name) for name in names}
        | {
            "problem": record["problem"],
            "truth": record["ground_truth"],
            "parts": [[part.kind, part.text, part.note, part.failed] for part in readable_parts(record)],
            "calls": [[c.get(name) for name in ("turn", "status", "queue_s", "wall_s")] for c in record["tool_calls"]],
            "times": [timings.get("started_s"), timings.get("finished_s")],
            "segments": segments,
        }
    ) | {"ids": record["ids"], "mask": run_lengths(record["sampled"]), "logprobs": logprob_codes(logprobs)}


def row(run: int, record: dict, greedy: bool) -> dict:
    """What the list shows and filters by; `surprise` is the mean of -log-prob over sampled tokens."""
    logprobs = [p for p, sampled in zip(record["logprobs"], record["sampled"], strict=True) if sampled]
    calls = record["tool_calls"]
    return clean(
        {
            "run": run,
            "split": f"{record.get('split') or 'samples'}{', greedy' if greedy else ''}",
            "step": record.get("step"),
            "id": str(record["id"]),
            "problem": " ".join(str(record["problem"])[: 4 * PROBLEM_CHARACTERS].split())[:PROBLEM_CHARACTERS],
            "outcome": OUTCOMES.index(outcome(record)),
            "end": record["end"].replace("_", " "),
            "tokens": record["response_tokens"],
            "calls": len(calls),
            "errors": sum(call.get("status") != "success" for call in calls),
            "surprise": round(-float(np.mean(logprobs)), 4) if logprobs else 0.0,
        }
    )


def make_blocks(runs: Sequence[Run], limit: int | None = None) -> Blocks:
    """The trajectories of runs for a page: `limit` of them, or by default as many as keep the page below 20 MB."""
    sources = sources_of(runs)
    names = [str(run.config.get("tokenizer") or "") for run in runs]
    loaded = {name: _load(name) for name in names} if sources else {}
    tokenizers = [loaded[name] for name in names] if sources else []
    # Saved rollouts have no texts, so they cannot be shown without a tokenizer.
    sources = [s for s in sources if s.step is None or not isinstance(tokenizers[s.run], str)]
    blocks = Blocks(total=sum(source.count for source in sources))
    places = share_out(sources, blocks.total if limit is None else limit)
    if limit is None:
        places = share_out(sources, _fitting(sources, tokenizers))
    rows, ids = [], {name: set() for name in names}
    with ExitStack() as stack:
        long = sum(source.path.stat().st_size for source in sources) > LONG_READING
        bar = stack.enter_context(Progress("reading trajectories", len(sources))) if long else None
        size = 0
        for number, (source, count) in enumerate(zip(sources, places, strict=True), start=1):
            if not count:
                continue
            tokenizer = tokenizers[source.run]
            with_texts = isinstance(tokenizer, str)
            chosen = read_records(source, tokenizer)
            chosen = choose_trajectories(chosen, count) if count < source.count else chosen
            for batch in _batches(_details(source, chosen, with_texts)):
                block = to_block([shown for _, shown in batch])
                size += len(block)
                if limit is None and size > PAGE_BYTES:
                    break
                blocks.starts.append(len(rows))
                blocks.details.append(block)
                for listed, shown in batch:
                    rows.append(listed)
                    ids[names[source.run]].update(shown["ids"])
            if bar:
                bar.step(number, {"shown": f"{len(rows):,}"})
    blocks.index = {name: [one[name] for one in rows] for name in rows[0]} if rows else {}
    blocks.tables = [one if isinstance(one, str) else token_texts(one, ids[name]) for name, one in loaded.items()]
    blocks.table_of_run = [list(loaded).index(name) for name in names if loaded]
    return blocks


def _fitting(sources: Sequence[Source], tokenizers: Sequence[Tokenizer | str]) -> int:
    """About how many trajectories fit into a page, from the size of some in the first, the middle and the last file."""
    shown = []
    for source in {s.path: s for s in (sources[:1] + sources[len(sources) // 2 :][:1] + sources[-1:])}.values():
        tokenizer = tokenizers[source.run]
        some = islice(read_records(source, tokenizer), 20)
        shown += [shown for _, shown in _details(source, some, isinstance(tokenizer, str))]
    return int(EXPECTED_SHARE * PAGE_BYTES * len(shown) / len(to_block(shown))) if shown else 0


def _details(source: Source, records: Iterable[dict], with_texts: bool) -> Iterator[tuple[dict, dict]]:
    """The `row` and the `detail` of each record."""
    for record in records:
        yield row(source.run, record, source.greedy), detail(record, with_texts)


def _batches(details: Iterable[tuple[dict, dict]]) -> Iterator[list[tuple[dict, dict]]]:
    """Groups of trajectories; each fills one block."""
    batch, size = [], 0
    for listed, shown in details:
        batch.append((listed, shown))
        size += 5 * len(shown["ids"]) + sum(len(part[1]) for part in shown["parts"])
        if size > BLOCK_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- tokens -----------------------------------------------------------------------------------------------------------


def _load(name: str) -> Tokenizer | str:
    """A run's tokenizer, or the reason why it is missing."""
    if not name:
        return "its config names no tokenizer"
    try:
        return load_tokenizer(name)
    except UserError as error:
        return str(error)


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    r"""The text of each single id; bytes that are not a whole character are escapes like `\xe2`."""
    letters = str.maketrans({letter: chr(byte) for byte, letter in byte_alphabet().items()})
    added = {number: text for text, number in tokenizer.control_tokens.items()}
    texts = {}
    for number in sorted(ids):
        piece = tokenizer.hf.backend_tokenizer.id_to_token(number) if 0 <= number < len(tokenizer) else None
        try:
            text = (piece or "").translate(letters).encode("latin-1").decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # the vocabulary is not byte-level
            text = piece
        texts[number] = visible(added.get(number, text if piece is not None else f"[{number}]"))
    return texts
