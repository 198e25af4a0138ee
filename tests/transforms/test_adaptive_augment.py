"""Augmentation against torch.flip, rot90, numpy's reflection, scipy's spline look-up and colours by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import pywt
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter, map_coordinates

from medgen.data.stream import derive_seed
from medgen.errors import UserError
from medgen.transforms import AUGMENT_PRESETS, AdaptiveAugment, AugmentController
from medgen.transforms.adaptive_augment import RISE_IMAGES_TRANSFER, SYM6

NEUTRAL = {name: values[0] for name, values in AdaptiveAugment().draw(1).items()}
GEOMETRY = [
    "x_flip", "rotate_90", "integer_shift_x", "integer_shift_y", "scale", "pre_rotation", "anisotropy",
    "post_rotation", "fractional_shift_x", "fractional_shift_y",
]  # fmt: skip


def only(batch_size=1, **values):
    """Parameters that do nothing but what is named."""
    everything = {**NEUTRAL, **values}
    return {name: torch.as_tensor(value, dtype=torch.float64).expand(batch_size) for name, value in everything.items()}


def images(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def smooth_image(height, width, seed=0):
    return gaussian_filter(np.random.default_rng(seed).standard_normal((height, width)), 4, mode="mirror") * 8


# ---------------------------------------------------------------------------------------------------------------------
# pixel blitting: the very pixels


def test_x_flip_is_flip_along_the_width():
    x = images(2, 3, 9, 12)
    assert torch.equal(AdaptiveAugment()(x, only(2, x_flip=1)), x.flip(3))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("side", [8, 9])
def test_quarter_turns_are_rot90(side, turns):
    x = images(2, 3, side, side)
    assert torch.equal(AdaptiveAugment()(x, only(2, rotate_90=turns)), torch.rot90(x, turns, (2, 3)))


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-4, 5), (10, 14)])
def test_integer_shift_is_numpys_reflection_cut_out_elsewhere(right, down):
    height, width = 16, 20
    x = images(1, 1, height, width)
    padded = np.pad(x[0, 0].numpy(), 15, mode="reflect")
    expected = padded[15 - down : 15 - down + height, 15 - right : 15 - right + width]
    y = AdaptiveAugment()(x, only(integer_shift_x=right / width, integer_shift_y=down / height))
    np.testing.assert_array_equal(y[0, 0].numpy(), expected)


def test_integer_shift_rounds_to_whole_pixels():
    x = images(1, 1, 16, 16)
    assert torch.equal(
        AdaptiveAugment()(x, only(integer_shift_x=3.4 / 16)), AdaptiveAugment()(x, only(integer_shift_x=3 / 16))
    )


def test_each_image_of_a_batch_gets_its_own():
    x = images(4, 1, 12, 12)
    parameters = only(4, x_flip=[0, 1, 0, 0], rotate_90=[0, 0, 1, 0], post_rotation=[0, 0, 0, 0.3])
    y = AdaptiveAugment()(x, parameters)
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[1], x[1].flip(2))
    assert torch.equal(y[2], x[2].rot90(1, (1, 2)))
    alone = AdaptiveAugment()(x[3:], {name: value[3:] for name, value in parameters.items()})
    torch.testing.assert_close(y[3:], alone)


# ---------------------------------------------------------------------------------------------------------------------
# resampling


def content_matrix(parameters, index, height, width):
    """Where a pixel (x, y) goes: the paper's matrix G about the centre, from textbook matrices, y down."""

    def scale(x, y):
        return np.diag([x, y, 1.0])

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    def turn(angle):  # counter-clockwise on the screen
        return np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])

    v = {name: float(values[index]) for name, values in parameters.items()}
    matrix = scale(1 - 2 * v["x_flip"], 1)
    matrix = turn(v["rotate_90"] * np.pi / 2) @ matrix
    matrix = shift(round(v["integer_shift_x"] * width), round(v["integer_shift_y"] * height)) @ matrix
    matrix = scale(v["scale"], v["scale"]) @ matrix
    matrix = turn(v["pre_rotation"]) @ matrix
    matrix = scale(v["anisotropy"], 1 / v["anisotropy"]) @ matrix
    matrix = turn(v["post_rotation"]) @ matrix
    matrix = shift(v["fractional_shift_x"] * width, v["fractional_shift_y"] * height) @ matrix
    centre = shift((width - 1) / 2, (height - 1) / 2)
    return centre @ matrix @ np.linalg.inv(centre)


def source_positions(parameters, index, height, width):
    """(x, y) of the pixel that each pixel of the result shows."""
    y, x = np.mgrid[:height, :width]
    return np.tensordot(
        np.linalg.inv(content_matrix(parameters, index, height, width)), [x, y, np.ones_like(x)], axes=1
    )[:2]


@pytest.mark.parametrize(
    ("values", "tolerance"),
    [
        ({"post_rotation": 0.15}, 0.01),
        ({"pre_rotation": -2.5}, 0.01),
        ({"scale": 1.3}, 0.01),
        ({"scale": 0.7}, 0.02),
        ({"scale": 0.25}, 0.06),  # looks beyond one reflection
        ({"anisotropy": 1.2}, 0.01),
        ({"fractional_shift_x": 0.11, "fractional_shift_y": -0.083}, 0.01),
        ({"rotate_90": 1}, 0.01),  # falls between the pixels: width and height differ by an odd number
        ({"x_flip": 1, "rotate_90": 3, "integer_shift_x": 0.1, "scale": 0.9, "pre_rotation": 0.7,
          "anisotropy": 1.25, "post_rotation": -1.9, "fractional_shift_x": -0.07}, 0.02),
    ],
)  # fmt: skip
def test_resampling_is_scipys_quintic_spline_of_a_smooth_image_with_mirrored_borders(values, tolerance):
    image = smooth_image(48, 61)
    parameters = only(**values)
    x, y = source_positions(parameters, 0, *image.shape)
    expected = map_coordinates(image, [y, x], order=5, mode="mirror")
    result = AdaptiveAugment()(torch.from_numpy(image)[None, None], parameters)[0, 0].numpy()
    assert np.abs(result - expected).max() < tolerance * np.ptp(image)


def test_resampling_of_linear_ramps_is_exact():
    """sym6 has six vanishing moments: with its own centroid as centre, first-order polynomials are reproduced."""
    height, width = 40, 52
    ys, xs = np.mgrid[:height, :width].astype(float)
    augment = AdaptiveAugment.from_preset(
        "bgc", 1.0, integer_shift=0, integer_shift_max=0, fractional_shift_std=0.02, scale_std=0.1
    )
    parameters = {
        name: value if name in GEOMETRY else torch.full_like(value, float(NEUTRAL[name]))
        for name, value in augment.draw(16, torch.Generator().manual_seed(0)).items()
    }
    ramp = torch.from_numpy(2 * xs - 3 * ys)[None, None].expand(16, 1, -1, -1)
    y = augment(ramp, parameters)
    compared = 0
    for index in range(16):
        x_source, y_source = source_positions(parameters, index, height, width)
        inside = (np.minimum(x_source, width - 1 - x_source) > 8) & (np.minimum(y_source, height - 1 - y_source) > 8)
        compared += inside.sum()
        np.testing.assert_allclose(y[index, 0].numpy()[inside], (2 * x_source - 3 * y_source)[inside], atol=1e-9)
    assert compared > 16 * 500


def test_fractional_shift_by_a_whole_pixel_is_the_integer_shift():
    x = images(1, 1, 24, 32)
    y = AdaptiveAugment()(x, only(fractional_shift_x=3 / 32, fractional_shift_y=-2 / 24))
    expected = AdaptiveAugment()(x, only(integer_shift_x=3 / 32, integer_shift_y=-2 / 24))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)


def test_filter_is_pywavelets_sym6():
    np.testing.assert_allclose(SYM6, pywt.Wavelet("sym6").dec_lo, atol=1e-14)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (33, 20)])
def test_constant_images_stay_constant_under_every_geometric_transformation(size, channels):
    augment = AdaptiveAugment.from_preset("bgc", 1.0, brightness=0, contrast=0, luma_flip=0)
    x = torch.full((8, channels, *size), 0.37, dtype=torch.float64)
    torch.testing.assert_close(augment(x, augment.draw(8)), x, rtol=0, atol=1e-9)


def test_geometry_preserves_the_mean_of_random_images():
    augment = AdaptiveAugment.from_preset("bgc", 1.0, brightness=0, contrast=0, luma_flip=0)
    generator = torch.Generator().manual_seed(0)
    x = images(512, 1, 16, 16) + 0.5
    y = augment(x, augment.draw(512, generator))
    # pixels have standard deviation 0.58 and are at most averaged over 256: far less than 0.01 over 512 images
    assert abs(float(y.mean() - x.mean())) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# colour


def test_brightness_adds_and_contrast_multiplies_after_it():
    x = images(2, 3, 4, 4)
    y = AdaptiveAugment()(x, only(2, brightness=[0.3, -0.2], contrast=[1.0, 2.0]))
    torch.testing.assert_close(y, torch.stack([x[0] + 0.3, (x[1] - 0.2) * 2]))


def test_luma_flip_negates_the_grey_part_and_keeps_the_rest():
    x = images(2, 3, 4, 4)
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(AdaptiveAugment()(x, only(2, luma_flip=1)), x - 2 * grey)


@pytest.mark.parametrize(("turns", "order"), [(1, [2, 0, 1]), (2, [1, 2, 0])])
def test_a_third_of_a_turn_of_hue_exchanges_the_channels(turns, order):
    x = images(2, 3, 4, 4)
    torch.testing.assert_close(AdaptiveAugment()(x, only(2, hue=turns * 2 * math.pi / 3)), x[:, order])


def test_hue_keeps_grey_part_and_length():
    x = images(2, 3, 4, 4)
    y = AdaptiveAugment()(x, only(2, hue=0.4))
    torch.testing.assert_close(y.mean(1), x.mean(1))
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    assert (y - x).abs().max() > 0.1


def test_saturation_scales_the_distance_from_grey():
    x = images(2, 3, 4, 4)
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(AdaptiveAugment()(x, only(2, saturation=2.5)), grey + 2.5 * (x - grey))


def test_colour_steps_follow_the_order_of_the_paper():
    x = images(1, 3, 4, 4)
    values = {"brightness": 0.1, "contrast": 1.4, "luma_flip": 1, "hue": 0.8, "saturation": 0.6}
    expected = x
    for name, value in values.items():
        expected = AdaptiveAugment()(expected, only(**{name: value}))
    torch.testing.assert_close(AdaptiveAugment()(x, only(**values)), expected)


def test_one_channel_is_what_three_equal_ones_become():
    x = images(8, 1, 6, 6)
    parameters = AdaptiveAugment.from_preset("bgc", 1.0).draw(8, torch.Generator().manual_seed(0))
    colours = AdaptiveAugment()(x.expand(-1, 3, -1, -1), parameters)
    torch.testing.assert_close(AdaptiveAugment()(x, parameters), colours.mean(1, keepdim=True))


def test_one_channel_is_negated_by_luma_flip_and_left_alone_by_hue_and_saturation():
    x = images(2, 1, 6, 6)
    torch.testing.assert_close(AdaptiveAugment()(x, only(2, luma_flip=1)), -x)
    torch.testing.assert_close(AdaptiveAugment()(x, only(2, hue=1.2, saturation=3.0)), x)


# ---------------------------------------------------------------------------------------------------------------------
# drawing


@pytest.mark.parametrize("preset", list(AUGMENT_PRESETS))
@pytest.mark.parametrize("channels", [1, 3])
def test_p_of_zero_returns_the_very_numbers(preset, channels):
    x = images(4, channels, 8, 8, dtype=torch.float32)
    augment = AdaptiveAugment.from_preset(preset)
    assert augment(x) is x
    assert torch.equal(augment(x, augment.draw(4)), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_draw_nothing_keep_their_bits_beside_others_that_do(channels):
    x = images(3, channels, 8, 8, dtype=torch.float32)
    changed = [0.0, 0.5, 0.0]
    y = AdaptiveAugment()(x, only(3, post_rotation=changed, brightness=changed, hue=changed, luma_flip=[0, 1, 0]))
    assert torch.equal(y[[0, 2]], x[[0, 2]])
    assert not torch.equal(y[1], x[1])


@pytest.mark.parametrize("p", [0.1, 0.6, 1.0])
def test_each_transformation_strikes_with_its_own_probability(p):
    count = 20_000
    shares = {"contrast": 0.25, "hue": 0.5, "x_flip": 1.0}
    augment = AdaptiveAugment.from_preset("bgc", p, **shares)
    parameters = augment.draw(count, torch.Generator().manual_seed(0))
    each_rotation = 1 - math.sqrt(1 - p)  # before or after or both: p
    expected = {
        "x_flip": p / 2, "rotate_90": p * 3 / 4, "integer_shift_x": p, "integer_shift_y": p, "scale": p,
        "pre_rotation": each_rotation, "anisotropy": p, "post_rotation": each_rotation, "fractional_shift_x": p,
        "fractional_shift_y": p, "brightness": p, "contrast": p / 4, "luma_flip": p / 2, "hue": p / 2, "saturation": p,
    }  # fmt: skip
    assert expected.keys() == parameters.keys()
    struck = {name: parameters[name] != NEUTRAL[name] for name in expected}
    for name, probability in expected.items():
        bound = 4.5 * math.sqrt(probability * (1 - probability) / count)
        assert abs(float(struck[name].double().mean()) - probability) <= bound, name
    rotated = float((struck["pre_rotation"] | struck["post_rotation"]).double().mean())
    assert abs(rotated - p) <= 4.5 * math.sqrt(p * (1 - p) / count)
    # one gate for both axes of a shift, and gates of different transformations independent of each other
    assert torch.equal(struck["integer_shift_x"], struck["integer_shift_y"])
    both = float((struck["scale"] & struck["saturation"]).double().mean())
    assert abs(both - p * p) <= 4.5 * math.sqrt(p * p * (1 - p * p) / count)


def test_strengths_are_distributed_as_in_the_paper():
    count = 20_000
    v = AdaptiveAugment.from_preset("bgc", 1.0).draw(count, torch.Generator().manual_seed(0))
    normal = {
        "scale": (v["scale"].log2(), 0.2), "anisotropy": (v["anisotropy"].log2(), 0.2),
        "fractional_shift_x": (v["fractional_shift_x"], 0.125), "fractional_shift_y": (v["fractional_shift_y"], 0.125),
        "brightness": (v["brightness"], 0.2), "contrast": (v["contrast"].log2(), 0.5),
        "saturation": (v["saturation"].log2(), 1.0),
    }  # fmt: skip
    for name, (sample, std) in normal.items():
        assert abs(float(sample.mean())) < 5 * std / math.sqrt(count), name
        assert abs(float(sample.std()) / std - 1) < 5 / math.sqrt(2 * count), name
    uniform = {"integer_shift_x": 0.125, "pre_rotation": math.pi, "post_rotation": math.pi, "hue": math.pi}
    for name, largest in uniform.items():
        sample = v[name] / largest
        assert sample.abs().max() <= 1
        assert abs(float(sample.square().mean()) - 1 / 3) < 0.01, name
    for name, values in {"x_flip": 2, "rotate_90": 4, "luma_flip": 2}.items():
        share = torch.bincount(v[name].long(), minlength=values) / count
        assert len(share) == values
        assert (share - 1 / values).abs().max() < 0.02, name


def test_a_seed_repeats_the_draw_and_another_rank_gets_another():
    augment = AdaptiveAugment.from_preset("bgc", 0.7)

    def draw(rank):
        return augment.draw(8, torch.Generator().manual_seed(derive_seed(5, rank, 1600)))

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_higher_p_adds_to_what_a_lower_one_does():
    low, high = (AdaptiveAugment.from_preset("bgc", p).draw(500, torch.Generator().manual_seed(3)) for p in (0.3, 0.8))
    for name, values in low.items():
        struck = values != NEUTRAL[name]
        assert struck.any()
        assert torch.equal(high[name][struck], values[struck])


def test_forward_draws_from_torchs_own_generator():
    augment, x = AdaptiveAugment.from_preset("bgc", 1.0), images(4, 1, 16, 16)
    torch.manual_seed(7)
    parameters = augment.draw(4)
    torch.manual_seed(7)
    assert torch.equal(augment(x), augment(x, parameters))


def test_saved_parameters_replay_on_images_of_another_size():
    augment = AdaptiveAugment.from_preset("bgc", 1.0)
    parameters = augment.draw(4)
    file = io.BytesIO()
    torch.save(parameters, file)
    file.seek(0)
    replayed = torch.load(file, weights_only=True)
    for size in ((16, 16), (24, 16)):
        x = images(4, 3, *size)
        assert torch.equal(AdaptiveAugment()(x, replayed), augment(x, parameters))


# ---------------------------------------------------------------------------------------------------------------------
# presets


def test_radiographs_are_never_mirrored_turned_stretched_or_inverted():
    augment = AdaptiveAugment.from_preset("radiograph", 1.0)
    parameters = augment.draw(5000, torch.Generator().manual_seed(0))
    for name in ("x_flip", "rotate_90", "pre_rotation", "luma_flip", "hue"):
        assert not parameters[name].any(), name
    for name in ("anisotropy", "saturation"):
        assert (parameters[name] == 1).all(), name
    assert parameters["post_rotation"].abs().max() <= math.radians(10)
    assert (parameters["contrast"] > 0).all()


def test_an_asymmetric_image_stays_more_like_itself_than_like_its_mirror_image_on_the_radiograph_preset():
    side, count = 32, 500
    image = torch.zeros(side, side)
    image[1:9, 1:9] = 1  # a bright square, top left
    torch.manual_seed(0)
    y = AdaptiveAugment.from_preset("radiograph", 1.0)(image.expand(count, 1, -1, -1))[:, 0]

    def alike(other):
        return (y * other).sum((1, 2))

    assert (alike(image) > alike(image.flip(1))).all()  # left is left
    assert (alike(image) > alike(image.flip(0))).all()  # up is up


def test_a_preset_can_be_changed_and_an_own_one_be_made():
    changed = AdaptiveAugment.from_preset("radiograph", 0.5, rotation_max=3, contrast=0)
    assert changed.p == 0.5
    parameters = changed.draw(2000)
    assert parameters["post_rotation"].abs().max() <= math.radians(3)
    assert (parameters["contrast"] == 1).all()
    own = AdaptiveAugment(1.0, integer_shift=1, integer_shift_max=0.25).draw(2000)
    changing = [name for name, values in own.items() if (values != NEUTRAL[name]).any()]
    assert changing == ["integer_shift_x", "integer_shift_y"]
    assert 0.24 < own["integer_shift_x"].abs().max() <= 0.25


# ---------------------------------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("channels", [1, 3])
def test_first_and_second_derivatives_are_those_of_finite_differences(channels):
    augment = AdaptiveAugment()
    x = images(3, channels, 4, 5).requires_grad_()
    # one image only coloured, one blitted, one resampled
    parameters = only(
        3, x_flip=[0, 1, 1], integer_shift_y=[0, 0.3, 0.2], post_rotation=[0, 0, 0.4], scale=[1, 1, 0.8],
        contrast=[1.3, 0.7, 1.1], hue=[0.3, 0, -0.8], luma_flip=[0, 1, 0],
    )  # fmt: skip
    assert torch.autograd.gradcheck(lambda x: augment(x, parameters), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, parameters).tanh(), x)


def test_r1_through_the_augmentation_is_that_of_its_matrix():
    """D(A x) = Σ tanh(w · A x): the penalty ‖Aᵀ (w · tanh')‖² and its gradient by w, with A taken out as a matrix."""
    augment = AdaptiveAugment()
    parameters = only(post_rotation=0.5, anisotropy=1.2, brightness=0.1, fractional_shift_x=0.1)
    offset = augment(torch.zeros(1, 1, 8, 8, dtype=torch.float64), parameters).flatten()
    columns = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    matrix = torch.stack([augment(column[None], parameters).flatten() - offset for column in columns], 1)
    x, w = images(1, 1, 8, 8).requires_grad_(), images(64, seed=1).requires_grad_()

    (gradient,) = torch.autograd.grad((w * augment(x, parameters).flatten()).tanh().sum(), x, create_graph=True)
    penalty = gradient.square().sum()
    (by_w,) = torch.autograd.grad(penalty, w)

    slope = w / (w * (matrix @ x.flatten() + offset)).cosh().square()
    expected = (matrix.T @ slope).square().sum()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(by_w, torch.autograd.grad(expected, w)[0])


# ---------------------------------------------------------------------------------------------------------------------
# types and errors


def test_bfloat16_and_autocast_compute_in_float32():
    augment, x = AdaptiveAugment(), images(2, 3, 16, 16, dtype=torch.float32)
    parameters = only(2, post_rotation=0.3, contrast=1.5, hue=0.4)
    expected = augment(x, parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x, parameters), expected)
    low = x.bfloat16()
    y = augment(low, parameters)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, augment(low.float(), parameters).bfloat16())


def test_a_metatensor_comes_out_as_a_plain_tensor_with_the_same_numbers():
    x = images(2, 1, 16, 16)
    parameters = only(2, x_flip=[0, 1], post_rotation=[0.3, 0])
    y = AdaptiveAugment()(MetaTensor(x), parameters)
    assert type(y) is torch.Tensor
    assert torch.equal(y, AdaptiveAugment()(x, parameters))


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (1, 8, 8), (1, 1, 1, 8)])
def test_images_of_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match="1 or 3 channels"):
        AdaptiveAugment.from_preset("bgc", 0.5)(torch.zeros(shape))


def test_parameters_of_another_batch_are_refused():
    with pytest.raises(UserError, match="shape \\(3,\\)"):
        AdaptiveAugment()(torch.zeros(3, 1, 8, 8), only(2))
    incomplete = only(3)
    del incomplete["hue"]
    with pytest.raises(UserError, match="; hue do not"):
        AdaptiveAugment()(torch.zeros(3, 1, 8, 8), incomplete)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.2}, "p must be a probability"),
        ({"p": math.nan}, "p must be a probability"),
        ({"hue": -0.1}, "hue must be a probability"),
        ({"scale_std": -1}, "scale_std must be 0 or more"),
    ],
)
def test_settings_outside_their_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        AdaptiveAugment(**arguments)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="none, bgc, radiograph, got 'bg'"):
        AdaptiveAugment.from_preset("bg")


# ---------------------------------------------------------------------------------------------------------------------
# control loop


def test_controller_follows_the_trajectory_worked_out_by_hand():
    augment = AdaptiveAugment.from_preset("bgc")
    controller = AugmentController(augment, target=0.6, interval=4, rise_images=1000)
    # batches of 10 real images, 8 of 10 signs positive on balance: r_t = 0.8 > 0.6, so p rises by 40 / 1000
    trajectory = []
    for sign_sum in [8] * 8 + [2] * 4 + [6] * 4 + [0] * 8:
        controller.update(sign_sum, 10)
        trajectory.append(round(augment.p, 10))
    rises = [0, 0, 0, 0.04, 0.04, 0.04, 0.04, 0.08]
    falls, stays, falls_to_zero = [0.08, 0.08, 0.08, 0.04], [0.04] * 4, [0.04] * 3 + [0.0] * 5
    assert trajectory == rises + falls + stays + falls_to_zero
    assert controller.overfitting == 0.0


def test_p_rises_to_one_within_the_images_of_the_setting_and_not_beyond():
    augment = AdaptiveAugment()
    controller = AugmentController(augment, rise_images=RISE_IMAGES_TRANSFER)
    for _ in range(100_000 // 500 - 4):
        controller.update(torch.tensor(500.0), 500)
    assert augment.p == pytest.approx(0.98)
    for _ in range(12):
        controller.update(torch.tensor(500.0), 500)
    assert augment.p == 1.0


def test_sums_over_processes_are_those_of_one_process():
    logits = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) + 0.9
    one, two = AdaptiveAugment(0.5), AdaptiveAugment(0.5)
    whole, shared = AugmentController(one, rise_images=500), AugmentController(two, rise_images=500)
    trajectories = []
    for batch in logits:
        whole.update(batch.sign().sum(), 32)
        shared.update(sum(part.sign().sum() for part in batch.split([20, 12])), 32)
        trajectories.append((one.p, two.p))
    assert all(a == b for a, b in trajectories)
    assert len({p for p, _ in trajectories}) > 2


def test_an_interrupted_controller_goes_on_from_its_saved_state():
    signs = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(8).round().add(18)
    undisturbed = AugmentController(AdaptiveAugment(0.5), rise_images=2000)
    for value in signs:
        undisturbed.update(value, 32)
    before = AugmentController(AdaptiveAugment(0.5), rise_images=2000)
    for value in signs[:18]:
        before.update(value, 32)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = AugmentController(AdaptiveAugment(), rise_images=2000)
    after.load_state_dict(torch.load(file, weights_only=True))
    for value in signs[18:]:
        after.update(value, 32)
    assert after.state_dict() == undisturbed.state_dict()
    assert after.augment.p not in {0.0, 0.5, 1.0}


def test_a_discriminator_that_gives_no_numbers_does_not_move_p():
    controller = AugmentController(AdaptiveAugment(0.3), interval=1, rise_images=100)
    controller.update(torch.tensor(math.nan), 32)
    assert controller.augment.p == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"target": 1.0}, "target"), ({"interval": 0}, "interval"), ({"rise_images": 0}, "rise_images")],
)
def test_controller_settings_outside_their_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        AugmentController(AdaptiveAugment(), **arguments)
