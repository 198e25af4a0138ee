"""The denoising objective against the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from medgen.errors import UserError
from medgen.losses import DiffusionLoss

BETAS = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205, "clip_sample": False}


def diffusion(prediction_type: str = "v_prediction", **kwargs) -> DiffusionLoss:
    return DiffusionLoss(DDPMScheduler(1000, prediction_type=prediction_type, **BETAS), **kwargs)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    return x0, noise, torch.tensor([0, 10, 300, 700, 999])


def alpha_bar(timesteps: torch.Tensor) -> torch.Tensor:
    """The source's schedule (scaled-linear from 0.0015 to 0.0205), restated in float64."""
    betas = np.linspace(0.0015**0.5, 0.0205**0.5, 1000) ** 2
    return torch.from_numpy(np.cumprod(1 - betas)[timesteps.numpy()]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction_costs_nothing_and_is_the_papers(prediction_type):
    loss = diffusion(prediction_type)
    x0, noise, t = drawn()
    a = alpha_bar(t)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    torch.testing.assert_close(loss.add_noise(x0, noise, t).double(), noisy, rtol=1e-5, atol=1e-5)
    perfect = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction_type]
    assert loss(perfect.float(), x0, noise, t) < 1e-10
    assert loss(perfect.float() + 0.5, x0, noise, t).item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_x0_by_the_clipped_snr_whatever_is_predicted(prediction_type):
    gamma = 5.0
    loss = diffusion(prediction_type, snr_gamma=gamma)
    x0, noise, t = drawn()
    a = alpha_bar(t)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    guess = x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)).double() * 0.1
    # the guess of x0, said in each parametrisation
    said = {
        "sample": guess,
        "epsilon": (noisy - a.sqrt() * guess) / (1 - a).sqrt(),
        "v_prediction": (a.sqrt() * noisy - guess) / (1 - a).sqrt(),
    }[prediction_type]
    snr = (a / (1 - a)).flatten()
    expected = (snr.clamp(max=gamma) * (guess - x0).square().flatten(1).mean(1)).mean()
    assert loss(said, x0.double(), noise.double(), t).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_flow_goes_straight_from_noise_to_the_image():
    loss = DiffusionLoss(RFlowScheduler(1000, use_discrete_timesteps=False))
    x0, noise, _ = drawn()
    t = torch.tensor([0.0, 250.0, 500.0, 750.0, 1000.0])
    share = (t / 1000).view(-1, 1, 1, 1)
    noisy = loss.add_noise(x0, noise, t)
    torch.testing.assert_close(noisy, (1 - share) * x0 + share * noise)
    # going on along the target for the rest of the time ends in the image
    torch.testing.assert_close(noisy + share * loss.target(x0, noise, t), x0, rtol=1e-4, atol=1e-5)
    timesteps = loss.draw_timesteps(x0.repeat(2000, 1, 1, 1))
    assert timesteps.is_floating_point()
    assert 0 <= timesteps.min() < 10 < 990 < timesteps.max() <= 1000


def test_drawn_timesteps_cover_the_schedule_evenly():
    timesteps = diffusion().draw_timesteps(torch.zeros(100_000, 1))
    counts = torch.bincount(timesteps, minlength=1000).double()
    assert len(counts) == 1000
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    assert 800 < chi_squared < 1200  # 999 degrees of freedom: 999 ± 45


def test_fixed_timesteps_are_the_middles_of_equal_parts():
    assert diffusion().fixed_timesteps(4) == [125, 375, 625, 875]
    assert DiffusionLoss(RFlowScheduler(1000)).fixed_timesteps(8)[0] == 62.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionLoss(DDIMScheduler(1000)), "must be MONAI's DDPMScheduler or RFlowScheduler, got DDIM"),
        (lambda: diffusion(snr_gamma=0), "snr_gamma must be a number above 0"),
        (lambda: diffusion(snr_gamma="five"), "snr_gamma must be a number above 0"),
        (lambda: DiffusionLoss(RFlowScheduler(1000), snr_gamma=5.0), "not of a rectified flow"),
    ],
)
def test_wrong_settings_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()
