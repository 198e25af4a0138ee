"""Addresses of trackers."""

from __future__ import annotations

import os

import pytest

from medgen.errors import UserError
from medgen.tracking import Tracker, default_uri, resolve_uri


@pytest.mark.parametrize(
    "uri",
    [
        "http://ann:secret@host:5000",
        "https://ann@host/mlflow",
        "postgresql://ann:secret@host/db",
        "postgresql://host/db?user=ann&password=secret",
        "https://host/?token=secret",
        "postgresql://ann:se/cret@host/db".replace("se/cret", "x/secret"),
        "mysql+pymysql://ann:p?secret#x@host/db",
        "http://ann:a/secret@host",
        "postgresql://host/db?sslpassword=secret",
        "http://host/?api_key=secret",
        "https://host/#access_token=secret",
        "https://host/?pass%77ord=secret",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dsecret",
        "sqlite:///x.db?password=secret",
    ],
)
def test_a_password_is_refused_in_one_line_that_does_not_repeat_it(uri):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        resolve_uri(uri)
    assert "secret" not in str(caught.value)
    assert "ann" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["file:///data/mlruns", "file:mlruns", "mlruns", "/data/mlruns"])
def test_a_folder_is_refused_and_a_database_proposed(uri):
    with pytest.raises(UserError, match=r"give sqlite:///.*/mlruns/mlflow\.db"):
        resolve_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "sqlite:////home/a@b/x.db",
        "databricks",
        "databricks://me",
        "postgresql://host/db?sslmode=require",
    ],
)
def test_servers_and_databases_are_taken_as_they_are(uri):
    assert resolve_uri(uri) == uri


def test_a_relative_database_is_that_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///x.db") == f"sqlite:///{tmp_path}/x.db"


def test_the_argument_beats_the_environment_which_beats_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker(tmp_path, "e", "r").tracking_uri is None  # follows the folder
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", "http://here:1")
    assert Tracker(tmp_path, "e", "r", default_uri(tmp_path)).tracking_uri == "http://here:1"
    assert Tracker(tmp_path, "e", "r", "http://there:2").tracking_uri == "http://there:2"
