"""The report's figures: the main picture, the small ones below it, and how they become part of a page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from retool_jax.report.runs import Run

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
