"""Images of a progressively grown generator: the same in any batch, truncated, walked through, and of any level."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from medgen.errors import UserError
from medgen.inferers import PGGANInferer, PGGANWalkInferer, check_resolution, draw_latents, level_weights
from medgen.networks import PGGANGenerator

Z = 8


def generator(num_classes: int = 0, out_channels: int = 1) -> PGGANGenerator:
    torch.manual_seed(0)
    network = PGGANGenerator((16, 12, 8), Z, out_channels, num_classes).eval()
    with torch.no_grad():
        for layer in network.to_rgb:
            layer.weight.mul_(0.2)  # keeps the images inside [-1, 1], where nothing is clipped
    return network


@torch.no_grad()
def images(network: PGGANGenerator, seeds: list[int], labels: list[int] | None = None, **settings) -> torch.Tensor:
    given = None if labels is None else torch.tensor(labels)
    return PGGANInferer(**settings)(torch.tensor(seeds), network, labels=given)


@torch.no_grad()
def walk(network: PGGANGenerator, positions: list[float], **settings) -> torch.Tensor:
    return PGGANWalkInferer(**settings)(torch.tensor(positions, dtype=torch.float64), network)


def test_output_is_the_networks_image_in_the_bundles_range():
    network = generator()
    with torch.no_grad():
        raw = network(draw_latents([3, 9], Z))

    got = images(network, [3, 9])

    assert raw.abs().max() < 1
    torch.testing.assert_close(got, raw / 2 + 0.5, rtol=0, atol=0)


def test_output_is_clipped():
    network = generator()
    with torch.no_grad():
        network.to_rgb[-1].bias.fill_(0.9)

    got = images(network, [0, 1])

    assert got.max() == 1
    assert got.min() >= 0


@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_image_does_not_depend_on_its_batch(num_classes):
    network = generator(num_classes, out_channels=3)
    seeds, labels = [5, 2, 11, 5], [0, 1, 2, 0]

    together = images(network, seeds, labels if num_classes else None)

    for number, seed in enumerate(seeds):
        alone = images(network, [seed], [labels[number]] if num_classes else None)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("resolution", "alpha"), [(4, 1.0), (8, 0.3), (16, 1.0)])
def test_images_are_of_the_size_that_the_network_is_grown_to(resolution, alpha):
    network = generator()
    network.grow(resolution, alpha)
    with torch.no_grad():
        raw = network(draw_latents([7], Z))

    got = images(network, [7])

    assert got.shape == (1, 1, resolution, resolution)
    torch.testing.assert_close(got, (raw / 2 + 0.5).clamp(0, 1))


def test_truncation_to_nothing_gives_one_image_for_all_seeds_and_one_for_each_class():
    network, of_classes = generator(), generator(num_classes=2)

    first, second = images(network, [1, 2], truncation_psi=0)
    by_class = images(of_classes, [1, 2, 3], [0, 0, 1], truncation_psi=0)

    torch.testing.assert_close(first, second)
    torch.testing.assert_close(by_class[0], by_class[1])
    assert (by_class[0] - by_class[2]).abs().max() > 1e-4


def test_truncation_shortens_the_latent_that_the_first_layer_sees():
    # by hand: normalise, shorten, and hand it to a network that does not normalise again
    network, seen = generator(), []
    network.blocks[0].dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    images(network, [4, 6], truncation_psi=0.7)

    z = draw_latents([4, 6], Z)
    expected = 0.7 * math.sqrt(Z) * z / z.norm(dim=1, keepdim=True)
    torch.testing.assert_close(seen[0], expected)


def test_classes_make_different_images_and_vectors_are_classes_too():
    network = generator(num_classes=3)

    by_index = images(network, [1, 1], [0, 2])
    with torch.no_grad():
        by_vector = PGGANInferer()(torch.tensor([1, 1]), network, labels=torch.eye(3)[[0, 2]])

    assert (by_index[0] - by_index[1]).abs().max() > 1e-4
    torch.testing.assert_close(by_index, by_vector)


def test_seeds_may_come_beside_the_images_of_a_validation():
    network = generator()

    with torch.no_grad():
        got = PGGANInferer()(torch.rand(2, 1, 16, 16), network, seeds=torch.tensor([8, 9]))

    torch.testing.assert_close(got, images(network, [8, 9]), rtol=0, atol=0)


@pytest.mark.parametrize("psi", [float("nan"), None, "0.7", True])
def test_a_truncation_that_is_no_number_is_refused(psi):
    for make in (PGGANInferer, lambda truncation_psi: PGGANWalkInferer([1, 2], truncation_psi=truncation_psi)):
        with pytest.raises(UserError, match="truncation_psi must be a finite number"):
            make(truncation_psi=psi)


def test_seeds_that_are_no_seeds_are_refused():
    with pytest.raises(UserError, match="seeds must be whole numbers"):
        PGGANInferer()(torch.rand(2), generator())
    with pytest.raises(UserError, match="seeds must be from 0 to 4294967295"):
        PGGANInferer()([-1], generator())


# ---------------------------------------------------------------- walks


@pytest.mark.parametrize("num_classes", [0, 2])
def test_walk_meets_the_image_of_each_seed_and_comes_back(num_classes):
    network = generator(num_classes)
    class_index = 1 if num_classes else None

    got = walk(network, [0, 1, 2, 3], seeds=[4, 8, 6], class_index=class_index)

    expected = images(network, [4, 8, 6, 4], [1] * 4 if num_classes else None)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_walk_is_on_the_great_circle():
    # cosines of the angles to both ends: 1/4 and 3/4 of the angle between them, by trigonometry alone
    network, seen = generator(), []
    network.blocks[0].dense.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    walk(network, [0.25], seeds=[4, 8])

    a, b = torch.nn.functional.normalize(draw_latents([4, 8], Z))
    x = torch.nn.functional.normalize(seen[0])[0]
    angle = math.acos(a @ b)
    assert math.acos(x @ a) == pytest.approx(angle / 4, abs=1e-4)
    assert math.acos(x @ b) == pytest.approx(3 * angle / 4, abs=1e-4)


def test_walk_is_continuous_at_its_seeds():
    network = generator(num_classes=2)

    before, at, after = walk(network, [0.9999, 1, 1.0001], seeds=[4, 8, 6], class_index=0)

    torch.testing.assert_close(before, at, atol=1e-3, rtol=0)
    torch.testing.assert_close(after, at, atol=1e-3, rtol=0)


def test_a_network_of_classes_needs_one():
    PGGANWalkInferer([1, 2]).check(generator())
    with pytest.raises(UserError, match="class_index must be from 0 to 1 for this network, got null"):
        PGGANWalkInferer([1, 2]).check(generator(num_classes=2))
    with pytest.raises(UserError, match="null for a network without classes, got 1"):
        PGGANWalkInferer([1, 2], class_index=1).check(generator())


# ---------------------------------------------------------------- levels


@pytest.fixture
def model(tmp_path) -> Path:
    """Weights grown to 16, with those of the end of levels 4 and 8 beside them."""
    network = generator()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    (tmp_path / "levels").mkdir()
    for resolution in (4, 8):
        network.grow(resolution)
        torch.save(network.state_dict(), tmp_path / "levels" / f"{resolution:04d}.pt")
    return tmp_path / "model.pt"


def test_weights_of_a_level_are_those_of_its_end(model):
    assert level_weights(model, None) == model
    assert level_weights(str(model), 16) == model
    assert level_weights(model, 8) == model.parent / "levels" / "0008.pt"


def test_levels_of_a_training_that_has_no_model_yet_can_be_used(model):
    model.unlink()

    assert level_weights(model, 4) == model.parent / "levels" / "0004.pt"
    assert level_weights(model, None) == model  # whoever reads it says that it is not there
    with pytest.raises(UserError, match=r"no weights for resolution 16: there is no .*model\.pt, .*levels holds those"):
        level_weights(model, 16)


def test_a_level_that_was_not_kept_is_named_with_those_that_were(model):
    (model.parent / "levels" / "0004.pt").unlink()
    (model.parent / "levels" / "notes.pt").touch()

    with pytest.raises(UserError, match=r"resolution 4: .*model\.pt is grown to 16, .*levels holds those of 8; set"):
        level_weights(model, 4)
    (model.parent / "levels" / "0008.pt").unlink()
    with pytest.raises(UserError, match=r"resolution 4: .* is grown to 16, .*levels holds none; set --resolution"):
        level_weights(model, 4)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")

    with pytest.raises(UserError, match=r"model\.pt belongs to another architecture: it lacks growth") as caught:
        level_weights(tmp_path / "model.pt", 8)
    assert "\n" not in str(caught.value)


def test_a_resolution_is_one_of_the_levels():
    check_resolution(None, (4, 8, 16))
    check_resolution(8, (4, 8, 16))
    for wrong in (12, 32, "8x", True, 2.5):
        with pytest.raises(UserError, match="resolution must be one of 4, 8, 16 for this network, or null for as far"):
            check_resolution(wrong, (4, 8, 16))
