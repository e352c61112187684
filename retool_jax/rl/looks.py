"""Looks at held-out problems: which splits are due after a step, and which of them are in the log already."""

from dataclasses import replace
from pathlib import Path

from retool_jax.metrics import METRICS_FILE, read_metrics
from retool_jax.rl.config import EvaluationConfig
from retool_jax.rl.evaluation import evaluate, faults
from retool_jax.rl.parts import Parts


async def look(p: Parts, step: int) -> None:
    """Measure accuracy on the splits whose turn it is after this step and whose numbers are not in the log."""
    for split in splits_at(p.evaluation, step, p.rl.steps):
        if looked(p.folder, step, split):
            continue
        with p.clock.part("evaluation"):
            numbers = await evaluate(
                p.engine,
                p.tokenizer,
                p.tools,
                p.problems[split],
                step,
                p.evaluation.problems,
                replace(p.rollout, answer_tokens=p.evaluation.answer_tokens),
                p.folder,
                p.rl.max_dropped,
            )
        p.log.write("eval", step, numbers)
        p.bar.say(
            f"step {step}: {split} accuracy {numbers['accuracy']:.3f} ± {numbers['accuracy_stderr']:.3f}"
            f" (greedy {numbers['greedy_accuracy']:.3f}), tool rate {numbers['tool_rate']:.2f}"
        )
        if happened := faults(numbers):
            p.bar.say(f"step {step}: {split}: {happened}")


def splits_at(evaluation: EvaluationConfig, step: int, last: int) -> list[str]:
    """The final split before the first and after the last step, the dev split every so often."""
    splits = [evaluation.final_split] if step in (0, last) else []
    if evaluation.every and step % evaluation.every == 0:
        splits.append("dev")
    return list(dict.fromkeys(splits))


def looked(folder: Path, step: int, split: str) -> dict | None:
    """The numbers of a look at a split after a step, from the log; None while there are none."""
    for record in read_metrics(folder) if (folder / METRICS_FILE).is_file() else ():
        if (record["kind"], record["step"], record.get("split")) == ("eval", step, split):
            return {key: value for key, value in record.items() if key not in ("kind", "step")}
    return None
