"""Trajectories in ATIF-v1.7, the Agent Trajectory Interchange Format (Harbor's RFC 0001), one JSON object a line.

A turn of the policy is a step of the agent with its calls, what they were answered and, in `metrics`, the ids that it
read and drew with their log-probabilities. Whoever trains from them needs no tokenizer.
"""

import math

import retool_jax
from retool_jax.export.records import Message, Record, messages_of

VERSION = "ATIF-v1.7"
TOLD = (
    *("split", "step", "group", "prompt_id", "problem", "ground_truth", "answer", "correct", "verdict"),
    *("reward", "reward_terms", "end", "fault"),
)
TOLD_OF_CALL = ("status", "wall_s", "queue_s", "repaired", "metrics")


def trajectory_of(record: Record, run: str) -> dict:
    """A record as ATIF's root object, ready for JSON. What ATIF has no field for stands in `extra`."""
    values = record.values
    messages = messages_of(values)
    steps = [_step(number, message, values) for number, message in enumerate(messages, start=1)]
    turns = [message for message in messages if message.stop]
    return {
        "schema_version": VERSION,
        "session_id": run,
        "trajectory_id": record.name,
        "agent": {"name": "retool_jax", "version": retool_jax.__version__, "model_name": run},
        "steps": steps,
        "final_metrics": {
            "total_prompt_tokens": sum(turn.start for turn in turns),
            "total_completion_tokens": sum(turn.stop - turn.start for turn in turns),
            "total_steps": len(steps),
        },
        "extra": {key: values[key] for key in TOLD if values.get(key) is not None},
    }


def _step(number: int, message: Message, values: dict) -> dict:
    step = {"step_id": number, "source": "agent" if message.role == "assistant" else message.role}
    step["message"] = message.text
    if not message.stop:
        # An assistant's turn that stands in a prompt was drawn by nobody.
        return step | ({"llm_call_count": 0} if message.role == "assistant" else {})
    step["llm_call_count"] = 1
    if message.reasoning:
        step["reasoning_content"] = message.reasoning
    if message.calls:
        step["tool_calls"] = [
            {
                "tool_call_id": call.id,
                "function_name": call.name,
                "arguments": call.arguments,
                "extra": {key: call.use[key] for key in TOLD_OF_CALL if call.use.get(key)},
            }
            for call in message.calls
        ]
    results = [{"source_call_id": call.id, "content": call.output} for call in message.calls if call.output is not None]
    if results:
        step["observation"] = {"results": results}
    drawn = slice(message.start, message.stop)
    step["metrics"] = {
        "prompt_tokens": message.start,
        "completion_tokens": message.stop - message.start,
        "prompt_token_ids": values["ids"][: message.start],
        "completion_token_ids": values["ids"][drawn],
    }
    logprobs = values["logprobs"][drawn]
    if all(map(math.isfinite, logprobs)):  # JSON has no other numbers
        step["metrics"]["logprobs"] = logprobs
    return step
