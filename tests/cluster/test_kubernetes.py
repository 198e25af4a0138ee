"""Every overlay renders, is what Kubernetes, JobSet and the training operator accept, and keeps our rules."""

from __future__ import annotations

import copy
import json
import shutil
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
}


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
        SHARDED | {"mimic_cxr.images", "chestxray14.images", "stylegan2_anomaly.project.runai"}
    )
    assert {f"{name}.merge" for name in SHARDED | {"mimic_cxr.images", "chestxray14.images"}} <= set(OVERLAYS)
    listed = yaml.safe_load((ARGS / "kustomization.yaml").read_text())["configMapGenerator"][0]["files"]
    assert sorted(listed) == sorted(f"{stage}.json" for stage in stages)


@pytest.mark.parametrize("stage", sorted(SHARDED))
def test_merge_is_the_command_of_the_shards_without_shard(stage):
    of_shards = workload(render(stage))["spec"]["template"]["spec"]
    of_merge = workload(render(f"{stage}.merge"))["spec"]["template"]["spec"]
    words = rules.argv(of_shards["containers"][0])
    assert rules.argv(of_merge["containers"][0]) == words[: words.index("--shard")]
    for container in (of_shards["containers"][0], of_merge["containers"][0]):
        del container["args"]
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


def test_components_before_jobset_reach_every_pod_of_it(tmp_path):
    components = ["kueue", "runai", "spot", "jobset"]
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    relative = Path("../" * len(overlay.parts[1:])) / KUBERNETES.relative_to("/")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(relative / "overlays" / "stylegan2_anomaly.train")],
        "components": [str(relative / "components" / name) for name in components],
    }
    (overlay / "kustomization.yaml").write_text(json.dumps(kustomization))
    documents = render(overlay)
    jobset = workload(documents)
    (pods,) = rules.pods_of(documents)
    assert jobset["kind"] == "JobSet"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu"
    assert pods.template["metadata"]["labels"]["kai.scheduler/preemptibility"] == "preemptible"
    assert pods.spec["schedulerName"] == "runai-scheduler"
    terms = pods.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 4  # alternatives: a node of one cloud has the label of that cloud only
    assert [finding for rule in rules.RULES for finding in rule(documents)] == []


def test_local_cache_is_filled_from_the_datalist_and_trained_from():
    import typer

    from medgen.data.stage import app

    (pods,) = rules.pods_of(render("stylegan2_anomaly.train.spot"))
    check, stage, main = pods.containers
    assert (check["name"], stage["name"]) == ("check", "stage")  # nothing is copied for a training that cannot begin
    given = typer.main.get_command(app).make_context("stage", list(stage["args"])).params
    assert str(given["datalist"]).startswith("/data/")
    assert rules.argv(main)[-2:] == ["--datalist", f"{given['target']}/datalist.json"]
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
    (rules.policies_fit, JOBSET, lambda d: d["spec"]["failurePolicy"].pop("maxRestarts"), "gives up"),
    (
        rules.policies_fit,
        JOBSET,
        lambda d: d["spec"]["replicatedJobs"][0]["template"]["spec"].update(backoffLimit=6),
        "start again alone",
    ),
    (rules.a_wrong_setting_is_final, JOB, lambda d: d["spec"]["podFailurePolicy"]["rules"].pop(0), "does not fail"),
    (rules.a_wrong_setting_is_final, JOB, lambda d: d["spec"]["podFailurePolicy"]["rules"].pop(1), "Disruption"),
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
