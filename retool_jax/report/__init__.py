"""One self-contained HTML page of a run, or of several side by side: `python -m retool_jax.report run=DIR`."""

from retool_jax.report.page import (
    PANELS,
    Part,
    Run,
    build_page,
    choose_trajectories,
    config_labels,
    draw_accuracy,
    draw_panel,
    end_counts,
    load_runs,
    main,
    readable_parts,
    summary_rows,
    time_rows,
    trajectory_views,
    write_report,
)

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
    "write_report",
]
