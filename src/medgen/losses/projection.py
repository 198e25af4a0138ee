"""Losses of a projection: how far generated images are from fixed targets whose features are computed once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.losses.perceptual import BACKBONES, LocalLPIPS
from medgen.metrics.diversity import C1, C2, SCALE_WEIGHTS, SIGMA

__all__ = [
    "EmbeddingLoss",
    "LPIPSProjectionLoss",
    "PixelMSSSIMLoss",
    "ProjectionLoss",
    "noise_correlation",
    "projection_loss",
    "unit_vectors",
]

Features = tuple[torch.Tensor, ...]

LPIPS_SIDE = 256  # StyleGAN2, appendix D: larger images are shrunk before they are compared
LPIPS_EPSILON = 1e-10  # as in the lpips package, here under the root
# of the shorter side: each network's name, and the least that its poolings leave something of
LPIPS_NETWORKS = {"squeeze": ("SqueezeNet", 17), "alex": ("AlexNet", 31), "vgg": ("VGG16", 16)}
WINDOW, SMALLEST_WINDOW = 11, 7  # Wang et al. 2004, section III.C; piq's advice for small images
SIMILARITY_FLOOR = 1e-3  # of a scale's mean similarity: the gradient of its power has no bound towards 0
PIXEL_WEIGHT = 10.0  # brings the mean square to the order of 1 - MS-SSIM and of LPIPS, 0.1 for a fair likeness
SMALLEST_NOISE_SIDE = 8  # StyleGAN2, appendix D: the pyramid of a noise map ends here


class ProjectionLoss(nn.Module):
    """Distance of each image of a batch from its own target.

    The target never changes during a projection, so what can be known of it is computed once, by :meth:`prepare`.
    Both take images in [0, 1]; generated ones are not clipped, so that the gradient of a value outside leads back.
    """

    @property
    @abstractmethod
    def settings(self) -> dict[str, str | float]:
        """What the values depend on, for the record of a projection."""

    @abstractmethod
    def prepare(self, target: torch.Tensor) -> Features:
        """Features of targets (B, C, H, W) in [0, 1]; the first axis of each tensor is B, so that images can leave."""

    @abstractmethod
    def forward(self, images: torch.Tensor, features: Features) -> torch.Tensor:
        """Distances (B,) of images (B, C, H, W), nominally in [0, 1], from the targets with these features."""


def projection_loss(perceptual_weights: str | Path | None = None) -> ProjectionLoss:
    """The loss that the given files allow.

    Args:
        perceptual_weights: state dict of torchvision's VGG16; None for the loss that needs none.

    Returns:
        :class:`LPIPSProjectionLoss` or :class:`PixelMSSSIMLoss`.

    Raises:
        UserError: no such file, or it holds something else.
    """
    if perceptual_weights is None:
        return PixelMSSSIMLoss()
    if not Path(perceptual_weights).is_file():
        raise UserError(
            f"perceptual_weights must be a file with torchvision's vgg16, no file at {perceptual_weights}; name one, "
            "or leave --perceptual_weights out for the loss of pixels and MS-SSIM that needs none"
        )
    return LPIPSProjectionLoss(perceptual_weights)


class EmbeddingLoss(ProjectionLoss):
    """Squared distance ``‖e(x) - e(t)‖²`` of two images' embeddings: the target's is computed once."""

    @abstractmethod
    def embed(self, images: torch.Tensor) -> Features:
        """Embedding of images (B, C, H, W), nominally in [0, 1], in parts of any shape (B, …)."""

    def prepare(self, target: torch.Tensor) -> Features:
        """Embedding of targets (B, C, H, W) in [0, 1]."""
        with torch.no_grad():
            return self.embed(target)

    def forward(self, images: torch.Tensor, features: Features) -> torch.Tensor:
        """Distances (B,) of images (B, C, H, W), nominally in [0, 1]."""
        pairs = zip(self.embed(images), features, strict=True)
        return torch.stack([(mine - target).square().flatten(1).sum(1) for mine, target in pairs]).sum(0)


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """Each pixel's vector over the channels of (B, C, …), divided by its length."""
    # epsilon within the root: pixels at which every channel is 0 would get a gradient that is no number
    return features / (features.square().sum(1, keepdim=True) + LPIPS_EPSILON).sqrt()


class LPIPSProjectionLoss(EmbeddingLoss):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) as a squared distance of two embeddings.

    ``LPIPS(x, t) = Σ_l mean_hw Σ_c weight_lc · (f_lc(x) - f_lc(t))²`` with channels f normalised at each pixel is
    ``‖e(x) - e(t)‖²`` with ``e_l = √(weight_l / (H_l · W_l)) · f_l``: the target's e is computed once. Images whose
    shorter side is above 256 are shrunk to it by averaging areas; grey images stand for all three channels; [0, 1]
    becomes the [-1, 1] that LPIPS was made for.

    Args:
        weights: state dict of torchvision's network; None for the file in torch's own cache.
        network_type: "vgg" for VGG16, "alex" for AlexNet or "squeeze" for SqueezeNet.

    Raises:
        UserError: no such file, or it holds something else.
    """

    def __init__(self, weights: str | Path | None = None, network_type: str = "vgg") -> None:
        super().__init__()
        self.network_type = network_type
        lpips = LocalLPIPS(network_type, weights, rescale=True).lpips
        path = weights or Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[network_type][0]
        self.weights_sha256 = file_sha256(path)
        self.scaling, self.backbone = lpips.scaling_layer, lpips.net
        self.channel_weights = nn.ParameterList(
            # trained under the constraint that they are not negative
            nn.Parameter(layer.model[-1].weight.detach().clamp(min=0), requires_grad=False)
            for layer in lpips.lins
        )

    @property
    def settings(self) -> dict[str, str | float]:
        """Name, side of the comparison, and SHA-256 of the weights' file."""
        name = f"lpips_{self.network_type}"
        return {"loss": name, "largest_side": LPIPS_SIDE, "perceptual_sha256": self.weights_sha256}

    def embed(self, images: torch.Tensor) -> Features:
        """A tensor for each layer, of images (B, 1 or 3, H, W), nominally in [0, 1].

        Raises:
            UserError: images that are too small for the network.
        """
        shorter = min(images.shape[2:])
        name, smallest = LPIPS_NETWORKS[self.network_type]
        if shorter < smallest:
            raise UserError(
                f"LPIPS with {name} takes images of at least {smallest} pixels, got {shorter}; enlarge them, or leave "
                "that term out"
            )
        if shorter > LPIPS_SIDE:
            size = [side * LPIPS_SIDE // shorter for side in images.shape[2:]]
            images = F.interpolate(images, size=size, mode="area")
        layers = self.backbone(self.scaling(images.expand(-1, 3, -1, -1) * 2 - 1))
        embedding = []
        for f, weight in zip(layers, self.channel_weights, strict=True):
            embedding.append(unit_vectors(f) * (weight / (f.shape[2] * f.shape[3])).sqrt())
        return tuple(embedding)


class PixelMSSSIMLoss(ProjectionLoss):
    """``pixel_weight · mean (x - t)² + ssim_weight · (1 - MS-SSIM(x, t))``, which needs no trained weights.

    MS-SSIM after Wang et al. 2003: five scales and a window of 11 pixels (sigma 1.5) where the shorter side is 176 or
    more; below, the window has 7 pixels and there are as many scales as it fits into, with the first of the published
    exponents divided by their sum: 5 at 112 pixels, 4 at 56, 3 at 28, 2 at 16. Similarities of a scale below 0.001
    count as that, so that opposites still have a gradient.

    Args:
        pixel_weight: of the mean square.
        ssim_weight: of the dissimilarity.

    Raises:
        UserError: a negative weight, or both are 0.
    """

    def __init__(self, pixel_weight: float = PIXEL_WEIGHT, ssim_weight: float = 1.0) -> None:
        super().__init__()
        if not (pixel_weight >= 0 and ssim_weight >= 0 and pixel_weight + ssim_weight > 0):
            raise UserError(
                f"pixel_weight and ssim_weight must be 0 or more and not both 0, got {pixel_weight} and {ssim_weight}; "
                f"set them to {PIXEL_WEIGHT:g} and 1"
            )
        self.pixel_weight, self.ssim_weight = float(pixel_weight), float(ssim_weight)
        self._bands: dict[tuple, torch.Tensor] = {}

    @property
    def settings(self) -> dict[str, str | float]:
        """Name and weights."""
        return {"loss": "pixel_ms_ssim", "pixel_weight": self.pixel_weight, "ssim_weight": self.ssim_weight}

    def prepare(self, target: torch.Tensor) -> Features:
        """Targets (B, C, H, W) in [0, 1]; for MS-SSIM their means, and each scale's pixels, local means, variances."""
        target = target.detach()
        with torch.no_grad():
            if not self.ssim_weight:
                return (target,)
            # covariances do not see a shift, float32 does: E[xy] - E[x]E[y] of centred pixels cancels least
            level = target.mean((2, 3), keepdim=True)
            window, exponents = _scales(target)
            parts = [target, level]
            x = target - level
            for scale in range(len(exponents)):
                x = F.avg_pool2d(x, 2) if scale else x
                mean, square = self._smooth(torch.stack([x, x.square()]), window)
                parts += [x, mean, square - mean.square()]
            return tuple(parts)

    def forward(self, images: torch.Tensor, features: Features) -> torch.Tensor:
        """Loss (B,) of images (B, C, H, W), nominally in [0, 1]."""
        loss = self.pixel_weight * (images - features[0]).square().mean((1, 2, 3))
        if not self.ssim_weight:
            return loss
        _, level, *scales = features
        window, exponents = _scales(images)
        x = images - level
        terms = []
        for scale in range(len(exponents)):
            pixels, mean, variance = scales[3 * scale : 3 * scale + 3]
            x = F.avg_pool2d(x, 2) if scale else x
            my_mean, square, product = self._smooth(torch.stack([x, x.square(), x * pixels]), window)
            similarity = 2 * (product - my_mean * mean) + C2
            similarity = similarity / (square - my_mean.square() + variance + C2)
            if scale == len(exponents) - 1:  # luminance is compared at the coarsest scale only
                a, b = my_mean + level, mean + level
                similarity = similarity * ((2 * a * b + C1) / (a.square() + b.square() + C1))
            terms.append(similarity.mean((1, 2, 3)))
        powers = torch.stack(terms, 1).clamp(min=SIMILARITY_FLOOR).pow(images.new_tensor(exponents))
        return loss + self.ssim_weight * (1 - powers.prod(1))

    def _smooth(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """Gaussian-weighted local means, valid convolution, as two matrix products: faster than a convolution."""
        rows, columns = (self._band(side, window, maps) for side in maps.shape[-2:])
        return rows.T @ (maps @ columns)

    def _band(self, side: int, window: int, like: torch.Tensor) -> torch.Tensor:
        """The window's matrix (side, side - window + 1)."""
        key = (side, window, like.device, like.dtype)
        if key not in self._bands:
            offset = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
            kernel = torch.exp(-(offset**2) / (2 * SIGMA**2))
            with torch.inference_mode(False):  # a tensor made in inference mode could not take part in a later graph
                band = torch.zeros(side, side - window + 1, dtype=torch.float64)
                for row, weight in enumerate(kernel / kernel.sum()):
                    band.diagonal(-row).fill_(weight)
                self._bands[key] = band.to(like.device, like.dtype)
        return self._bands[key]


def _scales(images: torch.Tensor) -> tuple[int, list[float]]:
    """Window and exponents of MS-SSIM that images of this size have room for."""
    side = min(images.shape[2:])
    depth = len(SCALE_WEIGHTS)
    window = WINDOW if side >> (depth - 1) >= WINDOW else SMALLEST_WINDOW
    depth = sum(side >> scale >= window for scale in range(depth))
    if not depth:
        raise UserError(f"the loss of a projection takes images of at least {window} pixels, got {side}; enlarge them")
    total = sum(SCALE_WEIGHTS[:depth])
    return window, [weight / total for weight in SCALE_WEIGHTS[:depth]]


def noise_correlation(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far noise maps are from white: the regulariser of StyleGAN2's projection (appendix D), for each image.

    ``Σ_maps Σ_levels mean(n · shift_x n)² + mean(n · shift_y n)²``, shifts by one pixel, edges wrapped; each level
    is the mean of 2×2 values of the one above, as long as that one's shorter side is above 8. The paper doubles it to
    keep the variance; the published projector does not, and its weight of 1e5 belongs to that.

    Args:
        maps: (B, 1, H, W) each, mean 0 and variance 1.

    Returns:
        (B,); white noise of N pixels has about 2 / N at the first level.
    """
    # maps of one size, and what larger ones have shrunk to, are channels of one tensor: few operations for many maps
    waiting: dict[torch.Size, list[torch.Tensor]] = {}
    for noise in maps:
        waiting.setdefault(noise.shape[2:], []).append(noise)
    total = maps[0].new_zeros(len(maps[0]))
    while waiting:
        size = sorted(waiting)[-1]  # max() of a dictionary breaks the graph of torch.compile
        n = torch.cat(waiting.pop(size), 1)
        for axis in (2, 3):
            total = total + (n * n.roll(1, axis)).mean((2, 3)).square().sum(1)
        if min(size) > SMALLEST_NOISE_SIDE:
            n = F.avg_pool2d(n, 2)
            waiting.setdefault(n.shape[2:], []).append(n)
    return total
