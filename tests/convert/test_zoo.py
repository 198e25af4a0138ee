"""Bundles in the layout of MONAI's model zoo: what MONAI itself downloads, extracts and verifies."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from monai.apps import extractall
from monai.bundle import download_large_files, verify_metadata
from typer.testing import CliRunner

from medgen import cli
from medgen.bundle_config import build_network
from medgen.bundle_zip import read_zip
from medgen.data.image_set import file_sha256

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "lung_segmentation"
DEMO = BUNDLE / "configs" / "demo.json"
NAME = f"lung_segmentation_v{json.loads((BUNDLE / 'configs' / 'metadata.json').read_text())['version']}"
runner = CliRunner()
pytestmark = pytest.mark.filterwarnings("ignore:No hash value provided:UserWarning")  # of the schema alone


class Run:
    def __init__(self, mark: object) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def push(bundle: Path, output: Path, *options: object):
    return runner.invoke(cli.app, ["convert", "push", *map(str, [bundle, "--output", output, *options])])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the demo's network, with a record of their training beside them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(build_network(BUNDLE, overlays=[DEMO]).state_dict(), folder / "best.pt")
    (folder / "trained_as.json").write_text("{}")
    (folder / "trained_on.json").write_text('{"patients": []}')
    return folder / "best.pt"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder that is served on loopback, and its address."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def pushed(server, weights):
    """The bundle with its demo's settings, pushed into the served folder."""
    folder, address = server
    result = push(BUNDLE, folder, "--overlay", DEMO, "--weights", weights, "--url", f"{address}/files/")
    assert result.exit_code == 0, result.stderr
    return folder, result.stdout


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_the_zoos(pushed, server):
    folder, printed = pushed

    assert sorted(os.listdir(folder)) == ["files", "lung_segmentation", f"{NAME}.zip", f"{NAME}.zip.sha256"]
    assert os.listdir(folder / "files") == [f"{NAME}_model.pt"]
    assert not list((folder / "lung_segmentation" / "models").glob("*.pt"))
    assert max(path.stat().st_size for path in (folder / "lung_segmentation").rglob("*")) <= 2**20
    assert file_sha256(folder / f"{NAME}.zip") in printed
    assert f"serve {NAME}_model.pt at {server[1]}/files" in printed


def test_weights_of_a_bundle_in_a_bundle_are_taken_out_as_well(pushed, tmp_path):
    bundle = read_zip(pushed[0] / f"{NAME}.zip", tmp_path / "own")
    shutil.copytree(bundle, tmp_path / "generator")
    shutil.move(tmp_path / "generator", bundle)

    result = push(bundle, tmp_path / "out", "--url", "https://host/files")

    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path / "out" / "files")) == [f"{NAME}_generator_model.pt", f"{NAME}_model.pt"]
    assert not list((tmp_path / "out" / "lung_segmentation").rglob("*.pt"))
    listed = (tmp_path / "out" / "lung_segmentation" / "large_files.yml").read_text()
    assert '"generator/models/model.pt"' in listed
    assert f'"https://host/files/{NAME}_generator_model.pt"' in listed


def test_checksum_is_as_sha256sum_reads_it(pushed):
    folder, _ = pushed
    text = (folder / f"{NAME}.zip.sha256").read_text()

    assert text == f"{hashlib.sha256((folder / f'{NAME}.zip').read_bytes()).hexdigest()}  {NAME}.zip\n"
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", f"{NAME}.zip.sha256"], cwd=folder, check=True)


def test_monai_downloads_and_checks_the_weights(pushed, weights, tmp_path):
    bundle = shutil.copytree(pushed[0] / "lung_segmentation", tmp_path / "lung_segmentation")

    download_large_files(str(bundle))

    assert file_sha256(bundle / "models" / "model.pt") == file_sha256(weights)
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    build_network(bundle).load_state_dict(state)  # the overlay is in its configs


def test_monai_refuses_weights_that_were_changed(pushed, tmp_path):
    bundle = shutil.copytree(pushed[0] / "lung_segmentation", tmp_path / "lung_segmentation")
    (bundle / "models").mkdir(exist_ok=True)
    (bundle / "models" / "model.pt").write_bytes(b"changed")

    with pytest.raises(Exception, match="hash check of existing file failed"):
        download_large_files(str(bundle))


def test_monai_and_we_extract_the_same_bundle(pushed, weights, tmp_path):
    folder, _ = pushed
    digest = (folder / f"{NAME}.zip.sha256").read_text().split()[0]

    extractall(folder / f"{NAME}.zip", tmp_path / "monai", hash_val=digest, has_base=False)
    ours = read_zip(folder / f"{NAME}.zip", tmp_path / "ours")

    theirs = tmp_path / "monai" / "lung_segmentation"
    assert files_in(ours) == files_in(theirs)
    # what the folder has and the archive has not is the list of what the archive brings along
    zoo = files_in(folder / "lung_segmentation")
    assert files_in(ours) == zoo - {"large_files.yml"} | {"models/model.pt"}
    assert {"models/trained_as.json", "models/trained_on.json"} < zoo
    assert file_sha256(ours / "models" / "model.pt") == file_sha256(weights)


def test_metadata_is_verified_by_monai(pushed, tmp_path):
    shutil.copyfile(ROOT / "tests" / "assets" / "meta_schema.json", tmp_path / "schema.json")

    verify_metadata(
        meta_file=str(pushed[0] / "lung_segmentation" / "configs" / "metadata.json"),
        filepath=str(tmp_path / "schema.json"),
    )


def test_same_bundle_gives_the_same_archive_and_is_replaced_by_force_alone(pushed, weights, tmp_path):
    options = ("--overlay", DEMO, "--weights", weights)

    first, second, forced = (push(BUNDLE, tmp_path, *options, *more) for more in ((), (), ("--force",)))

    assert (first.exit_code, second.exit_code, forced.exit_code) == (0, 1, 0)
    assert "must not hold this bundle yet" in second.stderr
    assert (tmp_path / f"{NAME}.zip").read_bytes() == (pushed[0] / f"{NAME}.zip").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"{NAME}.zip", f"{NAME}.zip.sha256"]
    assert "--url" in first.stdout


# ---------------------------------------------------------------- refused


def own(tmp_path: Path, weights: Path, **metadata: object) -> Path:
    """A copy of the bundle with weights of its own, as a training leaves it."""
    bundle = shutil.copytree(BUNDLE, tmp_path / "own" / "lung_segmentation")
    (bundle / "models").mkdir(exist_ok=True)
    shutil.copyfile(weights, bundle / "models" / "model.pt")
    path = bundle / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | metadata))
    return bundle


@pytest.mark.parametrize(
    ("options", "metadata", "message"),
    [
        ((), {}, "models/model.pt belongs to another architecture"),
        (("--overlay", DEMO, "--url", "ftp://host/files"), {}, "--url must be like https://host/path"),
        (("--overlay", DEMO, "--url", "https://me:secret@host/files"), {}, "--url must be an address alone"),
        (("--overlay", DEMO, "--url", "https://host/files?token=secret"), {}, "--url must be an address alone"),
        (("--overlay", DEMO), {"version": "../../x"}, "version in configs/metadata.json must be like 0.1.0"),
        (("--weights", "nowhere.pt"), {}, "no nowhere.pt; train the bundle first, or name a file with --weights"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(weights, tmp_path, options, metadata, message):
    result = push(own(tmp_path, weights, **metadata), tmp_path / "out", *options)

    assert result.exit_code == 1
    assert message in result.stderr
    assert "secret" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert not files_in(tmp_path / "out")


def test_poisoned_weights_are_not_run_and_not_pushed(weights, tmp_path):
    bundle = own(tmp_path, weights)
    torch.save({"w": Run(tmp_path / "mark")}, bundle / "models" / "model.pt")

    result = push(bundle, tmp_path / "out", "--overlay", DEMO)

    assert result.exit_code == 1
    assert "models/model.pt is not a file of plain weights" in result.stderr
    assert not (tmp_path / "mark").exists()
    assert not files_in(tmp_path / "out")


def test_bundle_is_not_pushed_onto_itself_or_another(weights, tmp_path):
    bundle = own(tmp_path, weights)
    (tmp_path / "work" / "lung_segmentation").mkdir(parents=True)
    (tmp_path / "work" / "lung_segmentation" / "mine").write_text("mine")
    url = ("--overlay", DEMO, "--url", "https://host/files", "--force")

    itself, another = push(bundle, bundle.parent, *url), push(bundle, tmp_path / "work", *url)

    assert "--output must lie elsewhere than the bundle" in itself.stderr
    assert "is there without large_files.yml, so not from here" in another.stderr
    assert (bundle / "models" / "model.pt").exists()
    assert (tmp_path / "work" / "lung_segmentation" / "mine").exists()
