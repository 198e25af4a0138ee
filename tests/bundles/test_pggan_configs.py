"""Synthesis, interpolation and evaluation of the progressive growing GAN as their users run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image, ImageSequence
from running import assert_resumes, assert_same_levels, assert_synthetic_dicom

from medgen.data import load_datalist, write_datalist
from medgen.errors import find_user_error
from medgen.inferers import PGGANInferer
from medgen.networks import PGGANGenerator

CONFIGS = Path(__file__).parents[2] / "bundles" / "cxr_pggan" / "configs"
PRESET = "demo_32"


def network(**changes: int) -> PGGANGenerator:
    torch.manual_seed(0)
    made = PGGANGenerator.from_preset(PRESET, **changes).eval()
    with torch.no_grad():
        for layer in made.to_rgb:
            layer.weight.mul_(0.3)  # keeps most pixels inside [-1, 1], where nothing is clipped
    return made


def weights(folder: Path, **changes: int) -> Path:
    """A training's files: the model grown to 32, and the weights of the ends of levels 8 and 16, which are others."""
    (folder / "levels").mkdir(parents=True)
    made = network(**changes)
    torch.save(made.state_dict(), folder / "model.pt")
    for resolution in (8, 16):
        torch.manual_seed(resolution)
        made = PGGANGenerator.from_preset(PRESET, **changes)
        made.grow(resolution)
        torch.save(made.state_dict(), folder / "levels" / f"{resolution:04d}.pt")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("model") / "models")


@pytest.fixture(scope="module")
def colour_and_classes(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("model") / "models", out_channels=3, num_classes=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "cache"))


def run(config: str, output_dir: Path, model_path: Path, **settings: object) -> ConfigWorkflow:
    fixed = {"output_dir": str(output_dir), "model_path": str(model_path), "preset": PRESET, "batch_size": 4}
    if config != "interpolate":
        fixed["num_workers"] = 0
    workflow = ConfigWorkflow(
        str(CONFIGS / f"{config}.json"),
        logging_file=False,  # it would take pytest's handlers off
        workflow_type="infer",
        **{**fixed, **settings},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def refusal(config: str, output_dir: Path, model_path: Path, **settings: object) -> str:
    """The line that a user is told."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 MONAI wraps it
        run(config, output_dir, model_path, **settings)
    line = find_user_error(caught.value)
    assert line is not None, repr(caught.value)
    assert "\n" not in line
    return line


def expected(path: Path, seeds: list[int], labels: list[int] | None = None, psi: float = 1.0, **changes: int):
    """8-bit images straight from the network."""
    made = PGGANGenerator.from_preset(PRESET, **changes).eval()
    made.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        given = None if labels is None else torch.tensor(labels)
        images = PGGANInferer(psi)(torch.tensor(seeds), made, labels=given)
    return (images * 255).round().byte().numpy()


# ---------------------------------------------------------------- inference.json


def test_png_samples_are_the_networks_images(model_path, tmp_path):
    run("inference", tmp_path, model_path, seeds="0-4,9", truncation_psi=0.8)

    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == [f"seed{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 9)]
    pixels = np.stack([np.asarray(Image.open(tmp_path / "samples" / file)) for file in files])
    assert_same_levels(pixels, expected(model_path, [0, 1, 2, 3, 4, 9], psi=0.8)[:, 0])
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [(item["seed"], item["patient"], item["synthetic"]) for item in items] == [
        (seed, f"synthetic-{seed}", True) for seed in (0, 1, 2, 3, 4, 9)
    ]
    assert all("label" not in item for item in items)
    assert Image.open(tmp_path / "images" / "grid.png").size == (3 * 32 + 4, 2 * 32 + 2)


def test_sixteen_bits_hold_what_eight_round_away(model_path, tmp_path):
    run("inference", tmp_path, model_path, seeds=3, file_format="png16")

    pixels = np.asarray(Image.open(tmp_path / "samples" / "seed000003.png")).astype(np.float64)
    assert_same_levels(np.round(pixels / 65535 * 255), expected(model_path, [3])[0, 0])
    assert (pixels % 257 != 0).any()


def test_dicom_samples_of_classes_in_colour(colour_and_classes, tmp_path):
    settings = {"file_format": "dicom", "in_channels": 3, "num_classes": 2}

    run("inference", tmp_path, colour_and_classes, seeds=[4, 7], **settings)

    images = expected(colour_and_classes, [4, 7], [0, 1], out_channels=3, num_classes=2)
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [item["label"] for item in items] == [0, 1]
    assert_synthetic_dicom(items, images)


def test_a_class_is_made_alone_on_request(colour_and_classes, tmp_path):
    run("inference", tmp_path, colour_and_classes, seeds="0-1", class_index=1, in_channels=3, num_classes=2)

    pixels = np.asarray(Image.open(tmp_path / "samples" / "seed000000.png"))
    alone = expected(colour_and_classes, [0], [1], out_channels=3, num_classes=2)[0]
    assert_same_levels(pixels, alone.transpose(1, 2, 0))
    assert [item["label"] for item in load_datalist(tmp_path / "datalist.json", "training")] == [1, 1]


@pytest.mark.parametrize(("label", "names"), [(1, None), ("opacity", ["normal", "opacity"])])
def test_samples_of_a_model_of_one_class_get_its_label(model_path, tmp_path, label, names):
    run("inference", tmp_path, model_path, seeds="0-2", label=label, label_names=names)

    assert [item["label"] for item in load_datalist(tmp_path / "datalist.json", "training")] == [label] * 3


@pytest.mark.parametrize("resolution", [8, 16])
def test_a_level_is_made_with_the_weights_of_its_end(model_path, tmp_path, resolution):
    run("inference", tmp_path, model_path, seeds="0-3", resolution=resolution)

    level = model_path.parent / "levels" / f"{resolution:04d}.pt"
    files = sorted((tmp_path / "samples").iterdir())
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    assert pixels.shape == (4, resolution, resolution)
    assert_same_levels(pixels, expected(level, [0, 1, 2, 3])[:, 0])


def test_resumed_run_ends_with_the_same_files(model_path, tmp_path):
    def generate(output_dir: Path, **settings: str) -> None:
        run("inference", output_dir, model_path, label=0, **settings)

    assert_resumes(generate, tmp_path)
    line = refusal("inference", tmp_path / "killed", model_path, seeds="0-9", resolution=16, resume=True, label=0)
    assert "were made with model_sha256" in line


def test_truncation_to_nothing_makes_one_image(model_path, tmp_path):
    run("inference", tmp_path, model_path, seeds="0-1", truncation_psi=0)

    first, second = (file.read_bytes() for file in sorted((tmp_path / "samples").iterdir()))
    assert first == second


# ---------------------------------------------------------------- interpolate.json


def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as film:
        return np.stack([np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)])


def test_closed_interpolation_passes_through_its_seeds(model_path, tmp_path):
    run("interpolate", tmp_path, model_path, seeds="3,5", frames=6, file_name="walk.gif")

    frames = frames_of(tmp_path / "images" / "walk.gif")
    assert len(frames) == 6
    assert_same_levels(frames[[0, 3]], expected(model_path, [3, 5])[:, 0])


def test_open_interpolation_ends_at_its_last_seed(model_path, tmp_path):
    settings = {"seeds": "3,5,8", "frames": 5, "closed": "false", "resolution": 16, "truncation_psi": 0.7}

    run("interpolate", tmp_path, model_path, **settings)

    frames = frames_of(tmp_path / "images" / "interpolation.gif")
    ends = expected(model_path.parent / "levels" / "0016.pt", [3, 5, 8], psi=0.7)
    assert_same_levels(frames[[0, 2, 4]], ends[:, 0])


def test_film_of_a_class_in_colour(colour_and_classes, tmp_path):
    import av

    settings = {"num_classes": 2, "in_channels": 3, "class_index": 1, "seeds": "0-1", "frames": 4}

    run("interpolate", tmp_path, colour_and_classes, file_name="walk.mp4", **settings)

    with av.open(str(tmp_path / "images" / "walk.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 4
    image = expected(colour_and_classes, [0], [1], out_channels=3, num_classes=2)[0].transpose(1, 2, 0)
    assert np.abs(frames[0].mean((0, 1)) - image.mean((0, 1))).max() < 4  # H.264 is lossy


# ---------------------------------------------------------------- evaluate.json


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Eight images of two classes, 40×32 pixels."""
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    items = []
    for number in range(8):
        pixels = rng.integers(0, 255, (10, 8)).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        items.append({"image": f"{number}.png", "patient": f"p{number}", "label": number // 4})
    write_datalist(folder / "datalist.json", "noise", "X-ray", {"test": items}, label_names=["normal", "opacity"])
    return folder / "datalist.json"


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


TEST_SEED = 1_000_000  # a validation, by which weights are chosen, has latents 0, 1, 2, ...


def test_evaluation_measures_as_many_samples_as_real_images(model_path, real, tmp_path):
    run("evaluate", tmp_path, model_path, datalist=str(real), max_images=6, seed=5)

    found = metrics_of(tmp_path)
    assert (found["n"], found["n_samples"], found["n_test"], found["resolution"]) == (6, 6, 6, 32)
    assert (found["seed"], found["split"], found["label"], found["truncation_psi"]) == (5, "test", None, 1.0)
    assert {"frd", "frd_equal_n", "frd_real", "swd", "swd_32", "swd_16", "swd_equal_n", "swd_real"} <= set(found)
    assert len(found["model_sha256"]) == 64
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_over_test.png"))
    assert picture.shape == (2 * 32 + 2, 6 * 32 + 5 * 2)
    assert_same_levels(picture[:32, :32], expected(model_path, [TEST_SEED + 5])[0, 0])
    # the middle of the first and of the last of six of the eight, evenly spaced
    for column, number in ((0, 0), (5, 6)):
        image = np.asarray(Image.open(real.parent / f"{number}.png"))[4:36]
        assert_same_levels(picture[34:, 34 * column : 34 * column + 32], image)


def test_evaluation_of_a_level_averages_the_real_images(model_path, real, tmp_path):
    run("evaluate", tmp_path, model_path, datalist=str(real), resolution=8, label="1")

    found = metrics_of(tmp_path)
    assert (found["n_test"], found["resolution"], found["label"]) == (4, 8, "1")
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_over_test.png"))
    assert_same_levels(picture[:8, :8], expected(model_path.parent / "levels" / "0008.pt", [TEST_SEED])[0, 0])
    image = np.asarray(Image.open(real.parent / "4.png"))[4:36].astype(float)
    assert_same_levels(picture[10:, :8], np.round(image.reshape(8, 4, 8, 4).mean((1, 3))))


def test_evaluation_of_classes_measures_each(tmp_path, real, tmp_path_factory):
    path = weights(tmp_path_factory.mktemp("model") / "models", num_classes=2)

    run("evaluate", tmp_path, path, datalist=str(real), num_classes=2)

    found = metrics_of(tmp_path)
    assert found["n_test"] == 8
    assert found["n_test_class0"] == found["n_test_class1"] == 4
    assert {"swd_class0", "swd_class1", "frd_class1", "swd_real_class1"} <= set(found)
    picture = np.asarray(Image.open(tmp_path / "images" / "samples_over_test.png"))
    made = expected(path, [TEST_SEED + i for i in range(8)], [0] * 4 + [1] * 4, num_classes=2)
    assert_same_levels(picture[:32, 34 * 7 :], made[7, 0])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("inference", {"seeds": "0-x"}, "seeds must be whole numbers"),
        ("inference", {"truncation_psi": float("nan")}, "truncation_psi must be a finite number"),
        ("inference", {"class_index": 0}, "class_index must be null for a network without classes"),
        ("inference", {"num_classes": 2, "class_index": 2}, "class_index must be from 0 to 1"),
        ("inference", {"num_classes": 2, "label": 1}, "label must be null for a network with 2 classes"),
        ("inference", {"label": 0.5}, "label must be a whole number or a name"),
        ("inference", {"file_format": "jpeg"}, "file_format must be png or png16 or dicom"),
        ("inference", {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ("inference", {"num_workers": -1}, "num_workers must be a whole number of at least 0"),
        ("inference", {"resume": "maybe"}, "a switch must be true or false"),
        ("inference", {"resolution": 12}, "resolution must be one of 4, 8, 16, 32 for this network"),
        ("inference", {"preset": "absent"}, "preset must be one of"),
        ("interpolate", {"file_name": "walk.avi"}, "file_name must be a name that ends in .gif, .mp4, .webp"),
        ("interpolate", {"file_name": "../walk.gif"}, "file_name must be a name"),
        ("interpolate", {"seeds": 3}, "between two or more latents, got 1"),
        ("interpolate", {"frames": 1}, "frames must be at least 2"),
        ("interpolate", {"fps": 0}, "fps must be a number above 0"),
        ("interpolate", {"num_classes": 2}, "class_index must be from 0 to 1 for this network, got null"),
        ("interpolate", {"resolution": 64}, "resolution must be one of 4, 8, 16, 32 for this network"),
        ("evaluate", {"datalist": "absent.json"}, "datalist absent.json not found"),
        ("evaluate", {"split": "training"}, "split training is"),
        ("evaluate", {"label": 7}, "label must be one that the datalist's items have, 0 (4), 1 (4), got 7"),
        ("evaluate", {"max_images": 1}, "max_images must be a whole number of at least 2"),
        ("evaluate", {"resolution": 1024}, "resolution must be one of 4, 8, 16, 32 for this network"),
        ("evaluate", {"truncation_psi": "much"}, "truncation_psi must be a finite number"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(config, settings, message, real, tmp_path):
    given = {"datalist": str(real)} if config == "evaluate" else {}

    assert message in refusal(config, tmp_path, tmp_path / "there_are_no_weights.pt", **{**given, **settings})


@pytest.mark.parametrize("config", ["inference", "interpolate", "evaluate"])
def test_missing_weights_are_named(config, real, tmp_path):
    given = {"datalist": str(real)} if config == "evaluate" else {}

    assert f"no weights at {tmp_path / 'model.pt'}" in refusal(config, tmp_path, tmp_path / "model.pt", **given)
    line = refusal(config, tmp_path, tmp_path / "model.pt", resolution=8, **given)
    assert line.startswith(f"no weights for resolution 8: there is no {tmp_path / 'model.pt'}")


@pytest.mark.parametrize("config", ["inference", "interpolate", "evaluate"])
def test_a_level_that_was_not_kept_is_named_with_those_that_were(config, model_path, real, tmp_path):
    given = {"datalist": str(real)} if config == "evaluate" else {}

    line = refusal(config, tmp_path / "out", model_path, resolution=4, **given)

    assert "no weights for resolution 4" in line
    assert "is grown to 32" in line
    assert "holds those of 8, 16" in line


def test_images_smaller_than_the_network_are_named(model_path, real, tmp_path):
    shutil.copytree(real.parent, tmp_path / "small")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "small" / "3.png")

    line = refusal("evaluate", tmp_path / "out", model_path, datalist=str(tmp_path / "small" / "datalist.json"))

    assert "3.png" in line


def test_the_configs_share_one_network():
    names = ("preset", "in_channels", "num_classes", "resolution", "network_def", "network", "weights")
    heads = []
    for config in ("inference", "interpolate", "evaluate"):
        content = json.loads((CONFIGS / f"{config}.json").read_text())
        heads.append({key: content[key] for key in names})

    assert heads[0] == heads[1] == heads[2]
