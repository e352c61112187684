"""`python -m retool_jax.prepare source=... out=FILE.jsonl`: published rows to files that training reads."""

import asyncio
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from retool_jax.data import problems as problems_of
from retool_jax.data.problems import Overlap, Problem, load_problems, overlaps, question_of, to_problem, to_row
from retool_jax.data.sources import read_rows
from retool_jax.data.traces import BadTrace, boxed_answer, check_answer, conversation, run_again, truth_of
from retool_jax.errors import UserError, run_command
from retool_jax.fields import split_words
from retool_jax.files import replacing
from retool_jax.metrics import Progress
from retool_jax.sandbox import Sandbox, SandboxConfig, open_sandbox
from retool_jax.sandbox.backends import candidates

USAGE = """\
Convert, check and clean published rows, and write those that can be used as JSONL.

    python -m retool_jax.prepare source=SOURCE out=FILE.jsonl [key=value ...]

source=SOURCE        a .jsonl, .json or .parquet file; a hub id (ID, ID:SPLIT or ID:CONFIG/SPLIT); tfds:NAME/SPLIT
out=FILE.jsonl       what to write; a report with every dropped row is written beside it as FILE.report.json
kind=traces          demonstrations for sft.data, from ReTool-SFT in its raw or its multi-turn form
kind=problems        problems for data.train: DAPO-Math-17k, AIME, GSM8K, MATH-500 and files in their columns;
                     repeats are dropped, and every question asks for its answer in the same words
                     default: traces where the first row has messages, problems otherwise
verify=true          traces only: run every program again in the sandbox and compare what it prints; drop rows whose
                     final answer is wrong, where the true one is known
sandbox=NAME[,NAME]  with verify=true: back-ends in order of preference (gvisor, bubblewrap, process, remote);
                     default: auto, which is gvisor, else bubblewrap; process is for code that you trust
answers=FILE[,FILE]  with verify=true: problems whose answers are the truth for traces that bring none
overlap=FILE[,FILE]  report questions that also stand in these problems, for example AIME 2024 and 2025
limit=N              read the first N rows only

For example:

    python -m retool_jax.prepare source=JoeYing/ReTool-SFT out=retool_sft.jsonl verify=true
    python -m retool_jax.prepare source=BytedTsinghua-SIA/DAPO-Math-17k out=dapo.jsonl overlap=AIME24.jsonl"""

LONG = 2000  # rows from which on reading shows its progress
AT_ONCE = 64  # traces that are verified together


@dataclass(frozen=True)
class Job:
    """The command line's words."""

    source: str
    out: Path
    kind: str = ""  # traces or problems; empty: by the first row
    verify: bool = False
    sandbox: tuple[str, ...] = ("auto",)
    answers: tuple[str, ...] = ()
    overlap: tuple[str, ...] = ()
    limit: int = 0  # 0: all rows


@dataclass
class Report:
    """What became of the rows; `dropped` has (row, reason), rows counted from 1."""

    source: str
    kind: str
    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    outputs: Counter[str] = field(default_factory=Counter)  # of programs that ran again, by verdict
    differences: list[dict] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # final answers that were compared with the truth
    overlaps: dict[str, list[dict]] = field(default_factory=dict)

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        self.reasons[reason] += 1
        self.dropped.append((row, detail or reason))


@dataclass(frozen=True)
class Trace:
    """A converted row on its way to the file."""

    row: int
    messages: list[dict]
    truth: str | None

    @property
    def question(self) -> str:
        return question_of(next(turn["content"] for turn in self.messages if turn["role"] == "user"))


def parse_words(words: Sequence[str]) -> Job:
    """The job that a command line describes.

    Raises:
        UserError: an unknown key (naming the nearest), or a value that is none.
    """
    keys = ("source", "out", "kind", "verify", "sandbox", "answers", "overlap", "limit")
    values = dict(split_words(words, keys))
    for key in ("source", "out"):
        if key not in values:
            raise UserError(f"no {key} given; usage: python -m retool_jax.prepare source=SOURCE out=FILE.jsonl")
    if values.get("kind", "traces") not in ("traces", "problems"):
        raise UserError(f"kind={values['kind']} is not one of: traces, problems")
    if values.get("verify", "true") not in ("true", "false"):
        raise UserError(f"verify={values['verify']} is not one of: true, false")
    limit = values.get("limit", "1")
    if not (limit.isascii() and limit.isdigit() and int(limit)):
        raise UserError(f"limit={limit} must be a whole number of rows, at least 1")
    job = Job(
        values["source"],
        Path(values["out"]),
        values.get("kind", ""),
        values.get("verify") == "true",
        tuple(filter(None, values.get("sandbox", "auto").split(","))),
        *(tuple(filter(None, values.get(key, "").split(","))) for key in ("answers", "overlap")),
        int(values.get("limit", 0)),
    )
    if job.answers and not job.verify:
        raise UserError(f"answers={values['answers']} is read with verify=true only; add it, or leave answers out")
    if "sandbox" in values and not job.verify:
        raise UserError(f"sandbox={values['sandbox']} is used with verify=true only; add it, or leave sandbox out")
    candidates(job.sandbox)
    check_out(job)
    return job


def check_out(job: Job) -> None:
    """A `UserError` unless the file can be written, told before the work and not after it."""
    out = job.out
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"out={out} must be a file named *.jsonl")
    inputs = (job.source, *job.answers, *job.overlap)
    if out.exists() and any(Path(name).exists() and out.samefile(name) for name in inputs):
        raise UserError(f"out={out} is also read; choose another file")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"out={out}: {folder} is no folder that can be written; choose another file")


def prepare(job: Job) -> Report:
    """Do the job: read, convert, verify, compare, write. Returns what became of the rows."""
    everything = read_rows(job.source)
    rows = list(itertools.islice(everything, job.limit)) if job.limit else everything
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"source={job.source} has no rows")
    kind = job.kind or ("traces" if "messages" in first else "problems")
    if job.verify and kind == "problems":
        raise UserError("verify=true checks traces, and these rows are problems; leave it out, or set kind=traces")
    references = {name: [problem.question for problem in load_problems(name)] for name in job.overlap}
    truths = {key_of(problem.question): problem.ground_truth for name in job.answers for problem in load_problems(name)}

    report = Report(job.source, kind)
    if kind == "traces":
        traces = convert(watched(rows), report)
        if job.verify:
            traces = asyncio.run(verify(traces, truths, report, job.sandbox))
        questions = [trace.question for trace in traces]
        lines = [
            {"messages": trace.messages} | ({"ground_truth": trace.truth} if trace.truth else {}) for trace in traces
        ]
    else:
        kept = read_problems(watched(rows), job.source, report)
        questions = [problem.question for problem in kept]
        lines = [to_row(problem, Path(job.source).stem) for problem in kept]
    report.kept = len(lines)
    if not lines:
        worst = ", ".join(f"{reason} ({count})" for reason, count in report.reasons.most_common(3))
        detail = report.dropped[0][1] if report.dropped else "no rows"
        raise UserError(f"no row of {job.source} can be used: {worst}; the first: {detail}; nothing was written")
    for name, texts in references.items():
        found = overlaps(questions, texts)
        report.overlaps[name] = [describe_overlap(overlap, questions, texts) for overlap in found]
    write(job.out, lines, report)
    return report


def watched(rows: Iterable[dict]) -> Iterator[tuple[int, dict]]:
    """The rows with their numbers, from 1; reading many of them shows how far it is."""
    total = len(rows)
    if total < LONG:
        yield from enumerate(rows, start=1)
        return
    with Progress("reading", total) as bar:
        for number, row in enumerate(rows, start=1):
            yield number, row
            bar.step(number, {})


def key_of(question: str) -> str:
    """By what two prompts ask the same question: its words, whatever asks for a form of the answer."""
    return " ".join(question_of(question).split())


# --- traces -----------------------------------------------------------------------------------------------------------


def convert(rows: Iterable[tuple[int, dict]], report: Report) -> list[Trace]:
    """The rows that are demonstrations with an answer in a box; the others are in the report, with their reason."""
    traces = []
    for number, row in rows:
        report.rows += 1
        try:
            messages = conversation(row)
            boxed_answer(messages)
        except BadTrace as reason:
            report.drop(number, str(reason))
        else:
            traces.append(Trace(number, messages, truth_of(row)))
    return traces


async def verify(
    traces: Sequence[Trace], truths: dict[str, str], report: Report, backend: tuple[str, ...]
) -> list[Trace]:
    """Run every program again and check every final answer whose truth is known; wrong answers are dropped."""
    kept = []
    async with open_sandbox(SandboxConfig(backend=backend, slots=os.cpu_count() or 1)) as box:
        with Progress("verifying", max(len(traces), 1)) as bar:
            for start in range(0, len(traces), AT_ONCE):
                part = traces[start : start + AT_ONCE]
                await asyncio.gather(*(_run_programs(trace, box, report) for trace in part))
                kept += [trace for trace in part if _answer_holds(trace, truths, report)]
                bar.step(start + len(part), {"outputs that differ": report.outputs["differs"]})
    report.dropped.sort()
    report.differences.sort(key=lambda item: (item["row"], item["call"]))
    return kept


async def _run_programs(trace: Trace, box: Sandbox, report: Report) -> None:
    for rerun in await run_again(trace.messages, box):
        report.outputs[rerun.verdict] += 1
        if rerun.verdict != "same":
            report.differences.append({"row": trace.row, **asdict(rerun)})


def _answer_holds(trace: Trace, truths: dict[str, str], report: Report) -> bool:
    truth = trace.truth or truths.get(key_of(trace.question))
    if truth is None:
        report.answers["no truth to compare with"] += 1
        return True
    verdict = check_answer(trace.messages, truth)
    report.answers["right" if verdict.correct else "wrong"] += 1
    if not verdict.correct:
        report.drop(trace.row, "wrong answer", f"wrong answer: {verdict.answer} and not {truth} ({verdict.reason})")
    return verdict.correct


# --- problems ---------------------------------------------------------------------------------------------------------


def read_problems(rows: Iterable[tuple[int, dict]], source: str, report: Report) -> list[Problem]:
    """The rows that are problems, each question once, with our instruction."""

    def readable() -> Iterator[Problem]:
        for number, row in rows:
            report.rows += 1
            try:
                problem = to_problem(row, f"{source} row {number}")
            except UserError as error:
                report.drop(number, "is no problem", str(error))
            else:
                yield problem

    kept, dropped = problems_of.clean(readable())
    report.reasons.update(dropped)
    return kept


def describe_overlap(overlap: Overlap, questions: Sequence[str], references: Sequence[str]) -> dict:
    """One overlap for the report: which line of the written file, which problem of the other, and both texts."""
    return {
        "line": overlap.index + 1,
        "reference": overlap.reference + 1,
        "share": round(overlap.share, 3),
        "question": question_of(questions[overlap.index]),
        "reference_question": question_of(references[overlap.reference]),
    }


# --- what is written and shown ----------------------------------------------------------------------------------------


def write(out: Path, lines: Sequence[dict], report: Report) -> None:
    """The file and its report, each whole or not at all."""
    try:
        with replacing(report_path(out), errors="backslashreplace") as file:
            file.write(json.dumps(vars(report), ensure_ascii=False, indent=1) + "\n")
        with replacing(out, errors="backslashreplace") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out} ({error.strerror}); choose another out=") from error


def report_path(out: Path) -> Path:
    return out.with_suffix(".report.json")


def table_rows(report: Report) -> list[tuple[str, int]]:
    """(what, how many) to show, in order."""
    rows = [("rows read", report.rows), ("kept", report.kept)]
    rows += [(f"dropped: {reason}", count) for reason, count in report.reasons.most_common()]
    rows += [(f"final answer: {verdict}", count) for verdict, count in report.answers.most_common()]
    rows += [(f"output run again: {verdict}", count) for verdict, count in report.outputs.most_common()]
    for source, found in report.overlaps.items():
        name = Path(source).name
        same = sum(overlap["share"] == 1 for overlap in found)
        rows += [(f"all of its words in {name}", same), (f"half or more of its words in {name}", len(found) - same)]
    return rows


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        return
    job = parse_words(words)
    report = prepare(job)
    table = Table(title=f"{report.kind} of {report.source}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, count in table_rows(report):
        table.add_row(name, f"{count:,}")
    Console(highlight=False).print(table)
    print(f"wrote {job.out} ({report.kept:,} rows) and {report_path(job.out)}")


if __name__ == "__main__":
    run_command(main)
