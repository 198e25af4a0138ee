"""Takes the place of Run:ai's command line: knows the flags of its second version, refuses others, records the rest.

Flags and their types are those of the reference of version 2.25 and later (training standard submit, training pytorch
submit and workload submit at docs.nvidia.com/run-ai/self-hosted/reference/cli/runai). What an early version 2, or
version 1, took is refused with a hint. Where RUNAI_RECORD names a file, each call adds a line of JSON to it: verb,
name, flags and command.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
FORMS = {
    "string": r"(?s).+",
    "name": NAME,
    "int32": r"-?[0-9]+",
    "int": r"[0-9]+",
    "ints": r"[0-9]+(,[0-9]+)*",
    "positiveInt": r"[1-9][0-9]*",
    "positiveFloat": r"(?!0*\.?0*$)[0-9]+(\.[0-9]+)?",
    "memory": r"[0-9]+(\.[0-9]+)?([KMGT]i?)?",
    "duration": r"([0-9]+(\.[0-9]+)?(ms|s|m|h))+",
    "variable": r"(?s)[A-Za-z_][A-Za-z0-9_]*=.*",
    "secret": rf"[A-Za-z_][A-Za-z0-9_]*={NAME},key=[-A-Za-z0-9._]+",
    "pvc": rf"claimname={NAME}(\.{NAME})*,path=/[^,]*",
    "restart-policy": "Always|OnFailure|Never",
    "pull-policy": "Always|IfNotPresent|Never",
    "pod-policy": "None|All|Running",
    "preemptibility": "preemptible|non-preemptible",
    "priority": "very-low|low|medium-low|medium|medium-high|high|very-high",
    "request-type": "portion|memory",
    "seccomp": "RuntimeDefault|Unconfined|Localhost",
    "user-source": "fromTheImage|fromIdpToken",
    "mnnvl": "None|Preferred|Required",
    "topology": r"[^=\s]+=\S+",
    "fields": r"[a-z-]+(=[^,]*)?(,[a-z-]+(=[^,]*)?)*",
}
SWITCHES = """allow-privilege-escalation attach command create-home-dir host-ipc host-network large-shm privileged
    run-as-non-root run-as-user stdin tty help debug quiet verbose""".split()
# name of a flag: form of its value; * where it may be given several times
COMMON = {
    **dict.fromkeys(SWITCHES, "switch"),
    **dict.fromkeys(["annotation", "capability", "env-my-credentials", "exclude-node", "extended-resource"], "string*"),
    **dict.fromkeys(["image-pull-my-credentials", "label", "env-pod-field-ref"], "string*"),
    **dict.fromkeys(["compute", "image", "template", "working-dir", "config-file", "config-path"], "string"),
    **dict.fromkeys(
        ["configmap-map-volume", "datasource", "datavolume", "empty-dir-volume", "external-url"], "fields*"
    ),
    **dict.fromkeys(
        ["git-sync", "host-path", "new-pvc", "nfs", "port", "s3", "secret-volume", "toleration"], "fields*"
    ),
    **dict.fromkeys(
        ["cpu-core-limit", "cpu-core-request", "gpu-portion-limit", "gpu-portion-request"], "positiveFloat"
    ),
    **dict.fromkeys(["cpu-memory-limit", "cpu-memory-request", "gpu-memory-limit", "gpu-memory-request"], "memory"),
    **dict.fromkeys(["auto-deletion-time-after-completion", "pod-running-timeout"], "duration"),
    **dict.fromkeys(["termination-grace-period", "wait-for-submit"], "duration"),
    **dict.fromkeys(["preferred-pod-topology-key", "required-pod-topology-key"], "topology"),
    "backoff-limit": "int32",
    "env-secret": "secret*",
    "environment": "name*",  # an asset of Run:ai, not a variable
    "environment-variable": "variable*",
    "existing-pvc": "pvc*",
    "gpu-devices-request": "positiveInt",
    "gpu-request-type": "request-type",
    "image-pull-policy": "pull-policy",
    "name-prefix": "name",
    "node-pools": "name*",
    "node-type": "string",
    "preemptibility": "preemptibility",
    "priority": "priority",
    "project": "name",
    "restart-policy": "restart-policy",
    "run-as-gid": "int",
    "run-as-uid": "int",
    "seccomp-profile": "seccomp",
    "supplemental-groups": "ints",
    "user-group-source": "user-source",
}
STANDARD = {**COMMON, "parallelism": "int32", "runs": "int32"}
PYTORCH = {
    **COMMON,
    **dict.fromkeys(["master-args", "master-command"], "string"),
    **dict.fromkeys(["master-cpu-core-limit", "master-cpu-core-request"], "positiveFloat"),
    **dict.fromkeys(["master-gpu-portion-limit", "master-gpu-portion-request"], "positiveFloat"),
    **dict.fromkeys(["master-cpu-memory-limit", "master-cpu-memory-request"], "memory"),
    "clean-pod-policy": "pod-policy",
    "master-environment-variable": "variable*",
    "master-extended-resource": "string*",
    "master-gpu-devices-request": "positiveInt",
    "master-no-pvcs": "switch",
    "master-restart-policy": "restart-policy",
    "workers": "int32",
}
WORKLOAD = {
    **dict.fromkeys(["help", "debug", "quiet", "verbose"], "switch"),
    **dict.fromkeys(["category", "config-file", "config-path"], "string"),
    "file": "string",
    "mnnvl": "mnnvl",
    "name-prefix": "name",
    "priority": "priority",
    "project": "name",
}
VERBS = {
    ("training", "standard", "submit"): STANDARD,
    ("training", "submit"): STANDARD,
    ("training", "pytorch", "submit"): PYTORCH,
    ("pytorch", "submit"): PYTORCH,
    ("workload", "submit"): WORKLOAD,
}
SHORT = {"c": "command", "e": "environment-variable", "f": "file", "g": "gpu-devices-request", "h": "help"}
SHORT |= {"i": "image", "p": "project", "t": "tty", "d": "debug", "q": "quiet"}
# what used to be, and what has become of it
FORMER = {
    "gpu": "gpu-devices-request",
    "gpu-memory": "gpu-memory-request",
    "cpu": "cpu-core-request",
    "cpu-limit": "cpu-core-limit",
    "memory": "cpu-memory-request",
    "memory-limit": "cpu-memory-limit",
    "volume": "existing-pvc or --host-path",
    "pvc": "existing-pvc",
    "job-name-prefix": "name-prefix",
    "node-pool": "node-pools",
    "preemptible": "preemptibility",
    "completions": "runs",
    "configmap-volume": "configmap-map-volume",
}


class RefusedError(Exception):
    """What runai would not take."""


def parse(argv: list[str]) -> dict[str, Any]:
    """A call, taken apart.

    Args:
        argv: the words after ``runai``.

    Returns:
        ``verb`` and ``command`` as lists of words, ``name``, and ``flags``: names to True, a text, or a list of texts.

    Raises:
        RefusedError: an unknown verb or flag, a value of another form, or something that is missing.
    """
    verb = next((verb for verb in VERBS if tuple(argv[: len(verb)]) == verb), None)
    if verb is None:
        hint = "; version 2 says runai training standard submit" if argv[:1] == ["submit"] else ""
        raise RefusedError(f"unknown command {' '.join(argv[:3])!r}{hint}")
    table, words = VERBS[verb], argv[len(verb) :]
    command: list[str] | None = None
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    flags: dict[str, Any] = {}
    names: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            names.append(word)
            continue
        name, form, value = _flag(word, table, rest)
        if form.endswith("*"):
            flags.setdefault(name, []).append(value)
        elif name in flags:
            raise RefusedError(f"--{name} is given twice")
        else:
            flags[name] = value
    _complete(verb, names, flags, command)
    return {
        "verb": list(verb),
        "name": (names or [flags.get("name-prefix")])[0],
        "flags": flags,
        "command": command or [],
    }


def _flag(word: str, table: dict[str, str], rest: Any) -> tuple[str, str, Any]:
    """Name, form and value of a flag, whose value may be the next word."""
    given, equals, value = word.partition("=")
    name = given[2:] if given.startswith("--") else SHORT.get(given[1:], "")
    if name not in table:
        hint = f"; it is --{FORMER[name]} now" if name in FORMER else ""
        raise RefusedError(f"unknown flag: {given}{hint}")
    form = table[name]
    if form == "switch":
        if equals and value not in ("true", "false"):
            raise RefusedError(f"invalid argument {value!r} for --{name}: true or false")
        return name, form, not equals or value == "true"
    if not equals:
        value = next(rest, None)
        if value is None:
            raise RefusedError(f"flag needs an argument: {given}")
    if not re.fullmatch(FORMS[form.rstrip("*")], value):
        hint = " (a variable is set by -e or --environment-variable)" if name == "environment" else ""
        raise RefusedError(f"invalid argument {value!r} for --{name}: expected {form}{hint}")
    return name, form, value


def _complete(verb: tuple[str, ...], names: list[str], flags: dict[str, Any], command: list[str] | None) -> None:
    """See that nothing is missing, and that the command outlives Run:ai's single string of it."""
    if len(names) > 1:
        raise RefusedError(f"expected one name, got {' '.join(names)}; the command stands after --")
    if names and not re.fullmatch(NAME, names[0]):
        raise RefusedError(f"invalid name {names[0]!r}")
    missing: Callable[[str], bool] = lambda name: name not in flags  # noqa: E731
    if missing("project"):
        raise RefusedError("no --project")
    if verb[0] == "workload":
        if missing("file") or not Path(flags["file"]).is_file():
            raise RefusedError(f"--file must name a manifest, got {flags.get('file')}")
        return
    if not names and missing("name-prefix"):
        raise RefusedError("no name of the workload")
    if all(missing(name) for name in ("image", "template", "environment")):
        raise RefusedError("no --image")
    if flags.get("command") and not command:
        raise RefusedError("--command without a command after --")
    for word in command or []:
        if not re.fullmatch(r"[A-Za-z0-9_./:=@,+-]+", word):
            raise RefusedError(f"{word!r} of the command needs quotes, which are lost on the way to the pod")


def main() -> None:
    """Take a call, or refuse it with exit code 1."""
    try:
        call = parse(sys.argv[1:])
    except RefusedError as error:
        sys.exit(f"Error: {error}")
    if "file" in call["flags"]:
        call["manifest"] = Path(call["flags"]["file"]).read_text()
    if record := os.environ.get("RUNAI_RECORD"):
        with open(record, "a") as file:
            file.write(json.dumps(call) + "\n")
    print(f"Creating workload {call['name']}...")


if __name__ == "__main__":
    main()
