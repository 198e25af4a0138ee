"""Generators in the layout of PyTorch's DCGAN example: the images of the plain stack of layers, written out here."""

from __future__ import annotations

import json

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn
from typer.testing import CliRunner

from medgen import cli
from medgen.convert import convert_dcgan
from medgen.errors import UserError
from medgen.networks import DCGANGenerator


class Generator(nn.Module):
    """The example's: one stack of layers called main."""

    def __init__(self, side: int, latent: int, width: int, channels: int) -> None:
        super().__init__()
        widths = [width * side // 8 // 2**level for level in range((side // 8).bit_length())]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, widths[0], 4, 1, 0, bias=False)]
        for before, after in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(before), nn.ReLU(True), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


def trained(side: int, latent: int, width: int, channels: int) -> Generator:
    """A generator whose normalisations hold statistics of their own."""
    torch.manual_seed(0)
    network = Generator(side, latent, width, channels)
    for _ in range(3):
        network(torch.randn(8, latent, 1, 1))
    return network.eval()


def convert(*arguments: object):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


@torch.no_grad()
@pytest.mark.parametrize(("side", "latent", "width", "channels"), [(64, 100, 4, 3), (128, 256, 2, 3), (32, 16, 3, 1)])
def test_images_are_those_of_the_foreign_network(tmp_path, side, latent, width, channels):
    network = trained(side, latent, width, channels)
    torch.save(network.state_dict(), tmp_path / "netG")
    z = torch.randn(5, latent)

    converted = convert_dcgan(tmp_path / "netG")

    expected = {"image_size": side, "latent_dim": latent, "out_channels": channels, "base_channels": width}
    assert converted.settings == expected
    ours = DCGANGenerator(**converted.settings).eval()
    ours.load_state_dict(converted.state)
    torch.testing.assert_close(ours(z), network(z[:, :, None, None]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["parallel", "half", "old", "module"])
def test_state_dict_is_found_in_the_forms_that_it_comes_in(tmp_path, form):
    network = trained(16, 8, 2, 3)
    plain = network.state_dict()
    saved = {
        "parallel": {f"module.{name}": value for name, value in plain.items()},
        "half": {name: value.half() if value.is_floating_point() else value for name, value in plain.items()},
        "old": {name: value for name, value in plain.items() if not name.endswith("num_batches_tracked")},
        "module": nn.DataParallel(network.main),
    }[form]
    if form == "module":  # as one whose only child is called main
        saved = nn.Module()
        saved.main = network.main
    torch.save(saved, tmp_path / "netG.pth")

    state = convert_dcgan(tmp_path / "netG.pth").state

    assert state.keys() == DCGANGenerator(16, 8, 3, 2).state_dict().keys()
    expected = plain["main.3.weight"].half().float() if form == "half" else plain["main.3.weight"]
    assert torch.equal(state["convs.1.weight"], expected)
    assert torch.equal(state["norms.1.running_var"].half(), plain["main.4.running_var"].half())


def discriminator(_: dict) -> dict:
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 4, 2, 1, bias=False)
    )
    return {f"main.{name}": value for name, value in layers.state_dict().items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (discriminator, r"expected a generator of PyTorch's DCGAN example, got .*netG with main.2.weight"),
        (lambda state: {**state, "main.6.bias": torch.ones(2)}, "netG with main.6.bias; such a network is not read"),
        (lambda state: {**state, "fc.weight": torch.ones(2, 2)}, "netG with fc.weight; such a network is not read"),
        (lambda state: {k: v for k, v in state.items() if k != "main.4.bias"}, "got nothing"),
        (lambda state: {**state, "main.3.weight": torch.ones(4, 5, 4, 4)}, "belongs to another architecture"),
        (lambda state: {k: v for k, v in state.items() if k[5] == "0"}, "with 1 convolutions"),
        (lambda state: {"netG": state}, "expected a module or a state dict, got netG"),
    ],
)
def test_other_networks_are_refused_in_one_line(tmp_path, change, message):
    torch.save(change(trained(16, 8, 2, 3).state_dict()), tmp_path / "netG")

    with pytest.raises(UserError, match=message) as caught:
        convert_dcgan(tmp_path / "netG")

    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harm"), "w")

    torch.save({"main.0.weight": Harm()}, tmp_path / "netG")

    with pytest.raises(UserError, match="nothing in it was run"):
        convert_dcgan(tmp_path / "netG")
    assert not (tmp_path / "harm").exists()


def test_command_writes_weights_and_an_overlay_of_a_bundles_ids(tmp_path):
    network = trained(16, 8, 2, 3)
    torch.save(network.state_dict(), tmp_path / "netG")
    output = tmp_path / "models" / "model.pt"

    result = convert("dcgan", tmp_path / "netG", "--output", output)

    assert result.exit_code == 0, result.output
    assert "image_size 16, latent_dim 8, in_channels 3, g_channels 2" in result.output
    overlay = json.loads((tmp_path / "models" / "model.json").read_text())
    definition = {
        "_target_": "medgen.networks.DCGANGenerator",
        "image_size": "@image_size",
        "latent_dim": "@latent_dim",
    }
    definition |= {"out_channels": "@in_channels", "base_channels": "@g_channels"}
    built = ConfigParser({**overlay, "network_def": definition}).get_parsed_content("network_def")
    built.load_state_dict(torch.load(output, weights_only=True))
    again = convert("dcgan", tmp_path / "netG", "--output", output)
    assert again.exit_code == 1
    assert "choose another or add --force" in again.stderr


def test_records_of_other_weights_go_with_them_and_with_no_others(tmp_path):
    torch.save(trained(16, 8, 2, 3).state_dict(), tmp_path / "netG")
    records = [tmp_path / name for name in ("trained_on.json", "trained_as.json")]
    for record in records:
        record.write_text("{}")

    convert("dcgan", tmp_path / "netG", "--output", tmp_path / "other.pt")
    assert all(record.exists() for record in records)  # of the weights beside which this file is new
    (tmp_path / "model.pt").write_bytes(b"trained here")
    result = convert("dcgan", tmp_path / "netG", "--output", tmp_path / "model.pt", "--force")

    assert result.exit_code == 0, result.output
    assert not any(record.exists() for record in records)
