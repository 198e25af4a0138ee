"""Registered bundles as sources of ``medgen convert``: named by their URI wherever a bundle or weights are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medgen import cli
from medgen.bundle_config import build_network
from medgen.bundle_zip import read_zip
from medgen.data.image_set import file_sha256

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore:Parameter `min_size` is deprecated:FutureWarning"),  # MONAI's own
]
BUNDLE = Path(__file__).parents[2] / "bundles" / "lung_segmentation"
DEMO = BUNDLE / "configs" / "demo.json"
URI = "models:/lungs@champion"
runner = CliRunner()


def convert(*arguments: object):
    return runner.invoke(cli.app, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Address of a registry with the demo's network, and the file of its weights."""
    from medgen.registry import register_bundle

    folder = tmp_path_factory.mktemp("registry")
    torch.manual_seed(0)
    torch.save(build_network(BUNDLE, overlays=[DEMO]).state_dict(), folder / "model.pt")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    register_bundle(BUNDLE, "lungs", uri, "champion", overlays=[DEMO], weights=folder / "model.pt")
    return uri, folder / "model.pt"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_its_network_is_exported_without_an_overlay(registry, tmp_path):
    result = convert(
        "export", URI, "--format", "torchscript", "--output", tmp_path / "m.ts", "--tracking_uri", registry[0]
    )

    assert result.exit_code == 0, result.stderr
    assert f"DropoutUNet of {URI}, scripted" in result.stdout
    assert os.listdir(tmp_path) == ["m.ts"]


def test_its_weights_are_taken_for_those_of_a_folder(registry, tmp_path):
    options = ("--overlay", DEMO, "--weights", URI, "--tracking_uri", registry[0], "--check_inputs", 1)

    result = convert("export", BUNDLE, "--format", "torchscript", "--output", tmp_path / "m.ts", *options)

    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("bundle", "options", "message"),
    [
        (BUNDLE, ("--weights", "gs://bucket/model.pt"), "got gs://bucket/model.pt; set --weights"),
        ("https://me:secret@host/bundle", (), "got https://host/bundle, where no configs/inference.json is"),
    ],
)
def test_mistake_is_told_by_the_name_of_the_option_and_without_a_password(registry, tmp_path, bundle, options, message):
    result = convert("push", bundle, "--output", tmp_path, "--tracking_uri", registry[0], *options)

    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert message in result.stderr
    assert "model_path" not in result.stderr
    assert "secret" not in result.stderr


def test_it_is_pushed_as_it_was_registered(registry, tmp_path):
    uri, weights = registry

    result = convert("push", URI, "--output", tmp_path, "--tracking_uri", uri)

    assert result.exit_code == 0, result.stderr
    (archive,) = tmp_path.glob("*.zip")
    assert archive.name.startswith("lung_segmentation_v")
    assert file_sha256(read_zip(archive, tmp_path / "new") / "models" / "model.pt") == file_sha256(weights)


def test_it_is_no_model_to_convert(registry, tmp_path):
    result = convert("mlflow", URI, "--output", tmp_path / "m.pt", "--tracking_uri", registry[0])

    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{URI} is a registered bundle; fetch it whole with `medgen registry pull {URI} FOLDER`" in result.stderr
    assert not os.listdir(tmp_path)
