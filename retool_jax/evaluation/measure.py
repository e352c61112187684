"""Accuracy on held-out problems: how it is drawn, when it is due, what it is, and every trajectory to read."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retool_jax import hosts
from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.problems import Problems
from retool_jax.engine.conversation import Statistics
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import Service
from retool_jax.errors import one_line
from retool_jax.evaluation.config import MOST_PROBLEMS, MOST_SAMPLES, EvaluationConfig
from retool_jax.evaluation.numbers import require_kept, summarise
from retool_jax.files import replacing
from retool_jax.metrics import METRICS_FILE, read_metrics
from retool_jax.rollout.config import RewardConfig, RolloutConfig
from retool_jax.rollout.rollout import Dialogue, Sample, dialogues_of, score, trajectories_of
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox

HOLD_S = 1.0  # for which trajectories that have ended are kept together, to be scored and handed over as one
FIRST_REQUEST = 3 << 30  # behind those of training, from 0 on, and those of its looks, from 1 << 31 on

Take = Callable[[list[tuple[int, Trajectory]]], object]


def request_of(problem: int, sample: int) -> int:
    """The request of a sample, which names its stream of draws, from its numbers alone: 12 bits for the sample, 18 for
    the problem's place in its set. So neither how many samples there are nor which others are drawn plays a part.
    """
    if not (0 <= problem < MOST_PROBLEMS and 0 <= sample < MOST_SAMPLES):
        raise ValueError(f"problem {problem}, sample {sample}: below {MOST_PROBLEMS} and {MOST_SAMPLES} have a stream")
    return FIRST_REQUEST + problem * MOST_SAMPLES + sample


# --- drawing ----------------------------------------------------------------------------------------------------------


class _UnderWay(NamedTuple):
    number: int
    sample: Sample
    dialogue: Dialogue
    again: bool  # drawn a second time


async def draw(
    engine: Engine,
    tokenizer: Tokenizer,
    tools: Toolbox | None,
    samples: Iterable[Sample],
    limits: RolloutConfig,
    take: Take,
    reward: RewardConfig | None = None,
    stream: bool = False,
) -> Statistics:
    """Draw a trajectory for each sample and score it.

    Args:
        samples: in order of their numbers, from 0 on.
        take: is given (number, trajectory) of all that were scored together, in another thread, one call at a time.
        reward: what trajectories are worth; accuracy does not depend on it.
        stream: samples are taken from the iterable as seats become free, scored and handed over while others draw,
            and what the machinery lost is drawn once more; a fault of a conversation ends that one alone. Otherwise
            all are submitted at once and scored together in the end, and the first fault of one is raised.

    Raises:
        UserError: as `rollout`.
    """
    origin, chunk = time.perf_counter(), 2 * engine.config.slots if stream else None
    left = enumerate(samples)
    ended: asyncio.Queue[tuple[_UnderWay, BaseException | None]] = asyncio.Queue()  # each with its fault
    under_way: set[Dialogue] = set()
    scored: list[tuple[int, Trajectory]] = []  # to be
    over = asyncio.Event()  # nothing will be added to them
    judge = asyncio.create_task(_judge(tokenizer, scored, over, take, reward, stream))

    service = Service(engine, tools.at_once if tools else 0)

    def begin(pairs: Sequence[tuple[int, Sample]], again: bool = False) -> None:
        dialogues = dialogues_of(engine, tokenizer, tools, [sample for _, sample in pairs], limits)
        for (number, sample), dialogue in zip(pairs, dialogues, strict=True):
            one = _UnderWay(number, sample, dialogue, again)
            future = service.submit(dialogue, dialogue.sampling, dialogue.on_tokens)
            future.add_done_callback(lambda done, one=one: ended.put_nowait((one, done.exception())))
            under_way.add(dialogue)

    try:
        async with service:
            while True:
                if len(under_way) <= (chunk or 0):
                    begin(list(islice(left, chunk)))
                if not under_way:
                    break
                one, error = await ended.get()
                if judge.done():
                    judge.result()
                await one.dialogue.close()
                under_way.discard(one.dialogue)
                if stream and not one.again and (error or one.dialogue.trajectory.end is End.SANDBOX_LOST):
                    try:
                        begin([(one.number, one.sample)], again=True)
                    except RuntimeError as refused:  # the engine's fault, so that nothing goes on
                        raise error or refused from None
                    continue
                if error and not stream:
                    raise error
                if error:
                    one.dialogue.drop(f"{type(error).__name__}: {one_line(error)}")
                scored.append((one.number, trajectories_of([one.dialogue], origin)[0]))
    except BaseException:
        if not stream:
            scored.clear()
        over.set()  # of a stream, what has ended by now is kept
        await asyncio.wait([judge])
        raise
    finally:
        for dialogue in under_way:
            await dialogue.close()
    statistics = service.take_statistics()
    over.set()
    await judge
    return statistics


async def _judge(
    tokenizer: Tokenizer,
    scored: list[tuple[int, Trajectory]],
    over: asyncio.Event,
    take: Take,
    reward: RewardConfig | None,
    stream: bool,
) -> None:
    """Score what has ended and hand it over, all that there is at once, in a thread: comparing takes long."""

    def work(found: list[tuple[int, Trajectory]]) -> None:
        found.sort(key=lambda pair: pair[0])
        _score([trajectory for _, trajectory in found], again=stream)
        take(found)

    def _score(trajectories: list[Trajectory], again: bool) -> None:
        ends = [trajectory.end for trajectory in trajectories]
        score(tokenizer, trajectories, reward)
        lost = [(t, end) for t, end in zip(trajectories, ends, strict=True) if t.end is not end]
        if again and lost:
            for trajectory, end in lost:
                trajectory.end, trajectory.fault = end, ""
            _score([trajectory for trajectory, _ in lost], again=False)

    while scored or not over.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(HOLD_S if stream else None):
                await over.wait()
        if scored:
            found = scored.copy()
            scored.clear()
            await asyncio.to_thread(work, found)


# --- looks while a run trains -----------------------------------------------------------------------------------------


def _val_names(name: str, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Numbers of an evaluation with one sample a problem, by the names that verl has for them.

    `name` is the set's. verl counts the turns of everybody: the question, what the policy says, what tools answer.
    """
    kept = [t for t in trajectories if not t.dropped]
    turns = [len(t.segments) for t in kept]
    return {
        f"val-core/{name}/acc/mean@1": float(np.mean([t.verdict.correct for t in kept])),
        "val-aux/num_turns/mean": float(np.mean(turns)),
        "val-aux/num_turns/min": min(turns),
        "val-aux/num_turns/max": max(turns),
    }


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


async def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    tools: Toolbox | None,
    problems: Problems,
    step: int,
    count: int,
    limits: RolloutConfig,
    folder: Path,
    max_dropped: float,
    reward: RewardConfig | None = None,
    purposes: str = "rules",
) -> dict:
    """Draw one trajectory at temperature 1 and one greedily for each of the first `count` problems.

    The random streams depend on the split and the problem but not on the step, so two evaluations differ by the
    weights alone. Writes all trajectories under `folder/trajectories`; returns the numbers for the metrics file.
    `reward` says what trajectories are worth there; accuracy does not depend on it. `purposes` is that of `summarise`.

    Raises:
        UserError: more than the share `max_dropped` of the trajectories was dropped.
    """
    # Requests of training count up from 0 and stay below the first of these.
    split = problems.split
    first = (1 << 31) + (SPLITS.index(split) << 24)
    chosen = problems.head(count)
    count = len(chosen)
    samples = [Sample(chosen[i], first + i, temperature) for temperature in (1.0, 0.0) for i in range(count)]
    own = [i for i in range(len(samples)) if hosts.is_mine(i)]
    drawn: dict[int, Trajectory] = {}
    statistics = await draw(engine, tokenizer, tools, [samples[i] for i in own], limits, drawn.update, reward)
    found: dict[int, Trajectory] = {}
    for theirs in hosts.gather({own[number]: trajectory for number, trajectory in drawn.items()}):
        found |= theirs
    trajectories = [found[i] for i in range(len(samples))]
    sampled, greedy = trajectories[:count], trajectories[count:]
    path = folder / "trajectories" / f"{split}-{step:06d}.jsonl"
    if hosts.is_first():
        write_trajectories(path, tokenizer, sampled, split, step)
        write_trajectories(path.with_name(f"{path.stem}-greedy.jsonl"), tokenizer, greedy, split, step)
    numbers = summarise(sampled, max_dropped, purposes, tokenizer)
    accuracy, kept = numbers["accuracy"], sum(not t.dropped for t in sampled)
    return {
        "split": split,
        **numbers,
        "accuracy_stderr": float(np.sqrt(accuracy * (1 - accuracy) / kept)),
        "greedy_accuracy": float(np.mean([t.verdict.correct for t in require_kept(greedy, max_dropped)])),
        **_val_names(problems.name, sampled),
        "trajectories": str(path.relative_to(folder)),
        "perf/eval_s": statistics.total_s,
    }


def write_trajectories(
    path: Path, tokenizer: Tokenizer, trajectories: Sequence[Trajectory], split: str, step: int
) -> None:
    """One JSON record per line, in UTF-8, replacing the file in one step; each is a group of its own.

    What no encoding can hold (a lone surrogate in a problem's text) is written as JSON's escape of it.
    """
    with replacing(path, errors="backslashreplace") as file:
        for group, trajectory in enumerate(trajectories):
            record = trajectory.record(tokenizer, split=split, step=step, group=group)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
