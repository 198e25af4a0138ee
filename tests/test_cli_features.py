"""``medgen features``: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from medgen import cli
from medgen.metrics.feature_set import FeatureSet
from medgen.metrics.frechet import FeatureMoments
from medgen.metrics.protocols import PROTOCOLS

MEANS = "module:cli_nets:means"


def features(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["features", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, no features of this machine's; a network to import."""
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "MEDGEN_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "cli_nets.py").write_text(
        "from torch import nn\ndef means():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six grey images of two patients."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(6):
        levels = np.random.default_rng(number).integers(0, 256, (20, 16), dtype=np.uint8)
        Image.fromarray(levels).save(root / f"p{number % 2}_{number}.png")
    return root


def levels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]) / 255


# ---------------------------------------------------------------------------------------------------------------------
# --list


def test_list_says_of_each_protocol_what_it_does_and_where_its_weights_are(tmp_path: Path) -> None:
    missing = features("--list")
    swav = tmp_path / "home" / "hub" / "checkpoints" / "swav_800ep_pretrain.pth.tar"
    swav.parent.mkdir(parents=True)
    swav.write_bytes(b"x")

    there = features("--list")

    assert missing.exit_code == there.exit_code == 0
    rows = {line.split()[0]: line for line in missing.stdout.splitlines()[1 : 1 + len(PROTOCOLS)]}
    assert list(rows) == list(PROTOCOLS)
    assert "-1024..1024" in rows["xrv"]
    assert "0..1 (reference); 0..255 (samples)" in rows["xrv_ldm_source"]
    assert rows["frd_v1"].endswith("none needed")
    assert rows["fsd"].endswith("missing")
    assert "INVALID" in missing.stdout
    assert PROTOCOLS["fsd"].weights.url in missing.stdout
    assert "about 96 MB, SHA-256 6726825d..." in missing.stdout
    assert str(tmp_path / "home" / ".torchxrayvision" / "models_data") in missing.stdout
    assert str(swav) in there.stdout
    assert PROTOCOLS["fsd"].weights.url not in there.stdout
    assert max(len(line) for line in missing.stdout.splitlines() if "https://" not in line) <= 120 + len(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# what it writes


def test_features_of_a_folder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "x.npz"

    done = features(folder, "--protocol", MEANS, "--output", output, "--patient_pattern", r"^(p\d)")

    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{MEANS} features of 6 images, 1 each; 0 rejected -> {output}\n"
    found = FeatureSet.load(output)
    np.testing.assert_allclose(found.features[:, 0], levels_of(folder).mean((1, 2)), rtol=1e-5)
    assert found.patients == ("p0",) * 3 + ("p1",) * 3
    assert (tmp_path / "out" / "x.rejected.csv").read_text() == "file,reason\n"


def test_moments_are_those_of_the_features(folder: Path, tmp_path: Path) -> None:
    done = features(folder, "--protocol", MEANS, "--output", tmp_path / "m.npz", "--moments", "--mode", "RGB")

    assert done.exit_code == 0, done.stderr
    assert "moments of 6 images, 3 each" in done.stdout
    moments = FeatureMoments.load(tmp_path / "m.npz")
    means = levels_of(folder).mean((1, 2))
    assert moments.n == 6
    np.testing.assert_allclose(moments.mean, np.full(3, means.mean()), rtol=1e-5)
    np.testing.assert_allclose(moments.covariance, np.full((3, 3), means.var(ddof=1)), rtol=1e-4)


def test_network_of_ones_own_takes_its_range_size_and_channels(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.npz"
    options = ("--feature_range", "-1", "1", "--feature_size", "8", "--feature_channels", "3")

    done = features(folder, "--protocol", MEANS, "--output", output, *options, "--num_workers", 2, "--batch_size", 4)

    assert done.exit_code == 0, done.stderr
    found = FeatureSet.load(output)
    assert found.features.shape == (6, 3)
    np.testing.assert_allclose(found.features[:, 1], levels_of(folder).mean((1, 2)) * 2 - 1, atol=0.02)
    settings = {key: found.settings[key] for key in ("size", "range", "channels")}
    assert settings == {"size": 8, "range": [-1, 1], "channels": 3}


def test_datalist_size_and_sample(folder: Path, tmp_path: Path) -> None:
    items = [{"image": path.name, "patient": path.name[:2]} for path in sorted(folder.glob("*.png"))]
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps({"training": items[:3], "test": items[3:]}))
    options = ("--protocol", MEANS, "--dataset_dir", folder, "--image_size", 8)

    test = features(datalist, "--output", tmp_path / "test.npz", "--split", "test", *options)
    drawn = features(datalist, "--output", tmp_path / "drawn.npz", "--max_images", 4, "--seed", 3, *options)

    assert test.exit_code == drawn.exit_code == 0, test.stderr + drawn.stderr
    assert FeatureSet.load(tmp_path / "test.npz").files == ("p1_1.png", "p1_3.png", "p1_5.png")
    found = FeatureSet.load(tmp_path / "drawn.npz")
    assert len(found) == 4
    assert len(found.patients) == 4


def test_unreadable_image_is_listed_skipped_and_counted(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "p1_3.png").read_bytes()
    (folder / "p1_3.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (16, 20), 9).save(folder / "p0_2.png")
    output = tmp_path / "x.npz"

    done = features(folder, "--protocol", MEANS, "--output", output)

    assert done.exit_code == 3
    rejected = tmp_path / "x.rejected.csv"
    assert f"features of 5 images, 1 each; 1 rejected ({rejected} says why) -> {output}" in done.stdout
    assert "note: 1 images are constant (every pixel alike), such as p0_2.png" in done.stderr
    head, row = rejected.read_text().splitlines()
    assert head == "file,reason"
    assert row.startswith("p1_3.png,")
    assert "truncated or damaged" in row
    assert len(FeatureSet.load(output)) == 5
    (folder / "p1_3.png").write_bytes(whole)
    assert features(folder, "--protocol", MEANS, "--output", output).exit_code == 0
    assert rejected.read_text() == "file,reason\n"


def test_radiomics_need_no_weights(folder: Path, tmp_path: Path) -> None:
    done = features(folder, "--protocol", "frd_v0", "--output", tmp_path / "x.npz")

    assert done.exit_code == 0, done.stderr
    assert "of 6 images, 93 each; 0 rejected" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "expected SOURCE and --protocol and --output; medgen features --help"),
        ("FOLDER --protocol fid", "expected --output;"),
        ("FOLDER --protocol fid --output x.csv", "--output must be a file that ends in .npz, got x.csv"),
        ("FOLDER --protocol nope --output x.npz", "protocol must be one of frd_v1"),
        ("FOLDER --protocol frd_v1 --output x.npz --moments", "which moments do not hold; leave --moments out"),
        ("absent --protocol frd_v0 --output x.npz", "which does not exist"),
        ("EMPTY --protocol frd_v0 --output x.npz", "got an empty folder"),
        ("FOLDER --protocol frd_v0 --output x.npz --split test", "split belongs to a datalist"),
        ("FOLDER --protocol frd_v0 --output x.npz --mode grey", "mode must be L (grey) or RGB"),
        ("FOLDER --protocol frd_v0 --output x.npz --image_size 0", "image_size must be a whole number from 1"),
        ("FOLDER --protocol frd_v0 --output x.npz --max_images 2 --seed -1", "seed must be"),
        ("FOLDER --protocol frd_v0 --output x.npz --patient_pattern (", "no regular expression"),
        (
            "FOLDER --protocol fid --output x.npz",
            "protocol fid needs pt_inception-2015-12-05-6726825d.pth (about 96 MB",
        ),
        ("FOLDER --protocol fid --output x.npz --weights fid=absent.pth", "not found at absent.pth; fetch it from"),
        (
            "FOLDER --protocol fid --output x.npz --weights absent.pth",
            "--weights must be PROTOCOL=PATH with one of fid",
        ),
        ("FOLDER --protocol fid --output x.npz --weights frd_v1=x", "--weights must be PROTOCOL=PATH"),
        ("FOLDER --protocol fid --output x.npz --weights fid=BAD", "is not the published pt_inception"),
        ("FOLDER --protocol fsd --output x.npz --weights fsd=BAD", "is not a file of plain weights"),
        ("FOLDER --protocol xrv --output x.npz --weights xrv=BAD", "is not read: it is no torch file"),
        ("FOLDER --protocol fid --output x.npz --feature_size 8", "feature_size is for module:PATH"),
        ("FOLDER --protocol xrv_ldm_source --output x.npz", "--role reference or --role samples, got None"),
        ("FOLDER --protocol module:absent.ts --output x.npz", "got absent.ts, which is no file"),
        ("FOLDER --protocol MEANS --output x.npz --device cuda:99", "device cuda:99 is not there"),
        ("FOLDER --protocol MEANS --output x.npz --batch_size 0", "batch_size must be at least 1"),
        ("FOLDER --protocol MEANS --output x.npz --num_workers -3", "num_workers must be at least 0, got -3"),
        ("FOLDER --protocol MEANS --output x.npz --seed -1", "seed must be at least 0, got -1"),
        ("FOLDER --protocol MEANS --output x.npz --role foo", "role must be reference or samples"),
        ("FOLDER --protocol MEANS --output BAD/x.npz", "cannot be written"),
        ("FOLDER --protocol MEANS --output BAD/x.npz --moments", "cannot be written"),
        ("FOLDER --protocol MEANS --output x.npz --cache_dir BAD", "cache_dir must be a folder that can be written to"),
    ],
)
def test_mistake_is_one_line_and_exit_status_1(
    folder: Path, tmp_path: Path, arguments: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    for word, value in (("FOLDER", "images"), ("EMPTY", "empty"), ("BAD", "bad.pth"), ("MEANS", MEANS)):
        arguments = arguments.replace(word, value)

    done = features(*arguments.split())

    assert done.exit_code == 1
    *notes, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert all(line.startswith("note: ") for line in notes)
    assert not list(tmp_path.glob("x.*"))


def test_protocol_that_means_nothing_says_so(folder: Path, tmp_path: Path) -> None:
    done = features(folder, "--protocol", "xrv_ldm_source", "--role", "samples", "--output", tmp_path / "x.npz")

    assert done.exit_code == 1  # no weights here
    assert done.stderr.startswith("note: figures by xrv_ldm_source mean nothing: samples enter at 0..255")
