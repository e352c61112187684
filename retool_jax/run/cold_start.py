"""The cold start (SFT in a folder of its own) that the train command runs first when an RL run has no `init_from`."""

import dataclasses
import hashlib
import re
from pathlib import Path

from retool_jax.errors import interruptible
from retool_jax.fields import defaults_of, flatten
from retool_jax.models.decoder import Params
from retool_jax.run import sft
from retool_jax.run.folder import may_change
from retool_jax.run.schema import CheckpointConfig, RLRun, SFTRun
from retool_jax.tokens.grammar import DEFAULT_GRAMMAR
from retool_jax.tools.config import NONE, words_of


def cold_start_of(run: RLRun) -> SFTRun:
    """The SFT run that trains the first weights of an RL run. The settings that decide them name its folder."""
    shared = {f.name: getattr(run, f.name) for f in dataclasses.fields(SFTRun)}
    grammar = run.rollout.grammar if words_of(run.tools) and run.rollout.grammar != DEFAULT_GRAMMAR else ""
    shared["sft"] = dataclasses.replace(run.sft, grammar=grammar, tool_prompt=run.rollout.tool_prompt)
    shared["checkpoint"] = CheckpointConfig(every=max(run.sft.steps // 5, 1), keep=1)
    made = SFTRun(**shared)
    defaults = defaults_of(SFTRun)
    decisive = {key: value for key, value in flatten(made).items() if not may_change(key)}
    # Values at their default are left out, so that a new key does not change the name of existing folders.
    decisive = {key: value for key, value in decisive.items() if value != defaults[key]}
    decisive["rollout.grammar"] = run.rollout.grammar
    digest = hashlib.blake2b(repr(sorted(decisive.items())).encode(), digest_size=4).hexdigest()
    tools = re.sub(r"[^\w.+]+", "_", "+".join(words_of(run.tools)) or NONE)[:60]
    folder = Path(run.run).parent / f"cold-start-{tools}-seed{run.seed}-{digest}"
    return dataclasses.replace(made, run=str(folder))


def make_cold_start(run: RLRun) -> Params:
    """The weights of a run's cold start, read from its folder, or trained there first when they are missing."""
    supervised = cold_start_of(run)
    if (params := sft.finished_weights(supervised)) is not None:
        print(f"cold start: reusing {supervised.run}")
        return params
    print(f"cold start: none yet for this config, training it first in {supervised.run}")
    with interruptible():
        return sft.train(supervised, wait=True).params
