"""From the first step of a training to answers over HTTP, with a real MLflow server on loopback."""

from __future__ import annotations

import base64
import io
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow_servers import Server, mlflow_server
from PIL import Image
from running import Forked, command, finish, start

REPO = Path(__file__).parents[2]
LUNGS, PGGAN = (REPO / "bundles" / name for name in ("lung_segmentation", "cxr_pggan"))
REAL = REPO.parent / "shared" / "data" / "nih_cxr512.zip"

pytestmark = pytest.mark.slow(reason="starts an MLflow server, five runs of bundles and two scoring servers")


def medgen(*arguments: object, fails: bool = False) -> str:
    """What ``medgen ...`` printed."""
    process = Forked(["-m", "medgen", *map(str, arguments)], REPO)
    if not fails:
        return finish(process)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    return output


@dataclass
class Lifecycle:
    """What the tests look at: trained, evaluated and registered."""

    folder: Path
    uri: str
    client: MlflowClient

    def run(self, experiment: str, name: str) -> Any:
        """The run of that experiment whose name begins so."""
        found = self.client.search_runs([self.client.get_experiment_by_name(experiment).experiment_id])
        (one,) = [run for run in found if run.info.run_name.startswith(name)]
        return one


@pytest.fixture(scope="module")
def lifecycle(datalist, empty_database, tmp_path_factory) -> Iterator[Lifecycle]:
    """Two versions of the lung network, evaluated, and a generator, on one server."""
    folder = tmp_path_factory.mktemp("lifecycle")
    with mlflow_server(folder, empty_database) as server:
        uri = server.uri
        common = {"datalist": datalist, "tracking": "configs/tracking.json", "tracking_uri": uri, "log_interval": 1}
        common["tracking_timeout"] = 240  # for weights and pictures of all three, on a machine with other work
        train = ["configs/train.json", "configs/demo.json"]
        growth = {"images": [8, 12, 12, 8], "fade_images": [0, 4, 8, 4], "tick_images": 8, "val_interval": 2}
        growth |= {"batch_sizes": [2, 2, 2, 2], "max_images": 40}
        epochs = {"batch_size": 2, "val_interval": 1}
        running = [
            start(LUNGS, command(train, folder / "short", run_name="short", max_epochs=1, **epochs, **common)),
            start(LUNGS, command(train, folder / "long", run_name="long", max_epochs=20, **epochs, **common)),
            start(PGGAN, command(train, folder / "pggan", run_name="growing", **growth, **common)),
        ]
        for process in running:
            finish(process)
        for name in ("short", "long"):
            evaluate = ["configs/evaluate.json", "configs/demo.json"]
            finish(start(LUNGS, command(evaluate, folder / name, run_name=f"test of {name}", **common)))
            medgen("registry", "register", LUNGS, "--name", "lungs", "--overlay", LUNGS / "configs" / "demo.json",
                   "--weights", folder / name / "model.pt", "--metrics", folder / name / "metrics.json",
                   "--training", folder / name, "--tracking_uri", uri)  # fmt: skip
        medgen("registry", "register", PGGAN, "--name", "pggan", "--overlay", PGGAN / "configs" / "demo.json",
               "--weights", folder / "pggan" / "model.pt", "--alias", "champion", "--training", folder / "pggan",
               "--tracking_uri", uri)  # fmt: skip
        yield Lifecycle(folder, uri, MlflowClient(uri))


def history(lifecycle: Lifecycle, run: Any, key: str) -> list[tuple[int, float]]:
    points = lifecycle.client.get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def artifacts(lifecycle: Lifecycle, run: Any, folder: str = "") -> list[str]:
    found = []
    for entry in lifecycle.client.list_artifacts(run.info.run_id, folder or None):
        found += artifacts(lifecycle, run, entry.path) if entry.is_dir else [entry.path]
    return found


@pytest.mark.parametrize(
    ("experiment", "name", "last", "curves"),
    [
        ("lung_segmentation", "short", 4, ["loss", "images_per_second", "val_dice"]),
        ("lung_segmentation", "long", 80, ["loss", "images_per_second", "val_dice"]),
        ("cxr_pggan", "growing", 40, ["loss", "discriminator", "images_per_second", "val_swd"]),
    ],
)
def test_a_runs_page_has_what_was_set_measured_drawn_and_kept(lifecycle, experiment, name, last, curves):
    run = lifecycle.run(experiment, name)
    assert run.info.status == "FINISHED"
    for key in curves:
        points = history(lifecycle, run, key)
        assert points, f"no curve {key}; there are {sorted(run.data.metrics)}"
        assert len(points) == len({step for step, _ in points})
        assert points[-1][0] <= last
    assert history(lifecycle, run, "loss")[-1][0] == last  # images seen: of whatever batch size
    if experiment == "lung_segmentation":  # given on the command line
        assert run.data.params["batch_size"] == "2"
        assert "batch_size" in run.data.tags["overrides"]
    assert {"seed", "datalist_sha256"} <= {*run.data.params, *run.data.tags}
    kept = artifacts(lifecycle, run)
    assert any(path.endswith("model.pt") for path in kept), kept
    assert any(path.endswith("last.pt") for path in kept), kept
    pictures = [path for path in kept if path.startswith("images/") and path.endswith(".png")]
    assert pictures
    picture = Image.open(lifecycle.client.download_artifacts(run.info.run_id, pictures[-1]))
    assert np.asarray(picture.convert("L")).std() > 10


def test_versions_know_their_training_and_are_compared(lifecycle):
    shown = json.loads(medgen("registry", "show", "lungs", 2, "--json", "--tracking_uri", lifecycle.uri))
    assert shown["training"]["run_id"] == lifecycle.run("lung_segmentation", "long").info.run_id
    page = lifecycle.folder / "compare.html"
    table = medgen("registry", "compare", "lungs", 1, 2, "--output", page, "--tracking_uri", lifecycle.uri)
    (dice,) = [line.split() for line in table.splitlines() if line.startswith("dice ")]
    figures = [json.loads((lifecycle.folder / name / "metrics.json").read_text())["dice"] for name in ("short", "long")]
    assert [float(dice[1]), float(dice[2])] == pytest.approx(figures, abs=1e-3)
    assert "max_epochs" in table
    text = page.read_text()
    assert text.count("data:image/png;base64,") >= 2
    assert "http://" not in text.replace(lifecycle.uri, "")


def test_gate_refuses_the_worse_version_and_lets_the_better_one_through(lifecycle):
    dice = json.loads((lifecycle.folder / "long" / "metrics.json").read_text())["dice"]
    above = ["--require", f"dice>={dice + 0.01}", "--tracking_uri", lifecycle.uri]
    refused = medgen("registry", "promote", "lungs", 2, *above, fails=True)
    assert refused.startswith("error: ")
    assert refused.count("\n") == 1
    assert "dice" in refused
    assert "champion" not in lifecycle.client.get_registered_model("lungs").aliases
    medgen("registry", "promote", "lungs", 2, "--require", f"dice>={dice - 0.01}", "--tracking_uri", lifecycle.uri)
    assert lifecycle.client.get_model_version_by_alias("lungs", "champion").version == "2"


def test_a_pulled_bundle_runs_as_it_is(lifecycle, tmp_path):
    bundle = tmp_path / "pulled"
    medgen("registry", "pull", "models:/lungs/2", bundle, "--tracking_uri", lifecycle.uri)
    (tmp_path / "images").mkdir()
    radiograph().save(tmp_path / "images" / "radiograph.png")
    output = finish(start(bundle, ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json",
                                   "--input_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "out"),
                                   "--num_workers", "0"]))  # fmt: skip
    (mask,) = (tmp_path / "out" / "masks").glob("*.png")
    assert Image.open(mask).size == radiograph().size, output


def radiograph() -> Image.Image:
    """A real one where there are any beside the repository, else a phantom."""
    if REAL.is_file():
        import zipfile

        with zipfile.ZipFile(REAL) as archive:
            first = min(name for name in archive.namelist() if name.endswith((".png", ".jpg")))
            return Image.open(io.BytesIO(archive.read(first))).convert("L")
    from medgen.data.phantom import make_thorax

    return Image.fromarray(np.uint8(make_thorax(np.random.default_rng(8), 256).image * 255))


def as_text(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def ask(address: str, request: Any) -> tuple[int, Any]:
    """Status and content of an answer; a request that is bytes is sent as it is."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    call = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def segments(lifecycle, tmp_path_factory) -> Iterator[str]:
    """MLflow's own command on the second version of the lung network."""
    command = ["mlflow", "models", "serve", "-m", "models:/lungs/2", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", "{port}"]
    folder = tmp_path_factory.mktemp("segments")
    with Server(command, folder, MLFLOW_TRACKING_URI=lifecycle.uri, OMP_NUM_THREADS="1") as server:
        yield server.uri


@pytest.fixture(scope="module")
def draws(lifecycle, tmp_path_factory) -> Iterator[str]:
    """Our command on the generator."""
    command = ["medgen", "registry", "serve", "models:/pggan@champion", "--tracking_uri", lifecycle.uri]
    folder = tmp_path_factory.mktemp("draws")
    with Server([*command, "--port", "{port}"], folder, XDG_CACHE_HOME=str(folder), OMP_NUM_THREADS="1") as server:
        yield server.uri


def test_served_network_segments_a_radiograph_of_any_size(segments):
    status, answer = ask(segments, of_images(as_text(radiograph())))
    assert status == 200, answer
    (found,) = answer["predictions"]
    mask = Image.open(io.BytesIO(base64.b64decode(found["mask"])))
    assert mask.size == radiograph().size
    assert np.asarray(mask).mean() / 255 == pytest.approx(found["area_fraction"], abs=1e-3)


def of_images(*images: Any, **params: Any) -> dict[str, Any]:
    return {"inputs": {"image": list(images)}, **({"params": params} if params else {})}


def grey(**spots: float | None) -> list[list[float | None]]:
    """An image of 32 × 32 pixels as an array, with a wrong one."""
    rows: list[list[float | None]] = [[0.5] * 32 for _ in range(32)]
    rows[3][4] = spots["spot"]
    return rows


BAD = {
    "no JSON": (b"image=radiograph.png", "JSON"),
    "no image": (of_images(), "got none"),
    "another column": ({"dataframe_records": [{"picture": "abcd", "other": 1}]}, "image"),
    "no base64": (of_images("not base64 at all!"), "no base64"),
    "no picture": (of_images(base64.b64encode(b"a text file").decode()), "another kind"),
    "cut short": (of_images(as_text(radiograph())[:400]), "truncated|damaged"),
    "not a number": (of_images(grey(spot=None)), "no such array|finite"),
    "out of range": (of_images(grey(spot=200.0)), r"\[0, 1\], got .* to 200"),
    "too many": (of_images(*[as_text(radiograph())] * 50), "got 50"),
    "unknown parameter": (of_images(as_text(radiograph()), treshold=0.5), "treshold"),
    "wrong type": (of_images(as_text(radiograph()), mc_passes="many"), "mc_passes.*whole number.*got a text"),
    "too large": (of_images(as_text(Image.new("L", (9000, 9000)))), "pixels"),
}


@pytest.mark.parametrize(("request_", "words"), BAD.values(), ids=BAD)
def test_bad_request_is_refused_in_one_line_without_its_image(request_, words, segments):
    status, answer = ask(segments, request_)
    assert status == 400, answer
    assert "\n" not in answer["message"]
    assert len(answer["message"]) < 400
    assert re.search(words, answer["message"]), answer
    assert not answer.get("stack_trace")
    assert ask(segments, of_images(as_text(radiograph())))[0] == 200


def test_served_generator_draws_what_its_seed_says(lifecycle, draws, tmp_path):
    request = {"inputs": [], "params": {"seed": 5, "num_samples": 2}}
    status, answer = ask(draws, request)
    assert status == 200, answer
    assert [sample["seed"] for sample in answer["predictions"]] == [5, 6]
    assert ask(draws, request)[1] == answer
    settings = {"seeds": "5-6", "num_workers": 0, "model_path": lifecycle.folder / "pggan" / "model.pt"}
    finish(start(PGGAN, command(["configs/inference.json", "configs/demo.json"], tmp_path, **settings)))
    for sample in answer["predictions"]:
        drawn = Image.open(io.BytesIO(base64.b64decode(sample["image"])))
        (written,) = (tmp_path / "samples").glob(f"*{sample['seed']:06d}.png")
        np.testing.assert_allclose(np.int16(drawn), np.int16(Image.open(written)), atol=1)
    for bad in (b"{", {"inputs": [], "params": {"seed": -1}}, {"params": {"num_samples": 10**9}, "inputs": []}):
        status, refused = ask(draws, bad)
        assert status == 400
        assert "\n" not in refused["message"]
