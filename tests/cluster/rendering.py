"""Overlays as kubectl renders them, and what Kubernetes, JobSet and the training operator publish of their kinds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
KUBERNETES = REPOSITORY / "cluster" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
CORE_VERSION = "1.34"  # of Kubernetes: the first in which podReplacementPolicy is stable


@cache
def _rendered(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(folder: Path | str) -> list[dict[str, Any]]:
    """The documents of an overlay, or of any folder with a kustomization; a fresh copy each time.

    Args:
        folder: a name among :data:`OVERLAYS`, or a path.
    """
    path = KUBERNETES / "overlays" / folder if isinstance(folder, str) else folder
    return [document for document in yaml.safe_load_all(_rendered(path)) if document]


def workload(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The Job, JobSet or PyTorchJob of a manifest."""
    (found,) = [document for document in documents if document["kind"] != "ConfigMap"]
    return found


@cache
def jobset_schema() -> dict[str, Any]:
    """JSON schema of a JobSet, from Kubeflow's models of it, closed: a field that is not in it is refused."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    schema = JobsetV1alpha2JobSet.model_json_schema()
    # numbers and texts in JSON, objects to the generator of the models
    quantity = {"anyOf": [{"type": "string"}, {"type": "number"}]}
    either = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    definitions = schema["$defs"]
    for name, definition in definitions.items():
        if name.endswith("ResourceQuantity"):
            definitions[name] = quantity
        elif name.endswith("IntOrString"):
            definitions[name] = either
        elif definition.get("type") == "object" and "properties" in definition:
            definition["additionalProperties"] = False
    schema["additionalProperties"] = False
    return schema


def unknown_of_pytorchjob(document: Mapping[str, Any]) -> list[str]:
    """Fields of a PyTorchJob that the training operator's own client does not know, or knows as of another type."""
    return list(_unknown(document, "KubeflowOrgV1PyTorchJob", document["kind"]))


SIMPLE = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}
BUILT_IN = ("V1", "Kubeflow")


def _unknown(value: Any, kind: str, path: str) -> Iterator[str]:
    if kind.startswith("list["):
        if not isinstance(value, list):
            yield f"{path}: expected a list, got {value!r}"
            return
        for number, entry in enumerate(value):
            yield from _unknown(entry, kind[5:-1], f"{path}/{number}")
    elif kind.startswith("dict("):
        if not isinstance(value, dict):
            yield f"{path}: expected a mapping, got {value!r}"
            return
        for name, entry in value.items():
            yield from _unknown(entry, kind[5:-1].split(", ", 1)[1], f"{path}/{name}")
    elif kind.startswith(BUILT_IN):
        if not isinstance(value, dict):
            yield f"{path}: expected {kind}, got {value!r}"
            return
        model = _model(kind)
        types = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
        for name, entry in value.items():
            if name in types:
                yield from _unknown(entry, types[name], f"{path}/{name}")
            else:
                yield f"{path}: {kind} has no {name}"
    elif kind in SIMPLE and (not isinstance(value, SIMPLE[kind]) or (kind == "int" and isinstance(value, bool))):
        yield f"{path}: expected {kind}, got {value!r}"


def _model(kind: str) -> Any:
    import kubeflow.training.models
    import kubernetes.client

    return getattr(kubeflow.training.models, kind, None) or getattr(kubernetes.client, kind)
