"""The report's figures: the main picture, the small ones below it, and their form inside a page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from textwrap import fill

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from retool_jax.report.runs import Run, by_setting

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
    "series6": ("#8a5a44", "#cfa38e"),
    "series7": ("#6b7a8f", "#a3b1c6"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
SERIES = [light for name, light in LIGHT.items() if name.startswith("series")]
TICK_STEPS = (1, 2, 5, 10)
LINE = 0.055  # height of a line of a label, as a share of the axes
Curve = tuple[np.ndarray, np.ndarray]  # steps, and a number at each


@dataclass(frozen=True)
class Panel:
    """A small figure of the number `key` in metrics lines of one kind, and of `dashed`, a second one of the same unit.

    A number that `rl` lines do not have comes from the evaluations of the run's `curve_split`.
    """

    title: str
    caption: str
    kind: str
    key: str
    dashed: str = ""
    percent: bool = False
    logarithmic: bool = False

    def curve(self, run: Run, key: str) -> Curve:
        steps, values = run.series(self.kind, key)
        return run.series("eval", key, run.curve_split) if self.kind == "rl" and not len(steps) else (steps, values)


PANELS = (
    Panel("Accuracy in training", "Share of rollouts with the right answer.", "rl", "accuracy", percent=True),
    Panel("Tool-call rate", "Share of trajectories with at least one call.", "rl", "tool_rate", percent=True),
    Panel("Tool success", "Share of calls that ran without an error.", "rl", "tool_success", percent=True),
    Panel("Calls", "Mean number of calls of a trajectory.", "rl", "calls_per_sample"),
    Panel("Entropy", "Nats per sampled token. Near zero, the policy no longer explores.", "rl", "entropy"),
    Panel("Clip fraction", "Share of sampled tokens whose ratio the loss clipped.", "rl", "clip_fraction"),
    Panel(
        "Engine against trainer",
        "Absolute log-prob difference per sampled token: mean; dashed: 99th percentile.",
        "rl",
        "logprob_diff_mean",
        dashed="logprob_diff_p99",
        logarithmic=True,
    ),
    Panel(
        "Divergence of the engine",
        "From the trainer's policy, estimator k3, in nats per token.",
        "rl",
        "mismatch_k3",
        logarithmic=True,
    ),
    Panel("Speed", "Tokens per second at each step.", "rl", "perf/tokens_per_s"),
    Panel("Cold-start loss", "Cross-entropy in nats per trained token, by cold-start step.", "sft", "loss"),
)


def setting_colours(runs: Sequence[Run]) -> dict[str, str]:
    """One colour for each setting; runs that differ only in their seed share it."""
    return {setting: SERIES[index % len(SERIES)] for index, setting in enumerate(by_setting(runs))}


def over_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The steps that all curves have, and the curves' mean, lowest and highest value at each of them."""
    steps = reduce(np.intersect1d, [steps for steps, _ in curves])
    values = np.array([np.interp(steps, *curve) for curve in curves]) if len(steps) else np.zeros((1, 0))
    return steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def draw_accuracy(runs: Sequence[Run]) -> Figure | None:
    """The main picture: accuracy against RL step, with labels at the ends of the curves. None without evaluations.

    A single run has a band of its standard error. Runs that differ only in their seed become a mean line, a band from
    the lowest to the highest, and a thin line for each run.
    """
    groups: dict[str, list[tuple[Run, Curve]]] = {}
    for run in runs:
        if len((curve := run.series("eval", "accuracy", run.curve_split))[0]):
            groups.setdefault(run.setting, []).append((run, curve))
    if not groups:
        return None
    figure, axes = new_figure(9.0, 4.5, left=0.065, right=0.76 if len(runs) > 1 else 0.84, top=0.83, bottom=0.13)
    colours, ends = setting_colours(runs), {}
    for setting, seeds in groups.items():
        colour, first = {"color": colours[setting]}, seeds[0][0]
        steps, mean, low, high = over_seeds([curve for _, curve in seeds])
        if len(seeds) == 1:
            error_steps, error = first.series("eval", "accuracy_stderr", first.curve_split)
            if np.array_equal(error_steps, steps):
                low, high = mean - error, mean + error
        for _, curve in seeds if len(seeds) > 1 else ():
            axes.plot(*curve, linewidth=0.8, alpha=0.45, clip_on=False, **colour)
        axes.fill_between(steps, low, high, alpha=0.16, linewidth=0, **colour)
        greedy = [run.series("eval", "greedy_accuracy", run.curve_split) for run, _ in seeds]
        axes.plot(*over_seeds(greedy)[:2], linewidth=1.1, dashes=(4, 2.5), **colour)
        axes.plot(steps, mean, linewidth=2.2, marker="o", markersize=3.5, clip_on=False, **colour)
        ends[setting] = mean[-1] if len(mean) else seeds[0][1][1][-1]
    last_step = max(steps[-1] for seeds in groups.values() for _, (steps, _) in seeds)
    axes.set(xlim=(0, max(last_step, 1)), xlabel="RL step (0: after the cold start)")
    axes.margins(x=0)
    percent_axis(axes)
    labels = {setting: _end_label([run for run, _ in seeds], setting) for setting, seeds in groups.items()}
    above, below = (max(label[i].count("\n") + 1 for label in labels.values()) for i in (0, 1))
    heights = _spread([float(end) for end in ends.values()], LINE * (above + below), 1.03 - LINE * above)
    for (setting, (name, note)), height in zip(labels.items(), heights, strict=True):
        place = {"xy": (1, height), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, xytext=(10, 1), va="bottom", color=colours[setting], weight="bold", **place)
        axes.annotate(note, xytext=(10, -1), va="top", color=LIGHT["muted"], fontsize=9, **place)
    splits = " and ".join(sorted({run.curve_split for seeds in groups.values() for run, _ in seeds}))
    figure.text(0.012, 0.94, "Accuracy while RL trains", color=LIGHT["ink"], fontsize=14, weight="bold")
    counts = {min(len(seeds), 2) for seeds in groups.values()}
    bands = [words for count, words in ((1, "± 1 standard error"), (2, "lowest to highest seed")) if count in counts]
    explanation = f"{splits} problems; line: sampled at T=1, band: {' or '.join(bands)}; dashed: greedy"
    figure.text(0.012, 0.885, explanation, color=LIGHT["muted"], fontsize=9.5)
    return figure


def _end_label(runs: Sequence[Run], setting: str) -> tuple[str, str]:
    """The name of a curve, and the text below it: the runs' result on the split of their summaries."""
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
    """One small figure; None if no run has its numbers."""
    figure, axes = new_figure(3.6, 2.0, left=0.15, right=0.96, top=0.95, bottom=0.15)
    return figure if plot_panel(axes, panel, runs) else None


def plot_panel(axes: Axes, panel: Panel, runs: Sequence[Run]) -> bool:
    """Draw a panel's lines: thin for every step, bold for the mean over nearby steps and seeds, and a band for seeds.

    Returns whether any run has its numbers.
    """
    colours, drawn = setting_colours(runs), []
    for setting, seeds in by_setting(runs).items():
        for key, dashes in ((panel.key, ()), (panel.dashed, (2.5, 1.5))):
            curves = [curve for run in seeds if len((curve := panel.curve(run, key))[0])]
            if not curves:
                continue
            # Above the frame of the axes, which would hide a rate that is always zero.
            style = {"color": colours[setting], "zorder": 3, "clip_on": False}
            smooth = [(steps, running_mean(values, max(1, len(values) // 16))) for steps, values in curves]
            steps, mean, low, high = over_seeds(smooth)
            for curve in curves:
                axes.plot(*curve, linewidth=0.6, alpha=0.3, **style)
            if len(curves) > 1:
                axes.fill_between(steps, low, high, color=colours[setting], alpha=0.18, linewidth=0)
            axes.plot(steps, mean, linewidth=1.8, dashes=dashes, **style)
            drawn += curves
    if not drawn:
        return False
    axes.set_xlim(0, max(1, *(max(steps) for steps, _ in drawn)))
    if panel.percent:
        percent_axis(axes)
    elif panel.logarithmic and any((values > 0).any() for _, values in drawn):
        axes.set_yscale("log", nonpositive="mask")  # zeros, where engine and trainer agree to the bit, are left out
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))
    return True


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window of `width` points, which shrinks at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def new_figure(width: float, height: float, **margins: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes in the report's style."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    figure.subplots_adjust(**margins)
    plain_axes(axes)
    return figure, axes


def plain_axes(axes: Axes) -> None:
    """Axes with a line at the bottom, horizontal grid lines, and a few integer ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(which="both", colors=LIGHT["muted"], length=0, labelsize=9)
    axes.tick_params(axis="x", pad=6)
    axes.xaxis.label.set_color(LIGHT["muted"])
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))


def percent_axis(axes: Axes) -> None:
    """A y axis from 0 to 100 %."""
    axes.set(ylim=(0, 1.02), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move heights apart, so that they are at least `gap` from each other and none is above `top`."""
    placed, floor, ceiling = [0.0] * len(heights), gap / 2, top
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for index in order:
        placed[index] = max(heights[index], floor)
        floor = placed[index] + gap
    for index in reversed(order):  # down again, as far as the ones above need it
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def to_svg(figure: Figure, salt: str) -> Markup:
    """The figure for use inside the page: without its own size, ids or addresses, with the page's colours and font."""
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
