"""The progressive GAN beside reference arrays, plain functions and the paper's table, and by its properties."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from medgen.errors import UserError
from medgen.networks import PGGAN_PRESETS, PGGANDiscriminator, PGGANGenerator
from medgen.networks.pggan import EqualisedConv, EqualisedDense, minibatch_stddev, pixel_norm

ASSETS = Path(__file__).parents[1] / "assets"
TINY = (6, 5, 4)  # 4×4 to 16×16; no two alike, so that no axis is taken for another


def make_generator(channels=TINY, latent_dim=7, **changes) -> PGGANGenerator:
    """A small one whose biases are not zero, as they are at the start of a training."""
    torch.manual_seed(0)
    return with_biases(PGGANGenerator(channels, latent_dim=latent_dim, **changes))


def make_discriminator(channels=TINY, **changes) -> PGGANDiscriminator:
    torch.manual_seed(1)
    return with_biases(PGGANDiscriminator(channels, **changes))


def with_biases(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return network


def noise(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# reference arrays: a run of the GAN zoo's networks


@pytest.fixture(scope="module")
def reference():
    with np.load(ASSETS / "pggan_gray32.npz", allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    layers = {part: {name[2:]: value for name, value in arrays.items() if name.startswith(f"{part}.")} for part in "GD"}
    return arrays, layers, json.loads((ASSETS / "pggan_configs.json").read_text(encoding="utf-8"))["gray32"]


def of_the_zoo(layers: dict[str, torch.Tensor], depth: int, part: str) -> dict[str, torch.Tensor]:
    """The zoo's layers as ours: it multiplies outputs, bias and all, by √2/√fan-in, whatever the layer."""
    inner = [(level, place) for level in range(1, depth) for place in (0, 1)]
    names = {f"scaleLayers.{level - 1}.{place}": f"blocks.{level}.conv{place}" for level, place in inner}
    gains = {}  # of ours, where it is not √2
    if part == "G":
        names |= {f"toRGBLayers.{level}": f"to_rgb.{level}" for level in range(depth)}
        names |= {"formatLayer": "blocks.0.dense", "groupScale0.0": "blocks.0.conv"}
        gains = {"formatLayer": math.sqrt(2) / 4, **{f"toRGBLayers.{level}": 1.0 for level in range(depth)}}
    else:
        names |= {f"fromRGBLayers.{level}": f"from_rgb.{level}" for level in range(depth)}
        names |= {"groupScaleZero.0": "blocks.0.conv", "groupScaleZero.1": "blocks.0.dense"}
        names |= {"decisionLayer": "blocks.0.out"}
        gains = {"decisionLayer": 1.0}
    state = {}
    for theirs, ours in names.items():
        weight, bias = layers[f"{theirs}.module.weight"], layers[f"{theirs}.module.bias"]
        state[f"{ours}.weight"] = weight * (math.sqrt(2) / gains.get(theirs, math.sqrt(2)))
        state[f"{ours}.bias"] = bias * math.sqrt(2 / weight[0].numel())
    if part == "D":
        state["blocks.0.conv.weight"][:, -1] *= math.sqrt(4 / 3)  # its variances are divided by 3, ours by 4
    return state


@pytest.mark.parametrize("old_weight", [0.0, 0.4])
@torch.no_grad()
def test_images_and_scores_equal_the_reference_arrays(reference, old_weight):
    arrays, layers, config = reference
    channels = tuple(config["channels_by_resolution"].values())
    generator = PGGANGenerator(channels, config["latent_dim"], config["image_channels"])
    discriminator = PGGANDiscriminator(channels, config["image_channels"], fused_scale=False)
    for network, part in ((generator, "G"), (discriminator, "D")):
        missing, unknown = network.load_state_dict(of_the_zoo(layers[part], len(channels), part), strict=False)
        assert (missing, unknown) == (["growth"], [])
        network.grow(32, 1 - old_weight)

    image, logits = generator(arrays["z"]), discriminator(arrays[f"image_alpha{old_weight}"])

    torch.testing.assert_close(image, arrays[f"image_alpha{old_weight}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, arrays[f"logits_alpha{old_weight}"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# layers


def plain(layer: EqualisedConv, gain: float):
    """The layer as the paper describes it, one operation after the other; differentiated by PyTorch's own formulas."""

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if layer.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = F.conv2d(x, weight * (gain / math.sqrt(weight[0].numel())), bias, padding=weight.shape[-1] // 2)
        return F.avg_pool2d(y, 2) if layer.resample == "down" else y

    return function


def called(layer: EqualisedConv):
    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    return function


LAYERS = [*itertools.product((None, "up", "down"), (3,), (False, True)), (None, 1, True), (None, 1, False)]


@pytest.fixture(params=LAYERS, ids=lambda given: "-".join(map(str, given)))
def layer_and_inputs(request):
    resample, kernel_size, twice = request.param
    torch.manual_seed(0)
    layer = EqualisedConv(3, 2, kernel_size, gain=1.3, resample=resample, twice=twice).double()
    inputs = tuple(
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4, 6), (2, 3, kernel_size, kernel_size), (2,))
    )
    return layer, inputs


def test_convolutions_and_their_derivatives_equal_plain_operations(layer_and_inputs):
    layer, inputs = layer_and_inputs

    def everything(function):
        y = function(*inputs)
        direction = noise(*y.shape).double().requires_grad_()
        gradients = torch.autograd.grad(y, inputs, direction, create_graph=True)
        penalty = sum(noise(*g.shape, seed=4).double().mul(g).sum() for g in gradients[:2])
        (of_image,) = torch.autograd.grad(function(*inputs), inputs[0], direction, create_graph=True)
        # as a gradient penalty has it: the image's gradient alone, differentiated by the weights
        by_weights = torch.autograd.grad(of_image.square().sum(), [inputs[1], direction])
        return [y, *gradients, *torch.autograd.grad(penalty, [*inputs[:2], direction]), *by_weights]

    for got, expected in zip(everything(called(layer)), everything(plain(layer, 1.3)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_derivatives_of_convolutions_equal_finite_differences(layer_and_inputs):
    layer, inputs = layer_and_inputs

    assert torch.autograd.gradcheck(called(layer), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(called(layer), inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", ["weight", "bias"])
def test_each_parameter_s_gradient_can_be_asked_for_alone(wanted):
    layer, x = EqualisedConv(3, 2, 3, twice=True), noise(2, 3, 4, 4)

    (got,) = torch.autograd.grad(layer(x).square().sum(), getattr(layer, wanted))
    layer.twice = False
    (expected,) = torch.autograd.grad(layer(x).square().sum(), getattr(layer, wanted))

    torch.testing.assert_close(got, expected)


def test_frozen_weights_get_no_gradient_and_pass_it_on():
    layer, x = EqualisedConv(3, 2, 3, twice=True).requires_grad_(False), noise(2, 3, 4, 4).requires_grad_()

    layer(x).square().sum().backward()

    assert layer.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_gradient_by_the_images_alone_costs_no_gradient_by_the_weights():
    flops = []
    for twice in (False, True):
        discriminator = make_discriminator()
        for layer in discriminator.modules():
            if isinstance(layer, EqualisedConv):
                layer.twice = twice
        images = noise(4, 1, 16, 16).requires_grad_().clone()  # the counter cannot bear a leaf
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
        flops.append(counter.get_total_flops())

    assert flops[0] == flops[1]


@pytest.mark.parametrize("fused_scale", [True, False])
def test_gradient_penalty_s_derivatives_equal_those_of_the_default_convolution(fused_scale):
    found = []
    for twice in (False, True):
        discriminator = make_discriminator(num_classes=2, fused_scale=fused_scale).double()
        for layer in discriminator.modules():
            if isinstance(layer, EqualisedConv):
                layer.twice = twice
        discriminator.grow(16, 0.3)
        images = noise(8, 1, 16, 16).double().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(images)[:, 0].sum(), images, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
        found.append({n: p.grad for n, p in discriminator.named_parameters() if p.grad is not None})

    assert found[0].keys() >= {"blocks.0.conv.weight", "blocks.2.conv0.bias", "from_rgb.1.weight", "from_rgb.2.weight"}
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_the_discriminator_equal_finite_differences():
    discriminator = make_discriminator((4, 3)).double()
    discriminator.grow(8, 0.4)
    images = noise(4, 1, 8, 8).double().requires_grad_()
    names = ("blocks.0.conv.weight", "blocks.1.conv1.weight", "blocks.1.conv0.bias")
    values = [discriminator.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def scores(images, *values):
        return torch.func.functional_call(discriminator, dict(zip(names, values, strict=True)), (images,))

    assert torch.autograd.gradgradcheck(scores, (images, *values), fast_mode=True)


@torch.no_grad()
def test_autocast_of_the_generator_is_close_to_float32():
    generator, kinds = make_generator(), set()
    for block in generator.blocks:
        block.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        image = generator(noise(8, 7))

    assert kinds == {torch.bfloat16}
    expected = generator(noise(8, 7))
    assert (image - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_autocast_of_the_discriminator_is_close_to_float32():
    gradients = []
    for enabled in (False, True):
        discriminator, images = make_discriminator(), noise(8, 1, 16, 16).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            scores = discriminator(images)
        (gradient,) = torch.autograd.grad(scores.float().sum(), images, create_graph=True)
        (gradient.square().sum() + scores.float().sum()).backward()
        weight = discriminator.blocks[2].conv1.weight
        assert weight.grad.dtype == torch.float32
        gradients.append(weight.grad)
    assert scores.dtype == torch.float32  # the last layer, whatever the others compute in
    assert not torch.equal(*gradients)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_weights_and_their_gradients_are_in_the_activations_layout():
    generator, discriminator = make_generator(), make_discriminator()

    discriminator(generator(noise(4, 7))).sum().backward()

    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        if parameter.ndim == 4 and parameter.grad is not None:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
            assert parameter.grad.is_contiguous(memory_format=torch.channels_last), name


def test_pixel_norm_is_a_division_by_the_root_mean_square():
    x = noise(2, 5, 3, 4).double().requires_grad_()

    expected = x.detach().numpy() / np.sqrt((x.detach().numpy() ** 2).mean(1, keepdims=True) + 1e-8)

    np.testing.assert_allclose(pixel_norm(x).detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(pixel_norm(x[:, :, 0, 0]).detach().numpy(), expected[:, :, 0, 0], rtol=1e-12)
    assert torch.equal(pixel_norm(torch.zeros(2, 5, 3, 4)), torch.zeros(2, 5, 3, 4))
    assert torch.autograd.gradcheck(pixel_norm, x)
    assert torch.autograd.gradgradcheck(pixel_norm, x)


# ---------------------------------------------------------------------------------------------------------------------
# equalised learning rate


@torch.no_grad()
def test_equalised_layers_have_unit_variance_at_the_start():
    torch.manual_seed(0)
    convolution, dense = EqualisedConv(64, 256, 3, gain=1.0), EqualisedDense(128, 256, gain=1.0)

    y = convolution(torch.randn(16, 64, 10, 10))[:, :, 1:-1, 1:-1]  # at the edges some of the taps see zeros

    assert y.var().item() == pytest.approx(1, abs=0.05)
    assert dense(torch.randn(512, 128)).var().item() == pytest.approx(1, abs=0.05)
    for layer in (convolution, dense):
        assert layer.weight.var().item() == pytest.approx(1, abs=0.05)
        assert not layer.bias.any()


@torch.no_grad()
def test_activations_of_a_new_generator_have_unit_second_moments_before_they_are_normalised():
    """Gain √2 and a leaky ReLU keep them: (1 + 0.2²) / 2 · 2 = 1.04."""
    torch.manual_seed(0)
    generator = PGGANGenerator((64, 64, 64, 64), latent_dim=64)
    moments = {}

    def remember(name):
        def hook(module, inputs, output):
            inner = output[:, :, 2:-2, 2:-2]
            moments[name] = F.leaky_relu(inner, 0.2).square().mean().item()

        return hook

    for level in (2, 3):
        for name in ("conv0", "conv1"):
            getattr(generator.blocks[level], name).register_forward_hook(remember(f"{level}.{name}"))

    image = generator(torch.randn(64, 64))

    assert moments == {name: pytest.approx(1.04, rel=0.15) for name in ("2.conv0", "2.conv1", "3.conv0", "3.conv1")}
    assert image.square().mean().item() == pytest.approx(1, rel=0.3)


@torch.no_grad()
def test_first_dense_layer_is_a_quarter_as_strong():
    """fan-in counted as 16 times as much: the authors' gain √2/4."""
    torch.manual_seed(0)
    generator = PGGANGenerator((512,), latent_dim=512)

    y = generator.blocks[0].dense(pixel_norm(torch.randn(64, 512)))

    assert y.square().mean().item() == pytest.approx(2 / 16, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# minibatch standard deviation


@pytest.mark.parametrize(("batch_size", "group_size"), [(8, 4), (4, 4), (2, 4), (1, 4), (6, 3), (6, None), (12, 4)])
def test_minibatch_stddev_equals_a_loop(batch_size, group_size):
    x = noise(batch_size, 3, 4, 5).double()

    y = minibatch_stddev(x, group_size)

    assert torch.equal(y[:, :3], x)
    size = min(group_size or batch_size, batch_size)
    for place in range(batch_size):
        group = x[place % (batch_size // size) :: batch_size // size].numpy()
        assert len(group) == size
        np.testing.assert_allclose(y[place, 3].numpy(), np.sqrt(group.var(0) + 1e-8).mean(), rtol=1e-12)


def test_minibatch_stddev_does_not_depend_on_the_order_within_a_group():
    x = noise(8, 3, 4, 4).double()
    order = torch.tensor([6, 3, 0, 7, 2, 1, 4, 5])  # even places stay in the even group

    torch.testing.assert_close(minibatch_stddev(x[order], 4), minibatch_stddev(x, 4)[order], rtol=1e-12, atol=0)


@torch.no_grad()
def test_scores_depend_on_the_group_and_on_nothing_else_of_the_batch():
    discriminator = make_discriminator()
    images = noise(8, 1, 16, 16)
    changed = images.clone()
    changed[7] += 1

    scores, after = discriminator(images), discriminator(changed)

    torch.testing.assert_close(after[::2], scores[::2])
    assert not torch.isclose(after[1::2], scores[1::2]).any()


@torch.no_grad()
def test_batches_that_groups_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"minibatch_group_size 4, got 6 images; set --batch_size to 4 or 8"):
        make_discriminator()(noise(6, 1, 16, 16))
    assert make_discriminator(minibatch_group_size=None)(noise(6, 1, 16, 16)).shape == (6, 1)


# ---------------------------------------------------------------------------------------------------------------------
# growth


@pytest.mark.parametrize("resolution", [8, 16])
@torch.no_grad()
def test_images_and_scores_do_not_jump_when_a_level_is_added(resolution):
    generator, discriminator = make_generator(), make_discriminator()
    z = noise(4, 7)

    generator.grow(resolution // 2)
    discriminator.grow(resolution // 2)
    before = generator(z)
    score = discriminator(before)
    generator.grow(resolution, 0.0)
    discriminator.grow(resolution, 0.0)
    after = generator(z)

    doubled = F.interpolate(before, scale_factor=2.0, mode="nearest")
    torch.testing.assert_close(after, doubled, rtol=0, atol=1e-6)
    torch.testing.assert_close(discriminator(doubled), score, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_fade_mixes_linearly_and_ends_without_a_jump():
    generator, discriminator = make_generator(), make_discriminator((4,) * 3)
    z, images, outputs = noise(4, 7), noise(4, 1, 16, 16), {}
    for alpha in (0.0, 0.25, 1 - 1e-6, 1.0):
        generator.grow(16, alpha)
        discriminator.grow(16, alpha)
        outputs[alpha] = generator(z), discriminator(images)

    torch.testing.assert_close(outputs[0.25][0], 0.75 * outputs[0.0][0] + 0.25 * outputs[1.0][0])
    for almost, whole in zip(outputs[1 - 1e-6], outputs[1.0], strict=True):
        torch.testing.assert_close(almost, whole, rtol=0, atol=1e-4)
    assert not torch.allclose(outputs[0.0][0], outputs[1.0][0], atol=0.1)


@pytest.mark.parametrize("make", [make_generator, make_discriminator])
def test_position_goes_with_the_weights(make):
    network = make()
    assert (network.resolution, network.alpha, network.growth.tolist()) == (16, 1.0, [16, 1])
    network.grow(8, 0.25)

    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with torch.device("meta"):
        assigned = make()
    assigned.load_state_dict(network.state_dict(), assign=True)

    for other in (loaded, assigned, copy.deepcopy(network), copy.deepcopy(network).to(torch.float64)):
        assert (other.resolution, other.alpha, other.growth.tolist()) == (8, 0.25, [8, 0.25])
    loaded.grow(4)
    assert network.resolution == 8


def test_weights_without_a_position_leave_it_as_it_is():
    generator = make_generator()
    generator.grow(8, 0.5)

    generator.load_state_dict({k: v for k, v in make_generator().state_dict().items() if k != "growth"}, strict=False)

    assert (generator.resolution, generator.alpha) == (8, 0.5)


def test_only_levels_in_use_get_gradients():
    generator, discriminator = make_generator(), make_discriminator()
    for network in (generator, discriminator):
        network.grow(8, 0.5)

    discriminator(generator(noise(4, 7))).sum().backward()

    for network, rgb in ((generator, "to_rgb"), (discriminator, "from_rgb")):
        with_gradient = {name for name, p in network.named_parameters() if p.grad is not None}
        all_names = {name for name, _ in network.named_parameters()}
        assert with_gradient == {name for name in all_names if not name.startswith(("blocks.2", f"{rgb}.2"))}


# ---------------------------------------------------------------------------------------------------------------------
# arguments


@torch.no_grad()
def test_only_the_direction_of_a_latent_counts_and_truncation_is_its_length():
    generator = make_generator()
    z = noise(3, 7)

    torch.testing.assert_close(generator(5 * z), generator(z), rtol=1e-5, atol=1e-5)
    at_zero = generator(z, truncation_psi=0.0)
    torch.testing.assert_close(at_zero, at_zero[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(at_zero[:1], generator(torch.zeros(1, 7)))
    distances = [(generator(z, truncation_psi=psi) - at_zero).norm() for psi in (0.1, 0.4, 1.0)]
    assert distances == sorted(distances)


@torch.no_grad()
def test_class_indices_are_one_hot_vectors_and_matter():
    generator = make_generator(num_classes=3)
    z, labels = noise(3, 7), torch.tensor([0, 2, 1])

    images = generator(z, labels, truncation_psi=0.8)

    assert torch.equal(images, generator(z, torch.eye(3)[labels], truncation_psi=0.8))
    assert not torch.allclose(images, generator(z, labels.flip(0), truncation_psi=0.8))
    assert make_discriminator(num_classes=3)(noise(4, 1, 16, 16)).shape == (4, 4)
    # the class is not shortened with the latent
    assert not torch.allclose(*generator(z[:1].expand(2, -1), torch.tensor([0, 1]), truncation_psi=0.0).split(1))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    generator = make_generator()
    z = noise(5, 7)

    alone = torch.cat([generator(z[place : place + 1]) for place in range(5)])

    torch.testing.assert_close(generator(z), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [make_generator, make_discriminator])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, "channels must be 1 to 9 positive whole numbers"),
        ({"channels": (4,) * 10}, "channels must be 1 to 9"),
        ({"channels": (4, 0)}, r"got \[4, 0\]"),
        ({"num_classes": -1}, "num_classes must be 0 or more, got -1"),
    ],
)
def test_wrong_settings_fail_at_construction(make, changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_generator, "latent_dim"),
        (make_generator, "out_channels"),
        (make_discriminator, "in_channels"),
        (make_discriminator, "minibatch_group_size"),
    ],
)
def test_numbers_below_one_fail_at_construction(make, name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        make(**{name: 0})


@pytest.mark.parametrize(
    ("resolution", "alpha", "message"),
    [
        (32, 1.0, "resolution must be one of 4, 8, 16, got 32"),
        (12, 1.0, "got 12"),
        (8, 1.1, "alpha must be from 0 to 1"),
        (8, -0.1, "alpha must be from 0 to 1"),
        (8, float("nan"), "alpha must be from 0 to 1"),
        (4, 0.5, "1 at 4×4, got 0.5 at 4"),
    ],
)
def test_positions_that_do_not_exist_are_refused(resolution, alpha, message):
    for network in (make_generator(), make_discriminator()):
        with pytest.raises(UserError, match=message):
            network.grow(resolution, alpha)
        assert (network.resolution, network.alpha) == (16, 1.0)


def test_inputs_of_wrong_shapes_are_told():
    with pytest.raises(UserError, match=r"latents must be \(B, 7\), got \(2, 8\)"):
        make_generator()(noise(2, 8))
    with pytest.raises(UserError, match="labels must be given to a network with 2 classes"):
        make_generator(num_classes=2)(noise(2, 7))
    with pytest.raises(UserError, match="labels must be left out"):
        make_generator()(noise(2, 7), torch.tensor([0, 1]))
    discriminator = make_discriminator()
    discriminator.grow(8)
    with pytest.raises(UserError, match=r"images must be \(B, 1, 8, 8\), got \(2, 1, 16, 16\); grow both networks"):
        discriminator(noise(2, 1, 16, 16))
    with pytest.raises(UserError, match=r"preset must be one of paper_1024, .*, got 'paper'"):
        PGGANGenerator.from_preset("paper")


# ---------------------------------------------------------------------------------------------------------------------
# sizes and presets


@pytest.mark.parametrize("levels", range(1, 10))
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels(levels, channels):
    with torch.device("meta"):  # shapes alone: nothing is computed
        generator = PGGANGenerator((8,) * levels, latent_dim=8, out_channels=channels)
        discriminator = PGGANDiscriminator((8,) * levels, in_channels=channels)
        images = generator(torch.randn(4, 8))
        scores = discriminator(images)

    side = 4 * 2 ** (levels - 1)
    assert generator.image_size == discriminator.image_size == side
    assert generator.resolutions == tuple(4 * 2**level for level in range(levels))
    assert (images.shape, scores.shape) == ((4, channels, side, side), (4, 1))


def count(*parts: torch.nn.Module) -> int:
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def test_sizes_of_the_networks_are_those_of_the_paper_s_table_2():
    """Numbers of parameters as printed there, with two digits; images of three channels."""
    convolutions = {8: (2.4e6, 2.4e6), 16: (2.4e6, 2.4e6), 32: (2.4e6, 2.4e6), 64: (1.2e6, 590e3)}
    convolutions |= {128: (295e3, 148e3), 256: (74e3, 37e3), 512: (18e3, 9.2e3), 1024: (4.6e3, 2.3e3)}
    with torch.device("meta"):
        generator = PGGANGenerator.from_preset("paper_1024", out_channels=3)
        discriminator = PGGANDiscriminator.from_preset("paper_1024", in_channels=3)

    for level, numbers in enumerate(convolutions.values(), 1):
        for place in (0, 1):
            of_g, of_d = (getattr(network.blocks[level], f"conv{place}") for network in (generator, discriminator))
            assert count(of_g) == pytest.approx(numbers[place], rel=0.03)
            assert count(of_d) == pytest.approx(numbers[1 - place], rel=0.03)
    assert count(generator.to_rgb[-1]) == 51
    assert count(discriminator.from_rgb[-1]) == 64
    assert count(discriminator.blocks[0].out) == 513
    for first in (generator.blocks[0], discriminator.blocks[0]):
        assert count(first.dense) == pytest.approx(4.2e6, rel=0.03)
        assert count(first.conv) == pytest.approx(2.4e6, rel=0.03)
    # a bias for each of the first 4×4 places, where the paper has one for each channel
    assert round((count(generator.blocks, generator.to_rgb[-1]) - 15 * 512) / 1e6, 1) == 23.1
    assert round(count(discriminator.blocks, discriminator.from_rgb[-1]) / 1e6, 1) == 23.1


PAPER_WIDTHS = (512, 512, 512, 512, 256, 128, 64, 32, 16)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("paper_1024", {"channels": PAPER_WIDTHS, "first_norm": True, "fused_scale": True}),
        ("rsna_512", {"channels": PAPER_WIDTHS[:8], "first_norm": True, "minibatch_group_size": 4}),
        (
            "cxr14_1024",
            {"channels": PAPER_WIDTHS, "first_norm": False, "minibatch_group_size": None,
             "from_rgb_activation": False, "fused_scale": False},
        ),
    ],
)  # fmt: skip
def test_presets_are_the_published_networks(preset, expected):
    settings = PGGAN_PRESETS[preset]

    assert settings["latent_dim"] == 512
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("preset", PGGAN_PRESETS)
def test_every_preset_builds_both_networks(preset):
    with torch.device("meta"):
        generator = PGGANGenerator.from_preset(preset, out_channels=3, num_classes=2)
        discriminator = PGGANDiscriminator.from_preset(preset, in_channels=3, num_classes=2)
        images = generator(torch.randn(4, generator.latent_dim), torch.eye(2).repeat(2, 1))
        scores = discriminator(images)

    assert generator.image_size == int(preset.rpartition("_")[2])
    assert images.shape == (4, 3, generator.image_size, generator.image_size)
    assert scores.shape == (4, 3)


def test_widths_of_the_presets_follow_the_authors_formula():
    """min(8192 / 2^(log2 of the side - 1), 512): 16 channels at 1024."""
    for preset in ("paper_1024", "rsna_512"):
        channels = PGGAN_PRESETS[preset]["channels"]
        assert channels == tuple(min(8192 // 2 ** (level + 1), 512) for level in range(len(channels)))


# ---------------------------------------------------------------------------------------------------------------------
# exports


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # shapes are checked once
@pytest.mark.filterwarnings("ignore:No complete tensor found in the group")
@pytest.mark.parametrize(("num_classes", "alpha"), [(0, 1.0), (0, 0.4), (3, 1.0)])
def test_generator_exports_at_any_batch_size(tmp_path, num_classes, alpha):
    generator = make_generator(num_classes=num_classes).eval()
    generator.grow(16, alpha)

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        labels = (torch.eye(num_classes)[torch.arange(count) % num_classes],) if num_classes else ()
        return (noise(count, 7), *labels)

    program = torch.export.export(
        generator, inputs(3), dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs(3))
    )
    torch.export.save(program, tmp_path / "generator.pt2")
    torch.jit.save(torch.jit.trace(generator, inputs(3)), tmp_path / "generator.ts")

    exported = (torch.export.load(tmp_path / "generator.pt2").module(), torch.jit.load(tmp_path / "generator.ts"))
    for network in exported:
        torch.testing.assert_close(network(*inputs(5)), generator(*inputs(5)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("growth", [[math.nan, 1.0], [math.inf, 1.0], [8.5, 1.0], [8.0, math.nan]])
def test_a_damaged_position_is_told_when_it_is_loaded(growth):
    network = PGGANGenerator((4, 4), latent_dim=4)
    state = {**network.state_dict(), "growth": torch.tensor(growth)}
    with pytest.raises(UserError, match=r"resolution must be one of 4, 8|alpha must be from 0 to 1"):
        network.load_state_dict(state)


def test_scores_keep_their_precision_under_autocast():
    torch.manual_seed(0)
    network = PGGANDiscriminator((8, 8), minibatch_group_size=None)
    with torch.no_grad():
        network.blocks[0].out.bias.fill_(300.0)  # bfloat16 has steps of 2 there
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = network(torch.randn(16, 1, 8, 8))
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 12
