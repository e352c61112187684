"""Demonstrations to packed batches, generated or from a file, in an order that the seed determines."""

import hashlib
from collections.abc import Sequence

import numpy as np

from retool_jax.data import arithmetic, word_problems
from retool_jax.data.config import MADE_HERE
from retool_jax.data.rows import tools_of
from retool_jax.data.sources import read_rows
from retool_jax.data.traces import BadTrace, messages_of
from retool_jax.errors import UserError
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.sft.config import SFTConfig
from retool_jax.tokens.demonstrations import demonstration_ids
from retool_jax.tokens.grammar import CODE_TOOL, DEFAULT_GRAMMAR
from retool_jax.tokens.tokenizer import Tokenizer
from retool_jax.tools.toolbox import Toolbox

KNOWN = 256  # generated demonstrations that are checked before a run
_REPLACEMENT = 1 << 40  # index distance to the replacement of a demonstration that is too long; no run gets so far
_GENERATORS = dict(zip(MADE_HERE, (arithmetic.demonstration, word_problems.demonstration), strict=True))


class Demonstrations:
    """Packed batches of demonstrations; batch i is the same in every run with this config, seed and use of tools.

    Finite data is shuffled anew for each epoch. An epoch has only whole steps: the rows that would not fill its last
    step are left out, and they are other ones in each epoch.

    Attributes:
        row_length: T of a packed row. For finite data it is at most what the longest demonstration needs, rounded up to
            a multiple of 128: the cost of attention grows with its square, and without an attention kernel so does the
            memory.
        per_step: demonstrations in each batch. It is fixed, so that a batch is a function of its step.
        steps: the number of batches of the run.
        digest: a hash of finite data (ids and mask); empty for generated data.
        description: a sentence about finite data; empty for generated data.
        left_out: indices of generated demonstrations that were longer than a row and were replaced.
    """

    def __init__(self, sft: SFTConfig, tools: Toolbox | None, seed: int, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._tools, self._seed, self._config = tokenizer, tools, seed, sft
        if sft.data in _GENERATORS and tools and CODE_TOOL not in tools.names:
            raise UserError(
                f"sft.data={sft.data} calls {CODE_TOOL}, and tools has {', '.join(tools.names)}; add python to it, or"
                " give other sft.data, or init_from"
            )
        self.left_out: set[int] = set()
        self._finite = None if sft.data in _GENERATORS else read_demonstrations(sft, tokenizer, self._tools)
        # `per_step` follows from the mean length, so that runs with shorter demonstrations (text only) train on as many
        # tokens and cost as much.
        known = self._generate_known() if self._finite is None else self._finite
        lengths = sorted((len(example.ids) for example in known), reverse=True)
        self.row_length = sft.row_length if self._finite is None else min(sft.row_length, -(-lengths[0] // 128) * 128)
        self.per_step = sft.batch_size or max(round(sft.batch_tokens / np.mean(lengths)), 1)
        self.steps, self.digest, self.description = sft.steps, "", ""
        if self._finite is None:
            rows = self.per_step  # the worst case, one row each: the lengths of later ones are not known
        else:
            self._epoch_steps = len(lengths) // self.per_step
            if not self._epoch_steps:
                raise UserError(
                    f"sft.data={sft.data} has {len(lengths)} demonstrations, fewer than the {self.per_step} of one"
                    " step; lower sft.batch_size or sft.batch_tokens"
                )
            self.steps = sft.steps or sft.epochs * self._epoch_steps
            # Any two rows of first-fit packing together hold more than one row's tokens. This bounds the rows of every
            # batch, also of one with all the longest demonstrations.
            rows = min(self.per_step, 2 * sum(lengths[: self.per_step]) // self.row_length + 1)
            self.digest = _digest(self._finite)
            self.description = (
                f"{len(lengths):,} demonstrations of {np.mean(lengths):,.0f} tokens on average, {lengths[0]:,} at most;"
                f" {self.per_step} a step in rows of {self.row_length}, {self._epoch_steps} steps an epoch"
            )
        self._micro_batches = -(-rows // sft.rows_per_micro)

    def at(self, index: int) -> Batch:
        examples = [self._example(i) for i in self._members(index)]
        return pack(examples, self.row_length, self._config.rows_per_micro, self._micro_batches)

    def _members(self, index: int) -> Sequence[int]:
        """The indices of the demonstrations of batch `index`."""
        if self._finite is None:
            return range(index * self.per_step, (index + 1) * self.per_step)
        epoch, part = divmod(index, self._epoch_steps)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._finite))
        return order[part * self.per_step : (part + 1) * self.per_step].tolist()

    def _example(self, index: int) -> Example:
        return self._fitting(index, self._generate(index)) if self._finite is None else self._finite[index]

    def _generate(self, index: int) -> Example:
        messages = _GENERATORS[self._config.data](index, self._tools is not None, self._seed)
        return to_example(self._tokenizer, messages, self._tools, self._config)

    def _fitting(self, index: int, example: Example) -> Example:
        """The generated demonstration `index`, or its replacement if it is longer than a row."""
        while len(example.ids) > self._config.row_length:
            self.left_out.add(index)
            index += _REPLACEMENT
            example = self._generate(index)
        return example

    def _generate_known(self) -> list[Example]:
        """The first `KNOWN`. A `UserError` if some of them are too long and `sft.overlong=error`, or if most are."""
        sft, examples = self._config, [self._generate(index) for index in range(KNOWN)]
        too_long = [
            (len(example.ids), f"sft.data={sft.data} number {index}")
            for index, example in enumerate(examples)
            if len(example.ids) > sft.row_length
        ]
        _check_overlong(sft, too_long)
        if 2 * len(too_long) > KNOWN:
            raise UserError(
                f"{len(too_long)} of the first {KNOWN} demonstrations of sft.data={sft.data} have more than"
                f" sft.row_length={sft.row_length} tokens; raise it to {max(too_long)[0]} or more"
            )
        return [self._fitting(index, example) for index, example in enumerate(examples)]


def to_example(tokenizer: Tokenizer, messages: list[dict], tools: Toolbox | None, sft: SFTConfig) -> Example:
    """A conversation as ids and mask; its prompt shows the tools as in RL."""
    schemas, grammar = tools.schemas if tools else None, sft.grammar or DEFAULT_GRAMMAR
    turns = _without_header_think(tokenizer, messages, grammar)
    tokens = demonstration_ids(tokenizer, turns, schemas, grammar, sft.tool_prompt)
    return Example(np.asarray(tokens.ids, np.int32), np.asarray(tokens.sampled, bool))


def _without_header_think(tokenizer: Tokenizer, messages: list[dict], grammar: str) -> list[dict]:
    """Remove the `<think>` from turns if the template's header has it; a turn without thinking begins by closing it."""
    if not tokenizer.turn_header.rstrip().endswith("<think>"):
        return messages
    turns, begun = [], False
    for turn in messages:
        # After an answer in the same turn, and in some families after every tool's answer, there is no header.
        if turn["role"] == "assistant" and (
            not begun or (grammar == "hermes" and tokenizer.family.header_after_answer)
        ):
            text = turn["content"]
            thought, closing, _ = text.partition("</think>")
            if thought.lstrip().startswith("<think>"):
                text = text.lstrip().removeprefix("<think>").removeprefix("\n")
            elif not closing or "<think>" in thought:  # otherwise it was drawn after such a header, and begins inside
                text = "\n</think>\n" + ("\n" + text if text else "")
            turn = turn | {"content": text}
        begun = begun or turn["role"] == "assistant"
        turns.append(turn)
    return turns


def read_demonstrations(sft: SFTConfig, tokenizer: Tokenizer, tools: Toolbox | None) -> list[Example]:
    """All rows of `sft.data` as examples, in order; `sft.overlong` decides about those that are too long.

    Raises:
        UserError: a row is not a conversation, calls a tool in a run without tools, cannot be written in the grammar,
            or is too long; or no row is left.
    """
    examples, too_long = [], []
    for number, row in enumerate(read_rows(sft.data, f", or one of {', '.join(MADE_HERE)}"), start=1):
        where = f"sft.data={sft.data} row {number}"
        own = tools.subset(tools_of(row, where), where) if tools else None
        try:
            messages = messages_of(row, own.names if own else (CODE_TOOL,))
        except BadTrace as reason:
            raise UserError(
                f"{where}: {reason}; python -m retool_jax.prepare converts rows and drops bad ones"
            ) from None
        if not tools and any(turn.get("tool_calls") for turn in messages):
            raise UserError(
                f"{where} calls a tool, which tools=none has not; set tools=python, or give data without calls"
            )
        try:
            example = to_example(tokenizer, messages, own, sft)
        except UserError as reason:
            raise UserError(f"{where}: {reason}") from None
        if len(example.ids) > sft.row_length:
            too_long.append((len(example.ids), where))
        else:
            examples.append(example)
    if too_long:
        _check_overlong(sft, too_long)
        print(f"dropped {len(too_long)} row(s) of sft.data={sft.data} above sft.row_length={sft.row_length} tokens")
    if not examples:
        raise UserError(
            f"sft.data={sft.data} has no rows to learn from; give at least one of at most sft.row_length tokens"
        )
    return examples


def _check_overlong(sft: SFTConfig, too_long: Sequence[tuple[int, str]]) -> None:
    """With `sft.overlong=error`, raise a `UserError` with the longest of the (tokens, where) that are too long."""
    if too_long and sft.overlong == "error":
        length, where = max(too_long)
        raise UserError(
            f"{where} has {length} tokens, and {len(too_long)} row(s) more than sft.row_length={sft.row_length};"
            " raise it, or set sft.overlong=drop"
        )


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(np.int32(len(example.ids)).tobytes() + example.ids.tobytes() + example.sampled.tobytes())
    return digest.hexdigest()
