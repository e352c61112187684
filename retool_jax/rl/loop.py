"""GRPO with a Python interpreter: the whole algorithm in `train`, and its parts below it."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from retool_jax.answers import workers
from retool_jax.checkpoint import Checkpoints, abstract_like
from retool_jax.clock import Clock
from retool_jax.config import RLRun
from retool_jax.data.arithmetic import SPLITS
from retool_jax.data.packing import Example, PackedBatch, pack
from retool_jax.data.problems import Problems
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import Statistics
from retool_jax.errors import UserError
from retool_jax.mesh import check_rows
from retool_jax.metrics import METRICS_FILE, MetricsLog, Progress, print_summary, read_metrics
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.transformer import Params, abstract_params
from retool_jax.rl.advantage import group_relative
from retool_jax.rl.evaluation import evaluate, faults, summarise
from retool_jax.rl.loss import policy_token_loss
from retool_jax.rl.rollout import Sample, encode_prompt, rollout, score
from retool_jax.rl.trajectory import Trajectory
from retool_jax.run_folder import claim_folder, write_config
from retool_jax.sandbox import Sandbox
from retool_jax.sft.loop import (
    finished_weights,
    has_checkpoints,
    load_weights,
    mesh_of,
    model_for,
    require_checkpoint,
)
from retool_jax.sft.loop import train as train_cold_start
from retool_jax.tokens.grammar import GRAMMARS
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer
from retool_jax.tools.config import words_of
from retool_jax.tools.toolbox import Toolbox, load_tools
from retool_jax.update import TrainState, Update, begin_from, fresh_state, make_update, state_shardings

SUMMARY = "summary.json"


@dataclass
class Session:
    """The objects of a run, built once; `notes` is what a checkpoint keeps beside the train state."""

    run: RLRun
    folder: Path
    tokenizer: Tokenizer
    problems: dict[str, Problems]
    tools: Toolbox | None
    engine: Engine
    update: Update
    checkpoints: Checkpoints
    log: MetricsLog
    bar: Progress
    clock: Clock
    notes: dict
    began: float


async def train(run: RLRun) -> None:
    """Train to the last step, resuming from the newest checkpoint; leaves the run folder and prints its table."""
    began = time.perf_counter()
    require_checkpoint(run)
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    problems = {split: Problems(getattr(run.data, split), split, run.seed) for split in SPLITS}
    tools = load_tools(run.tools)
    check_prompts(run, tokenizer, problems, tools)
    mesh = mesh_of(run)
    check_rows(mesh.shape, "rl.rows_per_micro", run.rl.rows_per_micro)
    # Loaded early when they will be needed: a wrong path is told before anything is written.
    given = load_weights(run, Path(run.init_from)) if run.init_from and not has_checkpoints(run) else None
    workers.pool.start()

    async with AsyncExitStack() as stack:
        if tools:
            await stack.enter_async_context(tools.open(run.sandbox_for_slots()))
        folder = stack.enter_context(claim_folder(run))
        checkpoints = stack.enter_context(closing(Checkpoints(folder / "checkpoints", run.checkpoint.keep)))
        clock = stack.enter_context(closing(Clock()))
        start = checkpoints.latest()
        if start is not None and start > run.rl.steps:
            raise UserError(
                f"{folder} is at step {start} already, beyond rl.steps={run.rl.steps}; set rl.steps={start} or more, or"
                " choose another run=FOLDER"
            )
        if start == run.rl.steps and (summary := read_summary(run)):
            print(f"{folder} is complete; nothing to do")
            print_summary(summary)
            return
        if start is None:
            with clock.part("cold start"):
                params = given if given is not None else cold_start(run)
            state = begin_from(params, run.model, run.rl.optimizer, mesh)
            notes = {"tokens": {"decode": 0, "update": 0}, "elapsed_s": 0.0}
        else:
            print(f"resuming {folder} from step {start} of {run.rl.steps}")
            state, notes = restore(run, checkpoints, start, mesh)
            clock.seconds = notes["seconds"]
        write_config(run)
        (folder / SUMMARY).unlink(missing_ok=True)  # that of a run that ended earlier and goes on now
        print("\n".join(sandbox_lines(tools.sandbox if tools else None)))
        if tools:
            print(f"tools: {', '.join(tools.names)}")
        print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
        session = Session(
            run=run,
            folder=folder,
            tokenizer=tokenizer,
            problems=problems,
            tools=tools,
            engine=Engine(run.model, run.engine, state.params, mesh, stop_ids(run, tokenizer), run.seed),
            update=make_update(run.model, run.rl.optimizer, policy_token_loss(run.rl.clip), mesh, run.rl.temperature),
            checkpoints=checkpoints,
            log=stack.enter_context(MetricsLog(folder, start)),
            bar=stack.enter_context(Progress("RL", run.rl.steps, start or 0)),
            clock=clock,
            notes=notes,
            began=began,
        )
        session.engine.warm_up()
        await learn_from_rewards(session, state, start)
        summary = summarise_run(session)
        write_summary(run, summary)
    print_summary(summary)
    print(f"\nto look at it: python -m retool_jax.report run={folder}")


async def learn_from_rewards(s: Session, state: TrainState, start: int | None) -> None:
    """The algorithm: roll out, score, compare within groups, update, hand the weights to the engine; look and save."""
    run = s.run
    if start is None:
        save(s, 0, state)
    await look(s, start or 0)  # what of it is not in the log: a look that was cut off, or that became due since
    for step in range((start or 0) + 1, run.rl.steps + 1):
        with s.clock.part("rollout"):
            samples = samples_of(run, s.problems["train"], step)
            trajectories, statistics = await rollout(s.engine, s.tokenizer, s.tools, samples, run.rollout)
            await asyncio.to_thread(score, s.tokenizer, trajectories)
            numbers = summarise(trajectories, run.rl.max_dropped)
        with s.clock.part("update"):
            groups = learnable_groups(trajectories, run.rl.group_size)
            state, learned = learn(s.update, state, batches_of(run, groups))
            s.engine.update_params(state.params)

        s.notes["tokens"]["decode"] += statistics.decoded_tokens
        s.notes["tokens"]["update"] += sum(len(example.ids) for group in groups for example in group)
        numbers |= learned | {"groups_used": len(groups)}
        s.log.write("rl", step, numbers | performance(statistics))
        speed = statistics.decoded_tokens / statistics.total_s
        s.bar.step(step, {"accuracy": numbers["accuracy"], "tool rate": numbers["tool_rate"], "tokens/s": speed})
        if happened := faults(numbers):
            s.bar.say(f"step {step}: {happened}")
        # Before the look, which may take long: a start after a kill takes the look again, not the step.
        if step % run.checkpoint.every == 0 or step == run.rl.steps:
            save(s, step, state)
        await look(s, step)


async def look(s: Session, step: int) -> None:
    """Measure accuracy on the splits whose turn it is after this step and whose numbers are not in the log."""
    for split in splits_at(s.run, step):
        if looked(s.folder, step, split):
            continue
        with s.clock.part("evaluation"):
            numbers = await evaluate(
                s.engine,
                s.tokenizer,
                s.tools,
                s.problems[split],
                step,
                s.run.evaluation.problems,
                replace(s.run.rollout, answer_tokens=s.run.evaluation.answer_tokens),
                s.folder,
                s.run.rl.max_dropped,
            )
        s.log.write("eval", step, numbers)
        s.bar.say(
            f"step {step}: {split} accuracy {numbers['accuracy']:.3f} ± {numbers['accuracy_stderr']:.3f}"
            f" (greedy {numbers['greedy_accuracy']:.3f}), tool rate {numbers['tool_rate']:.2f}"
        )
        if happened := faults(numbers):
            s.bar.say(f"step {step}: {split}: {happened}")


def looked(folder: Path, step: int, split: str) -> dict | None:
    """The numbers of a look at a split after a step, from the log; None while there are none."""
    for record in read_metrics(folder) if (folder / METRICS_FILE).is_file() else ():
        if (record["kind"], record["step"], record.get("split")) == ("eval", step, split):
            return {key: value for key, value in record.items() if key not in ("kind", "step")}
    return None


def splits_at(run: RLRun, step: int) -> list[str]:
    """The final split before the first and after the last step, the dev split every so often."""
    splits = [run.evaluation.final_split] if step in (0, run.rl.steps) else []
    if run.evaluation.every and step % run.evaluation.every == 0:
        splits.append("dev")
    return list(dict.fromkeys(splits))


def save(s: Session, step: int, state: TrainState) -> None:
    with s.clock.part("checkpoint"):
        elapsed = s.notes["elapsed_s"] + time.perf_counter() - s.began
        s.checkpoints.save(step, state, s.notes | {"seconds": s.clock.seconds, "elapsed_s": elapsed})


def sandbox_lines(box: Sandbox | None) -> list[str]:
    """Which sandbox a run has, and what its calls cost where that is much (docs/sandbox.md has the measurements)."""
    if box is None:
        return ["sandbox: none"]
    lines = [f"sandbox: {box.description}"]
    if box.backend == "gvisor":
        lines.append(
            "  a call takes about 20 ms of processor time there, with sandbox.backend=[bubblewrap] about 3 ms, and with"
            " sandbox.backend=[process] less, which isolates nothing"
        )
    return lines


def check_prompts(run: RLRun, tokenizer: Tokenizer, problems: dict[str, Problems], tools: Toolbox | None) -> None:
    """Refuse over-long prompts of a data set before anything runs; the miniature's are checked as they come."""
    for stream in problems.values():
        for problem in stream.finite or ():
            encode_prompt(tokenizer, problem, tools, run.rollout.max_prompt_tokens, run.rollout.grammar)


def stop_ids(run: RLRun, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a turn: the model family's own, and with tools those after which the grammar hears a call."""
    if not words_of(run.tools):
        return tokenizer.stop_ids
    return tuple(GRAMMARS[run.rollout.grammar].stop_ids(tokenizer))


def cold_start(run: RLRun) -> Params:
    """The weights that RL begins from: those of `init_from`, or of the cold start that belongs to this config."""
    if run.init_from:
        print(f"starting from {run.init_from}")
        return load_weights(run, Path(run.init_from))
    supervised = run.cold_start()
    if (params := finished_weights(supervised)) is not None:
        print(f"cold start: reusing {supervised.run}")
        return params
    print(f"cold start: none yet for this config, training it first in {supervised.run}")
    return train_cold_start(supervised, wait=True).params


def restore(run: RLRun, checkpoints: Checkpoints, step: int, mesh: Mesh) -> tuple[TrainState, dict]:
    """The train state and notes of a checkpoint of this run."""
    shapes = jax.eval_shape(partial(fresh_state, optimizer=run.rl.optimizer), abstract_params(run.model)[1])
    return checkpoints.restore(step, abstract_like(shapes, state_shardings(run.model, run.rl.optimizer, mesh)))


def samples_of(run: RLRun, problems: Problems, step: int) -> list[Sample]:
    """The samples of a step, group by group; problems and random streams follow from the step alone."""
    P, n = run.rl.prompts_per_step, run.rl.group_size
    first = (step - 1) * P
    return [
        Sample(problems[first + group], (first + group) * n + member, run.rl.temperature)
        for group in range(P)
        for member in range(n)
    ]


def learnable_groups(trajectories: Sequence[Trajectory], group_size: int) -> list[list[Example]]:
    """Groups with their advantages, without what cannot teach.

    A trajectory that the machinery dropped is no signal about the policy. A group of equal rewards has
    zero advantage everywhere and is left out of the batch, so the token mean is over tokens that carry a gradient.
    """
    groups = []
    for first in range(0, len(trajectories), group_size):
        kept = [t for t in trajectories[first : first + group_size] if not t.dropped]
        rewards = np.array([t.reward for t in kept])
        if len(kept) > 1 and rewards.std() > 0:
            pairs = zip(kept, group_relative(rewards), strict=True)
            groups.append([trajectory.example(float(advantage)) for trajectory, advantage in pairs])
    return groups


def batches_of(run: RLRun, groups: list[list[Example]]) -> list[PackedBatch]:
    """One packed batch per optimiser step; every one has the same shape, so one compiled update serves all."""
    rl = run.rl
    rows = rl.prompts_per_step // rl.minibatches * rl.group_size  # at worst each trajectory fills a row
    limit = -(-rows // rl.rows_per_micro)
    dealt = [[e for group in groups[i :: rl.minibatches] for e in group] for i in range(rl.minibatches)]
    return [pack(examples, rl.row_length, rl.rows_per_micro, limit) for examples in dealt if examples]


def learn(update: Update, state: TrainState, batches: list[PackedBatch]) -> tuple[TrainState, dict[str, float]]:
    """One optimiser step per batch; returns their mean metrics.

    The first batch is updated with the weights that sampled it, so there the difference between the engine's and
    the trainer's log-probabilities is numerics alone; that is the one to report.
    """
    history = []
    for batch in batches:
        state, metrics = update(state, batch)
        history.append({key: float(value) for key, value in jax.device_get(metrics).items()})
    if not history:
        return state, {}
    means = {key: float(np.mean([metrics[key] for metrics in history])) for key in history[0]}
    return state, means | {"logprob_diff_mean": history[0]["logprob_diff_mean"]}


def performance(statistics: Statistics) -> dict[str, float]:
    """Wall-clock numbers of a step, under `perf/`: the only ones that differ between two runs of one config."""
    return {
        "perf/tokens_per_s": statistics.decoded_tokens / statistics.total_s,
        "perf/rollout_s": statistics.total_s,
        "perf/tool_wait_s": statistics.tool_wait_s,
        "perf/tool_hidden": statistics.tool_hidden,
        "perf/fill": statistics.fill,
        "perf/turn_p50_s": float(np.percentile(statistics.turn_s, 50)),
        "perf/turn_p95_s": float(np.percentile(statistics.turn_s, 95)),
        "perf/prefilled_tokens": statistics.prefilled_tokens,
        "perf/appended_tokens": statistics.appended_tokens,
        "perf/rewritten_tokens": statistics.rewritten_tokens,
    }


def summarise_run(s: Session) -> dict:
    """What the closing table shows; time that no part claims is `other`."""
    seconds, tokens = s.clock.seconds, s.notes["tokens"]
    split = s.run.evaluation.final_split
    total = s.notes["elapsed_s"] + time.perf_counter() - s.began
    rates = {part: tokens[name] / seconds[part] for part, name in (("rollout", "decode"), ("update", "update"))}
    return {
        "split": split,
        "problems": s.run.evaluation.problems,
        "steps": s.run.rl.steps,
        "before": looked(s.folder, 0, split),
        "after": looked(s.folder, s.run.rl.steps, split),
        "tokens_per_s": rates,
        "seconds": seconds | {"other": total - sum(seconds.values()), "total": total},
    }


def write_summary(run: RLRun, summary: dict) -> None:
    """Replace the run's summary in one step."""
    path = Path(run.run) / SUMMARY
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.replace(path)


def read_summary(run: RLRun) -> dict | None:
    """The summary of the run's steps; None where there is none, or that of another number of steps."""
    try:
        summary = json.loads((Path(run.run) / SUMMARY).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return summary if summary.get("steps") == run.rl.steps else None
