"""The model card (README.md) of a converted checkpoint: what is known about the run that trained it."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import retool_jax
from retool_jax.metrics import METRICS_FILE, read_metrics
from retool_jax.models.huggingface import is_hub_id
from retool_jax.run.folder import CONFIG
from retool_jax.run.load import read_yaml

SFT_MASK = """\
Only what the assistant writes in a demonstration carries loss: its text, its calls and the token that ends its turn.
System and user turns, the template's own marks and the outputs of tools carry none."""
RL_MASK = """\
Only tokens that the policy sampled carry loss, entropy or advantage, and every mean is over them. Prompts, the
template's own marks and the outputs of tools carry none; a trajectory that a fault of the machinery cut short is left
out."""
LIBRARIES = ("jax", "flax", "transformers")


def model_card(folder: Path, name: str, dtype: str, stops: Mapping[int, str]) -> str:
    """The text of README.md.

    Args:
        folder: the run or the Hugging Face folder that the weights came from; a card of the latter says only that.
        stops: the ids that end a turn according to the checkpoint's configs, with their texts.
    """
    config = read_yaml(str(folder / CONFIG)) if (folder / CONFIG).is_file() else {}
    base, data = _base(config), _data(config)
    named = [f"{key}: {value}" for key, value in (("base_model", base), ("datasets", data)) if is_hub_id(value)]
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [retool_jax]", *named]
    marks = ", ".join(f"`{text}` ({index})" for index, text in stops.items())
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {name}",
        f"Weights in {dtype}, written by retool_jax from `{folder.resolve().name}`. A turn ends at {marks or 'no id'}.",
    ]
    if config:
        imitates = config.get("task") == "sft"
        begins = base or ("random" if imitates else "those of a cold start of its own, as `sft` says below")
        step = max(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())
        parts += [
            "## Training",
            f"`task={config.get('task')}`, checkpoint {step}; first weights: {begins}; data: {data};"
            f" tools: {config.get('tools')}.",
            "## Mask",
            SFT_MASK if imitates else RL_MASK,
            *_metrics(folder, step),
            "## Config",
            f"```yaml\n{(folder / CONFIG).read_text().strip()}\n```",
        ]
    versions = [f"retool_jax {retool_jax.__version__}", *(f"{library} {version(library)}" for library in LIBRARIES)]
    parts += ["## Versions", ", ".join(versions)]
    return "\n\n".join(parts) + "\n"


def _base(config: dict) -> str:
    """The weights that the first run of a chain of `init_from` began with."""
    name = str(config.get("init_from") or "")
    while name and (Path(name) / CONFIG).is_file():
        name = str(read_yaml(str(Path(name) / CONFIG)).get("init_from") or "")
    return name


def _data(config: dict) -> str:
    """Where the demonstrations or the problems came from."""
    section, key = ("sft", "data") if config.get("task") == "sft" else ("data", "train")
    return str((config.get(section) or {}).get(key, ""))


def _metrics(folder: Path, step: int) -> list[str]:
    """A table of the last numbers of each kind up to a step, without timings."""
    if not (folder / METRICS_FILE).is_file():
        return []
    last: dict[str, dict] = {}
    for record in read_metrics(folder):
        if record["step"] <= step:
            last[f"{record['kind']} {record['split']}" if "split" in record else record["kind"]] = record
    rows = [
        f"| {kind} | {record['step']} | {key} | {json.dumps(value)} |"
        for kind, record in last.items()
        for key, value in record.items()
        if key != "step" and not key.startswith("perf/") and isinstance(value, int | float)
    ]
    return ["## Metrics", "\n".join(["| kind | step | metric | value |", "| --- | --- | --- | --- |", *rows])]
