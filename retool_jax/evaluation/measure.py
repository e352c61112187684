"""Accuracy on held-out problems: drawing and scoring samples, and the evaluations while a run trains."""

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

HOLD_S = 1.0  # with `stream`, how long ended trajectories are collected before they are scored together
FIRST_REQUEST = 3 << 30  # after the requests of training, which begin at 0, and its evaluations, which begin at 1 << 31

OnScored = Callable[[list[tuple[int, Trajectory]]], object]


def request_of(problem: int, sample: int) -> int:
    """The request of a sample, which chooses its random stream: 12 bits for the sample, 18 for the problem's place in
    its set. So the stream depends neither on the number of samples nor on which others are drawn.
    """
    if not (0 <= problem < MOST_PROBLEMS and 0 <= sample < MOST_SAMPLES):
        raise ValueError(f"problem {problem}, sample {sample}: below {MOST_PROBLEMS} and {MOST_SAMPLES} have a stream")
    return FIRST_REQUEST + problem * MOST_SAMPLES + sample


# --- drawing ----------------------------------------------------------------------------------------------------------


class _Attempt(NamedTuple):
    """One try to draw a sample."""

    number: int
    sample: Sample
    dialogue: Dialogue
    is_retry: bool


async def draw(
    engine: Engine,
    tokenizer: Tokenizer,
    tools: Toolbox | None,
    samples: Iterable[Sample],
    limits: RolloutConfig,
    on_scored: OnScored,
    reward: RewardConfig | None = None,
    stream: bool = False,
) -> Statistics:
    """Draw a trajectory for each sample and score it.

    Args:
        samples: numbered in this order, from 0 on.
        on_scored: gets (number, trajectory) of all trajectories that were scored together; called in another thread,
            never twice at the same time.
        reward: how trajectories are rewarded; accuracy does not depend on it.
        stream: samples are taken from the iterable as seats become free, and are scored and given to `on_scored` while
            others are drawn. A sample that the machinery lost is drawn once more, and an exception of a conversation
            ends only that one. Without `stream` all samples are submitted together and scored together at the end, and
            the first exception is raised.

    Raises:
        UserError: as `rollout`.
    """
    origin, chunk = time.perf_counter(), 2 * engine.config.slots if stream else None
    remaining = enumerate(samples)
    ended: asyncio.Queue[tuple[_Attempt, BaseException | None]] = asyncio.Queue()  # each with its exception
    active: set[Dialogue] = set()
    unscored: list[tuple[int, Trajectory]] = []
    no_more = asyncio.Event()  # nothing will be added to `unscored`
    scoring = asyncio.create_task(_score_ended(tokenizer, unscored, no_more, on_scored, reward, stream))

    service = Service(engine, tools.at_once if tools else 0)

    def begin(pairs: Sequence[tuple[int, Sample]], is_retry: bool = False) -> None:
        dialogues = dialogues_of(engine, tokenizer, tools, [sample for _, sample in pairs], limits)
        for (number, sample), dialogue in zip(pairs, dialogues, strict=True):
            attempt = _Attempt(number, sample, dialogue, is_retry)
            future = service.submit(dialogue, dialogue.sampling, dialogue.on_tokens)
            future.add_done_callback(lambda done, attempt=attempt: ended.put_nowait((attempt, done.exception())))
            active.add(dialogue)

    try:
        async with service:
            while True:
                if len(active) <= (chunk or 0):
                    begin(list(islice(remaining, chunk)))
                if not active:
                    break
                attempt, error = await ended.get()
                if scoring.done():
                    scoring.result()
                dialogue = attempt.dialogue
                await dialogue.close()
                active.discard(dialogue)
                if stream and not attempt.is_retry and (error or dialogue.trajectory.end is End.SANDBOX_LOST):
                    try:
                        begin([(attempt.number, attempt.sample)], is_retry=True)
                    except RuntimeError as refused:  # the engine has failed, so nothing can go on
                        raise error or refused from None
                    continue
                if error and not stream:
                    raise error
                if error:
                    dialogue.drop(f"{type(error).__name__}: {one_line(error)}")
                unscored.append((attempt.number, trajectories_of([dialogue], origin)[0]))
    except BaseException:
        if not stream:
            unscored.clear()
        no_more.set()  # with `stream`, what has ended by now is still scored and kept
        await asyncio.wait([scoring])
        raise
    finally:
        for dialogue in active:
            await dialogue.close()
    statistics = service.take_statistics()
    no_more.set()
    await scoring
    return statistics


async def _score_ended(
    tokenizer: Tokenizer,
    unscored: list[tuple[int, Trajectory]],
    no_more: asyncio.Event,
    on_scored: OnScored,
    reward: RewardConfig | None,
    stream: bool,
) -> None:
    """Score trajectories that have ended and call `on_scored`, in a thread, because comparing answers takes long."""

    def score_and_take(batch: list[tuple[int, Trajectory]]) -> None:
        batch.sort(key=lambda pair: pair[0])
        score_all([trajectory for _, trajectory in batch], retry=stream)
        on_scored(batch)

    def score_all(trajectories: list[Trajectory], retry: bool) -> None:
        ends = [trajectory.end for trajectory in trajectories]
        score(tokenizer, trajectories, reward)
        lost = [(t, end) for t, end in zip(trajectories, ends, strict=True) if t.end is not end]
        if retry and lost:
            for trajectory, end in lost:
                trajectory.end, trajectory.fault = end, ""
            score_all([trajectory for trajectory, _ in lost], retry=False)

    while unscored or not no_more.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(HOLD_S if stream else None):
                await no_more.wait()
        if unscored:
            batch = unscored.copy()
            unscored.clear()
            await asyncio.to_thread(score_and_take, batch)


# --- evaluations while a run trains -----------------------------------------------------------------------------------


def _verl_numbers(name: str, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Numbers of an evaluation with one sample for each problem, by verl's names for them.

    `name` is the set's. verl counts all turns: the question, the policy's turns and the answers of tools.
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
    """The splits to evaluate after a step: `final_split` at steps 0 and `last`, dev after every `every` steps."""
    splits = [evaluation.final_split] if step in (0, last) else []
    if evaluation.every and step % evaluation.every == 0:
        splits.append("dev")
    return list(dict.fromkeys(splits))


def read_evaluation(folder: Path, step: int, split: str) -> dict | None:
    """The logged numbers of the evaluation of a split after a step; None if there are none yet."""
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

    The random streams depend on the split and the problem but not on the step, so two evaluations differ only by the
    weights. Writes all trajectories under `folder/trajectories`; returns the numbers for the metrics file. `reward`
    sets the rewards in these files; accuracy does not depend on it. `purposes` is as for `summarise`.

    Raises:
        UserError: more than the share `max_dropped` of the trajectories was dropped.
    """
    # Training's requests count up from 0 and stay below this.
    split = problems.split
    first = (1 << 31) + (SPLITS.index(split) << 24)
    chosen = problems.head(count)
    count = len(chosen)
    samples = [Sample(chosen[i], first + i, temperature) for temperature in (1.0, 0.0) for i in range(count)]
    own = [i for i in range(len(samples)) if hosts.is_mine(i)]
    drawn: dict[int, Trajectory] = {}
    statistics = await draw(engine, tokenizer, tools, [samples[i] for i in own], limits, drawn.update, reward)
    of_all_hosts: dict[int, Trajectory] = {}
    for of_one_host in hosts.gather({own[number]: trajectory for number, trajectory in drawn.items()}):
        of_all_hosts |= of_one_host
    trajectories = [of_all_hosts[i] for i in range(len(samples))]
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
        **_verl_numbers(problems.name, sampled),
        "trajectories": str(path.relative_to(folder)),
        "perf/eval_s": statistics.total_s,
    }


def write_trajectories(
    path: Path, tokenizer: Tokenizer, trajectories: Sequence[Trajectory], split: str, step: int
) -> None:
    """Write one JSON record per line, in UTF-8; the file is replaced in one step. Each trajectory is its own group.

    A character that UTF-8 cannot encode (a lone surrogate in a problem's text) is written as its JSON escape.
    """
    with replacing(path, errors="backslashreplace") as file:
        for group, trajectory in enumerate(trajectories):
            record = trajectory.record(tokenizer, split=split, step=step, group=group)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
