"""``medgen tracking``."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import threading

import pytest
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from medgen import cli
from medgen.tracking.journal import Journal

runner = CliRunner()

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")


@pytest.fixture
def waiting(out):
    """A run whose tracker was never there, with more than a request may hold and a line that was cut."""
    journal = Journal(out, "run-1", "experiment")
    journal.append("status", status="RUNNING")
    journal.append("params", values={f"p{number}": "x" * 6000 for number in range(250)})
    for step in range(1, 701):
        journal.metrics({"loss": 1 / step, "val": float(step)}, step)
    journal.append("status", status="FINISHED")
    journal.close()
    with open(journal.path, "ab") as file:
        file.write(b'{"kind": "metr')
    return out


def invoke(*words):
    result = runner.invoke(cli.app, ["tracking", *map(str, words)])
    return result.exit_code, result.output


def test_status_tells_what_waits_and_send_sends_it_once(waiting):
    uri = f"sqlite:///{waiting}/mlflow.db"
    line = f"run-1: FINISHED, 1400 points of curves, {{}} -> {uri}"
    assert invoke("status", waiting) == (0, line.format("703 lines wait") + "\n")

    for _ in range(2):
        code, output = invoke("send", waiting)
        assert (code, output.startswith(line.format("all sent"))) == (0, True), output

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 250
    points = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in points) == [(step, 1 / step) for step in range(1, 701)]


def test_a_run_whose_process_is_gone_is_closed(out):
    journal = Journal(out, "run-1", "experiment")
    journal.append("status", status="RUNNING")
    journal.metrics({"loss": 1.0}, 1)
    journal.close()
    assert invoke("send", out)[1].startswith("run-1: KILLED, 1 points of curves, all sent")


def test_a_line_that_mlflow_refuses_is_left_out_and_said_and_the_rest_is_sent(out, caplog):
    journal = Journal(out, "run-1", "experiment")
    journal.append("params", values={"lr": "1"})
    journal.append("status", status="RUNNING")
    journal.append("params", values={"lr": "2"})  # MLflow keeps the first
    journal.metrics({"loss": 1.0}, 1)
    journal.append("status", status="FINISHED")
    journal.close()

    assert invoke("send", out)[0] == 0
    assert "left out" in caplog.text
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert (run.data.params, run.data.metrics, run.info.status) == ({"lr": "1"}, {"loss": 1.0}, "FINISHED")


def test_a_file_that_is_no_longer_what_was_logged_stays_here(out, caplog):
    (out / "model.pt").write_bytes(b"weights")
    journal = Journal(out, "run-1", "experiment")
    journal.append("file", path="model.pt", to="model", sha256="0" * 64)
    journal.append("file", path="../../etc/passwd", to="", sha256="0" * 64)
    journal.append("status", status="FINISHED")
    journal.close()

    assert invoke("send", out)[0] == 0
    assert caplog.text.count("left out") == 2
    assert not (out / "mlruns").exists()


def finished(out, name, uri=None, **metrics):
    """A journal of that name with a point of each, and all its records."""
    journal = Journal(out, name, "experiment", uri)
    journal.append("status", status="RUNNING")
    journal.metrics(metrics or {"loss": 1.0}, 1)
    journal.append("status", status="FINISHED")
    return journal


def run_of(out, name):
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("experiment").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name = '{name}'")
    return client, run


def test_a_broken_picture_is_left_out_and_holds_up_no_other_file(out, caplog):
    journal = finished(out, "run-1")
    for name, content in {"a_1.png": b"\x89PNG\r\n\x1a\n cut", "b_1.png": b"GIF89a"}.items():
        (out / name).write_bytes(content)
        journal.picture(out / name, name[0], 1)
    Image.new("L", (8, 8)).save(out / "c_1.png")
    journal.picture(out / "c_1.png", "c", 1)
    journal.append("text", to="a.txt", text="x")

    assert invoke("send", out)[0] == 0
    client, run = run_of(out, "run-1")
    assert caplog.text.count("no picture that can be read") == 2
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"images", "a.txt"}
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2  # the picture and its thumbnail


def test_where_only_files_wait_that_is_said(out, monkeypatch):
    finished(out, "run-1").append("text", to="a.txt", text="x")

    def refuse(*_):
        raise ConnectionError("no room")

    monkeypatch.setattr(MlflowClient, "log_text", refuse)
    code, output = invoke("send", out)
    assert (code, "takes no files (no room)" in output) == (1, True), output
    assert ", 1 files wait ->" in invoke("status", out)[1]


def test_a_failure_between_a_picture_and_its_thumbnail_leaves_one_of_each(out, monkeypatch):
    Image.new("L", (8, 8)).save(out / "a_1.png")
    finished(out, "run-1").picture(out / "a_1.png", "a", 1)
    log_artifact = MlflowClient.log_artifact

    def break_off(self, run_id, path, *rest):
        if path.endswith(".webp"):
            raise ConnectionError("reset")
        log_artifact(self, run_id, path, *rest)

    monkeypatch.setattr(MlflowClient, "log_artifact", break_off)
    assert invoke("send", out)[0] == 1
    monkeypatch.undo()
    assert invoke("send", out)[0] == 0
    client, run = run_of(out, "run-1")
    names = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert sorted(name.rpartition(".")[2] for name in names) == ["png", "webp"]
    assert run.data.tags["mlflow.loggedImages"] == "True"


def test_a_picture_drawn_again_before_it_was_sent_is_sent_as_it_is_now(out, caplog):
    journal = finished(out, "run-1")
    for grey in (1, 200):
        Image.new("L", (8, 8), grey).save(out / "a_1.png")
        journal.picture(out / "a_1.png", "a", 1)
    assert invoke("send", out)[0] == 0
    client, run = run_of(out, "run-1")
    (name,) = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith("png")]
    with Image.open(client.download_artifacts(run.info.run_id, name)) as picture:
        assert picture.getpixel((0, 0)) == 200
    assert "left out" not in caplog.text


def test_a_metric_that_mlflow_refuses_takes_no_other_with_it(out, caplog):
    journal = finished(out, "run-1")
    for step in range(2, 52):
        journal.metrics({"loss": 1.0, **({"x//y": 1.0} if step == 30 else {})}, step)
    assert invoke("send", out)[0] == 0
    client, run = run_of(out, "run-1")
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 51
    assert caplog.text.count("refuses a line") == 1


def test_a_run_that_was_deleted_holds_up_no_other(out):
    deleted = finished(out, "run-1")
    assert invoke("send", out)[0] == 0
    client, run = run_of(out, "run-1")
    client.delete_run(run.info.run_id)
    assert invoke("send", out)[0] == 0  # nothing waits
    deleted.metrics({"loss": 2.0}, 2)
    finished(out, "run-2")
    (out / "tracking" / "run-0.jsonl").touch()  # a kill before the first line

    code, output = invoke("send", out)
    assert (code, len(output.strip().splitlines())) == (1, 1)
    assert "1 of 2 runs are sent" in output
    assert f"mlflow runs restore --run-id {run.info.run_id}" in output
    assert run_of(out, "run-2")[1].info.status == "FINISHED"


def test_files_of_a_folder_that_was_moved_do_not_go_back_to_the_old_place(out, tmp_path, caplog):
    journal = finished(out, "run-1")
    journal.append("text", to="a.txt", text="x")
    journal.close()
    assert invoke("send", out)[0] == 0
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    journal = Journal(moved, "run-1", "experiment", resume=True)
    journal.append("text", to="b.txt", text="x")
    journal.metrics({"loss": 2.0}, 2)
    journal.close()

    assert invoke("send", moved)[0] == 0
    assert "was moved or copied" in caplog.text
    assert not out.exists()
    assert not list(moved.rglob("b.txt"))
    assert run_of(moved, "run-1")[1].data.metrics == {"loss": 2.0}


class Listener(http.server.BaseHTTPRequestHandler):
    """Notes what it is given to log in with, and refuses."""

    given: list

    def do_GET(self):
        self.given.append(self.headers.get("Authorization"))
        self.send_response(403)
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - the name that the server looks for

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("named", [None, "environment", "argument"])
def test_a_token_goes_to_no_server_that_a_journal_alone_names(out, monkeypatch, named):
    handler = type("Noting", (Listener,), {"given": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        finished(out, "run-1", uri)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hospital")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if named == "environment" else "http://hospital:5000")
        code, output = invoke("send", out, *(["--tracking_uri", uri] if named == "argument" else []))
        server.shutdown()
    assert code == 1
    if named:
        assert handler.given == ["Bearer hospital"]
    else:
        assert handler.given == []
        assert f"--tracking_uri {uri}" in output
        assert len(output.strip().splitlines()) == 1


def test_a_tracker_that_is_away_is_one_line_and_loses_nothing(waiting):
    code, output = invoke("send", waiting, "--tracking_uri", "http://127.0.0.1:1")
    assert code == 1
    assert len(output.strip().splitlines()) == 1
    assert "takes nothing" in output
    assert "703 lines wait" in invoke("status", waiting)[1]


def test_a_folder_without_journals_is_one_line(tmp_path):
    code, output = invoke("status", tmp_path)
    assert (code, len(output.strip().splitlines())) == (1, 1)
    assert "name the --output_dir of a training that was tracked" in output


def test_help_and_status_import_no_framework(waiting):
    program = (
        "import sys; from medgen.cli import app\n"
        f"try: app(['tracking', 'status', {str(waiting)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'ignite'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
