"""Generation, interpolation and mixing as their users run them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image, ImageSequence
from running import assert_resumes, assert_same_levels, assert_shards_merge, assert_synthetic_dicom

from medgen.data import load_datalist
from medgen.errors import find_user_error
from medgen.inferers import GeneratorInferer
from medgen.networks import StyleGAN2Generator

CONFIGS = Path(__file__).parents[2] / "bundles" / "stylegan2_anomaly" / "configs"
PRESET = "small_32"


def weights(path: Path, **changes: int) -> Path:
    torch.manual_seed(0)
    torch.save(StyleGAN2Generator.from_preset(PRESET, **changes).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("model") / "model.pt")


@pytest.fixture(scope="module")
def colour_and_classes(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("model") / "model.pt", out_channels=3, num_classes=2)


def run(config: str, output_dir: Path, model_path: Path, **settings: object) -> ConfigWorkflow:
    workflow = ConfigWorkflow(
        str(CONFIGS / f"{config}.json"),
        logging_file=False,  # it would take pytest's handlers off
        workflow_type="infer",
        **{"output_dir": str(output_dir), "model_path": str(model_path), "preset": PRESET, "batch_size": 4, **settings},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def expected(model_path: Path, seeds: list[int], labels: list[int] | None = None, **changes: int) -> np.ndarray:
    """8-bit images straight from the network."""
    network = StyleGAN2Generator.from_preset(PRESET, **changes).eval()
    network.load_state_dict(torch.load(model_path, weights_only=True))
    with torch.no_grad():
        images = GeneratorInferer()(
            torch.tensor(seeds), network, labels=None if labels is None else torch.tensor(labels)
        )
    return (images * 255).round().byte().numpy()


def test_png_samples_are_the_networks_images(model_path, tmp_path):
    workflow = run("generate", tmp_path, model_path, seeds="0-5,9")

    assert workflow.check_properties() == []
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == [f"seed{seed:06d}.png" for seed in (0, 1, 2, 3, 4, 5, 9)]
    pixels = np.stack([np.asarray(Image.open(tmp_path / "samples" / file)) for file in files])
    assert_same_levels(pixels, expected(model_path, [0, 1, 2, 3, 4, 5, 9])[:, 0])
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [item["seed"] for item in items] == [0, 1, 2, 3, 4, 5, 9]
    assert Image.open(tmp_path / "images" / "grid.png").size == (3 * 32 + 4, 3 * 32 + 4)


def test_dicom_samples_of_classes_in_colour(colour_and_classes, tmp_path):
    settings = {"file_format": "dicom", "in_channels": 3, "num_classes": 2}

    run("generate", tmp_path, colour_and_classes, seeds=[4, 7], **settings)

    images = expected(colour_and_classes, [4, 7], [0, 1], out_channels=3, num_classes=2)
    items = load_datalist(tmp_path / "datalist.json", "training")
    assert [item["label"] for item in items] == [0, 1]
    assert_synthetic_dicom(items, images)


def test_a_class_is_made_alone_on_request(colour_and_classes, tmp_path):
    run("generate", tmp_path, colour_and_classes, seeds="0-1", class_index=1, in_channels=3, num_classes=2)

    pixels = np.asarray(Image.open(tmp_path / "samples" / "seed000000.png"))
    alone = expected(colour_and_classes, [0], [1], out_channels=3, num_classes=2)[0]
    assert_same_levels(pixels, alone.transpose(1, 2, 0))


def test_resumed_run_ends_with_the_same_files(model_path, tmp_path):
    def generate(output_dir: Path, **settings: str) -> None:
        run("generate", output_dir, model_path, **settings)

    assert_resumes(generate, tmp_path)


def test_shards_and_their_merge_leave_the_files_of_one_process(model_path, tmp_path, capsys):
    def generate(output_dir: Path, **settings: str) -> None:
        run("generate", output_dir, model_path, seeds="0-8", **settings)

    assert_shards_merge(generate, tmp_path, ["datalist.json", "images/grid.png"], "stylegan2_anomaly.generate")
    printed = capsys.readouterr().out
    assert "shard 3/4: 0 of 9 items are done in" in printed  # three groups of four, four and one
    assert "shard 0/4: 4 of 9 items" in printed
    assert "9 images in" in printed.splitlines()[-1]
    assert ", 0 of them new;" in printed.splitlines()[-1]


def test_later_seeds_join_the_earlier_ones(model_path, tmp_path):
    run("generate", tmp_path, model_path, seeds="0-3")
    run("generate", tmp_path, model_path, seeds="4-5", resume=True)

    assert [item["seed"] for item in load_datalist(tmp_path / "datalist.json", "training")] == [0, 1, 2, 3, 4, 5]


def test_interpolation_between_the_projections_of_a_folder(model_path, tmp_path):
    network = StyleGAN2Generator.from_preset(PRESET).eval()
    network.load_state_dict(torch.load(model_path, weights_only=True))
    with torch.no_grad():
        ws = GeneratorInferer().mapping([3, 5], network)
    for name, w in zip(("image2", "image10"), ws, strict=True):
        texts = {text: np.array("{}") for text in ("settings", "source")}
        found = {"w": w.numpy(), "loss_curve": np.zeros(1), "steps": np.array(1), "distance": np.array(0.5)}
        np.savez(tmp_path / f"{name}.npz", **found, **texts)

    run("interpolate", tmp_path / "out", model_path, projections=str(tmp_path), frames=2, file_name="walk.gif")

    with Image.open(tmp_path / "out" / "images" / "walk.gif") as film:
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)]
    for frame, image in zip(frames, expected(model_path, [3, 5])[:, 0], strict=True):
        assert_same_levels(frame, image)


@pytest.mark.parametrize("space", ["w", "z"])
def test_interpolation_passes_through_its_seeds(space, model_path, tmp_path):
    settings = {"seeds": "3,5", "frames": 6, "truncation_psi": 1.0, "space": space}

    run("interpolate", tmp_path, model_path, file_name="walk.gif", **settings)

    with Image.open(tmp_path / "images" / "walk.gif") as film:
        frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 6
    ends = expected(model_path, [3, 5])[:, 0]
    assert_same_levels(frames[0], ends[0])
    assert_same_levels(frames[3], ends[1])


def test_mixing_grid_has_its_sources_at_its_edges(model_path, tmp_path):
    run("mix", tmp_path, model_path, rows="1,2", columns="5-7", layers="0-1", truncation_psi=1.0)

    grid = np.asarray(Image.open(tmp_path / "images" / "mix.png"))
    assert grid.shape == (3 * 34 - 2, 4 * 34 - 2)
    assert (grid[:32, :32] == 255).all()
    assert_same_levels(grid[34:66, :32], expected(model_path, [1])[0, 0])
    assert_same_levels(grid[:32, 34:66], expected(model_path, [5])[0, 0])


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("generate", {"seeds": "0-x"}, "seeds must be whole numbers"),
        ("generate", {"seeds": 1.5}, "seeds must be whole numbers"),
        ("generate", {"seeds": None}, "seeds must be whole numbers"),
        ("generate", {"seeds": "0-9999999"}, "seeds must be at most 1,000,000 numbers"),
        ("generate", {"truncation_psi": float("nan")}, "truncation_psi must be a finite number"),
        ("generate", {"truncation_cutoff": 9}, "truncation_cutoff must be from 0 to 8 layers"),
        ("generate", {"class_index": 0}, "class_index must be null for a network without classes"),
        ("generate", {"num_classes": 2, "class_index": 2}, "class_index must be from 0 to 1"),
        ("generate", {"noise_mode": "off"}, "noise_mode must be const, random, none"),
        ("generate", {"file_format": "jpeg"}, "file_format must be png or dicom"),
        ("generate", {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ("generate", {"resume": "maybe"}, "a switch must be true or false"),
        ("interpolate", {"file_name": "walk.avi"}, "file_name must be a name that ends in .gif, .mp4, .webp"),
        ("interpolate", {"file_name": "../walk.gif"}, "file_name must be a name"),
        ("interpolate", {"projections": "absent"}, "projections must be a folder that holds two or more records"),
        ("interpolate", {"seeds": 3}, "between two or more latents, got 1"),
        ("interpolate", {"fps": 0}, "fps must be a number above 0"),
        ("interpolate", {"num_classes": 2}, "class_index must be from 0 to 1 for this network, got null"),
        ("mix", {"layers": "0-8"}, "layers must be from 0 to 7 for this network, got 8"),
        ("mix", {"layers": 1.5}, "layers must be whole numbers"),
        ("mix", {"rows": None}, "rows must be whole numbers"),
        ("mix", {"columns": "1-"}, "columns must be whole numbers"),
    ],
)
def test_mistakes_are_named_before_weights_are_read(config, settings, message, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011 MONAI wraps it
        run(config, tmp_path, tmp_path / "there_are_no_weights.pt", **settings)

    assert message in (find_user_error(caught.value) or "")


@pytest.mark.parametrize("config", ["generate", "interpolate", "mix"])
def test_missing_weights_are_named(config, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011 MONAI wraps it
        run(config, tmp_path, tmp_path / "model.pt")

    assert f"no weights at {tmp_path / 'model.pt'}" in (find_user_error(caught.value) or "")


def test_the_configs_share_one_network():
    heads = []
    for config in ("generate", "interpolate", "mix"):
        content = json.loads((CONFIGS / f"{config}.json").read_text())
        heads.append({key: content[key] for key in ("preset", "in_channels", "num_classes", "network_def", "network")})

    assert heads[0] == heads[1] == heads[2]
