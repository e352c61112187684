"""`python -m retool_jax.prepare source=... out=FILE.jsonl`: convert published data sets to files for training."""

import asyncio
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import pydantic.dataclasses
from pydantic import BeforeValidator, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from retool_jax.answers import check
from retool_jax.data import gsm8k
from retool_jax.data.instructions import question_of, unknown_instructions
from retool_jax.data.overlap import Overlap, overlaps
from retool_jax.data.problems import Problem, clean, load_problems, to_problem, to_row
from retool_jax.data.rows import asks_and_answers, is_text, plain_integer, tools_of
from retool_jax.data.sources import read_rows
from retool_jax.data.traces import MAX_OUTPUT, BadTrace, boxed_answer, conversation, rerun_calls, truth_of
from retool_jax.errors import UserError, run_command
from retool_jax.fields import Count, complaint, split_words
from retool_jax.files import check_result, replacing
from retool_jax.metrics import Progress
from retool_jax.sandbox import Sandbox, SandboxConfig, ToolResult, open_sandbox, tool_text
from retool_jax.sandbox.backends import candidates

USAGE = """\
Convert, check and clean the rows of a published data set, and write the usable ones as JSONL.

    python -m retool_jax.prepare source=SOURCE out=FILE.jsonl [key=value ...]

source=SOURCE        a .jsonl, .json or .parquet file; a hub id (ID, ID:SPLIT or ID:CONFIG/SPLIT); tfds:NAME/SPLIT
out=FILE.jsonl       the file to write; FILE.report.json beside it says which rows were dropped and why
kind=traces          demonstrations for sft.data: ReTool-SFT in its raw or multi-turn form, and conversations with calls
kind=problems        problems for data.train: DAPO-Math-17k, AIME, GSM8K, MATH-500 and others (docs/data.md);
                     duplicates are dropped, and every question gets the same instruction for its answer
                     default: traces if the first row has a policy's turns, problems otherwise
kind=gsm8k_code      demonstrations made from GSM8K's calculator annotations, whose programs are run in the sandbox;
                     the same solutions in words, for a control without tools, are written to FILE.text.jsonl
verify=true          traces only: run every program again in the sandbox and compare its output; drop rows whose final
                     answer is wrong, if the true one is known
sandbox=NAME[,NAME]  with verify=true or gsm8k_code: back-ends in order of preference (gvisor, bubblewrap, process,
                     remote); default: auto, which is gvisor, else bubblewrap; process is for code that you trust
answers=FILE[,FILE]  with verify=true: problems with the true answers of traces that have none of their own
overlap=FILE[,FILE]  report questions that are also in these problems, for example AIME 2024 and 2025
limit=N              read only the first N rows

For example:

    python -m retool_jax.prepare source=JoeYing/ReTool-SFT out=retool_sft.jsonl verify=true
    python -m retool_jax.prepare source=openai/gsm8k:main/train out=gsm8k.jsonl kind=gsm8k_code
    python -m retool_jax.prepare source=BytedTsinghua-SIA/DAPO-Math-17k out=dapo.jsonl overlap=AIME24.jsonl"""

LONG = 2000  # from this number of rows on, reading shows its progress
AT_ONCE = 64  # traces whose programs run concurrently

Item = TypeVar("Item")
Result = TypeVar("Result")
Names = Annotated[tuple[str, ...], BeforeValidator(lambda text: tuple(filter(None, text.split(","))))]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Job:
    """The command line's words."""

    source: str
    out: Path
    kind: Literal["", "traces", "problems", "gsm8k_code"] = ""
    verify: Literal["false", "true"] = "false"
    sandbox: Names = ()
    answers: Names = ()
    overlap: Names = ()
    limit: Count = 0  # 0: all rows


@dataclass
class Report:
    """The result of preparing: counts by reason; `dropped` has (row, reason), rows counted from 1, without repeats of a
    whole row."""

    source: str
    kind: str
    rows: int = 0
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)  # sentences that ask for another form of the answer, kept
    outputs: Counter[str] = field(default_factory=Counter)  # of programs that ran again, by verdict
    differences: list[dict] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)  # final answers that were compared with the truth
    overlaps: dict[str, list[dict]] = field(default_factory=dict)

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        self.reasons[reason] += 1
        self.dropped.append((row, detail or reason))


@dataclass(frozen=True)
class Line:
    """A row of the file to write, with its number in the source and its question."""

    row: int
    content: dict
    question: str


def parse_words(words: Sequence[str]) -> Job:
    """The job that a command line describes.

    Raises:
        UserError: an unknown key (naming the nearest), or a wrong value.
    """
    values = dict(split_words(words, tuple(Job.__dataclass_fields__)))
    for key in ("source", "out"):
        if key not in values:
            raise UserError(f"no {key} given; usage: python -m retool_jax.prepare source=SOURCE out=FILE.jsonl")
    try:
        job = Job(**values)
    except ValidationError as error:
        raise UserError(complaint(error, Job)) from None
    if "limit" in values and not job.limit:
        raise UserError("limit=0 must be at least 1; leave it out to read all rows")
    if job.answers and job.verify == "false":
        raise UserError(f"answers={values['answers']} is read with verify=true only; add it, or leave answers out")
    if job.sandbox and job.verify == "false" and job.kind != "gsm8k_code":
        raise UserError(f"sandbox={values['sandbox']} is used with verify=true or kind=gsm8k_code only; leave it out")
    candidates(job.sandbox or ("auto",))
    check_out(job)
    return job


def check_out(job: Job) -> None:
    """A `UserError` unless the file can be written; called before the work."""
    out = job.out
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"out={out} must be a file named *.jsonl")
    check_result(out)
    inputs = (job.source, *job.answers, *job.overlap)
    for path in (out, twin_path(out)) if job.kind == "gsm8k_code" else (out,):
        if path.exists() and any(Path(name).exists() and path.samefile(name) for name in inputs):
            raise UserError(f"out={out} would write {path}, which is also read; choose another file")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"out={out}: {folder} is not a writable folder; choose another file")


def prepare(job: Job) -> Report:
    """Do the job: read, convert, verify, compare, write. Returns the report."""
    everything = read_rows(job.source)
    rows = list(itertools.islice(everything, min(job.limit, sys.maxsize))) if job.limit else everything
    first = next(iter(rows), None)
    if first is None:
        raise UserError(f"source={job.source} has no rows")
    kind = job.kind or ("traces" if asks_and_answers(first) else "problems")
    if job.verify == "true" and kind != "traces":
        raise UserError(f"verify=true checks traces, and these rows are {kind}; leave it out, or set kind=traces")
    references = {name: [problem.question for problem in load_problems(name)] for name in job.overlap}
    truths = {key_of(problem.question): problem.ground_truth for name in job.answers for problem in load_problems(name)}

    report, twins = Report(job.source, kind), []
    if kind == "problems":
        lines = read_problems(numbered(rows), job.source, report)
    elif kind == "traces":
        lines = read_traces(numbered(rows), report)
        if job.verify == "true":
            lines = asyncio.run(verify(lines, truths, report, job.sandbox))
    else:
        lines, twins = asyncio.run(program_lines(numbered(rows), report, job.sandbox))
    report.kept = len(lines)
    if not lines:
        worst = ", ".join(f"{reason} ({count})" for reason, count in report.reasons.most_common(3))
        first = f"; the first: {report.dropped[0][1]}" if report.dropped else ""
        raise UserError(f"no row of {job.source} can be used: {worst}{first}; nothing was written")
    questions = [line.question for line in lines]
    for name, texts in references.items():
        found = overlaps(questions, texts)
        report.overlaps[name] = [describe_overlap(overlap, questions, texts) for overlap in found]
    for line in lines:
        asking = line.content.get("messages") or line.content["prompt"]
        report.unknown.update(
            sentence
            for turn in asking
            if turn["role"] in ("system", "user")
            for sentence in unknown_instructions(turn["content"])
        )
    write(job.out, [line.content for line in lines], twins, report)
    return report


def numbered(rows: Sequence[dict]) -> Iterator[tuple[int, dict]]:
    """The rows with their numbers, from 1; shows the progress if there are many."""
    if len(rows) < LONG:
        yield from enumerate(rows, start=1)
        return
    with Progress("reading", len(rows)) as bar:
        for number, row in enumerate(rows, start=1):
            yield number, row
            bar.step(number, {})


def key_of(question: str) -> str:
    """The key by which equal questions are found: their words without instructions for the form of the answer."""
    return " ".join(question_of(question).split())


# --- traces -----------------------------------------------------------------------------------------------------------


def read_traces(rows: Iterable[tuple[int, dict]], report: Report) -> list[Line]:
    """The rows that are demonstrations with a boxed answer; the report gets the others, each with its reason."""
    lines = []
    for number, row in rows:
        report.rows += 1
        try:
            messages = conversation(row)
            boxed_answer(messages)
            tools = tools_of(row, "a row that")
        except (BadTrace, UserError) as reason:
            report.drop(number, str(reason))
            continue
        truth, names = truth_of(row), {} if tools is None else {"tools": list(tools)}
        asked = next(turn["content"] for turn in messages if turn["role"] == "user")
        lines.append(
            Line(
                number, {"messages": messages} | ({"ground_truth": truth} if truth else {}) | names, question_of(asked)
            )
        )
    return lines


async def verify(lines: Sequence[Line], truths: dict[str, str], report: Report, backend: tuple[str, ...]) -> list[Line]:
    """Run every program again, and check every final answer whose truth is known; rows with wrong ones are dropped."""

    async def run(line: Line, box: Sandbox) -> bool:
        for rerun in await rerun_calls(line.content["messages"], box):
            report.outputs[rerun.verdict] += 1
            if rerun.verdict != "same":
                report.differences.append({"row": line.row, **asdict(rerun)})
        return _answer_holds(line, truths, report)

    kept = await _in_sandbox(lines, run, report, backend)
    report.dropped.sort()
    report.differences.sort(key=lambda item: (item["row"], item["call"]))
    return [line for line, right in zip(lines, kept, strict=True) if right]


def _answer_holds(line: Line, truths: dict[str, str], report: Report) -> bool:
    truth = line.content.get("ground_truth") or truths.get(key_of(line.question))
    if truth is None:
        report.answers["no truth to compare with"] += 1
        return True
    verdict = check(line.content["messages"][-1]["content"], truth)
    report.answers["right" if verdict.correct else "wrong"] += 1
    if not verdict.correct:
        report.drop(line.row, "wrong answer", f"wrong answer: {verdict.answer} and not {truth} ({verdict.reason})")
    return verdict.correct


async def _in_sandbox(
    items: Sequence[Item],
    run: Callable[[Item, Sandbox], Awaitable[Result]],
    report: Report,
    backend: tuple[str, ...],
) -> list[Result]:
    """The results of `run` for all items in one sandbox, `AT_ONCE` items at a time."""
    results: list[Result] = []
    title = "verifying" if report.kind == "traces" else "running"
    async with open_sandbox(SandboxConfig(backend=backend or ("auto",), slots=os.cpu_count() or 1)) as box:
        with Progress(title, max(len(items), 1)) as bar:
            for start in range(0, len(items), AT_ONCE):
                results += await asyncio.gather(*(run(item, box) for item in items[start : start + AT_ONCE]))
                bar.step(len(results), {f"outputs: {name}": str(count) for name, count in report.outputs.items()})
    return results


# --- programs ---------------------------------------------------------------------------------------------------------


async def program_lines(
    rows: Iterable[tuple[int, dict]], report: Report, backend: tuple[str, ...]
) -> tuple[list[Line], list[dict]]:
    """Traces of GSM8K's rows whose annotations form a program that prints the answer, and the same rows in words."""
    programs: list[tuple[int, dict, str]] = []
    for number, row in rows:
        report.rows += 1
        if not is_text(row.get("question"), row.get("answer")) or not gsm8k.answer_of(row["answer"]):
            report.drop(number, "is no row of GSM8K: question, and answer with its #### line")
            continue
        try:
            programs.append((number, row, gsm8k.program_of(row["question"], row["answer"])))
        except gsm8k.NoProgram as reason:
            report.drop(number, str(reason))

    async def run(item: tuple[int, dict, str], box: Sandbox) -> ToolResult:
        return await box.run(item[2])

    lines, twins = [], []
    results = await _in_sandbox(programs, run, report, backend)
    for (number, row, program), result in zip(programs, results, strict=True):
        question, answer = row["question"], gsm8k.answer_of(row["answer"])
        if result.status != "success":
            report.drop(number, "its program fails", f"its program fails: {result.message or result.status}")
        elif plain_integer(result.stdout.strip()) != answer:
            report.drop(number, "its program prints another value than the answer")
        else:
            trace = gsm8k.trace_of(question, program, tool_text(result, MAX_OUTPUT), answer)
            lines.append(Line(number, {"messages": trace, "ground_truth": answer}, question_of(question)))
            twins.append({"messages": gsm8k.twin_of(question, row["answer"], answer), "ground_truth": answer})
    report.dropped.sort()
    return lines, twins


# --- problems ---------------------------------------------------------------------------------------------------------


def read_problems(rows: Iterable[tuple[int, dict]], source: str, report: Report) -> list[Line]:
    """The rows that are problems, each question once, with the project's instruction."""
    name = Path(source).stem

    def readable() -> Iterator[tuple[int, Problem]]:
        for number, row in rows:
            report.rows += 1
            try:  # ids have the file's name and not its folder, so that they do not depend on where it is
                problem = to_problem(row, f"{source} row {number}", f"{name} row {number}")
            except UserError as error:
                report.drop(number, "is no problem", str(error))
            else:
                yield number, problem

    kept, reasons, dropped = clean(readable())
    report.reasons.update(reasons)
    report.dropped = sorted(report.dropped + dropped)
    return [Line(number, to_row(problem, name), problem.question) for number, problem in enumerate(kept, start=1)]


def describe_overlap(overlap: Overlap, questions: Sequence[str], references: Sequence[str]) -> dict:
    """An overlap for the report: the line of the written file, the problem of the other file, and both texts."""
    return {
        "line": overlap.index + 1,
        "reference": overlap.reference + 1,
        "share": round(overlap.share, 3),
        "question": question_of(questions[overlap.index]),
        "reference_question": question_of(references[overlap.reference]),
    }


# --- output -----------------------------------------------------------------------------------------------------------


def write(out: Path, lines: Sequence[dict], twins: Sequence[dict], report: Report) -> None:
    """Write the file, its report and, for gsm8k_code, its twin in words; each file is replaced atomically."""
    files = {report_path(out): json.dumps(vars(report), ensure_ascii=False, indent=1)}
    for path, rows in ((twin_path(out), twins), (out, lines)):
        if rows:
            files[path] = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        for path, text in files.items():
            with replacing(path, errors="backslashreplace") as file:
                file.write(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out} ({error.strerror}); choose another out=") from error


def report_path(out: Path) -> Path:
    return out.with_suffix(".report.json")


def twin_path(out: Path) -> Path:
    return out.with_suffix(".text.jsonl")


def table_rows(report: Report) -> list[tuple[str, int]]:
    """(name, count) of each line of the table that is printed."""
    rows = [("rows read", report.rows), ("kept", report.kept)]
    rows += [(f"dropped: {reason}", count) for reason, count in report.reasons.most_common()]
    rows += [(f"unknown instruction, kept: {text[:60]}", count) for text, count in report.unknown.most_common(5)]
    if len(report.unknown) > 5:
        rows.append(("other unknown instructions, kept", report.unknown.total() - sum(count for _, count in rows[-5:])))
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
    Console(highlight=False, markup=False).print(table)
    others = [twin_path(job.out)] if report.kind == "gsm8k_code" else []
    print(f"wrote {', '.join(map(str, [job.out, *others]))} ({report.kept:,} rows) and {report_path(job.out)}")


if __name__ == "__main__":
    run_command(main)
