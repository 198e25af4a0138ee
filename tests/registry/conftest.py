"""Registries for the tests: SQLite in temporary folders, and one server on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_servers import mlflow_server
from vector_bundles import make_vector_bundle


@pytest.fixture(autouse=True)
def _no_other_registry(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.fixture
def vector_bundle(tmp_path) -> Path:
    return make_vector_bundle(tmp_path / "vectors")


@pytest.fixture
def store(empty_database, tmp_path) -> str:
    """Tracking URI of an empty registry."""
    (tmp_path / "store").mkdir()
    return f"sqlite:///{shutil.copy(empty_database, tmp_path / 'store' / 'mlflow.db')}"


@pytest.fixture(scope="session")
def server(empty_database, tmp_path_factory) -> Iterator[str]:
    """Address of a real ``mlflow server`` on loopback, with a registry in SQLite and artifacts that it hands out."""
    with mlflow_server(tmp_path_factory.mktemp("server"), empty_database) as made:
        yield made.uri
