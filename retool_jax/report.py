"""One self-contained HTML page of a run, or of several side by side: the outcome, the learning curves, the
trajectories to read.

Everything a run wrote is data here: the page is rendered with autoescaping on, and it loads nothing from anywhere.
"""

import difflib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from textwrap import fill

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from omegaconf import OmegaConf

from retool_jax.errors import UserError, run_command
from retool_jax.metrics import (
    METRICS_FILE,
    format_percent,
    format_seconds,
    format_value,
    read_metrics,
    summary_rows,
    summary_title,
    time_rows,
)

USAGE = """\
Write one HTML page with a run's learning curves and its trajectories to read.

    python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE]

run=DIR    a run folder; give it again (or run=A,B) to draw several runs in one picture
out=FILE   the page to write; default DIR/report.html of the first run

The main picture is also written beside the page as curves.png, for a README."""

# The page shows at most so many trajectories of an evaluation, and about so many characters in all, so that it opens
# quickly whatever the size of the run; the run folder has every trajectory in full.
TRAJECTORIES_PER_EVALUATION = 60
TRAJECTORY_CHARACTERS = 900_000
SURPRISE_TOKENS = 300

# Name -> (on light, on dark). Figures are drawn in the light colours; in the page each becomes a CSS variable.
# The series colours follow Okabe and Ito, who chose them to differ for every kind of colour vision.
COLOURS = {
    "ink": ("#1b2430", "#e7ebf0"),
    "muted": ("#5c6675", "#98a3b3"),
    "rule": ("#dde2e8", "#2c3541"),
    "series0": ("#0072b2", "#58b6ec"),
    "series1": ("#d05a00", "#ff9d5c"),
    "series2": ("#00855f", "#35c79b"),
    "series3": ("#b0508a", "#e595c6"),
    "series4": ("#7d6608", "#e0c341"),
    "series5": ("#5b4fc4", "#a9a2f5"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SERIES = [light for name, light in LIGHT.items() if name.startswith("series")]
TICK_STEPS = (1, 2, 5, 10)
READABLE = {"tools=none": "text only (tools=none)", "tools=python": "with tool (tools=python)"}


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `label` tells the run from its neighbours, `setting` is the label without the seed."""

    folder: Path
    records: list[dict]
    summary: dict
    finished: bool
    label: str
    setting: str

    def series(self, kind: str, key: str, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one number, where it was measured."""
        points = [
            (record["step"], record[key])
            for record in self.records
            if record["kind"] == kind and record.get(key) is not None and split in (None, record.get("split"))
        ]
        steps, values = np.array(points, float).reshape(-1, 2).T
        return steps, values

    def evaluations(self, split: str) -> list[dict]:
        found = [record for record in self.records if record["kind"] == "eval" and record.get("split") == split]
        return sorted(found, key=lambda record: record["step"])

    @property
    def curve_split(self) -> str:
        """The split with the longest curve: dev, but for a run that evaluated on test alone."""
        return max(("dev", "test"), key=lambda split: len(self.evaluations(split)))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Raises UserError for one that is missing or has no metrics yet."""
    configs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"run folder {folder} does not exist; `python -m retool_jax.train config=grpo` makes one")
        path = folder / "config.yaml"
        configs.append(OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {})
    names = [folder.resolve().name for folder in folders]
    labels = config_labels(configs, names)
    settings = config_labels([{**config, "seed": None} for config in configs], [""] * len(names))
    return [_load_run(*arguments) for arguments in zip(folders, labels, settings, strict=True)]


def _load_run(folder: Path, label: str, setting: str) -> Run:
    path = folder / METRICS_FILE
    records = read_metrics(folder) if path.exists() else []
    if not records:
        state = "is empty" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}; start or resume the run with `python -m retool_jax.train config=grpo`")
    summary_path = folder / "summary.json"
    finished = summary_path.exists()
    summary = json.loads(summary_path.read_text(encoding="utf-8")) if finished else summary_so_far(records)
    return Run(folder, records, summary, finished, label, setting)


def summary_so_far(records: Iterable[dict]) -> dict:
    """The before and after columns of a run that has no summary yet: its first and its latest evaluation."""
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not evaluations:
        return {}
    split = evaluations[0].get("split")
    same = sorted((e for e in evaluations if e.get("split") == split), key=lambda e: e["step"])
    return {"before": same[0], "after": same[-1] if len(same) > 1 else {}, "split": split, "steps": same[-1]["step"]}


def config_labels(configs: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Tell runs apart by what differs in their configs: 'tools=none', 'rl.clip_high=0.2, seed 1'.

    A key that splits the runs just as an earlier one does adds nothing and is left out, and so are paths. Runs whose
    configs agree go by the names of their folders.
    """
    flat = [_flatten(config) for config in configs]
    keys = sorted({key for config in flat for key in config}, key=lambda key: (key == "seed", key != "tools", key))
    chosen, splits = [], set()
    for key in keys:
        values = [str(config.get(key)) for config in flat]
        split = tuple(values.index(value) for value in values)
        if (
            len(set(values)) > 1
            and not any("/" in value for value in values)
            and (split not in splits or key == "seed")
        ):
            chosen.append(key)
            splits.add(split)
    shown = [key for key in chosen if key != "seed"][:3] + [key for key in chosen if key == "seed"]
    labels = [", ".join(_setting(key, config.get(key)) for key in shown) for config in flat]
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    return [" · ".join(filter(None, pair)) for pair in zip(labels, names, strict=True)]


def _setting(key: str, value: object) -> str:
    words = f"seed {value}" if key == "seed" else f"{key}={value}"
    return READABLE.get(words, words)


def _flatten(config: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ----------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True)
class Panel:
    """A small figure of the number `key` of metrics lines of one kind."""

    title: str
    caption: str
    kind: str
    key: str
    percent: bool = False
    logarithmic: bool = False


PANELS = (
    Panel("Tool-call rate", "Share of trajectories with at least one call.", "rl", "tool_rate", percent=True),
    Panel("Tool success", "Share of calls that ran without an error.", "rl", "tool_success", percent=True),
    Panel("Accuracy in training", "Share of rollouts with the right answer.", "rl", "accuracy", percent=True),
    Panel("Response tokens", "Mean length of a trajectory after its prompt.", "rl", "response_tokens"),
    Panel("Entropy", "Nats per sampled token. Near zero, nothing is explored any more.", "rl", "entropy"),
    Panel("Clip fraction", "Share of sampled tokens whose ratio the loss clipped.", "rl", "clip_fraction"),
    Panel(
        "Engine against trainer",
        "Absolute log-prob difference per sampled token, mean.",
        "rl",
        "logprob_diff_mean",
        logarithmic=True,
    ),
    Panel("Speed", "Tokens per second at each step.", "rl", "perf/tokens_per_s"),
    Panel("Cold-start loss", "Cross-entropy in nats per trained token, by cold-start step.", "sft", "loss"),
)


def setting_colours(runs: Sequence[Run]) -> dict[str, str]:
    """One colour for each setting; runs that differ in their seed alone share it."""
    settings = dict.fromkeys(run.setting for run in runs)
    return {setting: SERIES[index % len(SERIES)] for index, setting in enumerate(settings)}


def draw_accuracy(runs: Sequence[Run]) -> Figure | None:
    """The main picture: accuracy against RL step, labelled at the curves' ends. None when nothing was evaluated."""
    curves = [(run, *run.series("eval", "accuracy", run.curve_split)) for run in runs]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    figure, axes = _new_figure(9.0, 4.5, left=0.065, right=0.76 if len(runs) > 1 else 0.84, top=0.83, bottom=0.13)
    colours, ends = setting_colours(runs), {}
    for run, steps, accuracy in curves:
        colour = colours[run.setting]
        error_steps, error = run.series("eval", "accuracy_stderr", run.curve_split)
        if np.array_equal(error_steps, steps):
            axes.fill_between(steps, accuracy - error, accuracy + error, color=colour, alpha=0.16, linewidth=0)
        axes.plot(*run.series("eval", "greedy_accuracy", run.curve_split), color=colour, linewidth=1.1, dashes=(4, 2.5))
        alone = [other.setting for other in runs].count(run.setting) == 1
        style = {"linewidth": 2.2, "marker": "o", "markersize": 3.5} if alone else {"linewidth": 1.6}
        axes.plot(steps, accuracy, color=colour, clip_on=False, **style)
        ends.setdefault(run.setting, []).append(accuracy[-1])
    last_step = max(steps[-1] for _, steps, _ in curves)
    axes.set(xlim=(0, max(last_step, 1)), xlabel="RL step (0: after the cold start)")
    axes.margins(x=0)
    _percent_axis(axes)
    labels = {setting: _end_label([run for run in runs if run.setting == setting], setting) for setting in ends}
    heights = _spread([float(np.mean(ends[setting])) for setting in labels], gap=0.16)
    for (setting, (name, note)), height in zip(labels.items(), heights, strict=True):
        place = {"xy": (1, height), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, xytext=(10, 1), va="bottom", color=colours[setting], weight="bold", **place)
        axes.annotate(note, xytext=(10, -1), va="top", color=LIGHT["muted"], fontsize=9, **place)
    splits = " and ".join(sorted({run.curve_split for run, _, _ in curves}))
    figure.text(0.012, 0.94, "Accuracy while RL trains", color=LIGHT["ink"], fontsize=14, weight="bold")
    explanation = f"{splits} problems; line: sampled at T=1, band: ± 1 standard error; dashed: greedy"
    figure.text(0.012, 0.885, explanation, color=LIGHT["muted"], fontsize=9.5)
    return figure


def _end_label(runs: Sequence[Run], setting: str) -> tuple[str, str]:
    """The name of a curve, and below it the runs' outcome on the split of their summaries."""
    name = fill(setting, 24) if setting else "sampled at T=1"
    seeds = f"{len(runs)} seeds\n" if len(runs) > 1 else ""
    before, after = (
        [(run.summary.get(column) or {}).get("accuracy") for run in runs] for column in ("before", "after")
    )
    if None in before or None in after:
        return name, seeds.strip()
    outcome = f"{100 * np.mean(before):.0f} → {100 * np.mean(after):.0f} %"
    return name, f"{seeds}{runs[0].summary.get('split', '')} {outcome}"


def draw_panel(panel: Panel, runs: Sequence[Run]) -> Figure | None:
    """One small figure; None when no run measured its numbers."""
    lines = [(run, *run.series(panel.kind, panel.key)) for run in runs]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return None
    figure, axes = _new_figure(3.9, 2.1, left=0.13, right=0.97, top=0.95, bottom=0.14)
    colours = setting_colours(runs)
    for run, steps, values in lines:
        # Above the axes, whose frame would hide a rate that is zero throughout.
        style = {"color": colours[run.setting], "zorder": 3, "clip_on": False}
        axes.plot(steps, values, linewidth=0.8, alpha=0.3, **style)
        axes.plot(steps, running_mean(values, max(1, len(values) // 16)), linewidth=1.8, **style)
    axes.set_xlim(0, max(max(steps) for _, steps, _ in lines))
    if panel.percent:
        _percent_axis(axes)
    elif panel.logarithmic and all((values > 0).all() for *_, values in lines):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    return figure


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of `width` points, which shrinks at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _new_figure(width: float, height: float, **margins: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    figure.subplots_adjust(**margins)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(which="both", colors=LIGHT["muted"], length=0, labelsize=9)
    axes.tick_params(axis="x", pad=6)
    axes.xaxis.label.set_color(LIGHT["muted"])
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
    return figure, axes


def _percent_axis(axes: Axes) -> None:
    axes.set(ylim=(0, 1.02), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights in [0, 1] apart, so that neighbours are `gap` from each other, as little as an upward pass can."""
    placed, floor = [0.0] * len(heights), gap / 2
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        placed[index] = max(heights[index], floor)
        floor = placed[index] + gap
    excess = max(0.0, max(placed) - (1 - gap / 4))
    return [height - excess for height in placed]


def to_svg(figure: Figure, salt: str) -> Markup:
    """The figure for use inside the page: no size, ids or addresses of its own, colours and font from the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, light in LIGHT.items():
        svg = svg.replace(light, f"var(--{name})")
    return Markup(svg)


# ------------------------------------------------------------------------------------------------- the trajectories

RESPONSE = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>(?=\s*(?:<\|im_end\|>|<tool_response>|$))", re.DOTALL)
# What a page may not hold, what ends a line in some readers, and what turns the direction of the text around it.
UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
CONTROL = re.compile(r"<\|im_start\|>assistant\n?|<\|im_(?:start|end)\|>|<\|endoftext\|>")


@dataclass(frozen=True)
class Part:
    """A piece of a trajectory as a reader wants it: `kind` is reasoning, code or output."""

    kind: str
    text: str
    note: str = ""
    failed: bool = False


def readable_parts(trajectory: dict) -> list[Part]:
    """Take a trajectory apart into reasoning, the code of its calls, and what the tool answered."""
    parts, calls = [], iter(trajectory["tool_calls"])
    for segment in trajectory["segments"]:
        if segment["role"] == "policy":
            for piece, is_call in _split_calls(segment["text"]):
                text = CONTROL.sub("", piece).strip("\n")
                if text.strip():
                    parts.append(_code(text.strip()) if is_call else Part("reasoning", text))
        elif segment["role"] == "tool":
            outputs = RESPONSE.findall(segment["text"]) or [CONTROL.sub("", segment["text"])]
            parts += [_output(text, next(calls, {})) for text in outputs]
    return parts


def _split_calls(text: str) -> Iterator[tuple[str, bool]]:
    """A turn's pieces in order, and whether each is what stands in a call; an opening without an end is none."""
    said, *pieces = text.split("<tool_call>")
    for piece in pieces:
        call, closed, after = piece.partition("</tool_call>")
        if closed:
            yield said, False
            yield call, True
            said = after
        else:
            said += f"<tool_call>{piece}"
    yield said, False


def _code(call: str) -> Part:
    try:
        return Part("code", str(json.loads(call, strict=False)["arguments"]["code"]))
    except (ValueError, KeyError, TypeError, RecursionError):  # as grammar.py: too long a number, too deep a nesting
        return Part("code", call, note="not a well-formed call", failed=True)


def _output(text: str, call: dict) -> Part:
    status = call.get("status", "")
    took = f" · {1000 * call['wall_s']:.0f} ms" if call.get("wall_s") is not None else ""
    return Part("output", text, note=status.replace("_", " ") + took, failed=status not in ("", "success"))


def shown_evaluations(run: Run) -> list[dict]:
    """The first and the last evaluation of the split that was followed longest, where their trajectories exist."""
    found = []
    for split in ("test", "dev"):
        kept = [e for e in run.evaluations(split) if (run.folder / (e.get("trajectories") or "-")).is_file()]
        found.append(kept[:1] + kept[1:][-1:])
    return max(found, key=lambda pair: pair[-1]["step"] - pair[0]["step"] if pair else -1)


def choose_trajectories(path: Path, limit: int) -> list[dict]:
    """Up to `limit` trajectories of a file, the first right ones and the first wrong ones, half and half if it can."""
    kept: dict[bool, list] = {True: [], False: []}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                trajectory = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}); remove that line") from error
            same = kept[bool(trajectory["correct"])]
            if len(same) < limit:
                same.append((number, trajectory))
    right, wrong = kept[True], kept[False]
    wrongs = min(len(wrong), max(limit - limit // 2, limit - len(right)))
    chosen = sorted(chain(wrong[:wrongs], islice(right, limit - wrongs)), key=lambda item: item[0])
    return [trajectory for _, trajectory in chosen]


def trajectory_views(runs: Sequence[Run]) -> list[dict]:
    """What the template shows of each chosen trajectory, long texts cut in the middle."""
    sources = [(run, evaluation) for run in runs for evaluation in shown_evaluations(run)]
    limit = min(TRAJECTORIES_PER_EVALUATION, 6 * TRAJECTORIES_PER_EVALUATION // max(1, len(sources)))
    chosen = []
    for run, evaluation in sources:
        path = run.folder / evaluation["trajectories"]
        chosen += [(run, evaluation, trajectory) for trajectory in choose_trajectories(path, limit)]
    return [_view(*source, characters=TRAJECTORY_CHARACTERS // len(chosen)) for source in chosen]


def _view(run: Run, evaluation: dict, trajectory: dict, characters: int) -> dict:
    parts = readable_parts(trajectory)
    share = characters // max(1, len(parts))
    logprobs = [p for p, sampled in zip(trajectory["logprobs"], trajectory["sampled"], strict=True) if sampled]
    return {
        **{key: trajectory[key] for key in ("id", "problem", "ground_truth", "answer", "correct", "reward", "turns")},
        "end": trajectory["end"].replace("_", " "),
        "tokens": trajectory["response_tokens"],
        "run": run.label,
        "evaluation": f"{evaluation['split']}, step {evaluation['step']}",
        "calls": len(trajectory["tool_calls"]),
        "parts": [Part(part.kind, cut(part.text, share), part.note, part.failed) for part in parts],
        "raw": [(s["role"], cut(s["text"], characters // len(trajectory["segments"]))) for s in trajectory["segments"]],
        "surprise": surprise_path(logprobs[:SURPRISE_TOKENS]),
        "surprise_width": 6 * min(len(logprobs), SURPRISE_TOKENS),
    }


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and end with a note of what is missing between them."""
    limit = max(limit, 200)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def surprise_path(logprobs: Sequence[float]) -> str:
    """An SVG path with a bar for each sampled token, 6 units apart and 16 high for a nat of -log-prob, at most 40."""
    heights = enumerate(round(min(40, max(0, -16 * logprob))) for logprob in logprobs)  # in this order NaN has no bar
    return "".join(f"M{6 * index + 2} 40v-{height}" for index, height in heights if height > 0)


# --------------------------------------------------------------------------------------------------------- the page


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


def build_page(runs: Sequence[Run]) -> str:
    """The whole report as HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible)
    environment.filters |= {
        "percent": format_percent,
        "seconds": format_seconds,
        "number": format_value,
        "mark_boxed": mark_boxed,
    }
    template = resources.files("retool_jax").joinpath("report.html.jinja").read_text(encoding="utf-8")
    accuracy = draw_accuracy(runs)
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
    page, picture, written = build_page(runs), draw_accuracy(runs), [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, out)
        if picture:
            written.append(out.with_name("curves.png"))
            picture.savefig(written[-1], dpi=160, facecolor="white")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror}; choose another file with out="
        ) from error
    return written


def parse_words(words: Sequence[str]) -> tuple[list[Path], Path]:
    """The run folders and the page to write, from the command line's words."""
    folders, out = [], None
    for word in words:
        key, _, value = word.partition("=")
        if key == "run" and value:
            folders += [Path(name) for name in value.split(",") if name]
        elif key == "out" and value:
            out = Path(value)
        else:
            near = difflib.get_close_matches(key, ("run", "out"), n=1)
            hint = f"did you mean {near[0]}=...?" if near else "it takes run=DIR and out=FILE (see --help)"
            raise UserError(f"cannot read {word!r}; {hint}")
    if not folders:
        raise UserError("no run to report on; usage: python -m retool_jax.report run=DIR [run=DIR2 ...] [out=FILE]")
    return folders, out or folders[0] / "report.html"


def main(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return
    for path in write_report(*parse_words(words)):
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_command(main)
