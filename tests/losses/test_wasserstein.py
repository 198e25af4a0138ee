"""Losses of the Wasserstein GAN against what their equations give by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medgen.errors import UserError
from medgen.losses import critic_loss, gradient_penalty


def test_critic_loss_is_the_difference_of_the_means_and_the_drift_of_the_real_scores():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0, 4.0])
    assert critic_loss(real, fake, drift=0.0) == pytest.approx(1.0 - 2.0)
    assert critic_loss(real, fake, drift=0.1) == pytest.approx(-1.0 + 0.1 * (1 + 9) / 2)
    assert critic_loss(real, fake) == pytest.approx(-1.0 + 0.005)


@pytest.mark.parametrize(("scale", "target", "expected"), [(1.0, 1.0, 10.0), (0.5, 1.0, 0.0), (2.0, 4.0, 0.0)])
def test_penalty_of_a_linear_critic_is_known(scale, target, expected):
    # D(x) = scale · sum of four pixels: its gradient has the norm 2 · scale everywhere
    images = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    penalty = gradient_penalty(lambda x: scale * x.sum((1, 2, 3)), *images, weight=10.0, target=target)
    assert float(penalty) == pytest.approx(expected, abs=1e-5)


def test_a_larger_target_scales_the_penalty_by_its_square():
    images = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)
    penalty = gradient_penalty(lambda x: x.sum((1, 2, 3)), *images, weight=10.0, target=750.0)
    assert float(penalty) == pytest.approx(10 * (2 - 750) ** 2 / 750**2, rel=1e-5)


def test_penalty_is_taken_between_the_images_and_not_beyond():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.zeros(200, 1, 1, 1), torch.ones(200, 1, 1, 1)
    torch.manual_seed(0)
    penalty = gradient_penalty(critic, real, fake, weight=1.0).detach()
    points = seen[0].flatten()
    assert 0 <= points.min() < 0.05
    assert 0.95 < points.max() <= 1
    assert abs(points.mean() - 0.5) < 0.06  # uniform: 3 standard errors
    assert float(penalty) == pytest.approx(float((2 * points - 1).square().mean()), rel=1e-5)


def test_gradient_reaches_the_critic_and_is_that_of_finite_differences():
    torch.manual_seed(1)
    critic = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 1)).double()
    images = torch.rand(2, 1, 4, 4).double(), torch.rand(2, 1, 4, 4).double()

    def penalty():
        torch.manual_seed(2)
        return gradient_penalty(critic, *images)

    weight = critic[0].weight
    penalty().backward()
    for place in [(0, 0, 0, 0), (1, 0, 2, 1), (2, 0, 1, 1)]:
        before, steps = weight.data[place].item(), []
        for step in (1e-6, -1e-6):
            weight.data[place] = before + step
            steps.append(penalty().item())
        weight.data[place] = before
        assert weight.grad[place].item() == pytest.approx((steps[0] - steps[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_images_themselves_get_no_gradient():
    real, fake = torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2, requires_grad=True)
    weight = torch.ones((), requires_grad=True)
    gradient_penalty(lambda x: weight * x.square().sum((1, 2, 3)), real, fake).backward()
    assert fake.grad is None
    assert weight.grad is not None


def test_mistakes_are_told():
    with pytest.raises(UserError, match=r"as many generated images as real ones, of one shape, got \(2, 1, 4, 4\)"):
        gradient_penalty(lambda x: x.sum((1, 2, 3)), torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4))
    with pytest.raises(UserError, match="target must be positive, got 0"):
        gradient_penalty(lambda x: x.sum((1, 2, 3)), torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), target=0)
