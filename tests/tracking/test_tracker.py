"""A training is tracked, whatever becomes of the tracker or of the training."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_training
import torch
from ignite.engine import Events
from mlflow import MlflowClient
from tiny_training import IMAGES, make

from medgen.preemption import AGAIN
from medgen.tracking import folder_status, send_folder

pytestmark = [
    # about MLflow's own insides
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
]

POINTS = ("loss", "resolution", "images_per_second", "val_error")


class KilledError(BaseException):
    """Not an Exception: no handler gets to clean up, as if the process had been killed."""


def runs_of(uri):
    client = MlflowClient(uri)
    return [run for e in client.search_experiments() for run in client.search_runs([e.experiment_id])]


def run_named(uri, name):
    (run,) = [run for run in runs_of(uri) if run.info.run_name == name]
    return run


def history(uri, run, names=POINTS):
    """All points of all curves, without the times: a point that is there twice is listed twice."""
    client = MlflowClient(uri)
    return {
        name: [(p.step, p.value if name in ("loss", "resolution", "val_error") else None) for p in points]
        for name in names
        for points in [sorted(client.get_metric_history(run.info.run_id, name), key=lambda p: p.step)]
    }


def pictures(uri, run):
    """(name, step) of the pictures, thumbnails apart."""
    names = [Path(f.path).name for f in MlflowClient(uri).list_artifacts(run.info.run_id, "images")]
    return sorted(tuple(name.split("+")[0:3:2]) for name in names if name.endswith(".png"))


def files_in(uri, run, path=None):
    client = MlflowClient(uri)
    found = client.list_artifacts(run.info.run_id, path)
    return {f.path for f in found if not f.is_dir} | {p for f in found if f.is_dir for p in files_in(uri, run, f.path)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, empty_database):
    """The training as it is when nothing happens, in a database of its own."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    folder.mkdir()
    shutil.copyfile(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    make(folder, None).run()
    return uri, run_named(uri, "tiny-out"), folder


def test_curves_have_every_step_at_the_number_of_images_seen(undisturbed):
    uri, run, _ = undisturbed
    found = history(uri, run)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in found["loss"]] == list(range(2, 25, 2)) == [s for s, _ in found["images_per_second"]]
    assert found["val_error"] == [(8, 1.0), (16, 0.5), (24, pytest.approx(1 / 3))]


def test_pictures_models_checkpoint_and_settings_are_artifacts(undisturbed):
    uri, run, folder = undisturbed
    expected = [("last_samples", "0"), *(("samples", step) for step in ("16", "24", "8"))]
    assert pictures(uri, run) == sorted(expected)
    others = {path for path in files_in(uri, run) if not path.startswith("images/")}
    assert others == {"settings.json", "requirements.txt", "model/model.pt", "checkpoints/last.pt"}
    client = MlflowClient(uri)
    kept = client.download_artifacts(run.info.run_id, "checkpoints/last.pt")
    assert Path(kept).read_bytes() == (folder / "checkpoints" / "last.pt").read_bytes()


def test_a_server_that_is_killed_and_comes_back_misses_nothing(server, undisturbed, tmp_path, caplog):
    trainer = make(tmp_path / "killed", server.uri, pause=0.1)
    killed = threading.Event()

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def kill():
        server.kill()

    @trainer.on(Events.ITERATION_STARTED(once=10))
    def start():
        threading.Thread(target=lambda: (server.start(), killed.set())).start()

    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert killed.wait(60)

    send_folder(tmp_path / "killed")
    run = run_named(server.uri, "tiny-killed")
    assert run.info.status == "FINISHED"
    assert history(server.uri, run) == history(*undisturbed[:2])
    assert pictures(server.uri, run) == pictures(*undisturbed[:2])
    assert files_in(server.uri, run, "model") == {"model/model.pt"}
    assert caplog.text.count("takes nothing") == 1
    assert caplog.text.count("answers again") == 1


def test_a_tracker_that_never_answers_costs_the_timeout_and_no_more(
    black_hole, server, undisturbed, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    trainer = make(tmp_path / "hole", black_hole, timeout=1)
    with caplog.at_level(logging.WARNING):
        trainer.run()

    assert trainer.state.iteration == 12
    assert f"send the rest with `medgen tracking send {tmp_path / 'hole'}`" in caplog.text
    (status,) = folder_status(tmp_path / "hole")
    assert (status.status, status.run_id, status.points) == ("FINISHED", None, 4 * 3 * 3 + 3)

    while folder_status(tmp_path / "hole")[0].active:  # the request that hangs; a process would be over
        time.sleep(0.1)
    assert send_folder(tmp_path / "hole", server.uri)[0].waiting == 0
    assert history(server.uri, run_named(server.uri, "tiny-hole")) == history(*undisturbed[:2])


def test_sending_again_sends_nothing(server, tmp_path):
    make(tmp_path / "twice", server.uri).run()
    before = history(server.uri, run_named(server.uri, "tiny-twice"))
    assert [status.waiting for status in send_folder(tmp_path / "twice")] == [0]
    assert history(server.uri, run_named(server.uri, "tiny-twice")) == before


@pytest.mark.parametrize("forgotten", ["positions", "all"])
def test_a_sender_that_died_before_it_noted_what_it_sent_leaves_nothing_twice(server, tmp_path, forgotten):
    out = tmp_path / f"unnoted-{forgotten}"
    make(out, server.uri).run()
    run = run_named(server.uri, f"tiny-{out.name}")
    before = history(server.uri, run), pictures(server.uri, run), files_in(server.uri, run)
    (state,) = out.glob("tracking/*.sent.json")
    if forgotten == "all":
        state.unlink()
    else:
        noted = json.loads(state.read_text())
        noted[server.uri] |= {"logs": 0, "files": 0}
        state.write_text(json.dumps(noted))

    send_folder(out)

    run = run_named(server.uri, f"tiny-{out.name}")
    assert (history(server.uri, run), pictures(server.uri, run), files_in(server.uri, run)) == before
    assert run.info.status == "FINISHED"


def test_an_interrupted_training_that_is_resumed_has_one_history(undisturbed, out):
    trainer = make(out, None)

    @trainer.on(Events.ITERATION_COMPLETED(once=7))
    def kill():
        raise KilledError

    with pytest.raises(KilledError):
        trainer.run()
    assert run_named(f"sqlite:///{out}/mlflow.db", "tiny-out").info.status == "KILLED"
    make(out, None, resume=True).run()

    uri = f"sqlite:///{out}/mlflow.db"
    (run,) = runs_of(uri)
    assert run.info.status == "FINISHED"
    assert history(uri, run) == history(*undisturbed[:2])
    assert pictures(uri, run) == pictures(*undisturbed[:2])


def test_what_was_set_otherwise_on_resuming_is_told_and_breaks_nothing(out):
    make(out, None, epochs=1).run()
    make(out, None, epochs=2, resume=True).run()
    (run,) = runs_of(f"sqlite:///{out}/mlflow.db")
    assert run.data.params["max_epochs"] == "1"
    assert run.data.tags["changed_on_resume"] == "max_epochs: 1 -> 2"
    assert run.data.metrics["val_error"] == 0.5


def test_a_new_training_of_the_same_name_is_a_run_of_its_own(out):
    trainer = make(out, None, name="mine")

    @trainer.on(Events.ITERATION_COMPLETED(once=1))
    def kill():
        raise KilledError

    with pytest.raises(KilledError):
        trainer.run()
    make(out, None, name="mine").run()

    found = runs_of(f"sqlite:///{out}/mlflow.db")
    assert [run.info.run_name for run in found] == ["mine", "mine"]
    assert sorted(len(history(f"sqlite:///{out}/mlflow.db", run)["loss"]) for run in found) == [1, 12]


def test_a_failed_training_is_failed_and_its_error_goes_on(out):
    trainer = make(out, None)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        trainer.run()
    (run,) = runs_of(f"sqlite:///{out}/mlflow.db")
    assert run.info.status == "FAILED"
    assert run.info.end_time is not None


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_worker_that_is_told_to_end_does_not_end_the_run(out):
    trainer = make(out, None)
    codes = []

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def end_worker():
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    trainer.run()
    assert codes == [-signal.SIGTERM]
    assert "KILLED" not in next(out.glob("tracking/*.jsonl")).read_text()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_was_deleted_is_left_alone(out, caplog):
    uri = f"sqlite:///{out}/mlflow.db"
    trainer = make(out, uri, timeout=1, pause=0.2)

    @trainer.on(Events.ITERATION_COMPLETED(once=8))
    def delete():
        while not (found := runs_of(uri)):
            time.sleep(0.05)
        MlflowClient(uri).delete_run(found[0].info.run_id)

    trainer.run()
    assert "was deleted there" in caplog.text
    assert runs_of(uri) == []


@pytest.fixture(scope="module")
def processes(tmp_path_factory, empty_database):
    """Three trainings in processes of their own, started at once: two into one database, one to be killed."""
    folder = tmp_path_factory.mktemp("processes")
    shared = f"sqlite:///{folder}/shared.db"
    options = {
        "a": {"uri": shared},
        "b": {"uri": shared},
        "killed": {"uri": None, "hang_at": 8},
        "ended": {"uri": None, "epochs": 1000, "pause": 0.05},
    }
    jobs = {}
    for name, given in options.items():
        (folder / name).mkdir()
        if given["uri"] is None:
            shutil.copyfile(empty_database, folder / name / "mlflow.db")
        jobs[str(folder / name)] = given
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, tiny_training.__file__, json.dumps(jobs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        pids = json.loads(process.stdout.readline())
        for name, number in (("killed", signal.SIGKILL), ("ended", signal.SIGTERM)):
            while not list(folder.glob(f"{name}/images/*.png")) or not list(
                folder.glob(f"{name}/tracking/*.sent.json")
            ):
                assert process.poll() is None
                time.sleep(0.01)
            os.kill(pids[str(folder / name)], number)
        codes = json.loads(process.stdout.readline())
    return folder, {Path(name).name: code for name, code in codes.items()}


@pytest.mark.slow(reason="processes import MONAI and MLflow")
class TestProcesses:
    def test_two_trainings_that_begin_one_database_at_once_both_complete(self, processes, undisturbed):
        folder, codes = processes
        uri = f"sqlite:///{folder}/shared.db"
        assert (codes["a"], codes["b"]) == (0, 0)
        for name in ("tiny-a", "tiny-b"):
            run = run_named(uri, name)
            assert run.info.status == "FINISHED"
            assert history(uri, run) == history(*undisturbed[:2])

    def test_a_killed_training_is_closed_by_send_and_continued_by_resume(self, processes, undisturbed):
        folder, codes = processes
        uri = f"sqlite:///{folder}/killed/mlflow.db"
        assert codes["killed"] == -signal.SIGKILL
        assert send_folder(folder / "killed")[0].status == "KILLED"
        assert run_named(uri, "tiny-killed").info.status == "KILLED"

        make(folder / "killed", None, resume=True).run()

        run = run_named(uri, "tiny-killed")
        assert run.info.status == "FINISHED"
        assert history(uri, run) == history(*undisturbed[:2])
        assert pictures(uri, run) == pictures(*undisturbed[:2])

    def test_a_training_that_is_told_to_end_says_so(self, processes):
        folder, codes = processes
        assert codes["ended"] == AGAIN
        run = run_named(f"sqlite:///{folder}/ended/mlflow.db", "tiny-ended")
        assert run.info.status == "KILLED"
        assert folder_status(folder / "ended")[0].waiting == 0
        # the same run goes on
        state = torch.load(folder / "ended/checkpoints/last.pt", weights_only=True)
        make(folder / "ended", None, epochs=state["images_seen"] // IMAGES + 1, resume=True).run()
        assert run_named(f"sqlite:///{folder}/ended/mlflow.db", "tiny-ended").info.status == "FINISHED"
