"""Problems to trajectories: the policy writes turns, tools answer its calls, and all of it is one list of ids."""

import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from retool_jax.answers import check_all, extract_boxed, workers
from retool_jax.answers.check import LOST
from retool_jax.data.problems import Problem
from retool_jax.engine.conversation import SamplingParams, Statistics, Tokens
from retool_jax.engine.engine import Engine
from retool_jax.engine.scheduler import converse
from retool_jax.errors import UserError
from retool_jax.rollout.config import RewardConfig, RolloutConfig
from retool_jax.rollout.reward import rewards_of, strict_box
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory, numbers_of
from retool_jax.tokens.chat import defuse, prompt_ids, user_segment
from retool_jax.tokens.grammar import GRAMMARS, ToolCall, marking_ids
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.tool import Output
from retool_jax.tools.toolbox import INVALID, Toolbox, ToolStates

FINAL_REQUEST = r"Stop here and give the final answer now, in \boxed{}."
# They run one after the other, each up to its time limit. A policy that repeats itself can write hundreds in one turn,
# and a step waits for its slowest trajectory.
MOST_CALLS = 16  # of one turn; further ones are answered with `TOO_MANY`
TOO_MANY = Output(f"[not run: a turn may have at most {MOST_CALLS} calls]", "program", kind="rejected")


@dataclass(frozen=True)
class Sample:
    """One trajectory to sample; `request` is the seed of its random draws and unique in a run."""

    problem: Problem
    request: int
    temperature: float = 1.0
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off


class Dialogue:
    """A trajectory that is being sampled; implements `engine.conversation.Conversation` for the scheduler."""

    def __init__(
        self,
        sample: Sample,
        prompt: list[int],
        tokenizer: Tokenizer,
        tools: Toolbox | None,
        room: int,
        limits: RolloutConfig,
    ) -> None:
        self.prompt = prompt
        self.request = sample.request
        self.cancelled = False
        self.temperature = sample.temperature
        self.sampling = SamplingParams(sample.temperature, sample.top_k, sample.top_p)
        identity = f"{sample.problem.id}/{sample.request}"
        self.trajectory = Trajectory(
            identity,
            sample.problem,
            room=room - len(prompt),
            temperature=sample.temperature,
            top_p=sample.top_p,
            top_k=sample.top_k,
        )
        self.trajectory.add("prompt", prompt)
        self._tokenizer, self._tools, self._room, self._limits = tokenizer, tools, room, limits
        self._tool_states, self._closes = ToolStates(), True
        self._versions: list[int] = []  # of the tokens of the current turn
        self._text = ""  # of the last turn
        self._grammar = GRAMMARS[limits.grammar]
        self._reserve = 0  # tokens that earlier turns must leave for a request for the answer and the answer itself
        if limits.answer_tokens:
            longest = max(len(user_segment(tokenizer, FINAL_REQUEST, ended)) for ended in (True, False))
            reserve = limits.answer_tokens + longest
            self._reserve = reserve if len(prompt) + reserve < room else 0
        self._stops = self._grammar.stop_ids(tokenizer) if tools else tokenizer.stop_ids

    def turn_budget(self) -> int:
        if not self.trajectory.started_s:
            self.trajectory.started_s = time.perf_counter()
        left = self._room - len(self.trajectory.ids) - self._reserve
        return min(left, self._limits.turn_tokens or left)

    def stop_at(self, ids: list[int], seen: int) -> int | None:
        return self._grammar.stop_at(self._tokenizer, ids, seen) if self._tools else None

    def on_tokens(self, tokens: Tokens) -> None:
        """Record which weights drew each token; pass it to the scheduler with the conversation."""
        self._versions += [tokens.version] * len(tokens.ids)

    def end_turn(self, ids: list[int], logprobs: list[float]) -> Coroutine[None, None, list[int] | None] | None:
        self.record_turn(ids, logprobs)
        return self.finish_turn()

    def record_turn(self, ids: list[int], logprobs: list[float]) -> None:
        """Record a turn that was drawn."""
        self.trajectory.add("policy", ids, logprobs, self._versions)
        self._versions = []
        self._text = self.trajectory.last_turn(self._tokenizer)

    @property
    def turn(self) -> list[int]:
        """The ids of the last turn."""
        return self.trajectory.ids[self.trajectory.segments[-1].start :]

    @property
    def is_whole(self) -> bool:
        """Whether the last turn ended by itself, and not because its budget was used up."""
        ids = self.turn
        return ids[-1] in self._stops or self.stop_at(ids, len(ids) - 1) is not None

    @property
    def may_call(self) -> bool:
        """Whether calls of the last turn may run: no in a turn that must be the answer."""
        return not self.trajectory.forced and self.trajectory.turns < self._limits.max_turns

    def calls(self) -> list[ToolCall]:
        """The calls of the last turn, in order."""
        if not self._tools:
            return []
        calls = self._grammar.calls(self._text)
        return [call.strict() for call in calls] if self._limits.strict_calls else calls

    def finish_turn(self) -> Coroutine[None, None, list[int] | None] | None:
        """What follows the last turn, in the form that `Conversation.end_turn` returns."""
        if not self.is_whole:
            return self._limit_reached(End.TOKEN_LIMIT)
        calls = self.calls()
        if not calls:
            boxed, _ = extract_boxed(self._text)
            return self.end(End.NO_ANSWER if boxed is None else End.ANSWERED)
        return self._run_calls(self.turn, calls) if self.may_call else self._limit_reached(End.TURN_LIMIT)

    def _limit_reached(self, reason: End) -> Coroutine[None, None, list[int]] | None:
        """No turns or no room are left: ask once for the answer, in the reserved room, or end."""
        return self.end(reason) if self.trajectory.forced or not self._reserve else self._ask_for_answer()

    async def _ask_for_answer(self) -> list[int]:
        segment = user_segment(self._tokenizer, FINAL_REQUEST, self.trajectory.ids[-1] in self._tokenizer.stop_ids)
        self._reserve, self.trajectory.forced = 0, True
        self.trajectory.add("tool", segment)
        return segment

    async def _run_calls(self, turn_ids: list[int], calls: list[ToolCall]) -> list[int] | None:
        """Run a turn's calls in order; returns the segment with the outputs, or None if the trajectory ends here."""
        turn, turn_start = self.trajectory.turns - 1, self.trajectory.segments[-1].start
        places = marking_ids(self._tokenizer, turn_ids, self._text, [call.start for call in calls])
        outputs = []
        for number, (call, place) in enumerate(zip(calls, places, strict=True)):
            output = await self._tools.run(call, self._tool_states) if number < MOST_CALLS else TOO_MANY
            lost = output.fault == "machinery"
            invalid = output.status == INVALID or output is TOO_MANY  # its name and arguments may be anything
            text = output.text if lost or invalid else output.shortened(self._limits.tool_output_tokens, self._count)
            numbers = {} if lost or invalid else numbers_of(output.metrics)
            use = ToolUse(
                turn,
                "" if invalid else call.code,
                output.status,
                text if lost else defuse(self._tokenizer, text),
                *(numbers.pop(key, 0.0) for key in ("wall_s", "queue_s")),
                tool="" if invalid else call.name,
                repaired=call.repaired,
                metrics=numbers,
                start=turn_start + place,
            )
            self.trajectory.tool_uses.append(use)
            if lost:
                return self.end(End.SANDBOX_LOST, output.text)
            outputs.append(use.output)
        segment = self._grammar.segment(self._tokenizer, turn_ids, outputs)
        # Do not cut a segment: part of it, or all of it without room for an answer, would teach nothing.
        if len(self.trajectory.ids) + len(segment) + self._reserve >= self._room:
            return await self._ask_for_answer() if self._reserve else self.end(End.TOKEN_LIMIT)
        self.trajectory.add("tool", segment)
        return segment

    def _count(self, text: str) -> int:
        """The number of tokens of a tool's output in the context, after special marks in it are broken up."""
        return len(self._tokenizer.encode(defuse(self._tokenizer, text)))

    def drop(self, reason: str) -> None:
        self.end(End.DISCARDED, reason)

    def use_states(self, states: ToolStates) -> None:
        """Let tools keep their states in `states`, which the caller closes; call it before the first turn."""
        self._tool_states, self._closes = states, False

    async def close(self) -> None:
        """Close the states that tools keep for this dialogue, unless the caller owns them (`use_states`)."""
        if self._closes:
            await self._tool_states.close()

    def end(self, reason: End, fault: str = "") -> None:
        """Record why the trajectory ended. Only the first reason counts: it may be dropped while its last call runs."""
        if self.trajectory.end is None:
            self.trajectory.end, self.trajectory.fault = reason, fault
            self.trajectory.finished_s = time.perf_counter()
            self.trajectory.started_s = self.trajectory.started_s or self.trajectory.finished_s
            if self._closes:
                self._tool_states.begin_to_close()


async def rollout(
    engine: Engine, tokenizer: Tokenizer, tools: Toolbox | None, samples: Sequence[Sample], limits: RolloutConfig
) -> tuple[list[Trajectory], Statistics]:
    """Sample one trajectory for each sample, in the same order. Without tools every trajectory is one turn.

    Raises:
        UserError: a prompt is longer than `max_prompt_tokens`, or a problem names a tool that does not exist.
    """
    dialogues = dialogues_of(engine, tokenizer, tools, samples, limits)
    origin = time.perf_counter()
    # The sandbox refuses calls when its queue is full, so further ones wait in the scheduler.
    at_once = tools.at_once if tools else 0
    try:
        on_tokens, sampling = [each.on_tokens for each in dialogues], [each.sampling for each in dialogues]
        statistics = await converse(engine, dialogues, at_once, on_tokens, sampling)
    finally:
        for dialogue in dialogues:
            await dialogue.close()
    return trajectories_of(dialogues, origin), statistics


def dialogues_of(
    engine: Engine, tokenizer: Tokenizer, tools: Toolbox | None, samples: Sequence[Sample], limits: RolloutConfig
) -> list[Dialogue]:
    """One dialogue for each sample, with the tools that its problem names. The caller must close them.

    Raises:
        UserError: as `rollout`.
    """
    room = engine.config.max_length
    encoded: dict[str, list[int]] = {}
    dialogues = []
    for sample in samples:
        problem = sample.problem
        if problem.id not in encoded:
            encoded[problem.id] = encode_prompt(tokenizer, problem, tools, limits)
        own = tools.subset(problem.tools, f"problem {problem.id}") if tools else None
        dialogues.append(Dialogue(sample, encoded[problem.id], tokenizer, own, room, limits))
    return dialogues


def trajectories_of(dialogues: Sequence[Dialogue], origin: float) -> list[Trajectory]:
    """The trajectories of finished dialogues, with times relative to `origin` (of `time.perf_counter`)."""
    trajectories = [dialogue.trajectory for dialogue in dialogues]
    if endless := [trajectory.id for trajectory in trajectories if trajectory.end is None]:
        raise RuntimeError(f"{len(endless)} trajectories came back without an end, the first of them {endless[0]}")
    for trajectory in trajectories:
        trajectory.started_s -= origin
        trajectory.finished_s -= origin
    return trajectories


class PromptTooLong(UserError):
    """A prompt has more than `rollout.max_prompt_tokens`, namely `tokens`."""

    def __init__(self, problem: Problem, tokens: int, limit: int) -> None:
        super().__init__(
            f"problem {problem.id} has a prompt of {tokens} tokens; the limit is rollout.max_prompt_tokens={limit}:"
            " raise it (and engine.max_length with it) or leave the problem out"
        )
        self.tokens = tokens


def encode_prompt(tokenizer: Tokenizer, problem: Problem, tools: Toolbox | None, limits: RolloutConfig) -> list[int]:
    """A problem's prompt as ids, with the tools that it names, or all tools.

    Raises:
        UserError: it is longer than the limit, or names a tool that does not exist.
    """
    messages = list(problem.messages)
    if tools:
        shown = tools.subset(problem.tools, f"problem {problem.id}").schemas
        ids = GRAMMARS[limits.grammar].prompt(tokenizer, messages, shown, limits.tool_prompt)
    else:
        ids = prompt_ids(tokenizer, messages)
    if len(ids) > limits.max_prompt_tokens:
        raise PromptTooLong(problem, len(ids), limits.max_prompt_tokens)
    return ids


def check_prompts(
    tokenizer: Tokenizer, problems: Sequence[Problem], tools: Toolbox | None, limits: RolloutConfig
) -> None:
    """As `encode_prompt` for each of the problems, with one error for all prompts that are too long."""
    found: list[PromptTooLong] = []
    for problem in problems:
        try:
            encode_prompt(tokenizer, problem, tools, limits)
        except PromptTooLong as error:
            found.append(error)
    if found:
        longest = max(error.tokens for error in found)
        more = f"; {len(found)} of {len(problems)} prompts are too long, the longest has {longest} tokens"
        raise UserError(f"{found[0]}{more if len(found) > 1 else ''}")


def score(
    tokenizer: Tokenizer,
    trajectories: Sequence[Trajectory],
    reward: RewardConfig | None = None,
    group_size: int = 1,
) -> None:
    """Give each trajectory its verdict and reward, from only the text of the policy's last turn.

    Only a turn that ended without a call is an answer; tool output and earlier turns do not count. A dropped trajectory
    gets none, and a trajectory whose answer could not be compared is dropped here. Comparisons may take
    `workers.STEP_LIMIT` seconds, so an event loop must call this in a thread.

    Args:
        tokenizer: the policy's.
        trajectories: group by group.
        reward: the reward's config; None: the default, +1 or -1.
        group_size: samples of a prompt, for `guarded` rewards.

    Raises:
        UserError: the reward function cannot be loaded, or returned no finite number.
    """
    groups = {index: index // group_size for index, t in enumerate(trajectories) if not t.dropped}
    kept = [trajectories[index] for index in groups]
    texts = []
    for trajectory in kept:
        answered = trajectory.end in (End.ANSWERED, End.NO_ANSWER)
        texts.append(trajectory.last_turn(tokenizer) if answered else "")
    verdicts = check_all([(text, t.problem.ground_truth) for text, t in zip(texts, kept, strict=True)])
    for trajectory, text, verdict in zip(kept, texts, verdicts, strict=True):
        if verdict.reason == LOST:
            trajectory.end, trajectory.fault = End.CHECKER_LOST, workers.pool.fault
            continue
        mark = tokenizer.decode(trajectory.ids[-1:]) if trajectory.ids[-1] in tokenizer.stop_ids else ""
        trajectory.verdict, trajectory.final_text = verdict, text.removesuffix(mark)
        trajectory.exact = strict_box(trajectory.final_text) == trajectory.problem.ground_truth
    judged = [(t, group) for t, group in zip(kept, groups.values(), strict=True) if not t.dropped]
    given = rewards_of(reward or RewardConfig(), [t for t, _ in judged], [group for _, group in judged])
    for (trajectory, _), (value, terms) in zip(judged, given, strict=True):
        trajectory.reward, trajectory.reward_terms = value, terms
