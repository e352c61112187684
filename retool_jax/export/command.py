"""The export command: its options, the checks before anything is written, and the writer of each format."""

import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from retool_jax.errors import UserError
from retool_jax.fields import split_words, whole_number
from retool_jax.files import check_result, replacing

if TYPE_CHECKING:
    from retool_jax.export.records import Selection

HELP = """\
Write the trajectories of a run or of an evaluation in a format that other programs read.

    python -m retool_jax.export run=DIR out=PATH [format=parquet] [key=value ...]

run=DIR          the folder of a run or of an evaluation
out=PATH         the file or folder to write. A file is replaced in one step; a folder must be new or empty
format=parquet   one table, a trajectory a row: ids, mask, log-probs, messages, calls, verdict, reward (the default)
format=traces    a folder with a session a file, for the trace viewer of the Hugging Face Hub
format=atif      JSONL in ATIF-v1.7, Harbor's interchange format: a trajectory a line, with ids and log-probs
format=inspect   a log of Inspect, for `inspect view`; out ends in .eval or .json; needs retool_jax[inspect]
split=NAME       only trajectories of this split
step=N           only those of the evaluation after this step
greedy=BOOL      only those that were drawn greedily (true), or only the others (false)
push=OWNER/NAME  copy a table or traces to this data set of the Hub. A new data set is made private; one that is public
                 stays public. Log in with the hub's own tools: hf auth login, or HF_TOKEN

Texts of policies and tools are copied unchanged: look at them before you share them. See docs/sharing.md."""

KEYS = ("run", "out", "format", "split", "step", "greedy", "push")
FORMATS = ("parquet", "traces", "atif", "inspect")
PUSHED = ("parquet", "traces")


def main(words: list[str]) -> None:
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return
    options = dict(split_words(words, KEYS))
    if not {"run", "out"} <= options.keys():
        raise UserError("give run=DIR and out=PATH; see --help")
    kind, push_to = options.get("format", "parquet"), options.get("push", "")
    if kind not in FORMATS:
        raise UserError(f"format={kind} is not one of: {', '.join(FORMATS)}")
    step = whole_number("step", options["step"]) if "step" in options else None
    if (greedy := options.get("greedy")) not in (None, "true", "false"):
        raise UserError(f"greedy={greedy} must be true or false")
    if push_to and not re.fullmatch(r"[\w.-]+/[\w.-]+", push_to):
        raise UserError(f"push={push_to} is no repository of the hub; give it as owner/name")
    if push_to and kind not in PUSHED:
        raise UserError(f"format={kind} is not pushed; push= takes format={' or format='.join(PUSHED)}")

    from retool_jax.export.records import Selection

    selection = Selection(
        split=options.get("split"),
        step=step,
        greedy=None if greedy is None else greedy == "true",
    )
    out = Path(options["out"])
    count = export(Path(options["run"]), out, kind, selection)
    print(f"wrote {out} ({count:,} trajectories)")
    if push_to:
        from retool_jax.export.hub import card, push

        text = card(kind, Path(options["run"]).resolve().name, count)
        print(f"pushed {push(kind, out, push_to, text)}")


def export(folder: Path, out: Path, kind: str, selection: "Selection") -> int:
    """Write the selected trajectories of a folder, and return their number.

    Raises:
        UserError: something is wrong with the folder, a record or the target. The target is then unchanged.
    """
    from retool_jax.export.records import files_of, read_records
    from retool_jax.sandbox.text import encodable

    check_target(out, kind, files_of(folder))
    records, run = read_records(folder, selection), encodable(folder.resolve().name)
    try:
        if kind == "parquet":
            from retool_jax.export import parquet

            with replacing(out) as file:
                return parquet.write(records, file.buffer)
        if kind == "atif":
            from retool_jax.export.atif import trajectory_of
            from retool_jax.export.records import to_json

            with replacing(out) as file:
                return sum(bool(file.write(to_json(trajectory_of(record, run)) + "\n")) for record in records)
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as parent:
            unfinished = Path(parent) / out.name
            if kind == "traces":
                from retool_jax.export import traces

                unfinished.mkdir()
                count = traces.write(records, unfinished, run)
            else:
                from retool_jax.export import inspect_log

                count = inspect_log.write(records, unfinished, run)
            unfinished.replace(out)
            return count
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out} ({error.strerror}); choose another out=") from error


def check_target(out: Path, kind: str, sources: list[Path]) -> None:
    """Raise a `UserError` if the target cannot be written in this format, or is one of the sources."""
    target, read = out.resolve(), {path.resolve() for path in sources}
    folders = {path.parent for path in read if path.parent.name == "trajectories"}
    if target in read | folders or target.parent in folders:
        raise UserError(f"out={out} is where trajectories are read from; choose another out=")
    check_result(out, folder=True)
    if kind == "traces":
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={out} exists already; remove it, or choose another out=")
    elif out.is_dir():
        raise UserError(f"out={out} is a folder, and format={kind} writes a file; choose another out=")
    if kind == "inspect":
        if out.suffix not in (".eval", ".json"):
            raise UserError(f"out={out} must end in .eval or .json, the two forms of Inspect's logs")
        if not find_spec("inspect_ai"):
            raise UserError(
                "format=inspect needs the package inspect-ai, which is not installed: pip install 'retool_jax[inspect]'"
            )
