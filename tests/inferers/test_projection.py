"""Projection beside a plain loop over one image, and by its properties."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch.utils.flop_counter import FlopCounterMode

from medgen.errors import UserError
from medgen.inferers import StyleGAN2Projector
from medgen.inferers import projection as module
from medgen.losses import PixelMSSSIMLoss, ProjectionLoss, noise_correlation
from medgen.networks import StyleGAN2Generator, latent_statistics

TINY = {"image_size": 16, "channel_base": 64, "channel_max": 8, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


def make_generator(**changes) -> StyleGAN2Generator:
    """A small one whose noise is not zero, as it is at the start of a training."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
    return generator


def make_images(generator: StyleGAN2Generator, batch: int, labels: torch.Tensor | None = None) -> torch.Tensor:
    z = torch.randn(batch, generator.latent_dim, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return ((generator(z, labels, noise="const") + 1) / 2).clamp(0, 1)


@pytest.fixture(scope="module")
def generator():
    return make_generator()


def make_projector(**changes) -> StyleGAN2Projector:
    return StyleGAN2Projector(**{"steps": 20, "w_avg_samples": 100, **changes})


class MeanSquare(ProjectionLoss):
    """Needs no more than a line."""

    settings: ClassVar = {"loss": "mean_square"}

    def prepare(self, target):
        return (target,)

    def forward(self, images, features):
        return (images - features[0]).square().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# the algorithm


def test_schedule_is_the_published_one():
    projector = StyleGAN2Projector()
    lr = [projector.schedule(step)[0] for step in (0, 25, 50, 750, 875, 1000)]
    assert lr == pytest.approx([0, 0.05, 0.1, 0.1, 0.05, 0])
    disturbance = [projector.schedule(step)[1] for step in (0, 375, 750, 900)]
    assert disturbance == pytest.approx([0.05, 0.0125, 0, 0])


def test_defaults_are_the_published_ones():
    published = {
        **{"space": "w", "steps": 1000, "initial_lr": 0.1, "noise_regularisation": 1e5, "initial_noise_factor": 0.05},
        **{"noise_ramp": 0.75, "w_avg_samples": 10_000, "w_avg_seed": 123, "seed": 303, "optimise_noise": True},
        **{"render_noise": "optimised", "patience": 0},
    }
    settings = StyleGAN2Projector().settings
    assert {name: settings[name] for name in published} == published


def project_by_loop(projector, generator, image, space):
    """One image after the description of the algorithm, with torch's Adam on separate tensors and no batch."""
    draws = torch.Generator().manual_seed(module._image_seed(projector.seed, image[0]))
    sizes = generator.synthesis.noise_sizes
    maps = [torch.randn(height * width, generator=draws).reshape(1, 1, height, width) for height, width in sizes]
    layers = generator.num_ws if space == "w+" else 1
    z = np.random.RandomState(123).randn(100, 8).astype(np.float32)
    with torch.no_grad():
        all_w = generator.mapping(torch.from_numpy(z), update_w_avg=False)[:, 0]
    w_std = ((all_w - all_w.mean(0)) ** 2).sum().div(100).sqrt()
    w = all_w.mean(0).repeat(1, layers, 1)
    jumps = torch.randn(64, layers * 8, generator=draws).reshape(64, 1, layers, 8)
    for tensor in (w, *maps):
        tensor.requires_grad_()
    optimizer = torch.optim.Adam([w, *maps], betas=(0.9, 0.999), foreach=False)
    losses = []
    for step in range(projector.steps):
        t = step / projector.steps
        ramp = 0.5 - 0.5 * math.cos(math.pi * min(1, (1 - t) / 0.25))
        optimizer.param_groups[0]["lr"] = 0.1 * ramp * min(1, t / 0.05)
        scale = w_std * 0.05 * max(0, 1 - t / 0.75) ** 2
        ws = (w + jumps[step] * scale).expand(-1, generator.num_ws, -1)
        fake = (generator.synthesis(ws, maps) + 1) / 2
        distance = (fake - image).square().mean()
        losses.append(distance.item())
        loss = distance + 1e5 * noise_correlation(maps).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for noise in maps:
                noise -= noise.mean()
                noise *= noise.square().mean().rsqrt()
    return w.detach().expand(-1, generator.num_ws, -1), [noise.detach() for noise in maps], losses


@pytest.mark.parametrize("space", ["w", "w+"])
def test_result_is_that_of_a_plain_loop_over_single_images(generator, space):
    images = make_images(generator, 2)
    projector = make_projector(space=space, loss=MeanSquare())
    found = projector(images, generator)
    for n in range(2):
        w, maps, losses = project_by_loop(projector, generator, images[n : n + 1], space)
        torch.testing.assert_close(found["w"][n : n + 1], w, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["loss_curve"][n], torch.tensor(losses), rtol=1e-3, atol=1e-5)
        for mine, theirs in zip(found["noise"], maps, strict=True):
            torch.testing.assert_close(mine[n : n + 1], theirs, rtol=1e-2, atol=1e-2)


def test_first_step_leaves_w_where_it_is(generator):
    found = make_projector(steps=1)(make_images(generator, 1), generator)
    mean = latent_statistics(generator, samples=100).mean
    torch.testing.assert_close(found["w"], mean.expand(1, generator.num_ws, -1), rtol=0, atol=0)


@pytest.mark.parametrize("space", ["w", "w+"])
def test_image_of_the_generator_is_found_again(generator, space):
    images = make_images(generator, 2)
    found = make_projector(steps=200, space=space)(images, generator)
    assert (found["distance"] < 0.35 * found["loss_curve"][:, 0]).all()
    assert found["loss_curve"].isfinite().all()
    assert (found["w"].std(1).max() < 1e-6) == (space == "w")  # one w for all layers, or not


def test_reconstruction_is_what_w_and_noise_give_clipped(generator):
    images = make_images(generator, 2)
    for render_noise in ("optimised", "const"):
        found = make_projector(render_noise=render_noise)(images, generator)
        with torch.no_grad():
            own = generator.synthesis(found["w"], "const" if render_noise == "const" else found["noise"])
        torch.testing.assert_close(found["reconstruction"], ((own + 1) / 2).clamp(0, 1))
        loss = PixelMSSSIMLoss()
        torch.testing.assert_close(found["distance"], loss(found["reconstruction"], loss.prepare(images)))


def test_noise_maps_have_mean_0_and_variance_1(generator):
    for noise in make_projector()(make_images(generator, 2), generator)["noise"]:
        assert noise.mean((2, 3)).abs().max() < 1e-5
        torch.testing.assert_close(noise.square().mean((2, 3)), torch.ones(2, 1))


def test_noise_regulariser_keeps_noise_white(generator):
    images = make_images(generator, 1)
    free, kept = (
        make_projector(steps=100, noise_regularisation=weight)(images, generator)["noise"] for weight in (0.0, 1e5)
    )
    assert noise_correlation(kept) < 0.1 * noise_correlation(free)


def test_without_optimised_noise_the_models_own_maps_are_used(generator):
    images = make_images(generator, 2)
    found = make_projector(optimise_noise=False)(images, generator)
    own = [layer.noise for block in generator.synthesis.blocks for layer in block.convolutions()]
    for mine, theirs in zip(found["noise"], own, strict=True):
        torch.testing.assert_close(mine, theirs.expand(2, 1, -1, -1), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            found["reconstruction"], ((generator.synthesis(found["w"], "const") + 1) / 2).clamp(0, 1)
        )


def test_weights_stay_and_get_no_gradient():
    generator = make_generator()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    make_projector()(make_images(generator, 1), generator)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in generator.parameters())
    torch.testing.assert_close(dict(generator.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_contexts_of_evaluators_change_nothing(generator, context):
    images = make_images(generator, 2)
    expected = make_projector()(images, generator)
    with context():
        found = make_projector()(MetaTensor(images.clone()), generator)
    torch.testing.assert_close(found["w"], expected["w"], rtol=0, atol=0)
    assert type(found["reconstruction"]) is torch.Tensor


def test_non_square_colour_images_are_projected():
    generator = make_generator(image_size=(16, 24), out_channels=3)
    images = make_images(generator, 2)
    found = make_projector(steps=60)(images, generator)
    assert found["reconstruction"].shape == (2, 3, 16, 24)
    assert (found["distance"] < 0.7 * found["loss_curve"][:, 0]).all()


def test_layers_in_bfloat16_are_projected():
    generator = make_generator(num_bf16_resolutions=2, conv_clamp=256.0)
    found = make_projector(steps=60)(make_images(generator, 2), generator)
    assert (found["distance"] < 0.7 * found["loss_curve"][:, 0]).all()


# ---------------------------------------------------------------------------------------------------------------------
# batches


def test_result_does_not_depend_on_the_batch_nor_on_the_order(generator):
    images = make_images(generator, 3)
    together = make_projector()(images, generator)
    turned = make_projector()(images.flip(0), generator)
    for n in range(3):
        alone = make_projector()(images[n : n + 1], generator)
        for other, row in ((together, n), (turned, 2 - n)):
            torch.testing.assert_close(other["w"][row], alone["w"][0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(other["loss_curve"][row], alone["loss_curve"][0], rtol=1e-3, atol=1e-4)


def test_another_seed_gives_other_noise(generator):
    images = make_images(generator, 1)
    first, again, other = (make_projector(seed=seed)(images, generator)["noise"][-1] for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().mean() > 0.5


class FlatForDark(MeanSquare):
    """Constant for targets that are black, so that they alone reach a plateau."""

    def prepare(self, target):
        return target, target.amax((1, 2, 3)).gt(0).to(target.dtype)

    def forward(self, images, features):
        target, bright = features
        return super().forward(images, (target,)) * bright + (1 - bright)


def test_image_on_a_plateau_leaves_the_batch_and_the_others_go_on(generator):
    images = make_images(generator, 3)
    images[1] = 0
    settings = {"loss": FlatForDark(), "steps": 60, "min_improvement": 0.0}
    whole = make_projector(**settings)(images, generator)
    found = make_projector(**settings, patience=12)(images, generator)
    # means of 12 steps can be compared from step 24 on, and are at every tenth
    assert found["steps"].tolist() == [60, 30, 60]
    assert found["loss_curve"][1, :30].isfinite().all()
    assert found["loss_curve"][1, 30:].isnan().all()
    for n in (0, 2):
        torch.testing.assert_close(found["w"][n], whole["w"][n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["loss_curve"][n], whole["loss_curve"][n], rtol=1e-3, atol=1e-4)
    stopped = make_projector(**settings, patience=12)(images[1:2], generator)
    torch.testing.assert_close(found["w"][1], stopped["w"][0], rtol=1e-3, atol=1e-3)


def test_compiled_projection_takes_the_same_steps(generator, monkeypatch):
    real = torch.compile
    # what inductor adds is speed, and a minute
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    torch._dynamo.reset()
    images = make_images(generator, 3)
    images[1] = 0
    settings = {"loss": FlatForDark(), "steps": 60, "min_improvement": 0.0, "patience": 12}
    eager = make_projector(**settings)(images, generator)
    with torch.inference_mode():
        compiled = make_projector(**settings, compile=True)(images, generator)
    assert compiled["steps"].tolist() == eager["steps"].tolist() == [60, 30, 60]
    torch.testing.assert_close(compiled["w"], eager["w"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(compiled["distance"], eager["distance"], rtol=1e-3, atol=1e-4)


def test_compiled_backward_pass_leaves_the_weights_out(generator, monkeypatch):
    real, flops, found = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="aot_eager"))
    torch._dynamo.reset()
    images = make_images(generator, 2)
    for compiled in (False, True):
        projector = make_projector(steps=2, compile=compiled)
        found.append(projector(images, generator)["w"])  # compiles
        with FlopCounterMode(display=False) as counter:
            projector(images, generator)
        flops.append(counter.get_total_flops())
    assert flops[1] <= flops[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_batch_in_which_all_have_stopped_ends(generator):
    images = make_images(generator, 2)
    found = make_projector(steps=1000, patience=10, min_improvement=1.0)(images, generator)
    assert found["steps"].tolist() == [20, 20]
    assert found["reconstruction"].shape == images.shape


def test_every_step_is_told(generator):
    told = []
    projector = make_projector(steps=5)
    projector.on_step = lambda step, images: told.append((step, images))
    projector(make_images(generator, 2), generator)
    assert told == [(step, 2) for step in range(1, 6)]


# ---------------------------------------------------------------------------------------------------------------------
# where w starts


def test_statistics_are_those_of_numpy_over_mapped_latents(generator):
    z = np.random.RandomState(7).randn(50, 8).astype(np.float32)
    with torch.no_grad():
        w = generator.mapping_network(torch.from_numpy(z), None).double().numpy()
    found = latent_statistics(generator, samples=50, seed=7)
    np.testing.assert_allclose(found.mean.numpy(), w.mean(0), rtol=1e-5, atol=1e-7)
    assert found.std == pytest.approx(math.sqrt(np.square(w - w.mean(0)).sum() / 50), rel=1e-5)


def test_statistics_are_computed_once_for_the_same_weights(generator, tmp_path, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return latent_statistics(*args)

    monkeypatch.setattr(module, "latent_statistics", counted)
    images = make_images(generator, 1)
    projector = make_projector(steps=1, w_statistics_dir=tmp_path / "w")
    first = projector(images, generator)
    projector(images, generator)
    fresh = make_projector(steps=1, w_statistics_dir=tmp_path / "w")(images, generator)
    assert len(calls) == 1
    torch.testing.assert_close(fresh["w"], first["w"], rtol=0, atol=0)
    other = make_generator(latent_dim=6)
    projector(make_images(other, 1), other)
    assert len(calls) == 2
    assert len(list((tmp_path / "w").iterdir())) == 2


def test_statistics_in_a_broken_file_are_computed_anew(generator, tmp_path):
    images = make_images(generator, 1)
    first = make_projector(steps=1, w_statistics_dir=tmp_path)(images, generator)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    again = make_projector(steps=1, w_statistics_dir=tmp_path)(images, generator)
    torch.testing.assert_close(again["w"], first["w"], rtol=0, atol=0)
    assert file.read_bytes() == whole


def test_classes_have_means_of_their_own():
    generator = make_generator(num_classes=3)
    labels = torch.tensor([2, 0])
    images = make_images(generator, 2, labels)
    found = make_projector(steps=1)(images, generator, labels=labels)
    for n, label in enumerate(labels):
        vector = F.one_hot(label, 3).float()
        mean = latent_statistics(generator, vector, samples=100).mean
        torch.testing.assert_close(found["w"][n, 0], mean)
    assert (found["w"][0] - found["w"][1]).abs().max() > 0.01
    vectors = make_projector(steps=1)(images, generator, labels=F.one_hot(labels, 3).float())
    torch.testing.assert_close(vectors["w"], found["w"])


@pytest.mark.parametrize(("space", "layers"), [("w", None), ("w+", None), ("w+", 6)])
def test_projection_starts_from_a_given_w(generator, space, layers):
    shape = (2, 8) if layers is None else (2, layers, 8)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = make_projector(steps=1, space=space)(make_images(generator, 2), generator, initial_w=start)
    torch.testing.assert_close(found["w"], start[:, None].expand(-1, 6, -1) if layers is None else start)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "z"}, "space must be w or w\\+, got 'z'"),
        ({"render_noise": "random"}, "render_noise must be optimised or const"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": "x"}, "steps must be a whole number of at least 1, got 'x'"),
        ({"w_avg_samples": 0}, "w_avg_samples must be a whole number of at least 1"),
        ({"patience": 2.5}, "patience must be a whole number of at least 0, got 2.5"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"initial_lr": -1}, "initial_lr must be a number from 0 to 1e\\+12, got -1"),
        ({"initial_lr": "x"}, "initial_lr must be a number from 0 to 1e\\+12, got 'x'"),
        ({"noise_regularisation": float("nan")}, "noise_regularisation must be a number from 0 to 1e\\+12, got nan"),
        ({"noise_regularisation": float("inf")}, "noise_regularisation must be a number from 0 to 1e\\+12, got inf"),
        ({"noise_regularisation": [1]}, "noise_regularisation must be a number"),
        ({"min_improvement": 2}, "min_improvement must be a number from 0 to 1, got 2"),
        ({"min_improvement": "x"}, "min_improvement must be a number from 0 to 1, got 'x'"),
        ({"noise_ramp": -0.1}, "noise_ramp must be a number from 0 to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        StyleGAN2Projector(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.rand(1, 1, 32, 32)}, r"must have shape \(B, 1, 16, 16\), got \(1, 1, 32, 32\); resize them"),
        ({"inputs": torch.rand(1, 3, 16, 16)}, "preset and in_channels of the weights"),
        ({"initial_w": torch.rand(1, 6, 8)}, "for the space w, got .*set space to w\\+"),
        ({"initial_w": torch.rand(2, 8)}, r"initial_w must have shape \(1, 8\)"),
        ({"labels": torch.tensor([0])}, "labels must be left out"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(generator, arguments, message):
    with pytest.raises(UserError, match=message):
        make_projector(steps=1)(**{"inputs": torch.rand(1, 1, 16, 16), "network": generator, **arguments})


def test_generator_with_classes_asks_for_labels():
    generator = make_generator(num_classes=3)
    with pytest.raises(UserError, match="labels must be given"):
        make_projector(steps=1)(torch.rand(1, 1, 16, 16), generator)


@pytest.mark.parametrize("patience", [0, 4])
def test_image_that_diverges_does_not_disturb_the_others(generator, patience):
    class InfiniteForDark(FlatForDark):
        def forward(self, images, features):
            target, bright = features
            return MeanSquare.forward(self, images, (target,)) / bright

    images = make_images(generator, 3)
    settings = {"loss": InfiniteForDark(), "steps": 20, "patience": patience, "min_improvement": 0.0}
    expected = make_projector(**settings)(images, generator)
    dark = images.clone()
    dark[1] = 0
    found = make_projector(**settings)(dark, generator)
    assert found["distance"].isfinite().tolist() == [True, False, True]
    assert found["steps"][1] == 20
    for n in (0, 2):
        torch.testing.assert_close(found["w"][n], expected["w"][n], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["distance"][n], expected["distance"][n], rtol=1e-3, atol=1e-4)
