"""Checks of a bundle's settings, made in ``initialize``, before any data is read."""

from __future__ import annotations

import ctypes
import difflib
import inspect
import json
import os
import sys
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.scripts import run
from monai.utils import ensure_tuple

from medgen.errors import UserError

__all__ = [
    "check_between",
    "check_choice",
    "check_device",
    "check_enough",
    "check_labelled",
    "check_multiple",
    "check_names",
    "check_one_class",
    "check_positive",
    "check_whole",
    "environment",
    "flag",
    "optional",
]


def check_names(argv: Sequence[str] | None = None) -> None:
    """See that every setting on the command line of ``monai.bundle run`` exists in its config files.

    MONAI adds an unknown name to the config as a new id and goes on: a training with ``--bach_size 4`` would run for
    days with the batch size of the config.

    Args:
        argv: the command line; default: this process's, if it is ``monai.bundle``'s.

    Raises:
        UserError: names the closest setting.
    """
    if argv is None:
        argv = sys.argv if Path(sys.argv[0]).parts[-2:] == ("bundle", "__main__.py") else []
    given = _options(argv)
    if "args_file" in given:
        given = {**ConfigParser.load_config_file(given["args_file"]), **given}
    if "config_file" not in given:
        return
    files = given["config_file"]
    if isinstance(files, str) and files.startswith("["):
        files = json.loads(files.replace("'", '"'))
    known = set(ConfigParser.load_config_files(ensure_tuple(files)))
    if "tracking" in given and str(given["tracking"]).endswith((".json", ".yaml", ".yml")):
        known |= set(ConfigParser.load_config_files(given["tracking"])["configs"])
    arguments_of_run = set(inspect.signature(run).parameters) - {"override"}
    for name in given.keys() - arguments_of_run:
        top = name.split("#")[0].split("::")[0]
        if top not in known and top != "_meta_":
            close = difflib.get_close_matches(top, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else "the names stand at the head of the config file"
            raise UserError(f"no setting {top} in {files if isinstance(files, str) else ', '.join(files)}; {hint}")


def _options(argv: Sequence[str]) -> dict[str, str]:
    """``--name value``, ``--name=value`` and bare ``--name`` as a dictionary."""
    given: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, _, given_with_it = word[2:].partition("=")
            given[name] = given_with_it
        elif name and not given[name]:
            given[name] = word
    return given


def environment(name: str) -> str:
    """A folder that a job's environment names, so that one args file serves on every cluster.

    Args:
        name: of the variable, such as ``DATA_DIR``.

    Raises:
        UserError: it is not set.
    """
    value = os.environ.get(name, "")
    if not value:
        raise UserError(f"the environment variable {name} must name a folder, it is not set; export {name}=/a/folder")
    return value


def flag(value: bool | str) -> bool:
    """A switch of the command line: ``--resume false`` arrives as the text "false", which Python takes for true.

    Raises:
        UserError: neither true nor false.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UserError(f"a switch must be true or false, got {value!r}")


def optional(value: Any) -> Any:
    """A setting that may be left empty: ``--initial_weights null`` of the command line arrives as the text "null"."""
    return None if isinstance(value, str) and value.lower() in ("", "none", "null") else value


def check_device(device: torch.device | str) -> None:
    """See that the device is there.

    Raises:
        UserError: no such device.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(
            f"device must be one of cpu{', ' if there else ''}{', '.join(there)}, got {device} "
            f"({str(error).splitlines()[0]}); set --device"
        ) from error


def check_labelled(input_dir: str | None, num_classes: int) -> None:
    """See that images of a network with classes come with their classes, which a folder does not hold.

    Raises:
        UserError: a folder for such a network.
    """
    if input_dir and num_classes:
        raise UserError(
            f"a network with {num_classes} classes needs a label for each image, which the folder {input_dir} does not "
            "hold; name a --datalist whose items have labels instead of --input_dir"
        )


def check_one_class(label: int | str | None, num_classes: int) -> None:
    """See that a training is of one class's images or of a network with classes.

    Raises:
        UserError: it is of both.
    """
    if label is not None and num_classes:
        raise UserError(
            f"label must be null for a network with {num_classes} classes, which learns from the images of each, got "
            f"{label!r:.80}; leave out --label or --num_classes"
        )


def check_positive(**settings: float) -> None:
    """See that numbers are above zero.

    Raises:
        UserError: names the first that is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{name} must be a number above 0, got {value!r}; set --{name}")


def check_choice(choices: Sequence[str], **settings: str) -> None:
    """See that settings are among what there is to choose from.

    Raises:
        UserError: names the first that is not.
    """
    for name, value in settings.items():
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}; set --{name}")


def check_between(low: float, high: float, **settings: float) -> None:
    """See that settings are numbers from ``low`` to ``high``.

    Raises:
        UserError: names the first that is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}; set --{name}")


def check_whole(minimum: int = 1, **settings: int) -> None:
    """See that settings are whole numbers of at least ``minimum``.

    Raises:
        UserError: names the first that is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(f"{name} must be a whole number of at least {minimum}, got {value!r}; set --{name}")


def check_enough(minimum: int, label: int | str | None = None, **splits: Sized) -> None:
    """See that splits hold enough images for what will be measured on them, before a training and not after it.

    Args:
        minimum: images.
        label: class that the splits were reduced to, for the message.
        splits: name -> items.

    Raises:
        UserError: names the first that does not.
    """
    for name, items in splits.items():
        if len(items) < minimum:
            of = "" if label is None else f" of label {label}"
            raise UserError(
                f"the {name} split must hold at least {minimum} images{of}, got {len(items)}; make the splits anew "
                "with more of them"
            )


def check_multiple(factor: int, **settings: int | Sequence[int]) -> None:
    """See that numbers, or all numbers of a list, are multiples of what a network divides them by.

    Raises:
        UserError: names the first that is not, and the nearest that are.
    """
    for name, values in settings.items():
        for value in ensure_tuple(values):
            if value % factor:
                below = value // factor * factor
                near = f"{below} or {below + factor}" if below else f"{factor}"
                raise UserError(f"{name} must be a multiple of {factor}, got {value}; set --{name} to {near}")


def keep_freed_memory(device: torch.device | str) -> bool:
    """Let this process keep the memory that it frees, where it computes on the CPU under glibc.

    glibc gives large blocks back to the system as they are freed and asks for them again in the next step, page by
    page: half of the time of a projection in batches of 32 (``tests/benchmarks/bench_projection.py``). The process's
    size stays at its peak.

    Args:
        device: that the network is on; on a GPU nothing changes.

    Returns:
        Whether it was set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or torch.device(device).type != "cpu":
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))
