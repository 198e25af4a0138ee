"""What a schema cannot say of a rendered manifest: rules that each return what is wrong, one line a finding."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[2]
SOURCE = "/opt/medgen"  # where the image has the repository
GPU = "nvidia.com/gpu"
AGAIN_NEVER = 78  # exit code of `medgen check` where a person must mend something
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# of a container whose process group the kubelet signals: torchrun must be done before the kubelet's patience is
SHUTDOWN_MARGIN = 10  # seconds
OPTIONS = {
    "--args_file",
    "--shard",
    "--datalist",
    "--latents_dir",
    "--checkpoint_interval",
}  # of the containers' command lines
# seconds for pods without a training, which end at once when they are told to
LONGEST_GRACE = 30
# failures that a workload outlives where each preemption counts as one: of all pods, and of one index
DISRUPTIONS, DISRUPTIONS_OF_INDEX = 1000, 100
RESTARTS = 100  # of a JobSet or PyTorchJob, whose restarts a drained node costs as well
RUNAI = "runai-scheduler"
LONGEST_POD_SUFFIX = len("-node-0-00-xxxxx")

Manifest = Sequence[Mapping[str, Any]]


class Pods(NamedTuple):
    """A kind of pods that a workload starts."""

    where: str
    template: Mapping[str, Any]
    job: Mapping[str, Any]  # spec of the batch/v1 Job they belong to; {} for a PyTorchJob
    count: int

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.template["spec"]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def named(self, container: Mapping[str, Any]) -> str:
        return f"{self.where}, container {container['name']}"


def pods_of(manifest: Manifest) -> Iterator[Pods]:
    """All kinds of pods that a manifest's Jobs, JobSets and PyTorchJobs start."""
    for document in manifest:
        where = f"{document['kind']} {document['metadata']['name']}"
        spec = document.get("spec", {})
        if document["kind"] == "Job":
            yield Pods(where, spec["template"], spec, spec.get("parallelism", 1))
        elif document["kind"] == "JobSet":
            for job in spec["replicatedJobs"]:
                of_job = job["template"]["spec"]
                count = job.get("replicas", 1) * of_job.get("parallelism", 1)
                yield Pods(f"{where}, {job['name']}", of_job["template"], of_job, count)
        elif document["kind"] == "PyTorchJob":
            for role, replica in spec["pytorchReplicaSpecs"].items():
                yield Pods(f"{where}, {role}", replica["template"], {}, replica.get("replicas", 1))


def argv(container: Mapping[str, Any]) -> list[str]:
    """What the container runs; the image has no entry point of its own."""
    return [*container.get("command", []), *container.get("args", [])]


def variables(container: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the container: values, or what they come from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container.get("env", [])}


def amount(quantity: str | float) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i?|)", str(quantity))
    if not match or match[2] == "K":
        raise ValueError(f"{quantity!r} is no quantity")
    return float(match[1]) * (0.001 if match[2] == "m" else UNITS[match[2]])


def _quantities(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in ("requests", "limits") and isinstance(value, Mapping):
                yield from ((f"{path}/{key}/{name}", quantity) for name, quantity in value.items())
            elif key == "sizeLimit":
                yield f"{path}/{key}", value
            else:
                yield from _quantities(value, f"{path}/{key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _quantities(value, f"{path}/{number}")


def quantities_are_read(manifest: Manifest) -> list[str]:
    """Amounts are written as the API server reads them: 256Gi, not 256GiB."""
    findings = []
    for document in manifest:
        for path, quantity in _quantities(document):
            try:
                amount(quantity)
            except ValueError as error:
                findings.append(f"{document['kind']} {document['metadata']['name']}{path}: {error}")
    return findings


def names_are_taken(manifest: Manifest) -> list[str]:
    """Names are DNS labels, short enough for those of their pods, which begin with them."""
    findings = []
    for document in manifest:
        name = document["metadata"]["name"]
        longest = 253 if document["kind"] == "ConfigMap" else 63 - LONGEST_POD_SUFFIX
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) or len(name) > longest:
            findings.append(f"{document['kind']} {name}: not a DNS label of at most {longest} characters")
    return findings


def gpu_request_is_limit(manifest: Manifest) -> list[str]:
    """A request for GPUs, where there is one, is the limit; so is one for memory, lest the pod be evicted."""
    findings = []
    for pods in pods_of(manifest):
        for container in pods.containers:
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if GPU in requests and requests[GPU] != limits.get(GPU):
                findings.append(f"{pods.named(container)}: requests {requests[GPU]} GPUs, limit {limits.get(GPU)}")
            if "memory" not in limits or requests.get("memory") != limits["memory"]:
                findings.append(
                    f"{pods.named(container)}: memory request {requests.get('memory')}, limit {limits.get('memory')}"
                )
            if "cpu" not in requests:
                findings.append(f"{pods.named(container)}: no request for CPUs")
    return findings


def processes_fit_gpus(manifest: Manifest) -> list[str]:
    """torchrun starts as many processes as the container has GPUs, and `medgen check` is told that number."""
    findings = []
    for pods in pods_of(manifest):
        main = pods.spec["containers"][0]
        if "torchrun" not in argv(main)[:1]:
            continue
        gpus = int(main.get("resources", {}).get("limits", {}).get(GPU, 0))
        wanted = variables(main).get("PET_NPROC_PER_NODE", "gpu")  # a PyTorchJob says it itself
        if not gpus or (wanted != "gpu" and int(wanted) > gpus):
            findings.append(f"{pods.named(main)}: {wanted} processes for {gpus} GPUs")
        for container in pods.spec.get("initContainers", []):
            told = variables(container).get("PET_NPROC_PER_NODE")
            if argv(container)[:2] == ["medgen", "check"] and told != str(gpus):
                findings.append(f"{pods.named(container)}: checks {told} processes of a node with {gpus} GPUs")
    return findings


def mounts_are_declared(manifest: Manifest) -> list[str]:
    """Every mount has its volume, every volume is mounted, and no two mounts of a container share a path."""
    findings = []
    for pods in pods_of(manifest):
        declared = {volume["name"] for volume in pods.spec.get("volumes", [])}
        mounted = set()
        for container in pods.containers:
            mounts = container.get("volumeMounts", [])
            mounted |= {mount["name"] for mount in mounts}
            findings += [
                f"{pods.named(container)}: mounts {mount['name']}, which is no volume of the pod"
                for mount in mounts
                if mount["name"] not in declared
            ]
            paths = [mount["mountPath"] for mount in mounts]
            findings += [f"{pods.named(container)}: two mounts at {p}" for p in set(paths) if paths.count(p) > 1]
        findings += [f"{pods.where}: nothing mounts the volume {name}" for name in sorted(declared - mounted)]
    return findings


def references_are_there(manifest: Manifest) -> list[str]:
    """A ConfigMap that a pod mounts is in the manifest, by kustomize's name for it, with the file that is asked for."""
    findings = []
    maps = {document["metadata"]["name"]: document["data"] for document in manifest if document["kind"] == "ConfigMap"}
    for pods in pods_of(manifest):
        mounted = {mount["name"]: mount["mountPath"] for c in pods.containers for mount in c.get("volumeMounts", [])}
        for volume in pods.spec.get("volumes", []):
            if "configMap" not in volume:
                continue
            name, path = volume["configMap"]["name"], mounted.get(volume["name"])
            if name not in maps:
                findings.append(f"{pods.where}: no ConfigMap {name} in the manifest")
                continue
            for container in pods.containers:
                for word in argv(container):
                    if path and word.startswith(f"{path}/") and word[len(path) + 1 :] not in maps[name]:
                        findings.append(f"{pods.named(container)}: no {word[len(path) + 1 :]} in ConfigMap {name}")
    return findings


def shm_is_below_memory(manifest: Manifest) -> list[str]:
    """Shared memory is there for the data loader, bounded, and smaller than the memory limit it counts against."""
    findings = []
    for pods in pods_of(manifest):
        main = pods.spec["containers"][0]
        shared = {v["name"]: v["emptyDir"] for v in pods.spec.get("volumes", []) if "medium" in v.get("emptyDir", {})}
        here = [m["name"] for m in main.get("volumeMounts", []) if m["mountPath"] == "/dev/shm"]
        if not here or here[0] not in shared:
            findings.append(f"{pods.named(main)}: no memory at /dev/shm, which is 64 MB without")
            continue
        size = shared[here[0]].get("sizeLimit")
        memory = main.get("resources", {}).get("limits", {}).get("memory", 0)
        if size is None or amount(size) >= amount(memory):
            findings.append(f"{pods.named(main)}: /dev/shm of {size} is not below the memory limit {memory}")
    return findings


def image_is_pinned(manifest: Manifest) -> list[str]:
    """Images are named by digest, one for all: a pod that starts again runs the code that wrote the checkpoint."""
    findings, images = [], set()
    for pods in pods_of(manifest):
        for container in pods.containers:
            images.add(container["image"])
            if not re.fullmatch(r"[^@\s:]+(:\d+)?(/[^@\s:]+)*@sha256:[0-9a-f]{64}", container["image"]):
                findings.append(f"{pods.named(container)}: image {container['image']} has no digest")
    return findings + ([f"different images: {', '.join(sorted(images))}"] if len(images) > 1 else [])


def policies_fit(manifest: Manifest) -> list[str]:
    """podFailurePolicy needs restartPolicy Never, names containers that exist, has a status; counts fit the kind."""
    findings = []
    for document in manifest:
        if document["kind"] == "JobSet":
            policy, where = document["spec"].get("failurePolicy", {}), f"JobSet {document['metadata']['name']}"
            if policy.get("maxRestarts", 0) < RESTARTS:
                findings.append(f"{where}: gives up after {policy.get('maxRestarts', 0)} lost pods (maxRestarts)")
            jobs = [job["template"]["spec"] for job in document["spec"]["replicatedJobs"]]
            if any(job.get("backoffLimit") != 0 for job in jobs):
                findings.append(f"{where}: backoffLimit not 0, ranks start again alone")
            if any(job.get("completionMode") != "Indexed" for job in jobs):
                findings.append(f"{where}: completionMode not Indexed, pods have no rank")
        elif document["kind"] == "PyTorchJob":
            limit = document["spec"].get("runPolicy", {}).get("backoffLimit", 0)
            if limit < RESTARTS:
                findings.append(f"PyTorchJob {document['metadata']['name']}: gives up after {limit} restarts of pods")
    for pods in pods_of(manifest):
        policy = pods.job.get("podFailurePolicy")
        restart = pods.spec.get("restartPolicy")
        if pods.job and restart != "Never":
            findings.append(f"{pods.where}: restartPolicy {restart}, podFailurePolicy needs Never")
        if "backoffLimitPerIndex" in pods.job and pods.job.get("completionMode") != "Indexed":
            findings.append(f"{pods.where}: backoffLimitPerIndex needs completionMode Indexed")
        alone = pods.job.get("backoffLimit") == 0  # of a JobSet, which starts all pods together
        if pods.job.get("completionMode") == "Indexed" and "backoffLimitPerIndex" not in pods.job and not alone:
            findings.append(f"{pods.where}: no backoffLimitPerIndex, one bad shard ends the others")
        if pods.job and pods.job.get("podReplacementPolicy") != "Failed":
            findings.append(f"{pods.where}: podReplacementPolicy not Failed, two pods write the same checkpoints")
        names = {container["name"] for container in pods.containers}
        for rule in (policy or {}).get("rules", []):
            of = rule.get("onExitCodes", {}).get("containerName")
            if of and of not in names:
                findings.append(f"{pods.where}: a rule for the container {of}, which is not there")
            for condition in rule.get("onPodConditions", []):
                if condition.get("status") not in ("True", "False", "Unknown"):
                    findings.append(f"{pods.where}: the condition {condition['type']} has no status")
        if pods.job and not policy:
            findings.append(f"{pods.where}: no podFailurePolicy, a preemption counts as a failure")
    return findings


def a_wrong_setting_is_final(manifest: Manifest) -> list[str]:
    """All fails at once where `medgen check` ends with 78, and a disruption is not held against a Job of its own."""
    findings = []
    for document in manifest:
        rules = document.get("spec", {}).get("failurePolicy", {}).get("rules", [])
        if document["kind"] == "JobSet" and not any(
            rule["action"] == "FailJobSet" and rule.get("onJobFailureReasons") == ["PodFailurePolicy"] for rule in rules
        ):
            findings.append(f"JobSet {document['metadata']['name']}: `medgen check` ending with 78 does not fail it")
    for pods in pods_of(manifest):
        first = [argv(container)[:2] for container in pods.spec.get("initContainers", [])][:1]
        if "--args_file" in argv(pods.spec["containers"][0]) and first != [["medgen", "check"]]:
            findings.append(f"{pods.where}: begins without `medgen check`")
        if not pods.job:  # a PyTorchJob has no such policy
            continue
        rules = pods.job.get("podFailurePolicy", {}).get("rules", [])
        checked = any(container["name"] == "check" for container in pods.containers)
        final = any(
            rule["action"] == "FailJob"
            and rule.get("onExitCodes", {}).get("containerName") == "check"
            and rule["onExitCodes"]["operator"] == "In"
            and rule["onExitCodes"]["values"] == [AGAIN_NEVER]
            for rule in rules
        )
        if checked and not final:
            findings.append(f"{pods.where}: `medgen check` ending with {AGAIN_NEVER} does not fail the job")
        forgiven = any(
            rule["action"] == "Ignore" and c["type"] == "DisruptionTarget" and c.get("status") == "True"
            for rule in rules
            for c in rule.get("onPodConditions", [])
        )
        if pods.job.get("backoffLimit") != 0 and not forgiven:
            findings.append(f"{pods.where}: a preemption counts as a failure (DisruptionTarget)")
    return findings


def grace_covers_the_checkpoint(manifest: Manifest) -> list[str]:
    """torchrun waits for the last checkpoint, ten seconds less than the kubelet waits for torchrun; others do not."""
    findings = []
    for pods in pods_of(manifest):
        grace = pods.spec.get("terminationGracePeriodSeconds", 30)
        for container in pods.spec["containers"]:
            if argv(container)[:1] != ["torchrun"]:
                if grace > LONGEST_GRACE:
                    findings.append(f"{pods.named(container)}: keeps its node for {grace} s and saves nothing")
                continue
            patience = int(variables(container).get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
            if patience != grace - SHUTDOWN_MARGIN:
                findings.append(f"{pods.named(container)}: torchrun waits {patience} s of a grace period of {grace} s")
    return findings


def gpu_nodes_are_tolerated(manifest: Manifest) -> list[str]:
    """Pods that ask for GPUs tolerate the taint of nodes that have some; the others stay away from those."""
    findings = []
    for pods in pods_of(manifest):
        gpus = any(GPU in container.get("resources", {}).get("limits", {}) for container in pods.containers)
        if gpus != any(toleration.get("key") == GPU for toleration in pods.spec.get("tolerations", [])):
            findings.append(f"{pods.where}: {'no' if gpus else 'a'} toleration of nodes with GPUs")
    return findings


def preemptions_are_outlived(manifest: Manifest) -> list[str]:
    """Run:ai's preemption deletes pods without a DisruptionTarget: it counts as a failure, and may come often."""
    findings = []
    for document in manifest:
        if document["kind"] != "Job" or document["spec"]["template"]["spec"].get("schedulerName") != RUNAI:
            continue
        spec = document["spec"]
        name, least = ("backoffLimitPerIndex", DISRUPTIONS_OF_INDEX)
        if spec.get("completionMode") != "Indexed":
            name, least = ("backoffLimit", DISRUPTIONS)
        if spec.get(name, 0) < least:
            findings.append(f"Job {document['metadata']['name']}: ends after {spec.get(name)} preemptions ({name})")
    return findings


def quota_is_of_what_queues_cover(manifest: Manifest) -> list[str]:
    """Kueue never admits a job that asks for what its queue does not cover: CPUs, memory and GPUs are what it does."""
    findings = []
    for document in manifest:
        if "kueue.x-k8s.io/queue-name" not in document["metadata"].get("labels", {}):
            continue
        for pods in pods_of([document]):
            for container in pods.containers:
                asked = {name for kind in container.get("resources", {}).values() for name in kind}
                for name in sorted(asked - {"cpu", "memory", GPU}):
                    findings.append(f"{pods.named(container)}: asks for {name}")
    return findings


def workers_fit_cpus(manifest: Manifest) -> list[str]:
    """Preprocessing is told its number of processes: by itself it would take all cores of the node."""
    findings = []
    for pods in pods_of(manifest):
        for container in pods.spec["containers"]:
            script = " ".join(argv(container))
            if "preprocessing." not in script:
                continue
            cpus = container["resources"]["requests"]["cpu"]
            told = re.findall(r"--workers (\d+)", script)
            if not told or set(told) != {cpus}:
                findings.append(f"{pods.named(container)}: {told} workers on {cpus} CPUs")
    return findings


def user_is_set(manifest: Manifest) -> list[str]:
    """USER and HOME are set: MONAI asks for the user's name, which a UID without an entry in /etc/passwd has not."""
    return [
        f"{pods.named(container)}: {name} is not set"
        for pods in pods_of(manifest)
        for container in pods.containers
        for name in ("USER", "HOME")
        if not variables(container).get(name)
    ]


def variables_resolve(manifest: Manifest) -> list[str]:
    """``$(NAME)`` is expanded only where NAME is a variable of the container, defined before it is used."""
    findings = []
    for pods in pods_of(manifest):
        given = {"JOB_COMPLETION_INDEX"} if pods.job.get("completionMode") == "Indexed" else set()
        for container in pods.containers:
            known = set(given)
            texts = []
            for entry in container.get("env", []):
                texts.append((entry.get("value", ""), set(known)))
                known.add(entry["name"])
            texts += [(word, known) for word in argv(container)]
            for text, at_hand in texts:
                for name in re.findall(r"(?<!\$)\$\((\w+)\)", text):
                    if name not in at_hand:
                        findings.append(f"{pods.named(container)}: $({name}) in {text} is no variable there")
    return findings


@cache
def _torchrun() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def argv_parses(manifest: Manifest) -> list[str]:
    """torchrun takes the command line; bundle, args file and configs exist; `check` is asked about the same."""
    findings = []
    for pods in pods_of(manifest):
        for container in pods.containers:
            findings += [f"{pods.named(container)}: {finding}" for finding in _findings_of_argv(container)]
        files = {word for c in pods.containers for word in argv(c) if word.startswith("/args/")}
        folders = {c.get("workingDir", "no folder") for c in pods.containers if files & set(argv(c))}
        if len(files) > 1 or len(folders) > 1:
            findings.append(f"{pods.where}: containers of different stages: {sorted(files)} in {sorted(folders)}")
    return findings


def _findings_of_argv(container: Mapping[str, Any]) -> Iterator[str]:
    words = argv(container)
    if words[:1] == ["torchrun"]:
        try:
            words = ["python", "-m", *_run_words(words[1:])]
        except (SystemExit, argparse.ArgumentError):
            yield f"torchrun refuses {' '.join(words[1:])}"
            return
    if words[:4] == ["python", "-m", "monai.bundle", "run"]:
        options = dict(zip(words[4::2], words[5::2], strict=False))
        if len(words) % 2 or not set(options) <= OPTIONS or "--args_file" not in options:
            yield f"expected --args_file FILE and perhaps --shard i/n, got {' '.join(words[4:])}"
            return
        named = options["--args_file"]
    elif words[:2] == ["medgen", "check"] and (len(words) == 3 or (words[3:4] == ["--shard"] and len(words) == 5)):
        named = words[2]
    elif words[:2] == ["medgen", "stage"] and words[3:4] == ["--target"]:
        return
    elif words[:1] == ["bash"] and f"{SOURCE}/cluster/accept_rejected.sh" in " ".join(words):
        script = " ".join(words)
        modules = re.findall(r"python -m (\S+)", script)
        if not modules:
            yield f"no module in {script}"
        for module in modules:
            if not (REPOSITORY / f"{module.replace('.', '/')}.py").is_file():
                yield f"no module {module} in {script}"
        if not (REPOSITORY / "cluster" / "accept_rejected.sh").is_file():
            yield "no cluster/accept_rejected.sh"
        return
    else:
        yield f"an unknown command {' '.join(words)}"
        return
    args_file = REPOSITORY / "cluster" / "args" / Path(named).name
    folder = REPOSITORY / str(container.get("workingDir", "")).removeprefix(f"{SOURCE}/")
    if not args_file.is_file() or not named.startswith("/args/"):
        yield f"no args file {named}"
    elif not (folder / "configs").is_dir() or folder.name != args_file.name.split(".")[0]:
        yield f"{container.get('workingDir')} is not the folder of {args_file.name}'s bundle"
    else:
        configs = json.loads(args_file.read_text())["config_file"]
        for config in [configs] if isinstance(configs, str) else configs:
            if not (folder / config).is_file():
                yield f"{args_file.name} names {config}, which is not in {folder.name}"


def _run_words(words: list[str]) -> list[str]:
    arguments = _torchrun().parse_args(words)
    if not arguments.module:
        raise SystemExit
    return [arguments.training_script, *arguments.training_script_args]


def no_secret_is_written_down(manifest: Manifest) -> list[str]:
    """Passwords come from a Secret outside: no value of such a name, no address with a password, no Secret here."""
    findings = [f"Secret {d['metadata']['name']} lies in the manifest" for d in manifest if d["kind"] == "Secret"]
    for pods in pods_of(manifest):
        for container in pods.containers:
            for entry in container.get("env", []):
                if "value" in entry and re.search(r"PASSWORD|TOKEN|SECRET|_KEY$|CREDENTIAL", entry["name"]):
                    findings.append(f"{pods.named(container)}: {entry['name']} has its value in the manifest")
    text = json.dumps(list(manifest))
    return findings + [f"an address with a password: {m}" for m in re.findall(r"\w+://[^/\s:@\"]+:[^/\s@\"]+@", text)]


def pods_are_hardened(manifest: Manifest) -> list[str]:
    """No root, no privileges, a read-only root, no token of the cluster: Pod Security's restricted profile and more."""
    findings = []
    for pods in pods_of(manifest):
        of_pod = pods.spec.get("securityContext", {})
        if not of_pod.get("runAsNonRoot") or not of_pod.get("runAsUser"):
            findings.append(f"{pods.where}: may run as root")
        if of_pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            findings.append(f"{pods.where}: no seccomp profile")
        if pods.spec.get("automountServiceAccountToken") is not False:
            findings.append(f"{pods.where}: has a token of the cluster's API")
        for container in pods.containers:
            own = container.get("securityContext", {})
            if (
                own.get("allowPrivilegeEscalation") is not False
                or own.get("readOnlyRootFilesystem") is not True
                or own.get("capabilities", {}).get("drop") != ["ALL"]
            ):
                findings.append(f"{pods.named(container)}: privileges, capabilities or a writable root")
    return findings


def _shard(container: Mapping[str, Any]) -> str | None:
    words = argv(container)
    return words[words.index("--shard") + 1] if "--shard" in words else None


def shards_agree(manifest: Manifest) -> list[str]:
    """An Indexed Job has as many indices as `--shard i/n` says, from 0; a merge, which has no --shard, has one pod."""
    findings = []
    for document in manifest:
        if document["kind"] != "Job":
            continue
        spec, where = document["spec"], f"Job {document['metadata']['name']}"
        shard = _shard(spec["template"]["spec"]["containers"][0])
        for container in spec["template"]["spec"].get("initContainers", []):
            if container["name"] == "check" and _shard(container) != shard:
                findings.append(f"{where}: checks --shard {_shard(container)}, runs --shard {shard}")
        indexed = spec.get("completionMode") == "Indexed"
        if (shard is not None) != indexed:
            findings.append(f"{where}: --shard {shard}, but completionMode {spec.get('completionMode')}")
        elif indexed and shard != f"$(JOB_COMPLETION_INDEX)/{spec.get('completions')}":
            findings.append(f"{where}: --shard {shard} of {spec.get('completions')} completions")
        elif not indexed and spec.get("completions", 1) != 1:
            findings.append(f"{where}: {spec['completions']} times the same")
    return findings


def nodes_find_the_first(manifest: Manifest) -> list[str]:
    """Nodes of a JobSet know how many they are, which one each is, and a first one by a name that outlives its pod."""
    findings = []
    for document in manifest:
        if document["kind"] != "JobSet":
            continue
        name, spec = document["metadata"]["name"], document["spec"]
        if spec.get("network", {}).get("enableDNSHostnames") is False:
            findings.append(f"JobSet {name}: pods have no names")
        subdomain = spec.get("network", {}).get("subdomain", name)
        for job in spec["replicatedJobs"]:
            of_job = job["template"]["spec"]
            main = of_job["template"]["spec"]["containers"][0]
            given = variables(main)
            address = str(given.get("PET_MASTER_ADDR")).replace("$(JOBSET_NAME)", name)
            if address != f"{name}-{job['name']}-0-0.{subdomain}":
                findings.append(f"JobSet {name}: {given.get('PET_MASTER_ADDR')} is not the first pod of {job['name']}")
            origin = given.get("JOBSET_NAME", {}).get("fieldRef", {}).get("fieldPath")
            if "$(JOBSET_NAME)" in str(given.get("PET_MASTER_ADDR")) and (
                origin != "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
            ):
                findings.append(f"JobSet {name}: JOBSET_NAME is {origin}, not the JobSet's")
            counts = {given.get("PET_NNODES"), str(of_job.get("completions")), str(of_job.get("parallelism"))}
            checks = [c for c in of_job["template"]["spec"].get("initContainers", []) if c["name"] == "check"]
            counts |= {variables(container).get("PET_NNODES") for container in checks}
            if len(counts) != 1 or job.get("replicas", 1) != 1:
                findings.append(f"JobSet {name}: different numbers of nodes: {sorted(map(str, counts))}")
            rank = given.get("PET_NODE_RANK")
            if rank != {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}:
                findings.append(f"JobSet {name}: the rank of a node is {rank}, not its index")
            if "PET_STANDALONE" in given:
                findings.append(f"JobSet {name}: PET_STANDALONE, each node would train alone")
    return findings


def operator_knows_its_container(manifest: Manifest) -> list[str]:
    """A PyTorchJob's container is called pytorch; its nodes and processes are set by the operator alone."""
    findings = []
    for document in manifest:
        if document["kind"] != "PyTorchJob":
            continue
        where, replicas = f"PyTorchJob {document['metadata']['name']}", document["spec"]["pytorchReplicaSpecs"]
        nodes = sum(replica.get("replicas", 1) for replica in replicas.values())
        for role, replica in replicas.items():
            spec = replica["template"]["spec"]
            if [container["name"] for container in spec["containers"]] != ["pytorch"]:
                findings.append(f"{where}, {role}: its one container must be called pytorch")
            own = {"PET_STANDALONE", "PET_NNODES", "PET_NPROC_PER_NODE"} & set(variables(spec["containers"][0]))
            findings += [f"{where}, {role}: {name} is the operator's" for name in sorted(own)]
            for container in spec.get("initContainers", []):
                if variables(container).get("PET_NNODES") != str(nodes):
                    findings.append(
                        f"{where}, {role}: checks {variables(container).get('PET_NNODES')} of {nodes} nodes"
                    )
        if replicas["Master"]["template"] != replicas.get("Worker", replicas["Master"])["template"]:
            findings.append(f"{where}: Master and Worker differ")
    return findings


RULES: tuple[Callable[[Manifest], list[str]], ...] = (
    quantities_are_read,
    names_are_taken,
    gpu_request_is_limit,
    processes_fit_gpus,
    mounts_are_declared,
    references_are_there,
    shm_is_below_memory,
    image_is_pinned,
    policies_fit,
    a_wrong_setting_is_final,
    grace_covers_the_checkpoint,
    gpu_nodes_are_tolerated,
    preemptions_are_outlived,
    quota_is_of_what_queues_cover,
    workers_fit_cpus,
    user_is_set,
    variables_resolve,
    argv_parses,
    no_secret_is_written_down,
    pods_are_hardened,
    shards_agree,
    nodes_find_the_first,
    operator_knows_its_container,
)
