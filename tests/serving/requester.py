"""JetStream's own client, from google-jetstream's wheel."""

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any


def jetstreams_requester() -> Callable[..., Any]:
    """`await grpc_async_request(address, request)` of the wheel's benchmark: ids, seconds to the first, seconds. Its
    measure of accuracy is left out, since it needs more packages."""
    from retool_jax.serving import jetstream  # puts something in the place of seqio where that is absent

    assert jetstream.engine_api
    path = importlib.metadata.distribution("google-jetstream").locate_file("benchmarks/benchmark_serving.py")
    spec = importlib.util.spec_from_file_location("benchmark_serving", path)
    module = importlib.util.module_from_spec(spec)
    accuracy = types.ModuleType("eval_accuracy")
    accuracy.eval_accuracy = None
    sys.modules |= {"eval_accuracy": accuracy, "benchmark_serving": module}  # its dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["eval_accuracy"], sys.modules["benchmark_serving"]
    return module.grpc_async_request
