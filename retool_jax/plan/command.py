"""Plan a training run for a slice of chips that is not here: whether it fits, the time by part, the cost.

    python -m retool_jax.plan config=grpo_qwen2.5_32b mesh=v5p-64 [json=plan.json] [key=value ...]

compiles the run's own functions from abstract values, so neither weights nor chips are needed (docs/tpu.md).
"""

import dataclasses
import json
from pathlib import Path

from retool_jax import slices
from retool_jax.errors import UserError
from retool_jax.fields import split_words, whole_number
from retool_jax.files import check_result, replacing
from retool_jax.mesh_config import MeshConfig, check_heads, known_sizes
from retool_jax.models.config import ARCHITECTURE
from retool_jax.plan import devices
from retool_jax.run import load
from retool_jax.run.schema import RLRun, SFTRun, task_of

OWN = ("json", "tokens", "search", "teacher")


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(load.help_text([word for word in words if word.partition("=")[0] not in OWN], "plan", "grpo_qwen2.5_32b"))
        return
    own = dict(split_words([word for word in words if word.partition("=")[0] in OWN], OWN))
    words = [word for word in words if word.partition("=")[0] not in OWN]
    if "json" in own:
        check_result(Path(own["json"]), "json")
    tokens = whole_number("tokens", own["tokens"], 1) if "tokens" in own else None
    search = _flag("search", own.get("search"))
    if search and tokens:
        raise UserError(f"tokens={tokens} is not read with search=true, which compares only updates; leave it out")
    run = load.load(words)
    if not isinstance(run, SFTRun | RLRun):
        raise UserError(f"this config is of task {task_of(type(run))} and trains nothing; plan a config that trains")
    if not run.mesh.name:
        raise UserError("for which chips? add mesh=NAME: v5p-64, v6e-256, tpu7x-128, h100-8, cpu-8 (docs/tpu.md)")
    place = slices.named(run.mesh.name)
    longest = run.sft.row_length if isinstance(run, SFTRun) else run.engine.max_length
    if tokens and tokens > longest:
        key = "sft.row_length" if isinstance(run, SFTRun) else "engine.max_length"
        raise UserError(f"tokens={tokens} of a trajectory are more than {key}={longest}; lower tokens, or raise {key}")
    teacher = load.load([f"config={own['teacher']}"]).model if "teacher" in own else None
    devices.prepare(place)
    # Imported only now: jax reads its settings when it is imported, and the mistakes above are reported at once.
    from retool_jax.rl.algorithms import algorithm_of
    from retool_jax.run.build import resolve, with_checkpoint

    if teacher and (isinstance(run, SFTRun) or "teacher" not in algorithm_of(run.rl).models):
        raise UserError(f"teacher={own['teacher']} is a model that this run does not use; leave it out")
    _, values = load.read(words)
    if run.init_from and not set(ARCHITECTURE) & (with_checkpoint(values).get("model") or {}).keys():
        raise UserError(
            f"the model's shape is that of init_from={run.init_from}, which is not here; name a folder that is here, or"
            " set model.hidden_size and the other sizes"
        )
    run = resolve(words)
    sizes = known_sizes(run.mesh)
    check_heads(sizes, run.model.num_kv_heads)
    run = dataclasses.replace(run, mesh=MeshConfig(name=place.name, **sizes))

    from rich.console import Console

    from retool_jax.plan.report import show, summary_of
    from retool_jax.plan.search import search_meshes, show_found
    from retool_jax.plan.whole import plan

    console = Console(highlight=False)
    console.width = max(console.width, 100)  # also when the output is a file
    if search:
        found = search_meshes(run, place, teacher or run.model, console)
        show_found(found, console)
        result = {"search": found}
    else:
        result = summary_of(run, place, plan(run, place, tokens, teacher or run.model, console), tokens)
        show(result, console)
    if "json" in own:
        with replacing(Path(own["json"])) as file:
            json.dump(result, file, indent=1)


def _flag(key: str, value: str | None) -> bool:
    if value not in (None, "true", "false"):
        raise UserError(f"{key}={value} must be true or false")
    return value == "true"
