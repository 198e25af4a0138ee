"""One command everywhere: Kubernetes, Run:ai and SLURM start the same, and checkov has no more to say than we know."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import rules
import yaml
from rendering import OVERLAYS, REPOSITORY, render, workload

CLUSTER = REPOSITORY / "cluster"
STAGES = sorted(path.stem for path in (CLUSTER / "args").glob("*.json"))
# what torchrun reads, wherever it runs on one node
OF_TORCHRUN = ("PET_MAX_RESTARTS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_NPROC_PER_NODE")


def of_kubernetes(stage: str) -> dict:
    return workload(render(stage))["spec"]["template"]["spec"]["containers"][0]


def of_runai(stage: str) -> list[str]:
    """The first command that the script of a stage would give to runai."""
    environment = {
        **os.environ,
        "SETTINGS": os.devnull,
        "PROJECT": "radiology",
        "IMAGE": f"registry.example.org/medgen@sha256:{'0' * 64}",
        "DATA_PVC": "medgen-data",
        "OUTPUT_PVC": "medgen-outputs",
    }
    script = CLUSTER / "runai" / f"{stage}.sh"
    done = subprocess.run(["bash", script, "--dry-run"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[0])


def of_slurm(stage: str) -> list[str]:
    """The command that the batch script of a stage runs in the bundle's folder."""
    if ".train" in stage:
        text = (CLUSTER / "slurm" / "train.sbatch").read_text()
        (command,) = re.findall(r"^in_image (torchrun .*)$", text, re.MULTILINE)
    else:
        text = (CLUSTER / "slurm" / "array.sbatch").read_text()
        (command,) = re.findall(r"^\s*command=\((python .*)\)$", text, re.MULTILINE)
    return [word.replace("$ARGS_FILE", f"/args/{stage}.json") for word in shlex.split(command)]


def comparable(words: list[str]) -> list[str]:
    """Without a shard, and without the folder of the args file: mounted here, in the image or the repository there."""
    words = words[: words.index("--shard")] if "--shard" in words else words
    return [Path(word).name if word.endswith(".json") else word for word in words]


@pytest.mark.parametrize("stage", STAGES)
def test_three_schedulers_run_the_same_command(stage):
    container = of_kubernetes(stage)
    runai = of_runai(stage)
    command = comparable(rules.argv(container))
    of_runai_container = runai[runai.index("--") + 1 :]
    # `medgen check` comes first: by an init container, which Run:ai's own workloads have none of, or by this script
    assert of_runai_container[:2] == ["bash", f"{rules.SOURCE}/cluster/check_then.sh"]
    assert comparable(of_runai_container[2:]) == command
    assert comparable(of_slurm(stage)) == command
    # in the same folder, on as many GPUs
    assert runai[runai.index("--working-dir") + 1] == container["workingDir"]
    gpus = container["resources"]["limits"].get(rules.GPU, "0")
    assert gpus == (runai[runai.index("--gpu-devices-request") + 1] if "--gpu-devices-request" in runai else "0")


def test_torchrun_is_told_the_same_by_all_three():
    ours = rules.variables(of_kubernetes("cxr_pggan.train"))
    slurm = (CLUSTER / "slurm" / "train.sbatch").read_text() + (CLUSTER / "slurm" / "common.sh").read_text()
    runai = of_runai("cxr_pggan.train")
    theirs = dict(word.split("=", 1) for word in runai if re.match(r"[A-Z_]+=", word))
    for name in OF_TORCHRUN:
        assert theirs[name] == ours[name]
        assert re.search(rf"{name}=\$\{{\w+:-{ours[name]}\}}", slurm), name
    assert {name: theirs[name] for name in ("DATA_DIR", "OUTPUT_DIR")} == {
        name: ours[name] for name in ("DATA_DIR", "OUTPUT_DIR")
    }


# what checkov finds in our pods, and why it stays
ACCEPTED = {
    "CKV_K8S_11": "no CPU limit: throttled data loaders keep GPUs waiting; requests divide the CPUs",
    "CKV_K8S_21": "no namespace in the manifest: it is the user's, by kubectl -n",
    "CKV_K8S_35": "MLflow takes its password from the environment only; it comes from a Secret",
    "CKV2_K8S_6": "no NetworkPolicy: pods talk to each other and to a tracking server that only the site knows",
}


def checkov() -> str:
    own = REPOSITORY / ".venv-checkov" / "bin" / "checkov"
    found = str(own) if own.is_file() else shutil.which("checkov")
    if not found:
        pytest.skip("checkov is not installed: python -m venv .venv-checkov && .venv-checkov/bin/pip install checkov")
    return found


@pytest.mark.slow(reason="checkov itself takes seconds to start")
def test_checkov_finds_nothing_that_is_not_accepted(tmp_path):
    bare = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "bare"},
        "spec": {"template": {"spec": {"containers": [{"name": "main", "image": "medgen"}], "restartPolicy": "Never"}}},
    }
    jobs = [bare]
    for number, overlay in enumerate(OVERLAYS):
        # it knows no JobSet and no PyTorchJob: their pods are shown as Jobs
        for role, pods in enumerate(rules.pods_of(render(overlay))):
            spec = {"template": pods.template}
            name = {"name": f"overlay-{number}-{role}"}
            jobs.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": name, "spec": spec})
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump_all(jobs))
    command = [checkov(), "-f", tmp_path / "jobs.yaml", "--framework", "kubernetes", "--compact", "--quiet"]
    done = subprocess.run(
        [*command, "--skip-download", "-o", "json"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    of_bare = {check["check_id"] for check in report["results"]["failed_checks"] if ".bare" in check["resource"]}
    of_ours = {check["check_id"] for check in report["results"]["failed_checks"] if "overlay-" in check["resource"]}
    assert of_ours <= set(ACCEPTED)
    assert len(of_bare - of_ours) > 10  # checkov did look
