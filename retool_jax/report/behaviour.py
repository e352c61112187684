"""The report's figures of the policy's behaviour: the curves of the paper's analysis, and shares that add up to one."""

from collections import Counter
from collections.abc import Sequence
from textwrap import fill, shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from retool_jax.report.curves import LIGHT, SERIES, Panel, new_figure, percent_axis, plain_axes, plot_panel
from retool_jax.report.runs import Run, by_setting

# Section 3.3 of the paper (arXiv 2504.11536), in its order; its seventh curve is the shares of PURPOSES.
BEHAVIOUR = (
    Panel("Response length", "Tokens after the prompt, including tool outputs.", "rl", "response_tokens"),
    Panel("Code ratio", "Share of trajectories with at least one program.", "rl", "behaviour/code_ratio", percent=True),
    Panel("Code lines", "Mean number of lines of all programs of a trajectory.", "rl", "behaviour/code_lines"),
    Panel("Correct codes", "Programs of a step that ran without an error.", "rl", "behaviour/correct_codes"),
    Panel(
        "Last code runs",
        "Share of last programs that ran: solid for right answers, dashed for wrong ones.",
        "rl",
        "behaviour/last_code_pass_right",
        dashed="behaviour/last_code_pass_wrong",
        percent=True,
    ),
    Panel(
        "Timing of code",
        "Share of a response before its first program.",
        "rl",
        "behaviour/timing",
        percent=True,
    ),
)
PURPOSES, ENDS = "behaviour/purpose/", "end/"


def shares(runs: Sequence[Run], prefix: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and for each name after `prefix` its share at every step, summed over runs. Names that never occur are
    left out.

    They come from `rl` lines or, if these have none, from the evaluations of `curve_split`.
    """
    sums: dict[int, Counter[str]] = {}
    for kind in ("rl", "eval"):
        for run in runs if not sums else ():
            for record in run.records if kind == "rl" else run.evaluations(run.curve_split):
                found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
                if record["kind"] == kind and any(found.values()):
                    sums.setdefault(record["step"], Counter()).update({k: v for k, v in found.items() if v})
    steps = sorted(sums)
    names = [name for name, _ in sum(sums.values(), Counter()).most_common()]
    values = {name: np.array([sums[step][name] / sums[step].total() for step in steps]) for name in names}
    return np.array(steps), {name.replace("_", " "): share for name, share in values.items()}


def plot_shares(axes: Axes, runs: Sequence[Run], prefix: str) -> bool:
    """Shares as stacked areas, the most frequent at the bottom. Returns whether there are at least two steps."""
    steps, values = shares(runs, prefix)
    if len(steps) < 2:
        return False
    colours = [SERIES[index % len(SERIES)] for index in range(len(values))]
    axes.stackplot(steps, list(values.values()), labels=list(values), colors=colours, alpha=0.85, linewidth=0)
    axes.set_xlim(steps[0], steps[-1])
    percent_axis(axes)
    axes.set_ylim(0, 1)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.14),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=LIGHT["muted"],
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.2,
        borderpad=0,
    )
    return True


def draw_shares(runs: Sequence[Run], prefix: str) -> Figure | None:
    """A small figure of shares; None if there are none."""
    legend_rows = (len(shares(runs, prefix)[1]) + 1) // 2
    height = 1.95 + 0.19 * legend_rows
    figure, axes = new_figure(
        3.6, height, left=0.15, right=0.96, top=1 - 0.1 / height, bottom=(0.33 + 0.19 * legend_rows) / height
    )
    return figure if plot_shares(axes, runs, prefix) else None


def draw_behaviour(runs: Sequence[Run]) -> Figure | None:
    """All these figures as one picture for documents; None if no run has numbers of behaviour except the length."""
    if not any(key.startswith("behaviour/") for run in runs for record in run.records for key in record):
        return None
    figure = Figure(figsize=(13, 6.0))
    grid = figure.subplots(2, 4)
    figure.subplots_adjust(left=0.04, right=0.985, top=0.93, bottom=0.17, hspace=0.42, wspace=0.2)
    cells = iter(grid.flat)
    for panel in BEHAVIOUR:
        axes = next(cells)
        plain_axes(axes)
        if plot_panel(axes, panel, runs):
            axes.set_title(panel.title, loc="left", color=LIGHT["ink"], fontsize=11, weight="bold")
        else:
            axes.set_axis_off()
    groups = by_setting(runs)
    axes = next(cells)
    plain_axes(axes)
    with_calls = next((seeds for seeds in groups.values() if len(shares(seeds, PURPOSES)[0]) > 1), [])
    if plot_shares(axes, with_calls, PURPOSES):
        axes.set_title("Purposes of code", loc="left", color=LIGHT["ink"], fontsize=11, weight="bold")
        if len(groups) > 1:
            axes.set_title(shorten(with_calls[0].setting, 30), loc="right", color=LIGHT["muted"], fontsize=9)
    else:
        axes.set_axis_off()
    axes = next(cells)
    axes.set_axis_off()
    if len(groups) > 1:
        for index, setting in enumerate(groups):
            axes.plot([], [], color=SERIES[index % len(SERIES)], linewidth=2, label=fill(setting or "all runs", 32))
        axes.legend(loc="center left", bbox_to_anchor=(-0.1, 0.5), frameon=False, fontsize=10, labelcolor=LIGHT["ink"])
    return figure
