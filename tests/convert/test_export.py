"""Networks of all bundles in three formats: what is kept equals the network, and what would not is not kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from medgen import cli
from medgen.bundle_config import build_network
from medgen.convert import FORMATS, export_network
from medgen.convert import export as exporting
from medgen.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
BUNDLES = Path(__file__).parents[2] / "bundles"
# Each network in the formats that its own code could break; MONAI's exporters run over the demos of all bundles in
# tests/bundles/test_zoo_rules.py.
TINY_DIFFUSION = {
    "channels": [32, 32],
    "attention_levels": [False, True],
    "num_head_channels": [0, 32],
    "num_res_blocks": 1,
    "context_dim": 8,
}
TINY_STYLES = {"_target_": "medgen.networks.StyleGAN2Generator", "image_size": 16, "latent_dim": 8, "w_dim": 8}
NETWORKS = {
    "augmentation_classifier": ("demo.json",),
    "cxr_autoencoder_kl": ("demo.json",),
    "cxr_inversion_encoder": ("demo.json",),
    "cxr_inversion_encoder w+": ("w_plus.json", "demo.json"),
    "cxr_latent_diffusion": (TINY_DIFFUSION,),
    "cxr_latent_diffusion labels": ("labels.json", TINY_DIFFUSION),
    "cxr_pggan": ("demo.json",),
    "lung_segmentation": ("demo.json",),
    "skin_sngan": ("demo.json",),
    "stylegan2_anomaly": ("demo.json",),
    "stylegan2_anomaly classes": ({"network_def": {**TINY_STYLES, "num_classes": 3}},),
}
CASES = [
    *((name, "torchscript") for name in NETWORKS),
    ("cxr_latent_diffusion", "torch_export"),
    ("cxr_latent_diffusion labels", "onnx"),
    ("cxr_pggan", "onnx"),
    ("stylegan2_anomaly classes", "torch_export"),
]
runner = CliRunner()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Branching(Plain):
    """What a tracer cannot see: its way depends on the values."""

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.conv(x) if x.mean() < 0.5 else -self.conv(x)


class Counting(Plain):
    """Takes the batch of its example for a constant."""

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.conv(x).reshape(-1)[: 2 * 4 * int(x.shape[0])].reshape(int(x.shape[0]), -1)


class Several(Plain):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, self.conv(x)


class Unbounded(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) / 0


def weights_of(network: nn.Module, path: Path) -> Path:
    """Weights in every layer: those that begin at zero would make any export look right."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def no_trace_of_the_compiler():
    """torch writes thousands of records for its own tools, and pytest would keep them all."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = False
    yield
    trace.propagate = True


def own_bundle(folder: Path, network: type[nn.Module], spatial_shape: list = (8, 8)) -> Path:
    """A bundle of a network of this file."""
    (folder / "configs").mkdir(parents=True)
    config = {"network_def": {"_target_": f"{__name__}.{network.__name__}"}}
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    image = {"format": "magnitude", "num_channels": 1, "spatial_shape": list(spatial_shape), "dtype": "float32"}
    metadata = {"version": "1.0.0", "network_data_format": {"inputs": {"image": image}}}
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    (folder / "models").mkdir()
    torch.save(network().state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.mark.parametrize(("name", "file_format"), CASES)
def test_every_network_equals_itself(tmp_path, tmp_path_factory, name, file_format):
    bundle, folder = BUNDLES / name.partition(" ")[0], tmp_path_factory.mktemp("given")
    overlays = [bundle / "configs" / overlay for overlay in NETWORKS[name] if isinstance(overlay, str)]
    for overlay in NETWORKS[name]:
        if isinstance(overlay, dict):
            (folder / "overlay.json").write_text(json.dumps(overlay))
            overlays.append(folder / "overlay.json")
    torch.manual_seed(0)
    weights = weights_of(build_network(bundle, overlays=overlays), folder / "model.pt")
    output = tmp_path / f"model{FORMATS[file_format]}"

    done = export_network(bundle, output, file_format, overlays, weights, check_inputs=2)

    assert done.files == (output,)
    assert os.listdir(tmp_path) == [output.name]
    assert done.compared == 4
    assert done.spread > 1e-3
    assert done.difference <= (1e-5 if file_format == "onnx" else 1e-6) * done.spread
    is_free = bundle.name in (
        "augmentation_classifier",
        "cxr_autoencoder_kl",
        "cxr_latent_diffusion",
        "lung_segmentation",
    )
    assert ("*n" in done.inputs) == is_free


@pytest.fixture(scope="module")
def lungs():
    """The segmentation of the demo with its weights, to be compared with from outside."""
    bundle = BUNDLES / "lung_segmentation"
    torch.manual_seed(0)
    return bundle, bundle / "configs" / "demo.json"


@torch.no_grad()
def test_files_run_by_themselves_and_carry_the_metadata(lungs, tmp_path):
    import onnxruntime

    bundle, overlay = lungs
    network = build_network(bundle, overlays=[overlay]).eval()
    weights = weights_of(network, tmp_path / "w.pt")
    x = torch.rand(5, 1, 96, 64)  # another batch and size than any that was compared
    expected = network(x)

    for file_format, suffix in FORMATS.items():
        export_network(bundle, tmp_path / f"m{suffix}", file_format, [overlay], weights, check_inputs=1)

    extra = {"metadata.json": ""}
    scripted = torch.jit.load(tmp_path / "m.ts", _extra_files=extra)
    torch.testing.assert_close(scripted(x), expected)
    assert (
        json.loads(extra["metadata.json"])["name"] == json.loads((bundle / "configs/metadata.json").read_text())["name"]
    )
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), expected)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(["pred"], {"x": x.numpy()})
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5 * float(expected.max() - expected.min()))
    assert "metadata.json" in session.get_modelmeta().custom_metadata_map
    assert isinstance(session.get_inputs()[0].shape[0], str)


def test_weights_of_a_large_onnx_model_lie_beside_it(tmp_path, monkeypatch):
    import onnxruntime

    bundle = own_bundle(tmp_path / "bundle", Plain)
    monkeypatch.setattr(exporting, "ONNX_LIMIT", 0)

    done = export_network(bundle, tmp_path / "out" / "m.onnx", "onnx", check_inputs=1)

    assert [path.name for path in done.files] == ["m.onnx", "m.onnx.data"]
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "m.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "moved")
    onnxruntime.InferenceSession(tmp_path / "moved" / "m.onnx", providers=["CPUExecutionProvider"])


def test_command_prints_what_was_compared(lungs, tmp_path):
    bundle, overlay = lungs
    weights = weights_of(build_network(bundle, overlays=[overlay]), tmp_path / "w.pt")
    command = ["convert", "export", bundle, "--format", "torchscript", "--output", tmp_path / "m.ts"]
    options = ["--overlay", overlay, "--weights", weights, "--check_inputs", 1]

    first, second = (runner.invoke(cli.app, [*map(str, [*command, *options])]) for _ in range(2))

    assert first.exit_code == 0, first.stderr
    assert f"DropoutUNet of {bundle}, scripted: x (B, 1, 32*n, 32*n) -> {tmp_path / 'm.ts'}" in first.stdout
    assert "largest difference on 2 random batches: 0, 0 of the output's range" in first.stdout
    assert (second.exit_code, second.stderr.count("\n")) == (1, 1)
    assert "must be a new file" in second.stderr


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("network", "file_format", "message"),
    [
        (Branching, "torchscript", "torchscript of Branching must differ by at most 0.0001 of the output's range"),
        (Branching, "torch_export", "Branching cannot be written as torch_export ("),
        (Branching, "onnx", "Branching cannot be written as onnx ("),
        (Counting, "torchscript", "torchscript of Counting gives (2,"),
        (Several, "onnx", "network_def must return one tensor, got tuple"),
        (Unbounded, "torchscript", "Unbounded gives NaN or infinite values with these weights"),
    ],
)
def test_network_that_a_format_cannot_hold_is_one_line_and_leaves_nothing(tmp_path, network, file_format, message):
    bundle = own_bundle(tmp_path / "bundle", network)
    output = tmp_path / f"m{FORMATS[file_format]}"

    with pytest.raises(UserError) as caught:
        export_network(bundle, output, file_format, check_inputs=8)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["bundle"]


def test_file_that_was_there_is_kept_when_its_successor_fails(tmp_path):
    bundle = own_bundle(tmp_path / "bundle", Branching)
    (tmp_path / "m.ts").write_text("mine")

    with pytest.raises(UserError, match=r"torchscript of Branching must differ by at most 0\.01 of the output's range"):
        export_network(bundle, tmp_path / "m.ts", "torchscript", check_inputs=8, tolerance=0.01)

    assert (tmp_path / "m.ts").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["bundle", "m.ts"]


class Run:
    def __init__(self, mark: object) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "m.ts"), "--output must be a file that ends in .onnx"),
        (("--format", "onnxx"), "--format must be one of torchscript, torch_export, onnx, got 'onnxx'"),
        (
            ("--weights", "nowhere.pt"),
            "no weights at nowhere.pt; train the bundle first, or name a file with --weights",
        ),
        (("--weights", "poison.pt"), "poison.pt is not a file of plain weights"),
        (("--weights", "other.pt"), "other.pt belongs to another architecture"),
        (("--device", "tpu"), "device must be one of cpu"),
        (("--tolerance", "2"), "--tolerance must be above 0 and below 1, got 2.0"),
        (("--output", "poison.pt/m.onnx"), "poison.pt/m.onnx cannot be written"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(lungs, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    bundle, overlay = lungs
    torch.save(Run(tmp_path / "mark"), "poison.pt")
    torch.save({"w": torch.ones(1)}, "other.pt")
    weights_of(build_network(bundle, overlays=[overlay]), Path("w.pt"))
    defaults = {"--format": "onnx", "--output": "m.onnx", "--overlay": str(overlay), "--weights": "w.pt"}
    given = defaults | dict([options])
    before = sorted(os.listdir())

    result = runner.invoke(
        cli.app, ["convert", "export", str(bundle), *[part for pair in given.items() for part in pair]]
    )

    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("shape", [["2**p", "2**p"], ["n + 1", "n"]])
def test_size_that_has_no_example_is_refused(tmp_path, shape):
    bundle = own_bundle(tmp_path / "bundle", Branching, shape)

    with pytest.raises(UserError, match="expected sizes such as 64"):
        export_network(bundle, tmp_path / "m.ts", "torchscript")


def test_folder_that_is_no_bundle_is_refused(tmp_path):
    result = runner.invoke(
        cli.app, ["convert", "export", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "m.onnx")]
    )

    assert result.exit_code == 1
    assert "expected a bundle's folder, models:/NAME@ALIAS or models:/NAME/VERSION" in result.stderr
    assert not os.listdir(tmp_path)
