"""Bundles through the MLflow registry and back: SQLite in a temporary folder, freshly initialised weights."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigParser
from torch import nn
from typer.testing import CliRunner

from medgen import cli
from medgen._pyfunc import BundleModel, TensorFormat
from medgen.errors import UserError
from medgen.registry import list_models, pull, register_bundle

AUTOENCODER = Path(__file__).parents[1] / "bundles" / "cxr_autoencoder_kl"
METRICS = {"ms_ssim": 0.97, "psnr": 31.5, "l1": 0.02, "n": 8, "git": "abc123", "split": "test", "fid": float("nan")}
PINS = {"monai_version": "1.6.1", "pytorch_version": "2.15.0", "numpy_version": "2.4.6"}


@pytest.fixture(autouse=True)
def _no_other_registry(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def network_of(bundle: Path, overlay: dict | None = None) -> nn.Module:
    config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
    return ConfigParser(config | (overlay or {})).get_parsed_content("network_def").eval()


def make_vector_bundle(folder: Path) -> Path:
    """A complete bundle whose network takes latent vectors: (B, 4) to (B, 2)."""
    tensor = {"spatial_shape": [], "dtype": "float32"}
    data_format = {"inputs": {"z": {**tensor, "num_channels": 4}}, "outputs": {"pred": {**tensor, "num_channels": 2}}}
    metadata = {"version": "0.2.0", **PINS, "required_packages_version": {}, "network_data_format": data_format}
    inference = {"network_def": {"_target_": "torch.nn.Linear", "in_features": "@width", "out_features": 2}, "width": 4}
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "LICENSE").write_text("as you like\n")
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    torch.save(nn.Linear(4, 2).state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture
def vector_bundle(tmp_path) -> Path:
    return make_vector_bundle(tmp_path / "vectors")


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """MLflow's tables without content; to make them takes seconds, to copy them nothing."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def store(empty_database, tmp_path) -> str:
    """Tracking URI of an empty registry."""
    (tmp_path / "store").mkdir()
    return f"sqlite:///{shutil.copy(empty_database, tmp_path / 'store' / 'mlflow.db')}"


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


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored_bundle(uri: str, name: str, version: int) -> Path:
    """The folder in the artifact store that holds a registered bundle."""
    database = Path(uri.removeprefix("sqlite:///"))
    model_id = MlflowClient(uri).get_model_version(name, str(version)).source.removeprefix("models:/")
    return database.parent / "mlruns" / "models" / model_id / "artifacts" / "artifacts" / "bundle"


# ---- what comes back


def test_pulled_bundle_computes_what_the_registered_network_computed(registered, pulled):
    network = network_of(pulled)
    network.load_state_dict(torch.load(pulled / "models" / "model.pt", weights_only=True))
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        assert torch.equal(network(images), registered["network"](images))


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

    for path in (registered["folder"], tempfile.gettempdir(), Path.home(), Path(__file__).parents[1], "file:"):
        assert str(path) not in text


def test_version_carries_card_signature_requirements_and_provenance(registered):
    version = MlflowClient(registered["uri"]).get_model_version("autoencoder", "1")
    model = stored_bundle(registered["uri"], "autoencoder", 1).parents[1]
    metadata = json.loads((AUTOENCODER / "configs" / "metadata.json").read_text())
    description = mlflow.models.Model.load(model)

    assert version.description.startswith("# A card\n")
    assert len(version.description) == 5000  # column width in MLflow's database
    assert description.signature.inputs.inputs[0].shape == (-1, 1, -1, -1)
    assert description.signature.inputs.inputs[0].name is None
    assert description.signature.inputs.inputs[0].type == np.float32
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


# ---- list


def test_list_gives_versions_aliases_bundle_and_metrics_in_file_order(registered):
    bundle_version = json.loads((AUTOENCODER / "configs" / "metadata.json").read_text())["version"]

    first, second = list_models(registered["uri"])

    assert (first.name, first.version, first.aliases) == ("autoencoder", 1, ("champion",))
    assert first.bundle == f"cxr_autoencoder_kl {bundle_version}"
    assert list(first.metrics) == ["ms_ssim", "psnr", "l1", "n"]
    assert (second.version, second.aliases, dict(second.metrics)) == (2, (), {})
    assert first.created <= second.created


def test_list_command_prints_an_aligned_table(registered):
    result = CliRunner().invoke(cli.app, ["registry", "list", "--tracking_uri", registered["uri"]])

    header, first, second = result.stdout.splitlines()
    for column, cell in (("VERSION", "1"), ("ALIASES", "champion"), ("BUNDLE", "cxr_"), ("METRICS", "ms_ssim 0.97")):
        assert first[header.index(column) :].startswith(cell)
    assert second[header.index("METRICS") :] == "-"


def test_commands_register_and_pull(vector_bundle, tmp_path):
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


def test_command_that_fails_says_why_in_one_line(tmp_path):
    result = CliRunner().invoke(cli.app, ["registry", "list", "--tracking_uri", f"sqlite:///{tmp_path / 'typo.db'}"])

    assert result.exit_code == 1
    assert re.fullmatch(r"error: no registry at .*typo\.db; .*\n", result.output)


# ---- predict


@pytest.mark.slow(reason="a fresh process imports MONAI")
def test_fresh_process_predicts_what_the_network_computes(registered, tmp_path):
    images = torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "images.npy", images.numpy())
    program = (
        "import mlflow, numpy as np\n"
        "model = mlflow.pyfunc.load_model('models:/autoencoder@champion')\n"
        "images = np.load('images.npy')\n"
        "np.save('predicted.npy', model.predict(images))\n"
        "for bad in (images[..., :44], np.where(images > 0.5, np.nan, images).astype('float32')):\n"
        "    try:\n"
        "        model.predict(bad)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )

    # the device is pinned: on a GPU the results would differ in the last digits
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": registered["uri"],
        "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )

    predicted = np.load(tmp_path / "predicted.npy")
    with torch.inference_mode():
        expected = registered["network"](images).numpy()
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted, expected, atol=1e-6)
    size, finite = done.stdout.splitlines()
    assert "(B, 1, 8*n, 8*n), got (2, 1, 32, 44)" in size
    assert "finite" in finite


def test_network_of_latent_vectors_is_served_by_the_same_code(vector_bundle, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cpu")
    register_bundle(vector_bundle, "vectors", store)
    state = torch.load(vector_bundle / "models" / "model.pt", weights_only=True)
    z = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    predicted = mlflow.pyfunc.load_model(str(stored_bundle(store, "vectors", 1).parents[1])).predict(z)

    np.testing.assert_allclose(predicted, z @ state["weight"].numpy().T + state["bias"].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "shape", "fits"),
    [
        (("8*n", "8*n"), (2, 1, 64, 24), True),
        (("8*n", "8*n"), (2, 1, 64, 20), False),
        (("8*n", "8*n"), (2, 3, 64, 24), False),  # channels
        (("8*n", "8*n"), (1, 64, 24), False),  # no batch
        (("8*n", "8*n"), (0, 1, 64, 24), False),
        (("8*n", "8*n"), (1, 1, 0, 8), False),
        ((64, "*"), (2, 1, 64, 7), True),
        ((64, "*"), (2, 1, 32, 7), False),
        (("2**p*n", "n"), (2, 1, 6, 7), True),
        ((), (5, 1), True),
    ],
)
def test_input_must_have_the_shape_of_the_metadata(sizes, shape, fits):
    tensor, batch = TensorFormat("image", 1, sizes), np.zeros(shape, np.float32)

    if fits:
        tensor.check(batch)
    else:
        with pytest.raises(UserError, match=re.escape(f"got {shape}")):
            tensor.check(batch)


def test_network_that_returns_several_tensors_is_named_as_the_cause():
    model = BundleModel()
    model.format, model.device, model.network = TensorFormat("z", 4, ()), torch.device("cpu"), lambda x: (x, x)

    with pytest.raises(UserError, match="must return one tensor, got tuple"):
        model.predict(None, np.zeros((1, 4), np.float32))


# ---- refusals before anything is written


class Evil:
    """Unpickles by making a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_model_file_that_holds_code_is_refused_without_running_it(vector_bundle, tmp_path):
    marker = tmp_path / "executed"
    (vector_bundle / "models" / "model.pt").write_bytes(pickle.dumps(Evil(marker)))

    with pytest.raises(UserError, match="not a file of plain weights"):
        register_bundle(vector_bundle, "vectors", f"sqlite:///{tmp_path / 'mlflow.db'}")

    assert not marker.exists()
    assert not (tmp_path / "mlflow.db").exists()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name must be"),
        ({"name": ""}, "name must be"),
        ({"alias": "v3"}, "keeps the aliases"),
        ({"alias": "Latest"}, "keeps the aliases"),
        ({"metrics": '{"dice": {"mean": 1}}'}, "flat object .* got dict at 'dice'"),
        ({"metrics": "[1]"}, "JSON object, got a list"),
        ({"metrics": "{"}, "must be a JSON file"),
        ({"overlays": '{"chanels": 3}'}, "sets chanels, which is no top-level id of inference.json"),
        ({"tracking_uri": "file:///x"}, "must be a database or a server"),
        ({"tracking_uri": "mlruns"}, "must be a database or a server"),
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


def test_absent_server_is_one_line_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = free.getsockname()[1]

        with pytest.raises(UserError, match=f"no MLflow registry answers at http://127.0.0.1:{port}") as caught:
            list_models(f"http://user:secret@127.0.0.1:{port}")

    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- tampered artifacts


@pytest.fixture(scope="module")
def vector_store(tmp_path_factory, empty_database) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tampered")
    return f"sqlite:///{shutil.copy(empty_database, folder)}", make_vector_bundle(folder / "vectors")


def change_weights(stored: Path) -> None:
    torch.save(nn.Linear(4, 2).state_dict(), stored / "models" / "model.pt")


def change_weights_and_list(stored: Path) -> None:
    change_weights(stored)
    sums = json.loads((stored / "checksums.json").read_text())
    sums["models/model.pt"] = hashlib.sha256((stored / "models" / "model.pt").read_bytes()).hexdigest()
    (stored / "checksums.json").write_text(json.dumps(sums))


def add_file(stored: Path) -> None:
    (stored / "configs" / "logging.conf").write_text("")


def remove_file(stored: Path) -> None:
    (stored / "LICENSE").unlink()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_weights, "models/model.pt of .* was changed"),
        (change_weights_and_list, "checksums.json of .* was changed"),
        (add_file, "configs/logging.conf of .* was changed"),
        (remove_file, "lacks LICENSE"),
    ],
)
def test_files_that_are_not_the_registered_ones_are_refused(vector_store, tmp_path, tamper, message):
    uri, bundle = vector_store
    version = register_bundle(bundle, "vectors", uri)
    tamper(stored_bundle(uri, "vectors", version))

    with pytest.raises(UserError, match=message):
        pull(f"models:/vectors/{version}", tmp_path / "out", uri)

    assert not list(tmp_path.iterdir())  # neither the target nor what was downloaded for it


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "configs/../../outside.txt", "..\\outside.txt"])
def test_path_that_leaves_the_target_is_refused_even_with_a_matching_digest(vector_store, tmp_path, name):
    uri, bundle = vector_store
    version = register_bundle(bundle, "vectors", uri)
    sums = stored_bundle(uri, "vectors", version) / "checksums.json"
    sums.write_text(json.dumps({**json.loads(sums.read_text()), name: "0" * 64}))
    digest = hashlib.sha256(sums.read_bytes()).hexdigest()
    MlflowClient(uri).set_model_version_tag("vectors", str(version), "bundle_sha256", digest)

    with pytest.raises(UserError, match="names a file outside the bundle"):
        pull(f"models:/vectors/{version}", tmp_path / "out", uri)

    assert not list(tmp_path.iterdir())


def test_symbolic_link_in_the_store_does_not_reach_the_target(vector_store, tmp_path):
    uri, bundle = vector_store
    version = register_bundle(bundle, "vectors", uri)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (stored_bundle(uri, "vectors", version) / "configs" / "link.json").symlink_to(secret)

    with pytest.raises(UserError, match=r"link\.json"):
        pull(f"models:/vectors/{version}", tmp_path / "out", uri)

    assert files_of(tmp_path) == {"secret.txt"}
