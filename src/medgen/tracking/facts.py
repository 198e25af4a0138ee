"""What a run is to be known by later: settings, data, versions, device."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from medgen import __version__
from medgen.lineage import used
from medgen.output import git_revision, plain_json

__all__ = [
    "command_line_settings",
    "data_facts",
    "device_facts",
    "installed_packages",
    "lineage",
    "name_of",
    "plain_settings",
    "short",
    "version_facts",
]

LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000  # characters that MLflow takes
OWN = ("imports", "initialize", "run", "finalize", "handlers_id")  # of MONAI's machinery, no settings
TRACKING = ("save_execute_config", "executed_config", "is_not_rank0", "tracked_files", "tracker")

LONGEST_LIST = 32  # numbers that are a setting, such as one for each resolution; more are data

_REFERENCE = re.compile(r"@(\w+)")  # the top-level id of @id, @id::part and @id#part
_FORBIDDEN = re.compile(r"[^\w\-. /]")  # in names of parameters and metrics


def name_of(text: str) -> str:
    """A name that MLflow takes for a parameter, a metric or a picture."""
    parts = _FORBIDDEN.sub("_", text)[:LONGEST_NAME].split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"


def short(text: str, longest: int) -> str:
    """A text, cut and marked so where it is longer than that."""
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def plain_settings(resolved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings at the head of a config, as a run has them.

    Data are none: what a config computes may be the names of patients, the paths of their images and the reports on
    them. Of that there are only numbers, a few in a list at most, and texts that are computed from settings alone, such
    as a path below another.

    Args:
        resolved: MONAI's resolved content, id -> value; its top-level ids have no ``::``.
        config: the executed config: what is written there is a setting as it stands, be it resolved or not.

    Returns:
        Numbers, texts, switches, None, and lists and dictionaries of them.
    """
    found: dict[str, bool] = {}

    def is_setting(name: str) -> bool:
        if name not in found:
            found[name] = False  # for one that refers to itself
            text, value = config.get(name), resolved.get(name)
            if name in config and _is_literal(text):
                found[name] = True
            elif name in resolved:
                references = _REFERENCE.findall(json.dumps(text)) if name in config else None
                found[name] = _is_numeric(value) or (
                    isinstance(value, str | Path) and references is not None and all(map(is_setting, references))
                )
        return found[name]

    names = dict.fromkeys([*(name for name in resolved if "::" not in name), *config])
    return {
        name: _plain(resolved.get(name, config.get(name)))
        for name in names
        if name not in (*OWN, *TRACKING) and not name.startswith("_") and is_setting(name)
    }


def command_line_settings(argv: Sequence[str]) -> list[str]:
    """Names of the settings on the command line of ``monai.bundle run``; none where it is another program's."""
    if Path(argv[0]).parts[-2:] != ("bundle", "__main__.py"):
        return []
    of_run = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")
    given = [word[2:].partition("=")[0] for word in argv[1:] if word.startswith("--") and len(word) > 2]
    return [name for name in given if name not in of_run]


def data_facts(datalist: str | Path | None) -> tuple[dict[str, str], dict[str, Any] | None]:
    """What a datalist holds.

    Args:
        datalist: JSON file, or None for a run without data.

    Returns:
        Parameters (its hash; images and patients of each split), and the fields of :class:`mlflow.entities.Dataset`,
        None without data. No path of an image and no patient's name is among them.
    """
    from medgen.data.datalist import SPLITS, datalist_hash

    if datalist is None or not Path(datalist).is_file():
        return {}, None
    content = json.loads(Path(datalist).read_text(encoding="utf-8"))
    counts: dict[str, int] = {}
    for split in SPLITS:
        items = content.get(split) or []
        counts |= {f"images_{split}": len(items), f"patients_{split}": len({item["patient"] for item in items})}
    digest = datalist_hash(datalist)
    params = {"datalist_sha256": digest, **{name: str(count) for name, count in counts.items()}}
    dataset = {
        "name": str(content.get("name") or Path(datalist).parent.name)[:500],
        "digest": digest[:36],
        "source_type": "local",
        "source": json.dumps({"uri": str(datalist)}),
        "profile": json.dumps(counts),
    }
    return params, dataset


def version_facts() -> dict[str, str]:
    """Tags: versions of what computes, the commit of the checkout, and who started the run."""
    tags = {f"version_{name}": importlib.metadata.version(name) for name in ("torch", "monai", "numpy", "mlflow")}
    tags |= {"version_medgen": __version__, "version_python": platform.python_version()}
    if revision := git_revision():
        # the second is what MLflow's page shows as the version of the source
        tags |= {"git": revision, "mlflow.source.git.commit": revision.partition("+")[0]}
    with suppress(OSError, KeyError):  # a container may run as a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


def installed_packages() -> str:
    """All that is installed, as pip's requirements."""
    found = {str(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def device_facts(device: Any) -> dict[str, str]:
    """Tags: what the run computes on."""
    import ignite.distributed as idist
    import torch

    facts = {
        "device": str(device),
        "world_size": str(idist.get_world_size()),
        "cpu_cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    if torch.device(device).type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "gpu_count": str(torch.cuda.device_count()),
            "cuda": str(torch.version.cuda),
        }
    return facts


def lineage() -> tuple[dict[str, str], list[str]]:
    """Models that this process has used so far.

    Returns:
        Tags, such as ``generator`` and ``generator_sha256``, and ids of those that MLflow has as models.
    """
    tags: dict[str, str] = {}
    for source in used():
        tags |= {source.kind: short(source.uri or source.source, LONGEST_TAG), f"{source.kind}_sha256": source.sha256}
    return tags, [source.model_id for source in used() if source.model_id]


def overrides_of(settings: Mapping[str, Any]) -> str:
    """Settings of the command line, for a tag."""
    names = [name for name in command_line_settings(sys.argv) if name in settings or "#" in name or "::" in name]
    return short(", ".join(names), LONGEST_TAG)


def _is_literal(value: Any) -> bool:
    """Whether a text of a config is itself what it stands for."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(_is_literal(entry) for entry in value.values())
    if isinstance(value, list):
        return all(_is_literal(entry) for entry in value)
    return not (isinstance(value, str) and value[:1] in ("$", "@", "%"))


def _is_numeric(value: Any) -> bool:
    """Whether a value can name nobody."""
    if isinstance(value, list | tuple):
        return len(value) <= LONGEST_LIST and all(isinstance(e, int | float) or e is None for e in value)
    return value is None or isinstance(value, int | float) or type(value).__name__ == "device"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return plain_json(value) if value is None or isinstance(value, str | int | float) else str(value)
