"""Chat messages as segments of token ids. No other file puts text beside the policy's tokens.

A trajectory is one growing list of ids:

    prompt | policy's turn ... <|im_end|> | environment's segment | policy's turn ... <|im_end|> | ...

The prompt and each environment segment are encoded once, each as one string; the policy's ids are kept as sampled.
ChatML puts a newline after `<|im_end|>`, where the policy has already stopped, so the environment's segment begins with
it; other families mark turns differently (`tokenizer.Family`). The concatenation equals the ids of the full template
render. SFT, RL and evaluation build their sequences only with these functions.
"""

from collections.abc import Callable

from retool_jax.tokens.tokenizer import FAMILIES, Tokenizer

# The marks of turns, calls and outputs in all families and grammars, whether or not the vocabulary has tokens for them.
_TAGS = ("tool_call", "tool_response", "think", "code", "interpreter")
_MARKS = (
    *(f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")),
    *(mark for family in FAMILIES for mark in family.marks),
)


def prompt_ids(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a prompt without tools (`grammar` adds them), including the header of the policy's first turn."""
    return tokenizer.encode(tokenizer.render(messages, None, generation_prompt=True))


def tool_segment(tokenizer: Tokenizer, outputs: list[str]) -> list[int]:
    """Ids of the environment's answer to one finished policy turn, one output per call, up to the next turn's header.

    Prompt, turn and segment together are the ids of the template's full render, if the template never changes earlier
    turns. Qwen3's can: it removes thinking from them. Segments never re-render, so the thinking of a trajectory stays
    in its context.
    """
    return next_segment(tokenizer, outputs, None, turn_ended=True)


def user_segment(tokenizer: Tokenizer, text: str, turn_ended: bool) -> list[int]:
    """Ids of a user message after a policy's turn, up to the next turn's header. They close the turn if it is open."""
    return next_segment(tokenizer, [], text, turn_ended)


def next_segment(tokenizer: Tokenizer, outputs: list[str], text: str | None, turn_ended: bool) -> list[int]:
    """Ids that follow a policy's turn: the answers to its calls, if any, then the user's `text`, if any."""
    family = tokenizer.family
    header = tokenizer.turn_header if text is not None or family.header_after_answer else ""

    def write(parts: list[str]) -> str:
        answers, user_texts = parts[: len(outputs)], parts[len(outputs) :]
        written = "" if turn_ended else family.turn_end
        if answers:
            wrapped = "\n".join(f"{family.output_open}{answer}{family.output_close}" for answer in answers)
            written += f"{family.answer_open}{wrapped}{family.answer_close}"
        for user_text in user_texts:
            opening = family.user_open.removeprefix("\n") if answers else family.user_open  # answers end in a newline
            written += opening + user_text + family.user_close
        return written + header

    return environment_ids(tokenizer, write, [*outputs, *([] if text is None else [text])])


def environment_ids(tokenizer: Tokenizer, write: Callable[[list[str]], str], outputs: list[str]) -> list[int]:
    """Ids of `write(outputs)`, encoded as one string.

    The outputs are data: strings of control tokens in them are broken up first. So no output can end a turn, open a
    call or look to a parser like text of the policy.
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

    Marks are all control tokens of the vocabulary, and the strings with which templates and grammars frame turns, calls
    and outputs, whether the vocabulary has tokens for them or not. Breaking one mark cannot create another, since no
    mark has a space after its first character.
    """
    for mark in (*tokenizer.control_tokens, *_MARKS):
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text
