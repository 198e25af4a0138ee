"""StyleGAN2-ADA's state dicts (PyTorch) under the names of :mod:`medgen.networks.stylegan2`, and back.

Both sides store weights before the gain of the equalised learning rate, and both up-sample by the same true
convolution, so that values pass unchanged: only names differ, and the filters, which the networks here hold as
constants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from medgen.errors import UserError
from medgen.networks.stylegan2 import RESAMPLE_TAPS, StyleGAN2Discriminator, StyleGAN2Generator
from medgen.weights import check_same_shapes

__all__ = ["ConvertedStyleGAN2", "from_official", "official_settings", "to_official"]

_DENSE = ("weight", "bias")
_STYLED = ("weight", "bias", "noise_strength", "affine.weight", "affine.bias")
_FILTER = "resample_filter"


class ConvertedStyleGAN2(NamedTuple):
    """A network out of a foreign file.

    Attributes:
        network: its class.
        settings: keyword arguments to build it with.
        state: its state dict.
    """

    network: type[StyleGAN2Generator | StyleGAN2Discriminator]
    settings: dict[str, Any]
    state: dict[str, torch.Tensor]

    @classmethod
    def checked(cls, source: str, settings: dict[str, Any], state: Mapping[str, torch.Tensor]) -> ConvertedStyleGAN2:
        """A network whose settings and weights have been seen to fit each other.

        Args:
            source: where they come from, for messages.
            settings: of the generator, with ``out_channels``, or of the discriminator.
            state: under the names of the network here; copied, as float32.

        Raises:
            UserError: no network can be built of these settings, or it has other shapes.
        """
        network = StyleGAN2Generator if "out_channels" in settings else StyleGAN2Discriminator
        with torch.device("meta"):  # shapes without numbers: what a file asks for is not allocated before it fits
            expected = network(**settings).state_dict()
        check_same_shapes(source, expected, state)
        return cls(network, settings, {name: state[name].detach().to(torch.float32, copy=True) for name in expected})


def _is_generator(state: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith("synthesis.") for name in state)


def _count(pattern: str, state: Mapping[str, torch.Tensor]) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _mapping_names(layers: int, classes: bool) -> list[tuple[str, str]]:
    names = [(f"mapping_network.embed.{part}", f"mapping.embed.{part}") for part in _DENSE if classes]
    for layer in range(layers):
        names += [(f"mapping_network.layers.{layer}.{part}", f"mapping.fc{layer}.{part}") for part in _DENSE]
    return names


def _generator_names(levels: int, mapping_layers: int, classes: bool) -> tuple[list[tuple[str, str]], list[str]]:
    """(ours, official) of every parameter and buffer, and the official names of the filters."""
    names = [*_mapping_names(mapping_layers, classes), ("w_avg", "mapping.w_avg")]
    names.append(("synthesis.constant", "synthesis.b4.const"))
    filters = []
    for level in range(levels):
        ours, official = f"synthesis.blocks.{level}", f"synthesis.b{4 << level}"
        filters.append(f"{official}.{_FILTER}")
        for conv in ("conv0", "conv1")[level == 0 :]:
            names += [(f"{ours}.{conv}.{part}", f"{official}.{conv}.{part}") for part in _STYLED]
            names.append((f"{ours}.{conv}.noise", f"{official}.{conv}.noise_const"))
            filters.append(f"{official}.{conv}.{_FILTER}")
        names += [
            (f"{ours}.to_image.{part}", f"{official}.torgb.{part}") for part in _STYLED if part != "noise_strength"
        ]
    return names, filters


def _discriminator_names(levels: int, mapping_layers: int, classes: bool) -> tuple[list[tuple[str, str]], list[str]]:
    """(ours, official) of every parameter, and the official names of the filters."""
    names, filters = _mapping_names(mapping_layers, classes), [f"b4.conv.{_FILTER}"]
    for level in range(levels - 1):
        ours, official = f"blocks.{level}", f"b{4 << (levels - 1 - level)}"
        filters.append(f"{official}.{_FILTER}")
        layers = [("from_image", "fromrgb")] if level == 0 else []
        for mine, theirs in [*layers, ("conv0", "conv0"), ("conv1", "conv1"), ("skip", "skip")]:
            parts = _DENSE[:1] if mine == "skip" else _DENSE
            names += [(f"{ours}.{mine}.{part}", f"{official}.{theirs}.{part}") for part in parts]
            filters.append(f"{official}.{theirs}.{_FILTER}")
    for mine, theirs in (("conv", "b4.conv"), ("linear", "b4.fc"), ("out", "b4.out")):
        names += [(f"{mine}.{part}", f"{theirs}.{part}") for part in _DENSE]
    return names, filters


def _names(state: Mapping[str, torch.Tensor], official: bool) -> tuple[list[tuple[str, str]], list[str]]:
    """The table of names of the network that a state dict belongs to."""
    mapping = r"mapping\.fc\d+\.weight" if official else r"mapping_network\.layers\.\d+\.weight"
    embed = "mapping.embed.weight" if official else "mapping_network.embed.weight"
    block = r"b\d+" if official else r"blocks\.\d+"
    if _is_generator(state):
        table, levels = _generator_names, _count(rf"synthesis\.{block}\.conv1\.weight", state)
    else:
        table, levels = _discriminator_names, _count(rf"{block}\.conv1\.weight", state) + 1
    return table(levels, _count(mapping, state), embed in state)


def _check_names(expected: set[str], state: Mapping[str, torch.Tensor], what: str) -> None:
    missing, foreign = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or foreign:
        found = f"no {missing[0]}" if missing else f"an unknown {foreign[0]}"
        raise UserError(
            f"expected the state dict of {what} (generator with output skips or residual discriminator), got one with "
            f"{found}; other architectures of StyleGAN2 are not read"
        )


def _resample_filter() -> torch.Tensor:
    taps = torch.tensor(RESAMPLE_TAPS)
    return torch.outer(taps, taps) / taps.sum() ** 2


def from_official(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of a :class:`~medgen.networks.StyleGAN2Generator` or discriminator out of an official one.

    Args:
        state: of ``G``, ``G_ema`` or ``D`` of StyleGAN2-ADA (PyTorch), under its own names.

    Returns:
        the same values, under the names of the network here.

    Raises:
        UserError: another architecture, or another filter than [1, 3, 3, 1].
    """
    names, filters = _names(state, official=True)
    _check_names({*(theirs for _, theirs in names), *filters}, state, "an official StyleGAN2-ADA network")
    expected = _resample_filter()
    for name in filters:
        if state[name].shape != expected.shape or not torch.allclose(state[name].float().cpu(), expected, atol=1e-6):
            raise UserError(
                f"{name} must be the filter [1, 3, 3, 1] in both directions, got a {tuple(state[name].shape)} filter; "
                "models with another resample_filter are not read"
            )
    return {ours: state[theirs] for ours, theirs in names}


def to_official(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`from_official`, filters included.

    Args:
        state: of a :class:`~medgen.networks.StyleGAN2Generator` or discriminator.

    Returns:
        the same values under the official names. ``b{side}`` counts the shorter side of images that are not square.

    Raises:
        UserError: not the state dict of such a network.
    """
    names, filters = _names(state, official=False)
    _check_names({ours for ours, _ in names}, state, "a StyleGAN2 network of medgen")
    return {**{theirs: state[ours] for ours, theirs in names}, **{name: _resample_filter() for name in filters}}


def official_settings(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What to build the network with, read off the shapes of an official state dict.

    Args:
        state: of ``G``, ``G_ema`` or ``D`` of StyleGAN2-ADA (PyTorch), under its own names.

    Returns:
        keyword arguments of :class:`~medgen.networks.StyleGAN2Generator` or of the discriminator.
        ``num_bf16_resolutions``, ``conv_clamp`` and the size of the minibatch groups leave no trace in a state dict.

    Raises:
        UserError: another architecture, or channels that no ``channel_base`` and ``channel_max`` give.
    """
    names, filters = _names(state, official=True)
    _check_names({*(theirs for _, theirs in names), *filters}, state, "an official StyleGAN2-ADA network")
    mapping_layers = _count(r"mapping\.fc\d+\.weight", state)
    embed = state.get("mapping.embed.weight")
    settings: dict[str, Any] = {"num_classes": 0 if embed is None else embed.shape[1]}
    if _is_generator(state):
        sides = [4 << level for level in range(_count(r"synthesis\.b\d+\.conv1\.weight", state))]
        channels = [state[f"synthesis.b{side}.conv1.weight"].shape[0] for side in sides]
        w_dim, width = state["mapping.fc0.weight"].shape
        settings |= {
            "out_channels": state["synthesis.b4.torgb.weight"].shape[0],
            "latent_dim": width - (0 if embed is None else embed.shape[0]),
            "w_dim": w_dim,
            "num_mapping_layers": mapping_layers,
        }
    else:
        sides = [4 << level for level in range(_count(r"b\d+\.conv1\.weight", state) + 1)]
        channels = [state["b4.conv.weight"].shape[0]] + [state[f"b{side}.conv0.weight"].shape[0] for side in sides[1:]]
        settings["in_channels"] = state[f"b{sides[-1]}.fromrgb.weight"].shape[1]
        settings |= {"num_mapping_layers": mapping_layers} if mapping_layers else {}
    settings |= {"image_size": sides[-1], "channel_base": channels[-1] * sides[-1], "channel_max": max(channels)}
    given = [min(settings["channel_base"] // side, settings["channel_max"]) for side in sides]
    if given != channels:
        raise UserError(
            f"channels must be channel_base / side up to channel_max, got {channels} at sides {sides}; such a network "
            "cannot be built here"
        )
    return settings
