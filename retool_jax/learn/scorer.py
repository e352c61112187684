"""Evaluate given tokens with a model: a reference, a teacher, a critic, or the policy after a rollout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from retool_jax import mesh as meshes
from retool_jax.learn.packing import Batch, Example, pack, places
from retool_jax.learn.step import Columns, Outputs, empty_columns, micro_batch, on_mesh, write_columns
from retool_jax.models.decoder import Params
from retool_jax.models.sharding import param_shardings


class Scorer:
    """The outputs of a model for examples: `scorer(params, examples)`.

    `max_micro_batches` fixes the shapes, so that one executable serves all steps; it skips empty micro-batches.
    """

    def __init__(
        self,
        outputs: Outputs,
        mesh: Mesh,
        row_length: int,
        rows_per_micro: int,
        max_micro_batches: int,
        share_prefixes: bool = False,
    ) -> None:
        self.outputs = outputs
        self._mesh = mesh
        self._rows = row_length, rows_per_micro
        self._max_micro_batches = max_micro_batches
        self._share_prefixes = share_prefixes
        rows, everywhere = meshes.sharding(mesh, "micro", "batch", "length"), meshes.replicated(mesh)
        self._compiled = jax.jit(
            self._score,
            in_shardings=(param_shardings(outputs.model, mesh, outputs.value_head), Batch(*[rows] * 5, everywhere)),
            out_shardings=everywhere,  # so that every process can read the whole result
            compiler_options=meshes.update_options(mesh),
        )

    def _score(self, params: Params, batch: Batch) -> Columns:
        """The outputs of a whole batch, [M,B,T] each, 0 where nothing was sampled."""

        def body(index: jax.Array, seen: Columns) -> Columns:
            micro = micro_batch(batch, index)
            values = self.outputs.of(params, micro)
            return write_columns(seen, {name: jnp.where(micro.sampled, x, 0.0) for name, x in values.items()}, index)

        return jax.lax.fori_loop(0, batch.micro_batches, body, empty_columns(self.outputs.names, batch))

    def __call__(self, params: Params, examples: Sequence[Example]) -> dict[str, list[np.ndarray]]:
        """For each output name and each example, a float32 array of a value per token, 0 where not sampled.

        Raises:
            UserError: an example is longer than a row, or there are more rows than the micro-batches hold.
        """
        # Without columns: they are not needed, and would change the shape of the compiled program's input.
        bare = [Example(example.ids, example.sampled) for example in examples]
        batch = pack(bare, *self._rows, self._max_micro_batches, self._share_prefixes)
        with jax.set_mesh(self._mesh):
            scores = jax.device_get(self._compiled(params, on_mesh(batch, self._mesh)))
        found = {name: [np.zeros(len(example.ids), np.float32) for example in examples] for name in scores}
        for place in places(examples, *self._rows, self._share_prefixes):
            for name, values in scores.items():
                found[name][place.example][place.tokens] = values[place.at]
        return found

    def lower(self, params: Params, batch: Batch) -> jax.stages.Lowered:
        """The program for arguments of these shapes, which may be abstract; the batch must have no columns."""
        with jax.set_mesh(self._mesh):
            return self._compiled.lower(params, batch)
