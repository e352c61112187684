"""Trajectories in ATIF-v1.7, the Agent Trajectory Interchange Format (Harbor's RFC 0001), one JSON object a line.

A turn of the policy is a step of the agent with its calls, their answers and, in `metrics`, the ids that it read and
sampled, with log-probabilities. Training from them needs no tokenizer.
"""

import math

import retool_jax
from retool_jax.export.records import Message, Record, messages_of

VERSION = "ATIF-v1.7"
EXTRA = (
    *("split", "step", "group", "prompt_id", "problem", "ground_truth", "answer", "correct", "verdict"),
    *("reward", "reward_terms", "end", "fault"),
)
EXTRA_OF_CALL = ("status", "wall_s", "queue_s", "repaired", "metrics")


def trajectory_of(record: Record, run: str) -> dict:
    """A record as ATIF's root object, ready for JSON. Values for which ATIF has no field are in `extra`."""
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
        "extra": {key: values[key] for key in EXTRA if values.get(key) is not None},
    }


def _step(number: int, message: Message, values: dict) -> dict:
    step = {"step_id": number, "source": "agent" if message.role == "assistant" else message.role}
    step["message"] = message.text
    if not message.stop:
        # An assistant's turn in a prompt was not sampled.
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
                "extra": {key: call.use[key] for key in EXTRA_OF_CALL if call.use.get(key)},
            }
            for call in message.calls
        ]
    results = [{"source_call_id": call.id, "content": call.output} for call in message.calls if call.output is not None]
    if results:
        step["observation"] = {"results": results}
    own = slice(message.start, message.stop)
    step["metrics"] = {
        "prompt_tokens": message.start,
        "completion_tokens": message.stop - message.start,
        "prompt_token_ids": values["ids"][: message.start],
        "completion_token_ids": values["ids"][own],
    }
    logprobs = values["logprobs"][own]
    if all(map(math.isfinite, logprobs)):  # JSON has only finite numbers
        step["metrics"]["logprobs"] = logprobs
    return step
