"""Reading plain weights, and seeing that they fit."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from medgen.errors import UserError

__all__ = ["check_same_shapes", "check_whole_file", "load_weights", "read_state_dict", "state_digest"]

FOLDER = 0x10  # attribute of an entry of a zip file, as of MS-DOS


def check_whole_file(path: str | Path) -> None:
    """See by its checksums that a file of ``torch.save`` holds what was written: ``torch.load`` itself compares none.

    It reads 1 to 2 GB a second on one core (``tests/benchmarks/bench_preemption.py``).

    Raises:
        zipfile.BadZipFile: it does not; what else is raised by a broken file depends on where it is broken.
    """
    with zipfile.ZipFile(path) as file:
        broken = file.testzip()
        # to torch's reader an entry with the attribute of a folder is empty, and the tensor not read
        odd = [entry.filename for entry in file.infolist() if entry.external_attr & FOLDER]
    if broken is not None or odd:
        raise zipfile.BadZipFile(f"{broken or odd[0]} is not what was written")


def read_state_dict(
    path: str | Path, shown: str | None = None, component: str | None = None
) -> dict[str, torch.Tensor]:
    """A bare state dict on the CPU, read with ``weights_only=True``; see :func:`check_whole_file`.

    Args:
        path: the file.
        shown: what to call it in messages; default: the path.
        component: the network to take if the file is a training's checkpoint, which holds several; None refuses those.

    Raises:
        UserError: a damaged file, not a torch file of plain weights, not one flat state dict, or a checkpoint without
            that component.
    """
    shown = shown or str(path)
    if not Path(path).is_file():
        raise UserError(f"no weights at {shown}; name a file that is there")
    is_zip = zipfile.is_zipfile(path)  # torch's legacy format is none, and has no checksums
    try:
        if is_zip:
            check_whole_file(path)
        # of a checkpoint one network is wanted: mapped, the others take no memory
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=component is not None and is_zip)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{shown} is damaged ({error}); copy or download it again") from error
    # a broken or foreign file raises whatever its bytes lead to
    except Exception as error:
        raise UserError(
            f"{shown} is not a file of plain weights ({type(error).__name__}); save the network's state_dict with "
            "torch.save"
        ) from error
    if component and isinstance(state, Mapping) and isinstance(parts := state.get("components"), Mapping):
        if component not in parts:
            raise UserError(
                f"expected a checkpoint with a {component}, {shown} holds {', '.join(parts)}; name one of a training "
                "that has it"
            )
        state = parts[component]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, Mapping) else type(state).__name__
        raise UserError(
            f"{shown} must be one flat state dict of tensors, got {found}; a checkpoint holds more than the network: "
            "name the model.pt that was saved beside it"
        )
    return dict(state)


def check_same_shapes(source: str, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """See that a state dict fits a network.

    Args:
        source: where the state dict comes from, for the message.
        expected: state dict of the network.
        given: state dict to load.

    Raises:
        UserError: names the first parameter that does not fit.
    """
    for key in [*expected, *(key for key in given if key not in expected)]:
        if key in expected and key in given and expected[key].shape == given[key].shape:
            continue
        want, got = (f"shape {tuple(d[key].shape)}" if key in d else "nothing" for d in (expected, given))
        raise UserError(
            f"{source} belongs to another architecture: this network has {want} at {key}, got {got}; use the network "
            "settings, or the overlay, that it was trained with"
        )


def load_weights(
    network: nn.Module, path: str | Path, shown: str | None = None, component: str | None = None, option: str = ""
) -> None:
    """Load a file of weights into the network that they are of.

    Args:
        network: the network.
        path: see :func:`read_state_dict`.
        shown: see :func:`read_state_dict`.
        component: see :func:`read_state_dict`.
        option: of the command line that sets the network's settings, told where the weights do not fit.

    Raises:
        UserError: the file holds no plain weights, or those of another architecture.
    """
    state = read_state_dict(path, shown, component)
    try:
        check_same_shapes(shown or str(path), network.state_dict(), state)
    except UserError as error:
        raise UserError(f"{error} ({option})" if option else str(error)) from error
    network.load_state_dict(state)


def state_digest(network: nn.Module) -> str:
    """SHA-256 of the names, shapes and values of all weights and buffers: what tells whether a network has changed."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
