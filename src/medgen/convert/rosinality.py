"""Checkpoints of rosinality's stylegan2-pytorch under the names of :mod:`medgen.networks.stylegan2`.

Its layers compute what those here do: weights before the gain of the equalised learning rate, an up-sampling that is a
true convolution, the filter [1, 3, 3, 1]; names differ, and axes of length one. The layout was written down from memory
of that project and has not been checked against a published file; a name that is not expected ends the conversion.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from medgen.convert.restricted import OneLineErrors, StoredTensor, module_state_dict, read_records
from medgen.convert.stylegan2 import ConvertedStyleGAN2, official_settings, to_official
from medgen.errors import UserError
from medgen.networks.stylegan2 import RESAMPLE_TAPS, MappingNetwork

__all__ = ["ROSINALITY_NETWORKS", "convert_rosinality"]

ROSINALITY_NETWORKS = ("g_ema", "g", "d")
MEAN_LATENTS = 10_000  # that w_avg is estimated from, as StyleGAN2's projection does (appendix D)


class _Place(NamedTuple):
    """Where a tensor belongs here."""

    name: str
    squeezed: tuple[int, ...] = ()  # axes of length one that it loses, one after the other


class _Layout(NamedTuple):
    places: dict[str, _Place]
    filters: dict[str, float]  # gain of each buffer that holds the filter


def _numbered(prefix: str, state: Mapping[str, torch.Tensor]) -> int:
    """How many modules ``prefix.N`` there are."""
    return len({match[1] for name in state if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def _modulated(theirs: str, ours: str) -> dict[str, _Place]:
    return {
        f"{theirs}.conv.weight": _Place(f"{ours}.weight", (0,)),
        f"{theirs}.conv.modulation.weight": _Place(f"{ours}.affine.weight"),
        f"{theirs}.conv.modulation.bias": _Place(f"{ours}.affine.bias"),
    }


def _generator_layout(state: Mapping[str, torch.Tensor]) -> _Layout:
    places = {"input.input": _Place("synthesis.constant", (0,))}
    for layer in range(_numbered("style", state)):  # style.0 is the normalisation
        for part in ("weight", "bias"):
            places[f"style.{layer + 1}.{part}"] = _Place(f"mapping_network.layers.{layer}.{part}")
    filters = {}
    styled, images = [("conv1", "0.conv1")], [("to_rgb1", "0.to_image")]
    for level in range(1, _numbered("to_rgbs", state) + 1):
        first = 2 * (level - 1)
        styled += [(f"convs.{first}", f"{level}.conv0"), (f"convs.{first + 1}", f"{level}.conv1")]
        images.append((f"to_rgbs.{level - 1}", f"{level}.to_image"))
        filters |= {f"convs.{first}.conv.blur.kernel": 4.0, f"to_rgbs.{level - 1}.upsample.kernel": 4.0}
    for index, (theirs, block) in enumerate(styled):
        ours = f"synthesis.blocks.{block}"
        places |= _modulated(theirs, ours)
        places[f"{theirs}.activate.bias"] = _Place(f"{ours}.bias")
        places[f"{theirs}.noise.weight"] = _Place(f"{ours}.noise_strength", (0,))
        places[f"noises.noise_{index}"] = _Place(f"{ours}.noise", (0, 0))
    for theirs, block in images:
        ours = f"synthesis.blocks.{block}"
        places |= _modulated(theirs, ours)
        places[f"{theirs}.bias"] = _Place(f"{ours}.bias", (0, -1, -1))
    return _Layout(places, filters)


def _discriminator_layout(state: Mapping[str, torch.Tensor]) -> _Layout:
    places = {
        "convs.0.0.weight": _Place("blocks.0.from_image.weight"),
        "convs.0.1.bias": _Place("blocks.0.from_image.bias"),
        "final_conv.0.weight": _Place("conv.weight"),
        "final_conv.1.bias": _Place("conv.bias"),
    }
    for index, ours in enumerate(("linear", "out")):
        places |= {f"final_linear.{index}.{part}": _Place(f"{ours}.{part}") for part in ("weight", "bias")}
    filters = {}
    for level in range(_numbered("convs", state) - 1):
        theirs, ours = f"convs.{level + 1}", f"blocks.{level}"
        places |= {
            f"{theirs}.conv1.0.weight": _Place(f"{ours}.conv0.weight"),
            f"{theirs}.conv1.1.bias": _Place(f"{ours}.conv0.bias"),
            f"{theirs}.conv2.1.weight": _Place(f"{ours}.conv1.weight"),
            f"{theirs}.conv2.2.bias": _Place(f"{ours}.conv1.bias"),
            f"{theirs}.skip.1.weight": _Place(f"{ours}.skip.weight"),
        }
        filters |= {f"{theirs}.conv2.0.kernel": 1.0, f"{theirs}.skip.0.kernel": 1.0}
    return _Layout(places, filters)


def _translated(source: str, state: Mapping[str, torch.Tensor], layout: _Layout) -> dict[str, torch.Tensor]:
    """The tensors under our names, once every name and every filter has been seen to be as expected."""
    expected = {*layout.places, *layout.filters}
    missing, foreign = sorted(expected - set(state)), sorted(set(state) - expected)
    if missing or foreign:
        found = f"without {missing[0]}" if missing else f"with an unknown {foreign[0]}"
        raise UserError(
            f"expected a network of rosinality's stylegan2-pytorch, got {source} {found}; such a network is not read"
        )
    taps = torch.tensor(RESAMPLE_TAPS) / sum(RESAMPLE_TAPS)
    for name, gain in layout.filters.items():
        filter_ = gain * torch.outer(taps, taps)
        if state[name].shape != filter_.shape or not torch.allclose(state[name].float(), filter_, atol=1e-6):
            raise UserError(f"{name} of {source} must be the filter [1, 3, 3, 1]; models with another are not read")
    translated = {}
    for theirs, (ours, squeezed) in layout.places.items():
        value = state[theirs]
        for axis in squeezed:
            value = value.squeeze(axis)  # an axis longer than one stays, and does not fit later
        translated[ours] = value
    return translated


def _mean_w(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean w (W,) of latents from seed 0."""
    prefix = "mapping_network."
    layers = {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}
    w_dim, latent_dim = layers["layers.0.weight"].shape
    mapping = MappingNetwork(latent_dim, 0, w_dim, len(layers) // 2, embed_dim=w_dim)
    mapping.load_state_dict(layers)
    latents = torch.randn(MEAN_LATENTS, latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return mapping(latents, None).mean(0)


def convert_rosinality(path: str | os.PathLike, network: str = "g_ema") -> ConvertedStyleGAN2:
    """A network of a rosinality checkpoint as one of :mod:`medgen.networks.stylegan2`.

    The layout is recalled, not checked against a published file.

    Args:
        path: torch file of a dictionary with ``g_ema``, ``g`` or ``d``; nothing in it is executed.
        network: one of these. ``g_ema`` takes ``latent_avg`` as its mean w; where there is none, and for ``g``, it is
            the mean over 10,000 latents.

    Returns:
        its class, what to build it with, and its weights in float32.

    Raises:
        UserError: not such a file, it lacks that network, or it is none that can be built here.
    """
    if network not in ROSINALITY_NETWORKS:
        raise UserError(f"network must be one of {', '.join(ROSINALITY_NETWORKS)}, got {network!r}; set --network")
    source = f"{network} of {path}"
    with OneLineErrors(Path(path), "checkpoint of rosinality's stylegan2-pytorch"):
        content = read_records(path, ["argparse"])  # a training's checkpoint holds its arguments
        if not isinstance(content, dict) or not isinstance(content.get(network), dict):
            names = [name for name in ROSINALITY_NETWORKS if name in content] if isinstance(content, dict) else []
            raise UserError(f"expected {network} in {path}, got {', '.join(names) or 'no network'}; set --network")
        state = module_state_dict(content[network])
        layout = _discriminator_layout(state) if network == "d" else _generator_layout(state)
        translated = _translated(source, state, layout)
        if network != "d":
            mean = content.get("latent_avg") if network == "g_ema" else None
            translated["w_avg"] = mean.read() if isinstance(mean, StoredTensor) else _mean_w(translated)
        settings = official_settings(to_official(translated))
        return ConvertedStyleGAN2.checked(source, settings, translated)
