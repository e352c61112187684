"""One self-contained HTML page of a run, or of several side by side: results, learning curves and trajectories.

Everything that a run wrote is data here: the page is rendered with autoescaping, trajectories are blocks that its
script writes out as text, no other script may run, and nothing is loaded from anywhere.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from retool_jax.errors import UserError
from retool_jax.evaluation.results import rows_of
from retool_jax.fields import flatten_dict, split_words, whole_number
from retool_jax.files import check_result, replacing
from retool_jax.metrics import format_percent, format_seconds, format_value, summary_rows, summary_title, time_rows
from retool_jax.report.behaviour import BEHAVIOUR, ENDS, PURPOSES, draw_behaviour, draw_shares
from retool_jax.report.blocks import OUTCOMES, Blocks, make_blocks, to_block, visible
from retool_jax.report.curves import COLOURS, LIGHT, PANELS, draw_accuracy, draw_panel, setting_colours, to_svg
from retool_jax.report.runs import Run, by_setting, load_runs

USAGE = """\
Write one HTML page with a run's learning curves and its trajectories to read.

    python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE] [trajectories=N]

run=DIR         the folder of a run or an evaluation; give it again (or run=A,B) to draw several runs in one picture:
                runs that differ only in their seed become a mean with a band
out=FILE        the page to write; default DIR/report.html of the first run
trajectories=N  how many trajectories to put into the page; by default all, or as many as keep it below 20 MB

Pictures for documents are written beside the page: curves.png, and behaviour.png if the run has its numbers."""

# Student's t at 97.5 % for the mean of 2, 3, ... seeds; the last one is for all larger numbers.
T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
NORMAL_QUANTILE = 1.96


def end_counts(run: Run) -> dict | None:
    """Why trajectories ended: (count, share) of each reason at the first and last evaluation and in all training."""
    evaluations = run.evaluations(run.curve_split)
    columns = {f"{e['split']}, step {e['step']}": [e] for e in evaluations[:1] + evaluations[-1:]}
    columns["training, all steps"] = [record for record in run.records if record["kind"] == "rl"]
    counts = {title: count for title, records in columns.items() if (count := _sum_ends(records))}
    if not counts:
        return None
    reasons = [reason for reason, _ in sum(counts.values(), Counter()).most_common()]
    rows = [(reason, [(c[reason], c[reason] / c.total()) for c in counts.values()]) for reason in reasons]
    return {"run": run.label, "columns": list(counts), "rows": rows}


def _sum_ends(records: Iterable[dict]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for key, value in chain.from_iterable(record.items() for record in records):
        if key.startswith("end/") and value:
            counts[key.removeprefix("end/").replace("_", " ")] += round(value)
    return counts


# --- runs side by side ------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float, float] | None:
    """The mean over runs and its 95 % interval, as (mean, low, high); None if nothing was measured.

    For several seeds the interval is Student's t. For one run, or seeds with equal values, which show no spread, it is
    the mean ± 1.96 of a run's standard errors (`errors`, of which the largest counts). Its ends are NaN if it would
    have no width.
    """
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) > 1 and max(values) - min(values) > 1e-9:
        quantile = T_QUANTILES[min(len(values) - 2, len(T_QUANTILES) - 1)]
        half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    else:
        half = NORMAL_QUANTILE * max((error for error in errors if error), default=math.nan)
    return mean, mean - half, mean + half


def comparison(runs: Sequence[Run]) -> list[dict]:
    """A row for each setting with summaries: accuracy before and after RL, and the gain, with their intervals."""
    rows = []
    for setting, seeds in by_setting(runs).items():
        pairs = [(run.summary.get("before") or {}, run.summary.get("after") or {}) for run in seeds]
        pairs = [pair for pair in pairs if all(column.get("accuracy") is not None for column in pair)]
        if not pairs:
            continue
        accuracy = [[column["accuracy"] for column in columns] for columns in zip(*pairs, strict=True)]
        errors = [[column.get("accuracy_stderr") for column in columns] for columns in zip(*pairs, strict=True)]
        gains = [after - before for before, after in zip(*accuracy, strict=True)]
        both = [None if None in pair else math.hypot(*pair) for pair in zip(*errors, strict=True)]
        after = [pair[1] for pair in pairs]
        means = {
            name: _mean(column.get(name) for column in after)
            for name in ("greedy_accuracy", "tool_rate", "response_tokens")
        }
        rows.append(
            {"setting": setting, "seeds": len(pairs), "split": seeds[0].summary.get("split", ""), **means}
            | {"before": interval(accuracy[0], errors[0]), "after": interval(accuracy[1], errors[1])}
            | {"gain": interval(gains, both)}
        )
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def format_interval(estimate: tuple[float, float, float] | None, points: bool = False) -> str:
    """'97.7 % (95.8 to 99.5)', or with `points` '+53.5 (47.1 to 59.9)'."""
    if estimate is None:
        return "-"
    mean, low, high = (100 * value for value in estimate)
    if not points:
        low, high = max(low, 0.0), min(high, 100.0)
    shown = f"{mean:+.1f}" if points else f"{mean:.1f} %"
    return shown if math.isnan(estimate[1]) else f"{shown} ({low:.1f} to {high:.1f})"


def times_table(runs: Sequence[Run]) -> dict | None:
    """Time by part: a row for each part with (seconds, share of the run's time) for each run, longest part first."""
    columns = {run.label: {name: (s, share) for name, s, share in time_rows(run.summary)} for run in runs}
    columns = {label: times for label, times in columns.items() if times}
    if not columns:
        return None
    longest: Counter[str] = Counter()
    for times in columns.values():
        longest.update({name: share for name, (_, share) in times.items()})
    rows = [(name, [times.get(name) for times in columns.values()]) for name, _ in longest.most_common()]
    totals = [sum(seconds for seconds, _ in times.values()) for times in columns.values()]
    return {"columns": list(columns), "rows": rows, "totals": totals}


def result_tables(result: dict) -> tuple[list[tuple], list[tuple]]:
    """An evaluation's estimates in the form of `rows_of`, and its other numbers."""
    others = {key: result.get(key) for key in ("set", "samples", "dropped", "strict_differs", "trajectories")}
    flat = flatten_dict(others)
    other_rows = [(key, value) for key, value in flat.items() if isinstance(value, int | float | str)]
    return rows_of(result.get("numbers") or {}), other_rows


# --- the page ---------------------------------------------------------------------------------------------------------


def build_page(runs: Sequence[Run], accuracy: Figure | None, blocks: Blocks) -> str:
    """The whole report as HTML; `accuracy` is the main picture, if there is one."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible)
    environment.filters |= {
        "percent": format_percent,
        "seconds": format_seconds,
        "number": format_value,
        "interval": format_interval,
    }
    files = resources.files("retool_jax.report")
    template, style, script = (
        files.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.jinja", "page.css", "reader.js")
    )
    several, settings = len(runs) > 1, by_setting(runs)
    colours = {light: f"var(--{name})" for name, light in LIGHT.items()}
    index = blocks.index and {
        "runs": [visible(run.label) for run in runs] if several else [""],
        "outcomes": OUTCOMES,
        "starts": blocks.starts,
        "tables": blocks.table_of_run,
        "columns": blocks.index,
    }
    return environment.from_string(template).render(
        runs=runs,
        colours=COLOURS,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        settings={setting: colours[colour] for setting, colour in setting_colours(runs).items()},
        accuracy=accuracy and to_svg(accuracy, "accuracy"),
        panels=_svgs((panel.title, panel.caption, draw_panel(panel, runs)) for panel in PANELS),
        behaviour=_svgs(
            chain(
                ((panel.title, panel.caption, draw_panel(panel, runs)) for panel in BEHAVIOUR),
                _shares(settings, PURPOSES, "Purposes of code", "What programs are for, as shares of each step's."),
            )
        ),
        end_shares=_svgs(_shares(settings, ENDS, "Ends by step", "Why trajectories ended, as shares of each step's.")),
        ends=[table for run in runs if (table := end_counts(run))],
        comparison=comparison(runs) if several else [],
        times=times_table(runs),
        results=[(run.label, *result_tables(run.result)) for run in runs if run.result],
        evaluations=[(run.label, run.evaluations(run.curve_split)) for run in runs],
        blocks=blocks,
        index_block=index and to_block(index),
        token_block=index and to_block(blocks.tables),
        several=several,
        summary_rows=summary_rows,
        summary_title=summary_title,
    )


def _shares(settings: dict[str, list[Run]], prefix: str, title: str, caption: str) -> Iterable[tuple]:
    for setting, seeds in settings.items():
        yield title, f"{setting}. {caption}" if len(settings) > 1 else caption, draw_shares(seeds, prefix)


def _svgs(panels: Iterable[tuple[str, str, Figure | None]]) -> list[tuple[str, str, Markup]]:
    return [(title, caption, to_svg(figure, title + caption)) for title, caption, figure in panels if figure]


def write_report(folders: Sequence[Path], out: Path, trajectories: int | None = None) -> list[Path]:
    """Write the page, and beside it curves.png and behaviour.png if there is something to draw.

    `trajectories` is the most that are shown; None shows as many as keep the page below 20 MB. Returns the written
    files.
    """
    runs = load_runs(folders)
    accuracy = draw_accuracy(runs)
    page = build_page(runs, accuracy, make_blocks(runs, trajectories))
    pictures = {"curves.png": accuracy, "behaviour.png": draw_behaviour(runs)}
    written = [out]
    try:
        with replacing(out, errors="replace") as file:
            file.write(page)
        for name, picture in pictures.items():
            if picture:
                written.append(out.with_name(name))
                picture.savefig(written[-1], dpi=160, facecolor="white")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror}; choose another file with out="
        ) from error
    return written


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return
    pairs = split_words(words, ("run", "out", "trajectories"))
    names = [given for key, given in pairs if key == "run"]
    folders = [
        Path(name) for given in names for name in ([given] if Path(given).is_dir() else given.split(",")) if name
    ]
    if not folders:
        raise UserError("no run to report on; usage: python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE]")
    paths = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise UserError(f"run={twice[-1]} is given twice, and would count as two seeds; give each folder once")
    given = dict(pairs)
    limit = whole_number("trajectories", given["trajectories"]) if "trajectories" in given else None
    out = Path(given.get("out", folders[0] / "report.html"))
    check_result(out)
    for path in write_report(folders, out, limit):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
