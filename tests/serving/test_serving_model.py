"""Bundles as MLflow models: signature, metadata, sources, pictures."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server

from medgen._pyfunc import BundleModel
from medgen.errors import UserError
from medgen.serving import app, describe, example, limits, load_service, save_model, serve
from medgen.serving.app import LimitedBody
from medgen.serving.guard import RequestError, guard_scoring_server, refused
from medgen.serving.sampling import GeneratorService
from medgen.serving.tensors import TensorFormat, TensorService


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
        ("augmentation_classifier", (), (1, ["32*n", "32*n"]), (2, [])),
        ("cxr_pggan", (), (128, []), (1, [64, 64])),
        ("stylegan2_anomaly", (), (128, []), (1, [64, 64])),
        ("skin_sngan", (), (128, []), (3, [32, 32])),
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


def test_example_that_needs_a_text_model_is_left_out(make_bundle, caplog):
    assert example(make_bundle("cxr_latent_diffusion")) == []
    assert "no example picture: this model's text model does not lie on the server" in caplog.text


def test_example_that_fails_is_no_model_without_pictures(make_bundle, monkeypatch):
    def fail(*_):
        raise UserError("the projection of the image diverged")

    monkeypatch.setattr(GeneratorService, "answer", fail)

    with pytest.raises(UserError, match="diverged"):
        example(make_bundle("cxr_pggan"))


# ---------------------------------------------------------------- errors and the server


def test_line_of_an_error_cannot_be_overwritten():
    error = RequestError("seed must be a number")
    error.message = "Failed to predict data 'iVBOR...'"

    assert json.loads(error.serialize_as_json())["message"] == "seed must be a number"
    assert error.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("kind", "status"), [(UserError, 400), (limits.UnavailableError, 503), (limits.LateError, 504)]
)
def test_status_says_whose_fault_it_is(kind, status):
    assert refused(kind("not now")).get_http_status_code() == status


def test_failure_of_the_model_is_logged_without_its_values(caplog):
    def service(model_input, params):
        raise RuntimeError(f"could not convert {model_input}")

    model = BundleModel()
    model.service = service

    with pytest.raises(RequestError, match="the model failed on this request"):
        model.predict(None, "John Doe")

    assert "RuntimeError" in caplog.text
    assert "in service" in caplog.text
    assert "Doe" not in caplog.text


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
        assert not messages  # a client that is still sending would be reset


def limited(length: int, chunks: int) -> tuple[list[dict], int]:
    """What is sent for a body of so many chunks of 50 bytes that says its length, and how many of them were read."""
    sent: list[dict] = []
    read = 0

    async def app(scope, receive, send):
        raise AssertionError

    async def receive():
        nonlocal read
        assert sent, "read before it was answered"
        read += 1
        return {"type": "http.request", "body": b"x" * 50, "more_body": read < chunks}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"content-length", str(length).encode())]}
    asyncio.run(LimitedBody(app, 100)(scope, receive, send))
    return sent, read


def test_length_that_is_declared_is_answered_at_once_and_read_to_its_end():
    sent, read = limited(500, 10)

    assert (sent[0]["status"], read) == (413, 10)
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()


def test_body_without_an_end_is_not_read_for_ever():
    assert limited(10**12, 10**10)[1] == 17  # eight times the limit, and one


def test_model_that_cannot_be_loaded_is_not_taken_for_an_app_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "app.py").write_text("None.weights\n")
    monkeypatch.setattr(scoring_server, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlflow.pyfunc.scoring_server.app", raising=False)

    with pytest.raises(RuntimeError, match="the model cannot be loaded: 'NoneType' object has no attribute 'weights'"):
        app.app  # noqa: B018


@pytest.fixture
def guarded(monkeypatch):
    """Asks a guarded server, whose own part is given."""

    def ask(service, body, answer=lambda body: body):
        monkeypatch.setenv(scoring_server._SERVER_MODEL_PATH, "file:/model")
        monkeypatch.setattr(scoring_server, "invocations", lambda body, *_: answer(body))
        guard_scoring_server(service)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return scoring_server.invocations(data, "application/json", None, None)

    return ask


@pytest.fixture(scope="module")
def service(make_bundle):
    return load_service(make_bundle("cxr_autoencoder_kl"), "cpu")


@pytest.mark.parametrize(
    "body",
    [
        {"instances": [{"img": "a"}, {"image": "b"}]},
        {"instances": [{"image": "a"}, "b"]},
        {"instances": [{"image": "a"}, {}]},
        {"inputs": {"image": ["a"], "Doe": ["b"]}},
        {"inputs": {"Doe": ["a"]}},
        {"inputs": [{"image": "a", "Doe": "b"}]},
        {"dataframe_records": [{"Doe": "a"}]},
        {"dataframe_records": ["Doe"]},
        {"dataframe_split": {"columns": ["image", "Doe"], "data": [["a", "b"]]}},
        {"dataframe_split": {"columns": ["image", "image"], "data": [["a", "b"]]}},
        {"dataframe_split": {"columns": "Doe", "data": [["a"]]}},
    ],
)
def test_entry_that_would_be_left_out_is_refused(guarded, service, body):
    with pytest.raises(
        RequestError, match=r"each entry of .* must have image and nothing else, got .* in entry"
    ) as told:
        guarded(service, body)
    assert "Doe" not in told.value.message
    assert told.value.message.endswith('send {"inputs": {"image": ["<base64 PNG>"]}}')


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"inputs": {}},
        {"inputs": {"image": "a"}},
        {"inputs": ["a", "b"]},
        {"inputs": [{"image": "a"}]},
        {"instances": [{"image": "a"}, {"image": "b"}]},
        {"dataframe_records": []},
        {"dataframe_split": {"columns": ["image"], "data": [["a"]]}},
        {"dataframe_split": {"data": []}},
    ],
)
def test_good_request_reaches_mlflow_as_it_was_read(guarded, service, body):
    assert guarded(service, body) == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            b'{"inputs": [' + b"[]," * 2**19 + b"[]]}",
            "at most 524288 lists and objects, got 524291; send images as PNG",
        ),
        (b'{"inputs": [' + b"0," * (2**23 + 1) + b"0]}", "at most 8388608 numbers, got 8388609; send images as PNG"),
        (b'{"inputs": [' + b"0," * 2**14 + b"0]}", "inputs may have at most 16384 entries, got 16385"),
        (b'{"inputs": {"image": [' + b"0," * 2**14 + b"0]}}", "inputs may have at most 16384 entries, got 16385"),
    ],
)
def test_small_text_of_a_large_tree_is_refused(guarded, service, body, message):
    with pytest.raises(RequestError, match=message):
        guarded(service, body)


def test_nothing_of_what_mlflow_says_is_told(guarded, service):
    def fail(body):
        raise MlflowException("Invalid input. Failed to convert data: John Doe")

    with pytest.raises(RequestError) as told:
        guarded(service, {"inputs": ["a"]}, fail)
    assert told.value.message == 'the inputs do not fit the model; send {"inputs": {"image": ["<base64 PNG>"]}}'


def test_model_of_numbers_is_told_to_be_sent_numbers(guarded):
    def fail(body):
        raise MlflowException("Incompatible input types")

    service = TensorService(torch.nn.Conv2d(1, 1, 1), TensorFormat("image", 1, ("8*n", "8*n")))
    with pytest.raises(RequestError) as told:
        guarded(service, {"inputs": {"image": ["a"]}}, fail)
    assert told.value.message == 'the inputs do not fit the model; send {"inputs": <numbers of shape (B, 1, 8*n, 8*n)>}'


def test_time_of_a_request_counts_from_its_arrival(guarded, service, monkeypatch):
    monkeypatch.setenv("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", "100")
    monkeypatch.setattr(limits, "monotonic", lambda: 94.0)
    arrived = limits.ARRIVED.set(0.0)
    try:
        assert guarded(service, {"inputs": []}, lambda body: limits.seconds_left()) == 1.0
    finally:
        limits.ARRIVED.reset(arrived)


# ---------------------------------------------------------------- the process of the server


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A model's folder, and the servers that were started for it; none is a process."""
    (tmp_path / "code" / "medgen" / "serving").mkdir(parents=True)
    (tmp_path / "MLmodel").touch()
    servers = []

    class Server:
        on_start = staticmethod(lambda: None)
        on_wait = staticmethod(lambda: None)

        def __init__(self, command, env):
            self.command, self.env, self.calls, self.status = command, env, [], None
            servers.append(self)
            self.on_start()

        def terminate(self):
            self.calls.append("terminate")
            self.status = -signal.SIGTERM

        def wait(self, timeout=None):
            self.calls.append("wait")
            if timeout is None and self.status is None:
                self.on_wait()
                self.status = 0
            return self.status

        def poll(self):
            return self.status

    monkeypatch.setattr("medgen.serving.server.subprocess.Popen", Server)
    return SimpleNamespace(folder=tmp_path, servers=servers, kind=Server)


def test_time_limit_is_that_of_mlflow(started):
    assert serve(started.folder, timeout=7) == 0
    assert started.servers[0].env["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] == "7"
    with pytest.raises(UserError, match="timeout must be at least 1 second, got 0"):
        serve(started.folder, timeout=0)


def test_server_can_be_waited_for_in_a_thread(started):
    found = []
    thread = threading.Thread(target=lambda: found.append(serve(started.folder)))
    thread.start()
    thread.join()

    assert found == [0]


def test_signal_while_the_server_starts_is_not_lost(started):
    before = signal.getsignal(signal.SIGTERM)
    started.kind.on_start = staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM))

    assert serve(started.folder) == -signal.SIGTERM
    assert started.servers[0].calls[0] == "terminate"
    assert signal.getsignal(signal.SIGTERM) is before


def test_server_is_ended_with_what_waits_for_it(started):
    def fail():
        raise OSError("gone")

    started.kind.on_wait = staticmethod(fail)

    with pytest.raises(OSError, match="gone"):
        serve(started.folder)
    assert started.servers[0].calls == ["wait", "terminate", "wait"]


def test_folder_without_a_model_is_not_served(tmp_path):
    with pytest.raises(UserError, match="no model of a registered bundle in"):
        serve(tmp_path)
