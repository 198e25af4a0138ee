"""``medgen convert``: files that load without pickle, an overlay that builds their network, and the way back."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigParser
from test_rosinality import make_generator_state
from test_stylegan2_pickle import arrays_of, make_snapshot
from typer.testing import CliRunner

from medgen import cli
from medgen.weights import read_state_dict

runner = CliRunner()


@pytest.fixture
def snapshot(tmp_path):
    return make_snapshot(tmp_path / "network.pkl", "gray32")


def convert(*arguments: object):
    return runner.invoke(cli.app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("network", "definition"),
    [("G_ema", "network_def"), ("G", "network_def"), ("D", "discriminator_def")],
)
def test_overlay_builds_the_network_that_the_weights_load_into(snapshot, tmp_path, network, definition):
    output = tmp_path / "models" / "model.pt"

    result = convert("stylegan2-ada", snapshot, "--output", output, "--network", network)

    assert result.exit_code == 0, result.stderr
    assert f"{network} of {snapshot}, 32 px -> {output}" in result.stdout
    config = json.loads((tmp_path / "models" / "model.json").read_text())
    assert list(config) == [definition]
    built = ConfigParser(config).get_parsed_content(definition)
    built.load_state_dict(torch.load(output, weights_only=True))


@torch.no_grad()
def test_image_of_the_written_files_equals_the_official_one(snapshot, tmp_path):
    convert("stylegan2-ada", snapshot, "--output", tmp_path / "model.pt", "--config", tmp_path / "overlay.json")
    arrays = arrays_of("gray32")

    config = json.loads((tmp_path / "overlay.json").read_text())
    generator = ConfigParser(config).get_parsed_content("network_def").eval()
    generator.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))

    image = generator(arrays["z"], noise="const")
    assert (image - arrays["image_noise_const"]).abs().max() < 1e-4 * arrays["image_noise_const"].abs().max()
    assert not (tmp_path / "model.json").exists()


def test_way_back_gives_the_official_state_dict(snapshot, tmp_path):
    convert("stylegan2-ada", snapshot, "--output", tmp_path / "model.pt")

    result = convert("to-stylegan2-ada", tmp_path / "model.pt", "--output", tmp_path / "official.pt")

    assert result.exit_code == 0, result.stderr
    official = read_state_dict(tmp_path / "official.pt")
    expected = {name[2:]: value for name, value in arrays_of("gray32").items() if name.startswith("G.")}
    assert official.keys() == expected.keys()
    assert all(torch.equal(official[name], value) for name, value in expected.items())


def test_rosinality_checkpoint_becomes_the_same_two_files(tmp_path):
    torch.save({"g_ema": make_generator_state(3), "latent_avg": torch.zeros(6)}, tmp_path / "c.pt")

    result = convert("rosinality", tmp_path / "c.pt", "--output", tmp_path / "model.pt")

    assert result.exit_code == 0, result.stderr
    definition = json.loads((tmp_path / "model.json").read_text())["network_def"]
    assert definition["out_channels"] == 3
    assert definition["latent_dim"] == 6
    assert "synthesis.constant" in read_state_dict(tmp_path / "model.pt")


def test_files_that_are_there_are_replaced_by_force_alone(snapshot, tmp_path):
    output, overlay = tmp_path / "model.pt", tmp_path / "model.json"
    command = ("stylegan2-ada", snapshot, "--output", output)
    for present in (output, overlay):
        present.write_text("mine")

        refused = convert(*command)

        assert refused.exit_code == 1
        assert f"must be a new file, got {present}" in refused.stderr
        assert present.read_text() == "mine"
        present.unlink()
    output.write_text("mine")

    assert convert(*command, "--force").exit_code == 0
    assert "synthesis.constant" in read_state_dict(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stylegan2-ada", "SNAPSHOT", "--output", "OUT.pkl"), "error: --output must be a file that ends in .pt"),
        (
            ("stylegan2-ada", "SNAPSHOT", "--output", "OUT.pt", "--config", "OUT"),
            "error: --config must be a file that ends in .json",
        ),
        (
            ("stylegan2-ada", "SNAPSHOT", "--output", "OUT.pt", "--network", "E"),
            "error: network must be one of G_ema, G, D, got 'E'",
        ),
        (("stylegan2-ada", "ABSENT", "--output", "OUT.pt"), "error: ABSENT cannot be read (No such file"),
        (("to-stylegan2-ada", "SNAPSHOT", "--output", "OUT.pt"), "error: SNAPSHOT is not a file of plain weights"),
        (("stylegan2-ada", "SNAPSHOT", "--output", "SNAPSHOT/model.pt"), "error: SNAPSHOT/model.pt cannot be written"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_mistake_is_one_line_and_leaves_nothing(snapshot, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    snapshot.rename("SNAPSHOT")

    result = convert(*arguments)

    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["SNAPSHOT"]


def test_hostile_file_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    class Run:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    (tmp_path / "n.pkl").write_bytes(pickle.dumps({"G_ema": Run()}))

    result = convert("stylegan2-ada", tmp_path / "n.pkl", "--output", tmp_path / "model.pt")

    assert result.exit_code == 1
    assert "it names posix.system" in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["n.pkl"]


def test_help_imports_no_framework():
    code = (
        "import sys; from medgen.cli import app\n"
        "try: app(['convert', 'stylegan2-ada', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'monai', 'mlflow', 'ignite'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout
