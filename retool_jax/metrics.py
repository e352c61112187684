"""Output of a run's numbers: the metrics file, trackers, the progress line and the closing table.

`metrics.jsonl` holds one JSON object a line, `{"kind": "sft" | "rl" | "eval", "step": int, ...}`. Rates lie between 0
and 1, times are in seconds. Every key that depends on the wall clock begins with "perf/", so that two runs of one
config can be compared line by line without these keys.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as LiveBar
from rich.table import Table

from retool_jax.files import replacing
from retool_jax.shapes import FINITE, SINGLE, TEXT, WHOLE, OrNull, complaint, read_records
from retool_jax.trackers import SERVICES, TensorBoard, Tracker, known_names, open_service, report_failure

METRICS_FILE = "metrics.jsonl"
PLAIN_LINES_PER_PHASE = 15
# Numbers of a line that closing tables and pictures show. Other values may also be words.
_SHOWN = (
    *("accuracy", "accuracy_stderr", "greedy_accuracy", "response_tokens", "calls_per_sample", "entropy", "loss"),
    *("clip_fraction", "logprob_diff_mean", "logprob_diff_p99", "mismatch_k3", "tool_rate", "tool_success"),
)
_NUMBERS = {f"{name}?": OrNull(FINITE) for name in _SHOWN} | dict.fromkeys(
    ("perf/*", "end/*", "behaviour/*"), OrNull(FINITE)
)
_EVALUATION = {"split?": OrNull(TEXT), "trajectories?": OrNull(TEXT), **_NUMBERS, ...: SINGLE}
LINE = {"kind": TEXT, "step": WHOLE} | _EVALUATION
SUMMARY = {
    **{"before?": OrNull(_EVALUATION), "after?": OrNull(_EVALUATION)},
    **{"split?": OrNull(TEXT), "problems?": OrNull(WHOLE), "steps?": OrNull(WHOLE)},
    **{"tokens_per_s?": OrNull({...: OrNull(FINITE)}), "seconds?": OrNull({...: FINITE})},
}

# ------------------------------------------------------------------------------------------------ the metrics file


class MetricsLog:
    """Appends a run's numbers to `folder/metrics.jsonl`, and sends them to the trackers that `loggers` names.

    With `resume_step` the run goes on from the checkpoint of that step. Later lines are dropped, since their steps are
    taken again: the finished file has each step once, and services do not get these steps twice. With None the run is
    new, and what an earlier attempt left is dropped. All kinds share one step axis, so a log holds one phase of
    training. `config` is what services show of the run, without secrets. Without a folder, on hosts that are not the
    first, nothing is written.
    """

    def __init__(
        self,
        folder: Path | None,
        resume_step: int | None,
        loggers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, object] | None = None,
    ):
        self._file: TextIO | None = None
        self._board: TensorBoard | None = None
        self._services: dict[str, Tracker] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        last_kept = -1 if resume_step is None else resume_step
        services = [name for name in dict.fromkeys(loggers) if name in SERVICES]
        known = known_names(folder) if services else {}
        path = folder / METRICS_FILE
        self._sent: dict[str, set[tuple]] = {}  # by service, the lines that it got before this run was resumed
        if path.exists():
            records = read_metrics(folder) if known or resume_step is not None else []
            with replacing(path) as file:
                file.writelines(json.dumps(record) + "\n" for record in records if record["step"] <= last_kept)
            written = {_identity(record["kind"], record["step"], record) for record in records}
            self._sent = {name: written for name in known}
        self._file = path.open("a", encoding="utf-8")
        self._board = TensorBoard(folder, last_kept + 1) if "tensorboard" in loggers else None
        opened = {name: open_service(name, folder, config or {}) for name in services}
        self._services = {name: service for name, service in opened.items() if service}

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Write one line and its scalars, flushed to the disk before this returns, and send them to the services.

        Non-finite numbers become null. A service that fails gets no more numbers.
        """
        if self._file is None:
            return
        plain = {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **plain}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        # dev and test may be measured at the same step, so their scalars need different names.
        prefix = f"{kind}/{plain['split']}" if "split" in plain else kind
        scalars = {f"{prefix}/{key}": value for key, value in plain.items() if isinstance(value, int | float)}
        if self._board:
            self._board.write(step, scalars)
        for name, service in list(self._services.items()):
            if _identity(kind, step, plain) not in self._sent.get(name, ()):
                self._try(name, service.write, step, scalars)

    def _try(self, name: str, call: Callable[..., None], *arguments: object) -> None:
        """Call a service; if it fails, report that once and do not use it any more."""
        try:
            call(*arguments)
        except Exception as error:  # from another package: the network, its disk, its own bugs
            self._services.pop(name, None)
            report_failure(name, error)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        for name, service in list(self._services.items()):
            self._try(name, service.close)
        self._services = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _identity(kind: str, step: int, values: Mapping[str, object]) -> tuple:
    """The values that identify a line in its file."""
    return kind, step, values.get("split")


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run folder, oldest first. An incomplete last line, left by a kill, is skipped.

    Raises FileNotFoundError when there is no metrics file; UserError when a line before the last is not JSON, or when a
    line lacks kind or step or has something else in the place of a number that is shown.
    """
    lines = read_records(folder / METRICS_FILE, "record", lambda line: complaint(line, LINE))
    return [record for _, record in lines]


def _plain(value: object) -> object:
    """A value for strict JSON: numpy and JAX scalars as Python numbers, NaN and infinities as None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------------------------------------- the progress


class Progress:
    """Shows the progress of a phase: a live bar on a terminal, about fifteen lines in a log file, nothing if `quiet`.

    with Progress("RL", total=80, start=12) as bar:      # steps 1..12 were done before this process started
        bar.step(13, {"accuracy": 0.51, "tool rate": 0.9, "tokens/s": 21500.0})
        bar.say("step 13: dev accuracy 51.2 %")
    """

    def __init__(
        self, title: str, total: int, start: int = 0, console: Console | None = None, quiet: bool = False
    ) -> None:
        self._title, self._total, self._start = title, total, start
        self._console = console or Console(highlight=False, quiet=quiet)
        self._every = math.ceil(total / PLAIN_LINES_PER_PHASE)
        self._first: tuple[int, float] | None = None
        self._last = start  # the last step that was reported
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = LiveBar(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=18),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, status="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, values: Mapping[str, float | str | None]) -> None:
        """Report that the steps up to `step` of `total` are done, with the numbers to show beside it."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        left = seconds_left(self._first, (step, now), self._total)
        status = "  ".join(f"{name} {format_value(value)}" for name, value in values.items())
        if left is not None:
            status += f"  {format_seconds(left)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        elif step // self._every > self._last // self._every or step == self._total:
            self.say(f"{self._title} {step}/{self._total}  {status}")
        self._last = step

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def seconds_left(first: tuple[int, float], last: tuple[int, float], total: int) -> float | None:
    """Remaining time, from (step, seconds) of the first and the last finished step; None if only one is finished.

    The rate is measured from the end of the first step, since that one includes compilation.
    """
    steps = last[0] - first[0]
    if steps <= 0 or last[0] >= total:
        return None
    return (last[1] - first[1]) / steps * (total - last[0])


# --------------------------------------------------------------------------------------------- numbers for people


def format_value(value: float | str | None) -> str:
    """Three decimals below 10 (losses, rates), one below 100, thousands separators above (tokens/s), words as is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def format_percent(share: float | None, stderr: float | None = None) -> str:
    """0.461 as '46.1 %', with a standard error '46.1 ± 3.1 %'."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if stderr is None else f"{100 * share:.1f} ± {100 * stderr:.1f} %"


def format_seconds(seconds: float) -> str:
    """75 as '1:15', 3700 as '1:01:40'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary_rows(summary: Mapping) -> list[tuple[str, str, str]]:
    """(name, before RL, after RL) of each number of a run's summary as text; a dash if it was not measured."""
    columns = [summary.get("before") or {}, summary.get("after") or {}]

    def row(name: str, show) -> tuple[str, str, str]:
        return name, show(columns[0]), show(columns[1])

    return [
        row("accuracy, sampled at T=1", lambda c: format_percent(c.get("accuracy"), c.get("accuracy_stderr"))),
        row("accuracy, greedy", lambda c: format_percent(c.get("greedy_accuracy"))),
        row("tool-call rate", lambda c: format_percent(c.get("tool_rate"))),
        row("tool success", lambda c: format_percent(c.get("tool_success"))),
        row("response tokens", lambda c: _one_decimal(c.get("response_tokens"))),
    ]


def time_rows(summary: Mapping) -> list[tuple[str, float, float]]:
    """(part, seconds, share of the total) of a run's time, longest part first."""
    parts = {name: seconds for name, seconds in (summary.get("seconds") or {}).items() if name != "total"}
    total = (summary.get("seconds") or {}).get("total") or sum(parts.values())
    longest_first = sorted(parts.items(), key=lambda item: -item[1])
    return [(name, seconds, seconds / total) for name, seconds in longest_first if seconds > 0]


def summary_title(summary: Mapping) -> str:
    """The title of the summary's table: which problems the columns were measured on."""
    problems = f"{summary['problems']:,} " if summary.get("problems") else ""
    return (
        f"{problems}{summary.get('split', 'held-out')} problems, before and after {summary.get('steps', '?')} RL steps"
    )


def print_summary(summary: Mapping, console: Console | None = None) -> None:
    """Print the closing table (held-out problems before and after RL), the speeds and the time by part."""
    console = console or Console(highlight=False)
    console.print()
    print_table(console, summary_title(summary), ("before RL", "after RL"), summary_rows(summary))
    if speeds := summary.get("tokens_per_s"):
        console.print("tokens/s   " + "   ".join(f"{name} {format_value(rate)}" for name, rate in speeds.items()))
    rows = [(name, format_seconds(s), f"{100 * share:.0f} %") for name, s, share in time_rows(summary)]
    if rows and (total := summary["seconds"].get("total")):
        rows.append(("total", format_seconds(total), ""))
    if rows:
        print_table(console, "time by part", ("time", "share"), rows)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of rows. The first entry of a row is its name; `columns` are the headers of the others."""
    table = Table("", title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _one_decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
