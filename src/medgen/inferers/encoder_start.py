"""A projection that starts where an encoder says, instead of at the mean of w."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer

from medgen.errors import UserError
from medgen.inferers.descent import plain
from medgen.inferers.projection import StyleGAN2Projector
from medgen.networks.encoders import LatentEncoder
from medgen.networks.stylegan2 import StyleGAN2Generator

__all__ = ["EncoderStart"]


class EncoderStart(Inferer):
    """A projector, each image of which starts at an encoder's estimate of its latent.

    The noise maps start as they do without an encoder, which knows nothing of them.

    Args:
        projector: does the steps.
        encoder: from :func:`medgen.sources.load_encoder`, on the device of the images; its latents are w, or for the
            projector's space "w+" also one w for each layer. None: start at the mean of w, as the projector does.

    Raises:
        UserError: an encoder of a space that the projector does not search.
    """

    def __init__(self, projector: StyleGAN2Projector, encoder: LatentEncoder | None = None) -> None:
        if encoder is not None and encoder.space not in ("w", projector.space):
            # Styles that differ have no w that draws the same: neither the first of them nor their mean.
            remedy = "set --space w+" if encoder.space == "w+" else "name one that was trained with --space w"
            raise UserError(
                f"the encoder of a projection in {projector.space} must estimate "
                f"{' or '.join(dict.fromkeys(('w', projector.space)))}, this one estimates {encoder.space}; {remedy}"
            )
        self.projector, self.encoder = projector, encoder

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the projector and, where there is an encoder, the SHA-256 of its weights."""
        if self.encoder is None:
            return self.projector.settings
        return {**self.projector.settings, "encoder_sha256": self.encoder.sha256}

    def check(self, network: StyleGAN2Generator) -> None:
        """See that the encoder's images and latents are the generator's.

        Raises:
            UserError: they are not.
        """
        if self.encoder is None:
            return
        encoder, styles = self.encoder, network.num_ws if self.encoder.space == "w+" else 1
        channels = network.synthesis.blocks[-1].to_image.bias.numel()
        for what, its, own in (
            ("images", (encoder.in_channels, *encoder.image_size), (channels, *network.image_size)),
            ("latents", encoder.latent_shape, (styles, network.w_dim)),
        ):
            if its != own:
                raise UserError(
                    f"the {what} of the encoder must be {own} as the generator's, got {its}; name an encoder that was "
                    "trained for this generator, or its --encoder_overlay"
                )

    def __call__(
        self, inputs: torch.Tensor, network: StyleGAN2Generator, labels: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Project a batch; arguments and result as those of the projector."""
        if self.encoder is None:
            return self.projector(inputs, network, labels)
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            start_BLW = self.encoder(plain(inputs))
        return self.projector(inputs, network, labels, start_BLW if self.encoder.space == "w+" else start_BLW[:, 0])
