"""Read run folders for the report, and label runs so that they can be distinguished."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retool_jax.errors import UserError, one_line
from retool_jax.evaluation.config import RESULT, SAMPLES
from retool_jax.evaluation.results import RESULT as RESULT_SHAPE
from retool_jax.fields import defaults_of, flatten_dict
from retool_jax.files import CONFIG
from retool_jax.metrics import METRICS_FILE, SUMMARY, read_metrics
from retool_jax.run.load import read_yaml
from retool_jax.run.schema import TASKS
from retool_jax.shapes import complaint

DATA = ("data.", "sft.data")  # keys of data sets, which make another setting even if their values are paths
SHOWN_KEYS = 3  # of a run's label
READABLE = {"tools=none": "text only (tools=none)", "tools=python": "with tool (tools=python)"}


@dataclass(frozen=True)
class Run:
    """The contents of a run folder. `label` distinguishes the run from the others; `setting` is the label without seed.

    The folder of an evaluation has a `result` instead of records and summary.
    """

    folder: Path
    records: list[dict]
    summary: dict
    finished: bool
    label: str
    setting: str
    config: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)

    def series(self, kind: str, key: str, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one number, at the steps that have it."""
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
        """The split with the longest curve: dev, unless the run has more evaluations of test."""
        return max(("dev", "test"), key=lambda split: len(self.evaluations(split)))


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each setting; they differ only in their seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    return groups


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read folders of runs and evaluations. Raises UserError if one is missing, damaged or has no numbers."""
    configs = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"run folder {folder} does not exist; `python -m retool_jax.train config=grpo` makes one")
        path = folder / CONFIG
        configs.append(read_yaml(str(path)) if path.is_file() else {})
    names = [folder.resolve().name for folder in folders]
    complete = [with_defaults(config) for config in configs]
    labels = config_labels(complete, names)
    settings = setting_labels(complete)
    return [_load_run(*arguments) for arguments in zip(folders, labels, settings, configs, strict=True)]


def with_defaults(config: dict) -> dict:
    """A run's config by dotted keys. A key that is newer than the run has its default, since the run did the same."""
    schema = TASKS.get(str(config.get("task")))
    return (defaults_of(schema) if schema else {}) | flatten_dict(config)


def _load_run(folder: Path, label: str, setting: str, config: dict) -> Run:
    path, result = folder / METRICS_FILE, folder / RESULT
    if result.exists() and not path.exists():
        return Run(folder, [], {}, True, label, setting, config, _read_object(result, RESULT_SHAPE))
    records = read_metrics(folder) if path.exists() else []
    if not records:
        if (folder / SAMPLES).exists():
            raise UserError(f"the evaluation in {folder} is not complete; start its command again, which continues it")
        state = "is empty" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}; start or resume the run with `python -m retool_jax.train config=grpo`")
    summary_path = folder / "summary.json"
    has_summary = summary_path.exists()
    summary = _read_object(summary_path, SUMMARY) if has_summary else summary_so_far(records)
    # A cold start writes no summary, so nothing tells whether it has ended.
    return Run(folder, records, summary, has_summary or config.get("task") == "sft", label, setting, config)


def _read_object(path: Path, shape: dict) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); move it away, or write it again") from error
    if fault := complaint(value, shape):
        raise UserError(f"{path} is not as a run writes it ({fault}); mend it, move it away, or write it again")
    return value


def summary_so_far(records: Iterable[dict]) -> dict:
    """The `before` and `after` of a run that has no summary yet: its first and its latest evaluation."""
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not evaluations:
        return {}
    split = evaluations[0].get("split")
    same = sorted((e for e in evaluations if e.get("split") == split), key=lambda e: e["step"])
    return {"before": same[0], "after": same[-1] if len(same) > 1 else {}, "split": split, "steps": same[-1]["step"]}


def setting_labels(configs: Sequence[dict]) -> list[str]:
    """Label flat configs by all their differences except the seed, so that equal labels are seeds of one setting.

    If more than `SHOWN_KEYS` keys differ, each label has only the values that most runs do not have. A path that
    differs with the seed, as `init_from` does if each seed has its own cold start, makes no other setting. If runs of
    one seed have different paths, it does.
    """
    keys = [key for key in telling_keys(configs) if key != "seed"]
    usual = {key: Counter(str(config.get(key)) for config in configs).most_common(1)[0][0] for key in keys}
    settings = []
    for config in configs:
        many = len(keys) > SHOWN_KEYS
        shown = [key for key in keys if not many or str(config.get(key)) != usual[key]]
        settings.append(", ".join(_setting(key, config.get(key)) for key in shown) or many * "as most runs")
    paths = {key for config in configs for key, value in config.items() if "/" in str(value)} - {"run", "compare"}
    for key in sorted(paths, key=lambda key: (key.count("."), key)):
        found: dict[tuple[str, str], set[str]] = {}
        for setting, config in zip(settings, configs, strict=True):
            found.setdefault((setting, str(config.get("seed"))), set()).add(str(config.get(key)))
        parted = {setting for (setting, _), values in found.items() if len(values) > 1}
        settings = [
            ", ".join(filter(None, (setting, _setting(key, config.get(key))))) if setting in parted else setting
            for setting, config in zip(settings, configs, strict=True)
        ]
    return settings


def config_labels(configs: Sequence[dict], names: Sequence[str]) -> list[str]:
    """Label runs by the differences of their configs: 'tools=none', 'rl.clip_high=0.2, seed 1'.

    At most `SHOWN_KEYS` keys are shown, and the seed. If this does not distinguish the runs, the names of their folders
    are added.
    """
    flat = [flatten_dict(config) for config in configs]
    keys = telling_keys(flat)
    shown = [key for key in keys if key != "seed"][:SHOWN_KEYS] + [key for key in keys if key == "seed"]
    labels = [", ".join(_setting(key, config.get(key)) for key in shown) for config in flat]
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    return [" · ".join(filter(None, pair)) for pair in zip(labels, names, strict=True)]


def telling_keys(configs: Sequence[dict]) -> list[str]:
    """The keys by which flat configs can be told apart, the seed last.

    Paths of anything but data are left out, and so are keys that split the runs exactly as an earlier key does, or less
    finely than another key.
    """
    # Keys with fewer parts come first: sft.steps says more to a reader than sft.optimizer.decay_steps.
    every = {key for config in configs for key in config}
    keys = sorted(every, key=lambda key: (key == "seed", key != "tools", key.count("."), key))
    splits: dict[str, tuple[int, ...]] = {}  # by key: for each run, the first run with the same value
    for key in keys:
        values = [str(config.get(key)) for config in configs]
        split = tuple(values.index(value) for value in values)
        adds_something = len(set(split)) > 1 and (key == "seed" or split not in splits.values())
        if adds_something and (key.startswith(DATA) or not any("/" in value for value in values)):
            splits[key] = split
    others = [split for key, split in splits.items() if key != "seed"]
    return [key for key, split in splits.items() if key == "seed" or not any(_coarser(split, one) for one in others)]


def _coarser(split: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether every part of `split` is a union of parts of `other`, and it has fewer parts."""
    return len(set(split)) < len(set(other)) == len(set(zip(split, other, strict=True)))


def _setting(key: str, value: object) -> str:
    if value is None:  # the config is older than the key
        return f"no {key}"
    words = f"seed {value}" if key == "seed" else f"{key}={value}"
    return READABLE.get(words, words)
