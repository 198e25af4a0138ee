"""Sampling, editing and interpolation of a latent diffusion model as their users run them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image, ImageSequence
from running import assert_one_line, assert_shards_merge

from medgen.data import LatentScaling, file_sha256, load_datalist, read_frames
from medgen.data.phantom.clip import write_clip

CONFIGS = Path(__file__).parents[2] / "bundles" / "cxr_latent_diffusion" / "configs"
OVERLAYS = {"none": ["unconditional"], "label": ["labels"], "text": [], "flow": ["unconditional", "rectified_flow"]}
SIDE = 64
PROMPTS = ["Small left pleural effusion.", "Clear lungs, no effusion."]


def config_files(config: str, kind: str) -> list[str]:
    return [str(CONFIGS / f"{name}.json") for name in (config, "demo", *OVERLAYS[kind])]


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, text_encoder) -> dict[str, Path]:
    """Weights of small networks, drawn and not trained, with their autoencoder and its scaling beside them."""
    paths = {}
    for kind in OVERLAYS:
        folder = tmp_path_factory.mktemp(kind)
        parser = ConfigParser(ConfigParser.load_config_files(config_files("inference", kind)))
        for name, definition in (("autoencoder.pt", "autoencoder_def"), ("model.pt", "network_def")):
            network = parser.get_parsed_content(definition)
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for key, value in network.named_parameters():
                    if value.ndim > 1:  # not the last layers alone, which begin at zero, so that conditions are seen
                        value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
                    if name == "autoencoder.pt" and key.startswith("decoder") and key.endswith("conv.bias"):
                        value.fill_(0.1)  # images in the middle of the range
            torch.save(network.state_dict(), folder / name)
        LatentScaling((0.8,), (0.0,), file_sha256(folder / "autoencoder.pt")).write(folder / "scaling.json")
        paths[kind] = folder / "model.pt"
    return paths


@pytest.fixture
def run(models, text_encoder, datalist, tmp_path) -> Callable[..., ConfigWorkflow]:
    def run_config(config: str, kind: str, **settings: object) -> ConfigWorkflow:
        workflow = ConfigWorkflow(
            config_files(config, kind),
            logging_file=False,  # it would take pytest's handlers off
            workflow_type="infer",
            **{
                "output_dir": str(tmp_path / "out"),
                "model_path": str(models[kind]),
                "text_encoder": str(text_encoder),
                "datalist": str(datalist),
                "batch_size": 2,
                "num_workers": 0,
                "num_steps": 3,
                **settings,
            },
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        return workflow

    return run_config


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def samples(tmp_path: Path, folder: str = "out") -> dict[str, np.ndarray]:
    return {path.stem: pixels(path) for path in sorted((tmp_path / folder / "samples").iterdir())}


def test_every_prompt_is_sampled_with_every_seed(run, tmp_path, capsys):
    workflow = run("inference", "text", prompts=PROMPTS, seeds="0-2", modality="DX")

    assert workflow.check_properties() == []
    assert "6 images in" in (printed := capsys.readouterr().out)
    assert "6 of them new (" in printed.splitlines()[-1]
    found = samples(tmp_path)
    assert list(found) == [f"prompt{p:04d}_seed{s:06d}" for p in (0, 1) for s in (0, 1, 2)]
    assert all(image.shape == (SIDE, SIDE) and image.std() > 1 for image in found.values())
    items = load_datalist(tmp_path / "out" / "datalist.json", "training")
    assert [item["text"] for item in items] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    generation = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert generation["prompts"] == PROMPTS
    assert generation["sampler"] == "dpm++"
    assert (generation["amp"], generation["scale"], generation["null_caption"]) == (True, [0.8], "empty")
    assert "2 prompts: 'Small left pleural effusion.', 'Clear lungs, no effusion.'\n" in printed
    assert Image.open(tmp_path / "out" / "images" / "grid.png").size == (3 * SIDE + 4, 2 * SIDE + 2)


def test_a_sample_is_of_its_prompt_and_seed_whatever_stands_beside_it(run, tmp_path):
    run("inference", "text", prompts=PROMPTS, seeds="0,1", output_dir=str(tmp_path / "all"), batch_size=3)
    run("inference", "text", prompt=PROMPTS[1], seeds=1, output_dir=str(tmp_path / "one"))

    among_others = samples(tmp_path, "all")
    alone = samples(tmp_path, "one")["seed000001"]
    # sums are rounded by the batch, and a level may tip over
    np.testing.assert_allclose(np.int16(among_others["prompt0001_seed000001"]), np.int16(alone), atol=1)
    assert (among_others["prompt0000_seed000001"] != alone).any()
    assert (among_others["prompt0001_seed000000"] != alone).any()


def test_interrupted_sampling_is_resumed_with_the_same_images(run, tmp_path):
    run("inference", "none", seeds="0-4")
    whole = samples(tmp_path)
    (tmp_path / "out" / "samples" / "seed000003.png").unlink()
    workflow = run("inference", "none", seeds="0-4", resume=True)

    assert [item["seed"] for item in workflow.parser.get_parsed_content("samples").todo] == [2, 3]
    for name, image in samples(tmp_path).items():
        np.testing.assert_array_equal(image, whole[name])


def test_shards_of_samples_and_edits_leave_the_files_of_one_process(run, tmp_path):
    def sample(output_dir: Path, **settings: str) -> None:
        run("inference", "text", prompts=PROMPTS, seeds="0-2", output_dir=str(output_dir), **settings)

    def edit(output_dir: Path, **settings: str) -> None:
        run("edit", "text", split="training", prompt=PROMPTS[0], output_dir=str(output_dir), **settings)

    assert_shards_merge(
        sample, tmp_path / "samples", ["datalist.json", "images/grid.png"], "cxr_latent_diffusion.sample"
    )
    assert_shards_merge(edit, tmp_path / "edits", ["images/edited.png"])


def test_negative_prompt_and_guidance_change_the_image(run, tmp_path):
    settings = {
        "plain": {"guidance_scale": 1.0},
        "guided": {},
        "negative": {"negative_prompt": "fracture"},
        "rescaled": {"guidance_rescale": 0.7},
    }
    found = {}
    for name, changes in settings.items():
        run("inference", "text", prompt=PROMPTS[0], seeds=0, output_dir=str(tmp_path / name), **changes)
        found[name] = samples(tmp_path, name)["seed000000"]

    assert all((found[a] != found[b]).any() for a in found for b in found if a != b)


@pytest.mark.parametrize("kind", ["none", "flow", "text"])
def test_images_without_a_prompt(run, tmp_path, capsys, kind):
    run("inference", kind, seeds="5")

    assert list(samples(tmp_path)) == ["seed000005"]
    assert ("no prompt: images of the empty caption" in capsys.readouterr().out) == (kind == "text")
    assert "text" not in load_datalist(tmp_path / "out" / "datalist.json", "training")[0]


def test_labels_take_turns_unless_one_is_named(run, tmp_path):
    run("inference", "label", seeds="0-3", output_dir=str(tmp_path / "turns"))
    run("inference", "label", seeds="0-3", class_index=1, output_dir=str(tmp_path / "one"))

    labels = [
        [item["label"] for item in load_datalist(tmp_path / folder / "datalist.json", "training")]
        for folder in ("turns", "one")
    ]
    assert labels == [[0, 1, 0, 1], [1, 1, 1, 1]]
    turns, one = samples(tmp_path, "turns"), samples(tmp_path, "one")
    np.testing.assert_allclose(np.int16(turns["seed000001"]), np.int16(one["seed000001"]), atol=1)
    assert (turns["seed000000"] != one["seed000000"]).any()


def test_prompts_of_a_file_and_of_a_datalist(run, datalist, tmp_path):
    (tmp_path / "prompts.txt").write_text("Clear lungs.\n\nEdema.\n", encoding="utf-8")
    run("inference", "text", prompts=str(tmp_path / "prompts.txt"), seeds=0, output_dir=str(tmp_path / "file"))
    run("inference", "text", prompt_datalist=str(datalist), seeds=0, output_dir=str(tmp_path / "datalist"))

    texts = [
        [item["text"] for item in load_datalist(tmp_path / folder / "datalist.json", "training")]
        for folder in ("file", "datalist")
    ]
    assert texts == [["Clear lungs.", "Edema."], ["A disc.", "A disc."]]


def test_source_prompts_are_thirteen_sets_of_a_hundred():
    content = ConfigParser.load_config_files([*config_files("inference", "text"), str(CONFIGS / "source_prompts.json")])

    assert len(set(content["prompts"])) == 13
    assert content["seeds"] == "0-99"
    assert not any("_" in prompt for prompt in content["prompts"])


def test_sixteen_bits_and_dicom_hold_the_same_image(run, tmp_path):
    for file_format in ("png", "png16", "dicom"):
        run(
            "inference", "text", prompt=PROMPTS[0], seeds=4, file_format=file_format,
            output_dir=str(tmp_path / file_format),
        )  # fmt: skip

    eight, sixteen = (samples(tmp_path, name)["seed000004"] for name in ("png", "png16"))
    assert sixteen.dtype == np.uint16
    assert len(np.unique(sixteen)) > 256
    np.testing.assert_allclose(sixteen / 257, eight, atol=0.51)
    dicom = pydicom.dcmread(tmp_path / "dicom" / "samples" / "seed000004.dcm")
    np.testing.assert_array_equal(dicom.pixel_array, eight)
    assert dicom.SyntheticData == "YES"
    assert dicom.ConversionType == "SYN"
    assert list(dicom.ImageType) == ["DERIVED", "SECONDARY", "SYNTHETIC"]
    assert dicom.PatientName == "SYNTHETIC"
    assert dicom.PatientID == "synthetic-4"
    assert dicom.SOPClassUID.name == "Secondary Capture Image Storage"
    assert dicom.DerivationDescription.startswith("latent diffusion: model_sha256 ")
    assert f"prompts '{PROMPTS[0]}'" in dicom.DerivationDescription
    assert "sampler dpm++, num_steps 3" in dicom.DerivationDescription
    assert Image.open(tmp_path / "png16" / "images" / "grid.png").size == (SIDE, SIDE)


def test_edit_keeps_what_the_mask_leaves(run, datalist, tmp_path):
    workflow = run("edit", "text", inpaint=True, strength=1.0, prompt=PROMPTS[0])

    assert workflow.check_properties() == []
    for item in load_datalist(datalist, "test"):
        before, after = pixels(Path(item["image"])), pixels(tmp_path / "out" / "edited" / Path(item["image"]).name)
        inside = pixels(Path(item["mask"])) > 0
        np.testing.assert_array_equal(after[~inside], before[~inside])
        assert np.abs(np.int16(after) - before)[inside].mean() > 5
    assert Image.open(tmp_path / "out" / "images" / "edited.png").size == (2 * SIDE + 2, 3 * SIDE + 4)
    generation = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert (generation["strength"], generation["inpaint"], generation["prompt"]) == (1.0, True, PROMPTS[0])


@torch.no_grad()
def test_less_strength_stays_nearer_to_the_image(run, datalist, tmp_path):
    name = Path(load_datalist(datalist, "test")[0]["image"]).name
    distances = []
    for strength in (0.02, 1.0):
        workflow = run(
            "edit", "none", strength=strength, num_steps=10, sampler="ddim", output_dir=str(tmp_path / f"{strength}")
        )
        image = torch.tensor(pixels(datalist.parent / name)).float()[None, None] / 255
        reconstruction = workflow.parser.get_parsed_content("autoencoder")(image).clamp(0, 1)[0, 0].numpy() * 255
        distances.append(np.abs(pixels(tmp_path / f"{strength}" / "edited" / name) - reconstruction).mean())

    assert distances[0] < distances[1] / 2


def test_edit_of_a_folder_with_masks_beside_it(run, datalist, tmp_path):
    items = load_datalist(datalist, "test")
    for part in ("image", "mask"):
        (tmp_path / part / "p1").mkdir(parents=True)
        Image.open(items[0][part]).save(tmp_path / part / "p1" / "a.png")

    run(
        "edit", "none", input_dir=str(tmp_path / "image"), mask_dir=str(tmp_path / "mask"), strength=0.5,
        file_format="dicom", seed=3,
    )  # fmt: skip

    (edited,) = (tmp_path / "out" / "edited").rglob("*.dcm")
    assert edited.relative_to(tmp_path / "out" / "edited") == Path("p1/a.dcm")
    dicom = pydicom.dcmread(edited)
    assert dicom.SyntheticData == "YES"
    assert "strength 0.5, seed 3, inpaint True" in dicom.DerivationDescription
    outside = pixels(tmp_path / "mask" / "p1" / "a.png") == 0
    np.testing.assert_array_equal(dicom.pixel_array[outside], pixels(tmp_path / "image" / "p1" / "a.png")[outside])


def test_interpolation_begins_and_ends_at_its_seeds(run, tmp_path):
    run("interpolate", "text", seeds="1,2", frames=5, fps=10, prompt=PROMPTS[0])
    run("inference", "text", seeds="1,2", prompt=PROMPTS[0], output_dir=str(tmp_path / "samples_of_both"))

    film = Image.open(tmp_path / "out" / "images" / "interpolation.gif")
    frames = [np.int16(np.asarray(frame.convert("L"))) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 5
    ends = samples(tmp_path, "samples_of_both")
    np.testing.assert_allclose(frames[0], np.int16(ends["seed000001"]), atol=2)
    np.testing.assert_allclose(frames[-1], np.int16(ends["seed000002"]), atol=2)
    assert all(np.abs(a - b).mean() > 0.5 for a, b in pairwise(frames))


def test_closed_interpolation_of_three_seeds_comes_back(run, tmp_path):
    run("interpolate", "none", seeds="0-2", frames=6, closed=True, file_name="loop.webp")

    frames = list(ImageSequence.Iterator(Image.open(tmp_path / "out" / "images" / "loop.webp")))
    assert len(frames) == 6


@pytest.mark.parametrize(
    ("config", "kind", "settings", "message"),
    [
        ("inference", "text", {"text_encoder": "nowhere"}, "no text model at nowhere"),
        ("inference", "text", {"text_encoder": None}, "needs --text_encoder"),
        ("inference", "none", {"sampler": "euler"}, "sampler must be one of .*, got 'euler'; set --sampler"),
        ("inference", "none", {"seeds": "a-b"}, "seeds must be whole numbers .*; got 'a-b'"),
        ("inference", "none", {"seeds": "5-2"}, "ends before it begins"),
        ("inference", "none", {"prompt": "edema"}, "conditioned on text, got 'edema' for --conditioning none"),
        ("inference", "label", {"class_index": 2}, "class_index must be from 0 to 1"),
        ("inference", "text", {"class_index": 0}, "class_index must be null"),
        ("inference", "text", {"prompts": "nowhere.txt"}, "prompts must be a text file .*No such file"),
        ("inference", "text", {"prompt": "a", "prompts": ["b"]}, "prompts come from one place"),
        ("inference", "text", {"negative_prompt": "a"}, "negative_prompt needs a prompt"),
        ("inference", "none", {"file_format": "jpeg"}, "file_format must be png or png16 or dicom"),
        ("inference", "none", {"num_steps": 0}, "num_steps must be a whole number of at least 1"),
        ("inference", "none", {"guidance_rescale": 2}, "guidance_rescale must be a number from 0 to 1"),
        ("inference", "flow", {"sampler": "dpm++"}, "sampler must be rflow for a network trained with RFlowScheduler"),
        ("inference", "none", {"image_size": 60}, "image_size must be a multiple of 16"),
        ("inference", "none", {"model_path": "nowhere/model.pt"}, "no scaling of latents at nowhere"),
        ("edit", "none", {"strength": 0}, "strength must be above 0"),
        ("edit", "none", {"file_format": "jpeg"}, "file_format must be png or png16 or dicom"),
        ("edit", "none", {"inpaint": True, "split": "bare"}, "takes a mask for each image, got none"),
        ("edit", "none", {"mask_dir": "nowhere"}, "expected a folder, got nowhere"),
        ("interpolate", "none", {"seeds": "1"}, "between two or more latents"),
        ("interpolate", "none", {"sampler": "ddpm"}, "needs a sampler without noise of its own"),
        ("interpolate", "none", {"file_name": "a.png"}, "file_name must be a name that ends in"),
    ],
)
def test_mistake_is_one_line(run, datalist, tmp_path, monkeypatch, config, kind, settings, message):
    monkeypatch.chdir(tmp_path)
    if settings.get("split") == "bare":
        content = json.loads(datalist.read_text())
        content["bare"] = [{"image": content["test"][0]["image"], "patient": "p"}]
        content["test"] = []
        (tmp_path / "bare.json").write_text(json.dumps(content))
        settings = {**settings, "datalist": "bare.json", "dataset_dir": str(datalist.parent)}

    with pytest.raises((ValueError, RuntimeError)) as raised:
        run(config, kind, **settings)

    assert_one_line(raised.value, message)
    assert not (tmp_path / "out" / "samples").exists()


def test_scaling_of_another_autoencoder_is_refused(run, models, tmp_path):
    LatentScaling((0.8,), (0.0,), "0" * 64).write(tmp_path / "scaling.json")

    with pytest.raises((ValueError, RuntimeError)) as raised:
        run("inference", "none", scaling_path=str(tmp_path / "scaling.json"))

    assert_one_line(raised.value, "the scaling belongs to")


@pytest.mark.parametrize("config", ["inference", "edit", "interpolate"])
def test_missing_weights_are_one_line(run, models, tmp_path, config):
    for name in ("autoencoder.pt", "scaling.json"):
        (tmp_path / name).symlink_to(models["none"].with_name(name))

    with pytest.raises((ValueError, RuntimeError)) as raised:
        run(config, "none", model_path=str(tmp_path / "model.pt"))

    assert_one_line(raised.value, r"no weights at .*model\.pt")


@pytest.mark.parametrize("config", ["inference", "edit", "interpolate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "epsilon"),
        ("null_caption", "eos"),
        ("num_head_channels", [0, 16, 32]),
        ("norm_num_groups", 16),
        ("scale", [0.3]),
        ("num_classes", 3),
    ],
)
def test_settings_of_the_training_are_asked_for(run, models, tmp_path, config, name, value):
    record = models["none"].with_name("trained_as.json")
    record.write_text(json.dumps({name: value}))
    try:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            run(config, "none")
    finally:
        record.unlink()

    assert_one_line(raised.value, f"{name} must be {re.escape(str(value))} as in the training")


@pytest.mark.parametrize("change", [{"beta_end": 0.03}, {"prediction_type": "epsilon"}, {"amp": False}])
def test_samples_of_another_schedule_are_not_resumed(run, change):
    run("inference", "none", seeds="0")

    with pytest.raises((ValueError, RuntimeError)) as raised:
        run("inference", "none", seeds="0,1", resume=True, **change)

    assert_one_line(raised.value, f"were made with {next(iter(change))} ")


def test_edits_of_other_settings_are_not_mixed(run, datalist, tmp_path, capsys):
    names = [Path(item["image"]).name for item in load_datalist(datalist, "test")]
    run("edit", "text", prompt="edema, effusion", strength=0.5)
    assert "1 prompt: 'edema, effusion'\n" in capsys.readouterr().out
    whole = {name: pixels(tmp_path / "out" / "edited" / name) for name in names}
    record = (tmp_path / "out" / "generation.json").read_text()

    for settings, message in (
        ({}, "edited holds images already; make the rest with --resume true"),
        ({"resume": True, "beta_end": 0.03}, r"were made with beta_end 0\.0205, this run has 0\.03"),
        ({"resume": True, "strength": 0.7}, r"were made with strength 0\.5, this run has 0\.7"),
    ):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            run("edit", "text", **{"prompt": "edema, effusion", "strength": 0.5, **settings})
        assert_one_line(raised.value, message)
    assert (tmp_path / "out" / "generation.json").read_text() == record

    (tmp_path / "out" / "edited" / names[1]).unlink()
    run("edit", "text", prompt="edema, effusion", strength=0.5, resume=True)
    assert "2 images, 2 of them new" in capsys.readouterr().out  # one batch
    run("edit", "text", prompt="edema, effusion", strength=0.5, resume=True)
    assert "2 images, 0 of them new" in capsys.readouterr().out
    for name in names:
        np.testing.assert_array_equal(pixels(tmp_path / "out" / "edited" / name), whole[name])


def test_prompt_of_300_words_is_cut_off_and_said_so(run, tmp_path, caplog):
    run("inference", "text", prompt=" ".join(["effusion"] * 299 + ["fracture"]), seeds=0)

    assert list(samples(tmp_path)) == ["seed000000"]
    assert "the text model reads 77 tokens" in caplog.text
    assert "dropped from its end: 225 tokens, 'effusion" in caplog.text


def test_samples_are_read_like_any_images(run, tmp_path):
    run("inference", "none", seeds="0", file_format="png16")

    (frame,) = read_frames(tmp_path / "out" / "samples" / "seed000000.png")
    assert frame.pixels.shape[:2] == (SIDE, SIDE)
