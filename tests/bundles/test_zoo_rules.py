"""Every bundle keeps the rules of MONAI's model zoo; a new bundle joins by existing."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events
from jsonschema import Draft202012Validator
from mlflow import MlflowClient
from monai.bundle import ConfigParser, ckpt_export, onnx_export, verify_metadata, verify_net_in_out
from monai.bundle.scripts import _get_fake_spatial_shape  # how verify_net_in_out itself reads a declared shape
from monai.networks.nets import AutoencoderKL
from PIL import Image

import medgen.output
from medgen.handlers import scalars

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parents[1] for path in (ROOT / "bundles").glob("*/configs/metadata.json"))
pytestmark = [
    # about MONAI's and MLflow's own insides: nothing that a bundle could change
    pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
]

SCHEMA = ROOT / "tests" / "assets" / "meta_schema.json"
REQUIRED_FILES = [
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/multi_gpu_train.json",
    "configs/demo.json",
    "configs/serve.json",
    "configs/tracking.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
]
# networks that take more than an image, which neither MONAI's exporters nor its command line can be told; the zoo has
# lists of such bundles, too. Shapes without the batch.
MORE_INPUTS = {"cxr_latent_diffusion": {"timesteps": (), "context": (77, "context_dim")}}
LENGTHS = {"max_epochs": "1", "max_images": "8", "max_steps": "1"}  # of a training, the least of each
PRODUCTS = {"models", "output", "eval"}  # made by a run, ignored by git
UNKNOWNS = {"p": 6, "n": 8, "any": 64}  # of a declared spatial shape: 2**p, 8*n and * become 64
EXPORT_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # another order of summation, nothing more
# an absolute path on any system, also as a literal in an expression (but not one that is added to a folder), or a home
FOREIGN_PATH = re.compile(r"""^[/~\\]|\b[A-Za-z]:\\|(?<!\w)~/|/(home|Users|root)/|(?<!\+ )['"]/\w""")


@pytest.fixture(scope="module", params=BUNDLES, ids=lambda folder: folder.name)
def bundle(request):
    """Folder of a bundle; a test that takes it runs for every bundle."""
    return request.param


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_of(bundle: Path) -> list[Path]:
    return [p for p in bundle.rglob("*") if p.is_file() and p.relative_to(bundle).parts[0] not in PRODUCTS]


def texts_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [key, *texts_in(item)]]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def more_inputs(bundle: Path, batch: int, *configs: str) -> dict[str, torch.Tensor]:
    """Arguments of a bundle's network beside its image."""
    parser = parsed(bundle, *configs)
    shapes = MORE_INPUTS.get(bundle.name, {}).items()
    return {name: torch.rand(batch, *(parser.get(n) if isinstance(n, str) else n for n in s)) for name, s in shapes}


def parsed(bundle: Path, *configs: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / f"{name}.json") for name in configs])
    return parser


# ---------------------------------------------------------------- files


def test_there_are_bundles_to_test():
    assert BUNDLES


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_bundle_has_the_file(bundle, name):
    file = bundle / name
    assert file.is_file(), f"{bundle.name} lacks {name}"
    assert file.stat().st_size > 0


def test_name_is_made_of_lower_case_words(bundle):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", bundle.name)


def test_files_are_at_most_one_megabyte(bundle):
    assert [p.name for p in files_of(bundle) if p.stat().st_size > 2**20] == []


def test_bundle_holds_no_python(bundle):
    # a second bundle's `scripts` package silently resolves to the first one's: code lives in medgen
    assert [p for p in files_of(bundle) if p.suffix == ".py"] == []


def test_text_ends_in_one_newline_and_no_line_in_blanks(bundle):
    for file in (file for file in files_of(bundle) if file.suffix != ".png"):
        text = file.read_text(encoding="utf-8")
        assert text.endswith("\n"), file
        assert not text.endswith("\n\n"), file
        assert [n for n, line in enumerate(text.splitlines(), 1) if line != line.rstrip()] == [], file


def test_json_is_indented_by_four(bundle):
    for file in (bundle / "configs").glob("*.json"):
        depth = 0
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            bare = re.sub(r'"(?:\\.|[^"\\])*"', "", line).strip()
            own = depth - bool(re.match(r"[\]}]", bare))
            assert len(line) - len(line.lstrip(" ")) == 4 * own, f"{file.name}, line {number}"
            depth += len(re.findall(r"[\[{]", bare)) - len(re.findall(r"[\]}]", bare))


def test_configs_name_no_path_of_anybodys_machine(bundle):
    for file in (bundle / "configs").glob("*.json"):
        assert [text for text in texts_in(read_json(file)) if FOREIGN_PATH.search(text)] == [], file.name


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("/srv/x.json", True),
        ("$'/srv/data'", True),
        ("$@dataset_dir + '/home/ann/data'", True),
        ("C:\\data", True),
        ("~/data", True),
        ("$@bundle_root + '/output'", False),
        ("https://github.com/a/b.json", False),
        ("PNG/JPEG", False),
    ],
)
def test_path_rule_tells_foreign_paths_from_relative_ones(text, foreign):
    assert bool(FOREIGN_PATH.search(text)) is foreign


def test_overlays_change_only_what_a_whole_config_has(bundle):
    # a misspelt id in an overlay is no error to MONAI: it would do nothing
    configs = {file.stem: read_json(file) for file in (bundle / "configs").glob("*.json")}
    whole = [parsed(bundle, name) for name, config in configs.items() if "network_def" in config]
    assert whole
    for name, overlay in configs.items():
        is_overlay = not {"network_def", "run"} & overlay.keys()  # a study of other configs has no network of its own
        if name not in ("metadata", "tracking") and is_overlay:
            unknown = {key for key in overlay if not any(key.lstrip("+") in config for config in whole)}
            assert unknown <= {"finalize"}, name


# ---------------------------------------------------------------- metadata


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def schema_in_place(tmp_path):
    """Where the zoo's own check keeps the schema; ``verify_metadata`` downloads only what is not there."""
    path = tmp_path / "eval" / "schema.json"
    path.parent.mkdir()
    shutil.copy(SCHEMA, path)
    return path


def test_schema_is_a_json_schema():
    Draft202012Validator.check_schema(read_json(SCHEMA))


def test_metadata_is_verified_offline(bundle, schema_in_place, no_network):
    verify_metadata(meta_file=str(bundle / "configs" / "metadata.json"), filepath=str(schema_in_place))


def without(*path):
    def change(metadata):
        for key in path[:-1]:
            metadata = metadata[key]
        del metadata[path[-1]]

    return change


def with_value(value, *path):
    def change(metadata):
        for key in path[:-1]:
            metadata = metadata[key]
        metadata[path[-1]] = value

    return change


BROKEN = {
    "no version": without("version"),
    "no changelog": without("changelog"),
    "no task": without("task"),
    "no copyright": without("copyright"),
    "no required packages": without("required_packages_version"),
    "no network format": without("network_data_format"),
    "no outputs": without("network_data_format", "outputs"),
    "no spatial shape": without("network_data_format", "inputs", "image", "spatial_shape"),
    "no channel definition": without("network_data_format", "outputs", "pred", "channel_def"),
    "release candidate": with_value("2.15.0rc1", "pytorch_version"),
    "two numbers": with_value("0.1", "version"),
    "old name of the packages": with_value({}, "optional_packages_version"),
    "half a range": with_value([0], "network_data_format", "inputs", "image", "value_range"),
    "unknown in the shape": with_value(["8*k"], "network_data_format", "inputs", "image", "spatial_shape"),
    "blank task": with_value(" ", "task"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_metadata_is_refused(change, schema_in_place, tmp_path, no_network):
    metadata = read_json(BUNDLES[0] / "configs" / "metadata.json")
    change(metadata)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema_in_place))


def test_newest_version_heads_the_changelog(bundle):
    metadata = read_json(bundle / "configs" / "metadata.json")
    newest = max(metadata["changelog"], key=lambda version: tuple(map(int, version.split("."))))
    assert metadata["version"] == newest == next(iter(metadata["changelog"]))


def test_versions_are_the_ones_that_are_tested_here(bundle):
    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([\w.]+)", line)))
    pins = {canonical(name): version for name, version in pins.items()}
    metadata = read_json(bundle / "configs" / "metadata.json")
    stated = {canonical(name): version for name, version in metadata["required_packages_version"].items()}
    stated |= {name: metadata[f"{field}_version"] for field, name in [("monai", "monai"), ("numpy", "numpy")]}
    stated["torch"] = metadata["pytorch_version"]
    assert stated == {name: pins.get(name) for name in stated}


# ---------------------------------------------------------------- network_def and its exports


@pytest.fixture(scope="module")
def network(bundle, tmp_path_factory):
    """The demo's ``network_def`` with weights in every layer, its ``model.pt``, an input and the eager output."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    net = parsed(bundle, "inference", "demo").get_parsed_content("network_def").eval()
    for parameter in net.parameters():
        # layers that begin at zero would make any export look right
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(net.state_dict(), folder / "model.pt")
    image = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["inputs"]["image"]
    size = _get_fake_spatial_shape(image["spatial_shape"], **UNKNOWNS)
    if image["spatial_shape"] and all(isinstance(side, int) for side in image["spatial_shape"]):
        size = net.image_size  # one that is fixed is the default config's; the demo has its own
    x = torch.rand(2, image["num_channels"], *size)
    more = more_inputs(bundle, 2, "inference", "demo")
    with torch.no_grad():
        y = net(x, **more)
    assert y.std() > 1e-3
    return SimpleNamespace(net=net, x=x, more=more, y=y, folder=folder, ckpt_file=str(folder / "model.pt"))


def export(function, bundle, network, name, **kwargs):
    """Call one of MONAI's exporters the way its command line does; returns the file."""
    if network.more:
        pytest.skip(f"MONAI's exporters cannot be told of {', '.join(network.more)}; torch.export is tested below")
    path = network.folder / name
    function(
        net_id="network_def",
        filepath=str(path),
        ckpt_file=network.ckpt_file,
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=[str(bundle / "configs" / "inference.json"), str(bundle / "configs" / "demo.json")],
        input_shape=list(network.x.shape),
        **kwargs,
    )
    return path


def test_network_keeps_its_declared_input_and_output(bundle):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
        extra_forward_args=more_inputs(bundle, 1, "inference"),
    )


def test_output_has_the_declared_size(bundle, network):
    pred = read_json(bundle / "configs" / "metadata.json")["network_data_format"]["outputs"]["pred"]
    size = _get_fake_spatial_shape(pred["spatial_shape"], **UNKNOWNS)
    assert tuple(network.y.shape) == (2, pred["num_channels"], *size)


def test_train_evaluate_and_inference_define_the_same_network(bundle):
    def shapes(config):
        state = parsed(bundle, config).get_parsed_content("network_def").state_dict()
        return {name: tuple(value.shape) for name, value in state.items()}

    assert shapes("train") == shapes("evaluate") == shapes("inference")


@pytest.fixture(scope="module")
def torchscript(bundle, network):
    """File of ``ckpt_export``: scripted, or traced where that cannot be; a warning says so in pytest's summary."""
    try:
        return SimpleNamespace(path=export(ckpt_export, bundle, network, "model.ts"), scripted=True)
    except pytest.skip.Exception:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        warnings.warn(f"{bundle.name}: network_def cannot be scripted ({reason}), traced instead", stacklevel=1)
        path = export(ckpt_export, bundle, network, "model.ts", use_trace=True)
        return SimpleNamespace(path=path, scripted=False)


def test_torchscript_equals_eager_and_carries_the_metadata(bundle, network, torchscript):
    extra = {"metadata.json": "", "inference.json": ""}
    loaded = torch.jit.load(torchscript.path, _extra_files=extra)
    with torch.no_grad():
        torch.testing.assert_close(loaded(network.x), network.y, **EXPORT_TOLERANCE)
    assert json.loads(extra["metadata.json"]).items() >= read_json(bundle / "configs" / "metadata.json").items()
    assert json.loads(extra["inference.json"]) == read_json(bundle / "configs" / "inference.json")


def test_onnx_equals_eager(bundle, network):
    import onnxruntime

    path = export(onnx_export, bundle, network, "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    (y,) = session.run([output.name], {given.name: network.x.numpy()})
    np.testing.assert_allclose(y, network.y.numpy(), **EXPORT_TOLERANCE)


def test_torch_export_equals_eager_at_any_batch_size(network):
    batch = {0: torch.export.Dim("batch")}
    shapes = {
        next(iter(inspect.signature(network.net.forward).parameters)): batch,
        **dict.fromkeys(network.more, batch),
    }
    program = torch.export.export(network.net, (network.x,), network.more, dynamic_shapes=shapes)
    torch.export.save(program, network.folder / "model.pt2")
    loaded = torch.export.load(network.folder / "model.pt2").module()
    x, *rest = (torch.cat([value, value.flip(0)[:1]]) for value in (network.x, *network.more.values()))
    more = dict(zip(network.more, rest, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(loaded(network.x, **network.more), network.y, **EXPORT_TOLERANCE)
        torch.testing.assert_close(loaded(x, **more), network.net(x, **more), **EXPORT_TOLERANCE)


@pytest.mark.parametrize("bundle", [ROOT / "bundles" / "cxr_autoencoder_kl"], indirect=True, ids=lambda b: b.name)
class TestAutoencoderKL:
    """What cxr_autoencoder_kl promises beyond the rules."""

    def test_weights_load_into_monais_own_network(self, bundle, network):
        parser = parsed(bundle, "inference", "demo")
        monais = AutoencoderKL(**parser.get_parsed_content("network_def", instantiate=False).resolve_args()).eval()
        monais.load_state_dict(torch.load(network.ckpt_file, weights_only=True), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(monais.reconstruct(network.x), network.y, rtol=0, atol=0)

    def test_network_is_scripted_not_traced(self, bundle, torchscript):
        assert torchscript.scripted


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_properties_are_complete(bundle, config, workflow, tmp_path):
    made = workflow(bundle, config, tmp_path)
    made.initialize()
    assert made.check_properties() == []


# ---------------------------------------------------------------- runs and their tracking


class KilledError(BaseException):
    """Not an Exception: no handler gets to clean up, as if the process had been killed."""


def run_to_end(workflow):
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def runs_of(client):
    return {r.info.run_id: r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])}


def artifacts_of(client, run, folder=None):
    found = client.list_artifacts(run.info.run_id, folder)
    inside = (artifacts_of(client, run, file.path) for file in found if file.is_dir)
    return {file.path for file in found if not file.is_dir}.union(*inside)


def shown_pictures(client, run):
    """The contents of the PNGs that MLflow shows along the steps."""
    found = [name for name in artifacts_of(client, run) if name.startswith("images/") and name.endswith(".png")]
    return {name: Image.open(client.download_artifacts(run.info.run_id, name)) for name in found}


def curve(client, run, name):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def pictures_in(output_dir):
    return {file.name for file in (output_dir / "images").iterdir()}


@pytest.fixture(scope="module")
def tracked(bundle, workflow, tmp_path_factory):
    """What the tracker holds after four runs that share it.

    A training is killed at the first step of its second epoch; another runs to its end; the first is resumed; the
    second one's model is evaluated into its folder.
    """
    folder = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)

    def make(config, output_dir, **overrides):
        tracking = str(bundle / "configs" / "tracking.json")
        # log_interval: a curve has more than one point, though an epoch has two steps
        settings = {"tracking_uri": uri, "log_interval": 1, "tracking_timeout": 120, **overrides}
        return workflow(bundle, config, folder / output_dir, tracking, **settings)

    killed = make("train", "first")
    killed.initialize()
    engine = killed.parser.get_parsed_content("train#trainer")
    steps = 0  # of an epoch

    @engine.on(Events.ITERATION_COMPLETED)
    def kill(_):
        nonlocal steps
        if engine.state.epoch == 2:
            raise KilledError
        steps += 1

    with pytest.raises(KilledError):
        killed.run()
    after_kill = runs_of(client)

    training = run_to_end(make("train", "second"))
    after_training = runs_of(client)
    run_to_end(make("train", "first", resume=True))
    after_resume = runs_of(client)

    result = SimpleNamespace(client=client, uri=uri, folder=folder, make=make, steps=steps, training=training)
    result.images = training.parser.get_parsed_content("train#dataloader").global_batch_size  # of a step
    result.crashed_id, *more = after_kill
    assert not more
    result.training_ids = after_training.keys() - after_kill.keys()
    result.resume_ids = after_resume.keys() - after_training.keys()
    result.status_after_kill = after_kill[result.crashed_id].info.status
    result.pictures = pictures_in(folder / "second")
    result.record = (folder / "second" / "run.json").read_text(encoding="utf-8")

    run_to_end(make("evaluate", "second"))
    result.evaluation_ids = runs_of(client).keys() - after_resume.keys()
    return result


def only(client, ids):
    (run_id,) = ids
    return client.get_run(run_id)


@pytest.mark.slow(reason="three short trainings and an evaluation, made once for all of these tests")
class TestTracking:
    """``--tracking configs/tracking.json``."""

    def test_training_does_not_join_the_run_of_a_killed_one(self, tracked):
        assert tracked.status_after_kill == "KILLED"
        assert len(tracked.training_ids) == 1

    def test_resumed_training_continues_its_own_run(self, tracked):
        run = tracked.client.get_run(tracked.crashed_id)
        assert tracked.resume_ids == set()
        assert run.info.status == "FINISHED"
        steps = [step for step, _ in curve(tracked.client, run, "loss")]
        assert steps == [tracked.images * number for number in range(1, 2 * tracked.steps + 1)]

    def test_run_is_named_after_the_bundle_and_finished(self, bundle, tracked):
        run = only(tracked.client, tracked.training_ids)
        assert re.fullmatch(rf"{bundle.name}-\d{{8}}-\d{{6}}.*", run.info.run_name)
        assert run.info.status == "FINISHED"
        assert tracked.client.get_experiment(run.info.experiment_id).name == bundle.name

    def test_losses_are_curves(self, tracked):
        run = only(tracked.client, tracked.training_ids)
        engine = tracked.training.parser.get_parsed_content("train#trainer")
        last = scalars(engine.state.output)
        assert last
        for name, value in last.items():
            points = curve(tracked.client, run, name)
            steps = [tracked.images * number for number in range(1, engine.state.iteration + 1)]
            assert [step for step, _ in points] == steps, name
            assert points[-1][1] == pytest.approx(value), name

    def test_validation_metric_is_a_curve_over_images_as_the_losses_are(self, tracked):
        run = only(tracked.client, tracked.training_ids)
        state = tracked.training.parser.get_parsed_content("validate#evaluator").state
        points = curve(tracked.client, run, state.key_metric_name)
        assert [step for step, _ in points] == [n * tracked.steps * tracked.images for n in range(1, state.epoch + 1)]
        assert points[-1][1] == pytest.approx(state.metrics[state.key_metric_name])

    def test_pictures_model_and_executed_config_are_kept(self, tracked, tmp_path):
        run = only(tracked.client, tracked.training_ids)
        kept = artifacts_of(tracked.client, run)
        (config,) = (name for name in kept if name.startswith("config_"))

        def download(name):
            return Path(tracked.client.download_artifacts(run.info.run_id, name, str(tmp_path)))

        assert {"model/model.pt", "checkpoints/last.pt", "settings.json", "requirements.txt"} < kept
        assert read_json(download(config))["output_dir"] == str(tracked.folder / "second")
        assert download("model/model.pt").read_bytes() == (tracked.folder / "second/models/model.pt").read_bytes()
        assert read_json(download("settings.json"))["log_interval"] == 1
        assert tracked.pictures
        shown = {np.asarray(picture).tobytes() for picture in shown_pictures(tracked.client, run).values()}
        drawn = {np.asarray(Image.open(tracked.folder / "second/images" / name)).tobytes() for name in tracked.pictures}
        assert shown == drawn

    def test_run_can_be_compared_by_its_settings_data_and_versions(self, tracked):
        run = only(tracked.client, tracked.training_ids)
        assert run.data.params["batch_size"] == "2"
        assert run.data.params["images_training"] == "4"
        assert len(run.data.params["datalist_sha256"]) == 64
        assert run.data.tags["version_torch"] == torch.__version__.partition("+")[0]
        assert run.data.tags["device"] == "cpu"
        assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["discs"]
        assert run.data.metrics["images_per_second"] > 0

    def test_evaluation_has_a_run_of_its_own_with_the_measured_metrics(self, bundle, tracked):
        run = only(tracked.client, tracked.evaluation_ids)
        measured = read_json(tracked.folder / "second" / "metrics.json")
        assert run.info.status == "FINISHED"
        assert run.info.run_name.startswith(f"{bundle.name}-evaluate-")
        assert run.data.metrics
        assert {name: pytest.approx(measured[name]) for name in run.data.metrics} == run.data.metrics

    def test_evaluation_keeps_its_own_artifacts_not_the_trainings(self, tracked):
        run = only(tracked.client, tracked.evaluation_ids)
        kept = artifacts_of(tracked.client, run)
        (config,) = (name for name in kept if name.startswith("config_"))
        pictures = pictures_in(tracked.folder / "second") - tracked.pictures
        assert kept == {*pictures, "metrics.json", config, "settings.json", "requirements.txt"}

    def test_evaluation_leaves_the_trainings_record_alone(self, tracked):
        # otherwise --resume would go on under the evaluation's name
        assert (tracked.folder / "second" / "run.json").read_text(encoding="utf-8") == tracked.record

    def test_inference_writes_its_results_in_a_run_of_its_own(self, bundle, tracked):
        before = runs_of(tracked.client)
        run_to_end(tracked.make("inference", "third", model_path=str(tracked.folder / "second/models/model.pt")))
        run = only(tracked.client, runs_of(tracked.client).keys() - before.keys())
        made = [p for p in (tracked.folder / "third").rglob("*") if p.is_file() and p.parent.name != "tracking"]
        results = [p for p in made if not p.name.startswith("config_")]
        assert results
        assert run.info.status == "FINISHED"
        assert any(name.startswith("config_") for name in artifacts_of(tracked.client, run))


def test_trainings_started_in_the_same_second_have_different_names(bundle, workflow, tmp_path, monkeypatch):
    # the jobs of a sweep start together and share a tracker, where one name for two would merge them
    class Stopped(medgen.output.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(medgen.output, "datetime", Stopped)
    a, b = (workflow(bundle, "train", tmp_path / name).parser.get_parsed_content("run_name") for name in ("a", "b"))
    assert a != b


def test_stock_mlflow_tracking_works(bundle, workflow, tmp_path):
    made = run_to_end(workflow(bundle, "train", tmp_path, "mlflow"))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (run,) = runs_of(client).values()
    engine = made.parser.get_parsed_content("train#trainer")
    assert run.info.status == "FINISHED"
    assert len(curve(client, run, "train_loss")) == engine.state.iteration
    assert made.parser.get_parsed_content("validate#evaluator").state.key_metric_name in run.data.metrics


@pytest.mark.slow(reason="a new process imports MONAI and MLflow, and trains")
def test_literal_command_line_trains_and_tracks(bundle, datalist, ingredients, tmp_path):
    before = sorted(bundle.rglob("*"))
    config = read_json(bundle / "configs" / "train.json")
    length = next([f"--{name}", number] for name, number in LENGTHS.items() if name in config)
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", "['configs/train.json','configs/demo.json']", "--tracking", "configs/tracking.json"]
    command += ["--datalist", str(datalist), "--output_dir", str(tmp_path / "out")]
    command += ["--model_path", str(tmp_path / "model.pt"), *length, "--val_interval", "1", "--batch_size", "2"]
    needed = {name: value for name, value in ingredients(bundle).items() if name in config}
    command += [word for name, value in needed.items() for word in (f"--{name}", value)]

    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-4000:]
    client = MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db")
    (run,) = runs_of(client).values()
    assert any(name.startswith("config_") for name in artifacts_of(client, run))
    assert run.info.status == "FINISHED"
    assert {"model/model.pt", "checkpoints/last.pt", "settings.json"} < artifacts_of(client, run)
    assert len(shown_pictures(client, run)) > len(pictures_in(tmp_path / "out"))  # the last of each name once more
    given = set(run.data.tags["overrides"].split(", "))
    assert {"datalist", "output_dir", "model_path", "val_interval", "batch_size"} <= given
    network = parsed(bundle, "train", "demo").get_parsed_content("network_def")
    network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    assert sorted(bundle.rglob("*")) == before, "a run leaves the bundle's folder as it was"
