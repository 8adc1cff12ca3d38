"""`tadistill export --push`, on a server here that answers as the Hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from tests.unit.report.builder import ArmSpec, StudySpec, build_study
from typer.testing import CliRunner

from tadistill.cli import app
from tadistill.errors import ConfigError, ModelError


class Hub(ThreadingHTTPServer):
    """Answers of the Hub to a user `me` with the token `hf_good`, and what was sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.message = ""


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer hf_good":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path.startswith("/api/models/others/"):
            return self.answer({"error": "Repository not found"}, 404)
        self.answer({"name": "me", "type": "user"} if self.path == "/api/whoami-v2" else {"id": "me/small", "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            if given["organization"] != "me":
                return self.answer({"error": "You don't have the rights"}, 403)
            self.server.created.append(given)
            return self.answer({"url": f"{self.server.address}/me/{given['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "header":
                self.server.message = line["value"]["summary"]
            else:
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"{self.server.address}/me/small/commit/{'1' * 40}", "commitOid": "1" * 40})


@pytest.fixture
def server(monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    build_study(root, StudySpec([ArmSpec("one", ("xl", "s"))], (10,), {"dolly": 2}, (), 1, also={}))
    return str(root)


def export(*arguments: str):
    return CliRunner().invoke(app, ["export", "demo", "one", *arguments], catch_exceptions=False)


def test_a_model_is_sent_to_a_new_private_repository(server, runs):
    found = export("--push", "small", "--runs", runs)
    assert found.output.splitlines()[-1] == f"uploaded to {server.address}/me/small"
    assert server.created == [{"name": "small", "organization": "me", "visibility": "private"}]
    assert {*server.files} == {"config.json", "README.md"}
    assert server.message == "one of study demo"
    assert b'AutoTokenizer.from_pretrained("me/small")' in server.files["README.md"]


def test_a_model_is_copied_and_sent(server, runs, tmp_path):
    found = export(str(tmp_path / "out"), "--push", "me/small", "--public", "--runs", runs)
    assert f"{tmp_path / 'out'} contains the model; load it with" in found.output.replace("\n", "")
    assert server.created[0]["visibility"] == "public"
    assert (tmp_path / "out" / "README.md").read_bytes() == server.files["README.md"]


@pytest.mark.parametrize(
    ("repository", "token", "said"),
    [
        ("a b", "hf_good", "`a b` is not a valid name of a repository .*; write NAME or ORG/NAME"),
        ("small", "", "has no token for the Hugging Face Hub; log in with `hf auth login`, or set HF_TOKEN"),
        ("small", "hf_bad", "does not accept this machine's token"),
        ("others/small", "hf_good", "the token has no permission to write to `others/small`"),
    ],
)
def test_what_is_wrong_is_said(server, runs, monkeypatch, repository, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match=said):
        export("--push", repository, "--runs", runs)
    assert not server.files


def test_no_network_is_said_before_anything_is_read(server, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelError, match=r"`small` could not be uploaded to the Hub at http://127.0.0.1:9 \(ConnectError\); check the network"
    ):
        export("--push", "small", "--runs", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE=1 forbids"):
        export("--push", "small", "--runs", str(tmp_path))


def test_an_export_needs_a_place(runs):
    with pytest.raises(ConfigError, match="needs a directory for the copy, or --push REPO"):
        export("--runs", runs)
