"""Progressive GANs of other projects as :mod:`medgen.networks.pggan`.

Equalised learning rate is a reparametrisation: what counts is the stored weight times the factor that it meets at run
time. Projects differ in that factor, and in whether biases meet it too; each layer is re-expressed with the factor that
the networks here have, w_here · g_here = w_there · g_there, so that outputs stay what they were.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from medgen.convert.pggan_pickle import SnapshotNetwork, read_pggan_pickle
from medgen.convert.restricted import OneLineErrors, Record, RefusedError, StoredTensor, read_records
from medgen.convert.stylegan2_pickle import LEGACY_HEAD
from medgen.errors import UserError
from medgen.networks.pggan import BASE_SIDE, EPSILON, GAIN, LEAK, PGGANDiscriminator, PGGANGenerator

__all__ = ["ConvertedPGGAN", "PGGANWeights", "convert_pggan"]

LARGEST_NPZ = 2**31  # bytes unpacked; the two networks at 1024×1024 have 0.2 GB


class ConvertedPGGAN(NamedTuple):
    """A network out of a foreign file.

    Attributes:
        network: its class.
        settings: keyword arguments to build it with.
        state: its state dict, with the position to which it has grown.
    """

    network: type[PGGANGenerator | PGGANDiscriminator]
    settings: dict[str, Any]
    state: dict[str, torch.Tensor]

    @property
    def image_size(self) -> int:
        """Side of the last level."""
        return BASE_SIDE << (len(self.settings["channels"]) - 1)


class PGGANWeights(NamedTuple):
    """What a foreign file holds.

    Attributes:
        generator: the moving average where there is one; None if there is no generator.
        discriminator: None if there is none.
    """

    generator: ConvertedPGGAN | None
    discriminator: ConvertedPGGAN | None

    @property
    def overlay(self) -> dict[str, Any]:
        """Ids of the bundle ``cxr_pggan`` that build these networks."""
        overlay: dict[str, Any] = {}
        for definition, converted in (("network_def", self.generator), ("discriminator_def", self.discriminator)):
            if converted is not None:
                network, settings, _ = converted
                overlay |= {"in_channels": settings.get("out_channels") or settings["in_channels"]}
                overlay |= {"num_classes": settings["num_classes"]}
                overlay[definition] = {"_target_": f"medgen.networks.{network.__name__}", **settings}
        return overlay


class _Layer(NamedTuple):
    """A layer that is understood.

    Attributes:
        name: in the file.
        weight: (O, C, H, W) or (O, C), as it is stored.
        bias: (O,), with whatever it meets at run time.
        scale: what the weight meets at run time.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor
    scale: float


class _Arrays:
    """Arrays of a network that are taken out one by one, so that none is missing and none is left over.

    Args:
        source: where they come from, for messages.
        kind: what a network of this layout is called.
        arrays: by their names in the file.
    """

    def __init__(self, source: str, kind: str, arrays: Mapping[str, torch.Tensor]) -> None:
        self.source, self.kind = source, kind
        self._left = dict(arrays)

    def take(self, name: str, dims: int) -> torch.Tensor:
        if name not in self._left:
            raise UserError(f"expected {self.kind}, got {self.source} without {name}; such a network is not read")
        value = self._left.pop(name)
        if value.ndim != dims or not value.numel() or not value.is_floating_point():
            raise UserError(
                f"{name} of {self.source} must be floating-point numbers in {dims} dimensions, got {value.dtype} of "
                f"shape {tuple(value.shape)}; such a network is not read"
            )
        value = value.float()
        if not value.isfinite().all():
            raise UserError(f"{name} of {self.source} must be finite, got NaN or infinity; the training diverged")
        return value

    def has(self, name: str) -> bool:
        return name in self._left

    def count(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in self._left)

    def check_none_left(self) -> None:
        if self._left:
            raise UserError(
                f"expected {self.kind}, got {self.source} with an unknown {min(self._left)}; such a network is not read"
            )


def _check_setting(source: str, name: str, value: Any, *known: Any) -> None:
    if not any(type(value) is type(one) and value == one for one in known):
        shown = " or ".join(map(str, known))
        raise UserError(
            f"{name} of {source} must be {shown} to give the images that the network here gives, got "
            f"{reprlib.repr(value)}; such a network is not read"
        )


def _built(
    source: str,
    network: type[PGGANGenerator | PGGANDiscriminator],
    settings: dict[str, Any],
    layers: Mapping[str, _Layer],
    growth: tuple[int, float],
) -> ConvertedPGGAN:
    """The layers under their names here, each scaled as here."""
    with torch.device("meta"):  # shapes without numbers: what a file asks for is not allocated before it fits
        empty = network(**settings)
    empty.grow(*growth)
    state = {"growth": torch.tensor([float(growth[0]), growth[1]])}
    for name, layer in layers.items():
        module = empty.get_submodule(name)
        for part, value, scale in (
            ("weight", layer.weight, layer.scale / module.weight_gain),
            ("bias", layer.bias, 1.0),
        ):
            fitting = tuple(getattr(module, part).shape)
            if value.shape != fitting:
                raise UserError(
                    f"{part} of {layer.name} of {source} must be {fitting} (output channels first) to fit the layers "
                    f"beside it, got {tuple(value.shape)}; such a network is not read"
                )
            state[f"{name}.{part}"] = (value * scale).contiguous()
    return ConvertedPGGAN(network, settings, {name: state[name] for name in empty.state_dict()})


def _with_statistic(weight: torch.Tensor, group_size: int | None) -> tuple[torch.Tensor, int | None]:
    """Weight and group of the convolution after the minibatch standard deviation.

    Without that statistic (``group_size`` 0) it has no channel for it; here it has one, which then counts for nothing.
    """
    if group_size == 0:
        return torch.cat([weight, torch.zeros_like(weight[:, :1])], 1), 1
    return weight, group_size


# ---------------------------------------------------------------------------------------------------------------------
# official progressive GAN (TensorFlow)

# What its networks can be built with, and what each setting must be for them to compute what those here do. The
# precision of activations is not that of the weights, so that a float16 network is the same function, rounded.
_OFFICIAL: dict[str, tuple[Any, ...]] = {
    "normalize_latents": (True,),
    "use_pixelnorm": (True,),
    "pixelnorm_epsilon": (EPSILON,),
    "use_leakyrelu": (True,),
    "use_wscale": (True, False),
    "dtype": ("float32", "float16"),
    "structure": (None, "linear", "recursive"),
    "tanh_at_end": (None, False),
}
_OFFICIAL_WHOLE = ("num_channels", "resolution", "label_size", "latent_size", "mbstd_group_size")
_OFFICIAL_SHAPES = ("fmap_base", "fmap_decay", "fmap_max", "fused_scale")  # the arrays tell


def _official_settings(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name in _OFFICIAL:
            _check_setting(source, name, value, *_OFFICIAL[name])
        elif name in _OFFICIAL_WHOLE:
            if (type(value) is not int or value < 0) and not (value is None and name == "latent_size"):
                raise UserError(f"{name} of {source} must be a whole number, got {reprlib.repr(value)}; it is not read")
        elif name not in _OFFICIAL_SHAPES:
            raise UserError(
                f"{source} must have settings of the official networks alone, got {name[:80]!r} as well; what it does "
                "is unknown, so such a network is not read"
            )
    return {"use_wscale": True, "label_size": 0, "mbstd_group_size": 4, **given}


class _Official(_Arrays):
    """Variables of an official network, under their scopes."""

    def __init__(self, source: str, network: SnapshotNetwork) -> None:
        super().__init__(source, f"a {network.build_function} of the official progressive GAN", network.variables)
        self.settings = _official_settings(source, network.settings)

    def layer(self, scope: str, gain: float, up: bool = False) -> _Layer:
        """A layer whose weight has its input channels first: (kh, kw, C, O) or (C, O)."""
        dims = 2 if "Dense" in scope else 4
        weight, bias = self.take(f"{scope}/weight", dims), self.take(f"{scope}/bias", 1)
        if dims == 2:
            weight = weight.T
        elif up:  # (kh, kw, O, C), for a transposed convolution, which flips its kernel
            weight = weight.permute(2, 3, 0, 1).flip(2, 3)
        else:
            weight = weight.permute(3, 2, 0, 1)
        fan_in = weight[0].numel()
        return _Layer(scope, weight, bias, gain / math.sqrt(fan_in) if self.settings["use_wscale"] else 1.0)

    def resampling(self, side: int, fused: str, separate: str) -> tuple[_Layer, bool]:
        """The layer that changes the size, and whether that is part of its convolution."""
        is_fused = self.has(f"{side}x{side}/{fused}/weight")
        scope = f"{side}x{side}/{fused if is_fused else separate}"
        return self.layer(scope, GAIN, up=is_fused and fused.endswith("_up")), is_fused

    def growth(self, levels: int) -> tuple[int, float]:
        """``lod`` counts from the full size down: 1.25 is a quarter of the way from half the size to a quarter."""
        lod = float(self.take("lod", 0))
        if not 0 <= lod <= levels - 1:
            raise UserError(
                f"lod of {self.source} must be from 0 to {levels - 1}, its levels below full size, got {lod}; the file "
                "is damaged"
            )
        return BASE_SIDE << (levels - 1 - math.floor(lod)), 1.0 - lod % 1

    def check_shapes(self, **found: int) -> None:
        for name, value in found.items():
            given = self.settings.get(name)
            if given is not None and given != value:
                raise UserError(
                    f"{name} of {self.source} is {given} by its settings and {value} by its arrays; expected them to "
                    "agree, so such a network is not read"
                )


def _official_generator(source: str, network: SnapshotNetwork) -> ConvertedPGGAN:
    arrays = _Official(source, network)
    levels = max(1, arrays.count(r"ToRGB_lod\d+/weight"))
    sides = [BASE_SIDE << level for level in range(levels)]
    dense = arrays.layer("4x4/Dense", GAIN / 4)
    # one bias for each channel, where here each of its 16 pixels has its own
    layers = {"blocks.0.dense": dense._replace(bias=dense.bias.repeat_interleave(BASE_SIDE**2))}
    layers["blocks.0.conv"] = arrays.layer("4x4/Conv", GAIN)
    for level, side in enumerate(sides[1:], 1):
        layers[f"blocks.{level}.conv0"], _ = arrays.resampling(side, "Conv0_up", "Conv0")
        layers[f"blocks.{level}.conv1"] = arrays.layer(f"{side}x{side}/Conv1", GAIN)
    for level in range(levels):
        layers[f"to_rgb.{level}"] = arrays.layer(f"ToRGB_lod{levels - 1 - level}", 1.0)
    growth = arrays.growth(levels)
    arrays.check_none_left()

    classes = arrays.settings["label_size"]
    settings = {
        "channels": [layers[f"to_rgb.{level}"].weight.shape[1] for level in range(levels)],
        "latent_dim": dense.weight.shape[1] - classes,
        "out_channels": layers["to_rgb.0"].weight.shape[0],
        "num_classes": classes,
        "first_norm": True,
    }
    arrays.check_shapes(resolution=sides[-1], num_channels=settings["out_channels"], latent_size=settings["latent_dim"])
    return _built(source, PGGANGenerator, settings, layers, growth)


def _official_discriminator(source: str, network: SnapshotNetwork) -> ConvertedPGGAN:
    arrays = _Official(source, network)
    levels = max(1, arrays.count(r"FromRGB_lod\d+/weight"))
    sides = [BASE_SIDE << level for level in range(levels)]
    layers = {f"from_rgb.{level}": arrays.layer(f"FromRGB_lod{levels - 1 - level}", GAIN) for level in range(levels)}
    fused = []
    for level, side in enumerate(sides[1:], 1):
        layers[f"blocks.{level}.conv0"] = arrays.layer(f"{side}x{side}/Conv0", GAIN)
        layers[f"blocks.{level}.conv1"], is_fused = arrays.resampling(side, "Conv1_down", "Conv1")
        fused.append(is_fused)
    conv = arrays.layer("4x4/Conv", GAIN)
    layers |= {"blocks.0.dense": arrays.layer("4x4/Dense0", GAIN), "blocks.0.out": arrays.layer("4x4/Dense1", 1.0)}
    growth = arrays.growth(levels)
    arrays.check_none_left()
    if len(set(fused)) > 1:
        # averaged before or after the leaky ReLU: two functions
        raise UserError(f"fused_scale of {source} must be the same at all levels, got both; such a network is not read")

    group = arrays.settings["mbstd_group_size"]
    weight, group = _with_statistic(conv.weight, group if group > 1 else 0)
    layers["blocks.0.conv"] = conv._replace(weight=weight)
    settings = {
        "channels": [layers[f"from_rgb.{level}"].weight.shape[0] for level in range(levels)],
        "in_channels": layers["from_rgb.0"].weight.shape[1],
        "num_classes": arrays.settings["label_size"],
        "minibatch_group_size": group,
        "from_rgb_activation": True,
        "fused_scale": all(fused),
    }
    arrays.check_shapes(resolution=sides[-1], num_channels=settings["in_channels"])
    return _built(source, PGGANDiscriminator, settings, layers, growth)


def _convert_pickle(path: Path, generator_only: bool) -> PGGANWeights:
    networks = read_pggan_pickle(path)
    found = {network.build_function: network for network in networks}  # Gs, the moving average, comes after G
    generator, discriminator = found.get("G_paper"), None if generator_only else found.get("D_paper")
    name = "Gs" if sum(network.build_function == "G_paper" for network in networks) > 1 else "G"
    return PGGANWeights(
        None if generator is None else _official_generator(f"{name} of {path}", generator),
        None if discriminator is None else _official_discriminator(f"D of {path}", discriminator),
    )


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch: CXR_PGGAN and the GAN zoo. In both a layer's whole output, bias included, is multiplied by √(2 / fan_in).


def _zoo_generator_names(levels: int) -> dict[str, str]:
    names = {"blocks.0.dense": "formatLayer", "blocks.0.conv": "groupScale0.0"}
    for level in range(1, levels):
        names |= {f"blocks.{level}.conv{index}": f"scaleLayers.{level - 1}.{index}" for index in (0, 1)}
    return names | {f"to_rgb.{level}": f"toRGBLayers.{level}" for level in range(levels)}


def _zoo_discriminator_names(levels: int) -> dict[str, str]:
    names = {"blocks.0.conv": "groupScaleZero.0", "blocks.0.dense": "groupScaleZero.1"}
    names["blocks.0.out"] = "decisionLayer"
    for level in range(1, levels):
        names |= {f"blocks.{level}.conv{index}": f"scaleLayers.{level - 1}.{index}" for index in (0, 1)}
    return names | {f"from_rgb.{level}": f"fromRGBLayers.{level}" for level in range(levels)}


def _cxr_generator_names(levels: int) -> dict[str, str]:
    names = {"blocks.0.dense": "latent_linear.0", "blocks.0.conv": "init_conv.0"}
    for level in range(1, levels):  # convolution, activation, pixel norm; twice
        names |= {f"blocks.{level}.conv{index}": f"ScaleBlocks.{level - 1}.convolv.{3 * index}" for index in (0, 1)}
    return names | {f"to_rgb.{level}": f"toRGB.{level}" for level in range(levels)}


def _cxr_discriminator_names(levels: int) -> dict[str, str]:
    names = {"blocks.0.conv": "DecisionBlock.0", "blocks.0.dense": "DecisionBlock.2", "blocks.0.out": "DecisionLinear"}
    for level in range(1, levels):  # the newest first; convolution and activation, twice
        block = f"ScaleBlocks.{levels - 1 - level}.convolv"
        names |= {f"blocks.{level}.conv{index}": f"{block}.{2 * index}" for index in (0, 1)}
    return names | {f"from_rgb.{level}": f"fromRGB.{level}" for level in range(levels)}


def _whole_outputs(arrays: _Arrays, names: Mapping[str, str], equalised: bool) -> dict[str, _Layer]:
    """Layers by their names here."""
    layers = {}
    for ours, theirs in names.items():
        dims = 4 if "conv" in ours or "rgb" in ours or theirs == "DecisionBlock.2" else 2
        weight, bias = arrays.take(f"{theirs}.weight", dims), arrays.take(f"{theirs}.bias", 1)
        scale = math.sqrt(2 / weight[0].numel()) if equalised else 1.0
        layers[ours] = _Layer(theirs, weight, bias * scale, scale)
    return layers


def _generator_settings(layers: Mapping[str, _Layer], levels: int, classes: int, first_norm: bool) -> dict[str, Any]:
    return {
        "channels": [layers[f"to_rgb.{level}"].weight.shape[1] for level in range(levels)],
        "latent_dim": layers["blocks.0.dense"].weight.shape[1] - classes,
        "out_channels": layers["to_rgb.0"].weight.shape[0],
        "num_classes": classes,
        "first_norm": first_norm,
    }


def _discriminator_settings(
    layers: dict[str, _Layer], levels: int, classes: int, group_size: int | None, activation: bool
) -> dict[str, Any]:
    """Also gives the convolution after the minibatch standard deviation its channel for it, where it has none."""
    conv = layers["blocks.0.conv"]
    counts = conv.weight.shape[1] != conv.weight.shape[0]
    weight, group_size = _with_statistic(conv.weight, group_size if counts else 0)
    layers["blocks.0.conv"] = conv._replace(weight=weight)
    return {
        "channels": [layers[f"from_rgb.{level}"].weight.shape[0] for level in range(levels)],
        "in_channels": layers["from_rgb.0"].weight.shape[1],
        "num_classes": classes,
        "minibatch_group_size": group_size,
        "from_rgb_activation": activation,
        "fused_scale": False,  # averaged after the leaky ReLU
    }


def _fading(source: str, alpha: Any, levels: int) -> tuple[int, float]:
    """The last level is in use; their alpha is the weight of the one before."""
    if isinstance(alpha, torch.Tensor) and alpha.numel() == 1:
        alpha = alpha.item()
    if type(alpha) not in (int, float) or not 0 <= alpha <= 1:
        raise UserError(
            f"alpha of {source} must be a number from 0 to 1, got {reprlib.repr(alpha)}; the file is damaged"
        )
    return BASE_SIDE << (levels - 1), 1.0 - alpha if levels > 1 else 1.0


class _Foreign(NamedTuple):
    """Networks of one file: their flat state dicts and their settings."""

    generator: dict[str, torch.Tensor] | None
    discriminator: dict[str, torch.Tensor] | None
    settings: Mapping[str, Any]


# Statistics of the zoo's groups of four use the unbiased variance; here it is the biased one, as in the paper.
ZOO_GROUP = 4
ZOO_STDDEV = math.sqrt(ZOO_GROUP / (ZOO_GROUP - 1))
ZOO_LINEAR_LOSSES = ("WGANGP", "Logistic")  # the others come with tanh after the generator


def _check_zoo(source: str, settings: Mapping[str, Any]) -> None:
    known = {"leakyReluLeak": (LEAK,), "perChannelNormalization": (True,), "lossCriterion": ZOO_LINEAR_LOSSES}
    for name, values in {**known, "equalizedlR": (True, False)}.items():
        _check_setting(source, name, settings.get(name, values[0]), *values)


def _zoo_classes(source: str, settings: Mapping[str, Any], discriminator: Mapping[str, torch.Tensor] | None) -> int:
    """By the settings; without them, what the discriminator has beside the score."""
    rows = None if discriminator is None else discriminator.get("decisionLayer.bias")
    classes = settings.get("categoryVectorDim", 0 if rows is None else rows.numel() - 1)
    if type(classes) is not int or classes < 0:
        raise UserError(
            f"categoryVectorDim of {source} must be a whole number, got {reprlib.repr(classes)}; such a network is "
            "not read"
        )
    return classes


def _zoo_generator(source: str, foreign: _Foreign) -> ConvertedPGGAN:
    _check_zoo(source, foreign.settings)
    arrays = _Arrays(source, "a generator of the PyTorch GAN zoo", foreign.generator)
    levels = arrays.count(r"toRGBLayers\.\d+\.weight")
    layers = _whole_outputs(arrays, _zoo_generator_names(levels), foreign.settings.get("equalizedlR", True))
    arrays.check_none_left()
    classes = _zoo_classes(source, foreign.settings, foreign.discriminator)
    settings = _generator_settings(layers, levels, classes, first_norm=True)
    growth = _fading(source, foreign.settings.get("alpha", 0), levels)
    return _built(source, PGGANGenerator, settings, layers, growth)


def _zoo_discriminator(source: str, foreign: _Foreign) -> ConvertedPGGAN:
    _check_zoo(source, foreign.settings)
    arrays = _Arrays(source, "a discriminator of the PyTorch GAN zoo", foreign.discriminator)
    levels = arrays.count(r"fromRGBLayers\.\d+\.weight")
    layers = _whole_outputs(arrays, _zoo_discriminator_names(levels), foreign.settings.get("equalizedlR", True))
    arrays.check_none_left()
    classes = _zoo_classes(source, foreign.settings, foreign.discriminator)
    out = layers["blocks.0.out"]
    if out.weight.shape[0] == 1 + classes:
        # its classifier reads the outputs from the first one on, which is the score as well; the last is never read
        rows = [0, *range(classes)]
        layers["blocks.0.out"] = out._replace(weight=out.weight[rows], bias=out.bias[rows])
    settings = _discriminator_settings(layers, levels, classes, ZOO_GROUP, activation=True)
    conv = layers["blocks.0.conv"]
    layers["blocks.0.conv"] = conv._replace(
        weight=torch.cat([conv.weight[:, :-1], conv.weight[:, -1:] * ZOO_STDDEV], 1)
    )
    side, alpha = _fading(source, foreign.settings.get("alpha", 0), levels)
    # at 8×8 its discriminator never mixes, whatever alpha is
    return _built(source, PGGANDiscriminator, settings, layers, (side, alpha if levels > 2 else 1.0))


CXR_BUFFERS = ("alpha", "current_size", "current_depth")


def _check_cxr(source: str, settings: Mapping[str, Any], norm_layers: bool, channels: list[int]) -> None:
    known = {"leakiness": (LEAK,), "norm_layers": (norm_layers,), "mode": ("nearest",), "equalize": (True, False)}
    for name, values in known.items():
        _check_setting(source, name, settings.get(name, values[0]), *values)
    depths = settings.get("channel_depth", channels)
    if depths != channels:
        raise UserError(
            f"channel_depth of {source} is {reprlib.repr(depths)} by its settings and {channels} by its arrays; "
            "expected them to agree, so such a network is not read"
        )


def _cxr_arrays(source: str, kind: str, state: Mapping[str, torch.Tensor]) -> tuple[_Arrays, torch.Tensor | int]:
    arrays = _Arrays(source, kind, {name: value for name, value in state.items() if name not in CXR_BUFFERS})
    return arrays, state.get("alpha", 0)


def _cxr_generator(source: str, foreign: _Foreign) -> ConvertedPGGAN:
    arrays, alpha = _cxr_arrays(source, "a generator of CXR_PGGAN", foreign.generator)
    levels = arrays.count(r"toRGB\.\d+\.weight")
    layers = _whole_outputs(arrays, _cxr_generator_names(levels), foreign.settings.get("equalize", True))
    arrays.check_none_left()
    settings = _generator_settings(layers, levels, 0, first_norm=False)
    _check_cxr(source, foreign.settings, True, settings["channels"])
    for level in range(levels):  # from [0, 1] to [-1, 1]
        layer = layers[f"to_rgb.{level}"]
        layers[f"to_rgb.{level}"] = layer._replace(weight=2 * layer.weight, bias=2 * layer.bias - 1)
    return _built(source, PGGANGenerator, settings, layers, _fading(source, alpha, levels))


def _cxr_discriminator(source: str, foreign: _Foreign) -> ConvertedPGGAN:
    arrays, alpha = _cxr_arrays(source, "a discriminator of CXR_PGGAN", foreign.discriminator)
    levels = arrays.count(r"fromRGB\.\d+\.weight")
    layers = _whole_outputs(arrays, _cxr_discriminator_names(levels), foreign.settings.get("equalize", True))
    arrays.check_none_left()
    for level in range(levels):  # from [-1, 1] to [0, 1]
        layer = layers[f"from_rgb.{level}"]
        bias = layer.bias + layer.scale * layer.weight.sum((1, 2, 3)) / 2
        layers[f"from_rgb.{level}"] = layer._replace(weight=layer.weight / 2, bias=bias)
    # 4×4 pixels without padding: each pixel of each channel once
    dense = layers["blocks.0.dense"]
    layers["blocks.0.dense"] = dense._replace(weight=dense.weight.flatten(1))
    settings = _discriminator_settings(layers, levels, 0, None, activation=False)
    _check_cxr(source, foreign.settings, False, settings["channels"])
    if layers["blocks.0.out"].bias.numel() != 1:
        raise UserError(
            f"decision_layer_dim of {source} must be 1, got {layers['blocks.0.out'].bias.numel()}; convert its "
            "generator alone with --generator_only"
        )
    return _built(source, PGGANDiscriminator, settings, layers, _fading(source, alpha, levels))


_Converter = Callable[[str, _Foreign], ConvertedPGGAN]
# a layer that only one of the networks has -> how it is converted, generator or discriminator
_KINDS: dict[str, tuple[_Converter, str]] = {
    "toRGBLayers.0.weight": (_zoo_generator, "generator"),
    "fromRGBLayers.0.weight": (_zoo_discriminator, "discriminator"),
    "toRGB.0.weight": (_cxr_generator, "generator"),
    "fromRGB.0.weight": (_cxr_discriminator, "discriminator"),
}
# Names of networks in a file or before the names of its arrays; a moving average before what it is the average of.
GENERATORS = ("avgG", "netG", "gen_shadow", "generator", "G")
DISCRIMINATORS = ("netD", "discriminator", "D")


def _state_dicts(content: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and state dicts of the networks in a file; a network that stands alone has the name ''."""
    whole = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if not isinstance(whole, Mapping) or not all(isinstance(name, str) for name in whole):
        return
    for network in (*GENERATORS, *DISCRIMINATORS):
        part = whole.get(network)
        if not isinstance(part, Mapping):
            part = {
                name.removeprefix(f"{network}."): value
                for name, value in whole.items()
                if name.startswith(f"{network}.")
            }
        yield network, part
    yield "", whole


def _settings(content: Any) -> Mapping[str, Any]:
    """What stands beside the networks, or nothing."""
    settings = content.get("config", content.get("settings")) if isinstance(content, Mapping) else None
    settings = settings.state if isinstance(settings, Record) else settings
    return settings if isinstance(settings, Mapping) else {}


def _convert_state_dicts(path: Path, content: Any, generator_only: bool) -> PGGANWeights:
    converters: dict[str, tuple[str, _Converter]] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for network, state in _state_dicts(content):
        # "module" stands between a layer of equalised learning rate and the layer that it wraps
        named = {name.replace(".module.", "."): value for name, value in state.items() if isinstance(name, str)}
        converter, role = next((kind for layer, kind in _KINDS.items() if layer in named), (None, ""))
        if converter is not None and role not in states:
            converters[role] = (f"{network} of {path}" if network else str(path), converter)
            states[role] = {name: _tensor(f"{name} of {path}", value) for name, value in named.items()}
    foreign = _Foreign(states.get("generator"), states.get("discriminator"), _settings(content))
    if generator_only:
        converters.pop("discriminator", None)
    return PGGANWeights(
        *(
            converters[role][1](converters[role][0], foreign) if role in converters else None
            for role in ("generator", "discriminator")
        )
    )


def _tensor(what: str, value: Any) -> torch.Tensor:
    if isinstance(value, StoredTensor):
        value = value.read()
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{what} must be an array, got a {type(value).__name__}; such a network is not read")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# files


def _read_npz(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > LARGEST_NPZ:
        raise RefusedError(f"its arrays unpack to {size} bytes, more than {LARGEST_NPZ}")
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_torch(path: Path) -> Any:
    return read_records(path, ["models"])  # the zoo's settings are an object of a class of its own


def convert_pggan(path: str | os.PathLike, generator_only: bool = False) -> PGGANWeights:
    """The networks of a file of another project as those of :mod:`medgen.networks.pggan`, giving the same outputs.

    Which project it comes from is told by its content: a snapshot of the official progressive GAN (TensorFlow's pickle
    of G, D and Gs), a checkpoint of CXR_PGGAN, or one of the PyTorch GAN zoo; of the last, also bare arrays, in a torch
    file or an ``.npz``, under ``G.`` and ``D.``. Nothing in the file is executed.

    Images of CXR_PGGAN are in [0, 1] there and in [-1, 1] here. The zoo takes the standard deviation of a minibatch
    over four images that follow each other, and here every quarter of the batch gives one of the four; scores are the
    same for a batch of four, and for more in that order.

    Args:
        path: the file.
        generator_only: leave the discriminator out, whatever it is like.

    Returns:
        the networks that the file has, in float32 and grown as far as they were; of two generators, the moving
        average.

    Raises:
        UserError: the file is damaged, none of these, or holds a network with a setting that the networks here have
            not; the message names the setting or the array.
    """
    path = Path(path)
    with OneLineErrors(path, "file of a progressive GAN"):
        with open(path, "rb") as file:
            legacy = file.read(len(LEGACY_HEAD)) == LEGACY_HEAD
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                npz = any(name.endswith(".npy") for name in file.namelist())
            weights = _convert_state_dicts(path, _read_npz(path) if npz else _read_torch(path), generator_only)
        elif legacy:
            weights = _convert_state_dicts(path, _read_torch(path), generator_only)
        else:
            weights = _convert_pickle(path, generator_only)
        if weights.generator is None and weights.discriminator is None:
            what = "generator of a progressive GAN" if generator_only else "progressive GAN"
            raise UserError(
                f"expected a {what} in {path} (official TensorFlow snapshot, CXR_PGGAN or PyTorch GAN zoo), got none; "
                "name another file"
            )
        return weights
