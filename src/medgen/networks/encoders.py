"""Encoders that turn an image into a latent of a generator: one vector, or one style for each layer.

The trunk is ConvNeXt (Liu et al. 2022, arXiv 2201.03545), of torchvision's blocks. Its layer normalisation sees one
image at a time, so that an image's latent does not depend on the batch it stands in.

Legend of the shape suffixes:
    B  batch        H, W  height and width
    C  channels     L     styles: 1 for Z and W, one for each layer for W+
    D  width of a latent
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.errors import UserError
from medgen.networks.latent_generator import LatentGenerator
from medgen.networks.pggan import pixel_norm
from medgen.weights import load_weights, read_state_dict

__all__ = [
    "CONVNEXT_SIZES",
    "ConvNeXtEncoder",
    "LatentDiscriminator",
    "LatentEncoder",
    "PyramidEncoder",
    "begin_encoder",
]

LEAK = 0.2  # of e4e's latent discriminator
STYLE_LEAK = 0.01  # of its style heads
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COARSE_STYLES, MIDDLE_STYLES = 3, 4  # e4e: styles 0 to 2 from the coarsest map, 3 to 6 from the next, the rest

# widths of the four stages, blocks in each, and the largest probability that a block is skipped in training
CONVNEXT_SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "atto":  ((40, 80, 160, 320),    (2, 2, 6, 2),  0.0),
    "pico":  ((64, 128, 256, 512),   (2, 2, 6, 2),  0.0),
    "tiny":  ((96, 192, 384, 768),   (3, 3, 9, 3),  0.1),
    "small": ((96, 192, 384, 768),   (3, 3, 27, 3), 0.4),
    "base":  ((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
}  # fmt: skip


def _trunk(
    image_size: tuple[int, int], in_channels: int, size: str, patch: int, layer_scale: float, stages: int
) -> nn.Sequential:
    """Stem and stages of ConvNeXt."""
    if size not in CONVNEXT_SIZES:
        raise UserError(f"size must be one of {', '.join(CONVNEXT_SIZES)}, got {size!r}; set --encoder_size")
    for name, value in (("in_channels", in_channels), ("patch", patch)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; set --{name}")
    if min(image_size) < 8 * patch:
        raise UserError(
            f"image_size must be at least {8 * patch} for patches of {patch}, got {image_size}; set --patch"
        )
    # torchvision refuses to load beside a torch of another release: only those who use an encoder need it
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths, depths, skipped = CONVNEXT_SIZES[size]
    outputs = [*widths[1:stages], None]
    setting = [CNBlockConfig(*row) for row in zip(widths[:stages], outputs, depths[:stages], strict=True)]
    trunk = ConvNeXt(setting, skipped, layer_scale, num_classes=1).features
    stem = nn.Conv2d(in_channels, widths[0], patch, stride=patch)
    nn.init.trunc_normal_(stem.weight, std=0.02)
    nn.init.zeros_(stem.bias)
    trunk[0][0] = stem
    return trunk


class LatentEncoder(nn.Module, ABC):
    """Base of the encoders: images to latents (B, L, D) of a generator.

    Subclasses implement :meth:`estimate`, in units of the latents' deviation from their mean. Mean and deviation are
    buffers, so that weights are of use without the generator at hand.

    Args:
        image_size: side of the images, or (height, width).
        in_channels: of the images.
        latent_shape: (L, D).
        space: "z", whose latents are points on a sphere, "w" or "w+".

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self, image_size: int | Sequence[int], in_channels: int, latent_shape: Sequence[int], space: str
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(f"image_size must be a side or (height, width), got {image_size}; set --image_size")
        shape = tuple(latent_shape)
        if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise UserError(f"latent_shape must be [styles, width], got {latent_shape}; set --latent_shape to [1,512]")
        if space not in ("z", "w", "w+"):
            raise UserError(f"space must be z, w or w+, got {space!r}; set --space")
        if space != "w+" and shape[0] != 1:
            raise UserError(f"latent_shape must be [1, width] in the space {space}, got {shape}; set --latent_shape")
        self.image_size, self.in_channels, self.latent_shape, self.space = sides, in_channels, shape, space
        self.sha256 = ""  # of the file of its weights, where it was read from one (medgen.sources)
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_std", torch.ones(()))

    @abstractmethod
    def estimate(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) of images (B, C, H, W) in [-1, 1]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images.

        Args:
            images: (B, C, H, W) in [0, 1].

        Returns:
            (B, L, D).

        Raises:
            UserError: images of another size.
        """
        expected = (self.in_channels, *self.image_size)
        # as integers: under torch.jit.trace sizes are tensors
        if tuple(map(int, images.shape[1:])) != expected:
            raise UserError(
                f"images must be (B, {', '.join(map(str, expected))}) for this encoder, got {tuple(images.shape)}; "
                "resize them, or set --image_size and --in_channels as in its training"
            )
        latents_BLD = self.latent_mean + self.latent_std * self.estimate(images * 2 - 1).float()
        return pixel_norm(latents_BLD.flatten(0, 1)).view_as(latents_BLD) if self.space == "z" else latents_BLD

    def load_pretrained(self, path: str | Path) -> None:
        """Take the trunk from torchvision's ConvNeXt of that size, trained on ImageNet.

        It then sees what it was trained on, whatever the channels: images in [-1, 1], a single channel for all three.

        Args:
            path: state dict of torchvision's ``convnext_tiny``, ``_small`` or ``_base``.

        Raises:
            UserError: weights of another network, or patches of another size than 4.
        """
        given, state = read_state_dict(path), self.trunk.state_dict()
        if tuple(state["0.0.weight"].shape[2:]) != (4, 4):
            raise UserError(
                f"patch must be 4 for pretrained weights, got {state['0.0.weight'].shape[2]}; set --patch 4, or leave "
                "--pretrained_weights out"
            )
        found = {name: given.get(f"features.{name}") for name in state}
        for name, value in state.items():
            wanted = (value.shape[0], 3, 4, 4) if name == "0.0.weight" else tuple(value.shape)
            if found[name] is None or tuple(found[name].shape) != wanted:
                got = "nothing" if found[name] is None else tuple(found[name].shape)
                raise UserError(
                    f"{path} must hold torchvision's ConvNeXt of the encoder's size, expected {wanted} at "
                    f"features.{name}, got {got}; name another file with --pretrained_weights, or set --encoder_size"
                )
        # The classifier saw (v - mean) / std of v in [0, 1]. A stem without padding takes that into its own numbers:
        # v = (x + 1) / 2.
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        stem, channels = found["0.0.weight"], self.in_channels
        found["0.0.bias"] = found["0.0.bias"] + (stem * (0.5 - mean) / std).sum((1, 2, 3))
        weight = stem / (2 * std)
        if channels != 3:
            weight = weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
        self.trunk.load_state_dict({**found, "0.0.weight": weight})

    def use_statistics(self, generator: LatentGenerator) -> None:
        """Take mean and deviation of the latents from the generator that this encoder is to be trained for.

        Raises:
            UserError: it was built for another one.
        """
        self.check_generator(generator)
        self.latent_mean.copy_(generator.mean)
        self.latent_std.copy_(generator.std)

    def check_generator(self, generator: LatentGenerator) -> None:
        """See that images and latents have the shapes of a generator's.

        Raises:
            UserError: names what differs, and what to set.
        """
        for name, own, its in (
            ("image_size", self.image_size, generator.image_size),
            ("in_channels", self.in_channels, generator.channels),
            ("space", self.space, generator.space),
            ("latent_shape", self.latent_shape, generator.latent_shape),
        ):
            if own != its:
                value = str(its).replace(" ", "").replace("(", "[").replace(")", "]")
                raise UserError(
                    f"{name} of the encoder must be the generator's, {value}, got {own}; set --{name} {value}, or "
                    "name another --generator"
                )


def begin_encoder(
    network: LatentEncoder,
    generator: LatentGenerator,
    weights: str | Path | None = None,
    pretrained_weights: str | Path | None = None,
) -> LatentEncoder:
    """An encoder as its training begins: fresh, or with the weights of an earlier stage.

    Args:
        network: the encoder.
        generator: that it is trained for.
        weights: state dict of an earlier stage; None: fresh, with mean and deviation of the generator's latents.
        pretrained_weights: of its trunk alone, see :meth:`LatentEncoder.load_pretrained`.

    Raises:
        UserError: the encoder was built, or the weights were trained, for another generator.
    """
    network.use_statistics(generator)
    if pretrained_weights is not None:
        network.load_pretrained(pretrained_weights)
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(
                f"no weights of the first stage at {weights}; train it with train_bootstrap.json, name them with "
                "--initial_weights, or do without them: --initial_weights null"
            )
        load_weights(network, weights)
        near = {"rtol": 1e-3, "atol": 1e-3 * float(generator.std)}
        if not torch.allclose(network.latent_mean.cpu(), generator.mean.cpu(), **near):
            raise UserError(
                f"{weights} was trained for another generator, whose latents have another mean; name the weights of "
                "the first stage for this one with --initial_weights, or the other generator"
            )
    return network


class ConvNeXtEncoder(LatentEncoder):
    """ConvNeXt with a linear head: all numbers of the latent from one vector.

    Args:
        image_size: side of the images, or (height, width).
        in_channels: of the images: 1 or 3.
        latent_shape: (L, D).
        space: "z", "w" or "w+".
        size: a row of :data:`CONVNEXT_SIZES`.
        patch: side and stride of the stem's convolution; 4 as published, 2 keeps more of small images.
        pooled_size: side of the map that the head sees; 1 as published, more keeps places apart.
        layer_scale: initial weight of each block's branch.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        latent_shape: Sequence[int] = (1, 512),
        space: str = "z",
        size: str = "small",
        patch: int = 4,
        pooled_size: int = 1,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__(image_size, in_channels, latent_shape, space)
        self.trunk = _trunk(self.image_size, in_channels, size, patch, layer_scale, 4)
        smallest = min(self.image_size) // (8 * patch)
        if not 1 <= pooled_size <= smallest:
            raise UserError(
                f"pooled_size must be from 1 to {smallest}, the side of the last map of {self.image_size} pixels under "
                f"patches of {patch}, got {pooled_size}; set --pooled_size, or a smaller --patch"
            )
        width = CONVNEXT_SIZES[size][0][-1]
        self.pool = nn.AdaptiveAvgPool2d(pooled_size)
        self.norm = nn.LayerNorm(width * pooled_size**2, eps=1e-6)
        self.head = nn.Linear(width * pooled_size**2, self.latent_shape[0] * self.latent_shape[1])
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def estimate(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) of images (B, C, H, W) in [-1, 1]."""
        features = self.norm(self.pool(self.trunk(x)).flatten(1))
        return self.head(features).unflatten(1, self.latent_shape)


class _StyleHead(nn.Module):
    """Map to one style: 3×3 convolutions of stride 2 down to a single pixel, then a linear layer."""

    def __init__(self, in_channels: int, width: int, side: int) -> None:
        super().__init__()
        depth = max(1, (side - 1).bit_length())
        widths = [in_channels, *[width] * depth]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution in self.convolutions:
            x = F.leaky_relu(convolution(x), STYLE_LEAK)
        return self.linear(x.mean((2, 3)))  # more than one pixel only where images are not square


class PyramidEncoder(LatentEncoder):
    """Feature pyramid with a head for each style of W+: e4e (Tov et al. 2021, arXiv 2102.02766) on a ConvNeXt trunk.

    Three maps, of 1/4, 1/8 and 1/16 of the image for patches of 4: the coarsest makes styles 0 to 2, the next 3 to 6,
    the finest the rest. Style 0 is w itself; the others are w plus an own delta. ``stage`` says how many deltas are in
    use (progressive training, section 5.1): at 0 the result lies in W, at k only styles 1 to k may differ from w.

    Args:
        image_size: side of the images, or (height, width).
        in_channels: of the images: 1 or 3.
        latent_shape: (L, D).
        space: "w+".
        size: a row of :data:`CONVNEXT_SIZES`, whose first three stages are the trunk.
        patch: side and stride of the stem's convolution.
        layer_scale: initial weight of each block's branch.

    Attributes:
        stage: deltas in use, part of the state dict; a fresh encoder uses none.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        latent_shape: Sequence[int] = (16, 512),
        space: str = "w+",
        size: str = "small",
        patch: int = 4,
        layer_scale: float = 1e-6,
    ) -> None:
        super().__init__(image_size, in_channels, latent_shape, space)
        if space != "w+":
            raise UserError(f"a pyramid of styles is for the space w+, got {space!r}; use ConvNeXtEncoder")
        self.trunk = _trunk(self.image_size, in_channels, size, patch, layer_scale, 3)
        styles, width = self.latent_shape
        sides = [min(self.image_size) // (patch * factor) for factor in (4, 2, 1)]
        widths = CONVNEXT_SIZES[size][0][:3]
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.map_of_style = [
            0 if style < COARSE_STYLES else 1 if style < COARSE_STYLES + MIDDLE_STYLES else 2 for style in range(styles)
        ]
        self.heads = nn.ModuleList(_StyleHead(width, width, sides[place]) for place in self.map_of_style)
        self.register_buffer("stage_reached", torch.zeros((), dtype=torch.long))
        self._stage = 0
        self.register_load_state_dict_post_hook(_read_stage)

    @property
    def stage(self) -> int:
        """Deltas in use, from 0 to L - 1."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < self.latent_shape[0]:
            raise UserError(
                f"stage must be a whole number from 0 to {self.latent_shape[0] - 1}, the deltas of this encoder, got "
                f"{stage!r}; set another"
            )
        self._stage = stage
        self.stage_reached.fill_(stage)

    def estimate(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, D) of images (B, C, H, W) in [-1, 1]."""
        maps = []
        for number, layer in enumerate(self.trunk):
            x = layer(x)
            if number % 2:  # stem or downsampling, stage, downsampling, stage, ...
                maps.append(x)
        pyramid = [self.lateral[2](maps[2])]
        for place in (1, 0):
            lateral = self.lateral[place](maps[place])
            above = F.interpolate(pyramid[-1], size=lateral.shape[2:], mode="bilinear", align_corners=False)
            pyramid.append(above + lateral)
        w_BD = self.heads[0](pyramid[0])
        styles = [w_BD] * self.latent_shape[0]
        for style in range(1, self._stage + 1):
            styles[style] = w_BD + self.heads[style](pyramid[self.map_of_style[style]])
        return torch.stack(styles, 1)


def _read_stage(encoder: PyramidEncoder, _: Any) -> None:
    """A stage that was loaded becomes the stage in use: read once, since reading it would make a GPU wait."""
    encoder.stage = int(encoder.stage_reached)


class LatentDiscriminator(nn.Module):
    """Whether a style is one that the mapping network makes: e4e, section 4.2, four layers, three of them of 512.

    Args:
        width: D.
        hidden: width of the layers.
        layers: hidden layers.
    """

    def __init__(self, width: int, hidden: int = 512, layers: int = 3) -> None:
        super().__init__()
        widths = [width, *[hidden] * layers]
        parts = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.LeakyReLU(LEAK)]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, 1))

    def forward(self, styles: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1) of styles (N, D) in units of their deviation from the mean; high: from the mapping network."""
        return self.layers(styles)
