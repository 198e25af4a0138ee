"""A real MLflow server on loopback, which tests may kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """``mlflow server`` on a SQLite file of its own.

    Args:
        folder: of its database and artifacts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        log = open(self.folder / "server.log", "ab")
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=env, cwd=self.folder
        )
        log.close()
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError("the server never answered")

    def kill(self) -> None:
        """SIGKILL, to its workers too."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs; a test that stops it starts it again."""
    made = Server(tmp_path_factory.mktemp("server"))
    shutil.copyfile(empty_database, made.folder / "server.db")
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracker's database with its tables, which take MLflow seconds to make."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture
def out(empty_database: Path, tmp_path: Path) -> Path:
    """An output folder with a database."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture
def black_hole() -> Iterator[str]:
    """Address of a socket that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_tracker_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests name is where they send."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # sooner than is polite, for tests that wait for it
    monkeypatch.setattr("medgen.tracking.sender.INTERVAL", 0.2)
    monkeypatch.setattr("medgen.tracking.sender.FIRST_PAUSE", 0.2)
    monkeypatch.setattr("medgen.tracking.sender.LONGEST_PAUSE", 0.5)
