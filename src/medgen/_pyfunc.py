"""The MLflow model of a bundle whose network takes one tensor and returns one tensor.

MLflow copies this file into every registered model ("models from code"): a version goes on running the code that it was
registered with. That is why it leans on nothing of this package but the error type.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from torch import nn

from medgen.errors import UserError

__all__ = ["BundleModel", "TensorFormat", "build_network"]

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

    def check(self, batch: np.ndarray) -> None:
        """See that a batch has this format.

        Args:
            batch: (B, C, *sizes).

        Raises:
            UserError: of another shape, with a size that does not divide, or with values that are not finite.
        """
        expected = f"({', '.join(['B', str(self.channels), *map(str, self.spatial_shape)])})"
        fits = batch.ndim == len(self.shape) and batch.shape[0] > 0 and batch.shape[1] == self.channels
        if not fits or not all(map(_size_fits, batch.shape[2:], self.spatial_shape)):
            raise UserError(
                f"{self.name} must have shape {expected}, got {batch.shape}; reshape, pad or crop it before predict()"
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


def build_network(
    bundle: str | Path,
    name: str = "network_def",
    config: str = "inference.json",
    overlays: Sequence[str | Path] = (),
) -> nn.Module:
    """The network in ``network_def`` of a bundle's ``configs/inference.json``, on the CPU and without weights.

    A config is code: its expressions run.

    Args:
        bundle: folder of the bundle.
        name: id of the network.
        config: file in ``configs`` that has it.
        overlays: JSON files that are laid over it, as ``monai.bundle run`` does with several config files. What they
            set within ids that the config lacks, as those for a training may, is left out.

    Raises:
        UserError: there is no network, or it cannot be built.
    """
    # here, because MONAI takes ten seconds that a wrong option should not have to wait for
    from monai.bundle import ConfigParser
    from monai.bundle.utils import merge_kv

    path = Path(bundle) / "configs" / config
    shown = " with ".join(map(str, [path.relative_to(Path(bundle).parent), *overlays]))
    try:
        parser = ConfigParser(json.loads(path.read_text(encoding="utf-8")))
        for overlay in overlays:
            for key, value in json.loads(Path(overlay).read_text(encoding="utf-8")).items():
                top, *within = re.split("#|::", key.removeprefix("+"))
                if not within or top in parser:
                    merge_kv(parser, key, value)
        parser["bundle_root"] = str(bundle)
        network = parser.get_parsed_content(name)
    # whatever a config's code raises
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [""]
        raise UserError(
            f"{name} in {shown} cannot be built ({type(error).__name__}: {reason[0]}); see that "
            "`python -m monai.bundle run` works with it"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} in {shown} must be a torch.nn.Module, got {type(network).__name__}")
    return network


class BundleModel(PythonModel):
    """``network_def`` with ``models/model.pt``, from batch to batch.

    Runs on CUDA where there is one, or on the device named by MLflow's own variable MLFLOW_DEFAULT_PREDICTION_DEVICE.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Build the network and load its weights.

        Args:
            context: holds the bundle's folder under ``bundle``.
        """
        bundle = Path(context.artifacts["bundle"])
        metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        self.format = TensorFormat.from_metadata(metadata, "inputs")
        device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = build_network(bundle)
        network.load_state_dict(torch.load(bundle / "models" / "model.pt", map_location="cpu", weights_only=True))
        self.network = network.to(self.device).eval()

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Run the network on a batch.

        Args:
            context: not used; part of the interface.
            model_input: float32 (B, C, *sizes) in the value range of the bundle's ``metadata.json``.
            params: not used; part of the interface.

        Returns:
            the network's output, float32.

        Raises:
            UserError: the batch does not have the format of the bundle's ``metadata.json``, or the network returned
                something other than one tensor.
        """
        batch = np.asarray(model_input, dtype=np.float32)
        self.format.check(batch)
        with torch.inference_mode():
            output = self.network(torch.tensor(batch, device=self.device))
        if not isinstance(output, torch.Tensor):
            raise UserError(
                f"network_def must return one tensor, got {type(output).__name__}; register a network whose forward "
                "returns its result alone"
            )
        return output.float().cpu().numpy()


mlflow.models.set_model(BundleModel())
