"""Walks between latents and mixtures of their styles."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.errors import UserError
from medgen.inferers import GeneratorInferer, LatentWalkInferer, StyleMixingInferer, mixing_cells, walk_positions
from medgen.inferers.latent_walk import NO_SEED, slerp
from medgen.networks import StyleGAN2Generator

SMALL = {"latent_dim": 8, "w_dim": 12, "num_mapping_layers": 2, "channel_base": 128, "channel_max": 16}


@pytest.fixture(scope="module")
def network() -> StyleGAN2Generator:
    torch.manual_seed(0)
    return StyleGAN2Generator(16, **SMALL).eval()


@pytest.fixture(scope="module")
def network_of_classes() -> StyleGAN2Generator:
    torch.manual_seed(0)
    return StyleGAN2Generator(16, num_classes=2, **SMALL).eval()


@torch.no_grad()
def walk(network: StyleGAN2Generator, positions: list[float], **settings) -> torch.Tensor:
    return LatentWalkInferer(**settings)(torch.tensor(positions, dtype=torch.float64), network)


@torch.no_grad()
def images(network: StyleGAN2Generator, seeds: list[int], label: int | None = None, **settings) -> torch.Tensor:
    labels = None if label is None else torch.full((len(seeds),), label)
    return GeneratorInferer(**settings)(torch.tensor(seeds), network, labels=labels)


def test_great_circle_is_walked_at_even_speed():
    a, b = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    steps = torch.linspace(0, 1, 9)

    points = slerp(a.expand(9, -1), b.expand(9, -1), steps)

    angle = math.acos(torch.nn.functional.cosine_similarity(a, b).item())
    torch.testing.assert_close(points.norm(dim=1), torch.ones(9))
    torch.testing.assert_close(
        torch.acos((points[:-1] * points[1:]).sum(1)), torch.full((8,), angle / 8), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(points[[0, -1]], torch.nn.functional.normalize(torch.cat([a, b])))


def test_great_circle_between_equal_directions_stays_there():
    a = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    points = slerp(a, 2 * a, torch.tensor([0.0, 0.3, 1.0]))

    torch.testing.assert_close(points, torch.nn.functional.normalize(a))


@pytest.mark.parametrize("space", ["w", "z"])
def test_walk_meets_the_image_of_each_seed(network, space):
    got = walk(network, [0, 1, 2], seeds=[4, 8, 6], space=space)

    torch.testing.assert_close(got, images(network, [4, 8, 6]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("space", ["w", "z"])
def test_walk_comes_back_to_its_first_seed(network, space):
    near_the_end, at_the_end = walk(network, [2.9999, 3], seeds=[4, 8, 6], space=space)

    torch.testing.assert_close(at_the_end, images(network, [4])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(near_the_end, at_the_end, atol=1e-2, rtol=0)


def test_way_through_w_is_straight(network):
    with torch.no_grad():
        ws = GeneratorInferer(truncation_psi=0.5).mapping([4, 8], network)
        expected = GeneratorInferer().synthesis((0.75 * ws[0] + 0.25 * ws[1])[None], network, [0])

    got = walk(network, [0.25], seeds=[4, 8], truncation_psi=0.5)

    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_frames_share_the_first_seeds_noise(network):
    torch.manual_seed(0)
    noisy = StyleGAN2Generator(16, **SMALL).eval()
    with torch.no_grad():
        for block in noisy.synthesis.blocks:
            for layer in block.convolutions():
                layer.noise_strength.fill_(0.3)

    got = walk(noisy, [0, 0, 1e-4], seeds=[4, 8], noise_mode="random")

    torch.testing.assert_close(got[0], images(noisy, [4], noise_mode="random")[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[0], got[2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("space", ["w", "z"])
def test_walk_within_a_class(network_of_classes, space):
    got = walk(network_of_classes, [0, 1], seeds=[4, 8], space=space, class_index=1)

    torch.testing.assert_close(got, images(network_of_classes, [4, 8], 1), atol=1e-5, rtol=0)


def write_record(path: Path, w: torch.Tensor) -> None:
    path.parent.mkdir(exist_ok=True)
    texts = {name: np.array("{}") for name in ("settings", "source")}
    np.savez(path, w=w.numpy(), loss_curve=np.zeros(1), steps=np.array(1), distance=np.array(0.0), **texts)


def test_folder_of_projections_is_walked_in_natural_order(network, tmp_path):
    for name, value in (("image10.npz", 2.0), ("image2.npz", 1.0), ("p1/image1.npz", 3.0)):
        write_record(tmp_path / name, torch.full((network.num_ws, network.w_dim), value))
    (tmp_path / "notes.txt").write_text("no record")

    for folder in (tmp_path, str(tmp_path), [tmp_path]):
        inferer = LatentWalkInferer(projections=folder)
        inferer.check(network)
        assert [w[0, 0].item() for w in inferer.projected] == [1, 2, 3]


def test_one_projection_is_no_walk(network, tmp_path):
    write_record(tmp_path / "a.npz", torch.zeros(network.num_ws, network.w_dim))
    (tmp_path / "empty").mkdir()

    for given, count in ((tmp_path, 1), (tmp_path / "a.npz", 1), (tmp_path / "empty", 0), ([], 0)):
        with pytest.raises(UserError, match=f"two or more records .*, got {count} from .*; set --projections"):
            LatentWalkInferer(projections=given)


def test_walk_between_projections(network, tmp_path):
    ws = torch.randn(2, network.num_ws, network.w_dim, generator=torch.Generator().manual_seed(0))
    for number, w in enumerate(ws):
        write_record(tmp_path / f"{number}.npz", w)
    inferer = LatentWalkInferer(projections=[tmp_path / "0.npz", tmp_path / "1.npz"])

    inferer.check(network)
    with torch.no_grad():
        got = inferer(torch.tensor([0, 0.5]), network)
        expected = GeneratorInferer().synthesis(torch.stack([ws[0], ws.mean(0)]), network, [0, 0])

    assert len(inferer) == 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"projections must hold w of shape \(8, 12\) for this network, got \(6, 12\)"):
        inferer.check(StyleGAN2Generator(32, **SMALL))


def test_positions_of_an_open_walk_end_at_the_last_seed():
    assert walk_positions(3, 5, closed=False) == [0, 0.5, 1, 1.5, 2]


def test_positions_of_a_closed_walk_stop_before_the_first_seed_comes_again():
    assert walk_positions(2, 4, closed=True) == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: walk_positions(1, 10, True), "an interpolation goes between two or more latents, got 1"),
        (lambda: walk_positions(3, 1, True), "frames must be at least 2, got 1"),
        (lambda: LatentWalkInferer([1, 2], space="x"), "space must be w or z, got 'x'"),
        (lambda: LatentWalkInferer(projections="x.npz", space="z"), "space must be w for projections"),
        (lambda: LatentWalkInferer(projections=["missing.npz"] * 2), "missing.npz is no whole record"),
        (lambda: LatentWalkInferer(projections=3), "projections must be a folder or a list of files, got 3"),
        (lambda: LatentWalkInferer([1, 2], truncation_psi=float("nan")), "truncation_psi must be a finite number"),
    ],
)
def test_walks_that_go_nowhere_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_network_of_classes_needs_one(network, network_of_classes):
    for inferer in (LatentWalkInferer([1, 2]), StyleMixingInferer([0])):
        inferer.check(network)
        with pytest.raises(UserError, match="class_index must be from 0 to 1 for this network, got null"):
            inferer.check(network_of_classes)
    with pytest.raises(UserError, match="null for a network without classes, got 1"):
        StyleMixingInferer([0], class_index=1).check(network)


def test_mixing_grid_has_its_sources_on_top_and_on_the_left():
    cells = mixing_cells([1, 2], [5, 6])

    assert [(cell["row"], cell["column"]) for cell in cells] == [
        (NO_SEED, NO_SEED), (NO_SEED, 5), (NO_SEED, 6),
        (1, NO_SEED), (1, 5), (1, 6),
        (2, NO_SEED), (2, 5), (2, 6),
    ]  # fmt: skip


@torch.no_grad()
def mixed(network: StyleGAN2Generator, row: int, column: int, layers: list[int], **settings) -> torch.Tensor:
    return StyleMixingInferer(layers, **settings)(torch.tensor([row]), network, columns=torch.tensor([column]))[0]


def test_sources_are_shown_as_they_are_and_the_corner_is_white(network):
    torch.testing.assert_close(mixed(network, 3, NO_SEED, [0, 1]), images(network, [3])[0])
    torch.testing.assert_close(mixed(network, NO_SEED, 7, [0, 1]), images(network, [7])[0])
    assert (mixed(network, NO_SEED, NO_SEED, [0]) == 1).all()


def test_layers_that_are_mixed_are_the_columns(network):
    with torch.no_grad():
        row, column = GeneratorInferer().mapping([3, 7], network)
        expected = GeneratorInferer().synthesis(torch.cat([column[:2], row[2:]])[None], network, [0])[0]

    torch.testing.assert_close(mixed(network, 3, 7, [0, 1]), expected)


def test_all_layers_mixed_make_the_columns_image(network_of_classes):
    every = list(range(network_of_classes.num_ws))

    got = mixed(network_of_classes, 3, 7, every, class_index=1)

    torch.testing.assert_close(got, images(network_of_classes, [7], 1)[0])


def test_layers_beyond_the_network_are_refused(network):
    with pytest.raises(UserError, match="layers must be from 0 to 5 for this network, got 6"):
        StyleMixingInferer([0, 6]).check(network)
