"""A stand-in for a cluster: runs the containers of rendered manifests as local processes.

It plays the API's defaults, the controllers of Job, Indexed Job and JobSet, and a kubelet, as far as our manifests use
them; a field that it does not know is refused, so that nothing of a manifest is passed over unseen. What a run here
does not prove: scheduling, quotas, the permissions and the sharing of real volumes, the user and the read-only root of
the container, the image itself, NCCL, DNS but for the names of a headless Service, admission, and time: a controller
waits between attempts, this one does not.

Programs of Python begin as forks of a preloaded server (``running.py``): importing MONAI takes longer than a training.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.bundle

REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "tests" / "bundles"))

from running import Forked, _run_module  # noqa: E402

# where the image has what lies elsewhere here
IMAGE = {"/opt/medgen": REPOSITORY, "/opt/venv": Path(sys.prefix)}
IMAGE_ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
INDEX = "batch.kubernetes.io/job-completion-index"
DEFAULT_GRACE = 30  # seconds, of a pod that names none
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000

# fields that are followed, and fields that only a real cluster can follow
POD_FIELDS = {"containers", "initContainers", "restartPolicy", "terminationGracePeriodSeconds", "volumes", "subdomain"}
POD_FIELDS |= {"hostname", "setHostnameAsFQDN"}
POD_UNPROVEN = {"securityContext", "automountServiceAccountToken", "nodeSelector", "tolerations", "affinity"}
POD_UNPROVEN |= {"schedulerName", "priorityClassName", "enableServiceLinks", "topologySpreadConstraints"}
POD_UNPROVEN |= {"serviceAccountName", "imagePullSecrets", "hostUsers"}
CONTAINER_FIELDS = {"name", "command", "args", "workingDir", "env", "envFrom", "volumeMounts"}
CONTAINER_UNPROVEN = {"image", "imagePullPolicy", "resources", "securityContext", "ports"}
CONTAINER_UNPROVEN |= {"terminationMessagePolicy"}
JOB_FIELDS = {"template", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes", "completions", "parallelism"}
JOB_FIELDS |= {"completionMode", "podFailurePolicy", "podReplacementPolicy"}
JOB_UNPROVEN = {"ttlSecondsAfterFinished", "suspend", "activeDeadlineSeconds"}
JOBSET_FIELDS = {"replicatedJobs", "failurePolicy", "network"}
JOBSET_UNPROVEN = {"ttlSecondsAfterFinished", "suspend"}


class ManifestError(Exception):
    """What a cluster would refuse, or what this stand-in cannot follow."""


def _known(kind: str, content: Mapping[str, Any], *fields: set[str]) -> None:
    unknown = set(content) - set().union(*fields)
    if unknown:
        raise ManifestError(f"{kind}: the stand-in does not know {', '.join(sorted(unknown))}")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$(VAR)`` as the API expands it: ``$$`` is a dollar, and the name of no variable stays as it is."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def rewrite(text: str, folders: Mapping[str, Path]) -> str:
    """Paths of a container as paths of this machine."""
    names = "|".join(re.escape(name) for name in sorted(folders, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({names})(?![\w.-])", lambda match: str(folders[match[1]]), text)


def descendants(pid: int) -> list[int]:
    """Processes below a process, and those of its session that have lost their parents."""
    parents, sessions = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                parents[int(stat.parent.name)], sessions[int(stat.parent.name)] = int(parent), int(session)
    found, below = {child for child, session in sessions.items() if session == pid} - {pid}, {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below} - found
        found |= below
    return sorted(found)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it, also to those in sessions of their own, as torchrun's workers are."""
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


# -- containers


class Container(Forked):
    """A container's first process: in a fork of the preloaded server, in its node's network where it has one."""

    def __init__(self, argv: list[str], cwd: Path, environment: dict[str, str], node: Node | None) -> None:
        descriptor, name = tempfile.mkstemp(prefix="output-")
        os.close(descriptor)
        self._output = Path(name)
        place = None if node is None else (node.namespace, node.hostname, str(node.hosts))
        target = (argv, str(cwd), name, environment, place)
        self._process = self._forkserver().Process(target=_run_container, args=target, daemon=False)
        self._process.start()
        self.pid = self._process.pid
        self._running.add(self)

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def end(self) -> tuple[int, str]:
        """Exit code as a kubelet tells it (128 + signal), and the log; whatever it left behind is ended."""
        kill_tree(self.pid)  # the kernel does so when the first process of a container has ended
        self._process.join()
        log, code = self.log, self.returncode
        self._end()
        return (128 - code if code < 0 else code), log


def _run_container(argv: list[str], cwd: str, output: str, environment: dict[str, str], place: tuple | None) -> None:
    if place is not None:
        _enter(*place)
    module = _as_module(argv)
    if module is not None:
        _run_module(module, cwd, output, environment)
        return
    os.setsid()
    os.chdir(cwd)
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execvpe(argv[0], argv, environment)


def _as_module(argv: list[str]) -> list[str] | None:
    """Arguments of Python for programs that a fork can run; None for any other."""
    program, arguments = Path(argv[0]).name, argv[1:]
    if program == "torchrun":
        if arguments[:2] != ["-m", "monai.bundle"]:
            raise ManifestError(f"torchrun is known with -m monai.bundle alone, got {argv}")
        # its processes are to be forks as well: see running.start
        script = str(Path(monai.bundle.__file__).with_name("__main__.py"))
        return ["-m", "torch.distributed.run", "--start-method=fork", "--run-path", script, *arguments[2:]]
    if program in ("python", "python3") and arguments[:1] == ["-m"]:
        return arguments
    return ["-m", "medgen", *arguments] if program == "medgen" else None


# -- nodes: network namespaces


class Node:
    """A network of its own, with a host name, for one pod."""

    def __init__(self, namespace: str, address: str, hostname: str, hosts: Path) -> None:
        self.namespace, self.address, self.hostname, self.hosts = namespace, address, hostname, hosts


class Network:
    """Nodes joined by a bridge that leads nowhere else; names are told by a file of hosts."""

    def __init__(self, folder: Path) -> None:
        self.prefix = f"mg{os.getpid() % 100000}{uuid.uuid4().hex[:3]}"
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.nodes: list[Node] = []
        self.switch = f"{self.prefix}s"
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")

    @staticmethod
    def permitted() -> bool:
        """Whether this machine lets us make network namespaces."""
        if shutil.which("ip") is None or os.geteuid() != 0:
            return False
        name = f"mg{os.getpid()}t"
        try:
            _ip("netns", "add", name)
            _ip("netns", "del", name)
        except subprocess.CalledProcessError:
            return False
        return True

    def add(self, hostname: str, names: Sequence[str]) -> Node:
        """A new node with its own address; its names lead to it, no longer to a node of that name before."""
        number = len(self.nodes) + 1
        node = Node(f"{self.prefix}n{number}", f"10.99.{number // 250}.{number % 250 + 1}", hostname, self.hosts)
        port = f"v{number}"
        _ip("netns", "add", node.namespace)
        self.nodes.append(node)
        _ip("link", "add", "eth0", "netns", node.namespace, "type", "veth", "peer", "name", port, "netns", self.switch)
        _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", node.namespace, "address", "add", f"{node.address}/16", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", node.namespace, "link", "set", device, "up")
        lines = [x for x in self.hosts.read_text().splitlines() if not set(x.split()[1:]) & {hostname, *names}]
        # written in place: the nodes have this very file
        self.hosts.write_text("\n".join([*lines, " ".join([node.address, *names, hostname]), ""]))
        return node

    def close(self) -> None:
        """Take all down."""
        for name in [self.switch, *(node.namespace for node in self.nodes)]:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _enter(namespace: str, hostname: str, hosts: str) -> None:
    """Move this process into a node; Python 3.11 has none of these calls."""
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    with open(f"/run/netns/{namespace}") as file:
        must(libc.setns(file.fileno(), CLONE_NEWNET))
    must(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS))
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    must(libc.mount(hosts.encode(), b"/etc/hosts", None, MS_BIND, None))
    must(libc.sethostname(hostname.encode(), len(hostname)))


# -- pods


class Pod:
    """A pod and its kubelet."""

    def __init__(self, cluster: Cluster, name: str, template: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self.cluster, self.name, self.uid = cluster, name, str(uuid.uuid4())
        own = template.get("metadata", {})
        self.labels = {**own.get("labels", {}), **metadata.get("labels", {})}
        self.annotations = {**own.get("annotations", {}), **metadata.get("annotations", {})}
        self.spec = template["spec"]
        _known("pod", self.spec, POD_FIELDS, POD_UNPROVEN)
        self.hostname = self.spec.get("hostname", name)
        self.folder = Path(tempfile.mkdtemp(dir=cluster.folder, prefix=f"{name}-"))
        self.phase, self.conditions, self.deleted = "Pending", set(), False
        self.exit_codes: dict[str, int] = {}
        self.log = ""
        self.running: dict[str, Container] = {}
        self._deadline: float | None = None
        self._to_start = [[c] for c in self.spec.get("initContainers", [])] + [list(self.spec["containers"])]
        self._volumes = {volume["name"]: self._make_volume(volume) for volume in self.spec.get("volumes", [])}
        self.node = cluster.attach(self)

    def step(self) -> None:
        """What a kubelet does, once."""
        if self.finished:
            return
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._kill()
        for name, container in list(self.running.items()):
            if container.poll() is not None:
                del self.running[name]
                code, log = container.end()
                self.log += f"--- {name} of {self.name} ended with {code}\n{log}"
                self.exit_codes[name] = code
                if code and self.spec.get("restartPolicy", "Always") != "Never":
                    raise ManifestError("the stand-in starts no container again: restartPolicy must be Never")
        if self.running:
            return
        if any(self.exit_codes.values()):
            self.phase = "Failed"
        elif self._deadline is not None and self._to_start:
            self.phase = "Failed"  # deleted before all had begun
        elif not self._to_start:
            self.phase = "Succeeded"
        else:
            self.phase = "Running"
            for container in self._to_start.pop(0):
                self.running[container["name"]] = self._start(container)

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.phase in ("Succeeded", "Failed")

    def terminate(self) -> None:
        """Delete it: SIGTERM to the first process of each container, SIGKILL to all when the grace period is over."""
        self.deleted = True
        if self._deadline is None:
            grace = self.spec.get("terminationGracePeriodSeconds", DEFAULT_GRACE)
            self._deadline = time.monotonic() + grace
            for container in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(container.pid, signal.SIGTERM)

    def evict(self) -> None:
        """Preemption, or a drained node: deletion with the condition that says so."""
        self.conditions.add("DisruptionTarget")
        self.terminate()

    def lose(self) -> None:
        """The node is gone with all its processes; the garbage collector of pods says that it was a disruption."""
        self.conditions.add("DisruptionTarget")
        self.deleted = True
        self._kill()

    def crash(self) -> None:
        """SIGKILL to all processes of the containers, as for want of memory: no disruption."""
        self._kill()

    def workers(self) -> list[int]:
        """Processes that the first process of the running container has started itself."""
        (container,) = self.running.values()
        return [pid for pid in descendants(container.pid) if _parent(pid) == container.pid]

    def _kill(self) -> None:
        self._to_start = self._to_start or []
        for container in self.running.values():
            kill_tree(container.pid)

    # what a container gets

    def _start(self, container: Mapping[str, Any]) -> Container:
        _known(f"container {container['name']}", container, CONTAINER_FIELDS, CONTAINER_UNPROVEN)
        folders = dict(IMAGE)
        for mount in container.get("volumeMounts", []):
            _known("volumeMount", mount, {"name", "mountPath", "subPath", "readOnly"})
            if mount["name"] not in self._volumes:
                raise ManifestError(f"{container['name']} mounts the undeclared volume {mount['name']}")
            folders[mount["mountPath"].rstrip("/")] = self._volumes[mount["name"]] / mount.get("subPath", "")
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        variables = self._environment(container)
        argv = [expand(word, variables) for word in [*container.get("command", []), *container.get("args", [])]]
        if not argv:
            raise ManifestError(f"{container['name']} runs the image's own command, which is not known here")
        for volume in self.spec.get("volumes", []):  # files that name folders
            if "configMap" in volume:
                for name, text in self._entries(self.cluster.config_maps, volume["configMap"]).items():
                    (self._volumes[volume["name"]] / name).write_text(rewrite(text, folders))
        environment = {name: rewrite(value, folders) for name, value in variables.items()}
        environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(folders.get("/tmp", self.folder))}
        if "PET_NPROC_PER_NODE" in environment:
            environment["PET_NPROC_PER_NODE"] = str(self.cluster.processes)
        if self.node is None and "PET_MASTER_ADDR" in environment:  # all nodes are this one
            environment["PET_MASTER_ADDR"] = "127.0.0.1"
            environment["PET_MASTER_PORT"] = self.cluster.free_port(environment["PET_MASTER_PORT"])
        cwd = Path(rewrite(container.get("workingDir", "/opt/medgen"), folders))
        return Container([rewrite(word, folders) for word in argv], cwd, environment, self.node)

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """Variables in the order of the API, in which each may use those before it."""
        variables = dict(IMAGE_ENVIRONMENT)
        variables["HOSTNAME"] = self.hostname
        for source in container.get("envFrom", []):
            for kind, store in (("configMapRef", self.cluster.config_maps), ("secretRef", self.cluster.secrets)):
                if kind in source:
                    variables |= self._entries(store, source[kind])
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                value = self._value_from(entry["valueFrom"])
                if value is not None:
                    variables[entry["name"]] = value
            else:
                if not isinstance(entry.get("value", ""), str):
                    raise ManifestError(f"the value of {entry['name']} must be text, got {entry['value']!r}")
                variables[entry["name"]] = expand(entry.get("value", ""), variables)
        if INDEX in self.annotations:  # of an Indexed Job; its controller appends it
            variables.setdefault("JOB_COMPLETION_INDEX", self.annotations[INDEX])
        return variables

    @staticmethod
    def _entries(store: Mapping[str, Mapping[str, str]], reference: Mapping[str, Any]) -> Mapping[str, str]:
        if reference["name"] in store:
            return store[reference["name"]]
        if reference.get("optional"):
            return {}
        raise ManifestError(f"there is no {reference['name']}, which is not optional")

    def _value_from(self, source: Mapping[str, Any]) -> str | None:
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        for kind, store in (("configMapKeyRef", self.cluster.config_maps), ("secretKeyRef", self.cluster.secrets)):
            if kind in source:
                reference = source[kind]
                value = self._entries(store, reference).get(reference["key"])
                if value is None and not reference.get("optional"):
                    raise ManifestError(f"{reference['name']} has no {reference['key']}")
                return value
        raise ManifestError(f"the stand-in does not know the source {source}")

    def _field(self, path: str) -> str:
        match = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
        if match:
            return getattr(self, match[1]).get(match[2], "")  # the API gives nothing for what is not there
        fields = {"metadata.name": self.name, "metadata.uid": self.uid, "metadata.namespace": "default"}
        fields |= {"status.podIP": self.node.address if self.node else "127.0.0.1"}
        if path not in fields:
            raise ManifestError(f"the stand-in does not know the field {path}")
        return fields[path]

    def _make_volume(self, volume: Mapping[str, Any]) -> Path:
        (kind,) = set(volume) - {"name"}
        if kind == "persistentVolumeClaim":
            claim = volume[kind]["claimName"]
            if claim not in self.cluster.claims:
                raise ManifestError(f"there is no claim {claim}")
            return self.cluster.claims[claim]
        folder = self.folder / volume["name"]
        folder.mkdir()
        if kind == "configMap":
            for name, text in self._entries(self.cluster.config_maps, volume[kind]).items():
                (folder / name).write_text(text)
        elif kind == "secret":
            secret = {"name": volume[kind]["secretName"], "optional": volume[kind].get("optional", False)}
            for name, text in self._entries(self.cluster.secrets, secret).items():
                (folder / name).write_text(text)
        elif kind not in ("emptyDir", "ephemeral"):
            raise ManifestError(f"the stand-in does not know volumes of kind {kind}")
        return folder


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# -- controllers


class Job:
    """A Job and its controller, also of completionMode Indexed."""

    def __init__(self, cluster: Cluster, manifest: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> None:
        self.cluster, self.name, self.spec = cluster, manifest["metadata"]["name"], manifest["spec"]
        _known(f"Job {self.name}", self.spec, JOB_FIELDS, JOB_UNPROVEN)
        self.template = self.spec["template"]
        if self.template["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
            raise ManifestError("restartPolicy of a Job must be Never or OnFailure")
        self.indexed = self.spec.get("completionMode") == "Indexed"
        self.completions = self.spec.get("completions", 1)
        self.parallelism = self.spec.get("parallelism", 1)
        self.labels = {"batch.kubernetes.io/job-name": self.name, "job-name": self.name, **(labels or {})}
        self.per_index = self.spec.get("backoffLimitPerIndex")
        self.backoff_limit = self.spec.get("backoffLimit", 6 if self.per_index is None else 2**31 - 1)
        self.pods: list[Pod] = []
        self.counted: set[str] = set()
        self.succeeded: set[int] = set()
        self.failures: dict[int, int] = {}
        self.failed_indexes: set[int] = set()
        self.condition, self.reason = "", ""  # Complete or Failed

    @property
    def active(self) -> list[Pod]:
        """Pods that have not come to their end."""
        return [pod for pod in self.pods if not pod.finished]

    @property
    def finished(self) -> bool:
        """Whether it is complete or has failed, and none of its pods lives."""
        return bool(self.condition) and not self.active

    def step(self) -> None:
        """What the controller does, once."""
        for pod in self.pods:
            pod.step()
            if pod.finished and pod.uid not in self.counted:
                self.counted.add(pod.uid)
                self._count(pod)
        if not self.condition:
            self._conclude()
        if self.condition:
            for pod in self.active:
                pod.terminate()
            return
        waiting = {self._index(pod) for pod in self.active}
        done = self.succeeded | self.failed_indexes | waiting
        for index in [i for i in range(self.completions) if i not in done][: self.parallelism - len(self.active)]:
            self._create(index)

    def stop(self) -> None:
        """Delete it with its pods."""
        self.condition = self.condition or "Deleted"
        for pod in self.active:
            pod.terminate()

    def _index(self, pod: Pod) -> int:
        return int(pod.annotations.get(INDEX, 0))

    def _create(self, index: int) -> None:
        suffix = uuid.uuid4().hex[:5]
        metadata: dict[str, Any] = {"labels": dict(self.labels), "annotations": dict(self.labels)}
        name = f"{self.name}-{suffix}"
        if self.indexed:
            metadata["annotations"][INDEX] = metadata["labels"][INDEX] = str(index)
            name = f"{self.name}-{index}-{suffix}"
            self.template = {**self.template, "spec": {**self.template["spec"], "hostname": f"{self.name}-{index}"}}
        self.pods.append(Pod(self.cluster, name, self.template, metadata))

    def _count(self, pod: Pod) -> None:
        index = self._index(pod)
        if pod.phase == "Succeeded":
            self.succeeded.add(index)
            return
        action = self._action(pod)
        if action == "FailJob":
            self.condition, self.reason = "Failed", "PodFailurePolicy"
        elif action == "FailIndex":
            self.failed_indexes.add(index)
        elif action == "Count":
            self.failures[index] = self.failures.get(index, 0) + 1
            if self.per_index is not None and self.failures[index] > self.per_index:
                self.failed_indexes.add(index)

    def _action(self, pod: Pod) -> str:
        """Of the first rule of the podFailurePolicy that fits."""
        for rule in self.spec.get("podFailurePolicy", {}).get("rules", []):
            _known("podFailurePolicy", rule, {"action", "onExitCodes", "onPodConditions"})
            for condition in rule.get("onPodConditions", []):
                if condition["type"] in pod.conditions and condition.get("status", "True") == "True":
                    return rule["action"]
            if "onExitCodes" in rule:
                wanted = rule["onExitCodes"]
                for name, code in pod.exit_codes.items():
                    if code and wanted.get("containerName", name) == name:
                        if (code in wanted["values"]) == (wanted["operator"] == "In"):
                            return rule["action"]
        return "Count"

    def _conclude(self) -> None:
        if len(self.succeeded) == self.completions:
            self.condition = "Complete"
        elif sum(self.failures.values()) > self.backoff_limit:
            self.condition, self.reason = "Failed", "BackoffLimitExceeded"
        elif len(self.failed_indexes) > self.spec.get("maxFailedIndexes", self.completions):
            self.condition, self.reason = "Failed", "MaxFailedIndexesExceeded"
        elif self.failed_indexes and len(self.failed_indexes | self.succeeded) == self.completions:
            self.condition, self.reason = "Failed", "FailedIndexes"


class JobSet:
    """A JobSet and its controller: all child Jobs together, and all anew when one has failed."""

    def __init__(self, cluster: Cluster, manifest: Mapping[str, Any]) -> None:
        self.cluster, self.name, self.spec = cluster, manifest["metadata"]["name"], manifest["spec"]
        _known(f"JobSet {self.name}", self.spec, JOBSET_FIELDS, JOBSET_UNPROVEN)
        network = self.spec.get("network", {})
        _known("network", network, {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"})
        self.subdomain = network.get("subdomain", self.name)
        self.policy = self.spec.get("failurePolicy", {})
        _known("failurePolicy", self.policy, {"maxRestarts", "rules", "restartStrategy"})
        if network.get("enableDNSHostnames", True):
            cluster.services.add(self.subdomain)  # its controller makes the headless Service
        self.restarts, self.condition, self.reason = 0, "", ""
        self.pods_before: list[Pod] = []
        self.jobs = self._create()

    @property
    def pods(self) -> list[Pod]:
        """All pods that there ever were."""
        return self.pods_before + [pod for job in self.jobs for pod in job.pods]

    @property
    def active(self) -> list[Pod]:
        """Pods that have not come to their end."""
        return [pod for job in self.jobs for pod in job.active]

    @property
    def finished(self) -> bool:
        """Whether it is complete or has failed, and none of its pods lives."""
        return bool(self.condition) and not self.active

    def step(self) -> None:
        """What the controller does, once."""
        for job in self.jobs:
            job.step()
        if self.condition:
            return
        failed = next((job for job in self.jobs if job.condition == "Failed"), None)
        if failed is not None:
            if self._action(failed) == "FailJobSet" or self.restarts >= self.policy.get("maxRestarts", 0):
                self.condition, self.reason = "Failed", failed.reason
            for job in self.jobs:
                job.stop()
            if not self.condition and not self.active:  # the new ones come when the old ones are gone
                self.restarts += 1
                self.pods_before = self.pods
                self.jobs = self._create()
        elif all(job.condition == "Complete" for job in self.jobs):
            self.condition = "Complete"

    def _action(self, job: Job) -> str:
        for rule in self.policy.get("rules", []):
            _known("rule of the failurePolicy", rule, {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"})
            if job.reason in rule.get("onJobFailureReasons", [job.reason]):
                return rule["action"]
        return "RestartJobSet"

    def _create(self) -> list[Job]:
        jobs = []
        for replicated in self.spec["replicatedJobs"]:
            _known("replicatedJob", replicated, {"name", "replicas", "template"})
            for number in range(replicated.get("replicas", 1)):
                manifest = copy.deepcopy(replicated["template"])
                name = f"{self.name}-{replicated['name']}-{number}"
                manifest["metadata"] = {**manifest.get("metadata", {}), "name": name}
                manifest["spec"]["completionMode"] = "Indexed"
                manifest["spec"]["template"]["spec"]["subdomain"] = self.subdomain
                prefix = "jobset.sigs.k8s.io/"
                labels = {
                    f"{prefix}jobset-name": self.name,
                    f"{prefix}replicatedjob-name": replicated["name"],
                    f"{prefix}replicatedjob-replicas": str(replicated.get("replicas", 1)),
                    f"{prefix}job-index": str(number),
                    f"{prefix}restart-attempt": str(self.restarts),
                }
                jobs.append(Job(self.cluster, manifest, labels))
        return jobs


class Cluster:
    """Volumes, ConfigMaps and controllers.

    Args:
        folder: of the pods.
        claims: PersistentVolumeClaim -> folder.
        processes: what ``PET_NPROC_PER_NODE`` becomes, whatever the manifest says.
        namespaces: give each pod with a subdomain a network namespace of its own; else all share the loopback, and the
            address and the port of the master are replaced.
    """

    def __init__(self, folder: Path, claims: Mapping[str, Path], processes: int = 2, namespaces: bool = False) -> None:
        self.folder, self.claims, self.processes = folder, dict(claims), processes
        folder.mkdir(parents=True, exist_ok=True)
        self.network = Network(folder) if namespaces else None
        self.config_maps: dict[str, dict[str, str]] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.services: set[str] = set()
        self.workloads: dict[str, Job | JobSet] = {}
        self._ports: dict[str, str] = {}

    def apply(self, manifests: Sequence[Mapping[str, Any]]) -> Job | JobSet:
        """As ``kubectl apply``; returns the last workload."""
        kinds = {"Job": Job, "JobSet": JobSet}
        workload = None
        for manifest in sorted(manifests, key=lambda manifest: manifest["kind"] in kinds):
            kind, name = manifest["kind"], manifest["metadata"]["name"]
            if kind == "ConfigMap":
                self.config_maps[name] = dict(manifest["data"])
            elif kind == "Secret":
                self.secrets[name] = dict(manifest["stringData"])
            elif kind == "Service":
                self.services.add(name)
            elif kind in kinds:
                workload = self.workloads[name] = kinds[kind](self, manifest)
            elif kind != "PersistentVolumeClaim":  # those are given
                raise ManifestError(f"the stand-in does not know the kind {kind}")
        if workload is None:
            raise ManifestError("there is no workload among the manifests")
        return workload

    def until(self, condition: Callable[[], object], timeout: float = 240) -> None:
        """Go on until a condition holds.

        Raises:
            TimeoutError: it did not come; tells what the pods said.
        """
        end = time.monotonic() + timeout
        while not condition():
            for workload in self.workloads.values():
                workload.step()
            if time.monotonic() > end:
                raise TimeoutError(self.logs())
            time.sleep(0.01)

    def finish(self, workload: Job | JobSet) -> str:
        """Go on until a workload has come to its end; returns its condition."""
        self.until(lambda: workload.finished)
        return workload.condition

    def logs(self) -> str:
        """What all pods have printed."""
        pods = [pod for workload in self.workloads.values() for pod in workload.pods]
        return "\n".join(pod.log + "".join(container.log for container in pod.running.values()) for pod in pods)

    def attach(self, pod: Pod) -> Node | None:
        """A node for a pod that has a name which others call it by."""
        subdomain = pod.spec.get("subdomain")
        if subdomain is None:
            return None
        if subdomain not in self.services:
            raise ManifestError(f"no headless Service {subdomain}, whose name the pods' addresses end with")
        if self.network is None:
            return None
        return self.network.add(pod.hostname, [f"{pod.hostname}.{subdomain}"])

    def free_port(self, port: str) -> str:
        """The same free port for the same one of a manifest."""
        if port not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[port] = str(probe.getsockname()[1])
        return self._ports[port]

    def close(self) -> None:
        """End all that runs."""
        for workload in self.workloads.values():
            for pod in workload.pods:
                pod.lose()
                for container in pod.running.values():
                    container.end()
        if self.network is not None:
            self.network.close()


@contextlib.contextmanager
def cluster(folder: Path, claims: Mapping[str, Path], **settings: Any) -> Iterator[Cluster]:
    """A :class:`Cluster` that ends with the block."""
    made = Cluster(folder, claims, **settings)
    try:
        yield made
    finally:
        made.close()


def change_arguments(manifests: Sequence[Mapping[str, Any]], key: str, overlay: str, **settings: Any) -> list[dict]:
    """Rendered manifests whose ConfigMap holds an args file with a smaller training in it.

    Args:
        manifests: as rendered; they are not changed.
        key: the args file, a key of one of the ConfigMaps.
        overlay: config file that is laid over the others.
        settings: overrides.
    """
    changed = copy.deepcopy(list(manifests))
    found = [manifest for manifest in changed if manifest["kind"] == "ConfigMap" and key in manifest["data"]]
    if len(found) != 1:
        raise ManifestError(f"{key} must lie in one ConfigMap, it lies in {len(found)}")
    arguments = json.loads(found[0]["data"][key])
    files = arguments["config_file"]
    files = [files] if isinstance(files, str) else files
    arguments["config_file"] = [files[0], overlay, *files[1:]]
    found[0]["data"][key] = json.dumps({**arguments, **settings})
    return changed
