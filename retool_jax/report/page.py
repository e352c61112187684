"""One self-contained HTML page of a run, or of several side by side: the outcome, the learning curves, the
trajectories to read.

Everything a run wrote is data here: the page is rendered with autoescaping on, and it loads nothing from anywhere.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import chain
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from retool_jax.errors import UserError
from retool_jax.fields import split_words
from retool_jax.files import replacing
from retool_jax.metrics import format_percent, format_seconds, format_value, summary_rows, summary_title, time_rows
from retool_jax.report.curves import COLOURS, LIGHT, PANELS, draw_accuracy, draw_panel, setting_colours, to_svg
from retool_jax.report.runs import Run, load_runs
from retool_jax.report.trajectories import trajectory_views

USAGE = """\
Write one HTML page with a run's learning curves and its trajectories to read.

    python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE]

run=DIR    a run folder; give it again (or run=A,B) to draw several runs in one picture
out=FILE   the page to write; default DIR/report.html of the first run

The main picture is also written beside the page as curves.png, for a README."""

# What a page may not hold, what ends a line in some readers, and what turns the direction of the text around it.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def end_counts(run: Run) -> dict | None:
    """Why trajectories ended: (count, share) of each reason at the first and last evaluation and over all training."""
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


def mark_boxed(text: str) -> Markup:
    """Escape a text and set its \\boxed{...} apart."""
    return Markup(re.sub(r"\\boxed\{[^{}]*\}", lambda match: f"<mark>{match[0]}</mark>", str(escape(text))))


def visible(value: object) -> object:
    """A value as the page shows it: in texts, characters that nobody could see become escapes like `\\u202e`."""
    if not isinstance(value, str):
        return value
    return type(value)(UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value))  # markup stays markup


def build_page(runs: Sequence[Run], accuracy: Figure | None) -> str:
    """The whole report as HTML, with the main picture if there is one."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible)
    environment.filters |= {
        "percent": format_percent,
        "seconds": format_seconds,
        "number": format_value,
        "mark_boxed": mark_boxed,
    }
    template = resources.files("retool_jax.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    panels = [(panel, draw_panel(panel, runs)) for panel in PANELS]
    colours = {light: f"var(--{name})" for name, light in LIGHT.items()}
    return environment.from_string(template).render(
        runs=runs,
        colours=COLOURS,
        settings={setting: colours[colour] for setting, colour in setting_colours(runs).items()},
        accuracy=accuracy and to_svg(accuracy, "accuracy"),
        panels=[(panel, to_svg(figure, panel.title)) for panel, figure in panels if figure],
        ends=[table for run in runs if (table := end_counts(run))],
        evaluations=[(run.label, run.evaluations(run.curve_split)) for run in runs],
        trajectories=trajectory_views(runs),
        several=len(runs) > 1,
        summary_rows=summary_rows,
        summary_title=summary_title,
        time_rows=time_rows,
    )


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write the page, and beside it curves.png where something was evaluated. Returns what was written."""
    runs = load_runs(folders)
    picture, written = draw_accuracy(runs), [out]
    page = build_page(runs, picture)
    try:
        with replacing(out, errors="replace") as file:
            file.write(page)
        if picture:
            written.append(out.with_name("curves.png"))
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
    pairs = split_words(words, ("run", "out"))
    folders = [Path(name) for key, names in pairs if key == "run" for name in names.split(",") if name]
    if not folders:
        raise UserError("no run to report on; usage: python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE]")
    out = dict(pairs).get("out", folders[0] / "report.html")
    for path in write_report(folders, Path(out)):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
