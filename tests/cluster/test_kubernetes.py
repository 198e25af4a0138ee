"""Every overlay renders, is what Kubernetes, JobSet and the training operator accept, and keeps our rules."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import rules
import yaml
from rendering import (
    CORE_VERSION,
    KUBERNETES,
    OVERLAYS,
    REPOSITORY,
    jobset_schema,
    render,
    unknown_of_pytorchjob,
    workload,
)

ARGS = REPOSITORY / "cluster" / "args"
SHARDED = {
    "cxr_latent_diffusion.encode",
    "cxr_latent_diffusion.sample",
    "stylegan2_anomaly.generate",
    "stylegan2_anomaly.project",
    "stylegan2_anomaly.score",
    "cxr_pggan.generate",
    "lung_segmentation.predict",
    "cxr_inversion_encoder.optimise",
    "skin_sngan.generate",
    "skin_sngan.study",
    "augmentation_classifier.predict",
    "augmentation_classifier.study",
}
PREPROCESSING = {"mimic_cxr.images", "chestxray14.images", "rsna.images", "rsna.crop", "isic.images"}  # in shards


def as_job(pods: rules.Pods) -> dict:
    """The pods of a JobSet or PyTorchJob as a Job, whose schema says everything of a pod."""
    spec = {**(pods.job or {}), "template": copy.deepcopy(pods.template)}
    spec["template"]["spec"].setdefault("restartPolicy", "Never")
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pods"}, "spec": spec}


def claims_of(pods: rules.Pods) -> dict[str, str]:
    """Volume -> claim that it is."""
    volumes = [volume for volume in pods.spec["volumes"] if "persistentVolumeClaim" in volume]
    return {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in volumes}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_accepted_by_the_schemas_of_its_kinds(overlay):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    pytest.importorskip("kubeflow_trainer_api")
    pytest.importorskip("kubeflow.training")
    documents = render(overlay)
    of_core = [document for document in documents if document["kind"] in ("Job", "ConfigMap")]
    for document in of_core + [as_job(pods) for pods in rules.pods_of(documents)]:
        kubernetes_validate.validate(document, CORE_VERSION, strict=True)
    for document in documents:
        if document["kind"] == "JobSet":
            jsonschema.Draft202012Validator(jobset_schema()).validate(document)
        elif document["kind"] == "PyTorchJob":
            assert unknown_of_pytorchjob(document) == []
        else:
            assert document in of_core, f"nothing here knows a {document['kind']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_keeps_the_rules(overlay):
    documents = render(overlay)
    assert [finding for rule in rules.RULES for finding in rule(documents)] == []


def test_example_of_claims_is_what_the_overlays_mount():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    claims = list(yaml.safe_load_all((KUBERNETES / "examples" / "claims.yaml").read_text()))
    for claim in claims:
        kubernetes_validate.validate(claim, CORE_VERSION, strict=True)
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        rules.amount(claim["spec"]["resources"]["requests"]["storage"])
    there = {claim["metadata"]["name"] for claim in claims}
    for overlay in OVERLAYS:
        for pods in rules.pods_of(render(overlay)):
            named = {
                v["persistentVolumeClaim"]["claimName"] for v in pods.spec["volumes"] if "persistentVolumeClaim" in v
            }
            assert named <= there


# the schemas: a deep typo and a wrong type in each kind are found
def test_schemas_find_what_is_misspelt_deep_inside():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    pytest.importorskip("kubeflow_trainer_api")
    pytest.importorskip("kubeflow.training")
    job = workload(render("cxr_pggan.train"))
    job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["mountpath"] = "/x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, CORE_VERSION, strict=True)
    for path, value in ((["network", "enableDnsHostnames"], True), (["failurePolicy", "maxRestarts"], "10")):
        jobset = workload(render("cxr_latent_diffusion.train.2_nodes"))
        jobset["spec"][path[0]][path[1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(jobset_schema()).validate(jobset)
    jobset = workload(render("cxr_latent_diffusion.train.2_nodes"))
    of_pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    of_pod["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(jsonschema.ValidationError, match="readOnlyRootFileSystem"):
        jsonschema.Draft202012Validator(jobset_schema()).validate(jobset)
    pytorchjob = workload(render("cxr_latent_diffusion.train.runai"))
    pytorchjob["spec"]["pytorchReplicaSpecs"]["Worker"]["replica"] = 1
    pytorchjob["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["tty"] = "yes"
    assert unknown_of_pytorchjob(pytorchjob) == [
        "PyTorchJob/spec/pytorchReplicaSpecs/Master/template/spec/containers/0/tty: expected bool, got 'yes'",
        "PyTorchJob/spec/pytorchReplicaSpecs/Worker: KubeflowOrgV1ReplicaSpec has no replica",
    ]


# what belongs together
def test_every_stage_has_an_overlay_and_every_sharded_one_a_merge():
    stages = {path.stem for path in ARGS.glob("*.json")}
    assert stages <= set(OVERLAYS)
    assert {name for name in OVERLAYS if workload(render(name))["spec"].get("completionMode") == "Indexed"} == (
        SHARDED | PREPROCESSING | {"stylegan2_anomaly.project.runai"}
    )
    assert {f"{name}.merge" for name in SHARDED | PREPROCESSING} <= set(OVERLAYS)
    listed = yaml.safe_load((ARGS / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert sorted(listed) == sorted(f"{stage}.json" for stage in stages)


@pytest.mark.parametrize("step", sorted(PREPROCESSING - {"mimic_cxr.images"}))
def test_merge_of_preprocessing_is_the_command_of_the_shards_without_shard(step):
    words = rules.argv(workload(render(step))["spec"]["template"]["spec"]["containers"][0])
    assert rules.argv(workload(render(f"{step}.merge"))["spec"]["template"]["spec"]["containers"][0]) == words[:-2]
    assert words[-2] == "--shard"


@pytest.mark.parametrize(
    "overlay", sorted(PREPROCESSING | {f"{step}.merge" for step in PREPROCESSING} | {"lungs", "anomaly_study"})
)
def test_preprocessing_takes_the_options_that_it_is_given(overlay, tmp_path):
    import typer

    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s ' \"$@\"; echo\n")  # says how it was called
    (tmp_path / "python").chmod(0o755)
    words = rules.argv(workload(render(overlay))["spec"]["template"]["spec"]["containers"][0])
    words = [w.replace(rules.SOURCE, str(REPOSITORY)).replace("$(JOB_COMPLETION_INDEX)", "0") for w in words]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(words, env={"PATH": path}, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout
    for line in done.stdout.splitlines():
        flag, module, *options = line.split()
        assert flag == "-m"
        command = typer.main.get_command(importlib.import_module(module).app)
        if options[0][0] != "-":  # a step
            command = command.commands[options.pop(0).replace("_", "-")]
        known = {name: param for param in command.params for name in param.opts}
        given = {option for option in options if option.startswith("--")}
        assert given <= set(known), line
        assert {param.name for param in command.params if param.required} <= {known[name].name for name in given}, line


def test_each_data_set_that_is_read_is_written_by_an_overlay():
    """Everything of /data that is neither raw nor somebody's weights."""
    scripts = {}
    for name in OVERLAYS:
        for pods in rules.pods_of(render(name)):
            scripts[name] = " ".join(word for container in pods.containers for word in rules.argv(container))
    written = {path for script in scripts.values() for path in re.findall(r"--target (/data/\S+)", script)}
    read = {path for script in scripts.values() for path in re.findall(r"/data/(?!raw/)\S+", script)}
    for path in ARGS.glob("*.json"):
        read |= {f"/data{name}" for name in re.findall(r"'DATA_DIR'\) \+ '(/(?!weights/)[^']+)'", path.read_text())}
    assert len(read) >= 8
    assert {"/".join(path.split("/")[:3]) for path in read} == written
    # boxes, masks and whatever else preprocessing takes from a bundle
    stages = {f"/outputs/{path.stem.replace('.', '/')}" for path in ARGS.glob("*.json")}
    for script in scripts.values():
        for path in re.findall(r"/outputs/\S+", script):
            assert "/".join(path.split("/")[:4]) in stages


@pytest.mark.parametrize("stage", sorted(SHARDED))
def test_merge_is_the_command_of_the_shards_without_shard(stage):
    of_shards = workload(render(stage))["spec"]["template"]["spec"]
    of_merge = workload(render(f"{stage}.merge"))["spec"]["template"]["spec"]
    words = rules.argv(of_shards["containers"][0])
    assert rules.argv(of_merge["containers"][0]) == words[: words.index("--shard")]
    for container in (of_shards["containers"][0], of_merge["containers"][0]):
        del container["args"]
    del of_shards["initContainers"][0]["args"], of_merge["initContainers"][0]["args"]
    names = [volume for spec in (of_shards, of_merge) for volume in spec["volumes"] if "configMap" in volume]
    for volume in names:
        del volume["configMap"]
    assert of_shards == of_merge


def test_several_nodes_run_the_pod_of_one_node():
    """All that differs is how torchrun finds the others."""
    one = workload(render("cxr_latent_diffusion.train"))["spec"]["template"]
    jobset = workload(render("cxr_latent_diffusion.train.2_nodes"))
    (several,) = [pods.template for pods in rules.pods_of([jobset])]
    standalone = {"PET_STANDALONE": "1", "PET_MAX_RESTARTS": "3"}
    joined = {"PET_NNODES", "PET_NODE_RANK", "JOBSET_NAME", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    first, second = (rules.variables(template["spec"]["containers"][0]) for template in (one, several))
    assert second["PET_MAX_RESTARTS"] == "0"  # JobSet starts the processes of all nodes together
    assert {**second, **standalone} == {**first, **{name: second[name] for name in joined}}
    for template in (one, several):
        for container in template["spec"]["containers"] + template["spec"]["initContainers"]:
            del container["env"]
        for volume in template["spec"]["volumes"]:
            volume.pop("configMap", None)
    assert one == several


def with_components(overlay: Path, resource: str, *components: str) -> list[dict]:
    """An overlay as a user may write it, rendered."""
    overlay.mkdir()
    relative = Path("../" * len(overlay.parts[1:])) / KUBERNETES.relative_to("/")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(relative / "overlays" / resource)],
        "components": [str(relative / "components" / name) for name in components],
    }
    (overlay / "kustomization.yaml").write_text(json.dumps(kustomization))
    return render(overlay)


def test_components_before_jobset_reach_every_pod_of_it(tmp_path):
    documents = with_components(tmp_path / "overlay", "stylegan2_anomaly.train", "kueue", "runai", "spot", "jobset")
    jobset = workload(documents)
    (pods,) = rules.pods_of(documents)
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert pods.template["metadata"]["labels"]["kai.scheduler/preemptibility"] == "preemptible"
    assert pods.spec["schedulerName"] == "runai-scheduler"
    terms = pods.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 4  # alternatives: a node of one cloud has the label of that cloud only
    assert pods.spec["terminationGracePeriodSeconds"] <= 30  # the notice that most clouds give
    assert [finding for rule in rules.RULES for finding in rule(documents)] == []


@pytest.mark.parametrize("stage", ["stylegan2_anomaly.score", "cxr_pggan.generate", "lung_segmentation.train"])
def test_components_may_be_put_together(stage, tmp_path):
    documents = with_components(tmp_path / "overlay", stage, "spot", "runai", "kueue")
    assert [finding for rule in rules.RULES for finding in rule(documents)] == []
    spec = workload(documents)["spec"]["template"]["spec"]
    assert spec["schedulerName"] == rules.RUNAI
    assert {toleration["key"] for toleration in spec["tolerations"]} >= {"cloud.google.com/gke-spot"}


def test_local_cache_is_filled_from_the_datalist_and_trained_from():
    import typer

    from medgen.data.stage import app

    (pods,) = rules.pods_of(render("stylegan2_anomaly.train.spot"))
    check, stage, main = pods.containers
    assert (check["name"], stage["name"]) == ("check", "stage")  # nothing is copied for a training that cannot begin
    given = typer.main.get_command(app).make_context("stage", list(stage["args"])).params
    assert str(given["datalist"]).startswith("/data/")
    words = rules.argv(main)
    assert words[words.index("--datalist") + 1] == f"{given['target']}/datalist.json"
    mounts = [
        {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]} for container in (stage, main)
    ]
    assert [of[str(given["target"])] for of in mounts] == [False, True]
    (cache,) = [volume for volume in pods.spec["volumes"] if volume["name"] == "cache"]
    limits = main["resources"]["limits"]["ephemeral-storage"]
    assert rules.amount(cache["emptyDir"]["sizeLimit"]) < rules.amount(limits)


def test_a_site_is_set_up_in_one_file(tmp_path):
    for name in ("args", "kubernetes"):
        shutil.copytree(REPOSITORY / "cluster" / name, tmp_path / name)
    site = tmp_path / "kubernetes" / "site" / "kustomization.yaml"
    text = site.read_text()
    volumes = {"medgen-data": "scans", "medgen-outputs": "work"}
    image = {"registry.example.org": "images.hospital.example", "0" * 64: "a" * 64}
    for before, after in {**volumes, **image, "10001": "20002"}.items():
        assert before in text
        text = text.replace(before, after)
    site.write_text(text)
    for overlay in ("stylegan2_anomaly.train.spot", SHARDS, JOBSET, PYTORCHJOB, "mimic_cxr.images"):
        for pods in rules.pods_of(render(tmp_path / "kubernetes" / "overlays" / overlay)):
            images = {container["image"] for container in pods.containers}
            assert images == {f"images.hospital.example/medgen@sha256:{'a' * 64}"}
            user = pods.spec["securityContext"]
            assert (user["runAsUser"], user["runAsGroup"]) == (20002, 20002)
            claims = claims_of(pods)
            assert claims["data"] == "scans"
            assert claims.get("outputs", "work") == "work"


def test_no_overlay_suspends_itself():
    """Kueue's webhook does that; a manifest that does would wait for ever on a cluster without Kueue."""
    assert not [name for name in OVERLAYS if "suspend" in workload(render(name))["spec"]]


# each rule finds what it is there for, in an overlay that was good
def pod_spec(document):
    return next(rules.pods_of([document])).spec


def main(document):
    return pod_spec(document)["containers"][0]


def with_one_limit(spec):
    return {**{name: value for name, value in spec.items() if name != "backoffLimitPerIndex"}, "backoffLimit": 6}


def entry(document, name):
    return next(e for e in main(document)["env"] if e["name"] == name)


JOB, JOBSET, PYTORCHJOB = "cxr_pggan.train", "cxr_latent_diffusion.train.2_nodes", "cxr_latent_diffusion.train.runai"
SHARDS = "stylegan2_anomaly.project"
BROKEN = [
    (rules.quantities_are_read, JOB, lambda d: main(d)["resources"]["limits"].update(memory="256GiB"), "256GiB"),
    (rules.names_are_taken, JOB, lambda d: d["metadata"].update(name="cxr_pggan"), "cxr_pggan: not a DNS label"),
    (rules.names_are_taken, JOBSET, lambda d: d["metadata"].update(name="m" * 48), "at most 47"),
    (rules.gpu_request_is_limit, JOB, lambda d: main(d)["resources"]["requests"].update({rules.GPU: "2"}), "2 GPUs"),
    (rules.gpu_request_is_limit, JOB, lambda d: main(d)["resources"]["requests"].update(memory="1Gi"), "1Gi"),
    (rules.gpu_request_is_limit, JOB, lambda d: main(d)["resources"]["requests"].pop("cpu"), "CPUs"),
    (rules.processes_fit_gpus, JOB, lambda d: entry(d, "PET_NPROC_PER_NODE").update(value="4"), "4 processes for 1"),
    (rules.processes_fit_gpus, JOB, lambda d: main(d)["resources"]["limits"].update({rules.GPU: "8"}), "checks 1"),
    (rules.mounts_are_declared, JOB, lambda d: pod_spec(d)["volumes"].pop(), "no volume of the pod"),
    (rules.mounts_are_declared, JOB, lambda d: pod_spec(d)["volumes"].append({"name": "x"}), "nothing mounts"),
    (rules.mounts_are_declared, JOB, lambda d: main(d)["volumeMounts"][0].update(mountPath="/data"), "two mounts"),
    (
        rules.references_are_there,
        JOB,
        lambda d: next(v for v in pod_spec(d)["volumes"] if "configMap" in v)["configMap"].update(name="args"),
        "no ConfigMap args",
    ),
    (rules.references_are_there, JOBSET, lambda d: main(d)["args"].__setitem__(1, "/args/x.json"), "no x.json in"),
    (
        rules.shm_is_below_memory,
        JOB,
        lambda d: next(v for v in pod_spec(d)["volumes"] if v["name"] == "shm")["emptyDir"].update(sizeLimit="48Gi"),
        "48Gi is not below",
    ),
    (rules.shm_is_below_memory, JOB, lambda d: main(d)["volumeMounts"].pop(0), "64 MB"),
    (rules.image_is_pinned, JOBSET, lambda d: main(d).update(image="registry.example.org/medgen:latest"), "no digest"),
    (rules.policies_fit, JOB, lambda d: pod_spec(d).update(restartPolicy="OnFailure"), "needs Never"),
    (rules.policies_fit, JOB, lambda d: pod_spec(d)["initContainers"][0].update(name="checks"), "which is not there"),
    (
        rules.policies_fit,
        JOB,
        lambda d: d["spec"]["podFailurePolicy"]["rules"][1]["onPodConditions"][0].pop("status"),
        "no status",
    ),
    (rules.policies_fit, JOB, lambda d: d["spec"].pop("podFailurePolicy"), "no podFailurePolicy"),
    (rules.policies_fit, SHARDS, lambda d: d["spec"].pop("completionMode"), "needs completionMode Indexed"),
    (rules.policies_fit, JOBSET, lambda d: d["spec"]["failurePolicy"].update(maxRestarts=10), "gives up after 10"),
    (rules.policies_fit, PYTORCHJOB, lambda d: d["spec"]["runPolicy"].update(backoffLimit=10), "gives up after 10"),
    (rules.policies_fit, SHARDS, lambda d: d["spec"].pop("backoffLimitPerIndex"), "one bad shard"),
    (rules.policies_fit, SHARDS, lambda d: d.update(spec=with_one_limit(d["spec"])), "one bad shard"),
    (rules.policies_fit, JOB, lambda d: d["spec"].pop("podReplacementPolicy"), "two pods write"),
    (
        rules.policies_fit,
        JOBSET,
        lambda d: d["spec"]["replicatedJobs"][0]["template"]["spec"].update(completionMode="NonIndexed"),
        "pods have no rank",
    ),
    (
        rules.policies_fit,
        JOBSET,
        lambda d: d["spec"]["replicatedJobs"][0]["template"]["spec"].update(backoffLimit=6),
        "start again alone",
    ),
    (rules.a_wrong_setting_is_final, JOB, lambda d: d["spec"]["podFailurePolicy"]["rules"].pop(0), "does not fail"),
    (rules.a_wrong_setting_is_final, JOB, lambda d: d["spec"]["podFailurePolicy"]["rules"].pop(1), "Disruption"),
    (rules.a_wrong_setting_is_final, JOBSET, lambda d: d["spec"]["failurePolicy"].pop("rules"), "does not fail it"),
    (rules.a_wrong_setting_is_final, JOB, lambda d: pod_spec(d).pop("initContainers"), "without `medgen check`"),
    (
        rules.grace_covers_the_checkpoint,
        SHARDS,
        lambda d: pod_spec(d).update(terminationGracePeriodSeconds=120),
        "keeps its node for 120 s",
    ),
    (rules.gpu_nodes_are_tolerated, JOB, lambda d: pod_spec(d).pop("tolerations"), "no toleration"),
    (
        rules.gpu_nodes_are_tolerated,
        "mimic_cxr.images",
        lambda d: pod_spec(d).update(tolerations=[{"key": rules.GPU, "operator": "Exists"}]),
        "a toleration",
    ),
    (
        rules.preemptions_are_outlived,
        "stylegan2_anomaly.project.runai",
        lambda d: d["spec"].update(backoffLimitPerIndex=4),
        "ends after 4 preemptions (backoffLimitPerIndex)",
    ),
    (
        rules.preemptions_are_outlived,
        JOB,
        lambda d: pod_spec(d).update(schedulerName=rules.RUNAI),
        "ends after 6 preemptions (backoffLimit)",
    ),
    (
        rules.quota_is_of_what_queues_cover,
        JOBSET,
        lambda d: main(d)["resources"]["requests"].update({"ephemeral-storage": "10Gi"}),
        "asks for ephemeral-storage",
    ),
    (rules.workers_fit_cpus, "rsna.crop", lambda d: main(d)["args"].remove("--workers"), "[] workers on 8 CPUs"),
    (
        rules.workers_fit_cpus,
        "mimic_cxr.images.merge",
        lambda d: main(d)["resources"]["requests"].update(cpu="4"),
        "workers on 4 CPUs",
    ),
    (
        rules.grace_covers_the_checkpoint,
        JOB,
        lambda d: pod_spec(d).update(terminationGracePeriodSeconds=30),
        "waits 110 s of a grace period of 30 s",
    ),
    (rules.user_is_set, JOB, lambda d: main(d)["env"].remove(entry(d, "USER")), "USER is not set"),
    (rules.variables_resolve, SHARDS, lambda d: d["spec"].pop("completionMode"), "JOB_COMPLETION_INDEX"),
    (rules.variables_resolve, JOBSET, lambda d: main(d)["env"].reverse(), "$(JOBSET_NAME)"),
    (rules.argv_parses, JOB, lambda d: main(d)["command"].insert(1, "--processes=2"), "torchrun refuses"),
    (rules.argv_parses, JOB, lambda d: main(d)["args"].__setitem__(1, "/args/cxr_pggan.trains.json"), "no args file"),
    (rules.argv_parses, JOB, lambda d: main(d).update(workingDir="/opt/medgen/bundles/x"), "not the folder"),
    (
        rules.argv_parses,
        JOB,
        lambda d: pod_spec(d)["initContainers"][0].update(args=["/args/cxr_pggan.evaluate.json"]),
        "different stages",
    ),
    (rules.argv_parses, SHARDS, lambda d: main(d)["args"].append("--seed"), "expected --args_file"),
    (rules.argv_parses, "mimic_cxr.images", lambda d: main(d)["args"].__setitem__(0, "preprocessing.x"), "no module"),
    (
        rules.no_secret_is_written_down,
        JOB,
        lambda d: main(d)["env"].append({"name": "MLFLOW_TRACKING_PASSWORD", "value": "x"}),
        "MLFLOW_TRACKING_PASSWORD",
    ),
    (
        rules.no_secret_is_written_down,
        JOB,
        lambda d: entry(d, "USER").update(value="https://someone:word@server/"),
        "an address with a password",
    ),
    (rules.pods_are_hardened, JOB, lambda d: pod_spec(d)["securityContext"].pop("runAsNonRoot"), "may run as root"),
    (rules.pods_are_hardened, JOB, lambda d: pod_spec(d)["securityContext"].pop("seccompProfile"), "seccomp"),
    (rules.pods_are_hardened, JOBSET, lambda d: pod_spec(d).pop("automountServiceAccountToken"), "token"),
    (
        rules.pods_are_hardened,
        PYTORCHJOB,
        lambda d: main(d)["securityContext"].update(readOnlyRootFilesystem=False),
        "writable root",
    ),
    (rules.shards_agree, SHARDS, lambda d: d["spec"].update(completions=8), "of 8 completions"),
    (
        rules.shards_agree,
        SHARDS,
        lambda d: pod_spec(d)["initContainers"][0].update(args=pod_spec(d)["initContainers"][0]["args"][:1]),
        "checks --shard None",
    ),
    (rules.shards_agree, SHARDS, lambda d: d["spec"].pop("completionMode"), "but completionMode None"),
    (rules.nodes_find_the_first, JOBSET, lambda d: entry(d, "PET_MASTER_ADDR").update(value="m-node-0-0.m"), "m-node"),
    (rules.nodes_find_the_first, JOBSET, lambda d: d["spec"]["network"].update(subdomain="other"), "not the first pod"),
    (rules.nodes_find_the_first, JOBSET, lambda d: entry(d, "PET_NNODES").update(value="3"), "numbers of nodes"),
    (rules.nodes_find_the_first, JOBSET, lambda d: main(d)["env"].append({"name": "PET_STANDALONE"}), "alone"),
    (rules.operator_knows_its_container, PYTORCHJOB, lambda d: main(d).update(name="main"), "called pytorch"),
    (
        rules.operator_knows_its_container,
        PYTORCHJOB,
        lambda d: d["spec"]["pytorchReplicaSpecs"]["Worker"].update(replicas=3),
        "checks 2 of 4 nodes",
    ),
]


@pytest.mark.parametrize(
    ("rule", "overlay", "damage", "finding"), BROKEN, ids=[f"{n}-{case[0].__name__}" for n, case in enumerate(BROKEN)]
)
def test_rule_finds_what_was_broken(rule, overlay, damage, finding):
    documents = render(overlay)
    assert rule(documents) == []
    damage(workload(documents))
    assert any(finding in line for line in rule(documents)), rule(documents)


def test_every_rule_has_a_manifest_that_it_refuses():
    assert {case[0] for case in BROKEN} == set(rules.RULES)
