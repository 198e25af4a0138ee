"""Snapshots of the official progressive GAN (TensorFlow), read without TensorFlow and without executing anything.

Such a file is a plain pickle of networks that carry their own Python source, which unpickling would run. Here the few
globals that a snapshot names are answered by inert builders, the source is dropped, and any other name ends the
reading.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from medgen.convert.restricted import Inert, InertDict, InertType, OneLineErrors, Record, RefusedError, next_pickle
from medgen.errors import UserError

__all__ = ["SnapshotNetwork", "read_pggan_pickle"]

KIND = "snapshot of the official progressive GAN"
VERSION = 2
BUILD_FUNCTIONS = ("G_paper", "D_paper")
NUMBERS = ("f2", "f4", "f8", "i4", "i8")


class SnapshotNetwork(NamedTuple):
    """A network of a snapshot.

    Attributes:
        build_function: ``G_paper`` or ``D_paper``.
        settings: what that function was called with; plain values.
        variables: names and arrays, as they lie in the file.
    """

    build_function: str
    settings: dict[str, Any]
    variables: dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# what a snapshot can build


class _Token(Inert):
    """A name that only ever stands as an argument."""

    __slots__ = ()


class _DType(Inert):
    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "=", "|"):
            raise RefusedError("a type of numbers is described without its byte order")
        self.order = order


class _MakeDType(Inert):
    """Stands for ``numpy.dtype``."""

    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _DType:
        if code not in NUMBERS:
            raise RefusedError(f"it holds numbers of type {reprlib.repr(code)} instead of {', '.join(NUMBERS)}")
        return _DType(code)


class _Array(Inert):
    __slots__ = ("numbers",)

    def __init__(self, numbers: np.ndarray | None = None) -> None:
        self.numbers = numbers

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array is described in an unknown way")
        _, shape, dtype, fortran, data = state
        self.numbers = _numbers(data, dtype, shape, "F" if fortran else "C")


class _MakeArray(Inert):
    """Stands for ``numpy.core.multiarray._reconstruct``; the numbers follow as the array's state."""

    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeScalar(Inert):
    """Stands for ``numpy.core.multiarray.scalar``."""

    __slots__ = ()

    def __call__(self, dtype: Any, data: Any) -> _Array:
        return _Array(_numbers(data, dtype, (), "C"))


class _FromBuffer(Inert):
    """Stands for ``numpy.core.numeric._frombuffer``, which arrays are made by since pickle's protocol 5."""

    __slots__ = ()

    def __call__(self, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        return _Array(_numbers(data, dtype, shape, order))


def _numbers(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if type(data) is str:  # how Python 2 wrote bytes
        data = data.encode("latin1")
    whole = isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 2**32 for n in shape)
    if not whole or len(shape) > 4 or not isinstance(dtype, _DType) or type(data) not in (bytes, bytearray):
        raise RefusedError("an array is described by something other than a type, a shape and its bytes")
    kind = np.dtype(dtype.code).newbyteorder(dtype.order)
    if math.prod(shape) * kind.itemsize != len(data) or order not in ("C", "F"):
        raise RefusedError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order=order)


class _Encode(Inert):
    """Stands for ``_codecs.encode``, which bytes are made by up to pickle's protocol 2."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise RefusedError("bytes are described by something other than characters")
        return text.encode("latin1")


class _Reconstructor(Inert):
    """Stands for ``copyreg._reconstructor``, which objects are made by up to pickle's protocol 1."""

    __slots__ = ()

    def __call__(self, kind: Any, *_: Any) -> Record:
        if kind is not _NETWORK:
            raise RefusedError("it makes an object of something other than a network")
        return kind()


_NETWORK = InertType("Network", (Record,), {"__slots__": (), "type_name": "tfutil.Network"})

SNAPSHOT_GLOBALS: dict[tuple[str, str], Any] = {
    ("tfutil", "Network"): _NETWORK,
    ("collections", "OrderedDict"): InertDict,
    ("numpy", "ndarray"): _Token(),
    ("numpy", "dtype"): _MakeDType(),
    ("_codecs", "encode"): _Encode(),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _MakeArray() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _MakeScalar() for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer() for core in ("core", "_core")},
    # Python 3's names and Python 2's
    **{(module, "_reconstructor"): _Reconstructor() for module in ("copyreg", "copy_reg")},
    **{(module, "object"): _Token() for module in ("builtins", "__builtin__")},
}

# Networks of their relatives, and what to do with them.
RELATIVES = {
    "network": "it is a network of the Theano edition; open it with the TensorFlow edition and save it there first",
    "dnnlib": "it is a TensorFlow network of StyleGAN or StyleGAN2; of the progressive GAN, files of its own are read",
    "torch_utils": "it is a snapshot of StyleGAN2-ADA; medgen convert stylegan2-ada reads it",
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in SNAPSHOT_GLOBALS:
            return SNAPSHOT_GLOBALS[module, name]
        said = RELATIVES.get(module.partition(".")[0])
        if said is not None:
            raise RefusedError(f"{said} (it names {module}.{name})")
        raise RefusedError(f"it names {module}.{name}, which no snapshot of the official progressive GAN needs")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise RefusedError("it refers to something outside of the file (a persistent id)")


# ---------------------------------------------------------------------------------------------------------------------
# files


def read_pggan_pickle(path: str | os.PathLike) -> list[SnapshotNetwork]:
    """The networks of a snapshot of the official progressive GAN, in their order: G, D, Gs.

    Args:
        path: the ``.pkl`` of a tuple of networks, or of one alone.

    Raises:
        UserError: the file is damaged, of another project or edition, or names what no snapshot needs; or it has more
            arrays than bytes for them, or two of one name.
    """
    path = Path(path)
    with OneLineErrors(path, KIND):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            pickled = next_pickle(data)
        content = _Unpickler(pickled).load()
        records = list(content) if isinstance(content, tuple | list) else [content]
        records = [record for record in records if record is not None]  # left out by hand
        if not records or not all(isinstance(record, _NETWORK) for record in records):
            raise RefusedError(f"it holds {reprlib.repr(content)} instead of the networks G, D and Gs")
        networks, room = [], len(pickled)
        for index, record in enumerate(records):
            networks.append(_network(f"network {index + 1} of {path}", record.state, room))
            room -= sum(array.nbytes for array in networks[-1].variables.values())
        return networks


def _network(source: str, state: Any, room: int) -> SnapshotNetwork:
    """A network whose arrays are at most ``room`` bytes: each becomes a copy, and a pickle may name one many times."""
    state = state if isinstance(state, Mapping) else {}
    expected = {"version": (VERSION,), "build_func_name": BUILD_FUNCTIONS}
    for key, known in expected.items():
        if state.get(key) not in known:
            raise UserError(
                f"{key} of {source} must be {' or '.join(map(str, known))}, got {reprlib.repr(state.get(key))}; other "
                "networks and other editions are not read"
            )
    settings, variables = state.get("static_kwargs"), state.get("variables")
    pairs = isinstance(variables, list) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], _Array)
        for pair in variables
    )
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings) or not pairs:
        raise UserError(f"{source} must have static_kwargs and variables by their names, got others; it is damaged")
    names = [name for name, _ in variables]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source} must have each array once, got {reprlib.repr(twice)} more than once; it is damaged")
    if sum(array.numbers.nbytes for _, array in variables if array.numbers is not None) > room:
        raise UserError(f"{source} must have arrays of its own, got more than the file has bytes for; it is damaged")
    return SnapshotNetwork(
        state["build_func_name"],
        {name: _plain(value) for name, value in settings.items()},
        {name: _tensor(f"{name} of {source}", array) for name, array in variables},
    )


def _plain(value: Any) -> Any:
    """A setting; NumPy's scalars become Python's."""
    if isinstance(value, _Array) and value.numbers is not None and value.numbers.ndim == 0:
        return value.numbers.item()
    return value


def _tensor(what: str, array: _Array) -> torch.Tensor:
    if array.numbers is None:
        raise UserError(f"{what} must be an array, got one without numbers; the file is damaged")
    native = array.numbers.dtype.newbyteorder("=")
    return torch.from_numpy(array.numbers.astype(native))  # a copy, in memory that may be written to
