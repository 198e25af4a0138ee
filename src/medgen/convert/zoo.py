"""A bundle as MONAI's model zoo holds it: an archive with its checksum, and a folder whose weights lie elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from medgen.bundle_zip import BUNDLE_NAME, write_zip
from medgen.data.image_set import file_sha256
from medgen.errors import UserError
from medgen.output import atomic_write_text
from medgen.registry.contents import check_weights, read_json, stage_bundle

__all__ = ["PushedBundle", "push_bundle"]

LARGE_FILES = "large_files.yml"
FILES = "files"

_VERSION = re.compile(r"\d+(\.[0-9A-Za-z]+){0,4}")


class PushedBundle(NamedTuple):
    """What was written.

    Attributes:
        archive: ``NAME_vVERSION.zip``; its checksum lies beside it, as ``sha256sum --check`` reads it.
        sha256: of the archive.
        folder: the bundle without its weights, with ``large_files.yml``; None without a URL.
        large_files: the weights, under the names that their URLs end in.
    """

    archive: Path
    sha256: str
    folder: Path | None
    large_files: tuple[Path, ...]


def push_bundle(
    bundle: str | Path,
    output: str | Path,
    url: str | None = None,
    overlays: Sequence[str | Path] = (),
    weights: str | Path | None = None,
    force: bool = False,
    name: str | None = None,
) -> PushedBundle:
    """Write a bundle for others to fetch.

    Weights are read with ``weights_only=True`` and compared with the network before anything is written. What travels
    is what a registration takes. The same bundle gives the same bytes.

    Args:
        bundle: its folder.
        output: folder to write into.
        url: where the folder ``files`` in it will be served; with it the bundle is written as a folder as well,
            without its weights, which ``python -m monai.bundle download_large_files`` then fetches and checks.
        overlays: JSON files to put into its configs: what the weights were trained with.
        weights: state dict to take for ``models/model.pt``, with what lies beside it.
        force: replace what is there.
        name: of the bundle; default: that of its folder.

    Returns:
        What was written.

    Raises:
        UserError: a file of the bundle is missing or wrong, the URL is none, or the output is there.
    """
    root, output = Path(bundle).resolve(), Path(output)
    if not root.is_dir():
        raise UserError(f"expected a bundle's folder, got {bundle}, which is none; name another")
    if url is not None:
        url = _checked_url(url)
    version = str(read_json(root / "configs" / "metadata.json").get("version", ""))
    if not _VERSION.fullmatch(version):
        raise UserError(f"version in configs/metadata.json must be like 0.1.0, got {version!r:.40}; correct it")
    name = root.name if name is None else name
    if not BUNDLE_NAME.fullmatch(name):
        raise UserError(f"a bundle's name must be letters, digits, _, - and ., got {name!r:.40}; rename its folder")
    stem = f"{name}_v{version}"
    archive, folder = output / f"{stem}.zip", output / name
    if folder.resolve() == root:
        raise UserError(f"--output must lie elsewhere than the bundle, got {output}, which holds it; choose another")
    for path in (archive, *([folder] if url else [])):
        if path.exists() and not force:
            raise UserError(f"--output must not hold this bundle yet, got {path}; choose another or add --force")
    if url and folder.exists() and not (folder / LARGE_FILES).is_file():
        # a folder that somebody works in is not replaced by any option
        raise UserError(f"{folder} is there without {LARGE_FILES}, so not from here; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".push-", dir=output) as temporary:
            staged = Path(temporary) / name
            stage_bundle(root, staged, overlays, weights)
            check_weights(staged)
            write_zip(staged, archive)
            digest = file_sha256(archive)
            atomic_write_text(archive.with_name(f"{archive.name}.sha256"), f"{digest}  {archive.name}\n")
            large = _move_large_files(staged, output / FILES, stem, url) if url else ()
            if url:
                if folder.exists():
                    shutil.rmtree(folder)
                os.replace(staged, folder)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}); choose another --output") from error
    return PushedBundle(archive, digest, folder if url else None, large)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        # not shown: it may be a secret
        raise UserError(
            "--url must be an address alone, got a user, a password, a query or a fragment with it: everybody who has "
            "the bundle would read it; leave it out"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--url must be like https://host/path, where {FILES} will be served, got {url}; correct it")
    return url.rstrip("/")


def _move_large_files(staged: Path, files: Path, stem: str, url: str) -> tuple[Path, ...]:
    """Take the weights out of a bundle and leave the list of them, as MONAI's ``download_large_files`` reads it."""
    files.mkdir(exist_ok=True)
    entries, moved = [], []
    for path in sorted(staged.rglob("*.pt")):
        # an encoder's bundle holds its generator's, with a models/model.pt of its own
        parts = [part for part in path.relative_to(staged).parts if part != "models"]
        target = files / "_".join([stem, *parts])
        entries.append(
            {
                "path": path.relative_to(staged).as_posix(),
                "url": f"{url}/{quote(target.name)}",
                "hash_val": file_sha256(path),
                "hash_type": "sha256",
            }
        )
        os.replace(path, target)
        moved.append(target)
    # strings in JSON's quotes are strings in YAML, whatever they hold
    lines = ["large_files:"]
    for entry in entries:
        texts = [f"{key}: {json.dumps(value)}" for key, value in entry.items()]
        lines += [f"  - {texts[0]}", *(f"    {text}" for text in texts[1:])]
    (staged / LARGE_FILES).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tuple(moved)
