"""Chat messages to segments of token ids: the only glue between the policy's tokens and everybody else's.

A trajectory is one growing list of ids:

    prompt | policy's turn ... <|im_end|> | environment's segment | policy's turn ... <|im_end|> | ...

The prompt and each environment segment are encoded once, as one string each; the policy's ids are kept as sampled.
The template puts a newline after `<|im_end|>`, where the policy has already stopped, so the environment's segment
brings it. The concatenation equals the ids of the full template render. SFT, RL and evaluation build their
sequences with these functions and no others.
"""

import json
from dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenList:
    """Ids with the mask of those that the policy sampled (or, in demonstrations, is to imitate)."""

    ids: list[int]
    sampled: list[bool]

    def extend(self, ids: list[int], sampled: bool) -> None:
        self.ids.extend(ids)
        self.sampled.extend([sampled] * len(ids))


def prompt_ids(tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """Ids up to and including the header of the policy's first turn."""
    return tokenizer.encode(tokenizer.render(messages, tools, generation_prompt=True))


def tool_segment(tokenizer: Tokenizer, outputs: list[str]) -> list[int]:
    """Ids of the environment's answer to one policy turn, one output per call, up to the next turn's header.

    The outputs are data: strings of control tokens in them are broken up first, so none can end a turn, open a
    call or look like the policy's own words to a parser.
    """
    defused = [defuse(tokenizer, output) for output in outputs]
    responses = "".join(f"\n<tool_response>\n{output}\n</tool_response>" for output in defused)
    ids = tokenizer.encode(f"\n<|im_start|>user{responses}<|im_end|>\n<|im_start|>assistant\n")
    control = set(tokenizer.control_tokens.values())
    # The template's own: two headers, one end, and a pair of tags per output where the vocabulary has them.
    own = 3 + sum(tag in tokenizer.control_tokens for tag in ("<tool_response>", "</tool_response>")) * len(outputs)
    found = sum(index in control for index in ids)
    if found != own:
        raise AssertionError(f"tool output put {found - own} control tokens into the context: {outputs!r}")
    return ids


def defuse(tokenizer: Tokenizer, text: str) -> str:
    """Break every control token's string in a text by a visible space: `<|im_end|>` becomes `< |im_end|>`.

    A rule on the strings' first two characters would miss vocabularies with other marks, so it goes by the
    tokenizer's own list. Breaking one string cannot make another, since no control token begins with a space
    after its first character.
    """
    for control in tokenizer.control_tokens:
        text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def policy_turn_text(message: dict) -> str:
    """The text that a policy would have sampled for an assistant message, its `<|im_end|>` included."""
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls") or ()
    ]
    parts = ([message["content"]] if message.get("content") else []) + calls
    return "\n".join(parts) + "<|im_end|>"


def demonstration_ids(tokenizer: Tokenizer, messages: list[dict], tools: list[dict] | None = None) -> TokenList:
    """A whole conversation as ids and mask, by the same segments as a rollout's.

    Raises:
        UserError: the messages are not user (or system) turns followed by assistant turns with tool turns between.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if not first:
        raise UserError("a demonstration needs a user message and then an assistant message")
    tokens = TokenList([], [])
    tokens.extend(prompt_ids(tokenizer, messages[:first], tools), sampled=False)
    pending: list[str] = []
    for message in messages[first:]:
        if message["role"] == "tool":
            pending.append(message["content"])
        elif message["role"] == "assistant":
            if pending:
                tokens.extend(tool_segment(tokenizer, pending), sampled=False)
                pending = []
            tokens.extend(tokenizer.encode(policy_turn_text(message)), sampled=True)
        else:
            raise UserError(f"a {message['role']} message after the first assistant turn is not supported")
    return tokens
