"""A push makes a private data set of the exported files and sends nothing else."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import DatasetCard

from retool_jax.errors import UserError
from retool_jax.export.command import main


class Hub:
    """A local server with as much of the Hub as a commit needs: the created repositories and received files."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False
        self.address = ""

    def answer(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return {"url": f"{self.address}/datasets/me/x"}
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/datasets/me/x/commit/0"}
        return {"errors": [], "warnings": []}  # the check of a card


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = json.dumps(made.answer(self.path, body)).encode()
            self.send_response(403 if made.refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    server.shutdown()
    server.server_close()


def test_a_table_goes_with_its_card(run, hub, tmp_path, capsys):
    out = tmp_path / "x.parquet"
    main([f"run={run}", f"out={out}", "push=me/x"])
    (made,) = hub.made
    assert (made["name"], made["organization"], made["type"]) == ("x", "me", "dataset")
    assert made.get("visibility") == "private" or made["private"], "as older versions of the library say it"
    assert hub.files.keys() == {"README.md", "data/train-00000-of-00001.parquet"}
    assert hub.files["data/train-00000-of-00001.parquet"] == out.read_bytes()
    card = DatasetCard(hub.files["README.md"].decode())
    assert card.data.configs[0]["data_files"][0]["path"] in hub.files and "viewer_mode" not in card.data.to_dict()
    assert f"pushed {hub.address}/datasets/me/x" in capsys.readouterr().out


def test_traces_go_as_they_lie_there(run, hub, tmp_path):
    out = tmp_path / "traces"
    main([f"run={run}", f"out={out}", "format=traces", "step=0", "push=me/x"])
    lying = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.files == lying and len(lying) == 5


def test_a_hub_that_refuses_leaves_the_export(run, hub, tmp_path):
    hub.refuses = True
    with pytest.raises(UserError, match=r"is complete, and the hub does not take it as me/x .*hf auth login"):
        main([f"run={run}", f"out={tmp_path / 'x.parquet'}", "push=me/x"])
    assert (tmp_path / "x.parquet").is_file() and not hub.files


def test_nothing_is_pushed_that_was_not_asked_for(run, hub, tmp_path):
    main([f"run={run}", f"out={tmp_path / 'x.parquet'}"])
    assert not hub.made and not hub.files
