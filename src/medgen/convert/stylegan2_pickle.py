"""Snapshots of StyleGAN2-ADA (PyTorch), read without executing anything out of them.

Such a file is a plain pickle whose networks carry their own Python source, which unpickling would run. Here the few
globals that a snapshot names are answered by inert builders, the source is dropped, and any other name ends the
reading. What a shape does not tell is taken from the attributes of the modules, and both must agree.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from medgen.convert.restricted import (
    GLOBALS,
    LEGACY_MAGIC,
    Inert,
    InertDict,
    InertType,
    OneLineErrors,
    Record,
    RefusedError,
    Storage,
    module_state_dict,
    next_pickle,
)
from medgen.convert.stylegan2 import ConvertedStyleGAN2, from_official, official_settings
from medgen.errors import UserError
from medgen.networks.stylegan2 import MAPPING_LR_MULTIPLIER

__all__ = ["SNAPSHOT_NETWORKS", "convert_stylegan2_pickle", "read_stylegan2_pickle"]

SNAPSHOT_NETWORKS = ("G_ema", "G", "D")
PERSISTENCE_VERSION = 6
LARGEST_STORAGE = 2**28  # bytes; the largest layer at 1024 has 17 MB
LEGACY_HEAD = pickle.dumps(LEGACY_MAGIC, 2)
TENSORFLOW = ("dnnlib.tflib", "tfutil")  # where the classes of StyleGAN's and StyleGAN2's first edition live


class Persistent(Record):
    """A network or a layer; its Python source is not kept."""

    __slots__ = ()


class _ReconstructPersistent(Inert):
    """Stands for ``torch_utils.persistence._reconstruct_persistent_obj``."""

    __slots__ = ()

    def __call__(self, meta: Any) -> Persistent:
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise RefusedError("a network is described by something other than a class and its attributes")
        if meta.get("version") != PERSISTENCE_VERSION:
            found = reprlib.repr(meta.get("version"))
            raise RefusedError(f"its networks have version {found} instead of {PERSISTENCE_VERSION}")
        name, state = meta.get("class_name"), meta.get("state")
        if not (isinstance(name, str) and name.isidentifier() and len(name) < 100 and isinstance(state, dict)):
            raise RefusedError("a network is described without its class or without its attributes")
        record = InertType(Persistent.__name__, (Persistent,), {"__slots__": (), "type_name": name})()
        record.__setstate__(state)
        return record


class _Storages(Inert):
    """Stands for ``torch.storage._load_from_bytes``, and keeps what it has read."""

    __slots__ = ("_path", "_read")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: list[torch.Tensor] = []

    def errors(self) -> OneLineErrors:
        return OneLineErrors(self._path, "snapshot of StyleGAN2-ADA")

    def storage(self, stored: Storage) -> torch.Tensor:
        """All numbers of a storage, (length,)."""
        return self._read[int(stored.key)]

    def __call__(self, data: Any) -> Storage:
        if type(data) is not bytes:
            raise RefusedError("the numbers of a tensor are no bytes")
        if len(data) > LARGEST_STORAGE:
            raise RefusedError(f"a tensor has {len(data)} bytes, more than {LARGEST_STORAGE}")
        _check_torch_file(data)
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # hostile bytes raise whatever they lead to
            named = re.search(r"GLOBAL (\S+)", str(error))
            said = f"it names {named[1]} where only numbers belong" if named else type(error).__name__
            raise RefusedError(f"the numbers of a tensor cannot be read ({said})") from error
        if not isinstance(found, torch.storage.TypedStorage):
            raise RefusedError(f"the numbers of a tensor are a {type(found).__name__} instead of a storage")
        numbers = torch.empty(0, dtype=found.dtype).set_(found)
        self._read.append(numbers)
        return Storage(self, str(len(self._read) - 1), numbers.dtype, len(numbers))


def _check_torch_file(data: bytes) -> None:
    """See that a torch file unpacks to no more than it is long, and is not the tar that torch would also read."""
    if data.startswith(LEGACY_HEAD):
        return
    if not data.startswith(b"PK"):
        raise RefusedError("the numbers of a tensor are no torch file")
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = file.infolist()
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > len(data):
        raise RefusedError("the numbers of a tensor are compressed, which torch files never are")


def _inert_class(name: str) -> type[Record]:
    return InertType(name.rpartition(".")[2], (Record,), {"__slots__": (), "type_name": name})


# What a snapshot names, all of it, beside the storages; NumPy's scalars are gains that the networks here compute.
SNAPSHOT_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        name: GLOBALS[name]
        for name in (
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("__builtin__", "set"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        )
    },
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _ReconstructPersistent(),
    ("dnnlib.util", "EasyDict"): InertDict,
    ("numpy", "dtype"): _inert_class("numpy.dtype"),
    ("numpy.core.multiarray", "scalar"): _inert_class("numpy.scalar"),
    ("numpy._core.multiarray", "scalar"): _inert_class("numpy.scalar"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storages: _Storages) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return self._storages
        if (module, name) in SNAPSHOT_GLOBALS:
            return SNAPSHOT_GLOBALS[module, name]
        if any(module == package or module.startswith(f"{package}.") for package in TENSORFLOW):
            raise RefusedError(
                f"it is a TensorFlow network (it names {module}.{name}); convert it with legacy.py of the PyTorch "
                "edition first"
            )
        raise RefusedError(f"it names {module}.{name}, which no snapshot of StyleGAN2-ADA needs")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise RefusedError("it refers to something outside of the file (a persistent id)")


def read_stylegan2_pickle(path: str | os.PathLike) -> dict[str, Any]:
    """What a snapshot of StyleGAN2-ADA (PyTorch) holds, as dictionaries, plain values and records.

    Args:
        path: the ``.pkl``.

    Returns:
        ``G``, ``D``, ``G_ema`` and whatever is beside them; networks are :class:`~medgen.convert.Record` objects
        that :func:`~medgen.convert.module_state_dict` reads.

    Raises:
        UserError: the file is damaged, a TensorFlow network, or names what no snapshot needs.
    """
    path = Path(path)
    storages = _Storages(path)
    with storages.errors():
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == b"PK\x03\x04":
                raise RefusedError("it is a torch file and no pickle; medgen convert rosinality may read it")
            content = _Unpickler(next_pickle(data), storages).load()
        if not isinstance(content, dict):
            raise RefusedError(f"it holds a {type(content).__name__} instead of the networks by their names")
    return content


def convert_stylegan2_pickle(path: str | os.PathLike, network: str = "G_ema") -> ConvertedStyleGAN2:
    """A network of an official snapshot as one of :mod:`medgen.networks.stylegan2`.

    Layers that were float16 in the file are bfloat16 here, which has its range and fewer digits.

    Args:
        path: the ``.pkl``.
        network: ``G_ema``, ``G`` or ``D``.

    Returns:
        its class, what to build it with, and its weights in float32.

    Raises:
        UserError: as :func:`read_stylegan2_pickle`; or the file lacks that network; or it is none that can be built
            here; or its attributes and its weights contradict each other.
    """
    if network not in SNAPSHOT_NETWORKS:
        raise UserError(f"network must be one of {', '.join(SNAPSHOT_NETWORKS)}, got {network!r}; set --network")
    source = f"{network} of {path}"
    with OneLineErrors(Path(path), "snapshot of StyleGAN2-ADA"):
        content = read_stylegan2_pickle(path)
        record = content.get(network)
        if not isinstance(record, Persistent):
            found = ", ".join(name for name in SNAPSHOT_NETWORKS if isinstance(content.get(name), Persistent))
            raise UserError(f"expected a network {network} in {path}, got {found or 'none'}; set --network")
        state = module_state_dict(record)
        settings = official_settings(state)
        settings |= _settings_of_attributes(source, record, settings)
        return ConvertedStyleGAN2.checked(source, settings, from_official(state))


# ---------------------------------------------------------------------------------------------------------------------
# attributes of the modules


def _settings_of_attributes(source: str, record: Persistent, settings: dict[str, Any]) -> dict[str, Any]:
    """What leaves no trace in the shapes; everything else that would change the images must be as it is here."""
    generator = "out_channels" in settings
    levels = int(math.log2(settings["image_size"])) - 1
    expected = {"c_dim": settings["num_classes"], "img_resolution": settings["image_size"]}
    if generator:
        expected |= {"img_channels": settings["out_channels"], "z_dim": settings["latent_dim"]}
        expected |= {"w_dim": settings["w_dim"], "num_ws": 2 * levels}
    else:
        expected["img_channels"] = settings["in_channels"]
    _check_attributes(source, record, expected)

    root = _child(record, "synthesis") if generator else record
    blocks = [_child(root, f"b{4 << level}") for level in range(levels)]
    layers = []
    for level, block in enumerate(blocks):
        if generator:
            names = ("conv1", "torgb") if level == 0 else ("conv0", "conv1", "torgb")
        else:
            names = ("conv",) if level == 0 else ("conv0", "conv1")
            names += ("fromrgb",) if level == levels - 1 else ()
        layers += [(name, _child(block, name)) for name in names]
    activated = [layer for name, layer in layers if name != "torgb"] + ([] if generator else [_child(blocks[0], "fc")])
    for layer in activated:
        _check_attributes(source, layer, {"activation": "lrelu"})
    if generator or settings["num_classes"]:
        mapping = _child(record, "mapping")
        _check_attributes(source, mapping, {"num_layers": settings["num_mapping_layers"]})
        for index in range(settings["num_mapping_layers"]):
            dense = _child(mapping, f"fc{index}")
            _check_attributes(source, dense, {"activation": "lrelu", "bias_gain": MAPPING_LR_MULTIPLIER})

    clamps = [layer.state.get("conv_clamp") for _, layer in layers]
    if not (clamps[0] is None or type(clamps[0]) in (int, float)) or any(clamp != clamps[0] for clamp in clamps):
        raise UserError(f"{source} must have one conv_clamp for all layers, got {reprlib.repr(clamps)}; it is not read")
    halves = [block.state.get("use_fp16", False) for block in blocks]
    count = halves.count(True)
    if halves != [False] * (levels - count) + [True] * count:
        raise UserError(
            f"{source} must have float16 in its highest resolutions only, got {reprlib.repr(halves)}; it is not read"
        )
    found = {"num_bf16_resolutions": count, "conv_clamp": clamps[0]}
    if not generator:
        group = _child(blocks[0], "mbstd").state.get("group_size")
        if type(group) is not int:
            raise UserError(
                f"{source} must have minibatch groups of a whole number, got {reprlib.repr(group)}; it is not read"
            )
        found["minibatch_group_size"] = group
    return found


def _child(module: Record, name: str) -> Record:
    """A module within a module; ``module_state_dict`` has seen that they are well formed."""
    child = module.state["_modules"].get(name)
    if not isinstance(child, Record):
        raise RefusedError(f"its {module.type_name} has no {name}")
    return child


def _check_attributes(source: str, module: Record, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if module.state.get(name) != value:
            raise UserError(
                f"{name} of {module.type_name} in {source} must be {value!r} to be what its weights belong to and "
                f"what is built here, got {reprlib.repr(module.state.get(name))}; such a network is not read"
            )
