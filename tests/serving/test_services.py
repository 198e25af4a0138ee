"""Services of all bundles, through their own serve.json: equal to the inferers of their inference, and repeatable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from base64_pictures import as_base64, picture
from monai.bundle import ConfigParser
from monai.transforms import LoadImage
from PIL import Image

from medgen.data import MedicalImageReader
from medgen.errors import UserError
from medgen.inferers import DCGANInferer, GeneratorInferer, LatentDiffusionSampler, PGGANInferer
from medgen.serving import limits, load_service
from medgen.serving.service import request_images

# of the function that MONAI's RemoveSmallObjects calls, once an image
pytestmark = pytest.mark.filterwarnings("ignore:Parameter `min_size` is deprecated")


@pytest.fixture(scope="module")
def service(make_bundle):
    """A bundle's service on the CPU, loaded once."""
    loaded = {}

    def load(name, *overlays, **settings):
        key = (name, overlays, json.dumps(settings))
        if key not in loaded:
            loaded[key] = load_service(make_bundle(name, *overlays, **settings), "cpu")
        return loaded[key]

    return load


def levels(images: torch.Tensor) -> np.ndarray:
    """8-bit levels (B, H, W) of grey images (B, 1, H, W) in [0, 1]."""
    return np.rint(images[:, 0].double().cpu().numpy() * 255).astype(np.uint8)


def preprocessed(bundle: Path, config: str, radiograph: np.ndarray, folder: Path, **settings) -> torch.Tensor:
    """What a config's whole preprocessing makes of a file."""
    Image.fromarray(radiograph).save(folder / "image.png")
    parser = ConfigParser(json.loads((bundle / "configs" / f"{config}.json").read_text()) | settings)
    item = {"image": str(folder / "image.png"), "noise_seed": 0}
    return parser.get_parsed_content("preprocessing")(item)["image"].as_tensor()[None]


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("name", "inferer", "task"),
    [("cxr_pggan", PGGANInferer(0.7), {}), ("stylegan2_anomaly", GeneratorInferer(0.7), {"task": "sample"})],
)
def test_samples_are_those_of_the_inferer(service, name, inferer, task):
    served = service(name)

    answers = served({"image": []}, {"seed": 5, "num_samples": 3, "truncation_psi": 0.7, **task})

    with torch.no_grad():
        expected = levels(inferer([5, 6, 7], served.network))
    assert [answer["seed"] for answer in answers] == [5, 6, 7]
    np.testing.assert_array_equal([picture(answer["image"]) for answer in answers], expected)


def test_samples_in_colour_are_those_of_the_inferer(service):
    served = service("skin_sngan", num_classes=2)

    answers = served([], {"seed": 5, "num_samples": 2, "truncation_psi": 0.7})

    with torch.no_grad():
        expected = DCGANInferer(0.7)([5, 6], served.network, labels=torch.tensor([1, 0]))
    shown = [picture(answer["image"]) for answer in answers]
    np.testing.assert_array_equal(shown, np.rint(expected.permute(0, 2, 3, 1).double().numpy() * 255))


def test_classes_take_turns_or_are_chosen(service):
    served = service("cxr_pggan", num_classes=3)

    turns, chosen = (served([], {"seed": 1, "num_samples": 3, **more}) for more in ({}, {"class_index": 2}))

    assert [answer["class_index"] for answer in turns] == [1, 2, 0]
    assert [answer["class_index"] for answer in chosen] == [2, 2, 2]
    assert turns[1] == chosen[1]
    assert turns[0]["image"] != chosen[0]["image"]
    with pytest.raises(UserError, match="class_index must be a whole number from 0 to 2, got 3"):
        served([], {"class_index": 3})


def test_diffusion_samples_are_those_of_the_sampler(service):
    served = service("cxr_latent_diffusion", "labels")

    answers = served(None, {"seed": 2, "num_samples": 2, "num_steps": 2, "guidance_scale": 2, "class_index": 1})

    keywords = served.inferer.keywords
    sampler = LatentDiffusionSampler(**keywords, num_steps=2, guidance_scale=2)
    np.testing.assert_array_equal(
        [picture(answer["image"]) for answer in answers], levels(sampler([2, 3], served.network, labels=[1, 1]))
    )


def test_parameters_of_diffusion_are_those_of_its_conditioning(service):
    def names(*overlays):
        return {parameter.name for parameter in service("cxr_latent_diffusion", *overlays).parameters}

    common = {"seed", "num_samples", "num_steps", "format"}
    assert names("unconditional") == common
    assert names("labels") == {*common, "class_index", "guidance_scale"}
    assert names() == {*common, "prompt", "negative_prompt", "guidance_scale"}


def test_text_model_that_is_not_there_is_named_when_it_is_needed(service):
    with pytest.raises(
        limits.UnavailableError, match=r"text model does not lie on the server, in text_encoder; .*MEDGEN_TEXT_ENCODER"
    ):
        service("cxr_latent_diffusion")(None, {"prompt": "No acute cardiopulmonary process.", "num_steps": 1})
    with pytest.raises(UserError, match="negative_prompt needs a prompt"):
        service("cxr_latent_diffusion")(None, {"negative_prompt": "pacemaker"})


def test_samplers_take_no_image(service, png):
    with pytest.raises(UserError, match=r"makes images and takes none, got 1; leave the inputs empty: \[\]"):
        service("cxr_pggan")({"image": png})


def test_last_seed_is_the_last(service):
    with pytest.raises(UserError, match="seeds must be at most 4294967295, got 2 from 4294967295"):
        service("cxr_pggan")([], {"seed": 2**32 - 1, "num_samples": 2})


# ---------------------------------------------------------------- images


def test_reconstruction_is_that_of_the_inference(service, make_bundle, radiograph, png, tmp_path):
    served = service("cxr_autoencoder_kl")
    batch = preprocessed(make_bundle("cxr_autoencoder_kl"), "inference", radiograph, tmp_path, image_size=64)

    (answer,) = served({"image": png}, {"latent": True})

    with torch.no_grad():
        mean, std = served.network.encode(batch)
        expected = served.network.decode(mean)
    np.testing.assert_array_equal(picture(answer["image"]), levels(expected.clamp(0, 1))[0])
    np.testing.assert_array_equal(np.float32(answer["mean"]), mean[0].numpy())
    np.testing.assert_array_equal(np.float32(answer["std"]), std[0].numpy())
    assert answer["l1"] == pytest.approx((expected.clamp(0, 1) - batch).abs().mean().item(), rel=1e-5)
    assert answer["psnr"] == pytest.approx(
        -10 * np.log10((expected.clamp(0, 1) - batch).square().mean().item()), rel=1e-5
    )


def test_latent_is_that_of_the_encoder(service, make_bundle, radiograph, png, tmp_path):
    served = service("cxr_inversion_encoder")
    batch = preprocessed(make_bundle("cxr_inversion_encoder"), "inference", radiograph, tmp_path, image_size=64)

    (answer,) = served([{"image": png}])

    with torch.no_grad():
        np.testing.assert_array_equal(np.float32(answer["latent"]), served.network(batch)[0].numpy())
    assert answer["space"] == "z"
    assert set(answer) == {"latent", "space"}  # there is no generator in the bundle


def test_latent_of_styles_has_its_distance_from_their_mean(service, png):
    served = service("cxr_inversion_encoder", "w_plus")
    served.network.latent_std.fill_(2.0)

    (answer,) = served({"image": png})

    assert np.shape(answer["latent"]) == (10, 128)
    assert answer["distance_from_mean"] == pytest.approx(np.sqrt(np.mean(np.square(answer["latent"]))) / 2, rel=1e-5)


def test_encoder_with_its_generator_gives_the_reconstruction(make_bundle, png, tmp_path):
    import shutil

    folder = shutil.copytree(make_bundle("cxr_inversion_encoder"), tmp_path / "encoder")
    shutil.copytree(make_bundle("cxr_pggan"), folder / "generator")
    shutil.copy(folder / "generator/configs/serve.json", folder / "generator/configs/inference.json")
    served = load_service(folder, "cpu")

    (answer,) = served({"image": png})

    with torch.no_grad():
        expected = served.generator(torch.tensor(answer["latent"])[None]).clamp(0, 1)
    np.testing.assert_allclose(picture(answer["image"]).astype(int), levels(expected)[0].astype(int), atol=1)
    assert 0 < answer["psnr"] < 60


def test_projection_and_scores_are_those_of_the_inference(service, make_bundle, radiograph, png, tmp_path):
    served = service("stylegan2_anomaly")
    batch = preprocessed(make_bundle("stylegan2_anomaly"), "inference", radiograph, tmp_path, preset="small_64")

    (answer,) = served({"image": png}, {"steps": 2})

    projector = served.projector
    before, projector.steps = projector.steps, 2
    found = projector(batch, served.network)
    projector.steps = before
    reconstruction = levels(found["reconstruction"])[0]
    np.testing.assert_array_equal(picture(answer["reconstruction"]), reconstruction)
    difference = (levels(batch)[0].astype(float) - reconstruction) / 255
    assert answer["scores"]["mse_full"] == pytest.approx((difference**2).mean(), rel=1e-6)
    assert answer["distance"] == pytest.approx(found["distance"].item(), rel=1e-5)


def test_maps_have_the_pixels_of_the_image_and_overlays_a_size_to_look_at(service, png):
    served = service("stylegan2_anomaly")

    (answer,) = served({"image": png}, {"steps": 1, "format": "array"})

    heat = np.array(answer["mse_map"], dtype=float)
    assert heat.shape == (1, 120, 100)
    assert np.isnan(heat[:, :9]).all()  # outside the centre crop nothing was scored
    assert np.nanmax(heat) == pytest.approx(answer["mse_top"])
    assert min(picture(answer["wd_overlay"]).shape[:2]) >= 512


def test_seed_of_a_request_is_that_of_the_projection(service, png):
    served = service("stylegan2_anomaly")

    own, same, other = (served({"image": png}, {"steps": 2, **more}) for more in ({}, {"seed": 303}, {"seed": 2}))

    assert own == same  # the bundle's
    assert own[0]["distance"] != other[0]["distance"]
    assert served({"image": png}, {"steps": 2}) == own


def test_samples_begin_with_the_first_seed(service):
    assert service("stylegan2_anomaly")([], {"task": "sample"})[0]["seed"] == 0


def test_steps_of_one_request_are_not_those_of_the_next(service, png):
    served = service("stylegan2_anomaly")
    first = served({"image": png}, {"steps": 1})

    served({"image": png}, {"steps": 3})

    assert served({"image": png}, {"steps": 1}) == first


@pytest.mark.parametrize(
    ("images", "params", "message"),
    [
        (1, {"task": "draw"}, "task must be one of score, sample, got 'draw'"),
        (0, {}, "the task score takes images, got none"),
        (1, {"task": "sample"}, "the task sample takes no image, got 1"),
        (1, {"steps": 1001}, "steps must be a whole number from 1 to 1000, got 1001"),
        (5, {"steps": 1}, "at most 4 images, got 5"),
        (1, {"num_samples": 9}, "num_samples belongs to the task sample, got it with the task score"),
        (1, {"truncation_psi": 0.1}, "truncation_psi belongs to the task sample"),
        (0, {"task": "sample", "steps": 7}, "steps belongs to the task score, got it with the task sample"),
    ],
)
def test_detector_refuses_what_does_not_fit_its_task(service, png, images, params, message):
    with pytest.raises(UserError, match=message):
        service("stylegan2_anomaly")({"image": [png] * images}, params)


def test_class_is_that_of_the_inference(service, make_bundle, radiograph, png, tmp_path):
    served = service("augmentation_classifier")
    batch = preprocessed(make_bundle("augmentation_classifier"), "inference", radiograph, tmp_path, image_size=32)

    (answer,) = served({"image": png})

    with torch.no_grad():
        expected = torch.softmax(served.network(batch)[0], dim=0).tolist()
    assert answer["probabilities"] == pytest.approx({"0": expected[0], "1": expected[1]})
    assert answer["class_index"] == int(expected[1] > expected[0])
    assert answer["class"] == str(answer["class_index"])  # no names lie beside these weights


def test_classes_have_the_names_of_the_training(make_bundle, png, tmp_path):
    import shutil

    folder = shutil.copytree(make_bundle("augmentation_classifier"), tmp_path / "bundle")
    (folder / "models" / "trained_as.json").write_text('{"label_names": ["nevus", "melanoma"], "image_size": 32}')

    (answer,) = load_service(folder, "cpu")({"image": png})

    assert set(answer["probabilities"]) == {"nevus", "melanoma"}
    assert answer["probabilities"][answer["class"]] == max(answer["probabilities"].values())


def test_mask_has_the_pixels_of_the_image(service, radiograph, png):
    served = service("lung_segmentation", min_area=0.0)

    (answer,) = served({"image": png}, {"mc_passes": 0})

    mask = picture(answer["mask"])
    assert mask.shape == radiograph.shape
    assert set(np.unique(mask)) <= {0, 255}
    assert answer["area_fraction"] == pytest.approx((mask > 0).mean())
    if answer["box"]:
        rows, columns = np.nonzero(mask)
        top, left, bottom, right = answer["box"]
        assert top <= rows.min() < rows.max() < bottom
        assert left <= columns.min() < columns.max() < right
    assert "uncertainty" not in answer


def test_uncertainty_comes_from_the_seed_of_the_request(service, radiograph, png):
    served = service("lung_segmentation")

    first, other, again = (
        served({"image": png}, {"mc_passes": 3, "seed": seed, "format": "array"})[0] for seed in (0, 1, 0)
    )

    assert first == again
    assert first["uncertainty"] != other["uncertainty"]
    assert np.shape(first["uncertainty"]) == (1, *radiograph.shape)
    assert 0 < first["mean_uncertainty"] < 0.5


def test_picture_of_one_grey_has_no_lungs(service):
    (answer,) = service("lung_segmentation")({"image": as_base64(np.full((40, 40), 90, np.uint8))}, {"mc_passes": 0})

    assert answer["box"] is None
    assert answer["reason"] == "no lung found: the image is one grey level"
    assert not picture(answer["mask"]).any()


def test_answer_of_an_image_does_not_depend_on_the_others(service, radiograph, png):
    served = service("cxr_autoencoder_kl")
    other = as_base64(255 - radiograph)

    alone, *_ = served({"image": png})
    together = served({"image": [other, png, other]})

    assert together[1] == alone
    assert together[0] != alone


def test_wrong_image_among_several_is_named(service, png):
    with pytest.raises(UserError, match="image 2 of 3 must be a PNG or JPEG"):
        service("cxr_autoencoder_kl")({"image": [png, "x", png]})


def test_network_keeps_no_gradient_and_no_state(service, png):
    served = service("cxr_autoencoder_kl")
    before = {name: value.clone() for name, value in served.network.state_dict().items()}

    served({"image": png})

    assert not any(parameter.requires_grad for parameter in served.network.parameters())
    assert not served.network.training
    assert all(torch.equal(value, before[name]) for name, value in served.network.state_dict().items())


# ---------------------------------------------------------------- requests


ROWS = [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, []),
        ([], []),
        ({}, []),
        ({"image": []}, []),
        (pd.DataFrame(), []),
        (pd.DataFrame({"image": [[]]}), []),
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ({"image": "a"}, ["a"]),
        ([{"image": "a"}, {"image": "b"}], ["a", "b"]),
        (pd.DataFrame({"image": ["a", "b"]}), ["a", "b"]),
        (pd.DataFrame({"image": [["a", "b"]]}), ["a", "b"]),  # what MLflow makes of {"inputs": ["a", "b"]}
        ({"image": ROWS}, [ROWS]),  # one picture
        ({"image": [ROWS, ROWS]}, [ROWS, ROWS]),
        ({"image": [[ROWS]]}, [[ROWS]]),
        (pd.DataFrame({"image": ROWS}), [ROWS]),  # what MLflow makes of one picture
        ([{"image": None}], [None]),
        ({"image": [1, 2]}, [1, 2]),
    ],
)
def test_images_are_found_in_every_form_of_a_request(given, found):
    assert request_images(given) == found


def test_other_names_than_image_are_refused():
    with pytest.raises(UserError, match="key image, got picture"):
        request_images({"picture": "a"})
    with pytest.raises(UserError, match="column image, got a, b"):
        request_images(pd.DataFrame({"a": ["x"], "b": ["y"]}))


# ---------------------------------------------------------------- time


class Clock:
    """Tells another second each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize(
    ("name", "overlays", "images", "params"),
    [
        ("stylegan2_anomaly", (), 1, {"steps": 1000}),
        ("cxr_latent_diffusion", ("labels",), 0, {"num_steps": 100}),
        ("lung_segmentation", (), 1, {"mc_passes": 50}),
        ("cxr_pggan", (), 0, {"num_samples": 16}),
        ("cxr_autoencoder_kl", (), 8, {}),
    ],
)
def test_work_ends_when_its_time_is_up(service, monkeypatch, png, name, overlays, images, params):
    served = service(name, *overlays)
    clock = Clock()
    monkeypatch.setattr(limits, "monotonic", clock)

    with limits.time_limit(4), pytest.raises(limits.LateError, match="takes longer than the server's time limit"):
        served({"image": [png] * images}, params)

    assert clock.now <= 6  # within a step of the end
    assert not served._lock.locked()


def test_request_does_not_wait_longer_than_its_client(service):
    served = service("cxr_pggan")

    with served._lock, limits.time_limit(0.01), pytest.raises(limits.LateError):
        served([])

    assert served([])


# ---------------------------------------------------------------- loading


def test_weights_of_another_network_are_refused(make_bundle, tmp_path):
    import shutil

    folder = shutil.copytree(make_bundle("cxr_pggan"), tmp_path / "bundle")
    torch.save({"x": torch.zeros(2)}, folder / "models" / "model.pt")

    with pytest.raises(UserError, match=r"models/model\.pt belongs to another architecture"):
        load_service(folder, "cpu")


def test_config_that_cannot_be_served_is_told_in_one_line(make_bundle):
    with pytest.raises(UserError, match=r"configs/serve.json of cxr_pggan cannot be served") as caught:
        load_service(make_bundle("cxr_pggan", request_samples="$1 / 0"), "cpu")
    assert "\n" not in str(caught.value)


def test_image_reader_and_service_agree_on_the_image(radiograph, tmp_path, service, png):
    Image.fromarray(radiograph).save(tmp_path / "image.png")
    loaded = LoadImage(reader=MedicalImageReader, ensure_channel_first=True)(tmp_path / "image.png")
    served = service("cxr_autoencoder_kl")

    assert served({"image": png}) == served({"image": [loaded.tolist()]})
