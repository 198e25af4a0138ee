"""A registry behind a real MLflow server on loopback, one that lies, one that is down, and one that keeps silent."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vector_bundles import files_of, make_vector_bundle

from medgen import cli
from medgen.errors import UserError
from medgen.registry import compare, fetch_model, list_models, promote, pull, register_bundle, resolve, show

pytestmark = pytest.mark.slow(reason="a server is started, which imports MLflow")


@pytest.fixture(scope="module")
def vectors(server, tmp_path_factory) -> Path:
    """The bundle of version 1, which the server has as champion."""
    folder = tmp_path_factory.mktemp("served")
    bundle = make_vector_bundle(folder / "vectors")
    for number in (1, 2):
        (folder / "metrics.json").write_text(json.dumps({"auroc": 0.5 + number / 10}))
        register_bundle(bundle, "vectors", server, "champion" if number == 1 else None, folder / "metrics.json")
    return bundle


def test_bundle_goes_to_the_server_and_comes_back(server, vectors, tmp_path):
    pulled = pull("models:/vectors@champion", tmp_path / "pulled", server)

    assert files_of(pulled) == files_of(vectors) | {"checksums.json"}
    assert (pulled / "models" / "model.pt").read_bytes() == (vectors / "models" / "model.pt").read_bytes()
    model = fetch_model("models:/vectors@champion", tmp_path / "cache", server)
    assert (model / "MLmodel").is_file()


def test_versions_behind_a_server_are_listed_shown_compared_and_promoted(server, vectors):
    assert [model.version for model in list_models(server)] == [1, 2]
    found = show("vectors", 2, server)
    assert dict(found.metrics) == {"auroc": 0.7}
    assert "(-1, 4)" in found.inputs
    assert resolve("models:/vectors/2", server).model_id == found.model_id
    assert compare("vectors", [1, 2], server).metrics[0].best == 1
    with pytest.raises(UserError, match=r"auroc is 0.7, 0.1 off the required auroc>=0.8$"):
        promote("vectors", 2, "champion", ["auroc>=0.8"], tracking_uri=server)
    assert resolve("models:/vectors@champion", server).version == 1
    assert promote("vectors", 2, "challenger", not_worse=["auroc"], tracking_uri=server).previous is None


class Liar(BaseHTTPRequestHandler):
    """Hands requests on to the server of the class's ``port``, and adds a file to each list of artifacts."""

    port: int
    extra: str

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.port)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        if "/mlflow-artifacts/artifacts?" in self.path:
            listing = json.loads(content)
            listing.setdefault("files", []).append({"path": self.extra, "is_dir": False, "file_size": 1})
            content = json.dumps(listing).encode()
        elif self.path.endswith("/x"):
            content = b"x"
        self.send_response(200 if self.path.endswith("/x") else answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(params=["../../x", "/x", "..%2f..%2fx"])
def lying_server(request, server) -> Iterator[str]:
    Liar.port, Liar.extra = int(server.rsplit(":", 1)[1]), request.param
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    thread.join()
    proxy.server_close()


def test_server_that_lists_a_path_outside_is_refused(lying_server, vectors, tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)

    with pytest.raises(UserError, match=r"^the registry at http://127\.0\.0\.1:\d+ refused: ") as caught:
        pull("models:/vectors/1", tmp_path / "deep" / "deeper" / "out", lying_server)

    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == set()


# ---- no answer


def test_server_that_is_down_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = free.getsockname()[1]

        result = CliRunner().invoke(cli.app, ["registry", "list", "--tracking_uri", f"http://127.0.0.1:{port}"])

    assert result.exit_code == 1
    assert result.output.startswith(f"error: no MLflow registry answers at http://127.0.0.1:{port} (")
    assert result.output.count("\n") == 1


def test_server_that_keeps_silent_is_given_up(monkeypatch):
    monkeypatch.setattr(
        "medgen.registry._connection.FIRST_ANSWER",
        {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"},
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        with pytest.raises(UserError, match=r"no MLflow registry answers at .* \(.*timed out"):
            list_models(f"http://127.0.0.1:{listener.getsockname()[1]}")

    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_web_server_that_is_no_mlflow_is_one_line():
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    proxy.RequestHandlerClass.log_message = lambda *args: None
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        with pytest.raises(UserError, match="no MLflow registry answers at") as caught:
            list_models(f"http://127.0.0.1:{proxy.server_address[1]}")
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()

    assert "\n" not in str(caught.value)


# ---- serve


def test_serve_answers_with_the_verified_model_and_ends_quietly(server, vectors, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "fastapi.py").write_text("raise SystemExit('a module of the current folder ran')")
    # -P as the command `medgen` has it, whose folder is its own and not the current one
    command = [sys.executable, "-P", "-m", "medgen", "registry", "serve", "models:/vectors@champion"]
    command += ["--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": server,
        "XDG_CACHE_HOME": str(tmp_path),
        "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
    }
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=tmp_path / "here"
        )
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        else:
            raise AssertionError("the model was never served")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": [[1.0, 2.0, 3.0, 4.0]]}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["predictions"][0]) == 2
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        status = process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    assert status == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    # the copy in the cache is as it was
    fetch_model("models:/vectors@champion", tmp_path / "medgen" / "models", server)
