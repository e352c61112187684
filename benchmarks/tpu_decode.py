"""Compile the engine's decode step for a TPU slice, on any machine with libtpu, and print its memory and time.

    python benchmarks/tpu_decode.py [topology=v6e:2x4] [slots=64] [max_length=8192] [page_size=128]

Prints JSON: gigabytes per chip of arguments, temporaries and outputs that share memory with donated arguments, and the
compiler's estimate of one step's time without attention kernels and collectives (`plan/hlo.py`). The model is
Qwen2.5-32B in bf16, tensor-parallel over all chips of the slice. A larger slice would hold several such engines, which
share nothing.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import arguments
import jax
import jax.numpy as jnp
from jax.experimental import topologies

from retool_jax.engine.compiled import Layouts, Programs
from retool_jax.engine.config import EngineConfig
from retool_jax.engine.programs import CHANGES, init_engine_state
from retool_jax.mesh import MeshConfig, make_mesh
from retool_jax.models.decoder import abstract_params
from retool_jax.plan.hlo import cost_of
from retool_jax.run.load import load
from retool_jax.slices import CHIPS


def main(words: list[str]) -> None:
    known = {"topology": "v6e:2x4", "slots": 64, "max_length": 8192, "page_size": 128}
    options = arguments.parse(words, known)
    model = load(["config=sft_qwen2.5_32b"]).model
    config = EngineConfig(options["slots"], options["max_length"], decode_steps=64, page_size=options["page_size"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options["topology"]).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tp=len(devices)), devices)
    layouts = Layouts.of(model, config, mesh)
    pages, page_size = layouts.sizes.pages, layouts.sizes.page_size

    def placed(shapes, shardings):
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings)

    state = placed(jax.eval_shape(partial(init_engine_state, model, config.slots, pages, page_size)), layouts.state)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.compute_dtype), abstract_params(model)[1])
    weights = placed(weights, layouts.weights)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layouts.everywhere)

    key = placed(jax.eval_shape(lambda: jax.random.key(0)), layouts.everywhere)
    B, P = config.slots, layouts.sizes.reads[-1]
    inputs = state, None, weights, key, ints(), ints(B, CHANGES), ints(B, P), ints(B), ints()
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        lowered = Programs.of(model, config, layouts, stop_ids=(151643, 151645)).decode.lower(*inputs)
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        text = max(Path(folder).glob("*after_codegen.txt"), key=lambda path: path.stat().st_size).read_text()
    memory = compiled.memory_analysis()
    pool = state.cache.size * state.cache.dtype.itemsize / len(devices)
    # The step is the body of the only loop whose trip count depends on data.
    step = cost_of(text, (1,)).cycles - cost_of(text, (0,)).cycles
    print(
        json.dumps(
            {
                "benchmark": "tpu_decode",
                **options,
                "chips": len(devices),
                "cache_gb": pool / 1e9,
                "arguments_gb": memory.argument_size_in_bytes / 1e9,
                "temporaries_gb": memory.temp_size_in_bytes / 1e9,
                "aliased_gb": memory.alias_size_in_bytes / 1e9,
                "estimated_ms": step / CHIPS[options["topology"].partition(":")[0]].clock_hz * 1e3,
                "jax": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
