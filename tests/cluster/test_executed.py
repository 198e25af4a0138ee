"""The rendered manifests, executed by a stand-in: trained, killed, evicted, moved, and with a mistake in them."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pods
import pytest
import torch
import yaml
from PIL import Image
from pods import REPOSITORY, Job, JobSet, Network, change_arguments
from running import assert_same_training, files_in, state

from medgen.data import write_datalist
from medgen.networks import StyleGAN2Generator

OVERLAYS = REPOSITORY / "cluster" / "kubernetes" / "overlays"
AUTOENCODER = "cxr_autoencoder_kl/train"  # below the outputs
# the demo, smaller still, with a checkpoint after each step
TINY = {"tracking": None, "perceptual_weights": None, "max_epochs": 12, "val_interval": 3, "checkpoint_interval": 1}
TINY |= {"adversarial_start_epoch": 1, "ema_decay": 0.9, "batch_size": "$medgen.engines.batch_per_process(4)"}

STYLEGAN2 = "stylegan2_anomaly/train"
TINY_STYLEGAN2 = {"tracking": None, "batch_size": "$medgen.engines.batch_per_process(8)", "max_images": 80}
TINY_STYLEGAN2 |= {"tick_images": 16, "val_interval": 1, "val_images": 4, "checkpoint_interval": 1}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders overlays, is not here")


@functools.cache
def render(overlay: str) -> list[dict]:
    rendered = subprocess.run(["kubectl", "kustomize", OVERLAYS / overlay], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(rendered.stdout))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The claim of data: eight images to train with, four to validate."""
    folder = tmp_path_factory.mktemp("claims") / "data"
    for name in ("mimic_cxr", "chestxray14"):
        splits, rng = {}, np.random.default_rng(0)
        for split, count in {"training": 8, "validation": 4, "test": 2}.items():
            splits[split] = [{"image": f"{split}{n}.png", "patient": f"{split}{n}", "label": 0} for n in range(count)]
            for item in splits[split]:
                (folder / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / name / item["image"])
        write_datalist(folder / name / "datalist.json", "noise", "X-ray", splits)
    return folder


def claims(data: Path, outputs: Path) -> dict[str, Path]:
    outputs.mkdir(parents=True, exist_ok=True)
    return {"medgen-data": data, "medgen-outputs": outputs}


def watch(cluster: pods.Cluster, workload: Job | JobSet, outputs: Path, rng: random.Random) -> pods.Pod:
    """Go on until a random moment after the next checkpoint; returns the pod of rank 0, which runs."""
    checkpoint = outputs / "checkpoints" / "last.pt"

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    before = stamp()
    cluster.until(lambda: stamp() != before or workload.finished)
    moment = time.monotonic() + rng.uniform(0, 0.3)
    cluster.until(lambda: time.monotonic() > moment)
    assert not workload.finished, "the training was over before it could be disturbed\n" + cluster.logs()
    return workload.active[0]


def randomness() -> random.Random:
    seed = int(time.time())
    print(f"seed of the moments: {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    """Outputs of the Job of two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pods.cluster(folder / "pods", claims(data, folder / "outputs")) as cluster:
        job = cluster.apply(tiny_autoencoder("cxr_autoencoder_kl.train"))
        assert cluster.finish(job) == "Complete", cluster.logs()
        assert len(job.pods) == 1
    return folder / "outputs" / AUTOENCODER


def tiny_autoencoder(overlay: str, **settings: object) -> list[dict]:
    return change_arguments(render(overlay), "cxr_autoencoder_kl.train.json", "configs/demo.json", **TINY, **settings)


@pytest.mark.slow(reason="starts a training of two processes five times")
def test_job_that_is_killed_evicted_and_moved_ends_with_the_same_weights(data, undisturbed, tmp_path):
    outputs, rng = tmp_path / "outputs" / AUTOENCODER, randomness()
    with pods.cluster(tmp_path / "pods", claims(data, tmp_path / "outputs")) as cluster:
        job = cluster.apply(tiny_autoencoder("cxr_autoencoder_kl.train"))

        pod = watch(cluster, job, outputs, rng)
        pods.kill_tree(rng.choice(pod.workers()))  # one rank: torchrun starts both anew, in the same pod
        watch(cluster, job, outputs, rng)
        assert job.pods == [pod]

        pod.lose()  # the node
        pod = watch(cluster, job, outputs, rng)
        assert len(job.pods) == 2

        pod.evict()
        cluster.until(lambda: pod.finished)
        evicted = state(outputs)["images_seen"]
        assert pod.exit_codes["main"] == 1  # as torchrun makes of any

        pod = watch(cluster, job, outputs, rng)
        assert f"at iteration {evicted // 4}, {evicted} images" in cluster.logs()
        assert job.failures == {}  # disruptions are not the job's fault
        pod.crash()
        assert cluster.finish(job) == "Complete", cluster.logs()
        assert job.failures == {0: 1}
        assert [pod.phase for pod in job.pods] == ["Failed"] * 3 + ["Succeeded"]
    assert_same_training(undisturbed, outputs)


@pytest.mark.slow(reason="starts a training on two nodes four times")
@pytest.mark.parametrize("namespaces", [True, False], ids=["network namespaces", "loopback"])
def test_jobset_of_two_nodes_that_loses_one_ends_with_the_weights_of_a_single_node(
    namespaces, data, undisturbed, tmp_path
):
    if namespaces and not Network.permitted():
        pytest.skip("network namespaces are not permitted here")
    outputs, rng = tmp_path / "outputs" / AUTOENCODER, randomness()
    manifests = tiny_autoencoder("cxr_autoencoder_kl.train.2_nodes")
    with pods.cluster(
        tmp_path / "pods", claims(data, tmp_path / "outputs"), processes=1, namespaces=namespaces
    ) as cluster:
        jobset = cluster.apply(manifests)
        losses = (1, 0) if namespaces else (1,)
        for rank in losses:
            watch(cluster, jobset, outputs, rng)
            jobset.active[rank].lose()
        assert cluster.finish(jobset) == "Complete", cluster.logs()
        assert jobset.restarts == len(losses)
        assert len(jobset.pods) == 2 * (len(losses) + 1)
        if namespaces:
            assert len({pod.node.address for pod in jobset.pods}) == len(jobset.pods)
    assert_same_training(undisturbed, outputs)


@pytest.mark.parametrize("overlay", ["cxr_autoencoder_kl.train", "cxr_autoencoder_kl.train.2_nodes"])
def test_a_mistake_in_the_config_ends_the_workload_at_once(overlay, data, tmp_path):
    manifests = tiny_autoencoder(overlay, datalist="$medgen.settings.environment('DATA_DIR') + '/absent.json'")
    with pods.cluster(tmp_path / "pods", claims(data, tmp_path / "outputs"), processes=1) as cluster:
        workload = cluster.apply(manifests)
        assert cluster.finish(workload) == "Failed"
        assert workload.reason == "PodFailurePolicy"
        assert len(workload.pods) <= 2
        assert {"check": 78} in [pod.exit_codes for pod in workload.pods]
        assert "absent.json" in cluster.logs().split("error: ")[1].splitlines()[0]
        assert not any("main" in pod.exit_codes for pod in workload.pods)


def test_a_restart_with_another_number_of_processes_goes_on(data, undisturbed, tmp_path):
    outputs = tmp_path / "outputs" / AUTOENCODER
    shutil.copytree(undisturbed, outputs)
    manifests = tiny_autoencoder("cxr_autoencoder_kl.train")
    longer = {**TINY, "max_epochs": TINY["max_epochs"] + 1}
    manifests = change_arguments(manifests, "cxr_autoencoder_kl.train.json", "configs/demo.json", **longer)
    with pods.cluster(tmp_path / "pods", claims(data, tmp_path / "outputs"), processes=1) as cluster:
        assert cluster.finish(cluster.apply(manifests)) == "Complete", cluster.logs()
        assert "of 4 images on cpu in float32, 1 process(es)" in cluster.logs()
    before, after = state(undisturbed), state(outputs)
    assert (before["images_seen"], after["images_seen"]) == (96, 104)


@pytest.mark.slow(reason="starts a training of two processes four times")
def test_another_bundle_that_loses_a_node_and_is_evicted_ends_with_the_same_weights(data, tmp_path):
    manifests = change_arguments(
        render("stylegan2_anomaly.train"), "stylegan2_anomaly.train.json", "configs/demo.json", **TINY_STYLEGAN2
    )
    rng, ends = randomness(), {"undisturbed": 1, "killed": 3}
    for name, attempts in ends.items():
        with pods.cluster(tmp_path / name / "pods", claims(data, tmp_path / name / "outputs")) as cluster:
            job = cluster.apply(manifests)
            for blow in (pods.Pod.lose, pods.Pod.evict)[: attempts - 1]:
                blow(watch(cluster, job, tmp_path / name / "outputs" / STYLEGAN2, rng))
            assert cluster.finish(job) == "Complete", cluster.logs()
            assert len(job.pods) == attempts
    assert_same_training(*(tmp_path / name / "outputs" / STYLEGAN2 for name in ends))


@pytest.mark.slow(reason="starts ten programs")
def test_array_that_loses_a_pod_and_is_merged_has_the_files_of_one_process(data, tmp_path):
    torch.manual_seed(0)
    weights = StyleGAN2Generator.from_preset("demo_64", out_channels=1).state_dict()
    files, key = {}, "stylegan2_anomaly.generate.json"
    tiny = {"seeds": "0-9", "batch_size": 2}
    array = change_arguments(render("stylegan2_anomaly.generate"), key, "configs/demo.json", **tiny)
    merge = change_arguments(render("stylegan2_anomaly.generate.merge"), key, "configs/demo.json", **tiny)
    shrink(array, 3)
    for name in ("whole", "sharded"):
        outputs = tmp_path / name / "outputs"
        (outputs / STYLEGAN2).mkdir(parents=True)
        torch.save(weights, outputs / STYLEGAN2 / "model.pt")
        with pods.cluster(tmp_path / name / "pods", claims(data, outputs)) as cluster:
            if name == "sharded":
                job = cluster.apply(array)
                cluster.until(lambda job=job: any("main" in pod.running for pod in job.active))
                lost = next(pod for pod in job.active if "main" in pod.running)
                lost.lose()
                assert cluster.finish(job) == "Complete", cluster.logs()
                indexes = sorted(pod.annotations[pods.INDEX] for pod in job.pods)
                assert indexes == sorted(["0", "1", "2", lost.annotations[pods.INDEX]])
                assert not (outputs / "stylegan2_anomaly" / "generate" / "datalist.json").exists()
            assert cluster.finish(cluster.apply(merge)) == "Complete", cluster.logs()
        files[name] = files_in(outputs / "stylegan2_anomaly" / "generate")
    assert len([name for name in files["whole"] if name.startswith("samples/")]) == 10
    assert files["sharded"] == files["whole"]


def shrink(manifests: list[dict], shards: int) -> None:
    """Fewer shards, where the overlay says their number."""
    (job,) = (manifest for manifest in manifests if manifest["kind"] == "Job")
    before = job["spec"]["completions"]
    job["spec"]["completions"] = shards
    pod = job["spec"]["template"]["spec"]
    for container in [*pod["initContainers"], *pod["containers"]]:
        container["args"] = [
            word.replace(f"$(JOB_COMPLETION_INDEX)/{before}", f"$(JOB_COMPLETION_INDEX)/{shards}")
            for word in container["args"]
        ]
