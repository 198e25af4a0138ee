"""DCGAN and SNGAN networks against plain ones of torch's own layers, their shapes, and their spectral norm."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from medgen.errors import UserError
from medgen.networks import DCGANDiscriminator, DCGANGenerator

SIZES = (16, 32, 64, 128, 256)


def plain_generator(width: int, latent_dim: int, channels: int) -> nn.Sequential:
    """PyTorch's DCGAN example at 64×64: its layers, restated."""
    layers = [nn.ConvTranspose2d(latent_dim, 8 * width, 4, 1, 0, bias=False)]
    for factor in (8, 4, 2):
        layers += [nn.BatchNorm2d(factor * width), nn.ReLU()]
        layers += [nn.ConvTranspose2d(factor * width, factor * width // 2, 4, 2, 1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def plain_discriminator(width: int, channels: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for factor in (1, 2, 4):
        layers += [nn.Conv2d(factor * width, 2 * factor * width, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(2 * factor * width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 0, bias=False), nn.Flatten(0))


def copy_weights(plain: nn.Sequential, ours: nn.Module) -> None:
    """Each layer's weights and statistics, moved away from where they start."""
    for kind, layers in ((nn.modules.conv._ConvNd, ours.convs), (nn.BatchNorm2d, ours.norms)):
        for theirs, layer in zip([x for x in plain if isinstance(x, kind)], layers, strict=True):
            with torch.no_grad():
                theirs.weight.add_(0.05 * torch.randn_like(theirs.weight))
                if kind is nn.BatchNorm2d:
                    theirs.bias.normal_(0, 0.3)
                    theirs.running_mean.normal_(0, 0.1)
                    theirs.running_var.uniform_(0.5, 1.5)
            layer.load_state_dict(theirs.state_dict())


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_are_as_many_as_those_of_pytorchs_example():
    assert count(DCGANGenerator()) == count(plain_generator(64, 100, 3)) == 3_576_704
    assert count(DCGANDiscriminator()) == count(plain_discriminator(64, 3)) == 2_765_568


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_equal_those_of_plain_layers_of_the_same_weights(training):
    torch.manual_seed(0)
    z, image = torch.randn(5, 7), torch.rand(5, 3, 64, 64) * 2 - 1
    for ours, plain, given, plain_given in (
        (DCGANGenerator(64, 7, 3, 4), plain_generator(4, 7, 3), z, z[:, :, None, None]),
        (DCGANDiscriminator(64, 3, 4), plain_discriminator(4, 3), image, image),
    ):
        copy_weights(plain, ours)
        plain.train(training)
        got, expected = ours.train(training)(given), plain(plain_given)
        weights = torch.randn_like(expected)
        (got * weights).mean().backward()
        (expected * weights).mean().backward()

        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        by_layer = [layer for pair in zip(ours.convs, [*ours.norms, None, None], strict=False) for layer in pair]
        gradients = {p.shape: p.grad for layer in by_layer if layer is not None for p in layer.parameters()}
        for parameter in plain.parameters():
            if parameter.ndim == 4:  # shapes of convolutions are all different
                torch.testing.assert_close(gradients[parameter.shape], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_widths_of_the_formula_and_trains_a_step(size):
    torch.manual_seed(0)
    channels = 1 if size == 32 else 3
    generator = DCGANGenerator(size, latent_dim=6, out_channels=channels, base_channels=2)
    discriminator = DCGANDiscriminator(size, channels, base_channels=2, spectral_norm=size == 64)

    image = generator(torch.randn(2, 6))
    logits = discriminator(image)
    before = [parameter.clone() for network in (generator, discriminator) for parameter in network.parameters()]
    both = [*generator.parameters(), *discriminator.parameters()]
    logits.sum().backward()
    torch.optim.SGD(both, lr=1.0).step()

    first = 2 * size // 8
    assert generator.convs[0].weight.shape == (6, first, 4, 4)
    assert discriminator.convs[-1].weight.shape == (1, first, 4, 4)
    widths = [layer.out_channels for layer in generator.convs]
    assert widths == [first >> level for level in range(len(widths) - 1)] + [channels]
    assert [layer.out_channels for layer in discriminator.convs[:-1]] == widths[-2::-1]
    assert (image.shape, logits.shape) == ((2, channels, size, size), (2,))
    assert image.abs().max() <= 1
    for old, parameter in zip(before, both, strict=True):
        assert parameter.isfinite().all()
        assert not torch.equal(old, parameter)


def test_the_largest_size_makes_its_images():
    # 512: nothing but the number of layers is new, and it would be slow to train here
    generator, discriminator = DCGANGenerator(512, 4, 1, 1).eval(), DCGANDiscriminator(512, 1, 1).eval()
    with torch.no_grad():
        assert discriminator(generator(torch.randn(1, 4))).shape == (1,)


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    generator, discriminator = DCGANGenerator(64, 64, 3, 16), DCGANDiscriminator(64, 3, 16, batch_norm=False)

    for layer in [*generator.convs[:-1], *discriminator.convs[1:-1]]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.weight.mean().abs() < 0.001
    gains = torch.cat([norm.weight for norm in generator.norms])
    assert gains.mean().item() == pytest.approx(1, abs=0.01)
    assert gains.std().item() == pytest.approx(0.02, rel=0.25)
    assert all(norm.bias.count_nonzero() == 0 for norm in generator.norms)
    assert all(layer.bias is None for layer in generator.convs)
    # without batch normalisation there is no other place for a bias
    assert all(layer.bias is not None and layer.bias.count_nonzero() == 0 for layer in discriminator.convs)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in discriminator.modules())
    assert all(layer.bias is None for layer in DCGANDiscriminator(16, 3, 2).convs)


# ---------------------------------------------------------------------------------------------------------------------
# spectral norm


def largest_singular_value(weight: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item()


@pytest.mark.parametrize(("size", "batch_norm"), [(64, False), (64, True), (128, False), (256, False)])
def test_every_weight_of_the_discriminator_has_spectral_norm_one(size, batch_norm):
    torch.manual_seed(0)
    base = 8 if size == 64 else 1
    network = DCGANDiscriminator(size, 3, base, num_classes=3, spectral_norm=True, batch_norm=batch_norm)
    with torch.no_grad():
        for _ in range(60):  # what one iteration at a time comes to
            network._weights("cpu")

    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weights) == len(network.convs) + 1
    for weight in weights:
        assert largest_singular_value(weight) == pytest.approx(1, abs=0.02)
    # no weight escapes: what else is trained are biases and batch normalisation
    others = [name for name, value in network.named_parameters() if value.ndim > 1 and "original" not in name]
    assert others == []


def test_power_iteration_follows_the_weights_in_training_alone_and_once_in_a_forward_pass():
    torch.manual_seed(0)
    network = DCGANDiscriminator(16, 1, 4, num_classes=2, spectral_norm=True)
    image, label = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    vectors = {name: value for name, value in network.named_buffers() if name.endswith(("._u", "._v"))}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in vectors.items()}

    network.eval()(image, label)
    for name, value in vectors.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    network.train()(image, label)
    for layer, prefix in ((network.convs[1], "convs.1"), (network.projection, "projection")):
        matrix = layer.parametrizations.weight.original.detach().flatten(1)
        u = nn.functional.normalize(matrix @ before[f"{prefix}.parametrizations.weight.0._v"], dim=0)
        torch.testing.assert_close(vectors[f"{prefix}.parametrizations.weight.0._u"], u)
        v = nn.functional.normalize(matrix.T @ u, dim=0)
        torch.testing.assert_close(vectors[f"{prefix}.parametrizations.weight.0._v"], v)


def test_gradient_goes_through_the_norm():
    # with u and v held, W / (u W v) has no gradient along W itself: growing a weight changes nothing
    torch.manual_seed(0)
    network = DCGANDiscriminator(16, 1, 4, spectral_norm=True).eval()
    network(torch.rand(3, 1, 16, 16)).sum().backward()

    for layer in network.convs:
        original = layer.parametrizations.weight.original
        assert original.grad.abs().max() > 0
        along = (original.grad * original).sum() / (original.grad.norm() * original.norm())
        assert along.abs() < 1e-4


def test_logits_are_bounded_by_the_images_distance_where_the_discriminator_is_normalised():
    # each 4×4 convolution of stride 2 reads a pixel four times at most: at most twice as long as its norm says
    torch.manual_seed(0)
    network = DCGANDiscriminator(32, 1, 4, spectral_norm=True, batch_norm=False)
    with torch.no_grad():
        for layer in network.convs:  # far from where it began
            layer.parametrizations.weight.original.mul_(50)
        for _ in range(60):
            network._weights("cpu")
        a, b = torch.rand(2, 4, 1, 32, 32) * 2 - 1
        difference = (network.eval()(a) - network(b)).abs()
    assert (difference <= 1.05 * 2**3 * (a - b).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_copies_and_saved_weights_say_the_same(spectral_norm):
    torch.manual_seed(0)
    settings = {"image_size": 16, "in_channels": 1, "base_channels": 4, "num_classes": 2}
    network = DCGANDiscriminator(**settings, spectral_norm=spectral_norm)
    image, label = torch.rand(3, 1, 16, 16), torch.tensor([0, 1, 1])
    network(image, label)  # moves u, v and the running statistics
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = DCGANDiscriminator(**settings, spectral_norm=spectral_norm)
    other.load_state_dict(torch.load(file, weights_only=True))
    duplicate = copy.deepcopy(network)

    for _ in range(2):  # in training mode, in which the state moves on
        expected = network(image, label)
        for copied in (other, duplicate):
            torch.testing.assert_close(copied(image, label), expected, rtol=0, atol=0)


def test_singular_vectors_are_exact_under_autocast():
    torch.manual_seed(0)
    network = DCGANDiscriminator(16, 1, 4, num_classes=2, spectral_norm=True, batch_norm=False)
    plain = copy.deepcopy(network)
    image, label = torch.rand(3, 1, 16, 16) * 2 - 1, torch.tensor([0, 1, 1])

    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(image, label)
    exact = plain(image, label)

    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)
    for (name, value), expected in zip(network.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# classes


def test_class_decides_gain_and_bias_of_the_generators_normalisation():
    torch.manual_seed(0)
    network, plain = DCGANGenerator(16, 5, 3, 4, num_classes=3).eval(), DCGANGenerator(16, 5, 3, 4).eval()
    with torch.no_grad():
        for norm in network.norms:
            norm.gain_KO.normal_(1, 0.3)
            norm.bias_KO.normal_(0, 0.3)
    z = torch.randn(3, 5)
    got = network(z, torch.tensor([0, 2, 0]))

    for index, label in enumerate((0, 2, 0)):  # an unconditional network with the class's row
        for layer, theirs in zip(plain.convs, network.convs, strict=True):
            layer.load_state_dict(theirs.state_dict())
        for norm, theirs in zip(plain.norms, network.norms, strict=True):
            norm.weight.data, norm.bias.data = theirs.gain_KO[label].detach(), theirs.bias_KO[label].detach()
        torch.testing.assert_close(got[index : index + 1], plain(z[index : index + 1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(z, torch.eye(3)[[0, 2, 0]]), got)
    assert (network(z, torch.tensor([1, 1, 1])) - got).abs().max() > 1e-2


def test_discriminators_class_is_projected_on_the_sum_of_the_last_activations():
    torch.manual_seed(0)
    network, plain = DCGANDiscriminator(16, 3, 4, num_classes=3).eval(), DCGANDiscriminator(16, 3, 4).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("projection")})
    image, label = torch.rand(4, 3, 16, 16), torch.tensor([0, 2, 1, 2])

    x = nn.functional.leaky_relu(network.convs[0](image), 0.2)
    phi = nn.functional.leaky_relu(network.norms[0](network.convs[1](x)), 0.2)
    expected = plain(image)
    for item, of_class in enumerate(label):
        for channel in range(8):
            expected[item] += network.projection.weight[channel, of_class] * phi[item, channel].sum()

    torch.testing.assert_close(network(image, label), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DCGANGenerator(image_size=48), "image_size must be 16, 32, 64, 128, 256, 512, got 48; set --image_"),
        (lambda: DCGANDiscriminator(image_size=8), "image_size must be 16, 32, .* got 8"),
        (lambda: DCGANGenerator(image_size="64"), "image_size must be .* got '64'"),
        (lambda: DCGANGenerator(latent_dim=0), "latent_dim must be a whole number of at least 1, got 0; set --latent"),
        (lambda: DCGANGenerator(base_channels=2.5), r"base_channels must be a whole number of at least 1, got 2\.5"),
        (lambda: DCGANDiscriminator(in_channels=-1), "in_channels must be a whole number of at least 1, got -1"),
        (lambda: DCGANGenerator(num_classes=-1), "num_classes must be a whole number of at least 0, got -1"),
        (lambda: DCGANGenerator(16, 5, 1, 2)(torch.zeros(2, 6)), r"latents must be \(B, 5\), got \(2, 6\)"),
        (lambda: DCGANDiscriminator(16, 1, 2)(torch.zeros(2, 3, 16, 16)), r"must be \(B, 1, 16, 16\), got \(2, 3, 16"),
        (lambda: DCGANGenerator(16, 5, 1, 2, 2)(torch.zeros(2, 5)), "2 classes, got none"),
    ],
)
def test_wrong_arguments_are_told(make, message):
    with pytest.raises(UserError, match=message) as told:
        make()
    assert "\n" not in str(told.value)
