"""One self-contained HTML page of a run, or of several side by side: `python -m retool_jax.report run=DIR`."""

from retool_jax.metrics import summary_rows, time_rows
from retool_jax.report.curves import PANELS, draw_accuracy, draw_panel
from retool_jax.report.page import build_page, end_counts, main, visible, write_report
from retool_jax.report.runs import Run, config_labels, load_runs
from retool_jax.report.trajectories import Part, choose_trajectories, readable_parts, trajectory_views

__all__ = [
    "PANELS",
    "Part",
    "Run",
    "build_page",
    "choose_trajectories",
    "config_labels",
    "draw_accuracy",
    "draw_panel",
    "end_counts",
    "load_runs",
    "main",
    "readable_parts",
    "summary_rows",
    "time_rows",
    "trajectory_views",
    "visible",
    "write_report",
]
