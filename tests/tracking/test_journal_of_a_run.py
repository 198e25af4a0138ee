"""The journal: whole lines, nothing twice, whatever was cut."""

from __future__ import annotations

import pytest

from medgen.tracking.journal import METRICS, Journal, locked, read_records


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
