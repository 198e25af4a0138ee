"""A real MLflow server on loopback, which tests may kill and start again."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_servers import Server, mlflow_server


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs; a test that stops it starts it again."""
    with mlflow_server(tmp_path_factory.mktemp("server"), empty_database) as made:
        yield made


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
