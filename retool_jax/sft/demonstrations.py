"""Demonstrations to packed batches: made here or from a file, in an order that the seed decides."""

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

KNOWN = 256  # demonstrations that are looked at before a run, where they are made without an end
_ELSEWHERE = 1 << 40  # from a demonstration to the one that is taken in its place: no run comes so far
_MADE = dict(zip(MADE_HERE, (arithmetic.demonstration, word_problems.demonstration), strict=True))


class Demonstrations:
    """Packed batches of demonstrations; batch i is the same in every run with this config, tools or none, and seed.

    Finite data is read in a new order each epoch, and an epoch has whole steps only: the rows that would not fill the
    last one wait for another epoch, whose order leaves out others.

    Attributes:
        row_length: T of a packed row. Of finite data no more than the longest demonstration needs, in steps of 128:
            attention costs the square of it, in memory too where no kernel of its own computes it.
        per_step: demonstrations in each batch. A fixed number keeps batches a function of the step.
        steps: batches that the run takes.
        digest: of finite data, as ids and mask; empty for what is made here.
        description: finite data in a sentence; empty for what is made here.
        left_out: numbers of demonstrations that were made and were longer than a row; others stand in their places.
    """

    def __init__(self, sft: SFTConfig, tools: Toolbox | None, seed: int, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._tools, self._seed, self._config = tokenizer, tools, seed, sft
        if sft.data in _MADE and tools and CODE_TOOL not in tools.names:
            raise UserError(
                f"sft.data={sft.data} calls {CODE_TOOL}, and tools has {', '.join(tools.names)}; add python to it, or"
                " give other sft.data, or init_from"
            )
        self.left_out: set[int] = set()
        self._finite = None if sft.data in _MADE else read_demonstrations(sft, tokenizer, self._tools)
        if self._finite is None:
            self._look_ahead()
        # Its number follows from their mean length, so that runs with shorter ones (text only) see as many tokens, and
        # cost as much.
        known = [self._example(i) for i in range(KNOWN)] if self._finite is None else self._finite
        lengths = sorted((len(example.ids) for example in known), reverse=True)
        self.row_length = sft.row_length if self._finite is None else min(sft.row_length, -(-lengths[0] // 128) * 128)
        self.per_step = sft.batch_size or max(round(sft.batch_tokens / np.mean(lengths)), 1)
        self.steps, self.digest, self.description = sft.steps, "", ""
        if self._finite is None:
            rows = self.per_step  # at worst each of them fills one, and what comes later is not known yet
        else:
            self._epoch_steps = len(lengths) // self.per_step
            if not self._epoch_steps:
                raise UserError(
                    f"sft.data={sft.data} has {len(lengths)} demonstrations, fewer than the {self.per_step} of one"
                    " step; lower sft.batch_size or sft.batch_tokens"
                )
            self.steps = sft.steps or sft.epochs * self._epoch_steps
            # Any two rows of a first fit hold more than one row together: a bound for every order, the longest ones
            # in one batch included.
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
        """The demonstrations of batch `index`, by number."""
        if self._finite is None:
            return range(index * self.per_step, (index + 1) * self.per_step)
        epoch, part = divmod(index, self._epoch_steps)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._finite))
        return order[part * self.per_step : (part + 1) * self.per_step].tolist()

    def _example(self, index: int) -> Example:
        if self._finite is not None:
            return self._finite[index]
        while len((example := self._made(index)).ids) > self._config.row_length:
            self.left_out.add(index)
            index += _ELSEWHERE
        return example

    def _made(self, index: int) -> Example:
        messages = _MADE[self._config.data](index, self._tools is not None, self._seed)
        return to_example(self._tokenizer, messages, self._tools, self._config)

    def _look_ahead(self) -> None:
        """Refuse what is made here where some of the first are too long by the rule of `sft.overlong`, or most are."""
        sft = self._config
        lengths = [len(self._made(index).ids) for index in range(KNOWN)]
        too_long = [
            (length, f"sft.data={sft.data} number {index}")
            for index, length in enumerate(lengths)
            if length > sft.row_length
        ]
        _check_overlong(sft, too_long)
        if 2 * len(too_long) > KNOWN:
            raise UserError(
                f"{len(too_long)} of the first {KNOWN} demonstrations of sft.data={sft.data} have more than"
                f" sft.row_length={sft.row_length} tokens; raise it to {max(lengths)} or more"
            )


def to_example(tokenizer: Tokenizer, messages: list[dict], tools: Toolbox | None, sft: SFTConfig) -> Example:
    """A conversation as ids and mask, with RL's tools in the prompt as RL shows them."""
    schemas, grammar = tools.schemas if tools else None, sft.grammar or DEFAULT_GRAMMAR
    turns = _behind_headers(tokenizer, messages, grammar)
    tokens = demonstration_ids(tokenizer, turns, schemas, grammar, sft.tool_prompt)
    return Example(np.asarray(tokens.ids, np.int32), np.asarray(tokens.sampled, bool))


def _behind_headers(tokenizer: Tokenizer, messages: list[dict], grammar: str) -> list[dict]:
    """The policy's turns without the `<think>` that the template's header opens; a turn without thinking closes it."""
    if not tokenizer.turn_header.rstrip().endswith("<think>"):
        return messages
    turns, begun = [], False
    for turn in messages:
        # An answer in place, and some families' answers, bring no header along.
        if turn["role"] == "assistant" and (
            not begun or (grammar == "hermes" and tokenizer.family.header_after_answer)
        ):
            text = turn["content"]
            if text.startswith("<think>\n"):
                text = text.removeprefix("<think>\n")
            else:
                text = "\n</think>\n" + ("\n" + text if text else "")
            turn = turn | {"content": text}
        begun = begun or turn["role"] == "assistant"
        turns.append(turn)
    return turns


def read_demonstrations(sft: SFTConfig, tokenizer: Tokenizer, tools: Toolbox | None) -> list[Example]:
    """All rows of `sft.data` as examples, in their order; those that are too long by the rule of `sft.overlong`.

    Raises:
        UserError: a row is no conversation, calls a tool in a run without, cannot be written in the grammar, or is too
            long; or none is left.
    """
    examples, too_long = [], []
    for number, row in enumerate(read_rows(sft.data, f", or one of {', '.join(MADE_HERE)}"), start=1):
        where = f"sft.data={sft.data} row {number}"
        own = tools.of(tools_of(row, where), where) if tools else None
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
    """A `UserError` that names the longest demonstration, where `sft.overlong` has none dropped: (tokens, where)."""
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
