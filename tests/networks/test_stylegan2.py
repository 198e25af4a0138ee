"""StyleGAN2 beside arrays of the official implementation, and by its properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medgen.convert.stylegan2 import from_official, official_settings, to_official
from medgen.errors import UserError
from medgen.networks import STYLEGAN2_PRESETS, StyleGAN2Discriminator, StyleGAN2Generator
from medgen.networks.stylegan2 import Convolution, StyledConvolution, minibatch_std

ASSETS = Path(__file__).parents[1] / "assets"
REFERENCES = ("gray32", "rgb16_cond2")
TINY = {"image_size": 16, "channel_base": 64, "channel_max": 8}
TINY_G = {**TINY, "latent_dim": 8, "w_dim": 8, "num_mapping_layers": 2}


def make_generator(**changes) -> StyleGAN2Generator:
    """A small one whose noise and biases are not zero, as they are at the start of a training."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(**{**TINY_G, **changes}).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength") or (name.startswith("synthesis") and name.endswith(".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        generator.w_avg.normal_()
    return generator


def make_discriminator(**changes) -> StyleGAN2Discriminator:
    torch.manual_seed(1)
    return StyleGAN2Discriminator(**{**TINY, **changes}).eval()


def latents(batch_size: int, dim: int = 8, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, dim, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# the official implementation


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request):
    """Arrays of one run of the official code, and the two networks with its weights."""
    with np.load(ASSETS / f"stylegan2_{request.param}.npz", allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    official_g, official_d = ({k[2:]: v for k, v in arrays.items() if k[:2] == prefix} for prefix in ("G.", "D."))
    generator = StyleGAN2Generator(**official_settings(official_g), conv_clamp=256.0).eval()
    discriminator = StyleGAN2Discriminator(**official_settings(official_d), conv_clamp=256.0).eval()
    generator.load_state_dict(from_official(official_g))
    discriminator.load_state_dict(from_official(official_d))
    arrays["labels"] = arrays["c"] if generator.num_classes else None
    return arrays, generator, discriminator, official_g, official_d


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_w_and_truncated_w_equal_the_official_ones(reference):
    arrays, generator, *_ = reference

    assert relative_error(generator.mapping(arrays["z"], arrays["labels"]), arrays["w"]) < 1e-5
    assert relative_error(generator.mapping(arrays["z"], arrays["labels"], 0.7), arrays["w_psi07"]) < 1e-5


@pytest.mark.parametrize(
    ("array", "psi", "noise"),
    [("image_noise_const", 1.0, "const"), ("image_noise_none", 1.0, "none"), ("image_psi07", 0.7, "const")],
)
@torch.no_grad()
def test_images_equal_the_official_ones(reference, array, psi, noise):
    arrays, generator, *_ = reference

    image = generator(arrays["z"], arrays["labels"], truncation_psi=psi, noise=noise)

    assert relative_error(image, arrays[array]) < 1e-5


def test_logits_and_r1_penalty_equal_the_official_ones(reference):
    arrays, _, discriminator, *_ = reference
    image = arrays["image_noise_const"].clone().requires_grad_()

    logits = discriminator(image, arrays["labels"])
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)

    assert relative_error(logits.detach(), arrays["logits"]) < 1e-5
    assert relative_error(gradient.square().sum((1, 2, 3)).detach(), arrays["r1_penalty"]) < 1e-5


def test_official_names_and_back_is_exact(reference):
    _, generator, discriminator, *officials = reference

    for network, official in zip((generator, discriminator), officials, strict=True):
        back = to_official(network.state_dict())

        assert back.keys() == official.keys()
        for name, value in official.items():
            assert back[name].dtype == value.dtype
            assert torch.equal(back[name], value), name


def test_ours_to_official_names_and_back_is_exact_for_images_that_are_not_square():
    for network in (make_generator(image_size=(16, 24)), make_discriminator(image_size=(16, 24), num_classes=3)):
        state = network.state_dict()

        back = from_official(to_official(state))

        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_settings_are_read_off_the_official_shapes():
    for settings in ({"image_size": 16}, {"image_size": 64, "channel_base": 256, "channel_max": 16}):
        given = {**TINY_G, "out_channels": 3, "num_classes": 2, "num_mapping_layers": 3, **settings}
        read = official_settings(to_official(StyleGAN2Generator(**given).state_dict()))
        assert read == {**given, "channel_base": min(given["channel_base"], given["channel_max"] * given["image_size"])}

        given = {**TINY, "in_channels": 3, "num_classes": 2, "num_mapping_layers": 3, **settings}
        read = official_settings(to_official(StyleGAN2Discriminator(**given).state_dict()))
        assert read == {**given, "channel_base": min(given["channel_base"], given["channel_max"] * given["image_size"])}


def test_other_architectures_and_filters_are_refused():
    official = to_official(make_generator().state_dict())

    with pytest.raises(UserError, match=r"no synthesis\.b8\.torgb\.weight"):
        from_official({name: value for name, value in official.items() if name != "synthesis.b8.torgb.weight"})
    with pytest.raises(UserError, match=r"an unknown synthesis\.b16\.skip\.weight"):
        from_official({**official, "synthesis.b16.skip.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"resample_filter must be the filter \[1, 3, 3, 1\]"):
        from_official({**official, "synthesis.b8.conv0.resample_filter": torch.full((4, 4), 1 / 16)})
    with pytest.raises(UserError, match="a StyleGAN2 network of medgen"):
        to_official(official)
    with pytest.raises(UserError, match="channels must be channel_base / side up to channel_max"):
        official_settings({**official, "synthesis.b8.conv1.weight": torch.zeros(5, 5, 3, 3)})


# ---------------------------------------------------------------------------------------------------------------------
# generator


@pytest.mark.parametrize("upsample", [False, True])
@torch.no_grad()
def test_styled_convolution_equals_weights_made_for_each_sample(upsample):
    """Equations 1 to 3 as they stand in the paper; upsampling by zeros, full convolution and an explicit filter."""
    torch.manual_seed(0)
    layer = StyledConvolution(5, 6, w_dim=7, size=(8, 12), upsample=upsample, conv_clamp=None).double()
    layer.bias.normal_()
    layer.noise_strength.fill_(0.4)
    x, w = torch.randn(3, 5, *((4, 6) if upsample else (8, 12))).double(), torch.randn(3, 7).double()
    noise = torch.randn(3, 1, 8, 12).double()

    got = layer(x, w, noise)

    style = w @ layer.affine.weight.T / 7**0.5 + layer.affine.bias
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 4
    for sample in range(3):
        weight = layer.weight / 45**0.5 * style[sample, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if upsample:
            spread = torch.zeros(1, 5, 8, 12).double()
            spread[:, :, ::2, ::2] = x[sample]
            # full true convolution, then the filter at the offset that keeps the size
            full = F.conv2d(F.pad(spread, (2, 2, 2, 2)), weight.flip(2, 3))
            filtered = F.conv2d(F.pad(full, (1, 1, 1, 1)), torch.outer(taps, taps).expand(6, 1, 4, 4), groups=6)
            y = filtered[:, :, :8, :12]
        else:
            y = F.conv2d(x[sample : sample + 1], weight, padding=1)
        y = y + 0.4 * noise[sample] + layer.bias[:, None, None]
        expected = torch.where(y > 0, y, 0.2 * y) * 2**0.5
        torch.testing.assert_close(got[sample : sample + 1], expected)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    generator = make_generator(num_classes=2)
    z, labels = latents(5), torch.tensor([0, 1, 1, 0, 1])

    together = generator(z, labels, truncation_psi=0.8, noise=generator.draw_noise(range(5)))
    alone = [generator(z[i : i + 1], labels[i : i + 1], 0.8, noise=generator.draw_noise([i])) for i in range(5)]

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_truncation_runs_from_the_mean_w_to_the_untouched_image():
    generator = make_generator()
    z = latents(3)

    mean_image = generator.synthesis(generator.w_avg[None], noise="const")
    torch.testing.assert_close(generator(z, truncation_psi=0.0, noise="const"), mean_image.expand(3, -1, -1, -1))
    untouched, cut_at_none = generator.mapping(z), generator.mapping(z, truncation_psi=0.3, truncation_cutoff=0)
    assert torch.equal(untouched, cut_at_none)
    half = generator.mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (untouched[:, :2] + generator.w_avg) / 2)
    assert torch.equal(half[:, 2:], untouched[:, 2:])


@torch.no_grad()
def test_running_mean_of_w_decays_by_0_995_in_training_only():
    generator = make_generator()
    z, before = latents(4), generator.w_avg.clone()

    mean = generator.mapping(z)[:, 0].mean(0)
    assert torch.equal(generator.w_avg, before)

    generator.train().mapping(z, update_w_avg=False)
    assert torch.equal(generator.w_avg, before)

    generator(z)
    torch.testing.assert_close(generator.w_avg, 0.995 * before + 0.005 * mean)


def test_every_style_of_w_plus_reaches_the_image():
    generator = make_generator()
    z = latents(2)
    with torch.no_grad():
        ws = generator.mapping(z)
        torch.testing.assert_close(generator.synthesis(ws[:, 0], "const"), generator.synthesis(ws, "const"))
    ws.requires_grad_()

    generator.synthesis(ws, "const").square().sum().backward()

    assert ws.shape == (2, generator.num_ws, 8) == (2, 6, 8)
    assert (ws.grad.abs().amax(2) > 0).all()


@torch.no_grad()
def test_style_mixing_leaves_the_coarser_layers_as_they_were():
    generator = make_generator()
    first, second = generator.mapping(latents(2)), generator.mapping(latents(2, seed=3))
    features = []
    for layer in generator.modules():
        if isinstance(layer, StyledConvolution):
            layer.register_forward_hook(lambda module, inputs, output: features.append(output))

    generator.synthesis(first, "const")
    generator.synthesis(torch.cat([first[:, :3], second[:, 3:]], 1), "const")

    same = [torch.equal(before, after) for before, after in zip(features[:5], features[5:], strict=True)]
    assert same == [True, True, True, False, False]


@torch.no_grad()
def test_noise_modes():
    generator = make_generator()
    z = latents(2)
    stored = [layer.noise for layer in generator.modules() if isinstance(layer, StyledConvolution)]

    assert torch.equal(generator(z, noise="none"), generator(z, noise="none"))
    assert not torch.equal(generator(z, noise="none"), generator(z, noise="const"))
    assert torch.equal(generator(z, noise="const"), generator(z, noise=stored))
    assert not torch.equal(generator(z, noise="random"), generator(z, noise="random"))
    drawn = generator.draw_noise([5, 6])
    assert [tuple(noise.shape) for noise in drawn] == [(2, 1, side, side) for side in (4, 8, 8, 16, 16)]
    assert torch.equal(drawn[3][1:], generator.draw_noise([6])[3])


def test_gradient_reaches_each_image_s_own_w_and_noise_maps():
    generator = make_generator().requires_grad_(False)
    w = latents(3).requires_grad_()
    noise = [noise.requires_grad_() for noise in generator.draw_noise([0, 1, 2])]

    generator.synthesis(w, noise)[1].square().sum().backward()

    for tensor in (w, *noise):
        assert tensor.grad[1].abs().sum() > 0
        assert tensor.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize(
    ("size", "channels", "base"),
    [
        (16, 1, (4, 4)),
        (32, 3, (4, 4)),
        ((16, 24), 1, (4, 6)),
        ([80, 64], 3, (5, 4)),
        ((512, 768), 1, (4, 6)),
        (1024, 2, (4, 4)),
    ],
)
def test_sizes_and_channels(size, channels, base):
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):  # shapes alone: nothing is computed
        settings = {"image_size": size, "channel_base": 8192, "channel_max": 16}
        generator = StyleGAN2Generator(out_channels=channels, latent_dim=8, w_dim=8, **settings)
        discriminator = StyleGAN2Discriminator(in_channels=channels, **settings)

        image = generator(torch.randn(2, 8))

        assert generator.synthesis.constant.shape[1:] == base
        assert image.shape == (2, channels, height, width)
        assert discriminator(image).shape == (2, 1)


@pytest.mark.parametrize(("preset", "g_gmac", "d_gmac"), [("stylegan2_512", 59.7, 61.6), ("auto_256", 14.9, 15.4)])
def test_presets_have_the_published_cost(preset, g_gmac, d_gmac):
    """Convolutions only, as the public tables count them; RGB."""
    with torch.device("meta"):
        generator = StyleGAN2Generator.from_preset(preset, out_channels=3)
        discriminator = StyleGAN2Discriminator.from_preset(preset, in_channels=3)
        with FlopCounterMode(display=False) as of_g:
            image = generator(torch.randn(1, 512))
        with FlopCounterMode(display=False) as of_d:
            discriminator(image)

    assert of_g.get_total_flops() / 2e9 == pytest.approx(g_gmac, rel=0.02)
    assert of_d.get_total_flops() / 2e9 == pytest.approx(d_gmac, rel=0.02)


@pytest.mark.parametrize("preset", STYLEGAN2_PRESETS)
def test_every_preset_builds_both_networks(preset):
    with torch.device("meta"):
        generator = StyleGAN2Generator.from_preset(preset, num_classes=2, out_channels=3)
        discriminator = StyleGAN2Discriminator.from_preset(preset, num_classes=2, in_channels=3)
        labels = torch.eye(2)
        image = generator(torch.randn(2, generator.latent_dim), labels)

    assert image.shape == (2, 3, *generator.image_size)
    assert generator.image_size == discriminator.image_size == (STYLEGAN2_PRESETS[preset]["image_size"],) * 2


# ---------------------------------------------------------------------------------------------------------------------
# discriminator


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_minibatch_std_is_each_group_s_mean_standard_deviation(batch_size):
    x = torch.randn(batch_size, 3, 4, 6, generator=torch.Generator().manual_seed(batch_size)).double()

    y = minibatch_std(x, 4)

    assert torch.equal(y[:, :3], x)
    groups = -(-batch_size // 4)
    for sample in range(batch_size):
        group = x[sample % groups :: groups].numpy()
        assert len(group) <= 4
        assert len(group) > 1 or batch_size == 1
        expected = np.sqrt(group.var(0) + 1e-8).mean()
        np.testing.assert_allclose(y[sample, 3].numpy(), expected, rtol=1e-12)


@torch.no_grad()
def test_logits_depend_on_the_group_and_on_nothing_else_of_the_batch():
    discriminator = make_discriminator()
    images = torch.randn(8, 1, 16, 16)
    changed = images.clone()
    changed[1::2] += 1  # the other one of two groups

    logits, after = discriminator(images), discriminator(changed)

    torch.testing.assert_close(after[::2], logits[::2])
    assert not torch.isclose(after[1::2], logits[1::2]).any()


@torch.no_grad()
def test_class_indices_are_one_hot_vectors_and_matter():
    generator, discriminator = make_generator(num_classes=3), make_discriminator(num_classes=3)
    z, image, indices = latents(3), torch.randn(3, 1, 16, 16), torch.tensor([0, 2, 1])
    vectors = torch.eye(3)[indices]

    assert torch.equal(generator(z, indices, noise="const"), generator(z, vectors, noise="const"))
    assert torch.equal(discriminator(image, indices), discriminator(image, vectors))
    assert not torch.isclose(discriminator(image, indices), discriminator(image, indices.flip(0)))[::2].any()
    assert not torch.allclose(generator(z, indices, noise="const"), generator(z, indices.flip(0), noise="const"))


def test_freezing_starts_at_the_image():
    discriminator = make_discriminator()

    discriminator.freeze_layers(5)

    layers = [layer for layer in discriminator.blocks.modules() if isinstance(layer, Convolution)]
    frozen = [not layer.weight.requires_grad for layer in layers]
    assert frozen == [True] * 5 + [False] * 2
    assert not discriminator.blocks[0].from_image.bias.requires_grad
    with pytest.raises(UserError, match="count must be from 0 to 7 layers, got 8"):
        discriminator.freeze_layers(8)


# ---------------------------------------------------------------------------------------------------------------------
# second derivatives, precision, compilation


def test_second_derivatives_of_the_discriminator_equal_finite_differences():
    """R1 needs the gradient, by the weights, of the gradient by the image."""
    discriminator = make_discriminator(channel_max=4, num_classes=2).double()
    image = torch.randn(3, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0])
    weight = discriminator.blocks[0].conv1.weight

    def logits(image, weight):
        return torch.func.functional_call(discriminator, {"blocks.0.conv1.weight": weight}, (image, labels))

    assert torch.autograd.gradgradcheck(logits, (image, weight.detach().requires_grad_()), fast_mode=True)


def test_second_derivatives_of_the_generator_equal_finite_differences():
    """The path length penalty needs the gradient, by the weights, of the gradient by w."""
    generator = make_generator(channel_max=4, conv_clamp=256.0).double()
    ws = torch.randn(2, generator.num_ws, 8, dtype=torch.float64, requires_grad=True)
    names = ("synthesis.blocks.1.conv0.weight", "synthesis.blocks.1.conv0.affine.weight")
    weights = [generator.get_parameter(name).detach().requires_grad_() for name in names]

    class Synthesis(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.synthesis = generator.synthesis

        def forward(self, ws):
            return self.synthesis(ws, "const")

    def image(ws, *weights):
        return torch.func.functional_call(Synthesis(), dict(zip(names, weights, strict=True)), (ws,))

    assert torch.autograd.gradgradcheck(image, (ws, *weights), fast_mode=True)


@torch.no_grad()
def test_bfloat16_in_the_upper_layers_is_close_to_float32():
    settings = {"image_size": 32, "conv_clamp": 256.0}
    exact, mixed = make_generator(**settings), make_generator(**settings, num_bf16_resolutions=2)
    exact_d, mixed_d = make_discriminator(**settings), make_discriminator(**settings, num_bf16_resolutions=3)
    types = {}
    for level, block in enumerate(mixed.synthesis.blocks):
        block.conv1.register_forward_hook(
            lambda module, inputs, output, level=level: types.update({level: output.dtype})
        )
    z = latents(8)

    image, expected = mixed(z, noise="const"), exact(z, noise="const")

    assert [types[level] for level in range(4)] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert image.dtype == torch.float32
    assert not torch.equal(image, expected)
    assert (image - expected).square().mean().sqrt() < 0.02 * expected.std()
    logits, expected = mixed_d(expected), exact_d(expected)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max().clamp(min=1)


@torch.no_grad()
def test_clamp_bounds_what_each_layer_puts_out():
    generator = make_generator(conv_clamp=0.25)
    bounds = []
    for layer in generator.modules():
        if isinstance(layer, StyledConvolution):
            layer.register_forward_hook(lambda module, inputs, output: bounds.append(output.abs().max().item()))

    image = generator(latents(4), noise="const")

    assert bounds == [0.25] * 5
    assert image.abs().max() <= 0.25 * 3  # three contributions, and the filter between them averages


def test_first_order_paths_compile_without_a_break():
    generator, discriminator = make_generator(num_classes=2).train(), make_discriminator(num_classes=2)
    z, labels = latents(4), torch.tensor([0, 1, 0, 1])
    expected = discriminator(make_generator(num_classes=2)(z, labels, noise="const"), labels)

    def step(z, labels):
        return discriminator(generator(z, labels, noise="const"), labels)

    logits = torch.compile(step, backend="eager", fullgraph=True)(z, labels)
    logits.sum().backward()

    torch.testing.assert_close(logits, expected)
    assert generator.mapping_network.layers[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 96}, "image_size must be a power of two from 16 to 1024, got 96; set image_size to 64 or 128"),
        ({"image_size": 8}, "got 8; set image_size to 16"),
        ({"image_size": 2048}, "got 2048; set image_size to 1024"),
        ({"image_size": (48, 64)}, "the shorter side of image_size must be a power of two .* got 48; .* to 32 or 64"),
        ({"image_size": (512, 700)}, "must be a multiple of 128, .* got 700; set it to 640 or 768"),
        ({"image_size": (16, 16, 16)}, r"one integer or \(height, width\)"),
        ({"image_size": (16.0, 32)}, r"one integer or \(height, width\)"),
        ({"channel_base": 8}, "channel_base must be at least the shorter side of the image, 16, got 8"),
        ({"channel_max": 0}, "channel_max must be at least 1, got 0"),
        ({"num_bf16_resolutions": 3}, "num_bf16_resolutions must be from 0 to 2"),
        ({"conv_clamp": 0}, "conv_clamp must be positive or null, got 0"),
    ],
)
def test_wrong_settings_fail_at_construction(changes, message):
    for network, settings in ((StyleGAN2Generator, TINY_G), (StyleGAN2Discriminator, TINY)):
        with pytest.raises(UserError, match=message):
            network(**{**settings, **changes})


def test_wrong_settings_of_one_network_fail_at_construction():
    with pytest.raises(UserError, match="num_mapping_layers must be at least 1, got 0"):
        StyleGAN2Generator(**{**TINY_G, "num_mapping_layers": 0})
    with pytest.raises(UserError, match="minibatch_group_size must be at least 1, got 0"):
        StyleGAN2Discriminator(**TINY, minibatch_group_size=0)
    with pytest.raises(UserError, match=r"preset must be one of stylegan2_1024, .*, got 'paper'"):
        StyleGAN2Generator.from_preset("paper")


@pytest.mark.parametrize(
    ("num_classes", "arguments", "message"),
    [
        (0, {"z": torch.zeros(2, 9)}, r"z must have shape \(B, 8\), got \(2, 9\)"),
        (3, {}, "labels must be given to a network with 3 classes"),
        (0, {"labels": torch.tensor([0, 1])}, "labels must be left out for a network without classes"),
        (3, {"labels": torch.zeros(2, 2)}, r"class indices \(2,\) or vectors \(2, 3\), got torch.float32 of shape"),
        (3, {"labels": torch.tensor([0])}, r"class indices \(2,\) or vectors \(2, 3\)"),
        (0, {"noise": "fixed"}, "noise must be random, const, none or a list of maps, got 'fixed'"),
        (0, {"noise": [torch.zeros(4, 4)]}, "a map for each of 5 convolutions, got 1"),
        (0, {"noise": [torch.zeros(4, 4)] * 5}, r"shape \(8, 8\) or \(2, 1, 8, 8\), got \(4, 4\)"),
        (0, {"truncation_psi": 0.5, "truncation_cutoff": 7}, "truncation_cutoff must be from 0 to 6 layers, got 7"),
    ],
)
def test_wrong_arguments_of_the_generator_are_told(num_classes, arguments, message):
    generator = make_generator(num_classes=num_classes)

    with pytest.raises(UserError, match=message):
        generator(**{"z": latents(2), **arguments})


def test_wrong_arguments_of_synthesis_and_discriminator_are_told():
    with pytest.raises(UserError, match=r"ws must have shape \(B, 8\) or \(B, 6, 8\), got \(2, 5, 8\)"):
        make_generator().synthesis(torch.zeros(2, 5, 8))
    with pytest.raises(UserError, match=r"images must have shape \(B, 1, 16, 16\), got \(2, 3, 16, 16\)"):
        make_discriminator()(torch.zeros(2, 3, 16, 16))
    with pytest.raises(UserError, match="labels must be given to a network with 2 classes"):
        make_discriminator(num_classes=2)(torch.zeros(2, 1, 16, 16))
