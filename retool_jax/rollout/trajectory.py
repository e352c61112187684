"""What a rollout leaves behind: ids, which of them were sampled, their log-probabilities, and why it ended."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.sandbox.text import writable
from retool_jax.tokens.tokenizer import Tokenizer


class End(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"  # a turn without a call, with an answer in a box
    NO_ANSWER = "no_answer"  # a turn without a call and without a box
    TURN_LIMIT = "turn_limit"  # a call in the last turn allowed
    TOKEN_LIMIT = "token_limit"  # no room for the rest of a turn, or for a tool's output
    SANDBOX_LOST = "sandbox_lost"  # a call could not be run
    DISCARDED = "discarded"  # new weights came, or nobody wanted the rest
    CHECKER_LOST = "checker_lost"  # the answer could not be compared


# Ends by the machinery and not by the policy. Such a trajectory is counted and has no other part in anything: it gets
# no reward, and no place in a loss, a group's mean, a metric or an accuracy.
INFRASTRUCTURE = (End.SANDBOX_LOST, End.DISCARDED, End.CHECKER_LOST)


@dataclass
class ToolUse:
    """One call and its outcome; `output` is what the policy was told, seconds and `metrics` are the tool's.

    `code` is the program, or the arguments of another tool as JSON. Both texts are kept as a file can hold them
    (`writable`); the ids have the call as it was sampled.
    """

    turn: int
    code: str
    status: str
    output: str
    wall_s: float = 0.0
    queue_s: float = 0.0
    tool: str = ""  # the name that it was called by; empty where there is no such tool
    repaired: str = ""  # what is not as the grammar writes it in a call that was read all the same
    metrics: dict[str, float] = field(default_factory=dict)
    start: int = -1  # of the trajectory's ids, the one at which the call begins; -1 in records older than this

    def __post_init__(self) -> None:
        self.code, self.output = writable(self.code), writable(self.output)


def numbers_of(metrics: object) -> dict[str, float]:
    """What a tool says of a call, as far as a file can hold it: names with numbers of Python's own.

    Arrays of one number and numbers of other libraries become such; what is no number is left out.
    """
    kept = {}
    for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
        with suppress(Exception):  # of others' types
            number = value if type(value) in (bool, int, float) else float(value)
            json.dumps(number)  # an int of thousands of digits is refused
            kept[writable(str(name))] = number
    return kept


@dataclass
class Segment:
    """A run of ids with one author: `prompt`, `policy` or `tool`; [start, stop) in the trajectory's ids."""

    role: str
    start: int
    stop: int


@dataclass
class Trajectory:
    """One growing list of ids. What the policy sampled is kept as sampled and never encoded again."""

    id: str
    problem: Problem
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # 0 where not sampled
    versions: list[int] = field(default_factory=list)  # of the weights that drew each token, -1 where not sampled
    segments: list[Segment] = field(default_factory=list)
    tool_uses: list[ToolUse] = field(default_factory=list)
    forced: bool = False  # the last turn was asked for, as turns or tokens had run out
    end: End | None = None  # None while it goes on
    fault: str = ""  # what the machinery did, where that ended it
    room: int = 0  # tokens that there were for a response
    temperature: float | None = None  # at which it was drawn; None where that is not known
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    final_text: str = ""  # what is scored: the last turn without its end mark; empty where that did not end by itself
    verdict: Verdict | None = None  # None, as the reward, before it is scored and where it is dropped
    exact: bool = False  # the strict rule takes its answer too (`reward.strict_box`)
    reward: float | None = None
    reward_terms: dict[str, float] = field(default_factory=dict)  # by name; the reward is their sum
    started_s: float = 0.0
    finished_s: float = 0.0

    def add(
        self, role: str, ids: list[int], logprobs: list[float] | None = None, versions: list[int] | None = None
    ) -> None:
        """Append a segment; only the policy's has log-probabilities, and only it is marked sampled.

        Its `versions` are those of the weights that drew each id; without them it is of the first weights, 0.
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
        """The machinery ended it, so that it says nothing about the policy."""
        return self.end in INFRASTRUCTURE

    @property
    def turns(self) -> int:
        return sum(segment.role == "policy" for segment in self.segments)

    @property
    def response_tokens(self) -> int:
        """Tokens after the prompt, tool output included."""
        return len(self.ids) - self.segments[0].stop

    def last_turn(self, tokenizer: Tokenizer) -> str:
        """Text of the policy's last turn, with a `<think>` before it where it began inside thinking.

        Thinking is opened by the header that the template writes (DeepSeek-R1's does) or by the policy, and lasts
        until `</think>` or the end of its turn, whatever is answered in place meanwhile.
        """
        turn = ""  # before the last segment: its header, and what was said before programs were answered in place
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

        Whether it is `correct` stands apart from its `reward`, which may be shaped. `extra` is what others know of it,
        such as its step and its `group`.
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
