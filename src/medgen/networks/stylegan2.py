"""StyleGAN2: mapping, synthesis with skip connections, residual discriminator, and a table of presets.

Written from three papers: StyleGAN (Karras et al. 2019, arXiv 1812.04948), StyleGAN2 (Karras et al. 2020, arXiv
1912.04958) and its training with limited data, ADA (Karras et al. 2020, arXiv 2006.06676). Plain PyTorch: no compiled
extension, no control flow that depends on values, every operation twice differentiable.

Legend of the shape suffixes:
    B  batch                    Z  width of the latent space Z
    C  channels in              W  width of the latent space W (as the last letter after B or BL), else image width
    O  channels out             L  style inputs of the synthesis network: W+ is one w for each
    H  image height             K  classes
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.errors import UserError
from medgen.weights import read_state_dict

__all__ = ["STYLEGAN2_PRESETS", "StyleGAN2Discriminator", "StyleGAN2Generator", "transfer_stylegan2"]

RESAMPLE_TAPS = (1.0, 3.0, 3.0, 1.0)  # binomial filter of every up- and downsampling
LEAK = 0.2  # negative slope of every leaky ReLU
GAIN = math.sqrt(2)  # of every leaky ReLU, keeps the variance (He initialisation)
EPSILON = 1e-8  # under every root
MAPPING_LR_MULTIPLIER = 0.01  # StyleGAN, appendix C
W_AVG_DECAY = 0.995  # StyleGAN, appendix B: running mean of w for the truncation
BASE_SIDE = 4  # shorter side of the learned constant, and of the discriminator's last feature map
SMALLEST_SIDE, LARGEST_SIDE = 16, 1024

# One row a preset, one column an argument of the two networks (each network takes those it knows).
_COLUMNS = (
    "image_size", "channel_base", "channel_max", "latent_dim", "w_dim", "num_mapping_layers", "num_bf16_resolutions",
    "conv_clamp",
)  # fmt: skip
_ROWS: dict[str, tuple[Any, ...]] = {
    # name             size   base  max    Z    W  map bf16  clamp
    "stylegan2_1024": (1024, 32768, 512, 512, 512,   8,   0,  None),  # StyleGAN2, configuration F
    "stylegan2_512":  ( 512, 32768, 512, 512, 512,   8,   0,  None),  # the same at 512: cfg stylegan2 with fp32
    "paper_256":      ( 256, 16384, 512, 512, 512,   8,   4, 256.0),  # ADA's at 256: half the width
    "auto_512":       ( 512, 32768, 512, 512, 512,   2,   4, 256.0),  # cfg auto: two mapping layers
    "auto_256":       ( 256, 16384, 512, 512, 512,   2,   4, 256.0),
    "anomaly_source": ( 512, 32768, 512, 512, 512,   8,   0,  None),  # Woodland et al.: cfg stylegan2, fp32, 512
    "small_64":       (  64,  4096,  64, 128, 128,   2,   0,  None),  # two CPU cores
    "small_32":       (  32,  2048,  64, 128, 128,   2,   0,  None),
    "demo_64":        (  64,  2048,  32, 512, 128,   2,   0,  None),  # minutes; Z as in the large ones
}  # fmt: skip
STYLEGAN2_PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()
}


def _preset(name: str, columns: Sequence[str]) -> dict[str, Any]:
    if name not in STYLEGAN2_PRESETS:
        raise UserError(
            f"preset must be one of {', '.join(STYLEGAN2_PRESETS)}, got {name!r}; set preset to one of them"
        )
    return {column: STYLEGAN2_PRESETS[name][column] for column in columns}


# ---------------------------------------------------------------------------------------------------------------------
# arguments that both networks take


def _image_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W), checked: the shorter side 4 · 2^n from 16 to 1024, the longer one a multiple of 2^n."""
    if isinstance(image_size, int):
        sides = (image_size, image_size)
    else:
        sides = tuple(image_size)
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise UserError(
                f"image_size must be one integer or (height, width), got {image_size}; set it to (512, 768)"
            )
    short, long = min(sides), max(sides)
    if short.bit_count() != 1 or not SMALLEST_SIDE <= short <= LARGEST_SIDE:
        below = 2 ** (max(short, 1).bit_length() - 1)
        near = sorted({min(max(side, SMALLEST_SIDE), LARGEST_SIDE) for side in (below, 2 * below)})
        what = "image_size" if short == long else "the shorter side of image_size"
        raise UserError(
            f"{what} must be a power of two from {SMALLEST_SIDE} to {LARGEST_SIDE}, got {short}; "
            f"set {what} to {' or '.join(map(str, near))}"
        )
    step = short // BASE_SIDE
    if long % step:
        below = long // step * step
        raise UserError(
            f"the longer side of image_size must be a multiple of {step}, a quarter of the shorter side, got {long}; "
            f"set it to {below} or {below + step}"
        )
    return sides


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; set {name} to 1 or more")


def _levels(
    image_size: tuple[int, int], channel_base: int, channel_max: int, num_bf16_resolutions: int
) -> list[tuple[tuple[int, int], int, torch.dtype | None]]:
    """(size, channels, type of the activations; None: the weights') of each resolution, from the base to the image."""
    _check_positive(channel_base=channel_base, channel_max=channel_max)
    short = min(image_size)
    if channel_base < short:
        raise UserError(
            f"channel_base must be at least the shorter side of the image, {short}, got {channel_base}; "
            f"set channel_base to {short} times the channels wanted at full resolution"
        )
    depth = (short // BASE_SIDE).bit_length()
    if not 0 <= num_bf16_resolutions < depth:
        raise UserError(
            f"num_bf16_resolutions must be from 0 to {depth - 1} for image_size {image_size}, got "
            f"{num_bf16_resolutions}; set it to 4 on a GPU and to 0 on a CPU"
        )
    levels = []
    for level in range(depth):
        divisor = 2 ** (depth - 1 - level)
        size = (image_size[0] // divisor, image_size[1] // divisor)
        dtype = torch.bfloat16 if divisor < 2**num_bf16_resolutions else None
        levels.append((size, min(channel_base // min(size), channel_max), dtype))
    return levels


def _check_clamp(conv_clamp: float | None) -> None:
    if conv_clamp is not None and not conv_clamp > 0:
        raise UserError(f"conv_clamp must be positive or null, got {conv_clamp}; set conv_clamp to 256 or null")


def class_vectors(labels: torch.Tensor | None, num_classes: int, batch_size: int) -> torch.Tensor | None:
    """Labels as (B, K) floats, or None for a network without classes."""
    if labels is None:
        if num_classes:
            raise UserError(
                f"labels must be given to a network with {num_classes} classes, got none; pass class indices (B,) or "
                f"vectors (B, {num_classes})"
            )
        return None
    if not num_classes:
        raise UserError("labels must be left out for a network without classes, got some; set num_classes or drop them")
    if labels.shape == (batch_size,) and not labels.is_floating_point():
        return F.one_hot(labels.long(), num_classes)
    if labels.shape != (batch_size, num_classes):
        raise UserError(
            f"labels must be class indices ({batch_size},) or vectors ({batch_size}, {num_classes}), got "
            f"{labels.dtype} of shape {tuple(labels.shape)}; pass one label for each item of the batch"
        )
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# layers. Weights are stored as N(0, 1) and scaled where they are used: equalised learning rate (Karras et al. 2018).


class EqualisedLinear(nn.Module):
    """``x @ weight.T · gain + bias · lr_multiplier``, then leaky ReLU on request.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        activation: whether a leaky ReLU with gain √2 follows.
        bias_init: what the bias adds at the start.
        lr_multiplier: learning rate of this layer relative to the optimiser's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: bool = False,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        gain = GAIN if activation else 1.0  # √2 · lrelu(x) = lrelu(√2 · x)
        self.activation = activation
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = gain * lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_features) to (B, out_features)."""
        # addmm scales both terms while it adds them: no scaled copy of the weight
        y = torch.addmm(self.bias, x, self.weight.T, beta=self.bias_gain, alpha=self.weight_gain)
        return F.leaky_relu_(y, LEAK) if self.activation else y


def _conv_weight(out_channels: int, in_channels: int, kernel_size: int) -> nn.Parameter:
    """N(0, 1), channels last as the activations are: on a CPU the convolution takes half the time of the default."""
    weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
    return nn.Parameter(weight.contiguous(memory_format=torch.channels_last))


class Blur(nn.Module):
    """The binomial filter [1, 3, 3, 1] along both axes of every channel, edges padded with zeros.

    Kept apart from the convolution beside it: on a CPU in the channels-last layout it costs a sixteenth of a 3×3
    convolution of 64 channels, whereas folding it into that convolution makes a 6×6 kernel, 2 to 3 times slower than
    both (tests/benchmarks/bench_stylegan2.py).

    Args:
        channels: of the input.
        padding: zeros on each side.
        stride: 2 leaves out every other pixel of the result.
        gain: 4 where zeros were inserted before, so that the mean stays.
    """

    def __init__(self, channels: int, padding: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        taps = torch.tensor(RESAMPLE_TAPS)
        taps = taps / taps.sum()
        kernel = (gain * taps[:, None] * taps[None, :]).expand(channels, 1, -1, -1)
        self.register_buffer("kernel", kernel.contiguous(memory_format=torch.channels_last), persistent=False)
        self.padding, self.stride = padding, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, (H + 2 · padding − 4) // stride + 1, likewise)."""
        return F.conv2d(x, self.kernel.to(x.dtype), stride=self.stride, padding=self.padding, groups=x.shape[1])


class UpsampleImage(nn.Module):
    """Twice the size, by inserting zeros and filtering with [1, 3, 3, 1].

    Args:
        channels: of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor(RESAMPLE_TAPS)
        taps = 2 * taps / taps.sum()  # gain 2 along each axis for the inserted zeros
        self.register_buffer("kernel", (taps[:, None] * taps[None, :]).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return F.conv_transpose2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# mapping


class MappingNetwork(nn.Module):
    """z and class to w. StyleGAN section 2; the embedding of the class is concatenated to z.

    Args:
        latent_dim: Z; 0 for a network of the class alone, as the discriminator's.
        num_classes: K; 0 for none.
        w_dim: W.
        num_layers: fully connected layers.
        embed_dim: width of the class embedding.
    """

    def __init__(self, latent_dim: int, num_classes: int, w_dim: int, num_layers: int, embed_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = EqualisedLinear(num_classes, embed_dim) if num_classes else None
        widths = [latent_dim + (embed_dim if num_classes else 0)] + [w_dim] * num_layers
        self.layers = nn.Sequential(
            *(
                EqualisedLinear(n_in, n_out, activation=True, lr_multiplier=MAPPING_LR_MULTIPLIER)
                for n_in, n_out in pairwise(widths)
            )
        )

    def forward(self, z: torch.Tensor | None, classes: torch.Tensor | None) -> torch.Tensor:
        """Latents z (B, Z), N(0, 1), and class vectors (B, K) to w (B, W)."""
        parts = [] if z is None else [_unit_variance(z)]
        if self.embed is not None:
            parts.append(_unit_variance(self.embed(classes.to(self.embed.weight.dtype))))
        return self.layers(torch.cat(parts, 1) if len(parts) > 1 else parts[0])


def _unit_variance(x: torch.Tensor) -> torch.Tensor:
    """Each row divided by its root mean square."""
    return x * (x.square().mean(1, keepdim=True) + EPSILON).rsqrt()


# ---------------------------------------------------------------------------------------------------------------------
# synthesis


class StyledConvolution(nn.Module):
    """Modulated 3×3 convolution, noise, bias, leaky ReLU. StyleGAN2, equations 1 to 3.

    The style scales the input of a shared convolution and the demodulation its output, which equals a weight for each
    sample (the convolution is linear) but keeps one convolution for the batch: on a CPU 1.9 times as fast
    (tests/benchmarks/bench_stylegan2.py).

    Args:
        in_channels: C.
        out_channels: O.
        w_dim: W.
        size: (H, W) of the output.
        upsample: whether the input has half that size.
        conv_clamp: bound of the output's magnitude; None for no bound.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        size: tuple[int, int],
        upsample: bool,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        self.affine = EqualisedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = _conv_weight(out_channels, in_channels, 3)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(size))
        # behind the transposed convolution, whose result is a pixel larger than twice its input
        self.blur = Blur(out_channels, padding=1, gain=4.0) if upsample else None
        self.weight_gain = 1 / math.sqrt(in_channels * 9)
        self.conv_clamp = conv_clamp

    def forward(self, x: torch.Tensor, w: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Features (B, C, H, W), or half that size, w (B, W) and noise ([B, 1,] H, W) to (B, O, H, W)."""
        dtype = x.dtype
        style_BC = self.affine(w) * self.weight_gain
        squares_OC = self.weight.square().sum((2, 3))
        demodulation_BO = (style_BC.square() @ squares_OC.T + EPSILON).rsqrt() * GAIN

        y = x * style_BC.to(dtype)[:, :, None, None]
        weight = self.weight.to(dtype)
        if self.blur is None:
            y = F.conv2d(y, weight, padding=1)
        else:  # a true convolution: transposed, with the kernel as it is (FORMATS: flipped against conv2d)
            y = self.blur(F.conv_transpose2d(y, weight.transpose(0, 1), stride=2))
        # √2 · lrelu(x) = lrelu(√2 · x): the gain rides on factors that are there anyway
        bias = (self.bias * GAIN).to(dtype)[None, :, None, None]
        y = torch.addcmul(bias, y, demodulation_BO.to(dtype)[:, :, None, None])
        if noise is not None:
            y = y.add_((noise * (self.noise_strength * GAIN)).to(dtype))
        y = F.leaky_relu_(y, LEAK)
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class ToImage(nn.Module):
    """Modulated 1×1 convolution to the channels of the image, without demodulation. StyleGAN2, section 4.1.

    Args:
        in_channels: C.
        out_channels: O, of the image.
        w_dim: W.
        conv_clamp: bound of the output's magnitude; None for no bound.
    """

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None) -> None:
        super().__init__()
        self.affine = EqualisedLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = _conv_weight(out_channels, in_channels, 1)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)
        self.conv_clamp = conv_clamp

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Features (B, C, H, W) and w (B, W) to what they add to the image, (B, O, H, W) in the weights' type."""
        style_BC = self.affine(w) * self.weight_gain
        # few channels out: a weight for each sample is tiny, and the features are read once instead of scaled first
        weight_BCO = (style_BC[:, None] * self.weight.flatten(1)).transpose(1, 2).to(x.dtype)
        y_BHWO = x.permute(0, 2, 3, 1).flatten(1, 2) @ weight_BCO
        y = y_BHWO.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2).to(self.bias.dtype) + self.bias[:, None, None]
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions, the first of them upsampling, and a contribution to the image.

    Args:
        in_channels: 0 for the first block, which starts at ``conv1``.
        out_channels: O.
        image_channels: of the image.
        w_dim: W.
        size: (H, W).
        dtype: of the activations; None: the weights'.
        conv_clamp: bound of the activations' magnitude; None for no bound.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        w_dim: int,
        size: tuple[int, int],
        dtype: torch.dtype | None,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.conv0 = (
            StyledConvolution(in_channels, out_channels, w_dim, size, upsample=True, conv_clamp=conv_clamp)
            if in_channels
            else None
        )
        self.conv1 = StyledConvolution(out_channels, out_channels, w_dim, size, upsample=False, conv_clamp=conv_clamp)
        self.to_image = ToImage(out_channels, image_channels, w_dim, conv_clamp)
        self.upsample_image = UpsampleImage(image_channels) if in_channels else None

    def convolutions(self) -> list[StyledConvolution]:
        """In the order of their styles and noise maps."""
        return [self.conv1] if self.conv0 is None else [self.conv0, self.conv1]

    def forward(
        self,
        x: torch.Tensor,
        image: torch.Tensor | None,
        ws: torch.Tensor,
        noise: Sequence[torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and image of the resolution below, styles of each convolution and of the image, noise maps."""
        x = x.to(dtype=self.dtype or self.conv1.weight.dtype, memory_format=torch.channels_last)
        styles = ws.unbind(1)
        for layer, w_BW, noise_map in zip(self.convolutions(), styles, noise, strict=False):
            x = layer(x, w_BW, noise_map)
        addition = self.to_image(x, styles[-1])
        return x, addition if image is None else addition.add_(self.upsample_image(image))


class SynthesisNetwork(nn.Module):
    """Learned constant to image, under one style for each layer. StyleGAN2, figure 7: output skips.

    Args:
        image_size: (H, W).
        out_channels: of the image.
        w_dim: W.
        channel_base: channels at a resolution are ``channel_base / shorter side`` …
        channel_max: … but at most this.
        num_bf16_resolutions: the highest resolutions whose activations are bfloat16.
        conv_clamp: bound of the activations' magnitude; None for no bound.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        out_channels: int,
        w_dim: int,
        channel_base: int,
        channel_max: int,
        num_bf16_resolutions: int,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        levels = _levels(image_size, channel_base, channel_max, num_bf16_resolutions)
        base_size, base_channels, _ = levels[0]
        self.w_dim = w_dim
        self.constant = nn.Parameter(torch.randn(base_channels, *base_size))
        self.blocks = nn.ModuleList()
        below = 0
        for size, channels, dtype in levels:
            self.blocks.append(SynthesisBlock(below, channels, out_channels, w_dim, size, dtype, conv_clamp))
            below = channels
        # each to_image but the last shares its style with the convolution after it
        self.num_ws = 2 * len(levels)
        self.noise_sizes = [tuple(layer.noise.shape) for block in self.blocks for layer in block.convolutions()]

    def _noise_maps(
        self, noise: str | Sequence[torch.Tensor], batch_size: int, device: torch.device
    ) -> list[torch.Tensor | None]:
        if noise == "random":
            return [torch.randn(batch_size, 1, *size, device=device) for size in self.noise_sizes]
        if noise == "const":
            return [layer.noise for block in self.blocks for layer in block.convolutions()]
        if noise == "none":
            return [None] * len(self.noise_sizes)
        if isinstance(noise, str):
            raise UserError(f"noise must be random, const, none or a list of maps, got {noise!r}; set noise to const")
        if len(noise) != len(self.noise_sizes):
            raise UserError(
                f"noise must have a map for each of {len(self.noise_sizes)} convolutions, got {len(noise)}; make them "
                "with draw_noise"
            )
        for given, size in zip(noise, self.noise_sizes, strict=True):
            if tuple(given.shape) not in {size, (1, 1, *size), (batch_size, 1, *size)}:
                raise UserError(
                    f"noise map must have shape {size} or {(batch_size, 1, *size)}, got {tuple(given.shape)}; make "
                    "them with draw_noise"
                )
        return list(noise)

    def forward(self, ws: torch.Tensor, noise: str | Sequence[torch.Tensor] = "const") -> torch.Tensor:
        """Images of w or W+.

        Args:
            ws: (B, W), one style for all layers, or W+ (B, L, W) with ``L = num_ws``.
            noise: "const" takes the maps stored with the weights, "random" draws anew from torch's generator (as
                training does), "none" leaves noise out; or the maps themselves, in the order and sizes of
                ``noise_sizes``, each (H, W) or (B, 1, H, W).

        Returns:
            images (B, C, H, W), nominally in [-1, 1] and not clipped.

        Raises:
            UserError: shapes do not fit, or an unknown kind of noise.
        """
        # as integers: under torch.jit.trace sizes are tensors, which no set holds
        if tuple(map(int, ws.shape[1:])) not in {(self.w_dim,), (self.num_ws, self.w_dim)}:
            raise UserError(
                f"ws must have shape (B, {self.w_dim}) or (B, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}; "
                "make it with mapping"
            )
        ws_BLW = ws[:, None].expand(-1, self.num_ws, -1) if ws.ndim == 2 else ws
        maps = self._noise_maps(noise, ws.shape[0], ws.device)
        x, image = self.constant.expand(ws.shape[0], -1, -1, -1), None
        first = 0
        for block in self.blocks:
            count = len(block.convolutions())
            x, image = block(x, image, ws_BLW[:, first : first + count + 1], maps[first : first + count])
            first += count
        return image


class StyleGAN2Generator(nn.Module):
    """Generator of StyleGAN2: z to w by :class:`MappingNetwork`, w to image by :class:`SynthesisNetwork`.

    Args:
        image_size: side, a power of two from 16 to 1024; or (height, width), the shorter side such a power and the
            longer one a multiple of its quarter: (512, 768) grows from 4×6.
        out_channels: of the image.
        num_classes: K; 0 for a model without classes.
        latent_dim: Z.
        w_dim: W.
        num_mapping_layers: fully connected layers from z to w.
        channel_base: channels at a resolution are ``channel_base / shorter side`` …
        channel_max: … but at most this.
        num_bf16_resolutions: the highest resolutions whose activations are bfloat16; weights stay float32.
        conv_clamp: bound of the magnitude of activations and of each contribution to the image; 256 where bfloat16
            is used (ADA); None for no bound.

    Raises:
        UserError: a value that no network can be built from.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        out_channels: int = 1,
        num_classes: int = 0,
        latent_dim: int = 512,
        w_dim: int = 512,
        num_mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_bf16_resolutions: int = 0,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.image_size = _image_size(image_size)
        _check_positive(
            out_channels=out_channels, latent_dim=latent_dim, w_dim=w_dim, num_mapping_layers=num_mapping_layers
        )
        _check_clamp(conv_clamp)
        self.latent_dim, self.w_dim, self.num_classes = latent_dim, w_dim, num_classes
        self.mapping_network = MappingNetwork(latent_dim, num_classes, w_dim, num_mapping_layers, embed_dim=w_dim)
        self.synthesis = SynthesisNetwork(
            self.image_size, out_channels, w_dim, channel_base, channel_max, num_bf16_resolutions, conv_clamp
        )
        self.register_buffer("w_avg", torch.zeros(w_dim))

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> StyleGAN2Generator:
        """A row of :data:`STYLEGAN2_PRESETS`, with other arguments beside it or instead of it."""
        return cls(**{**_preset(preset, _COLUMNS), **changes})

    @property
    def num_ws(self) -> int:
        """L, the styles that the synthesis network takes."""
        return self.synthesis.num_ws

    def mapping(
        self,
        z: torch.Tensor,
        labels: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = True,
    ) -> torch.Tensor:
        """W+ of latents: the same w for each layer but for the truncation.

        Args:
            z: (B, Z), N(0, 1).
            labels: class indices (B,) or vectors (B, K).
            truncation_psi: distance from the mean w is multiplied by this (StyleGAN, appendix B); 1 changes nothing.
            truncation_cutoff: how many layers, from the coarsest, are truncated; None for all.
            update_w_avg: whether a network in training mode takes this batch into its running mean of w.

        Returns:
            (B, L, W).

        Raises:
            UserError: shapes do not fit, or labels are missing.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise UserError(f"z must have shape (B, {self.latent_dim}), got {tuple(z.shape)}; draw it with torch.randn")
        w_BW = self.mapping_network(z, class_vectors(labels, self.num_classes, z.shape[0]))
        if self.training and update_w_avg:
            self.w_avg.lerp_(w_BW.detach().mean(0), 1 - W_AVG_DECAY)
        ws_BLW = w_BW[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws_BLW
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        if not 0 <= cutoff <= self.num_ws:
            raise UserError(
                f"truncation_cutoff must be from 0 to {self.num_ws} layers, got {cutoff}; leave it out to truncate all"
            )
        truncated_BLW = self.w_avg.lerp(ws_BLW, truncation_psi)
        return torch.cat([truncated_BLW[:, :cutoff], ws_BLW[:, cutoff:]], 1)

    def draw_noise(self, seeds: Sequence[int]) -> list[torch.Tensor]:
        """Noise maps that depend on each image's own seed and not on the batch it stands in.

        Args:
            seeds: one for each image.

        Returns:
            a map (B, 1, H, W), N(0, 1), for each convolution, on the network's device.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [
            torch.stack([torch.randn(1, *size, generator=generator) for generator in generators]).to(self.w_avg.device)
            for size in self.synthesis.noise_sizes
        ]

    def forward(
        self,
        z: torch.Tensor,
        labels: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise: str | Sequence[torch.Tensor] = "const",
    ) -> torch.Tensor:
        """Images of latents; arguments are those of :meth:`mapping` and of :class:`SynthesisNetwork`.

        Returns:
            images (B, C, H, W), nominally in [-1, 1] and not clipped.
        """
        return self.synthesis(self.mapping(z, labels, truncation_psi, truncation_cutoff), noise)


# ---------------------------------------------------------------------------------------------------------------------
# discriminator


class Convolution(nn.Module):
    """Convolution with equalised learning rate; halves the size, adds a bias and applies a leaky ReLU on request.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        downsample: whether the output has half the size.
        activation: whether a bias and a leaky ReLU follow.
        gain: factor of the output.
        conv_clamp: bound of the output's magnitude before that factor; None for no bound.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        downsample: bool = False,
        activation: bool = True,
        gain: float = 1.0,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = _conv_weight(out_channels, in_channels, kernel_size)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activation else None
        # 3×3: filtered, then strided. 1×1: the two commute, so the filter keeps every other pixel only
        pointwise = kernel_size == 1
        self.blur = (
            Blur(in_channels, padding=kernel_size // 2 + 1, stride=2 if pointwise else 1) if downsample else None
        )
        self.stride = 2 if downsample and not pointwise else 1
        self.padding = 0 if downsample else kernel_size // 2
        self.gain = gain * (GAIN if activation else 1.0)
        self.weight_gain = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.clamp = None if conv_clamp is None else conv_clamp * gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, O, H, W) or half that size."""
        if self.blur is not None:
            x = self.blur(x)
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else (self.bias * self.gain).to(x.dtype)
        y = F.conv2d(x, weight, bias, stride=self.stride, padding=self.padding)
        if self.bias is not None:
            y = F.leaky_relu_(y, LEAK)
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the size. StyleGAN2, figure 7.

    Args:
        in_channels: C.
        out_channels: O.
        image_channels: of the image, for the first block; 0 for the others.
        dtype: of the activations; None: the weights'.
        conv_clamp: bound of the activations' magnitude; None for no bound.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        dtype: torch.dtype | None,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        half = math.sqrt(0.5)  # the sum of two branches keeps the variance
        self.dtype = dtype
        self.from_image = Convolution(image_channels, in_channels, 1, conv_clamp=conv_clamp) if image_channels else None
        self.conv0 = Convolution(in_channels, in_channels, 3, conv_clamp=conv_clamp)
        self.conv1 = Convolution(in_channels, out_channels, 3, downsample=True, gain=half, conv_clamp=conv_clamp)
        self.skip = Convolution(in_channels, out_channels, 1, downsample=True, activation=False, gain=half)

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Features (B, C, H, W), or the image for the first block, to features (B, O, H / 2, W / 2).

        ``dtype`` is that of the activations instead of the block's own.
        """
        x = x.to(dtype=dtype or self.dtype or self.conv0.weight.dtype, memory_format=torch.channels_last)
        if self.from_image is not None:
            x = self.from_image(x)
        return self.skip(x).add_(self.conv1(self.conv0(x)))


def minibatch_std(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """One more channel that tells how much the samples of a group differ (Karras et al. 2018, section 3).

    Sample n belongs to group ``n mod M`` with ``M = ceil(B / group_size)`` groups; where B does not divide, groups
    differ in size by one: groups of four lose no sample, and none is left alone unless the batch is a single one.

    Args:
        x: features.
        group_size: largest number of samples in a group.

    Returns:
        (B, C + 1, H, W).
    """
    batch, _, height, width = x.shape
    groups = -(-batch // group_size)
    rows = -(-batch // groups)
    missing = rows * groups - batch
    y = x
    if missing:  # the last row lacks its last members: zeros that are counted out below
        y = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
    y = y.unflatten(0, (rows, groups))
    if missing:
        present = torch.arange(rows * groups, device=x.device).lt(batch).reshape(rows, groups, 1, 1, 1).to(x.dtype)
        count = present.sum(0)
        centred = (y - y.sum(0) / count) * present
        variance = centred.square().sum(0) / count
    else:
        variance = (y - y.mean(0)).square().mean(0)
    std_M = (variance + EPSILON).sqrt().mean((1, 2, 3))
    std_B = std_M.repeat(rows)[:batch]
    channel = std_B[:, None, None, None].expand(-1, 1, height, width)
    return torch.cat([x, channel], 1)


class StyleGAN2Discriminator(nn.Module):
    """Residual discriminator of StyleGAN2, with classes by projection (Miyato and Koyama 2018, arXiv 1802.05637).

    Args:
        image_size: side, a power of two from 16 to 1024; or (height, width), the shorter side such a power and the
            longer one a multiple of its quarter.
        in_channels: of the image.
        num_classes: K; 0 for a model without classes.
        num_mapping_layers: fully connected layers behind the class embedding; of no effect without classes.
        channel_base: channels at a resolution are ``channel_base / shorter side`` …
        channel_max: … but at most this.
        num_bf16_resolutions: the highest resolutions whose activations are bfloat16; weights stay float32.
        conv_clamp: bound of the activations' magnitude; None for no bound.
        minibatch_group_size: largest number of samples whose standard deviation the last layer sees.

    Raises:
        UserError: a value that no network can be built from.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        num_classes: int = 0,
        num_mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_bf16_resolutions: int = 0,
        conv_clamp: float | None = None,
        minibatch_group_size: int = 4,
    ) -> None:
        super().__init__()
        self.image_size = _image_size(image_size)
        _check_positive(
            in_channels=in_channels, num_mapping_layers=num_mapping_layers, minibatch_group_size=minibatch_group_size
        )
        _check_clamp(conv_clamp)
        self.in_channels, self.num_classes, self.minibatch_group_size = in_channels, num_classes, minibatch_group_size
        levels = _levels(self.image_size, channel_base, channel_max, num_bf16_resolutions)[::-1]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(channels, below, in_channels if level == 0 else 0, dtype, conv_clamp)
            for level, ((_, channels, dtype), (_, below, _)) in enumerate(pairwise(levels))
        )
        (height, width), channels, _ = levels[-1]
        self.conv = Convolution(channels + 1, channels, 3, conv_clamp=conv_clamp)
        self.linear = EqualisedLinear(channels * height * width, channels, activation=True)
        self.out = EqualisedLinear(channels, channels if num_classes else 1)
        self.mapping_network = (
            MappingNetwork(0, num_classes, channels, num_mapping_layers, embed_dim=channels) if num_classes else None
        )

    @classmethod
    def from_preset(cls, preset: str, **changes: Any) -> StyleGAN2Discriminator:
        """A row of :data:`STYLEGAN2_PRESETS`, with other arguments beside it or instead of it.

        The row's mapping layers are the generator's: the discriminator keeps its own default of 8.
        """
        columns = ("image_size", "channel_base", "channel_max", "num_bf16_resolutions", "conv_clamp")
        return cls(**{**_preset(preset, columns), **changes})

    def freeze_layers(self, count: int) -> None:
        """Stop the gradient of the layers nearest the image: freeze-D (Mo et al. 2020, arXiv 2002.10964).

        A later ``requires_grad_(True)`` of the whole network undoes it.

        Args:
            count: layers, in the order from_image, conv0, conv1, skip of the highest resolution, conv0 of the next, …
        """
        layers = [layer for layer in self.blocks.modules() if isinstance(layer, Convolution)]
        if not 0 <= count <= len(layers):
            raise UserError(
                f"count must be from 0 to {len(layers)} layers, got {count}; set it to {len(layers)} or less"
            )
        for layer in layers[:count]:
            layer.requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of images.

        Args:
            x: (B, C, H, W) in [-1, 1].
            labels: class indices (B,) or vectors (B, K).

        Returns:
            (B, 1), high where the image looks real.

        Raises:
            UserError: shapes do not fit, or labels are missing.
        """
        classes_BK = class_vectors(labels, self.num_classes, x.shape[0])
        x = self._activations(x)[-1]
        x = self.conv(minibatch_std(x.to(self.conv.weight.dtype), self.minibatch_group_size))
        # the names of the weights count channels first, then rows, then columns
        logits = self.out(self.linear(x.flatten(1)))
        if self.mapping_network is None:
            return logits
        projection = self.mapping_network(None, classes_BK)
        return (logits * projection).sum(1, keepdim=True) / math.sqrt(projection.shape[1])

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the network sees in each image by itself.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Returns:
            The activations after each block, from half the image's size down to the smallest, in the weights' type:
            bfloat16 would round away by how little similar images differ.

        Raises:
            UserError: images of another shape.
        """
        # the layer after the blocks sees the deviation over a group of images: behind it they are not independent
        return self._activations(x, self.conv.weight.dtype)

    def _activations(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """What comes out of each block."""
        expected = (self.in_channels, *self.image_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"images must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}; resize them or "
                "set image_size and in_channels"
            )
        activations = []
        for block in self.blocks:
            x = block(x, dtype)
            activations.append(x)
        return activations


# ---------------------------------------------------------------------------------------------------------------------
# transfer


def transfer_stylegan2(
    network: StyleGAN2Generator | StyleGAN2Discriminator, path: str | os.PathLike | None
) -> StyleGAN2Generator | StyleGAN2Discriminator:
    """Start from a trained network: take over every weight that has a place in this one.

    The networks may differ in resolution (blocks are matched by their size), in classes, and in the channels of the
    image: colour to grey sums what the discriminator's first layer does to the three equal channels of a grey image,
    and averages what the generator's ``to_image`` layers make of them; grey to colour repeats. What has no place is
    logged, and keeps its random start.

    Args:
        network: to be filled, in place.
        path: state dict of a generator or of a discriminator, such as ``medgen convert`` writes, for the latter also a
            training's checkpoint; None changes nothing.

    Returns:
        The network.

    Raises:
        UserError: the file cannot be read, holds the other kind of network, or one of which less than half of the
            numbers fit.
    """
    if path is None:
        return network
    is_discriminator = isinstance(network, StyleGAN2Discriminator)
    given = read_state_dict(path, component="discriminator" if is_discriminator else None)
    own = network.state_dict()
    offset = 0
    if is_discriminator:  # its blocks count from the image: match them from the base
        offset = _depth(own) - _depth(given)
    taken: dict[str, torch.Tensor] = {}
    for name, value in given.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match and offset:
            name = f"blocks.{int(match[1]) + offset}.{match[2]}"
        if name in own:
            value = _image_channels(name, value, own[name].shape)
            if name == "mapping_network.layers.0.weight" and isinstance(network, StyleGAN2Generator):
                value = _class_columns(value, own[name].shape[1], network.latent_dim)
            if value.shape == own[name].shape:
                taken[name] = value
    share = sum(value.numel() for value in taken.values()) / sum(value.numel() for value in own.values())
    if share < 0.5:
        raise UserError(
            f"{path} fits only {share:.0%} of the {type(network).__name__}'s numbers; transfer from a network of the "
            "same preset, or from one that differs in resolution, classes or image channels alone"
        )
    network.load_state_dict(taken, strict=False)
    left = [name for name in own if name not in taken]
    told = f"; random start for {', '.join(left)}" if left else ""
    logging.getLogger(__name__).info(f"{type(network).__name__}: {share:.1%} of the numbers from {path}{told}")
    return network


def _depth(state: Mapping[str, torch.Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _class_columns(weight: torch.Tensor, width: int, latent_dim: int) -> torch.Tensor:
    """The mapping's first weight with or without the columns of a class embedding, so that w stays what it was."""
    if weight.shape[1] == width or latent_dim not in (weight.shape[1], width):
        return weight
    # the equalised layer divides by the root of its width; classes begin without influence
    of_z = weight[:, :latent_dim] * math.sqrt(width / weight.shape[1])
    return F.pad(of_z, (0, width - latent_dim))


def _image_channels(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A weight or bias next to the image, for 1 channel where it has 3 and for 3 where it has 1."""
    if ".from_image.weight" in name and {value.shape[1], shape[1]} == {1, 3}:
        # the equalised layer divides by the root of the channels: kept, so that a grey image gives what it gave
        return value.sum(1, keepdim=True) / math.sqrt(3) if shape[1] == 1 else value.repeat(1, 3, 1, 1) / math.sqrt(3)
    if ".to_image." in name and not name.endswith(("affine.weight", "affine.bias")):
        if {value.shape[0], shape[0]} == {1, 3}:
            return value.mean(0, keepdim=True) if shape[0] == 1 else value.repeat(3, *[1] * (value.ndim - 1))
    return value
