"""The protocol table: what a network receives for an image, to the ends of its range, and where weights are found."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from medgen.errors import UserError
from medgen.metrics.protocols import PROTOCOLS, find_weights, get_protocol, make_extractor

GREY = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 16, 16)


def random_image(channels: int, height: int, width: int) -> np.ndarray:
    levels = np.random.default_rng(3).integers(0, 256, (channels, height, width))
    return (levels / 255).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "shape", "black", "white"),
    [
        ("fid", (3, 299, 299), -1.0, 127 / 128),  # (0 - 128) / 128 and (255 - 128) / 128
        ("fid_tf", (3, 40, 30), 0, 255),
        ("xrv", (1, 224, 224), -1024.0, 1024.0),
    ],
)
def test_ends_of_the_range(name: str, shape: tuple[int, ...], black: float, white: float) -> None:
    protocol = get_protocol(name)

    ends = [protocol.prepare(np.full((1, 40, 30), value, np.float32)) for value in (0, 1)]

    assert ends[0].shape == ends[1].shape == shape
    np.testing.assert_allclose(ends[0], black, rtol=1e-6)
    np.testing.assert_allclose(ends[1], white, rtol=1e-6)


def test_fsd_ends_of_the_range_are_those_of_imagenet() -> None:
    protocol = get_protocol("fsd")

    black, white = (protocol.prepare(np.full((1, 50, 50), value, np.float32)) for value in (0, 1))

    assert black.shape == (3, 224, 224)
    np.testing.assert_allclose(black[:, 7, 9], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-5)
    np.testing.assert_allclose(white[:, 7, 9], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-5)


def test_xrv_range_is_that_of_its_library() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xrv = pytest.importorskip("torchxrayvision")
    image = random_image(1, 224, 224)

    prepared = get_protocol("xrv").prepare(image)

    np.testing.assert_allclose(prepared[0], xrv.utils.normalize(image[0] * 255, 255), atol=1e-3)


@pytest.mark.parametrize("size", [(512, 512), (150, 400), (64, 64)])
def test_clean_resizing_is_pillows_on_floats(size: tuple[int, int]) -> None:
    image = random_image(3, *size)

    prepared = get_protocol("fid").prepare(image)

    for plane, got in zip(image, prepared, strict=True):
        resized = Image.fromarray(plane * 255).resize((299, 299), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(got, (np.asarray(resized).clip(0, 255) - 128) / 128, atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), [("fid", "bicubic"), ("fsd", "bicubic"), ("xrv", "bilinear")])
def test_resizing_agrees_with_torchs_antialiased_filters(name: str, mode: str) -> None:
    image = random_image(1, 512, 512)
    protocol = replace(get_protocol(name), low=0.0, high=1.0, mean=None, std=None, clip=False)

    prepared = protocol.prepare(image)[0]

    side = protocol.size
    expected = F.interpolate(torch.from_numpy(image)[None], (side, side), mode=mode, antialias=True)
    np.testing.assert_allclose(prepared, expected[0, 0], atol=2e-5)


def test_cubic_overshoot_is_clipped_where_the_source_clips_it() -> None:
    edge = np.zeros((1, 512, 512), np.float32)
    edge[..., 256:] = 1

    clean_fid = get_protocol("fid").prepare(edge)
    studiogan = get_protocol("fsd").prepare(edge)
    own = get_protocol("module:x", feature_size=64, feature_range=(-1, 1)).prepare(edge)

    assert (clean_fid.min(), clean_fid.max()) == (-1, 127 / 128)
    assert (own.min(), own.max()) == (-1, 1)
    assert studiogan[0].min() < -0.485 / 0.229 - 0.01
    assert studiogan[0].max() > 0.515 / 0.229 + 0.01


def test_image_of_the_networks_size_is_not_resampled() -> None:
    image = random_image(1, 224, 224)

    np.testing.assert_allclose(get_protocol("xrv").prepare(image), image * 2048 - 1024, rtol=1e-6, atol=1e-3)


def test_tensorflow_protocol_gets_the_levels_of_the_file() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)

    prepared = get_protocol("fid_tf").prepare(levels / np.float32(255))

    assert prepared.dtype == np.uint8
    np.testing.assert_array_equal(prepared, np.repeat(levels, 3, axis=0))


def test_grey_is_repeated_and_colour_keeps_its_order() -> None:
    colour = np.stack([np.full((299, 299), value, np.float32) for value in (0.0, 0.5, 1.0)])

    grey = get_protocol("fid").prepare(GREY)
    prepared = get_protocol("fid").prepare(colour)

    np.testing.assert_array_equal(grey[0], grey[1])
    np.testing.assert_array_equal(grey[0], grey[2])
    np.testing.assert_allclose(prepared[:, 0, 0], [-1, -0.5 / 128, 127 / 128], atol=1e-6)


def test_colour_becomes_luma_where_a_network_takes_one_channel() -> None:
    colour = np.zeros((3, 224, 224), np.float32)
    colour[1] = 1

    prepared = get_protocol("xrv").prepare(colour)

    np.testing.assert_allclose(prepared, 0.587 * 2048 - 1024, rtol=1e-5)


@pytest.mark.parametrize(("role", "white"), [("reference", 1.0), ("samples", 255.0)])
def test_invalid_source_protocol_scales_each_side_as_the_source_did(role: str, white: float) -> None:
    protocol = get_protocol("xrv_ldm_source", role=role)

    prepared = protocol.prepare(np.ones((1, 96, 80), np.float32))

    assert prepared.shape == (1, 96, 80)
    np.testing.assert_array_equal(prepared, white)
    assert protocol.invalid
    assert protocol.settings["role"] == role


@pytest.mark.parametrize("protocol", ["frd_v1", "xrv_ldm_source"])
def test_role_that_is_none_is_refused(protocol: str) -> None:
    with pytest.raises(UserError, match="role must be reference or samples, got 'fake'"):
        get_protocol(protocol).with_role("fake")


def test_invalid_source_protocol_asks_for_the_role() -> None:
    protocol = get_protocol("xrv_ldm_source")

    for attempt in (
        lambda: protocol.prepare(GREY),
        lambda: make_extractor(protocol),
    ):
        with pytest.raises(UserError, match="treats reference and samples differently"):
            attempt()
    assert get_protocol("xrv").with_role("samples") is PROTOCOLS["xrv"]


def test_settings_tell_protocols_apart_and_stand_in_json() -> None:
    texts = {json.dumps(row.settings) for row in PROTOCOLS.values()}

    assert len(texts) == len(PROTOCOLS)
    assert get_protocol("module:a.ts", feature_size=64).settings != get_protocol("module:a.ts").settings


def test_widths_of_radiomics_are_those_of_their_extractors() -> None:
    for name in ("frd_v0", "frd_v1", "radiomics"):
        assert PROTOCOLS[name].width == len(make_extractor(PROTOCOLS[name]).feature_names)


def test_rows_can_be_sent_to_processes() -> None:
    for row in PROTOCOLS.values():
        assert pickle.loads(pickle.dumps(row)) == row


def test_module_takes_its_own_size_range_and_channels() -> None:
    protocol = get_protocol("module:net.ts", feature_size=32, feature_range=(-1, 1), feature_channels=3)

    prepared = protocol.prepare(np.ones((1, 64, 48), np.float32))
    untouched = get_protocol("module:net.ts").prepare(GREY)

    assert prepared.shape == (3, 32, 32)
    np.testing.assert_allclose(prepared, 1)
    np.testing.assert_array_equal(untouched, GREY)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fdi", {}, "protocol must be one of frd_v1"),
        ("module:", {}, "needs a path"),
        ("fid", {"feature_size": 64}, "feature_size is for module:PATH"),
        ("module:x", {"feature_range": (1, 1)}, "two different numbers"),
        ("module:x", {"feature_channels": 2}, "must be 1 or 3"),
        ("module:x", {"feature_size": 0}, "feature_size must be"),
    ],
)
def test_mistakes_are_named(name: str, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_protocol(name, **options)


def test_images_of_another_form_are_refused() -> None:
    for shape in ((16, 16), (2, 16, 16), (16, 16, 3)):
        with pytest.raises(UserError, match="an image must be"):
            get_protocol("xrv").prepare(np.zeros(shape, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# weights


def test_missing_weights_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    with pytest.raises(UserError) as caught:
        find_weights(get_protocol("fid"))

    said = str(caught.value)
    assert "\n" not in said
    folder = tmp_path / "hub" / "checkpoints"
    for part in (
        "needs pt_inception-2015-12-05-6726825d.pth (about 96 MB, SHA-256 6726825d...)",
        f"not found in {folder} as pt_inception",
        "or weights-inception-2015-12-05-6726825d.pth",
        "fetch it from https://github.com/",
        f"put it into {folder}, or name it with --weights fid=PATH",
    ):
        assert part in said
    with pytest.raises(UserError, match=r"not found at .*other\.pth; fetch it from"):
        find_weights(get_protocol("fid"), tmp_path / "other.pth")


def test_weights_are_found_where_torch_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "swav_800ep_pretrain.pth.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")

    found, digest = find_weights(get_protocol("fsd"))

    assert found == path
    assert len(digest) == 64
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert PROTOCOLS["fsd"].weights.search_folder == tmp_path / "other" / "torch" / "hub" / "checkpoints"


def test_weights_of_xrv_are_found_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    assert PROTOCOLS["xrv"].weights.search_folder == tmp_path / ".torchxrayvision" / "models_data"


def test_other_file_than_the_published_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"something else")

    with pytest.raises(UserError) as caught:
        find_weights(get_protocol("fid"), path)

    said = str(caught.value)
    assert "\n" not in said
    for part in (
        f"{path} is not the published",
        "(about 96 MB, SHA-256 6726825d...)",
        "it has 14 bytes and SHA-256 f41f3fa6...",  # sha256sum of that text
        "fetch it again from https://github.com/",
    ):
        assert part in said


def test_weights_for_a_protocol_without_any_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no weights"):
        find_weights(get_protocol("frd_v1"), tmp_path)
