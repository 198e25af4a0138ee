"""The thread that sends, and how long it may take."""

from __future__ import annotations

import http.server
import os
import threading
import time

import pytest
from mlflow import MlflowClient
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from PIL import Image

from medgen.tracking import Tracker, ValidationTracking
from medgen.tracking import sender as module
from medgen.tracking.journal import Journal, locked, read_records
from medgen.tracking.sender import BackgroundSender, Sender

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")

LIMITS = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")


def tracker(folder, uri=None, resume=False, timeout=120.0):
    return Tracker(folder, "e", "r", uri, {"resume": resume, "model_path": "none.pt"}, timeout=timeout)


def test_a_resumed_training_is_sent_to_the_address_that_it_names(out, tmp_path, empty_database):
    first = tracker(out, "http://127.0.0.1:9", timeout=0)
    first.start("cpu")
    first.metrics({"loss": 1.0}, 1)
    first.finish("FAILED")
    while True:  # the thread that was left behind
        with locked(next(out.glob("tracking/*.jsonl")).with_suffix(".lock")) as free:
            if free:
                break
        time.sleep(0.05)

    other = f"sqlite:///{tmp_path}/other.db"
    (tmp_path / "other.db").write_bytes(empty_database.read_bytes())
    again = tracker(out, other, resume=True)
    again.start("cpu")
    again.metrics({"loss": 2.0}, 2)
    again.finish()

    client = MlflowClient(other)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 2
    assert Sender(next(out.glob("tracking/*.jsonl"))).uri == other


def test_a_disk_that_is_full_at_the_start_stops_no_training(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", refuse)
    run = tracker(tmp_path)
    run.start("cpu")
    run.metrics({"loss": 1.0}, 1)
    run.pictures(last=True)
    run.results()
    run.files([tmp_path])
    run.finish()
    assert caplog.text.count("No space left on device") == 1


def test_a_folder_that_cannot_be_made_stops_no_training(tmp_path, caplog):
    (tmp_path / "tracking").write_text("a file")
    run = tracker(tmp_path)
    run.start("cpu")
    run.metrics({"loss": 1.0}, 1)
    run.finish()
    assert caplog.text.count("the run is not tracked") == 1


def test_a_validation_without_a_run_is_not_tracked(tmp_path):
    engine = type("Engine", (), {"state": type("State", (), {"metrics": {"dice": 1.0}})})
    ValidationTracking(tracker(tmp_path))(engine)
    assert not (tmp_path / "tracking").exists()


def test_where_nothing_can_be_locked_all_is_sent(out, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    run = tracker(out)
    run.start("cpu")
    run.metrics({"loss": 1.0}, 1)
    run.finish()
    sender = Sender(next(out.glob("tracking/*.jsonl")))
    sender.load_position()
    assert (sender.waiting("logs"), sender.waiting("files")) == (0, 0)


def test_a_picture_under_one_name_is_tracked_each_time_that_it_changes(tmp_path):
    (tmp_path / "images").mkdir()
    run = tracker(tmp_path, "http://127.0.0.1:9", timeout=0)
    run.start("cpu")
    for step in (1, 2, 3):
        run.step = step
        Image.new("L", (8, 8), step).save(tmp_path / "images/test.png")
        os.utime(tmp_path / "images/test.png", (step, step))
        run.pictures()
    run.pictures(last=True)
    run.finish()
    names = [r["name"] for r, _, _ in read_records(next(tmp_path.glob("tracking/*.jsonl"))) if r["kind"] == "picture"]
    assert [name.partition("+timestamp")[0] for name in names] == [
        *(f"test+step+{step}" for step in (1, 2, 3)),
        "last_test+step+0",
    ]


class Scripted(Sender):
    """Calls a function in place of the tracker."""

    def __init__(self, path, act):
        super().__init__(path)
        self.act, self.calls = act, 0

    def send(self):
        self.calls += 1
        self._attempt(lambda: None)
        return self.act(self)


def test_nothing_more_is_sent_of_a_run_that_was_abandoned(tmp_path):
    journal = Journal(tmp_path, "run", "experiment")
    going, told = threading.Event(), threading.Event()

    def act(sender):
        going.set()
        told.wait(60)
        for _ in range(3):
            sender._attempt(lambda: sent.append(1))

    sent: list[int] = []
    thread = BackgroundSender(Scripted(journal.path, act))
    thread.start()
    assert going.wait(60)
    assert not thread.close(0)
    told.set()
    thread.join(60)
    assert sent == []


def test_a_thread_that_waits_for_another_process_does_not_spin(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "run", "experiment")
    sender = Scripted(journal.path, lambda sender: 0)
    looks = []
    lock = sender.lock
    monkeypatch.setattr(sender, "lock", lambda: looks.append(1) or lock())
    monkeypatch.setattr(module, "FIRST_PAUSE", 3600)
    with locked(journal.path.with_suffix(".lock")):
        thread = BackgroundSender(sender)
        thread.start()
        assert not thread.close(1)
        thread.join(60)
    assert not thread.is_alive()
    assert len(looks) <= 3
    assert sender.calls == 0


def test_a_thread_that_fails_does_not_keep_its_training_waiting(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "run", "experiment")
    thread = BackgroundSender(Scripted(journal.path, lambda sender: 0))

    def fail():
        raise MemoryError

    monkeypatch.setattr(thread, "_loop", fail)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    thread.start()
    assert thread.close(3600)


@pytest.mark.parametrize("users", [None, "7"])
def test_requests_fail_soon_but_uploads_take_as_long_as_they_need(monkeypatch, users):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    if users:
        monkeypatch.setenv(LIMITS[0], users)
    before = dict(os.environ)
    with module._api_limits(), module._api_limits():
        assert [os.environ[name] for name in LIMITS] == [users or module.REQUEST_TIMEOUT, "0"]
    with module._api_limits(upload=True):
        assert os.environ.get(LIMITS[0]) == users
    assert dict(os.environ) == before


class Slow(http.server.BaseHTTPRequestHandler):
    """Stores an upload in more time than a request may take."""

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(2)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def test_a_server_that_takes_its_time_over_a_file_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", "1")
    (tmp_path / "model.pt").write_bytes(b"weights")
    journal = Journal(tmp_path, "run", "experiment")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = MlflowArtifactsRepository("mlflow-artifacts:/1/a", f"http://127.0.0.1:{server.server_port}")
        sender = Sender(journal.path)
        sender._client = type("Client", (), {"log_artifact": lambda self, run_id, path, to: store.log_artifact(path)})()
        record = {"kind": "file", "path": "model.pt", "to": "", "sha256": module.file_sha256(tmp_path / "model.pt")}
        sender._send_file(record, 0)
        server.shutdown()
