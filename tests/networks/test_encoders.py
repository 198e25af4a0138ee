"""Encoders from images to latents."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import convnext_tiny

from medgen.errors import UserError
from medgen.networks import (
    ConvNeXtEncoder,
    LatentDiscriminator,
    LatentGenerator,
    PGGANGenerator,
    PyramidEncoder,
    StyleGAN2Generator,
    begin_encoder,
)

SMALL = {"size": "atto", "layer_scale": 0.1}


def pyramid(styles=10, image_size=64, **changes) -> PyramidEncoder:
    torch.manual_seed(0)
    return PyramidEncoder(image_size, 1, (styles, 8), **{**SMALL, **changes})


@pytest.mark.parametrize(("image_size", "channels"), [(64, 1), (128, 3), ((64, 96), 1)])
def test_encoders_take_any_size_grey_or_rgb(image_size, channels):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.rand(2, channels, height, width)

    for encoder, shape in (
        (ConvNeXtEncoder(image_size, channels, (1, 12), "z", **SMALL), (2, 1, 12)),
        (PyramidEncoder(image_size, channels, (10, 12), **SMALL), (2, 10, 12)),
    ):
        assert encoder(images).shape == shape


def test_latents_of_z_lie_on_the_sphere():
    latents = ConvNeXtEncoder(64, 1, (1, 12), "z", **SMALL)(torch.rand(3, 1, 64, 64))

    torch.testing.assert_close(latents.square().mean(2), torch.ones(3, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [lambda: ConvNeXtEncoder(64, 1, (1, 8), "w", **SMALL), pyramid])
def test_latent_of_an_image_does_not_depend_on_its_batch(make):
    torch.manual_seed(0)
    encoder, images = make().train(), torch.rand(4, 1, 64, 64)

    torch.testing.assert_close(encoder(images)[2:3], encoder(images[2:3]), atol=1e-5, rtol=1e-5)


def test_mean_and_deviation_are_those_of_the_generator():
    torch.manual_seed(0)
    network = StyleGAN2Generator(64, channel_base=64, channel_max=8, latent_dim=6, w_dim=8, num_mapping_layers=2)
    generator, encoder = LatentGenerator(network), pyramid()
    images = torch.rand(2, 1, 64, 64)
    estimate = encoder.estimate(images * 2 - 1)

    begin_encoder(encoder, generator)

    torch.testing.assert_close(encoder(images), generator.mean + generator.std * estimate)
    assert {"latent_mean", "latent_std"} <= set(encoder.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 4, 9])
def test_at_stage_k_only_the_first_k_styles_differ_from_w(stage):
    encoder, images = pyramid(), torch.rand(2, 1, 64, 64)
    encoder.stage = 0
    w = encoder(images)
    encoder.stage = stage

    differs = (encoder(images) - w).abs().amax((0, 2)) > 1e-6

    assert differs.tolist() == [1 <= style <= stage for style in range(10)]
    assert (w == w[:, :1]).all()


def test_gradients_reach_the_heads_of_the_deltas_in_use_alone():
    encoder = pyramid()
    encoder.stage = 3
    encoder(torch.rand(1, 1, 64, 64)).sum().backward()

    reached = [any(p.grad is not None for p in head.parameters()) for head in encoder.heads]

    assert reached == [style <= 3 for style in range(10)]


def test_stage_travels_with_the_weights():
    encoder, other = pyramid(), pyramid()
    encoder.stage = 5

    other.load_state_dict(encoder.state_dict())

    assert other.stage == 5
    images = torch.rand(1, 1, 64, 64)
    torch.testing.assert_close(other(images), encoder(images))


def test_styles_come_from_the_map_of_their_scale():
    # e4e: 0 to 2 coarse, 3 to 6 middle, the rest fine
    assert pyramid(styles=18, image_size=256).map_of_style == [0] * 3 + [1] * 4 + [2] * 11


def test_pretrained_weights_do_what_the_classifier_did(tmp_path):
    torch.manual_seed(0)
    classifier = convnext_tiny(weights=None).eval()
    torch.save(classifier.state_dict(), tmp_path / "convnext.pth")
    rgb = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    # a grey image stands for three equal channels
    for channels, images in ((3, rgb), (1, rgb[:, :1])):
        encoder = ConvNeXtEncoder(64, channels, (1, 4), "w", size="tiny")
        encoder.load_pretrained(tmp_path / "convnext.pth")
        expected = classifier.features((images.expand(-1, 3, -1, -1) - mean) / std)
        torch.testing.assert_close(encoder.trunk(images * 2 - 1), expected, atol=2e-4, rtol=1e-3)


def test_weights_of_another_classifier_are_refused(tmp_path):
    torch.save({"features.0.0.weight": torch.zeros(3)}, tmp_path / "other.pth")

    with pytest.raises(UserError, match="must hold torchvision's ConvNeXt of the encoder's size"):
        ConvNeXtEncoder(64, 1, (1, 4), "w", size="atto").load_pretrained(tmp_path / "other.pth")
    with pytest.raises(UserError, match="patch must be 4 for pretrained weights, got 2"):
        ConvNeXtEncoder(64, 1, (1, 4), "w", size="atto", patch=2).load_pretrained(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNeXtEncoder(64, size="huge"), "size must be one of atto, pico, tiny, small, base, got 'huge'"),
        (lambda: ConvNeXtEncoder(64, 0, size="atto"), "in_channels must be at least 1, got 0"),
        (lambda: ConvNeXtEncoder(64, pooled_size=3, size="atto"), "pooled_size must be from 1 to 2"),
        (lambda: ConvNeXtEncoder(16, size="atto"), "image_size must be at least 32 for patches of 4"),
        (lambda: ConvNeXtEncoder("64", size="atto"), "image_size must be a side or"),
        (lambda: ConvNeXtEncoder(64, 1, (2, 8), "z", size="atto"), r"latent_shape must be \[1, width\]"),
        (lambda: ConvNeXtEncoder(64, 1, (8,), "z", size="atto"), r"latent_shape must be \[styles, width\]"),
        (lambda: ConvNeXtEncoder(64, 1, (1, 8), "y", size="atto"), "space must be z, w or w+"),
        (lambda: PyramidEncoder(64, 1, (1, 8), "w", size="atto"), "a pyramid of styles is for the space w+"),
        (lambda: PyramidEncoder(16, 1, (10, 8), size="atto"), "image_size must be at least 32"),
        (lambda: setattr(pyramid(), "stage", 10), "stage must be a whole number from 0 to 9"),
        (lambda: pyramid()(torch.rand(1, 1, 32, 32)), r"images must be \(B, 1, 64, 64\)"),
    ],
)
def test_wrong_settings_are_told_in_one_line(make, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        make()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: ConvNeXtEncoder(64, 1, (1, 5), "z", **SMALL), r"image_size of the encoder.*\[32,32\]"),
        (lambda: ConvNeXtEncoder(32, 3, (1, 5), "z", **SMALL), "in_channels of the encoder must be the generator's, 1"),
        (lambda: ConvNeXtEncoder(32, 1, (1, 6), "z", **SMALL), r"latent_shape of the encoder.*\[1,5\]"),
        (lambda: ConvNeXtEncoder(32, 1, (1, 5), "w", **SMALL), "space of the encoder must be the generator's, z"),
    ],
)
def test_generator_of_another_kind_is_refused(encoder, message):
    generator = LatentGenerator(PGGANGenerator((8, 6, 4, 4), latent_dim=5))

    with pytest.raises(UserError, match=message):
        begin_encoder(encoder(), generator)


def test_weights_of_an_encoder_of_another_generator_are_refused(tmp_path):
    settings = {"channel_base": 64, "channel_max": 8, "latent_dim": 6, "w_dim": 8, "num_mapping_layers": 2}
    generators = [LatentGenerator(StyleGAN2Generator(64, **settings), "w") for _ in range(2)]
    encoder = begin_encoder(ConvNeXtEncoder(64, 1, (1, 8), "w", **SMALL), generators[0])
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    fresh = ConvNeXtEncoder(64, 1, (1, 8), "w", **SMALL)

    begin_encoder(fresh, generators[0], tmp_path / "encoder.pt")
    torch.testing.assert_close(fresh.head.weight, encoder.head.weight)
    with pytest.raises(UserError, match="was trained for another generator"):
        begin_encoder(fresh, generators[1], tmp_path / "encoder.pt")


def test_latent_discriminator_judges_each_style_by_itself():
    torch.manual_seed(0)
    judge, styles = LatentDiscriminator(8, hidden=16), torch.randn(5, 8)

    torch.testing.assert_close(judge(styles)[1:2], judge(styles[1:2]))
    assert judge(styles).shape == (5, 1)
    assert sum(isinstance(layer, torch.nn.LeakyReLU) for layer in judge.layers) == 3
