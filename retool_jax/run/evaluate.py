"""An evaluation run: find the samples that its folder lacks, draw them, and write the result of all samples.

With several hosts, each draws its share of the missing samples with an engine, tools and a sandbox of its own. The
first host writes the files that exist once: the config, asked.json, the merged samples, and the result.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import jax
from rich.console import Console

from retool_jax import hosts
from retool_jax.answers import workers
from retool_jax.checkpoint import PARAMS, WHOLE, Checkpoints
from retool_jax.data.problems import MADE, Problem, digest_of
from retool_jax.engine.conversation import Statistics
from retool_jax.errors import UserError, one_line
from retool_jax.evaluation.config import RESULT, SAMPLES
from retool_jax.evaluation.measure import draw, request_of
from retool_jax.evaluation.numbers import describe_failures, summarise
from retool_jax.evaluation.purposes import classifier_named
from retool_jax.evaluation.results import COMPLETE, ProblemResult, compare, numbers_of, table
from retool_jax.evaluation.store import Store
from retool_jax.fields import show as show_value
from retool_jax.files import replacing
from retool_jax.metrics import Progress, format_percent
from retool_jax.models.attention import resolve_kernel
from retool_jax.models.huggingface import find_folder
from retool_jax.rl.collector import merge_statistics
from retool_jax.rl.summary import performance
from retool_jax.rollout.rollout import Sample
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.run.build import (
    compiled_ahead,
    engine_of,
    explain_out_of_memory,
    mesh_of,
    model_for,
    problems_to_evaluate,
    sandbox_config,
    sandbox_lines,
    warm_up,
)
from retool_jax.run.folder import check_folder, claim_folder, to_flat, write_config
from retool_jax.run.origin import versions, write_origin
from retool_jax.run.schema import EvaluateRun
from retool_jax.run.weights import load_weights, no_checkpoint, require_checkpoint
from retool_jax.shapes import complaint
from retool_jax.tokens.tokenizer import Tokenizer, load_tokenizer
from retool_jax.tools.toolbox import load_tools

ASKED = "asked.json"  # whose weights and which problems the samples are of
PERFORMANCE = "perf.json"  # timings of the process that drew last


async def evaluate(run: EvaluateRun) -> dict:
    """Draw the samples that the folder lacks, write the result there, print it and return it.

    The result of a finished evaluation is only printed and returned.

    Raises:
        UserError: the weights or the result to compare with are missing or do not fit; the folder holds something
            else; or infrastructure faults lost too many samples.
    """
    theirs = read_result(Path(run.compare)) if run.compare else None
    classifier_named(run.evaluation.purposes)
    require_checkpoint(run)
    tokenizer = load_tokenizer(run.tokenizer)
    run = replace(run, model=model_for(run, tokenizer))
    tools = load_tools(run.tools)
    problems = problems_to_evaluate(run, tokenizer, tools)
    folder = Path(run.run)
    check_folder(run)
    check_writable(folder)
    if theirs:  # report a result of another set now
        rows = [{"id": problem.id, "correct": [False]} for problem in problems]
        compare({"set": set_name(run), "problems": rows, "problems_sha256": digest_of(problems)}, theirs)
    asked = {"set": set_name(run), "problems": digest_of(problems), "weights": weights_of(run.init_from)}
    hosts.require_same({"the digest of data.source": asked["problems"]})
    check_asked(folder, asked)
    if result := hosts.broadcast(complete_result(folder)):
        print(f"{folder} is complete; nothing to draw")
        show(result, theirs)
        return result
    mesh = mesh_of(run)
    async with AsyncExitStack() as stack:
        stack.enter_context(compiled_ahead(run, mesh, tokenizer))
        checker = asyncio.get_running_loop().run_in_executor(None, workers.pool.start)
        params = load_weights(run, Path(run.init_from))
        await checker
        stack.enter_context(explain_out_of_memory(run))
        if tools:
            await stack.enter_async_context(tools.open(sandbox_config(run)))
        stack.enter_context(claim_folder(run))
        check_asked(folder, asked)
        store = stack.enter_context(Store(folder))
        if first := hosts.is_first():
            write_json(folder / ASKED, asked)
        write_config(run)
        write_origin(folder)
        every = sample_keys(len(problems), run.evaluation.samples)
        check_samples(folder, store, every)
        missing, total = [key for key in every if not store.finished(*key)], len(every)
        own = [key for number, key in enumerate(missing) if hosts.is_mine(number)]
        if missing:
            print("\n".join(sandbox_lines(tools.sandbox if tools else None)))
            how = run.evaluation
            preset = f", as evaluation.preset={how.preset}" if how.preset else ""
            print(f"{len(problems)} problems x {how.samples}, T={how.temperature:g}, top-p {how.top_p:g}{preset}")
            print(f"attention: {resolve_kernel(run.model, mesh.devices.flat[0].platform)}")
            if len(missing) < total:
                print(f"{folder}: {total - len(missing)} of {total} samples are there already")
            if len(own) < len(missing):
                print(f"this host draws {len(own)} of {len(missing)} samples")
            engine = engine_of(run, params, mesh, tokenizer)
            del params  # the engine has its own
            warm_up(engine)
            there = total - len(missing)
            bar = stack.enter_context(Progress("evaluation", there + len(own), there, quiet=not first))
            recorder = SampleRecorder(tokenizer, store, own, total, run.evaluation.max_dropped, asked, bar)
            samples = (sample_of(run, problems, *key) for key in own)
            statistics = await draw(engine, tokenizer, tools, samples, run.rollout, recorder, stream=True)
            statistics = merge_statistics(hosts.gather(statistics))
            if first:
                write_json(folder / PERFORMANCE, performance_of(statistics, len(missing)))
        store.collect()
        result = None
        if first:
            if lost := sum(key not in store.done for key in every):
                raise UserError(
                    f"{folder} lacks {lost} of the samples that other hosts drew; the folder has to be the same one for"
                    " all of them: copy their samples.NUMBER.jsonl into it, and start the same command again"
                )
            result = result_of(run, problems, store, asked, tokenizer)
            write_json(folder / RESULT, result)
        result = hosts.broadcast(result)
    show(result, theirs)
    if first:
        print(f"{folder / RESULT} has these numbers; every trajectory is in samples.jsonl beside it")
    return result


def sample_keys(problems: int, samples: int) -> list[tuple[int, int]]:
    """(index of a problem, number of a sample) in the order of drawing. Samples of one problem are adjacent, since they
    share its prompt."""
    return [(i, j) for i in range(problems) for j in range(samples)]


def sample_of(run: EvaluateRun, problems: Sequence[Problem], problem: int, sample: int) -> Sample:
    how = run.evaluation
    return Sample(problems[problem], request_of(problem, sample), how.temperature, how.top_p, how.top_k)


class SampleRecorder:
    """Called with trajectories when they are scored: stores them, counts them, and updates the progress bar.

    `missing` are the samples that this host draws; `total` is the number of all samples of the evaluation.

    Raises:
        UserError: infrastructure faults lost more than `evaluation.max_dropped` of this host's share of the samples.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        store: Store,
        missing: Sequence[tuple[int, int]],
        total: int,
        max_dropped: float,
        asked: dict,
        bar: Progress,
    ) -> None:
        self._tokenizer, self._store, self._missing, self._bar = tokenizer, store, missing, bar
        self._about = {"split": asked["set"], "step": asked["weights"]["step"] or 0}
        self._max_dropped = max_dropped
        kept = [done for done in store.done.values() if not done.dropped]
        self._total = -(-total // jax.process_count())
        self._kept, self._right = len(kept), sum(done.correct for done in kept)
        self._tokens = self._dropped = 0
        self._began = time.perf_counter()

    def __call__(self, scored: list[tuple[int, Trajectory]]) -> None:
        records = []
        for number, trajectory in scored:
            problem, sample = self._missing[number]
            if trajectory.dropped:
                trajectory.fault = hosts.with_host_name(trajectory.fault)
            records.append(trajectory.record(self._tokenizer, **self._about, group=problem, sample=sample))
        self._store.add(records)
        lost = [trajectory for _, trajectory in scored if trajectory.dropped]
        self._dropped += len(lost)
        self._kept += len(scored) - len(lost)
        self._right += sum(record["correct"] for record in records)
        self._tokens += sum(sum(trajectory.sampled) for _, trajectory in scored)
        speed = self._tokens / (time.perf_counter() - self._began)
        if self._kept:
            self._bar.step(self._kept, {"accuracy": self._right / self._kept, "tokens/s": speed})
        if lost and self._dropped > self._max_dropped * self._total:
            raise UserError(
                f"the machinery lost {self._dropped} of {self._total} samples, a share above evaluation.max_dropped="
                f"{self._max_dropped:g}, the last as {lost[-1].end} ({one_line(lost[-1].fault)}); mend"
                " the cause and start the same command again, which draws them anew"
            )


# --- what is asked ----------------------------------------------------------------------------------------------------


def set_name(run: EvaluateRun) -> str:
    """The name of the run's set in results."""
    return f"{run.data.source}:{run.data.split}" if run.data.source in MADE else run.data.source


def weights_of(name: str) -> dict:
    """The identity of the weights of a folder or hub id: `init_from`, `step` (of a run), `sha256` (`digest_of_files`).

    The files are the `*.safetensors` of a Hugging Face folder, or the weights of a run's newest checkpoint without the
    optimiser's state.

    Raises:
        UserError: there is no checkpoint.
    """
    folder, step = find_folder(name), None
    if (folder / "config.json").is_file():
        top, files = folder, folder.glob("*.safetensors")
    else:
        with closing(Checkpoints(folder / "checkpoints", keep=None)) as checkpoints:
            step = checkpoints.latest()
        if step is None:
            raise no_checkpoint(folder)
        top = folder / "checkpoints" / str(step)
        top = top / WHOLE if (top / WHOLE).is_dir() else top / PARAMS
        files = (path for path in top.rglob("*") if path.is_file())
    # Only one host reads all these bytes.
    digest = hosts.broadcast(digest_of_files(top, files) if hosts.is_first() else "")
    return {"init_from": name, "step": step, "sha256": digest}


def digest_of_files(top: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names below `top` and the SHA-256 of each file, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(top)} {own}\n".encode())
    return digest.hexdigest()


def check_asked(folder: Path, asked: dict) -> None:
    """A `UserError` when a folder's samples are of other problems, or of weights that have changed since."""
    if not (folder / ASKED).is_file():
        return
    try:
        there = json.loads((folder / ASKED).read_text())
        there = {what: there[what] for what in ("weights", "problems")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / ASKED} cannot be read ({one_line(error)}), so the weights and problems of the samples there are"
            " unknown; restore it, or choose another run=FOLDER"
        ) from error
    for what, key in (("weights", "init_from"), ("problems", "data.source")):
        if there[what] != asked[what]:
            raise UserError(
                f"{folder} has samples of other {what}: {key} is not what it was when they were drawn; restore it, or"
                " choose another run=FOLDER"
            )


def check_samples(folder: Path, store: Store, every: Collection[tuple[int, int]]) -> None:
    """A `UserError` when a folder holds a sample that is not in `every`, the (problem, sample) of the evaluation."""
    if unknown := sorted(store.done.keys() - set(every)):
        problem, sample = unknown[0]
        raise UserError(
            f"{folder / SAMPLES} has sample {sample} of group {problem}, and groups count from 0 up to"
            f" {max(every)[0]}, their samples up to {max(every)[1]}; remove its line"
        )


def check_writable(folder: Path) -> None:
    """A `UserError` when a folder can be neither made nor written to; nothing is made."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "cannot be written to" if above.is_dir() else "is no folder"
        raise UserError(f"cannot write run={folder}: {above} {why}; choose another run=FOLDER")


# --- the result -------------------------------------------------------------------------------------------------------


def result_of(run: EvaluateRun, problems: Sequence[Problem], store: Store, asked: dict, tokenizer: Tokenizer) -> dict:
    """The result, computed only from the samples in the folder; it contains no timings.

    Raises:
        UserError: infrastructure faults lost every sample.
    """
    found: list[list[Trajectory]] = [[] for _ in problems]
    for (problem, _), trajectory in store.trajectories(problems):
        found[problem].append(trajectory)
    everything = [trajectory for trajectories in found for trajectory in trajectories]
    kept = [[trajectory for trajectory in trajectories if not trajectory.dropped] for trajectories in found]
    answered = [
        ProblemResult(problem.id, tuple(t.verdict.correct for t in own), tuple(t.verdict.answer for t in own))
        for problem, own in zip(problems, kept, strict=True)
    ]
    count = sum(map(len, kept))
    if not count:
        raise UserError(
            f"the machinery lost all {len(everything)} samples ({one_line(everything[0].fault)}); mend the cause and"
            " start the same command again"
        )
    differing = sum(t.exact != t.verdict.correct for own in kept for t in own)
    summary = summarise(everything, 1.0, run.evaluation.purposes, tokenizer)
    ks = [k for k in run.evaluation.ks if any(len(own) >= k for own in kept)]
    config = {key: value for key, value in to_flat(run).items() if key not in ("run", "compare")}
    return {
        "set": asked["set"],
        "weights": asked["weights"],
        "samples": run.evaluation.samples,
        "dropped": len(everything) - count,
        "numbers": numbers_of(answered, ks, run.seed),
        "strict_differs": {"count": differing, "share": differing / count},
        "trajectories": {key: value for key, value in summary.items() if not key.startswith("perf/")},
        "problems": [asdict(one) for one in answered],
        "problems_sha256": asked["problems"],
        "config": config,
        "versions": [line for line in versions().decode().splitlines() if line],
    }


def performance_of(statistics: Statistics, samples: int) -> dict:
    """Timings of the samples that a process drew."""
    return {
        "samples": samples,
        **{key.removeprefix("perf/"): value for key, value in performance(statistics, ()).items()},
    }


def read_result(path: Path) -> dict:
    """Read the result file of an evaluation.

    Raises:
        UserError: the file is missing or is not a result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or not {"set", "problems", "numbers", "dropped"} <= result.keys():
            raise ValueError("it has no set, problems, numbers and dropped")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({one_line(error)}); give the {RESULT} of an evaluation") from error
    return result


def complete_result(folder: Path) -> dict | None:
    """The folder's result if it counts every sample; None if it is missing or damaged, so that it is made again."""
    try:
        result = read_result(folder / RESULT)
    except UserError:
        return None
    return result if not complaint(result, COMPLETE) and not result["dropped"] else None


def write_json(path: Path, values: dict) -> None:
    """Replace a JSON file atomically; a lone surrogate in an answer is written as its escape."""
    with replacing(path, errors="backslashreplace") as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def show(result: dict, theirs: dict | None) -> None:
    """Print a result's table, the statistics of its trajectories, and the difference to `theirs`; first host only."""
    if not hosts.is_first():
        return
    console, numbers = Console(highlight=False), result["trajectories"]
    console.print(table(result["numbers"], f"{result['set']}, {result['samples']} samples of each problem"))
    ends = {name.removeprefix("end/"): count for name, count in numbers.items() if name.startswith("end/") and count}
    strict = result["strict_differs"]
    print(
        f"turns {numbers['turns_mean']:.2f}, calls {numbers['calls_per_sample']:.2f}, response tokens"
        f" {numbers['response_tokens']:.1f}, tool rate {format_percent(numbers['tool_rate'])}, tool success"
        f" {format_percent(numbers['tool_success'])}\nends: {', '.join(f'{name} {n}' for name, n in ends.items())}\n"
        f"the strict box rule says otherwise of {strict['count']} answers ({format_percent(strict['share'])})"
    )
    if happened := describe_failures(numbers):
        print(f"{happened}; the same command again draws what was lost anew")
    if theirs:
        compared = compare(result, theirs)
        console.print(table(compared, f"{result['set']}: this one and the other, on the same problems"))
        if compared["changed"]:
            print("the set has changed between them: ids are compared, and not all problems are the same")
        if differs := compared["drawn_differently"].items():
            words = ", ".join(f"{key} is {show_value(ours)} and {show_value(other)}" for key, (ours, other) in differs)
            print(f"their samples were drawn in different ways: {words}")
