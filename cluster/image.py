"""What the image will hold, read out of Dockerfile and .dockerignore: ``python cluster/image.py files|env``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # what the base image sets, as far as it matters


def pattern_to_regex(pattern: str) -> re.Pattern[str]:
    """A pattern of .dockerignore as a regular expression over whole paths: ``**`` crosses folders, ``*`` does not."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(parts.get(word) or re.escape(word) for word in words))


def context_files(root: Path = ROOT) -> Iterator[str]:
    """Files that .dockerignore lets through to the builder.

    The last pattern that matches a path or one of its parents decides, as in docker's own matcher.

    Args:
        root: the repository.

    Yields:
        Names from the root, with ``/``, sorted within each folder.
    """
    rules = []
    for line in (root / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            rules.append((pattern_to_regex(line.strip().removeprefix("!").strip("/")), line.startswith("!")))
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            name = (Path(folder) / file).relative_to(root)
            steps = [name.as_posix(), *(parent.as_posix() for parent in name.parents[:-1])]
            passes = True
            for regex, allows in rules:
                if any(regex.fullmatch(step) for step in steps):
                    passes = allows
            if passes:
                yield name.as_posix()


def environment(dockerfile: Path = ROOT / "cluster" / "Dockerfile") -> dict[str, str]:
    """Variables of a container, as the ENV lines of a Dockerfile's last stage set them on top of :data:`BASE`."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8")))
    last_stage = re.split(r"(?m)^FROM ", text)[-1]
    variables = dict(BASE)
    for line in re.findall(r"(?m)^ENV (.*)$", last_stage):
        for name, value in (setting.split("=", 1) for setting in line.split()):
            variables[name] = re.sub(r"\$\{(\w+)\}", lambda found: variables.get(found[1], ""), value)
    return variables


if __name__ == "__main__":
    if sys.argv[1:] == ["files"]:
        print(*context_files(), sep="\n")
    elif sys.argv[1:] == ["env"]:
        print(*(f"{name}={value}" for name, value in environment().items()), sep="\n")
    else:
        sys.exit("expected files or env; run: python cluster/image.py files")
