"""Trajectories as a log of Inspect (inspect_ai), which its viewer and its data frames read.

A log has one evaluation. A sample is a trajectory; several trajectories of one problem are its epochs. A trajectory
that the machinery ended is a sample with an error and without a score. Inspect writes a log from memory, so all of it
must fit there.
"""

import math
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import inspect_ai
from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalError,
    EvalLog,
    EvalMetric,
    EvalResults,
    EvalSample,
    EvalScore,
    EvalSpec,
    EvalStats,
    write_eval_log,
)
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    ModelOutput,
)
from inspect_ai.scorer import Score
from inspect_ai.tool import ToolCall

from retool_jax.errors import UserError
from retool_jax.export.records import Message, Record, messages_of

SCORER = "retool_jax"
METADATA = ("id", "prompt_tokens", "response_tokens", "turns", "end", "reward", "reward_terms", "forced", "exact_match")


def write(records: Iterable[Record], path: Path, run: str) -> int:
    """Write the log, compressed if its name ends in .eval, and return its number of samples.

    Raises:
        UserError: the trajectories are of more than one evaluation.
    """
    sources: set[str] = set()
    epochs: Counter[str] = Counter()
    samples = []
    for record in records:
        sources.add(record.source)
        if len(sources) > 1:
            raise UserError(
                f"format=inspect holds one evaluation, and there are more of them: {', '.join(sorted(sources))}; choose"
                " one with split=, step= and greedy="
            )
        problem = str(record.values.get("prompt_id") or record.values["id"])
        epochs[problem] += 1
        samples.append(sample_of(record.values, problem, epochs[problem], run))
    write_eval_log(log_of(samples, run, *sources), str(path))
    return len(samples)


def sample_of(values: dict, problem: str, epoch: int, run: str) -> EvalSample:
    """A trajectory as a sample: its input is everything before the policy's first turn."""
    parts = messages_of(values)
    prompt = next((index for index, part in enumerate(parts) if part.stop), len(parts))
    messages = [message for part in parts for message in _messages(part, run)]
    last = next((message for message in reversed(messages) if message.role == "assistant"), None)
    dropped = values.get("reward") is None
    error = f"{values.get('end')}: {values.get('fault') or 'ended by the machinery'}" if dropped else ""
    score = Score(
        value="C" if values.get("correct") else "I",
        answer=None if values.get("answer") is None else str(values["answer"]),
        explanation=values.get("verdict"),
    )
    timings = values.get("timings") or {}
    return EvalSample(
        id=problem,
        epoch=epoch,
        input=messages[:prompt],
        target=str(values.get("ground_truth") or ""),
        messages=messages,
        output=ModelOutput.from_message(last) if last else ModelOutput(model=run),
        scores=None if dropped else {SCORER: score},
        error=EvalError(message=error, traceback="", traceback_ansi="") if dropped else None,
        metadata={key: values[key] for key in METADATA if values.get(key) is not None},
        total_time=max(timings.get("finished_s", 0.0) - timings.get("started_s", 0.0), 0.0),
    )


def _messages(message: Message, run: str) -> list[ChatMessage]:
    """A message, and the answers to its calls, as Inspect's messages."""
    if message.role == "system":
        return [ChatMessageSystem(content=message.text)]
    if message.role == "user":
        return [ChatMessageUser(content=message.text)]
    content: str | list = message.text
    if message.reasoning:
        content = [ContentReasoning(reasoning=message.reasoning), ContentText(text=message.text)]
    calls = [ToolCall(id=call.id, function=call.name, arguments=call.arguments) for call in message.calls]
    answers = [
        ChatMessageTool(content=call.output, tool_call_id=call.id, function=call.name)
        for call in message.calls
        if call.output is not None
    ]
    return [ChatMessageAssistant(content=content, tool_calls=calls or None, model=run), *answers]


def log_of(samples: list[EvalSample], run: str, source: str) -> EvalLog:
    """The log of one evaluation, with the accuracy over scored samples and its standard error over trajectories."""
    right = [sample.scores[SCORER].value == "C" for sample in samples if sample.scores]
    metrics = {}
    if right:
        accuracy = sum(right) / len(right)
        spread = math.sqrt(accuracy * (1 - accuracy) / len(right))
        metrics = {
            name: EvalMetric(name=name, value=value) for name, value in (("accuracy", accuracy), ("stderr", spread))
        }
    score = EvalScore(
        name=SCORER,
        scorer=SCORER,
        scored_samples=len(right),
        unscored_samples=len(samples) - len(right),
        metrics=metrics,
    )
    now = datetime.now(UTC).isoformat()
    spec = EvalSpec(
        created=now,
        task=source,
        dataset=EvalDataset(name=source, samples=len({sample.id for sample in samples})),
        model=f"{SCORER}/{run}",
        config=EvalConfig(epochs=max((sample.epoch for sample in samples), default=1)),
        packages={"inspect_ai": inspect_ai.__version__},
    )
    results = EvalResults(total_samples=len(samples), completed_samples=len(right), scores=[score])
    stats = EvalStats(started_at=now, completed_at=now)  # records do not have the time, but the viewer needs one
    return EvalLog(status="success", eval=spec, results=results, stats=stats, samples=samples)
