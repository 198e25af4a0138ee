"""Bundles as one archive, as MONAI's zoo has them: written to the same bytes each time, read without trust."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path

from medgen.errors import UserError
from medgen.output import atomic_file

__all__ = ["BUNDLE_NAME", "BUNDLE_PARTS", "COMPANIONS", "GENERATOR_PARTS", "bundle_files", "read_zip", "write_zip"]

# a bundle folder also holds outputs, checkpoints and perhaps images of patients: only these ever leave it
BUNDLE_PARTS = ("LICENSE", "configs", "docs", "models/model.pt")
# what a training puts beside its weights (medgen.handlers.ModelCompanions): what they are of no use without, and whose
# images they saw
COMPANIONS = ("models/autoencoder.pt", "models/scaling.json", "models/trained_as.json", "models/trained_on.json")
# the bundle of the generator that an inversion encoder was trained for, should it lie in the encoder's
GENERATOR_PARTS = tuple(f"generator/{part}" for part in BUNDLE_PARTS)

MOST_MEMBERS = 100_000
MOST_EXPANSION = 100  # bytes out of a byte of the archive; configs compress to a tenth, weights hardly at all
DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip archive can hold

BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def bundle_files(bundle: str | Path) -> dict[str, Path]:
    """The files of a bundle that may leave its folder.

    Args:
        bundle: the folder.

    Returns:
        Their names in the bundle, with ``/``, sorted, and where they are.
    """
    root = Path(bundle)
    found: dict[str, Path] = {}
    for part in (*BUNDLE_PARTS, *COMPANIONS, *GENERATOR_PARTS):
        for path in (root / part, *(root / part).rglob("*")):
            name = path.relative_to(root)
            if path.is_file() and path.suffix != ".pyc" and not any(step.startswith(".") for step in name.parts):
                found[name.as_posix()] = path
    return dict(sorted(found.items()))


def write_zip(bundle: str | Path, target: str | Path) -> Path:
    """Write the files of a bundle into a zip archive, below a folder of the bundle's name.

    The same files give the same bytes, on any machine and at any time: sorted, without dates, owners and compression
    (weights have none to gain, and a compressor's bytes differ from version to version).

    Args:
        bundle: the folder.
        target: the archive; one that is there is replaced.

    Returns:
        The archive.

    Raises:
        UserError: the folder has no files of a bundle, or the archive cannot be written.
    """
    root, target = Path(bundle).resolve(), Path(target)
    files = bundle_files(root)
    if not files:
        raise UserError(f"expected a bundle's folder with {', '.join(BUNDLE_PARTS)}, got {bundle}; name another")
    try:
        with atomic_file(target) as file, zipfile.ZipFile(file, "w") as archive:
            for name, path in files.items():
                member = zipfile.ZipInfo(f"{root.name}/{name}", DATE)
                member.create_system = 3  # Unix, whatever this machine is
                member.external_attr = (stat.S_IFREG | 0o644) << 16
                member.file_size = path.stat().st_size  # more than 4 GiB need another header
                with open(path, "rb") as source, archive.open(member, "w") as copy:
                    shutil.copyfileobj(source, copy, 2**20)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}); choose another --output") from error
    return target


def read_zip(archive: str | Path, folder: str | Path) -> Path:
    """Extract the bundle of a zip archive, all of it or nothing.

    Args:
        archive: file with one folder in it, such as :func:`write_zip` writes and MONAI's zoo has.
        folder: where to put that folder; made if need be.

    Returns:
        The bundle's folder, ``folder/NAME``.

    Raises:
        UserError: no zip archive or a damaged one, several or no folders at its top, a member that would lie outside
            of it, is no plain file or is compressed in another way than by deflate, too many members, more bytes than
            such an archive can hold, or a folder of that name is there.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        with zipfile.ZipFile(archive) as opened:
            name = _check_members(archive, opened)
            target = folder / name
            if target.exists() or target.is_symlink():
                raise UserError(f"{archive} holds a bundle {name}, and {target} is there; choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
                for member in opened.infolist():
                    opened.extract(member, temporary)
                os.replace(Path(temporary) / name, target)
    except OSError as error:
        raise UserError(
            f"{archive} cannot be extracted to {folder} ({error.strerror or error}); name an archive that is there "
            "and a folder that can be written to"
        ) from error
    # RuntimeError: encrypted
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{archive} must be a zip archive of a bundle, got a damaged or other file ({reason})"
        ) from error
    return target


def _check_members(archive: Path, opened: zipfile.ZipFile) -> str:
    """See that every member is a plain file or folder within one folder; returns that one's name."""
    members = opened.infolist()

    def refuse(reason: str) -> UserError:
        return UserError(f"{archive} is not extracted: {reason}; nothing of it was written")

    if len(members) > MOST_MEMBERS:
        raise refuse(f"it has {len(members)} members, a bundle has at most {MOST_MEMBERS}")
    size = archive.stat().st_size
    if sum(m.compress_size for m in members) > size or sum(m.file_size for m in members) > MOST_EXPANSION * size:
        raise refuse(f"its {size} bytes claim to hold {sum(m.file_size for m in members)}, which no bundle does")
    tops, seen = set(), set()
    for member in members:
        # as it is written: zipfile's own name is cut at a NUL or taken from elsewhere, and its extraction drops parts
        name = member.orig_filename
        steps = name.removesuffix("/").split("/")
        if (
            name != member.filename
            or not name.isprintable()
            or re.search(r"[\\:]", name)
            or any(step in ("", ".", "..") for step in steps)
        ):
            raise refuse(f"it has a member {name!r:.100} that would lie outside its folder")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
            raise refuse(f"its member {name!r:.100} is a link or something else that is no plain file")
        # of the others Python unpacks what a few bytes hold at once, whatever size they claim
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"its member {name!r:.100} is compressed in another way than by deflate")
        if not member.is_dir():
            # on some systems A and a are one file
            if name.casefold() in seen:
                raise refuse(f"it has two members {name!r:.100}")
            seen.add(name.casefold())
            if len(steps) == 1:
                raise refuse(f"its member {name!r:.100} lies beside the folder of the bundle")
        tops.add(steps[0])
    if len(tops) != 1 or not BUNDLE_NAME.fullmatch(min(tops)):
        shown = ", ".join(f"{top!r:.40}" for top in sorted(tops)[:4]) or "nothing"
        raise refuse(f"it must hold one folder with the name of a bundle, got {shown}")
    return min(tops)
