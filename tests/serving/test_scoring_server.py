"""``mlflow models serve`` of a bundle: good and bad requests over HTTP."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base64_pictures import as_base64, picture
from mlflow_servers import Server

from medgen.serving import load_service, save_model

pytestmark = pytest.mark.slow(reason="a server is started, which imports MONAI and MLflow")


@pytest.fixture(scope="module")
def model(make_bundle, tmp_path_factory) -> Path:
    """A detector as a model whose own copy of the sources has another word in an error."""
    stage = tmp_path_factory.mktemp("stage")
    shutil.copytree(make_bundle("stylegan2_anomaly"), stage / "bundle")
    metadata = json.loads((stage / "bundle" / "configs" / "metadata.json").read_text())
    save_model(stage, metadata, {}, ["torch==2.15.0"]).save(stage / "model" / "MLmodel")
    source = stage / "model" / "code" / "medgen" / "serving" / "parameters.py"
    source.write_text(source.read_text().replace("; change params.", "; registered: change params."))
    return stage / "model"


@pytest.fixture(scope="module")
def server(model) -> Any:
    """Address of MLflow's own server."""
    command = ["mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    environment = {"OMP_NUM_THREADS": "1", "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cpu"}
    with Server([*command, "-h", "127.0.0.1", "-p", "{port}"], model.parent, **environment) as running:
        yield f"{running.uri}/invocations"


def post(url: str, body: Any, kind: str = "application/json") -> tuple[int, Any]:
    """Status and answer: predictions, or the text of an error."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind} if kind else {})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_image_is_scored_in_every_form_of_a_request(server, make_bundle, png, radiograph):
    params = {"steps": 1}
    array = (radiograph / 255).tolist()
    expected = load_service(make_bundle("stylegan2_anomaly"), "cpu")({"image": png}, params)

    for body in (
        {"inputs": [png]},
        {"inputs": {"image": png}},
        {"inputs": {"image": [png]}},
        {"inputs": {"image": f"data:image/png;base64,{png}"}},
        {"inputs": {"image": array}},
        {"inputs": {"image": [array]}},
        {"instances": [{"image": png}]},
        {"instances": [{"image": array}]},
        {"dataframe_records": [{"image": png}]},
        {"dataframe_split": {"columns": ["image"], "data": [[png]]}},
        {"dataframe_split": {"columns": ["image"], "data": [[array]]}},
    ):
        status, found = post(server, {**body, "params": params})
        assert status == 200, found
        # MLflow rounds nothing, but the arrays are float64 text
        assert found[0]["scores"]["mse_full"] == pytest.approx(expected[0]["scores"]["mse_full"], rel=1e-4)
        assert list(found[0]) == list(expected[0])
        assert picture(found[0]["mse_map"]).shape == radiograph.shape


@pytest.mark.parametrize(
    "body",
    [{"inputs": []}, {"inputs": {}}, {"instances": []}, {"dataframe_records": []}, {"dataframe_split": {"data": []}}],
)
def test_sampler_is_asked_with_empty_inputs(server, make_bundle, body):
    params = {"task": "sample", "seed": 7, "num_samples": 2}

    status, found = post(server, {**body, "params": params})

    assert status == 200, found
    assert found == load_service(make_bundle("stylegan2_anomaly"), "cpu")([], params)


BAD = {
    "no JSON": (b"hello {", "must be a JSON object, got 7 bytes that are no JSON"),
    "not UTF-8": (b"\xff\xfe{}", "are no JSON"),
    "too deep": (b"[" * 200_000, "are no JSON"),
    "a list": ([1], "must be a JSON object .* got a list"),
    "no inputs": ({"params": {}}, "got none"),
    "two inputs": ({"inputs": [], "instances": []}, "got inputs and instances"),
    "misplaced": ({"inputs": [], "seed": 1}, "got 'seed'; parameters belong under"),
    "prompt": ({"prompt": "effusion"}, "got 'prompt'; parameters belong under"),
    "no image": ({"inputs": []}, "takes images, got none"),
    "null": ({"inputs": {"image": None}}, "must be a PNG or JPEG in base64"),
    "number": ({"inputs": [3]}, "got something of type int"),
    "an object": ({"inputs": {"image": {"a": "b"}}}, "must be a PNG or JPEG in base64"),
    "records": ({"dataframe_records": [1, 2]}, "must have image and nothing else, got a int in entry 1 of 2"),
    "misspelt": ({"instances": [{"img": "x"}, {"image": "y"}]}, "must have image and nothing else"),
    "another column": ({"inputs": {"image": ["x"], "name": ["y"]}}, "nothing else, got 2 names in entry 1 of 1"),
    "split": ({"dataframe_split": {"x": 1}}, "the inputs do not fit the model.*; send"),
    "many lists": (b'{"inputs": [' + b"[]," * 2**20 + b"[]]}", "at most 524288 lists and objects"),
    "long seed": (b'{"inputs": [], "params": {"seed": 1' + b"0" * 400 + b"}}", "from 0 to 4294967295, got 1000"),
    "steps of samples": ({"inputs": [], "params": {"task": "sample", "steps": 7}}, "steps belongs to the task score"),
    "base64": ({"inputs": ["!!"]}, "a text that is no base64"),
    "text": ({"inputs": ["aGVsbG8gd29ybGQ="]}, "11 bytes of another kind"),
    "NaN": (b'{"inputs": {"image": [[[NaN, 0.5], [0, 0]]]}}', "must be finite, got 1 NaN"),
    "shape": ({"inputs": {"image": [[[[[0.5]]]]]}}, "with 1 or 3 channels"),
    "ragged": ({"inputs": {"image": [[[0.1, 0.2], [0.3]]]}}, "see that its rows are equal"),
    "range": ({"inputs": {"image": [[[0, 255]] * 20]}}, r"in \[0, 1\], got 0 to 255"),
    "tiny": ({"inputs": {"image": [[[0, 1], [1, 0]]]}}, "at least 16 pixels"),
    "unknown parameter": ({"inputs": [], "params": {"sed": 1}}, "among task, steps, seed, .* got 'sed'"),
    "params": ({"inputs": [], "params": [1]}, "params must be a JSON object of names"),
    "type": ({"inputs": [], "params": {"seed": "one"}}, "seed must be a whole number .* got a text"),
    "seed": ({"inputs": [], "params": {"seed": -1}}, "from 0 to 4294967295, got -1; registered: change params.seed"),
    "samples": ({"inputs": [], "params": {"task": "sample", "num_samples": 17}}, "num_samples .* from 1 to 16, got 17"),
    "steps": ({"inputs": [], "params": {"steps": 1001}}, "steps .* from 1 to 1000, got 1001"),
    "class": ({"inputs": [], "params": {"class_index": 1}}, "got 'class_index'"),
    "task": ({"inputs": [], "params": {"task": "draw"}}, "one of score, sample, got 'draw'"),
    "format": ({"inputs": [], "params": {"format": "gif"}}, "one of png, png16, array, got 'gif'"),
}


@pytest.mark.parametrize(("body", "message"), BAD.values(), ids=BAD)
def test_bad_request_is_400_and_one_line(server, body, message):
    status, answer = post(server, body)

    assert status == 400
    told = json.loads(answer)
    assert "stack_trace" not in told
    assert "\n" not in told["message"]
    assert len(told["message"]) <= 300
    assert re.search(message, told["message"]), told["message"]


@pytest.mark.parametrize("kind", ["", "text/csv", "text/plain", "application/vnd.apache.parquet"])
def test_other_types_than_json_are_refused(server, kind):
    status, answer = post(server, b"image\nabc", kind)

    assert status == 400
    assert "of type application/json" in json.loads(answer)["message"]


@pytest.mark.parametrize("spoil", ["cut", "huge", "parameter"])
def test_refusal_repeats_nothing_of_the_image(server, png, spoil):
    if spoil == "cut":
        png = base64.b64encode(base64.b64decode(png)[:2000]).decode()
    if spoil == "huge":
        png = as_base64(np.zeros((5000, 5000), np.uint8))

    status, answer = post(server, {"inputs": {"image": png}, "params": {"steps": "x" if spoil == "parameter" else 1}})

    assert status == 400
    assert png[:20] not in answer
    assert "data" not in json.loads(answer)["message"]


def test_requests_at_once_have_the_answers_of_requests_by_themselves(server, png):
    bodies = [{"inputs": [], "params": {"task": "sample", "seed": seed}} for seed in range(6)]
    bodies += [{"inputs": [png], "params": {"steps": 1}}] * 2
    alone = [post(server, body) for body in bodies]
    together: dict[int, Any] = {}

    threads = [
        threading.Thread(target=lambda n=n: together.update({n: post(server, bodies[n])})) for n in range(len(bodies))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [together[n] for n in range(len(bodies))] == alone
    assert all(status == 200 for status, _ in alone)
