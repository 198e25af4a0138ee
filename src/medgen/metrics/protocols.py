"""Feature protocols: what exactly is done to an image before a distance is computed, one row each.

A Fréchet distance is comparable between two papers only if the network, its weights, the value range, the resizing
and the layer are the same; a row here fixes all of them, and its settings travel with the features.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medgen.data.image_set import LUMA, file_sha256
from medgen.errors import UserError

__all__ = [
    "DEFAULT_PROTOCOLS",
    "PROTOCOLS",
    "Protocol",
    "WeightsFile",
    "find_weights",
    "get_protocol",
    "make_extractor",
    "parse_weights",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
ROLES = ("reference", "samples")


@dataclass(frozen=True)
class WeightsFile:
    """A file of pretrained weights, which is never downloaded here.

    Attributes:
        names: what the file is called where it is published; the first is the usual one.
        url: where it is published.
        megabytes: its size, about.
        sha256: first digits of its SHA-256, where published; "" if not.
        folder: ``torch`` (where torch.hub keeps files) or ``torchxrayvision``: where it is looked for.
    """

    names: tuple[str, ...]
    url: str
    megabytes: int
    sha256: str
    folder: str

    @property
    def told(self) -> str:
        """Size and checksum, for people."""
        return f"about {self.megabytes} MB" + (f", SHA-256 {self.sha256}..." if self.sha256 else "")

    @property
    def search_folder(self) -> Path:
        """The folder in which the file's own library keeps it."""
        if self.folder == "torchxrayvision":
            return Path("~/.torchxrayvision/models_data").expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
        return Path(home).expanduser() / "hub" / "checkpoints"

    def found(self) -> Path | None:
        """Where the file lies; None if it does not."""
        paths = [self.search_folder / name for name in self.names]
        return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True)
class Protocol:
    """How features come from an image of values in [0, 1].

    The steps, in this order: channels (grey is repeated three times, RGB becomes BT.601 luma where a network takes one
    channel), resizing (both sides to ``size``: the aspect is not kept), ``low + value × (high − low)``, then
    ``(value − mean) / std`` per channel. Cubic resizing overshoots the range at edges; ``clip`` ends it there.

    Attributes:
        name: name of the row.
        extractor: ``radiomics``, ``inception``, ``swav``, ``xrv`` or ``module``.
        preset: preset of the radiomics extractor, or path of a module.
        size: side of the network's input in pixels; None: as the image is.
        resize: ``bicubic`` or ``bilinear``: Pillow's, on floats, kernel widened when shrinking (antialiasing);
            ``tf_bilinear``: that of TensorFlow 1.x, without antialiasing, inside the network's graph, which takes
            8-bit levels; ``none``.
        clip: cut what resizing made less than 0 or more than 1.
        low, high: what 0 and 1 become.
        mean, std: per channel; None for no normalisation.
        channels: of the network's input; None: as the image has.
        layer: the layer whose output the features are.
        width: number of features; None where it depends on other settings.
        weights: the file of pretrained weights; None if there is none, or if the module brings its own.
        source: the system whose figures the row reproduces.
        invalid: why figures by this row mean nothing, for rows that are kept for comparison only.
        ranges: (low, high) by role, where the reference and the samples were treated differently.
        role: ``reference`` or ``samples``, for rows with ``ranges``.
    """

    name: str
    extractor: str
    preset: str = ""
    size: int | None = None
    resize: str = "none"
    clip: bool = False
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    layer: str = ""
    width: int | None = None
    weights: WeightsFile | None = None
    source: str = ""
    invalid: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    role: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features, but for the weights; can stand in JSON."""
        settings = {
            "protocol": self.name,
            "extractor": self.extractor,
            "preset": self.preset,
            "size": self.size,
            "resize": self.resize,
            "clip": self.clip,
            "range": [self.low, self.high],
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "channels": self.channels,
            "layer": self.layer,
        }
        return settings if self.role is None else {**settings, "role": self.role}

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """What the network receives for one image.

        Args:
            image: (C, H, W) in [0, 1], C = 1 or 3.

        Returns:
            (``channels``, ``size``, ``size``) float32; with ``tf_bilinear`` (``channels``, H, W) uint8.

        Raises:
            UserError: the image has another shape, or the row needs a role.
        """
        if self.ranges and self.role is None:
            raise UserError(f"{self.name} treats reference and samples differently; name one: role='reference'")
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UserError(f"an image must be (1, H, W) or (3, H, W), got {image.shape}")
        planes = np.asarray(image, dtype=np.float32)
        if self.channels == 1 and len(planes) == 3:
            planes = np.tensordot(LUMA, planes, axes=1)[None]
        if self.resize == "tf_bilinear":
            planes = np.floor(planes * 255 + 0.5).astype(np.uint8)
        else:
            if self.size is not None and planes.shape[1:] != (self.size, self.size):
                planes = np.stack([_resized(plane, self.size, FILTERS[self.resize]) for plane in planes])
            if self.clip:
                planes = np.clip(planes, 0, 1)
            planes = planes * np.float32(self.high - self.low) + np.float32(self.low)
        if self.channels == 3 and len(planes) == 1:
            planes = np.repeat(planes, 3, axis=0)
        if self.mean is not None and self.std is not None:
            planes = (planes - _per_channel(self.mean)) / _per_channel(self.std)
        return np.ascontiguousarray(planes)

    def with_role(self, role: str | None) -> Protocol:
        """This row for one of the two sets of images; unchanged where a row treats both alike.

        Raises:
            UserError: the role is not ``reference`` or ``samples``, or the row needs one.
        """
        if role is not None and role not in ROLES:
            raise UserError(f"role must be {' or '.join(ROLES)}, got {role!r}")
        if not self.ranges:
            return self
        if role not in ROLES:
            raise UserError(
                f"{self.name} treats reference and samples differently; say which these images are with --role "
                f"reference or --role samples, got {role!r}"
            )
        low, high = self.ranges[role]
        return replace(self, role=role, low=low, high=high)


def _resized(plane: np.ndarray, size: int, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((size, size), resampling))


def _per_channel(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)[:, None, None]


# ---------------------------------------------------------------------------------------------------------------------
# the table

INCEPTION = WeightsFile(
    names=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    megabytes=96,
    sha256="6726825d",  # part of the published name, as torch.hub checks it
    folder="torch",
)
SWAV = WeightsFile(
    names=("swav_800ep_pretrain.pth.tar",),
    url="https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar",
    megabytes=113,
    sha256="",
    folder="torch",
)
XRV = WeightsFile(
    names=("nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",),
    url="https://github.com/mlmed/torchxrayvision/releases/download/v1/"
    "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt",
    megabytes=28,
    sha256="",
    folder="torchxrayvision",
)
# What generative_chestxray's compute_fid.py fed the network: fakes as stored, reals scaled; both at their own size.
LDM_RANGES = {"reference": (0.0, 1.0), "samples": (0.0, 255.0)}
LDM_FAULT = "samples enter at 0..255 and reals at 0..1, at their own size; the network expects -1024..1024 at 224"

# fmt: off
_COLUMNS = "name extractor preset size resize low high channels layer width weights".split()
_ROWS = [
    ("frd_v1",         "radiomics", "frd_v1", None, "none",        0.0,     255.0,     1, "radiomics", 398,  None),
    ("frd_v0",         "radiomics", "frd_v0", None, "none",        0.0,     255.0,     1, "radiomics", 93,   None),
    ("radiomics",      "radiomics", "full",   None, "none",        0.0,     255.0,     1, "radiomics", 837,  None),
    ("fid",            "inception", "",       299,  "bicubic",     -1.0,    127 / 128, 3, "pool3",     2048, INCEPTION),
    ("fid_tf",         "inception", "",       299,  "tf_bilinear", 0.0,     255.0,     3, "pool3",     2048, INCEPTION),
    ("fsd",            "swav",      "",       224,  "bicubic",     0.0,     1.0,       3, "avgpool",   2048, SWAV),
    ("xrv",            "xrv",       "",       224,  "bilinear",    -1024.0, 1024.0,    1, "features",  1024, XRV),
    ("xrv_ldm_source", "xrv",       "",       None, "none",        0.0,     255.0,     1, "features",  1024, XRV),
]
# fmt: on
_MORE: dict[str, dict[str, Any]] = {
    "frd_v1": {
        "source": "frd-score 1.x: original and wavelet images, normalised by the reference; its LoG images, which it "
        "configures, it leaves out where an image has one slice"
    },
    "frd_v0": {"source": "frd-score 0.x, gan_anom_detect: original image only"},
    "radiomics": {"source": "93 features (IBSI) of original, LoG and wavelet images"},
    "fid": {"source": "clean-fid: antialiased float bicubic, clipped, (x − 128) / 128 of 0..255", "clip": True},
    "fid_tf": {"source": "Heusel et al. 2017, torch-fidelity: TensorFlow 1.x bilinear of 8-bit levels"},
    "fsd": {
        "source": "StudioGAN 'clean' with SwAV ResNet-50, gan_anom_detect",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    },
    "xrv": {"source": "torchxrayvision DenseNet-121 'all', global average without ReLU; generative_chestxray, mended"},
    "xrv_ldm_source": {"source": "generative_chestxray compute_fid.py", "invalid": LDM_FAULT, "ranges": LDM_RANGES},
}
PROTOCOLS: dict[str, Protocol] = {
    row[0]: Protocol(**dict(zip(_COLUMNS, row, strict=True)), **_MORE[row[0]]) for row in _ROWS
}


DEFAULT_PROTOCOLS = ("frd_v1", "radiomics")  # need no weights


def get_protocol(
    name: str,
    *,
    role: str | None = None,
    feature_size: int | None = None,
    feature_range: Sequence[float] | None = None,
    feature_channels: int | None = None,
) -> Protocol:
    """A row of the table, or one for a network of the caller's own.

    Args:
        name: a row's name; or ``module:PATH`` with a TorchScript file; or ``module:package.module:callable``, which is
            imported and called without arguments for its ``torch.nn.Module``.
        role: ``reference`` or ``samples``, for ``xrv_ldm_source``; without effect on the others.
        feature_size: side of the module's input, by antialiased bicubic, clipped; default: images enter as they are.
        feature_range: what 0 and 1 become for the module; default: 0 and 1.
        feature_channels: 1 or 3 for the module; default: as the images have.

    Raises:
        UserError: no such row, or options of a module given for one.
    """
    kind, _, where = name.partition(":")
    if kind == "module":
        if not where:
            raise UserError("module: needs a path, such as module:features.ts or module:my_package.nets:encoder")
        low, high = (0.0, 1.0) if feature_range is None else _checked_range(feature_range)
        if feature_size is not None and not 1 <= feature_size <= 8192:
            raise UserError(f"feature_size must be from 1 to 8192 pixels, got {feature_size}")
        if feature_channels not in (None, 1, 3):
            raise UserError(f"feature_channels must be 1 or 3, got {feature_channels}")
        return Protocol(
            name=name,
            extractor="module",
            preset=where,
            size=feature_size,
            resize="none" if feature_size is None else "bicubic",
            clip=True,
            low=low,
            high=high,
            channels=feature_channels,
            layer="output",
            source="your own module",
        )
    if name not in PROTOCOLS:
        raise UserError(f"protocol must be one of {', '.join(PROTOCOLS)} or module:PATH, got {name!r}")
    given = {"feature_size": feature_size, "feature_range": feature_range, "feature_channels": feature_channels}
    wrong = [option for option, value in given.items() if value is not None]
    if wrong:
        raise UserError(f"{wrong[0]} is for module:PATH; protocol {name} fixes it, leave it out")
    return PROTOCOLS[name] if role is None else PROTOCOLS[name].with_role(role)


def _checked_range(values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not np.all(np.isfinite(values)) or values[0] == values[1]:
        raise UserError(f"feature_range must be two different numbers, what 0 and 1 become, got {tuple(values)}")
    return float(values[0]), float(values[1])


# ---------------------------------------------------------------------------------------------------------------------
# weights


def find_weights(protocol: Protocol, given: str | os.PathLike | None = None) -> tuple[Path, str]:
    """The file of a protocol's weights and its SHA-256.

    Args:
        protocol: a row with weights.
        given: the file; default: where the network's own library keeps it.

    Raises:
        UserError: the file is not there, or is another one than was published.
    """
    weights = protocol.weights
    if weights is None:
        raise UserError(f"protocol {protocol.name} takes no weights; leave --weights {protocol.name}=PATH out")
    path = weights.found() if given is None else Path(given)
    if path is None or not path.is_file():
        looked = f"at {path}" if path else f"in {weights.search_folder} as {' or '.join(weights.names)}"
        raise UserError(
            f"protocol {protocol.name} needs {weights.names[0]} ({weights.told}), not found {looked}; fetch it from "
            f"{weights.url} and put it into {weights.search_folder}, or name it with --weights {protocol.name}=PATH"
        )
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
    if not digest.startswith(weights.sha256):
        raise UserError(
            f"{path} is not the published {weights.names[0]} ({weights.told}): it has "
            f"{path.stat().st_size:,} bytes and SHA-256 {digest[: len(weights.sha256)]}...; fetch it again from "
            f"{weights.url}"
        )
    return path, digest


def make_extractor(protocol: Protocol, *, weights: str | os.PathLike | None = None, device: str = "cpu") -> Any:
    """The extractor of a protocol; see :mod:`medgen.metrics.feature_set` for what it offers.

    Args:
        protocol: the row.
        weights: file of its weights; default: where the network's own library keeps it.
        device: of a network; radiomics run on the CPU.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    if protocol.ranges and protocol.role is None:
        protocol.with_role(None)
    if protocol.extractor == "radiomics":
        from medgen.metrics.radiomics import RadiomicsExtractor

        if weights is not None:
            find_weights(protocol, weights)
        return RadiomicsExtractor(protocol.preset)
    # here: radiomics must not wait for torch
    from medgen.metrics.extractors import EXTRACTORS

    return EXTRACTORS[protocol.extractor](protocol, weights=weights, device=device)


def parse_weights(options: Sequence[str], others: Sequence[str] = ()) -> dict[str, str]:
    """``PROTOCOL=PATH`` options as a dictionary.

    Args:
        options: as they were typed.
        others: names beside those of the protocols that have weights.

    Raises:
        UserError: one is of another form, or names something else.
    """
    known = [*(name for name, row in PROTOCOLS.items() if row.weights), *others]
    given = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or not path or name not in known:
            raise UserError(f"--weights must be PROTOCOL=PATH with one of {', '.join(known)}, got {option!r}")
        given[name] = path
    return given
