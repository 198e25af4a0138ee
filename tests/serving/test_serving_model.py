"""Bundles as MLflow models: signature, metadata, sources, pictures."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server

from medgen.errors import UserError
from medgen.serving import describe, example, load_service, save_model, serve
from medgen.serving.app import LimitedBody
from medgen.serving.guard import RequestError, guard_scoring_server, refused


def data_format(bundle: Path) -> dict:
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return {side: next(iter(tensors.values())) for side, tensors in metadata["network_data_format"].items()}


@pytest.fixture
def copied(make_bundle, tmp_path):
    """A bundle of one's own."""
    return lambda name, *overlays: Path(shutil.copytree(make_bundle(name, *overlays), tmp_path / name))


# ---------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("name", "overlays", "given", "returned"),
    [
        ("cxr_pggan", (), (128, []), (1, [64, 64])),
        ("stylegan2_anomaly", (), (128, []), (1, [64, 64])),
        ("cxr_inversion_encoder", (), (1, [64, 64]), (1, [128])),
        ("cxr_inversion_encoder", ("w_plus",), (1, [64, 64]), (10, [128])),
        ("cxr_autoencoder_kl", (), (1, ["8*n", "8*n"]), (1, ["8*n", "8*n"])),
        ("cxr_latent_diffusion", (), (3, ["8*n", "8*n"]), (3, ["8*n", "8*n"])),
        ("cxr_latent_diffusion", ("labels",), (3, ["8*n", "8*n"]), (3, ["8*n", "8*n"])),
        ("lung_segmentation", (), (1, ["32*n", "32*n"]), (1, ["32*n", "32*n"])),
    ],
)
def test_metadata_becomes_that_of_the_network(copied, name, overlays, given, returned):
    bundle = copied(name, *overlays)

    describe(bundle)

    found = data_format(bundle)
    assert (found["inputs"]["num_channels"], found["inputs"]["spatial_shape"]) == given
    assert (found["outputs"]["num_channels"], found["outputs"]["spatial_shape"]) == returned
    assert len(found["outputs"]["channel_def"]) in (1, returned[0])


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("outputs", {"spatial_shape": ["4*n", "4*n"]}, r"must return \['4\*n', '4\*n'\] for \['8\*n', '8\*n'\]"),
        ("inputs", {"dtype": "uint8"}, "one float32 tensor, got image"),
    ],
)
def test_network_that_does_not_do_what_is_declared_is_refused(copied, side, change, message):
    bundle = copied("cxr_autoencoder_kl")
    path = bundle / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    next(iter(metadata["network_data_format"][side].values())).update(change)
    path.write_text(json.dumps(metadata))

    with pytest.raises(UserError, match=message) as caught:
        describe(bundle)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def saved(make_bundle, tmp_path_factory):
    """Saves bundles as models, each once; returns the folders of the stages."""
    stages = {}

    def save(name: str) -> Path:
        if name not in stages:
            stage = stages[name] = tmp_path_factory.mktemp("stage")
            shutil.copytree(make_bundle(name), stage / "bundle")
            metadata = json.loads((stage / "bundle/configs/metadata.json").read_text())
            model = save_model(stage, metadata, {"bundle": name}, ["torch==2.15.0", "monai==1.6.1"])
            model.save(stage / "model" / "MLmodel")
        return stages[name]

    return save


def test_image_is_any_column_and_parameters_have_defaults(saved):
    signature = Model.load(saved("cxr_autoencoder_kl") / "model").signature

    (column,) = signature.inputs.inputs
    assert (column.name, column.required) == ("image", False)
    assert {spec.name: spec.default for spec in signature.params.params} == {"latent": False, "format": "png"}


def test_sampler_has_no_inputs(saved):
    signature = Model.load(saved("cxr_pggan") / "model").signature

    assert signature.inputs is None
    assert [spec.name for spec in signature.params.params] == ["seed", "num_samples", "truncation_psi", "format"]


def test_model_names_no_path_of_this_machine(saved):
    for name in ("cxr_autoencoder_kl", "cxr_pggan"):
        text = "".join((saved(name) / "model" / file).read_text() for file in ("MLmodel", "python_env.yaml"))
        for path in (saved(name), tempfile.gettempdir(), Path.home(), Path(__file__).parents[1], "file:"):
            assert str(path) not in text


def test_sources_travel_with_the_model(saved):
    code = saved("cxr_pggan") / "model" / "code" / "medgen"

    assert (code / "networks" / "pggan.py").is_file()
    assert not [path for path in code.rglob("*") if "test" in path.name]


def test_loaded_model_answers_as_the_service(saved, make_bundle, monkeypatch, png):
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "cpu")
    for name, data, params in (
        ("cxr_autoencoder_kl", {"image": [png]}, {"latent": True}),
        ("cxr_pggan", None, {"seed": 4, "num_samples": 2}),
    ):
        model = mlflow.pyfunc.load_model(str(saved(name) / "model"))
        assert model.predict(data, params=params) == load_service(make_bundle(name), "cpu")(data, params)


def test_input_example_is_a_phantom_that_the_model_takes(saved):
    model = mlflow.pyfunc.load_model(str(saved("cxr_autoencoder_kl") / "model"))

    assert model.predict(model.input_example)[0]["psnr"] > 0


def test_wrong_request_is_both_a_user_error_and_one_of_mlflow(saved):
    model = mlflow.pyfunc.load_model(str(saved("cxr_pggan") / "model"))

    for kind in (UserError, MlflowException):
        with pytest.raises(kind, match="seed must be a whole number"):
            model.predict(None, params={"seed": -1})


def test_bundle_without_serve_json_runs_its_network(copied):
    bundle = copied("cxr_autoencoder_kl")
    shutil.copy(bundle / "configs" / "serve.json", bundle / "configs" / "inference.json")
    (bundle / "configs" / "serve.json").unlink()
    service = load_service(bundle, "cpu")

    assert service(np.zeros((2, 1, 16, 24), np.float32)).shape == (2, 1, 16, 24)
    for batch, message in (
        (np.zeros((2, 1, 16, 20), np.float32), r"\(B, 1, 8\*n, 8\*n\), got \(2, 1, 16, 20\)"),
        (np.full((2, 1, 16, 24), np.nan, np.float32), "must be finite, got 768 NaN"),
    ):
        with pytest.raises(UserError, match=message):
            service(batch)
    with pytest.raises(UserError, match="params must be among none, got 'seed'"):
        service(np.zeros((1, 1, 8, 8)), {"seed": 1})


# ---------------------------------------------------------------- pictures


def test_example_of_a_generator_is_a_grid_of_sixteen(make_bundle):
    (sheet,) = example(make_bundle("cxr_pggan"))

    assert sheet.size == (4 * 64 + 3 * 2,) * 2


def test_example_of_an_image_model_is_a_phantom_and_what_is_made_of_it(make_bundle):
    phantom, reconstruction = example(make_bundle("cxr_autoencoder_kl"))

    assert (phantom.size, reconstruction.size) == ((256, 256), (64, 64))


def test_example_that_needs_a_text_model_is_left_out(make_bundle):
    assert example(make_bundle("cxr_latent_diffusion")) == []


# ---------------------------------------------------------------- errors and the server


def test_line_of_an_error_cannot_be_overwritten():
    error = RequestError("seed must be a number")
    error.message = "Failed to predict data 'iVBOR...'"

    assert json.loads(error.serialize_as_json())["message"] == "seed must be a number"
    assert error.get_http_status_code() == 400


def test_failure_of_the_model_is_told_without_its_values():
    error = refused(RuntimeError("could not convert John Doe"))

    assert error.get_http_status_code() == 500
    assert "Doe" not in error.message
    assert refused(UserError("seed must be 1")).message == "seed must be 1"


def test_guard_changes_nothing_outside_a_scoring_server(monkeypatch):
    monkeypatch.delenv(scoring_server._SERVER_MODEL_PATH, raising=False)
    before = scoring_server.invocations

    guard_scoring_server(None)

    assert scoring_server.invocations is before


@pytest.mark.parametrize(("sizes", "status"), [([40, 40, 20], 200), ([40, 40, 21], 413), ([101], 413)])
def test_body_is_limited_while_it_arrives(sizes, status):
    sent, bodies = [], []
    messages = [
        {"type": "http.request", "body": b"x" * size, "more_body": n + 1 < len(sizes)} for n, size in enumerate(sizes)
    ]

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            bodies.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(LimitedBody(app, 100)({"type": "http"}, receive, send))

    assert sent[0]["status"] == status
    assert bodies == ([b"x" * size for size in sizes] if status == 200 else [])
    if status == 413:
        assert "at most 100 bytes" in json.loads(sent[1]["body"])["message"]


def test_folder_without_a_model_is_not_served(tmp_path):
    with pytest.raises(UserError, match="no model of a registered bundle in"):
        serve(tmp_path)
