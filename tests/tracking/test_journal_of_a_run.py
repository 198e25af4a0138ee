"""The journal: whole lines, nothing twice, whatever was cut."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from medgen.tracking import journal as module
from medgen.tracking.journal import METRICS, Journal, locked, read_header, read_records


def records(journal, kind=METRICS):
    return [record for record, _, _ in read_records(journal.path) if record["kind"] == kind]


def test_a_line_that_a_kill_cut_is_passed_over_and_its_step_written_again(tmp_path):
    journal = Journal(tmp_path, "run", "experiment")
    journal.metrics({"loss": 1.0}, 1)
    journal.metrics({"loss": 2.0}, 2)
    journal.close()
    journal.path.write_bytes(journal.path.read_bytes()[:-20])

    resumed = Journal(tmp_path, "run", "experiment", resume=True)
    for step in (1, 2, 3):
        resumed.metrics({"loss": float(step)}, step)

    assert resumed.path == journal.path
    assert [(r["step"], r["values"]["loss"]) for r in records(resumed)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_run_that_is_not_resumed_begins_a_journal_of_its_own(tmp_path):
    first, second = (Journal(tmp_path, "run", "experiment") for _ in range(2))
    assert first.path != second.path
    assert first.header["id"] != second.header["id"]
    assert Journal(tmp_path, "run", "experiment", resume=True).path == second.path


def test_no_name_leads_out_of_the_folder(tmp_path):
    journal = Journal(tmp_path / "out", "../../a b/c", "experiment")
    assert journal.path.parent == tmp_path / "out" / "tracking"
    assert journal.header["name"] == "../../a b/c"


def test_each_curve_has_a_position_of_its_own(tmp_path):
    journal = Journal(tmp_path, "run", "experiment")
    journal.metrics({"loss": 1.0}, 8)
    journal.metrics({"val": 2.0, "loss": 9.0}, 8)
    assert [record["values"] for record in records(journal)] == [{"loss": 1.0}, {"val": 2.0}]


def test_files_of_the_folder_are_named_relative_to_it(tmp_path):
    journal = Journal(tmp_path / "out", "run", "experiment")
    assert journal.relative(tmp_path / "out" / "images" / "a.png") == "images/a.png"
    assert journal.relative(tmp_path / "model.pt") == str(tmp_path / "model.pt")


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path, caplog, monkeypatch):
    journal = Journal(tmp_path, "run", "experiment")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", refuse)
    journal.metrics({"loss": 1.0}, 1)
    journal.metrics({"loss": 1.0}, 2)
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    assert records(journal) == []


def test_half_a_line_is_said_and_costs_that_line_alone(tmp_path, caplog, monkeypatch):
    journal = Journal(tmp_path, "run", "experiment")
    write = os.write
    monkeypatch.setattr("os.write", lambda file, line: write(file, line[:30]))
    journal.metrics({"loss": 1.0}, 1)
    monkeypatch.undo()
    assert "the disk took half a line" in caplog.text
    assert journal.last_step == {}
    for step in (1, 2):
        journal.metrics({"loss": float(step)}, step)
    assert [record["step"] for record in records(journal)] == [1, 2]


def test_a_journal_that_goes_on_is_sent_to_the_newest_address(tmp_path, caplog):
    for uri, expected in (("http://a:1", "http://a:1"), ("http://b:2", "http://b:2"), (None, "http://b:2")):
        caplog.clear()
        journal = Journal(tmp_path, "run", "experiment", uri, resume=True)
        journal.close()
        assert read_header(journal.path) == journal.header
        assert journal.header["uri"] == expected
    assert "goes on at http://b:2" in caplog.text


def test_a_picture_that_is_drawn_again_takes_the_place_of_the_first(tmp_path):
    journal = Journal(tmp_path, "run", "experiment")
    path = tmp_path / "samples_8.png"
    for content, step in ((b"a", 8), (b"a", 8), (b"b", 8), (b"b", 16)):
        path.write_bytes(content)
        journal.picture(path, "samples", step)
        journal.close()
        journal = Journal(tmp_path, "run", "experiment", resume=True)
    first, again, later = records(journal, "picture")
    assert first["name"] == again["name"] != later["name"]
    assert first["sha256"] != again["sha256"] == later["sha256"]
    assert later["name"].startswith("samples+step+16+timestamp+")


@pytest.mark.parametrize("line", [b"null\n", b"[1]\n", b"{}\n", b"\xff\xfe\n", b'{"kind": "metrics"}\n', b"\n"])
def test_what_is_no_record_is_passed_over(tmp_path, line):
    journal = Journal(tmp_path, "run", "experiment")
    with open(journal.path, "ab") as file:
        file.write(line)
    journal.metrics({"loss": 1.0}, 1)
    assert len(records(journal)) == 1


def test_one_at_a_time_holds_a_lock(tmp_path):
    with locked(tmp_path / "lock") as first, locked(tmp_path / "lock") as second:
        assert (first, second) == (True, False)
    with locked(tmp_path / "lock") as again:
        assert again


@pytest.mark.parametrize("system", ["refuses", "has none"])
def test_where_nothing_can_be_locked_that_is_said_once_and_all_goes_on(tmp_path, caplog, monkeypatch, system):
    monkeypatch.setattr(module, "_UNLOCKED", set())

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "refuses":
        monkeypatch.setattr("fcntl.flock", refuse)
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    for _ in range(2):
        with locked(tmp_path / "lock", wait=True) as mine:
            assert mine
    assert caplog.text.count("cannot be locked") == 1
