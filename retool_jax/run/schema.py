"""Everything that a run may set, by task. Each section is defined in the room that reads it."""

from typing import Annotated, Literal

from pydantic import Field, with_config
from pydantic.dataclasses import dataclass

from retool_jax.data.config import MADE_HERE, DataConfig, SetConfig
from retool_jax.engine.config import EngineConfig
from retool_jax.errors import UserError
from retool_jax.evaluation.config import EvaluationConfig, SampledConfig
from retool_jax.fields import CHECKED, Positive
from retool_jax.hosts_config import HostsConfig
from retool_jax.mesh_config import MeshConfig, check_rows, known_sizes
from retool_jax.models.config import ModelConfig
from retool_jax.rl.config import RLConfig
from retool_jax.rollout.config import RolloutConfig
from retool_jax.sandbox.types import Limits, SandboxConfig
from retool_jax.serving.config import ServeConfig
from retool_jax.sft.config import SFTConfig
from retool_jax.tools.config import check_tools, words_of

Seed = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]
Tools = str | tuple[str, ...]
Loggers = tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...]

# The sandbox can be used without the rest, so its sections are ordinary dataclasses that check their own ranges.
for section in (Limits, SandboxConfig):
    with_config(CHECKED)(section)


@dataclass(frozen=True, config=CHECKED)
class CheckpointConfig:
    """How often a run is saved, and how many checkpoints are kept."""

    every: Positive = 10  # steps
    keep: Positive = 2  # last checkpoints that stay on disk


@dataclass(frozen=True, config=CHECKED)
class SFTRun:
    """Everything that a config of task sft may set."""

    run: str = ""  # run folder; empty: runs/ and the command's words
    seed: Seed = 0
    tools: Tools = "python"
    """Or none (text only), python_session, calculator, my_package.my_module:MyTool; several as [python,calculator]."""
    logger: Loggers = ("tensorboard",)
    """Where numbers go beside metrics.jsonl: tensorboard, wandb, trackio; several as [tensorboard,wandb]; or none."""
    tokenizer: str = "miniature"  # or a folder with tokenizer.json, or a hub id; empty: that of init_from
    init_from: str = ""  # first weights: a run or Hugging Face folder, or a hub id; empty: random
    model: ModelConfig = ModelConfig()  # where no key of its shape is set: that of init_from
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    sft: SFTConfig = SFTConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        _one_spelling(self)
        _no_logger(self)
        check_tools(self.tools, self.sft.grammar)
        if self.sft.tool_prompt and self.sft.grammar != "retool" and words_of(self.tools):
            raise UserError(
                f"sft.tool_prompt explains <code>, and sft.grammar={self.sft.grammar or 'hermes'} is explained by the"
                " chat template; set sft.grammar=retool, or leave sft.tool_prompt out"
            )
        check_micro_batches(self)


@dataclass(frozen=True, config=CHECKED)
class RLRun:
    """Everything that a config of task grpo may set.

    `sft` describes the cold start that is trained first when `init_from` is empty; otherwise it is not used.
    """

    run: str = ""  # run folder; empty: runs/ and the command's words
    seed: Seed = 0
    tools: Tools = "python"
    """Or none (text only), python_session, calculator, my_package.my_module:MyTool; several as [python,calculator]."""
    logger: Loggers = ("tensorboard",)
    """Where numbers go beside metrics.jsonl: tensorboard, wandb, trackio; several as [tensorboard,wandb]; or none."""
    tokenizer: str = "miniature"  # or a folder with tokenizer.json, or a hub id; empty: that of init_from
    init_from: str = (
        ""  # first weights: a run or Hugging Face folder, or a hub id; empty: a cold start, as section sft describes
    )
    replay: str = ""  # a run's folder with rollouts (rl.save_rollouts): train from them, without engine and sandbox
    model: ModelConfig = ModelConfig()  # where no key of its shape is set: that of init_from
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    sft: SFTConfig = SFTConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    rl: RLConfig = RLConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        _one_spelling(self)
        _no_logger(self)
        check_tools(self.tools, self.rollout.grammar)
        _check_sessions(self)
        _check_strict(self)
        if not self.init_from:
            _check_cold_start(self)
        check_micro_batches(self)
        _check_lengths(self)
        _check_unread(self)
        if self.replay and self.rl.rollout_only:
            raise UserError(
                f"replay={self.replay} learns from rollouts that are there, and rl.rollout_only=true learns nothing;"
                " leave one of them out"
            )
        _check_queue(self)


@dataclass(frozen=True, config=CHECKED)
class EvaluateRun:
    """Everything that a config of task evaluate may set."""

    run: str = ""  # folder of the evaluation; empty: runs/ and the command's words
    seed: Seed = 0  # of the draws
    tools: Tools = "python"
    """Or none (text only), python_session, calculator, my_package.my_module:MyTool; several as [python,calculator]."""
    tokenizer: str = ""  # miniature, a folder with tokenizer.json, or a hub id; empty: that of init_from
    init_from: str = ""  # the weights to evaluate: a run or Hugging Face folder, or a hub id
    compare: str = ""  # result.json of another evaluation, to print the difference to it
    model: ModelConfig = ModelConfig()  # where no key of its shape is set: that of init_from
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    data: SetConfig = SetConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    evaluation: SampledConfig = SampledConfig()

    def __post_init__(self) -> None:
        _one_spelling(self)
        check_tools(self.tools, self.rollout.grammar)
        _check_sessions(self)
        _check_strict(self)
        _check_room(self, {"rollout": self.rollout.answer_tokens})
        _check_queue(self)


@dataclass(frozen=True, config=CHECKED)
class ServeRun:
    """Everything that a config of task serve may set."""

    seed: Seed = 0  # of the engine; with the seed of a request it decides what is drawn
    tools: Tools = "python"
    """Or none (text only), python_session, calculator, my_package.my_module:MyTool; several as [python,calculator]."""
    tokenizer: str = ""  # miniature, a folder with tokenizer.json, or a hub id; empty: that of init_from
    init_from: str = ""  # the weights to serve: a run or Hugging Face folder, or a hub id
    model: ModelConfig = ModelConfig()  # where no key of its shape is set: that of init_from
    mesh: MeshConfig = MeshConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    serve: ServeConfig = ServeConfig()

    def __post_init__(self) -> None:
        _one_spelling(self)
        check_tools(self.tools, self.rollout.grammar)
        if not self.init_from:
            raise UserError(
                "init_from is empty, and a server needs weights; name a run's folder, a model's, or a hub id"
            )
        if self.engine.tool_lag >= 0:
            raise UserError(
                f"engine.tool_lag={self.engine.tool_lag} lets every stream wait for the slowest tool; set"
                " engine.tool_lag=-1"
            )
        if self.rollout.max_prompt_tokens >= self.engine.max_length:
            raise UserError(
                f"rollout.max_prompt_tokens={self.rollout.max_prompt_tokens} leaves no room in"
                f" engine.max_length={self.engine.max_length}; lower it"
            )


EngineRun = RLRun | EvaluateRun | ServeRun  # the runs that sample
Run = SFTRun | EngineRun
TASKS = {"sft": SFTRun, "grpo": RLRun, "evaluate": EvaluateRun, "serve": ServeRun}


def task_of(schema: type[Run]) -> str:
    """The name of a run's task in a config."""
    return next(task for task, known in TASKS.items() if issubclass(schema, known))


def micro_batches(run: Run) -> dict[str, int]:
    """Key and rows of each kind of micro-batch that a run trains on."""
    if isinstance(run, SFTRun):
        return {"sft.rows_per_micro": run.sft.rows_per_micro}
    if isinstance(run, EvaluateRun | ServeRun):
        return {}
    own = {"rl.rows_per_micro": run.rl.rows_per_micro}
    return own if run.init_from else {"sft.rows_per_micro": run.sft.rows_per_micro} | own


def check_micro_batches(run: Run) -> None:
    """A `UserError` when the rows of a micro-batch do not divide over the mesh axes whose size is known."""
    for key, rows in micro_batches(run).items():
        check_rows(known_sizes(run.mesh), key, rows)


def _one_spelling(run: Run) -> None:
    """Replace a list of one tool by that tool, so that both spellings give equal runs."""
    if isinstance(run.tools, tuple) and len(run.tools) == 1:
        object.__setattr__(run, "tools", run.tools[0])


def _no_logger(run: SFTRun | RLRun) -> None:
    """Replace logger=none by an empty list, for the same reason."""
    if "none" in run.logger:
        if len(run.logger) > 1:
            raise UserError(f"logger=[{','.join(run.logger)}] names none and others; leave out none, or the others")
        object.__setattr__(run, "logger", ())


def _check_queue(run: RLRun | EvaluateRun) -> None:
    """A `UserError` when the sandbox's queue is shorter than the number of calls that may wait at once."""
    if 0 < run.sandbox.queue_limit < run.engine.slots:
        raise UserError(
            f"sandbox.queue_limit={run.sandbox.queue_limit} is below engine.slots={run.engine.slots}: every slot"
            " may wait for a tool at once; raise it, or 0 lets all of them wait"
        )


def _check_sessions(run: RLRun | EvaluateRun) -> None:
    """A `UserError` when a call may wait for another trajectory's interpreter while that trajectory waits for it."""
    if "python_session" in words_of(run.tools) and run.engine.tool_lag >= 0:
        raise UserError(
            f"engine.tool_lag={run.engine.tool_lag} waits for each call, and with tools=python_session a call may"
            " wait for another trajectory's end; set engine.tool_lag=-1"
        )


def _check_cold_start(run: RLRun) -> None:
    """A `UserError` when the sections of a run without weights describe no cold start that fits it."""
    if run.sft.epochs:
        raise UserError(
            f"sft.epochs={run.sft.epochs} needs a cold start of its own; run config=sft first and give its folder"
            " as init_from, or use sft.steps"
        )
    for name in ("grammar", "tool_prompt"):
        here, there = getattr(run.sft, name), getattr(run.rollout, name)
        if here not in ("", there):
            raise UserError(
                f"sft.{name}={here} is not rollout.{name}={there}; leave it out, and the cold start uses the one of the"
                " rollouts"
            )


def _check_lengths(run: RLRun) -> None:
    """A `UserError` when a trajectory, or a part of it that a key sets, does not fit into its room."""
    longest = run.engine.max_length
    if run.rl.row_length < longest:
        raise UserError(
            f"rl.row_length={run.rl.row_length} is shorter than engine.max_length={longest};"
            " a packed row must hold the longest trajectory"
        )
    _check_room(run, {"rollout": run.rollout.answer_tokens, "evaluation": run.evaluation.answer_tokens})
    room, overlong = longest - run.rollout.max_prompt_tokens, run.rl.reward.overlong_tokens
    if overlong > room:
        raise UserError(
            f"rl.reward.overlong_tokens={overlong} is more than the longest response of {room} tokens"
            f" (engine.max_length={longest} minus rollout.max_prompt_tokens); lower it to {room} or less"
        )


def _check_unread(run: RLRun) -> None:
    """A `UserError` when a key is set that has no effect in this run."""
    if run.engine.stale_rows != EngineConfig.stale_rows and not run.rl.ahead:
        raise UserError(
            f"engine.stale_rows={run.engine.stale_rows} is for rows that are unfinished when the weights change, and"
            " with rl.ahead=0 there are none; leave it out, or set rl.ahead=1 or more"
        )
    if (times := run.rl.groups.skip_solved) and run.data.train.partition(":")[0] in MADE_HERE:
        raise UserError(
            f"rl.groups.skip_solved={times} skips prompts that come again, and no prompt of"
            f" data.train={run.data.train} does; leave it out, or give a data set"
        )


def _check_strict(run: RLRun | EvaluateRun) -> None:
    """A `UserError` when calls are to be read strictly in a run without tools."""
    if run.rollout.strict_calls and not words_of(run.tools):
        raise UserError(
            "rollout.strict_calls=true refuses calls that are not exactly as the grammar writes them, and with"
            " tools=none a call is only text; leave it out, or name a tool"
        )


def _check_room(run: RLRun | EvaluateRun, answers: dict[str, int]) -> None:
    """A `UserError` when a prompt, or a prompt and the tokens that a section reserves for the answer, fill a row."""
    longest = run.engine.max_length
    room = longest - run.rollout.max_prompt_tokens
    if room <= 0:
        raise UserError(
            f"rollout.max_prompt_tokens={run.rollout.max_prompt_tokens} leaves no room in engine.max_length={longest}"
        )
    for name, tokens in answers.items():
        if tokens >= room:
            raise UserError(
                f"{name}.answer_tokens={tokens} must lie between 0 (none) and {room - 1}, what"
                f" engine.max_length={longest} leaves beside rollout.max_prompt_tokens; lower it"
            )
