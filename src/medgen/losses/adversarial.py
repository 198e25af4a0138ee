"""Adversarial losses of DCGAN and SNGAN, from logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from medgen.errors import UserError

__all__ = ["AdversarialLoss"]

KINDS = ("non_saturating", "hinge")


class AdversarialLoss:
    """Loss of the discriminator, with smoothed labels on request, and of the generator.

    ``non_saturating`` (Goodfellow et al. 2014, arXiv 1406.2661, section 3): D is trained by the cross-entropy between
    ``sigmoid(D)`` and its targets, G by ``-E[log sigmoid(D(G(z)))]``. ``hinge`` (Lim & Ye 2017, arXiv 1705.02894;
    Miyato et al. 2018, arXiv 1802.05957, equations 16 and 17): D by ``E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))]``,
    G by ``-E[D(G(z))]``.

    Smoothing moves D's targets only, one-sided as Salimans et al. 2016 (arXiv 1606.03498, section 3.4) advise, or
    two-sided: the generator always aims at 1.

    Args:
        kind: ``non_saturating`` or ``hinge``.
        real_label: what D is to say of a real image, as a probability; 0.9 smooths.
        fake_label: the same of a generated one; 0.1 smooths.

    Raises:
        UserError: no such kind, labels outside 0 to 1 or in the wrong order, or smoothing of the hinge loss, which
            knows no probabilities.
    """

    # MONAI's PatchAdversarialLoss is not used: its targets are fixed, its hinge is of tanh(D), which no logit beyond
    # the margin would follow, and its cross-entropy takes the logarithm of a rounded sigmoid

    def __init__(self, kind: str = "non_saturating", real_label: float = 1.0, fake_label: float = 0.0) -> None:
        if kind not in KINDS:
            raise UserError(f"loss must be {' or '.join(KINDS)}, got {kind!r}; set --loss")
        for name, value in {"real_label": real_label, "fake_label": fake_label}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(f"{name} must be a number from 0 to 1, got {value!r}; set --{name}")
        if not fake_label < real_label:
            raise UserError(
                f"fake_label must be below real_label, got {fake_label} and {real_label}; set them to 0 and 0.9"
            )
        if kind == "hinge" and (real_label, fake_label) != (1, 0):
            raise UserError(
                f"the hinge loss has no labels to smooth, got real_label {real_label} and fake_label {fake_label}; set "
                "--real_label 1 --fake_label 0 or --loss non_saturating"
            )
        self.kind, self.real_label, self.fake_label = kind, float(real_label), float(fake_label)

    def discriminator(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        """Loss of D.

        Args:
            real_logits: of training images, any shape.
            fake_logits: of generated images, any shape.

        Returns:
            scalar: the mean over the real images plus the mean over the generated ones.
        """
        if self.kind == "hinge":
            return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        return _cross_entropy(real_logits, self.real_label) + _cross_entropy(fake_logits, self.fake_label)

    def generator(self, fake_logits: torch.Tensor) -> torch.Tensor:
        """Loss of G.

        Args:
            fake_logits: of generated images, any shape.

        Returns:
            scalar.
        """
        return -fake_logits.mean() if self.kind == "hinge" else _cross_entropy(fake_logits, 1.0)


def _cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
