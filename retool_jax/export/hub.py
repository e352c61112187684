"""Push exported trajectories to a data set of the Hub, with a card."""

from pathlib import Path

import retool_jax
from retool_jax.errors import UserError, one_line

PARQUET_FILE = "data/train-00000-of-00001.parquet"  # the Hub's name for a table of one file
# With these tags the Hub shows a data set in its trace viewer.
_TRACES = "viewer_mode: traces\ntags: [retool_jax, agent-traces, 'format:agent-traces']"
_TABLE = "tags: [retool_jax]"
_CONFIG = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{path}'"
_DESCRIPTION = {
    "traces": "One session a file, as the Hub's trace viewer shows it.",
    "parquet": "One trajectory a row: token ids, which of them the policy sampled, their log-probabilities, messages,"
    " calls with their outputs, verdict and reward.",
}


def card(kind: str, run: str, count: int) -> str:
    """The README.md of a data set of `traces` or `parquet`."""
    header = _TRACES if kind == "traces" else _TABLE
    paths = _CONFIG.format(path="**/*.jsonl" if kind == "traces" else PARQUET_FILE)
    return (
        f"---\n{header}\n{paths}\n---\n\n# Trajectories of {run}\n\n{count:,} trajectories, written by retool_jax"
        f" {retool_jax.__version__}. {_DESCRIPTION[kind]}\n"
    )


def push(kind: str, out: Path, name: str, text: str) -> str:
    """Copy an export to a data set of the Hub, and return its address. A new data set is made private.

    Raises:
        UserError: the Hub refuses, or cannot be reached. The local export is kept.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        commit = {"repo_id": name, "repo_type": "dataset", "commit_message": "Trajectories and card"}
        if kind == "traces":
            hub.upload_folder(folder_path=out, **commit)
        else:
            files = {PARQUET_FILE: out, "README.md": text.encode()}
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            hub.create_commit(operations=operations, **commit)
    except Exception as error:  # from the hub, from HTTP or from the network
        raise UserError(
            f"{out} is complete, and the hub does not take it as {name} ({type(error).__name__}: {one_line(error)});"
            f" log in with hf auth login, then: hf upload --repo-type dataset {name} {out}"
        ) from error
    return str(address)
