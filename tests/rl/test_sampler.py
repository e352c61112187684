"""One stream of groups: in order, none lost or repeated by a resume; solved prompts are skipped."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from retool_jax.answers import Verdict
from retool_jax.data.arithmetic import problem_row
from retool_jax.data.problems import Problem, Problems
from retool_jax.rl.config import GroupsConfig, RLConfig
from retool_jax.rl.sampler import Group, Sampler
from retool_jax.rollout.config import RewardConfig
from retool_jax.rollout.trajectory import End, Trajectory

RL = RLConfig(prompts_per_step=4, group_size=3, minibatches=2, temperature=0.9)
PROBLEMS = Problems("arithmetic", "train", 5)


@pytest.fixture
def few(tmp_path) -> Problems:
    """Five problems that repeat."""
    path = tmp_path / "few.jsonl"
    rows = [problem_row("train", index) | {"extra_info": {"index": str(index)}} for index in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Problems(str(path), "train", 0)


def skipping(times: int) -> RLConfig:
    return replace(RL, groups=GroupsConfig(skip_solved=times))


def scored(problem: Problem, correct: bool | None) -> Trajectory:
    """A trajectory that is right or wrong; None is one that was dropped."""
    if correct is None:
        return Trajectory("x", problem, end=End.SANDBOX_LOST)
    return Trajectory("x", problem, end=End.ANSWERED, verdict=Verdict(correct, "1", "integer"))


def consume(sampler: Sampler, groups: list[Group], right: Callable[[Problem], list[bool | None]]) -> None:
    for group in groups:
        sampler.consumed(group, [scored(group.problem, correct) for correct in right(group.problem)])


def resumed(problems: Problems, rl: RLConfig, sampler: Sampler) -> Sampler:
    """A sampler from a checkpoint, which keeps JSON."""
    return Sampler(problems, rl, json.loads(json.dumps(sampler.state())))


def wrong(problem: Problem) -> list[bool]:
    return [False] * 3


def test_group_g_is_of_problem_g_with_its_own_requests():
    groups = Sampler(PROBLEMS, RL).take(12)
    for number, group in enumerate(groups):
        assert group.number == number and group.problem == PROBLEMS[number]
        requests = [(sample.problem, sample.request, sample.temperature) for sample in group.samples]
        assert requests == [(PROBLEMS[number], number * 3 + member, 0.9) for member in range(3)]
    sampler = Sampler(PROBLEMS, RL)
    assert [group for count in (4, 0, 1, 7) for group in sampler.take(count)] == groups


@pytest.mark.parametrize("state", [None, {}])
def test_a_checkpoint_without_a_state_continues_after_its_step(state):
    """A replay's state is empty, and a run may continue from it with its own rollouts."""
    assert Sampler(PROBLEMS, RL, state, 6).take(8) == Sampler(PROBLEMS, RL).take(32)[24:]


@pytest.mark.parametrize("skip", [0, 1])
def test_what_was_not_consumed_is_given_out_again_and_once(few, skip):
    """With groups in progress after it, and a table in which some of them were solved meanwhile."""
    rl = skipping(skip)

    def right(problem: Problem) -> list[bool]:
        return [problem.id in ("0", "3")] * 3

    sampler = Sampler(few, rl)
    groups = sampler.take(11)
    consume(sampler, groups[:2], right)
    again = resumed(few, rl, sampler)
    assert again.state() == sampler.state() and again.take(9) == groups[2:]
    assert resumed(few, rl, again).take(9) == groups[2:], "also when it is cut off once more"
    for each, left in ((sampler, groups[2:]), (again, groups[2:])):
        consume(each, left[:6], right)
    assert again.take(20) == sampler.take(20) and again.state() == sampler.state()


def test_groups_are_consumed_in_their_order():
    sampler = Sampler(PROBLEMS, RL)
    with pytest.raises(ValueError, match="group 0 was consumed out of its turn"):
        consume(sampler, Sampler(PROBLEMS, RL).take(1), wrong)
    first, second = sampler.take(2)
    with pytest.raises(ValueError, match="group 1 was consumed out of its turn: the next one is 0"):
        consume(sampler, [second], wrong)
    consume(sampler, [first, second], wrong)


def test_the_table_counts_what_was_tried_and_right(few):
    sampler = Sampler(few, RL)
    outcomes = iter([[True, True, None], [True, True, True], [True, False, None], [None, None, None], [True] * 3])
    groups = sampler.take(25)
    first = [group for group in groups if group.problem == groups[0].problem]
    for group in groups[: first[4].number + 1]:
        consume(sampler, [group], lambda problem: next(outcomes) if problem == first[0].problem else wrong(problem))
        if group.number == first[1].number:
            assert sampler.state()["table"][group.problem.id] == [5, 5, 2]
    table = sampler.state()["table"]
    assert table.pop(first[0].problem.id) == [10, 9, 1]
    assert len(table) == 4 and all(right == streak == 0 for _, right, streak in table.values())


def test_a_solved_prompt_is_passed_over_and_no_other(few):
    """The order of the other prompts does not change."""
    sampler = Sampler(few, skipping(2))
    seen = []
    for _ in range(25):
        (group,) = sampler.take(1)
        seen.append(group.problem)
        consume(sampler, [group], lambda problem: [problem.id in ("1", "4")] * 3)
    assert [seen.count(problem) for problem in few.finite if problem.id in ("1", "4")] == [2, 2]
    stream = [few[index] for index in range(40)]
    places = [index for index, problem in enumerate(stream) if problem.id not in ("1", "4")]
    assert [problem for problem in seen if problem.id not in ("1", "4")] == [stream[place] for place in places][:21]


def test_a_prompt_is_solved_where_the_reward_says_so(few):
    """With the strict rule, an answer that only the verdict accepts does not count as right."""
    for name, right in (("dapo_strict", 0), ("default", 3)):
        sampler = Sampler(few, replace(skipping(1), reward=RewardConfig(name=name)))
        (group,) = sampler.take(1)
        consume(sampler, [group], lambda problem: [True] * 3)  # none is `exact`
        assert sampler.state()["table"] == {group.problem.id: [3, right, int(right == 3)]}


def test_where_all_are_solved_they_are_drawn_again(few):
    sampler = Sampler(few, skipping(1))
    seen = []
    for _ in range(15):
        (group,) = sampler.take(1)
        seen.append(group.problem.id)
        consume(sampler, [group], lambda problem: [True] * 3)
    assert all(sorted(seen[at : at + 5]) == ["0", "1", "2", "3", "4"] for at in (0, 5, 10))
