"""Chat messages to segments of token ids: the only glue between the policy's tokens and everybody else's.

A trajectory is one growing list of ids:

    prompt | policy's turn ... <|im_end|> | environment's segment | policy's turn ... <|im_end|> | ...

The prompt and each environment segment are encoded once, as one string each; the policy's ids are kept as sampled.
ChatML puts a newline after `<|im_end|>`, where the policy has already stopped, so the environment's segment brings it;
other families mark turns otherwise (`tokenizer.Family`). The concatenation equals the ids of the full template render.
SFT, RL and evaluation build their sequences with these functions and no others.
"""

from collections.abc import Callable

from retool_jax.tokens.tokenizer import FAMILIES, Tokenizer

# What frames turns, calls and outputs in any family or grammar, also where the vocabulary has no token for it.
_TAGS = ("tool_call", "tool_response", "think", "code", "interpreter")
_MARKS = (
    *(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")),
    *(mark for family in FAMILIES for mark in family.marks),
)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Ids up to and including the header of the policy's first turn, of a prompt without tools (`grammar`)."""
    return tokenizer.encode(tokenizer.render(messages, None, generation_prompt=True))


def tool_segment(tokenizer: Tokenizer, outputs: list[str]) -> list[int]:
    """Ids of the environment's answer to one finished policy turn, one output per call, up to the next turn's header.

    Prompt, turn and segment are the ids of the template's full render, for the templates that keep what they have
    written. Qwen3's does not always: it takes thinking out of earlier turns. Segments never re-render, so the thinking
    of a trajectory stays in its context.
    """
    return next_segment(tokenizer, outputs, None, turn_ended=True)


def user_segment(tokenizer: Tokenizer, text: str, turn_ended: bool) -> list[int]:
    """Ids of the user's words after a policy's turn, which they close if it is open, up to the next turn's header."""
    return next_segment(tokenizer, [], text, turn_ended)


def next_segment(tokenizer: Tokenizer, outputs: list[str], text: str | None, turn_ended: bool) -> list[int]:
    """Ids of what follows a policy's turn: answers to its calls, if it has any, then the user's words, if there are."""
    family = tokenizer.family
    header = tokenizer.turn_header if text is not None or family.header_after_answer else ""

    def write(parts: list[str]) -> str:
        told, said = parts[: len(outputs)], parts[len(outputs) :]
        written = "" if turn_ended else family.turn_end
        if told:
            wrapped = "\n".join(f"{family.output_open}{output}{family.output_close}" for output in told)
            written += f"{family.answer_open}{wrapped}{family.answer_close}"
        for words in said:  # the newline that follows a turn is there already behind answers
            opening = family.user_open.removeprefix("\n") if told else family.user_open
            written += opening + words + family.user_close
        return written + header

    return environment_ids(tokenizer, write, [*outputs, *([] if text is None else [text])])


def environment_ids(tokenizer: Tokenizer, write: Callable[[list[str]], str], outputs: list[str]) -> list[int]:
    """Ids of `write(outputs)`, encoded as one string, where the outputs are data.

    Strings of control tokens in them are broken up first, so none can end a turn, open a call or look like the
    policy's own words to a parser.
    """
    ids = tokenizer.encode(write([defuse(tokenizer, output) for output in outputs]))
    control = set(tokenizer.control_tokens.values())
    own = [index for index in tokenizer.encode(write([""] * len(outputs))) if index in control]
    found = [index for index in ids if index in control]
    if found != own:
        raise AssertionError(f"tool output changed the control tokens from {own} to {found}: {outputs!r}")
    return ids


def defuse(tokenizer: Tokenizer, text: str) -> str:
    """Break every mark in a text by a visible space: `<|im_end|>` becomes `< |im_end|>`.

    Marks are the control tokens of the vocabulary, whichever they are, and the strings by which templates and
    grammars frame turns, calls and outputs, be they tokens or plain text here. Breaking one cannot make another,
    since no mark has a space after its first character.
    """
    for mark in (*tokenizer.control_tokens, *_MARKS):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
