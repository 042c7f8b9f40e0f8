"""Weights & Biases that is not there, or fails: training goes on and its figures are kept. Keys are written nowhere."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.broken_host import SECRETS
from tests.cli.conftest import Inputs
from tests.support.cli import Run, run_cli

PATCHES = "tests.cli.broken_host"
STEPS = 8
# The answers that wandb 0.31 needs to open a run, all in one: it picks what it has asked for.
RUN = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
PROJECT = {"id": "p", "name": "x", "entity": {"id": "e", "name": "e"}}
ANSWER = {
    "viewer": {"id": "v", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9"}, "latestLocalVersionInfo": None, "features": []},
    "upsertBucket": {"bucket": {**RUN, "project": PROJECT}, "inserted": True},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
    "model": None,
    "project": None,
    "entity": None,
}


class Handler(BaseHTTPRequestHandler):
    """A server that opens runs, until `down`: from then on it closes every connection without an answer."""

    protocol_version = "HTTP/1.1"
    goes_down_after = b"no request"
    down = threading.Event()
    seen: list[bytes] = []  # noqa: RUF012

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.down.is_set():
            self.close_connection = True
            return
        self.seen.append(body)
        answer = json.dumps({"data": ANSWER} if "graphql" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if self.goes_down_after in body:
            self.down.set()

    do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    """Its address; it fails after a run has been opened."""
    Handler.down.clear()
    Handler.goes_down_after = b"mutation UpsertBucket"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def logged(inputs: Inputs, log_dir: Path, url: str, *patches: str) -> Run:
    log_dir.mkdir(exist_ok=True)
    (log_dir / "server.txt").write_text(url)
    wanted = ["exp_manager.create_wandb_logger=true", "exp_manager.create_checkpoint_callback=true"]
    names = [f"{PATCHES}:{patch}" for patch in ("account_at_a_server", *patches)]
    run = run_cli([*inputs.arguments(), *wanted], log_dir, patches=names)
    assert [row["step"] for row in run.rows("train")] == list(range(STEPS))
    return run


@pytest.fixture(params=["refuses", "is silent"])
def absent_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where nobody listens, or somebody who never answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            bound.listen()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_a_server_that_cannot_be_reached(inputs: Inputs, tmp_path: Path, absent_server: str) -> None:
    """Training is offline, and the keys of the environment are written nowhere."""
    run = logged(inputs, tmp_path, absent_server)
    assert run.output.count(f"Weights & Biases at {absent_server} cannot be reached (") == 1, run.output
    (kept,) = (tmp_path / "logs").glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in kept.read_bytes()
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "progress.json", "output.txt", kept.name} <= {path.name for path in written}
    for name, secret in SECRETS.items():
        assert [path for path, content in written.items() if secret.encode() in content] == [], name


@pytest.mark.faults
def test_a_server_that_fails_midway(inputs: Inputs, tmp_path: Path, server: str) -> None:
    begin = time.monotonic()
    run = logged(inputs, tmp_path, server)
    assert Handler.down.is_set()
    assert time.monotonic() - begin < 120, "the end waits for WANDB_FINISH_TIMEOUT, here 2 s, and not for ever"
    assert "Traceback" not in run.output


@pytest.mark.faults
def test_its_own_process_dies(inputs: Inputs, tmp_path: Path) -> None:
    run = logged(inputs, tmp_path, "http://127.0.0.1:9", "kill_wandb")
    assert run.output.count("Weights & Biases has failed") == 1, run.output
    assert len(run.rows("val")) == 2
