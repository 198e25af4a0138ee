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

_FORBIDDEN = re.compile(r"[^\w\-. /]")  # in names of parameters and metrics


def name_of(text: str) -> str:
    """A name that MLflow takes for a parameter, a metric or a picture."""
    return _FORBIDDEN.sub("_", text)[:LONGEST_NAME]


def short(text: str, longest: int) -> str:
    """A text, cut and marked so where it is longer than that."""
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def plain_settings(resolved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings at the head of a config, as a run has them.

    Args:
        resolved: MONAI's resolved content, id -> value; its top-level ids have no ``::``.
        config: the executed config, for those that nothing has asked for, and so nothing has resolved.

    Returns:
        Numbers, texts, switches, None, and lists and dictionaries of them; what was built from the config is left out.
    """
    unresolved = {name: value for name, value in config.items() if name not in resolved and _is_literal(value)}
    found = {**{name: value for name, value in resolved.items() if "::" not in name}, **unresolved}
    return {
        name: _plain(value)
        for name, value in found.items()
        if name not in (*OWN, *TRACKING) and not name.startswith("_") and _is_plain(value)
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
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return _is_plain(value) and not any(isinstance(text, str) and text[:1] in ("$", "@", "%") for text in texts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and name != "_target_" and _is_plain(entry) for name, entry in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, str | int | float | Path) or type(value).__name__ == "device"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return plain_json(value) if value is None or isinstance(value, str | int | float) else str(value)
