"""What the figures are drawn from: seeds as a mean with a band, behaviour and shares by step."""

import json
from pathlib import Path

import numpy as np
import pytest

from retool_jax.report.behaviour import BEHAVIOUR, ENDS, PURPOSES, draw_behaviour, draw_shares, shares
from retool_jax.report.curves import PANELS, draw_accuracy, draw_panel, over_seeds
from retool_jax.report.page import main
from retool_jax.report.runs import load_runs


def behave(folder: Path, kinds: tuple[str, ...] = ("rl", "eval")) -> Path:
    """Add the numbers of behaviour to the lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] in kinds:
            step = line["step"]
            line |= {name: 0.5 for panel in BEHAVIOUR for name in (panel.key, panel.dashed) if name}
            line |= {f"{PURPOSES}calculation": 0.75, f"{PURPOSES}check_of_result": 0.25 if step > 1 else None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_seeds_become_a_mean_between_the_lowest_and_the_highest():
    first = np.array([0.0, 1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0, 9.0])
    second = np.array([0.0, 2.0, 4.0, 6.0]), np.array([3.0, 5.0, 5.0, 0.0])
    steps, mean, low, high = over_seeds([first, second])
    assert steps.tolist() == [0, 2, 4]
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([2, 4, 7], [1, 3, 5], [3, 5, 9])
    steps, *lines = over_seeds([(np.array([1.0]), np.array([1.0])), (np.array([2.0]), np.array([1.0]))])
    assert [len(steps), *map(len, lines)] == [0, 0, 0, 0]


def test_the_main_picture_has_a_band_for_seeds_and_their_thin_lines(make_run, tmp_path):
    runs = load_runs([make_run(tmp_path / str(seed), "python", seed) for seed in range(3)])
    (axes,) = draw_accuracy(runs).axes
    values = np.array([run.series("eval", "accuracy", "dev")[1] for run in runs])
    (band,) = axes.collections
    bounds = band.get_paths()[0].vertices[:, 1]
    assert (bounds.min(), bounds.max()) == pytest.approx((values.min(), values.max()))
    drawn = [line.get_ydata() for line in axes.lines]
    assert all(any(np.array_equal(line, own) for line in drawn) for own in values)
    assert any(len(line) == 5 and np.allclose(line, values.mean(axis=0)) for line in drawn)


def test_behaviour_is_drawn_from_rollouts_and_without_them_from_looks(make_run, tmp_path):
    rollouts, looks = (behave(make_run(tmp_path / kind, "python", 0), (kind,)) for kind in ("rl", "eval"))
    for folder, points in ((rollouts, 20), (looks, 5)):
        (run,) = load_runs([folder])
        for panel in BEHAVIOUR[1:]:
            assert len(panel.curve(run, panel.key)[0]) == points
        assert draw_behaviour([run]) and all(draw_panel(panel, [run]) for panel in BEHAVIOUR)
        assert draw_shares([run], PURPOSES)


def test_shares_add_up_to_one_at_every_step(make_run, tmp_path):
    runs = load_runs([behave(make_run(tmp_path / "a", "python", 0))])
    steps, values = shares(runs, PURPOSES)
    assert steps.tolist() == list(range(1, 21)) and list(values) == ["calculation", "check of result"]
    assert values["calculation"][:2].tolist() == [1, 0.75] and values["check of result"][:2].tolist() == [0, 0.25]
    steps, values = shares(runs, ENDS)
    assert values["answered"].tolist() == pytest.approx([185 / 192] * 20)
    assert shares(runs, "nothing/")[1] == {}


def test_a_run_without_numbers_of_behaviour_has_its_other_curves(make_run, tmp_path):
    older = make_run(tmp_path / "a", "python", 0)
    main([f"run={older}"])
    page = (older / "report.html").read_text()
    assert "Code ratio" not in page and "Purposes of code" not in page and "Response length" in page
    assert not (older / "behaviour.png").exists()
    newer = behave(make_run(tmp_path / "b", "python", 1))
    main([f"run={newer},{older}"])
    page = (newer / "report.html").read_text()
    assert all(panel.title in page for panel in BEHAVIOUR) and "Purposes of code" in page
    assert (newer / "behaviour.png").read_bytes().startswith(b"\x89PNG")


def test_the_numbers_that_figures_show_and_these_tests_make_up_are_defined(make_run, tmp_path, undefined):
    (run,) = load_runs([make_run(tmp_path / "a", "python", 0)])
    assert undefined({name for record in run.records for name in record}) == set()
    assert undefined({name for panel in (*PANELS, *BEHAVIOUR) for name in (panel.key, panel.dashed) if name}) == set()
