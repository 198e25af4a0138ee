"""Networks whose features distances are computed on; their weights are read from local files and never fetched."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models import densenet121, resnet50

from medgen.convert.restricted import read_module_weights
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.metrics.protocols import Protocol, find_weights, get_protocol
from medgen.weights import check_same_shapes, read_state_dict

__all__ = [
    "EXTRACTORS",
    "InceptionV3Features",
    "ModuleFeatures",
    "NetworkFeatures",
    "SwAVFeatures",
    "XRVDenseNetFeatures",
]

# BatchNorm counts its steps since PyTorch 0.4.1; older weights have no such number and evaluation does not use it.
COUNTER = "num_batches_tracked"


class NetworkFeatures(ABC):
    """Features by a network; a subclass says which and how its weights are read.

    Attributes:
        name: of the protocol.
        settings: those of the protocol, and the weights' SHA-256.
        feature_names: None, a network's features have none.
        network: in evaluation mode, on ``device``.
        prepare: what turns an image into the network's input; picklable, so that processes can do it.
    """

    feature_names: tuple[str, ...] | None = None

    def __init__(
        self,
        protocol: Protocol | str,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        network: nn.Module | None = None,
    ) -> None:
        """Read the weights and build the network.

        Args:
            protocol: row of the protocol table, or its name.
            weights: file of the weights; default: where the network's own library keeps it.
            device: to compute on.
            network: takes the place of the protocol's network, weights and all.

        Raises:
            UserError: the weights are missing or another network's, or there is no such device.
        """
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
        self.name = self.protocol.name
        self.prepare = self.protocol.prepare
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device} is not there ({str(error).splitlines()[0]}); set --device cpu") from error
        if network is None:
            network, fingerprint = self.build(weights)
        else:
            fingerprint = _state_fingerprint(network)
        self.settings: dict[str, Any] = {**self.protocol.settings, "weights_sha256": fingerprint}
        self.network = network.to(self.device).eval()

    @abstractmethod
    def build(self, weights: str | os.PathLike | None) -> tuple[nn.Module, str]:
        """The network with its weights, and their SHA-256."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, D) of prepared images ``x`` (B, C, H, W)."""
        return self.network(x)

    def on_prepared(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """Features of what :attr:`prepare` returned.

        Args:
            batch: (C, H, W) each, of one shape.

        Returns:
            (B, D) float32.

        Raises:
            UserError: the device has too little memory.
        """
        try:
            x = torch.from_numpy(np.stack(batch)).to(self.device)
            cudnn = torch.backends.cudnn
            # TF32 would make the third digit of a feature depend on the GPU; flags() turns off what it is not told
            with torch.inference_mode(), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
                features = self.forward(x)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.device} has too little memory for {len(batch)} images at a time; lower --batch_size"
            ) from error
        return features.float().cpu().numpy()

    def on_images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """Features of images.

        Args:
            batch: (C, H, W) each, values in [0, 1], C = 1 or 3.

        Returns:
            (B, D) float32.
        """
        prepared = [self.prepare(image) for image in batch]
        if len({image.shape for image in prepared}) == 1:
            return self.on_prepared(prepared)
        return np.concatenate([self.on_prepared([image]) for image in prepared])


class InceptionV3Features(NetworkFeatures):
    """Inception v3 with the weights of the FID (converted from TensorFlow's), 2048 features after the last pooling.

    Protocol ``fid`` resizes before the network, on floats and with antialiasing; ``fid_tf`` leaves it to the network's
    own graph, which samples 8-bit levels without.
    """

    def build(self, weights: str | os.PathLike | None) -> tuple[nn.Module, str]:
        # here: importing it takes seconds, and only this class needs it
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path, digest = find_weights(self.protocol, weights)
        state = read_state_dict(path)
        # It reads its file by pickle: it is given a copy of what the safe reader has read.
        copied = io.BytesIO()
        torch.save(state, copied)
        copied.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=copied)
        except RuntimeError as error:
            raise _other_network(path, error) from error
        return network, digest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.protocol.resize == "tf_bilinear":
            return self.network(x)[0]
        # The network's forward() takes 8-bit images only. Its layers are its children in the order in which they are
        # applied; the last is the classifier.
        for layer in list(self.network.children())[:-1]:
            x = layer(x)
        return x.flatten(1)


class SwAVFeatures(NetworkFeatures):
    """ResNet-50 trained by SwAV, 2048 features after the global pooling."""

    def build(self, weights: str | os.PathLike | None) -> tuple[nn.Module, str]:
        path, digest = find_weights(self.protocol, weights)
        state = {name.removeprefix("module."): value for name, value in read_state_dict(path).items()}
        state = {
            name: v for name, v in state.items() if not name.startswith(("projection_head.", "prototypes.", "fc."))
        }
        network = resnet50(weights=None)
        network.fc = nn.Identity()
        _load(network, state, path)
        return network, digest


class XRVDenseNetFeatures(NetworkFeatures):
    """DenseNet-121 of torchxrayvision, 1024 features: the last feature map's mean, without ReLU.

    The published file is a pickled module of that library; it is read by :mod:`medgen.convert.restricted`, which takes
    the numbers and runs nothing.
    """

    def build(self, weights: str | os.PathLike | None) -> tuple[nn.Module, str]:
        path, digest = find_weights(self.protocol, weights)
        # numpy, whose arrays are written by _codecs: lists of labels that lie beside the weights
        state = read_module_weights(path, packages=("torchxrayvision", "torchvision.models", "numpy", "_codecs"))
        network = densenet121(weights=None).features
        network.conv0 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        # the classifier and its thresholds stay behind
        prefix = "features."
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        _load(network, state, path)
        return network, digest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).mean((2, 3))


class ModuleFeatures(NetworkFeatures):
    """Features by a network of the caller's own: ``module:features.ts`` or ``module:package.module:callable``.

    Both run code that came with the network: use files that you trust. The output must be (B, D), or (B, D, h, w),
    of which the mean over h and w is taken.
    """

    def build(self, weights: str | os.PathLike | None) -> tuple[nn.Module, str]:
        if weights is not None:
            raise UserError(f"{self.name} brings its own weights; leave --weights out")
        where = self.protocol.preset
        if Path(where).is_file():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # deprecated in favour of formats few can write yet
                    network = torch.jit.load(where, map_location="cpu")
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0][:200]
                raise UserError(f"{where} is no TorchScript file ({reason}); save one with torch.jit.save") from error
            return network, file_sha256(where)
        package, colon, name = where.partition(":")
        if not colon:
            raise UserError(f"expected a TorchScript file or package.module:callable, got {where}, which is no file")
        try:
            make = getattr(importlib.import_module(package), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"module:{where} cannot be imported ({error}); its folder must be on PYTHONPATH") from error
        network = make()
        if not isinstance(network, nn.Module):
            raise UserError(f"module:{where} must return a torch.nn.Module, got a {type(network).__name__}")
        return network, _state_fingerprint(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            features = self.network(x)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(
                f"{self.name} does not take images of (channels, height, width) {tuple(x.shape[1:])}: "
                f"{said[-1][:200]}; set --feature_channels and --feature_size"
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim not in (2, 4) or len(features) != len(x):
            got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(f"{self.name} must give one tensor (B, D) or (B, D, h, w) for {len(x)} images, got {got}")
        return features.mean((2, 3)) if features.ndim == 4 else features


EXTRACTORS: dict[str, type[NetworkFeatures]] = {
    "inception": InceptionV3Features,
    "swav": SwAVFeatures,
    "xrv": XRVDenseNetFeatures,
    "module": ModuleFeatures,
}


def _load(network: nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = network.state_dict()
    state = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    check_same_shapes(str(path), {name: v for name, v in own.items() if not name.endswith(COUNTER)}, state)
    network.load_state_dict(state, strict=False)


def _other_network(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} belongs to another network ({' '.join(str(error).split())[:200]})")


def _state_fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's layers, of its numbers, and of the files that its own classes are written in."""
    digest = hashlib.sha256(repr(network).encode())
    # a state dict lacks buffers that are not persistent, such as a mean that is subtracted
    for name, value in sorted((dict(network.named_buffers()) | network.state_dict()).items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name}{value!r}".encode())
    kinds = {type(module) for module in network.modules()}
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if kind.__module__.partition(".")[0] not in ("torch", "torchvision"):
            with suppress(TypeError, OSError):  # made at the prompt
                digest.update(Path(inspect.getfile(kind)).read_bytes())
    return digest.hexdigest()
