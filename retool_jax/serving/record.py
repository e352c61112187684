"""Record finished conversations of a server, and turn them into rollouts that a run can learn from.

`serve.record=FOLDER` writes the conversations; `python -m retool_jax.serving.sessions` converts them to a folder for
`replay` (docs/serving.md).
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from retool_jax.errors import UserError, one_line
from retool_jax.rl.replay import FOLDER, read_record, record_of, rollouts_path, write_rollouts
from retool_jax.rollout.rollout import score
from retool_jax.rollout.trajectory import Trajectory
from retool_jax.tokens.tokenizer import Tokenizer

SESSIONS = "sessions.jsonl"
logger = logging.getLogger(__name__)


# --- writing ----------------------------------------------------------------------------------------------------------


def begin_record(folder: Path) -> None:
    """Prepare a folder's file for new conversations. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / SESSIONS).open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":  # a kill left an incomplete last line; begin a new one
                    file.write(b"\n")
    except OSError as error:
        raise UserError(
            f"cannot write serve.record={folder} ({error.strerror}); choose a folder that can be written"
        ) from None


def add_sessions(folder: Path, name: str, trajectories: Sequence[Trajectory]) -> None:
    """Add the conversations of an answer, one line for each choice; a disk error is only logged."""
    lines = []
    for choice, trajectory in enumerate(trajectories):
        line = {"session": name, "choice": choice} | record_of(trajectory, group=0)
        lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":"), default=float) + "\n")
    try:
        with (folder / SESSIONS).open("ab") as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
    except OSError as error:
        logger.error("%s was not recorded: %s", name, error)


# --- reading ----------------------------------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """A client's judgement of a conversation: its reward, or the right answer."""

    reward: float | None
    answer: str | None


def read_judgements(path: Path) -> dict[tuple[str, int | None], Judgement]:
    """Judgements by session and choice (None: all choices), from lines with `session` and either `reward` or `answer`.

    Raises:
        UserError: there is no such file, or a line has neither or both.
    """
    found: dict[tuple[str, int | None], Judgement] = {}
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:  # texts may hold line ends that only `splitlines` takes for one
                number += 1
                record = json.loads(line)
                session, choice, reward, answer = (record.get(key) for key in ("session", "choice", "reward", "answer"))
                named = isinstance(session, str) and (choice is None or type(choice) is int)
                if not named or (reward is None) == (answer is None) or not isinstance(answer, str | None):
                    raise ValueError('it needs a "session", and either a "reward" or an "answer" in a text')
                reward = None if reward is None else float(reward)
                if reward is not None and not math.isfinite(reward):
                    raise ValueError(f"the reward is {reward}, and must be finite")
                found[session, choice] = Judgement(reward, answer)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a file of rewards") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} line {number} is no reward ({one_line(error)}); write {{"session": ID, "reward": 1}} or'
            ' {"session": ID, "answer": "6"}, with "choice": N for one of several'
        ) from None
    return found


class Conversion(NamedTuple):
    """The result of `make_rollouts`: sessions used, steps, their temperatures, and what is left out, by reason."""

    used: int
    steps: int
    temperatures: tuple[float | None, ...]
    left_out: Counter[str]


def make_rollouts(
    sessions: Path, rewards: Path, out: Path, group_size: int, prompts_per_step: int, tokenizer: Tokenizer
) -> Conversion:
    """Write the sessions that have a judgement as rollouts of steps, for `replay`.

    Sessions with the same prompt ids are samples of one prompt; they form groups of `group_size` in the order in which
    they were recorded.

    Args:
        sessions: a server's file.
        rewards: a file for `read_judgements`; a right answer is compared as in a run (`rollout.score`), +1 or -1.
        out: a folder without rollouts.
        group_size: `rl.group_size` of the run that will learn from them.
        prompts_per_step: `rl.prompts_per_step` of that run; the last step may have fewer.
        tokenizer: of the policy that was served.

    Raises:
        UserError: a file cannot be read, the folder has rollouts, the sessions have ids that the tokenizer lacks, or
            nothing would be written.
    """
    if (out / FOLDER).exists():
        raise UserError(f"out={out} has {FOLDER}/ already; choose another folder")
    judgements, left_out = read_judgements(rewards), Counter()
    groups: dict[tuple[int, ...], list[Trajectory]] = {}
    to_score: list[Trajectory] = []  # judged by a right answer
    for trajectory, judgement in _judged(sessions, judgements, left_out):
        # Unknown ids have no text, so answers would be judged wrong. The prompt is all of known ids; a policy may draw
        # ids that only pad its table.
        if (highest := max(trajectory.ids[: trajectory.segments[0].stop])) >= len(tokenizer):
            raise UserError(
                f"{sessions} has the id {highest}, and the tokenizer has ids up to {len(tokenizer) - 1}; set"
                " tokenizer=FOLDER to that of the policy that was served"
            )
        if trajectory.temperature is None:
            left_out["whose turns were drawn in different ways"] += 1
            continue
        if trajectory.temperature == 0 or trajectory.top_p < 1 or trajectory.top_k:
            left_out["drawn greedily, with top_p or with top_k, which no update knows"] += 1
            continue
        groups.setdefault(tuple(trajectory.ids[: trajectory.segments[0].stop]), []).append(trajectory)
        to_score += [trajectory] if judgement.answer is not None else []
    score(tokenizer, to_score)
    whole: list[list[Trajectory]] = []
    for samples in groups.values():
        kept = len(samples) // group_size * group_size
        left_out[f"no {group_size} of their prompt together"] += len(samples) - kept
        whole += [samples[at : at + group_size] for at in range(0, kept, group_size)]
    if not whole:
        raise UserError(
            f"{sessions} has no {group_size} judged sessions of one prompt ({describe(left_out)}); lower group_size,"
            ' or ask for several choices of each answer ("n")'
        )
    steps = [whole[at : at + prompts_per_step] for at in range(0, len(whole), prompts_per_step)]
    for number, step in enumerate(steps, start=1):
        write_rollouts(rollouts_path(out, number), [t for group in step for t in group], group_size, tokenizer)
    used = [t for group in whole for t in group]
    temperatures = dict.fromkeys(t.temperature for t in used)
    return Conversion(len(used), len(steps), tuple(temperatures), +left_out)


def describe(left_out: Counter[str]) -> str:
    """The sessions that were left out, by reason, in words."""
    return "; ".join(f"{count} left out: {why}" for why, count in left_out.items() if count) or "none left out"


def _judged(path: Path, judgements: dict, left_out: Counter[str]) -> list[tuple[Trajectory, Judgement]]:
    """The sessions of a file that have a judgement, each with it. `left_out` gets the others of both, by reason."""
    found, unused = [], set(judgements)
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    session, choice = record["session"], record["choice"]
                    judgement = judgements.get((session, choice)) or judgements.get((session, None))
                    unused -= {(session, choice), (session, None)}
                    if judgement is None:
                        left_out["nobody judged them"] += 1
                        continue
                    record["reward"] = judgement.reward or 0.0
                    record["problem"]["ground_truth"] = judgement.answer or ""
                    found.append((read_record(record, number)[1], judgement))
                except (KeyError, TypeError, ValueError, AttributeError):
                    left_out["no whole line"] += 1
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give the folder of serve.record") from None
    if unused:
        name, choice = min(unused, key=str)
        which = name if choice is None else f"{name}, choice {choice}"
        left_out[f"judgements of what is not in the record, as {which}"] = len(unused)
    return found
