"""The serve section of a run."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED, Count, Positive

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0.1, le=604_800)]  # a week
Kilobytes = Annotated[int, Field(ge=1, le=1 << 20)]


@dataclass(frozen=True, config=CHECKED)
class ServeConfig:
    """The server's addresses and limits. Its bearer token is not set here but in $RETOOL_SERVE_TOKEN."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets other machines in
    port: Port = 8000  # 0 takes a free one and prints it
    grpc_port: Port | None = None  # port of JetStream's gRPC, in the same process; 0 takes a free one; null: not served
    name: str = ""  # the model's name for clients; empty: the last part of init_from
    streams: Positive = 256  # requests that are answered at once; further ones are refused with 429
    queue: Positive = 1024  # conversations that may wait for a slot of the engine; further ones are refused with 503
    choices: Positive = 16  # the largest n of a request
    body_kb: Kilobytes = 1024  # of a request; larger ones are refused with 413
    answer_s: Seconds = 600.0  # time limit of one answer, including tools and waiting for a slot
    keep: Count = 1024  # how many of the newest answers stay for previous_response_id and /v1/trajectories; 0: none
    record: str = ""  # folder in which finished conversations, with prompts, are recorded for training; empty: none
    drain_s: Count = 60  # after SIGTERM, how long answers that have begun may take to end
    log_text: bool = False  # write prompts and answers into the log too
