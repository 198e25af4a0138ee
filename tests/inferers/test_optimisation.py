"""Optimisation of latents beside a plain loop over one image, and by its properties."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from monai.data import MetaTensor

from medgen.errors import UserError
from medgen.inferers import LatentOptimiser, OptimisedInferer
from medgen.losses import PixelMSSSIMLoss, ProjectionLoss
from medgen.networks import LatentEncoder, LatentGenerator, PGGANGenerator, StyleGAN2Generator

STYLEGAN2 = {
    **{"image_size": 16, "channel_base": 64, "channel_max": 8},
    **{"latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2},
}


def make_generator(space: str = "z") -> LatentGenerator:
    torch.manual_seed(0)
    if space == "z":
        network = PGGANGenerator(channels=[16, 16, 8], latent_dim=8)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # without, as before a training, the image of 0 has no direction to leave to
                torch.nn.init.normal_(parameter, std=0.3)
        return LatentGenerator(network, sha256="f" * 64)
    return LatentGenerator(StyleGAN2Generator(**STYLEGAN2), space)


def make_latents(generator: LatentGenerator, batch: int, seed: int = 5) -> torch.Tensor:
    z = torch.randn(batch, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return generator.from_z(z)


def make_images(generator: LatentGenerator, batch: int) -> torch.Tensor:
    with torch.no_grad():
        return generator(make_latents(generator, batch)).clamp(0, 1)


class Encoder(LatentEncoder):
    """Another latent of the generator for each level of grey."""

    def __init__(self, generator: LatentGenerator) -> None:
        super().__init__(generator.image_size, generator.channels, generator.latent_shape, generator.space)
        self.use_statistics(generator)
        self.weight = torch.nn.Parameter(make_latents(generator, 1, seed=6)[0] - generator.mean)

    def estimate(self, x):
        return self.weight / self.latent_std * torch.cos(9 * x.mean((1, 2, 3))[:, None, None] + self.weight)


class MeanSquare(ProjectionLoss):
    """Needs no more than a line."""

    settings: ClassVar = {"loss": "mean_square"}

    def prepare(self, target):
        return (target,)

    def forward(self, images, features):
        return (images - features[0]).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture(scope="module")
def encoder(generator):
    return Encoder(generator).eval()


def make_optimiser(generator: LatentGenerator, loss: ProjectionLoss | None = None, **changes) -> LatentOptimiser:
    return LatentOptimiser(loss or MeanSquare(), generator, **{"steps": 20, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# the algorithm


def test_learning_rate_is_that_of_the_source(generator, encoder):
    optimiser = LatentOptimiser(MeanSquare(), generator)
    settings = {"steps": 3000, "initial_lr": 0.1, "ramp_up": 0.05, "ramp_down": 0.4, "start": "encoder", "patience": 0}
    assert {name: optimiser.settings[name] for name in settings} == settings
    # Adam's first step of a number is the learning rate: of two steps the first rises from 0 and the second is whole
    latents = make_generator("w").mean[None]
    w = make_generator("w")
    found = make_optimiser(w, start="mean", steps=2, ramp_up=0.5, ramp_down=0.5)(make_images(w, 1))
    assert found["steps"].tolist() == [2]
    assert (found["w"] - latents).abs().max() == pytest.approx(0.1, rel=1e-2)


def optimise_by_loop(generator, image, latent, steps):
    """One image after the description, with torch's Adam: the best latent, the step it was found at, all losses."""
    x = latent.clone().requires_grad_()
    adam = torch.optim.Adam([x], foreach=False)
    losses, latents = [], []
    for step in range(steps + 1):
        loss = (generator(x) - image).square().mean()
        losses.append(loss.item())
        latents.append(x.detach().clone())
        adam.zero_grad()
        loss.backward()
        t = step / steps
        ramp = 0.5 - 0.5 * math.cos(math.pi * min(1, (1 - t) / 0.4))
        adam.param_groups[0]["lr"] = 0.1 * ramp * min(1, t / 0.05)
        adam.step()
        if generator.space == "z":
            with torch.no_grad():
                x /= x.square().mean(2, keepdim=True).sqrt()
    best = losses.index(min(losses))
    return latents[best], best, losses


@pytest.mark.parametrize("space", ["z", "w", "w+"])
def test_result_is_that_of_a_plain_loop_over_single_images(space):
    generator = make_generator(space)
    encoder = Encoder(generator)
    images = make_images(generator, 3)
    found = make_optimiser(generator)(images, encoder)
    for n in range(3):
        start = encoder(images[n : n + 1]).detach()
        latents, best, losses = optimise_by_loop(generator, images[n : n + 1], start, 20)
        torch.testing.assert_close(found["w"][n : n + 1], latents, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found["loss_curve"][n], torch.tensor(losses[:-1]), rtol=1e-3, atol=1e-6)
        assert found["best_step"][n] == best


@pytest.mark.parametrize("space", ["z", "w", "w+"])
@pytest.mark.parametrize("start", ["encoder", "mean"])
def test_images_of_the_generator_are_approached(space, start):
    generator = make_generator(space)
    found = make_optimiser(generator, start=start, steps=100)(make_images(generator, 2), Encoder(generator))
    assert found["w"].shape == (2, *generator.latent_shape)
    first = 2 if generator.is_spherical and start == "mean" else 0  # the first on the sphere, far from the mean
    assert (found["loss_curve"][:, -1] < 0.7 * found["loss_curve"][:, first]).all()


def test_start_is_the_encoders_estimate_or_the_mean(generator, encoder):
    images = make_images(generator, 2)
    loss = MeanSquare()
    for start, latents in (("encoder", encoder(images)), ("mean", generator.mean.expand(2, -1, -1))):
        curve = make_optimiser(generator, start=start)(images, encoder)["loss_curve"]
        torch.testing.assert_close(curve[:, 0], loss(generator(latents), (images,)).detach())


def test_mean_of_w_plus_is_the_mean_in_each_style():
    generator = make_generator("w+")
    found = make_optimiser(generator, start="mean", steps=1)(make_images(generator, 2))
    torch.testing.assert_close(found["w"], generator.mean.expand(2, -1, -1), rtol=0, atol=0)
    assert found["w"].std(1).max() == 0


def test_latents_of_a_sphere_stay_on_it(generator, encoder):
    w = make_optimiser(generator)(make_images(generator, 2), encoder)["w"]
    torch.testing.assert_close(w.square().mean((1, 2)), torch.ones(2), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# the best of all steps


@pytest.mark.parametrize("initial_lr", [0.001, 0.1, 3.0])
def test_result_is_the_best_and_its_image_and_loss_belong_to_it(generator, encoder, initial_lr):
    images = make_images(generator, 3)
    loss = PixelMSSSIMLoss()
    found = make_optimiser(generator, loss, initial_lr=initial_lr)(images, encoder)
    with torch.no_grad():
        raw = generator(found["w"])
        losses = loss(raw, loss.prepare(images))
    torch.testing.assert_close(found["reconstruction"], raw.clamp(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(found["distance"], loss(found["reconstruction"], loss.prepare(images)))
    for n in range(3):
        within = found["best_step"][n] < 20
        lowest = found["loss_curve"][n].min()
        assert losses[n] == pytest.approx(lowest.item(), rel=1e-4) if within else losses[n] < lowest
        assert not within or found["loss_curve"][n, found["best_step"][n]] == lowest


def test_start_is_kept_where_no_step_is_better(generator, encoder):
    latents = encoder(torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)))

    class Exact(Encoder):
        def estimate(self, x):
            return latents.detach()

    with torch.no_grad():
        images = generator(latents)
    found = make_optimiser(generator)(images, Exact(generator))
    torch.testing.assert_close(found["w"], latents.detach())
    assert found["best_step"].tolist() == [0, 0]
    assert found["loss_curve"][:, -1].max() > 0


def test_latent_after_the_last_step_counts(generator, encoder):
    found = make_optimiser(generator, initial_lr=1e-3, ramp_down=0)(make_images(generator, 2), encoder)
    assert found["best_step"].tolist() == [20, 20]
    assert (found["distance"] < found["loss_curve"][:, -1]).all()


class NotFiniteNearby(MeanSquare):
    """Whose values are lost once it has become low."""

    def forward(self, images, features):
        distance = super().forward(images, features)
        return torch.where(distance < features[0].new_tensor(self.floor), torch.nan, distance)


def test_best_before_the_loss_was_lost_is_kept(generator, encoder):
    images = make_images(generator, 2)
    NotFiniteNearby.floor = make_optimiser(generator)(images, encoder)["loss_curve"][:, 10].max().item()
    found = make_optimiser(generator, NotFiniteNearby())(images, encoder)
    assert found["loss_curve"].isnan().any(1).all()
    assert found["w"].isfinite().all()
    assert (found["best_step"] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# batches


@pytest.mark.parametrize("patience", [0, 10])
def test_batch_gives_each_image_what_it_gets_alone(patience):
    generator = make_generator()
    encoder = Encoder(generator)
    images = make_images(generator, 4)
    settings = {"steps": 40, "patience": patience, "min_improvement": 0.1}
    together = make_optimiser(generator, PixelMSSSIMLoss(), **settings)(images, encoder)
    turned = make_optimiser(generator, PixelMSSSIMLoss(), **settings)(images.flip(0), encoder)
    for n in range(4):
        alone = make_optimiser(generator, PixelMSSSIMLoss(), **settings)(images[n : n + 1], encoder)
        for other, row in ((together, n), (turned, 3 - n)):
            for name in ("w", "reconstruction", "loss_curve", "distance"):
                torch.testing.assert_close(other[name][row], alone[name][0], rtol=1e-4, atol=1e-4, equal_nan=True)
            assert other["steps"][row] == alone["steps"][0]
    assert (len(together["steps"].unique()) > 1) == bool(patience)  # images have left at different steps


class FlatForDark(MeanSquare):
    """Constant for targets that are black, so that they alone reach a plateau."""

    def forward(self, images, features):
        is_dark = features[0].amax((1, 2, 3)) == 0
        return torch.where(is_dark, images.mean((1, 2, 3)) * 0 + 1, super().forward(images, features))


def test_image_on_a_plateau_leaves_and_the_others_go_on(generator, encoder):
    images = make_images(generator, 3)
    images[1] = 0
    seen = []
    optimiser = make_optimiser(generator, FlatForDark(), steps=40, patience=10, ramp_up=0.25, min_improvement=1e-6)
    optimiser.on_step = lambda step, count: seen.append((step, count))
    found = optimiser(images, encoder)
    # the rise of the learning rate, 10 steps, and 10 of patience
    assert found["steps"].tolist() == [40, 20, 40]
    assert found["best_step"][1] == 0
    assert found["loss_curve"][1].isnan().tolist() == [False] * 20 + [True] * 20
    assert seen == [(step, 3 if step <= 20 else 2) for step in range(1, 41)]
    rest = optimiser(images[[0, 2]], encoder)
    torch.testing.assert_close(found["w"][[0, 2]], rest["w"], rtol=1e-4, atol=1e-4)


def test_batch_ends_where_all_images_have_stopped(generator, encoder):
    seen = []
    optimiser = make_optimiser(generator, FlatForDark(), steps=100, patience=5, ramp_up=0)
    optimiser.on_step = lambda step, count: seen.append(step)
    assert optimiser(torch.zeros(2, 1, 16, 16), encoder)["steps"].tolist() == [10, 10]
    assert seen[-1] == 10


# ---------------------------------------------------------------------------------------------------------------------
# what must not change


def test_weights_stay_and_get_no_gradient(generator):
    encoder = Encoder(generator)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in (generator, encoder)]
    make_optimiser(generator)(make_images(generator, 2), encoder)
    for network, state in zip((generator, encoder), before, strict=True):
        torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert encoder.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in generator.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_contexts_of_evaluators_change_nothing(generator, encoder, context):
    images = make_images(generator, 2)
    expected = make_optimiser(generator)(images, encoder)
    with context():
        found = make_optimiser(generator)(MetaTensor(images.clone()), encoder)
    torch.testing.assert_close(found["w"], expected["w"], rtol=0, atol=0)
    assert type(found["reconstruction"]) is torch.Tensor


def test_settings_name_all_that_the_result_depends_on(generator):
    settings = make_optimiser(generator, PixelMSSSIMLoss()).settings
    assert settings == {
        **{"start": "encoder", "steps": 20, "initial_lr": 0.1, "ramp_up": 0.05, "ramp_down": 0.4, "patience": 0},
        **{"min_improvement": 0.01, "space": "z", "generator_sha256": "f" * 64, **PixelMSSSIMLoss().settings},
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"start": "noise"}, "start must be one of encoder, mean, got 'noise'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"patience": -1}, "patience must be a whole number of at least 0, got -1"),
        ({"initial_lr": -0.1}, "initial_lr must be a number from 0 to"),
        ({"ramp_up": 1.5}, "ramp_up must be a number from 0 to 1, got 1.5"),
        ({"ramp_down": "x"}, "ramp_down must be a number from 0 to 1, got 'x'"),
    ],
)
def test_settings_out_of_range_are_refused(generator, setting, message):
    with pytest.raises(UserError, match=message):
        make_optimiser(generator, **setting)


def test_images_of_another_size_are_refused(generator, encoder):
    for start in ("encoder", "mean"):
        with pytest.raises(
            UserError, match=r"images must be \(B, 1, 16, 16\) for this generator, got \(2, 1, 16, 24\)"
        ):
            make_optimiser(generator, start=start)(torch.zeros(2, 1, 16, 24), encoder)


def test_encoder_of_another_space_is_refused(generator):
    with pytest.raises(UserError, match="space of the encoder must be the generator's, z, got w"):
        make_optimiser(generator)(make_images(generator, 1), Encoder(make_generator("w")))


def test_optimised_latents_are_rendered_beside_the_start(generator, encoder):
    images, latents = make_images(generator, 2), make_latents(generator, 2)
    with torch.inference_mode():
        found = OptimisedInferer(make_optimiser(generator))(MetaTensor(images), encoder, latents=latents)
    assert torch.equal(found["latent"], latents)
    torch.testing.assert_close(found["reconstruction"], generator(latents).clamp(0, 1))
    torch.testing.assert_close(found["start"], generator(encoder(images)).clamp(0, 1).detach())
