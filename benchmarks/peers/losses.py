"""Compare the losses and gradients of our updates with those of TRL and verl, on the same weights and trajectories.

    python benchmarks/peers/losses.py [peers=TRL,verl] [cases=TEXT] [folder=build/losses] [environments=build/peers] \
        [NAME=PYTHON]

Each case of `loss_cases.py` learns from the same 16 trajectories in up to four updates of several micro-batches each,
so later updates are off-policy. Ours are those of a run's own learner (`rl.learner.learn`), TRL's those of its
trainers, and verl's use its functions in the order of its trainer. The model is a tiny Qwen2 in fp32 with random
weights, also in norms and biases. With `cases`, only those run whose name has this text. Each peer runs in its own
virtual environment, which the first call makes; NAME=PYTHON uses an existing one.

Prints a table of the loss of the last update and the norm of the first gradient on both sides, and the largest
difference of all updates: of the loss, relative to the largest loss, and of the gradient as a vector, relative to its
norm. Exits with 1 if a case that should agree differs by more than 1e-4, or one with a reason does not.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import optax
from environments import ENVIRONMENTS, last_line, make_environment
from loss_cases import CASES, DEAL, GROUP, OURS, Case, trajectories

from retool_jax.data.problems import Problem
from retool_jax.learn.optimizer import TrainState, begin_from
from retool_jax.learn.packing import Batch, Example, pack
from retool_jax.learn.scorer import Scorer
from retool_jax.learn.step import Metrics, Outputs, Step, make_step
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import Params, init_params
from retool_jax.models.huggingface import checkpoint_tensors, save_params
from retool_jax.rl.learner import ActorCritic, learn
from retool_jax.rollout.trajectory import End, Trajectory
from retool_jax.run.learner import first_state, make_learner
from retool_jax.run.load import load
from retool_jax.sft.loop import imitation_loss

HERE = Path(__file__).resolve().parent
SCRIPTS = {"TRL": ("torch", "losses_trl.py"), "verl": ("verl", "losses_verl.py")}
TOLERANCE = 1e-4
HEAD = ("value", "value_bias")  # of a critic
MESH = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
MODEL = load(list(OURS)).model
Found = tuple[list[float], list[dict[str, np.ndarray]]]  # the loss and the gradient of each update


class Watched:
    """A step that also keeps the loss and the gradient of each update.

    Without a momentum the first moment of Adam is the gradient.
    """

    def __init__(self, step: Step, loss: str) -> None:
        self._step, self._loss = step, loss
        self.losses: list[float] = []
        self.gradients: list[dict[str, np.ndarray]] = []

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state, metrics = self._step(state, batch)
        self.losses.append(float(metrics[self._loss]))
        self.gradients.append(tensors_of(optax.tree_utils.tree_get(state.opt_state, "mu")))
        return state, metrics


def tensors_of(params: Params) -> dict[str, np.ndarray]:
    """Weights or gradients by the names of their checkpoint; a critic's head is `value` and `value_bias`."""
    heads = {name: np.asarray(params[name][...]) for name in HEAD if name in params}
    tensors = checkpoint_tensors(MODEL, params)
    return {
        name: read(np.float32) for name, read in tensors.items() if not (heads and name == "lm_head.weight")
    } | heads


def weights(seed: int) -> Params:
    """Random weights, also of norms and biases."""
    params = init_params(MODEL, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


def trajectory_of(row: dict, place: int) -> Trajectory:
    found = Trajectory(f"{row['group']}/{place}", Problem(str(row["group"]), (), ""), end=End.ANSWERED)
    found.add("prompt", row["prompt"])
    for own in np.split(np.arange(len(row["sampled"])), np.flatnonzero(np.diff(row["sampled"])) + 1):
        ids, logprobs = ([row[name][i] for i in own] for name in ("completion", "logprobs"))
        found.add(*(("policy", ids, logprobs) if row["sampled"][own[0]] else ("tool", ids)))
    found.reward = row["reward"]
    return found


def ours(case: Case, rows: list[dict]) -> Found:
    """The losses and gradients of our updates."""
    run = load([*OURS, *case.words])
    if case.work == "sft":
        step = Watched(make_step(Outputs(MODEL), imitation_loss, run.rl.optimizer, MESH), "loss")
        state = begin_from(weights(0), MODEL, run.rl.optimizer, MESH)
        learned = [trajectory_of(row, place) for place, row in enumerate(rows)]
        batch = pack([Example(t.ids, t.sampled) for t in learned], run.rl.row_length, run.rl.rows_per_micro)
        for _ in range(2):
            state, _ = step(state, batch)
        return step.losses, step.gradients
    learner = make_learner(run, MESH, lambda: weights(1), lambda *_: (MODEL, weights(2)))
    policy = Watched(learner.update, "loss")
    critic = Watched(learner.critic, "critic/value_loss") if learner.critic else None
    state = first_state(run, weights(0), MESH)
    if isinstance(state, ActorCritic):
        state = state._replace(critic=state.critic._replace(params=with_value_head(state.critic.params)))
    trajectories = [trajectory_of(row, place) for place, row in enumerate(rows)]
    learn(replace(learner, update=policy, critic=critic), state, trajectories, step=1)
    watched = critic if case.settings.get("learns") == "critic" else policy
    return watched.losses, watched.gradients


def with_value_head(critic: Params) -> Params:
    """A critic's weights with a random head in the place of zeros."""

    def random(path: tuple, x: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(x.size), x.shape) if path[0].key in HEAD else x

    return jax.tree_util.tree_map_with_path(random, critic)


def theirs(peer: str, python: str, folder: Path) -> tuple[dict[str, Found], list[str]]:
    """The losses and gradients of a peer's updates, by case, and its versions."""
    name = SCRIPTS[peer][1]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RAY_IGNORE_UNHANDLED_ERRORS": "1"}
    with (folder / f"{peer}.log").open("w") as log:
        subprocess.run([python, HERE / name, folder], check=True, stdout=log, stderr=log, env=environment)
    told, gradients = json.loads((folder / f"{peer}.json").read_text()), np.load(folder / f"{peer}.npz")
    found: dict[str, Found] = {case: (losses, [{} for _ in losses]) for case, losses in told["losses"].items()}
    for key in gradients.files:
        case, update, weight = key.split("|")
        found[case][1][int(update)][weight] = gradients[key]
    return found, told["versions"]


def prepare(folder: Path, cases: list[Case]) -> None:
    """Write the weights and the cases for the peers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for seed, name in enumerate(("policy", "reference", "teacher")):
        save_params(MODEL, weights(seed), folder / name)
    state = first_state(load([*OURS, "rl.algorithm=ppo"]), weights(0), MESH)
    critic = with_value_head(state.critic.params)
    np.savez(folder / "value_head.npz", **{name: np.asarray(critic[name][...]) for name in HEAD})
    told = [asdict(case) | {"rows": rows_of(case, dealt=case.peer == "TRL"), "prompts": len(DEAL)} for case in cases]
    (folder / "cases.json").write_text(json.dumps(told))


def rows_of(case: Case, dealt: bool) -> list[dict]:
    """A case's trajectories, for TRL in the order in which our updates take them."""
    rows = case.rows or trajectories()
    if case.noise:
        rng, learned = np.random.default_rng(1), [trajectory_of(row, place) for place, row in enumerate(rows)]
        scorer = Scorer(Outputs(MODEL, ("logprobs",)), MESH, row_length=64, rows_per_micro=1, max_micro_batches=16)
        found = scorer(weights(0), [Example(t.ids, t.sampled) for t in learned])["logprobs"]
        for row, values in zip(rows, found, strict=True):
            drawn = values[len(row["prompt"]) :] + rng.normal(0, case.noise, len(row["completion"]))
            row["logprobs"] = np.where(row["sampled"], drawn, 0.0).tolist()
    if not dealt or len(rows) != len(DEAL) * GROUP:
        return rows
    return [row for group in DEAL for row in rows if row["group"] == group]


def compare(case: Case, mine: Found, other: Found) -> tuple[str, bool]:
    """A row of the table, and whether the case is as it should be."""
    (my_losses, my_gradients), (losses, gradients) = mine, other
    assert len(my_losses) == len(losses)
    gap = np.max(np.abs(np.subtract(my_losses, losses))) / np.max(np.abs(losses))
    slopes = [distance(a, b) for a, b in zip(my_gradients, gradients, strict=True)]
    norms = norm(gradients[0]), norm(my_gradients[0])
    numbers = (
        f"{losses[-1]:.6g} | {my_losses[-1]:.6g} | {norms[0]:.6g} | {norms[1]:.6g} | {gap:.1e} | {max(slopes):.1e}"
    )
    agree = max(gap, *slopes) <= TOLERANCE
    good = agree != bool(case.why)
    verdict = case.why if good else "they should agree" if not case.why else f"they agree, in spite of: {case.why}"
    return f"| {case.peer} | {case.name} | {len(losses)} | {numbers} | {verdict} |", good


def norm(gradient: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x.astype(np.float64))) for x in gradient.values())))


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The norm of the difference of two gradients, relative to that of the second."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return norm({name: a[name] - b[name] for name in a}) / (norm(b) or 1.0)


def main(words: list[str]) -> None:
    options = {"peers": ",".join(SCRIPTS), "cases": "", "folder": "build/losses", "environments": "build/peers"}
    known = [*options, *(name for name, _ in SCRIPTS.values())]
    if odd := [word for word in words if "=" not in word or word.split("=")[0] not in known]:
        sys.exit(f"error: cannot read {odd[0]!r}; the options are {', '.join(f'{key}=...' for key in known)}")
    options |= dict(word.split("=", 1) for word in words)
    folder, peers = Path(options["folder"]), options["peers"].split(",")
    cases = [case for case in CASES if case.peer in peers and options["cases"] in case.name]
    prepare(folder, cases)
    found, versions, reasons = {}, [f"jax {version('jax')}"], []
    for peer in peers:
        name, _ = SCRIPTS[peer]
        try:
            environment = Path(options["environments"]) / name
            python = options.get(name) or make_environment(environment, ENVIRONMENTS[name])
            found[peer], told = theirs(peer, python, folder)
            versions += [word for word in told if word not in versions]
        except (OSError, subprocess.CalledProcessError) as error:
            reasons.append(f"{peer} could not be run ({last_line(error)}); see {folder / f'{peer}.log'}")
    print("| peer | case | updates | loss | ours | gradient | ours | loss differs | gradient differs | why |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    good = not reasons
    for case in cases:
        if case.peer in found:
            line, agrees = compare(case, ours(case, rows_of(case, dealt=False)), found[case.peer][case.name])
            print(line, flush=True)
            good &= agrees
    print(f"\n{date.today()}, {', '.join(versions)}", *reasons, sep="\n")
    sys.exit(not good)


if __name__ == "__main__":
    main(sys.argv[1:])
