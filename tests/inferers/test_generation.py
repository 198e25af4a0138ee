"""Images from seeds: the same in any batch, truncated and noisy as asked, with or without classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen.errors import UserError
from medgen.inferers import GeneratorInferer, PrepareInputs, check_class, draw_latents, parse_numbers
from medgen.networks import StyleGAN2Generator

SMALL = {"latent_dim": 8, "w_dim": 12, "num_mapping_layers": 2, "channel_base": 128, "channel_max": 16}


def generator(num_classes: int = 0, out_channels: int = 1) -> StyleGAN2Generator:
    """Random weights that show what they should: noise counts, and the mean w is not zero."""
    torch.manual_seed(0)
    network = StyleGAN2Generator(16, out_channels, num_classes, **SMALL).eval()
    with torch.no_grad():
        network.w_avg.normal_()
        for block in network.synthesis.blocks:
            for layer in block.convolutions():
                layer.noise_strength.fill_(0.3)
            block.to_image.weight.mul_(0.2)  # keeps the images inside [-1, 1], where nothing is clipped
    return network


@torch.no_grad()
def images(network: StyleGAN2Generator, seeds: list[int], labels: list[int] | None = None, **settings) -> torch.Tensor:
    given = None if labels is None else torch.tensor(labels)
    return GeneratorInferer(**settings)(torch.tensor(seeds), network, labels=given)


def test_latents_are_those_of_the_papers_code():
    # the code of StyleGAN2's authors draws z of a seed alone, by NumPy's legacy generator
    expected = np.concatenate([np.random.RandomState(seed).randn(1, 512) for seed in (7, 0)])

    np.testing.assert_array_equal(draw_latents([7, 0], 512).numpy(), expected.astype(np.float32))


def test_output_is_the_networks_image_in_the_bundles_range():
    network = generator()
    with torch.no_grad():
        raw = network(draw_latents([3, 9], 8), noise="const")

    got = images(network, [3, 9])

    assert raw.abs().max() < 1
    torch.testing.assert_close(got, raw / 2 + 0.5, rtol=0, atol=0)


def test_output_is_clipped():
    network = generator()
    with torch.no_grad():
        network.synthesis.blocks[-1].to_image.bias.fill_(0.9)

    got = images(network, [0, 1])

    assert got.max() == 1
    assert got.min() >= 0


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_image_does_not_depend_on_its_batch(noise_mode, num_classes):
    network = generator(num_classes)
    seeds, labels = [5, 2, 11, 5], [0, 1, 2, 0]

    together = images(network, seeds, labels if num_classes else None, noise_mode=noise_mode)

    for number, seed in enumerate(seeds):
        alone = images(network, [seed], [labels[number]] if num_classes else None, noise_mode=noise_mode)
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_torchs_own_generator_is_neither_used_nor_moved():
    network = generator()
    torch.manual_seed(1)
    first = images(network, [1, 2], noise_mode="random")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = images(network, [1, 2], noise_mode="random")

    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_noise_has_a_stream_of_its_own(monkeypatch):
    # torch's and NumPy's Mersenne Twisters have one state for one seed: words in common would tie noise to z
    network, used = generator(), []
    monkeypatch.setattr(network, "draw_noise", lambda seeds: used.extend(seeds) or "none")

    images(network, [5, 6], noise_mode="random")

    assert len(set(used)) == 2
    for seed, derived in zip([5, 6], used, strict=True):
        of_z = np.random.RandomState(seed).randint(0, 2**32, size=6, dtype=np.uint32) % 2**24
        of_noise = torch.randint(0, 2**24, (6,), generator=torch.Generator().manual_seed(derived)).numpy()
        assert not (of_z == of_noise).any()


def test_noise_modes_differ_and_none_is_without_the_maps():
    network = generator()

    const, random, none = (images(network, [4], noise_mode=mode) for mode in ("const", "random", "none"))

    assert (const - random).abs().max() > 1e-3
    assert (const - none).abs().max() > 1e-3
    with torch.no_grad():
        for block in network.synthesis.blocks:
            for layer in block.convolutions():
                layer.noise.zero_()
    torch.testing.assert_close(images(network, [4], noise_mode="const"), none)


def test_truncation_to_nothing_gives_the_mean_image():
    network = generator()
    with torch.no_grad():
        mean = (network.synthesis(network.w_avg[None], "const")[0] / 2 + 0.5).clamp(0, 1)

    got = images(network, [1, 2], truncation_psi=0)

    torch.testing.assert_close(got, torch.stack([mean, mean]))


def test_truncation_keeps_the_layers_behind_the_cutoff():
    network = generator()
    inferer = GeneratorInferer(truncation_psi=0.5, truncation_cutoff=2)

    with torch.no_grad():
        full = GeneratorInferer().mapping([1], network)
        truncated = inferer.mapping([1], network)

    torch.testing.assert_close(truncated[:, :2], network.w_avg + 0.5 * (full[:, :2] - network.w_avg))
    torch.testing.assert_close(truncated[:, 2:], full[:, 2:], rtol=0, atol=0)


def test_classes_make_different_images_and_vectors_are_classes_too():
    network = generator(num_classes=3)

    by_index = images(network, [1, 1], [0, 2])
    with torch.no_grad():
        by_vector = GeneratorInferer()(torch.tensor([1, 1]), network, labels=torch.eye(3)[[0, 2]])

    assert (by_index[0] - by_index[1]).abs().max() > 1e-4
    torch.testing.assert_close(by_index, by_vector)


def test_seeds_may_come_beside_the_images_of_a_validation():
    network = generator()

    with torch.no_grad():
        got = GeneratorInferer()(torch.rand(2, 1, 16, 16), network, seeds=torch.tensor([8, 9]))

    torch.testing.assert_close(got, images(network, [8, 9]), rtol=0, atol=0)


def test_generation_leaves_the_running_mean_of_a_training_as_it_was():
    network = generator().train()
    before = network.w_avg.clone()

    images(network, [1, 2])

    assert torch.equal(network.w_avg, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation_psi": float("nan")}, "truncation_psi must be a finite number, got nan"),
        ({"truncation_psi": float("inf")}, "truncation_psi must be a finite number, got inf"),
        ({"truncation_psi": None}, "truncation_psi must be a finite number, got None"),
        ({"truncation_psi": [1]}, "truncation_psi must be a finite number"),
        ({"truncation_psi": "0.7x"}, "truncation_psi must be a finite number, got '0.7x'"),
        ({"truncation_cutoff": -1}, "truncation_cutoff must be a number of layers of at least 0"),
        ({"truncation_cutoff": 1.5}, "truncation_cutoff must be a number of layers of at least 0"),
        ({"noise_mode": "constant"}, "noise_mode must be const, random, none, got 'constant'"),
    ],
)
def test_settings_are_refused_at_construction(settings, message):
    with pytest.raises(UserError, match=message):
        GeneratorInferer(**settings)


def test_a_cutoff_beyond_the_network_is_refused_before_weights_are_read():
    network = generator()

    GeneratorInferer(truncation_cutoff=network.num_ws).check(network)
    with pytest.raises(UserError, match="truncation_cutoff must be from 0 to 6 layers for this network"):
        GeneratorInferer(truncation_cutoff=7).check(network)


@pytest.mark.parametrize("seeds", [torch.rand(2), torch.zeros(2, 1, 4, 4, dtype=torch.int64)])
def test_seeds_that_are_no_seeds_are_refused(seeds):
    with pytest.raises(UserError, match="seeds must be whole numbers"):
        GeneratorInferer()(seeds, generator())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UserError, match="seeds must be from 0 to 4294967295"):
        draw_latents([seed], 8)


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ("0-3", [0, 1, 2, 3]),
        ("1,5,7-9", [1, 5, 7, 8, 9]),
        (" 4 , 4 ", [4, 4]),
        (7, [7]),
        ("7", [7]),
        ((1, 2), [1, 2]),
        ([3, "8-9"], [3, 8, 9]),
        ("4294967295", [2**32 - 1]),
    ],
)
def test_ranges_of_numbers(given, numbers):
    assert parse_numbers(given, "seeds") == numbers


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "got ''"),
        ("1,,2", "got ''"),
        ("a-b", "got 'a-b'"),
        ("-3", "got '-3'"),
        ("1.5", "got '1.5'"),
        ("٣", "got"),
        (True, "got 'True'"),
        (1.5, "got '1.5'"),
        (None, "got 'None'"),
        ({1: 2}, "got"),
        ([1, [2]], "got"),
        ("9" * 5000, "got"),
        ([], "got none"),
        ("9-3", "ends before it begins"),
        ("0-4294967296", "got 4294967296"),
    ],
)
def test_numbers_that_are_none_are_refused(given, message):
    with pytest.raises(UserError, match=rf"seeds must be whole numbers from 0 to 4294967295.*{message}.*set --seeds"):
        parse_numbers(given, "seeds")


def test_a_huge_range_is_refused_before_it_fills_the_memory():
    with pytest.raises(UserError, match="got 99999999999999"):
        parse_numbers("0-99999999999999", "seeds")
    for given in ("0-4294967295", "0-999999,7"):
        with pytest.raises(UserError, match="seeds must be at most 1,000,000 numbers"):
            parse_numbers(given, "seeds")
    assert len(parse_numbers("1-1000000", "seeds")) == 1_000_000


def test_classes_that_do_not_exist_are_refused():
    check_class(None, 0)
    check_class(2, 3)
    with pytest.raises(UserError, match="null for a network without classes, got 0"):
        check_class(0, 0)
    for wrong in (3, -1, 1.0, True):
        with pytest.raises(UserError, match="from 0 to 2, or null"):
            check_class(wrong, 3)
    check_class(None, 0, required=True)
    with pytest.raises(UserError, match="class_index must be from 0 to 2 for this network, got null"):
        check_class(None, 3, required=True)


def test_an_evaluator_gets_the_keys_that_the_batch_has():
    prepare = PrepareInputs("seed", labels="label")

    assert prepare({"seed": 1, "label": 2, "name": "x"}, device="cpu") == (1, None, (), {"labels": 2})
    assert prepare({"seed": 1}) == (1, None, (), {})
