"""Progressive GANs of three projects: outputs as a plain restatement of each gives them; nothing foreign is run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from test_stylegan2_pickle import make_snapshot as make_stylegan2_snapshot
from typer.testing import CliRunner

from medgen import cli
from medgen.convert import ConvertedPGGAN, convert_pggan, read_pggan_pickle
from medgen.errors import UserError
from medgen.networks import PGGANDiscriminator, PGGANGenerator

ASSETS = Path(__file__).parents[1] / "assets"
INFERENCE = Path(__file__).parents[2] / "bundles" / "cxr_pggan" / "configs" / "inference.json"
LATENT, WIDTHS = 7, (6, 5, 4)  # from 4×4 to 16×16; no two alike, so that no axis is taken for another

runner = CliRunner()


def built(converted: ConvertedPGGAN) -> torch.nn.Module:
    """In float64, so that what is left of a difference is the conversion's."""
    network = converted.network(**converted.settings).eval()
    network.load_state_dict(converted.state)
    return network.double()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def refused(convert: Callable[[], object]) -> str:
    """The message, which is one line."""
    with pytest.raises(UserError) as caught:
        convert()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def activated(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.2 * x)


class Values(dict):
    """Seeded random arrays by name; biases as large as weights, so that none is overlooked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)

    def draw(self, name: str, *shape: int) -> None:
        self[name] = self.random.standard_normal(shape).astype(np.float32)

    def module(self, name: str, *shape: int) -> None:
        """As PyTorch names them."""
        self.draw(f"{name}.weight", *shape)
        self.draw(f"{name}.bias", shape[0])


def tensors(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# official progressive GAN, restated: arrays as TensorFlow has them, full-sized images whatever lod is


def official_arrays(kind: str, lod: float, fused: bool = True, channels: int = 1, classes: int = 0) -> Values:
    values, levels = Values(ord(kind)), len(WIDTHS)

    def layer(scope: str, *shape: int, outputs: int | None = None) -> None:
        values.draw(f"{scope}/weight", *shape)
        values.draw(f"{scope}/bias", outputs or shape[-1])

    values["lod"] = np.float32(lod)  # TensorFlow gives a scalar, and no array, for a variable without a shape
    if kind == "G":
        layer("4x4/Dense", LATENT + classes, 16 * WIDTHS[0], outputs=WIDTHS[0])
        layer("4x4/Conv", 3, 3, WIDTHS[0], WIDTHS[0])
    else:
        layer("4x4/Conv", 3, 3, WIDTHS[0] + 1, WIDTHS[0])
        layer("4x4/Dense0", 16 * WIDTHS[0], WIDTHS[0])
        layer("4x4/Dense1", WIDTHS[0], 1 + classes)
    for level, width in enumerate(WIDTHS):
        side, below = 4 << level, WIDTHS[level - 1]
        if level and kind == "G":
            shape = (width, below) if fused else (below, width)
            layer(f"{side}x{side}/Conv0{'_up' if fused else ''}", 3, 3, *shape, outputs=width)
            layer(f"{side}x{side}/Conv1", 3, 3, width, width)
        elif level:
            layer(f"{side}x{side}/Conv0", 3, 3, width, width)
            layer(f"{side}x{side}/Conv1{'_down' if fused else ''}", 3, 3, width, below)
        if kind == "G":
            layer(f"ToRGB_lod{levels - 1 - level}", 1, 1, width, channels)
        else:
            layer(f"FromRGB_lod{levels - 1 - level}", 1, 1, channels, width)
    return values


class Official:
    """The arithmetic of the official layers, in TensorFlow's axes and in float64."""

    def __init__(self, values: Values, wscale: bool) -> None:
        self.arrays = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in values.items()}
        self.wscale = wscale

    def weight(self, scope: str, gain: float, fan_in: int) -> torch.Tensor:
        return self.arrays[f"{scope}/weight"] * (gain / math.sqrt(fan_in) if self.wscale else 1)

    def bias(self, scope: str) -> torch.Tensor:
        return self.arrays[f"{scope}/bias"]

    def conv(self, x: torch.Tensor, scope: str, gain: float = math.sqrt(2)) -> torch.Tensor:
        height, width, inputs, _ = self.arrays[f"{scope}/weight"].shape
        w = self.weight(scope, gain, height * width * inputs).permute(3, 2, 0, 1)
        return F.conv2d(x, w, padding=height // 2) + self.bias(scope)[:, None, None]

    def dense(self, x: torch.Tensor, scope: str, gain: float = math.sqrt(2)) -> torch.Tensor:
        return x @ self.weight(scope, gain, x.shape[1]) + self.bias(scope)

    @staticmethod
    def widened(w: torch.Tensor) -> torch.Tensor:
        """(3, 3, …) to (4, 4, …): the sum of the kernel at four places."""
        wide = w.new_zeros(4, 4, *w.shape[2:])
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wide[row : row + 3, column : column + 3] += w
        return wide

    def conv_up(self, x: torch.Tensor, scope: str) -> torch.Tensor:
        """A transposed convolution, whose weight has the output's channels before the input's."""
        w = self.widened(self.weight(scope, math.sqrt(2), 9 * x.shape[1])).permute(3, 2, 0, 1)
        return F.conv_transpose2d(x, w, stride=2, padding=1) + self.bias(scope)[:, None, None]

    def conv_down(self, x: torch.Tensor, scope: str) -> torch.Tensor:
        w = self.widened(self.weight(scope, math.sqrt(2), 9 * x.shape[1])).permute(3, 2, 0, 1) / 4
        return F.conv2d(x, w, stride=2, padding=1) + self.bias(scope)[:, None, None]

    def images(self, z: torch.Tensor, labels: torch.Tensor | None, fused: bool) -> torch.Tensor:
        """Every level blended in turn, at its size: what is above lod is given no weight."""
        x = z.double() if labels is None else torch.cat([z, labels], 1).double()
        x = normalised(x)
        w = self.weight("4x4/Dense", math.sqrt(2) / 4, x.shape[1])
        x = (x @ w).reshape(len(x), -1, 4, 4) + self.bias("4x4/Dense")[:, None, None]
        x = normalised(activated(x))
        x = normalised(activated(self.conv(x, "4x4/Conv")))
        levels, image = len(WIDTHS), None
        for level in range(levels):
            lod, scope = levels - 1 - level, f"{4 << level}x{4 << level}"
            if level:
                up = self.conv_up(x, f"{scope}/Conv0_up") if fused else self.conv(doubled(x), f"{scope}/Conv0")
                x = normalised(activated(up))
                x = normalised(activated(self.conv(x, f"{scope}/Conv1")))
            new = self.conv(x, f"ToRGB_lod{lod}", gain=1)
            old = float(torch.clamp(self.arrays["lod"] - lod, 0, 1)) if level else 0.0
            image = new if image is None else old * doubled(image) + (1 - old) * new
        return image

    def outputs(self, images: torch.Tensor, fused: bool, group_size: int) -> torch.Tensor:
        levels, image = len(WIDTHS), images.double()
        x = activated(self.conv(image, "FromRGB_lod0"))
        for level in range(levels - 1, 0, -1):
            lod, scope = levels - 1 - level, f"{4 << level}x{4 << level}"
            x = activated(self.conv(x, f"{scope}/Conv0"))
            if fused:
                x = activated(self.conv_down(x, f"{scope}/Conv1_down"))
            else:
                x = F.avg_pool2d(activated(self.conv(x, f"{scope}/Conv1")), 2)
            image = F.avg_pool2d(image, 2)
            old = float(torch.clamp(self.arrays["lod"] - lod, 0, 1))
            x = old * activated(self.conv(image, f"FromRGB_lod{lod + 1}")) + (1 - old) * x
        if group_size > 1:
            groups = x.reshape(min(group_size, len(x)), -1, *x.shape[1:])
            spread = ((groups - groups.mean(0)).square().mean(0) + 1e-8).sqrt().mean((1, 2, 3))
            spread = spread.repeat(len(groups))[:, None, None, None].expand(-1, 1, 4, 4)
            x = torch.cat([x, spread], 1)
        x = activated(self.conv(x, "4x4/Conv"))
        x = activated(self.dense(x.flatten(1), "4x4/Dense0"))
        return self.dense(x, "4x4/Dense1", gain=1)


class Network:
    """Pickles as ``tfutil.Network`` does."""

    def __init__(self, name: str, variables: dict, **settings: object) -> None:
        self.state = {"version": 2, "name": name, "static_kwargs": {"num_channels": 1, "resolution": 16, **settings}}
        self.state |= {"build_module_src": "raise SystemExit", "build_func_name": f"{name[0]}_paper"}
        self.state |= {"variables": list(variables.items())}

    def __getstate__(self) -> dict:
        return self.state


@contextlib.contextmanager
def named(network: type, module: str) -> Iterator[None]:
    """The module that a snapshot names, for as long as one is written."""
    before = network.__module__, network.__qualname__
    modules = [".".join(module.split(".")[: index + 1]) for index in range(module.count(".") + 1)]
    for name in modules:
        sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[module], network.__name__, network)
    network.__module__, network.__qualname__ = module, network.__name__
    try:
        yield
    finally:
        network.__module__, network.__qualname__ = before
        for name in modules:
            del sys.modules[name]


def written(path: Path, content: object, protocol: int = 4, module: str = "tfutil") -> Path:
    with named(Network, module):
        path.write_bytes(pickle.dumps(content, protocol))
    return path


def make_networks(lod: float = 0, fused: bool = True, channels: int = 1, classes: int = 0, **settings: object) -> tuple:
    settings = {"num_channels": channels, "label_size": classes, "fmap_base": 24, "fused_scale": fused, **settings}
    average = official_arrays("G", lod, fused, channels, classes)
    training = {name: value + 1 if name != "lod" else value for name, value in average.items()}
    discriminator = official_arrays("D", lod, fused, channels, classes)
    return (
        Network("G", training, latent_size=LATENT, **settings),
        Network("D", discriminator, **settings),
        Network("Gs", average, latent_size=LATENT, **settings),
    )


@pytest.fixture
def snapshot(tmp_path):
    return written(tmp_path / "network.pkl", make_networks())


CASES = {
    "fused, grey": {},
    "unfused, grey": {"fused": False},
    "fused, RGB, classes": {"channels": 3, "classes": 3},
    "unfused, classes": {"fused": False, "classes": 2},
    "weights as they are": {"use_wscale": False},
    "groups of two": {"mbstd_group_size": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("lod", [0.0, 0.25, 1.0, 1.625, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_official_snapshot_gives_the_images_and_scores_of_its_restatement(tmp_path, case, lod):
    networks = make_networks(lod, **CASES[case])
    fused, classes = CASES[case].get("fused", True), CASES[case].get("classes", 0)
    wscale, group_size = CASES[case].get("use_wscale", True), CASES[case].get("mbstd_group_size", 4)
    random = torch.Generator().manual_seed(0)
    z = torch.randn(8, LATENT, generator=random, dtype=torch.float64)
    labels = F.one_hot(torch.arange(8) % classes, classes) if classes else None

    weights = convert_pggan(written(tmp_path / "network.pkl", networks))
    generator, discriminator = built(weights.generator), built(weights.discriminator)

    assert isinstance(generator, PGGANGenerator)
    assert isinstance(discriminator, PGGANDiscriminator)
    assert discriminator.fused_scale is fused
    shrunk = 16 // generator.resolution
    assert shrunk == 1 << math.floor(lod)
    assert generator.alpha == discriminator.alpha == 1 - lod % 1
    expected = Official(dict(networks[2].state["variables"]), wscale).images(z, labels, fused)
    images = generator(z, labels)
    assert relative_error(images.repeat_interleave(shrunk, 2).repeat_interleave(shrunk, 3), expected) < 1e-5
    restated = Official(dict(networks[1].state["variables"]), wscale).outputs(expected, fused, group_size)
    outputs = discriminator(F.avg_pool2d(expected, shrunk))
    assert outputs.shape == (8, 1 + classes)
    assert relative_error(outputs, restated) < 1e-5


@torch.no_grad()
def test_network_without_minibatch_statistic_has_the_same_scores(tmp_path):
    networks = make_networks(mbstd_group_size=0)
    arrays = dict(networks[1].state["variables"])
    arrays["4x4/Conv/weight"] = arrays["4x4/Conv/weight"][:, :, :-1]
    networks[1].state["variables"] = list(arrays.items())
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    discriminator = built(convert_pggan(written(tmp_path / "network.pkl", networks)).discriminator)

    assert relative_error(discriminator(images), Official(arrays, True).outputs(images, True, 0)) < 1e-5


def test_moving_average_is_taken(tmp_path):
    networks = make_networks()
    alone = convert_pggan(written(tmp_path / "alone.pkl", networks[2]))

    weights = convert_pggan(written(tmp_path / "all.pkl", networks))
    without = convert_pggan(written(tmp_path / "two.pkl", networks[:2]))

    assert alone.discriminator is None
    for name, value in weights.generator.state.items():
        assert torch.equal(value, alone.generator.state[name])
    assert not torch.equal(weights.generator.state["to_rgb.0.bias"], without.generator.state["to_rgb.0.bias"])
    assert convert_pggan(tmp_path / "all.pkl", generator_only=True).discriminator is None


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(data)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012


@pytest.mark.parametrize("protocol", ["Python 2", 0, 1, 2, 3, 4, 5])
def test_every_protocol_and_both_spellings_of_numpy_are_read(tmp_path, protocol):
    path = tmp_path / "network.pkl"
    networks = make_networks(lod=0.5)
    if protocol == "Python 2":
        with named(Network, "tfutil"), open(path, "wb") as file:
            Python2Pickler(file, 2).dump(networks)
    else:
        written(path, networks, protocol)
    data, new, old = path.read_bytes(), b"numpy._core.", b"numpy.core."
    for spelling in (new, old) if protocol in (0, 1, 2, 3) else (None,):  # later, names have a length
        if spelling:
            path.write_bytes(data.replace(new, spelling).replace(old, spelling))

        average = read_pggan_pickle(path)[2]

        assert average.build_function == "G_paper"
        assert average.settings["latent_size"] == LATENT
        for name, value in networks[2].state["variables"]:
            assert torch.equal(average.variables[name], torch.from_numpy(np.array(value)))
    assert convert_pggan(path).generator.state["growth"].tolist() == [16, 0.5]


def test_arrays_in_every_order_of_bytes_and_axes_are_read(tmp_path):
    networks = make_networks()
    reordered = [(name, np.asfortranarray(value).astype(">f8")) for name, value in networks[2].state["variables"][1:]]
    networks[2].state["variables"][1:] = reordered
    expected = convert_pggan(written(tmp_path / "plain.pkl", make_networks())).generator.state

    state = convert_pggan(written(tmp_path / "reordered.pkl", networks)).generator.state

    assert all(torch.equal(state[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------------------------------
# official snapshots that are refused


@pytest.mark.parametrize(
    ("network", "setting", "value"),
    [
        (2, "use_pixelnorm", False),
        (2, "use_leakyrelu", False),
        (2, "normalize_latents", False),
        (2, "pixelnorm_epsilon", 1e-4),
        (2, "dtype", "bfloat16"),
        (2, "structure", "skip"),
        (2, "tanh_at_end", True),
        (2, "some_trick", 1),
        (2, "latent_size", LATENT - 1),
        (2, "resolution", 32),
        (2, "num_channels", 3),
        (1, "num_channels", 3),
        (1, "label_size", -1),
        (2, "label_size", None),
        (1, "use_wscale", "yes"),
        (1, "mbstd_group_size", 0.5),
    ],
)
def test_setting_that_would_change_the_outputs_is_refused_by_its_name(tmp_path, network, setting, value):
    networks = make_networks()
    networks[network].state["static_kwargs"][setting] = value
    path = written(tmp_path / "network.pkl", networks)

    assert setting in refused(lambda: convert_pggan(path))


@pytest.mark.parametrize(
    "setting", [{"dtype": "float16"}, {"structure": "linear"}, {"tanh_at_end": None}, {"fmap_max": 512}]
)
def test_setting_that_changes_nothing_is_accepted(tmp_path, setting):
    expected = convert_pggan(written(tmp_path / "plain.pkl", make_networks())).generator.state

    state = convert_pggan(written(tmp_path / "network.pkl", make_networks(**setting))).generator.state

    assert all(torch.equal(state[name], value) for name, value in expected.items())


def change(networks: tuple, network: int, name: str, value: object) -> None:
    arrays = dict(networks[network].state["variables"])
    arrays[name] = value
    networks[network].state["variables"] = [(name, value) for name, value in arrays.items() if value is not None]


@pytest.mark.parametrize(
    ("network", "name", "value", "message"),
    [
        (2, "8x8/Conv1/bias", None, "without 8x8/Conv1/bias"),
        (2, "8x8/Conv0_up/weight", None, "without 8x8/Conv0/weight"),
        (1, "4x4/Dense1/weight", None, "without 4x4/Dense1/weight"),
        (2, "lod", None, "without lod"),
        (2, "32x32/Noise/weight", np.zeros(3, np.float32), "with an unknown 32x32/Noise/weight"),
        (2, "16x16/Conv1/weight", np.zeros((3, 3, 4, 5), np.float32), "weight of 16x16/Conv1"),
        (2, "16x16/Conv1/weight", np.zeros((4, 4), np.float32), "in 4 dimensions, got torch.float32 of shape (4, 4)"),
        (2, "16x16/Conv1/bias", np.zeros(4, np.int32), "16x16/Conv1/bias"),
        (2, "4x4/Dense/bias", np.zeros(6 * 16, np.float32), "bias of 4x4/Dense"),
        (1, "4x4/Conv/bias", np.full(6, np.nan, np.float32), "must be finite"),
        (1, "4x4/Dense0/weight", np.zeros((96, 12), np.float32), "weight of 4x4/Dense0"),
        (1, "4x4/Dense1/weight", np.zeros((6, 2), np.float32), "weight of 4x4/Dense1"),
        (2, "lod", np.float32(2.5), "lod"),
        (2, "lod", np.float32(-1), "lod"),
    ],
)
def test_array_that_does_not_fit_is_refused_by_its_name(tmp_path, network, name, value, message):
    networks = make_networks()
    change(networks, network, name, value)
    path = written(tmp_path / "network.pkl", networks)

    assert message in refused(lambda: convert_pggan(path))


def test_array_under_many_names_is_refused_before_it_is_copied(tmp_path, monkeypatch):
    network = make_networks()[2]
    one = np.zeros((64, 64), np.float32)
    network.state["variables"] += [(f"more{number}", one) for number in range(1000)]
    copies = []
    monkeypatch.setattr("medgen.convert.pggan_pickle._tensor", lambda *_: copies.append(1))
    path = written(tmp_path / "network.pkl", network)

    assert "more than the file has bytes for" in refused(lambda: convert_pggan(path))
    assert not copies


def test_network_that_stands_in_a_snapshot_many_times_is_refused(tmp_path):
    network = make_networks()[2]
    path = written(tmp_path / "network.pkl", (network,) * 100)

    assert "more than the file has bytes for" in refused(lambda: convert_pggan(path))


def test_two_arrays_of_one_name_are_refused(tmp_path):
    networks = make_networks()
    networks[2].state["variables"].append(("lod", np.float32(1)))
    path = written(tmp_path / "network.pkl", networks)

    assert "must have each array once, got 'lod' more than once" in refused(lambda: convert_pggan(path))


def test_averaging_in_both_places_is_refused(tmp_path):
    networks = make_networks()
    arrays = dict(networks[1].state["variables"])
    for part in ("weight", "bias"):
        arrays[f"8x8/Conv1/{part}"] = arrays.pop(f"8x8/Conv1_down/{part}")
    networks[1].state["variables"] = list(arrays.items())
    path = written(tmp_path / "network.pkl", networks)

    assert "fused_scale" in refused(lambda: convert_pggan(path))
    assert convert_pggan(path, generator_only=True).generator is not None


def test_snapshots_of_relatives_are_named(tmp_path):
    networks = make_networks()
    theano = written(tmp_path / "theano.pkl", networks, module="network")
    stylegan = written(tmp_path / "stylegan.pkl", networks, module="dnnlib.tflib.network")
    ada = make_stylegan2_snapshot(tmp_path / "ada.pkl", "gray32")

    assert "Theano edition" in refused(lambda: convert_pggan(theano))
    assert "StyleGAN" in refused(lambda: convert_pggan(stylegan))
    assert "medgen convert stylegan2-ada" in refused(lambda: convert_pggan(ada))


@pytest.mark.parametrize(("key", "value"), [("version", 3), ("build_func_name", "G_style"), ("version", "2")])
def test_other_editions_are_refused(tmp_path, key, value):
    networks = make_networks()
    networks[2].state[key] = value
    path = written(tmp_path / "network.pkl", networks)

    assert key in refused(lambda: convert_pggan(path))


def test_source_code_is_neither_run_nor_kept(tmp_path):
    networks = make_networks()
    for network in networks:
        network.state["build_module_src"] = f"import pathlib; pathlib.Path({str(tmp_path / 'mark')!r}).touch()"
    path = written(tmp_path / "network.pkl", networks)

    convert_pggan(path)

    assert os.listdir(tmp_path) == ["network.pkl"]
    assert "pathlib" not in repr(read_pggan_pickle(path))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickle_is_not_run(tmp_path, protocol):
    networks = make_networks()
    networks[1].state["static_kwargs"]["run"] = Call(os.system, f"touch {tmp_path / 'mark'}")
    path = written(tmp_path / "network.pkl", networks, protocol)

    assert "it names posix.system" in refused(lambda: convert_pggan(path))
    assert os.listdir(tmp_path) == ["network.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        Call(np._core.multiarray.scalar, np.dtype("O"), None),
        Call(np._core.multiarray.scalar, np.dtype("f4"), b"123"),
        Call(np._core.numeric._frombuffer, b"1234", np.dtype("f4"), (2**31, 2**31), "C"),
        Call(np._core.numeric._frombuffer, "text", np.dtype("f4"), (1,), "C"),
        (1, 2, 3),
        [],
        {"G": None},
        "text",
    ],
)
def test_snapshot_of_something_else_is_one_line(tmp_path, content):
    (tmp_path / "network.pkl").write_bytes(pickle.dumps(content, 4))

    assert str(tmp_path / "network.pkl") in refused(lambda: convert_pggan(tmp_path / "network.pkl"))


def test_truncated_snapshot_is_one_line(snapshot):
    data = snapshot.read_bytes()
    for length in (1, 2, 50, len(data) // 2, len(data) - 1):
        snapshot.write_bytes(data[:length])

        assert "nothing in it was run" in refused(lambda: convert_pggan(snapshot))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"{}", b"PK\x03\x04" + bytes(40)])
def test_file_of_another_kind_is_one_line(tmp_path, data):
    (tmp_path / "file.pkl").write_bytes(data)

    refused(lambda: convert_pggan(tmp_path / "file.pkl"))


def test_absent_file_is_one_line(tmp_path):
    assert "No such file" in refused(lambda: convert_pggan(tmp_path / "absent.pkl"))


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch layouts, restated: a layer's whole output is multiplied by √(2 / fan_in)


class Equalised:
    """Modules by name, in float64."""

    def __init__(self, values: dict[str, np.ndarray], equalised: bool = True) -> None:
        self.values = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in values.items()}
        self.equalised = equalised

    def __call__(self, name: str, x: torch.Tensor, padding: int = 0) -> torch.Tensor:
        weight, bias = self.values[f"{name}.weight"], self.values[f"{name}.bias"]
        y = F.linear(x, weight, bias) if weight.ndim == 2 else F.conv2d(x, weight, bias, padding=padding)
        return y * math.sqrt(2 / weight[0].numel()) if self.equalised else y


def cxr_arrays(
    kind: str, channels: int = 3, widths: tuple[int, ...] = WIDTHS, wrapped: str = ".module", decisions: int = 1
) -> Values:
    values = Values(ord(kind))
    if kind == "G":
        values.module("latent_linear.0.module", 16 * widths[0], LATENT)
        values.module(f"init_conv.0{wrapped}", widths[0], widths[0], 3, 3)
    else:
        values.module(f"DecisionBlock.0{wrapped}", widths[0], widths[0] + 1, 3, 3)
        values.module(f"DecisionBlock.2{wrapped}", widths[0], widths[0], 4, 4)
        values.module("DecisionLinear.module", decisions, widths[0])
    for level, width in enumerate(widths):
        below, place = widths[level - 1], level - 1 if kind == "G" else len(widths) - 1 - level
        if level and kind == "G":
            values.module(f"ScaleBlocks.{place}.convolv.0{wrapped}", width, below, 3, 3)
            values.module(f"ScaleBlocks.{place}.convolv.3{wrapped}", width, width, 3, 3)
        elif level:
            values.module(f"ScaleBlocks.{place}.convolv.0{wrapped}", width, width, 3, 3)
            values.module(f"ScaleBlocks.{place}.convolv.2{wrapped}", below, width, 3, 3)
        if kind == "G":
            values.module(f"toRGB.{level}{wrapped}", channels, width, 1, 1)
        else:
            values.module(f"fromRGB.{level}{wrapped}", width, channels, 1, 1)
    return values


def cxr_images(
    values: dict[str, np.ndarray], z: torch.Tensor, alpha: float, equalised: bool = True, wrapped: str = ".module"
) -> torch.Tensor:
    """In [0, 1], nearly; alpha is the weight of the level before the last."""
    layer = Equalised(values, equalised)
    levels = sum(name.startswith("toRGB") for name in values) // 2
    x = activated(layer("latent_linear.0.module", normalised(z.double()))).reshape(len(z), -1, 4, 4)
    x = normalised(activated(layer(f"init_conv.0{wrapped}", x, 1)))
    for block in range(levels - 1):
        before = x
        x = normalised(activated(layer(f"ScaleBlocks.{block}.convolv.0{wrapped}", doubled(x), 1)))
        x = normalised(activated(layer(f"ScaleBlocks.{block}.convolv.3{wrapped}", x, 1)))
    image = layer(f"toRGB.{levels - 1}{wrapped}", x)
    if alpha:
        image = alpha * doubled(layer(f"toRGB.{levels - 2}{wrapped}", before)) + (1 - alpha) * image
    return image


def cxr_scores(values: dict[str, np.ndarray], images: torch.Tensor, alpha: float) -> torch.Tensor:
    layer = Equalised(values)
    levels = sum(name.startswith("fromRGB") for name in values) // 2
    x = layer(f"fromRGB.{levels - 1}.module", images.double())
    for block in range(levels - 1):
        x = activated(layer(f"ScaleBlocks.{block}.convolv.0.module", x, 1))
        x = F.avg_pool2d(activated(layer(f"ScaleBlocks.{block}.convolv.2.module", x, 1)), 2)
        if alpha and not block:
            x = alpha * layer(f"fromRGB.{levels - 2}.module", F.avg_pool2d(images.double(), 2)) + (1 - alpha) * x
    spread = ((x - x.mean(0)).square().mean(0) + 1e-8).sqrt().mean()
    x = torch.cat([x, spread.expand(len(x), 1, 4, 4)], 1)
    x = activated(layer("DecisionBlock.0.module", x, 1))
    x = activated(layer("DecisionBlock.2.module", x))
    return layer("DecisionLinear.module", x.flatten(1))


def cxr_file(path: Path, kind: str, values: Values, alpha: float = 0.0, **settings: object) -> Path:
    buffers = {"alpha": torch.tensor(alpha), "current_size": torch.tensor(16), "current_depth": torch.tensor(2)}
    common = {"channel_depth": list(WIDTHS), "init_bias": True, "equalize": True, "leakiness": 0.2}
    common |= {"z_dim": LATENT, "norm_layers": True} if kind == "G" else {"norm_layers": False, "minibatch": True}
    torch.save({"state_dict": {**buffers, **tensors(values)}, "settings": {**common, **settings}}, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_cxr_pggan_files_give_the_outputs_of_their_restatement(tmp_path, alpha):
    arrays = {kind: cxr_arrays(kind) for kind in "GD"}
    random = torch.Generator().manual_seed(0)
    z = torch.randn(6, LATENT, generator=random, dtype=torch.float64)
    images = torch.rand(6, 3, 16, 16, generator=random, dtype=torch.float64)

    generator, nothing = convert_pggan(cxr_file(tmp_path / "g.pth", "G", arrays["G"], alpha))
    no_generator, discriminator = convert_pggan(cxr_file(tmp_path / "d.pth", "D", arrays["D"], alpha))

    assert nothing is None
    assert no_generator is None
    expected = 2 * cxr_images(arrays["G"], z, alpha) - 1
    assert relative_error(built(generator)(z), expected) < 1e-5
    assert relative_error(built(discriminator)(2 * images - 1), cxr_scores(arrays["D"], images, alpha)) < 1e-5


@torch.no_grad()
def test_training_checkpoint_of_cxr_pggan_gives_moving_average_and_discriminator(tmp_path):
    arrays = {"generator": cxr_arrays("G"), "discriminator": cxr_arrays("D")}
    arrays["gen_shadow"] = {name: value[::-1].copy() for name, value in arrays["generator"].items()}
    state = {"img_size": torch.tensor(16), "fixed_z": torch.zeros(2, LATENT), "alpha": torch.tensor(0.25)}
    for network, values in arrays.items():
        state |= {f"{network}.{name}": torch.from_numpy(value) for name, value in values.items()}
        state |= {f"{network}.alpha": torch.tensor(0.25, dtype=torch.float64)}
    torch.save({"state_dict": state, "settings": {"alpha": torch.tensor(0.25)}}, tmp_path / "c.pth")
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    generator, discriminator = map(built, convert_pggan(tmp_path / "c.pth"))

    expected = 2 * cxr_images(arrays["gen_shadow"], z, 0.25) - 1
    assert relative_error(generator(z), expected) < 1e-5
    scores = cxr_scores(arrays["discriminator"], (expected + 1) / 2, 0.25)
    assert relative_error(discriminator(expected), scores) < 1e-5


@torch.no_grad()
def test_cxr_pggan_without_equalised_layers_and_at_4_pixels(tmp_path):
    values = cxr_arrays("G", widths=(6,), wrapped="")
    z = torch.randn(5, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = cxr_file(tmp_path / "g.pth", "G", values, equalize=False, channel_depth=[6])

    generator = built(convert_pggan(path).generator)

    assert generator.resolution == generator.image_size == 4
    expected = 2 * cxr_images(values, z, 0, equalised=False, wrapped="") - 1
    assert relative_error(generator(z), expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("G", {"leakiness": 0.1}, "leakiness"),
        ("G", {"norm_layers": False}, "norm_layers"),
        ("G", {"mode": "bilinear"}, "mode"),
        ("G", {"equalize": None}, "equalize"),
        ("G", {"channel_depth": [6, 5]}, "channel_depth"),
        ("D", {"norm_layers": True}, "norm_layers"),
    ],
)
def test_setting_of_cxr_pggan_that_is_not_had_here_is_refused_by_its_name(tmp_path, kind, settings, name):
    path = cxr_file(tmp_path / "n.pth", kind, cxr_arrays(kind), **settings)

    assert name in refused(lambda: convert_pggan(path))


def test_several_decisions_of_cxr_pggan_are_refused(tmp_path):
    path = cxr_file(tmp_path / "d.pth", "D", cxr_arrays("D", decisions=2))

    assert "decision_layer_dim" in refused(lambda: convert_pggan(path))


def zoo_arrays(
    kind: str, widths: tuple[int, ...] = WIDTHS, channels: int = 1, classes: int = 0, statistic: int = 1
) -> Values:
    values = Values(ord(kind))
    if kind == "G":
        values.module("formatLayer.module", 16 * widths[0], LATENT + classes)
        values.module("groupScale0.0.module", widths[0], widths[0], 3, 3)
    else:
        values.module("groupScaleZero.0.module", widths[0], widths[0] + statistic, 3, 3)
        values.module("groupScaleZero.1.module", widths[0], 16 * widths[0])
        values.module("decisionLayer.module", 1 + classes, widths[0])
    for level, width in enumerate(widths):
        shapes = (
            ((width, widths[level - 1]), (width, width))
            if kind == "G"
            else ((width, width), (widths[level - 1], width))
        )
        for index, shape in enumerate(shapes if level else ()):
            values.module(f"scaleLayers.{level - 1}.{index}.module", *shape, 3, 3)
        if kind == "G":
            values.module(f"toRGBLayers.{level}.module", channels, width, 1, 1)
        else:
            values.module(f"fromRGBLayers.{level}.module", width, channels, 1, 1)
    return values


def zoo_images(values: dict[str, np.ndarray], z: torch.Tensor, alpha: float, equalised: bool = True) -> torch.Tensor:
    layer = Equalised(values, equalised)
    levels = sum(name.startswith("toRGB") for name in values) // 2
    x = activated(layer("formatLayer.module", normalised(z.double()))).reshape(len(z), -1, 4, 4)
    x = normalised(activated(layer("groupScale0.0.module", normalised(x), 1)))
    for block in range(levels - 1):
        before, x = x, doubled(x)
        for index in (0, 1):
            x = normalised(activated(layer(f"scaleLayers.{block}.{index}.module", x, 1)))
    image = layer(f"toRGBLayers.{levels - 1}.module", x)
    if alpha:
        image = alpha * doubled(layer(f"toRGBLayers.{levels - 2}.module", before)) + (1 - alpha) * image
    return image


def zoo_outputs(
    values: dict[str, np.ndarray], images: torch.Tensor, alpha: float, equalised: bool = True
) -> torch.Tensor:
    layer = Equalised(values, equalised)
    levels = sum(name.startswith("fromRGB") for name in values) // 2
    x = activated(layer(f"fromRGBLayers.{levels - 1}.module", images.double()))
    for block in range(levels - 2, -1, -1):
        for index in (0, 1):
            x = activated(layer(f"scaleLayers.{block}.{index}.module", x, 1))
        x = F.avg_pool2d(x, 2)
        if alpha and block == levels - 2 > 0:  # never at 8×8
            old = activated(layer(f"fromRGBLayers.{levels - 2}.module", F.avg_pool2d(images.double(), 2)))
            x = alpha * old + (1 - alpha) * x
    if values["groupScaleZero.0.module.weight"].shape[1] > x.shape[1]:
        spread = [(group.var(0, correction=1) + 1e-8).sqrt().mean().expand(4, 1, 4, 4) for group in x.split(4)]
        x = torch.cat([x, torch.cat(spread)], 1)
    x = activated(layer("groupScaleZero.0.module", x, 1))
    x = activated(layer("groupScaleZero.1.module", x.flatten(1)))
    return layer("decisionLayer.module", x)


class BaseConfig:
    """The zoo's settings: an object with attributes."""


ZOO_CONFIG = {"leakyReluLeak": 0.2, "perChannelNormalization": True, "lossCriterion": "WGANGP", "equalizedlR": True}
ZOO_CONFIG |= {"alpha": 0, "categoryVectorDim": 0, "depthOtherScales": list(WIDTHS[1:]), "attribKeysOrder": None}


def zoo_file(path: Path, networks: dict[str, dict[str, np.ndarray]], legacy: bool = False, **settings: object) -> Path:
    config = BaseConfig()
    config.__dict__.update(ZOO_CONFIG | settings)
    content = {"config": config, **{name: tensors(values) for name, values in networks.items()}}
    with named(BaseConfig, "models.utils.config"):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    ("alpha", "widths", "settings"),
    [
        (0.0, WIDTHS, {}),
        (0.35, WIDTHS, {"legacy": True}),
        (1.0, WIDTHS, {}),
        (0.35, WIDTHS[:2], {}),
        (0, WIDTHS[:1], {}),
        (0.35, WIDTHS, {"equalizedlR": False}),
        (0.35, WIDTHS, {"lossCriterion": "Logistic"}),
    ],
)
def test_zoo_checkpoint_gives_the_outputs_of_its_restatement(tmp_path, alpha, widths, settings):
    networks = {"netD": zoo_arrays("D", widths), "avgG": zoo_arrays("G", widths)}
    networks["netG"] = {name: value + 1 for name, value in networks["avgG"].items()}
    equalised = settings.get("equalizedlR", True)
    z = torch.randn(4, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    weights = convert_pggan(zoo_file(tmp_path / "c.pt", networks, alpha=alpha, **settings))

    expected = zoo_images(networks["avgG"], z, alpha, equalised)
    assert relative_error(built(weights.generator)(z), expected) < 1e-5
    scores = zoo_outputs(networks["netD"], expected, alpha, equalised)
    assert relative_error(built(weights.discriminator)(expected), scores) < 1e-5


@torch.no_grad()
def test_groups_of_the_zoo_are_neighbours_and_here_quarters(tmp_path):
    values = zoo_arrays("D")
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quarters = torch.arange(8).reshape(2, 4).T.flatten()  # image i stands with i + 2, i + 4 and i + 6

    discriminator = built(convert_pggan(zoo_file(tmp_path / "c.pt", {"netD": values})).discriminator)

    expected = zoo_outputs(values, images, 0)
    assert relative_error(discriminator(images[quarters]), expected[quarters]) < 1e-5


@torch.no_grad()
def test_classes_of_the_zoo_are_its_first_outputs(tmp_path):
    networks = {"netG": zoo_arrays("G", channels=3, classes=3), "netD": zoo_arrays("D", channels=3, classes=3)}
    z = torch.randn(4, LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([2, 0, 1, 1])

    generator, discriminator = map(built, convert_pggan(zoo_file(tmp_path / "c.pt", networks, categoryVectorDim=3)))

    expected = zoo_images(networks["netG"], torch.cat([z, F.one_hot(labels, 3)], 1), 0)
    assert relative_error(generator(z, labels), expected) < 1e-5
    outputs = zoo_outputs(networks["netD"], expected, 0)
    got = discriminator(expected)
    assert relative_error(got[:, :1], outputs[:, :1]) < 1e-5
    assert relative_error(got[:, 1:], outputs[:, :3]) < 1e-5


@torch.no_grad()
def test_zoo_network_without_minibatch_statistic_has_the_same_scores(tmp_path):
    values = zoo_arrays("D", statistic=0)
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    discriminator = built(convert_pggan(zoo_file(tmp_path / "c.pt", {"netD": values})).discriminator)

    assert relative_error(discriminator(images), zoo_outputs(values, images, 0)) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"leakyReluLeak": 0.3},
        {"perChannelNormalization": False},
        {"lossCriterion": "DCGAN"},
        {"equalizedlR": 1},
        {"categoryVectorDim": "3"},
        {"alpha": 1.5},
        {"alpha": math.nan},
    ],
)
def test_setting_of_the_zoo_that_is_not_had_here_is_refused_by_its_name(tmp_path, settings):
    path = zoo_file(tmp_path / "c.pt", {"netG": zoo_arrays("G")}, **settings)

    assert next(iter(settings)) in refused(lambda: convert_pggan(path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scaleLayers.0.1.module.bias", None, "without scaleLayers.0.1.bias"),
        ("toRGBLayers.2.module.weight", np.zeros((2, 4, 1, 1), np.float32), "weight of toRGBLayers.2"),
        ("styleLayer.module.weight", np.zeros(2, np.float32), "with an unknown styleLayer.weight"),
        ("formatLayer.module.bias", np.full(96, np.inf, np.float32), "must be finite"),
    ],
)
def test_zoo_array_that_does_not_fit_is_refused_by_its_name(tmp_path, name, value, message):
    values = zoo_arrays("G")
    values[name] = value
    if value is None:
        del values[name]
    path = zoo_file(tmp_path / "c.pt", {"netG": values})

    assert message in refused(lambda: convert_pggan(path))


def test_hostile_torch_file_is_not_run(tmp_path):
    content = {"netG": tensors(zoo_arrays("G")), "config": Call(os.system, f"touch {tmp_path / 'mark'}")}
    torch.save(content, tmp_path / "c.pt")

    assert "it names posix.system" in refused(lambda: convert_pggan(tmp_path / "c.pt"))
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.parametrize("content", [{"model": {"weight": torch.zeros(2)}}, [torch.zeros(2)], {1: 2}])
def test_torch_file_of_another_network_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "c.pt")

    assert "expected a progressive GAN" in refused(lambda: convert_pggan(tmp_path / "c.pt"))


def test_generator_only_of_a_discriminator_is_one_line(tmp_path):
    path = zoo_file(tmp_path / "c.pt", {"netD": zoo_arrays("D")})

    assert "expected a generator" in refused(lambda: convert_pggan(path, generator_only=True))


# ---------------------------------------------------------------------------------------------------------------------
# arrays that the zoo's own code gave


@torch.no_grad()
@pytest.mark.parametrize("kind", ["npz", "torch"])
def test_reference_arrays_are_reproduced_at_both_alphas(tmp_path, kind):
    path = ASSETS / "pggan_gray32.npz"
    widths = json.loads((ASSETS / "pggan_configs.json").read_text())["gray32"]["channels_by_resolution"]
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    if kind == "torch":
        path = tmp_path / "bare.pt"
        torch.save({name: value for name, value in arrays.items() if name[:2] in ("G.", "D.")}, path)

    generator, discriminator = (built(network).float() for network in convert_pggan(path))

    assert generator.channels == discriminator.channels == tuple(widths.values())
    assert (generator.resolution, generator.alpha) == (32, 1)
    for old_weight in ("0.0", "0.4"):  # of the level before, there
        for network in (generator, discriminator):
            network.grow(32, 1 - float(old_weight))
        images, logits = arrays[f"image_alpha{old_weight}"], arrays[f"logits_alpha{old_weight}"]
        assert relative_error(generator(arrays["z"]), images) < 1e-4
        assert relative_error(discriminator(images), logits) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# command


def command(*arguments: object):
    return runner.invoke(cli.app, ["convert", "pggan", *map(str, arguments)])


@torch.no_grad()
def test_command_writes_both_networks_and_an_overlay_for_the_bundle(tmp_path):
    networks = make_networks(lod=0.5, channels=3, classes=2)
    source = written(tmp_path / "network.pkl", networks)
    output = tmp_path / "models" / "model.pt"

    result = command(source, "--output", output)

    assert result.exit_code == 0, result.stderr
    assert f"grown to 16 of 16 px, alpha 0.5 -> {output} for PGGANGenerator" in result.stdout
    config = ConfigParser.load_config_files([str(INFERENCE), str(output.with_suffix(".json"))])
    assert (config["in_channels"], config["num_classes"]) == (3, 2)
    parser = ConfigParser(
        {key: config[key] for key in ("in_channels", "num_classes", "network_def", "discriminator_def")}
    )
    generator = parser.get_parsed_content("network_def").eval()
    generator.load_state_dict(torch.load(output, weights_only=True))
    discriminator = parser.get_parsed_content("discriminator_def").eval()
    discriminator.load_state_dict(torch.load(output.with_name("discriminator.pt"), weights_only=True))
    assert generator.alpha == discriminator.alpha == 0.5
    z, labels = torch.randn(2, LATENT, generator=torch.Generator().manual_seed(0)), torch.eye(2)
    expected = Official(dict(networks[2].state["variables"]), True).images(z, labels, True)
    assert relative_error(generator(z, labels), expected) < 1e-4


def test_command_without_discriminator(snapshot, tmp_path):
    result = command(snapshot, "--output", tmp_path / "model.pt", "--generator_only")

    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.pt", "network.pkl"]
    assert "discriminator_def" not in json.loads((tmp_path / "model.json").read_text())


def test_generator_only_has_no_use_for_the_discriminators_path(snapshot, tmp_path):
    result = command(snapshot, "--output", tmp_path / "discriminator.pt", "--generator_only")

    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["discriminator.json", "discriminator.pt", "network.pkl"]


def test_command_with_a_discriminator_alone(tmp_path):
    source = cxr_file(tmp_path / "d.pth", "D", cxr_arrays("D"))

    result = command(source, "--output", tmp_path / "model.pt", "--discriminator", tmp_path / "critic.pt")

    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["critic.pt", "d.pth", "model.json"]
    assert list(json.loads((tmp_path / "model.json").read_text())) == [
        "in_channels",
        "num_classes",
        "discriminator_def",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SNAPSHOT", "--output", "OUT.pkl"), "error: --output must be a file that ends in .pt"),
        (("SNAPSHOT", "--output", "OUT.pt", "--discriminator", "d.bin"), "error: --discriminator must be a file that"),
        (("SNAPSHOT", "--output", "OUT.pt", "--discriminator", "OUT.pt"), "error: expected different files"),
        (("SNAPSHOT", "--output", "discriminator.pt"), "error: expected different files"),
        (("ABSENT", "--output", "OUT.pt"), "error: ABSENT cannot be read (No such file"),
        (("SNAPSHOT", "--output", "SNAPSHOT/model.pt"), "error: SNAPSHOT/model.pt cannot be written"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(snapshot, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    snapshot.rename("SNAPSHOT")

    result = command(*arguments)

    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["SNAPSHOT"]


@pytest.mark.parametrize("name", ["model.pt", "discriminator.pt", "model.json"])
def test_files_that_are_there_are_replaced_by_force_alone(snapshot, tmp_path, name):
    (tmp_path / name).write_text("mine")

    result = command(snapshot, "--output", tmp_path / "model.pt")

    assert result.exit_code == 1
    assert f"must be a new file, got {tmp_path / name}" in result.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(["network.pkl", name])
    assert command(snapshot, "--output", tmp_path / "model.pt", "--force").exit_code == 0
    assert (tmp_path / name).read_bytes() != b"mine"
