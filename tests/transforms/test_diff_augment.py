"""Differentiable augmentation: what each step can do and cannot, its gradient, and each image by itself."""

from __future__ import annotations

import pytest
import torch

from medgen.errors import UserError
from medgen.transforms import DiffAugment

ALL = "color,translation,cutout"
MANY = 400


def images(count: int = 4, channels: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_colours_are_an_affine_map_of_each_image_within_the_papers_ranges():
    torch.manual_seed(0)
    image = images(1).expand(MANY, -1, -1, -1).double()
    got = DiffAugment("color")(image)

    # brightness and contrast keep differences between pixels' mean over the channels: their ratio is the contrast
    grey, got_grey = image.mean(1), got.mean(1)
    contrast = (got_grey[:, 3, 5] - got_grey[:, 9, 2]) / (grey[:, 3, 5] - grey[:, 9, 2])
    # contrast keeps the mean over the image: what it moved is the brightness
    brightness = (got - image).mean((1, 2, 3))
    # differences between channels: contrast and saturation
    saturation = (got[:, 0, 3, 5] - got[:, 1, 3, 5]) / (image[:, 0, 3, 5] - image[:, 1, 3, 5]) / contrast
    for values, low, high in ((brightness, -0.5, 0.5), (saturation, 0, 2), (contrast, 0.5, 1.5)):
        assert low <= values.min() < low + 0.03 * (high - low)
        assert high - 0.03 * (high - low) < values.max() <= high + 1e-9
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
    # and nothing else has happened
    mean, each = image.mean((1, 2, 3)), [value[:, None, None] for value in (brightness, saturation, contrast)]
    for channel in range(3):
        colour = grey + each[1] * (image[:, channel] - grey) + each[0]
        offset = (mean + brightness)[:, None, None]
        torch.testing.assert_close(got[:, channel], (colour - offset) * each[2] + offset)


def test_grey_images_have_no_saturation():
    torch.manual_seed(0)
    image = images(6, 1)
    colour = image.expand(-1, 3, -1, -1)
    state = torch.get_rng_state()
    grey = DiffAugment("color")(image)
    torch.set_rng_state(state)
    torch.testing.assert_close(DiffAugment("color")(colour), grey.expand(-1, 3, -1, -1))


def test_translation_moves_whole_pixels_up_to_an_eighth_and_uncovers_zeros():
    torch.manual_seed(0)
    height, width = 16, 24
    image = images(1, 2, height, width).expand(MANY, -1, -1, -1)
    got = DiffAugment("translation")(image)

    padded, seen = torch.nn.functional.pad(image[0], (3, 3, 2, 2)), set()
    shifted = {
        (dy, dx): padded[:, 2 + dy : 2 + dy + height, 3 + dx : 3 + dx + width]
        for dy in range(-2, 3)
        for dx in range(-3, 4)
    }
    for item in got:
        (which,) = [shift for shift, expected in shifted.items() if torch.equal(item, expected)]
        seen.add(which)
    assert seen == set(shifted)  # each of the 35 has a chance of 1/35 in 400


def test_cutout_zeroes_a_rectangle_of_half_the_sides_around_any_pixel():
    torch.manual_seed(0)
    got = DiffAugment("cutout")(torch.ones(MANY, 1, 16, 24))[:, 0]

    seen = set()
    for item in got:
        assert set(item.unique().tolist()) <= {0.0, 1.0}
        rows, columns = (item == 0).any(1).nonzero()[:, 0], (item == 0).any(0).nonzero()[:, 0]
        top, bottom, left, right = (int(x) for x in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
        assert (item[top:bottom, left:right] == 0).all()
        # half the side, unless it reaches over an edge
        assert bottom - top == 8 or (bottom - top < 8 and (top == 0 or bottom == 16))
        assert right - left == 12 or (right - left < 12 and (left == 0 or right == 24))
        seen.add((top, bottom))
    assert {(0, 4), (8, 16), (4, 12), (12, 16)} <= seen


def test_gradient_is_that_of_finite_differences():
    image = images(1, 3, 8, 8).double().requires_grad_()

    def augmented(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return DiffAugment(ALL)(x)

    assert torch.autograd.gradcheck(augmented, image)


def test_an_image_depends_on_no_other_and_the_seed_alone_decides():
    image = images(5)
    other = image.clone()
    other[1:] = 0.25
    results = []
    for given in (image, other, image):
        torch.manual_seed(3)
        results.append(DiffAugment(ALL)(given))

    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    assert not torch.equal(DiffAugment(ALL)(image), results[0])
    assert (DiffAugment(ALL)(image[:1].expand(5, -1, -1, -1)).diff(dim=0).flatten(1).abs().amax(1) > 0).all()


def test_a_policy_is_any_of_the_steps_in_one_order():
    image = images()
    assert DiffAugment("none")(image) is image
    for policy in ("cutout, color", ("cutout", "color"), ["color", "cutout"]):  # a tuple: MONAI's command line
        assert DiffAugment(policy).policy == ["color", "cutout"]
    for wrong in ("colour", "", "color,color", "none,color", None, [3], "color,,cutout"):
        with pytest.raises(
            UserError, match=r"diff_augment must be none or some of color,translation,cutout, each once"
        ):
            DiffAugment(wrong)
