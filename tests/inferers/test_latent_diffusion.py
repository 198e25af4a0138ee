"""Images from seeds by diffusion: guided, from an image, within a mask; the same in any batch."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler, RFlowScheduler
from torch import nn

from medgen.data.latents import LatentScaling
from medgen.engines.trainer import autocast as autocast_of_trainer
from medgen.errors import UserError
from medgen.inferers import LatentDiffusionSampler, Sampler
from medgen.inferers.latent_diffusion import _filled
from medgen.inferers.samplers import SAMPLERS
from medgen.networks import KLAutoencoder
from medgen.precision import autocast

SCALING = LatentScaling(scale=(2.0, 4.0, 1.0), shift=(0.5, 0.4, 0.6), autoencoder_sha256="")
SHAPE = (3, 8, 8)
PROMPTS = ["edema", "small effusion", "", "pneumonia"]


class Blocks(nn.Module):
    """An autoencoder of three equal channels of block means; decoding takes the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = nn.functional.avg_pool2d(images, 4).expand(-1, 3, -1, -1)
        return mean, torch.full_like(mean, 9.0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        assert latents.dtype == torch.float32
        return nn.functional.interpolate(latents[:, :1], scale_factor=4.0)


class Captions:
    """A text conditioner of one token, that tells texts apart by their length."""

    key = "caption"

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"context": torch.tensor([[[float(len(caption))] * 4] for caption in captions]).sin()}

    def null(self, batch: int) -> dict[str, torch.Tensor]:
        return self([""] * batch)


class Labels:
    """A conditioner on three classes."""

    key = "label"

    def __call__(self, labels: list[int] | torch.Tensor) -> dict[str, torch.Tensor]:
        return {"class_labels": torch.as_tensor(labels)}

    def null(self, batch: int) -> dict[str, torch.Tensor]:
        return self([3] * batch)


class Counted(nn.Module):
    """A network that remembers the sizes of its batches and its timesteps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.batches, self.timesteps = network, [], []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        self.timesteps.append(timesteps)
        return self.network(x, timesteps=timesteps, **condition)


class Still(nn.Module):
    """Puts out what it was told, whatever it is given."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.output.expand_as(x)


def unet(kind: str = "") -> nn.Module:
    """A small U-Net with random weights, the zeros that it begins with among them."""
    torch.manual_seed(0)
    network = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=1,
        channels=(8, 16),
        attention_levels=(False, True),
        num_head_channels=(0, 16),
        norm_num_groups=4,
        with_conditioning=kind == "text",
        cross_attention_dim=4 if kind == "text" else None,
        num_class_embeds=4 if kind == "labels" else None,
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def training(prediction_type: str = "v_prediction") -> DDPMScheduler:
    return DDPMScheduler(
        1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, prediction_type=prediction_type
    )


def sampler(conditioner: object | None = None, **settings) -> LatentDiffusionSampler:
    settings = {"noise_scheduler": training(), "num_steps": 6, "spacing": "trailing", **settings}
    return LatentDiffusionSampler(
        autoencoder=Blocks(), scaling=SCALING, latent_shape=SHAPE, conditioner=conditioner, **settings
    )


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 1, 32, 32, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.25


# Seeds


@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.8)])
def test_an_image_does_not_depend_on_its_batch(name, eta):
    network = unet("text")
    scheduler = RFlowScheduler(1000) if name == "rflow" else training()
    inferer = sampler(Captions(), noise_scheduler=scheduler, sampler=name, eta=eta, guidance_scale=3.0)

    together = inferer.sample_latents([7, 1, 30, 2], network, prompts=PROMPTS)

    for number, seed in enumerate([7, 1, 30, 2]):
        alone = inferer.sample_latents([seed], network, prompts=PROMPTS[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_images_are_unwhitened_decoded_and_clamped():
    network, inferer = unet(), sampler()

    images = inferer(torch.tensor([4, 5]), network)

    latents = inferer.sample_latents([4, 5], network)
    expected = nn.functional.interpolate(latents[:, :1] / 2.0 + 0.5, scale_factor=4.0)
    assert expected.max() > 1
    assert expected.min() < 0
    torch.testing.assert_close(images, expected.clamp(0, 1))


def test_noise_is_not_that_of_weights_of_the_same_seed():
    torch.manual_seed(11)
    weights = torch.randn(SHAPE)

    drawn = sampler().interpolate(11, 12, [0.0])[0]

    assert torch.corrcoef(torch.stack([drawn.flatten(), weights.flatten()]))[0, 1].abs() < 0.3
    assert abs(drawn.std() - 1) < 0.15


def test_torchs_own_generator_is_not_moved():
    network, inferer = unet(), sampler(sampler="ddpm")
    torch.manual_seed(1)
    before = torch.get_rng_state()

    inferer([0, 1], network)

    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)


def test_the_network_sees_the_samplers_timesteps():
    counted = Counted(unet())

    sampler(sampler="ddim", num_steps=10, spacing=None)([0, 1], counted)

    assert [int(t[0]) for t in counted.timesteps] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert counted.timesteps[0].tolist() == [900, 900]


# Guidance


@pytest.mark.parametrize(("scale", "prompts"), [(1.0, PROMPTS), (0.0, [""] * 4)])
def test_guidance_1_is_the_conditional_model_and_0_the_unconditional(scale, prompts):
    network, counted = unet("text"), Counted(unet("text"))
    inferer = sampler(Captions(), guidance_scale=scale)

    got = inferer.sample_latents([0, 1, 2, 3], counted, prompts=PROMPTS)

    walk, expected = Sampler(training(), "dpm++", 6, "trailing"), inferer._draw(inferer._generators([0, 1, 2, 3]))
    with torch.no_grad():
        for index, t in enumerate(walk.timesteps):
            output = network(expected, timesteps=t.expand(4), **Captions()(prompts))
            expected = walk.step(output, index, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert counted.batches == [4] * 6


@pytest.mark.parametrize("negative", [None, "blurred", ["a", "bb", "ccc", "dddd"]])
def test_one_batched_forward_is_guidance_by_two(negative):
    network, counted = unet("text"), Counted(unet("text"))
    inferer = sampler(Captions(), guidance_scale=4.0)

    got = inferer.sample_latents([0, 1, 2, 3], counted, prompts=PROMPTS, negative_prompts=negative)

    without = {None: [""] * 4, "blurred": ["blurred"] * 4}.get(negative if isinstance(negative, str) else None)
    without = Captions()(negative if isinstance(negative, list) else without)
    walk, expected = Sampler(training(), "dpm++", 6, "trailing"), inferer._draw(inferer._generators([0, 1, 2, 3]))
    with torch.no_grad():
        for index, t in enumerate(walk.timesteps):
            unconditional = network(expected, timesteps=t.expand(4), **without)
            conditional = network(expected, timesteps=t.expand(4), **Captions()(PROMPTS))
            output = unconditional + 4.0 * (conditional - unconditional)
            expected = walk.step(output, index, expected)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert counted.batches == [8] * 6


def test_no_prompts_are_the_null_in_one_forward():
    counted, inferer = Counted(unet("text")), sampler(Captions())

    got = inferer.sample_latents([0, 1], counted)

    expected = sampler(Captions(), guidance_scale=1.0).sample_latents([0, 1], unet("text"), prompts="")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert counted.batches == [2] * 6


def test_a_network_without_conditions_is_sampled_without():
    counted = Counted(unet())

    sampler()([0, 1], counted)

    assert counted.batches == [2] * 6


def test_labels_guide_as_prompts_do():
    network, inferer = unet("labels"), sampler(Labels(), guidance_scale=2.0)

    both = inferer.sample_latents([0, 1], network, labels=torch.tensor([0, 2]))

    alone = inferer.sample_latents([1], network, labels=[2])
    torch.testing.assert_close(both[1], alone[0], rtol=1e-5, atol=1e-5)
    other = inferer.sample_latents([0, 1], network, labels=torch.tensor([1, 2]))
    assert (both[0] - other[0]).abs().max() > 1e-4
    torch.testing.assert_close(both[1], other[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescale_gives_the_standard_deviation_of_the_conditional_prediction(rescale):
    network, x = unet("text"), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    inferer = sampler(Captions(), guidance_scale=7.0, guidance_rescale=rescale)
    condition = Captions()(["", "", "edema", "small effusion"])

    with torch.no_grad():
        got = inferer._predict(network, x, 500, condition, True)
        conditional = network(x, timesteps=torch.tensor([500, 500]), context=condition["context"][2:])
        without = network(x, timesteps=torch.tensor([500, 500]), context=condition["context"][:2])

    guided = without + 7 * (conditional - without)
    std = torch.stack([conditional.flatten(1).std(1), guided.flatten(1).std(1)])
    expected = rescale * std[0] + (1 - rescale) * std[1]
    torch.testing.assert_close(got.flatten(1).std(1), expected, rtol=1e-4, atol=1e-5)
    assert (std[1] - std[0]).abs().min() > 1e-3


# Images, masks, interpolation


def test_little_strength_gives_the_images_reconstruction():
    images = pictures()
    counted = Counted(Still(SCALING.whiten(Blocks().encode(images)[0])))

    result = sampler(noise_scheduler=training("sample"), num_steps=1000, strength=0.001)([0, 1], counted, images=images)

    assert [t.tolist() for t in counted.timesteps] == [[0, 0]]
    torch.testing.assert_close(result, nn.functional.interpolate(nn.functional.avg_pool2d(images, 4), scale_factor=4))


def test_little_strength_of_a_flow_gives_the_images_latents():
    inferer = sampler(noise_scheduler=RFlowScheduler(1000), sampler="rflow", num_steps=1000, strength=0.001)
    still = Still(torch.zeros(1, *SHAPE))  # its velocity is 0

    latents = inferer.sample_latents([0, 1], still, images=pictures())

    torch.testing.assert_close(latents, inferer.encode(pictures()), rtol=0, atol=0.01)


@pytest.mark.parametrize(("strength", "evaluations"), [(0.25, 5), (0.5, 10), (1.0, 20)])
def test_strength_is_the_share_of_steps_that_is_taken(strength, evaluations):
    network, counted = unet(), Counted(unet())
    inferer = sampler(num_steps=20, sampler="ddim", strength=strength)

    got = inferer.sample_latents([0, 1], counted, images=MetaTensor(pictures()))

    walk = Sampler(training(), "ddim", 20, "trailing")
    walk.start(strength)
    noise = inferer._draw(inferer._generators([0, 1]))
    x = walk.add_noise(SCALING.whiten(Blocks().encode(pictures())[0]), noise, 0) if strength < 1 else noise
    with torch.no_grad():
        for index, t in enumerate(walk.timesteps):
            x = walk.step(network(x, timesteps=t.expand(2)), index, x)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)
    assert type(got) is torch.Tensor
    assert counted.batches == [2] * evaluations


@pytest.mark.parametrize("name", ["dpm++", "pndm", "ddpm", "unipc"])
def test_inpainting_keeps_what_lies_outside_the_mask(name):
    images, masks = pictures(), torch.zeros(2, 1, 32, 32)
    masks[0, :, 9:15, 9:15] = 1
    masks[1, :, :, 20:] = 1
    inferer, network = sampler(sampler=name), unet()

    result = inferer([0, 1], network, images=images, masks=masks)

    is_new = masks.bool()
    torch.testing.assert_close(result[~is_new], images[~is_new], rtol=0, atol=0)
    assert (result - images)[is_new].abs().mean() > 0.05
    latents = inferer.sample_latents([0, 1], network, images=images, masks=masks)
    # a latent with one pixel of the mask is new: rows 9 to 14 lie in the blocks 2 and 3
    changed = (latents - inferer.encode(images)).abs().amax(1) > 1e-6
    assert changed[0].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    assert changed[1].any(0).tolist() == [False] * 5 + [True] * 3


def autoencoder() -> KLAutoencoder:
    """A small one with random weights, whose latents see far beyond the pixels that they lie over."""
    torch.manual_seed(1)
    return KLAutoencoder(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=[8, 8, 8],
        attention_levels=[False] * 3,
        latent_channels=3,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_at_full_strength_what_lies_under_the_mask_has_no_influence(strength):
    images, masks = pictures(), torch.zeros(2, 1, 32, 32)
    masks[0, :, 9:15, 9:15] = 1
    masks[1, :, :, 20:] = 1
    is_new = masks.bool()
    inferer, network = sampler(strength=strength), unet()
    inferer.autoencoder = autoencoder()
    hidden = [images, *(torch.where(is_new, value, images) for value in (0.0, 1.0)), images.flip(0)]
    hidden[-1] = torch.where(is_new, hidden[-1], images)

    results = [inferer([0, 1], network, images=one, masks=masks) for one in hidden]

    for result in results:
        torch.testing.assert_close(result[~is_new], images[~is_new], rtol=0, atol=0)
        assert torch.equal(result, results[0]) == (strength == 1 or result is results[0])


def test_masked_pixels_are_filled_from_the_edge_inwards():
    images = torch.zeros(3, 1, 6, 9)
    images[0], images[1] = 0.25, torch.linspace(0, 0.8, 9)
    is_new = torch.zeros(3, 1, 6, 9, dtype=torch.bool)
    is_new[:, :, 1:5, 2:7] = True
    is_new[2] = True

    filled = _filled(images.where(~is_new, 1.0), is_new)

    torch.testing.assert_close(filled[0], images[0])
    assert torch.equal(filled[1][~is_new[1]], images[1][~is_new[1]])
    torch.testing.assert_close(filled[1], filled[1].flip(1))
    # neighbours that are known: (0, 1, 2) of the column before, and above the two columns beside
    assert filled[1, 0, 1, 2] == pytest.approx((3 * 0.1 + 0.2 + 0.3) / 5)
    assert (filled[1, 0, 2].diff() > -1e-6).all()
    assert not filled[2].any()


def test_amp_is_that_of_the_training(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "medgen.inferers.latent_diffusion.autocast",
        lambda device, amp: asked.append((device.type, amp)) or nullcontext(),
    )

    sampler(amp=False, num_steps=2)([0], unet())
    sampler(num_steps=2)([0], unet())

    assert asked == [("cpu", False)] * 2 + [("cpu", True)] * 2
    assert autocast_of_trainer is autocast


def test_the_mask_sees_the_surroundings_at_every_step():
    images, masks = pictures(1), torch.zeros(1, 1, 32, 32)
    masks[..., :16] = 1
    inferer = sampler()
    seen = []
    network = unet()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))

    inferer([0], network, images=images, masks=masks)

    known, noise = inferer.encode(images), inferer._draw(inferer._generators([0]))
    for index, sample in enumerate(seen):
        expected = inferer.sampler.add_noise(known, noise, index)[..., 4:]
        torch.testing.assert_close(sample[..., 4:], expected, rtol=0, atol=1e-6)


def test_an_empty_mask_changes_nothing_and_a_full_one_everything():
    images, network = pictures(), unet()
    inferer = sampler()

    kept = inferer([0, 1], network, images=images, masks=torch.zeros(2, 1, 32, 32))
    new = inferer([0, 1], network, images=images, masks=torch.ones(2, 1, 32, 32))

    torch.testing.assert_close(kept, images, rtol=0, atol=0)
    torch.testing.assert_close(new, inferer([0, 1], network), rtol=0, atol=1e-6)


def test_interpolation_goes_from_seed_to_seed_at_the_noises_norm():
    inferer, network = sampler(), unet()

    noise = inferer.interpolate(3, 8, [0.0, 0.5, 1.0])

    ends = inferer.sample_latents([3, 8], network)
    got = inferer.sample_latents([3, 3, 8], network, noise=noise)
    torch.testing.assert_close(got[[0, 2]], ends, rtol=1e-4, atol=1e-4)
    norms = noise.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms[1], (norms[0] + norms[2]) / 2, rtol=1e-5, atol=0)
    halves = nn.functional.cosine_similarity(noise[1].flatten(), noise[[0, 2]].flatten(1), dim=1)
    torch.testing.assert_close(halves[0], halves[1], rtol=1e-4, atol=0)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "euler"}, "sampler must be one of"),
        ({"sampler": "rflow"}, "sampler must be ddim"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_steps": 1001}, "num_steps must be from 1 to 1000"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a number from -1000 to 1000, got nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be"),
        ({"guidance_scale": "7"}, "guidance_scale must be"),
        ({"guidance_rescale": 1.1}, "guidance_rescale must be a number from 0 to 1"),
        ({"strength": 0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        sampler(**settings)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("conditioner", "given", "message"),
    [
        (None, {"prompts": ["a", "b"]}, "prompts were given, but the network has no conditions"),
        (None, {"labels": [0, 1]}, "labels were given, but the network has no conditions"),
        (Labels(), {"prompts": ["a", "b"]}, "prompts were given, but the network takes labels"),
        (Captions(), {"labels": [0, 1]}, "labels were given, but the network takes prompts"),
        (Captions(), {"negative_prompts": "a"}, "negative_prompts need prompts"),
        (Captions(), {"prompts": ["a"]}, "prompts must be one for each of 2 images, or one for all, got 1"),
        (Captions(), {"prompts": "a", "negative_prompts": ["b"]}, "negative_prompts must be one for each of 2"),
        (None, {"masks": torch.ones(2, 1, 32, 32)}, "masks need the images"),
        (None, {"images": pictures(3)}, r"images must be \(2, C, H, W\)"),
        (None, {"images": pictures() * 255}, r"images must have values in \[0, 1\]"),
        (None, {"images": pictures() * math.nan}, r"images must have values in \[0, 1\]"),
        (None, {"images": pictures()[..., :16, :16]}, "images must have the size of the bundle"),
        (None, {"images": pictures(), "masks": torch.ones(2, 1, 8, 8)}, r"masks must be \(2, 1, 32, 32\)"),
        (None, {"noise": torch.zeros(2, 3, 4, 4)}, r"noise must be \(2, 3, 8, 8\), got \(2, 3, 4, 4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(conditioner, given, message):
    kind = {None: "", Labels: "labels", Captions: "text"}[type(conditioner) if conditioner else None]

    with pytest.raises(UserError, match=message) as caught:
        sampler(conditioner)([0, 1], unet(kind), **given)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", [[-1], [2**32], torch.tensor([0.5]), torch.tensor(3)])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(UserError, match="seeds must be"):
        sampler()(seeds, unet())


def test_images_that_are_not_finite_are_refused_by_their_seeds():
    clean = torch.zeros(3, *SHAPE)
    clean[1, 0, 2, 2] = math.inf

    with pytest.raises(UserError, match="images must be finite, got others for the seeds 8; lower --guidance_scale"):
        sampler(noise_scheduler=training("sample"))([7, 8, 9], Still(clean))


def test_an_interpolation_needs_a_deterministic_sampler():
    with pytest.raises(UserError, match="got ddpm with eta 1"):
        sampler(sampler="ddpm").interpolate(0, 1, [0.5])
