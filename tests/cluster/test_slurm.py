"""The batch scripts on a real SLURM cluster of two nodes: requeued, told to stop, killed, failing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slurm_cluster import missing, slurm_cluster

from medgen.data import write_datalist
from medgen.networks import StyleGAN2Generator

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "bundles"))

from running import assert_same_files, assert_same_training, finish, start  # noqa: E402

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "a cluster can be started")

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TINY = {"image_size": 16, "channel_base": 128, "channel_max": 8, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster(kill_wait=5) as running:
        yield running


class Site:
    """A checkout with stages of its own, the settings of its user, and an environment with programs."""

    def __init__(self, folder, cluster):
        self.folder, self.cluster = folder, cluster
        for name in ("bundles", "cluster/settings.sh", "cluster/accept_rejected.sh", "cluster/slurm"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(ROOT / name)
        for name in ("cluster/args", "venv/bin", "data", "outputs"):
            (folder / name).mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = {"DATA_DIR": folder / "data", "OUTPUT_DIR": folder / "outputs", "VENV": folder / "venv"}
        settings |= {"NPROC_PER_NODE": 1, "RENDEZVOUS_ADDRESS": "127.0.0.1", "RENDEZVOUS_PORT": port}
        settings |= {"MAX_FAILURE_REQUEUES": 1}
        (folder / "settings.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def program(self, name, text=None):
        """A program of the environment: a script of the shell, or the real one."""
        path = self.folder / "venv" / "bin" / name
        path.write_text("#!/bin/bash\n" + (text or f'exec {Path(sys.executable).with_name(name)} "$@"\n'))
        path.chmod(0o755)

    def stage(self, name, **content):
        path = self.folder / "cluster" / "args" / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    def submit(self, script, *arguments, options=(), **environment):
        own = {"SETTINGS": str(self.folder / "settings.env"), **environment}
        path = self.folder / "cluster" / "slurm" / script
        return self.cluster.submit("--output=%x.log", *options, str(path), *arguments, cwd=self.folder, **own)

    def log(self):
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 400
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.log()}"
            self.cluster.hurry()


@pytest.fixture
def site(tmp_path, cluster):
    return Site(tmp_path, cluster)


@pytest.fixture
def stub(site):
    """A training that goes on where its checkpoint was, and writes one when it is told to end."""
    site.stage("cxr_pggan.train")
    site.program("medgen", "exit ${CHECK:-0}\n")
    site.program(
        "torchrun",
        'echo "rank $PET_NODE_RANK of $PET_NNODES at $PET_MASTER_ADDR in ${PWD##*/}: $*"\n'
        "[[ -z ${FAIL:-} ]] || exit 3\n"
        "file=$OUTPUT_DIR/checkpoint$PET_NODE_RANK\n"
        'if [[ -e $file ]]; then echo "rank $PET_NODE_RANK goes on"; exit 0; fi\n'
        "trap 'echo rank $PET_NODE_RANK writes; sleep 1; touch $file; exit 1' TERM\n"
        "for ((i = 0; i < 600; i++)); do sleep 0.1; done\n",
    )
    return site


def both_run(site):
    site.wait_for(lambda: "rank 0 of 2" in site.log() and "rank 1 of 2" in site.log(), "a start on both nodes")


def test_a_job_that_is_told_to_stop_writes_its_checkpoints_and_goes_back_into_the_queue(stub, cluster):
    # what the profile of a login node may say is no business of this job
    job = stub.submit("train.sbatch", "cxr_pggan.train", options=["--nodes=2"], MASTER_ADDR="localhost")
    both_run(stub)
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # what --signal=B:TERM@120 does before the time is over
    ended = cluster.wait(job, ENDED)
    log = stub.log()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    for rank in (0, 1):
        args = stub.folder / "cluster" / "args" / "cxr_pggan.train.json"
        start_line = f"rank {rank} of 2 at 127.0.0.1 in cxr_pggan: -m monai.bundle run --args_file {args}"
        assert log.count(start_line) == 2
        assert (log.count(f"rank {rank} writes"), log.count(f"rank {rank} goes on")) == (1, 1)


@pytest.mark.slow(reason="the shortest time limit of Slurm is a minute")
def test_the_time_limit_is_such_a_moment(stub, cluster):
    job = stub.submit("train.sbatch", "cxr_pggan.train", options=["--nodes=2", "--time=1"])
    both_run(stub)
    ended = cluster.wait(job, ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), stub.log()
    assert "after it was told to stop; requeue 1 of at most 100" in stub.log()


def test_a_failure_is_not_requeued_for_ever_and_a_mistake_not_at_all(stub, cluster):
    job = stub.submit("train.sbatch", "cxr_pggan.train", options=["--nodes=2"], FAIL="1")
    ended = cluster.wait(job, ENDED)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "1")
    assert "ended with code 3 after 1 requeues; it stays ended" in stub.log()

    for check, code, restarts in (("78", "78:0", "0"), ("75", "75:0", "1")):
        job = stub.submit("train.sbatch", "cxr_pggan.train", CHECK=check)
        ended = cluster.wait(job, ENDED)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", code, restarts)
    job = stub.submit("train.sbatch", "cxr_pggan.trian")
    assert cluster.wait(job, ENDED)["ExitCode"] == "78:0"
    assert "no stage cxr_pggan.trian" in stub.log()


def test_the_end_of_its_time_leaves_a_job_its_attempts(stub, cluster):
    stub.program(
        "torchrun",
        "attempt=${SLURM_RESTART_COUNT:-0}\n"
        'echo "attempt $attempt"\n'
        "((attempt < 3)) || exit 0\n"
        "((attempt == 1)) || exit 1\n"
        "trap 'exit 1' TERM\n"
        "for ((i = 0; i < 600; i++)); do sleep 0.1; done\n",
    )
    job = stub.submit("train.sbatch", "cxr_pggan.train")
    stub.wait_for(lambda: "attempt 1" in stub.log(), "the second attempt")
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    ended = cluster.wait(job, ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "3"), stub.log()
    assert not list((stub.folder / "outputs").glob(".failures-*"))


def test_a_cancelled_job_stays_cancelled(stub, cluster):
    job = stub.submit("train.sbatch", "cxr_pggan.train", options=["--nodes=2"])
    both_run(stub)
    cluster.run("scancel", job)
    ended = cluster.wait(job, ENDED)
    stub.wait_for(lambda: f"job {job} was ended from outside" in stub.log(), "the end of the script")
    assert (ended["JobState"], cluster.job(job)["JobState"], ended["Restarts"]) == ("CANCELLED", "CANCELLED", "0")
    assert all((stub.folder / "outputs" / f"checkpoint{rank}").exists() for rank in (0, 1))


def test_shards_are_numbered_and_the_merge_waits_for_all(site, cluster):
    site.program(
        "python",
        'echo "$*" >>$OUTPUT_DIR/calls\n'
        "lost=$OUTPUT_DIR/lost$SLURM_ARRAY_TASK_ID\n"
        "[[ $* != *[12]/3 || -e $lost ]] || { touch $lost; kill -9 $$; }\n",
    )
    own = {"MEDGEN_ROOT": str(site.folder), "SETTINGS": str(site.folder / "settings.env"), "SBATCH_OUTPUT": "%x.log"}
    script = f"cd {site.folder} && cluster/slurm/submit_shards.sh"
    merge = cluster.run("bash", "-c", f"{script} 3 -- python -m preprocessing.images", **own).strip()
    after = cluster.run("bash", "-c", f"{script} 1 -- python -m preprocessing.later", AFTER=merge, **own).strip()
    assert cluster.job(merge)["TresPerNode"] == "gres:gpu:0"  # it has no use for one
    ended = cluster.wait(after, ENDED)
    calls = (site.folder / "outputs" / "calls").read_text().splitlines()
    expected = [f"-m preprocessing.images --shard {i}/3" for i in (0, 1, 1, 2, 2)]
    assert ended["JobState"] == "COMPLETED"
    assert sorted(calls[:5]) == expected
    later = ["-m preprocessing.later --shard 0/1", "-m preprocessing.later"]
    assert calls[5:] == ["-m preprocessing.images", *later]


def test_with_an_image_check_and_stage_run_in_it(site, cluster):
    site.stage("cxr_pggan.generate")
    site.program("apptainer", 'echo "$*" >>$OUTPUT_DIR/calls\n')
    command = ["--", "python", "-m", "preprocessing.images"]
    for options, arguments in ((["--array=2"], ["cxr_pggan.generate"]), ([], command)):
        job = site.submit("array.sbatch", *arguments, options=options, IMAGE="medgen.sif", SHARDS="4")
        assert cluster.wait(job, ENDED)["JobState"] == "COMPLETED", site.log()
    folder, args = site.folder, site.folder / "cluster" / "args" / "cxr_pggan.generate.json"
    bound = f"--bind {folder}:{folder}:ro --bind {folder}/data:{folder}/data:"
    outputs = f"--bind {folder}/outputs:{folder}/outputs medgen.sif"
    in_bundle = f"exec --nv --pwd /opt/medgen/bundles/cxr_pggan {bound}ro {outputs}"
    assert (folder / "outputs" / "calls").read_text().splitlines() == [
        f"{in_bundle} medgen check {args} --shard 2/4",
        f"{in_bundle} python -m monai.bundle run --args_file {args} --shard 2/4",
        f"exec --nv --pwd /opt/medgen {bound}rw {outputs} bash /opt/medgen/cluster/accept_rejected.sh "
        "python -m preprocessing.images",
    ]


@pytest.mark.slow(reason="three trainings of two processes; those of Slurm import MONAI by themselves")
def test_a_training_that_is_requeued_ends_with_the_weights_of_an_undisturbed_one(site, cluster, monkeypatch):
    random = np.random.default_rng(0)
    splits = {name: [] for name in ("training", "validation", "test")}
    for n in range(8):
        Image.fromarray(random.integers(0, 255, (64, 64), dtype=np.uint8)).save(site.folder / f"data/{n}.png")
        splits[["training", "training", "validation", "test"][n % 4]].append({"image": f"{n}.png", "patient": f"p{n}"})
    write_datalist(site.folder / "data/datalist.json", "noise", "X-ray", splits)
    arguments = site.stage(
        "cxr_autoencoder_kl.train",
        config_file=["configs/train.json", "configs/demo.json", "configs/multi_gpu_train.json"],
        datalist="$medgen.settings.environment('DATA_DIR') + '/datalist.json'",
        output_dir="$medgen.settings.environment('OUTPUT_DIR')",
        model_path="$@output_dir + '/model.pt'",
        resume=True,
        batch_size="$medgen.engines.batch_per_process(2)",
        max_epochs=20,
        val_interval=10,
        checkpoint_interval=1,
        adversarial_start_epoch=2,
    )
    site.program("torchrun")
    site.program("medgen", "exit 0\n")  # its check takes as long as a start of the training, and has tests of its own
    job = site.submit("train.sbatch", "cxr_autoencoder_kl.train", options=["--nodes=2"])
    undisturbed, requeued = site.folder / "undisturbed", site.folder / "outputs"
    monkeypatch.setenv("DATA_DIR", str(site.folder / "data"))
    monkeypatch.setenv("OUTPUT_DIR", str(undisturbed))
    run = ["-m", "monai.bundle", "run", "--args_file", str(arguments)]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    finish(start(ROOT / "bundles" / "cxr_autoencoder_kl", run, *torchrun))

    checkpoint = requeued / "checkpoints" / "last.pt"
    site.wait_for(checkpoint.exists, "a checkpoint")
    cluster.run("scontrol", "requeue", job)  # as a preemption does: SIGTERM, and KillWait later SIGKILL
    ended = cluster.wait(job, ENDED)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.log()
    assert "resumed from" in site.log()
    assert_same_training(undisturbed, requeued)


@pytest.mark.slow(reason="five projections as processes that import MONAI by themselves")
def test_a_projection_in_shards_with_a_killed_task_ends_with_the_files_of_a_single_process(site, cluster, monkeypatch):
    random = np.random.default_rng(0)
    items = [{"image": f"{n}.png", "patient": f"p{n}"} for n in range(200)]
    for item in items:
        Image.fromarray(random.integers(0, 255, (16, 16), dtype=np.uint8)).save(site.folder / "data" / item["image"])
    write_datalist(
        site.folder / "data/datalist.json", "noise", "X-ray", {"training": [], "validation": [], "test": items}
    )
    torch.manual_seed(0)
    torch.save(StyleGAN2Generator(**TINY).state_dict(), site.folder / "model.pt")
    tiny = {"network_def": {"_target_": "medgen.networks.StyleGAN2Generator", **TINY}}
    (site.folder / "tiny.json").write_text(json.dumps(tiny))
    arguments = site.stage(
        "stylegan2_anomaly.project",
        config_file=["configs/project.json", str(site.folder / "tiny.json")],
        datalist="$medgen.settings.environment('DATA_DIR') + '/datalist.json'",
        output_dir="$medgen.settings.environment('OUTPUT_DIR')",
        model_path=str(site.folder / "model.pt"),
        resume=True,
        steps=4,
        batch_size=4,
        num_workers=0,
    )
    site.program("python")
    site.program("medgen", "exit 0\n")
    job = site.submit("array.sbatch", "stylegan2_anomaly.project", options=["--array=0-1"])
    merge = site.submit(
        "array.sbatch",
        "stylegan2_anomaly.project",
        options=[f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"],
    )
    outputs, single = site.folder / "outputs", site.folder / "single"

    def done_by_shard_1():
        return [n for n in range(200) if n // 4 % 2 == 1 and (outputs / "projections" / f"{n}.npz").exists()]

    site.wait_for(done_by_shard_1, "a result of shard 1")
    kill_processes("--shard 1/2", arguments)
    assert len(done_by_shard_1()) < 100
    monkeypatch.setenv("DATA_DIR", str(site.folder / "data"))
    monkeypatch.setenv("OUTPUT_DIR", str(single))
    run = ["-m", "monai.bundle", "run", "--args_file", str(arguments)]
    finish(start(ROOT / "bundles" / "stylegan2_anomaly", run))
    ended = cluster.wait(merge, ENDED)
    assert ended["JobState"] == "COMPLETED", site.log()
    assert cluster.job(f"{job}_1")["Restarts"] == "1"
    assert len(list((outputs / "projections").glob("*.npz"))) == 200
    assert_same_files(outputs, single)


def kill_processes(option: str, arguments: Path) -> None:
    """SIGKILL to the programs that have this option and this args file on their command lines."""
    killed = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if option in words and str(arguments) in words and "srun" not in words.split()[0]:
            os.kill(int(folder.name), signal.SIGKILL)
            killed += 1
    assert killed
