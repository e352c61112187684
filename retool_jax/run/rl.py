"""An RL run: claim its folder, build its parts, train to the last step, and write its summary."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from shlex import quote

from retool_jax import hosts
from retool_jax.answers import workers
from retool_jax.checkpoint import Checkpoints
from retool_jax.clock import Clock
from retool_jax.errors import UserError
from retool_jax.evaluation.purposes import classifier_named
from retool_jax.metrics import MetricsLog, Progress, print_summary
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.decoder import Params
from retool_jax.rl import loop
from retool_jax.rl.collector import Collector
from retool_jax.rl.learner import State, fingerprint
from retool_jax.rl.replay import Replay
from retool_jax.rl.sampler import Sampler
from retool_jax.rl.summary import SUMMARY, read_summary, summarise_run, write_summary
from retool_jax.rollout.reward import reward_named
from retool_jax.run.build import (
    compiled_ahead,
    engine_of,
    explain_out_of_memory,
    mesh_of,
    model_for,
    problems_of,
    sandbox_config,
    sandbox_lines,
    warm_up,
)
from retool_jax.run.folder import claim_folder, to_flat, write_config
from retool_jax.run.learner import abstract_train_state, first_state, make_learner
from retool_jax.run.origin import write_origin
from retool_jax.run.schema import RLRun
from retool_jax.run.weights import has_checkpoints, load_weights, require_checkpoint
from retool_jax.tokens.tokenizer import load_tokenizer
from retool_jax.tools.toolbox import load_tools
from retool_jax.trackers import check_loggers


async def train(run: RLRun, make_weights: Callable[[RLRun], Params]) -> None:
    """Train to the last step, resuming from the newest checkpoint; write the run folder and print the closing table.

    `make_weights` gives the first weights of a run that has no `init_from`.
    """
    began = time.perf_counter()
    require_checkpoint(run)
    check_loggers(run.logger)
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    tools = load_tools(run.tools) if not run.replay else None
    problems = problems_of(run, tokenizer, tools) if not run.replay else {}
    data = {split: stream.digest for split, stream in problems.items()}
    hosts.require_same({f"the digest of data.{split}": digest for split, digest in data.items()})
    mesh = mesh_of(run)
    async with AsyncExitStack() as stack:
        if not run.replay and not read_summary(Path(run.run), run.rl.steps):
            stack.enter_context(compiled_ahead(run, mesh, tokenizer))
        checker = None if run.replay else asyncio.get_running_loop().run_in_executor(None, workers.pool.start)
        # Weights that will be needed are loaded now: a wrong path is reported before anything is written.
        given = load_weights(run, Path(run.init_from)) if run.init_from and not has_checkpoints(run) else None

        def first_weights() -> Params:
            return load_weights(run, Path(run.init_from)) if run.init_from else make_weights(run)

        # These names, too, are looked up before anything is written.
        reward_named(run.rl.reward.name)
        classifier_named(run.evaluation.purposes)
        learner = None if run.rl.rollout_only else make_learner(run, mesh, first_weights)
        frozen = {name: fingerprint(model.params) for name, model in learner.frozen.items()} if learner else {}
        if checker:
            await checker
        elif not has_checkpoints(run):
            await Replay(Path(run.replay), run.rl, run.model.vocab_size).take()  # so that a bad file is reported now

        stack.enter_context(explain_out_of_memory(run))
        if tools:
            await stack.enter_async_context(tools.open(sandbox_config(run)))
        folder = stack.enter_context(claim_folder(run))
        checkpoints = stack.enter_context(closing(Checkpoints(folder / "checkpoints", run.checkpoint.keep)))
        clock = stack.enter_context(closing(Clock()))
        start = checkpoints.latest()
        if start is not None and start > run.rl.steps:
            raise UserError(
                f"{folder} is at step {start} already, beyond rl.steps={run.rl.steps}; set rl.steps={start} or more, or"
                " choose another run=FOLDER"
            )
        if start == run.rl.steps and (summary := hosts.broadcast(read_summary(folder, run.rl.steps))):
            print(f"{folder} is complete; nothing to do")
            print_summary(summary)
            return
        if start is None:
            with clock.part("cold start"):
                if run.init_from:
                    print(f"starting from {run.init_from}")
                state = first_state(run, given if given is not None else first_weights(), mesh)
            notes = {"tokens": {"decode": 0, "update": 0}, "elapsed_s": 0.0}
        else:
            print(f"resuming {folder} from step {start} of {run.rl.steps}")
            state, notes = checkpoints.restore(start, abstract_train_state(run, mesh))
            check_data(run, notes.get("data", {}), data)
            check_frozen(run, frozen, notes.get("frozen", {}))
            clock.seconds = notes["seconds"]

        def elapsed_s() -> float:
            return notes["elapsed_s"] + time.perf_counter() - began

        def save(step: int, state: State, drawn: dict) -> None:
            with clock.part("checkpoint"):
                counts = {"tokens": notes["tokens"], "seconds": clock.seconds, "elapsed_s": elapsed_s()}
                checkpoints.save(step, state, counts | {"drawn": drawn, "data": data, "frozen": frozen})

        write_config(run)
        write_origin(folder)
        if first := hosts.is_first():
            (folder / SUMMARY).unlink(missing_ok=True)  # of a shorter run that had ended and goes on now
        engine = None
        if run.replay:
            print(f"rollouts: those of {run.replay}; no engine, no sandbox, and no evaluation on held-out problems")
            rollouts = Replay(Path(run.replay), run.rl, run.model.vocab_size, start or 0)
        else:
            print("\n".join(sandbox_lines(tools.sandbox if tools else None)))
            if tools:
                print(f"tools: {', '.join(tools.names)}")
            engine = engine_of(run, state.params, mesh, tokenizer)
            sampler = Sampler(problems["train"], run.rl, notes.get("drawn"), start or 0)
            rollouts = Collector(engine, tokenizer, tools, sampler, run.rl, run.rollout, start or 0)
        print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
        parts = loop.Parts(
            rl=run.rl,
            rollout=run.rollout,
            evaluation=run.evaluation,
            folder=folder,
            tokenizer=tokenizer,
            problems=problems,
            tools=tools,
            engine=engine,
            rollouts=await stack.enter_async_context(rollouts),
            learner=learner,
            save=save,
            save_every=run.checkpoint.every,
            log=stack.enter_context(MetricsLog(folder if first else None, start, run.logger, to_flat(run))),
            bar=stack.enter_context(Progress("RL", run.rl.steps, start or 0, quiet=not first)),
            clock=clock,
            tokens=notes["tokens"],
        )
        if engine:
            warm_up(engine)
        await loop.train(parts, state, start)
        checkpoints.wait()  # a summary marks the run as complete, so the last checkpoint has to be complete first
        if first:
            summary = summarise_run(folder, run.evaluation, run.rl.steps, clock.seconds, notes["tokens"], elapsed_s())
            write_summary(folder, summary)
    if first:
        print_summary(summary)
        print(f"\nto look at it: python -m retool_jax.report run={quote(str(folder))}")


def check_data(run: RLRun, there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """A `UserError` when a split's problems differ from those of the checkpoint; both are given as digests."""
    for split, digest in here.items():
        if there.get(split, digest) != digest:
            raise UserError(
                f"data.{split}={getattr(run.data, split)} is not what {run.run} began with; restore it, or choose"
                " another run=FOLDER"
            )


def check_frozen(run: RLRun, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """A `UserError` when the reference or the teacher differs from the checkpoint's; both are given as fingerprints."""
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            teacher = f"rl.teacher.init_from={run.rl.teacher.init_from}"
            what = teacher if name == "teacher_logprobs" else f"init_from={run.init_from or 'the cold start'}"
            raise UserError(
                f"{what} holds other weights than when {run.run} began to learn from them; restore them, or choose"
                " another run=FOLDER"
            )
