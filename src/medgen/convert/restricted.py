"""A reader for torch files that hold pickled modules, which executes nothing out of them.

``torch.load`` of a whole module imports and calls whatever the file names. Here the pickle machine gets a closed world:
the few globals that describe tensors are answered by inert builders, classes of packages that the caller expects become
empty records, and any other name ends the reading. The numbers are read afterwards, with their bounds checked. Formats:
torch's zip (since 1.6) and its legacy one (a row of pickles, then the storages).
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from medgen.errors import UserError

__all__ = ["Record", "StoredTensor", "module_state_dict", "read_module_weights", "read_records"]

EXPECTED = ("torch.nn",)  # packages whose classes every pickled module names
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
DEEPEST = 200  # modules within modules
MOST_MODULES = 100_000  # a module may stand in many places: 50 levels of twice the same are a quadrillion

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}


class RefusedError(Exception):
    """Something in the file that is not read; the message says what."""


# ---------------------------------------------------------------------------------------------------------------------
# what a pickle can build. Its BUILD instruction calls __setstate__, or else sets attributes of whatever object it is
# given, so each of these has a __setstate__, and nothing that a later file could find changed.


class InertType(type):
    """Type of classes that cannot be changed."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise RefusedError(f"it tries to change the class {cls.__name__}")


class Record(metaclass=InertType):
    """An object whose class was not imported.

    Attributes:
        type_name: its class, ``module.name``.
        arguments: what it was made with.
        state: what it was restored from, as a rule a dictionary of its attributes; empty if nothing.
    """

    __slots__ = ("arguments", "state")
    type_name = ""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        record = object.__new__(cls)
        object.__setattr__(record, "arguments", arguments)
        object.__setattr__(record, "state", {})
        return record

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise RefusedError(f"it tries to set {name} of a {self.type_name}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # attributes and slots
            state = {**(state[0] or {}), **state[1]}
        object.__setattr__(self, "state", state)

    def __repr__(self) -> str:
        return f"Record({self.type_name})"


class InertDict(dict, metaclass=InertType):
    """Stands for ``collections.OrderedDict``, whose methods a pickle could replace."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Dropped: the ``_metadata`` of a state dict."""


class Inert:
    """Base of what a pickle may get hold of: its BUILD instruction is refused."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise RefusedError(f"it tries to change a {type(self).__name__.strip('_')}")


class StorageReader(Protocol):
    """What knows where the numbers of a storage lie."""

    def errors(self) -> OneLineErrors: ...

    def storage(self, stored: Storage) -> torch.Tensor:
        """All numbers of a storage, (length,)."""
        ...


@dataclass(frozen=True, eq=False)
class Storage(Inert):
    """A row of numbers that tensors are views of."""

    archive: StorageReader
    key: str
    dtype: torch.dtype
    length: int


@dataclass(frozen=True, eq=False)
class StoredTensor(Inert):
    """A tensor that still lies in its file; :meth:`read` fetches it.

    Attributes:
        shape: of the tensor.
        stride, offset: in elements of its storage, which other tensors may share.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def read(self) -> torch.Tensor:
        """The tensor on the CPU; tensors of one storage share their memory.

        Raises:
            UserError: its numbers lie outside of the file.
        """
        archive = self.storage.archive
        with archive.errors():
            return torch.as_strided(archive.storage(self.storage), self.shape, self.stride, self.offset)


class _RebuildTensor(Inert):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        whole = [offset, *shape, *stride]
        if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 2**48 for n in whole):
            raise RefusedError("a tensor is described by something other than a storage and whole numbers")
        shape, stride = tuple(shape), tuple(stride)
        elements = 1
        for n in shape:
            elements *= n
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if elements else 0
        # more elements than the storage has: a few bytes that would become terabytes when they are copied
        if last >= max(storage.length, 1) or elements > storage.length:
            raise RefusedError(f"a tensor of shape {shape} does not fit its storage of {storage.length} numbers")
        return StoredTensor(storage, offset, shape, stride)


class _RebuildParameter(Inert):
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> StoredTensor:
        if not isinstance(tensor, StoredTensor):
            raise RefusedError("a parameter is made of something other than a tensor")
        return tensor


# The globals that are answered, all of them; those of the packages expected become records.
GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): InertDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): dtype for name, dtype in {**STORAGES, **DTYPES}.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.archive = archive
        self.classes: dict[tuple[str, str], type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in GLOBALS:
            return GLOBALS[module, name]
        if any(module == package or module.startswith(f"{package}.") for package in self.archive.packages):
            if (module, name) not in self.classes:
                body = {"__slots__": (), "type_name": f"{module}.{name}"}
                self.classes[module, name] = InertType(name.rpartition(".")[2], (Record,), body)
            return self.classes[module, name]
        expected = ", ".join(self.archive.packages)
        raise RefusedError(f"it names {module}.{name}, which is neither a tensor nor a class of {expected}")

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # a class, with the source code that it had; legacy format
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise RefusedError("it refers to something outside that is neither a class nor a whole storage")
        _, dtype, key, _, length = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(length) is not int or length < 0:
            raise RefusedError("a storage is described by something other than a type, a name and a length")
        stored = self.archive.described.setdefault(key, Storage(self.archive, key, dtype, length))
        if (stored.dtype, stored.length) != (dtype, length):
            raise RefusedError(f"storage {key} is described in two ways")
        return stored


def next_pickle(data: Any) -> bytes:
    """The bytes of one pickle, from where ``data`` stands, with what the pickle machine itself does not check."""
    start = data.tell()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name.startswith("EXT"):  # would take objects from a registry of this process, unseen by find_class
            raise RefusedError("it uses pickle's extension registry")
        if opcode.name.endswith("PUT") and int(argument) > data.tell():  # the machine makes a table of that length
            raise RefusedError("it has a memo index beyond its own length")
    end = data.tell()
    data.seek(start)
    return data.read(end - start)


# ---------------------------------------------------------------------------------------------------------------------
# files


class _Archive:
    """A torch file: its one pickle and its storages."""

    def __init__(self, path: Path, packages: Sequence[str]) -> None:
        self.path = path
        self.packages = packages
        self.described: dict[str, Storage] = {}
        self._places: dict[str, int] | None = None  # legacy: key -> where its numbers begin; None: zip
        self._read: dict[str, torch.Tensor] = {}

    def errors(self) -> OneLineErrors:
        return OneLineErrors(self.path)

    def unpickled(self) -> Any:
        if zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as file:
                names = set(file.namelist())
                pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise RefusedError("it is a zip archive without the one data.pkl of a torch file")
                self._prefix = pickles[0].removesuffix("data.pkl")
                if f"{self._prefix}constants.pkl" in names:
                    raise RefusedError("it is a TorchScript file, which torch.jit.load reads")
                order = f"{self._prefix}byteorder"
                if order in names:
                    self._check_order(self._entry(file, order).decode("ascii"))
                data = io.BytesIO(self._entry(file, pickles[0]))
            return _Unpickler(next_pickle(data), self).load()
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:2] != b"\x80\x02":
                raise RefusedError("it is no torch file")
            if self._plain(data) != LEGACY_MAGIC or self._plain(data) != LEGACY_PROTOCOL:
                raise RefusedError("it is a pickle, but no torch file")
            self._check_order("little" if self._plain(data)["little_endian"] else "big")
            content = _Unpickler(next_pickle(data), self).load()
            self._places = {}
            for key in self._plain(data):
                if key not in self.described:
                    raise RefusedError(f"storage {key} belongs to nothing")
                (length,) = struct.unpack("<q", data.read(8))
                if length != self.described[key].length:
                    raise RefusedError(f"storage {key} has {length} numbers instead of {self.described[key].length}")
                self._places[key] = data.tell()
                data.seek(length * self.described[key].dtype.itemsize, os.SEEK_CUR)
            return content

    def _plain(self, data: mmap.mmap) -> Any:
        """The next pickle, which must do without any global."""
        return _PlainUnpickler(io.BytesIO(next_pickle(data))).load()

    @staticmethod
    def _check_order(order: str) -> None:
        if order != sys.byteorder:
            raise RefusedError(f"its numbers are stored {order}-endian, this machine's are {sys.byteorder}-endian")

    @staticmethod
    def _entry(file: zipfile.ZipFile, name: str) -> bytes:
        if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise RefusedError(f"{name} is compressed, which torch files never are")
        return file.read(name)

    def storage(self, stored: Storage) -> torch.Tensor:
        """All numbers of a storage, (length,); read once."""
        if stored.key not in self._read:
            size = stored.length * stored.dtype.itemsize
            if self._places is None:
                with zipfile.ZipFile(self.path) as file:
                    numbers = self._entry(file, f"{self._prefix}data/{stored.key}")
            else:
                with open(self.path, "rb") as file:
                    file.seek(self._places[stored.key])
                    # never more than there is: a length out of the file must not decide what is allocated
                    numbers = file.read(min(size, os.fstat(file.fileno()).st_size))
            if len(numbers) != size:
                raise RefusedError(f"storage {stored.key} has {len(numbers)} bytes instead of {size}")
            buffer = bytearray(numbers)  # torch wants memory that may be written to
            self._read[stored.key] = (
                torch.frombuffer(buffer, dtype=stored.dtype) if size else torch.empty(0, dtype=stored.dtype)
            )
        return self._read[stored.key]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise RefusedError(f"it names {module}.{name} where only numbers and names belong")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise RefusedError("it refers to something outside where only numbers and names belong")


class OneLineErrors:
    """Turns whatever damaged bytes lead to into one line.

    Args:
        path: the file that is read.
        kind: what it should be, for the message.
    """

    def __init__(self, path: Path, kind: str = "torch file") -> None:
        self.path = path
        self.kind = kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise UserError(_one_line(error)) from error.__cause__
        if isinstance(error, RefusedError):
            raise UserError(f"{self.path} is not read: {_one_line(error)}; nothing in it was run") from None
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{self.path} cannot be read ({error.strerror})") from error
        if isinstance(error, Exception):
            what = f"{self.path} is no {self.kind}, or a damaged one"
            raise UserError(f"{what} ({type(error).__name__}: {_one_line(error)}); nothing in it was run") from error


def _one_line(error: BaseException) -> str:
    """What it says, without what names out of a hostile file could do to a terminal."""
    text = " ".join(str(error).split())
    return "".join(character if character.isprintable() else "?" for character in text)[:500]


def read_records(path: str | os.PathLike, packages: Sequence[str] = ()) -> Any:
    """What a torch file holds, as dictionaries, lists, plain values, :class:`Record` and :class:`StoredTensor`.

    Args:
        path: the file, in torch's zip or legacy format.
        packages: whose classes become records, beside those of ``torch.nn``; nothing of them is imported.

    Raises:
        UserError: the file is damaged, something else, or names anything but tensors and classes of these packages.
    """
    path = Path(path)
    with OneLineErrors(path):
        return _Archive(path, (*EXPECTED, *packages)).unpickled()


def module_state_dict(content: Any) -> dict[str, torch.Tensor]:
    """The state dict of a module that was read as a record; or of a state dict itself.

    Args:
        content: a record with ``_parameters``, ``_buffers`` and ``_modules``, or a mapping of names to tensors.

    Returns:
        Names and tensors on the CPU, in the order of ``torch.nn.Module.state_dict``; buffers that are not persistent
        are left out. Tensors that shared memory share it again.

    Raises:
        UserError: it is neither.
    """
    found: dict[str, StoredTensor] = {}
    if isinstance(content, Record):
        _collect(content, "", 0, found, itertools.count())
    elif isinstance(content, Mapping) and all(isinstance(value, StoredTensor) for value in content.values()):
        found = {str(name): value for name, value in content.items()}
    else:
        keys = ", ".join(map(str, list(content)[:4])) if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"expected a module or a state dict, got {keys}; name the part that holds the network")
    return {name: tensor.read() for name, tensor in found.items()}


def _collect(
    module: Record, prefix: str, depth: int, found: dict[str, StoredTensor], modules_seen: Iterator[int]
) -> None:
    where = prefix.rstrip(".") or "the file"
    if depth > DEEPEST or next(modules_seen) > MOST_MODULES:
        raise UserError(f"{where[:80]} holds modules within modules without an end")
    state = module.state if isinstance(module.state, dict) else {}
    parts = [state.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise UserError(f"expected a module at {where}, got {module.type_name} without parameters and buffers")
    parameters, buffers, modules = parts
    # older modules have no such set
    passing = state.get("_non_persistent_buffers_set") or ()
    for name, value in [*parameters.items(), *((k, v) for k, v in buffers.items() if k not in passing)]:
        if value is None:
            continue
        if not isinstance(value, StoredTensor):
            raise UserError(f"expected a tensor at {prefix}{name}, got a {type(value).__name__}")
        found[f"{prefix}{name}"] = value
    for name, child in modules.items():
        if child is None:
            continue
        if not isinstance(child, Record):
            raise UserError(f"expected a module at {prefix}{name}, got a {type(child).__name__}")
        _collect(child, f"{prefix}{name}.", depth + 1, found, modules_seen)


def read_module_weights(path: str | os.PathLike, packages: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The state dict of a module that was saved whole (``torch.save(module, path)``), without running anything.

    Args:
        path: the file, in torch's zip or legacy format.
        packages: whose classes the module consists of, beside ``torch.nn``; they are not imported.

    Raises:
        UserError: as :func:`read_records` and :func:`module_state_dict`.
    """
    return module_state_dict(read_records(path, packages))
