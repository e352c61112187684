"""The shape of the records of trajectories in files (`Trajectory.record`), to check them when they are read."""

from collections.abc import Collection
from pathlib import Path

from retool_jax.files import read_lines
from retool_jax.shapes import BIT, FLAG, NUMBER, SINGLE, TEXT, WHOLE, OrNull, complaint, missing

# Records may come from an older version, so fields may be absent; readers name those that they need. Ids and answers of
# a data set may be numbers.
SEGMENT = {"role": frozenset({"prompt", "policy", "tool"}), "start": WHOLE, "stop": WHOLE, "text?": TEXT}
CALL = {
    **{"turn": WHOLE, "code": TEXT, "status": TEXT, "output": TEXT, "wall_s?": NUMBER, "queue_s?": NUMBER},
    **{"tool?": TEXT, "repaired?": TEXT, "metrics?": {...: SINGLE}, "start?": WHOLE},
}
RECORD = {
    **{"id?": TEXT, "split?": OrNull(TEXT), "step?": OrNull(WHOLE), "group?": OrNull(WHOLE), "sample?": WHOLE},
    **dict.fromkeys(("prompt_id?", "problem?", "ground_truth?", "answer?"), SINGLE),
    **{"correct?": FLAG, "exact_match?": FLAG, "verdict?": OrNull(TEXT), "end?": TEXT, "fault?": TEXT, "forced?": FLAG},
    **{"reward?": OrNull(NUMBER), "reward_terms?": {...: NUMBER}},
    **{"turns?": WHOLE, "prompt_tokens?": WHOLE, "response_tokens?": WHOLE},
    **{"ids?": [WHOLE], "sampled?": [BIT], "logprobs?": [NUMBER], "versions?": [WHOLE]},
    **{"segments?": [SEGMENT | {"text": TEXT}], "tool_calls?": [CALL]},
    "timings?": {"started_s?": NUMBER, "finished_s?": NUMBER},
}
TOKENS = ("ids", "sampled", "logprobs", "versions")  # lists with an entry for each token
MOST_IDS = 1 << 31


def fault_of(record: object, needed: Collection[str], shape: dict = RECORD) -> str:
    """What is wrong with a record that `Trajectory.record` should have made; empty if nothing is.

    Args:
        record: the JSON value of a line.
        needed: the fields that the reader needs.
        shape: the shape of its fields.
    """
    return missing(record, needed) or complaint(record, shape) or _fault_of_tokens(record)


def last_lines(path: Path) -> frozenset[int]:
    """The numbers of the lines that count in an evaluation's file of samples: the last line of each sample.

    A sample that the machinery lost has a line, too, and is drawn again.
    """
    last = {str(record.get("id")): number for number, record in read_lines(path) if isinstance(record, dict)}
    return frozenset(last.values())


def _fault_of_tokens(record: dict) -> str:
    """What is wrong with the tokens of a record whose fields are of the right types."""
    lists = {name: record[name] for name in TOKENS if name in record}
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        return f"it has {counts}, and must have as many of each"
    ids = record.get("ids")
    if ids and not 0 <= min(ids) <= max(ids) < MOST_IDS:
        return f"an id is {min(ids) if min(ids) < 0 else max(ids)} and must lie between 0 and {MOST_IDS - 1}"
    if odd := set(record.get("sampled", ())) - {0, 1}:
        return f"sampled has {odd.pop()} and must have 0 or 1 for each id"
    at = 0
    for number, segment in enumerate(record.get("segments", ())):
        if not at <= segment["start"] <= segment["stop"] <= (len(ids) if ids is not None else segment["stop"]):
            return (
                f"segments[{number}] is of the ids from {segment['start']} up to {segment['stop']}, and must begin at"
                f" {at} or later and end within the ids"
            )
        at = segment["stop"]
    if "segments" in record and [s["role"] for s in record["segments"][:1]] != ["prompt"]:
        return "segments must begin with one of the role prompt"
    return ""
