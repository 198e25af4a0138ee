"""Bundles through the MLflow registry and back: SQLite in a temporary folder, freshly initialised weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from typer.testing import CliRunner
from vector_bundles import files_of, stored_bundle

from medgen import cli
from medgen.bundle_zip import write_zip
from medgen.errors import UserError
from medgen.registry import list_models, log_run, pull, register_bundle, resolve
from medgen.registry._connection import connection
from medgen.tracking.journal import Journal, locked

AUTOENCODER = Path(__file__).parents[2] / "bundles" / "cxr_autoencoder_kl"
METRICS = {"ms_ssim": 0.97, "psnr": 31.5, "l1": 0.02, "n": 8, "git": "abc123", "split": "test", "fid": float("nan")}


def network_of(bundle: Path, overlay: dict | None = None) -> nn.Module:
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    return ConfigParser(config | (overlay or {})).get_parsed_content("network_def").eval()


@pytest.fixture(scope="module")
def registered(tmp_path_factory, empty_database) -> dict:
    """The autoencoder bundle in the size of its demo overlay, registered twice, and a folder of other things in it."""
    folder = tmp_path_factory.mktemp("registry")
    bundle = folder / "cxr_autoencoder_kl"
    for part in ("configs", "docs"):
        if (AUTOENCODER / part).is_dir():
            shutil.copytree(AUTOENCODER / part, bundle / part)
    shutil.copy(AUTOENCODER / "LICENSE", bundle)
    (bundle / "docs").mkdir(exist_ok=True)
    (bundle / "docs" / "README.md").write_text("# A card\n" + "word " * 2000)
    demo = bundle / "configs" / "demo.json"
    torch.manual_seed(0)
    network = network_of(bundle, json.loads(demo.read_text()))
    for name in (
        "models/model.pt",
        "models/other.pt",
        "output/checkpoints/last.pt",
        "eval/schema.json",
        "datalist.json",
    ):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), bundle / name)
    (bundle / "configs" / "__pycache__").mkdir()
    (bundle / "configs" / "__pycache__" / "x.pyc").write_bytes(b"x")
    metrics = folder / "metrics.json"
    metrics.write_text(json.dumps(METRICS))
    (folder / "store").mkdir()
    uri = f"sqlite:///{shutil.copy(empty_database, folder / 'store')}"
    # in a folder of its own, to see that nothing lands in it
    before = Path.cwd()
    (folder / "cwd").mkdir()
    os.chdir(folder / "cwd")
    try:
        first = register_bundle(bundle, "autoencoder", uri, "champion", metrics, [demo])
        second = register_bundle(bundle, "autoencoder", uri, overlays=[demo])
    finally:
        os.chdir(before)
    assert (first, second) == (1, 2)
    return {"folder": folder, "uri": uri, "network": network, "overlay": json.loads(demo.read_text())}


@pytest.fixture(scope="module")
def pulled(registered) -> Path:
    return pull("models:/autoencoder@champion", registered["folder"] / "pulled", registered["uri"])


# ---- what comes back


def test_pulled_bundle_computes_what_the_registered_network_computed(registered, pulled):
    network = network_of(pulled)
    network.load_state_dict(torch.load(pulled / "models" / "model.pt", weights_only=True))
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        assert torch.equal(network(images), registered["network"](images))


def test_pulled_bundle_runs_by_itself(pulled, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a bundle replaces
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(tmp_path / "in" / "a.png")
    settings = {"bundle_root": str(pulled), "input_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}

    workflow = ConfigWorkflow(str(pulled / "configs/inference.json"), logging_file=False, num_workers=0, **settings)
    workflow.initialize()
    workflow.run()
    workflow.finalize()

    assert [path.name for path in (tmp_path / "out").rglob("a*.png")]


def test_pulled_folder_holds_the_bundle_and_nothing_else_of_its_folder(pulled):
    configs = {f"configs/{path.name}" for path in (AUTOENCODER / "configs").iterdir() if path.is_file()}
    docs = {f"docs/{path.name}" for path in (AUTOENCODER / "docs").glob("*") if path.is_file()} | {"docs/README.md"}

    assert files_of(pulled) == configs | docs | {"LICENSE", "models/model.pt", "checksums.json"}


def test_overlay_values_replace_the_ids_that_each_config_has(registered, pulled):
    for name in ("train", "evaluate", "inference"):
        config = json.loads((pulled / "configs" / f"{name}.json").read_text())
        original = json.loads((AUTOENCODER / "configs" / f"{name}.json").read_text())
        expected = {key: registered["overlay"].get(key, value) for key, value in original.items()}
        assert list(config.items()) == list(expected.items())  # values, and the order in which people read them


def test_checksums_are_those_of_the_files(pulled):
    sums = json.loads((pulled / "checksums.json").read_text())

    assert sums == {
        name: hashlib.sha256((pulled / name).read_bytes()).hexdigest() for name in files_of(pulled) - {"checksums.json"}
    }


def test_registering_leaves_the_current_folder_and_the_tracking_uri_alone(registered):
    assert not list((registered["folder"] / "cwd").iterdir())
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_model_description_names_no_path_of_this_machine(registered):
    model = stored_bundle(registered["uri"], "autoencoder", 1).parents[1]

    text = "".join((model / name).read_text() for name in ("MLmodel", "python_env.yaml", "conda.yaml"))

    for path in (registered["folder"], tempfile.gettempdir(), Path.home(), Path(__file__).parents[2], "file:"):
        assert str(path) not in text


def test_version_carries_card_signature_requirements_and_provenance(registered):
    version = MlflowClient(registered["uri"]).get_model_version("autoencoder", "1")
    model = stored_bundle(registered["uri"], "autoencoder", 1).parents[1]
    metadata = json.loads((AUTOENCODER / "configs" / "metadata.json").read_text())
    description = mlflow.models.Model.load(model)

    assert "- **Figures**: ms_ssim 0.97, psnr 31.5, l1 0.02, n 8\n" in version.description
    assert "\n\n# A card\n" in version.description
    assert len(version.description) == 5000  # column width in MLflow's database
    assert description.signature.inputs.input_names() == ["image"]
    assert description.metadata["bundle_version"] == metadata["version"]
    requirements = (model / "requirements.txt").read_text().splitlines()
    assert f"torch=={metadata['pytorch_version']}" in requirements
    assert {f"{name}=={pin}" for name, pin in metadata["required_packages_version"].items()} <= set(requirements)


def test_numbers_become_metrics_and_the_rest_tags(registered):
    client = MlflowClient(registered["uri"])
    run = client.get_run(client.get_model_version("autoencoder", "1").run_id)

    assert run.data.metrics == {"ms_ssim": 0.97, "psnr": 31.5, "l1": 0.02, "n": 8.0}
    assert {key: run.data.tags[key] for key in ("git", "split", "fid")} == {
        "git": "abc123",
        "split": "test",
        "fid": "NaN",
    }
    assert client.get_experiment(run.info.experiment_id).name == "cxr_autoencoder_kl"


def test_commands_register_and_pull(vector_bundle, tmp_path):
    trained_on = vector_bundle / "models" / "trained_on.json"
    trained_on.write_text('{"patients": ["0123456789abcdef"]}')
    # a registry that is not there yet: MLflow must make its tables in silence
    runner, uri = CliRunner(), f"sqlite:///{tmp_path / 'mlflow.db'}"

    register = [
        "registry",
        "register",
        str(vector_bundle),
        "--name",
        "vectors",
        "--alias",
        "best",
        "--tracking_uri",
        uri,
    ]
    registering = runner.invoke(cli.app, register)
    fetching = runner.invoke(
        cli.app, ["registry", "pull", "models:/vectors@best", str(tmp_path / "out"), "--tracking_uri", uri]
    )

    assert registering.output == "registered models:/vectors/1, also models:/vectors@best\n"  # and no log of MLflow's
    assert fetching.output == f"models:/vectors@best -> {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "models" / "model.pt").read_bytes() == (vector_bundle / "models/model.pt").read_bytes()
    assert (tmp_path / "out" / "models" / "trained_on.json").read_bytes() == trained_on.read_bytes()


def test_command_that_fails_says_why_in_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["registry", "list", "--tracking_uri", f"sqlite:///{tmp_path / 'typo.db'}"])

    assert result.exit_code == 1
    assert re.fullmatch(r"error: no registry at .*typo\.db; .*\n", result.output)


# ---- refusals before anything is written


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "no models/model.pt in .*; train the bundle first"),
        ({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, r"another architecture: .* shape \(2, 4\) at weight"),
        ({"weight": torch.zeros(2, 4)}, "another architecture: .* at bias, got nothing"),
        ({"network": {"weight": torch.zeros(2, 4)}, "epoch": 3}, "flat state dict of tensors, got network, epoch"),
    ],
)
def test_weights_that_do_not_fit_leave_no_trace_in_the_registry(vector_bundle, tmp_path, weights, message):
    path = vector_bundle / "models" / "model.pt"
    path.unlink() if weights is None else torch.save(weights, path)

    with pytest.raises(UserError, match=message):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")

    assert not (tmp_path / "mlflow.db").exists()


def test_weights_from_elsewhere_are_registered_instead_of_the_bundles_own(vector_bundle, store, tmp_path):
    trained = tmp_path / "run" / "model.pt"
    trained.parent.mkdir()
    torch.save({name: value + 1 for name, value in torch.load(vector_bundle / "models/model.pt").items()}, trained)
    (vector_bundle / "models" / "model.pt").unlink()

    register_bundle(vector_bundle, "vectors", store, weights=trained)

    pulled = pull("models:/vectors/1", tmp_path / "pulled", store)
    assert (pulled / "models" / "model.pt").read_bytes() == trained.read_bytes()
    with pytest.raises(UserError, match=r"no .*absent\.pt; .*--weights"):
        register_bundle(vector_bundle, "vectors", store, weights=tmp_path / "absent.pt")


def test_figures_of_other_weights_are_refused(vector_bundle, store, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"l1": 0.1, "model_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"metrics\.json was measured with other weights; evaluate the weights"):
        register_bundle(vector_bundle, "vectors", store, metrics=metrics)
    own = hashlib.sha256((vector_bundle / "models" / "model.pt").read_bytes()).hexdigest()
    metrics.write_text(json.dumps({"l1": 0.1, "model_sha256": own}))
    assert register_bundle(vector_bundle, "vectors", store, metrics=metrics) == 1


def test_overlay_is_what_the_weights_are_checked_against(vector_bundle, tmp_path):
    overlay = tmp_path / "wide.json"
    overlay.write_text('{"width": 6}')

    with pytest.raises(UserError, match=r"this network has shape \(2, 6\) at weight"):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}", overlays=[overlay])


def test_overlay_of_the_bundle_itself_is_named_without_its_folder(vector_bundle, store, tmp_path):
    (vector_bundle / "configs" / "wide.json").write_text('{"width": 6}')
    torch.save(nn.Linear(6, 2).state_dict(), vector_bundle / "models" / "model.pt")
    metadata = vector_bundle / "configs" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"num_channels": 4', '"num_channels": 6'))

    assert register_bundle(write_zip(vector_bundle, tmp_path / "v.zip"), "vectors", store, overlays=["wide.json"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name must be"),
        ({"name": ""}, "name must be"),
        ({"alias": "v3"}, "keeps the aliases"),
        ({"alias": "Latest"}, "keeps the aliases"),
        ({"metrics": '{"dice": {"mean": 1}}'}, "flat object .* got dict at 'dice'"),
        ({"metrics": "[1]"}, "JSON object, got a list"),
        ({"metrics": '{"mlflow.parentRunId": "x"}'}, "must hold figures, got mlflow.parentRunId"),
        ({"metrics": '{"medgen.journal": "x"}'}, "must hold figures, got medgen.journal"),
        ({"metrics": "{"}, "must be a JSON file"),
        ({"overlays": '{"chanels": 3}'}, "sets chanels, which is no top-level id of inference.json"),
        ({"tracking_uri": "file:///x"}, "must be a server or a database"),
        ({"tracking_uri": "mlruns"}, "must be a server or a database"),
        ({"tracking_uri": None}, "no registry named"),
    ],
)
def test_wrong_argument_is_one_line_and_leaves_no_trace(vector_bundle, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"name": "vectors", "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"} | change
    if "metrics" in arguments:
        (tmp_path / "file.json").write_text(arguments["metrics"])
        arguments["metrics"] = tmp_path / "file.json"
    if "overlays" in arguments:
        (tmp_path / "file.json").write_text(arguments["overlays"])
        arguments["overlays"] = [tmp_path / "file.json"]
    before = files_of(tmp_path)

    with pytest.raises(UserError, match=message) as caught:
        register_bundle(vector_bundle, **arguments)

    assert "\n" not in str(caught.value)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numpy_version": ">=2,<3"}, "plain X.Y.Z"),
        ({"version": None}, "must hold version, .*; add version"),
        ({"network_data_format": {"inputs": {"a": {}}, "outputs": {}}}, r"network_data_format.inputs .* num_channels"),
    ],
)
def test_incomplete_metadata_is_refused(vector_bundle, tmp_path, change, message):
    path = vector_bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))

    with pytest.raises(UserError, match=message):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_network_with_two_inputs_is_refused(vector_bundle, tmp_path):
    path = vector_bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["network_data_format"]["inputs"]["label"] = metadata["network_data_format"]["inputs"]["z"]
    path.write_text(json.dumps(metadata))

    with pytest.raises(UserError, match="must describe one float32 tensor, got z, label"):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")


# ---- refusals of the registry


@pytest.mark.parametrize("step", ["log_model_artifacts", "create_model_version"])
def test_registry_that_fails_half_way_keeps_no_empty_model(vector_bundle, store, monkeypatch, step):
    def refuse(*args, **kwargs):
        raise MlflowException("disk full\nand more")

    monkeypatch.setattr(MlflowClient, step, refuse)
    with pytest.raises(UserError, match="refused: disk full and more; see") as caught:
        register_bundle(vector_bundle, "vectors", store)

    assert "\n" not in str(caught.value)
    assert not list(MlflowClient(store).search_registered_models())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("models:/autoencoder@nobody", "alias nobody not found"),
        ("models:/autoencoder/99", "version=99"),
        ("models:/nothing@champion", "name=nothing not found"),
        ("autoencoder", "is named models:/NAME@ALIAS"),
        ("models:/autoencoder/../x@champion", "is named models:/NAME@ALIAS"),
    ],
)
def test_unknown_model_is_one_line_and_makes_no_folder(registered, tmp_path, name, message):
    with pytest.raises(UserError, match=message) as caught:
        pull(name, tmp_path / "out", registered["uri"])

    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pull_does_not_touch_a_folder_in_use(registered, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    with pytest.raises(UserError, match="new or empty folder"):
        pull("models:/autoencoder@champion", tmp_path, registered["uri"])

    assert files_of(tmp_path) == {"mine.txt"}


def test_misspelt_database_is_not_created(tmp_path):
    with pytest.raises(UserError, match="no registry at"):
        list_models(f"sqlite:///{tmp_path / 'typo.db'}")

    assert not list(tmp_path.iterdir())


# ---- what else is going on in MLflow


def test_runs_that_are_open_elsewhere_are_left_alone(vector_bundle, store, tmp_path, monkeypatch):
    client = MlflowClient(store)
    experiment = client.create_experiment("mine", artifact_location=(tmp_path / "mlruns").as_uri())
    other = client.create_run(experiment, run_name="somebody's").info.run_id
    (tmp_path / "metrics.json").write_text('{"l1": 0.1}')
    mlflow.set_tracking_uri(store)
    try:
        with mlflow.start_run(experiment_id=experiment) as active:
            monkeypatch.setenv("MLFLOW_RUN_ID", other)
            register_bundle(vector_bundle, "vectors", store, metrics=tmp_path / "metrics.json")
            logged = log_run(store, "mine", "a report", {"n": 2, "split": "test"}, [tmp_path / "metrics.json"])
            mlflow.set_tracking_uri(store)
    finally:
        mlflow.set_tracking_uri(None)

    version = client.get_model_version("vectors", "1")
    made = [client.get_run(run_id) for run_id in (version.run_id, logged)]
    assert [(run.info.run_name, run.info.status) for run in made] == [("vectors", "FINISHED"), ("a report", "FINISHED")]
    assert [run.data.metrics for run in made] == [{"l1": 0.1}, {"n": 2.0}]
    assert made[1].data.tags["split"] == "test"
    assert [file.path for file in client.list_artifacts(logged)] == ["metrics.json"]
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert [(metric.key, metric.value) for metric in model.metrics] == [("l1", 0.1)]
    assert client.get_run(other).info.status == "RUNNING"
    assert not client.get_run(other).data.metrics
    assert not client.get_run(active.info.run_id).data.metrics


def test_registry_that_a_variable_names_is_not_the_one_that_was_asked_for(vector_bundle, store, tmp_path, monkeypatch):
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", elsewhere)

    register_bundle(vector_bundle, "vectors", store, "best")

    assert [model.name for model in list_models(store)] == ["vectors"]
    assert files_of(pull("models:/vectors@best", tmp_path / "pulled", store)) > files_of(vector_bundle)
    assert not (tmp_path / "elsewhere.db").exists()
    assert (os.environ["MLFLOW_REGISTRY_URI"], mlflow.get_registry_uri()) == (elsewhere, elsewhere)


def test_tables_of_a_new_database_are_made_by_one_process_alone(tmp_path, monkeypatch):
    held, ask = [], MlflowClient.search_registered_models

    def search(client, **kwargs):
        with locked(tmp_path / ".mlflow.db.lock") as free:
            held.append(not free)
        return ask(client, **kwargs)

    monkeypatch.setattr(MlflowClient, "search_registered_models", search)
    with connection(f"sqlite:///{tmp_path / 'mlflow.db'}", create=True):
        with locked(tmp_path / ".mlflow.db.lock") as free:
            assert free  # an upload keeps nobody waiting

    assert held == [True]


def test_registrations_that_begin_at_the_same_time_share_experiment_and_model(vector_bundle, store, monkeypatch):
    client = MlflowClient(store)
    looks = {"get_experiment_by_name": None, "search_registered_models": []}
    for name, nothing in looks.items():
        ask = getattr(MlflowClient, name)

        def look(self, *args, ask=ask, nothing=nothing, seen=[], **kwargs):  # noqa: B006
            if kwargs.get("max_results") == 1 or seen:
                return ask(self, *args, **kwargs)
            seen.append(1)  # made by another process after this look at it
            return nothing

        monkeypatch.setattr(MlflowClient, name, look)
    client.create_experiment("vectors")
    client.create_registered_model("vectors")

    assert register_bundle(vector_bundle, "vectors", store) == 1


def test_model_that_another_process_has_given_a_version_is_not_deleted(vector_bundle, store, monkeypatch):
    create = MlflowClient.create_model_version

    def too_late(client, name, **kwargs):
        create(client, name, kwargs["source"])
        raise MlflowException("disk full")

    monkeypatch.setattr(MlflowClient, "create_model_version", too_late)
    with pytest.raises(UserError, match="disk full"):
        register_bundle(vector_bundle, "vectors", store)

    assert [version.version for version in MlflowClient(store).search_model_versions("name = 'vectors'")] == [1]


# ---- archives, trainings, pictures


def test_archive_of_a_bundle_is_registered_as_its_folder(vector_bundle, store, tmp_path):
    archive = write_zip(vector_bundle, tmp_path / "vectors_v0.2.0.zip")

    version = register_bundle(archive, "vectors", store)

    pulled = pull(f"models:/vectors/{version}", tmp_path / "pulled", store)
    assert files_of(pulled) == files_of(vector_bundle) | {"checksums.json"}
    assert MlflowClient(store).get_model_version("vectors", "1").tags["bundle"] == "vectors"


def make_training(folder: Path, run_name: str, weights: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run_name": run_name}))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "best.json").write_text(json.dumps({"metric": "val_l1", "value": 1.0, "model_sha256": digest}))
    return folder


def test_version_names_the_run_of_its_training_and_what_that_was_made_from(vector_bundle, store, tmp_path):
    training = make_training(tmp_path / "out", "vectors-1", vector_bundle / "models" / "model.pt")
    client = MlflowClient(store)
    experiment = client.create_experiment("vectors", artifact_location=(tmp_path / "mlruns").as_uri())
    run = client.create_run(experiment, run_name="vectors-1")
    record = {"generator_sha256": "a" * 64, "autoencoder": "b" * 64, "generator": "models:/gan/3", "space": "z"}
    (vector_bundle / "models" / "trained_as.json").write_text(json.dumps(record))

    register_bundle(vector_bundle, "vectors", store, training=training)

    version = client.get_model_version("vectors", "1")
    lineage = {"generator_sha256": "a" * 64, "autoencoder_sha256": "b" * 64, "generator": "models:/gan/3"}
    assert version.tags["training_run_id"] == run.info.run_id
    assert {key: version.tags[key] for key in lineage} == lineage
    assert version.tags["model_sha256"] == hashlib.sha256((vector_bundle / "models/model.pt").read_bytes()).hexdigest()
    assert f"run vectors-1, {run.info.run_id}" in version.description
    assert client.get_run(version.run_id).data.tags["mlflow.parentRunId"] == run.info.run_id


def test_training_is_known_by_its_journal_whatever_other_runs_are_called(vector_bundle, store, tmp_path):
    training = make_training(tmp_path / "out", "vectors", vector_bundle / "models" / "model.pt")
    Journal(training, "earlier", "trainings").close()
    journal = Journal(training, "vectors", "trainings")
    journal.close()
    client = MlflowClient(store)
    experiment = client.create_experiment("trainings", artifact_location=(tmp_path / "mlruns").as_uri())
    run = client.create_run(experiment, run_name="vectors", tags={"medgen.journal": journal.header["id"]})
    client.create_run(experiment, run_name="vectors", tags={"medgen.journal": "of another folder"})
    client.create_run(experiment, run_name="vectors")

    register_bundle(vector_bundle, "vectors", store, training=training)

    assert client.get_model_version("vectors", "1").tags["training_run_id"] == run.info.run_id
    # sent to another registry than this one
    client.delete_run(run.info.run_id)
    with pytest.raises(UserError, match=r"knows no run vectors .*; send it with `medgen tracking send"):
        register_bundle(vector_bundle, "vectors", store, training=training)
    # with no journal there is the name alone, and several have it
    shutil.rmtree(training / "tracking")
    with pytest.raises(UserError, match=r"must know one run vectors of the training in .*, got several of that name"):
        register_bundle(vector_bundle, "vectors", store, training=training)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda out: (out / "run.json").unlink(), r"no run\.json in .*; name the output folder of the training"),
        (lambda out: None, r"knows no run vectors-1 .*; send it with `medgen tracking send"),
        (
            lambda out: (out / "best.json").write_text(json.dumps({"model_sha256": "c" * 64})),
            r"are not the best ones of the training in .*, cccccccccccc; name those with --weights",
        ),
    ],
)
def test_training_that_does_not_go_with_the_weights_is_refused(vector_bundle, store, tmp_path, prepare, message):
    training = make_training(tmp_path / "out", "vectors-1", vector_bundle / "models" / "model.pt")
    prepare(training)

    with pytest.raises(UserError, match=message):
        register_bundle(vector_bundle, "vectors", store, training=training)

    assert not list(MlflowClient(store).search_registered_models())


def test_pictures_are_kept_without_their_files_notes(vector_bundle, store, tmp_path):
    notes, exif = PngInfo(), Image.Exif()
    notes.add_text("PatientName", "Doe^Jane")
    exif[0x010E] = "Doe^Jane"
    Image.new("L", (8, 8), 77).save(tmp_path / "grid of samples.png", pnginfo=notes, exif=exif)

    register_bundle(vector_bundle, "vectors", store, pictures=[tmp_path / "grid of samples.png"])

    kept = stored_bundle(store, "vectors", 1).parents[1] / "pictures" / "grid_of_samples.png"
    assert b"Doe" not in kept.read_bytes()
    with Image.open(kept) as image:
        assert image.getpixel((3, 3)) == 77
    assert MlflowClient(store).get_model_version("vectors", "1").tags["pictures"] == "grid_of_samples.png"


def test_bundle_that_can_be_served_is_registered_with_a_picture_of_what_it_does(registered):
    with Image.open(stored_bundle(registered["uri"], "autoencoder", 1).parents[1] / "pictures/example.png") as image:
        assert image.width == 2 * image.height + 4  # a phantom beside its reconstruction


@pytest.mark.parametrize("content", [None, b"not a picture"])
def test_picture_that_is_none_is_refused(vector_bundle, store, tmp_path, content):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)

    with pytest.raises(UserError, match=r"x\.png"):
        register_bundle(vector_bundle, "vectors", store, pictures=[tmp_path / "x.png"])

    assert not list(MlflowClient(store).search_registered_models())


# ---- what a URI points at


def test_uri_resolves_to_name_number_and_what_mlflow_calls_the_model(registered):
    found = resolve("models:/autoencoder@champion", registered["uri"])

    version = MlflowClient(registered["uri"]).get_model_version("autoencoder", "1")
    assert (found.name, found.version, f"models:/{found.model_id}") == ("autoencoder", 1, version.source)
    assert found.tags["bundle_sha256"] == version.tags["bundle_sha256"]


def test_version_that_is_no_bundle_is_told_apart(store, tmp_path):
    client = MlflowClient(store)
    client.create_registered_model("raw")
    client.create_model_version("raw", source=tmp_path.as_uri())

    for ask in (lambda: resolve("models:/raw/1", store), lambda: pull("models:/raw/1", tmp_path / "out", store)):
        with pytest.raises(UserError, match=r"models:/raw/1 is not a registered bundle; register one with"):
            ask()


@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:9", "https://:secret@mlflow.local/"])
def test_address_with_a_password_is_refused_without_repeating_it(uri):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        list_models(uri)

    assert "secret" not in str(caught.value)
