"""A bundle without ``configs/serve.json``: its network, from a batch of numbers to a batch of numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from medgen.errors import UserError
from medgen.serving.parameters import check_parameters

__all__ = ["TensorFormat", "TensorService"]

# sizes of metadata.json that are free, or free up to a factor: "*", "n", "8*n"
_MULTIPLE = re.compile(r"(?:(\d+)\s*\*\s*)?n")


class TensorFormat(NamedTuple):
    """One tensor of ``network_data_format`` in a bundle's ``metadata.json``.

    Args:
        name: its name there, for messages.
        channels: number of channels, or width of a latent vector.
        spatial_shape: a number where the size is fixed, else MONAI's expression (``"8*n"``, ``"*"``); empty for a
            vector.
    """

    name: str
    channels: int
    spatial_shape: tuple[int | str, ...]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], side: str) -> TensorFormat:
        """The only tensor under ``inputs`` or ``outputs``.

        Args:
            metadata: content of ``metadata.json``.
            side: ``inputs`` or ``outputs``.

        Raises:
            UserError: none or several tensors, an entry that is incomplete, or a type other than float32.
        """
        try:
            tensors = dict(metadata["network_data_format"][side])
            (name, spec), *others = tensors.items()
            channels, shape, dtype = int(spec["num_channels"]), tuple(spec["spatial_shape"]), spec["dtype"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"network_data_format.{side} in configs/metadata.json must describe one tensor with num_channels, "
                f"spatial_shape and dtype ({type(error).__name__}: {error}); complete it"
            ) from error
        if others or dtype != "float32":
            raise UserError(
                f"network_data_format.{side} in configs/metadata.json must describe one float32 tensor, got "
                f"{', '.join(tensors)} ({name} is {dtype}); only networks with one tensor in and one out can be served"
            )
        return cls(name, channels, shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, channels, *sizes), -1 where the size is free."""
        return (-1, self.channels, *(size if isinstance(size, int) else -1 for size in self.spatial_shape))

    @property
    def wanted(self) -> str:
        """The shape, for messages."""
        return f"({', '.join(['B', str(self.channels), *map(str, self.spatial_shape)])})"

    def check(self, batch: np.ndarray) -> None:
        """See that a batch has this format.

        Args:
            batch: (B, C, *sizes).

        Raises:
            UserError: of another shape, with a size that does not divide, or with values that are not finite.
        """
        fits = batch.ndim == len(self.shape) and batch.shape[0] > 0 and batch.shape[1] == self.channels
        if not fits or not all(map(_size_fits, batch.shape[2:], self.spatial_shape)):
            raise UserError(
                f"{self.name} must have shape {self.wanted}, got {batch.shape}; reshape, pad or crop it before "
                "predict()"
            )
        if not np.isfinite(batch).all():
            raise UserError(
                f"{self.name} must be finite, got {np.count_nonzero(~np.isfinite(batch))} NaN or infinite values of "
                f"{batch.size}; clean it before predict()"
            )


def _size_fits(size: int, expected: int | str) -> bool:
    if isinstance(expected, int):
        return size == expected
    # expressions with a power ("2**p*n") admit every size for some p: the network has the last word on those
    multiple = _MULTIPLE.fullmatch(expected)
    return size > 0 and (multiple is None or size % int(multiple[1] or 1) == 0)


class TensorService:
    """Runs a network that takes one tensor and returns one.

    Args:
        network: in evaluation mode, with its weights.
        format: of its input.
    """

    parameters = ()
    column = None  # the inputs have no names

    def __init__(self, network: nn.Module, format: TensorFormat) -> None:
        self.network, self.format = network, format

    @property
    def usage(self) -> str:
        """What a request looks like, for messages."""
        return f'{{"inputs": <numbers of shape {self.format.wanted}>}}'

    def check(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """There are no parameters.

        Raises:
            UserError: there are.
        """
        return check_parameters((), params)

    def __call__(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Run the network on a batch.

        Args:
            model_input: (B, C, *sizes) in the value range of the bundle's ``metadata.json``.
            params: none.

        Returns:
            the network's output, float32.

        Raises:
            UserError: the batch does not have the format of the bundle's ``metadata.json``, or the network returned
                something other than one tensor.
        """
        self.check(params)
        batch = np.asarray(model_input, dtype=np.float32)
        self.format.check(batch)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            output = self.network(torch.tensor(batch, device=device))
        if not isinstance(output, torch.Tensor):
            raise UserError(
                f"network_def must return one tensor, got {type(output).__name__}; register a network whose forward "
                "returns its result alone"
            )
        return output.float().cpu().numpy()
