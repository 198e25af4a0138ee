"""A projection's start at an encoder's estimate, with a generator and encoders of a few numbers."""

from __future__ import annotations

import pytest
import torch

from medgen.errors import UserError
from medgen.inferers import EncoderStart, StyleGAN2Projector
from medgen.networks import LatentEncoder, PyramidEncoder, StyleGAN2Generator

TINY = {"image_size": 16, "channel_base": 64, "channel_max": 8, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


class KnowingEncoder(LatentEncoder):
    """Says what it was told."""

    def __init__(self, latents: torch.Tensor, space: str, **changes) -> None:
        super().__init__(
            **{"image_size": 16, "in_channels": 1, "latent_shape": latents.shape[1:], **changes}, space=space
        )
        self.latents, self.sha256 = latents, "0123"

    def estimate(self, x):
        assert not torch.is_grad_enabled()
        return self.latents[: len(x)]


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return StyleGAN2Generator(**TINY).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ws(generator):
    """(3, L, W), a style for each layer."""
    z = torch.randn(3 * generator.num_ws, 8, generator=torch.Generator().manual_seed(1))
    return generator.mapping(z, update_w_avg=False)[:, 0].unflatten(0, (3, -1))


def make_projector(**changes) -> StyleGAN2Projector:
    return StyleGAN2Projector(**{"steps": 1, "w_avg_samples": 100, **changes})  # one step leaves w where it starts


def images_of(generator, ws: torch.Tensor) -> torch.Tensor:
    return ((generator.synthesis(ws, "const") + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize(("space", "of_encoder"), [("w", "w"), ("w+", "w"), ("w+", "w+")])
def test_each_image_starts_at_its_own_estimate(space, of_encoder, generator, ws):
    latents = ws if of_encoder == "w+" else ws[:, :1]
    start = EncoderStart(make_projector(space=space), KnowingEncoder(latents, of_encoder))
    start.check(generator)

    with torch.inference_mode():  # as an evaluator calls it
        found = start(images_of(generator, ws), generator)

    torch.testing.assert_close(found["w"], latents.expand(-1, generator.num_ws, -1))


def test_true_latent_draws_the_image_at_once(generator, ws):
    w = ws[:, :1].expand(-1, generator.num_ws, -1)
    images = images_of(generator, w)
    settings = {"optimise_noise": False, "initial_noise_factor": 0.0}

    known = EncoderStart(make_projector(**settings), KnowingEncoder(w[:, :1], "w"))(images, generator)
    unknown = make_projector(**settings)(images, generator)

    assert known["distance"].max() < 1e-4
    assert unknown["distance"].min() > 100 * known["distance"].max()


def test_without_an_encoder_it_is_the_projection_bit_for_bit(generator, ws):
    projector = make_projector(steps=5)
    images = images_of(generator, ws)

    plain, wrapped = projector(images, generator), EncoderStart(projector)(images, generator)

    assert EncoderStart(projector).settings == projector.settings
    EncoderStart(projector).check(generator)
    assert torch.equal(plain["w"], wrapped["w"])
    assert all(map(torch.equal, plain["noise"], wrapped["noise"]))


def test_settings_name_the_encoder(ws):
    projector = make_projector()
    start = EncoderStart(projector, KnowingEncoder(ws[:, :1], "w"))
    assert start.settings == {**projector.settings, "encoder_sha256": "0123"}


@pytest.mark.parametrize(
    ("space", "of_encoder", "message"),
    [
        ("w", "w+", r"must estimate w, this one estimates w\+; set --space w\+$"),
        ("w", "z", "must estimate w, this one estimates z; name one that was trained with --space w$"),
        ("w+", "z", r"in w\+ must estimate w or w\+, this one estimates z; name one"),
    ],
)
def test_encoder_of_another_space_is_refused(space, of_encoder, message, ws):
    latents = ws if of_encoder == "w+" else ws[:, :1]
    with pytest.raises(UserError, match=message):
        EncoderStart(make_projector(space=space), KnowingEncoder(latents, of_encoder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 32}, r"the images of the encoder must be \(1, 16, 16\) as the generator's, got \(1, 32, 32\)"),
        ({"in_channels": 3}, r"the images of the encoder must be \(1, 16, 16\) as the generator's, got \(3, 16, 16\)"),
        ({"latent_shape": (1, 4)}, r"the latents of the encoder must be \(1, 8\) as the generator's, got \(1, 4\)"),
    ],
)
def test_encoder_of_another_shape_is_refused(changes, message, generator, ws):
    with pytest.raises(UserError, match=message + r"; .*--encoder_overlay$"):
        EncoderStart(make_projector(), KnowingEncoder(ws[:, :1], "w", **changes)).check(generator)


def test_encoder_with_too_few_styles_is_refused(generator):
    encoder = PyramidEncoder(16, latent_shape=(4, 8), size="atto", patch=2)
    with pytest.raises(
        UserError, match=r"the latents of the encoder must be \(6, 8\) as the generator's, got \(4, 8\)"
    ):
        EncoderStart(make_projector(space="w+"), encoder).check(generator)
