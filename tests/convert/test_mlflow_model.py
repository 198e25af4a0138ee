"""Models that MLflow logged, of every kind and under every name: read without running anything of them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import uuid
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import AutoencoderKL as CoreAutoencoder
from test_latent_diffusion_convert import AUTOENCODERS, GROUPS, make_autoencoder, make_diffusion
from torch import nn
from typer.testing import CliRunner

from medgen import cli
from medgen.convert.mlflow_model import read_exported_weights
from medgen.data.image_set import file_sha256
from medgen.errors import UserError

pytestmark = [
    # about MLflow's own insides
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pickle.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
HERE = __name__  # the package of the classes below
runner = CliRunner()


class Small(nn.Module):
    """Another network than those of latent diffusion: tied weights, a half, buffers of which one is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.coarse = nn.Parameter(torch.randn(3).half())
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.first(x)).sum() + self.coarse.sum() + self.steps.sum() + self.passing.sum()


class Run:
    def __init__(self, mark: object) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def convert(*arguments: object):
    return runner.invoke(cli.app, ["convert", "mlflow", *map(str, arguments)])


def assert_equal(path: Path, expected: dict[str, torch.Tensor]) -> None:
    state = torch.load(path, weights_only=True)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name], value), name


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A database with one run of each kind, and a registered model; ``uris`` by kind."""
    import mlflow
    import mlflow.pytorch

    root = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    net = Small()
    try:
        experiment = mlflow.create_experiment("old", artifact_location=(root / "artifacts").as_uri())
        runs = {}
        with mlflow.start_run(experiment_id=experiment) as run:
            folder = root / "final_model"
            mlflow.pytorch.save_model(net, folder, serialization_format="pickle", pip_requirements=[])
            mlflow.log_artifacts(str(folder), "final_model")  # where the source's trainings have it
            mlflow.pytorch.log_state_dict(net.state_dict(), "weights")
            runs["run"] = run.info.run_id
        with mlflow.start_run(experiment_id=experiment) as run:
            mlflow.pytorch.log_model(
                net,
                name="final_model",
                serialization_format="pt2",
                input_example=torch.ones(2, 4).numpy(),
                registered_model_name="small",
                pip_requirements=[],
            )
            mlflow.MlflowClient().set_registered_model_alias("small", "champion", 1)
            runs["exported"] = run.info.run_id
    finally:
        mlflow.set_tracking_uri(before)
    return SimpleNamespace(net=net, uri=uri, root=root, folder=folder, **runs)


@pytest.mark.parametrize(
    "source",
    ["{run}", "runs:/{run}", "runs:/{run}/final_model", "{folder}", "runs:/{run}/weights", "{root}/artifacts/{run}"],
)
def test_pickled_module_and_state_dict_are_read_wherever_they_lie(logged, tmp_path, source):
    source = source.format(**vars(logged))

    result = convert(source, "--output", tmp_path / "m.pt", "--tracking_uri", logged.uri, "--package", HERE)

    assert result.exit_code == 0, result.stderr
    assert f"6 tensors of {source} -> {tmp_path / 'm.pt'}" in result.stdout
    assert_equal(tmp_path / "m.pt", logged.net.state_dict())
    assert os.listdir(tmp_path) == ["m.pt"]


@pytest.mark.parametrize("source", ["{exported}", "models:/small/1", "models:/small@champion"])
def test_exported_program_gives_the_same_weights(logged, tmp_path, source):
    source = source.format(**vars(logged))

    result = convert(source, "--output", tmp_path / "m.pt", "--tracking_uri", logged.uri)

    assert result.exit_code == 0, result.stderr
    assert_equal(tmp_path / "m.pt", logged.net.state_dict())
    # what an alias pointed at, and no other model can be taken for
    uri = "models:/small/1" if "small" in source else f"runs:/{logged.exported}/final_model"
    assert re.search(f"^model.pt2 of {uri} has SHA-256 [0-9a-f]{{64}}$", result.stdout, re.MULTILINE)


def test_alias_is_looked_up_once(logged, tmp_path, monkeypatch):
    import mlflow

    asked = []

    def look_up(client, name, alias, found=mlflow.MlflowClient.get_model_version_by_alias):
        asked.append(alias)
        return found(client, name, alias)

    monkeypatch.setattr(mlflow.MlflowClient, "get_model_version_by_alias", look_up)

    result = convert("models:/small@champion", "--output", tmp_path / "m.pt", "--tracking_uri", logged.uri)

    assert result.exit_code == 0, result.stderr
    assert asked == ["champion"]


def test_place_of_the_model_can_be_named(logged, tmp_path):
    options = ("--output", tmp_path / "m.pt", "--tracking_uri", logged.uri)

    assert convert(logged.run, "--artifact_path", "weights", *options).exit_code == 0
    assert_equal(tmp_path / "m.pt", logged.net.state_dict())


def test_run_of_an_old_file_store_is_read(logged, tmp_path):
    run = tmp_path / "mlruns" / "0" / uuid.uuid4().hex
    shutil.copytree(logged.folder, run / "artifacts" / "final_model")
    (run / "meta.yaml").write_text("run_name: old\n")

    result = convert(run, "--output", tmp_path / "m.pt", "--package", HERE)

    assert result.exit_code == 0, result.stderr
    assert_equal(tmp_path / "m.pt", logged.net.state_dict())


def test_checkpoint_among_several_networks_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    content = {"epoch": 3, "g": {"w": torch.ones(2)}, "d": {"v": torch.zeros(1)}, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "model" / "state_dict.pth")
    options = (tmp_path / "model", "--output", tmp_path / "m.pt")

    undecided, wrong, chosen = (convert(*options, *more) for more in ((), ("--network", "e"), ("--network", "g")))

    assert "expected one module or state dict in state_dict.pth of" in undecided.stderr
    assert "got g, d; name one with --network" in undecided.stderr
    assert "expected a state dict e" in wrong.stderr
    assert chosen.exit_code == 0, chosen.stderr
    assert_equal(tmp_path / "m.pt", {"w": torch.ones(2)})


@torch.no_grad()
def test_autoencoder_of_the_source_becomes_monais_with_its_overlay(tmp_path):
    import mlflow.pytorch

    old = make_autoencoder("source")
    mlflow.pytorch.save_model(old, tmp_path / "final_model", serialization_format="pickle", pip_requirements=[])

    result = convert(tmp_path / "final_model", "--output", tmp_path / "autoencoder.pt")

    assert result.exit_code == 0, result.stderr
    overlay = json.loads((tmp_path / "autoencoder.json").read_text())
    assert overlay["autoencoder_channels"] == list(AUTOENCODERS["source"]["num_channels"])
    new = CoreAutoencoder(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=overlay["autoencoder_res_blocks"],
        channels=overlay["autoencoder_channels"],
        attention_levels=[False] * 4,
        latent_channels=overlay["latent_channels"],
        norm_num_groups=GROUPS,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()
    new.load_state_dict(torch.load(tmp_path / "autoencoder.pt", weights_only=True))
    images = torch.rand(1, 1, 16, 16)
    assert torch.equal(new.reconstruct(images), old.reconstruct(images))


def test_diffusion_network_gets_its_scaling_and_record(tmp_path):
    import mlflow.pytorch

    diffusion = make_diffusion("unconditional")
    mlflow.pytorch.save_model(diffusion, tmp_path / "model", serialization_format="pickle", pip_requirements=[])
    torch.save(make_autoencoder("source").state_dict(), tmp_path / "old.pth")
    groups = ("--norm_num_groups", GROUPS)
    first = runner.invoke(
        cli.app,
        [
            "convert",
            "latent-diffusion",
            str(tmp_path / "old.pth"),
            "--output",
            str(tmp_path / "a.pt"),
            *map(str, groups),
        ],
    )
    assert first.exit_code == 0, first.stderr
    options = ("--autoencoder", tmp_path / "a.pt", "--scale", 0.5, "--prediction_type", "epsilon")

    result = convert(tmp_path / "model", "--output", tmp_path / "out" / "model.pt", *options)

    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "out" / "trained_as.json").read_text())
    assert record["autoencoder"] == file_sha256(tmp_path / "a.pt")
    assert record["prediction_type"] == "epsilon"
    assert (tmp_path / "out" / "scaling.json").exists()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{run}", (), f"names {HERE}.Small, which is neither a tensor nor a class of"),
        ("{run}", ("--artifact_path", "nothing"), "must be a model of mlflow.pytorch with data/model.pth"),
        ("{run}", ("--package", HERE, "--scale", 0.3), "--scale belongs to an AutoencoderKL or a DiffusionModelUNet"),
        ("runs:/" + "0" * 32, (), "refused: Run with id=" + "0" * 32 + " not found"),
        ("models:/small@nobody", (), "refused: "),
        ("models:/small/9", (), "refused: "),
        ("{root}/artifacts", (), "must be a model that MLflow logged"),
        ("nowhere", (), "no folder at nowhere"),
        ("https://host/model", (), "expected a run id, runs:/ID/PATH"),
        ("https://me:se/cr@et@host/model?token=x", (), "or a folder, got https://host/model; name its server with"),
        ("{exported}", ("--network", "g"), "holds one network, got --network g"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(logged, tmp_path, source, options, message):
    result = convert(
        source.format(**vars(logged)), "--output", tmp_path / "m.pt", "--tracking_uri", logged.uri, *options
    )

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not os.listdir(tmp_path)


def test_registry_that_is_not_there_is_one_line(tmp_path):
    result = convert("0" * 32, "--output", tmp_path / "m.pt", "--tracking_uri", f"sqlite:///{tmp_path}/no.db")

    assert result.exit_code == 1
    assert f"no registry at {tmp_path}/no.db" in result.stderr
    assert not os.listdir(tmp_path)


def described(folder: Path, description: str) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "MLmodel").write_text(description)
    torch.save({"w": torch.ones(1)}, folder / "data" / "model.pth")
    return folder


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("flavors: {python_function: {artifacts: {bundle: {path: artifacts/bundle}}}}", "`medgen registry pull "),
        ("flavors: {sklearn: {}}", "must be a model of mlflow.pytorch, got sklearn"),
        ("flavors: [", "MLmodel of "),
        ("nothing", "MLmodel of "),
        ("!!python/object/apply:os.system ['touch MARK']", "is damaged (ConstructorError)"),
    ],
)
def test_other_models_are_told_apart(tmp_path, description, message):
    folder = described(tmp_path / "model", description.replace("MARK", str(tmp_path / "mark")))

    result = convert(folder, "--output", tmp_path / "m.pt")

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["data/model.pth", "state_dict.pth"])
def test_poisoned_pickle_does_not_run(tmp_path, name):
    path = tmp_path / "model" / name
    path.parent.mkdir(parents=True)
    torch.save({"w": torch.ones(1), "x": Run(tmp_path / "mark")}, path)

    result = convert(tmp_path / "model", "--output", tmp_path / "m.pt")

    assert result.exit_code == 1
    assert "it names posix.system" in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]


# ---------------------------------------------------------------- exported programs


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    torch.export.save(torch.export.export(Small().eval(), (torch.ones(2, 4),)), path)
    return path


def rewritten(source: Path, target: Path, change) -> Path:
    """The archive with its list of weights, or another entry, changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name, content = change(info.filename, old.read(info.filename))
            new.writestr(name, content)
    return target


def changed_entry(**values: object):
    def change(name: str, content: bytes) -> tuple[str, bytes]:
        if name.endswith("model_weights_config.json"):
            config = json.loads(content)
            entry = config["config"]["steps"]
            for key, value in values.items():
                (entry if key in entry else entry["tensor_meta"])[key] = value
            content = json.dumps(config).encode()
        return name, content

    return change


def test_weights_of_a_program_equal_torchs_and_share_memory_again(program):
    state = read_exported_weights(program)

    expected = torch.export.load(program).state_dict
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items())
    assert state["first.weight"].data_ptr() == state["tied.weight"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_entry(use_pickle=True), "its weight steps is pickled"),
        (changed_entry(path_name="../constants/tensor_0"), "its weight steps is pickled, or lies outside"),
        (changed_entry(path_name="weight_99"), "is no program of torch.export, or a damaged one"),
        (changed_entry(dtype=99), "of a type 99 that is not read"),
        (changed_entry(sizes=[{"as_int": 2**40}], strides=[{"as_int": 0}]), "has more numbers than are stored"),
        (changed_entry(sizes=[{"as_int": 3}], strides=[{"as_int": 2}]), "or a damaged one"),
        (changed_entry(storage_offset={"as_int": -1}), "or a damaged one"),
        (changed_entry(sizes=[{"as_int": -3}]), "or a damaged one"),
        (changed_entry(sizes=None), "or a damaged one"),
        (lambda name, content: (name.replace("weights_config", "other"), content), "it has 0 lists of weights"),
        (lambda name, content: (name, b"big" if name.endswith("byteorder") else content), "not stored little-endian"),
    ],
)
def test_program_that_is_not_as_torch_writes_it_is_refused(program, tmp_path, change, message):
    path = rewritten(program, tmp_path / "model.pt2", change)

    with pytest.raises(UserError) as caught:
        read_exported_weights(path)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickles_of_a_program_are_not_even_looked_at(program, tmp_path):
    poison = io.BytesIO()
    torch.save(Run(tmp_path / "mark"), poison)
    (tmp_path / "data").mkdir()
    rewritten(
        program,
        tmp_path / "data" / "model.pt2",
        lambda name, content: (name, poison.getvalue() if name.endswith("sample_inputs/model.pt") else content),
    )

    result = convert(tmp_path, "--output", tmp_path / "m.pt")

    assert result.exit_code == 0, result.stderr
    assert_equal(tmp_path / "m.pt", Small().state_dict())
    assert sorted(os.listdir(tmp_path)) == ["data", "m.pt"]
