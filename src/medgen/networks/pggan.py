"""Progressive growing GAN: generator and discriminator from 4×4 to full size, and a table of presets.

Written from Karras et al. 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (arXiv
1710.10196). All levels exist from the start; ``growth`` says which of them are in use, so that one state dict and one
optimiser serve the whole training.

Legend of the shape suffixes:
    B  batch              H, W  height and width
    C  channels in        Z     width of the latent space
    O  channels out       K     classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medgen.errors import UserError
from medgen.networks.stylegan2 import class_vectors

__all__ = ["PGGAN_PRESETS", "PGGANDiscriminator", "PGGANGenerator"]

LEAK = 0.2  # negative slope of every leaky ReLU
GAIN = math.sqrt(2)  # of a layer that a leaky ReLU follows (He initialisation)
EPSILON = 1e-8  # under every root
BASE_SIDE = 4
LARGEST_SIDE = 1024

_WIDTHS = (512, 512, 512, 512, 256, 128, 64, 32, 16)  # from 4×4 to 1024×1024 (the paper's table 2)
_COLUMNS = ("channels", "latent_dim", "first_norm", "minibatch_group_size", "from_rgb_activation", "fused_scale")
_ROWS: dict[str, tuple[Any, ...]] = {
    # name          channels from 4×4 up      Z   norm group from_rgb fused
    "paper_1024": (_WIDTHS,                 512,  True, None,  True,  True),  # the paper's
    "rsna_512":   (_WIDTHS[:-1],            512,  True,    4,  True,  True),  # chestXray-PGGAN: the paper's at 512
    "cxr14_1024": (_WIDTHS,                 512, False, None, False, False),  # CXR_PGGAN
    "small_64":   ((128, 128, 64, 48, 24),  128,  True,    4,  True,  True),  # two CPU cores
    "demo_32":    ((48, 48, 32, 16),        512,  True,    4,  True,  True),  # minutes; Z as in the large ones
}  # fmt: skip
PGGAN_PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}


def _preset(name: str, columns: Sequence[str]) -> dict[str, Any]:
    if name not in PGGAN_PRESETS:
        raise UserError(f"preset must be one of {', '.join(PGGAN_PRESETS)}, got {name!r}; set preset to one of them")
    return {column: PGGAN_PRESETS[name][column] for column in columns}


# ---------------------------------------------------------------------------------------------------------------------
# layers. Weights are stored as N(0, 1) and scaled where they are used: equalised learning rate (section 4.1).


class EqualisedDense(nn.Module):
    """``x @ weight.T · gain/√in_features + bias``.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        gain: of the weights.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = GAIN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.weight_gain = gain / math.sqrt(in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_features) to (B, out_features)."""
        # addmm scales while it adds: no scaled copy of the weight
        return torch.addmm(self.bias, x, self.weight.T, alpha=self.weight_gain)


class _TwiceConvolution(torch.autograd.Function):
    """``F.conv2d`` whose derivative is itself made of ordinary convolutions.

    PyTorch's own takes the weight's share of a gradient's derivative, which a gradient penalty needs, as a convolution
    with a kernel as large as the feature map, which is slower on a CPU (tests/benchmarks/bench_pggan.py). Values and
    derivatives are the same.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, padding: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv_transpose2d(grad, weight, None, ctx.stride, ctx.padding)
        if _is_wanted(ctx, 1):
            grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, ctx.stride, ctx.padding)
        if _is_wanted(ctx, 2):
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias, None, None


def _is_wanted(ctx: Any, place: int) -> bool:
    # needs_input_grad is about the forward pass; the first pass of a gradient penalty asks for the image's alone
    return ctx.needs_input_grad[place] and _will_run(ctx.next_functions[place][0])


# an internal of PyTorch, which its own FSDP uses: without it more is computed than is asked for
_will_run = getattr(torch._C, "_will_engine_execute_node", lambda node: True)


class EqualisedConv(nn.Module):
    """Convolution at unchanged size, or together with nearest upsampling before it or 2×2 averaging after it.

    Both pairs are one operation with a 4×4 kernel and stride 2, which takes 16 multiplications where a 3×3 kernel at
    full size takes 36.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: 1 or 3.
        gain: of the weights.
        resample: ``up``, ``down`` or None.
        twice: whether gradients will be differentiated, as a gradient penalty does: that is faster then.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        gain: float = GAIN,
        resample: str | None = None,
        twice: bool = False,
    ) -> None:
        super().__init__()
        weight = torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        # channels last as the activations are: on a CPU the convolution takes half the time of the default
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = gain / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.stride = 2 if resample else 1
        self.resample, self.twice = resample, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, O, H, W), (B, O, 2H, 2W) or (B, O, H/2, W/2)."""
        bias = self.bias
        # pooling averages four places of the kernel; after upsampling they are summed
        weight = self.weight * (self.weight_gain * (4 if self.resample == "up" else 1))
        if self.resample:
            weight = F.avg_pool2d(weight, 2, stride=1, padding=1)
        if self.resample == "up":
            return F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), bias, self.stride, self.padding)
        if self.twice and torch.is_grad_enabled():
            device = x.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                dtype = torch.get_autocast_dtype(device)
                x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
            # a view: autograd cannot be asked about a parameter itself
            return _TwiceConvolution.apply(x, weight, bias.view_as(bias), self.stride, self.padding)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def pixel_norm(x: torch.Tensor) -> torch.Tensor:
    """Each pixel's vector over the channels, divided by its root mean square (section 4.2)."""
    # on a CPU a norm's derivative takes half the time of a mean square's
    at_least_float32 = torch.promote_types(x.dtype, torch.float32)
    mean = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=at_least_float32).square() / x.shape[1]
    return x * (mean + EPSILON).rsqrt().to(x.dtype)


def minibatch_stddev(x: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """One more channel: the standard deviation over a group of images, averaged over channels and pixels (section 3).

    Args:
        x: (B, C, H, W); a group is every (B / group_size)-th image.
        group_size: images in a group, at most B; None for the whole batch.

    Returns:
        (B, C + 1, H, W).

    Raises:
        UserError: the batch cannot be divided into such groups.
    """
    B, C, H, W = x.shape
    size = B if group_size is None else min(group_size, B)
    if B % size:
        raise UserError(
            f"a batch must be a multiple of minibatch_group_size {size}, got {B} images; set --batch_size to "
            f"{B // size * size} or {(B // size + 1) * size}"
        )
    groups = x.reshape(size, B // size, C, H, W)
    groups = groups - groups.mean(0)  # `var` takes twice as long
    stddev = (groups.square().mean(0) + EPSILON).sqrt().mean((1, 2, 3))
    return torch.cat([x, stddev.repeat(size)[:, None, None, None].expand(B, 1, H, W)], 1)


def _activate(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu_(x, LEAK)


# ---------------------------------------------------------------------------------------------------------------------
# growth


class _Growing(nn.Module):
    """What both networks have in common: levels from 4×4 on, and a buffer that says how many of them are in use.

    Attributes:
        growth: (2,) float32, side of the newest level in use, and its weight.
        image_size: side of the last level.
        resolutions: sides of all levels.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        most = (LARGEST_SIDE // BASE_SIDE).bit_length()
        if not 1 <= len(channels) <= most or not all(isinstance(c, int) and c > 0 for c in channels):
            raise UserError(
                f"channels must be 1 to {most} positive whole numbers, one for each level from {BASE_SIDE}×{BASE_SIDE} "
                f"on, got {list(channels)}; set channels"
            )
        if num_classes < 0:
            raise UserError(f"num_classes must be 0 or more, got {num_classes}; set --num_classes 0 for no classes")
        self.channels, self.num_classes = tuple(channels), num_classes
        self.resolutions = tuple(BASE_SIDE << level for level in range(len(channels)))
        self.image_size = self.resolutions[-1]
        self.register_buffer("growth", torch.tensor([float(self.image_size), 1.0]))
        self._resolution, self._alpha = self.image_size, 1.0
        self.register_load_state_dict_post_hook(_read_growth)

    @property
    def resolution(self) -> int:
        """Side of the images now."""
        return self._resolution

    @property
    def alpha(self) -> float:
        """Weight of the newest level, which rises from 0 to 1 while it fades in (the paper's figure 2)."""
        return self._alpha

    def grow(self, resolution: int, alpha: float = 1.0) -> None:
        """Use the levels up to a resolution.

        Args:
            resolution: side of the images, one of :attr:`resolutions`.
            alpha: weight of the newest level, from 0 to 1.

        Raises:
            UserError: no such level, or another weight than 1 for the first.
        """
        if resolution not in self.resolutions:
            raise UserError(
                f"resolution must be one of {', '.join(map(str, self.resolutions))}, got {resolution!r}; set another"
            )
        if not 0 <= alpha <= 1 or (alpha < 1 and resolution == BASE_SIDE):
            raise UserError(
                f"alpha must be from 0 to 1, and 1 at {BASE_SIDE}×{BASE_SIDE}, got {alpha} at {resolution}; set it to 1"
            )
        self._resolution, self._alpha = int(resolution), float(alpha)
        # filled, not copied: a GPU need not wait for the host
        self.growth[0].fill_(self._resolution)
        self.growth[1].fill_(self._alpha)

    @property
    def _level(self) -> int:
        return self.resolutions.index(self._resolution)


def _read_growth(network: _Growing, _: Any) -> None:
    """A position that was loaded becomes the position in use: read once, since reading it would make a GPU wait."""
    resolution, alpha = network.growth.tolist()
    network.grow(int(resolution) if resolution.is_integer() else resolution, alpha)  # NaN is no whole number


# ---------------------------------------------------------------------------------------------------------------------
# networks


class _FirstSynthesisBlock(nn.Module):
    """Latent to 4×4: a dense layer and a 3×3 convolution."""

    def __init__(self, features: int, channels: int, first_norm: bool) -> None:
        super().__init__()
        # gain √2/4 rather than √2: the authors' dense layer learns as a 4×4 convolution of one pixel would
        self.dense = EqualisedDense(features, BASE_SIDE**2 * channels, GAIN / 4)
        self.conv = EqualisedConv(channels, channels, 3)
        self.first_norm = first_norm

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = _activate(self.dense(z).unflatten(1, (-1, BASE_SIDE, BASE_SIDE)))
        x = x.contiguous(memory_format=torch.channels_last)
        if self.first_norm:
            x = pixel_norm(x)
        return pixel_norm(_activate(self.conv(x)))


class _SynthesisBlock(nn.Module):
    """Twice the size: upsampling and two 3×3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = EqualisedConv(in_channels, out_channels, 3, resample="up")
        self.conv1 = EqualisedConv(out_channels, out_channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pixel_norm(_activate(self.conv0(x)))
        return pixel_norm(_activate(self.conv1(x)))


class PGGANGenerator(_Growing):
    """Latents to images, as far as the network has grown.

    The first dense layer has a bias for each place of its 4×4 pixels, as the networks of the GAN zoo and of CXR_PGGAN
    have; the official code has one for each channel.

    Args:
        channels: widths of the levels, from 4×4 on; their number decides the full size.
        latent_dim: Z.
        out_channels: channels of the images: 1 or 3.
        num_classes: K; 0 for none. A class is appended to the latent as a one-hot vector.
        first_norm: whether pixel normalisation follows the first dense layer, as in the paper.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        latent_dim: int = 512,
        out_channels: int = 1,
        num_classes: int = 0,
        first_norm: bool = True,
    ) -> None:
        super().__init__(channels, num_classes)
        _check_positive(latent_dim=latent_dim, out_channels=out_channels)
        self.latent_dim, self.out_channels = latent_dim, out_channels
        first = _FirstSynthesisBlock(latent_dim + num_classes, channels[0], first_norm)
        later = [_SynthesisBlock(channels[i - 1], channels[i]) for i in range(1, len(channels))]
        self.blocks = nn.ModuleList([first, *later])
        self.to_rgb = nn.ModuleList([EqualisedConv(width, out_channels, 1, gain=1.0) for width in channels])

    @classmethod
    def from_preset(cls, preset: str, out_channels: int = 1, num_classes: int = 0) -> PGGANGenerator:
        """A network of :data:`PGGAN_PRESETS`.

        Raises:
            UserError: no such preset, or an argument outside its range.
        """
        settings = _preset(preset, ("channels", "latent_dim", "first_norm"))
        return cls(**settings, out_channels=out_channels, num_classes=num_classes)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None, truncation_psi: float = 1.0) -> torch.Tensor:
        """Images of latents.

        Args:
            z: (B, Z) of any length: it is normalised (section 4.2), so that only its direction counts.
            labels: class indices (B,) or vectors (B, K), for a network with classes.
            truncation_psi: length of the normalised latent relative to training; less than 1 moves all images towards
                the one of the latent 0, away from the rare ones.

        Returns:
            (B, C, resolution, resolution), mostly in [-1, 1], not clamped.

        Raises:
            UserError: shapes that do not fit.
        """
        x = self.normalise(z, labels)
        if truncation_psi != 1:
            x = torch.cat([x[:, : self.latent_dim] * truncation_psi, x[:, self.latent_dim :]], 1)
        return self.synthesis(x)

    def normalise(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """What the first layer sees of latents and classes.

        Args:
            z: (B, Z) of any length.
            labels: class indices (B,) or vectors (B, K), for a network with classes.

        Returns:
            (B, Z + K), each row of mean square 1.

        Raises:
            UserError: shapes that do not fit.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise UserError(f"latents must be (B, {self.latent_dim}), got {tuple(z.shape)}; set latent_dim")
        classes = class_vectors(labels, self.num_classes, z.shape[0])
        return pixel_norm(z if classes is None else torch.cat([z, classes.to(z.dtype)], 1))

    def synthesis(self, x: torch.Tensor) -> torch.Tensor:
        """Images of normalised latents.

        Args:
            x: (B, Z + K), see :meth:`normalise`.

        Returns:
            (B, C, resolution, resolution), mostly in [-1, 1], not clamped.
        """
        level, before = self._level, None
        for block in self.blocks[: level + 1]:
            before, x = x, block(x)
        image = self.to_rgb[level](x)
        if self.alpha < 1:
            old = F.interpolate(self.to_rgb[level - 1](before), scale_factor=2.0, mode="nearest")
            image = torch.lerp(old, image, self.alpha)
        return image


class _LastAnalysisBlock(nn.Module):
    """4×4 to the score: minibatch standard deviation, a 3×3 convolution and two dense layers."""

    def __init__(self, channels: int, out_features: int, minibatch_group_size: int | None) -> None:
        super().__init__()
        self.minibatch_group_size = minibatch_group_size
        self.conv = EqualisedConv(channels + 1, channels, 3, twice=True)
        self.dense = EqualisedDense(BASE_SIDE**2 * channels, channels)
        self.out = EqualisedDense(channels, out_features, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _activate(self.conv(minibatch_stddev(x, self.minibatch_group_size)))
        x = _activate(self.dense(x.flatten(1)))
        device = x.device.type
        # a score of 64 would be rounded to 0.5 in bfloat16, and it is differences of scores that count
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return self.out(x.to(self.out.weight.dtype))


class _AnalysisBlock(nn.Module):
    """Half the size: two 3×3 convolutions and averaging."""

    def __init__(self, in_channels: int, out_channels: int, fused_scale: bool) -> None:
        super().__init__()
        self.conv0 = EqualisedConv(in_channels, in_channels, 3, twice=True)
        resample = "down" if fused_scale else None
        self.conv1 = EqualisedConv(in_channels, out_channels, 3, resample=resample, twice=True)
        self.fused_scale = fused_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _activate(self.conv1(_activate(self.conv0(x))))
        return x if self.fused_scale else F.avg_pool2d(x, 2)


class PGGANDiscriminator(_Growing):
    """Images, of the size the network has grown to, to scores and class logits.

    Args:
        channels: widths of the levels, from 4×4 on, as the generator's.
        in_channels: channels of the images: 1 or 3.
        num_classes: K; 0 for none. The classes are predicted from the image (Odena et al. 2017, arXiv 1610.09585).
        minibatch_group_size: images whose standard deviation is seen together; None for the whole batch.
        from_rgb_activation: whether a leaky ReLU follows the first convolution, as in the paper.
        fused_scale: whether a level's averaging is part of its convolution, before the leaky ReLU, as in the authors'
            training; else it comes after the leaky ReLU, as in the paper's table 2: another function.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int = 1,
        num_classes: int = 0,
        minibatch_group_size: int | None = 4,
        from_rgb_activation: bool = True,
        fused_scale: bool = True,
    ) -> None:
        super().__init__(channels, num_classes)
        _check_positive(in_channels=in_channels)
        if minibatch_group_size is not None:
            _check_positive(minibatch_group_size=minibatch_group_size)
        self.in_channels, self.from_rgb_activation = in_channels, from_rgb_activation
        self.minibatch_group_size, self.fused_scale = minibatch_group_size, fused_scale
        last = _LastAnalysisBlock(channels[0], 1 + num_classes, minibatch_group_size)
        earlier = [_AnalysisBlock(channels[i], channels[i - 1], fused_scale) for i in range(1, len(channels))]
        self.blocks = nn.ModuleList([last, *earlier])
        self.from_rgb = nn.ModuleList([EqualisedConv(in_channels, width, 1, twice=True) for width in channels])

    @classmethod
    def from_preset(cls, preset: str, in_channels: int = 1, num_classes: int = 0) -> PGGANDiscriminator:
        """A network of :data:`PGGAN_PRESETS`.

        Raises:
            UserError: no such preset, or an argument outside its range.
        """
        settings = _preset(preset, ("channels", "minibatch_group_size", "from_rgb_activation", "fused_scale"))
        return cls(**settings, in_channels=in_channels, num_classes=num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores.

        Args:
            images: (B, C, resolution, resolution) in [-1, 1].

        Returns:
            (B, 1 + K): the critic's score, unbounded, and the logits of the classes.

        Raises:
            UserError: images of another size.
        """
        return self.blocks[0](self._activations(images)[-1])

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What the network sees in each image by itself.

        Args:
            images: (B, C, resolution, resolution) in [-1, 1].

        Returns:
            The activations after each level but the last, (B, O, side, side) with sides from resolution / 2 down to 4;
            the first is faded as the score's is. None at 4×4.

        Raises:
            UserError: images of another size.
        """
        # the last level begins with the deviation over a group of images: behind it they are no longer independent
        return self._activations(images)[1:]

    def _activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What goes into each level in use, from the images' own on."""
        expected = (self.in_channels, self.resolution, self.resolution)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise UserError(
                f"images must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}; grow both networks "
                "to one resolution"
            )
        images = images.contiguous(memory_format=torch.channels_last)
        level = self._level
        activations = [self._from_rgb(level, images)]
        for place in range(level, 0, -1):
            x = self.blocks[place](activations[-1])
            if place == level and self.alpha < 1:
                x = torch.lerp(self._from_rgb(level - 1, F.avg_pool2d(images, 2)), x, self.alpha)
            activations.append(x)
        return activations

    def _from_rgb(self, level: int, images: torch.Tensor) -> torch.Tensor:
        x = self.from_rgb[level](images)
        return _activate(x) if self.from_rgb_activation else x


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}; set {name} to 1 or more")
