"""Images of a DCGAN from seeds: the same in any batch and in whatever mode the network is."""

from __future__ import annotations

import pytest
import torch

from medgen.inferers import DCGANInferer, draw_latents
from medgen.networks import DCGANGenerator

Z = 6


def generator(num_classes: int = 0) -> DCGANGenerator:
    torch.manual_seed(0)
    network = DCGANGenerator(16, Z, 3, 4, num_classes)
    with torch.no_grad():
        for layer in network.convs:
            layer.weight.mul_(20)  # images that differ from one another
        for _ in range(5):
            label = torch.randint(0, num_classes, (8,)) if num_classes else None
            network(torch.randn(8, Z), label)  # statistics that are not those of the batch
    return network


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_images_depend_on_seed_and_class_and_not_on_the_batch_or_the_mode(training, num_classes):
    network = generator(num_classes).train(training)
    labels = torch.tensor([0, 1, 2, 2]) if num_classes else None
    state = {name: value.clone() for name, value in network.state_dict().items()}

    together = DCGANInferer()(torch.tensor([5, 2, 11, 7]), network, labels=labels)
    alone = DCGANInferer()([2], network, labels=None if labels is None else labels[1:2])
    reversed_ = DCGANInferer()([7, 11, 2, 5], network, labels=None if labels is None else labels.flip(0))

    torch.testing.assert_close(alone[0], together[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reversed_.flip(0), together, rtol=1e-5, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 0.1
    assert network.training is training
    for name, value in network.state_dict().items():  # no running statistics have moved
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_images_are_the_networks_brought_to_zero_and_one():
    network = generator().eval()

    got = DCGANInferer()([3, 4], network)

    with torch.no_grad():
        raw = network(draw_latents([3, 4], Z))
    assert (got.shape, got.requires_grad) == ((2, 3, 16, 16), False)
    torch.testing.assert_close(got, (raw + 1) / 2)
    assert raw.min() < -0.5  # 0.25 and less would be clipped, were it not brought to 0 and 1 first


def test_truncation_shortens_the_latent():
    network = generator().eval()

    half, none = (DCGANInferer(truncation_psi=psi)([3, 4], network) for psi in (0.5, 0.0))

    with torch.no_grad():
        torch.testing.assert_close(half, network(draw_latents([3, 4], Z) * 0.5) / 2 + 0.5)
        torch.testing.assert_close(none, network(torch.zeros(2, Z)) / 2 + 0.5)
    torch.testing.assert_close(none[0], none[1])
