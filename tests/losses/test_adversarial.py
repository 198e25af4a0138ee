"""Adversarial losses against the papers' formulas, and what smoothing does to their minima."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen.errors import UserError
from medgen.losses import AdversarialLoss

REAL, FAKE = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5])


def test_non_saturating_loss_is_that_of_the_formula():
    # in double precision, by probabilities
    real, fake = (1 / (1 + np.exp(-logits.double().numpy())) for logits in (REAL, FAKE))
    loss = AdversarialLoss()

    expected = -np.log(real).mean() - np.log(1 - fake).mean()
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(expected, rel=1e-6)
    assert loss.generator(FAKE).item() == pytest.approx(-np.log(fake).mean(), rel=1e-6)


def test_hinge_loss_is_that_of_the_formula():
    loss = AdversarialLoss("hinge")
    # real: max(0, 1 - 2) = 0, 1 + 1 = 2, 0.7; generated: max(0, 1 - 3) = 0, 1.5
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(2.7 / 3 + 1.5 / 2)
    assert loss.generator(FAKE).item() == pytest.approx(2.5 / 2)


@pytest.mark.parametrize(("real_label", "fake_label"), [(1.0, 0.0), (0.9, 0.0), (0.9, 0.1), (1.0, 0.2)])
def test_smoothing_moves_the_discriminators_targets_and_not_the_generators(real_label, fake_label):
    loss = AdversarialLoss("non_saturating", real_label, fake_label)
    real, fake = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))

    # the minimum over the logits is where sigmoid is the label: there the gradient is 0
    for logits, label, total in (
        (real, real_label, lambda: loss.discriminator(real, fake.detach())),
        (fake, fake_label, lambda: loss.discriminator(real.detach(), fake)),
    ):
        for probability in np.linspace(0.05, 0.95, 19):
            logits.data.fill_(np.log(probability / (1 - probability)))
            (gradient,) = torch.autograd.grad(total(), logits)
            assert gradient.item() == pytest.approx(probability - label, abs=1e-9)

    plain = AdversarialLoss()
    assert loss.generator(FAKE).item() == plain.generator(FAKE).item()


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_gradient_of_the_generator_does_not_vanish_where_the_discriminator_is_sure(kind):
    logits = torch.tensor([-60.0], requires_grad=True)
    loss = AdversarialLoss(kind)
    loss.generator(logits).backward()
    assert logits.grad.item() == pytest.approx(-1)
    assert loss.discriminator(torch.tensor([500.0]), torch.tensor([-500.0])).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wasserstein",), "loss must be non_saturating or hinge, got 'wasserstein'; set --loss"),
        (("non_saturating", 1.2), r"real_label must be a number from 0 to 1, got 1\.2; set --real_label"),
        (("non_saturating", 1.0, "0.1"), r"fake_label must be a number from 0 to 1, got '0\.1'"),
        (("non_saturating", float("nan")), "real_label must be a number from 0 to 1, got nan"),
        (("non_saturating", 0.1, 0.9), r"fake_label must be below real_label, got 0\.9 and 0\.1"),
        (
            ("hinge", 0.9),
            r"the hinge loss has no labels to smooth, got real_label 0\.9 and fake_label 0\.0; set --real",
        ),
    ],
)
def test_settings_that_make_no_loss_are_told(arguments, message):
    with pytest.raises(UserError, match=message) as told:
        AdversarialLoss(*arguments)
    assert "\n" not in str(told.value)
