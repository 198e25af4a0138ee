"""Control files of MedImageGAN as overlays of a bundle that trains, or samples, a DCGAN or SNGAN.

The control file is YAML of plain values, one a line. What the source's code makes of them is kept where it is a meaning
(a ``learning_rate`` from 1 on, ``out`` and ``run``), and left where it is a slip (the seed is used, not dropped).
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from medgen.errors import UserError

__all__ = ["ControlOverlay", "convert_control_file"]

PRESETS = {"DCGAN": "batch_16", "SNGAN": "spectral_norm"}  # of the trainings' settings; a file's own go before
GENERATOR = "Generator"
LEARNING_RATE = 2e-4  # both networks' where learning_rate is a factor
MOST_IMAGES = 1_000_000  # of one call of the inference, as its seeds are read
LARGEST = 65_536  # bytes of a control file; the source's have less than a thousand
LONGEST = 1_000  # characters of a value: Python takes the square of the time to write out a number


class ControlOverlay(NamedTuple):
    """What a control file becomes.

    Attributes:
        config: the bundle's config that it is laid over, ``train.json`` or ``inference.json``.
        settings: id -> value.
        notes: what else is to be done, or was understood how, one line each.
    """

    config: str
    settings: dict[str, Any]
    notes: tuple[str, ...]


def _check_plain(text: bytes) -> None:
    """See that a control file is one mapping of plain values, each key once, before anything is made of it.

    Repetitions by name (aliases), which may grow without limit, are none of a control file's.

    Raises:
        UserError: a key stands twice.
        yaml.YAMLError: it is no such mapping, or no YAML.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"a value must be written out, got *{event.anchor:.60}")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        for part in (key, value):
            if not isinstance(part, yaml.ScalarNode) or len(part.value) > LONGEST:
                name = f"{key.value:.60}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise yaml.YAMLError(
                    f"each key has a number or a short text, got something else in line {part.start_mark.line + 1} "
                    f"({name})"
                )
    for name, count in Counter(key.value for key, _ in node.value).items():
        if count > 1:
            raise UserError(f"each key of a control file must stand once, got {name!r:.60} {count} times")


def _whole(minimum: int, maximum: int | None = None) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"a whole number of at least {minimum}")
        if maximum is not None and value > maximum:
            raise ValueError(f"a whole number of at most {maximum:,}")
        return value

    return read


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)  # YAML 1.1 takes 2e-4, without a point, for text
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _above_zero(value: Any) -> float:
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError("a number above 0")
    return number


def _share(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < 1:
        raise ValueError("a number from 0 to below 1")
    return number


def _one_of(*choices: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, bool) or value not in choices:
            raise ValueError(", ".join(map(str, choices[:-1])) + f" or {choices[-1]}")
        return value

    return read


def _text(value: Any) -> str:
    # in a config, text that begins so is code or a reference
    if not isinstance(value, str) or not value or value[0] in "$@%":
        raise ValueError("text that does not begin with $, @ or %")
    return value


_SIZE = _one_of(16, 32, 64, 128, 256, 512)
_OF_BOTH: dict[str, Callable[[Any], Any]] = {
    "arch": _one_of(*PRESETS, GENERATOR),
    "path": _text,
    "out": _text,
    "run": _text,
    "n_gpu": _whole(0),
    "image_size": _SIZE,
}
_OF_TRAINING = _OF_BOTH | {
    "seed": _whole(0),
    "num_epochs": _whole(1),
    "learning_rate": _above_zero,
    "beta_adam": _share,
    "batch_size": _whole(1),
    "latent_vector": _whole(1),
    "loader_workers": _whole(0),
    "number_channels": _one_of(1, 3),
    "gen_feature_maps": _whole(1),
    "dis_feature_maps": _whole(1),
}
_OF_SAMPLING = _OF_BOTH | {"quantity": _whole(1, MOST_IMAGES)}
# theirs -> the bundle's id, where the value is the same
_TRAINING_IDS = {
    "seed": "seed",
    "num_epochs": "epochs",
    "beta_adam": "beta0",
    "latent_vector": "latent_dim",
    "image_size": "image_size",
    "loader_workers": "num_workers",
    "number_channels": "in_channels",
    "gen_feature_maps": "g_channels",
    "dis_feature_maps": "d_channels",
}


def convert_control_file(path: str | os.PathLike, overlay: str | os.PathLike) -> ControlOverlay:
    """A control file of MedImageGAN as an overlay.

    Keys that it lacks keep the value of the bundle's preset.

    Args:
        path: YAML file; nothing in it is executed.
        overlay: where the overlay will be written, for the commands among the notes.

    Raises:
        UserError: not such a file, an unknown key, or a value that cannot be.
    """
    given = _read(path)
    arch = given.get("arch")
    known = _OF_SAMPLING if arch == GENERATOR else _OF_TRAINING
    if unknown := [key for key in given if key not in known]:
        kind = f"a control file of arch {arch}" if arch in (*PRESETS, GENERATOR) else "a control file"
        raise UserError(
            f"{kind} has the keys {', '.join(known)}, got {unknown[0]!r:.60} in {path}; remove or rename it"
        )
    values = {}
    for key, value in given.items():
        try:
            values[key] = known[key](value)
        except ValueError as error:
            raise UserError(f"{key} of {path} must be {error}, got {value!r:.60}") from error
    if "arch" not in values:
        raise UserError(f"{path} must have the key arch with {', '.join(PRESETS)} or {GENERATOR}; add it")
    return (_sampling if arch == GENERATOR else _training)(values, overlay)


def _read(path: str | os.PathLike) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{path} must be a control file, got one of more than {LARGEST:,} bytes; name another")
        _check_plain(text)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a control file") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not text, or a day that is none
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} must be a control file in YAML, got one that cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a control file in YAML, with lines KEY: VALUE, got {type(content).__name__}")
    return content


def _training(values: Mapping[str, Any], overlay: str | os.PathLike) -> ControlOverlay:
    settings: dict[str, Any] = {"preset": PRESETS[values["arch"]]}
    settings |= {ours: values[theirs] for theirs, ours in _TRAINING_IDS.items() if theirs in values}
    notes = []
    if "learning_rate" in values:
        rate = values["learning_rate"]
        if rate >= 1:
            settings |= {"g_lr": LEARNING_RATE, "d_lr": LEARNING_RATE * rate}
            notes.append(f"learning_rate {rate:g} is a factor: {LEARNING_RATE * rate:g} of D, {LEARNING_RATE:g} of G")
        else:
            settings |= {"g_lr": rate, "d_lr": rate}
    # the source's code smooths none, though its experiments say so; the preset of SNGAN does
    settings["real_label"] = 1.0
    command = "python -m monai.bundle run"
    gpus = values.get("n_gpu", 1)
    if "batch_size" in values:
        batch = values["batch_size"]  # of all GPUs together, as DataParallel divides it
        settings["batch_size"] = batch if gpus < 2 else f"$medgen.engines.batch_per_process({batch})"
    files = ["configs/train.json", str(Path(overlay).resolve())]
    if gpus > 1:
        command = f"torchrun --standalone --nproc_per_node {gpus} -m monai.bundle run"
        files.insert(1, "configs/multi_gpu_train.json")
    elif "n_gpu" in values:
        settings["device"] = _device(gpus)
    settings |= _output_dir(values)
    images, side = _absolute(values.get("path", "IMAGES")), settings.get("image_size", "SIZE")
    data = f"{Path(overlay).resolve().with_suffix('')}_data"  # a folder of its own, the same from wherever it is named
    notes.append(
        "a training reads a datalist instead of a folder: python -m preprocessing.images --source "
        f"{shlex.quote(images)} --target {shlex.quote(data)} --folder-labels --size {side}"
    )
    notes.append(
        f"then, in the bundle's folder: {command} --config_file {_listed(files)} --datalist "
        f"{shlex.quote(data)}/datalist.json"
    )
    return ControlOverlay("train.json", settings, tuple(notes))


def _sampling(values: Mapping[str, Any], overlay: str | os.PathLike) -> ControlOverlay:
    settings: dict[str, Any] = {"image_size": values["image_size"]} if "image_size" in values else {}
    if "quantity" in values:
        settings["seeds"] = f"0-{values['quantity'] - 1}"
    if "n_gpu" in values:
        settings["device"] = _device(min(values["n_gpu"], 1))  # several would take a share each, by --shard
    settings |= _output_dir(values)
    weights = Path(settings.get("output_dir", Path(overlay).resolve().with_suffix(""))) / "model.pt"
    settings["model_path"] = str(weights)
    files = ["configs/inference.json", str(weights.with_suffix(".json")), str(Path(overlay).resolve())]
    notes = (
        f"the weights: medgen convert dcgan {shlex.quote(_absolute(values.get('path', 'WEIGHTS')))} --output "
        f"{shlex.quote(str(weights))}",
        f"in the bundle's folder: python -m monai.bundle run --config_file {_listed(files)}",
    )
    return ControlOverlay("inference.json", settings, notes)


def _device(gpus: int) -> str:
    return "cuda:0" if gpus else "cpu"


def _output_dir(values: Mapping[str, Any]) -> dict[str, str]:
    """The source puts ``out`` and ``run`` before its files' names; here they are a folder and one within it."""
    if not values.keys() & {"out", "run"}:
        return {}
    out = _absolute(values.get("out", "."))
    folder = _absolute(Path(out, values.get("run", ".")))
    if not Path(folder).is_relative_to(out):
        raise UserError(f"run must be a folder within out, {out}, got {values['run']!r:.60}; name one without ..")
    return {"output_dir": folder}


def _absolute(path: str | os.PathLike) -> str:
    """A path that is the same in the bundle's folder."""
    return os.path.abspath(path)


def _listed(files: list[str]) -> str:
    """Config files as MONAI's command line takes several."""
    text = "[" + ",".join(f"'{name}'" for name in files) + "]"
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
