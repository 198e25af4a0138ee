"""Validation at fixed timesteps and noise, and encoding in the step."""

from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler
from torch import nn

from medgen.inferers import DenoisingInferer, PosteriorEncoder
from medgen.losses import DiffusionLoss


class Recorder(nn.Module):
    """Predicts a constant and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[torch.Tensor, torch.Tensor, dict]] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        self.calls.append((x, timesteps, condition))
        return self.constant.expand_as(x)


@pytest.fixture
def loss() -> DiffusionLoss:
    return DiffusionLoss(DDPMScheduler(1000, prediction_type="epsilon", clip_sample=False))


def test_the_same_image_is_asked_the_same_whatever_its_batch_and_epoch(loss):
    inferer, network = DenoisingInferer(loss, levels=3), Recorder()
    latents = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    together = inferer(latents, network, seeds=torch.arange(4))
    torch.manual_seed(2)
    alone = inferer(latents[2:3], network, seeds=[2])
    assert torch.equal(together["target"][2:3], alone["target"])
    assert together["pred"].shape == together["target"].shape == (4, 3, 3, 8, 8)
    assert [call[1].tolist() for call in network.calls[:3]] == [[166] * 4, [500] * 4, [833] * 4]
    # noise differs between images and between levels
    noise = together["target"].flatten(2)
    assert torch.unique(noise.reshape(12, -1), dim=0).shape[0] == 12
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_captions_reach_the_network_through_the_conditioner(loss):
    def conditioner(values: list[str]) -> dict[str, torch.Tensor]:
        return {"context": torch.tensor([len(value) for value in values])}

    network = Recorder()
    DenoisingInferer(loss, 1, conditioner)(torch.zeros(2, 3, 8, 8), network, seeds=[0, 1], condition=["a", "bcd"])
    assert network.calls[0][2]["context"].tolist() == [1, 3]


class Posterior:
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images * 2, torch.full_like(images, 0.25)


class Whitening:
    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents - 1) * 10


def test_the_encoder_draws_from_the_posterior_or_takes_its_mean():
    images = torch.rand(2, 3, 64, 64)
    mean = PosteriorEncoder(Posterior(), Whitening(), sample=False)(images)
    torch.testing.assert_close(mean, (images * 2 - 1) * 10)
    torch.manual_seed(0)
    drawn = PosteriorEncoder(Posterior(), Whitening())(images)
    assert (drawn - mean).std().item() == pytest.approx(2.5, rel=0.03)
    torch.manual_seed(0)
    assert torch.equal(drawn, PosteriorEncoder(Posterior(), Whitening())(images))
