"""Loss of an inversion: how far a reconstruction is from its image in pixels, to LPIPS, and to a third network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.losses.projection import (
    EmbeddingLoss,
    Features,
    LPIPSProjectionLoss,
    PixelMSSSIMLoss,
    ProjectionLoss,
    unit_vectors,
)
from medgen.metrics.protocols import IMAGENET_MEAN, IMAGENET_STD
from medgen.settings import check_between
from medgen.weights import state_digest

__all__ = ["DiscriminatorLoss", "InversionLoss", "MoCoLoss", "inversion_loss"]

# Tov et al. 2021 (e4e), arXiv 2102.02766, and the inversion of chest radiographs after it
PIXEL_WEIGHT, PERCEPTUAL_WEIGHT, SIMILARITY_WEIGHT = 1.0, 0.8, 0.1
MOCO_SIDE = 224  # of the images that MoCo was trained on
MOCO_FILE = "moco_v2_800ep_pretrain.pth.tar"
MOCO_URL = f"https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/{MOCO_FILE}"
# of the query encoder in MoCo's checkpoint, with and without its DistributedDataParallel, and of a bare ResNet-50
MOCO_PREFIXES = ("module.encoder_q.", "encoder_q.", "module.backbone.", "backbone.", "module.", "")
LARGEST_WEIGHT = 1e12  # far beyond any use, far below what float32 can hold


def inversion_loss(
    pixel_weight: float = PIXEL_WEIGHT,
    perceptual_weight: float = PERCEPTUAL_WEIGHT,
    perceptual_weights: str | Path | None = None,
    ms_ssim_weight: float = 0.0,
    similarity_weight: float = SIMILARITY_WEIGHT,
    similarity_weights: str | Path | None = None,
    discriminator: nn.Module | None = None,
) -> InversionLoss:
    """The loss of e4e: ``1 · mean square + 0.8 · LPIPS (AlexNet) + 0.1 · dissimilarity``, and MS-SSIM on request.

    A term of weight 0 is left out, and needs no file.

    Args:
        pixel_weight: of the mean square.
        perceptual_weight: of LPIPS, see :class:`~medgen.losses.LPIPSProjectionLoss`.
        perceptual_weights: state dict of torchvision's AlexNet; None for the file in torch's own cache.
        ms_ssim_weight: of 1 - MS-SSIM, see :class:`~medgen.losses.PixelMSSSIMLoss`.
        similarity_weight: of the dissimilarity to a third network.
        similarity_weights: MoCo v2's ResNet-50, see :class:`MoCoLoss`.
        discriminator: the generator's own, which stands in where there are no similarity_weights, see
            :class:`DiscriminatorLoss`.

    Raises:
        UserError: a weight below 0, none above 0, no network for the similarity, or a file that is missing or holds
            something else.
    """
    weights = {
        "pixel": pixel_weight,
        "perceptual": perceptual_weight,
        "ms_ssim": ms_ssim_weight,
        "similarity": similarity_weight,
    }
    check_between(0, LARGEST_WEIGHT, **{f"{name}_weight": weight for name, weight in weights.items()})
    terms: dict[str, ProjectionLoss] = {}
    if pixel_weight:
        terms["pixel"] = PixelMSSSIMLoss(pixel_weight=1, ssim_weight=0)
    if perceptual_weight:
        terms["perceptual"] = LPIPSProjectionLoss(perceptual_weights, "alex")
    if ms_ssim_weight:
        terms["ms_ssim"] = PixelMSSSIMLoss(pixel_weight=0, ssim_weight=1)
    if similarity_weight:
        if similarity_weights is not None:
            terms["similarity"] = MoCoLoss(similarity_weights)
        elif discriminator is not None:
            terms["similarity"] = DiscriminatorLoss(discriminator)
        else:
            raise UserError(
                f"similarity_weight {similarity_weight:g} needs a network; name a file of MoCo v2's ResNet-50 with "
                "--similarity_weights, or a checkpoint of the generator's training with --discriminator_checkpoint, or "
                "leave the term out with --similarity_weight 0"
            )
    return InversionLoss(terms, {name: weights[name] for name in terms})


class MoCoLoss(EmbeddingLoss):
    """``1 - cos`` of two images' features in MoCo v2's ResNet-50 (Chen et al. 2020, arXiv 2003.04297), as in e4e.

    The features are the 2,048 after the last pooling; the layers that MoCo's contrastive loss looked through are left
    out. Images become 224×224, bilinear with antialiasing, and are normalised as ImageNet's were; a grey one stands for
    all three channels.

    Args:
        weights: MoCo's checkpoint, of which the query encoder is taken, or a state dict of torchvision's ResNet-50, its
            names plain or behind ``encoder_q.`` or ``backbone.``.

    Raises:
        UserError: no such file, or it holds something else.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise UserError(
                f"similarity_weights must be a file with MoCo v2's ResNet-50, no file at {weights}; copy {MOCO_FILE} "
                f"from {MOCO_URL} there, name your copy with --similarity_weights, or leave the term out with "
                "--similarity_weight 0"
            )
        # torchvision refuses to load beside a torch of another release: only those who use this loss need it
        from torchvision.models import resnet50

        self.backbone = resnet50(weights=None)
        self.backbone.fc = nn.Identity()
        _load_resnet(self.backbone, weights)
        self.weights_sha256 = file_sha256(weights)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    @property
    def settings(self) -> dict[str, str | float]:
        """Name, and SHA-256 of the weights' file."""
        return {"loss": "moco_v2", "similarity_sha256": self.weights_sha256}

    def train(self, mode: bool = True) -> MoCoLoss:
        """Stay in evaluation mode: batch normalisation would couple the images of a batch."""
        return super().train(False)

    def embed(self, images: torch.Tensor) -> Features:
        """(B, 2048) of images (B, 1 or 3, H, W), nominally in [0, 1]."""
        x = F.interpolate(images, (MOCO_SIDE, MOCO_SIDE), mode="bilinear", antialias=True)
        # half the squared distance of unit vectors is 1 - cos, and is 0 for equal ones whatever the rounding
        return (unit_vectors(self.backbone((x - self.mean) / self.std)) / 2**0.5,)


def _load_resnet(network: nn.Module, path: str | Path) -> None:
    wanted = network.state_dict()
    try:
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
        given = given.get("state_dict", given)
        prefix = next((p for p in MOCO_PREFIXES if f"{p}conv1.weight" in given), "")
        network.load_state_dict({name: given[prefix + name] for name in wanted})
    # a broken or foreign file raises whatever its bytes lead to
    except Exception as error:
        raise UserError(
            f"{path} does not hold the weights of a ResNet-50 ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "name another file with --similarity_weights, or leave the term out with --similarity_weight 0"
        ) from error


class DiscriminatorLoss(EmbeddingLoss):
    """``1 - cos`` of two images' features at each pixel of each level of a discriminator, averaged over both.

    This is half of what LPIPS would be without its linear weights (Zhang et al. 2018, equation 1): like
    :class:`MoCoLoss` it is 0 for equal directions and 1 for right angles. It needs no file of another training, and
    what it knows are images like these.

    Args:
        discriminator: a :class:`~medgen.networks.PGGANDiscriminator` or
            :class:`~medgen.networks.StyleGAN2Discriminator`, which is frozen and stays in evaluation mode.

    Raises:
        UserError: a network of another family.
    """

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        if not callable(getattr(discriminator, "features", None)):
            raise UserError(
                "discriminator must be a PGGANDiscriminator or a StyleGAN2Discriminator, got "
                f"{type(discriminator).__name__}; name the generator's own with --discriminator_checkpoint"
            )
        self.discriminator = discriminator.eval().requires_grad_(False)
        self.weights_sha256 = state_digest(discriminator)

    @property
    def settings(self) -> dict[str, str | float]:
        """Name, and SHA-256 of the discriminator's weights."""
        return {"loss": "discriminator", "similarity_sha256": self.weights_sha256}

    def train(self, mode: bool = True) -> DiscriminatorLoss:
        """Stay in evaluation mode."""
        return super().train(False)

    def embed(self, images: torch.Tensor) -> Features:
        """A tensor for each level, of images (B, C, H, W) of the discriminator's own shape, nominally in [0, 1].

        Raises:
            UserError: images of another shape, or a discriminator without levels.
        """
        levels = self.discriminator.features(images * 2 - 1)
        if not levels:
            raise UserError(
                "a discriminator of 4×4 pixels has no levels to compare; train it further, or leave the term out with "
                "--similarity_weight 0"
            )
        return tuple(unit_vectors(f) / (2 * f.shape[2] * f.shape[3] * len(levels)) ** 0.5 for f in levels)


class InversionLoss(ProjectionLoss):
    """Weighted sum of distances, in float32 under autocast too; an image's value does not depend on its batch.

    Its networks are frozen and stay in evaluation mode: gradients reach the images alone.

    Args:
        losses: name -> distance.
        weights: name -> weight.

    Raises:
        UserError: no distance at all.
    """

    def __init__(self, losses: Mapping[str, ProjectionLoss], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not losses:
            raise UserError(
                "the loss of an inversion needs a weight above 0, all are 0; set --pixel_weight "
                f"{PIXEL_WEIGHT:g} for the mean square alone"
            )
        self.losses, self.weights = nn.ModuleDict(losses), dict(weights)
        # image shape -> how many tensors of the features belong to each distance
        self._counts: dict[torch.Size, list[int]] = {}
        self.eval().requires_grad_(False)

    @property
    def settings(self) -> dict[str, str | float]:
        """Weights, and of each network the name and the SHA-256 of its weights."""
        record: dict[str, str | float] = {"loss": "inversion"}
        for name, loss in self.losses.items():
            record[f"{name}_weight"] = float(self.weights[name])
            if isinstance(loss, EmbeddingLoss):
                record |= {name if key == "loss" else key: value for key, value in loss.settings.items()}
        return record

    def train(self, mode: bool = True) -> InversionLoss:
        """Stay in evaluation mode: its networks are rulers, not students."""
        return super().train(False)

    def prepare(self, target: torch.Tensor) -> Features:
        """Features of targets (B, 1 or 3, H, W) in [0, 1]: those of each distance, one after the other.

        Raises:
            UserError: images of other channels, or of a size that a network does not take.
        """
        if target.ndim != 4 or target.shape[1] not in (1, 3):
            raise UserError(
                f"images must be (B, 1 or 3, H, W), got {tuple(target.shape)}; set in_channels to 1 or 3, the "
                "generator's channels"
            )
        with torch.autocast(target.device.type, enabled=False):
            parts = [loss.prepare(target.float()) for loss in self.losses.values()]
        self._counts[target.shape[1:]] = [len(part) for part in parts]
        return tuple(tensor for part in parts for tensor in part)

    def terms(self, images: torch.Tensor, features: Features) -> dict[str, torch.Tensor]:
        """Each distance by itself, without its weight.

        Args:
            images: (B, 1 or 3, H, W), nominally in [0, 1].
            features: of targets of that shape, from :meth:`prepare`.

        Returns:
            (B,) each: of "pixel", "perceptual", "ms_ssim" and "similarity" those whose weight is not 0.

        Raises:
            UserError: images of another shape.
        """
        if images.shape[1:] not in self._counts:
            raise UserError(
                f"images must have the shape of their targets, {' or '.join(str(tuple(s)) for s in self._counts)}, got "
                f"{tuple(images.shape[1:])}; name the generator of that resolution and those channels"
            )
        rest, values = list(features), {}
        with torch.autocast(images.device.type, enabled=False):
            for (name, loss), count in zip(self.losses.items(), self._counts[images.shape[1:]], strict=True):
                values[name] = loss(images.float(), tuple(rest[:count]))
                del rest[:count]
        return values

    def forward(self, images: torch.Tensor, features: Features) -> torch.Tensor:
        """Distances (B,) of images (B, 1 or 3, H, W), nominally in [0, 1], from the targets with these features."""
        return sum(self.weights[name] * value for name, value in self.terms(images, features).items())
