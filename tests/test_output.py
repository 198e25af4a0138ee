"""The output folder of a run."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from medgen import output
from medgen.errors import UserError
from medgen.output import (
    atomic_file,
    atomic_write_text,
    check_apart,
    disable_usage_reports,
    git_revision,
    plain_json,
    prepare_output_dir,
    run_name,
    write_first,
)


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir must be a folder that can be written to, got .*file/out"):
        prepare_output_dir(tmp_path / "file" / "out")


def test_folder_with_checkpoints_is_refused_unless_they_are_to_be_continued(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    prepare_output_dir(tmp_path, resume=False)
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match="--resume true"):
        prepare_output_dir(tmp_path, resume=False)
    assert prepare_output_dir(tmp_path, resume=True) == tmp_path


def test_resumed_run_keeps_its_name_and_a_new_one_gets_its_own(tmp_path):
    first = run_name(tmp_path, "bundle")
    assert run_name(tmp_path, "bundle", resume=True) == first
    assert run_name(tmp_path, "bundle") != first
    assert re.fullmatch(r"bundle-\d{8}-\d{6}-[0-9a-f]{4}", first)


def test_only_the_first_process_writes_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run_name(tmp_path, "bundle")
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_whole_into_a_new_folder(tmp_path):
    atomic_write_text(tmp_path / "new" / "a.json", json.dumps({"a": 1}))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}


def test_file_that_many_write_at_once_is_that_of_one_of_them(tmp_path):
    path, together = tmp_path / "a.txt", Barrier(4)

    def write(letter):
        with atomic_file(path, "w") as file:
            together.wait(timeout=60)  # all have their file open
            file.write(letter * 10_000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))

    text = path.read_text()
    assert len(text) == 10_000
    assert len(set(text)) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_file_whose_writing_fails_is_as_it_was(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def half():
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()

    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_file_has_the_permissions_of_any_other_and_text_is_utf8(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "plain").touch()
        atomic_write_text(tmp_path / "atomic", "é → ½")
    finally:
        os.umask(before)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes == [0o640, 0o640]
    assert (tmp_path / "atomic").read_bytes() == "é → ½".encode()


def test_git_revision_names_the_commit_says_when_there_are_changes_and_leaves_other_repositories_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(output, "__file__", str(tmp_path / "output.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "output.py").write_text("1")
    assert git_revision() == ""
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert git_revision() == ""  # this file is not part of that repository
    monkeypatch.setenv("MEDGEN_REVISION", "of the image")  # outside a checkout of its own alone
    assert git_revision() == "of the image"
    subprocess.run([*git, "add", "output.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision())
    (tmp_path / "output.py").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", git_revision())


def test_mlflow_does_not_report_usage_unless_the_environment_allows_it(monkeypatch):
    import mlflow.telemetry.utils as telemetry

    monkeypatch.setattr(telemetry, "_IS_IN_CI_ENV_OR_TESTING", False)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    assert not telemetry.is_telemetry_disabled()
    disable_usage_reports()
    assert telemetry.is_telemetry_disabled()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    disable_usage_reports()
    assert not telemetry.is_telemetry_disabled()


def test_plain_json_holds_what_json_knows():
    value = {
        1: (np.float32(0.5), np.nan, -np.inf),
        "array": np.array([[1, 2], [3, 4]]),
        "numbers": [np.int64(7), True, None, "text", math.inf],
        "none": np.array([np.nan, 1.0]),
    }

    assert plain_json(value) == {
        "1": [0.5, None, None],
        "array": [[1, 2], [3, 4]],
        "numbers": [7, True, None, "text", None],
        "none": [None, 1.0],
    }
    json.dumps(plain_json(value), allow_nan=False)


def test_output_below_the_input_is_refused(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for output_dir in ("in", "in/out", "./in/../in/out", tmp_path / "in" / "a" / "b", "link/out"):
        with pytest.raises(UserError, match=r"output_dir must lie outside input_dir, got \S+ in in: .*--output_dir"):
            check_apart("in", output_dir)
    for input_dir, output_dir in ((None, "in"), ("in", "inner"), ("in", "."), ("in", "out")):
        check_apart(input_dir, output_dir)


def test_file_that_was_first_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "record.json"
    write_first(path, "a")
    write_first(path, "b")
    assert path.read_text() == "a"
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    write_first(path, "c")
    write_first(path.with_name("other"), "d")
    assert (path.read_text(), path.with_name("other").read_text()) == ("a", "d")
    assert len(list(path.parent.iterdir())) == 2
