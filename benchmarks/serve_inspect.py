"""The miniature's test problems as a task of Inspect (inspect_ai), to evaluate our server with another tool.

    pip install inspect-ai openai
    RETOOL_BASE_URL=http://127.0.0.1:8000/v1 RETOOL_API_KEY=none \
        inspect eval benchmarks/serve_inspect.py --model openai-api/retool/grpo --max-connections 64 --epochs 4

A problem is one message, and its programs run within the request. The last box of the answer is compared as in training
(`answers/`). `-T problems=64` asks fewer problems; without `--epochs` each is asked once.
"""

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from retool_jax.answers import check
from retool_jax.data.arithmetic import exercise


@task
def arithmetic(problems: int = 256, split: str = "test") -> Task:
    """Products, greatest common divisors, modular powers and sums: those of `evaluate config=eval`."""
    exercises = [exercise(split, index) for index in range(problems)]
    samples = [Sample(each.question, target=str(each.answer), id=f"{split}-{n}") for n, each in enumerate(exercises)]
    return Task(dataset=MemoryDataset(samples, "miniature"), solver=generate(), scorer=boxed())


@scorer(metrics=[accuracy(), stderr()])
def boxed() -> Scorer:
    """Whether the last box holds the target's value."""

    async def score(state: TaskState, target: Target) -> Score:
        verdict = check(state.output.completion, target.text)
        value = CORRECT if verdict.correct else INCORRECT
        return Score(value=value, answer=verdict.answer, explanation=verdict.reason)

    return score
