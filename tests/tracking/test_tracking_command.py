"""``medgen tracking``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mlflow import MlflowClient
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
