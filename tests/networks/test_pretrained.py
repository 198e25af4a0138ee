"""Weights from elsewhere as the beginning of a classifier, against torchvision's own DenseNet."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from monai.networks.nets import DenseNet, EfficientNetBN
from torchvision.models import densenet

from medgen.errors import UserError
from medgen.networks import load_pretrained

SMALL = {"growth_rate": 4, "block_config": (2, 2)}


@pytest.fixture
def theirs():
    """torchvision's network with numbers in every entry, and an image."""
    torch.manual_seed(0)
    network = densenet.DenseNet(num_init_features=8, num_classes=3, **SMALL)
    network(torch.rand(4, 3, 32, 32))  # moves the statistics of its normalisation
    return network.eval()


def ours(num_classes: int = 3, **settings: object) -> DenseNet:
    torch.manual_seed(1)
    return DenseNet(2, 3, num_classes, init_features=8, **(SMALL | settings))


def saved(state, path):
    torch.save(dict(state), path)
    return path


@pytest.mark.parametrize(
    "rename", [str, lambda name: re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name), "module.{}".format]
)
@torch.no_grad()
def test_densenet_of_torchvision_computes_the_same_in_monais(rename, theirs, tmp_path):
    state = {
        rename(name) if "denselayer" in name or "{" in str(rename) else name: value
        for name, value in theirs.state_dict().items()
    }
    x = torch.rand(2, 3, 32, 32)

    network = load_pretrained(ours(), saved(state, tmp_path / "w.pth")).eval()

    torch.testing.assert_close(network(x), theirs(x))


@torch.no_grad()
def test_layer_of_the_classes_begins_anew_for_another_number_of_them(theirs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, fresh = saved(theirs.state_dict(), tmp_path / "w.pth"), ours(num_classes=2)
    head = {name: value.clone() for name, value in fresh.class_layers.state_dict().items()}

    network = load_pretrained(fresh, path).eval()

    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network.features(x), theirs.features(x))
    torch.testing.assert_close(network.class_layers.state_dict(), head, rtol=0, atol=0)
    assert "all layers but that of the classes, which begins anew" in caplog.text


def test_efficientnet_in_one_row_of_blocks_is_put_into_stages(tmp_path):
    torch.manual_seed(0)
    source, network = (EfficientNetBN("efficientnet-b0", pretrained=False, num_classes=2) for _ in range(2))
    # the layout of the weights that MONAI itself would download: blocks numbered through
    flat = {re.sub(r"^(_blocks)\.\d+\.", r"\1.", name): value for name, value in source.state_dict().items()}

    load_pretrained(network, saved(flat, tmp_path / "w.pth"))

    torch.testing.assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_nothing_is_read_without_a_path():
    network = ours()
    assert load_pretrained(network, None) is network


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(3, 3)}, "holds no weights of this DenseNet: its entries are weight"),
        ({"net": {"weight": torch.zeros(3)}}, "must be one flat state dict"),
        (ours(growth_rate=8).state_dict(), "belongs to another architecture"),
        (ours(block_config=(2,)).state_dict(), "belongs to another architecture"),
        (ours(block_config=(2, 2, 2)).state_dict(), "belongs to another architecture"),
    ],
)
def test_weights_of_something_else_are_refused(state, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(ours(), saved(state, tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
