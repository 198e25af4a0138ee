"""Generators of PyTorch's DCGAN example, and of projects that follow it, as :mod:`medgen.networks.dcgan` names them.

They are one ``nn.Sequential`` called ``main``: transposed convolution, batch normalisation, ReLU, and so on to tanh.
Its layers are those of :class:`medgen.networks.DCGANGenerator`, so that values pass unchanged.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medgen.convert.restricted import OneLineErrors, module_state_dict, read_records
from medgen.errors import UserError
from medgen.networks import DCGANGenerator
from medgen.weights import check_same_shapes

__all__ = ["ConvertedDCGAN", "convert_dcgan"]

KIND = "generator of PyTorch's DCGAN example"
PACKAGES = ("models", "__main__")  # that whole modules were saved from; nothing of them is imported
_PARALLEL = "module."  # what nn.DataParallel puts before every name


class ConvertedDCGAN(NamedTuple):
    """A generator out of a foreign file.

    Attributes:
        settings: keyword arguments of :class:`medgen.networks.DCGANGenerator`.
        state: its state dict, float32.
    """

    settings: dict[str, Any]
    state: dict[str, torch.Tensor]

    @property
    def overlay(self) -> dict[str, Any]:
        """The settings under the ids that a bundle's configs have at their head."""
        names = {"out_channels": "in_channels", "base_channels": "g_channels"}
        return {names.get(name, name): value for name, value in self.settings.items()}


def convert_dcgan(path: str | os.PathLike) -> ConvertedDCGAN:
    """A generator in the layout of PyTorch's DCGAN example as one of :mod:`medgen.networks.dcgan`.

    Args:
        path: torch file of its state dict, or of the whole module, by itself or within ``nn.DataParallel``; nothing in
            it is executed.

    Returns:
        what to build it with, found from the tensors' shapes, and its weights.

    Raises:
        UserError: not such a file, or a network that cannot be built here.
    """
    with OneLineErrors(Path(path), KIND):
        state = module_state_dict(read_records(path, PACKAGES))
        if all(name.startswith(_PARALLEL) for name in state):
            state = {name.removeprefix(_PARALLEL): value for name, value in state.items()}
        convolutions = [name for name in state if re.fullmatch(r"main\.\d+\.weight", name) and state[name].ndim == 4]
        translated = {_renamed(name, len(convolutions) - 1, path): value for name, value in state.items()}
        settings = _settings(translated, len(convolutions), path)
        with torch.device("meta"):  # shapes without numbers: what a file asks for is not allocated before it fits
            expected = DCGANGenerator(**settings).state_dict()
        for name, value in expected.items():
            if name.endswith("num_batches_tracked"):  # older than this counter, which nothing is computed from
                translated.setdefault(name, torch.zeros(value.shape, dtype=value.dtype))
        check_same_shapes(str(path), expected, translated)
    return ConvertedDCGAN(settings, {name: translated[name].to(value.dtype) for name, value in expected.items()})


def _renamed(name: str, last: int, path: str | os.PathLike) -> str:
    """Our name of a tensor of theirs; layers stand at 3i (convolution) and 3i + 1 (batch normalisation)."""
    found = re.fullmatch(r"main\.(\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)", name)
    number, kind = divmod(int(found[1]), 3) if found else (0, 2)
    if number > last or kind == 2 or (kind == 0 and found[2] != "weight") or (kind == 1 and number == last):
        raise UserError(f"expected a {KIND}, got {path} with {name:.60}; such a network is not read")
    return f"{('convs', 'norms')[kind]}.{number}.{found[2]}"


def _settings(state: dict[str, torch.Tensor], count: int, path: str | os.PathLike) -> dict[str, Any]:
    """Arguments of the generator, by the shapes of its first and its last convolution."""
    wanted = ["convs.0.weight", f"convs.{count - 1}.weight"]
    if count < 3 or not all(name in state for name in wanted):
        raise UserError(f"expected a {KIND}, got {path} with {count} convolutions; such a network is not read")
    first, last = (state[name] for name in wanted)
    return {
        "image_size": 2 ** (count + 1),  # from 4 pixels on, twice as many with each further convolution
        "latent_dim": first.shape[0],
        "out_channels": last.shape[1],
        "base_channels": last.shape[0],
    }
