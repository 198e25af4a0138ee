"""Directions: their file, orthogonalisation, moves, SeFa and GANSpace."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medgen.apps import disentanglement
from medgen.apps.directions import Directions, ganspace, move, orthogonalise, sefa, unit
from medgen.errors import UserError
from medgen.networks import LatentGenerator, PGGANGenerator, StyleGAN2Generator

Z, W = 8, 6


def pggan(num_classes=0):
    torch.manual_seed(0)
    return LatentGenerator(PGGANGenerator((12, 8), latent_dim=Z, num_classes=num_classes), sha256="a" * 64)


def stylegan(space):
    torch.manual_seed(0)
    network = StyleGAN2Generator(
        16, latent_dim=Z, w_dim=W, num_mapping_layers=2, channel_base=128, channel_max=8, num_classes=0
    )
    return LatentGenerator(network, space, "b" * 64)


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(size=(50, 2, 3)) * [1, 2, 3]


@pytest.fixture
def directions(latents):
    found = Directions("w+", "c" * 64)
    random = np.random.default_rng(1)
    found.add_probe("Pneumonia", random.normal(size=(2, 3)), 0.5, latents, kind="label", auroc=0.8)
    found.add_probe("age", random.normal(size=(2, 3)), 50.0, latents, kind="age", r2=0.3)
    found.add("sefa_0", random.normal(size=(2, 3)), latents, kind="sefa", eigenvalue=2.0)
    return found


class TestDirections:
    def test_length_is_the_spread_of_the_latents_along_it(self, directions, latents):
        for name in directions.vectors:
            vector = directions.vector(name)
            length = np.linalg.norm(vector)
            projections = (latents * vector / length).sum((1, 2))
            assert projections.std(ddof=1) == pytest.approx(length, rel=1e-6)
            assert directions.records[name]["spread"] == pytest.approx(length, rel=1e-6)

    def test_probe_comes_back(self, latents):
        weight = np.arange(1.0, 7).reshape(2, 3)
        directions = Directions("w+", "")
        directions.add_probe("a", weight, -2.0, latents)

        found, bias = directions.probe("a")

        assert found == pytest.approx(weight, rel=1e-6)
        assert bias == -2
        assert directions.records["a"]["score_per_strength"] == pytest.approx((weight * directions.vector("a")).sum())

    def test_file_comes_back(self, directions, tmp_path):
        directions.write(tmp_path)

        for path in (tmp_path, tmp_path / "directions.safetensors"):
            found = Directions.read(path)
            assert (found.space, found.generator_sha256) == ("w+", "c" * 64)
            assert found.records == directions.records
            assert list(found.vectors) == list(directions.vectors)
            assert all(np.array_equal(found.vectors[name], directions.vectors[name]) for name in directions.vectors)
        listing = json.loads((tmp_path / "directions.json").read_text())
        assert listing["directions"]["Pneumonia"]["auroc"] == 0.8
        assert listing["shape"] == [2, 3]

    def test_directions_of_another_generator_are_refused(self, directions, tmp_path):
        directions.write(tmp_path)
        other = SimpleNamespace(sha256="d" * 64, space="w+", latent_shape=(2, 3))

        with pytest.raises(UserError, match="of the generator cccccccccccc, this one is dddddddddddd") as error:
            Directions.read(tmp_path, other)
        assert "\n" not in str(error.value)

    def test_directions_of_another_space_are_refused(self, directions, tmp_path):
        directions.write(tmp_path)
        other = SimpleNamespace(sha256="c" * 64, space="w", latent_shape=(1, 3))

        with pytest.raises(UserError, match=r"directions in w\+ of shape \(2, 3\)"):
            Directions.read(tmp_path, other)

    def test_unknown_name_tells_the_closest(self, directions):
        with pytest.raises(UserError, match=r"no direction 'pnuemonia' .* did you mean Pneumonia"):
            directions.vector("pnuemonia")

    def test_direction_without_probe_has_no_score(self, directions):
        with pytest.raises(UserError, match="sefa_0 is no probe but a direction of sefa; choose among Pneumonia, age"):
            directions.probe("sefa_0")

    @pytest.mark.parametrize("content", [b"", b"nonsense", None])
    def test_file_that_holds_none_is_refused(self, content, tmp_path):
        if content is not None:
            (tmp_path / "directions.safetensors").write_bytes(content)

        with pytest.raises(UserError, match="directions"):
            Directions.read(tmp_path)

    def test_name_that_is_there_already_is_refused(self, directions, latents):
        with pytest.raises(UserError, match="names of directions must differ, got sefa_0 twice"):
            directions.add("sefa_0", np.ones((2, 3)), latents)

    def test_chance_is_an_adjusted_p_of_5_percent(self, latents):
        directions = Directions("w+", "")
        for name, record in {"read": {"p_adjusted": 0.049}, "chance": {"p_adjusted": 0.05}, "unknown": {}}.items():
            directions.add(name, np.ones((2, 3)), latents, **record)

        assert [name for name in directions.vectors if directions.is_chance(name)] == ["chance"]

    def test_one_latent_has_no_spread(self):
        with pytest.raises(UserError, match="takes latents that differ, got 1"):
            Directions("z", "").add("a", np.ones((1, 4)), np.ones((1, 1, 4)))


class TestOrthogonalise:
    def test_is_the_residual_of_least_squares(self):
        random = np.random.default_rng(0)
        direction, held = random.normal(size=(2, 5)), [random.normal(size=(2, 5)) for _ in range(3)]

        found = orthogonalise(direction, held)

        a = np.stack([weight.ravel() for weight in held], 1)
        expected = direction.ravel() - a @ np.linalg.lstsq(a, direction.ravel(), rcond=None)[0]
        assert found.ravel() == pytest.approx(expected, abs=1e-12)
        assert np.abs(a.T @ found.ravel()).max() < 1e-12

    def test_weights_that_depend_on_each_other_are_held_once(self):
        held = [np.array([[1.0, 0, 0]]), np.array([[2.0, 0, 0]])]

        assert orthogonalise(np.array([[1.0, 1, 1]]), held)[0] == pytest.approx([0, 1, 1])

    def test_nothing_held_changes_nothing(self):
        direction = np.array([[1.0, 2]])
        assert orthogonalise(direction, []) is direction

    def test_nothing_left_is_an_error(self):
        with pytest.raises(UserError, match="nothing is left of the direction"):
            orthogonalise(np.array([[1.0, 1, 0]]), [np.array([[1.0, 0, 0]]), np.array([[0.0, 1, 0]])])


class TestMove:
    @pytest.fixture
    def on_sphere(self):
        x = np.random.default_rng(0).normal(size=(4, 1, 16))
        return x / np.sqrt((x**2).mean(2, keepdims=True))

    def test_flat_space_is_straight(self):
        latents, direction = np.ones((2, 1, 3)), np.array([[1.0, 0, 2]])

        moved = move(latents, direction, [-1, 0, 2])

        assert moved.shape == (2, 3, 1, 3)
        assert moved[0].tolist() == [[[0, 1, -1]], [[1, 1, 1]], [[3, 1, 5]]]

    def test_sphere_is_not_left(self, on_sphere):
        moved = move(on_sphere, 0.8 * unit(np.ones((1, 16))), [-5, -1, 0.3, 4], is_spherical=True)

        assert (moved**2).mean(3) == pytest.approx(1)

    def test_great_circle_has_the_length_of_the_straight_way(self, on_sphere):
        direction = 0.8 * unit(np.ones((1, 16)))

        moved = move(on_sphere, direction, [1.5], is_spherical=True)[:, 0]

        cosines = (moved * on_sphere).sum((1, 2)) / 16
        assert np.arccos(cosines) * 4 == pytest.approx(1.5 * 0.8)  # radius √16
        # in the plane of the latent and the direction
        for latent, after in zip(on_sphere, moved, strict=True):
            assert np.linalg.matrix_rank(np.concatenate([latent, after, direction]), tol=1e-9) == 2
        assert ((moved - on_sphere) * direction > 0).sum() > 0
        assert ((moved - on_sphere) * direction).sum((1, 2)).min() > 0

    @pytest.mark.parametrize("is_spherical", [False, True])
    def test_strength_0_is_the_latent_to_the_last_bit(self, on_sphere, is_spherical):
        held = [np.eye(16)[:1]]
        direction = orthogonalise(np.ones((1, 16)), held)

        assert np.array_equal(move(on_sphere, direction, [0], held, is_spherical)[:, 0], on_sphere)

    @pytest.mark.parametrize("is_spherical", [False, True])
    def test_held_scores_stay(self, on_sphere, is_spherical):
        random = np.random.default_rng(2)
        held = [random.normal(size=(1, 16)) for _ in range(3)]
        direction = unit(orthogonalise(random.normal(size=(1, 16)), held))

        moved = move(on_sphere, direction, [-3, 1, 3], held, is_spherical).astype(np.float32)

        for weight in held:
            before = (on_sphere * weight).sum((1, 2))[:, None]
            assert np.abs((moved * weight).sum((2, 3)) - before).max() < 1e-5
        assert np.abs((moved * direction).sum((2, 3)) - (on_sphere * direction).sum((1, 2))[:, None]).min() > 0.1

    def test_more_than_a_quarter_of_the_circle_is_refused(self, on_sphere):
        with pytest.raises(UserError, match=r"strengths must be at most 6.3 here, .* got 7"):
            move(on_sphere, np.eye(16)[:1], [-7, 1], is_spherical=True)

    def test_latent_along_the_direction_has_nowhere_to_go(self):
        with pytest.raises(UserError, match="nowhere to go"):
            move(2 * np.eye(4)[:1, None], np.eye(4)[:1], [1], is_spherical=True)


class TestSeFa:
    def test_is_the_closed_form_of_a_linear_generator(self):
        generator = pggan()
        # A = U S Vᵀ: its directions are V's columns
        left = np.linalg.qr(np.random.default_rng(0).normal(size=(16 * 12, Z)))[0]
        right = np.linalg.qr(np.random.default_rng(1).normal(size=(Z, Z)))[0]
        singular = np.arange(Z, 0, -1.0)
        dense = generator.network.blocks[0].dense
        dense.weight.copy_(torch.from_numpy(left * singular @ right.T / dense.weight_gain))

        found = sefa(generator, 3)

        for number, (direction, value) in enumerate(found):
            assert direction.shape == (1, Z)
            assert abs(direction[0] @ right[:, number]) == pytest.approx(1, abs=1e-6)
            assert value == pytest.approx(singular[number] ** 2, rel=1e-5)

    def test_class_is_no_direction(self):
        for direction, _ in sefa(pggan(num_classes=3), 4):
            assert direction.shape == (1, Z + 3)
            assert not direction[:, Z:].any()

    def test_chosen_styles_of_w_plus_alone_have_it(self):
        generator = stylegan("w+")
        affine = generator.network.synthesis.blocks[1].conv0.affine  # style 1
        matrix = (affine.weight * affine.weight_gain).double().numpy()

        (direction, value), *_ = sefa(generator, 2, [1])

        assert np.flatnonzero(direction.any(1)).tolist() == [1]
        assert value == pytest.approx(np.linalg.svd(matrix)[1][0] ** 2)
        assert np.linalg.norm(matrix @ direction[1]) ** 2 == pytest.approx(value)

    def test_last_style_is_that_of_the_image(self):
        generator = stylegan("w+")
        affine = generator.network.synthesis.blocks[-1].to_image.affine
        matrix = (affine.weight * affine.weight_gain).double().numpy()

        (_, value), *_ = sefa(generator, 1, [generator.latent_shape[0] - 1])

        assert value == pytest.approx(np.linalg.svd(matrix)[1][0] ** 2)

    def test_layers_that_are_not_there_are_refused(self):
        with pytest.raises(UserError, match="sefa_layers must be from 0 to 5"):
            sefa(stylegan("w"), 1, [6])
        with pytest.raises(UserError, match="sefa_layers must be null in the space z"):
            sefa(pggan(), 1, [0])

    def test_more_directions_than_there_are_is_refused(self):
        with pytest.raises(UserError, match=f"sefa_components must be from 1 to {Z}"):
            sefa(pggan(), Z + 1)


class TestGANSpace:
    @pytest.mark.parametrize("space", ["w", "w+"])
    def test_planted_covariance_is_found(self, space, monkeypatch):
        generator = stylegan(space)
        axes = np.linalg.qr(np.random.default_rng(0).normal(size=(W, W)))[0]
        deviations = np.array([8.0, 4, 2, 1, 0.5, 0.25])

        def planted(self, z, labels):
            w = z[:, :W] @ torch.from_numpy(axes * deviations).float().T + 5
            return w[:, None].expand(-1, self.latent_shape[0], -1)

        monkeypatch.setattr(LatentGenerator, "from_z", planted)

        found = ganspace(generator, 3, samples=4000)

        for number, (direction, share) in enumerate(found):
            assert direction.shape == generator.latent_shape
            assert (direction == direction[0]).all()  # every style alike
            assert abs(unit(direction[0]) @ axes[:, number]) > 0.99
            assert share == pytest.approx(deviations[number] ** 2 / (deviations**2).sum(), rel=0.1)

    def test_of_z_it_is_the_regression_from_the_components_of_a_block(self):
        generator = pggan()
        # a block that is linear: the components of A z lead back to A's right singular vectors
        matrix = torch.from_numpy(np.random.default_rng(0).normal(size=(64, Z)) * 2.0 ** -np.arange(Z)).float()

        class Linear(torch.nn.Module):
            def forward(self, z):
                return (z @ matrix.T).view(-1, 4, 4, 4)

        generator.network.blocks[0] = Linear()

        found = ganspace(generator, 3, samples=20_000, resolution=4)

        right = np.linalg.svd(matrix.numpy())[2]
        for number, (direction, _) in enumerate(found):
            assert abs(direction[0] @ right[number]) > 0.99

    def test_class_is_no_direction(self):
        for direction, _ in ganspace(pggan(num_classes=2), 2, samples=100):
            assert not direction[:, Z:].any()

    def test_same_seed_gives_the_same_directions(self):
        first, second = (ganspace(pggan(), 2, samples=200, seed=3) for _ in range(2))

        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))

    def test_more_directions_than_there_are_is_refused(self):
        with pytest.raises(UserError, match=f"ganspace_components must be from 1 to {W}"):
            ganspace(stylegan("w"), W + 1, samples=100)

    def test_features_are_those_of_the_resolution(self):
        deep, last, first = (ganspace(pggan(), 1, samples=200, resolution=side)[0] for side in (None, 8, 4))

        assert np.array_equal(deep[0], last[0])  # of a network of 8 pixels
        assert not np.allclose(last[0], first[0])

    def test_resolution_that_is_not_there_is_refused(self):
        with pytest.raises(UserError, match="ganspace_resolution must be one of 4, 8, got 16"):
            ganspace(pggan(), 1, samples=100, resolution=16)
        with pytest.raises(UserError, match="ganspace_resolution must be null in the space w"):
            ganspace(stylegan("w"), 1, samples=100, resolution=4)


class TestPicture:
    @pytest.fixture
    def drawn(self, monkeypatch, tmp_path):
        """Latents that are rendered for the picture of one direction that would change the class."""
        generator, rendered = pggan(num_classes=2), []
        random = np.random.default_rng(0)
        with torch.no_grad():
            z, classes = torch.from_numpy(random.normal(size=(40, Z))).float(), torch.arange(40) % 2
            latents = generator.from_z(z, classes).numpy()
        directions = Directions("z", "a" * 64)
        directions.add_probe("mass", random.normal(size=(1, Z + 2)), 0.0, latents, kind="label", p_adjusted=0.01)

        def render(generator, moved, batch_size):
            rendered.append(moved)
            return np.zeros((len(moved), 1, 8, 8))

        monkeypatch.setattr(disentanglement, "render", render)
        start, _ = disentanglement._start(None, generator, None, seed=3)
        arguments = (directions, latents, start, "seed 3", generator, 4)
        disentanglement._draw_directions(tmp_path / "directions.png", *arguments)
        assert (tmp_path / "directions.png").is_file()
        return start, rendered[0]

    def test_class_is_kept(self, drawn):
        start, moved = drawn

        assert moved[..., Z:] == pytest.approx(np.broadcast_to(start[..., Z:], moved[..., Z:].shape), abs=1e-9)
        assert np.abs(moved[:, 0, :Z] - start[:, :Z])[[0, -1]].max() > 0.5

    def test_starts_on_the_sphere(self, drawn):
        start, moved = drawn

        assert (start**2).mean() == pytest.approx(1, rel=1e-5)
        assert (moved**2).mean((1, 2)) == pytest.approx(1, rel=1e-5)


class TestNames:
    def test_metrics_of_one_name_are_refused(self):
        with pytest.raises(UserError, match="metrics of Lung Mass and lung_mass would have one name"):
            disentanglement._check_names(["Lung Mass", "lung_mass"], [], 0)
        with pytest.raises(UserError, match="metrics of mass and mass low would have one name"):
            disentanglement._check_names(["mass", "mass low"], [], 0)

    def test_label_called_as_a_direction_is_refused(self):
        for name in ("sefa_0", "ganspace_1"):
            with pytest.raises(UserError, match=f"{name} is what a direction without a label is called"):
                disentanglement._check_names([name], ["sefa_0"], 2)
        disentanglement._check_names(["Effusion", "age", "ganspace_2"], ["sefa_0"], 2)
