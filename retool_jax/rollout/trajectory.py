"""The result of a rollout: ids, which of them were sampled, their log-probabilities, and why it ended."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.sandbox.text import encodable
from retool_jax.tokens.tokenizer import Tokenizer


class End(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"  # a turn without a call, with an answer in a box
    NO_ANSWER = "no_answer"  # a turn without a call and without a box
    TURN_LIMIT = "turn_limit"  # a call in the last turn allowed
    TOKEN_LIMIT = "token_limit"  # no room for the rest of a turn, or for a tool's output
    SANDBOX_LOST = "sandbox_lost"  # a call could not be run
    DISCARDED = "discarded"  # it was cancelled, or dropped because of new weights
    CHECKER_LOST = "checker_lost"  # the answer could not be compared


# Ends that are not the policy's doing. Such a trajectory is dropped: it is counted, but it gets no reward and is not
# part of any loss, group mean, metric or accuracy.
INFRASTRUCTURE = (End.SANDBOX_LOST, End.DISCARDED, End.CHECKER_LOST)


@dataclass
class ToolUse:
    """One call and its outcome; `output` is the text that the policy saw, seconds and `metrics` come from the tool.

    `code` is the program, or the arguments of another tool as JSON. Both texts are stored in a form that a file can
    hold (`encodable`); the ids have the call as it was sampled.
    """

    turn: int
    code: str
    status: str
    output: str
    wall_s: float = 0.0
    queue_s: float = 0.0
    tool: str = ""  # the name that was called; empty if the call was invalid
    repaired: str = ""  # how the call deviates from the grammar, if it could be read anyway
    metrics: dict[str, float] = field(default_factory=dict)
    start: int = -1  # index in the trajectory's ids where the call begins; -1 in records from before this field

    def __post_init__(self) -> None:
        self.code, self.output = encodable(self.code), encodable(self.output)


def numbers_of(metrics: object) -> dict[str, float]:
    """A tool's metrics of a call as Python numbers by name, which a file can hold.

    Arrays of one number and numbers of other libraries are converted; other values are left out.
    """
    kept = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with suppress(Exception):  # the conversion of an unknown type may raise anything
            number = value if type(value) in (bool, int, float) else float(value)
            json.dumps(number)  # raises for an int of thousands of digits
            kept[encodable(str(name))] = number
    return kept


@dataclass
class Segment:
    """A run of ids with one author: `prompt`, `policy` or `tool`; [start, stop) in the trajectory's ids."""

    role: str
    start: int
    stop: int


@dataclass
class Trajectory:
    """One growing list of ids. Sampled ids are kept as they are and never encoded again."""

    id: str
    problem: Problem
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # 0 where not sampled
    versions: list[int] = field(default_factory=list)  # of the weights that drew each token, -1 where not sampled
    segments: list[Segment] = field(default_factory=list)
    tool_uses: list[ToolUse] = field(default_factory=list)
    forced: bool = False  # the policy was asked for its answer, because turns or tokens had run out
    end: End | None = None  # None until it ends
    fault: str = ""  # the infrastructure failure, if one ended it
    room: int = 0  # the most tokens that the response could have
    temperature: float | None = None  # at which it was sampled; None if unknown, or not the same for all its turns
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    final_text: str = ""  # the text to score: the last turn without its end mark; empty if it did not end by itself
    verdict: Verdict | None = None  # like the reward, None before scoring and for dropped trajectories
    exact: bool = False  # the strict rule also accepts its answer (`reward.strict_box`)
    reward: float | None = None
    reward_terms: dict[str, float] = field(default_factory=dict)  # by name; the reward is their sum
    started_s: float = 0.0
    finished_s: float = 0.0

    def add(
        self, role: str, ids: list[int], logprobs: list[float] | None = None, versions: list[int] | None = None
    ) -> None:
        """Append a segment; only a segment of the policy has log-probabilities and is marked as sampled.

        `versions` are those of the weights that drew each id of the policy; the default is 0, the first weights.
        """
        sampled = role == "policy"
        if sampled != (logprobs is not None) or (logprobs is not None and len(logprobs) != len(ids)):
            raise ValueError(f"a {role} segment of {len(ids)} ids came with log-probabilities {logprobs!r}")
        if versions is not None and len(versions) != len(ids):
            raise ValueError(f"a {role} segment of {len(ids)} ids came with versions {versions!r}")
        self.segments.append(Segment(role, len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.logprobs += logprobs if logprobs is not None else [0.0] * len(ids)
        self.versions += versions if versions is not None else [0 if sampled else -1] * len(ids)

    @property
    def dropped(self) -> bool:
        """Whether the policy is not the reason of its end (`INFRASTRUCTURE`), so that nothing is learned from it."""
        return self.end in INFRASTRUCTURE

    @property
    def turns(self) -> int:
        return sum(segment.role == "policy" for segment in self.segments)

    @property
    def response_tokens(self) -> int:
        """Tokens after the prompt, tool output included."""
        return len(self.ids) - self.segments[0].stop

    def last_turn(self, tokenizer: Tokenizer) -> str:
        """The text of the policy's last turn, with a `<think>` before it if it began inside thinking.

        Thinking begins in the header that the template writes (as DeepSeek-R1's does) or in the policy's text. It lasts
        until `</think>` or the end of the turn, also across answers inside the turn.
        """
        turn = ""  # the turn before the last segment: its header, and the policy's text before answers inside the turn
        for segment in reversed(self.segments[:-1]):
            text = tokenizer.decode(self.ids[segment.start : segment.stop])
            if segment.role == "policy":
                if self.ids[segment.stop - 1] in tokenizer.stop_ids:
                    break
                turn = text + turn
            elif text.endswith(tokenizer.turn_header):
                turn = tokenizer.turn_header + turn
                break
        last = self.segments[-1]
        opened = "<think>" in turn.rpartition("</think>")[2]
        return ("<think>" if opened else "") + tokenizer.decode(self.ids[last.start : last.stop])

    def record(self, tokenizer: Tokenizer, **extra: object) -> dict:
        """A JSON-ready record with everything that is needed to read or check the trajectory.

        `correct` does not depend on `reward`, which may be shaped. `extra` are fields that the caller adds, such as the
        step and the `group`.
        """
        return {
            "id": self.id,
            **extra,
            "prompt_id": self.problem.id,
            "problem": self.problem.question,
            "ground_truth": self.problem.ground_truth,
            "answer": self.verdict.answer if self.verdict else None,
            "correct": bool(self.verdict and self.verdict.correct),
            "exact_match": self.exact,
            "verdict": self.verdict.reason if self.verdict else None,
            "reward": self.reward,
            "reward_terms": self.reward_terms,
            "end": str(self.end),
            "fault": self.fault,
            "forced": self.forced,
            "turns": self.turns,
            "prompt_tokens": self.segments[0].stop,
            "response_tokens": self.response_tokens,
            "ids": self.ids,
            "sampled": list(map(int, self.sampled)),
            "logprobs": np.round(self.logprobs, 6).tolist(),
            "segments": [
                {"role": s.role, "start": s.start, "stop": s.stop, "text": tokenizer.decode(self.ids[s.start : s.stop])}
                for s in self.segments
            ],
            "tool_calls": [vars(use) for use in self.tool_uses],
            "timings": {"started_s": round(self.started_s, 4), "finished_s": round(self.finished_s, 4)},
        }
