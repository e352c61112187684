"""The same step by retool_jax: a policy update whose loss covers every token but the first of each row.

It does more than the others: entropies and the spread of log-probabilities are logged.
"""

from functools import partial

import jax
import numpy as np
from shape import LENGTH, MODEL, ROWS, report

from retool_jax.learn.config import OptimizerConfig
from retool_jax.learn.optimizer import init_state
from retool_jax.learn.packing import Example, pack
from retool_jax.learn.step import Outputs, make_step
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.config import ModelConfig
from retool_jax.rl.config import RLConfig
from retool_jax.rl.loss import clipped_loss


def main() -> None:
    model, optimizer = ModelConfig(**MODEL, tie_embeddings=False), OptimizerConfig(warmup_steps=1)
    mesh, rng = make_mesh(MeshConfig()), np.random.default_rng(0)
    examples = [
        Example(
            rng.integers(0, MODEL["vocab_size"], LENGTH).tolist(),
            np.arange(LENGTH) > 0,
            {"old_logprobs": -7.6, "advantages": (-1.0) ** row},
        )
        for row in range(ROWS)
    ]
    batch = pack(examples, LENGTH, ROWS)
    update = make_step(Outputs(model), partial(clipped_loss, rl=RLConfig()), optimizer, mesh)
    state = init_state(model, optimizer, mesh, seed=0)

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(update(state, batch))

    report(step, jax=jax.__version__)


if __name__ == "__main__":
    main()
