"""Archives of bundles: the same bytes each time, only what may leave a bundle, and nothing outside of the folder."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from medgen import bundle_zip
from medgen.bundle_zip import bundle_files, read_zip, write_zip
from medgen.errors import UserError

FILES = {
    "LICENSE": "free",
    "configs/inference.json": "{}",
    "configs/metadata.json": '{"version": "1"}',
    "docs/README.md": "# readme",
    "models/model.pt": "weights",
    "models/scaling.json": "[1]",
}
PRIVATE = ["output/patient.png", "models/checkpoints/last.pt", "models/other.pt", "configs/.secret", "docs/.git/x"]


def make_bundle(folder: Path) -> Path:
    for name, text in {**FILES, **dict.fromkeys(PRIVATE, "private")}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def test_archive_holds_the_files_of_a_bundle_alone(tmp_path):
    archive = write_zip(make_bundle(tmp_path / "lungs"), tmp_path / "out" / "lungs.zip")

    with zipfile.ZipFile(archive) as opened:
        assert opened.namelist() == sorted(f"lungs/{name}" for name in FILES)
        assert {name: opened.read(f"lungs/{name}").decode() for name in FILES} == FILES
    assert list(bundle_files(tmp_path / "lungs")) == sorted(FILES)


def test_same_files_give_the_same_bytes_whenever_and_wherever(tmp_path):
    first = make_bundle(tmp_path / "a" / "lungs")
    second = make_bundle(tmp_path / "b" / "lungs")
    for path in second.rglob("*"):
        os.utime(path, (1e9, 1e9))
        path.chmod(0o700)

    digests = [
        hashlib.sha256(write_zip(folder, tmp_path / f"{number}.zip").read_bytes()).hexdigest()
        for number, folder in enumerate((first, second))
    ]

    # of bytes that no version of this code, of Python or of zlib may change: others have published them
    assert digests == ["ae6ae7b7c7af98b7f882f0c28aa431d1bf4b0f5d01c399a696a63caeffef71f9"] * 2


def test_linked_weights_travel_as_their_content(tmp_path):
    bundle = make_bundle(tmp_path / "lungs")
    (bundle / "models" / "model.pt").unlink()
    (tmp_path / "elsewhere.pt").write_text("linked")
    (bundle / "models" / "model.pt").symlink_to(tmp_path / "elsewhere.pt")

    read = read_zip(write_zip(bundle, tmp_path / "lungs.zip"), tmp_path / "new")

    assert (read / "models" / "model.pt").read_text() == "linked"
    assert not (read / "models" / "model.pt").is_symlink()


def test_reading_gives_back_what_was_written(tmp_path):
    archive = write_zip(make_bundle(tmp_path / "lungs"), tmp_path / "lungs.zip")

    read = read_zip(archive, tmp_path / "deep" / "folder")

    assert read == tmp_path / "deep" / "folder" / "lungs"
    assert {path.relative_to(read).as_posix(): path.read_text() for path in read.rglob("*") if path.is_file()} == FILES
    assert os.listdir(read.parent) == ["lungs"]


def test_archive_with_folders_and_compression_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("lungs")
        archive.writestr("lungs/LICENSE", "x" * 500)

    assert (read_zip(tmp_path / "b.zip", tmp_path / "new") / "LICENSE").read_text() == "x" * 500


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("b/x", b""), ("b/../../evil", b"")], "member 'b/../../evil' that would lie outside"),
        ([("/etc/evil", b"")], "member '/etc/evil' that would lie outside"),
        ([("b/x", b""), ("../evil", b"")], "member '../evil' that would lie outside"),
        ([("b\\..\\..\\evil", b"")], "that would lie outside"),
        ([("C:/evil", b"")], "that would lie outside"),
        ([("b//evil", b"")], "that would lie outside"),
        ([("b/a\x1b[2J", b"")], "that would lie outside"),
        ([("b/x", b""), (link("b/link"), b"/etc/passwd")], "'b/link' is a link"),
        ([("b/x", b""), ("c/x", b"")], "must hold one folder with the name of a bundle, got 'b', 'c'"),
        ([("x", b"")], "'x' lies beside the folder"),
        ([(".b/x", b"")], "must hold one folder with the name of a bundle, got '.b'"),
        ([], "must hold one folder with the name of a bundle, got nothing"),
        ([("b/x", b"1"), ("b/X", b"2")], "two members 'b/X'"),
        ([("b/x", b"1"), ("b/x/y", b"2")], "cannot be extracted"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archive_that_reaches_out_is_refused(tmp_path, members, message):
    archive = make_zip(tmp_path / "b.zip", *members)

    with pytest.raises(UserError) as caught:
        read_zip(archive, tmp_path / "in" / "new")

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != archive]


def test_bomb_is_refused_before_anything_is_written(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/x", bytes(10**6))

    with pytest.raises(UserError, match="claim to hold 1000000, which no bundle does"):
        read_zip(tmp_path / "b.zip", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_unpacks_without_a_limit_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", method) as archive:
        archive.writestr("b/configs/metadata.json", b"{}" * 50)

    with pytest.raises(UserError, match=r"'b/configs/metadata\.json' is compressed in another way than by deflate"):
        read_zip(tmp_path / "b.zip", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_size_that_is_understated_is_no_way_around(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/x", bytes(10**6))
    content = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(content.replace(struct.pack("<L", 10**6), struct.pack("<L", 10)))

    with pytest.raises(UserError, match="must be a zip archive of a bundle, got a damaged or other file"):
        read_zip(tmp_path / "b.zip", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_zip, "MOST_MEMBERS", 3)
    archive = make_zip(tmp_path / "b.zip", *[(f"b/{number}", b"") for number in range(4)])

    with pytest.raises(UserError, match="it has 4 members, a bundle has at most 3"):
        read_zip(archive, tmp_path / "new")


@pytest.mark.parametrize("damage", ["other", "cut", "flipped", "absent"])
def test_damaged_archive_is_one_line_and_leaves_nothing(tmp_path, damage):
    archive = write_zip(make_bundle(tmp_path / "lungs"), tmp_path / "lungs.zip")
    content = archive.read_bytes()
    changed = {"other": b"no zip", "cut": content[:-40], "flipped": content.replace(b"weights", b"Weights", 1)}
    archive.unlink() if damage == "absent" else archive.write_bytes(changed[damage])

    with pytest.raises(UserError) as caught:
        read_zip(archive, tmp_path / "new")

    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / "lungs").exists()


def test_folder_that_is_there_is_kept(tmp_path):
    archive = write_zip(make_bundle(tmp_path / "lungs"), tmp_path / "lungs.zip")

    with pytest.raises(UserError, match="holds a bundle lungs, and"):
        read_zip(archive, tmp_path)
    assert (tmp_path / "lungs" / "output" / "patient.png").exists()


def test_folder_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a bundle's folder with LICENSE"):
        write_zip(tmp_path, tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()
