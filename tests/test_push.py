"""What goes to a hub, and that nothing goes unasked: against a hub of the test's own, over HTTP."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from maskdm.cli import run_command


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as sending a folder of small files takes."""

    server: Any

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        repo = "/".join(self.path.split("/")[3:5])
        known = self.server.repos.get(repo)
        if known is None:
            self._answer({"error": "Repository not found"}, 404)
        else:
            self._answer({"id": repo, "private": known["private"], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        self.server.asked.append(("POST", self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_of_the_test":
            self._answer({"error": "this token may not write here"}, 403)
        elif self.path.endswith("/create"):
            plain = json.loads(body)
            repo = f"{plain['organization']}/{plain['name']}" if plain.get("organization") else f"anna/{plain['name']}"
            self.server.repos.setdefault(repo, {"private": plain.get("private", plain.get("visibility") == "private"), "files": {}})
            self._answer({"url": f"{self.server.home}/{repo}"})
        elif "validate-yaml" in self.path:
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = self.server.repos["/".join(self.path.split("/")[3:5])]["files"]
            files |= {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"}
            self._answer({"commitUrl": f"{self.server.home}/anna/x/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._answer({"error": f"no {self.path} here"}, 400)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    from huggingface_hub import constants

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = {}, []
    threading.Thread(target=lambda: server.serve_forever(0.05), daemon=True).start()
    server.home = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", server.home)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "unet").mkdir(parents=True)
    (folder / "export.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "unet" / "weights").write_bytes(bytes(range(256)))
    return folder


def test_an_export_arrives_whole_and_private(hub: Any, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["push", str(exported), "--to", "anna/flowers"]) == 0, capsys.readouterr().err
    assert "sent to anna/flowers (private)" in capsys.readouterr().out
    assert hub.repos["anna/flowers"]["private"]
    sent = hub.repos["anna/flowers"]["files"]
    assert sent == {str(path.relative_to(exported)): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert run_command(["push", str(exported), "--to", "anna/flowers"]) == 0  # again: the same place


def test_public_only_where_asked(hub: Any, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["anna/open"] = {"private": False, "files": {}}
    assert run_command(["push", str(exported), "--to", "anna/open"]) == 2
    assert "anna/open is there already, for all to see; add --public" in capsys.readouterr().err
    assert hub.repos["anna/open"]["files"] == {}
    assert run_command(["push", str(exported), "--to", "anna/open", "--public"]) == 0
    assert run_command(["push", str(exported), "--to", "anna/new", "--public"]) == 0
    assert not hub.repos["anna/new"]["private"] and "README.md" in hub.repos["anna/open"]["files"]
    hub.repos["anna/hidden"] = {"private": True, "files": {}}
    capsys.readouterr()
    assert run_command(["push", str(exported), "--to", "anna/hidden", "--public"]) == 0
    assert "sent to anna/hidden (private)" in capsys.readouterr().out  # as it was


def test_what_is_missing_is_said_before_anything_is_sent(
    hub: Any, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    for words, said in (
        ([str(exported), "--to", "flowers"], "--to is 'flowers'; give user/name"),
        ([str(exported), "--to", "anna/my flowers"], "give user/name"),
        ([str(tmp_path / "folder"), "--to", "anna/x"], "is not the directory of a run"),
        ([str(exported), "--to", "anna/x", "--licence", "mit"], "is an export already; give --licence and --format to `maskdm export`"),
    ):
        assert run_command(["push", *words]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert run_command(["push", str(exported), "--to", "anna/x"]) == 2
    assert "push needs a token of the hub with the right to write: set HF_TOKEN, or run `hf auth login`" in capsys.readouterr().err
    assert hub.asked == []


def test_a_hub_that_refuses_or_is_not_there(
    hub: Any, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert run_command(["push", str(exported), "--to", "anna/x"]) == 2
    said = capsys.readouterr().err
    assert "the hub refused anna/x" in said and "this token may not write here" in said and said.count("\n") == 1
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run_command(["push", str(exported), "--to", "anna/x"]) == 2
    assert "the hub cannot be reached" in capsys.readouterr().err
